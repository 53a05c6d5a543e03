"""scrape of one's own folder, its usage errors, and the command."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gallery import WEB, encoded, files, jpeg, picture, records, table, whole
from PIL import Image
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.formats.images import decode_image
from bolid.formats.photos import SAME_FILE
from bolid.formats.sites import SITES, read_site
from bolid.scrape import scrape
from bolid_cli.main import app

ROOT = Path(__file__).parent.parent


@pytest.fixture
def own(tmp_path):
    """mine/<person>/*.jpg with a caption, a PNG, and what does not belong."""
    folder = tmp_path / "mine"
    for person, seeds in (("anna", (0, 1, 2)), ("ben", (3, 4))):
        (folder / person).mkdir(parents=True)
        for seed in seeds:
            (folder / person / f"IMG_{seed}.jpg").write_bytes(jpeg(seed))
    (folder / "anna" / "IMG_0.txt").write_text("anna on a beach")
    (folder / "anna" / "IMG_1.json").write_text('{"url": "https://example.org/1.jpg", "license": "CC0", "seed": 7}')
    (folder / "anna" / "scan.png").write_bytes(encoded(picture(9), "PNG"))
    (folder / "ben" / "broken.jpg").write_bytes(jpeg(5)[:-500])
    (folder / "ben" / "copy.jpg").write_bytes(jpeg(3))
    return folder


def test_own_folder(own, tmp_path):
    out = tmp_path / "photos"
    result = scrape(own, out=out, min_size=64, license="mine", consent="written, 2026-01-02")
    assert result.warnings == []
    assert files(out) == {"anna": 4, "ben": 2} and result.dropped == {SAME_FILE: 1}
    assert result.failed == {"the file is damaged": 1}
    whole(out)
    stem = hashlib.sha256(jpeg(0)).hexdigest()[:16]
    assert (out / "anna" / f"{stem}.txt").read_text() == "anna on a beach\n"
    by_file = {record["file"]: record for record in records(out)}
    assert by_file["anna/IMG_0.jpg"]["consent"] == "written, 2026-01-02" and "url" not in by_file["anna/IMG_0.jpg"]
    assert by_file["anna/IMG_1.jpg"]["url"] == "https://example.org/1.jpg", "what was known of its origin stays known"
    assert by_file["anna/IMG_1.jpg"]["license"] == "mine" and "seed" not in by_file["anna/IMG_1.jpg"]
    assert {Path(row["source"]).name for row in table(out / "dropped.csv")} == {"broken.jpg", "copy.jpg"}

    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    (own / "ben" / "broken.jpg").write_bytes(jpeg(5))
    (own / "ben" / "new.jpg").write_bytes(jpeg(6))
    again = scrape(own, out=out, min_size=64, consent="written, 2026-01-02")
    assert again.new == 2 and again.failed == {} and files(out) == {"anna": 4, "ben": 4}
    assert all(path.stat().st_mtime_ns == time for path, time in times.items()), "what is there stays as it is"


@pytest.mark.parametrize("lost", ["the database", "the last row", "the folder's place"])
def test_what_was_kept_is_never_listed_as_dropped(own, tmp_path, lost):
    """A photo whose row is made anew from its record is the same photo when its file is seen again."""
    out = tmp_path / "photos"
    options = {"out": out, "min_size": 64, "max_bad": 1}
    before = scrape(own, **options)
    if lost == "the database":
        for path in out.glob(".scrape.sqlite*"):
            path.unlink()
    elif lost == "the last row":  # a kill between the photo and its row
        with contextlib.closing(sqlite3.connect(out / ".scrape.sqlite")) as database:
            database.execute("DELETE FROM photos WHERE source LIKE '%IMG_1%'")
            database.commit()
    else:
        own = own.rename(tmp_path / "moved")
    again = scrape(own, **options)
    assert (again.photos, again.new) == (before.photos, 0)
    listed = {"/".join(Path(row["source"]).parts[-2:]) for row in table(out / "dropped.csv")}
    assert listed == {"ben/broken.jpg", "ben/copy.jpg"} and listed.isdisjoint(r["file"] for r in records(out))


def test_odd_entries_and_names_never_end_a_run(own, tmp_path):
    expected = {
        "link.jpg": "the file is a link to nothing",
        "pipe.jpg": "the file is a pipe, a socket or a device",
        "album.jpg": "the file is a folder",
    }
    (own / "ben" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(own / "ben" / "pipe.jpg")
    (own / "ben" / "album.jpg").mkdir()
    (own / "anna" / "IMG_1.json").write_text("[" * 100_000)
    (own / "anna" / "IMG_2.txt").write_text("long " * 10_000)
    Path(os.fsdecode(os.fsencode(own) + b"/c\xff")).mkdir()
    Path(os.fsdecode(os.fsencode(own) + b"/c\xff/\xfe.jpg")).write_bytes(jpeg(8))
    result = scrape(own, out=tmp_path / "photos", min_size=64, max_bad=1)
    reasons = {Path(row["source"]).name: row["reason"] for row in table(result.out / "dropped.csv")}
    assert expected.items() <= reasons.items() and reasons["IMG_2.jpg"] == "its caption is too long to be one"
    assert result.photos == 6 and "c\\xff/\\xfe.jpg" in {record["file"] for record in records(result.out)}


def test_a_broken_exif_block_drops_no_photo(tmp_path):
    """scrape and extract go by one rule: the pixels do not depend on it."""
    (tmp_path / "mine").mkdir()
    for number, exif in enumerate((b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 40)):
        data = encoded(picture(number), exif=exif)
        (tmp_path / "mine" / f"{number}.jpg").write_bytes(data)
        decode_image(data)
    assert scrape(tmp_path / "mine", out=tmp_path / "photos", min_size=64).photos == 3


def test_what_is_not_read_is_reported(own, tmp_path):
    (own / "anna" / "IMG_7.CR2").write_bytes(b"x")
    (own / "anna" / "lost.caption").write_text("a man")
    (own / "dora").mkdir()
    (own / "anna" / "2020").mkdir()
    warnings = scrape(own, out=tmp_path / "photos", min_size=64, max_bad=1).warnings
    assert "not read: 1 (anna/IMG_7.CR2): no known picture (.cr2); save it as JPEG or PNG if it is a photo" in warnings
    assert "not read: 1 (anna/lost.caption): a caption without its photo" in warnings
    assert "not read: 1 (dora): no photo in this person's folder" in warnings
    assert any("not read: 1 (anna/2020): deeper folders" in warning for warning in warnings)


def test_a_flat_folder_is_one_person(own, tmp_path):
    assert files(scrape(own / "anna", out=tmp_path / "photos", min_size=64).out) == {"anna": 4}


def test_extract_reads_it_as_it_stands(own, tmp_path):
    """What `bolid extract` takes from the folder: people, captions, and where each photo comes from."""
    from bolid.extract.command import _origin, _photos

    out = scrape(own, out=tmp_path / "photos", min_size=64, license="mine", consent="written").out
    photos = _photos(out, None)
    assert Counter(photo.person for photo in photos) == {"anna": 4, "ben": 2}
    assert {photo.caption for photo in photos} == {"", "anna on a beach"}
    assert {photo.path.stem for photo in photos if photo.sha256[:16] == photo.path.stem} == {
        photo.path.stem
        for photo in photos
        if json.loads(photo.path.with_suffix(".json").read_text())["format"] == "JPEG"
    }
    origin = _origin(next(p.path for p in photos if p.caption))
    assert origin == {"license": "mine", "consent": "written"}


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([], "nothing to collect from", "give a FOLDER of your own photos"),
        (["x", "--site", "theplace"], "more than one thing to collect from", "or --site NAME"),
        (["absent"], "the photo folder absent does not exist", "give the folder"),
        (
            ["--urls", "absent.csv", "--contact", "a@b.c"],
            "there is no list absent.csv",
            "a .txt, .csv, .tsv or .parquet",
        ),
        (["--site", "nowhere", "--contact", "a@b.c"], "there is no site called 'nowhere'", "known are: theplace"),
        (["--site", "theplace"], "a web server should know whom to write to", "--contact"),
        (["--site", "theplace", "--contact", " "], "a web server should know whom to write to", "BOLID_CONTACT"),
        (["x", "--min-size", "0"], "--min-size is 0", "at least 1"),
        (["x", "--connections", "0"], "--connections is 0", "at least 1"),
        (["x", "--delay", "-1"], "--delay is -1", "seconds, 0 or more"),
        (["photos"], "photos is both read and written", "another --out"),
        (["x", "--also", "y"], "--also belongs to --forget", "leave it out"),
        (["x", "--forget", "y"], "--forget deletes; it does not collect", "without FOLDER"),
        (["x", "--watermark", "'"], "is no command line", "quotes"),
    ],
)
def test_usage(tmp_path, monkeypatch, arguments, message, hint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BOLID_CONTACT", raising=False)
    result = CliRunner().invoke(app, ["scrape", *arguments])
    assert result.exit_code == 1 and message in result.stderr and hint in result.stderr, result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start = 1", "'people' is missing"),
        ('start = "http://a/"\npeople = "a"\nphotos = "a"', "'start' is 'http://a/'"),
        ('start = ["a.html"]\npeople = "a"\nphotos = "a"', "'start' has 'a.html'"),
        ('start = ["http://a/"]\npeople = "a"\nphotos = "a"\ncolour = "x"', "unknown entry 'colour'"),
        ('start = ["http://a/"]\npeople = "a"\nphotos = 1', "'photos' is 1"),
        ('start = ["http://a/"]\npeople = "a"\nphotos = "a"\nthumbnail = ["(", ""]', "is no regular expression"),
        ('start = ["http://a/"]\npeople = "a"\nphotos = "a"\nencoding = "x"', "unknown encoding 'x'"),
        ('start = ["http://127.0.0.1:9/"]\npeople = "a["\nphotos = "a"', "people = 'a\\[' is no CSS selector"),
        ("start =", "is not valid TOML"),
    ],
)
def test_site_descriptions_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(BolidError, match=message) as error:
        scrape(site=str(path), out=tmp_path / "photos", **WEB)
    assert error.value.hint


def test_shipped_sites_are_whole():
    for path in SITES.glob("*.toml"):
        assert read_site(path.stem).name == path.stem


def test_the_command(own, tmp_path):
    out = tmp_path / "photos"
    result = CliRunner().invoke(app, ["scrape", str(own), "--out", str(out), "--min-size", "64", "--max-bad", "0.2"])
    assert result.exit_code == 0 and result.stdout == f"{out}\n", result.output
    assert "kept 6 photos of 2 people (6 new)" in result.stderr and SAME_FILE in result.stderr
    assert "warning: license or consent is recorded as unknown" in result.stderr
    shown = CliRunner().invoke(
        app, ["scrape", str(own), "-o", str(out), "--min-size", "64", "--max-bad", "1", "--json", "-q"]
    )
    report = json.loads(shown.stdout)
    assert (
        report["photos"] == 6
        and report["new"] == 0
        and report["dropped"] == {SAME_FILE: 1}
        and report["out"] == str(out)
    )
    result = CliRunner().invoke(app, ["scrape", str(own), "--out", str(tmp_path / "none"), "--min-size", "5000"])
    assert result.exit_code == 1 and "no photos could be kept" in result.stderr
    assert "lower --min-size" in result.stderr and "smaller than --min-size 5000" in result.stderr


def test_a_program_that_looks_for_watermarks(own, tmp_path):
    program = tmp_path / "look.py"
    program.write_text(
        "import sys; from PIL import Image; image = Image.open(sys.argv[-1]).convert('L').resize((1, 1))\n"
        "if image.getpixel((0, 0)) > 128: print('bright'); sys.exit(1)\n"
    )
    arguments = ["scrape", str(own), "-o", str(tmp_path / "photos"), "--min-size", "64", "--max-bad", "1", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--watermark", f"{sys.executable} {program}"])
    report = json.loads(result.stdout)
    bright = sum(np.asarray(picture(seed).convert("L").resize((1, 1))).item() > 128 for seed in (0, 1, 2, 3, 4, 9))
    assert 0 < bright < 6 and abs(report["dropped"]["watermark: bright"] - bright) <= 1
    result = CliRunner().invoke(app, [*arguments, "--watermark", "no-such-program"])
    assert result.exit_code == 1 and "--watermark 'no-such-program' cannot be run" in result.stderr


@pytest.mark.slow
def test_ignoring_robots_is_loud(server, tmp_path, listed):
    server.pages |= {"/robots.txt": "User-agent: *\nDisallow: /\n", "/0.jpg": jpeg(0)}
    arguments = ["--urls", str(listed({"Anna": ["/0.jpg"]})), "-o", str(tmp_path / "photos"), "--min-size", "64", "-q"]
    result = CliRunner().invoke(app, ["scrape", *arguments, "--contact", "a@b.c", "--delay", "0", "--ignore-robots"])
    assert result.exit_code == 0 and "robots.txt is ignored" in result.stderr, "even with --quiet"


@pytest.mark.slow
def test_scrape_then_extract(server, rendered_people, tmp_path):
    """examples/gallery.toml on a folder of rendered people as a plain web server lists it, then the tiny family."""
    from bolid.formats.shards import read_shards

    people = sorted(path.name for path in rendered_people.iterdir())
    server.pages["/"] = "".join(f'<li><a href="{name}/">{name}/</a></li>' for name in people)
    for name in people:
        found = sorted((rendered_people / name).iterdir())
        server.pages[f"/{name}/"] = "".join(f'<li><a href="{path.name}">{path.name}</a></li>' for path in found)
        server.pages |= {f"/{name}/{path.name}": path.read_bytes() for path in found}
    site = tmp_path / "gallery.toml"
    text = (ROOT / "examples" / "gallery.toml").read_text()
    site.write_text(text.replace("http://127.0.0.1:8000", server.url))
    photos, shards = tmp_path / "photos", tmp_path / "shards"
    arguments = ["--site", str(site), "--contact", "a@b.c", "--min-size", "128", "--min-photos", "4", "--delay", "0"]
    result = CliRunner().invoke(app, ["scrape", *arguments, "--out", str(photos)])
    assert result.exit_code == 0 and "kept 15 photos of 3 people (15 new)" in result.stderr, result.output
    assert not any(path.endswith((".json", ".txt")) and path != "/robots.txt" for path in server.hits)
    result = CliRunner().invoke(app, ["extract", str(photos), "--out", str(shards), "--max-bad", "0.5"])
    assert result.exit_code == 0, result.output
    samples = list(read_shards(shards))
    assert {sample.person for sample in samples} <= set(people) and len(samples) > 7
    for sample in samples:
        assert sample.meta["license"] == "my own" and sample.meta["consent"] == "unknown"
        assert sample.meta["url"].startswith(f"{server.url}/{sample.person}/")


@pytest.mark.slow
def test_one_person(rendered_people, tmp_path):
    """The family's own pose model: one rendered person stays, two side by side and nobody at all go."""
    folder = tmp_path / "mine" / "anna"
    folder.mkdir(parents=True)
    pictures = [Image.open(path).convert("RGB") for path in sorted((rendered_people / "p100000").glob("*.jpg"))]
    for n, one in enumerate(pictures):
        one.save(folder / f"one{n}.jpg", quality=95)
    for n, (left, right) in enumerate(itertools.pairwise(pictures)):
        both = Image.new("RGB", (left.width * 2, left.height))
        both.paste(left, (0, 0))
        both.paste(right, (left.width, 0))
        both.save(folder / f"two{n}.jpg", quality=95)
    picture(0, (192, 256)).save(folder / "nobody.jpg")
    options = {"out": tmp_path / "photos", "min_size": 64, "min_sharpness": 0, "family": "tiny"}
    result = scrape(tmp_path / "mine", one_person=True, **options)
    reasons = {Path(row["source"]).stem: row["reason"] for row in table(result.out / "dropped.csv")}
    kept = {Path(record["file"]).stem for record in records(result.out)}
    assert "nobody" in reasons and any(name.startswith("one") for name in kept)
    two = [reasons.get(f"two{n}", "") for n in range(len(pictures) - 1)]
    assert "several people (--one-person)" in two
    # Without it all are kept, and with it again they go.
    assert scrape(tmp_path / "mine", **options).photos > result.photos
    assert scrape(tmp_path / "mine", one_person=True, **options).photos == result.photos
