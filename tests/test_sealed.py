"""The three sets of people: no shipped record and no example names a sealed person; a release is scored and logged."""

from __future__ import annotations

import ast
import itertools
import json
import sys
from pathlib import Path

import pytest

from bolid.errors import BolidError
from bolid.method.metrics import Interval

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiment"))
import people
import release
from judge.network import Judge

from bolid.evaluate.protocol import read_protocol

ROOT = Path(__file__).parents[1]
TEXTS = {".py", ".sh", ".json", ".toml", ".md"}
OPENS = {ROOT / "examples/experiment" / name for name in ("people.py", "release.py", "people/sealed.json")}
SEALED = people.read_people("sealed")


def shipped_texts() -> dict[str, str]:
    """What shipped weights and their cards record, the examples and the package's code."""
    found = {}
    for folder in ("bolid", "bolid_cli", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path in OPENS or not path.is_file() or "tokenizer" in path.parts:
                continue
            if path.suffix == ".safetensors":
                header = path.read_bytes()
                size = int.from_bytes(header[:8], "little")
                metadata = json.loads(header[8 : 8 + size]).get("__metadata__", {})
                found[str(path.relative_to(ROOT))] = "\n".join(metadata.values())
            elif path.suffix in TEXTS:
                found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
    return found


def test_the_sets_are_apart_and_large_enough():
    dev, calibration = (people.read_people(name) for name in ("dev", "calibration"))
    sets = [people.TRAINING, dev.seeds, calibration.seeds, SEALED.seeds]
    for one, other in itertools.pairwise(sets):
        assert one.stop <= other.start
    assert SEALED.seeds.start == 600_000 and len(SEALED.seeds) >= 100
    assert set(read_protocol().people) <= set(dev.seeds)


def test_nothing_that_is_shipped_names_a_sealed_person():
    texts = shipped_texts()
    assert sum(name.endswith(".safetensors") for name in texts) > 10  # records were read
    assert {"bolid/tiny/base/training.json", "bolid/evaluate/protocol.json"} <= texts.keys()
    assert {name: found for name, text in texts.items() if (found := people.mentions(text, SEALED))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "--people 600000", "seed 600_119", "people 600,010 and on", "photos/p600003/000.jpg", "--person-seed 0:700000",
        "range(599_000, 600_001)", "seeds 599990 to 600010", '{"config": {"first": 599999, "count": 2}}',
        'read_people("sealed")', "people/sealed.json", '{"people": [1, 600000]}',
    ],
)  # fmt: skip
def test_a_seed_of_the_sealed_set_is_found_however_it_is_written(text):
    assert people.mentions(text, SEALED)


@pytest.mark.parametrize(
    "text",
    [
        "644064 samples", "0.600012", "sha256 ab600012cd", "p6000121", "range(100_000, 200_000)", "600120",
        '{"first": 300000, "count": 2000}', "a sealed set", "2026-11-30", "599990:599999",
    ],
)  # fmt: skip
def test_other_numbers_are_not_mistaken_for_sealed_people(text):
    assert people.mentions(text, SEALED) == []


def test_an_unknown_or_damaged_set_is_refused(tmp_path):
    with pytest.raises(BolidError, match="no set of people called 'x'"):
        people.read_people("x")
    (tmp_path / "y.json").write_text('{"name": "y"}')
    with pytest.raises(BolidError, match="is damaged"):
        people.read_people("y", tmp_path)


WEIGHTS = {".safetensors", ".onnx"}
# Of these files no record names all people. A file that is made anew names them, and goes from this list.
UNNAMED = {
    "bolid/tiny/adapter/body.safetensors", "bolid/tiny/adapter/face.safetensors",
    "bolid/tiny/base/text_encoder/model.safetensors", "bolid/tiny/base/unet/diffusion_pytorch_model.safetensors",
    "bolid/tiny/base/vae/diffusion_pytorch_model.safetensors", "bolid/tiny/body-encoder.safetensors",
    "bolid/tiny/probe/probe.safetensors",
}  # fmt: skip
JUDGE = "examples/experiment/judge/judge.safetensors"


def test_every_shipped_file_names_its_people():
    shipped = people.read_shipped()
    weights = {
        str(path.relative_to(ROOT))
        for folder in ("bolid", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in WEIGHTS
    }
    assert weights == shipped.keys()
    assert {path for path, made in shipped.items() if made.unknown} == UNNAMED
    assert sum(bool(made.seeds) for made in shipped.values()) >= len(shipped) - 1


def test_no_shipped_file_was_made_with_people_that_figures_are_reported_on():
    reported = {person for person in read_protocol().people}
    for path, made in people.read_shipped().items():
        for use, ranges in made.seeds.items():
            for seeds in ranges:
                assert not set(seeds) & (set(SEALED.seeds) | reported), f"{path}, {use}"
                assert seeds.stop <= people.TRAINING.stop or use != "trained", path


def test_the_list_agrees_with_the_records():
    """A record that names seeds names those of the list."""
    compared = 0
    for path, made in people.read_shipped().items():
        if not path.endswith(".safetensors") or not (ROOT / path).exists():
            continue
        header = (ROOT / path).read_bytes()
        metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).get("__metadata__", {})
        config = json.loads(metadata.get("bolid", "{}")).get("config", {})
        named = [config["seeds"]] if "seeds" in config else []
        named += [
            [e["first"], e["first"] + e["count"]] for e in config.values() if isinstance(e, dict) and "first" in e
        ]
        for first, last in named:
            everyone = set(itertools.chain(*itertools.chain(*made.seeds.values())))
            assert {first, last - 1} <= everyone, path
            compared += 1
    assert compared >= 2


