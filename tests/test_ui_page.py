"""`bolid ui` as people and programs meet it: its HTTP API, and the page in a real browser."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import ODD

from bolid.models.families import get_family
from bolid.synth.people import sample_person

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="pip install 'bolid[ui]' to run these tests"),
]

PROMPT = "a full body photo of a woman, in a red top and blue trousers, on a beach"
PATIENCE = 120  # seconds; of a busy machine
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Client:
    """A program that uses the page's HTTP API."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def open(self, path, data=None, **headers):
        """The answer's bytes."""
        request = urllib.request.Request(self.address + path, data, headers)
        with _opener.open(request, timeout=PATIENCE) as answer:
            return answer.read()

    def start(self, function, **arguments):
        """The id of a job."""
        body = json.dumps(arguments).encode()
        answer = self.open(f"/gradio_api/call/v2/{function}", body, **{"Content-Type": "application/json"})
        return json.loads(answer)["event_id"]

    def events(self, function, job):
        """(kind, data) of a job, as they come."""
        request = urllib.request.Request(f"{self.address}/gradio_api/call/{function}/{job}")
        with _opener.open(request, timeout=PATIENCE) as answer:
            kind = ""
            for line in answer:
                name, _, text = line.decode().strip().partition(": ")
                if name == "event":
                    kind = text
                elif name == "data" and kind != "heartbeat":
                    yield kind, json.loads(text)

    def call(self, function, **arguments):
        """What a function returns; an AssertionError of what it says where it fails."""
        kind, data = list(self.events(function, self.start(function, **arguments)))[-1]
        assert kind == "complete", data["error"]
        return data[0]

    def refusal(self, function, **arguments):
        """What a function says where it fails."""
        kind, data = list(self.events(function, self.start(function, **arguments)))[-1]
        assert kind == "error", data
        assert "Traceback" not in json.dumps(data) and "unexpected" not in data["error"], data
        return data["error"]

    def upload(self, *files):
        """Files (name, bytes), as functions take them."""
        mark, body = uuid.uuid4().hex, io.BytesIO()
        for name, data in files:
            head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
            body.write(head.encode() + data + b"\r\n")
        body.write(f"--{mark}--\r\n".encode())
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        paths = json.loads(self.open("/gradio_api/upload", body.getvalue(), **kind))
        return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]

    def fetch(self, file):
        return self.open(f"/gradio_api/file={urllib.parse.quote(file['path'])}")


def serve(folder, *options, **variables):
    """(the process, its address) of `bolid ui`."""
    command = [
        sys.executable,
        "-m",
        "bolid_cli.main",
        "ui",
        "--no-browser",
        "--port",
        "0",
        "--folder",
        "work",
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **variables}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    address = process.stdout.readline().strip()
    assert address.startswith("http://"), "it did not start"
    return process, address


def end(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(120)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ui")


@pytest.fixture(scope="module")
def address(folder):
    process, address = serve(folder, BOLID_HOME=str(folder / "home"))
    yield address
    end(process)


@pytest.fixture(scope="module")
def client(address):
    return Client(address)


@pytest.fixture(scope="module")
def anna(client, rendered_people):
    """A person on the page, from photos that were uploaded."""
    photos = sorted((rendered_people / "p100000").glob("*.jpg"))
    files = client.upload(*((path.name, path.read_bytes()) for path in photos))
    profile, file = client.call("profile", name="Anna", photos=files, known={"height": "172"})
    assert profile["name"] == "Anna" and len(profile["photos"]) == 5 and client.fetch(file)[8:20].startswith(b"{")
    return profile


def picture(client, state):
    status, files = state
    return np.asarray(Image.open(io.BytesIO(client.fetch(files[0])))), status


# ---- the HTTP API


def test_photos_become_a_profile_and_pictures(client, anna, folder, tmp_path):
    assert any(photo["weight"] > 0 for photo in anna["photos"]) and anna["measurements"][0]["known"]
    more = {"pose": "waving", "upscale": 2, "refine_face": True}
    job = client.start("generate", prompt=PROMPT, people=["Anna"], seed=3, **more)
    states = [data for _, data in client.events("generate", job)]
    assert states[0][0][0]["job"] == job and {s[0][0]["state"] for s in states} >= {"sampling", "finished"}
    pixels, status = picture(client, states[-1][0])
    assert pixels.shape[:2] == tuple(2 * side for side in get_family("tiny").image_size)
    # The command makes that very picture.
    words = shlex.split(status["commands"][0])[1:]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-m", "bolid_cli.main", *words, "--out", str(tmp_path)], cwd=folder,
                          env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(done.stdout.strip())), pixels)


