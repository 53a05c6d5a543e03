"""Who the synthetic people are and what a photo of them shows: all sampling, no rendering.

A `SyntheticPerson` is what stays the same in every photo (body, head, skin, hair); a `PhotoPlan` is what
changes (pose, camera, framing, clothes, place, light). Both are pure functions of a seed: the same seed
gives the same person, and the same (seed, photo index) the same photo.

Only adults are sampled (Anny's age parameter is at least ADULT_AGE), and every plan is dressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bolid.run import derive_seed

ADULT_AGE = 2 / 3
"""Anny's `age` phenotype: 1/3 is a child, 2/3 a young adult, 1 an old one. Nothing below 2/3 is sampled."""

FRAMINGS = ("full body", "three-quarter", "portrait")
POSES = ("standing", "walking", "waving", "hands on hips", "arms raised", "arms spread", "squatting")
SCENES = ("studio", "beach", "meadow", "street", "room", "snow")
SCENE_PHRASES = {
    "studio": "in a studio",
    "beach": "on a beach",
    "meadow": "in a meadow",
    "street": "on a street",
    "room": "in a room",
    "snow": "in the snow",
}
POSE_PHRASES = {
    "standing": "standing",
    "walking": "walking",
    "waving": "waving",
    "hands on hips": "with hands on hips",
    "arms raised": "with arms raised",
    "arms spread": "with arms spread",
    "squatting": "squatting",
}
COLORS = {
    "red": (0.76, 0.12, 0.13),
    "orange": (0.93, 0.49, 0.10),
    "yellow": (0.95, 0.82, 0.18),
    "green": (0.16, 0.53, 0.23),
    "blue": (0.14, 0.30, 0.72),
    "purple": (0.47, 0.20, 0.60),
    "white": (0.93, 0.93, 0.91),
    "black": (0.10, 0.10, 0.11),
}
"""Garment colours by name: sRGB 0..1."""
SLEEVES = ("short", "long")
BOTTOMS = ("trousers", "shorts", "skirt")
HAIR_STYLES = ("bald", "short", "full", "bun", "long")
HAIR_COLORS = (
    (0.09, 0.07, 0.06),
    (0.26, 0.16, 0.09),
    (0.45, 0.30, 0.16),
    (0.80, 0.64, 0.36),
    (0.55, 0.24, 0.10),
    (0.62, 0.61, 0.60),
)
SKIN_TONES = (
    (0.96, 0.80, 0.70),
    (0.89, 0.70, 0.57),
    (0.78, 0.57, 0.43),
    (0.62, 0.42, 0.30),
    (0.43, 0.28, 0.20),
    (0.30, 0.19, 0.14),
)

RATIO_NAMES = (
    "leg",
    "arm",
    "torso",
    "head",
    "shoulder_breadth",
    "hip_breadth",
    "chest_girth",
    "waist_girth",
    "hip_girth",
    "volume",
)
"""Lengths over stature; `volume` is volume over stature cubed. All from the 3D mesh at rest, without clothes."""

PHENOTYPES = ("gender", "age", "muscle", "weight", "height", "proportions")

# Shape changes beyond the phenotypes, so that proportions vary independently of build (ranges are half-widths).
BODY_CHANGES = {
    "measure-shoulder-dist-incr": 0.8,
    "measure-hips-circ-incr": 0.6,
    "measure-waist-circ-incr": 0.6,
    "measure-upperleg-height-incr": 0.7,
    "measure-lowerleg-height-incr": 0.7,
    "measure-upperarm-length-incr": 0.7,
    "measure-lowerarm-length-incr": 0.7,
    "torso-scale-vert-incr": 0.6,
}
HEAD_CHANGES = {
    "head-scale-horiz-incr": 0.7,
    "head-scale-vert-incr": 0.6,
    "head-fat-incr": 0.7,
    "forehead-scale-vert-incr": 0.7,
    "chin-width-incr": 0.9,
    "chin-height-incr": 0.9,
    "chin-jaw-drop-incr": 0.7,
    "nose-scale-vert-incr": 0.8,
    "nose-scale-horiz-incr": 0.9,
    "nose-scale-depth-incr": 0.8,
    "mouth-scale-horiz-incr": 0.9,
    "mouth-trans-up": 0.7,
    "mouth-upperlip-volume-incr": 0.9,
    "eyebrows-trans-up": 0.9,
    "{s}-eye-scale-incr": 0.9,
    "{s}-eye-trans-out": 0.8,
    "{s}-eye-trans-up": 0.6,
    "{s}-cheek-bones-incr": 0.9,
    "{s}-cheek-volume-incr": 0.9,
    "{s}-ear-scale-incr": 0.7,
}
"""`{s}` stands for both sides: the same value is used left ("l") and right ("r")."""


