"""Readers of 3D bodies for `bolid evaluate`: what they keep of one picture, and the body they read off several.

Shapes: V numbers that a reader keeps of a picture, n pictures, P parameters of a body, D body dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from bolid.errors import BolidError

if TYPE_CHECKING:
    from bolid.backends.body import BodyEncoder
    from bolid.models.families import Family


class ShapeReader(Protocol):
    """Reads a person's body off pictures."""

    name: str
    size: int  # V
    needs_features: bool  # whether `view` wants the image-text features of the picture

    def view(self, image: np.ndarray, person: Any, features: np.ndarray | None) -> torch.Tensor:
        """What is kept of one picture, uint8 [H,W,3], of a detected person: f32 [V]."""

    def body(self, views: torch.Tensor) -> np.ndarray:
        """The body's parameters [P], of any stature, from what was kept of one person's pictures [n, V]."""


class EncoderShapeReader:
    """The body encoder, and what its vectors say of the shape. The adapter was trained on the same encoder."""

    def __init__(self, encoder: BodyEncoder, family: Family) -> None:
        from bolid.body.body_vector import load_body_vectors

        self.encoder, self.view_size = encoder, family.view_size
        self.vectors = load_body_vectors(family.require("body_shape"), encoder.space)
        self.size, self.needs_features = 2 * encoder.body_dim + 1, encoder.needs_features
        self.name = f"body encoder of family {family.name} (which the adapter was trained on)"

    def view(self, image: np.ndarray, person: Any, features: np.ndarray | None) -> torch.Tensor:
        """Mean and log variance of the picture's Gaussian, and the confidence of its pose."""
        from bolid.views import person_crop, whole_box

        cut, _, inside = person_crop(image, whole_box(person, image.shape[:2]), person.keypoints, self.view_size)
        mean, logvar, confidence = self.encoder.encode([cut], [inside], None if features is None else [features])
        return torch.cat([mean[0], logvar[0], confidence])

    def body(self, views: torch.Tensor) -> np.ndarray:
        """The most probable body."""
        from bolid.backends.body import fuse_views
        from bolid.body.profiles import body_from_vector

        mean, logvar, confidence = views[:, : self.encoder.body_dim], views[:, self.encoder.body_dim : -1], views[:, -1]
        people = self.encoder.population
        spread = None if people is None else (people.mean.double().numpy(), people.covariance.double().numpy())
        fused, uncertain, _ = fuse_views(mean, logvar, confidence, people)
        parts = fused.double().numpy(), uncertain.double().numpy()
        return body_from_vector(self.vectors, *parts, len(views), people=spread)[0].mean


def open_reader(family: Family, device: str) -> ShapeReader | None:
    """The family's reader of shapes; None where its body encoder is missing, or knows no shape."""
    from bolid.backends.body import BodyEncoder

    if not (family.has("body_shape") and family.has("body_encoder")):
        return None
    try:
        return EncoderShapeReader(BodyEncoder(family.require("body_encoder"), device), family)
    except BolidError:  # fitted for another encoder
        return None
