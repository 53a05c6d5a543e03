"""Photographs given to `tiny`, which knows only renders: refused by name, with what to do; --force goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_rendered import shipped
from typer.testing import CliRunner

from bolid.backends.body import BodyEncoder
from bolid.body.shape import Known
from bolid.errors import BolidError
from bolid.extract import TooManyRejected, extract
from bolid.formats.profile import load_profile
from bolid.formats.shards import read_shards
from bolid.generate import generate
from bolid.models.families import MASK_ENCODER, get_family
from bolid.profile import body_of, make_profile
from bolid.rendered import REFUSED, REFUSED_HINT
from bolid.run import home, sha256_file
from bolid.scrape import TooManyFailed, scrape
from bolid_cli.main import app

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photograph():
    """A portrait that `tiny`'s pose model takes for a render without being asked."""
    found = [path for path in shipped() if path.stem in ("grace_hopper", "astronaut")]
    if not found:
        pytest.skip("no package that ships a portrait is installed")
    return found[0]


@pytest.fixture
def mixed(photograph, rendered_people, tmp_path):
    """A folder of four renders and a photograph of one person."""
    folder = tmp_path / "photos" / "anna"
    folder.mkdir(parents=True)
    renders = sorted(next(path for path in sorted(rendered_people.iterdir()) if path.is_dir()).glob("*.jpg"))[:4]
    for number, path in enumerate([*renders, photograph]):
        shutil.copy(path, folder / f"{number}{path.suffix}")
    return folder


@pytest.mark.slow
def test_extract(mixed, photograph, tmp_path):
    result = extract(mixed.parent, tmp_path / "shards")
    assert result.rejected == {REFUSED: [f"anna/4{photograph.suffix}"]} and result.samples == 4
    assert result.warning.startswith("family tiny knows only rendered people, and 1 of 5 photos are photographs")
    for path in mixed.glob("[0-3].jpg"):
        path.unlink()
    with pytest.raises(TooManyRejected, match="none of the 1 photos could be used") as caught:
        extract(mixed.parent, tmp_path / "none")
    assert REFUSED_HINT in caught.value.hint and not (tmp_path / "none").exists()
    forced = extract(mixed.parent, tmp_path / "forced", force=True)
    assert forced.samples == 1 and len(list(read_shards(tmp_path / "forced"))) == 1


def test_scrape(mixed, tmp_path):
    options = {"min_size": 100, "min_sharpness": 0, "one_person": True}
    result = scrape(mixed.parent, out=tmp_path / "out", **options)
    assert result.photos == 4 and result.dropped == {REFUSED: 1}
    assert any(REFUSED in warning and "--force" in warning for warning in result.warnings)
    again = scrape(mixed.parent, out=tmp_path / "out", force=True, **options)  # the verdict was of the filter alone
    assert REFUSED not in again.dropped
    for path in mixed.glob("[0-3].jpg"):
        path.unlink()
    with pytest.raises(TooManyFailed, match="no photos could be kept") as caught:
        scrape(mixed.parent, out=tmp_path / "none", **options)
    assert REFUSED_HINT in caught.value.hint


def test_generate_photo(photograph, tmp_path):
    with pytest.raises(BolidError, match="the photo cannot be used") as caught:
        generate(["a woman standing"], tmp_path / "out", photo=photograph, steps=1)
    assert caught.value.hint == REFUSED_HINT and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_profile(mixed, photograph, tmp_path):
    result = make_profile([mixed], tmp_path / "me.safetensors")
    assert result.photos == 4 and [report.rejected for report in result.reports if report.rejected] == [REFUSED]
    forced = make_profile([photograph], tmp_path / "forced.safetensors", force=True)
    assert forced.photos == 1 and not forced.warning


def test_profile_of_photographs_alone(photograph, tmp_path):
    """The mask encoder estimates the body from the silhouette, in the space of the adapters."""
    path = tmp_path / "me.safetensors"
    done = CliRunner().invoke(app, ["profile", str(photograph), "--height", "172", "-o", str(path)])
    assert done.exit_code == 0 and "warning: these are photographs" in done.stderr
    assert "docs/concepts/mask-encoder.md" in done.stderr and (ROOT / "docs/concepts/mask-encoder.md").is_file()
    row = next(line for line in done.stderr.splitlines() if line.startswith(str(photograph)))
    assert row.split()[-7:-5] == ["1.000", "no"]  # weight, face
    profile, tiny = load_profile(path), get_family("tiny")
    assert profile.face is None and profile.body is not None
    inputs = profile.record["inputs"]
    assert inputs["body_encoder"] == BodyEncoder(tiny.body_encoder).space
    assert inputs["outline_encoder"] == sha256_file(MASK_ENCODER)
    _, rows = body_of(path)
    assert {row.name: row for row in rows}["height"].value == pytest.approx(172, abs=1)
    # Less is known than of a render: one photograph of a portrait leaves the waist nearly as open as no photo at all.
    measured = make_profile([], tmp_path / "none.safetensors", known={"height": Known(1.72, 0.005)})
    spread = [{row.name: row for row in result}["waist"].sd for result in (rows, measured.measurements)]
    assert 0 < spread[0] <= spread[1]


@pytest.mark.slow
def test_a_full_size_family_reads_bodies_untrained(rendered_people, tmp_path):
    """The published networks are not here: tiny's own stand in their places, in their layout."""
    tiny = get_family("tiny")
    for part in ("pose", "face", "image_text", "segmentation"):
        (home() / "sdxl").mkdir(parents=True, exist_ok=True)
        (home() / "sdxl" / part).symlink_to(getattr(tiny, part), target_is_directory=True)
    person = next(path for path in sorted(rendered_people.iterdir()) if path.is_dir())
    result = make_profile([person], tmp_path / "me.safetensors", family="sdxl", known={"height": Known(1.72, 0.005)})
    rows = {row.name: row for row in result.measurements}
    assert not result.warning and rows["height"].value == pytest.approx(172, abs=1) and 50 < rows["waist"].value < 150
    record = load_profile(result.path).record
    assert record["family"] == "sdxl" and record["inputs"]["body_encoder"] == sha256_file(MASK_ENCODER)
    # It belongs to every family, so it may be named in any.
    again = make_profile([person], tmp_path / "tiny.safetensors", family="tiny", body_encoder=MASK_ENCODER)
    assert load_profile(again.path).record["family"] == "tiny"
