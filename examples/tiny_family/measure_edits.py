"""Do pictures follow `bolid profile edit`? The body branch with profiles of which one measurement was moved.

    python examples/tiny_family/measure_edits.py photos/val --people 12 --out runs/edits.md

Each measurement of EDITS is moved by -1 and +1 standard deviation, the others held; the prompts and noise are the same.
A person whose body cannot be moved so far is left out of that row.
The probe reads the body ratios. "follows": the change of the own ratio in the pictures, over that of the 3D body that
was asked for. "largest other": the largest change of another row's ratio, over the own one's, both in standard
deviations over people. Intervals: 95 %, bootstrap over people.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from bolid.backends.probe import BodyProbe
from bolid.errors import BolidError
from bolid.formats.profile import load_profile
from bolid.generate import generate
from bolid.models.families import get_family
from bolid.profile import edit_profile, make_profile
from bolid.run import write_atomic
from bolid.synth.body import anny_body
from bolid.synth.people import sample_person

EDITS = {
    "inseam": "leg", "arm": "arm", "shoulders": "shoulder_breadth", "head": "head", "waist": "waist_girth",
    "hip": "hip_girth",
}  # fmt: skip
"""Measurement -> the ratio that goes with it."""
PROMPTS = (
    "a full body photo of a {} standing, in a red short-sleeved top and blue trousers, in a studio",
    "a full body photo of a {} with arms spread, in a green short-sleeved top and black trousers, on a beach",
)


def ratios_of(profile: Path) -> np.ndarray:
    """The true ratios [R] of a profile's 3D body."""
    from bolid.body.mesh import body_model

    rest = body_model().rest(load_profile(profile).body.shape_mean[None])[0]
    found = anny_body().ratios(rest)
    return np.array([found[ratio] for ratio in EDITS.values()])


def measure(folder: Path, seed: int, scratch: Path, probe: BodyProbe) -> tuple[np.ndarray, np.ndarray]:
    """(what was asked for, what pictures show): change of each ratio from -1 to +1 sd of each measurement [E, R]."""
    columns = [probe.ratio_names.index(ratio) for ratio in EDITS.values()]
    make_profile([folder], scratch / "me.safetensors", family="tiny", device="cpu")
    files = [scratch / f"{name}-{side}.safetensors" for name in EDITS for side in ("less", "more")]
    reached = np.ones((len(EDITS), 1))
    for i, name in enumerate(EDITS):
        for file, sign in zip(files[2 * i : 2 * i + 2], "-+", strict=True):
            try:
                edit_profile(scratch / "me.safetensors", file, changes={name: f"{sign}1sd"})
            except BolidError:  # no body like this one is so narrow or wide
                reached[i] = np.nan
                shutil.copy(scratch / "me.safetensors", file)
    sex = "woman" if sample_person(seed).phenotypes["gender"] > 0.5 else "man"
    paths = generate([p.format(sex) for p in PROMPTS], scratch / "out", profile=files, seed=seed, family="tiny")
    pictures = [np.asarray(Image.open(path)) for path in paths]
    shown = probe.predict(pictures)[:, columns].reshape(len(files), len(PROMPTS), -1).mean(1)
    asked = np.stack([ratios_of(file) for file in files])
    return reached * (asked[1::2] - asked[::2]), reached * (shown[1::2] - shown[::2])


def report(asked: np.ndarray, shown: np.ndarray, spread: np.ndarray) -> str:
    """The Markdown page, of changes [people, E, R]; `spread` [R]: of the ratios over people."""
    people, rng = len(asked), np.random.default_rng(0)
    draws = [rng.integers(0, people, people) for _ in range(2000)]
    lines = [
        "# Do pictures follow an edit?", "", "Made by `examples/tiny_family/measure_edits.py`, which says how.", "",
        f"{people} held-out synthetic people, {len(PROMPTS)} pictures of each edit.", "",
        "| moved by 2 sd in all | people | follows | largest other |", "|---|---|---|---|",
    ]  # fmt: skip
    names = list(EDITS)
    for i, name in enumerate(names):

        def follows(rows: np.ndarray, i: int = i) -> float:
            return float(np.nanmean(shown[rows, i, i]) / np.nanmean(asked[rows, i, i]))

        low, high = np.nanquantile([follows(rows) for rows in draws], (0.025, 0.975))
        moved = np.nanmean(shown[:, i], axis=0) / spread
        others = np.abs(np.delete(moved, i)) / abs(moved[i])
        worst = int(others.argmax())
        cells = (
            name,
            str(int((~np.isnan(shown[:, i, i])).sum())),
            f"{follows(np.arange(people)):.2f} [{low:.2f}, {high:.2f}]",
            f"{others[worst]:.2f} ({names[worst + (worst >= i)]})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/edits.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    probe = BodyProbe(get_family("tiny").require("probe"))
    folders = sorted(path for path in args.photos.iterdir() if path.is_dir())[: args.people]
    found = []
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            found.append(measure(folder, int(folder.name[1:]), Path(scratch), probe))
    asked, shown = (np.stack(parts) for parts in zip(*found, strict=True))
    bodies = [sample_person(seed) for seed in range(20000, 20200)]
    ratios = [anny_body().ratios(anny_body().rest(p.phenotypes, p.local_changes)[0]) for p in bodies]
    spread = np.array([[each[ratio] for ratio in EDITS.values()] for each in ratios]).std(0)
    write_atomic(args.out, report(asked, shown, spread))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
