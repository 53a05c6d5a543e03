"""extract and shard with the embedded models, on rendered people the models have never seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bolid import views
from bolid.backends.pose import PoseModel
from bolid.errors import BolidError
from bolid.extract.command import TooManyRejected, extract
from bolid.formats.images import decode_image, read_photo
from bolid.formats.profile import load_profile
from bolid.formats.shards import read_shards
from bolid.generate.command import generate
from bolid.method.keypoints import MIN_CONFIDENCE
from bolid.models.families import get_family
from bolid.person import FACE_WEIGHT, PersonReader
from bolid.profile import make_profile
from bolid.shard import shard
from bolid_cli.main import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool({"pose", "face", "image_text"} & set(get_family("tiny").missing())), reason="tiny is not trained"
    ),
]


@pytest.fixture(scope="module")
def shards(rendered_people, tmp_path_factory):
    out = tmp_path_factory.mktemp("extract") / "shards"
    extract(rendered_people, out, device="cpu", max_bytes=200_000, max_bad=0.2)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_people_are_seen_where_they_are(shards, rendered_people):
    samples = list(read_shards(shards))
    assert len(samples) >= 13
    faces, errors, held = 0, [], []
    for sample in samples:
        truth = json.loads((rendered_people / sample.meta["source"]).with_suffix(".json").read_text())
        assert sample.caption == (rendered_people / sample.meta["source"]).with_suffix(".txt").read_text().strip()
        left, top, right, bottom = truth["box"]
        found = sample.meta["box"]
        overlap_w = min(right, found[2]) - max(left, found[0])
        overlap_h = min(bottom, found[3]) - max(top, found[1])
        held.append(overlap_w * overlap_h / ((right - left) * (bottom - top)))
        expected, seen = np.array(truth["keypoints"]), sample.tensors["keypoints"]
        both = (expected[:, 2] == 2) & (seen[:, 2] > 0.5)
        assert both.sum() >= 4, sample.meta["source"]
        errors.append(np.median(np.linalg.norm(expected[both, :2] - seen[both, :2], axis=1)) / (bottom - top))
        if "face" in sample.tensors:
            faces += 1
            assert np.linalg.norm(sample.tensors["face"]) == pytest.approx(1, abs=1e-4)
        assert sample.tensors["view_features"].shape[0] == 17
        assert not sample.tensors["view_features"][seen[:, 2] < MIN_CONFIDENCE].any()
        assert np.linalg.norm(sample.tensors["image_embed"]) == pytest.approx(1, abs=1e-3)
    assert np.median(held) > 0.7 and min(held) > 0.25
    assert np.median(errors) < 0.06  # of the person's height; measure.py has the exact figures
    assert faces >= len(samples) // 2


@pytest.mark.slow
def test_worker_processes_write_the_same_bytes(shards, rendered_people, tmp_path):
    extract(rendered_people, tmp_path / "two", device="cpu", max_bytes=200_000, max_bad=0.2, workers=2)
    assert contents(tmp_path / "two") == contents(shards)


@pytest.mark.slow
def test_an_error_in_a_worker_arrives(rendered_people, tmp_path):
    family = tmp_path / "broken.toml"
    family.write_text("image_size = [128, 96]\n")
    with pytest.raises(BolidError, match="has no pose model"):
        extract(rendered_people, tmp_path / "x", family=str(family), workers=2)


@pytest.mark.skipif("base" in get_family("tiny").missing(), reason="the tiny family's base is not trained")
def test_latents_are_those_of_the_cropped_photos(shards, tmp_path):
    from bolid.backends.diffusion import LatentEncoder

    shard(shards, tmp_path / "train", device="cpu")
    samples = list(read_shards(tmp_path / "train", kind="training-shards"))
    assert len(samples) >= 8
    family = get_family("tiny")
    encoder = LatentEncoder(get_family("tiny"))
    for sample in samples[:3]:
        picture = decode_image(sample.image)
        assert picture.shape == (*family.view_size, 3)
        rebuilt = encoder.decode(sample.tensors["latents"][None])[0]
        assert rebuilt.shape == (*family.image_size, 3)
        small = np.asarray(Image.fromarray(picture).resize(family.image_size[::-1], Image.Resampling.LANCZOS))
        error = np.mean((rebuilt.astype(float) - small) ** 2)
        assert 10 * np.log10(255**2 / error) > 22, "dB"


def test_a_hand_alone_is_rejected(rendered_people, tmp_path):
    """Cut around a wrist: little of the person is left, and nobody should be made of it."""
    for number, path in enumerate(sorted(rendered_people.glob("*/*.jpg"))[:6]):
        x, y, visible = json.loads(path.with_suffix(".json").read_text())["keypoints"][9]
        if visible == 2:
            image = Image.fromarray(read_photo(path)).crop((int(x) - 18, int(y) - 24, int(x) + 18, int(y) + 24))
            image.resize((192, 256)).save(tmp_path / f"{number}.png")
    with pytest.raises(TooManyRejected) as caught:
        extract(tmp_path, tmp_path / "shards", device="cpu")
    assert set(caught.value.rejected) <= {views.NO_PERSON, views.UNSURE, views.CUT_OFF, views.SMALL}


def test_pictures_without_people(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    with pytest.raises(TooManyRejected, match="none of the 4 photos could be used") as caught:
        extract(tmp_path, tmp_path / "shards", device="cpu")
    assert "tiny knows only rendered people" in caught.value.hint


@pytest.mark.slow
def test_a_profile_says_how_much_of_the_body_its_photos_show(rendered_people, tmp_path):
    photos = sorted(rendered_people.glob("*/*.jpg"))
    framings = {path: json.loads(path.with_suffix(".json").read_text())["attributes"]["framing"] for path in photos}
    whole = [path for path, framing in framings.items() if framing == "full body"]
    cut = next(path for path, framing in framings.items() if framing != "full body")
    reports = make_profile(photos, tmp_path / "all.safetensors", device="cpu").reports
    assert {report.down_to for report in reports if report.photo in whole} == {"feet"}
    assert next(report for report in reports if report.photo == cut).down_to not in ("", "feet")

    messages = {}
    for photo in (whole[0], cut):
        out = tmp_path / f"{photo.parent.name}-{photo.stem}.safetensors"
        result = CliRunner().invoke(app, ["profile", str(photo), "--out", str(out)])
        assert result.exit_code == 0 and result.stdout.strip() == str(out)
        messages[photo] = result.stderr
    assert (
        "no photo shows the whole body" not in messages[whole[0]] and "no photo shows the whole body" in messages[cut]
    )


@pytest.mark.slow
def test_the_best_of_several_is_chosen_by_the_face_too(rendered_people, tmp_path, monkeypatch):
    people = []
    for number, folder in enumerate(sorted(rendered_people.iterdir())[:2]):
        make_profile(sorted(folder.glob("*.jpg")), tmp_path / f"{number}.safetensors", device="cpu")
        people.append(load_profile(tmp_path / f"{number}.safetensors"))
    reader, own = PersonReader(get_family("tiny")), people[0].face
    whole = [read_photo(path) for path in sorted(rendered_people.glob("*/*.jpg"))[:5]]
    heads = [photo[: photo.shape[0] // 3] for photo in whole]
    seen = {True: [], False: []}  # whether it is a head alone -> (how much the face counts, its cosine)
    for pictures, head in ((whole, False), (heads, True)):
        bodies, both, other = (
            np.array(reader.distances(pictures, people[0].body_mean, face)) for face in (None, own, people[1].face)
        )
        for view, body, one, another in zip(reader.view_reader.read(pictures), bodies, both, other, strict=True):
            if isinstance(view, views.View):
                cosine = 0.0 if view.face is None else float(view.face @ own.numpy())
                seen[head].append(((one - body) / (1 - cosine), cosine))
                assert one < another or cosine < 0.5
    counts, cosines = np.array(seen[False] + seen[True]).T
    assert cosines.max() > 0.5, "of this very person"
    assert ((counts > -1e-3) & (counts <= FACE_WEIGHT)).all()
    assert np.mean([c for c, _ in seen[True]]) > 2 * np.mean([c for c, _ in seen[False]])

    faces, distances = [], PersonReader.distances

    def spy(self, pictures, body, face=None):
        faces.append(face)
        return distances(self, pictures, body, face)

    monkeypatch.setattr(PersonReader, "distances", spy)
    options = {"profile": tmp_path / "0.safetensors", "best_of": 2, "device": "cpu"}
    generate(["a portrait of a woman"], tmp_path / "a", **options)
    assert len(faces) == 2 and all(face is not None and np.array_equal(face, own) for face in faces)
    generate(["a portrait of a woman"], tmp_path / "b", face_scale=0, **options)
    assert faces[2:] == [None, None], "a face that is not to be shown is not looked for"


@pytest.mark.slow
def test_a_pose_from_a_photo_is_taken(rendered_people, tmp_path):
    """The joints stand in the picture where they stand in the photo, and elsewhere without the ControlNet's say."""
    family = get_family("tiny")
    if not family.has("controlnet"):
        pytest.skip("tiny has no ControlNet")
    pose = PoseModel(family.pose)
    prompt = "a full body photo of a woman, in a red short-sleeved top and blue trousers, in a studio"
    photos = [
        path.with_suffix(".jpg")
        for path in sorted(rendered_people.glob("*/*.json"))
        if json.loads(path.read_text())["attributes"]["framing"] == "full body"
    ]
    assert len(photos) >= 3
    limbs = slice(5, 17)

    def generated(photo: Path, scale: float) -> np.ndarray:
        (path,) = generate(
            [prompt], tmp_path / f"{photo.stem}-{scale}", pose_from=photo, pose_scale=scale, device="cpu"
        )
        (shown,) = pose.detect([np.asarray(Image.open(path))])[0][:1]
        return shown.keypoints[limbs, :2]

    misses: dict[float, list[float]] = {1.0: [], 0.0: []}
    without = generated(photos[0], 0.0)  # the same whatever the photo
    for photo in photos[:4]:
        (person,) = pose.detect([read_photo(photo)])[0][:1]
        _, _, asked = views.person_crop(
            read_photo(photo), views.whole_box(person, (256, 192)), person.keypoints, family.image_size
        )
        for scale, shown in ((1.0, generated(photo, 1.0)), (0.0, without)):
            distance = np.linalg.norm(shown - asked[limbs, :2], axis=1)
            misses[scale].append(float(np.median(distance)) / family.image_size[0])
    assert np.mean(misses[1.0]) < 0.05 and np.mean(misses[1.0]) < 0.5 * np.mean(misses[0.0]), misses


