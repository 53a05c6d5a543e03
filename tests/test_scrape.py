"""scrape against a real web server on the loopback interface: three kinds of gallery, and all that goes wrong."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.formats.images import list_photos
from bolid.formats.photos import NEAR_DUPLICATE, REMOVED, SAME_FILE, PhotoFolder, folder_name
from bolid.formats.sites import SITES, read_site
from bolid.scrape import crawl
from bolid.scrape.command import DUPLICATE_BITS, TooManyFailed, scrape
from bolid_cli.main import app

ROOT = Path(__file__).parent.parent
WEB = {"contact": "test@example.org", "delay": 0.0, "min_size": 64}  # full speed: it is our own server


def picture(seed: int, size: tuple[int, int] = (120, 96), blur: float = 0) -> Image.Image:
    """Noise with the spectrum of photographs (1/f), tinted: no two seeds look alike, a smaller copy does."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(120)[None])
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(96, 120))) / frequency**1.1).real
    pixels = 100 + 50 * noise[..., None] / noise.std() + rng.uniform(0, 60, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize(size)
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur else image


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int, **options) -> bytes:
    return encoded(picture(seed, **options), quality=90)


class Server:
    """What it serves is a dict: path -> bytes, text, (status, headers, body), or a function of the request handler."""

    def __init__(self) -> None:
        self.pages: dict[str, object] = {}
        self.hits: list[str] = []
        self.agents: set[str] = set()
        self.times: dict[str, list[float]] = {}
        self.busy = self.most_busy = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.path = unquote(self.path)
                server.hits.append(self.path)
                server.times.setdefault(self.path, []).append(time.monotonic())
                server.agents.add(self.headers["User-Agent"])
                server.busy += 1
                server.most_busy = max(server.most_busy, server.busy)
                try:
                    page = server.pages.get(self.path, (404, {}, b"none"))
                    if callable(page):
                        page = page(self)
                    if page is not None:
                        self.answer(page)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    server.busy -= 1

            def answer(self, page):
                if isinstance(page, bytes):
                    page = (200, {"Content-Type": "image/jpeg"}, page)
                elif isinstance(page, str):
                    page = (200, {"Content-Type": "text/html; charset=utf-8"}, page.encode())
                status, headers, body = page
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def count(self, path: str) -> int:
        return self.hits.count(path)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server():
    server = Server()
    server.pages["/robots.txt"] = "User-agent: *\nDisallow: /private/\n"
    yield server
    server.close()


@pytest.fixture
def listed(server, tmp_path):
    """listed({person: [path, ...]}) -> a CSV of these addresses on the server."""

    def write(people: dict[str, list[str]], name: str = "list.csv") -> Path:
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("person", "url"))
            rows.writerows(
                (p, path if "://" in path else server.url + path) for p, paths in people.items() for path in paths
            )
        return tmp_path / name

    return write


def files(out: Path) -> dict[str, int]:
    """person -> photos."""
    return dict(Counter(person for person, _ in list_photos(out)))


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*/*.json"))]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def whole(out: Path) -> None:
    """Nothing half-written: every photo has a record that fits, and nothing else lies about."""
    for path in out.glob("*/*"):
        assert path.suffix in (".jpg", ".json", ".txt") and not path.name.startswith("."), path
    for path in out.glob("*/*.jpg"):
        record = json.loads(path.with_suffix(".json").read_text("utf-8"))
        assert record["sha256"][:16] == path.stem
        Image.open(path).load()
    assert len(list(out.glob("*/*.jpg"))) == len(list(out.glob("*/*.json")))


# ------------------------------------------------------------------------------------------------- three kinds of site


def theplace(server: Server, tmp_path: Path) -> str:
    """The shipped description, turned to the local server."""
    text = (SITES / "theplace.toml").read_text("utf-8")
    assert "https://www.theplace.ru" in text
    path = tmp_path / "theplace.toml"
    path.write_text(text.replace("https://www.theplace.ru", server.url), "utf-8")
    return str(path)


