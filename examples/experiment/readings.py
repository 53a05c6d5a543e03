"""What the instruments read off pictures, and the figures that are made of it.

Shapes: P people, N pictures of each, R body ratios.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from build_words import population
from instruments import OUTSIDER, OWN, REFERENCES, Readers
from methods import BASE, EIGHT, ONE, REAL, WORDS
from pictures import People, Wanted, load

from bolid.backends.image_text import ImageTextModel
from bolid.method.distributions import frechet_interval, kernel_distance
from bolid.method.feature_statistics import FeatureStatistics
from bolid.method.metrics import (
    Interval,
    correlation_interval,
    correlation_left_out,
    jackknife_interval,
    jackknife_p_value,
    perceptual_distance,
    r2_scores,
)
from bolid.synth.body import body_ratios
from bolid.synth.people import RATIO_NAMES, sample_person

sys.path.append(str(Path(__file__).parents[1] / "tiny_family"))
from measure import shown_as_asked
from measure_base import edge_energy

COLOURS = ("top_color", "bottom_color")
LIGHT = np.array([0.2126, 0.7152, 0.0722])  # luminance of linear RGB (Rec. 709)


@dataclass
class Row:
    """One row's readings. nan where a picture has none."""

    bodies: dict[str, np.ndarray]  # reader -> [P, N, ...] of full bodies
    found_bodies: np.ndarray  # [P, N] 0 or 1
    found_portraits: np.ndarray  # [P, N]
    likeness: dict[str, np.ndarray]  # recogniser -> [P, N]: of portraits with the person's real ones
    strangers: dict[str, np.ndarray]  # recogniser -> [P, N]: with the other people's
    asked: dict[str, np.ndarray]  # attribute -> [P, N], 0 or 1, of all pictures
    features: dict[str, torch.Tensor]  # figure -> [P * N, D] of full bodies
    edges: np.ndarray  # [P] of full bodies
    diversity: np.ndarray  # [P]
    text: np.ndarray  # [P, N] cosine with the prompt that all methods were given


class Difference(NamedTuple):
    """A paired difference, its interval, and its p-value, not corrected for there being several."""

    interval: Interval
    p: float


Statistic = Callable[[np.ndarray], float]
"""Of some people, by their rows."""


