"""extract's own part: walking, decoding, rejecting, resuming. (test_models_tiny.py runs it with the real models.)"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import bolid.extract.command
from bolid import views
from bolid.errors import BolidError
from bolid.extract.command import BATCH, CHANGED, DUPLICATE, TooManyRejected, extract
from bolid.formats.shards import decode_image, read_index, read_shards
from bolid.views import View
from bolid_cli.main import app


class Reader:
    """Stands in for the models: what it sees is a function of the pixels, and of what else is in the batch."""

    looked_at = 0
    batches = 0
    ends_at = None  # the batch at which the process is killed

    def __init__(self, family, device, person):
        pass

    def read(self, images):
        if Reader.batches == Reader.ends_at:
            raise KeyboardInterrupt
        Reader.batches += 1
        results = []
        batch = float(np.mean([image.mean() for image in images])) if images else 0.0
        for image in images:
            Reader.looked_at += 1
            height, width = image.shape[:2]
            if image.mean() > 250:
                results.append(views.NO_PERSON)
                continue
            box = np.array([0.2 * width, 0.1 * height, 0.8 * width, 0.95 * height], np.float32)
            keypoints = np.linspace(1, 40, 51, dtype=np.float32).reshape(17, 3)
            keypoints[:, 2] = 0.9
            embed = np.full(8, image.mean() + batch, np.float32)
            results.append(View(image, box, 0.9, keypoints, None, None, embed, np.zeros((17, 4), np.float16)))
        return results


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    Reader.looked_at = Reader.batches = 0
    Reader.ends_at = None
    monkeypatch.setattr(bolid.extract.command, "ViewReader", Reader)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for person in ("anna", "ben", "carl"):
        (folder / person).mkdir(parents=True)
        for number in range(9):
            picture = Image.fromarray(rng.integers(0, 200, (4, 3, 3), dtype=np.uint8))
            picture = picture.resize((48, 64), Image.Resampling.BICUBIC)  # as plain as a render
            picture.save(folder / person / f"{number}.jpg")
            (folder / person / f"{number}.txt").write_text(f"photo {number} of {person}")
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def white(path: Path) -> None:
    Image.new("RGB", (48, 64), "white").save(path)
    path.write_bytes(path.read_bytes() + path.name.encode())  # not the same file twice


def test_what_is_written(photos, tmp_path):
    (photos / "anna" / "3.json").write_text('{"url": "https://example.org/3.jpg", "license": "CC0", "seed": 1}')
    result = extract(photos, tmp_path / "shards")
    assert (result.samples, result.persons, result.rejected) == (27, 3, {})
    samples = list(read_shards(tmp_path / "shards", kind="shards"))
    assert [s.person for s in samples] == ["anna"] * 9 + ["ben"] * 9 + ["carl"] * 9
    sample = samples[3]
    assert sample.caption == "photo 3 of anna" and sample.meta["source"] == "anna/3.jpg"
    assert sample.meta["url"].endswith("3.jpg") and sample.meta["license"] == "CC0" and "seed" not in sample.meta
    assert sample.key == f"anna/{sample.meta['sha256'][:16]}"
    assert decode_image(sample.image).shape == (64, 48, 3) == (sample.meta["height"], sample.meta["width"], 3)
    assert set(sample.tensors) == {"keypoints", "image_embed", "view_features"}  # no face was seen


def test_a_photo_is_encoded_once(photos, tmp_path):
    """Between the file and the training shard: a JPEG is stored as it is, without its metadata."""
    exif = Image.Exif()
    exif[0x010E] = "at home"
    path = photos / "anna" / "0.jpg"
    Image.open(path).save(path, quality=80, exif=exif)
    extract(photos, tmp_path / "shards")
    sample = next(iter(read_shards(tmp_path / "shards", kind="shards")))
    assert np.array_equal(decode_image(sample.image), np.asarray(Image.open(path)))
    assert b"at home" not in sample.image and int(sample.meta["dhash"], 16) > 0


@pytest.mark.parametrize("stop", [3, 9, 14, 20])
def test_resumed_equals_uninterrupted(photos, tmp_path, stop):
    white(photos / "ben" / "5.jpg")
    (photos / "anna" / "2.jpg").write_bytes(b"no picture")
    options = {"max_bytes": 60_000, "max_bad": 0.2}
    extract(photos, tmp_path / "whole", **options)

    Reader.batches, Reader.ends_at = 0, stop // BATCH
    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "resumed", **options)
    Reader.ends_at = None
    with pytest.raises(BolidError, match="no index.json"):
        read_index(tmp_path / "resumed")
    extract(photos, tmp_path / "resumed", **options)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_a_second_run_does_nothing_and_other_photos_are_refused(photos, tmp_path):
    extract(photos, tmp_path / "shards")
    looked_at = Reader.looked_at
    assert extract(photos, tmp_path / "shards").samples == 27
    assert Reader.looked_at == looked_at
    (photos / "anna" / "3.txt").write_text("another caption")
    with pytest.raises(BolidError, match="was written by another run: different inputs"):
        extract(photos, tmp_path / "shards")


def test_rejected_photos_are_listed_with_the_reason(photos, tmp_path):
    white(photos / "ben" / "5.jpg")
    (photos / "anna" / "2.jpg").write_bytes(b"no picture")
    whole = (photos / "anna" / "4.jpg").read_bytes()
    (photos / "anna" / "4.jpg").write_bytes(whole[: len(whole) // 2])
    shutil.copy(photos / "carl" / "0.jpg", photos / "carl" / "copy.jpg")
    with pytest.raises(
        TooManyRejected, match="4 of 28 photos were rejected, more than --max-bad 0.05 allows"
    ) as caught:
        extract(photos, tmp_path / "shards")
    assert "--max-bad 0.15" in caught.value.hint
    expected = {
        DUPLICATE: ["carl/copy.jpg"],
        "the file is not a picture": ["anna/2.jpg"],
        views.NO_PERSON: ["ben/5.jpg"],
    }
    rejected = read_index(tmp_path / "shards")["rejected"]
    assert rejected == caught.value.rejected and expected.items() <= rejected.items()
    assert [sources for reason, sources in rejected.items() if "damaged" in reason] == [["anna/4.jpg"]]
    # Everything is kept: the same command with a larger limit has nothing left to do.
    looked_at = Reader.looked_at
    assert extract(photos, tmp_path / "shards", max_bad=0.15).samples == 24
    assert Reader.looked_at == looked_at


def test_a_photo_that_changes_during_the_run_is_not_stored_under_the_old_hash(photos, tmp_path):
    path = photos / "anna" / "3.jpg"

    def replace(done, total, text):
        if text.startswith("reading the list") and done == total - 1:
            path.write_bytes((photos / "ben" / "3.jpg").read_bytes())

    result = extract(photos, tmp_path / "shards", progress=replace)
    assert result.samples == 26 and result.rejected == {CHANGED: ["anna/3.jpg"]}


def odd_entries(folder: Path) -> dict[str, str]:
    """Put into `folder` what is named like a photo and is none; name -> the message about it."""
    (folder / "away.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "album.jpg").mkdir()
    return {
        "away.jpg": "the file is a link to nothing",
        "pipe.png": "the file is a pipe, a socket or a device",
        "album.jpg": "the file is a folder",
    }


def test_one_odd_entry_never_ends_a_run(photos, tmp_path, monkeypatch):
    """A link to nothing, a pipe, a folder called x.jpg, captions that are none, and a person nobody may read."""
    expected = {f"anna/{name}": reason for name, reason in odd_entries(photos / "anna").items()}
    (photos / "ben" / "1.txt").write_bytes(b"\xff\xfe")
    (photos / "ben" / "2.txt").write_text("long " * 10_000)
    (photos / "ben" / "3.txt").unlink()
    (photos / "ben" / "3.txt").mkdir()
    (photos / "ben" / "4.txt").unlink()
    os.mkfifo(photos / "ben" / "4.txt")
    (photos / "carl" / "1.json").write_text("[" * 100_000)
    (photos / "carl" / "2.json").write_text('{"url": "\\ud800", "license": "CC0"}')
    os.mkfifo(photos / "carl" / "3.json")
    (photos / "dora").mkdir()
    listdir = os.listdir

    def refused(path="."):
        if Path(path).name == "dora":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)  # the tests may run as root, who may read all
    result = extract(photos, tmp_path / "shards", max_bad=1)
    reasons = {source: reason for reason, sources in result.rejected.items() for source in sources}
    captions = {source: reasons.pop(source) for source in [f"ben/{n}.jpg" for n in range(2, 5)]}
    assert reasons == {**expected, "dora": "the file cannot be read: Permission denied"}
    assert list(captions.values()) == [
        "its caption is too long to be one", "its caption 3.txt is no file", "its caption 4.txt is no file",
    ]  # fmt: skip
    assert result.samples == 27 - 3


def test_names_that_are_not_utf8(photos, tmp_path):
    os.rename(photos / "anna" / "3.jpg", os.fsencode(photos / "anna") + b"/\xff.jpg")
    os.rename(photos / "ben", os.fsencode(photos) + b"/b\xff")
    extract(photos, tmp_path / "shards")
    samples = list(read_shards(tmp_path / "shards"))
    assert {sample.person for sample in samples} == {"anna", "b\\xff", "carl"} and len(samples) == 27
    assert "anna/\\xff.jpg" in {sample.meta["source"] for sample in samples}


def test_one_bad_photo_of_a_few_is_no_failure(photos, tmp_path):
    white(photos / "ben" / "5.jpg")
    result = extract(photos / "ben", tmp_path / "shards")
    assert result.samples == 8 and result.rejected == {views.NO_PERSON: ["5.jpg"]} and not result.warning
    assert next(read_shards(tmp_path / "shards")).person == "ben"


def test_real_photographs_given_to_tiny(photos, tmp_path):
    for number in range(9):
        if number % 2:
            white(photos / "ben" / f"{number}.jpg")
    with pytest.raises(TooManyRejected) as caught:
        extract(photos / "ben", tmp_path / "some")
    assert "family tiny knows only rendered people" in caught.value.hint
    assert "family tiny knows only" in extract(photos / "ben", tmp_path / "some", max_bad=1).warning
    for path in (photos / "ben").glob("*.jpg"):
        white(path)
    with pytest.raises(TooManyRejected, match="none of the 9 photos could be used") as caught:
        extract(photos / "ben", tmp_path / "none")
    assert "choose another family" in caught.value.hint
    assert not (tmp_path / "none").exists()  # so that the same command works with another --family


def test_photos_of_several_people_alone(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Reader, "read", lambda self, images: [views.SEVERAL] * len(images))
    with pytest.raises(TooManyRejected, match="none of the 27 photos could be used") as caught:
        extract(photos, tmp_path / "none", select_person="only")
    assert caught.value.hint.startswith("--select-person main")


def test_options(photos, tmp_path):
    extract(photos, tmp_path / "small", max_side=32)
    assert decode_image(next(read_shards(tmp_path / "small")).image).shape == (32, 24, 3)
    with pytest.raises(BolidError, match="--workers is 0"):
        extract(photos, tmp_path / "x", workers=0)
    with pytest.raises(BolidError, match="no model family called 'huge'"):
        extract(photos, tmp_path / "x", family="huge")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BolidError, match="no photos in"):
        extract(tmp_path / "empty", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_command(photos, tmp_path):
    white(photos / "ben" / "5.jpg")
    result = CliRunner().invoke(app, ["extract", str(photos), "--out", str(tmp_path / "shards"), "--device", "cpu"])
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'shards'}\n"
    assert "family: tiny" in result.stderr and "26 photos of 3 people" in result.stderr
    assert "ben/5.jpg  no person found" in result.stderr
    result = CliRunner().invoke(app, ["extract", str(photos), "--out", str(tmp_path / "shards"), "--json", "-q"])
    assert json.loads(result.stdout)["samples"] == 26 and result.stderr == ""
    white(photos / "ben" / "4.jpg")
    result = CliRunner().invoke(app, ["extract", str(photos), "--out", str(tmp_path / "more")])
    assert result.exit_code == 1 and "ben/4.jpg  no person found" in result.stderr
    assert "error: 2 of 27 photos were rejected" in result.stderr and "hint: " in result.stderr
    result = CliRunner().invoke(app, ["extract", str(tmp_path / "absent")])
    assert result.exit_code == 1 and "absent does not exist" in result.stderr


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_of_other_programs(photos, tmp_path):
    """ShardWriter's keys with a folder, img2dataset's triples with and without a person, and a sample of no picture."""
    jpg = [(photos / "anna" / f"{n}.jpg").read_bytes() for n in range(6)]
    write_tar(tmp_path / "t" / "00000.tar", {
        "anna/0.jpg": jpg[0], "anna/0.txt": b"a woman", "anna/1.jpg": jpg[1], "anna/1.caption": "été".encode("utf-16"),
        "x.json": b"{}",
    })  # fmt: skip
    write_tar(tmp_path / "t" / "00001.tar", {
        "000010000.jpg": jpg[2], "000010000.txt": b"a man", "000010000.json": b'{"person": 7, "url": "http://a/b"}',
        "000010001.png": jpg[3], "000010001.json": b'{"caption": "on a beach", "key": "000010001"}',
        "./000010002.jpg": jpg[4], "./000010002.txt": b"\0" * 9, "../ben/3.jpg": jpg[5],
    })  # fmt: skip
    result = extract(tmp_path / "t" / "{00000..00001}.tar", tmp_path / "shards")
    samples = {sample.meta["source"]: sample for sample in read_shards(tmp_path / "shards")}
    assert {source: (sample.person, sample.caption) for source, sample in samples.items()} == {
        "00000.tar/anna/0.jpg": ("anna", "a woman"), "00000.tar/anna/1.jpg": ("anna", "été"),
        "00001.tar/000010000.jpg": ("7", "a man"), "00001.tar/../ben/3.jpg": ("ben", ""),
        "00001.tar/000010001.png": ("unnamed-00001-000010001", "on a beach"),
    }  # fmt: skip
    assert samples["00001.tar/000010000.jpg"].meta["url"] == "http://a/b"
    assert result.rejected == {"its caption is no text": ["00001.tar/./000010002.jpg"]}
    assert result.unread == {"a sample without a picture": ["00000.tar/x"]} and result.unnamed == 2
    assert extract(tmp_path / "t", tmp_path / "folder").samples == 5  # the folder of tars
    with pytest.raises(BolidError, match="1 of the 3 tars"):
        extract(tmp_path / "t" / "{00000..00002}.tar", tmp_path / "none")
    whole = (tmp_path / "t" / "00001.tar").read_bytes()
    (tmp_path / "t" / "00001.tar").write_bytes(whole[:1000])  # the others go on
    result = extract(tmp_path / "t", tmp_path / "part")
    assert result.samples == 2 and [*result.rejected.values()] == [["00001.tar"]]
    assert next(iter(result.rejected)).startswith("the tar is damaged or no tar")
    with pytest.raises(BolidError, match="the tar is damaged"):
        extract(tmp_path / "t" / "00001.tar", tmp_path / "none")


def test_what_is_not_used_is_said(photos, tmp_path):
    """A caption that is none rejects its photo, and ends no run; other files and people are counted."""
    (photos / "anna" / "3.txt").write_bytes(b"a" * 20_000)
    (photos / "anna" / "4.txt").rename(photos / "anna" / "4.caption")
    (photos / "anna" / "raw.cr2").write_bytes(b"x")
    (photos / "dora").mkdir()
    white(photos / "dora" / "0.jpg")
    run = CliRunner().invoke(
        app, ["extract", str(photos), "-o", str(tmp_path / "s"), "--device", "cpu", "--max-bad", "1"]
    )
    assert run.exit_code == 0, run.stderr
    assert "anna/3.jpg  its caption is too long to be one" in run.stderr
    assert "not read: 1 (anna/raw.cr2): no known picture (.cr2)" in run.stderr
    assert "1 people have no photo that could be used: dora" in run.stderr
    captions = {sample.meta["source"]: sample.caption for sample in read_shards(tmp_path / "s")}
    assert captions["anna/4.jpg"] == "photo 4 of anna" and "anna/3.jpg" not in captions
