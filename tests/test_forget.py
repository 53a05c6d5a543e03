"""scrape --forget: what it deletes, what it leaves, and that a kill in the middle does no harm."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import forget_world
import pytest
import torch
from typer.testing import CliRunner

import bolid.scrape.forget
from bolid.errors import BolidError
from bolid.formats.profile import load_profile, save_profile
from bolid.formats.shards import ShardReader, ShardWriter, read_index, read_shards, removal, remove_person, samples_of
from bolid.scrape.command import scrape
from bolid.scrape.forget import forget
from bolid_cli.main import app


@pytest.fixture
def write_shards(make_sample, record):
    """write_shards(directory, people) -> a finished directory of three samples each, two or three to a tar."""
    return partial(forget_world.write_shards, make_sample, record)


@pytest.fixture
def world(tmp_path, monkeypatch, write_shards, record):
    """photos/ of Anna, Ben and Carl, shards/ and train/, and a profile of Anna and one of Ben."""
    monkeypatch.chdir(tmp_path)
    return forget_world.fill(tmp_path, write_shards, record)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_everything_of_a_person_and_nothing_else(world):
    before = tree(world)
    result = forget("anna")
    assert result.person == "anna" and len(result.photos) == 6, "three photos, three records"
    assert {name: len(keys) for name, keys in result.samples.items()} == {"shards": 3, "train/train": 3}
    assert result.profiles == [Path("anna.safetensors")]
    gone = {path for path in before - tree(world) if "shard-" not in path}
    assert gone == {path.as_posix() for path in result.photos} | {"anna.safetensors"}
    for directory, people in (("shards", {"ben", "carl"}), ("train/train", {"ben"}), ("train/val", {"carl"})):
        samples = list(read_shards(directory))
        index = read_index(directory)
        assert {s.person for s in samples} == people and len(samples) == index["samples"] == 3 * len(people)
        assert (index["persons"] == len(people) and index["rejected"] == {"no person found": ["ben/blurred.jpg"]}) or (
            directory == "train/val" and index["rejected"]["no person found"][0] == "ben/blurred.jpg"
        )
        listed = {shard["file"] for shard in index["shards"]}
        assert {path.name for path in Path(directory).glob("*.tar*")} == listed
    assert load_profile("ben.safetensors").record["kind"] == "profile"
    everything = b"".join(path.read_bytes() for path in world.rglob("*") if path.is_file() and "mine" not in path.parts)
    assert b"anna" not in everything, "no name left in any file, the database and the tables included"


def test_who_is_forgotten_is_not_collected_again(world):
    forget("ANNA")
    result = scrape("mine", out="photos", min_size=32)
    assert result.people == 2 and result.people_dropped == {"forgotten on request (--forget)": 1}
    assert scrape("mine/anna", out="photos", min_size=32).new == 0


def test_a_kill_before_the_tables_are_written(world):
    """The same command again takes the name out of them."""
    named = Path("photos/people.csv").read_bytes()
    forget("anna")
    forgotten = Path("photos/people.csv").read_bytes()
    Path("photos/people.csv").write_bytes(named)
    with pytest.raises(BolidError, match="there is nothing of 'anna'"):
        forget("anna")
    assert b"anna" in named and Path("photos/people.csv").read_bytes() == forgotten


def test_twice_and_nobody(world):
    forget("anna")
    for name, hint in (("anna", "carl"), ("bern", "perhaps you mean ben"), ("xyz", "people.csv says who is there")):
        with pytest.raises(BolidError, match=f"there is nothing of '{name}'") as error:
            forget(name)
        assert hint in error.value.hint or name == "anna"
    assert len(list(Path("photos/ben").iterdir())) == 6


def test_places_elsewhere(world, write_shards, tmp_path):
    write_shards(tmp_path / "old" / "shards-2")
    Path("anna.safetensors").rename("old/profile.safetensors")
    result = forget("anna", also=["old"])
    assert result.samples.keys() == {"shards", "train/train", "old/shards-2"}
    assert result.profiles == [Path("old/profile.safetensors")]
    with pytest.raises(BolidError, match="there is no nowhere"):
        forget("ben", also=["nowhere"])
    assert Path("photos/ben").exists()


def test_shards_alone_lead_to_profiles(world, record):
    """The photos are gone already; the samples know their hashes."""
    keys = samples_of("shards", "carl")
    run = record("profile", inputs={"photo_000": next(iter(keys.values()))})
    save_profile("carl.safetensors", torch.zeros(4), torch.zeros(4), None, torch.ones(1), run)
    result = forget("carl", out="no-such-folder")
    assert result.photos == [] and len(result.samples["shards"]) == 3 and Path("carl.safetensors") in result.profiles


def test_an_unfinished_directory_stops_it_before_anything_is_deleted(world, make_sample, record):
    writer = ShardWriter("shards2", record())
    writer.write(make_sample("anna", 0))
    before = tree(world)
    with pytest.raises(BolidError, match="shards2 is unfinished") as error:
        forget("anna", also=["shards2"])
    assert "nothing was deleted yet" in error.value.hint and tree(world) == before


def test_two_people_of_one_name(world):
    from bolid.formats.photos import PhotoFolder

    with PhotoFolder("photos") as photos:
        first = photos.person("Zoe", "https://example.org/1")
        second = photos.person("Zoe", "https://example.org/2")
    with pytest.raises(BolidError, match="several people are called 'zoe'") as error:
        forget("zoe")
    assert error.value.hint == "give one of these folders" and first in error.value.message
    assert forget(second).person == "Zoe"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("_copy_tar", 0),
        ("_copy_tar", 1),
        ("_copy_tar", 3),
        ("write_index", 0),
        ("write_index", 1),
        ("write_index", 2),
    ],
)
def test_a_kill_in_the_middle(world, monkeypatch, name, step):
    """At every stage: shards stay readable, and the same call finishes."""
    calls = iter(range(100))

    def die(*args, **kwargs):
        if next(calls) == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = getattr(removal, name)
    monkeypatch.setattr(removal, name, die)
    with pytest.raises(KeyboardInterrupt):
        forget("anna")
    assert len(list(read_shards("shards"))) in (9, 6) and len(list(read_shards("train/train"))) in (6, 3)
    monkeypatch.setattr(removal, name, original)
    forget("anna")
    for directory in ("shards", "train/train", "train/val"):
        assert "anna" not in {sample.person for sample in read_shards(directory)}
        listed = {shard["file"] for shard in read_index(directory)["shards"]}
        assert {path.name for path in Path(directory).iterdir()} == listed | {"index.json"}
    assert not Path("photos/anna").exists() and not Path("anna.safetensors").exists()


def test_shards_without_a_person_equal_shards_never_made_of_them(tmp_path, write_shards):
    """One tar: the bytes of the others' samples are those that would have been written without the person."""
    whole = write_shards(tmp_path / "whole", tar=10**9)
    assert len(remove_person(whole, "anna")) == 3 and remove_person(whole, "anna") == []
    without = write_shards(tmp_path / "without", ("ben", "carl"), tar=10**9)
    tars = [next(directory.glob("*.tar")).read_bytes() for directory in (whole, without)]
    assert tars[0] == tars[1]
    assert list(ShardReader(whole).keys) == list(ShardReader(without).keys)


def test_nobody_left(tmp_path, write_shards):
    directory = write_shards(tmp_path / "one", ("anna",))
    remove_person(directory, "anna")
    assert {path.name for path in directory.iterdir()} == {"index.json"}
    assert read_index(directory)["samples"] == 0 and read_index(directory)["rejected"] == {}


def test_the_command(world):
    result = CliRunner().invoke(app, ["scrape", "--forget", "Anna"])
    assert result.exit_code == 0, result.output
    assert "anna: deleted 6 files in photos, 6 samples in shards, train/train, 1 profiles" in result.stderr
    assert "trained on the photos" in result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 13 and "anna.safetensors" in lines and sum("shards/anna/" in line for line in lines) == 3
    result = json.loads(CliRunner().invoke(app, ["scrape", "--forget", "ben", "--json"]).stdout)
    assert result["person"] == "ben" and len(result["photos"]) == 6 and result["profiles"] == ["ben.safetensors"]
    assert bolid.scrape.forget.ForgetResult(**result).samples["shards"]
