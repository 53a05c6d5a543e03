"""Every writing command, killed and started again: the bytes of an undisturbed run.

BOLID_CAMPAIGN=20 kills twenty times as often as CI.
"""

from __future__ import annotations

from functools import partial

import forget_world
import pytest
from generate_world import make_world
from kills import finish, kill
from mutations import SCALE
from small_base import make_body_encoder, make_family, make_training_shards

pytestmark = pytest.mark.slow
KILLS = max(1, round(2 * SCALE))
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, rendered_people):
    """Feature shards of the rendered people."""
    root = tmp_path_factory.mktemp("shards")
    finish(["extract", str(rendered_people), "--out", "shards", "--max-bad", "1", *CPU], root)
    return root / "shards"


@pytest.fixture(scope="module")
def trainable(tmp_path_factory):
    """Training shards and a body encoder of a small random family."""
    root = tmp_path_factory.mktemp("trainable")
    family = make_family(root)
    make_training_shards(root / "train", family)
    make_body_encoder(root / "encoder.safetensors", family)
    return root


def test_extract(rendered_people, tmp_path):
    kill("extract", ["extract", str(rendered_people), "-o", "out", "--max-bad", "1", *CPU], tmp_path, KILLS)


def test_shard(shards, tmp_path):
    kill("shard", ["shard", str(shards), "-o", "out", "--min-photos", "2", *CPU], tmp_path, KILLS)


def test_scrape(rendered_people, tmp_path):
    filters = ["--min-size", "64", "--min-sharpness", "0"]
    kill("scrape", ["scrape", str(rendered_people), "-o", "out", *filters], tmp_path, KILLS)


def test_forget(make_sample, record, tmp_path):
    """Deleting a person from photos, shards and profiles. When all is deleted, there is nobody to delete: status 1."""
    whole = forget_world.fill(tmp_path / "world", partial(forget_world.write_shards, make_sample, record), record)
    command = ["scrape", "--forget", "anna", "-o", "photos"]
    kill("scrape --forget", command, tmp_path / "kills", KILLS, whole, ends=(0, 1))


def test_train_vae(trainable, tmp_path):
    steps = ["--steps", "12", "--people", "3", "--body-dim", "6", "--width", "4", "--checkpoint-minutes", "0"]
    command = ["train-vae", str(trainable / "train"), "-o", "encoder.safetensors", *steps, *CPU]
    kill("train-vae", command, tmp_path, KILLS)


def test_train_adapter(trainable, tmp_path):
    steps = ["--steps", "4", "--batch-size", "3", "--sample-every", "0", "--checkpoint-minutes", "0"]
    encoder = ["--body-encoder", str(trainable / "encoder.safetensors")]
    command = ["train-adapter", str(trainable / "train"), "-o", "adapter", *encoder, *steps, *CPU]
    kill("train-adapter", command, tmp_path, KILLS)


def test_profile(rendered_people, tmp_path):
    kill("profile", ["profile", str(rendered_people / "p100001"), "-o", "me.safetensors", *CPU], tmp_path, KILLS)


def test_generate(tmp_path):
    world = make_world(tmp_path / "world")
    people = ["--profile", str(world.me), "--profile", str(world.faceless), "--adapter", str(world.adapter)]
    command = ["generate", "a man, in a coat", "a woman waving", *people, "-o", "out", "--family", world.family]
    kill("generate", [*command, "-n", "2", "--grid", "guidance=1,3", *CPU], tmp_path / "kills", KILLS)


def test_synth(tmp_path):
    command = ["synth", "--person-seed", "100000:100002", "--photos", "2", "--size", "64x86", "-o", "out"]
    kill("synth", command, tmp_path, KILLS)
