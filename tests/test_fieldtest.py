"""`bolid fieldtest`: every step on `tiny` and on a thin SDXL, failures that end nothing, and a report without names."""

from __future__ import annotations

import getpass
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_base import make_base, make_family
from typer.testing import CliRunner

import bolid.fieldtest.command
from bolid.doctor import diagnose
from bolid.errors import BolidError
from bolid.fieldtest import fieldtest
from bolid.fieldtest.measure import Meter
from bolid.fieldtest.privacy import Scrubber
from bolid.fieldtest.steps import STEPS, Bench, Step, choose_photos, count_photographs, run_generate
from bolid.models.families import get_family
from bolid_cli.main import app

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick_doctor(monkeypatch):
    """Importing every library once more takes a while, and test_doctor.py does it."""
    monkeypatch.setattr(bolid.fieldtest.command, "diagnose", lambda family, progress=None: diagnose(family, quick=True))


@pytest.fixture
def with_steps(monkeypatch):
    """with_steps(Step, ...): these instead of the chain's."""
    return lambda *steps: monkeypatch.setattr(bolid.fieldtest.command, "STEPS", steps)


def read(folder):
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return data, {step["name"]: step for step in data["steps"]}, (folder / "report.html").read_text(encoding="utf-8")


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# ---- the whole chain ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_step_on_tiny_with_photos_of_ones_own(tmp_path, rendered_people):
    """The report names neither the person nor a file, and shows no photo; the working files are gone."""
    photos = tmp_path / "Alice Liddell" / "holiday"
    photos.mkdir(parents=True)
    for number, photo in enumerate(sorted((rendered_people / "p100000").glob("*.jpg"))):
        shutil.copyfile(photo, photos / f"alice-{number}.jpg")
        (photos / f"alice-{number}.txt").write_text("Alice in a red top")
    result = fieldtest("tiny", tmp_path / "out", photos=photos, steps=3, device="cpu")
    data, steps, page = read(tmp_path / "out")
    assert {name: step["state"] for name, step in steps.items()} == {
        name: "skipped" if name in ("generate-offload", "generate-face", "generate-few") else "passed"
        for name in ("doctor", *(s.name for s in STEPS))
    }
    assert result.failed == () and data["ended"] and data["doctor"]["usable"]
    assert steps["photos"]["figures"]["kind"] == "photos of one person, halved into two"
    assert steps["extract"]["figures"]["photos used"] == 5 and steps["extract"]["figures"]["faces found"] >= 3
    assert steps["extract"]["figures"]["photographs"] == 0
    height, width = get_family("tiny").image_size
    assert steps["generate"]["figures"]["size"] == f"{width}x{height}" and len(steps["generate"]["pictures"]) == 2
    assert steps["evaluate"]["figures"]["metrics"]["person_found"] > 0
    ran = [step for step in steps.values() if step["state"] == "passed"]
    assert all(step["host_peak"] > 1e7 for step in ran) and steps["generate"]["seconds"] > 0.05
    assert not re.search("alice|liddell|holiday", json.dumps(data) + page, re.IGNORECASE)
    assert str(tmp_path) not in json.dumps(data) + page
    images = [attrs for tag, attrs in Elements(page).found if tag == "img"]
    pictures = [name for step in steps.values() for name in step["pictures"]]
    assert len(images) == len(pictures) == 6 and all((tmp_path / "out" / name).is_file() for name in pictures)
    assert not (tmp_path / "out" / "work").exists() and len(list((tmp_path / "out").iterdir())) == 3


def thin_sdxl(path):
    """A StableDiffusionXLPipeline with every layer of SDXL's UNet and VAE, an eighth as wide, random."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from test_real_architectures import SDXL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    small = StableDiffusionPipeline.from_pretrained(make_base(path / "small"), safety_checker=None)
    torch.manual_seed(0)
    thin = {"block_out_channels": [40, 80, 160], "norm_num_groups": 8, "cross_attention_dim": 96}
    unet = UNet2DConditionModel.from_config(SDXL | thin)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(
        block_out_channels=[16, 32, 64, 64], layers_per_block=2, norm_num_groups=8, scaling_factor=0.13025, **kinds
    )
    config = small.text_encoder.config.to_dict() | {"hidden_size": 48, "num_attention_heads": 4}
    text = CLIPTextModel(CLIPTextConfig(**config))
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config | {"projection_dim": 1280}))
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=text, text_encoder_2=second, tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    ).save_pretrained(path / "base")  # fmt: skip
    return path / "base"


def write_face_portrait(path, base, family):
    """A random adapter in FaceID-Portrait's layout, as `bolid models convert` writes it."""
    from diffusers import UNet2DConditionModel

    from bolid.formats.adapter import flat_tensors, save_adapter
    from bolid.method.body_condition import initial_state
    from bolid.run import run_record

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tensors = flat_tensors(initial_state(unet, "face", 512, tokens=16))
    save_adapter(path, {name: tensor.half() for name, tensor in tensors.items()},
                 run_record("face-adapter", family=family))  # fmt: skip


