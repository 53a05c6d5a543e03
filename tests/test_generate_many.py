"""`generate` with many pictures: going on after an interruption, paths as they come, memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from generate_world import PROMPTS, make_world

from bolid.errors import BolidError
from bolid.generate import generate
from bolid.generate.generation import Generation

MANY = [f"{prompt} {word}" for prompt in PROMPTS for word in ("one", "two", "three")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("generate"))


def options_of(world):
    return {"profile": world.me, "adapter": world.adapter, "device": "cpu", "batch_size": 2, "steps": 1, "seed": 4}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sampled(monkeypatch):
    """The numbers of the prompts that were sampled, batch by batch."""
    found: list[list[int]] = []
    whole = Generation.sample_batch
    monkeypatch.setattr(
        Generation,
        "sample_batch",
        lambda self, batch: found.append([place[2] for place in batch]) or whole(self, batch),
    )
    return found


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_samples_nothing_finished_again(world, tmp_path, sampled):
    def stop(path):
        stopped.append(path)
        if len(stopped) == 3:
            raise KeyboardInterrupt

    stopped: list[Path] = []
    generate(MANY, tmp_path / "whole", **options_of(world))
    assert sampled == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(KeyboardInterrupt):
        generate(MANY, tmp_path / "out", made=stop, **options_of(world))
    assert sorted(stopped) == sorted((tmp_path / "out").iterdir()), "each path is reported as soon as it is there"
    times = {path: path.stat().st_mtime_ns for path in stopped}
    os.link(stopped[0], stopped[0].with_name(f".{stopped[0].stem}.bolid-tmp.png"))  # killed before it was removed
    sampled.clear()
    reported: list[Path] = []
    paths = generate(MANY, tmp_path / "out", made=reported.append, **options_of(world))
    assert sampled == [[2, 3], [4, 5]]  # of the second batch one picture was there: its bytes depend on the batch
    assert reported == paths and len(paths) == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in stopped} == times, "what was finished is left alone"
    sampled.clear()
    assert generate(MANY, tmp_path / "out", **options_of(world)) == paths and sampled == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(world, tmp_path):
    def look(path):
        made.append(tracemalloc.get_traced_memory()[0])

    made: list[int] = []
    tracemalloc.start()
    try:
        generate([f"a photo {i}" for i in range(60)], tmp_path, made=look, **options_of(world))
    finally:
        tracemalloc.stop()
    assert (made[-1] - made[19]) / 40 < 4000  # bytes; a picture has 9,216


@pytest.mark.slow
def test_pictures_of_other_settings_are_not_taken_for_finished(world, tmp_path, sampled):
    [first] = generate(MANY[:1], tmp_path, **options_of(world))
    for changed in ({"seed": 5}, {"steps": 2}, {"body_scale": 0.5}, {"dtype": "bf16"}, {"negative": "a hat"}):
        sampled.clear()
        [path] = generate(MANY[:1], tmp_path, **{**options_of(world), **changed})
        assert sampled == [[0]] and path != first
    data = first.read_bytes()
    first.write_bytes(data[:-40])  # cut off by another program
    sampled.clear()
    [again] = generate(MANY[:1], tmp_path, **options_of(world))
    assert sampled == [[0]] and again.read_bytes() == data


def test_the_best_of_several_is_found_whichever_candidate_it_is(world, tmp_path, sampled, monkeypatch):
    class Ranker:
        class view_reader:
            class faces:
                sha256 = ""

        def distances(self, pictures, body, face):
            return [float(picture.mean()) for picture in pictures]

    monkeypatch.setattr("bolid.generate.generation._ranker", lambda *_: Ranker())
    paths = generate(MANY, tmp_path, best_of=3, **options_of(world))
    sampled.clear()
    assert generate(MANY, tmp_path, best_of=3, **options_of(world)) == paths and sampled == []


def test_an_error_of_the_sampling_stops_all(world, tmp_path):
    with pytest.raises(BolidError, match="--steps 0|--steps is 0"):
        generate(MANY, tmp_path, **{**options_of(world), "steps": 0, "workers": 2})
