"""Who is to be shown: the person of a profile, of one photo, an invented one, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.formats.images import printable
from bolid.generate.request import PathLike, Request
from bolid.generate.shape_map import SHAPE_ALONE, shape_of_photo, shape_of_profile, shape_of_vector
from bolid.models.families import Family, match_family
from bolid.person import PersonReader
from bolid.run import Progress, derive_seed, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

LARGEST = 1e4  # of a vector's numbers: bodies are in standard deviations of the prior, faces of unit length


def _nobodys_shape() -> np.ndarray:
    raise BolidError("nobody's body is to be shown", "add --profile, or leave out --body-from and --pose")


@dataclass(frozen=True)
class Identity:
    """A person to be shown. `vectors`: branch -> f32 [dim]; a branch that is not there is not used."""

    vectors: dict[str, torch.Tensor]
    body_encoder: str  # sha256 that names the space of the body vector, "" for nobody
    face_model: str  # sha256 of the face recogniser, "" where it is not known
    inputs: dict[str, str]  # for the run record
    name: str
    folder: str = ""  # of this person's pictures, where there are several people
    shape: Callable[[], np.ndarray] = _nobodys_shape
    """Makes the parameters [P] of the 3D body. BolidError where nothing is known of it."""

    def __post_init__(self) -> None:
        for branch, vector in self.vectors.items():
            largest = float(vector.abs().max())
            if not largest <= LARGEST or (branch == "face" and largest == 0):
                raise BolidError(
                    f"{self.name} is damaged: the numbers of its {branch} vector are not those of any person",
                    "make the profile again with: bolid profile; or give another photo",
                )


def find_people(
    request: Request, reader: Callable[[], PersonReader], progress: Progress | None = None
) -> list[Identity]:
    """The people of a request: one, or one for each of several profiles. `reader` loads the models for photos.

    Raises BolidError for files that are damaged, missing or of another family.
    """
    if request.profiles:
        return _from_profiles(request)
    if request.photo is not None:
        person = reader().read([request.photo], progress)
        vectors = {"body": person.body_mean} | ({"face": person.face} if person.face is not None else {})
        name = f"the photo {printable(Path(request.photo).name)}"
        shape = partial(shape_of_photo, reader(), person)
        inputs = {"photo": person.sha256[0]}
        return [Identity(vectors, reader().encoder.space, person.face_model, inputs, name, shape=shape)]
    if request.new_person is not None:
        return [_invented(request.family, request.require_adapter("body"), request.new_person)]
    return [Identity({}, "", "", {}, "nobody")]


def _from_profiles(request: Request) -> list[Identity]:
    paths = request.profiles
    folders = [Path(path).stem if len(paths) > 1 else "" for path in paths]
    if twice := [name for name in folders if name and folders.count(name) > 1]:
        raise BolidError(
            f"two profiles are called {twice[0]}: their pictures could not be told apart", "rename one of them"
        )
    return [_from_profile(request, path, folder) for path, folder in zip(paths, folders, strict=True)]


def _from_profile(request: Request, path: PathLike, folder: str) -> Identity:
    person, recorded = identity_of(path, folder)
    if recorded == request.family.name:
        return person
    if not request.shape_alone:  # a 3D body belongs to no family
        match_family(request.family.name, recorded, path, SHAPE_ALONE)
    return replace(person, vectors={})


def identity_of(path: PathLike, folder: str = "") -> tuple[Identity, str]:
    """(the person of a profile, the name of the family that it was made with)."""
    from bolid.formats.profile import load_profile

    profile = load_profile(path)
    vectors = {"body": profile.body_mean} | ({"face": profile.face} if profile.face is not None else {})
    made_with = profile.record["inputs"]
    # The photos too: `evaluate` must not score a picture against a photo that it could have copied.
    photos = {name: sha for name, sha in made_with.items() if name.startswith("photo_")}
    inputs = {"profile": sha256_file(path), **photos}
    name = f"the profile {printable(Path(path).name)}"
    models = made_with.get("body_encoder", ""), made_with.get("face_model", "")
    shape = partial(shape_of_profile, profile)
    return Identity(vectors, *models, inputs, name, folder, shape=shape), profile.record["family"]


def _invented(family: Family, body_adapter: Path, seed: int) -> Identity:
    """Somebody who does not exist, the same in every prompt: c_body drawn from the body encoder's prior.

    From N(0, I) where the family's body encoder is missing, has no prior or another space than the adapter.
    """
    import torch

    from bolid.backends.body import BodyEncoder
    from bolid.formats.adapter import load_adapter
    from bolid.method.body_vae import draw_body

    tensors, record = load_adapter(body_adapter, "body")
    space = record["inputs"]["body_encoder"]
    generator = torch.Generator().manual_seed(derive_seed(seed, "new-person"))
    body = torch.randn(tensors["image_proj.proj.weight"].shape[1], generator=generator)
    inputs = {}
    if family.has("body_encoder"):
        encoder = BodyEncoder(family.require("body_encoder"))
        if encoder.prior is not None and encoder.space == space:
            body, inputs = draw_body(encoder.prior, body), {"population": encoder.sha256}
    shape = partial(shape_of_vector, body, space, family)
    return Identity({"body": body}, space, "", inputs, f"new person {seed}", shape=shape)


def check_comparable(option: str, people: Sequence[Identity], model: str, sha256: str, family: Family) -> None:
    """BolidError where a person's vector is of another `model`, "body encoder" or "face model", than the family's."""
    for person in people:
        theirs = person.body_encoder if model == "body encoder" else person.face_model or sha256
        if theirs != sha256:
            raise BolidError(
                f"{option}: {person.name} was made with another {model} than that of family '{family.name}'",
                "make the profile again with: bolid profile",
            )
