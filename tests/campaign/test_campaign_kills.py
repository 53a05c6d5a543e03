"""Every writing command, killed at random moments and started again: the bytes of an undisturbed run.

BOLID_CAMPAIGN=20 kills twenty times as often as CI.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import forget_world
import pytest
from kills import finish, kill
from mutations import SCALE
from small_base import make_body_encoder, make_family, make_training_shards

pytestmark = pytest.mark.slow
KILLS = max(1, round(2 * SCALE))


@pytest.fixture(scope="module")
def world(tmp_path_factory, rendered_people):
    """What the commands read: photos, shards of them, and a small random family with its own."""
    root = tmp_path_factory.mktemp("campaign")
    finish(["extract", str(rendered_people), "--out", "shards", "--max-bad", "1", "--device", "cpu"], root)
    finish(["profile", str(rendered_people / "p100000"), "--out", "me.safetensors", "--device", "cpu"], root)
    family = make_family(root)
    make_training_shards(root / "train", family)
    make_body_encoder(root / "encoder.safetensors", family)
    return root


FILTERS = ["--min-size", "64", "--min-sharpness", "0"]
CPU = ["--device", "cpu"]


def test_extract(world, rendered_people, tmp_path):
    kill("extract", ["extract", str(rendered_people), "-o", "out", "--max-bad", "1", *CPU], tmp_path, KILLS)


def test_shard(world, tmp_path):
    kill("shard", ["shard", str(world / "shards"), "-o", "out", "--min-photos", "2", *CPU], tmp_path, KILLS)


def test_scrape(rendered_people, tmp_path):
    kill("scrape", ["scrape", str(rendered_people), "-o", "out", *FILTERS], tmp_path, KILLS)


def test_forget(make_sample, record, tmp_path):
    """Deleting a person from photos, shards and profiles. When all is deleted, there is nobody to delete: status 1."""
    whole = forget_world.fill(tmp_path / "world", partial(forget_world.write_shards, make_sample, record), record)

    def prepare(folder: Path) -> None:
        shutil.copytree(whole, folder, dirs_exist_ok=True)

    kill("scrape --forget", ["scrape", "--forget", "anna", "-o", "photos"], tmp_path, KILLS, prepare, ends=(0, 1))


def test_train_vae(world, tmp_path):
    steps = ["--steps", "12", "--people", "3", "--body-dim", "6", "--width", "4", "--checkpoint-minutes", "0"]
    kill("train-vae", ["train-vae", str(world / "train"), "-o", "encoder.safetensors", *steps, *CPU], tmp_path, KILLS)


def test_train_adapter(world, tmp_path):
    steps = ["--steps", "8", "--batch-size", "3", "--sample-every", "0", "--checkpoint-minutes", "0"]
    encoder = ["--body-encoder", str(world / "encoder.safetensors")]
    command = ["train-adapter", str(world / "train"), "-o", "adapter", *encoder, *steps, *CPU]
    kill("train-adapter", command, tmp_path, KILLS)


def test_profile(rendered_people, tmp_path):
    kill("profile", ["profile", str(rendered_people / "p100001"), "-o", "me.safetensors", *CPU], tmp_path, KILLS)


def test_generate(world, tmp_path):
    prompts = ["a man, in a coat", "a woman waving", "a portrait of a man"]
    command = ["generate", *prompts, "--profile", str(world / "me.safetensors"), "-o", "out", "--steps", "1", *CPU]
    kill("generate", command, tmp_path, KILLS)


def test_synth(tmp_path):
    kill("synth", ["synth", "--person-seed", "100000:100002", "--photos", "3", "-o", "out"], tmp_path, KILLS)