class Readings:
    """All rows' readings, and `figures`. People whom a row left out are left out of all."""

    def __init__(self, readers: Readers, people: People, folders: Mapping[str, Path]) -> None:
        self.readers = readers
        names = {seed: sample_person(seed).name for seed in people}
        self.people = {
            seed: both for seed, both in people.items()
            if all((folder / names[seed] / f"{both[1][0].name}.png").is_file() for folder in folders.values())
        }  # fmt: skip
        seeds = list(self.people)
        ratios = [body_ratios(sample_person(seed)) for seed in seeds]
        self.truth = np.array([[one[name] for name in RATIO_NAMES] for one in ratios])  # [P, R]
        self.reference_faces = [
            [readers.face(image) for image in load(photos.portraits[:REFERENCES])] for photos, _ in self.people.values()
        ]
        self.rows = {name: self._read(name, folder, names) for name, folder in folders.items()}
        self.rows[REAL] = self._read_real()
        skin = np.array([sample_person(seed).skin for seed in seeds])
        self.by_skin = np.argsort(np.power(skin, 2.2) @ LIGHT)  # darkest first

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """A photo at the family's size, where that is smaller."""
        if image.shape[0] <= self.readers.size[0]:
            return image
        return cv2.resize(image, self.readers.size[::-1], interpolation=cv2.INTER_AREA)

    def _read(self, name: str, folder: Path, names: Mapping[int, str]) -> Row:
        bodies, portraits, again, asked = [], [], [], []
        for seed, (_, requests) in self.people.items():
            files = [folder / names[seed] / f"{one.name}.png" for one in requests]
            pictures = {file.stem: picture for file, picture in zip(files, load(files), strict=True)}
            again.append(pictures.pop("full-0-again"))
            bodies.append([picture for one, picture in pictures.items() if one.startswith("full")])
            portraits.append([picture for one, picture in pictures.items() if one.startswith("portrait")])
            asked.append([one for one in requests if one.name in pictures])
        return self._row(bodies, portraits, again, asked)

    def _read_real(self) -> Row:
        bodies = [[self._resized(i) for i in load(photos.held_out)] for photos, _ in self.people.values()]
        portraits = [load(photos.portraits[REFERENCES:]) for photos, _ in self.people.values()]
        return self._row(bodies, portraits, None, None)

    def _row(
        self, bodies: list[list[np.ndarray]], portraits: list[list[np.ndarray]], again: list[np.ndarray] | None,
        asked: list[list[Wanted]] | None,
    ) -> Row:  # fmt: skip
        """Of each person: full bodies, portraits, the first body with other noise, and what they were asked to show."""
        readers, each = self.readers, len(bodies[0])
        flat = [picture for theirs in bodies for picture in theirs]
        features = {"FID": readers.tower.encode_images(flat).float()}
        if readers.dino is not None:
            features["FD on DINOv2"] = readers.dino.encode(flat)
        faces = [[readers.face(picture) for picture in theirs] for theirs in portraits]
        likeness, strangers = {}, {}
        for by in (OUTSIDER, OWN) if readers.outsider is not None else (OWN,):
            with_each = np.array(
                [
                    [[likeness_of(face, references, by) for references in self.reference_faces] for face in theirs]
                    for theirs in faces
                ]
            )  # [P, N, P]
            own = np.eye(len(faces), dtype=bool)[:, None]
            likeness[by] = with_each.sum(2, where=own)
            strangers[by] = np.nanmean(with_each, 2, where=~own)
        diversity = np.full(len(bodies), np.nan)
        if again is not None:
            views = [
                readers.tower.patch_features([p])
                for pair in zip(again, bodies, strict=True)
                for p in (pair[0], pair[1][0])
            ]
            diversity = np.array([
                float(perceptual_distance([a], [b])) for a, b in zip(views[::2], views[1::2], strict=True)
            ])  # fmt: skip
        scores: dict[str, np.ndarray] = {}
        text = np.full((len(bodies), 1), np.nan)
        if asked is not None:
            pictures = [p for body, portrait in zip(bodies, portraits, strict=True) for p in (*body, *portrait)]
            requests = [one for theirs in asked for one in theirs]
            scores = as_asked(readers.tower, pictures, [one.attributes for one in requests], len(bodies))
            embeds = readers.tower.encode_text([one.prompt for one in requests]).float()
            text = (readers.tower.encode_images(pictures).float() * embeds).sum(1).view(len(bodies), -1).numpy()
        return Row(
            {name: one.read(flat).reshape(len(bodies), each, -1) for name, one in readers.bodies.items()},
            np.array([[bool(readers.faces.detect(p)) for p in theirs] for theirs in bodies], float),
            np.array([[bool(face) for face in theirs] for theirs in faces], float),
            likeness, strangers, scores, features,
            np.array([edge_energy(np.stack(theirs)) for theirs in bodies]), diversity, text,
        )  # fmt: skip

    # ---- figures --------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, dict[str, Interval]]:
        """Row -> figure -> value and interval."""
        found = {}
        for name in self.rows:
            bodies = [self._body(name, by).items() for by in self.readers.bodies]
            found[name] = dict(itertools.chain(*bodies)) | self._faces(name) | self._looks(name)
        return found

    def without_each(self, statistic: Statistic) -> tuple[float, torch.Tensor]:
        """A statistic of rows of people, and its values without each person, f64 [P], for a jackknife."""
        rows = np.arange(len(self.people))
        left_out = torch.tensor([statistic(rows[rows != person]) for person in rows], dtype=torch.float64)
        return statistic(rows), left_out

    def over_people(self, statistic: Statistic) -> Interval:
        """A statistic of rows of people, and its jackknife interval."""
        value, left_out = self.without_each(statistic)
        return jackknife_interval(value, left_out) if left_out.isfinite().all() else Interval(value, np.nan, np.nan)

    def mean(self, values: np.ndarray) -> Interval:
        """Of [P, N] or [P], people weighing equally."""
        theirs = of_people(values)
        return self.over_people(
            lambda rows: float(np.nanmean(theirs[rows])) if not np.isnan(theirs[rows]).all() else np.nan
        )

    def differences(self, name: str, other: str) -> dict[str, Difference]:
        """Figure -> how much more `name` has than `other`, over pairs of equal person, prompt and noise."""
        mine, theirs = self.rows[name], self.rows[other]
        found = {}
        for by in self.readers.bodies:
            a, b = self._ratios(name, by)[0], self._ratios(other, by)[0]
            if len(self.people) >= 5:
                truth, one, two = (torch.from_numpy(x.astype(float)) for x in (self.truth, a, b))
                found[f"body by {by}, mean r"] = difference(*correlation_left_out(truth, one, two), bound=2.0)
            of_r2 = self.without_each(lambda rows, a=a, b=b: self._r2(a, rows) - self._r2(b, rows))
            found[f"body by {by}, mean R2, mean of a person's pictures"] = difference(*of_r2)
        for by, values in mine.likeness.items():
            gap = of_people(values) - of_people(theirs.likeness[by])
            found[f"likeness by {by}"] = difference(*self.without_each(lambda rows, g=gap: float(g[rows].mean())))
        for label, one, two in (
            ("face found, portraits", mine.found_portraits, theirs.found_portraits),
            ("face found, full bodies", mine.found_bodies, theirs.found_bodies),
            ("text score", mine.text, theirs.text),
        ):
            gap = of_people(one) - of_people(two)
            found[label] = difference(*self.without_each(lambda rows, g=gap: float(g[rows].mean())))
        return found

    def _r2(self, ratios: np.ndarray, rows: np.ndarray, part: int | None = None) -> float:
        """Mean over the ratios, or of one, of readings [P, R]."""
        scores = r2_scores(torch.from_numpy(self.truth[rows]), torch.from_numpy(ratios[rows].astype(float)))
        return float(scores.mean() if part is None else scores[part])

    def _ratios(self, name: str, by: str) -> tuple[np.ndarray, np.ndarray]:
        """[P, R] of the mean of a person's pictures, [N, P, R] of single ones; in the order of RATIO_NAMES."""
        read, reader = self.rows[name].bodies[by], self.readers.bodies[by]
        order = [reader.ratio_names.index(ratio) for ratio in RATIO_NAMES]
        single = np.stack([reader.ratios(read[:, i : i + 1])[:, order] for i in range(read.shape[1])])
        return reader.ratios(read)[:, order], single

    def _body(self, name: str, by: str) -> dict[str, Interval]:
        mean, single = self._ratios(name, by)
        found = {
            f"body by {by}, mean R2, mean of a person's pictures": self.over_people(lambda rows: self._r2(mean, rows)),
            f"body by {by}, mean R2, one picture": self.over_people(
                lambda rows: float(np.mean([self._r2(one, rows) for one in single]))
            ),
        }
        off = np.abs(mean - self.truth) / population()[1]
        found[f"body by {by}, mean error in standard deviations"] = self.mean(off)
        for part, label in enumerate(RATIO_NAMES):
            found[f"{label.replace('_', ' ')} by {by}, R2"] = self.over_people(
                lambda rows, p=part: self._r2(mean, rows, p)
            )
        if name == ONE and EIGHT in self.rows:
            eight = self._ratios(EIGHT, by)[0]
            found[f"R2 by {by} over that of {EIGHT}"] = self.over_people(
                lambda rows: self._r2(mean, rows) / self._r2(eight, rows)
            )
        if len(self.people) < 5:
            return found
        truth, read = torch.from_numpy(self.truth), torch.from_numpy(mean.astype(float))
        found[f"body by {by}, mean r"] = correlation_interval(truth, read)
        for other in (BASE, WORDS):
            if other in self.rows and name not in (BASE, WORDS, REAL):
                theirs = torch.from_numpy(self._ratios(other, by)[0].astype(float))
                found[f"r by {by} minus {other}'s"] = correlation_interval(truth, read, minus=theirs)
        return found

    def _faces(self, name: str) -> dict[str, Interval]:
        row, real = self.rows[name], self.rows[REAL]
        found = {
            "face found, portraits": self.mean(row.found_portraits),
            "face found, full bodies": self.mean(row.found_bodies),
        }
        by_person = {"face found": np.concatenate([row.found_portraits, row.found_bodies], 1).mean(1)}
        for by, values in row.likeness.items():
            found[f"likeness by {by}"] = self.mean(values)
            found[f"likeness by {by} to strangers"] = self.mean(row.strangers[by])
            by_person[f"likeness by {by}"] = own = values.mean(1)
            if name == REAL:
                continue
            more = own - row.strangers[by].mean(1)
            photos = real.likeness[by].mean(1)
            for label, one, other in (
                (f"likeness by {by}, over real photos'", own, photos),
                (f"likeness by {by} beyond strangers, over real photos'", more, photos - real.strangers[by].mean(1)),
            ):
                found[label] = self.over_people(
                    lambda rows, a=one, b=other: float(np.nanmean(a[rows]) / np.nanmean(b[rows]))
                )
        third = len(self.by_skin) // 3
        darkest, lightest = self.by_skin[:third], self.by_skin[-third:]
        for label, values in by_person.items():

            def of(group: np.ndarray, rows: np.ndarray, values: np.ndarray = values) -> float:
                chosen = values[np.intersect1d(group, rows)]
                return float(np.nanmean(chosen)) if (~np.isnan(chosen)).any() else np.nan

            found[f"{label}, darkest third"] = self.over_people(lambda rows, of=of: of(darkest, rows))
            found[f"{label}, lightest third"] = self.over_people(lambda rows, of=of: of(lightest, rows))
            found[f"{label}, darkest over lightest"] = self.over_people(
                lambda rows, of=of: of(darkest, rows) / of(lightest, rows)
            )
        return found

    def _looks(self, name: str) -> dict[str, Interval]:
        row, real = self.rows[name], self.rows[REAL]
        found = {} if name == REAL else {"text score": self.mean(row.text)}
        for label, values in row.asked.items():
            found[f"{label} as asked"] = self.mean(values)
            if BASE in self.rows and name != BASE:
                found[f"{label} as asked, minus the base's"] = self.mean(values - self.rows[BASE].asked[label])
        found["edges over the renders'"] = self.over_people(
            lambda rows: float(row.edges[rows].mean() / real.edges[rows].mean())
        )
        if name == REAL:
            return found
        found["diversity"] = self.mean(row.diversity)
        if BASE in self.rows and name != BASE:
            base = self.rows[BASE].diversity
            found["diversity over the base's"] = self.over_people(
                lambda rows: float(row.diversity[rows].mean() / base[rows].mean())
            )
        for label, features in row.features.items():
            mine, theirs = self._statistics(features), self._statistics(real.features[label])
            found[label] = frechet_interval(mine, theirs)
            if label == "FID":
                found["KID, 1e-3"] = Interval(*(1000 * x for x in kernel_distance(mine, theirs)))
        return found

    def _statistics(self, features: torch.Tensor) -> FeatureStatistics:
        found = FeatureStatistics(features.shape[1])
        found.update(features)
        return found


