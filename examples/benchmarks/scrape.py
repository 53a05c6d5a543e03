"""How fast `bolid scrape` downloads beside img2dataset: the same photos, the same local server, as many connections.

    python examples/benchmarks/scrape.py --img2dataset /path/to/venv/bin/img2dataset

Prints photos per second, from the first request to the last as the server sees them, so that start-up does not count;
their ratio; and the memory of `bolid scrape` at a quarter of the photos and at all of them. img2dataset runs twice:
storing what it downloads without looking at it, and in its default way (decoding, resizing to 256, encoding). `scrape`
decodes every photo, and measures its sharpness and its hash. img2dataset may live in an environment of its own. An idle
machine gives the best figures; the ratio is taken side by side, in turns.

2026-11-25, two shared cores (Intel Xeon) beside two other jobs, img2dataset 1.47.0, `--photos 240 --rounds 3`; the
median of three rounds, and each:

    bolid scrape                    127.9 photos/s  (133, 128, 72)
    img2dataset, storing           459.6 photos/s  (605, 420, 460)
    img2dataset, default            88.7 photos/s  (84, 94, 89)
    bolid / img2dataset, storing    0.22  (0.22, 0.30, 0.16)
    bolid / img2dataset, default    1.36  (1.58, 1.36, 0.82)
    peak memory, quarter      189 MiB
    peak memory, all          192 MiB

So it is about as fast as img2dataset where both decode, and not where img2dataset only stores: of the 9 ms of processor
time a photo takes here, 5 are for looking at it and 3 are Scrapy's.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img2dataset", help="its program; without it only bolid is measured")
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    make_photos(folder / "photos", options.photos)
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(folder / "photos")], stdout=subprocess.PIPE, text=True
    )
    try:
        url = server.stdout.readline().strip()  # type: ignore[union-attr]
        names = [f"person{n // 40},{url}/{n}.jpg" for n in range(options.photos)]
        (folder / "all.csv").write_text("person,url\n" + "\n".join(names) + "\n")
        (folder / "quarter.csv").write_text("person,url\n" + "\n".join(names[: options.photos // 4]) + "\n")
        speeds: dict[str, list[float]] = {}
        for number in range(options.rounds):
            out = folder / f"round{number}"
            out.mkdir()
            for name, command in commands(options, folder / "all.csv", out).items():
                speeds.setdefault(name, []).append(run(command, url)[0])
        for name, values in speeds.items():
            print(f"{name:28} {statistics.median(values):7.1f} photos/s  ({', '.join(f'{v:.0f}' for v in values)})")
        for name in list(speeds)[1:]:
            ratios = [ours / theirs for ours, theirs in zip(speeds["bolid scrape"], speeds[name], strict=True)]
            print(f"bolid / {name:20} {statistics.median(ratios):7.2f}  ({', '.join(f'{r:.2f}' for r in ratios)})")
        for which in ("quarter", "all"):
            command = commands(options, folder / f"{which}.csv", folder / which)["bolid scrape"]
            print(f"peak memory, {which:8} {run(command, url)[1]:7.0f} MiB")
    finally:
        server.terminate()
        server.wait()


def commands(options: argparse.Namespace, urls: Path, out: Path) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "bolid_cli.main", "scrape", "--urls", str(urls), "--out", str(out / "bolid"),
            "--delay", "0", "--connections", str(options.connections), "--contact", "me@example.org", "-q"]  # fmt: skip
    found = {"bolid scrape": ours}
    if options.img2dataset:
        theirs = [options.img2dataset, "--url_list", str(urls), "--input_format", "csv", "--url_col", "url",
                  "--output_format", "webdataset", "--processes_count", "1", "--thread_count", str(options.connections),
                  "--number_sample_per_shard", str(options.photos), "--enable_wandb", "False"]  # fmt: skip
        store = ["--resize_mode", "no", "--disable_all_reencoding", "True"]
        found["img2dataset, storing"] = [*theirs, "--output_folder", str(out / "storing"), *store]
        found["img2dataset, default"] = [*theirs, "--output_folder", str(out / "default")]
    return found


def run(command: list[str], url: str) -> tuple[float, float]:
    """(photos a second as the server saw it, MiB of memory at the most)."""
    ask(f"{url}/clear")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    error = process.stderr.read()  # type: ignore[union-attr]
    _, status, usage = os.wait4(process.pid, 0)
    seen = ask(f"{url}/seen")
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{error.decode()}")
    return (seen["photos"] - 1) / (seen["last"] - seen["first"]), usage.ru_maxrss / 1024


def ask(url: str) -> dict:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def make_photos(folder: Path, count: int) -> None:
    """JPEG files of 1200x1000 pixels with the spectrum of photographs, some 200 KB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(250)[:, None], np.fft.fftfreq(300)[None])
    frequency[0, 0] = 1
    grain = rng.normal(0, 6, (1000, 1200, 1))
    for number in range(count):
        noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(250, 300))) / frequency**1.1).real
        pixels = (100 + 50 * noise[..., None] / noise.std() + rng.uniform(0, 60, 3)).clip(0, 255)
        large = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((1200, 1000)), np.float64)
        buffer = io.BytesIO()
        Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())


async def serve(folder: Path) -> None:
    """The photos, from memory; when the first and the last was sent, and how many."""
    from aiohttp import web

    photos = {path.name: path.read_bytes() for path in folder.iterdir()}
    seen = {"photos": 0, "first": 0.0, "last": 0.0}

    async def answer(request: web.Request) -> web.Response:
        name = request.path.lstrip("/")
        if name == "clear":
            seen.update(photos=0, first=0.0, last=0.0)
        if name in ("clear", "seen"):
            return web.json_response(seen)
        if name not in photos:
            raise web.HTTPNotFound
        now = time.monotonic()
        seen.update(photos=seen["photos"] + 1, first=seen["first"] or now, last=now)
        return web.Response(body=photos[name], content_type="image/jpeg")

    app = web.Application()
    app.router.add_get("/{name}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
