"""`bolid profile`: photos of one person in, me.safetensors out. The photos are not needed any more after it.

And what can be done to a profile: `mix` two people, `edit` a body along its sliders, `show` where it is on them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.models.families import get_family, match_family
from bolid.person import PersonReader, PhotoReport, all_photographs
from bolid.rendered import OUTLINE_ONLY
from bolid.run import Progress, atomic_path, pick_device, run_record, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.body.profiles import MeasurementRow
    from bolid.body.shape import Known, Shape
    from bolid.formats.profile import Profile, ProfileBody
    from bolid.formats.sliders import Sliders
    from bolid.models.families import Family
    from bolid.person import Person


@dataclass(frozen=True)
class ProfileResult:
    """What `make_profile` wrote, and what it made of each photo."""

    path: Path
    photos: int  # accepted
    has_face: bool
    uncertainty: float  # mean standard deviation of the body vector; 1 is "nothing known"
    reports: tuple[PhotoReport, ...]
    warning: str = ""
    measurements: tuple[MeasurementRow, ...] = ()  # of the body; empty where the encoder knows no shape


def make_profile(
    photos: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "me.safetensors",
    *,
    known: Mapping[str, Known] | None = None,
    sex: str | None = None,
    body_encoder: str | os.PathLike[str] | None = None,
    family: str | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> ProfileResult:
    """Make a profile of one person. `photos`: files, or folders of them; one photo is enough, more are better.

    `known`: measurements, by name, in metres (kilograms), each with its standard deviation. They are combined with what
    the photos show; without photos they are enough. `sex`: "woman" or "man". `body_encoder`: by default the family's.
    `force`: read photographs with `tiny`, too.
    Raises BolidError when no photo can be used, and for measurements that no adult has.
    """
    from bolid.formats.profile import KIND, save_profile
    from bolid.formats.tensors import read_record

    if not photos and not known:
        raise BolidError("no photo and no measurement given", "name photos, or measurements like --height 172")
    device = pick_device(device)
    if body_encoder is None:
        chosen = get_family(family)
    else:
        made = read_record(body_encoder)
        masks = made.get("config", {}).get("view") == "mask"  # which are the same in every family
        chosen = get_family(family) if masks else match_family(family, made["family"], body_encoder)
    outlines = body_encoder is None and not force and all_photographs(_files(photos), chosen)
    reader = PersonReader(chosen, device, body_encoder, force)
    if outlines:
        seen = PersonReader(chosen.with_mask_encoder(), device, force=True)
        person, shape = _with_shape(seen, seen.read(_files(photos), progress), known, sex)
        person = _in_own_space(reader, person, shape)
    elif photos:
        person, shape = _with_shape(reader, reader.read(_files(photos), progress), known, sex)
    else:
        person, shape = _measured_person(reader, known or {}, sex)
    inputs = reader.encoder.inputs | {f"photo_{i:03d}": sha for i, sha in enumerate(person.sha256)}
    if person.face is not None:
        inputs["face_model"] = person.face_model
    config: dict[str, Any] | None = {"known": dict(known or {}), "sex": sex} if known or sex else None
    if outlines:
        inputs["outline_encoder"] = seen.encoder.sha256
    record = run_record(KIND, family=chosen, config=config, inputs=inputs)
    body, rows = _body_and_rows(shape)
    save_profile(out, person.body_mean, person.body_logvar, person.face, person.view_weights, record, body)
    uncertainty = float((0.5 * person.body_logvar).exp().mean())
    return ProfileResult(
        Path(out),
        len(person.sha256),
        person.face is not None,
        uncertainty,
        person.reports,
        OUTLINE_ONLY if outlines else "",
        rows,
    )


def _with_shape(
    reader: PersonReader, person: Person, known: Mapping[str, Known] | None, sex: str | None
) -> tuple[Person, Shape | None]:
    """The shape that photos show and measurements tell; the body vector follows the measurements."""
    if not _knows_shape(reader.family, reader.encoder.space):
        if known or sex:
            raise BolidError(
                f"the body encoder of family {reader.family.name!r} knows no shape: measurements cannot be used",
                "leave them out, or fit a body-shape file: examples/tiny_family/fit_body_shape.py",
            )
        return person, None
    from bolid.body.body_vector import load_body_vectors
    from bolid.body.profiles import body_from_vector

    vectors = load_body_vectors(reader.family.body_shape, reader.encoder.space)
    people = reader.encoder.population
    spread = None if people is None else (people.mean.double().numpy(), people.covariance.double().numpy())
    mean, logvar = person.body_mean.double().numpy(), person.body_logvar.double().numpy()
    views = len(person.view_weights)
    seen, shape = body_from_vector(vectors, mean, logvar, views, people=spread, known=known, sex=sex)
    if not known:
        return person, shape
    return replace(person, body_mean=_tensor(vectors.moved(mean, seen, shape))), shape


def _in_own_space(reader: PersonReader, person: Person, shape: Shape | None) -> Person:
    """Somebody known by outlines, as the family's own body encoder would see them: by their shape, without a face."""
    from bolid.body.body_vector import load_body_vectors

    if shape is None:
        raise BolidError("the body encoder of masks knows no shape", "install bolid again: its file is not whole")
    vectors = load_body_vectors(reader.family.require("body_shape"), reader.encoder.space)
    mean, logvar = map(_tensor, vectors.vector_of(shape))
    return replace(person, body_mean=mean, body_logvar=logvar, face=None)


