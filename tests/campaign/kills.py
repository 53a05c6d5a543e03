"""Commands in processes of their own, killed and started again until they end: the bytes of an undisturbed run?

The undisturbed run is a fresh process. The others are forked from one that has imported the same modules, so that a
kill costs the command's own time. Half of the kills fall at a random moment of the command's processor time, the others
before a random file operation: an opening to write, a rename, a removal.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LOG, MODULES = ".log", ".modules"
CHAIN = 3  # a run is killed, started, killed again: at most so often before it may end
_TIME = re.compile(rb'"time": "[^"]*"')
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# ---- in the process of the command ----------------------------------------------------------------------------------


def _enter(folder: Path, mode: str) -> None:
    """Work in `folder`; what is printed is added to its log."""
    log = os.open(folder / LOG, os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if mode == "w" else os.O_APPEND))
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)


def _run(arguments: list[str]) -> int:
    """A command's exit status."""
    from bolid_cli.main import app

    try:
        app(arguments, prog_name="bolid")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _kill_at(seconds: float | None, number: int, counter: mmap.mmap) -> None:
    """End this process at once after `seconds` of processor time, or before operation `number` (0: never).

    Operations on files below the working directory are counted.
    """
    if seconds is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles its signal: the system ends the process
    root = os.getcwd() + os.sep

    def hook(event: str, values: tuple[Any, ...]) -> None:
        writes = (event == "open" and isinstance(values[2], int) and values[2] & _WRITES) or event in (
            "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "sqlite3.connect",
        )  # fmt: skip
        if writes and isinstance(values[0], str | os.PathLike) and os.path.abspath(values[0]).startswith(root):
            count = struct.unpack("I", counter[:4])[0] + 1
            counter[:4] = struct.pack("I", count)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _serve() -> None:
    """Fork for every run that a line of stdin asks for; answer with its status (None: killed), seconds and operations.

    A line is JSON: arguments, folder, after (seconds of processor time until the kill, or null), before (operation, or
    0); or {"modules": FILE}, to import what that file lists.
    """
    counter, answers = mmap.mmap(-1, 4), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print when they are imported
    for line in sys.stdin:
        run = json.loads(line)
        if "modules" in run:
            _import_all(json.loads(Path(run["modules"]).read_text()))
            continue
        counter[:4] = bytes(4)
        if (process := os.fork()) == 0:
            _enter(Path(run["folder"]), "a")
            _kill_at(run["after"], run["before"], counter)
            status = _run(run["arguments"])
            atexit._run_exitfuncs()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)  # threads of the parent are not here to be ended
        _, status, used = os.wait4(process, 0)
        status = os.waitstatus_to_exitcode(status)
        status = None if status in (-signal.SIGKILL, -signal.SIGPROF) else status
        figures = [status, used.ru_utime + used.ru_stime, struct.unpack("I", counter[:4])[0]]
        print(json.dumps(figures), file=answers, flush=True)


def _import_all(modules: list[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # some are only to be imported by others
            continue


def _fresh(folder: Path, arguments: list[str]) -> None:
    """Run a command; write the names of what it has imported."""
    _enter(folder, "w")
    status = _run(arguments)
    names = [name for name, module in sorted(sys.modules.items()) if getattr(module, "__spec__", None)]
    (folder / MODULES).write_text(json.dumps([name for name in names if name != "__main__"]))
    sys.exit(status)


# ---- in the test ----------------------------------------------------------------------------------------------------


def finish(arguments: list[str], folder: Path) -> None:
    """Run a command to its end in a fresh process. Raises AssertionError, with its words, where it fails."""
    command = [sys.executable, __file__, "fresh", str(folder), *arguments]
    status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    assert status == 0, f"{arguments} ended with {status}: {_words(folder)}"


def _words(folder: Path) -> str:
    return (folder / LOG).read_text()[-600:]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the log and scrape's database, whose bytes hold times; times in records left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (LOG, MODULES) and ".scrape.sqlite" not in name:
            data = path.read_bytes()
            found[name] = _TIME.sub(b"", data) if path.suffix == ".json" else data
    return found


class _Server:
    """A process that has imported what the commands import, and forks."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.close)

    def load(self, modules: Path) -> None:
        self._ask({"modules": str(modules)})

    def run(
        self, arguments: list[str], folder: Path, after: float | None = None, before: int = 0
    ) -> tuple[int | None, float, int]:
        """(exit status or None where it was killed, seconds, operations)."""
        self._ask({"arguments": arguments, "folder": str(folder), "after": after, "before": before})
        line = self.process.stdout.readline()
        assert line, "the process that forks has ended"
        return tuple(json.loads(line))

    def _ask(self, request: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


_server = functools.cache(_Server)  # one for all commands


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
    template: Path | None = None,
    ends: tuple[int, ...] = (0,),
) -> None:
    """Kill a command `kills` times, each chain of kills in a new folder, let it end, and compare.

    `arguments`: paths in them are inside the working directory, which begins as a copy of `template`. `ends`: exit
    statuses of a run after a kill that are no failure.
    """
    root.mkdir(parents=True, exist_ok=True)

    def folder(label: str) -> Path:
        path = root / label
        shutil.copytree(template, path) if template else path.mkdir()
        return path

    finish(arguments, whole := folder("whole"))
    expected, tally = contents(whole), Kills(name)
    server = _server()
    server.load(whole / MODULES)
    status, seconds, operations = server.run(arguments, timed := folder("timed"))
    assert status == 0, f"forked, it ends with {status}: {_words(timed)}"
    assert contents(timed) == expected, f"forked, it writes something else: {_different(timed, expected)}"
    rng, chain = np.random.default_rng(sum(name.encode())), 0
    while tally.killed < kills and chain < 3 * kills:
        chain += 1
        place = folder(str(chain))
        for _ in range(min(int(rng.integers(1, CHAIN + 1)), kills - tally.killed)):
            moment, number = float(rng.uniform(0, seconds)), int(rng.integers(1, operations + 1))
            timer = {"after": moment} if rng.random() < 0.5 else {"before": number}
            if server.run(arguments, place, **timer)[0] is not None:
                tally.too_late += 1
                break
            tally.killed += 1
        status = server.run(arguments, place)[0]
        if status not in ends:
            tally.failures.append(f"{chain}: ended with {status}: {_words(place)}")
        elif different := _different(place, expected):
            tally.failures.append(f"{chain}: different {different}")
        else:
            shutil.rmtree(place)
        print(f"{tally}; {seconds:.1f} s and {operations} operations a run", file=sys.stderr, flush=True)
    print(tally)
    assert not tally.failures, f"{tally}\n" + "\n".join(tally.failures)


def _different(folder: Path, expected: dict[str, bytes]) -> str:
    found = contents(folder)
    return ", ".join(sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)))


if __name__ == "__main__":
    from bolid.run import prepare_environment

    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_environment()
    if sys.argv[1] == "serve":
        _serve()
    else:
        _fresh(Path(sys.argv[2]), sys.argv[3:])
