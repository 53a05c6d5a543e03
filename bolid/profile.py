"""`bolid profile`: photos of one person in, me.safetensors out. The photos are not needed any more after it.

And what can be done to a profile: `mix` two people, `edit` a body, `show` what it measures, `export` it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.models.families import get_family, match_family
from bolid.person import PersonReader, PhotoReport, all_photographs
from bolid.preview import check_preview, save_preview
from bolid.rendered import OUTLINE_ONLY
from bolid.run import Progress, atomic_path, pick_device, run_record, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.body.profiles import MeasurementRow
    from bolid.body.shape import Known, Shape
    from bolid.formats.profile import Profile, ProfileBody
    from bolid.models.families import Family
    from bolid.person import Person
    from bolid.views import PersonRule, View


INNER_FOLDERS = "of a folder with photos of its own only these are read"


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
    unread: dict[str, list[str]] = field(default_factory=dict)  # reason -> what the folders hold besides photos


def make_profile(
    photos: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "me.safetensors",
    *,
    known: Mapping[str, Known] | None = None,
    sex: str | None = None,
    select_person: PersonRule = "main",
    preview: str | os.PathLike[str] | None = None,
    body_encoder: str | os.PathLike[str] | None = None,
    family: str | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    reader: PersonReader | None = None,
) -> ProfileResult:
    """Make a profile of one person. `photos`: files, or folders of them; one photo is enough, more are better.

    `known`: measurements, by name, in metres (kilograms), each with its standard deviation. They are combined with what
    the photos show; without photos they are enough. `sex`: "woman" or "man". `body_encoder`: by default the family's.
    `select_person`: of several people in a photo the "main" one, the N-th from the left, or "only": none.
    `preview`: a PNG that shows what was taken of each photo. `force`: read photographs with `tiny`, too. `reader`: one
    that is loaded already; it decides on family, device, body encoder and `select_person`.
    Raises BolidError when no photo can be used, and for measurements that no adult has.
    """
    from bolid.formats.profile import KIND, save_profile

    if not photos and not known:
        raise BolidError("no photo and no measurement given", "name photos, or measurements like --height 172")
    if preview is not None:
        check_preview(Path(preview))
    if reader is None:
        chosen = get_family(family) if body_encoder is None else _family_of(body_encoder, family)
        reader = PersonReader(chosen, pick_device(device), body_encoder, person=select_person, force=force)
    files, unread = _files(photos)
    outlines = body_encoder is None and not force and all_photographs(files, reader.family)
    seen = reader.of_outlines() if outlines else reader
    views: dict[Path, View] = {}
    if preview is not None:
        seen.on_view = lambda path, view: None if isinstance(view, str) else views.update({path: view})
    if files:
        who, shape = _with_shape(seen, seen.read(files, progress), known, sex)
    else:
        who, shape = _measured_person(reader, known or {}, sex)
    if outlines:
        who = _in_own_space(reader, who, shape)
        views = {path: replace(view, face=None, face_box=None) for path, view in views.items()}
    if preview is not None:
        save_preview(Path(preview), who.reports, views)
    inputs = reader.encoder.inputs | {f"photo_{i:03d}": sha for i, sha in enumerate(who.sha256)}
    if who.face is not None:
        inputs["face_model"] = who.face_model
    config: dict[str, Any] | None = {"known": dict(known or {}), "sex": sex} if known or sex else None
    if outlines:
        inputs["outline_encoder"] = seen.encoder.sha256
    record = run_record(KIND, family=reader.family, config=config, inputs=inputs)
    body, rows = _body_and_rows(shape)
    save_profile(out, who.body_mean, who.body_logvar, who.face, who.view_weights, record, body)
    uncertainty = float((0.5 * who.body_logvar).exp().mean())
    warning = OUTLINE_ONLY if outlines else ""
    return ProfileResult(
        Path(out), len(who.sha256), who.face is not None, uncertainty, who.reports, warning, rows, unread
    )


def _family_of(body_encoder: str | os.PathLike[str], family: str | None) -> Family:
    """The family that an encoder was made with; an encoder of masks belongs to all."""
    from bolid.formats.tensors import read_record

    made = read_record(body_encoder)
    masks = made.get("config", {}).get("view") == "mask"
    return get_family(family) if masks else match_family(family, made["family"], body_encoder)


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

    seen, shape = reader.shapes(person, known, sex)
    if not known:
        return person, shape
    vectors = load_body_vectors(reader.family.body_shape, reader.encoder.space)
    return replace(person, body_mean=_tensor(vectors.moved(person.body_mean.double().numpy(), seen, shape))), shape


def _in_own_space(reader: PersonReader, person: Person, shape: Shape | None) -> Person:
    """Somebody known by outlines, as the family's own body encoder would see them: by their shape, without a face."""
    from bolid.body.body_vector import load_body_vectors

    if shape is None:
        raise BolidError("the body encoder of masks knows no shape", "install bolid again: its file is not whole")
    vectors = load_body_vectors(reader.family.require("body_shape"), reader.encoder.space)
    mean, logvar = map(_tensor, vectors.vector_of(shape))
    reports = tuple(replace(report, face=False) for report in person.reports)
    return replace(person, body_mean=mean, body_logvar=logvar, face=None, reports=reports)


