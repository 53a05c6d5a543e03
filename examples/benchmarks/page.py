"""Does `bolid ui` keep its clients apart, and its memory?

    python examples/benchmarks/page.py                              # 20 clients, three rounds, about ten minutes
    python examples/benchmarks/page.py --clients 5 --rounds 1

Starts the page on a free port. In each round all clients ask at once, each for a person, prompt and seed of its own,
over the HTTP API. A picture is wrong unless its pixels are those that `bolid.api.generate` makes of the same request
alone, after the page has ended. Prints JSON: pictures, wrong ones, seconds a picture, the server's resident memory
after each round, and the seconds from typing the command to the first picture, with the processor time in them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PEOPLE = 4
PLACES = ("on a beach", "in the snow", "in a street", "in a room")
COLORS = ("red", "green", "blue", "yellow", "white", "black")


def call(address: str, function: str, **arguments: Any) -> Any:
    """What a function of the page returns."""
    request = urllib.request.Request(
        f"{address}gradio_api/call/v2/{function}", json.dumps(arguments).encode(), {"Content-Type": "application/json"}
    )
    job = json.loads(urllib.request.urlopen(request).read())["event_id"]
    kind = ""
    with urllib.request.urlopen(f"{address}gradio_api/call/{function}/{job}") as answer:
        for line in answer:
            name, _, text = line.decode().strip().partition(": ")
            if name == "event":
                kind = text
            elif name == "data" and kind in ("complete", "error"):
                data = json.loads(text)
    if kind != "complete":
        raise SystemExit(f"{function}: {data}")
    return data[0]


def request(client: int, turn: int, steps: int | None) -> dict[str, Any]:
    """What a client asks for in a round: no two ask for the same."""
    number = client + 100 * turn
    prompt = f"a full body photo of a person, in a {COLORS[number % 6]} top, {PLACES[number // 6 % 4]}"
    people = [f"p{number % PEOPLE}"] if number % 5 else []
    return {"prompt": prompt, "people": people, "seed": number, "steps": steps}


def ask(address: str, wanted: dict[str, Any]) -> np.ndarray:
    """The picture that a client gets."""
    _, (file,) = call(address, "generate", **wanted)
    with urllib.request.urlopen(f"{address}gradio_api/file={file['path']}") as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def resident(process: subprocess.Popen[str]) -> float:
    """MiB of a process."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor(process: subprocess.Popen[str]) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the sampling; fewer are quicker")
    options = parser.parse_args()
    got: list[tuple[dict[str, Any], np.ndarray]] = []
    memory, took = [], []
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "bolid_cli.main", "ui", "--no-browser", "--port", "0", "--folder", "work"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            address = process.stdout.readline().strip()  # type: ignore[union-attr]
            call(address, "generate", prompt="a portrait of a person", people=[])
            first, spent = time.monotonic() - began, processor(process)
            for number in range(PEOPLE):
                known = {"height": str(160 + 8 * number), "waist": str(66 + 8 * number)}
                call(address, "profile", name=f"p{number}", photos=[], known=known)
            for turn in range(options.rounds):
                began = time.monotonic()
                with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
                    requests = [request(client, turn, options.steps) for client in range(options.clients)]
                    answers = [pool.submit(ask, address, wanted) for wanted in requests]
                    got += [(wanted, answer.result()) for wanted, answer in zip(requests, answers, strict=True)]
                took.append((time.monotonic() - began) / options.clients)
                memory.append(round(resident(process)))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
        wrong = count_wrong(got, Path(folder))
    result = {
        "clients": options.clients, "rounds": options.rounds, "pictures": len(got), "wrong": wrong,
        "seconds_a_picture": [round(seconds, 2) for seconds in took], "server_mib_after_each_round": memory,
        "seconds_to_the_first_picture": round(first, 1), "of_processor_time": round(spent, 1),
    }  # fmt: skip
    print(json.dumps(result, indent=2))


def count_wrong(got: list[tuple[dict[str, Any], np.ndarray]], folder: Path) -> int:
    """How many pictures are not those that the request makes alone."""
    from bolid import api
    from bolid.generate.models import Models

    models, wrong = Models(most=2), 0
    for asked, pixels in got:
        profile = [folder / "work" / "people" / f"{name}.safetensors" for name in asked["people"]]
        (path,) = api.generate(
            [asked["prompt"]], folder / "alone" / str(asked["seed"]), profile=profile or None, seed=asked["seed"],
            steps=asked["steps"], models=models,
        )  # fmt: skip
        wrong += not np.array_equal(np.asarray(Image.open(path).convert("RGB")), pixels)
    return wrong


if __name__ == "__main__":
    main()
