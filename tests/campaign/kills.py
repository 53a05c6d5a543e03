"""Commands in processes of their own, killed at random moments.

A server process loads the libraries once and forks for each command, so that a kill costs the command's own time.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PRELOAD = ["bolid_cli.main", "torch", "diffusers", "transformers", "ultralytics", "insightface", "open_clip", "scrapy"]
_TIME = re.compile(rb'"time": "[^"]*"')


def _command(arguments: list[str], folder: str, log: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    from bolid_cli.main import app

    app(arguments, prog_name="bolid")


def start(arguments: list[str], folder: Path) -> multiprocessing.process.BaseProcess:
    """A command under way. What it prints goes to `folder`/.log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_command, args=(arguments, str(folder), str(folder / ".log")))
    process.start()
    return process


def finish(arguments: list[str], folder: Path, ends: tuple[int, ...] = (0,)) -> float:
    """Run a command to its end; the seconds that it took. Raises AssertionError, with its words, where it fails.

    `ends`: exit statuses that are no failure.
    """
    started = time.monotonic()
    process = start(arguments, folder)
    process.join()
    assert process.exitcode in ends, (
        f"{arguments} ended with {process.exitcode}: {(folder / '.log').read_text()[-600:]}"
    )
    return time.monotonic() - started


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the log and scrape's database, whose bytes hold times; times in records left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != ".log" and ".scrape.sqlite" not in name:
            data = path.read_bytes()
            found[name] = _TIME.sub(b"", data) if path.suffix == ".json" else data
    return found


@dataclass
class Kills:
    """What came of the killed runs of one command."""

    name: str
    killed: int = 0
    too_late: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lost = len(self.failures)
        return f"campaign: kills of {self.name}: {self.killed} killed, {self.too_late} too late, {lost} lost"


def kill(
    name: str,
    arguments: list[str],
    root: Path,
    kills: int,
    prepare: Callable[[Path], None] = lambda folder: None,
    ends: tuple[int, ...] = (0,),
) -> None:
    """Kill a command `kills` times, each time in a new folder, start it again, and compare with an undisturbed run.

    `arguments`: paths in them are inside the working directory, which `prepare` fills. `ends`: exit statuses of the
    second start that are no failure.
    """
    whole = root / "whole"
    whole.mkdir(parents=True)
    prepare(whole)
    finish(arguments, whole)  # fills caches, so that the next one's time is typical
    expected = contents(whole)
    timed = root / "timed"
    timed.mkdir()
    prepare(timed)
    seconds = finish(arguments, timed)
    tally = Kills(name)
    if contents(timed) != expected:
        tally.failures.append("two undisturbed runs differ")
    rng = np.random.default_rng(sum(name.encode()))
    for number in range(kills):
        folder = root / str(number)
        folder.mkdir()
        prepare(folder)
        process = start(arguments, folder)
        process.join(float(rng.uniform(0, 1)) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            tally.killed += 1
        else:
            tally.too_late += 1
        try:
            finish(arguments, folder, ends)
        except AssertionError as error:
            tally.failures.append(f"{number}: {error}")
            continue
        found = contents(folder)
        if found != expected:
            names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            tally.failures.append(f"{number}: different {', '.join(names)}")
    print(tally)
    assert not tally.failures, f"{tally}\n" + "\n".join(tally.failures)
