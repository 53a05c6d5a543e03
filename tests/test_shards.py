from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from bolid.errors import BolidError
from bolid.formats.shards import (
    Sample,
    ShardReader,
    ShardWriter,
    decode_sample,
    group_by_person,
    read_index,
    read_shards,
)
from bolid.formats.shards.reading import iter_tars


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def people(make_sample):
    return [make_sample(f"p{person:06d}", photo) for person in range(6) for photo in range(3)]


@pytest.fixture
def written(tmp_path, people, record):
    """A directory of several tars with two rejected photos."""
    return write(tmp_path / "shards", people, record())


def write(directory, people, record, stop_after=None, max_bytes=60_000):
    writer = ShardWriter(directory, record, max_bytes)
    for number, sample in enumerate(people):
        if number in (4, 13) and f"bad{number}.jpg" not in writer.done_rejects:
            writer.reject(f"bad{number}.jpg", "no person")
        if sample.key in writer.done_keys:
            continue
        if number == stop_after:
            return directory  # as if killed: nothing is closed
        writer.write(sample)
    writer.close()
    return directory


def test_round_trip(written, people):
    index = read_index(written)
    assert index["samples"] == 18 and index["persons"] == 6 and len(index["shards"]) > 2
    assert index["rejected"] == {"no person": ["bad4.jpg", "bad13.jpg"]}
    assert sorted(contents(written)) == ["index.json", *(shard["file"] for shard in index["shards"])]
    for sample, expected in zip(read_shards(written, kind="shards"), people, strict=True):
        assert (sample.key, sample.image, sample.meta, sample.caption) == (
            expected.key, expected.image, expected.meta, expected.caption,
        )  # fmt: skip
        assert sample.tensors.keys() == expected.tensors.keys()
        for name, value in expected.tensors.items():
            assert np.array_equal(sample.tensors[name], value) and sample.tensors[name].dtype == value.dtype
    assert [person for person, _ in group_by_person(read_shards(written))] == [f"p{n:06d}" for n in range(6)]
    wanted = [people[7].key, people[2].key]
    assert [sample.key for sample in ShardReader(written).read(wanted)] == wanted


def test_equal_input_gives_equal_bytes(written, tmp_path, people, record):
    assert contents(write(tmp_path / "again", people, record())) == contents(written)


@pytest.mark.parametrize("stop_after", range(0, 18, 2))
def test_resumed_run_equals_an_uninterrupted_one(written, tmp_path, people, record, stop_after):
    directory = write(tmp_path / "resumed", people, record(), stop_after=stop_after)
    with pytest.raises(BolidError, match="no index.json: its writing was interrupted"):
        next(read_shards(directory))
    journal = directory / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"file":"shard-0')  # cut while writing a line
    (directory / "shard-000099.tar").write_bytes(b"renamed, but not yet in the journal")
    (directory / "shard-000099.tar").unlink()
    assert contents(write(directory, people, record())) == contents(written)


def test_tar_that_the_journal_missed_is_written_again(written, tmp_path, people, record):
    directory = write(tmp_path / "resumed", people, record(), stop_after=12)
    journal = directory / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))
    assert contents(write(directory, people, record())) == contents(written)


def test_killed_process(written, tmp_path, record):
    """A real SIGKILL while a tar is open; the next run cleans up and finishes."""
    directory = tmp_path / "killed"
    code = f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        from bolid.formats import shards
        people = list(shards.read_shards({str(written)!r}))
        writer = shards.ShardWriter({str(directory)!r}, shards.read_index({str(written)!r})["record"], 60_000)
        for number, sample in enumerate(people[:11]):
            if number == 4: writer.reject("bad4.jpg", "no person")
            writer.write(sample)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert any(name.endswith(".tmp") for name in os.listdir(directory))
    assert contents(write(directory, list(read_shards(written)), record())) == contents(written)