def _measured_person(reader: PersonReader, known: Mapping[str, Known], sex: str | None) -> tuple[Person, Shape]:
    """Somebody of whom there is no photo."""
    import torch

    from bolid.body.body_vector import load_body_vectors
    from bolid.body.profiles import body_from_measurements
    from bolid.person import Person

    vectors = load_body_vectors(reader.family.require("body_shape"), reader.encoder.space)
    shape = body_from_measurements(known, sex)
    mean, logvar = map(_tensor, vectors.vector_of(shape))
    nothing = torch.zeros(0)
    return Person(mean, logvar, None, nothing, (), "", (), (nothing[:, None], nothing)), shape


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


@dataclass(frozen=True)
class MixResult:
    """What `mix_profiles` wrote."""

    path: Path
    has_face: bool


@dataclass(frozen=True)
class EditResult:
    """What `edit_profile` wrote, and the measurements before and after."""

    path: Path
    before: tuple[MeasurementRow, ...]
    after: tuple[MeasurementRow, ...]


def mix_profiles(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str] = "mixed.safetensors",
    *,
    fraction: float = 0.5,
) -> MixResult:
    """Write the profile of somebody between two people: `fraction` 0 is A, 1 is B.

    The body is (1 - fraction) A + fraction B, as a Gaussian: the vector, and the shape in metres where both have one.
    The face the same, of unit length, where both have one.
    Raises BolidError for profiles of different families, body encoders or face models.
    """
    import torch
    import torch.nn.functional as F

    from bolid.formats.profile import KIND, load_profile, save_profile

    if not 0 <= fraction <= 1:
        raise BolidError(f"--fraction is {fraction}", "give a number from 0 (all A) to 1 (all B)")
    first, second = load_profile(a), load_profile(b)
    for what, theirs in (("families", "family"), ("body encoders", "body_encoder"), ("face models", "face_model")):
        ours = [p.record["family"] if theirs == "family" else p.record["inputs"].get(theirs) for p in (first, second)]
        needed = theirs != "face_model" or all(ours)  # a profile without a face has none, an old one does not say
        if needed and ours[0] != ours[1]:
            shown = f": {ours[0]} and {ours[1]}" if theirs == "family" else ""
            raise BolidError(
                f"{a} and {b} were made with different {what}{shown}", "make both again with the same family"
            )
    rest = 1 - fraction
    body_mean = rest * first.body_mean + fraction * second.body_mean
    # The variance of the sum of two independent Gaussians.
    variance = rest**2 * first.body_logvar.exp() + fraction**2 * second.body_logvar.exp()
    views = torch.cat([rest * first.view_weights, fraction * second.view_weights])
    face = None
    inputs = {"profile_a": sha256_file(a), "profile_b": sha256_file(b)} | _made_with(first) | _made_with(second)
    photos = sorted({*_photos(first), *_photos(second)})
    inputs |= {f"photo_{i:03d}": sha for i, sha in enumerate(photos)}
    if first.face is not None and second.face is not None:
        face = F.normalize(rest * first.face + fraction * second.face, dim=0)
    else:
        inputs.pop("face_model", None)
    record = run_record(KIND, family=first.record["family"], config={"fraction": fraction}, inputs=inputs)
    save_profile(out, body_mean, variance.log(), face, views, record, _mixed_body(first, second, fraction))
    return MixResult(Path(out), face is not None)


