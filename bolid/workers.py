"""Where batches of photos or pictures are processed: here, in worker processes, on ranks of several machines, by Ray.

Every engine takes the same batches and gives their results in the same order, so the bytes written are the same. One
process alone, rank 0, writes; it alone needs to see ``--out``. All of them need to see the inputs under the same path.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol

from bolid.errors import BolidError
from bolid.run import prepare_environment

Batch = list[Any]
Results = list[Any]
Process = Callable[[Batch], Results]
TIMEOUT_HOURS = 24  # rank 0 lists and hashes all photos while the others wait; a rank that dies ends the others at once


class Work(Protocol):
    """What is to be done with every batch. It goes to the other processes as a pickle."""

    @property
    def device(self) -> str:
        """Where it computes, a torch device name."""
        ...

    @property
    def threads(self) -> int | None:
        """Of the CPU, in each process; None: as many as there are, and one in worker processes."""
        ...

    @property
    def round(self) -> int:
        """Batches that a rank processes before its results are gathered."""
        ...

    def load(self) -> Process:
        """Load the models; returns the function that runs them on a batch."""


Run = Callable[[Work, list[Batch]], Iterator[Results]]
EngineName = Literal["local", "ray"]


@contextlib.contextmanager
def start(engine: EngineName, workers: int) -> Iterator[Run | None]:
    """The function that processes all batches; None in a rank that has done its share for rank 0."""
    rank = this_rank()
    if engine == "ray":
        yield partial(on_ray, workers=workers)
    elif rank.size == 1:
        yield partial(run, workers=workers)
    else:
        with _joined(rank):
            if rank.leads:
                leader = _Leader(rank, workers)
                try:
                    yield leader.run
                finally:
                    leader.release()
            else:
                _follow(rank)
                yield None


def run(work: Work, batches: list[Batch], workers: int) -> Iterator[Results]:
    """The results of every batch, in order, by this process or by so many worker processes."""
    if batches:
        yield from _alone(work, batches) if workers == 1 else _in_pool(work, batches, workers)


def _alone(work: Work, batches: list[Batch]) -> Iterator[Results]:
    import torch

    threads = torch.get_num_threads()
    if work.threads is not None:
        torch.set_num_threads(work.threads)  # as in every worker process; the caller's number again afterwards
    try:
        process = work.load()
        for batch in batches:
            yield process(batch)
    finally:
        torch.set_num_threads(threads)


# ---- worker processes -----------------------------------------------------------------------------------------------


def _in_pool(work: Work, batches: list[Batch], workers: int) -> Iterator[Results]:
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(batches)),
        mp_context=multiprocessing.get_context("spawn"),  # forked torch threads hang
        initializer=_start_worker,
        initargs=(work,),
    )
    try:
        waiting: deque[concurrent.futures.Future[Results]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_process_in_worker, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException as error:
        # Whatever went wrong, or Ctrl-C: they hold nothing that is worth waiting for.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        if not isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise
        raise BolidError(
            "a worker process was ended from outside, perhaps for want of memory",
            "run the same command again with fewer --workers: it goes on where it stopped",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Process | BolidError | None = None


def _start_worker(work: Work) -> None:
    global _worker
    import torch

    # Ctrl-C reaches every process of the terminal; the main one alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(work.threads or 1)
    try:
        _worker = work.load()
    except BolidError as error:  # raised here it would only break the pool
        _worker = error


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _process_in_worker(batch: Batch) -> Results:
    if _worker is None or isinstance(_worker, BolidError):
        raise _worker or BolidError("the worker has not started")
    return _worker(batch)


# ---- the ranks of torchrun or SLURM ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """One of ``size`` processes that were started with the same command."""

    number: int
    size: int
    local: int  # among those of its own machine

    @property
    def leads(self) -> bool:
        """Whether this one writes, and speaks to the user."""
        return self.number == 0


def this_rank() -> Rank:
    """Which of how many processes this is, by RANK and WORLD_SIZE (torchrun) or the variables of a SLURM step."""
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        # SLURM_NTASKS is also there in a batch script, which is one process of its own.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if rank in os.environ and size in os.environ:
            return Rank(int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, 0)))
    return Rank(0, 1, 0)


@contextlib.contextmanager
def _joined(rank: Rank) -> Iterator[None]:
    """Inside, the ranks can exchange objects (torch.distributed with gloo). Raises BolidError if they don't meet."""
    from datetime import timedelta

    from torch import distributed

    _find_leader()
    # Imported by one rank alone, later, it would wait for the others at a barrier.
    prepare_environment()
    import ultralytics  # noqa: F401

    try:
        distributed.init_process_group(
            "gloo", rank=rank.number, world_size=rank.size, timeout=timedelta(hours=TIMEOUT_HOURS)
        )
    except (RuntimeError, ValueError) as error:
        raise BolidError(
            f"rank {rank.number} of {rank.size} found no others: {str(error).splitlines()[0]}",
            "start all ranks with torchrun or srun; MASTER_ADDR must name the machine of rank 0, and MASTER_PORT a "
            "free port there",
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _find_leader() -> None:
    """Set MASTER_ADDR and MASTER_PORT where SLURM has started the ranks and nobody has set them."""
    if "SLURM_STEP_NUM_TASKS" not in os.environ or "RANK" in os.environ:
        return
    job = int(os.environ.get("SLURM_JOB_ID", 0))
    os.environ.setdefault("MASTER_PORT", str(20_000 + job % 20_000))
    if "MASTER_ADDR" not in os.environ:
        nodes, address = os.environ.get("SLURM_STEP_NODELIST", ""), "127.0.0.1"
        if os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1" and shutil.which("scontrol"):
            shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            address = shown.stdout.split()[0]
        os.environ["MASTER_ADDR"] = address


class _Leader:
    """Rank 0, which the others wait for in ``_follow``: it calls ``run`` as often as it likes, then ``release``."""

    def __init__(self, rank: Rank, workers: int) -> None:
        self.rank, self.workers, self.waiting = rank, workers, True

    def run(self, work: Work, batches: list[Batch]) -> Iterator[Results]:
        """The results of all ranks. Batch i goes to rank i modulo their number."""
        self._send((work, batches, self.workers))
        own, left = _by_rank(self.rank, work, batches, self.workers), len(batches)
        self.waiting = not left
        for _ in range(_rounds(work, batches, self.rank)):
            gathered = _gather(self.rank, next(own))
            for error in gathered:
                if isinstance(error, BolidError):
                    raise error
            for turn in range(work.round):
                for results in gathered:
                    if turn < len(results):
                        left -= 1
                        self.waiting = not left
                        yield results[turn]

    def release(self) -> None:
        """Let the others end if they wait for work."""
        if self.waiting:
            self._send(None)

    def _send(self, what: Any) -> None:
        from torch import distributed

        distributed.broadcast_object_list([what], src=0)


def _follow(rank: Rank) -> None:
    """Process this rank's batches for rank 0, until that has no more work."""
    from torch import distributed

    received: list[Any] = [None]
    while True:
        distributed.broadcast_object_list(received, src=0)
        if received[0] is None:
            return
        work, batches, workers = received[0]
        own = _by_rank(rank, work, batches, workers)
        for _ in range(_rounds(work, batches, rank)):
            _gather(rank, next(own))


def _rounds(work: Work, batches: list[Batch], rank: Rank) -> int:
    return -(-len(batches) // (rank.size * work.round))


def _gather(rank: Rank, results: Any) -> list[Any]:
    """What every rank has, on rank 0."""
    from torch import distributed

    gathered: list[Any] = [None] * rank.size
    try:
        distributed.gather_object(results, gathered if rank.leads else None, dst=0)
    except RuntimeError as error:
        raise BolidError(
            f"rank {rank.number} lost the others: {str(error).splitlines()[0]}",
            "read their messages; then run the same command again: it goes on where it stopped",
        ) from error
    return gathered


def _by_rank(rank: Rank, work: Work, batches: list[Batch], workers: int) -> Iterator[list[Results] | BolidError]:
    """This rank's results, a round of batches at a time; an error once, and for every round left."""
    import torch

    if work.device.startswith("cuda") and torch.cuda.device_count() > 1:
        device = f"cuda:{rank.local % torch.cuda.device_count()}"
        work = replace(work, device=device)  # type: ignore[type-var]
    results = run(work, batches[rank.number :: rank.size], workers)
    while True:
        try:
            yield list(islice(results, work.round))
        except BolidError as error:
            while True:
                yield error


# ---- Ray ------------------------------------------------------------------------------------------------------------


def on_ray(work: Work, batches: list[Batch], workers: int) -> Iterator[Results]:
    """The same by ``workers`` actors of Ray Data, on the cluster that RAY_ADDRESS names or on this machine."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import ray.data
        from ray import cloudpickle
    except ImportError as error:
        raise BolidError("--engine ray needs Ray", "pip install 'bolid[ray]'") from error
    if not batches:
        return
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray raises plain ones
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BolidError(f"Ray did not start: {reason}", "try again when the machine is less busy") from error
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every execution
    rows = ray.data.from_items(
        [{"batch": cloudpickle.dumps(batch)} for batch in batches], override_num_blocks=len(batches)
    )
    options = {"num_gpus": 1} if work.device.startswith("cuda") else {"num_cpus": 1}
    actors = ray.data.ActorPoolStrategy(size=workers)
    processed = rows.map(_RayWorker, fn_constructor_args=(work,), compute=actors, **options)
    for row in processed.iter_rows():
        results = cloudpickle.loads(row["results"])  # our own actors wrote it
        if isinstance(results, BolidError):
            raise results
        yield results


class _RayWorker:
    def __init__(self, work: Work) -> None:
        import torch

        torch.set_num_threads(work.threads or 1)
        try:
            self.process: Process | BolidError = work.load()
        except BolidError as error:  # raised here, Ray would start the actor again and again
            self.process = error

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        from ray import cloudpickle

        try:
            if isinstance(self.process, BolidError):
                raise self.process
            return {"results": cloudpickle.dumps(self.process(cloudpickle.loads(row["batch"])))}
        except BolidError as error:
            return {"results": cloudpickle.dumps(error)}