def current_markup(server: Server, people: dict[str, int], said: dict[str, int] | None = None) -> None:
    """theplace's markup of 2025: letters, lists, people with pages of 3 photos, a page for each photo."""
    initials = sorted({name[0] for name in people})
    letters = "".join(f'<a href="/photos/letter/{ord(i)}/">{i}</a>' for i in initials)
    server.pages["/photos/"] = f'<div class="letters-list">{letters}</div><a href="/private/x">no</a>'
    for initial in initials:
        links = "".join(f'<div><a href="/photos/{ord(n[0])}{n[1:]}/">{n}</a></div>' for n in people if n[0] == initial)
        server.pages[f"/photos/letter/{ord(initial)}/"] = f'<div class="models_list row my-5">{links}</div>'
    for number, (name, photos) in enumerate(people.items()):
        base = f"/photos/{ord(name[0])}{name[1:]}/"
        last = -(-photos // 3)
        for page in range(1, last + 1):
            shown = range(3 * page - 3, min(photos, 3 * page))
            pics = "".join(
                f'<div class="p-1"><a href="{base}{n}.html"><img src="/t/{n}_s.jpg"></a></div>' for n in shown
            )
            more = "".join(f'<a href="{base}?page={n}">{n}</a>' for n in range(1, last + 1) if n != page)
            server.pages[base if page == 1 else f"{base}?page={page}"] = (
                f'<div class="main-col-content"><h1 class="my-3">{name}</h1>'
                f'<div class="d-none d-sm-block"><p>Всего {(said or people)[name]} фото</p></div></div>'
                f'<div class="gallery-pics-list photos-pics-list">{pics}</div><div class="listalka">{more}</div>'
            )
        server.pages[f"{base}?page=1"] = server.pages[base]
        for n in range(photos):
            server.pages[f"{base}{n}.html"] = (
                f'<span class="s-pic"><img class="pic big_pic" src="/img/{number}-{n}.jpg"></span>'
            )
            server.pages[f"/img/{number}-{n}.jpg"] = jpeg(100 * number + n)


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
    assert crawl._number(text) == number


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


# ------------------------------------------------------------------------------------------------- lists of addresses


def test_lists(server, tmp_path, listed):
    for n in range(4):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    expected = {"Anna": 2, "Ben Ali": 1, "list": 1}
    (tmp_path / "list.txt").write_text(
        f"# mine\nAnna {server.url}/0.jpg\nAnna\t{server.url}/1.jpg\n\nBen Ali {server.url}/2.jpg\n{server.url}/3.jpg\n"
    )
    assert files(scrape(urls=tmp_path / "list.txt", out=tmp_path / "a", **WEB).out) == expected
    people = {"Anna": ["/0.jpg", "/1.jpg"], "Ben Ali": ["/2.jpg"], "": ["/3.jpg"]}
    assert files(scrape(urls=listed(people), out=tmp_path / "b", **WEB).out) == expected
    import polars

    polars.read_csv(tmp_path / "list.csv").write_parquet(tmp_path / "list.parquet")
    assert files(scrape(urls=tmp_path / "list.parquet", out=tmp_path / "c", **WEB).out) == expected


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.csv", b"name,link\nx,http://a/\n", "has the columns link, name", "needs the columns person,url"),
        ("a.csv", b"person,url\n", "there are no addresses in", "one a line"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text", "save it as UTF-8"),
        ("a.parquet", b"PAR1nonsense", "cannot read", "write it again"),
        ("a.json", b"[]", "is no .txt, .csv or .parquet file", "one of these formats"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, name, content, message, hint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BolidError, match=message) as error:
        scrape(urls=tmp_path / name, out=tmp_path / "photos", **WEB)
    assert hint in error.value.hint and not (tmp_path / "photos").exists()


# ----------------------------------------------------------------------------------------- what goes wrong on the web


def test_what_goes_wrong(server, tmp_path, listed, monkeypatch):
    """Every kind of failure in one run: each has its reason, and none costs another photo."""
    monkeypatch.setattr(crawl, "TIMEOUT", 2)
    monkeypatch.setattr(crawl, "RETRIES", 1)
    good = jpeg(1)

    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(good)))
        handler.end_headers()
        for byte in good[:40]:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.1)

    def cut_off(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(good)))
        handler.end_headers()
        handler.wfile.write(good[: len(good) // 2])
        handler.close_connection = True

    def endless(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        block = b"100000\r\n" + bytes(2**20) + b"\r\n"
        for _ in range(64):
            handler.wfile.write(block)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/x.jpg"
    server.pages |= {
        "/good.jpg": good,
        "/500.jpg": (500, {}, b"oh"),
        "/slow.jpg": slow,
        "/cut.jpg": cut_off,
        "/truncated.jpg": jpeg(2)[:-900],
        "/moved.jpg": (302, {"Location": "/moved/here.jpg"}, b""),
        "/moved/here.jpg": jpeg(3),
        "/round.jpg": (302, {"Location": "/round.jpg?2"}, b""),
        "/round.jpg?2": (302, {"Location": "/round.jpg"}, b""),
        "/huge.jpg": (200, {"Content-Length": str(10**12)}, b"x"),
        "/endless.jpg": endless,
        "/page.jpg": "<html>you are not logged in</html>",
        "/bomb.png": (200, {}, bomb),
        "/file.jpg": (302, {"Location": "file:///etc/passwd"}, b""),
        "/private/a.jpg": jpeg(4),
        "/noai.jpg": (200, {"X-Robots-Tag": "otherbot: noindex, NoImageAI"}, jpeg(5)),
        "/tdm.jpg": (200, {"TDM-Reservation": "1"}, jpeg(6)),
        "/open.jpg": (200, {"TDM-Reservation": "0", "X-Robots-Tag": "noindex"}, jpeg(7)),
    }  # fmt: skip
    paths = [path for path in server.pages if path not in ("/robots.txt", "/moved/here.jpg", "/round.jpg?2")]
    odd = [nobody, "file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "/missing.jpg"]
    people = {"Anna": [path for path in paths if path != "/file.jpg"] + odd, "Ben": ["/file.jpg"]}
    result = scrape(urls=listed(people), out=tmp_path / "photos", max_bad=1, connections=4, **WEB)
    assert {r["url"].removeprefix(server.url) for r in records(result.out)} == {"/good.jpg", "/moved.jpg", "/open.jpg"}
    reasons = {row["source"].removeprefix(server.url): row["reason"] for row in table(result.out / "dropped.csv")}
    redirected = reasons.pop("/file.jpg")
    assert redirected.startswith(("HTTP status 302", "cannot be fetched", crawl.LOOP))
    assert reasons == {
        "/500.jpg": "HTTP status 500",
        "/missing.jpg": "HTTP status 404",
        "/slow.jpg": "no answer within 2 s",
        "/cut.jpg": "the connection broke off",
        "/truncated.jpg": "the file is damaged",
        "/round.jpg": crawl.LOOP,
        "/huge.jpg": crawl.TOO_LARGE,
        "/endless.jpg": crawl.TOO_LARGE,
        "/page.jpg": "the file is not a picture",
        "/bomb.png": "the file is too large a picture (more than 100 megapixels)",
        "/private/a.jpg": crawl.ROBOTS,
        "/noai.jpg": crawl.RESERVED,
        "/tdm.jpg": crawl.RESERVED,
        nobody: crawl.ROBOTS_UNREACHABLE,
        "file:///etc/passwd": crawl.NO_ADDRESS,
        "ftp://127.0.0.1/x": crawl.NO_ADDRESS,
        "http://": reasons["http://"],
    }
    assert server.count("/500.jpg") == server.count("/cut.jpg") == 2 and server.count("/page.jpg") == 1
    assert server.count("/private/a.jpg") == 0
    assert result.dropped == {crawl.RESERVED: 2, crawl.ROBOTS: 1}
    whole(result.out)

    # What may work later is tried again; what is settled is not.
    server.pages["/500.jpg"], server.pages["/slow.jpg"] = jpeg(8), jpeg(9)
    before = Counter(server.hits)
    with pytest.raises(
        TooManyFailed, match=r"of \d+ photos could not be fetched or read, more than --max-bad 0.05"
    ) as error:
        scrape(urls=listed(people), out=tmp_path / "photos", connections=4, **WEB)
    assert "dropped.csv" in error.value.hint and error.value.result.new == 2 and error.value.result.photos == 5
    tried = {path for path, number in Counter(server.hits).items() if number > before[path]}
    assert (
        {"/500.jpg", "/slow.jpg", "/cut.jpg"}
        <= tried
        <= {"/500.jpg", "/slow.jpg", "/cut.jpg", "/robots.txt", "/file.jpg"}
    )


def test_a_server_that_asks_for_pauses(server, tmp_path, listed):
    answers = iter(
        [(429, {"Retry-After": "1"}, b""), (503, {"Retry-After": formatdate(time.time() + 3, usegmt=True)}, b"")]
    )
    server.pages |= {"/0.jpg": lambda handler: next(answers, jpeg(0)), "/1.jpg": jpeg(1)}
    said = []
    result = scrape(
        urls=listed({"Anna": ["/0.jpg", "/1.jpg"]}),
        out=tmp_path / "photos",
        **WEB,
        progress=lambda d, t, text: said.append(text),
    )
    assert result.photos == 2 and server.count("/0.jpg") == 3
    first, second, _ = server.times["/0.jpg"]
    assert second - first >= 1 and all(not first < t < first + 1 for t in server.times["/1.jpg"]), (
        "the whole host waits"
    )

    server.pages["/2.jpg"] = (429, {"Retry-After": "86400"}, b"")
    with pytest.raises(TooManyFailed) as error:
        scrape(urls=listed({"Ben": ["/2.jpg"]}), out=tmp_path / "other", **WEB)
    assert error.value.result.failed == {crawl.BUSY: 1} and server.count("/2.jpg") == 1


@pytest.mark.parametrize(
    ("robots", "reason"),
    [
        ("User-agent: *\nDisallow: /\n", crawl.ROBOTS),
        ("User-agent: bolid\nDisallow: /*.jpg$\n\nUser-agent: *\nAllow: /\n", crawl.ROBOTS),
        ((500, {}, b""), crawl.ROBOTS_UNREACHABLE),
        ((403, {}, b"User-agent: *\nDisallow: /\n"), ""),
        ((404, {}, b"none"), ""),
        (b"\x00\xff not a robots.txt \n\xfe", ""),
    ],
)
def test_robots(server, tmp_path, listed, robots, reason):
    server.pages |= {"/robots.txt": robots, "/0.jpg": jpeg(0)}
    urls = listed({"Anna": ["/0.jpg"]})
    if not reason:
        assert scrape(urls=urls, out=tmp_path / "photos", **WEB).photos == 1
        return
    with pytest.raises(TooManyFailed, match="no photos could be kept") as error:
        scrape(urls=urls, out=tmp_path / "photos", **WEB)
    assert reason in error.value.message and server.count("/0.jpg") == 0
    assert error.value.hint == "the owner does not want it; ask them"
    result = scrape(urls=urls, out=tmp_path / "photos", ignore_robots=True, **WEB)
    assert result.photos == 1 and records(result.out)[0]["ignored_robots"] == "yes"


def test_crawl_delay_and_least_delay(server, tmp_path, listed):
    for n in range(3):
        server.pages[f"/{n}.jpg"] = jpeg(n)
    server.pages["/robots.txt"] = "User-agent: *\nCrawl-delay: 0.8\n"
    urls = listed({"Anna": [f"/{n}.jpg" for n in range(3)]})
    assert scrape(urls=urls, out=tmp_path / "a", connections=3, **WEB).photos == 3
    times = sorted(t for path, when in server.times.items() if path.endswith("jpg") for t in when)
    # Half of it: requests leave in time, but a busy machine's server notes the first one late.
    assert times[2] - times[0] >= 2 * 0.8 * 0.5, "as robots.txt asks"
    server.pages["/robots.txt"] = ""
    server.times.clear()
    assert scrape(urls=urls, out=tmp_path / "b", **{**WEB, "delay": 0.6}).photos == 3
    times = sorted(t for path, when in server.times.items() if path.endswith("jpg") for t in when)
    assert times[2] - times[0] >= 2 * 0.6 * 0.5 * 0.5, "AutoThrottle varies the delay by half"


def test_pages_that_reserve_their_rights(server, tmp_path):
    current_markup(server, {"Anna Ivanova": 2, "Boris Petrov": 2})
    for path, page in list(server.pages.items()):
        if path.endswith("Ivanova/0.html"):
            server.pages[path] = '<meta name="robots" content="index, noai">' + page
        if path.endswith("Petrov/"):
            server.pages[path] = '<meta name="tdm-reservation" content="1">' + page
    result = scrape(site=theplace(server, tmp_path), out=tmp_path / "photos", min_photos=1, **WEB)
    assert files(result.out) == {"Anna Ivanova": 1} and result.dropped == {f"page: {crawl.RESERVED}": 2}


def test_a_site_that_is_not_there(server, tmp_path):
    with pytest.raises(TooManyFailed, match="page: HTTP status 404: 1") as error:
        scrape(site=theplace(server, tmp_path), out=tmp_path / "photos", **WEB)
    assert "check the addresses" in error.value.hint


# ------------------------------------------------------------------------------------------------------------- filters


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
        **{f"/more{n}.jpg": jpeg(10 + n) for n in range(40)},
    }

    def corner(image: np.ndarray) -> str:
        return (
            "a stripe" if np.abs(image[:16].mean((0, 1)) - np.asarray(picture(3))[:16].mean((0, 1))).max() < 8 else ""
        )

    paths = [path for path in server.pages if path != "/robots.txt"]
    people = {"Anna": paths, "Ben": ["/same.jpg?ben", "/ben.jpg"]}
    server.pages["/same.jpg?ben"], server.pages["/ben.jpg"] = server.pages["/same.jpg"], jpeg(6)
    out = tmp_path / "photos"
    options = {**WEB, "out": out, "watermark": corner, "max_photos": 2}
    result = scrape(urls=listed(people), **options)
    reasons = {row["source"].removeprefix(server.url): row["reason"] for row in table(out / "dropped.csv")}
    # Which of the good ones comes second is the network's and the cores' choice; some more were on their way by then.
    good = {"/other.jpg", *(f"/more{n}.jpg" for n in range(40))}
    second = good & {record["url"].removeprefix(server.url) for record in records(out)}
    enough = good & set(reasons)
    assert {reasons.pop(path) for path in enough} <= {"more than --max-photos 2"}
    assert reasons == {
        "/same.jpg": SAME_FILE,
        "/near.jpg": NEAR_DUPLICATE,
        "/small.jpg": "smaller than --min-size 64",
        "/blurred.jpg": "blurred (--min-sharpness 20)",
        "/marked.jpg": "watermark: a stripe",
        "/same.jpg?ben": SAME_FILE,
    }
    assert files(out) == {"Anna": 2, "Ben": 1} and len(enough) < 20, "enough is enough"
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
    monkeypatch.setattr(crawl, "RETRIES", 0)
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
            assert 2 * (phash(image) - phash(copy)) < DUPLICATE_BITS
            assert all(phash(image) - phash(other) > 2 * DUPLICATE_BITS for other in images[:number])


# --------------------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize(
    "name",
    ["../../etc", "..", "a/b", "/absolute", ".hidden", "a\\b", "C:\\x", "nul\x00l", "new\nline", "a" * 300, "ж" * 300,
     "ends with dot.", "\u202egpj", "", "   ", "~", "-rf", "people.csv", "Dropped.CSV"],
)  # fmt: skip
def test_no_name_leaves_the_folder(tmp_path, name):
    folder = folder_name(name)
    path = tmp_path / folder
    path.mkdir()
    assert path.parent == tmp_path and path.resolve().parent == tmp_path.resolve()
    assert folder.casefold() not in ("people.csv", "dropped.csv")
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


def test_a_symlink_trap(server, tmp_path, listed):
    server.pages["/0.jpg"] = jpeg(0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "Anna").symlink_to(elsewhere)
    with pytest.raises(BolidError, match="is a link that leads out of") as error:
        scrape(urls=listed({"Anna": ["/0.jpg"]}), out=tmp_path / "photos", **WEB)
    assert "remove the link" in error.value.hint and list(elsewhere.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ kill and resume


def test_kill_and_resume(server, tmp_path):
    """kill -9 and Ctrl-C in the middle: only what was on its way is fetched again, nothing is half-written."""
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
    for stop, how, status in ((4, signal.SIGKILL, -9), (11, signal.SIGINT, 130), (18, signal.SIGKILL, -9)):
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
        )
        while process.poll() is None and len({p for p in server.hits if p.startswith("/img/")}) < stop:
            time.sleep(0.005)
        process.send_signal(how)
        told = process.communicate()[1].decode()
        assert process.returncode == status and told == (
            "interrupted; the same command goes on where it stopped\n" if status == 130 else ""
        )
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


# ----------------------------------------------------------------------------------------------------- one's own folder


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


def test_what_is_not_looked_at_is_told(own, tmp_path):
    (own / "anna" / "IMG_7.HEIC").write_bytes(b"x")
    (own / "anna" / "2020").mkdir()
    warnings = scrape(own, out=tmp_path / "photos", min_size=64, max_bad=1).warnings
    assert any("(.heic: 1); save them as JPEG" in warning for warning in warnings)
    assert any("deeper folders were not looked at (anna/2020)" in warning for warning in warnings)


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
        (["--urls", "absent.csv", "--contact", "a@b.c"], "there is no list absent.csv", "a .txt, .csv or .parquet"),
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


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command(own, tmp_path):
    out = tmp_path / "photos"
    result = CliRunner().invoke(app, ["scrape", str(own), "--out", str(out), "--min-size", "64", "--max-bad", "0.2"])
    assert result.exit_code == 0 and result.stdout == f"{out}\n", result.output
    assert "kept 6 photos of 2 people (6 new)" in result.stderr and SAME_FILE in result.stderr
    assert "warning: license or consent is recorded as unknown" in result.stderr
    shown = CliRunner().invoke(
        app, ["scrape", str(own), "-o", str(out), "--min-size", "64", "--max-bad", "1", "--json", "-q"]
    )
    told = json.loads(shown.stdout)
    assert told["photos"] == 6 and told["new"] == 0 and told["dropped"] == {SAME_FILE: 1} and told["out"] == str(out)
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
    told = json.loads(result.stdout)
    bright = sum(np.asarray(picture(seed).convert("L").resize((1, 1))).item() > 128 for seed in (0, 1, 2, 3, 4, 9))
    assert 0 < bright < 6 and abs(told["dropped"]["watermark: bright"] - bright) <= 1
    result = CliRunner().invoke(app, [*arguments, "--watermark", "no-such-program"])
    assert result.exit_code == 1 and "--watermark 'no-such-program' cannot be run" in result.stderr


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
    for n, (left, right) in enumerate(zip(pictures, pictures[1:], strict=False)):
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
