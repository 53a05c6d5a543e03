"""How much of extract's time is the models' own, and how it grows with worker processes.

    python examples/benchmarks/extract.py photos/

Prints photos per second of the bare models (decoded pictures, one thread), of `extract` with one process (at least 0.9
of that is the aim) and with two (twice as fast on two free cores, start-up taken off). The first two are in processor
time, which busy neighbours do not change much; the last needs an idle machine. Give it some 200 photos.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bolid.extract.command import BATCH, extract
from bolid.formats.images import list_photos, read_photo
from bolid.models.families import get_family
from bolid.views import ViewReader


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "photos")
    paths = [path for _, path in list_photos(folder)]
    torch.set_num_threads(1)
    reader = ViewReader(get_family())
    images = [read_photo(path) for path in paths]
    reader.read(images[:BATCH])  # the first call is slower
    start = time.process_time()
    for first in range(0, len(images), BATCH):
        reader.read(images[first : first + BATCH])
    models = len(paths) / (time.process_time() - start)
    del reader, images
    print(f"models alone        {models:6.1f} photos/s")
    alone = timed(folder, 1, time.process_time)
    print(f"extract             {alone:6.1f} photos/s, {alone / models:.2f} of the models' own")
    one, two = timed(folder, 1, time.perf_counter), timed(folder, 2, time.perf_counter)
    print(f"extract --workers 2 {two:6.1f} photos/s, {two / one:.2f} times one ({one:.1f}), by the clock")


def timed(folder: Path, workers: int, clock: Callable[[], float]) -> float:
    """Photos per second after the first batches of every worker, when the models are loaded."""
    marks: list[tuple[float, int]] = []

    def progress(done: int, total: int, text: str) -> None:
        if text != "reading the list of photos":
            marks.append((clock(), done))

    with tempfile.TemporaryDirectory() as out:
        extract(folder, Path(out) / "shards", workers=workers, max_bad=1, device="cpu", progress=progress)
    steady = [mark for mark in marks if mark[1] >= 2 * workers * BATCH]
    (start, first), (end, last) = steady[0], steady[-1]
    return (last - first) / (end - start)


if __name__ == "__main__":
    main()