@pytest.mark.slow
def test_every_step_on_sdxls_architecture(tmp_path, rendered_people):
    """Random weights, and a family that has neither encoder nor adapters: they come from one training step each."""
    tiny = get_family("tiny")
    base = thin_sdxl(tmp_path)
    paths = "\n".join(f"{part} = '{getattr(tiny, part)}'" for part in ("pose", "face", "image_text"))
    (tmp_path / "thin.toml").write_text(
        f"image_size = [128, 128]\n[defaults]\nsteps = 30\nguidance = 5.0\n[paths]\nbase = '{base}'\n{paths}\n"
    )
    write_face_portrait(tmp_path / "adapter" / "face-portrait.safetensors", base, str(tmp_path / "thin.toml"))
    result = fieldtest(
        str(tmp_path / "thin.toml"), tmp_path / "out", photos=rendered_people, steps=2, pictures=1, device="cpu"
    )
    data, steps, page = read(tmp_path / "out")
    assert [(step.name, step.failure) for step in result.failed] == []
    skipped = {name for name, step in steps.items() if step["state"] == "skipped"}
    assert skipped == {"generate-few", "generate-pose", "generate-offload"}
    assert "one training step" in steps["profile"]["figures"]["body encoder"]
    assert steps["generate"]["figures"] | {"contrast": 0} == {
        "steps": 2, "pictures": 1, "size": "128x128", "contrast": 0
    }  # fmt: skip
    assert data["family"] == "family/thin.toml" and str(tmp_path) not in page


# ---- what fails ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_family_that_lacks_most_still_generates(tmp_path, rendered_people):
    family = make_family(tmp_path)
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app,
        ["fieldtest", family, str(rendered_people), "--out", str(out), "--steps", "2", "--device", "cpu"],
    )
    data, steps, page = read(out)
    assert result.exit_code == 1 and result.stdout.split() == [str(out / "report.html"), str(out / "report.json")]
    assert re.search(r"error: 1 of \d+ steps failed: extract", result.stderr) and "hint: " in result.stderr
    assert steps["generate-base"]["state"] == "passed" and len(steps["generate-base"]["pictures"]) == 2
    failure = steps["extract"]["failure"]
    assert failure["kind"] == "BolidError" and "has no pose model: looked for family/pose" in failure["message"]
    assert "put it there" in failure["hint"] and "bolid/models/families.py" in failure["traceback"]
    assert steps["shard"]["state"] == "skipped" and steps["shard"]["reason"] == "it needs extract"
    assert steps["generate"]["reason"] == "it needs profile and train-adapter"
    assert not data["doctor"]["usable"] or data["doctor"]["problems"] == []
    assert "it needs extract" in page and "Traceback" in page and str(tmp_path) not in page


@pytest.mark.slow
def test_a_step_that_fails_ends_nothing_but_what_needs_it(tmp_path, with_steps):
    def fail(bench):
        raise RuntimeError(f"cannot open {bench.work / 'x.bin'} of {Path.home() / 'My Photos' / 'me.jpg'}")

    seen = []
    with_steps(
        Step("a", "first", fail),
        Step("b", "second", lambda bench: {"x": 1}, lambda bench: ["a"]),
        Step("c", "third", lambda bench: {"loss": 0.5, "where": str(bench.work)}),
        Step("d", "fourth", fail, without=lambda bench: "there is no moon"),
    )
    result = fieldtest("tiny", tmp_path / "out", show=seen.append)
    _, steps, page = read(tmp_path / "out")
    assert [step.state for step in seen] == ["passed", "failed", "skipped", "passed", "skipped"]
    assert [step.name for step in result.failed] == ["a"]
    assert steps["a"]["failure"]["message"] == "cannot open work/x.bin of ~/My Photos/me.jpg"
    assert steps["b"]["reason"] == "it needs a" and steps["d"]["reason"] == "there is no moon"
    assert steps["c"]["figures"] == {"loss": 0.5, "where": "work"}
    assert "cannot open work/x.bin" in page and "RuntimeError" in page and "there is no moon" in page