def test_a_body_is_moved_and_a_person_deleted(client, anna):
    profile, file = client.call("edit", name="Anna", wanted={"waist": 75}, new_name="Anna 75")
    assert abs(next(r["value"] for r in profile["measurements"] if r["name"] == "waist") - 75) < 1
    assert client.fetch(client.call("mannequin", name="Anna", wanted={"waist": 80})).startswith(b"glTF")
    assert client.call("delete", name="Anna 75")["people"] == ["Anna"] == client.call("people")
    with pytest.raises(urllib.error.HTTPError):
        client.fetch(file)


def test_bad_pictures_get_a_message(client, anna, rendered_people):
    bomb = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(bomb, "PNG")
    photo = next((rendered_people / "p100000").glob("*.jpg")).read_bytes()
    bad = {"empty.jpg": b"", "text.jpg": b"no picture", "cut.jpg": photo[:2000], "bomb.png": bomb.getvalue(),
           "<b>.jpg": b"\xff\xd8\xff"} | {f"{i}.jpg": make() for i, make in enumerate(ODD.values())}  # fmt: skip
    for name, data in list(bad.items())[:6]:
        text = client.refusal("profile", name="Nobody", photos=client.upload((name, data)))
        assert "be used" in text and str(Path.cwd()) not in text and "uploads" not in text and "<b>" not in text
    # Among good ones they are listed.
    files = client.upload(("good.jpg", photo), *bad.items())
    profile, _ = client.call("profile", name="Mixed", photos=files)
    assert [p["photo"] for p in profile["photos"] if not p["rejected"]] == ["good.jpg"]
    client.call("delete", name="Mixed")


def test_limits(client, anna):
    assert "too many" in client.refusal("profile", name="x", photos=client.upload(*[("a.jpg", b"x")] * 41))
    with pytest.raises(urllib.error.HTTPError) as caught:
        client.upload(("large.jpg", bytes(33 * 2**20)))
    assert caught.value.code == 413
    for wrong in ({"number": 1000}, {"steps": 10_000}, {"prompt": "x" * 5000}, {"seed": "many"}, {"people": "Anna"},
                  {"people": ["Bob"]}, {"body_scale": 99}, {"prompt": None, "seed": -1}, {"upscale": 3},
                  {"people": ["Anna"], "pose": "flying"}):  # fmt: skip
        client.refusal("generate", **{"prompt": PROMPT, "people": [], **wrong})