def _mixed_body(first: Profile, second: Profile, weight: float) -> ProfileBody | None:
    """The body between two, where both have one of the same body model."""
    if first.body is None or second.body is None:
        return None
    from bolid.body.profiles import shape_stored, stored
    from bolid.body.shape import Shape

    try:
        a, b = shape_stored(first.body, first.record), shape_stored(second.body, second.record)
    except BolidError:
        return None
    mean = (1 - weight) * a.mean + weight * b.mean
    return stored(Shape(mean, (1 - weight) ** 2 * a.covariance + weight**2 * b.covariance))


# ---- the body of a profile ----------------------------------------------------------------------------------------


def edit_profile(
    profile: str | os.PathLike[str],
    out: str | os.PathLike[str] = "edited.safetensors",
    *,
    changes: Mapping[str, str],
    hold: bool = True,
) -> EditResult:
    """Write a profile whose body measures something else: `changes` like {"waist": "-4cm", "inseam": "+2sd"}.

    With `hold` the other measurements stay (but the weight); else they follow as in the population. The face stays, and
    the body vector follows the shape. A change leaves a measurement as uncertain as it was; a new value makes it exact.
    Raises BolidError where no such body is near, and without a body-shape file.
    """
    from bolid.body.body_vector import load_body_vectors
    from bolid.body.profiles import exact_targets, read_targets, shape_in, table
    from bolid.body.shape import edit
    from bolid.formats.profile import KIND, load_profile, save_profile

    if not changes:
        raise BolidError("nothing to change", "say what, like --set waist=-4cm or --set inseam=+2sd")
    person = load_profile(profile)
    file = get_family(person.record["family"]).require("body_shape")
    vectors = load_body_vectors(file, person.record["inputs"].get("body_encoder", ""))
    before = shape_in(person, file)
    after = edit(before, read_targets(before, changes), hold=hold, exact=exact_targets(changes))
    mean = vectors.moved(person.body_mean.double().numpy(), before, after)
    inputs = {"profile": sha256_file(profile), "body_shape": sha256_file(file)} | _made_with(person)
    inputs |= {f"photo_{i:03d}": sha for i, sha in enumerate(_photos(person))}
    config = {"set": dict(changes), "hold": "all" if hold else "none"}
    record = run_record(KIND, family=person.record["family"], config=config, inputs=inputs)
    body, rows = _body_and_rows(after)
    save_profile(out, _tensor(mean), person.body_logvar, person.face, person.view_weights, record, body)
    return EditResult(Path(out), table(before, person.body), rows)


def body_of(profile: str | os.PathLike[str]) -> tuple[Shape, tuple[MeasurementRow, ...]]:
    """The shape of a profile's body, and what it measures."""
    from bolid.body.profiles import shape_in, shape_stored, table
    from bolid.formats.profile import load_body, load_profile

    body, record = load_body(profile)
    if body is not None:
        shape = shape_stored(body, record)
        return shape, table(shape, body)
    person = load_profile(profile)
    family = get_family(person.record["family"])
    shape = shape_in(person, family.body_shape if family.has("body_shape") else None)
    return shape, table(shape)


def show_profile(profile: str | os.PathLike[str]) -> tuple[MeasurementRow, ...]:
    """What a profile's body measures. Raises BolidError where neither it nor its family knows of a shape."""
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


