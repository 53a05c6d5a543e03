"""Photographs given to `tiny`, which knows only renders: refused by name, with what to do; --force goes on."""

from __future__ import annotations

import shutil

import pytest
from test_rendered import shipped
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.extract import TooManyRejected, extract
from bolid.formats.shards import read_shards
from bolid.generate import generate
from bolid.profile import make_profile
from bolid.rendered import REFUSED, REFUSED_HINT
from bolid.scrape import TooManyFailed, scrape
from bolid_cli.main import app


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


def test_generate_reference(photograph, tmp_path):
    with pytest.raises(BolidError, match="none of the 1 photos can be used") as caught:
        generate(["a woman standing"], tmp_path / "out", reference=photograph, steps=1)
    assert caught.value.hint == REFUSED_HINT and not (tmp_path / "out").exists()


def test_profile(mixed, photograph, tmp_path):
    result = make_profile([mixed], tmp_path / "me.safetensors")
    assert result.photos == 4 and [report.rejected for report in result.reports if report.rejected] == [REFUSED]
    done = CliRunner().invoke(app, ["profile", str(photograph), "-o", str(tmp_path / "x.safetensors")])
    assert done.exit_code == 1 and not (tmp_path / "x.safetensors").exists()
    assert make_profile([photograph], tmp_path / "forced.safetensors", force=True).photos == 1
