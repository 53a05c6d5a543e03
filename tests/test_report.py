"""The report: what it says, and how a real browser shows it."""

from __future__ import annotations

import base64
import contextlib
import html.parser
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from bolid.evaluate.pictures import Picture, PictureFolder
from bolid.evaluate.plots import axis
from bolid.evaluate.report import write_report
from bolid.evaluate.results import DESCRIPTIONS, Difference, Evaluation, Metric, Scored

PROMPTS = [
    "a full body photo of a woman standing, in a red short-sleeved top and blue trousers, on a beach & <more>",
    "a full body photo of a woman walking, in a green long-sleeved top and black trousers, on a street",
    "a_prompt_without_any_spaces_" * 8,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two methods with three people, two settings of the scales and two numbers of photos; pictures of noise."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)

    def source(name):
        (root / name).mkdir()
        return PictureFolder(root / name)

    def picture(folder, name, **known):
        path = folder.place / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (96, 72, 3), dtype=np.uint8)).save(path)
        return Picture(str(path), name, folder.place, **known)

    people = ["p1", "p2", "p3"]
    references = source("photos")
    references.pictures = [picture(references, f"photo-{p}", person=p) for p in people]
    scored = []
    for method in ("base", "a-method-with-quite-a-long-name"):
        folder = source(method)
        for p in people:
            for i, prompt in enumerate(PROMPTS):
                photos = {f"photo_{n:03d}": f"{p}{n}" for n in range(1 + 3 * (i % 2))}
                body = float(i % 2) if method == "base" else "down=1,mid=0,up=0"  # finer than a number
                record = {"config": {"scales": {"face": 1.0, "body": body}}, "inputs": photos}
                folder.pictures.append(picture(folder, f"{p}-{i}", prompt=prompt, person=p, record=record))
        n = len(folder.pictures)
        metrics = {
            name: Metric(float(v), n, "the tower of family tiny", "a note <b>", float(v) - 0.1, float(v) + 0.1)
            for name, v in zip(DESCRIPTIONS, rng.uniform(0, 1, len(DESCRIPTIONS)), strict=True)
        }
        metrics["disturbance"] = Metric(None, 0, "the tower", "needs --without-adapter")
        evaluation = Evaluation(
            n, 3, 3, metrics, {"waist_girth": {"true": 0.5, "pictures": 0.55}}, {"excluded": 2, "checked": True},
            ["a note on sizes"], {"it is damaged": ["x.png"] * 8},
        )  # fmt: skip
        names = ("bone_error", "body_error", "face_similarity")
        scores = {name: torch.from_numpy(rng.uniform(0, 1, n)) for name in names}
        scored.append(
            Scored(method, folder, folder.pictures, [p.person for p in folder.pictures], scores, {}, evaluation)
        )
    differences = {scored[1].name: {"text_score": Difference(0.2, 0.1, 0.3, 9, "picture", 0.01)}}
    write_report(root / "two.html", scored, differences, references, "tiny")
    write_report(root / "one.html", scored[:1], {}, references, "tiny")
    return root


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", ["one.html", "two.html"])
def test_the_page_needs_nothing_else(world, name):
    page = Page((world / name).read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object")
        for attribute in ("src", "href"):
            assert attributes.get(attribute, "data:").startswith("data:")
    assert "url(" not in page.text and "a note <b>" in page.text and "on a beach & <more>" in page.text


def test_what_the_page_says(world):
    one, two = (Page((world / name).read_text(encoding="utf-8")) for name in ("one.html", "two.html"))
    for page in (one, two):
        assert "2 reference photos had made a profile" in page.text and "it is damaged: x.png" in page.text
        assert "body error by prompt" in page.text and "body error by number of photos" in page.text
        assert "1 photo" in page.text and "4 photos" in page.text and "face 1, body 0" in page.text
    assert "nearest by body" in one.text and "farthest by body" in one.text
    assert "paired by person and prompt" in two.text and "*" in two.text
    assert "face 1, body down=1,mid=0,up=0" in two.text
    images = [attributes for tag, attributes in two.tags if tag == "img"]
    assert len(images) == 9 * 3 and all(a["alt"] for a in images)
    first = base64.b64decode(images[0]["src"].partition(",")[2])
    assert first.startswith(b"\xff\xd8")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.3), (-5, 1200), (0.0012, 0.0013), (0, 0)])
def test_axes_have_round_ticks_inside(low, high):
    place, ticks = axis(low, high, 10, 300)
    assert 10 <= place(low) <= place(high) <= 300 and 2 <= len(ticks) <= 6
    assert all(10 <= x <= 300 for x, _ in ticks) and len({text for _, text in ticks}) == len(ticks)


# ---- in a browser -------------------------------------------------------------------------------------------------

HOW = "install it to run this test: apt-get install chromium chromium-driver"


class Browser:
    """A headless Chromium, spoken to in the WebDriver protocol."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [shutil.which("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
        ]  # fmt: skip
        wanted = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.call("/status", None)
                break
            time.sleep(0.1)
        session = self.call("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.url += f"/session/{session['sessionId']}"

    def call(self, path, data):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def show(self, path, width):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": screen})
        self.call("/url", {"url": path.as_uri()})

    def ask(self, expression):
        return self.call("/execute/sync", {"script": f"return {expression}", "args": []})

    def close(self):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=20).close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip(f"there is no chromium with its chromedriver; {HOW}")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["one.html", "two.html"])
@pytest.mark.slow
def test_a_browser_shows_it(browser, world, name, width):
    browser.show(world / name, width)
    assert browser.ask("[...document.images].length") > 8
    assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    # Nothing sticks out of the page but what scrolls inside its own box.
    outside = (
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && "
        f"(e.getBoundingClientRect().right > {width} + 1 || e.getBoundingClientRect().left < -1)).length"
    )
    assert browser.ask(outside) == 0
    assert browser.ask("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 40)")
    inside = "[...document.querySelectorAll('svg')].every(s => { const b = s.getBBox(), v = s.viewBox.baseVal; return "
    assert browser.ask(inside + "b.x >= -2 && b.x + b.width <= v.width + 2 && b.y + b.height <= v.height + 2 })")
    assert browser.call("/se/log", {"type": "browser"}) == []
    assert len(base64.b64decode(browser.call("/screenshot", None))) > 10_000