def test_only_our_own_leftovers_are_removed(tmp_path, people, record):
    (tmp_path / "shards").mkdir()
    for name in (".notes.tmp.txt", ".x.tmp", ".shard-000000.tar.tmp", ".index.bolid-tmp.json"):
        (tmp_path / "shards" / name).write_text("thesis")
    write(tmp_path / "shards", people, record())
    assert {name for name in os.listdir(tmp_path / "shards") if name[0] == "."} == {".notes.tmp.txt", ".x.tmp"}


def test_finished_directory_is_left_alone_and_another_run_refused(written, people, record):
    before = contents(written)
    writer = ShardWriter(written, record())
    assert writer.complete and writer.close()["samples"] == 18
    with pytest.raises(BolidError, match="was written by another run: different config") as caught:
        ShardWriter(written, record(config={"person": "only"}))
    assert "another --out" in caught.value.hint
    assert contents(written) == before


def test_tars_that_are_gone_are_noticed_when_going_on(written, tmp_path, people, record):
    directory = write(tmp_path / "resumed", people, record(), stop_after=12)
    for place in (written, directory):
        (place / "shard-000001.tar").unlink()
        with pytest.raises(BolidError, match="shard-000001.tar is missing or has changed"):
            ShardWriter(place, record(), 60_000)


def test_a_group_stays_in_one_tar(tmp_path, people, record):
    writer = ShardWriter(tmp_path / "train", record("training-shards"), 60_000)
    for start in range(0, 18, 3):
        writer.write_group(people[start : start + 3])
    writer.close()
    places: dict[str, set[Path]] = {}
    for path, layout in iter_tars(tmp_path / "train", "training-shards"):
        for key in layout:
            places.setdefault(key.split("/")[0], set()).add(path)
    assert len(places) == 6 and all(len(paths) == 1 for paths in places.values())