def _measured_person(reader: PersonReader, known: Mapping[str, Known], sex: str | None) -> tuple[Person, Shape]:
    """Somebody of whom there is no photo."""
    import torch

    from bolid.body.body_vector import load_body_vectors
    from bolid.body.profiles import body_from_measurements
    from bolid.person import Person

    vectors = load_body_vectors(reader.family.require("body_shape"), reader.encoder.space)
    shape = body_from_measurements(known, sex)
    mean, logvar = map(_tensor, vectors.vector_of(shape))
    return Person(mean, logvar, None, torch.zeros(0), (), "", ()), shape


def _knows_shape(family: Family, body_encoder: str) -> bool:
    """Whether the family has a body-shape file, and for this body encoder."""
    from bolid.formats.tensors import read_record

    return family.has("body_shape") and read_record(family.body_shape)["inputs"].get("body_encoder") == body_encoder


def _body_and_rows(shape: Shape | None) -> tuple[ProfileBody | None, tuple[MeasurementRow, ...]]:
    if shape is None:
        return None, ()
    from bolid.body.profiles import stored, table

    body = stored(shape)
    return body, table(shape, body)


def _tensor(values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(values).float()


# ---- profiles of profiles -----------------------------------------------------------------------------------------

LIMIT = 3.0  # standard deviations; further out no body was seen


@dataclass(frozen=True)
class Reading:
    """Where a body is on a slider, in standard deviations of the population."""

    slider: str
    value: float
    r2: float  # how well the slider's ratio can be read off a body vector, 0..1, on people never seen


@dataclass(frozen=True)
class MixResult:
    """What `mix_profiles` wrote."""

    path: Path
    has_face: bool


@dataclass(frozen=True)
class EditResult:
    """What `edit_profile` wrote, and the body's readings before and after."""

    path: Path
    before: tuple[Reading, ...]
    after: tuple[Reading, ...]


@dataclass(frozen=True)
class ReshapeResult:
    """What `reshape_profile` wrote, and the measurements before and after."""

    path: Path
    before: tuple[MeasurementRow, ...]
    after: tuple[MeasurementRow, ...]


def mix_profiles(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str] = "mixed.safetensors",
    *,
    weight: float = 0.5,
) -> MixResult:
    """Write the profile of somebody between two people: `weight` 0 is A, 1 is B.

    The body is (1 - weight) A + weight B, as a Gaussian; the face the same, of unit length, where both have one.
    Raises BolidError for profiles of different families, body encoders or face models.
    """
    import torch
    import torch.nn.functional as F

    from bolid.formats.profile import KIND, load_profile, save_profile

    if not 0 <= weight <= 1:
        raise BolidError(f"--weight is {weight}", "give a number from 0 (all A) to 1 (all B)")
    first, second = load_profile(a), load_profile(b)
    for what, theirs in (("families", "family"), ("body encoders", "body_encoder"), ("face models", "face_model")):
        ours = [p.record["family"] if theirs == "family" else p.record["inputs"].get(theirs) for p in (first, second)]
        needed = theirs != "face_model" or all(ours)  # a profile without a face has none, an old one does not say
        if needed and ours[0] != ours[1]:
            shown = f": {ours[0]} and {ours[1]}" if theirs == "family" else ""
            raise BolidError(
                f"{a} and {b} were made with different {what}{shown}", "make both again with the same family"
            )
    rest = 1 - weight
    body_mean = rest * first.body_mean + weight * second.body_mean
    # The variance of the sum of two independent Gaussians.
    variance = rest**2 * first.body_logvar.exp() + weight**2 * second.body_logvar.exp()
    views = torch.cat([rest * first.view_weights, weight * second.view_weights])
    face = None
    inputs = {"profile_a": sha256_file(a), "profile_b": sha256_file(b)} | _made_with(first) | _made_with(second)
    photos = sorted({*_photos(first), *_photos(second)})
    inputs |= {f"photo_{i:03d}": sha for i, sha in enumerate(photos)}
    if first.face is not None and second.face is not None:
        face = F.normalize(rest * first.face + weight * second.face, dim=0)
    else:
        inputs.pop("face_model", None)
    record = run_record(KIND, family=first.record["family"], config={"weight": weight}, inputs=inputs)
    save_profile(out, body_mean, variance.log(), face, views, record)
    return MixResult(Path(out), face is not None)