def of_people(values: np.ndarray) -> np.ndarray:
    """[P]: the mean of each person's values [P, N] or [P], without nan."""
    each = values.reshape(len(values), -1)
    return np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in each])


def difference(value: float, left_out: torch.Tensor, bound: float = np.inf) -> Difference:
    """Of a statistic's value and its values without each person (`Readings.without_each`)."""
    return Difference(jackknife_interval(value, left_out, bound=bound), jackknife_p_value(value, left_out))


def likeness_of(face: Mapping[str, np.ndarray], references: Sequence[Mapping[str, np.ndarray]], by: str) -> float:
    """Mean cosine of a face with each reference face, by one recogniser; 0 without a face, nan without a reference."""
    known = [one[by] for one in references if one]
    if not known:
        return float("nan")
    return float(np.mean([face[by] @ one for one in known])) if face else 0.0


def as_asked(
    tower: ImageTextModel, pictures: list[np.ndarray], attributes: list[dict[str, Any]], people: int
) -> dict[str, np.ndarray]:
    """Attribute -> [P, N]: whether each picture shows it as its prompt asked; nan where it asked for none.

    `pictures` and `attributes` are person by person. "colours" is the mean of top and bottom.
    """
    found = {name: right.reshape(people, -1) for name, right in shown_as_asked(tower, pictures, attributes).items()}
    colours = np.concatenate([found.pop(name) for name in COLOURS], 1)
    return {"pose": found.pop("pose"), "colours": colours, **found}
