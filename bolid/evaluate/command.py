"""`bolid evaluate`: do generated pictures follow their prompts, look real, and keep a person's face and body?

Pictures are scored against photos of the person that did *not* make the profile (the held-out protocol). Each metric
has its n, its 95 % bootstrap interval, and the name of its evaluator.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from bolid import workers as sharing
from bolid.errors import BolidError
from bolid.evaluate.bounds import real_and_strangers
from bolid.evaluate.pictures import Picture, PictureFolder, generated_pictures, reference_photos
from bolid.evaluate.results import DESCRIPTIONS, Comparison, Difference, Evaluation, Scored
from bolid.models.families import get_family
from bolid.run import Progress, derive_seed, pick_device
from bolid.workers import EngineName

if TYPE_CHECKING:
    from bolid.evaluate.evaluators import BodyReader, Evaluators
    from bolid.evaluate.picture_scores import Conditioning

PathLike = str | os.PathLike[str]


class ScoringOptions(TypedDict, total=False):
    """How `evaluate`, `compare` and `bench` score. Their defaults are those of `Scoring`.

    conditioning: the photos that made the profiles, where `reference` does not hold them.
    features: of FID, KID and IS: "inception", "tower" (the family's) or "auto".
    html: the report to write.
    family: the evaluators' family; None: the chosen one.
    device: "auto", "cpu", "cuda", ...
    seed: of the bootstrap.
    workers, engine: processes that share the pictures, as in `extract`: of this machine, or actors of Ray ("ray").
        The ranks that torchrun or a SLURM step starts share them too.
    progress: called with (done, total, text).
    """

    conditioning: PathLike | None
    features: str
    html: PathLike | None
    family: str | None
    device: str
    seed: int
    workers: int
    engine: EngineName
    progress: Progress | None


class EvaluateOptions(ScoringOptions, total=False):
    """The options of `evaluate` and `compare`.

    profiles: the profiles behind the pictures, where their run records do not name them.
    without_adapter: pictures of the same prompts and seeds without adapter, for `disturbance`.
    """

    profiles: Sequence[PathLike] | None
    without_adapter: PathLike | None


def evaluate(
    generated: PathLike,
    reference: PathLike = "photos",
    *,
    prompts: PathLike | None = None,
    **options: Unpack[EvaluateOptions],
) -> Evaluation | None:
    """Score the pictures in `generated` against photos of the same people in `reference`.

    Both are folders or shard directories. With several people, `reference` holds a folder of each; a picture's person
    is named by its table, its run record or its folder. Photos that made the profile are left out of `reference`.
    `prompts`: a table of file, prompt, person, seed. `options`: see `EvaluateOptions`.

    Returns the metrics; None in a rank other than the first. Pictures that cannot be read are listed, and the others
    are scored. Raises BolidError where no picture can be read, or no reference photo remains.
    """
    scores = Scoring(reference, **options).score(
        lambda: {Path(generated).resolve().name: generated_pictures(generated, prompts)}
    )
    return None if scores is None else scores.methods[0].evaluation


def compare(
    folders: Sequence[PathLike],
    reference: PathLike = "photos",
    *,
    prompts: PathLike | None = None,
    **options: Unpack[EvaluateOptions],
) -> Comparison | None:
    """Score several methods' folders as `evaluate` does, and compare each with the first.

    All are scored against the same photos: those that any method used are left out for all. Differences are paired by
    person, prompt and place among equal prompts, or by person where a metric is one of a person.
    """
    if len(folders) < 2:
        raise BolidError(f"only {len(folders)} folder to compare", "give two or more: bolid evaluate --compare A/ B/")
    scores = Scoring(reference, **options).score(
        lambda: dict(zip(_names(folders), [generated_pictures(folder, prompts) for folder in folders], strict=True))
    )
    return None if scores is None else scores.comparison()


@dataclass(frozen=True)
class Scores:
    """Every method's scores, the differences of the others from the first, and the scores of real photos."""

    methods: list[Scored]
    differences: dict[str, dict[str, Difference]]
    bounds: list[Scored]

    def comparison(self) -> Comparison:
        """The same without the single pictures."""
        methods, bounds = ({one.name: one.evaluation for one in some} for some in (self.methods, self.bounds))
        return Comparison(self.methods[0].name, methods, self.differences, bounds)


@dataclass(frozen=True)
class Scoring:
    """The reference, the options of `evaluate`, and those that `bench` adds."""

    reference: PathLike
    profiles: Sequence[PathLike] | None = None
    conditioning: PathLike | None = None
    without_adapter: PathLike | None = None
    features: str = "auto"
    html: PathLike | None = None
    family: str | None = None
    device: str = "auto"
    seed: int = 0
    workers: int = 1
    engine: EngineName = "local"
    progress: Progress | None = None
    recognisers: Sequence[PathLike] = ()
    body_reader: tuple[str, BodyReader] | None = None
    bounded: bool = False  # half of the held-out photos are scored themselves

    def score(self, read_methods: Callable[[], Mapping[str, PictureFolder]]) -> Scores | None:
        """Score the pictures of each method; None in a rank other than the first, which does not read them."""
        with sharing.start(self.engine, self.workers) as run:
            return None if run is None else self._score(read_methods(), run)

    def _score(self, methods: Mapping[str, PictureFolder], run: sharing.Run) -> Scores:
        from bolid.evaluate.body_shape import known_bodies
        from bolid.evaluate.evaluators import FEATURES, Evaluators
        from bolid.evaluate.extraction import Extractor
        from bolid.evaluate.references import read_references
        from bolid.evaluate.scores import score

        if self.features not in FEATURES:
            raise BolidError(f"--features is {self.features!r}", f"choose one of {', '.join(FEATURES)}")
        _refuse_equal(methods.values(), self.reference, "the generated pictures and the reference photos")
        if self.html is not None and Path(self.html).is_dir():  # now, and not when everything has been measured
            raise BolidError(f"--html {self.html} is a folder", "give the name of a file, like report.html")
        family, device = get_family(self.family), pick_device(self.device)
        progress = self.progress or (lambda done, total, text: None)
        profiles = self.profiles or ()
        held_out, used, checked = _hold_out(reference_photos(self.reference), list(methods.values()), profiles)
        limits = real_and_strangers(held_out) if self.bounded else {}
        given = reference_photos(self.conditioning) if self.conditioning is not None else None
        base = None if self.without_adapter is None else generated_pictures(self.without_adapter)
        packs = [Path(path) for path in self.recognisers]
        evaluators = Evaluators(family, device, self.features, packs, self.body_reader)
        extractor = Extractor(evaluators, run)
        references = read_references(held_out, extractor, progress)
        references.bodies = known_bodies(held_out.pictures, profiles, references.people)
        conditioning = _conditioning(used, held_out, given, evaluators)
        scored, bounds = (
            [score(name, folder, references, conditioning, other, extractor, progress) for name, folder in some.items()]
            for some, other in ((methods, base), (limits, None))
        )
        for one in scored:  # only now is every rejection known
            rejected: dict[str, list[str]] = {}
            for source in filter(None, (one.folder, held_out, given, base)):
                for reason, names in source.rejected.items():
                    rejected.setdefault(reason, []).extend(names)
            protocol = {"excluded": len(used), "checked": checked}
            notes = [*one.evaluation.notes, *held_out.unread_notes()]
            one.evaluation = replace(one.evaluation, held_out=protocol, rejected=rejected, notes=notes)
        differences = _corrected({one.name: _differences(scored[0], one, self.seed) for one in scored[1:]})
        if self.html is not None:
            from bolid.evaluate.report import write_report

            write_report(self.html, scored, differences, held_out, family.name, bounds)
        return Scores(scored, differences, bounds)


def _refuse_equal(folders: Iterable[PictureFolder], other: PathLike, what: str) -> None:
    for folder in (one.place for one in folders):
        if folder.exists() and Path(other).exists() and folder.samefile(other):
            raise BolidError(f"{what} are the same folder: {folder}", "give two folders")


def _names(folders: Sequence[PathLike]) -> list[str]:
    """The folders' own names, or their paths where these are equal."""
    short = [Path(folder).resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [os.fspath(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise BolidError(f"a folder is given twice: {', '.join(names)}", "give different folders")
    return names


# ---- the held-out protocol ----------------------------------------------------------------------------------------


def _hold_out(
    reference: PictureFolder, generated: Sequence[PictureFolder], profiles: Sequence[PathLike]
) -> tuple[PictureFolder, list[Picture], bool]:
    """(reference without the photos that made the profiles, those photos, whether any record or profile names them)."""
    from bolid.formats.profile import load_profile

    hashes = {sha for folder in generated for picture in folder.pictures for sha in picture.photos_used}
    for profile in profiles:
        inputs = load_profile(profile).record.get("inputs", {})
        hashes |= {sha for name, sha in inputs.items() if name.startswith("photo_")}
    nobody = all(picture.of_nobody for folder in generated for picture in folder.pictures)
    short = {sha[:16] for sha in hashes}
    used = [photo for photo in reference.pictures if photo.sha256[:16] in short]
    remaining = [photo for photo in reference.pictures if photo.sha256[:16] not in short]
    lost = {photo.person for photo in used} - {photo.person for photo in remaining}
    if lost:
        everyone = "" if remaining else "all of "
        raise BolidError(
            f"{everyone}the {len(used)} reference photos of {', '.join(sorted(lost)[:3])} made the profile: a picture "
            "must be scored against photos it could not copy",
            "add photos of the same people that were not given to `bolid profile`",
        )
    reference.pictures = remaining
    if not remaining:
        raise BolidError(f"no photos in {reference.place} can be read", "give a folder of photos of the person")
    return reference, used, bool(hashes) or nobody


def _conditioning(
    used: list[Picture], reference: PictureFolder, given: PictureFolder | None, evaluators: Evaluators
) -> dict[str, Conditioning]:
    """Person -> the photos that made the profile: the `used` and the `given` ones."""
    import torch

    from bolid.evaluate.picture_scores import Conditioning

    photos = [(reference, photo) for photo in used] + [(given, photo) for photo in (given.pictures if given else [])]
    people: dict[str, list[tuple[PictureFolder, Picture]]] = {}
    known: set[tuple[str, str]] = set()
    for folder, photo in photos:
        if (photo.person, photo.sha256[:16]) not in known and folder is not None:
            known.add((photo.person, photo.sha256[:16]))
            people.setdefault(photo.person, []).append((folder, photo))
    found = {}
    for person, theirs in people.items():
        images, captions = [], []
        for folder, photo in sorted(theirs, key=lambda pair: pair[1].sha256):
            try:
                images.append(folder.load(photo))
                captions.append(photo.prompt)
            except BolidError as error:
                folder.reject(photo, error.message)
        if images:
            seen = evaluators.extract(images, body=False)
            embeds, faces = (torch.stack([getattr(one, name) for one in seen]) for name in ("embed", "face"))
            found[person] = Conditioning(embeds, faces, captions)
    return found


# ---- several methods ----------------------------------------------------------------------------------------------


def _differences(first: Scored, other: Scored, seed: int) -> dict[str, Difference]:
    """Other minus first, over the pictures (by person, prompt and occurrence) or people that both have."""
    import torch

    from bolid.evaluate.aggregate import REPLICATES, person_numbers
    from bolid.method.metrics import MIN_GROUPS, bootstrap_mean, mean_p_value

    places = [_by_prompt(one) for one in (first, other)]
    keys = [key for key in places[0] if key in places[1]]
    found: dict[str, Difference] = {}
    for metric in DESCRIPTIONS:
        groups = None
        if metric == "body_ratio_correlation":
            if difference := _correlation_difference(first, other):
                found[metric] = difference
            continue
        if metric in first.scores and metric in other.scores:
            rows = [torch.tensor([place[key] for key in keys], dtype=torch.long) for place in places]
            values = other.scores[metric][rows[1]] - first.scores[metric][rows[0]]
            groups, by = person_numbers([key[0] for key in keys]) if keys else None, "picture"
        elif metric in first.per_person and metric in other.per_person:
            theirs = [first.per_person[metric], other.per_person[metric]]
            both = [person for person in theirs[0] if person in theirs[1]]
            values = torch.tensor([theirs[1][p] - theirs[0][p] for p in both], dtype=torch.float64)
            by = "person"
        else:
            continue
        pairs = int((~values.isnan()).sum())
        if pairs:
            interval = bootstrap_mean(values, groups, REPLICATES, derive_seed(seed, "differences", metric) % 2**31)
            value, low, high = (None if math.isnan(x) else x for x in interval)
            p: float | None = mean_p_value(values, groups)
            if pairs < MIN_GROUPS:  # few differences of one sign would always exclude 0
                low = high = p = None
            found[metric] = Difference(value, low, high, pairs, by, None if p is None or math.isnan(p) else p)
    return found


def _correlation_difference(first: Scored, other: Scored) -> Difference | None:
    """None where fewer than five people have bodies in both."""
    import torch

    from bolid.evaluate.aggregate import MIN_CORRELATION_PEOPLE
    from bolid.method.metrics import correlation_interval, correlation_left_out, jackknife_p_value

    both = [person for person in first.bodies if person in other.bodies]
    if len(both) < MIN_CORRELATION_PEOPLE:
        return None
    truth = torch.stack([first.bodies[person][0] for person in both])
    theirs, ours = (torch.stack([one.bodies[person][1] for person in both]) for one in (first, other))
    p = jackknife_p_value(*correlation_left_out(truth, ours, theirs))
    return Difference(*correlation_interval(truth, ours, theirs), len(both), "person", p)


def _corrected(differences: dict[str, dict[str, Difference]]) -> dict[str, dict[str, Difference]]:
    """The same with p-values corrected by Holm for all methods and figures together."""
    from bolid.method.metrics import holm

    tested = [(method, name) for method, found in differences.items() for name, d in found.items() if d.p is not None]
    adjusted = holm([differences[method][name].p or 0.0 for method, name in tested])
    for (method, name), p in zip(tested, adjusted, strict=True):
        differences[method][name] = replace(differences[method][name], p=p)
    return differences


def _by_prompt(scored: Scored) -> dict[tuple[str, str, int], int]:
    """(person, prompt, number of equal ones before) -> place."""
    places: dict[tuple[str, str, int], int] = {}
    counts: dict[tuple[str, str], int] = {}
    for place, (picture, person) in enumerate(zip(scored.pictures, scored.people, strict=True)):
        pair = (person, picture.prompt or picture.relative_source)
        places[(*pair, counts.get(pair, 0))] = place
        counts[pair] = counts.get(pair, 0) + 1
    return places
