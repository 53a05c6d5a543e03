"""Which keeps the body better: the trained body branch, the depth map of the 3D body, or both.

    python examples/tiny_family/measure_body_from.py photos/val --people 24 --out docs/results/body-from.md

Each person's profile is made from eight photos, with no stature. The prompts name poses, and so does `--pose`; the same
prompts and seeds in all rows. The probe, which no training and no calibration of the profile has used, reads each
picture's body ratios; a person's reading is the mean of his or her pictures. The first row reads real renders of the
same people, an equal number of pictures. Intervals: 95 %, bootstrap over people, of the differences too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from bolid.backends.pose import PoseModel
from bolid.backends.probe import BodyProbe
from bolid.generate import generate
from bolid.models.families import get_family
from bolid.profile import make_profile
from bolid.run import write_atomic
from bolid.synth.people import POSE_PHRASES, sample_person, sample_plan
from bolid.synth.render import Renderer

POSES = ("standing", "walking", "hands on hips", "arms spread")
PLACES = ("in a red short-sleeved top and blue trousers, on a beach", "in a green long-sleeved top and black trousers, "
          "in a studio", "in a white short-sleeved top and red shorts, in a meadow", "in a blue short-sleeved top and "
          "orange trousers, on a street")  # fmt: skip
WAYS = {
    "adapter": {"body_from": "adapter"},
    "shape": {"body_from": "shape"},
    "both": {"body_from": "both"},
}


def paint(profiles: dict[int, Path], way: str, seed: int, out: Path) -> dict[int, list[np.ndarray]]:
    """Seed of a person -> a picture of each pose."""
    made: dict[int, list[np.ndarray]] = {person: [] for person in profiles}
    for sex in ("woman", "man"):
        some = [s for s in profiles if (sample_person(s).phenotypes["gender"] > 0.5) == (sex == "woman")]
        files = [profiles[s] for s in some]
        prompts = [
            f"a full body photo of a {sex} {POSE_PHRASES[pose]}, {w}" for pose, w in zip(POSES, PLACES, strict=True)
        ]
        for i, (pose, prompt) in enumerate(zip(POSES, prompts, strict=True)):
            named = {} if way == "adapter" else {"pose": pose}
            paths = generate([prompt], out / way / str(i), profile=files, seed=seed + i, **WAYS[way], **named)
            for person, path in zip(some, paths, strict=True):
                made[person].append(np.asarray(Image.open(path)))
    return made


def renders(people: Sequence[int], size: tuple[int, int]) -> dict[int, list[np.ndarray]]:
    """Real pictures of the same people in the same poses."""
    found = {}
    for seed in people:
        renderer = Renderer(sample_person(seed), (2 * size[0], 2 * size[1]))
        plans = [sample_plan(renderer.person, 50 + i, framing="full body", pose=p) for i, p in enumerate(POSES)]
        found[seed] = [np.asarray(Image.fromarray(renderer.render(p).image).resize(size[::-1])) for p in plans]
    return found


def interval(value: Callable[[np.ndarray], float], people: int) -> str:
    """ "0.700 [0.600, 0.800]": `value` of rows of people, and its bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = [value(rng.integers(0, people, people)) for _ in range(2000)]
    return f"{value(np.arange(people)):.3f} [{np.quantile(draws, 0.025):.3f}, {np.quantile(draws, 0.975):.3f}]"


def scores(readings: np.ndarray, truth: np.ndarray, spread: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
    """Correlation with the truth over people, and mean absolute error in standard deviations; of rows of people."""

    def correlation(rows: np.ndarray) -> float:
        a, b = readings[rows] - readings[rows].mean(0), truth[rows] - truth[rows].mean(0)
        return float(((a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0)).clip(1e-12)).mean())

    return {"correlation": correlation, "error": lambda rows: float((np.abs(readings - truth) / spread)[rows].mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/body-from"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/body-from.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    family = get_family("tiny")
    probe, pose = BodyProbe(family.require("probe")), PoseModel(family.require("pose"))
    folders = sorted(path for path in args.photos.iterdir() if path.is_dir())[: args.people]
    profiles = {int(folder.name[1:]): args.work / f"{folder.name}.safetensors" for folder in folders}
    for folder, file in zip(folders, profiles.values(), strict=True):
        if not file.exists():
            make_profile([folder], file, family="tiny", device="cpu")
    sets = {"real renders": renders(list(profiles), family.image_size)}
    sets |= {way: paint(profiles, way, args.seed, args.work / "pictures") for way in WAYS}
    bodies = [Renderer(sample_person(seed), (64, 48)).ratios for seed in profiles]
    truth = np.array([[body[name] for name in probe.ratio_names] for body in bodies])
    spread, found, sheet = truth.std(0, ddof=1), {}, []
    for name, pictures in sets.items():
        readings = np.stack([probe.predict(some).mean(0) for some in pictures.values()])
        seen = np.mean([bool(people) for some in pictures.values() for people in pose.detect(some)])
        found[name] = scores(readings, truth, spread) | {"seen": seen}
        sheet.append(np.concatenate([picture for some in list(pictures.values())[:4] for picture in some], 1))
    Image.fromarray(np.concatenate(sheet)).save(args.work / "sheet.png")
    write_atomic(args.out, report(found, len(profiles)))
    print(args.out.read_text())


def report(found: dict[str, dict], people: int) -> str:
    """The Markdown page."""
    lines = [
        "# Body branch, 3D body, or both",
        "",
        "Made by `examples/tiny_family/measure_body_from.py`, which says how.",
        "",
        f"{people} held-out synthetic people, {len(POSES)} pictures each; ten body ratios. Error: in standard",
        "deviations over people.",
        "",
        "| the body comes from | correlation with the truth | error | person found |",
        "|---|---|---|---|",
    ]
    for name, entry in found.items():
        cells = [interval(entry[key], people) for key in ("correlation", "error")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {entry['seen']:.2f} |")
    lines += ["", "| paired difference | correlation | error |", "|---|---|---|"]
    for a, b in (("shape", "adapter"), ("both", "adapter"), ("both", "shape")):
        cells = []
        for key in ("correlation", "error"):
            first, second = found[a][key], found[b][key]
            cells.append(interval(lambda rows, f=first, s=second: f(rows) - s(rows), people))
        lines.append(f"| {a} minus {b} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