def edit_profile(
    profile: str | os.PathLike[str],
    out: str | os.PathLike[str] = "edited.safetensors",
    *,
    changes: Mapping[str, float],
    sliders: str | os.PathLike[str] | None = None,
) -> EditResult:
    """Write a profile whose body is moved along sliders: `changes`, slider -> standard deviations of the population.

    `sliders`: a file that measure_sliders.py wrote, by default the family's. The face stays.
    Raises BolidError for a slider that is not there, and for sliders of another body encoder.
    """
    from bolid.formats.profile import KIND, load_profile, save_profile

    person = load_profile(profile)
    file, known = _sliders(person, sliders)
    if not changes:
        raise BolidError("nothing to change", f"say what, like --set {known.names[0]}=+1; {_names(known)}")
    body_mean = person.body_mean.clone()
    for name, value in changes.items():
        if name not in known.names:
            raise BolidError(f"there is no slider {name!r}", _names(known))
        if not (math.isfinite(value) and abs(value) <= LIMIT):
            raise BolidError(
                f"--set {name} is {value}", f"give standard deviations of the population, from -{LIMIT:g} to {LIMIT:g}"
            )
        body_mean += value * known.directions[known.names.index(name)]
    inputs = {"profile": sha256_file(profile), "body_sliders": sha256_file(file)} | _made_with(person)
    inputs |= {f"photo_{i:03d}": sha for i, sha in enumerate(_photos(person))}
    record = run_record(KIND, family=person.record["family"], config={"set": dict(changes)}, inputs=inputs)
    save_profile(out, body_mean, person.body_logvar, person.face, person.view_weights, record)
    return EditResult(Path(out), _readings(known, person.body_mean), _readings(known, body_mean))


def show_profile(
    profile: str | os.PathLike[str], *, sliders: str | os.PathLike[str] | None = None
) -> tuple[Reading, ...]:
    """Where a profile's body is on each slider."""
    from bolid.formats.profile import load_profile

    person = load_profile(profile)
    return _readings(_sliders(person, sliders)[1], person.body_mean)


# ---- the body of a profile ----------------------------------------------------------------------------------------


def reshape_profile(
    profile: str | os.PathLike[str],
    out: str | os.PathLike[str] = "edited.safetensors",
    *,
    changes: Mapping[str, str],
    hold: bool = True,
) -> ReshapeResult:
    """Write a profile whose body measures something else: `changes` like {"waist": "-4cm", "inseam": "+2sd"}.

    With `hold` the other measurements stay (but the weight); else they follow as in the population. The face stays, and
    the body vector follows the shape. Raises BolidError where no such body is near, and without a body-shape file.
    """
    from bolid.body.body_vector import load_body_vectors
    from bolid.body.profiles import read_targets, shape_in, table
    from bolid.body.shape import edit
    from bolid.formats.profile import KIND, load_profile, save_profile

    person = load_profile(profile)
    file = get_family(person.record["family"]).require("body_shape")
    vectors = load_body_vectors(file, person.record["inputs"].get("body_encoder", ""))
    before = shape_in(person, file)
    after = edit(before, read_targets(before, changes), hold=hold)
    mean = vectors.moved(person.body_mean.double().numpy(), before, after)
    inputs = {"profile": sha256_file(profile), "body_shape": sha256_file(file)} | _made_with(person)
    inputs |= {f"photo_{i:03d}": sha for i, sha in enumerate(_photos(person))}
    config = {"set": dict(changes), "hold": "all" if hold else "none"}
    record = run_record(KIND, family=person.record["family"], config=config, inputs=inputs)
    body, rows = _body_and_rows(after)
    save_profile(out, _tensor(mean), person.body_logvar, person.face, person.view_weights, record, body)
    return ReshapeResult(Path(out), table(before, person.body), rows)


def body_of(profile: str | os.PathLike[str]) -> tuple[Shape, tuple[MeasurementRow, ...]]:
    """The shape of a profile's body, and what it measures."""
    from bolid.body.profiles import shape_in, table
    from bolid.formats.profile import load_profile

    person = load_profile(profile)
    family = get_family(person.record["family"])
    shape = shape_in(person, family.body_shape if family.has("body_shape") else None)
    return shape, table(shape, person.body)