def test_nothing_outside_the_folder_is_read_or_written(client, anna, folder):
    secret = folder / "secret.jpg"
    secret.write_bytes(b"x")
    for path in ("/etc/passwd", str(secret), str(folder / "work" / "uploads" / ".." / ".." / "secret.jpg")):
        for file in ({"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}):
            assert "uploaded" in client.refusal("profile", name="x", photos=[file])
        with pytest.raises(urllib.error.HTTPError):
            client.open(f"/gradio_api/file={path}")
    for name in ("../Anna", "/tmp/x", "..", "a/b", ""):
        assert "is no name" in client.refusal("delete", name=name)
        assert "is no name" in client.refusal("profile", name=name, photos=[], known={"height": "170"})
    (file,) = client.upload(("../../../evil.jpg", b"x"))
    assert Path(file["path"]).is_relative_to((folder / "work" / "uploads").resolve())
    assert {path.name for path in folder.iterdir()} <= {"work", "home", "secret.jpg"}
    with pytest.raises(urllib.error.HTTPError):
        client.open("/", Host="evil.example")


def test_a_waiting_client_sees_its_place_and_a_cancelled_job_stops(client):
    long = client.start("generate", prompt=PROMPT, people=[], number=16, steps=200)
    api = json.loads(client.open("/config"))
    number = next(d["id"] for d in api["dependencies"] if d["api_name"] == "generate")
    session = uuid.uuid4().hex
    data = [PROMPT, [], 1, 0, None, None, 1, None, "", False, "", 1, False]
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode()
    client.open("/gradio_api/queue/join", body, **{"Content-Type": "application/json"})
    places = []

    def watch():
        request = urllib.request.Request(f"{client.address}/gradio_api/queue/data?session_hash={session}")
        with _opener.open(request, timeout=PATIENCE) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    places.append(json.loads(line[6:]))

    thread = threading.Thread(target=watch)
    thread.start()
    later = client.start("generate", prompt=PROMPT, people=[], number=16, steps=200)
    assert client.call("cancel", job=later) is False  # it has not begun
    began = time.monotonic()
    while not any(m["msg"] == "estimation" for m in places) and time.monotonic() < began + PATIENCE:
        time.sleep(0.1)
    assert client.call("cancel", job=long) is True
    status, files = list(client.events("generate", long))[-1][1][0]
    assert status["state"] == "cancelled" and files == []
    assert list(client.events("generate", later))[-1][1][0][0]["state"] == "cancelled"
    thread.join(PATIENCE)
    assert next(m["rank"] for m in places if m["msg"] == "estimation") == 0  # first of those who wait
    assert places[-2]["msg"] == "process_completed" and places[-2]["success"]


def test_listening_needs_the_token(tmp_path):
    process, address = serve(tmp_path, "--listen", BOLID_UI_TOKEN="s3cret", BOLID_HOME=str(tmp_path / "home"))
    try:
        port = address.split(":")[2].partition("/")[0]
        assert address.endswith("?token=s3cret")
        client = Client(f"http://127.0.0.1:{port}")
        for path in ("/", "/config", "/gradio_api/info", "/gradio_api/file=x", "/theme.css"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                client.open(path)
            assert caught.value.code == 401
        assert json.loads(client.open("/config", Authorization="Bearer s3cret"))["title"] == "BoLID"
    finally:
        end(process)


# ---- the page in a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to run this test")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium; install it to run this test: apt-get install chromium")
    arguments = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                 "--ignore-gpu-blocklist", "--disable-background-networking", "--no-first-run"]  # fmt: skip
    with playwright.sync_playwright() as p:
        # A browser for each test: the mannequin, drawn without a GPU, may leave one slow.
        yield lambda: p.chromium.launch(executable_path=program, args=arguments)


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request, chromium, address, anna):
    width, scheme = request.param
    browser = chromium()
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.outside, page.faults = [], []
    page.on(
        "request", lambda r: page.outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
    )
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#person input")
    page.wait_for_function("document.querySelector('#person input').value != ''")
    yield page
    outside, faults = page.outside, page.faults
    browser.close()
    assert outside == [] and faults == []


def fits(page):
    """Nothing sticks out of the page at its sides."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def drop(page, selector, files):
    """Files dragged from the desktop onto the middle of an element, as the browser itself takes them."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **middle, "data": data})


def drag(page, slider, start, end):
    """The thumb of a slider dragged with the mouse from one value to another."""
    slider.scroll_into_view_if_needed()
    box, thumb = slider.bounding_box(), 16  # pixels; its middle stays within the slider
    low, high = float(slider.get_attribute("min")), float(slider.get_attribute("max"))
    y = box["y"] + box["height"] / 2
    x = [box["x"] + thumb / 2 + (box["width"] - thumb) * (value - low) / (high - low) for value in (start, end)]
    page.mouse.move(x[0], y)
    page.mouse.down()
    page.mouse.move(x[1], y, steps=5)
    page.mouse.up()


def test_a_person_is_made_moved_and_saved(page, client, rendered_people):
    name = f"Bea {uuid.uuid4().hex[:4]}"
    page.wait_for_selector("#mannequin canvas")  # of the person that is there already
    page.fill("#name input, #name textarea", name)
    photos = sorted((rendered_people / "p100001").glob("*.jpg"))[:2]
    drop(page, "#photos", photos)
    page.wait_for_selector(f"#photos :text('{photos[1].stem}')")
    page.click("#make")
    page.wait_for_function("name => document.querySelector('#person input').value == name", arg=name)
    assert page.locator("#detections figure").count() == 2 and "weight" in page.inner_text("#detections")
    page.wait_for_selector("#mannequin canvas")
    waist = page.locator("#slider-waist input[type=range]")
    before = next(r["value"] for r in client.call("measurements", name=name) if r["name"] == "waist")
    ready = "v => Math.abs(document.querySelector('#slider-waist input[type=range]').value - v) < 0.06"
    page.wait_for_function(ready, arg=before)
    with page.expect_response(lambda r: "mannequin.glb" in r.url and r.status == 200):
        drag(page, waist, before, before + 6)
    moved = float(waist.input_value())
    assert abs(moved - before - 6) < 2  # a pixel is half a centimetre or so
    with page.expect_response(lambda r: "mannequin.glb" in r.url and r.status == 200):
        waist.focus()
        page.keyboard.press("ArrowLeft")
    assert float(waist.input_value()) < moved
    assert fits(page)
    page.fill("#new-name input, #new-name textarea", f"{name} moved")
    page.click("#save-body")
    page.wait_for_function("name => document.querySelector('#person input').value == name", arg=f"{name} moved")
    rows = {r["name"]: r["value"] for r in client.call("measurements", name=f"{name} moved")}
    assert abs(rows["waist"] - float(waist.input_value())) < 1
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#delete")
    page.wait_for_function("name => document.querySelector('#person input').value != name", arg=f"{name} moved")
    assert f"{name} moved" not in client.call("people") and name in client.call("people")
    client.call("delete", name=name)


def set_prompt(page, prompt, seed):
    """On the tab Picture. What is typed while the tab is still being drawn may be lost: then it is typed again."""
    page.get_by_role("tab", name="Picture").click()
    fields = {"#prompt textarea": prompt, "#seed input, #seed textarea": str(seed)}
    for _ in range(20):
        for field, text in fields.items():
            page.fill(field, text)
        page.wait_for_timeout(500)
        if all(page.input_value(field) == text for field, text in fields.items()):
            return


def test_a_picture_is_made_and_compared(page):
    noun = "woman" if sample_person(100_000).phenotypes["gender"] > 0.5 else "man"  # Anna
    page.get_by_role("tab", name="Picture").click()
    page.wait_for_function(f"document.querySelector('#prompt textarea')?.value.includes(' of a {noun} ')")
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function(f"document.querySelector('#compare-prompt textarea')?.value.includes(' of a {noun},')")
    set_prompt(page, PROMPT, page.viewport_size["width"])
    page.get_by_text("More settings").click()  # what is left empty there is as usual
    page.wait_for_selector("#refine-face input")
    page.click("#generate")
    page.wait_for_selector(f"#stage img[alt='{PROMPT}']")
    page.wait_for_function("document.querySelector('#stage img').naturalWidth > 0")
    command = page.input_value("#command textarea")
    assert command.startswith("bolid generate") and "work/people/Anna.safetensors" in command
    assert PROMPT in page.inner_text("#settings") and fits(page)
    page.click("#compare-base")
    page.wait_for_selector("#before-after img")
    page.click("#repeat")
    page.wait_for_function("document.querySelectorAll('#gallery img').length == 2")
    assert page.input_value("#command textarea") == command  # the same picture
    page.fill("#seed input, #seed textarea", "no number")
    page.click("#generate")
    page.wait_for_selector("text=the seed is")
    assert "Traceback" not in page.inner_text("body")


UNDER_WAY = "document.querySelector('#stage .bar') !== null"
STOPPED = "document.querySelector('#stage .words')?.innerText == 'stopped'"


@pytest.fixture
def long_run(page):
    """A run under way that nobody waits to the end of; new pictures in each window, so that there are previews."""
    set_prompt(page, f"{PROMPT}, running", page.viewport_size["width"])
    page.get_by_text("More settings").click()
    page.get_by_label("Steps", exact=True).fill("200")
    page.get_by_label("number input for Pictures").fill("16")
    page.click("#generate")
    page.wait_for_function(UNDER_WAY)


def test_pictures_are_stopped(page, long_run):
    """As often as somebody likes; what is shown then is the end of it."""
    page.wait_for_selector("#stage img[alt=preview]")
    for _ in range(3):
        page.click("#stop")
        page.wait_for_function(STOPPED)
        page.wait_for_timeout(1000)  # later messages, if there are any
        assert page.inner_text("#stage .words") == "stopped" and page.locator("#stage .bar").count() == 0
        page.click("#generate")
        page.wait_for_function(UNDER_WAY)
    page.click("#stop")
    page.wait_for_function(STOPPED)


def test_a_run_that_waits_is_stopped(page, client):
    """It ends when its turn comes; the others go on."""
    job = client.start("generate", prompt=PROMPT, people=[], number=16, steps=200)
    under_way = client.events("generate", job)
    assert next(under_way)[1][0][0]["state"] == "waiting for the models"
    set_prompt(page, PROMPT, 1)
    with page.expect_response(lambda r: "/queue/join" in r.url):
        page.click("#generate")
    with page.expect_response(lambda r: "/run/" in r.url):
        page.click("#stop")
    assert client.call("cancel", job=job) is True
    assert list(under_way)[-1][1][0][0]["state"] == "cancelled"
    page.wait_for_function(STOPPED)


def test_labels_and_keyboard(page):
    """Every control has a name, and the tabs can be walked by keys."""
    unnamed = """[...document.querySelectorAll('input, textarea, button, select')].filter(e => e.offsetParent &&
        !(e.getAttribute('aria-label') || e.title || e.innerText.trim() || e.labels?.length || e.closest('label') ||
          e.getAttribute('aria-labelledby') || e.placeholder)).map(e => e.outerHTML.slice(0, 200))"""
    for tab in ("Person", "Picture", "Compare"):
        page.get_by_role("tab", name=tab).focus()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "name => document.querySelector('[role=tab][aria-selected=true]').innerText == name", arg=tab
        )
        assert page.evaluate(unnamed) == [] and fits(page)
