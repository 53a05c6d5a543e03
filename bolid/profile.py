"""`bolid profile`: photos of one person in, me.safetensors out. The photos are not needed any more after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bolid.errors import BolidError
from bolid.families import get_family, match_family
from bolid.person import PhotoReport, read_person
from bolid.run import pick_device, run_record

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ProfileResult:
    path: Path
    photos: int  # accepted
    has_face: bool
    uncertainty: float  # mean standard deviation of the body vector; 1 is "nothing known"
    reports: tuple[PhotoReport, ...]


def make_profile(
    photos: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "me.safetensors",
    *,
    body_encoder: str | os.PathLike[str] | None = None,
    family: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> ProfileResult:
    """Make a profile of one person. `photos`: files, or folders of them; one photo is enough, more are better.

    `body_encoder`: by default the family's. Raises BolidError when no photo can be used.
    """
    from bolid.backends.body import BodyEncoder
    from bolid.formats.profile import KIND, save_profile
    from bolid.formats.tensors import read_record

    device = pick_device(device)
    if body_encoder is None:
        chosen = get_family(family)
    else:
        chosen = match_family(family, read_record(body_encoder)["family"], body_encoder)
    encoder = BodyEncoder(body_encoder or chosen.require("body_encoder"), device)
    person = read_person(_files(photos), encoder, chosen, device=device, progress=progress)
    inputs = {"body_encoder": encoder.sha256} | {f"photo_{i:03d}": sha for i, sha in enumerate(person.sha256)}
    record = run_record(KIND, family=chosen, inputs=inputs)
    save_profile(out, person.body_mean, person.body_logvar, person.face, person.view_weights, record)
    uncertainty = float((0.5 * person.body_logvar).exp().mean())
    return ProfileResult(Path(out), len(person.sha256), person.face is not None, uncertainty, person.reports)


def _files(photos: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Folders replaced by the photos in them."""
    from bolid.formats.images import list_photos

    files: list[Path] = []
    for photo in map(Path, photos):
        if photo.is_dir():
            found = list_photos(photo)
            people = sorted({person for person, _ in found})
            if len(people) > 1:
                raise BolidError(
                    f"{photo} holds photos of {len(people)} people: {', '.join(people[:3])}...",
                    f"a profile is of one person: give one of its folders, like {photo / people[0]}",
                )
            files += [path for _, path in found]
        else:
            files.append(photo)
    return files