def measurements_of(profile: str | os.PathLike[str]) -> tuple[MeasurementRow, ...]:
    """What a profile's body measures; empty where neither the profile nor its family knows of a shape."""
    from bolid.formats.profile import load_profile

    person = load_profile(profile)
    if person.body is None and not _knows_shape(
        get_family(person.record["family"]), person.record["inputs"].get("body_encoder", "")
    ):
        return ()
    return body_of(profile)[1]


def picture_profile(profile: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the mannequin: front, side and back of a profile's body with its measuring lines, a PNG."""
    from PIL import Image

    from bolid.body.mannequin import mannequin
    from bolid.body.measurements import MEASUREMENTS, measuring_tape

    if Path(out).suffix.lower() != ".png":
        raise BolidError(f"--picture {out} is no PNG", "end the name in .png")
    shape, rows = body_of(profile)
    scale = [row.scale for row in MEASUREMENTS]
    values = [row.value / size for row, size in zip(rows, scale, strict=True)]
    sd = [row.sd / size for row, size in zip(rows, scale, strict=True)]
    picture = mannequin(measuring_tape(), shape.mean, values, sd, Path(profile).stem)
    with atomic_path(out) as temporary:
        Image.fromarray(picture).save(temporary)
    return Path(out)


def export_profile(profile: str | os.PathLike[str], out: str | os.PathLike[str], *, pose: str = "a-pose") -> Path:
    """Write a profile's body as a mesh: .glb, .obj or .ply, in metres. `pose`: one of `bolid.body.mesh.poses()`."""
    from bolid.body.export import check_suffix, export_mesh
    from bolid.body.mesh import body_model
    from bolid.body.shape import within_bounds

    check_suffix(out)
    shape, _ = body_of(profile)
    model = body_model()
    return export_mesh(out, model.posed(within_bounds(shape.mean), pose), model.faces)


def export_maps(
    profile: str | os.PathLike[str],
    out: str | os.PathLike[str] = "maps",
    *,
    maps: Sequence[str] = ("depth", "normal", "silhouette", "openpose"),
    pose: str = "standing",
    size: tuple[int, int] = (1216, 832),
    turn: float = 0.0,
) -> tuple[Path, ...]:
    """Write control maps of a profile's body in a pose, `out`/depth.png and so on; `size` = (height, width)."""
    from PIL import Image

    from bolid.body.maps import control_maps
    from bolid.body.mesh import body_model
    from bolid.body.shape import within_bounds

    shape, _ = body_of(profile)
    made = control_maps(body_model(), within_bounds(shape.mean), tuple(maps), pose=pose, size=size, turn=turn)
    paths = []
    for name, picture in made.items():
        with atomic_path(Path(out) / f"{name}.png") as temporary:
            Image.fromarray(picture).save(temporary)
        paths.append(Path(out) / f"{name}.png")
    return tuple(paths)


# ---- sliders ------------------------------------------------------------------------------------------------------


def read_changes(texts: Sequence[str]) -> dict[str, float]:
    """`["legs=+1", "build=-0.5"]` -> {"legs": 1.0, "build": -0.5}"""
    changes: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise BolidError(f"--set {text} sets nothing", "write SLIDER=NUMBER, like --set legs=+1") from None
        if name in changes:
            raise BolidError(f"--set {name} is given twice", "leave one of them out")
        changes[name] = value
    return changes


def _sliders(person: Profile, file: str | os.PathLike[str] | None) -> tuple[Path, Sliders]:
    from bolid.formats.sliders import load_sliders

    path = Path(file) if file is not None else get_family(person.record["family"]).require("body_sliders")
    return path, load_sliders(path, person.record["inputs"].get("body_encoder", ""))


def _readings(sliders: Sliders, body_mean) -> tuple[Reading, ...]:
    values = sliders.read(body_mean)
    return tuple(Reading(name, values[name], r2) for name, r2 in zip(sliders.names, sliders.r2, strict=True))


def _names(sliders: Sliders) -> str:
    return f"the sliders are {', '.join(sliders.names)}"


def _made_with(profile: Profile) -> dict[str, str]:
    """The models whose numbers a profile holds."""
    return {name: sha for name, sha in profile.record["inputs"].items() if name in ("body_encoder", "face_model")}


def _photos(profile: Profile) -> list[str]:
    """The hashes of the photos that a profile goes back to: `evaluate` wants to know them."""
    return [sha for name, sha in sorted(profile.record["inputs"].items()) if name.startswith("photo_")]


# ---- photos -------------------------------------------------------------------------------------------------------


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
