"""`bolid evaluate`: do generated pictures follow their prompts, look like pictures, and keep a person's face and body?

Pictures are scored against photos of the person that were *not* used to make the profile (the held-out protocol). Each
figure says how many pictures are behind it, its 95 % bootstrap interval, and what measured it.

Shapes: N pictures, M reference photos, P people, E embedding, D features, R body readings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.evaluate.pictures import Picture, Source, generated_pictures, reference_photos
from bolid.evaluate.results import Comparison, Difference, Evaluation, Scored
from bolid.evaluate.scores import DESCRIPTIONS, REPLICATES, numbered, relative_source, score
from bolid.models.families import get_family
from bolid.run import Progress, derive_seed, pick_device

if TYPE_CHECKING:
    import torch

    from bolid.evaluate.observe import Models


def evaluate(
    generated: str | os.PathLike[str],
    reference: str | os.PathLike[str] = "photos",
    *,
    prompts: str | os.PathLike[str] | None = None,
    profiles: Sequence[str | os.PathLike[str]] | None = None,
    conditioning: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    features: str = "auto",
    html: str | os.PathLike[str] | None = None,
    family: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the pictures in `generated` against photos of the same people in `reference`.

    Both are folders or shard directories; with several people, `reference` holds a folder of each, and a picture's
    person is named by its table, its run record or its folder. `prompts`: a table of file, prompt, person, seed.
    `profiles`: what the pictures were made with, if their records don't tell. `conditioning`: the photos that were
    used, if `reference` does not hold them too. `base`: the same prompts and seeds without adapter, for `disturbance`.
    `features`: of FID, KID and IS. `html`: write a report there.

    Reference photos that made the profile are left out; BolidError when none remains. Pictures that cannot be read are
    listed and the rest is scored.
    """
    return _score_all(
        [generated],
        reference,
        prompts,
        profiles or (),
        conditioning,
        base,
        features,
        html,
        family,
        device,
        seed,
        progress,
    )[0][0].evaluation  # type: ignore[return-value]


