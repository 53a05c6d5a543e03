from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_base import make_body_encoder, make_family
from typer.testing import CliRunner

import bolid.api
import bolid.views
from bolid.backends.body import FEW_VIEWS, BodyEncoder, save_body_encoder
from bolid.body.shape import Known
from bolid.errors import BolidError
from bolid.formats.profile import load_profile, save_profile
from bolid.formats.tensors import load_tensors, read_record
from bolid.method.body_vae import BodyPrior, mean_under_prior
from bolid.models.families import get_family
from bolid.person import GREY_WEIGHT
from bolid.profile import edit_profile, make_profile, mix_profiles, show_profile
from bolid.run import run_record, sha256_file
from bolid_cli.main import app


class Reader:
    """Stands in for the family's models: what it sees is a function of the picture."""

    def __init__(self, family, device="cpu", person="main"):
        self.faces = SimpleNamespace(sha256="f" * 64)

    def read(self, images):
        return [self._view(image) for image in images]

    def _view(self, image):
        if image.mean() < 2:
            return bolid.views.NO_PERSON
        rng = np.random.default_rng(int(hashlib.sha256(image.tobytes()).hexdigest()[:8], 16))
        h, w = image.shape[:2]
        keypoints = (rng.uniform(0.1, 0.9, (17, 3)) * [w, h, 0] + [0, 0, rng.uniform(0.5, 1)]).astype(np.float32)
        face = rng.normal(size=512).astype(np.float32)
        return bolid.views.View(
            image=image, box=np.array([4, 4, w - 4, h - 4], np.float32), score=0.9, keypoints=keypoints,
            face=face / np.linalg.norm(face) if image.mean() < 140 else None, face_box=None,
            image_embed=np.zeros(4, np.float32), view_features=np.zeros((17, 4), np.float16),
        )  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(bolid.views, "ViewReader", Reader)
    family = make_family(tmp_path)
    rng = np.random.default_rng(0)
    photos = []
    for i in range(4):
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(path)
        photos.append(path)
    return family, make_body_encoder(tmp_path / "enc.safetensors", family), photos


def profile(world, photos, out):
    return make_profile(photos, out, body_encoder=world[1], family=world[0], device="cpu")