@pytest.mark.slow
def test_which_of_several_people_is_taken(rendered_people, tmp_path):
    """The embedded models on two people in one picture: --select-person counts from the left."""
    whole = []
    for path in sorted(rendered_people.glob("*/*.jpg")):
        framing = json.loads(path.with_suffix(".json").read_text())["attributes"]["framing"]
        if framing != "portrait" and path.parent not in [other.parent for other in whole]:
            whole.append(path)
    whole = whole[:2]
    pictures = [Image.open(path) for path in whole]
    both = Image.new("RGB", (2 * pictures[0].width, pictures[0].height))
    for place, picture in enumerate(pictures):
        both.paste(picture, (place * picture.width, 0))
    both.save(tmp_path / "both.png")
    bodies = {}
    for rule in (1, 2):
        out = tmp_path / f"{rule}.safetensors"
        run = CliRunner().invoke(
            app, ["profile", str(tmp_path / "both.png"), "--select-person", str(rule), "-o", str(out)]
        )
        assert run.exit_code == 0 and f"{rule} of 2" in run.stderr, run.stderr
        assert "1 photo shows several people" in run.stderr
        bodies[rule] = load_profile(out).body_mean
    for rule, photo in zip((1, 2), whole, strict=True):
        make_profile([photo], tmp_path / "alone.safetensors", device="cpu")
        alone = load_profile(tmp_path / "alone.safetensors").body_mean
        assert (bodies[rule] - alone).norm() < (bodies[3 - rule] - alone).norm()
    run = CliRunner().invoke(app, ["profile", str(tmp_path / "both.png"), "--select-person", "only"])
    assert (
        run.exit_code == 1
        and "several people (--select-person only)" in run.stderr
        and "--select-person main" in run.stderr
    )
    run = CliRunner().invoke(app, ["profile", str(tmp_path / "both.png"), "--select-person", "left"])
    assert run.exit_code == 1 and "--select-person is 'left'" in run.stderr
