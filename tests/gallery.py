"""A web server with photos, for the tests of scrape, and what they ask of a photo folder."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageFilter

from bolid.formats.images import list_photos
from bolid.formats.sites import SITES

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


def theplace(server: Server, tmp_path: Path) -> str:
    """The shipped description, turned to the local server."""
    text = (SITES / "theplace.toml").read_text("utf-8")
    assert "https://www.theplace.ru" in text
    path = tmp_path / "theplace.toml"
    path.write_text(text.replace("https://www.theplace.ru", server.url), "utf-8")
    return str(path)


def current_markup(server: Server, people: dict[str, int], stated: dict[str, int] | None = None) -> None:
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
                f'<div class="d-none d-sm-block"><p>Всего {(stated or people)[name]} фото</p></div></div>'
                f'<div class="gallery-pics-list photos-pics-list">{pics}</div><div class="listalka">{more}</div>'
            )
        server.pages[f"{base}?page=1"] = server.pages[base]
        for n in range(photos):
            server.pages[f"{base}{n}.html"] = (
                f'<span class="s-pic"><img class="pic big_pic" src="/img/{number}-{n}.jpg"></span>'
            )
            server.pages[f"/img/{number}-{n}.jpg"] = jpeg(100 * number + n)