@dataclass(frozen=True)
class SyntheticPerson:
    """What stays the same in every photo of one person."""

    seed: int
    phenotypes: dict[str, float]
    local_changes: dict[str, float]
    skin: tuple[float, float, float]
    hair_style: str
    hair_color: tuple[float, float, float]
    eye_color: tuple[float, float, float]
    brow: float = field(default=1.0, metadata={"help": "thickness of the eyebrows, relative"})

    @property
    def name(self) -> str:
        """The person's folder, p000007."""
        return f"p{self.seed:06d}"


@dataclass(frozen=True)
class PhotoPlan:
    """What one photo shows of a person. Angles in degrees, lengths relative to the stature."""

    index: int
    framing: str
    pose: str
    scene: str
    top_color: str
    bottom_color: str
    sleeves: str
    bottom: str
    yaw: float
    pitch: float
    roll: float
    fill: float
    shift: tuple[float, float]
    joint_jitter_seed: int
    looseness: float
    light_azimuth: float
    light_elevation: float
    light_strength: float
    scene_seed: int
    name_build: bool
    shoe: tuple[float, float, float]


def _mix(
    rng: np.random.Generator, palette: Sequence[tuple[float, float, float]], spread: float
) -> tuple[float, float, float]:
    """A colour between two neighbours of an ordered palette, with a small shift of its brightness."""
    position = rng.uniform(0, len(palette) - 1)
    low = int(min(position, len(palette) - 2))
    color = np.array(palette[low]) + (position - low) * (np.array(palette[low + 1]) - np.array(palette[low]))
    return _rgb(np.clip(color * rng.uniform(1 - spread, 1 + spread), 0.03, 0.97).round(4))


def _rgb(color: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(c) for c in color)
    return red, green, blue


def sample_person(seed: int) -> SyntheticPerson:
    """The adult person with this seed."""
    rng = np.random.default_rng(derive_seed(seed, "identity"))
    female = rng.random() < 0.5
    phenotypes = {  # in Anny gender 0 is male and 1 female
        "gender": rng.uniform(0.85, 1.0) if female else rng.uniform(0.0, 0.15),
        "age": rng.uniform(ADULT_AGE, 0.92),
        "muscle": rng.uniform(0.1, 0.9),
        "weight": rng.uniform(0.05, 1.0),
        "height": rng.uniform(0.1, 0.9),
        "proportions": rng.uniform(0.1, 1.0),
    }
    changes = {}
    for name, half_width in {**BODY_CHANGES, **HEAD_CHANGES}.items():
        value = float(rng.uniform(-half_width, half_width))
        for label in [name.format(s=side) for side in "lr"] if "{s}" in name else [name]:
            changes[label] = round(value, 4)
    weights = (0.02, 0.10, 0.22, 0.26, 0.40) if female else (0.16, 0.46, 0.28, 0.04, 0.06)
    style = HAIR_STYLES[int(rng.choice(len(HAIR_STYLES), p=weights))]
    hair = HAIR_COLORS[int(rng.choice(len(HAIR_COLORS), p=(0.28, 0.25, 0.15, 0.14, 0.10, 0.08)))]
    hair = _rgb(np.clip(np.array(hair) * rng.uniform(0.8, 1.2), 0.03, 0.95).round(4))
    eyes = ((0.25, 0.15, 0.08), (0.30, 0.42, 0.55), (0.28, 0.38, 0.20))
    return SyntheticPerson(
        seed=seed,
        phenotypes={name: round(float(value), 4) for name, value in phenotypes.items()},
        local_changes=changes,
        skin=_mix(rng, SKIN_TONES, 0.05),
        hair_style=style,
        hair_color=hair,
        eye_color=eyes[int(rng.integers(len(eyes)))],
        brow=round(float(rng.uniform(0.6, 1.6)), 3),
    )