def test_a_crash_leaves_a_whole_report(tmp_path):
    code = (
        "import os, sys, bolid.fieldtest.command as c\n"
        "from bolid.fieldtest.steps import Step\n"
        "c.diagnose = lambda family, progress=None: None\n"
        "c.STEPS = (Step('a', 'first', lambda b: {}), Step('b', 'the one that crashes', lambda b: os._exit(7)))\n"
        f"c.fieldtest('tiny', {str(tmp_path / 'out')!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path).returncode == 7
    data, steps, page = read(tmp_path / "out")
    assert steps["a"]["state"] == "passed" and steps["b"]["state"] == "running" and data["ended"] == ""
    assert "not ended" in page and "the one that crashes" in page
    assert not [path for path in (tmp_path / "out").rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
def test_an_interruption_leaves_the_report_and_no_working_files(tmp_path, with_steps):
    def interrupt(bench):
        (bench.work / "large").write_bytes(b"x")
        raise KeyboardInterrupt

    with_steps(Step("a", "first", interrupt))
    with pytest.raises(KeyboardInterrupt):
        fieldtest("tiny", tmp_path / "out")
    assert read(tmp_path / "out")[1]["a"]["state"] == "running" and not (tmp_path / "out" / "work").exists()


@pytest.mark.slow
def test_the_folder_of_another_field_test_is_used_again_and_no_other(tmp_path, with_steps):
    with_steps(Step("a", "first", lambda bench: {}))
    out = tmp_path / "out"
    assert fieldtest("tiny", out, keep=True).failed == () and (out / "work").is_dir()
    (out / "pictures").mkdir()
    (out / "pictures" / "old.png").write_bytes(b"")
    assert fieldtest("tiny", out).failed == () and not (out / "pictures" / "old.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BolidError, match="holds other files"):
        fieldtest("tiny", tmp_path / "mine")
    with pytest.raises(BolidError, match="is a file"):
        fieldtest("tiny", tmp_path / "mine" / "letter.txt")
    with pytest.raises(BolidError, match="is no folder"):
        fieldtest("tiny", tmp_path / "new", photos=tmp_path / "absent")
    with pytest.raises(BolidError, match="--steps is 0"):
        fieldtest("tiny", tmp_path / "new", steps=0)


def test_pictures_of_one_colour_fail(tmp_path, monkeypatch):
    def black(prompts, out, n, **options):
        Path(out).mkdir(parents=True)
        Image.new("RGB", (96, 128)).save(Path(out) / "0.png")
        return [Path(out) / "0.png"]

    monkeypatch.setattr("bolid.generate.generate", black)
    bench = Bench(get_family("tiny"), tmp_path, tmp_path, None, "a prompt", 10, 1, "cpu", 0)
    with pytest.raises(BolidError, match="1 of 1 pictures are of one colour") as caught:
        run_generate(bench, "base", person=False)
    assert "--dtype fp32" in caught.value.hint and bench.made == ["pictures/base/0.png"]


def test_losses_that_are_not_finite_fail():
    from bolid.fieldtest.steps import _require_finite

    with pytest.raises(BolidError, match="kl is nan after one step"):
        _require_finite({"loss": 1.0, "kl": float("nan")})


# ---- photos -------------------------------------------------------------------------------------------------------


def make_photos(folder, count):
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.full((8, 8, 3), (200, 30, number), np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG {number}.jpg")


def test_which_photos_are_taken(tmp_path):
    make_photos(tmp_path / "one", 5)
    people, kind = choose_photos(tmp_path / "one")
    assert list(map(len, people)) == [3, 2] and "halved" in kind
    for name, count in (("x", 9), ("y", 2), ("z", 1)):
        make_photos(tmp_path / "many" / name, count)
    people, kind = choose_photos(tmp_path / "many")
    assert list(map(len, people)) == [6, 2] and people[0][0].parent.name == "x"
    make_photos(tmp_path / "few", 3)
    with pytest.raises(BolidError, match="3 photos, too few") as caught:
        choose_photos(tmp_path / "few")
    assert "leave the folder out" in caught.value.hint


@pytest.mark.slow
def test_photos_are_shown_only_if_asked_for(tmp_path, with_steps):
    make_photos(tmp_path / "holiday in Rome", 4)
    with_steps(STEPS[0])
    for asked, shown in ((False, 0), (True, 2)):  # of the person whose pictures are made
        result = fieldtest("tiny", tmp_path / "out", photos=tmp_path / "holiday in Rome", include_photos=asked)
        assert result.failed == ()
        data, _, page = read(tmp_path / "out")
        assert sum(tag == "img" for tag, _ in Elements(page).found) == shown
        assert "Rome" not in page + json.dumps(data) and "IMG" not in page


@pytest.mark.slow
def test_tiny_says_which_photos_are_photographs(tmp_path, with_steps):
    from test_rendered import shipped

    make_photos(tmp_path / "photos", 2)
    for number, photo in enumerate(shipped()[:3]):
        shutil.copyfile(photo, tmp_path / "photos" / f"{number}.jpg")
    with_steps(STEPS[0], Step("count", "photographs", count_photographs))
    for family, note in (
        ("tiny", "family tiny knows only rendered people: 3 of 5 photos are photographs"),
        ("sdxl", ""),
    ):
        fieldtest(family, tmp_path / "out", photos=tmp_path / "photos")
        assert read(tmp_path / "out")[1]["count"]["figures"] == {"photographs": 3, "note": note}


# ---- privacy and measuring ----------------------------------------------------------------------------------------


def test_texts_lose_paths_and_names(monkeypatch, tmp_path):
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/home/ada")))
    scrub = Scrubber({"work": tmp_path / "out" / "work", "photos": "/media/ada/My Photos"})
    cases = {
        f"cannot read {tmp_path}/out/work/shards/0.tar": "cannot read work/shards/0.tar",
        "/media/ada/My Photos/a.jpg": "photos/a.jpg",
        "'/home/ada/x/y.py', line 3": "'~/x/y.py', line 3",
        "/home/adam/x.py": ".../x.py",
        "/srv/data/ada/file.bin: gone": ".../file.bin: gone",
        "https://huggingface.co/ada/model and s3://bucket/a/b": "https://huggingface.co/USER/model and s3://bucket/a/b",
        "3/4 of a/b, 1e-3/2": "3/4 of a/b, 1e-3/2",
        f'File "{ROOT}/bolid/run.py", line 7': 'File "bolid/run.py", line 7',
        f"{torch.__file__}": "site-packages/torch/__init__.py",
    }
    assert {text: scrub(text) for text in cases} == cases
    nested = scrub.all_of({"/home/ada/a": ["/home/ada/b", 3, None, True, ("/home/ada/c",)]})
    assert nested == {"~/a": ["~/b", 3, None, True, ["~/c"]]}


@pytest.mark.slow
def test_peaks_are_of_the_step_alone():
    with Meter() as large:
        block = np.ones(60_000_000)  # 480 MB
        del block
    with Meter() as small:
        pass
    assert large.host_peak - small.host_peak > 400e6 and large.seconds > small.seconds > 0


@pytest.mark.slow
def test_figures_and_texts_are_escaped(tmp_path, with_steps):
    def fail(bench):
        raise ValueError("<b>bold</b> & more")

    with_steps(Step("a", "first", lambda bench: {"<i>": ["<script>", {"x_y": True}]}), Step("b", "second", fail))
    fieldtest("tiny", tmp_path / "out", prompt="<u>a prompt</u>")
    page = read(tmp_path / "out")[2]
    assert not {tag for tag, _ in Elements(page).found} & {"b ", "i", "script", "u"}
    assert "&lt;script&gt;, x y yes" in page and "&lt;b&gt;bold&lt;/b&gt; &amp; more" in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it(tmp_path, with_steps, width):
    from test_report import HOW, Browser

    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip(f"there is no chromium with its chromedriver; {HOW}")

    def picture(bench):
        (bench.out / "pictures").mkdir()
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (768, 768, 3), dtype=np.uint8)).save(bench.out / "pictures" / "0.png")
        bench.made.append("pictures/0.png")
        return {"a_long_name_without_any_space_" * 6: "x" * 200}

    def fail(bench):
        raise ValueError("a long message " * 20 + "y" * 200)

    with_steps(Step("a", "a step with a picture", picture), Step("b", "a step that fails", fail))
    fieldtest("sdxl", tmp_path / "out")
    browser = Browser(tmp_path / "chromium")
    try:
        browser.show(tmp_path / "out" / "report.html", width)
        assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert browser.ask("document.documentElement.scrollWidth") <= width
        heights = "[...document.querySelectorAll('.state')].map(e => e.getBoundingClientRect().height)"
        assert max(browser.ask(heights)) < 30  # no word is broken
        assert browser.call("/se/log", {"type": "browser"}) == []
    finally:
        browser.close()


def test_every_step_has_a_name_of_its_own():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    bench = Bench(get_family("tiny"), Path(), Path(), None, "", 1, 1, "cpu", 0)
    assert all(set(step.needs(bench)) <= set(names) for step in STEPS)
    bench.family = get_family("sdxl")
    assert all(set(step.needs(bench)) <= set(names) for step in STEPS)
