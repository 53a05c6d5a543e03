"""Processes, ranks and Ray: the same results in the same order, and errors that arrive."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bolid import workers
from bolid.errors import BolidError

BATCHES = [[number, number + 0.5] for number in range(21)]  # more than two rounds of two ranks, the last not full


@dataclass(frozen=True)
class Doubling:
    """Work that needs no model."""

    device: str = "cpu"
    fails_at: int = -1
    threads: int | None = 1
    round: int = 4

    def load(self):
        if self.fails_at == 0:
            raise BolidError("no model", "get one")
        return self._look

    def _look(self, batch):
        if batch[0] == self.fails_at:
            raise BolidError("a bad batch", "leave it out")
        return [2 * number for number in batch]


EXPECTED = [[2 * number for number in batch] for batch in BATCHES]

RANK_SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from bolid import workers
from bolid.errors import BolidError
from test_workers import BATCHES, Doubling

for port, (name, fails_at) in zip({ports!r}, {cases!r}):
    os.environ["MASTER_PORT"] = str(port)
    try:
        with workers.start("local", workers=1) as run:
            if run is None:
                print(name, "helped")
            elif name != "nothing":
                print(name, list(run(Doubling(fails_at=fails_at), BATCHES)))
    except BolidError as error:
        print(name, "error:", error.message, "/", error.hint)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(command: list[str], names: tuple[str, str, str] = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), **extra: str):
    """What two processes of the same command say, when they are started as torchrun (or srun, by `names`) does."""
    common = {**os.environ, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **extra}
    if names[0] == "RANK":
        common["MASTER_ADDR"] = "127.0.0.1"
    processes = [
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**common, names[0]: str(rank), names[1]: "2", names[2]: str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    results = [process.communicate(timeout=1800) for process in processes]
    for process, (_, talk) in zip(processes, results, strict=True):
        assert process.returncode == 0, talk
    return [out.strip() for out, _ in results]


def rank_script(**cases: int) -> list[str]:
    """A command that runs one case after the other. A case's number is the batch that fails; `nothing` has no batch."""
    tests, ports = str(Path(__file__).parent), [free_port() for _ in cases]
    return [sys.executable, "-c", RANK_SCRIPT.format(tests=tests, ports=ports, cases=list(cases.items()))]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_one_process_alone_keeps_its_threads():
    import torch

    threads = torch.get_num_threads()
    assert list(workers.run(Doubling(), BATCHES, workers=1)) == EXPECTED
    assert torch.get_num_threads() == threads
    assert list(workers.run(Doubling(), [], workers=3)) == []


@pytest.mark.slow
def test_ranks_of_slurm_share_the_batches_and_rank_0_has_all_results_in_order():
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    assert run_ranks(rank_script(all=-1), names) == [f"all {EXPECTED}", "all helped"]


@pytest.mark.slow
def test_ranks_share_the_batches_let_each_other_go_and_hear_of_errors():
    """One pair of processes, one case after the other. Batch 5 is rank 1's; at 0 the models cannot be loaded."""
    first, second = (output.splitlines() for output in run_ranks(rank_script(all=-1, nothing=-1, fails=5, lacks=0)))
    assert first == [
        f"all {EXPECTED}", "fails error: a bad batch / leave it out", "lacks error: no model / get one",
    ]  # fmt: skip
    assert second[:2] == ["all helped", "nothing helped"] and len(second) == 4
    assert second[2] == "fails helped" or second[2].startswith("fails error: rank 1 lost the others")


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert workers.this_rank() == workers.Rank(0, 1, 0) and workers.this_rank().leads


def test_ranks_that_do_not_meet_say_so(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(BolidError, match="rank 0 of 2 found no others") as caught, workers.start("local", 1):
        pass
    assert "MASTER_ADDR" in caught.value.hint


RAY_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from bolid import workers
from bolid.errors import BolidError
from test_workers import BATCHES, Doubling

print(list(workers.on_ray(Doubling(), [], workers=2)))
try:
    for results in workers.on_ray(Doubling(fails_at=20), BATCHES, workers=2):
        print(results)
except BolidError as error:
    print("error:", error.message)
"""


def run_with_ray(command: list[str], **extra: str) -> str:
    """What a process that uses Ray prints. Ray ends such a process when one of its own servers fails, which on a busy
    machine happens while they start: that is not ours to test, so such a process is started again, twice at most."""
    # The actors must find Doubling; the object store needs no third of the machine's memory.
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "200000000",
        **extra,
    }
    for _ in range(3):
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
        if ended.returncode == 0 or not any(name in ended.stderr.lower() for name in ("raylet", "gcs")):
            break
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_ray_gives_results_in_order_up_to_an_error():
    pytest.importorskip("ray", reason="pip install 'bolid[ray]'")
    script = RAY_SCRIPT.format(tests=str(Path(__file__).parent))
    lines = run_with_ray([sys.executable, "-c", script]).splitlines()
    lines = [line for line in lines if "(raylet)" not in line]  # which Ray says now and then of actors that were ended
    assert lines == ["[]", *map(str, EXPECTED[:20]), "error: a bad batch"]


def test_an_actor_without_its_model_says_so():
    """Raised there, Ray would start the actor again and again."""
    cloudpickle = pytest.importorskip("ray", reason="pip install 'bolid[ray]'").cloudpickle
    answer = workers._RayWorker(Doubling(fails_at=0))({"batch": cloudpickle.dumps(BATCHES[0])})
    error = cloudpickle.loads(answer["results"])
    assert isinstance(error, BolidError) and (error.message, error.hint) == ("no model", "get one")
