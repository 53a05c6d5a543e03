"""`bolid demo`: the whole chain on the embedded models, as the commands a user would type, and a contact sheet.

The person is a synthetic one that no model has seen (seeds from 200,000 up). Which commands run is decided here; the
program runs them (bolid_cli/demo.py) just as if they had been typed.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.run import atomic_path, disk_errors

if TYPE_CHECKING:
    from PIL import Image

    from bolid.synth.people import SyntheticPerson

FIRST_UNSEEN = 200_000
PHOTOS, PICTURES = 8, 2
_LEAST_HEIGHT, _MOST_HEIGHT = 216, 320  # pixels, of a picture on the contact sheet
_FINISH = ("--upscale", "2", "--refine-face")
HELD_OUT = 4  # further photos, for `evaluate`: the profile's own would flatter it
COLUMNS = ("base, no profile", "with this profile", "with another person's profile")

_PROMPTS = (
    "a full body photo of a {who} standing, in a red short-sleeved top and blue trousers, on a beach",
    "a full body photo of a {who} walking, in a green long-sleeved top and black trousers, on a street",
    "a full body photo of a {who} with arms spread, in a white short-sleeved top and purple shorts, in a meadow",
    "a full body photo of a {who} with hands on hips, in a yellow long-sleeved top and blue trousers, in a room",
    "a full body photo of a {who} waving, in an orange short-sleeved top and black trousers, in the snow",
)
_PORTRAIT = "a portrait of a {who}, in a red short-sleeved top, in a studio"


@dataclass(frozen=True)
class Plan:
    """The demo's people, prompts, files and commands (each the arguments after `bolid`)."""

    out: Path
    person: str
    other: str
    prompts: tuple[str, ...]  # of bodies
    portrait: str  # and of a face
    commands: tuple[tuple[str, ...], ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Of the pictures of bodies, one for each of COLUMNS; then of the portraits."""
        names = "base", self.person, self.other
        return tuple(place / name for place in (self.out, self.out / "portraits") for name in names)

    def shown(self, command: tuple[str, ...]) -> str:
        """A command as one would type it."""
        return shlex.join(("bolid", *command))


def plan(
    out: str | os.PathLike[str] = "bolid-demo", person: int = FIRST_UNSEEN, other: int | None = None, seed: int = 0
) -> Plan:
    """What the demo does for the person with the seed `person`.

    `other`: the seed of another person, so that the contact sheet can show whether the body follows the profile. By
    default it is the one of the next 24 people with the same gender word whose body ratios differ most (sum over
    logarithms).
    """
    from bolid.synth.people import build_words, sample_person

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BolidError(f"--out {out} is a file", "give a folder for the demo's files")
    if other == person:
        raise BolidError(f"--other-seed {other} is the same person", "give another seed")
    me = sample_person(person)
    who = build_words(me)["gender_word"]
    if other is None:
        from bolid.synth.body import body_ratios

        candidates = [sample_person(person + i) for i in range(1, 25)]
        alike = [c for c in candidates if build_words(c)["gender_word"] == who] or candidates
        own = body_ratios(me)

        def unlike(candidate: SyntheticPerson) -> float:
            return sum(abs(math.log(ratio / own[name])) for name, ratio in body_ratios(candidate).items())

        other = max(alike, key=unlike).seed
    names = [sample_person(s).name for s in (person, other)]
    photos = str(out / "photos")
    prompts = tuple(prompt.format(who=who) for prompt in _PROMPTS)
    prompt_file = str(out / "prompts.txt")
    profiles = [str(out / f"{name}.safetensors") for name in names]
    commands: list[tuple[str, ...]] = [
        ("synth", "--person-seed", str(number), "--photos", str(PHOTOS), "--out", photos) for number in (person, other)
    ]
    commands.append(("extract", photos, "--out", str(out / "shards"), "--max-bad", "0.5"))
    commands += [
        ("profile", str(Path(photos) / name), "--out", profile) for name, profile in zip(names, profiles, strict=True)
    ]
    portrait = _PORTRAIT.format(who=who)
    bodies, faces = ("generate", "--prompts-file", prompt_file), ("generate", portrait)
    for prompted, place in ((bodies, out), (faces, out / "portraits")):
        common = (*prompted, "-n", str(PICTURES), "--seed", str(seed), *_FINISH)
        commands.append((*common, "--out", str(place / "base")))
        for name, profile in zip(names, profiles, strict=True):
            commands.append((*common, "--profile", profile, "--out", str(place / name)))
    held_out = str(out / "held-out")
    commands.append(("synth", "--person-seed", str(person), "--photos", str(PHOTOS + HELD_OUT), "--out", held_out))
    shown = [str(out / name) for name in ("base", *names)]
    commands.append(("evaluate", "--compare", *shown, "--reference", str(Path(held_out) / names[0]), "--json"))
    return Plan(out, names[0], names[1], prompts, portrait, tuple(commands))


def draw_contact_sheet(plan: Plan) -> Path:
    """Draw out/contact-sheet.png with the three COLUMNS: both people's photos, a row a prompt, and one of portraits.

    Pictures are shown in their own size, within limits.
    """
    from PIL import Image, ImageDraw, ImageFont

    from bolid.contact_sheet import wrap_text

    gap, text_w = 6, 200
    with Image.open(min(plan.folders[0].glob("*.png"))) as picture:
        cell_h = min(max(picture.height, _LEAST_HEIGHT), _MOST_HEIGHT)
        cell_w = cell_h * picture.width // picture.height
    block = PICTURES * (cell_w + 2)
    width = text_w + 3 * (block + 3 * gap) + gap
    photo_w = (width - text_w - gap) // PHOTOS - gap
    photo_h = photo_w * 4 // 3
    head, row = 34, cell_h + gap
    shown = [(index, prompt, plan.folders[:3]) for index, prompt in enumerate(plan.prompts)]
    shown.append((0, plan.portrait, plan.folders[3:]))
    height = gap + 2 * (photo_h + gap) + head + len(shown) * row + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)

    y = gap
    for name, label in (
        (plan.person, "this person:\nthe eight photos\nof the profile"),
        (plan.other, "another person"),
    ):
        draw.multiline_text((gap, y + 4), f"{label}\n{name}", fill="black", font=font, spacing=4)
        for i, path in enumerate(sorted((plan.out / "photos" / name).glob("*.jpg"))[:PHOTOS]):
            sheet.paste(_fit(path, (photo_w, photo_h)), (text_w + i * (photo_w + gap), y))
        y += photo_h + gap
    for column, label in enumerate(COLUMNS):
        x = text_w + column * (block + 3 * gap)
        draw.text((x + block / 2, y + head / 2), label, fill="black", font=font, anchor="mm")
    y += head
    for index, prompt, folders in shown:
        draw.multiline_text(
            (gap, y + 4), wrap_text(prompt, draw, small, text_w - 2 * gap), fill="black", font=small, spacing=3
        )
        for column, folder in enumerate(folders):
            x = text_w + column * (block + 3 * gap)
            for i, path in enumerate(sorted(folder.glob(f"{index:03d}-*.png"))[:PICTURES]):
                sheet.paste(_fit(path, (cell_w, cell_h)), (x + i * (cell_w + 2), y))
        y += row
    target = plan.out / "contact-sheet.png"
    with atomic_path(target) as temporary:
        sheet.save(temporary, "PNG")
    return target


def how_close(plan: Plan, compared: dict) -> list[tuple[str, float | None, float | None]]:
    """Rows of the table from the comparison's JSON, all against the same photos of the person.

    (what was shown, mean error of the body in percent, text score in percent of the base's)
    """
    methods = [compared["methods"][name] for name in ("base", plan.person, plan.other)]
    text = [one["metrics"]["text_score"]["value"] for one in methods]
    body = [one["metrics"]["body_ratio_error"]["value"] for one in methods]
    return [
        (name, None if error is None else 100 * error, None if not (score and text[0]) else 100 * score / text[0])
        for name, error, score in zip((COLUMNS[0], COLUMNS[1], COLUMNS[2]), body, text, strict=True)
    ]


def prepare(plan: Plan) -> None:
    """Make the folder and write the prompts. Pictures of an earlier demo go: `generate` would keep those of other
    settings, and they would be scored with the new ones."""
    from bolid.formats.pictures import picture_record

    with disk_errors(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    for path in (path for folder in plan.folders for path in folder.glob("*.png")):
        if picture_record(path.read_bytes(), str(path)) is not None:
            path.unlink()
    with atomic_path(plan.out / "prompts.txt") as temporary:
        temporary.write_text("\n".join(plan.prompts) + "\n", encoding="utf-8")


def write_summary(plan: Plan, rows: list[tuple]) -> Path:
    """out/summary.json: the table and the commands, for scripts."""
    target = plan.out / "summary.json"
    keys = ("shown", "body_error_percent", "text_score_percent_of_base")
    data = {
        "person": plan.person,
        "other": plan.other,
        "table": [dict(zip(keys, row, strict=True)) for row in rows],
        "commands": [plan.shown(command) for command in plan.commands],
    }
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return target


def _fit(path: Path, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    from bolid.formats.images import read_photo

    return Image.fromarray(read_photo(path)).resize(size, Image.Resampling.BICUBIC)
