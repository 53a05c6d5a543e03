"""``me.safetensors``: a person's body and face vectors, in a few KB. It replaces the photos."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from bolid.errors import BolidError
from bolid.formats.tensors import check_finite, load_arrays, load_tensors, save_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch

KIND = "profile"


class ProfileBody(NamedTuple):
    """The body in metres: P parameters (`bolid.body.mesh`), the covariance of its state of S = P + K
    (`bolid.body.shape`), K measurements (`bolid.body.measurements`; the weight in kilograms) and their covariance.
    """

    shape_mean: np.ndarray  # f32 [P]
    shape_covariance: np.ndarray  # f32 [S, S]
    measurements: np.ndarray  # f32 [K]
    measurements_covariance: np.ndarray  # f32 [K, K]


@dataclass(frozen=True)
class Profile:
    """A person's body as a Gaussian, and the face. D: body dimension of the encoder; M: photos."""

    body_mean: torch.Tensor  # f32 [D]
    body_logvar: torch.Tensor  # f32 [D], log variance: shrinks with more and better photos
    face: torch.Tensor | None  # f32 [512], unit length; None where no photo shows the face
    view_weights: torch.Tensor  # f32 [M], each photo's share in body_mean, summing to 1
    record: dict[str, Any] = field(default_factory=dict)
    body: ProfileBody | None = None  # None in profiles of before there was one, and of encoders that know no shape


def save_profile(
    path: str | os.PathLike[str],
    body_mean: torch.Tensor | np.ndarray,
    body_logvar: torch.Tensor | np.ndarray,
    face: torch.Tensor | np.ndarray | None,
    view_weights: torch.Tensor | np.ndarray,
    record: dict[str, Any],
    body: ProfileBody | None = None,
) -> None:
    """Write a profile; shapes as in ``Profile``. ``record`` must be of kind "profile"."""
    import torch

    tensors = {"body_mean": body_mean, "body_logvar": body_logvar, "view_weights": view_weights}
    if face is not None:
        tensors["face"] = face
    if body is not None:
        tensors |= body._asdict()
    save_tensors(path, {name: torch.as_tensor(value).float() for name, value in tensors.items()}, record)


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile. Raises BolidError for anything that is not a whole one."""
    tensors, record = load_tensors(path, KIND)
    mean, logvar, weights = (tensors.get(name) for name in ("body_mean", "body_logvar", "view_weights"))
    if mean is None or logvar is None or weights is None or mean.ndim != 1 or mean.shape != logvar.shape:
        raise BolidError(f"{path} lacks parts of a profile: it has {sorted(tensors)}", "make it again: bolid profile")
    check_finite(path, tensors)
    face = tensors.get("face")
    body = _body({name: tensors[name].numpy() for name in ProfileBody._fields if name in tensors})
    return Profile(mean.float(), logvar.float(), None if face is None else face.float(), weights.float(), record, body)


def load_body(path: str | os.PathLike[str]) -> tuple[ProfileBody | None, dict[str, Any]]:
    """(the body in metres, the record) of a profile, without torch. Raises BolidError as `load_profile` does."""
    arrays, record = load_arrays(path, KIND)
    check_finite(path, arrays)
    return _body(arrays), record


def _body(arrays: Mapping[str, np.ndarray]) -> ProfileBody | None:
    if any(name not in arrays for name in ProfileBody._fields):
        return None
    return ProfileBody(*(arrays[name].astype("float32") for name in ProfileBody._fields))
