"""Shards in an object store: the same as in a folder, against a local S3 server (moto)."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.extract.command import extract
from bolid.formats.shards import ShardReader, ShardWriter, read_index, read_shards, remove_person
from bolid.formats.storage import place
from bolid.run import home
from bolid.shard import shard
from bolid_cli.main import app

pytest.importorskip("s3fs", reason="pip install 'bolid[s3]'")
moto_server = pytest.importorskip("moto.server", reason="pip install 'bolid[test]'")


@pytest.fixture(scope="module")
def server():
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """The URL of an empty bucket of a local server."""
    import boto3
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", server), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_MAX_ATTEMPTS", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://photos"
    s3fs.S3FileSystem.clear_instance_cache()
    for entry in client.list_objects_v2(Bucket="photos").get("Contents", []):
        client.delete_object(Bucket="photos", Key=entry["Key"])
    client.delete_bucket(Bucket="photos")


@pytest.fixture
def samples(make_sample):
    return [make_sample(person, number) for person in ("anna", "ben") for number in range(8)]


def write(directory, samples, record, stop=None):
    writer = ShardWriter(directory, record("shards"), 60_000)
    for number, sample in enumerate(samples):
        if number == stop:
            return writer
        if sample.key not in writer.done_keys:
            writer.write(sample)
    writer.close()
    return writer


def test_the_same_bytes_as_in_a_folder_even_after_a_stop(bucket, samples, record, tmp_path):
    write(tmp_path / "local", samples, record)
    write(f"{bucket}/shards", samples, record, stop=11)
    with pytest.raises(BolidError, match="its writing was interrupted"):
        read_index(f"{bucket}/shards")
    resumed = write(f"{bucket}/shards", samples, record)
    assert resumed.done_keys
    there = {path.name: path.read_bytes() for path in place(f"{bucket}/shards").glob("*")}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}


def test_reading_fetches_each_tar_once_and_notices_damage(bucket, samples, record):
    write(f"{bucket}/shards", samples, record)
    read = list(read_shards(f"{bucket}/shards", kind="shards"))
    assert [sample.key for sample in read] == [sample.key for sample in samples]
    assert read[3].image == samples[3].image and read[3].caption == samples[3].caption
    copies = {path: path.stat().st_mtime_ns for path in (home() / "shards").iterdir()}
    assert len(copies) == len(read_index(f"{bucket}/shards")["shards"]) > 1
    wanted = [samples[9].key, samples[1].key]
    assert [sample.key for sample in ShardReader(f"{bucket}/shards").read(wanted)] == wanted
    assert {path: path.stat().st_mtime_ns for path in (home() / "shards").iterdir()} == copies

    for path in copies:
        path.unlink()
    tar = place(f"{bucket}/shards") / "shard-000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:600] + b"X" + data[601:])
    with pytest.raises(BolidError, match="is damaged"):
        list(read_shards(f"{bucket}/shards"))


def test_a_person_can_be_taken_out(bucket, samples, record):
    write(f"{bucket}/shards", samples, record)
    gone = remove_person(f"{bucket}/shards", "anna")
    assert gone == [sample.key for sample in samples[:8]]
    assert {sample.person for sample in read_shards(f"{bucket}/shards")} == {"ben"}
    names = {path.name for path in place(f"{bucket}/shards").glob("*")}
    assert names == {"index.json", *(shard["file"] for shard in read_index(f"{bucket}/shards")["shards"])}


def test_the_commands_take_urls(bucket, samples, record):
    write(f"{bucket}/shards", samples, record)
    result = CliRunner().invoke(app, ["inspect", f"{bucket}/shards", "--verify", "--json"], catch_exceptions=False)
    described = json.loads(result.stdout)
    assert described["samples"] == 16 and described["path"] == f"{bucket}/shards"
    result = CliRunner().invoke(app, ["train-vae", f"{bucket}/nothing"])
    assert result.exit_code == 1 and "there is no shard directory s3://photos/nothing" in result.stderr


@pytest.mark.parametrize(
    ("url", "message"),
    [("s3://no-such-bucket/shards", "no-such-bucket"), ("nonsense://a/b", "cannot reach nonsense://a/b")],
)
def test_places_that_cannot_be_written(bucket, record, samples, url, message):
    with pytest.raises(BolidError, match=message) as caught:
        write(url, samples, record)
    assert caught.value.hint


def test_a_store_that_does_not_answer(bucket, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(BolidError, match="cannot reach s3://photos/shards"):
        read_index("s3://photos/shards")


@pytest.mark.slow
def test_extract_and_shard_from_url_to_url(bucket, rendered_people, tmp_path):
    for base in (str(tmp_path), bucket):
        extract(rendered_people, f"{base}/shards", family="tiny", device="cpu", max_bad=0.2)
        shard(f"{base}/shards", f"{base}/train", device="cpu", min_photos=3)
    for name in ("shards", "train"):
        there = {path.name: path.read_bytes() for path in place(f"{bucket}/{name}").glob("*")}
        assert there == {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}


def test_nothing_stays_of_an_extract_that_found_nobody(bucket, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(BolidError, match="none of the 1 photos"):
        extract(tmp_path / "photos", f"{bucket}/shards", family="tiny", device="cpu")
    assert not list(place(f"{bucket}/shards").glob("*"))
