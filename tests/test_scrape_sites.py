"""scrape --site: three kinds of gallery on a real web server on the loopback interface."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from gallery import WEB, current_markup, encoded, files, jpeg, picture, records, table, theplace, whole
from PIL import Image

from bolid.scrape import TooManyFailed, scrape
from bolid.scrape.spiders import first_number


@pytest.mark.slow
def test_current_markup(server, tmp_path):
    current_markup(server, {"Anna Ivanova": 7, "Ann Few": 2, "Boris Petrov": 4})
    out = tmp_path / "photos"
    result = scrape(site=theplace(server, tmp_path), out=out, min_photos=4, license="all rights reserved", **WEB)
    assert (result.people, result.photos, result.new, result.dropped, result.failed) == (2, 11, 11, {}, {})
    assert result.people_dropped == {"fewer than --min-photos 4 photos on the site": 1}
    assert files(out) == {"Anna Ivanova": 7, "Boris Petrov": 4}
    whole(out)
    record = next(r for r in records(out) if r["url"].endswith("/img/0-0.jpg"))
    assert record["person"] == "Anna Ivanova" and record["page"].endswith("/0.html")
    assert record["sha256"] == hashlib.sha256(jpeg(0)).hexdigest() and record["bytes"] == len(jpeg(0))
    assert (record["width"], record["height"], record["license"], record["consent"]) == (
        120,
        96,
        "all rights reserved",
        "unknown",
    )
    assert "ignored_robots" not in record and record["time"].endswith("+00:00")
    assert (out / "Anna Ivanova" / f"{record['sha256'][:16]}.jpg").read_bytes() == jpeg(0), "the original's own bytes"
    people = table(out / "people.csv")
    assert [(row["person"], row["photos"]) for row in people] == [("Anna Ivanova", "7"), ("Boris Petrov", "4")]
    assert max(Counter(server.hits).values()) == 1, "nothing is fetched twice"
    assert not any("/private/" in path or "_s.jpg" in path for path in server.hits)
    assert server.agents == {f"bolid/{__import__('bolid').__version__} (+test@example.org)"}
    assert server.most_busy == 1, "one request at a time"

    asked = len(server.hits)
    again = scrape(site=theplace(server, tmp_path), out=out, min_photos=4, license="all rights reserved", **WEB)
    assert (again.photos, again.new) == (11, 0)
    assert set(server.hits[asked:]) <= {"/robots.txt"}, "a second run fetches nothing"


def test_older_markup_in_windows_1251(server, tmp_path):
    def old(text: str) -> tuple:
        return 200, {"Content-Type": "text/html"}, text.encode("windows-1251")

    server.pages["/photos/"] = old(
        '<table id="models_list"><tr><td><a href="gallery.php?id=1">Анна Иванова</a></td></tr></table>'
    )
    for page, shown in ((1, (0, 1, 2)), (2, (3, 4))):
        boxes = "".join(
            f'<div class="pic_box"><a href="pic.php?n={n}"><img src="/a/{n}_s.jpg"></a></div>' for n in shown
        )
        markup = old(
            f"<h1>Анна Иванова</h1><div class='gallery-pics-list'>{boxes}</div>"
            "<div class='listalka ltop'><a href='?id=1&page=1'>1</a> <a href='?id=1&amp;page=2'>2</a></div>"
        )
        server.pages[f"/photos/gallery.php?id=1&page={page}"] = markup
        if page == 1:
            server.pages["/photos/gallery.php?id=1"] = markup
    for n in range(5):
        server.pages[f"/photos/pic.php?n={n}"] = old(f"<div class='pic-big-box'><img src='/a/{n}_s.jpg'></div>")
        server.pages[f"/a/{n}.jpg"] = jpeg(n)
    result = scrape(site=theplace(server, tmp_path), out=tmp_path / "photos", min_photos=1, **WEB)
    assert files(result.out) == {"Анна Иванова": 5} and result.failed == {}
    assert {r["url"] for r in records(result.out)} == {f"{server.url}/a/{n}.jpg" for n in range(5)}, (
        "not the thumbnails"
    )


def test_a_site_in_toml(server, tmp_path):
    """Links in other places: names in attributes, pictures straight from thumbnails, a next link in circles."""
    toml = tmp_path / "mine.toml"
    toml.write_text(
        f'start = ["{server.url}/"]\npeople = "li.person a"\nphotos = "ul.thumbs img::attr(data-src)"\n'
        'next = "a[rel=next]"\nlicense = "CC BY 4.0"\nthumbnail = ["/thumbs/", "/full/"]\n'
    )
    server.pages["/"] = '<li class="person"><a href="/p/1"><img alt="Zoë"></a></li><a rel="next" href="/?2">more</a>'
    server.pages["/?2"] = '<li class="person"><a href="p/2" title="Noor">-</a></li><a rel="next" href="/">and round</a>'
    for p in (1, 2):
        thumbs = "".join(f'<img src="x.gif" data-src="/thumbs/{p}-{n}.png">' for n in range(3))
        server.pages[f"/p/{p}"] = f'<ul class="thumbs">{thumbs}</ul><a rel="next" href="/p/{p}">again</a>'
        for n in range(3):
            server.pages[f"/full/{p}-{n}.png"] = (200, {}, encoded(picture(10 * p + n), "PNG"))
    result = scrape(site=str(toml), out=tmp_path / "photos", min_photos=3, **WEB)
    assert files(result.out) == {"-": 3, "Zoë": 3} and max(Counter(server.hits).values()) == 1
    record = records(result.out)[0]
    assert record["license"] == "CC BY 4.0" and record["format"] == "PNG"
    stored = np.asarray(
        Image.open(
            result.out / "Zoë" / f"{next(r for r in records(result.out) if '/1-0' in r['url'])['sha256'][:16]}.jpg"
        )
    )
    assert np.abs(stored.astype(int) - np.asarray(picture(10))).mean() < 3, "other formats become JPEG"


@pytest.mark.parametrize(
    ("text", "number"),
    [("Всего 312 фото", 312), ("1 234 photos", 1234), ("12,345", 12345), ("1.234 Fotos", 1234), ("page 2 of 300", 2),
     ("4 1234", 4), ("none", None), ("", None)],
)  # fmt: skip
def test_photo_counts(text, number):
    assert first_number(text) == number


def test_a_count_of_thousands_of_digits_is_none():
    assert first_number("9" * 5000) is None and first_number("1,234 of " + "9" * 5000) == 1234


@pytest.mark.slow
def test_only_some_people(server, tmp_path):
    current_markup(server, {"Anna Ivanova": 3, "Anna Maria": 3, "Boris Petrov": 3, "Robot 47": 3})
    site = theplace(server, tmp_path)
    result = scrape(site=site, out=tmp_path / "a", person=["boris  PETROV", "Nobody"], min_photos=1, **WEB)
    assert files(result.out) == {"Boris Petrov": 3}
    assert any("found no Nobody" in warning for warning in result.warnings)
    assert not any("nna" in path for path in server.hits), "nobody else's pages are fetched"
    assert files(scrape(site=site, out=tmp_path / "d", person=["robot 47"], min_photos=1, **WEB).out) == {"Robot 47": 3}
    with pytest.raises(TooManyFailed, match="found no Anna Ivanovna") as error:
        scrape(site=site, out=tmp_path / "b", person=["Anna Ivanovna"], min_photos=1, **WEB)
    assert error.value.hint == "perhaps you mean anna ivanova, anna maria"
    result = scrape(site=site, out=tmp_path / "c", max_people=2, max_photos=2, min_photos=1, **WEB)
    assert list(files(result.out).values()) == [2, 2]


def test_two_people_of_one_name(server, tmp_path):
    current_markup(server, {"Anna": 2, "Bnna": 2})
    for path in [path for path in server.pages if "/66nna/" in path]:
        if isinstance(server.pages[path], str):
            server.pages[path] = server.pages[path].replace(">Bnna<", ">Anna<")
    result = scrape(site=theplace(server, tmp_path), out=tmp_path / "photos", min_photos=1, **WEB)
    assert sorted(files(result.out).values()) == [2, 2] and "Anna" in files(result.out)
