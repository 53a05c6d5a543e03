"""The demo's plan and its contact sheet. That the whole of it runs is checked by .ci/run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import typer
from PIL import Image

import bolid.demo
from bolid.errors import BolidError
from bolid.generate import save_picture
from bolid.run import run_record
from bolid.synth.body import body_ratios
from bolid.synth.people import RATIO_NAMES, build_words, sample_person
from bolid_cli.main import COMMANDS, app


def test_plan_takes_an_unseen_person_and_one_of_another_build():
    plan = bolid.demo.plan("out")
    me, other = (sample_person(int(name[1:])) for name in (plan.person, plan.other))
    assert me.seed >= bolid.demo.FIRST_UNSEEN and other.seed >= bolid.demo.FIRST_UNSEEN and me != other
    assert build_words(me)["gender_word"] == build_words(other)["gender_word"]
    mine, theirs = body_ratios(me), body_ratios(other)
    assert sum(abs(math.log(theirs[name] / mine[name])) for name in RATIO_NAMES) > 1.5


def test_plan_refuses_the_same_person_twice(tmp_path):
    with pytest.raises(BolidError, match="the same person") as error:
        bolid.demo.plan(tmp_path, 200001, 200001)
    assert "another seed" in error.value.hint
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BolidError, match="is a file"):
        bolid.demo.plan(file)


def test_every_command_shown_can_be_typed():
    """Each command of the plan exists and takes the options it is given."""
    plan = bolid.demo.plan("out")
    known = {name for name, _ in COMMANDS}
    for command in plan.commands:
        assert command[0] in known
        parameters = typer.main.get_command(app).commands[command[0]].params
        options = {text for parameter in parameters for text in parameter.opts}
        for word in command[1:]:
            if word.startswith("-"):
                assert word in options, (command[0], word)
    assert {"synth", "extract", "profile", "generate", "evaluate"} <= {command[0] for command in plan.commands}
    assert plan.shown(plan.commands[0]).startswith("bolid synth --person-seed 200000 ")


def test_pictures_of_an_earlier_demo_go_and_nothing_else(tmp_path):
    plan = bolid.demo.plan(tmp_path)
    bolid.demo.prepare(plan)
    (tmp_path / "portraits" / "base").mkdir(parents=True)
    old, notes = (tmp_path / "portraits" / "base" / name for name in ("000-x-0.png", "mine.png"))
    save_picture(old, Image.new("RGB", (8, 8)), run_record("picture", family="tiny"))
    Image.new("RGB", (8, 8)).save(notes)
    bolid.demo.prepare(plan)
    assert not old.exists() and notes.exists()
    assert (tmp_path / "prompts.txt").read_text().splitlines() == list(plan.prompts)


def test_contact_sheet_shows_photos_and_pictures(tmp_path):
    plan = bolid.demo.plan(tmp_path)
    colours = {plan.person: (200, 30, 30), plan.other: (30, 30, 200), "base": (30, 200, 30)}
    for name in (plan.person, plan.other):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (48, 64), colours[name]).save(folder / f"{i:03d}.jpg")
    for name, colour in colours.items():
        for folder, rows in ((tmp_path / name, len(plan.prompts)), (tmp_path / "portraits" / name, 1)):
            folder.mkdir(parents=True)
            for index in range(rows):
                for i in range(2):
                    Image.new("RGB", (72, 96), colour).save(folder / f"{index:03d}-x-{i}.png")
    sheet = np.asarray(Image.open(bolid.demo.draw_contact_sheet(plan)).convert("RGB")).astype(int)
    for row in (-60, -60 - 222):  # portraits, and the last prompt of bodies
        columns = [np.flatnonzero((np.abs(sheet - colour).sum(-1) < 30)[row]).mean() for colour in
                   (colours["base"], colours[plan.person], colours[plan.other])]  # fmt: skip
        assert columns == sorted(columns)  # base, this profile, another's: from left to right
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_pictures_are_compared_over_equal_photos(tmp_path):
    plan = bolid.demo.plan(tmp_path)
    (command,) = [command for command in plan.commands if command[0] == "evaluate"]
    assert command[1] == "--compare" and list(command[2:5]) == [str(folder) for folder in plan.folders[:3]]
    assert command[command.index("--reference") + 1].endswith(f"held-out/{plan.person}")


def test_summary_is_data(tmp_path):
    plan = bolid.demo.plan(tmp_path)
    values = {"base": (0.08, 0.5), plan.person: (0.04, 0.45), plan.other: (0.1, None)}
    methods = {
        name: {"metrics": {"body_ratio_error": {"value": body}, "text_score": {"value": text}}}
        for name, (body, text) in values.items()
    }
    rows = bolid.demo.how_close(plan, {"methods": methods})
    assert rows == [(bolid.demo.COLUMNS[0], 8, 100), (bolid.demo.COLUMNS[1], 4, 90), (bolid.demo.COLUMNS[2], 10, None)]
    data = json.loads(bolid.demo.write_summary(plan, rows).read_text())
    assert [row["shown"] for row in data["table"]] == list(bolid.demo.COLUMNS)
    assert data["table"][1]["body_error_percent"] == 4 and data["commands"][0].startswith("bolid synth")
