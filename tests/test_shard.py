"""shard's own part: people, duplicates, split, crop, resuming. (test_models_tiny.py runs it with the real VAE.)"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import bolid.backends.diffusion
from bolid.errors import BolidError
from bolid.formats.images import decode_image, difference_hash, encode_jpeg
from bolid.formats.shards import ShardWriter, group_by_person, read_shards
from bolid.models.families import get_family
from bolid.shard import FEW_PHOTOS, NEAR_DUPLICATE, shard
from bolid_cli.main import app


class Encoder:
    """Stands in for the VAE: latents are a quarter-size copy of the picture."""

    encoded = 0

    def __init__(self, family, device="cpu"):
        pass

    def encode(self, images):
        Encoder.encoded += len(images)
        small = np.stack([image[::8, ::8, :].transpose(2, 0, 1) for image in images]).astype(np.float16)
        return np.stack([small, np.zeros_like(small)], axis=1)


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    Encoder.encoded = 0
    monkeypatch.setattr(bolid.backends.diffusion, "LatentEncoder", Encoder)


@pytest.fixture
def shards(tmp_path, make_sample, record):
    """Six people with five photos each, one with three, written in turns, not by person."""
    writer = ShardWriter(tmp_path / "shards", record(), 100_000)
    for number in range(5):
        for person in range(7):
            if person < 6 or number < 3:
                writer.write(make_sample(f"p{person}", number, size=(80, 80)))
    writer.close()
    return writer.directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_is_written(shards, tmp_path):
    result = shard(shards, tmp_path / "train", max_bytes=200_000)
    assert (result.out, result.samples, result.persons) == ([tmp_path / "train"], 30, 6)
    assert list(result.rejected) == [FEW_PHOTOS] and len(result.rejected[FEW_PHOTOS]) == 3
    people = dict(group_by_person(read_shards(tmp_path / "train", kind="training-shards")))
    assert list(people) == [f"p{n}" for n in range(6)] and all(len(photos) == 5 for photos in people.values())
    (height, width), (latent_h, latent_w) = get_family().view_size, get_family().image_size
    source = {sample.key: sample for sample in read_shards(shards)}
    for sample in people["p3"]:
        before = source[sample.key]
        assert decode_image(sample.image).shape == (height, width, 3)
        assert (sample.meta["height"], sample.meta["width"]) == (height, width)
        assert sample.tensors["latents"].shape == (2, 3, latent_h // 8, latent_w // 8)
        assert sample.tensors["latents"].dtype == np.float16
        assert np.array_equal(sample.tensors["face"], before.tensors["face"]) and sample.caption == before.caption
        # 80x80 => the window is 80 x 60, scaled to the family's height.
        moved = sample.tensors["keypoints"][:, 1] / before.tensors["keypoints"][:, 1]
        assert np.allclose(moved, height / 80, atol=0.01)


def test_resumed_equals_uninterrupted(shards, tmp_path, monkeypatch):
    options = {"max_bytes": 200_000, "val_fraction": 0.34}
    shard(shards, tmp_path / "whole", **options)
    original = Encoder.encode
    for stop in (1, 3, 5):
        calls = iter(range(100))

        def killed(self, images, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return original(self, images)

        out = tmp_path / f"resumed{stop}"
        monkeypatch.setattr(Encoder, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(shards, out, **options)
        monkeypatch.setattr(Encoder, "encode", original)
        shard(shards, out, **options)
        assert contents(out) == contents(tmp_path / "whole")
    encoded = Encoder.encoded
    assert shard(shards, out, **options).samples == 30 and Encoder.encoded == encoded


def test_split_is_by_person_and_by_seed(shards, tmp_path):
    result = shard(shards, tmp_path / "out", val_fraction=0.34)
    train, val = ({s.person for s in read_shards(tmp_path / "out" / part)} for part in ("train", "val"))
    assert len(train) == 4 and len(val) == 2 and not train & val
    assert result.out == [tmp_path / "out" / "train", tmp_path / "out" / "val"] and result.persons == 6
    others = set()
    for seed in range(5):
        shard(shards, tmp_path / f"seed{seed}", val_fraction=0.34, seed=seed)
        others.add(frozenset(s.person for s in read_shards(tmp_path / f"seed{seed}" / "val")))
    assert frozenset(val) in others and len(others) > 1


def test_several_directories_count_as_one(shards, tmp_path, make_sample, record):
    """Photos 3 to 6 of two people and five of a new one: two photos are in both, and one person is in one alone."""
    more = ShardWriter(tmp_path / "more", record())
    for person, numbers in (("p0", range(3, 7)), ("p6", range(3, 7)), ("p9", range(5))):
        for number in numbers:
            more.write(make_sample(person, number, size=(80, 80)))
    more.close()
    result = shard([shards, tmp_path / "more"], tmp_path / "train")
    people = dict(group_by_person(read_shards(tmp_path / "train", kind="training-shards")))
    assert {person: len(photos) for person, photos in people.items()} == {
        "p0": 7, **{f"p{n}": 5 for n in range(1, 6)}, "p6": 7, "p9": 5,
    }  # fmt: skip
    assert result.samples == 44 and not result.rejected
    alone, both = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("more", "train"))
    assert set(both["record"]["inputs"]) == {"shards", "shards_2"} and alone["samples"] == 13
    words = [str(shards), str(tmp_path / "more"), "--out", str(tmp_path / "train"), "--json"]
    shown = CliRunner().invoke(app, ["shard", *words])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["samples"] == 44

    other = ShardWriter(tmp_path / "other", {**record(), "family": "sdxl"})
    other.write(make_sample("p1", 9, size=(80, 80)))
    other.close()
    with pytest.raises(BolidError, match="different families: .*shards with 'tiny', .*other with 'sdxl'") as error:
        shard([shards, tmp_path / "other"], tmp_path / "x")
    assert "one family" in error.value.hint and not (tmp_path / "x").exists()


def test_near_duplicates_are_dropped(tmp_path, make_sample, record):
    smooth = np.asarray(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize((192, 256))
    )
    buffer = io.BytesIO()
    Image.fromarray(smooth).resize((150, 200)).save(buffer, "JPEG", quality=60)
    writer = ShardWriter(tmp_path / "shards", record())
    for number in range(5):
        writer.write(make_sample("p1", number, size=(256, 192)))
    for number, image in ((10, encode_jpeg(smooth)), (11, buffer.getvalue())):
        writer.write(dataclasses.replace(make_sample("p1", number), image=image))
    writer.close()
    result = shard(tmp_path / "shards", tmp_path / "train")
    assert result.rejected == {NEAR_DUPLICATE: [f"p1/{11:016x}"]} and result.samples == 6


def test_difference_hash():
    gradient = np.tile(np.arange(0, 240, dtype=np.uint8)[None, :, None], (64, 1, 3))
    assert difference_hash(gradient).bit_count() == 256 and difference_hash(gradient[:, ::-1]) == 0


def test_bad_input(shards, tmp_path, make_sample, record):
    with pytest.raises(BolidError, match="--min-photos is 1"):
        shard(shards, tmp_path / "x", min_photos=1)
    with pytest.raises(BolidError, match="--val-fraction is 1"):
        shard(shards, tmp_path / "x", val_fraction=1)
    with pytest.raises(BolidError, match="was made with family 'tiny', but --family is 'sdxl'"):
        shard(shards, tmp_path / "x", family="sdxl")
    with pytest.raises(BolidError, match="nobody in .* has 9 photos that differ") as caught:
        shard(shards, tmp_path / "x", min_photos=9)
    assert "--min-photos" in caught.value.hint
    with pytest.raises(BolidError, match="there is no shard directory"):
        shard(tmp_path / "absent", tmp_path / "x")
    shard(shards, tmp_path / "train")
    with pytest.raises(BolidError, match="holds training-shards, not shards"):
        shard(tmp_path / "train", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    writer = ShardWriter(tmp_path / "one", record())
    for number in range(4):
        writer.write(make_sample("p1", number))
    writer.close()
    with pytest.raises(BolidError, match="one person cannot be split"):
        shard(tmp_path / "one", tmp_path / "x", val_fraction=0.5)


def test_command(shards, tmp_path):
    arguments = ["shard", str(shards), "--out", str(tmp_path / "train"), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'train'}\n"
    assert "30 photos of 6 people" in result.stderr and f"left out 3 photos of 1 people: {FEW_PHOTOS}" in result.stderr
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["persons"] == 6
    assert CliRunner().invoke(app, [*arguments, "--seed", "1"]).exit_code == 1  # another run's directory