def test_plain_webdataset_reads_the_tars(written, people):
    import webdataset

    urls = [str(written / shard["file"]) for shard in read_index(written)["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(decode_sample))
    assert [sample["__key__"] for sample in samples] == [sample.key for sample in people]
    assert samples[5]["jpg"].shape == (64, 48, 3) and samples[5]["json"] == people[5].meta
    assert samples[5]["txt"] == people[5].caption
    assert np.array_equal(samples[5]["safetensors"]["keypoints"], people[5].tensors["keypoints"])


def test_times_and_owners_are_left_out(written):
    import tarfile

    with tarfile.open(written / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert all((member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "") for member in members)
    assert [member.name.partition(".")[2] for member in members[:4]] == ["jpg", "json", "safetensors", "txt"]


def test_damage_is_noticed(written):
    tar = written / "shard-000001.tar"
    whole = tar.read_bytes()
    for damaged in (whole[:-1024], whole[: len(whole) // 2], whole[:700] + bytes([whole[700] ^ 1]) + whole[701:], b""):
        tar.write_bytes(damaged)
        with pytest.raises(BolidError, match="shard-000001.tar is damaged"):
            list(read_shards(written))
    tar.unlink()
    with pytest.raises(BolidError, match="cannot read .*shard-000001.tar"):
        list(read_shards(written))


def test_what_is_no_shard_directory(tmp_path, written):
    with pytest.raises(BolidError, match="there is no shard directory"):
        next(read_shards(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BolidError, match="has no index.json"):
        next(read_shards(tmp_path / "empty"))
    with pytest.raises(BolidError, match="holds shards, not training-shards"):
        next(read_shards(written, kind="training-shards"))
    (written / "index.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(BolidError, match="is not the index of a shard directory"):
        next(read_shards(written))
    (written / "index.json").unlink()
    with pytest.raises(BolidError, match="neither index.json nor journal.jsonl"):
        ShardWriter(written, {})


def change_index(directory, **fields):
    """Another index, with a checksum that fits."""
    index = {**json.loads((directory / "index.json").read_text()), **fields}
    del index["sha256"]
    (directory / "index.json").write_text(json.dumps(index))


def test_a_damaged_index_is_noticed(written):
    text = (written / "index.json").read_text()
    (written / "index.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(BolidError, match="its content does not match the checksum"):
        read_index(written)
    (written / "index.json").write_text(text)
    shards = read_index(written)["shards"]
    for fields, message in (
        ({"samples": 19}, "counts 19 samples, its tars have 18"),
        ({"samples": -1}, "-1 is no count"),
        ({"persons": 1.5}, "1.5 is no count"),
        ({"shards": [*shards, shards[0]]}, "names a tar twice"),
        ({"shards": [{**shards[0], "file": "../../x.tar"}, *shards[1:]]}, "is no tar's name"),
        ({"shards": [{**shards[0], "bytes": "many"}, *shards[1:]]}, "is no number of a tar's bytes"),
        ({"shards": 5}, "is not the index"),
        ({"record": {"kind": 5}}, "its record has no kind"),
        ({"rejected": {"x": [5]}}, "list of rejected photos"),
    ):
        (written / "index.json").write_text(text)
        change_index(written, **fields)
        with pytest.raises(BolidError, match=message):
            read_index(written)
    (written / "index.json").write_text("[" * 200_000)
    with pytest.raises(BolidError, match="nested too deeply"):
        read_index(written)


def test_numbers_of_the_index_are_compared_with_the_tars(written):
    text = (written / "index.json").read_text()
    change_index(written, persons=7)
    with pytest.raises(BolidError, match="another number of people"):
        list(read_shards(written))
    (written / "index.json").write_text(text)
    first, second, *others = read_index(written)["shards"]
    moved = [{**first, "count": first["count"] + 1}, {**second, "count": second["count"] - 1}, *others]
    change_index(written, shards=moved)
    with pytest.raises(BolidError, match="shard-000000.tar holds . samples, index.json counts"):
        list(read_shards(written))


def test_flipped_bits_are_noticed_when_going_on(written, tmp_path, people, record):
    directory = write(tmp_path / "resumed", people, record(), stop_after=12)
    for place in (written, directory):
        tar = place / "shard-000001.tar"
        data = bytearray(tar.read_bytes())
        data[700] ^= 1
        tar.write_bytes(data)
        with pytest.raises(BolidError, match="shard-000001.tar is missing or has changed"):
            ShardWriter(place, record(), 60_000)


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'"x"', b'{"file":"x"}', b"[" * 100_000, b"\xff\xfe", b'{"record":5}', b"\0"]
)
def test_a_damaged_journal_is_noticed(tmp_path, people, record, line):
    directory = write(tmp_path / "resumed", people, record(), stop_after=12)
    journal = directory / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    for number in range(2):
        journal.write_bytes(b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + b"\n")
        with pytest.raises(BolidError, match=f"line {number + 1} of .*journal.jsonl is damaged") as caught:
            ShardWriter(directory, record(), 60_000)
        assert "start again" in caught.value.hint


def test_full_disk(tmp_path, people, record, monkeypatch):
    import errno
    import tarfile

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path / "shards", record())
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(BolidError, match="no space left on the disk"):
        writer.write(people[0])
    monkeypatch.undo()
    assert os.listdir(tmp_path / "shards") == ["journal.jsonl"]
    assert read_index(write(tmp_path / "shards", people, record()))["samples"] == 18


def test_unusual_person_names(tmp_path, make_sample, record):
    names = ["Zoë Müller", "a.b", "x" * 120]
    writer = ShardWriter(tmp_path / "shards", record())
    for name in names:
        writer.write(make_sample(name))
    writer.close()
    assert [sample.person for sample in read_shards(tmp_path / "shards")] == names
    with pytest.raises(ValueError, match="bad sample key"):
        ShardWriter(tmp_path / "bad", record()).write(Sample("a/b.c", b"", {}, "", {}))