def sample_plan(person: SyntheticPerson, index: int, **fixed: Any) -> PhotoPlan:
    """The photo number `index` of a person; `fixed` sets any field of the plan (say pose="standing")."""
    rng = np.random.default_rng(derive_seed(person.seed, "photo", index))
    framing = FRAMINGS[int(rng.choice(3, p=(0.56, 0.26, 0.18)))]
    framing = fixed.get("framing", framing)
    pose = POSES[int(rng.choice(len(POSES), p=(0.22, 0.16, 0.14, 0.15, 0.13, 0.12, 0.08)))]
    if framing == "portrait":
        pose = "standing"
    elif framing == "three-quarter" and pose in ("squatting", "walking"):
        pose = "standing"  # cut at the thighs, these two cannot be told apart
    yaw = float(np.clip(rng.normal(0, 22), -60, 60))
    bottom = BOTTOMS[int(rng.choice(3, p=(0.5, 0.28, 0.22) if person.phenotypes["gender"] > 0.5 else (0.66, 0.34, 0)))]
    top, low = rng.choice(len(COLORS), 2, replace=False)  # never top and bottom alike
    names = list(COLORS)
    plan: dict[str, Any] = {
        "index": index,
        "framing": framing,
        "pose": pose,
        "scene": SCENES[int(rng.integers(len(SCENES)))],
        "top_color": names[int(top)],
        "bottom_color": names[int(low)],
        "sleeves": SLEEVES[int(rng.integers(2))],
        "bottom": bottom,
        "yaw": yaw,
        "pitch": float(rng.uniform(-3, 9)),
        "roll": float(rng.normal(0, 0.8)),
        "fill": float(rng.uniform(0.82, 0.93)),
        "shift": (float(rng.normal(0, 0.02)), float(rng.normal(0, 0.012))),
        "joint_jitter_seed": int(rng.integers(2**31)),
        "looseness": float(rng.uniform(0.3, 1.0)),
        "light_azimuth": float(rng.uniform(-65, 65)),
        "light_elevation": float(rng.uniform(35, 65)),
        "light_strength": float(rng.uniform(0.5, 0.75)),
        "scene_seed": int(rng.integers(2**31)),
        "name_build": bool(rng.random() < 0.5),
        "shoe": tuple(
            float(c) for c in rng.choice(np.array([[0.13, 0.11, 0.10], [0.85, 0.85, 0.85], [0.35, 0.22, 0.13]]))
        ),
    }
    plan.update(fixed)
    if plan["bottom"] == "skirt" and plan["pose"] == "squatting":
        plan["bottom"] = "trousers"
    return PhotoPlan(**plan)


def build_words(person: SyntheticPerson) -> dict[str, str]:
    """The words a caption may use for the build: {"gender_word", "height_word", "weight_word"} ("" if average)."""
    p = person.phenotypes
    height = "tall" if p["height"] > 0.66 else "short" if p["height"] < 0.34 else ""
    weight = "heavy" if p["weight"] > 0.76 else "slim" if p["weight"] < 0.36 else ""
    if not weight and p["muscle"] > 0.72:
        weight = "muscular"
    return {"gender_word": "woman" if p["gender"] > 0.5 else "man", "height_word": height, "weight_word": weight}


def caption(person: SyntheticPerson, plan: PhotoPlan) -> str:
    """The caption of a photo, in the form of

        a full body photo of a tall slim woman waving, in a red long-sleeved top and blue trousers, on a beach

    The build is named only if the plan says so, a portrait's pose and lower garment never.
    """
    words = build_words(person)
    who = [words["gender_word"]]
    if plan.name_build:
        who = [word for word in (words["height_word"], words["weight_word"]) if word] + who
    pose = "" if plan.framing == "portrait" else f" {POSE_PHRASES[plan.pose]}"
    low = "" if plan.framing == "portrait" else f" and {bottom_phrase(plan.bottom_color, plan.bottom)}"
    return (
        f"a {plan.framing}{' photo' if plan.framing != 'portrait' else ''} of a {' '.join(who)}{pose}, in "
        f"{article(plan.top_color)} {plan.top_color} {plan.sleeves}-sleeved top{low}, {SCENE_PHRASES[plan.scene]}"
    )


def article(word: str) -> str:
    """The indefinite article of a word: "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def bottom_phrase(color: str, bottom: str) -> str:
    """A garment of BOTTOMS in a caption: "a red skirt", "red trousers"."""
    if bottom == "skirt":
        return f"{article(color)} {color} skirt"
    return f"{color} {bottom}"


def attributes(person: SyntheticPerson, plan: PhotoPlan) -> dict[str, object]:
    """The ground truth of what the caption can say, as plain data."""
    keys = ("framing", "pose", "scene", "top_color", "bottom_color", "sleeves", "bottom")
    return {**{key: getattr(plan, key) for key in keys}, "build": build_words(person)}