def compare(
    folders: Sequence[str | os.PathLike[str]],
    reference: str | os.PathLike[str] = "photos",
    *,
    prompts: str | os.PathLike[str] | None = None,
    profiles: Sequence[str | os.PathLike[str]] | None = None,
    conditioning: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    features: str = "auto",
    html: str | os.PathLike[str] | None = None,
    family: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Score several methods' folders as `evaluate` does, against the same photos, and compare each with the first.

    Photos used by any of the methods are held out from all. Differences are taken between pictures of the same person,
    prompt and place among those, or between people where a figure is one of a person.
    """
    if len(folders) < 2:
        raise BolidError(f"only {len(folders)} folder to compare", "give two or more: bolid evaluate --compare A/ B/")
    scored, differences = _score_all(
        folders, reference, prompts, profiles or (), conditioning, base, features, html, family, device, seed, progress
    )
    methods = {one.name: one.evaluation for one in scored if one.evaluation is not None}
    return Comparison(scored[0].name, methods, differences)


def _score_all(
    folders: Sequence[str | os.PathLike[str]],
    reference: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | None,
    profiles: Sequence[str | os.PathLike[str]],
    conditioning: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    features: str,
    html: str | os.PathLike[str] | None,
    family: str | None,
    device: str,
    seed: int,
    progress: Progress | None,
) -> tuple[list[Scored], dict[str, dict[str, Difference]]]:
    from bolid.evaluate.observe import FEATURES, Models, read_references

    if features not in FEATURES:
        raise BolidError(f"--features is {features!r}", f"choose one of {', '.join(FEATURES)}")
    _refuse_equal([*folders], reference, "the generated pictures and the reference photos")
    if html is not None and Path(html).is_dir():  # now, and not when everything has been measured
        raise BolidError(f"--html {html} is a folder", "give the name of a file, like report.html")
    chosen, device = get_family(family), pick_device(device)
    tell = progress or (lambda done, total, text: None)
    sources = [generated_pictures(folder, prompts) for folder in folders]
    held_out, used, checked = _hold_out(reference_photos(reference), sources, profiles)
    given = reference_photos(conditioning) if conditioning is not None else None
    bases = generated_pictures(base) if base is not None else None
    models = Models(chosen, device, features)
    references = read_references(held_out, models, tell)
    known = _conditioning(used, held_out, given, models)
    scored = []
    for name, source in zip(_names(folders), sources, strict=True):
        one = score(name, source, references, known, bases, models, tell)
        scored.append(one)
    for one in scored:  # only now is every rejection known
        rejected: dict[str, list[str]] = {}
        for source in filter(None, (one.source, held_out, given, bases)):
            for reason, names in source.rejected.items():
                rejected.setdefault(reason, []).extend(names)
        protocol = {"excluded": len(used), "checked": checked}
        one.evaluation = replace(one.evaluation, held_out=protocol, rejected=rejected)  # type: ignore[type-var]
    differences = {one.name: _differences(scored[0], one, seed) for one in scored[1:]}
    if html is not None:
        from bolid.evaluate.report import write_report

        write_report(html, scored, differences, held_out, DESCRIPTIONS, chosen.name)
    return scored, differences


def _refuse_equal(folders: Sequence[str | os.PathLike[str]], other: str | os.PathLike[str], what: str) -> None:
    for folder in map(Path, folders):
        if folder.exists() and Path(other).exists() and folder.samefile(other):
            raise BolidError(f"{what} are the same folder: {folder}", "give two folders")


def _names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The folders' own names, or their paths where these are equal."""
    short = [Path(folder).resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [os.fspath(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise BolidError(f"a folder is given twice: {', '.join(names)}", "give different folders")
    return names


# ---- the held-out protocol ----------------------------------------------------------------------------------------


def _hold_out(
    reference: Source, sources: Sequence[Source], profiles: Sequence[str | os.PathLike[str]]
) -> tuple[Source, list[Picture], bool]:
    """(reference without the photos that made the profiles, those photos, whether anything told which they are)."""
    from bolid.formats.profile import load_profile

    hashes = {sha for source in sources for picture in source.pictures for sha in picture.photos_used}
    for profile in profiles:
        inputs = load_profile(profile).record.get("inputs", {})
        hashes |= {sha for name, sha in inputs.items() if name.startswith("photo_")}
    nobody = all(picture.of_nobody for source in sources for picture in source.pictures)
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
    used: list[Picture], reference: Source, given: Source | None, models: Models
) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Person -> (embeddings [k, E], captions) of the photos they were known from."""
    photos = [(reference, photo) for photo in used] + [(given, photo) for photo in (given.pictures if given else [])]
    people: dict[str, list[tuple[Source, Picture]]] = {}
    seen: set[tuple[str, str]] = set()
    for source, photo in photos:
        if (photo.person, photo.sha256[:16]) not in seen and source is not None:
            seen.add((photo.person, photo.sha256[:16]))
            people.setdefault(photo.person, []).append((source, photo))
    found = {}
    for person, theirs in people.items():
        images, captions = [], []
        for source, photo in sorted(theirs, key=lambda pair: pair[1].sha256):
            try:
                images.append(source.load(photo))
                captions.append(photo.prompt)
            except BolidError as error:
                source.reject(photo, error.message)
        if images:
            found[person] = (models.image_text.encode_images(images).float().cpu(), captions)
    return found


# ---- several methods ----------------------------------------------------------------------------------------------


def _differences(first: Scored, other: Scored, seed: int) -> dict[str, Difference]:
    """Other minus first, over what both have: pictures by person, prompt and occurrence; people by name."""
    import torch

    from bolid.method.metrics import MIN_GROUPS, bootstrap_mean

    places = [_by_prompt(one) for one in (first, other)]
    keys = [key for key in places[0] if key in places[1]]
    found: dict[str, Difference] = {}
    for metric in DESCRIPTIONS:
        groups = None
        if metric in first.scores and metric in other.scores:
            rows = [torch.tensor([place[key] for key in keys], dtype=torch.long) for place in places]
            values = other.scores[metric][rows[1]] - first.scores[metric][rows[0]]
            groups, by = numbered([key[0] for key in keys]) if keys else None, "picture"
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
            if pairs < MIN_GROUPS:  # three differences of one sign would always leave out 0
                low = high = None
            found[metric] = Difference(value, low, high, pairs, by)
    return found


def _by_prompt(scored: Scored) -> dict[tuple[str, str, int], int]:
    """(person, prompt, how many such came before) -> place."""
    places: dict[tuple[str, str, int], int] = {}
    counts: dict[tuple[str, str], int] = {}
    for place, (picture, person) in enumerate(zip(scored.pictures, scored.people, strict=True)):
        pair = (person, picture.prompt or relative_source(picture))
        places[(*pair, counts.get(pair, 0))] = place
        counts[pair] = counts.get(pair, 0) + 1
    return places
