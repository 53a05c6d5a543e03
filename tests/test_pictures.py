"""What is scored: folders, tables, run records and shards."""

from __future__ import annotations

import json

import pytest
from PIL import Image, PngImagePlugin

from bolid.errors import BolidError
from bolid.evaluate.pictures import assign_people, generated_pictures, reference_photos
from bolid.formats.shards import ShardWriter


def save(path, prompt=None, size=(48, 64), **record):
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if prompt is not None or record:
        info.add_itxt("bolid", json.dumps({"config": {"prompt": prompt}, **record}))
    Image.effect_noise(size, 40).convert("RGB").save(path, pnginfo=info)
    return path


def test_records_name_prompt_seed_and_photos(tmp_path):
    inputs = {"profile": "p", "photo_000": "a", "photo_001": "b", "body_adapter": "c"}
    save(tmp_path / "x.png", "a man", seed=7, inputs=inputs)
    (picture,) = generated_pictures(tmp_path).pictures
    assert (picture.prompt, picture.seed, picture.photos_used) == ("a man", 7, {"a", "b"})


@pytest.mark.parametrize(
    "record",
    [
        {"config": 5},
        {"config": {"prompt": "x"}, "inputs": []},
        {"config": {"prompt": "x"}, "inputs": {"photo_0": 5}},
        {"config": {"prompt": "x", "scales": 1}},
    ],
)
def test_a_record_of_another_form_counts_for_nothing(tmp_path, record):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("bolid", json.dumps({"kind": "picture", **record}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    (picture,) = generated_pictures(tmp_path).pictures
    assert not picture.record and not picture.prompt and not picture.photos_used and not picture.scales


def test_contact_sheets_are_no_pictures(tmp_path):
    save(tmp_path / "x.png", "a man", kind="picture")
    save(tmp_path / "grid.png", kind="grid")
    source = generated_pictures(tmp_path)
    assert len(source.pictures) == 1
    assert source.rejected == {"not one picture but a grid": [str(tmp_path / "grid.png")]}


def test_pictures_of_nobody(tmp_path):
    save(tmp_path / "a.png", "x", inputs={})
    save(tmp_path / "b.png", "x", inputs={"body_adapter": "c"})  # an invented person
    save(tmp_path / "c.png", "x", inputs={"profile": "p"})
    save(tmp_path / "d.png")
    assert [p.of_nobody for p in generated_pictures(tmp_path).pictures] == [True, True, False, False]


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.jsonl", "metadata.jsonl"])
def test_tables_beside_the_pictures(tmp_path, name):
    for file in ("sub/a.png", "b.png"):
        save(tmp_path / file)
    rows = [
        {"file": "sub/a.png", "prompt": 'a man, "tall"', "person": "p1", "seed": 3},
        {"file": "b.png", "prompt": "x"},
    ]
    if name.endswith(".csv"):
        text = 'file,prompt,person,seed\nsub/a.png,"a man, ""tall""",p1,3\nb.png,x,,\n'
    elif name.startswith("metadata"):  # the names that Hugging Face's image folders use
        text = "\n".join(json.dumps({"file_name": r["file"], "text": r["prompt"], **r}) for r in rows)
    else:
        text = "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    found = {p.source.rpartition("/")[2]: p for p in generated_pictures(tmp_path).pictures}
    assert (found["a.png"].prompt, found["a.png"].person, found["a.png"].seed) == ('a man, "tall"', "p1", 3)
    assert (found["b.png"].prompt, found["b.png"].person, found["b.png"].seed) == ("x", "", None)


def test_a_table_may_name_missing_pictures(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "prompts.csv").write_text("file,prompt\na.png,x\ngone.png,y\n")
    source = generated_pictures(tmp_path)
    assert len(source.pictures) == 1
    assert source.rejected == {"named in the table of prompts, but not there": [str(tmp_path / "gone.png")]}


@pytest.mark.parametrize(("text", "why"), [("prompt\nx\n", "names no file"), ("{broken", "cannot read the prompts")])
def test_bad_tables(tmp_path, text, why):
    save(tmp_path / "a.png")
    table = tmp_path / ("t.csv" if "\n" in text else "t.jsonl")
    table.write_text(text)
    with pytest.raises(BolidError, match=why) as error:
        generated_pictures(tmp_path, table)
    assert "columns file and prompt" in error.value.hint


def test_damaged_pictures_are_listed(tmp_path):
    save(tmp_path / "a.png", "x")
    cut = save(tmp_path / "cut.png", "x")
    cut.write_bytes(cut.read_bytes()[:200])
    source = generated_pictures(tmp_path)
    assert [p.source for p in source.pictures] == [str(tmp_path / "a.png")]
    assert any("damaged" in reason and str(cut) in names for reason, names in source.rejected.items())


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(BolidError, match="no pictures in") as error:
        generated_pictures(tmp_path)
    assert "PNG or JPEG" in error.value.hint
    with pytest.raises(BolidError, match="does not exist"):
        generated_pictures(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BolidError, match="is a file"):
        generated_pictures(tmp_path / "file")


def test_shards_are_folders_too(tmp_path, make_sample, record):
    writer = ShardWriter(tmp_path / "shards", record())
    for person in ("p1", "p2"):
        writer.write(make_sample(person, 5))
    writer.close()
    source = generated_pictures(tmp_path / "shards")
    assert [(p.person, p.prompt) for p in source.pictures] == [("p1", "photo 5 of p1"), ("p2", "photo 5 of p2")]
    assert source.load(source.pictures[0]).shape == (64, 48, 3)
    assert [p.sha256 for p in reference_photos(tmp_path / "shards").pictures] == [f"{5:016x}"] * 2


def test_whose_picture(tmp_path):
    save(tmp_path / "p1" / "a.png", "x")
    save(tmp_path / "b.png", "x")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("bolid", json.dumps({"config": {"prompt": "x", "person": "the profile p2.safetensors"}}))
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png", pnginfo=info)
    pictures = generated_pictures(tmp_path).pictures
    names = {
        p.source.rpartition("/")[2]: who for p, who in zip(pictures, assign_people(pictures, {"p1", "p2"}), strict=True)
    }
    assert names == {"a.png": "p1", "b.png": "", "c.png": "p2"}
    assert assign_people(pictures, {"only"}) == ["only"] * 3


def test_what_lies_among_the_reference_photos_is_said(tmp_path):
    save(tmp_path / "anna" / "1.png")
    (tmp_path / "anna" / "2.cr2").write_bytes(b"x")
    (tmp_path / "ben").mkdir()
    first, second = reference_photos(tmp_path).unread_notes()
    assert first.startswith(f"not read in {tmp_path}: 1 (anna/2.cr2, ...): no known picture (.cr2)")
    assert "ben" in second and "no photo in this person's folder" in second