def test_nobody_but_the_judge_has_its_people():
    shipped = people.read_shipped()
    theirs = {seed for ranges in shipped.pop(JUDGE).seeds.values() for seeds in ranges for seed in seeds}
    for path, made in shipped.items():
        assert not any(theirs & set(seeds) for ranges in made.seeds.values() for seeds in ranges), path


def test_only_releases_use_the_judge():
    """No package and no script but those of release.py and figures.py imports the judge or reads its file."""
    reports = {ROOT / "examples/experiment" / name for name in ("release.py", "instruments.py")}
    folders = [ROOT / name for name in ("bolid", "bolid_cli", "examples")]
    for path in itertools.chain(*(folder.rglob("*.py") for folder in folders)):
        if "judge" in path.parts or path in reports:
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("judge" in name.split(".") for name in names), path
        assert "judge.safetensors" not in text, path


def test_a_damaged_list_of_people_is_refused(tmp_path):
    (tmp_path / "shipped.json").write_text('{"a": {"trained": [[0, 5]]}}')
    with pytest.raises(BolidError, match="is damaged"):
        people.read_shipped(tmp_path / "shipped.json")


MADE_UP = people.People("made-up", "a test", range(400_000, 400_008))


def test_a_release_is_logged_before_and_after(tmp_path):
    log = tmp_path / "releases.jsonl"

    def make(method):
        assert json.loads(log.read_text().splitlines()[-1])["event"] == "opened"
        return tmp_path / method

    def score(folders):
        assert folders == {"base": tmp_path / "base", "bolid-8": tmp_path / "bolid-8"}
        return {"bolid-8": {"r": Interval(0.61249, 0.5, 0.7)}}

    figures = release.release(MADE_UP, ["base", "bolid-8"], make, score, log, {"commit": "abc", "judge": "def"})
    assert figures == {"bolid-8": {"r": [0.612, 0.5, 0.7]}}
    opened, scored = (json.loads(line) for line in log.read_text().splitlines())
    assert opened["event"] == "opened" and "figures" not in opened
    assert scored["figures"] == figures and scored["commit"] == "abc" and scored["set"] == "made-up"
    assert scored["people"] == 8 and scored["date"].startswith("20")


def test_the_page_of_releases_has_the_last_one_first(tmp_path):
    log = tmp_path / "releases.jsonl"
    for commit, value in (("a" * 40, 0.25), ("b" * 40, 0.75)):
        found = {"base": {"text score": Interval(value, value - 0.1, value + 0.1)}}
        facts = {"commit": commit, "family": "tiny"}
        release.release(MADE_UP, ["base"], lambda method: tmp_path, lambda folders, found=found: found, log, facts)
    release.append(log, {"event": "opened", "commit": "c" * 40})
    page = release.page(log)
    assert page.index("commit bbbbbbb") < page.index("commit aaaaaaa") and "ccccccc" not in page
    assert "| text score |  | 0.750 (0.650 to 0.850) |" in page and "log: 3." in page and "8 people" in page


def test_an_opening_that_fails_stays_in_the_log(tmp_path):
    log = tmp_path / "releases.jsonl"

    def score(folders):
        raise BolidError("no pictures", "")

    for _ in range(2):
        with pytest.raises(BolidError, match="no pictures"):
            release.release(MADE_UP, ["base"], lambda method: tmp_path / "nothing", score, log, {})
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == ["opened", "opened"]


def test_nothing_is_opened_without_a_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "LOG", tmp_path / "releases.jsonl")
    monkeypatch.setattr(sys, "argv", ["release.py", "--judge", str(tmp_path / "none"), "--work", str(tmp_path)])
    with pytest.raises(BolidError, match="there is no judge"):
        release.main()
    assert not any(tmp_path.iterdir())


def test_a_release_takes_all_sealed_people(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "LOG", tmp_path / "releases.jsonl")
    monkeypatch.setattr(sys, "argv", ["release.py", "--people", "3", "--work", str(tmp_path)])
    with pytest.raises(BolidError, match="all sealed people"):
        release.main()
    assert not any(tmp_path.iterdir())


def test_a_dry_run_takes_dev_people_only(tmp_path, monkeypatch):
    words = ["--dry-run", "--first", "599999", "--people", "3", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["release.py", *words])
    with pytest.raises(BolidError, match="not of the dev set"):
        release.main()
    assert not any(tmp_path.iterdir())


def test_the_probe_is_no_judge():
    with pytest.raises(BolidError, match="body-probe"):
        Judge(ROOT / "bolid" / "tiny" / "probe" / "probe.safetensors")


def test_a_release_needs_a_commit(tmp_path):
    with pytest.raises(BolidError, match="git does not know the commit"):
        release.clean_commit(tmp_path)
