"""Every test makes its own small world, offline, on the CPU, away from the user's home."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import numpy as np
import pytest
import torch
from filelock import FileLock
from gallery import Server

from bolid.formats.images import encode_jpeg
from bolid.formats.shards import Sample, sample_key
from bolid.run import atomic_folder, run_record


def pytest_xdist_auto_num_workers(config):
    """One more than cores: some tests wait for processes of their own. No more than four: each holds some gigabytes."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(items):
    """The folders of long tests first, so that workers end at about the same time."""
    items.sort(key=lambda item: item.path.parent.name == "tests")


@pytest.fixture(scope="session", autouse=True)
def homes(tmp_path_factory):
    """Paths of new folders. (Pytest's `mktemp` would search all folders for a free name.) One is for fixtures."""
    folder = tmp_path_factory.mktemp("homes")
    with pytest.MonkeyPatch.context() as patch:
        away(patch, folder / "fixtures")
        yield (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def away_from_home(homes, monkeypatch):
    """No remembered family, no family from the environment."""
    away(monkeypatch, next(homes))


def away(patch: pytest.MonkeyPatch, home: Path) -> None:
    home.mkdir()
    patch.setenv("BOLID_HOME", str(home))
    for name in ("BOLID_FAMILY", "BOLID_COMMERCIAL", "BOLID_DEBUG"):
        patch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def make_sample():
    """make_sample(person, number) -> a small Sample of noise, the same for the same arguments."""

    def make(person: str = "p000001", number: int = 0, size: tuple[int, int] = (64, 48)) -> Sample:
        rng = np.random.default_rng([sum(person.encode()), number])
        height, width = size
        keypoints = rng.uniform(0, 1, (17, 3)).astype(np.float32) * [width, height, 1]
        return Sample(
            key=sample_key(person, f"{number:016x}"),
            image=encode_jpeg(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            meta={
                "person": person,
                "width": width,
                "height": height,
                "box": [4.0, 4.0, 40.0, 60.0],
                "source": f"{number}.jpg",
            },
            caption=f"photo {number} of {person}",
            tensors={
                "keypoints": keypoints.astype(np.float32),
                "face": rng.normal(size=512).astype(np.float32),
                "image_embed": rng.normal(size=32).astype(np.float32),
                "view_features": rng.normal(size=(17, 8)).astype(np.float16),
            },
        )

    return make


@pytest.fixture
def record():
    """record(kind) -> a run record of the tiny family."""

    def make(kind: str = "shards", **fields) -> dict:
        return run_record(kind, family="tiny", **{"config": {}, "seed": 0, **fields})

    return make


@pytest.fixture(scope="session")
def rendered_people(tmp_path_factory):
    """photos/<person>/*.jpg, *.txt, *.json: three validation people with five photos each, 256x192."""
    from bolid.synth.render import write_photos

    base = tmp_path_factory.getbasetemp()
    once = (base.parent if workers else base) / "rendered-once"  # by the first worker that needs them
    with FileLock(f"{once}.lock"):
        if not once.exists():
            with atomic_folder(once) as making:
                for seed in (100_000, 100_001, 100_002):
                    write_photos(making, seed, 5, size=(256, 192))
    folder = tmp_path_factory.mktemp("rendered")
    shutil.copytree(once, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def server():
    """A web server on the loopback interface; it serves what is in `server.pages`."""
    server = Server()
    server.pages["/robots.txt"] = "User-agent: *\nDisallow: /private/\n"
    yield server
    server.close()


@pytest.fixture
def listed(server, tmp_path):
    """listed({person: [path, ...]}) -> a CSV of these addresses on the server."""

    def write(people: dict[str, list[str]], name: str = "list.csv") -> Path:
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("person", "url"))
            rows.writerows(
                (p, path if "://" in path else server.url + path) for p, paths in people.items() for path in paths
            )
        return tmp_path / name

    return write