def export_profile(
    profile: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pose: str = "a-pose",
    pose_from: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a profile's body as a mesh: .glb, .obj or .ply, in metres.

    `pose`: one of `bolid.body.mesh.poses()`; `pose_from`: a photo whose pose takes its place.
    """
    from bolid.body.export import check_suffix, export_mesh
    from bolid.body.mesh import body_model

    check_suffix(out)
    parameters, posed = _posed(profile, pose, pose_from)
    return export_mesh(out, body_model().posed(parameters, posed), body_model().faces)


def export_maps(
    profile: str | os.PathLike[str],
    out: str | os.PathLike[str] = "maps",
    *,
    maps: Sequence[str] = ("depth", "normal", "silhouette", "openpose"),
    pose: str = "standing",
    pose_from: str | os.PathLike[str] | None = None,
    size: tuple[int, int] = (1216, 832),
    turn: float = 0.0,
) -> tuple[Path, ...]:
    """Write control maps of a profile's body, `out`/depth.png and so on; `size` = (height, width).

    `pose` and `pose_from` as in `export_profile`; `turn`: of the camera round the body, degrees.
    """
    from PIL import Image

    from bolid.body.maps import control_maps
    from bolid.body.mesh import body_model

    parameters, posed = _posed(profile, pose, pose_from)
    made = control_maps(body_model(), parameters, tuple(maps), pose=posed, size=size, turn=turn)
    paths = []
    for name, picture in made.items():
        with atomic_path(Path(out) / f"{name}.png") as temporary:
            Image.fromarray(picture).save(temporary)
        paths.append(Path(out) / f"{name}.png")
    return tuple(paths)


def _posed(
    profile: str | os.PathLike[str], pose: str, photo: str | os.PathLike[str] | None
) -> tuple[np.ndarray, str | Mapping[str, np.ndarray]]:
    """(the parameters [P] of a profile's body, its pose: the named one, or that of the person in a photo)."""
    from bolid.body.mesh import body_model
    from bolid.body.pose_fit import fit_pose
    from bolid.body.shape import within_bounds
    from bolid.formats.tensors import read_record
    from bolid.views import person_in_photo

    parameters = within_bounds(body_of(profile)[0].mean)
    if photo is None:
        return parameters, pose
    _, person = person_in_photo(photo, get_family(read_record(profile)["family"]))
    return parameters, fit_pose(body_model(), parameters, person.keypoints)


def _made_with(profile: Profile) -> dict[str, str]:
    """The models whose numbers a profile holds."""
    return {name: sha for name, sha in profile.record["inputs"].items() if name in ("body_encoder", "face_model")}


def _photos(profile: Profile) -> list[str]:
    """The hashes of the photos that a profile goes back to: `evaluate` wants to know them."""
    return [sha for name, sha in sorted(profile.record["inputs"].items()) if name.startswith("photo_")]


# ---- photos -------------------------------------------------------------------------------------------------------


def _files(photos: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], dict[str, list[str]]]:
    """(the files, folders replaced by the photos in them; reason -> what the folders hold besides)."""
    from bolid.formats.images import list_photos, unread_files

    files: list[Path] = []
    unread: dict[str, list[str]] = {}
    for photo in map(Path, photos):
        if photo.is_dir():
            found = list_photos(photo)
            own = [path for _, path in found if path.parent == photo and not path.is_dir()]
            folders = sorted({path.parent for _, path in found} - {photo})
            if not own and len(folders) > 1:
                some = ", ".join(folder.name for folder in folders[:3]) + (", ..." if len(folders) > 3 else "")
                raise BolidError(
                    f"{photo} holds photos of {len(folders)} people: {some}",
                    f"a profile is of one person: give one of its folders, like {folders[0]}",
                )
            files += own or [path for _, path in found]
            if own and folders:
                unread.setdefault(INNER_FOLDERS, []).extend(map(str, folders))
            for reason, names in unread_files(photo).items():
                unread.setdefault(reason, []).extend(str(photo / name) for name in names)
        elif photo.suffix == ".safetensors" and photo.is_file():
            raise BolidError(f"{photo} is no photo", f"if it is a profile, look at it: bolid profile show {photo}")
        elif photo.exists() or photo.is_symlink():
            files.append(photo)
        else:
            raise BolidError(f"cannot read {photo}: No such file or directory", "check the path")
    return files, unread