def test_the_order_of_the_photos_does_not_matter(world, tmp_path):
    _, _, photos = world
    profile(world, photos, tmp_path / "a.safetensors")
    profile(world, photos[::-1], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_names_of_the_photos_do_not_matter(world, tmp_path):
    _, _, photos = world
    profile(world, photos, tmp_path / "a.safetensors")
    for i, photo in enumerate(photos):
        photo.rename(photo.with_name(f"z{3 - i}.png"))
    profile(world, [tmp_path / "photos"], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_another_photo_never_raises_the_uncertainty(world, tmp_path):
    _, _, photos = world
    spreads = []
    for count in range(1, 5):
        profile(world, photos[:count], tmp_path / "me.safetensors")
        me = load_profile(tmp_path / "me.safetensors")
        assert len(me.view_weights) == count and float(me.view_weights.sum()) == pytest.approx(1)
        spreads.append(me.body_logvar)
    assert all((more <= fewer).all() for fewer, more in itertools.pairwise(spreads))
    assert (spreads[0] <= 0).all()  # never above the prior's


def test_few_photos_are_completed_by_the_population(world, tmp_path):
    family, plain, photos = world
    encoder = BodyEncoder(plain)
    people = BodyPrior(torch.full((encoder.body_dim,), 0.5), 0.3 + torch.eye(encoder.body_dim))
    save_body_encoder(tmp_path / "with.safetensors", encoder.model, {**encoder.record, "space": encoder.space}, people)
    knowing = BodyEncoder(tmp_path / "with.safetensors")
    assert knowing.space == encoder.space and encoder.prior is None
    assert all(torch.equal(a, b) for a, b in zip(knowing.prior, people, strict=True))

    def profiles(count):
        paths = []
        for file in (plain, tmp_path / "with.safetensors"):
            paths.append(tmp_path / f"{count}-{file.name}")
            make_profile(photos[:count], paths[-1], body_encoder=file, family=family, device="cpu")
        return [load_profile(path) for path in paths]

    for count in range(1, FEW_VIEWS + 1):
        alone, completed = profiles(count)
        expected = mean_under_prior(alone.body_mean, alone.body_logvar, people)
        assert torch.equal(completed.body_mean, expected) and not torch.allclose(expected, alone.body_mean, atol=0.01)
        assert torch.equal(completed.body_logvar, alone.body_logvar)  # or another photo would raise the uncertainty
    many, same = profiles(FEW_VIEWS + 1)
    assert torch.equal(many.body_mean, same.body_mean)


def test_photos_that_cannot_be_used_are_reported(world, tmp_path):
    _, _, photos = world
    Image.new("RGB", (60, 80)).save(tmp_path / "dark.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "again.png").write_bytes(photos[0].read_bytes())
    bad = [tmp_path / name for name in ("dark.png", "text.png", "again.png")]
    result = profile(world, [*photos, *bad], tmp_path / "me.safetensors")
    reasons = [report.rejected for report in result.reports]
    assert reasons[:4] == [""] * 4 and reasons[4] == "no person found" and reasons[6] == "the same file again"
    assert "is not a picture" in reasons[5] and result.photos == 4
    profile(world, photos, tmp_path / "without.safetensors")
    with_bad, without = load_profile(tmp_path / "me.safetensors"), load_profile(tmp_path / "without.safetensors")
    assert torch.equal(with_bad.body_mean, without.body_mean)


def test_no_face_is_no_face(world, tmp_path):
    Image.new("RGB", (60, 80), (200, 200, 200)).save(tmp_path / "light.png")
    result = profile(world, [tmp_path / "light.png"], tmp_path / "me.safetensors")
    assert not result.has_face and load_profile(tmp_path / "me.safetensors").face is None
    assert "face_model" not in load_profile(tmp_path / "me.safetensors").record["inputs"]


def test_a_face_says_which_model_it_is_of(world, tmp_path):
    assert profile(world, world[2], tmp_path / "me.safetensors").has_face
    assert load_profile(tmp_path / "me.safetensors").record["inputs"]["face_model"] == "f" * 64


def test_nothing_usable_leaves_no_file(world, tmp_path):
    Image.new("RGB", (60, 80)).save(tmp_path / "dark.png")
    with pytest.raises(BolidError, match="the photo cannot be used: .*no person found") as error:
        profile(world, [tmp_path / "dark.png"], tmp_path / "me.safetensors")
    assert error.value.hint and not (tmp_path / "me.safetensors").exists()


def test_a_photo_that_is_named_twice_counts_once(world, tmp_path):
    photo = world[2][0]
    result = profile(world, [photo, photo.parent, photo], tmp_path / "me.safetensors")
    assert result.photos == 4 and len(result.reports) == 4 and not any(report.rejected for report in result.reports)


@pytest.mark.parametrize("content", [b"text", b""])
def test_files_that_are_no_pictures_are_told_from_bad_photos(world, tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BolidError, match="the photo cannot be used: .*the file is not a picture") as error:
        profile(world, [tmp_path / "a.jpg"], tmp_path / "me.safetensors")
    assert "JPEG, PNG" in error.value.hint


def test_errors(world, tmp_path):
    family, encoder, photos = world
    with pytest.raises(BolidError, match="no photo and no measurement given"):
        profile(world, [], tmp_path / "me.safetensors")
    with pytest.raises(BolidError, match="cannot read"):
        profile(world, [tmp_path / "missing.jpg"], tmp_path / "me.safetensors")
    with pytest.raises(BolidError, match="is no photo") as error:
        profile(world, [encoder], tmp_path / "me.safetensors")
    assert f"bolid profile show {encoder}" in error.value.hint
    with pytest.raises(BolidError, match="was made with family"):
        make_profile(photos, tmp_path / "me.safetensors", body_encoder=encoder, family="tiny")
    for name in ("a", "b"):
        (tmp_path / "people" / name).mkdir(parents=True)
        (tmp_path / "people" / name / "1.png").write_bytes(photos[0].read_bytes())
    with pytest.raises(BolidError, match="holds photos of 2 people"):
        profile(world, [tmp_path / "people"], tmp_path / "me.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(encoder.read_bytes()[:-10])
    with pytest.raises(BolidError, match="damaged"):
        make_profile(photos, tmp_path / "me.safetensors", body_encoder=tmp_path / "bad.safetensors")


# ---- profiles of profiles -----------------------------------------------------------------------------------------

MADE_WITH = {"body_encoder": "e" * 64, "face_model": "f" * 64}


def save(path, seed, face=True, family="tiny", **inputs):
    generator = torch.Generator().manual_seed(seed)
    body, spread, own = (torch.randn(n, generator=generator) for n in (12, 12, 512))
    record = run_record("profile", family=family, inputs=MADE_WITH | {"photo_000": f"{seed:064d}"} | inputs)
    own = torch.nn.functional.normalize(own, dim=0) if face else None
    save_profile(path, body, -spread.abs(), own, torch.tensor([0.25, 0.75]), record)
    return path


def test_a_mix_is_between_its_two(tmp_path):
    a, b = save(tmp_path / "a.safetensors", 1), save(tmp_path / "b.safetensors", 2)
    mixed = {}
    for fraction in (0.0, 0.3, 1.0):
        result = mix_profiles(a, b, tmp_path / "m.safetensors", fraction=fraction)
        assert result.has_face
        mixed[fraction] = load_profile(result.path)
    for whole, fraction in ((load_profile(a), 0.0), (load_profile(b), 1.0)):
        for name in ("body_mean", "body_logvar", "face"):
            assert torch.allclose(getattr(mixed[fraction], name), getattr(whole, name), atol=1e-6)
    some = mixed[0.3]
    assert torch.allclose(some.body_mean, 0.7 * load_profile(a).body_mean + 0.3 * load_profile(b).body_mean)
    assert float(some.face.norm()) == pytest.approx(1) and float(some.view_weights.sum()) == pytest.approx(1)
    faces = [float(some.face @ load_profile(path).face) for path in (a, b)]
    assert faces[0] > faces[1] > 0.2
    # The variance of 0.7 A + 0.3 B, drawn.
    generator = torch.Generator().manual_seed(0)
    draws = sum(
        part * (0.5 * load_profile(path).body_logvar).exp() * torch.randn(20000, 12, generator=generator)
        for part, path in ((0.7, a), (0.3, b))
    )
    assert torch.allclose(draws.var(0), some.body_logvar.exp(), rtol=0.05)
    photos = {"photo_000": f"{1:064d}", "photo_001": f"{2:064d}"}
    assert some.record["inputs"] == MADE_WITH | photos | {"profile_a": sha256_file(a), "profile_b": sha256_file(b)}
    assert some.record["config"] == {"fraction": 0.3} and mix_profiles(a, b, tmp_path / "m.safetensors").has_face


def test_the_body_of_a_mix_is_between_two_bodies(tmp_path):
    a, b = measured(tmp_path / "a.safetensors", 1.6), measured(tmp_path / "b.safetensors", 1.8)
    mix_profiles(a, b, tmp_path / "m.safetensors", fraction=0.25)
    first, second, mixed = (
        {row.name: row for row in show_profile(path)} for path in (a, b, tmp_path / "m.safetensors")
    )
    assert mixed["height"].value == pytest.approx(165, abs=1) and mixed["height"].sd < 1
    low, high = sorted((first["weight"].value, second["weight"].value))
    assert low < mixed["weight"].value < high
    other = load_profile(b)
    save_profile(tmp_path / "c.safetensors", other.body_mean, other.body_logvar, None, other.view_weights, other.record)
    mix_profiles(a, tmp_path / "c.safetensors", tmp_path / "n.safetensors")
    assert load_profile(tmp_path / "n.safetensors").body is None


def test_a_mix_with_somebody_without_a_face_has_none(tmp_path):
    a, b = save(tmp_path / "a.safetensors", 1), save(tmp_path / "b.safetensors", 2, face=False)
    assert not mix_profiles(a, b, tmp_path / "m.safetensors").has_face
    mixed = load_profile(tmp_path / "m.safetensors")
    assert mixed.face is None and "face_model" not in mixed.record["inputs"]


def test_what_cannot_be_mixed(tmp_path):
    a = save(tmp_path / "a.safetensors", 1)
    for other, message in (
        ({"family": "sdxl"}, "were made with different families: tiny and sdxl"),
        ({"body_encoder": "0" * 64}, "were made with different body encoders"),
        ({"face_model": "0" * 64}, "were made with different face models"),
    ):
        b = save(tmp_path / "b.safetensors", 2, **other)
        with pytest.raises(BolidError, match=message) as error:
            mix_profiles(a, b, tmp_path / "m.safetensors")
        assert "make both again with the same family" in error.value.hint
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(BolidError, match=f"--fraction is {fraction}"):
            mix_profiles(a, a, tmp_path / "m.safetensors", fraction=fraction)
    assert not (tmp_path / "m.safetensors").exists()


def measured(path, height: float = 1.7, **record):
    """A profile whose body has been measured."""
    from bolid.body.profiles import body_from_measurements, stored
    from bolid.body.shape import Known

    made = load_profile(save(path, 1, **record))
    body = stored(body_from_measurements({"height": Known(height, 0.005), "waist": Known(0.8, 0.01)}, "woman"))
    zeros = torch.zeros(len(load_tensors(SHAPES, "body-shape")[0]["bias"]))
    save_profile(path, zeros, zeros.clone(), made.face, made.view_weights, made.record, body)
    return path


SHAPES = get_family("tiny").body_shape


def test_what_cannot_be_edited(tmp_path):
    known = read_record(SHAPES)["inputs"]["body_encoder"]
    me = measured(tmp_path / "me.safetensors", body_encoder=known)
    for changes, message in (
        ({}, "nothing to change"),
        ({"nose": "+1cm"}, "there is no measurement 'nose'"),
        ({"waist": "+1"}, r"--set waist=\+1 sets nothing"),
        ({"waist": "sd"}, "--set waist=sd sets nothing"),
    ):
        with pytest.raises(BolidError, match=message) as error:
            edit_profile(me, tmp_path / "x.safetensors", changes=changes)
        assert error.value.hint
    other = measured(tmp_path / "other.safetensors", body_encoder="0" * 64)
    with pytest.raises(BolidError, match="is for another body encoder"):
        edit_profile(other, tmp_path / "x.safetensors", changes={"waist": "-1cm"})
    sdxl = measured(tmp_path / "sdxl.safetensors", family="sdxl")
    with pytest.raises(BolidError, match="body-shape.safetensors is for another body encoder"):
        edit_profile(sdxl, tmp_path / "x.safetensors", changes={"waist": "-1cm"})
    assert not (tmp_path / "x.safetensors").exists()


def test_the_commands_of_two_words(tmp_path, monkeypatch):
    run = CliRunner().invoke
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "me.safetensors", 1)
    save(tmp_path / "you.safetensors", 2, face=False)
    result = run(app, ["profile", "mix", "me.safetensors", "you.safetensors", "--fraction", "0.3", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout) == {"has_face": False, "path": "mixed.safetensors"}
    assert "no face" in result.stderr
    measured(tmp_path / "me.safetensors", body_encoder=read_record(SHAPES)["inputs"]["body_encoder"])
    edited = ["profile", "edit", "me.safetensors", "--set", "waist=-4cm", "--set", "inseam=+0.5sd"]
    result = run(app, [*edited, "--out", "x.safetensors"])
    assert result.exit_code == 0 and result.stdout == "x.safetensors\n" and "waist girth" in result.stderr
    shown = [
        json.loads(run(app, ["profile", "show", file, "--json"]).stdout) for file in ("me.safetensors", "x.safetensors")
    ]
    before, after = ({row["name"]: row["value"] for row in table["measurements"]} for table in shown)
    assert after["waist"] - before["waist"] == pytest.approx(-4, abs=0.7)
    assert after["hip"] == pytest.approx(before["hip"], abs=1) and after["inseam"] > before["inseam"] + 0.5
    shown = run(app, ["profile", "show", "x.safetensors"])
    assert shown.exit_code == 0 and shown.stdout.startswith("measurement ")
    # A folder of that name holds photos, as it always did.
    (tmp_path / "edit").mkdir()
    result = run(app, ["profile", "edit", "--out", "y.safetensors"])
    assert result.exit_code == 1 and "no photos in edit" in result.stderr
    result = run(app, ["profile", "mixed"])
    assert result.exit_code == 1 and "cannot read mixed" in result.stderr


@pytest.mark.slow
def test_showing_a_body_loads_neither_torch_nor_anny(tmp_path):
    """The table, the picture and a mesh at rest take seconds less without them."""
    me = measured(tmp_path / "me.safetensors")
    for arguments in (["show", me, "--picture", tmp_path / "me.png"], ["export", me, tmp_path / "me.obj"]):
        code = (
            f"import sys; sys.argv = ['bolid', 'profile', *{[str(part) for part in arguments]}]\n"
            "from bolid_cli.main import main\n"
            "try: main()\n"
            "except SystemExit as end: assert end.code == 0\n"
            "print('HEAVY', *sorted({'torch', 'anny', 'cv2'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout.rstrip().endswith("HEAVY"), result.stdout + result.stderr
    assert Image.open(tmp_path / "me.png").size == (2120, 1180) and (tmp_path / "me.obj").stat().st_size > 10**5


def test_a_damaged_body_is_noticed(tmp_path):
    me = measured(tmp_path / "me.safetensors")
    content = bytearray(me.read_bytes())
    content[-40] ^= 1
    me.write_bytes(content)
    with pytest.raises(BolidError, match="does not match the checksum"):
        show_profile(me)


def test_a_face_in_a_grey_photo_counts_little(world, tmp_path):
    """And a message says so: the profile's face is nearly that of the photos in colour."""
    _, _, photos = world
    Image.open(photos[0]).convert("L").save(tmp_path / "grey.png")
    face = {}
    for name, files in (
        ("colour", photos[1:2]),
        ("grey", [tmp_path / "grey.png"]),
        ("both", [photos[1], tmp_path / "grey.png"]),
    ):
        result = profile(world, files, tmp_path / f"{name}.safetensors")
        face[name] = load_profile(result.path).face
    assert [report.grey for report in result.reports] == [False, True]
    expected = face["colour"] + GREY_WEIGHT * face["grey"]
    torch.testing.assert_close(face["both"], expected / expected.norm())


def test_what_lies_in_the_folder_besides_photos(world, tmp_path):
    folder = world[2][0].parent
    (folder / "a.cr2").write_bytes(b"x")
    result = profile(world, [folder], tmp_path / "me.safetensors")
    assert result.photos == 4 and [*result.unread.values()] == [[str(folder / "a.cr2")]]


def test_measurements_need_no_models_of_photos(tmp_path, monkeypatch):
    """With a full-size family of which nothing has been fetched; a photo needs all of it."""
    monkeypatch.setenv("BOLID_HOME", str(tmp_path / "home"))
    known = {"height": Known(1.72, 0.01)}
    result = make_profile([], tmp_path / "me.safetensors", known=known, sex="woman", family="sdxl", device="cpu")
    rows = {row.name: row for row in result.measurements}
    assert rows["height"].value == pytest.approx(172, abs=1) and not result.has_face
    assert load_profile(result.path).record["family"] == "sdxl"
    Image.new("RGB", (60, 80), "red").save(tmp_path / "a.png")
    with pytest.raises(BolidError, match="family 'sdxl' has no segmentation model"):
        make_profile([tmp_path / "a.png"], tmp_path / "x.safetensors", family="sdxl", device="cpu")
    with pytest.raises(BolidError, match="was made with family 'sdxl', but --family is 'tiny'") as error:
        bolid.api.generate(["a woman"], profile=result.path, family="tiny", out=tmp_path / "generated", device="cpu")
    assert "--body-from shape" in error.value.hint


def test_a_photo_in_several_files_counts_once(world, tmp_path):
    """A phone's HEIC and the JPEG made of it are no more evidence than one of them. The largest picture stays."""
    _, _, photos = world
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (20, 15, 3), np.uint8)).resize((300, 400), Image.Resampling.BICUBIC)
    for name, size in (("a.png", (300, 400)), ("b.jpg", (225, 300)), ("c.webp", (150, 200))):
        picture.resize(size).save(tmp_path / name)
    copies = [tmp_path / name for name in ("b.jpg", "a.png", "c.webp")]
    result = profile(world, [*copies, *photos], tmp_path / "me.safetensors")
    assert [report.rejected for report in result.reports[:3]] == [
        "the same photo as a.png",
        "",
        "the same photo as a.png",
    ]
    once = profile(world, [tmp_path / "a.png", *photos], tmp_path / "once.safetensors")
    assert result.photos == 5 and result.uncertainty == once.uncertainty


def test_thumbnails_are_no_photos(world, tmp_path):
    Image.open(world[2][0]).resize((15, 20)).save(tmp_path / "tiny.png")
    with pytest.raises(BolidError, match="the picture has 15x20 pixels only"):
        profile(world, [tmp_path / "tiny.png"], tmp_path / "me.safetensors")


def test_a_person_with_folders_inside(world, tmp_path):
    """A folder with photos of its own is one person's, whatever folders it has. Several people are refused."""
    folder = world[2][0].parent
    (folder / "edited").mkdir()
    (folder / "edited" / "0.png").write_bytes(world[2][0].read_bytes())
    result = profile(world, [folder], tmp_path / "me.safetensors")
    assert result.photos == 4 and list(result.unread.values()) == [[str(folder / "edited")]]
    (tmp_path / "all" / "Zoë").mkdir(parents=True)
    (tmp_path / "all" / "Zoë" / "0.png").write_bytes(world[2][1].read_bytes())
    assert profile(world, [tmp_path / "all"], tmp_path / "me.safetensors").photos == 1
    (tmp_path / "all" / "Ann").mkdir()
    (tmp_path / "all" / "Ann" / "0.png").write_bytes(world[2][2].read_bytes())
    with pytest.raises(BolidError, match="photos of 2 people: Ann, Zoë") as error:
        profile(world, [tmp_path / "all"], tmp_path / "me.safetensors")
    assert str(tmp_path / "all" / "Ann") in error.value.hint


def test_the_preview_shows_every_photo(world, tmp_path):
    make_profile([*world[2], world[2][0]], tmp_path / "me.safetensors", body_encoder=world[1], family=world[0],
                 device="cpu", preview=tmp_path / "sheet.png")  # fmt: skip
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    green = (np.abs(sheet.astype(int) - [0, 200, 83]).max(2) < 8).sum(0) > 60
    assert sheet.shape[1] > sheet.shape[0] and np.diff(green.astype(int)).clip(0).sum() == 8  # two sides of four boxes
    with pytest.raises(BolidError, match="is no PNG"):
        make_profile(world[2], tmp_path / "x.safetensors", body_encoder=world[1], family=world[0], preview="a.jpg")
