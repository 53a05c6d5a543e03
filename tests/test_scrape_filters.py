"""Which photos scrape keeps, and that names, kills, full disks and power cuts do no harm."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gallery import WEB, current_markup, encoded, files, jpeg, picture, records, table, theplace, whole
from PIL import Image

from bolid.errors import BolidError
from bolid.formats.photos import NEAR_DUPLICATE, REMOVED, SAME_FILE, PhotoFolder, folder_name
from bolid.scrape import rules, scrape
from bolid.scrape.check import MAX_PHASH_DISTANCE

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_filters(server, tmp_path, listed):
    first = picture(0, (240, 192))
    server.pages |= {
        "/first.jpg": encoded(first, quality=95),
        "/same.jpg": encoded(first, quality=95),
        "/near.jpg": encoded(first.resize((180, 144)), quality=50),
        "/small.jpg": encoded(first.resize((100, 63)), quality=95),
        "/blurred.jpg": jpeg(2, size=(240, 192), blur=12),
        "/marked.jpg": jpeg(3),
        "/other.jpg": jpeg(4),
    }
    out = tmp_path / "photos"

    def more(number):
        """A photo; after the first ten only once two photos are kept, however slow the machine is."""

        def page(handler):
            deadline = time.monotonic() + 60
            ten = sum(hit.startswith("/more") for hit in server.hits) > 10
            while ten and len(list((out / "Anna").glob("*.jpg"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            return photo

        photo = jpeg(10 + number)
        return page

    server.pages |= {f"/more{n}.jpg": more(n) for n in range(40)}

    def corner(image: np.ndarray) -> str:
        return (
            "a stripe" if np.abs(image[:16].mean((0, 1)) - np.asarray(picture(3))[:16].mean((0, 1))).max() < 8 else ""
        )

    paths = [path for path in server.pages if path != "/robots.txt"]
    people = {"Anna": paths, "Ben": ["/same.jpg?ben", "/ben.jpg"]}
    server.pages["/same.jpg?ben"], server.pages["/ben.jpg"] = server.pages["/same.jpg"], jpeg(6)
    options = {**WEB, "out": out, "watermark": corner, "max_photos": 2}
    result = scrape(urls=listed(people), **options)
    reasons = {row["source"].removeprefix(server.url): row["reason"] for row in table(out / "dropped.csv")}
    # Which of the good ones comes second is the network's and the cores' choice; some more were on their way by then.
    good = {"/other.jpg", *(f"/more{n}.jpg" for n in range(40))}
    second = good & {record["url"].removeprefix(server.url) for record in records(out)}
    enough = good & set(reasons)
    assert {reasons.pop(path) for path in enough} <= {"more than --max-photos 2"}
    [copy] = {"/first.jpg", "/same.jpg"} & set(reasons)  # whichever was checked later
    assert reasons == {
        copy: SAME_FILE,
        "/near.jpg": NEAR_DUPLICATE,
        "/small.jpg": "smaller than --min-size 64",
        "/blurred.jpg": "blurred (--min-sharpness 20)",
        "/marked.jpg": "watermark: a stripe",
        "/same.jpg?ben": SAME_FILE,
    }
    assert files(out) == {"Anna": 2, "Ben": 1} and len(enough) < 35, "enough is enough"
    assert result.dropped[SAME_FILE] == 2

    # Other filters: only what hangs on them is fetched again, and what is there is looked at again.
    before = Counter(server.hits)
    scrape(urls=listed(people), **{**options, "min_size": 60, "max_photos": None, "watermark": None})
    fetched = {path for path, number in Counter(server.hits).items() if number > before[path]} - {"/robots.txt"}
    assert fetched == {"/small.jpg", "/marked.jpg", *(good - second)}
    assert files(out) == {"Anna": 43, "Ben": 1}, "the small one is a near-duplicate"
    stricter = scrape(urls=listed(people), **{**options, "min_size": 150, "max_photos": None})
    assert stricter.photos == 1 and files(out) == {"Anna": 1}
    whole(out)


def test_people_with_too_few_photos_are_left_out(server, tmp_path, listed):
    for n in range(4):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    server.pages["/busy.jpg"] = (503, {}, b"")
    urls = listed({"Anna": ["/0.jpg", "/1.jpg"], "Ben": ["/2.jpg"], "Cy": ["/3.jpg", "/busy.jpg"]})
    result = scrape(urls=urls, out=tmp_path / "photos", min_photos=2, max_bad=1, **WEB)
    assert files(result.out) == {"Anna": 2, "Cy": 1}, "who may yet get enough stays"
    assert result.dropped == {"person with fewer than --min-photos 2 photos": 1}
    asked = server.count("/2.jpg")
    scrape(urls=urls, out=tmp_path / "photos", min_photos=2, max_bad=1, **WEB)
    assert server.count("/2.jpg") == asked, "settled"
    assert files(scrape(urls=urls, out=tmp_path / "photos", max_bad=1, **WEB).out) == {"Anna": 2, "Ben": 1, "Cy": 1}


def test_a_page_that_is_missing_costs_nobody_their_photos(server, tmp_path, monkeypatch):
    """Of whom not all pages could be fetched is not judged by --min-photos yet."""
    monkeypatch.setattr(rules, "RETRIES", 0)
    current_markup(server, {"Anna Ivanova": 5})
    page, down = "/photos/65nna Ivanova/?page=2", (500, {}, b"")
    server.pages[page], there = down, server.pages[page]
    options = {**WEB, "site": theplace(server, tmp_path), "out": tmp_path / "photos", "min_photos": 4}
    result = scrape(**options)
    assert files(result.out) == {"Anna Ivanova": 3} and result.failed == {"page: HTTP status 500": 1}
    server.pages[page] = there
    assert files(scrape(**options).out) == {"Anna Ivanova": 5}
    assert max(Counter(path for path in server.hits if path.startswith("/img/")).values()) == 1


@pytest.mark.slow
def test_the_threshold_for_near_duplicates(rendered_people):
    """A copy of a rendered photo is below it, another photo of the same person above, both with room."""
    import imagehash

    def phash(image: Image.Image):
        return imagehash.phash(image, hash_size=16)

    for person in sorted(rendered_people.iterdir()):
        images = [Image.open(path).convert("RGB") for path in sorted(person.glob("*.jpg"))]
        for number, image in enumerate(images):
            copy = Image.open(
                io.BytesIO(encoded(image.resize((image.width * 3 // 4, image.height * 3 // 4)), quality=50))
            )
            assert 2 * (phash(image) - phash(copy)) < MAX_PHASH_DISTANCE
            assert all(phash(image) - phash(other) > 2 * MAX_PHASH_DISTANCE for other in images[:number])


@pytest.mark.parametrize(
    "name",
    ["../../etc", "..", "a/b", "/absolute", ".hidden", "a\\b", "C:\\x", "nul\x00l", "new\nline", "a" * 300, "ж" * 300,
     "ends with dot.", "\u202egpj", "", "   ", "~", "-rf", "people.csv", "Dropped.CSV"],
)  # fmt: skip
def test_no_name_leaves_the_folder(tmp_path, name):
    folder = folder_name(name)
    assert folder.casefold() not in ("people.csv", "dropped.csv")
    path = tmp_path / folder
    path.mkdir()
    assert path.parent == tmp_path and path.resolve().parent == tmp_path.resolve()
    assert not folder.startswith(".") and "/" not in folder and len(folder.encode()) < 100
    assert folder_name("Анна Иванова") == "Анна Иванова" and folder_name("J. R. Smith") == "J. R. Smith"
    assert folder_name("a/b") != folder_name("a_b"), "two names never meet"


def test_names_from_the_web(server, tmp_path, listed):
    names = ["../../etc", "a/b", "Анна", ".ssh", "anna", "Anna"]
    for n in range(len(names)):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    out = tmp_path / "deep" / "er" / "photos"
    result = scrape(urls=listed({name: [f"/{n}.jpg"] for n, name in enumerate(names)}), out=out, **WEB)
    assert result.people == 6 and {r["person"] for r in records(out)} == set(names)
    assert len({folder.casefold() for folder in files(out)}) == 6, "also where capitals do not count"
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "list.csv"}
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["photos"]


def test_names_that_a_spreadsheet_would_calculate(server, tmp_path, listed):
    server.pages |= {"/0.jpg": jpeg(0), "/1.jpg": b"no picture"}
    urls = listed({"=cmd|' /C calc'!A0": ["/0.jpg"], "@SUM(1)": ["/1.jpg"]})
    out = scrape(urls=urls, out=tmp_path / "photos", max_bad=1, **WEB).out
    for name in ("people.csv", "dropped.csv"):
        cells = [cell for row in table(out / name) for cell in row.values()]
        assert any(cell.startswith(("'=", "'@")) for cell in cells)
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_a_symlink_trap(server, tmp_path, listed):
    server.pages["/0.jpg"] = jpeg(0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "Anna").symlink_to(elsewhere)
    with pytest.raises(BolidError, match="is a link that leads out of") as error:
        scrape(urls=listed({"Anna": ["/0.jpg"]}), out=tmp_path / "photos", **WEB)
    assert "remove the link" in error.value.hint and list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_kill_and_resume(server, tmp_path):
    """kill -9, Ctrl-C and SIGTERM in the middle: only what was on its way is fetched again, nothing is half-written."""
    current_markup(server, {"Anna Ivanova": 12, "Boris Petrov": 12})
    out, given, settled = tmp_path / "photos", set(), 0

    def give(path, page):
        # Not before the others that this process was given are settled, however busy the disk, or many would be on
        # their way when it is killed.
        limit = time.monotonic() + 3
        while len(given - {path}) > len(list(out.glob("*/*.json"))) - settled and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.1)
        given.add(path)
        return page

    for path, page in list(server.pages.items()):
        if path.startswith("/img/"):
            server.pages[path] = lambda handler, path=path, page=page: give(path, page)
    command = [
        sys.executable, "-m", "bolid_cli.main", "scrape", "--site", theplace(server, tmp_path), "--out", str(out),
        "--min-size", "64", "--min-photos", "12", "--delay", "0", "--contact", "test@example.org", "--quiet",
    ]  # fmt: skip
    for stop, how, status in ((4, signal.SIGKILL, -9), (11, signal.SIGINT, 130), (18, signal.SIGTERM, 143)):
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
        )
        while process.poll() is None and len({p for p in server.hits if p.startswith("/img/")}) < stop:
            time.sleep(0.005)
        process.send_signal(how)
        messages = process.communicate()[1].decode()
        what = {-9: "", 130: "interrupted", 143: "ended by SIGTERM"}[status]
        assert process.returncode == status
        assert messages == (f"{what}; the same command goes on where it stopped\n" if what else "")
        given.clear()
        settled = len(list(out.glob("*/*.json")))
    result = scrape(site=theplace(server, tmp_path), out=out, min_photos=12, **WEB)
    assert files(out) == {"Anna Ivanova": 12, "Boris Petrov": 12} and result.failed == {}
    whole(out)
    again = {path: number - 1 for path, number in Counter(server.hits).items() if number > 1 and path != "/robots.txt"}
    assert sum(again.values()) <= 2 * 3, f"at most, a kill, one on its way and one not yet settled: {again}"


def test_what_a_kill_leaves_is_put_right(server, tmp_path, listed):
    for n in range(4):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    urls = listed({"Anna": [f"/{n}.jpg" for n in range(4)]})
    out = tmp_path / "photos"
    scrape(urls=urls, out=out, **WEB)
    stem = {n: hashlib.sha256(jpeg(n)).hexdigest()[:16] for n in range(4)}
    folder = out / "Anna"
    # Killed before a photo was written; between a photo and its row; while writing; and one was removed by hand.
    with PhotoFolder(out) as photos:
        photos._db.execute("DELETE FROM photos WHERE source LIKE '%/0.jpg' OR source LIKE '%/1.jpg'")
    (folder / f"{stem[0]}.jpg").unlink()
    (folder / f".{stem[0]}.123.tmp.jpg").write_bytes(b"half")
    (folder / f"{stem[2]}.jpg").unlink()
    (folder / "notes.json").write_text("{}")
    before = Counter(server.hits)
    result = scrape(urls=urls, out=out, **WEB)
    fetched = {path for path, number in Counter(server.hits).items() if number > before[path]} - {"/robots.txt"}
    assert fetched == {"/0.jpg"} and result.photos == 3 and result.dropped == {REMOVED: 1}
    (folder / "notes.json").unlink()
    whole(out)
    # The database is lost: the photos are known from their records.
    for path in out.glob(".scrape.sqlite*"):
        path.unlink()
    before = Counter(server.hits)
    assert scrape(urls=urls, out=out, **WEB).photos == 4
    fetched = {path for path, number in Counter(server.hits).items() if number > before[path]} - {"/robots.txt"}
    assert fetched == {"/2.jpg"}


def test_a_power_cut(server, tmp_path, listed):
    """Files that had not reached the disk are empty or short; they are fetched again, what is whole is not."""
    for n in range(4):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    urls, out = listed({"Anna": [f"/{n}.jpg" for n in range(4)]}), tmp_path / "photos"
    scrape(urls=urls, out=out, **WEB)
    stem = {n: hashlib.sha256(jpeg(n)).hexdigest()[:16] for n in range(4)}
    with sqlite3.connect(out / ".scrape.sqlite") as database:
        database.execute("UPDATE notes SET value = 'yes' WHERE name = 'open'")
        database.execute("DELETE FROM photos WHERE source LIKE '%/2.jpg'")
    database.close()
    os.truncate(out / "Anna" / f"{stem[0]}.jpg", 0)
    os.truncate(out / "Anna" / f"{stem[1]}.jpg", 512)
    os.truncate(out / "Anna" / f"{stem[2]}.json", 0)
    before = Counter(server.hits)
    assert scrape(urls=urls, out=out, **WEB).photos == 4
    fetched = {path for path, number in Counter(server.hits).items() if number > before[path]} - {"/robots.txt"}
    assert fetched == {"/0.jpg", "/1.jpg", "/2.jpg"}
    whole(out)


def test_a_full_disk_ends_the_run(server, tmp_path, listed, monkeypatch):
    for n in range(4):
        server.pages[f"/{n}.jpg"] = jpeg(n)

    def full(path, data):
        raise BolidError(f"no space left on the disk while writing {path}", "free some space")

    monkeypatch.setattr("bolid.formats.photos._write", full)
    with pytest.raises(BolidError, match="no space left"):
        scrape(urls=listed({"Anna": [f"/{n}.jpg" for n in range(4)]}), out=tmp_path / "photos", **WEB)


def test_two_at_once_and_a_damaged_database(server, tmp_path, listed):
    server.pages["/0.jpg"] = jpeg(0)
    out = tmp_path / "photos"
    with PhotoFolder(out), pytest.raises(BolidError, match="is being written by another") as error:
        scrape(urls=listed({"Anna": ["/0.jpg"]}), out=out, **WEB)
    assert "wait for it" in error.value.hint
    (out / ".scrape.sqlite").write_bytes(b"no database " * 100)
    with pytest.raises(BolidError, match="is damaged") as error:
        scrape(urls=listed({"Anna": ["/0.jpg"]}), out=out, **WEB)
    assert "remove that file" in error.value.hint
