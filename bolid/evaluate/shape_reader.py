"""Evaluators of 3D bodies for `bolid evaluate`: their features of one picture, the body predicted from several.

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
    """The body encoder and what it says of the shape, as `profile` reads photos. The adapter was trained on it."""

    def __init__(self, encoder: BodyEncoder, family: Family) -> None:
        from bolid.body.body_vector import load_body_vectors

        self.encoder, self.view_size, self.file = encoder, family.view_size, family.require("body_shape")
        load_body_vectors(self.file, encoder.space)  # whether it is for this encoder
        self.size, self.needs_features = encoder.model.evidence_dim + 1, encoder.needs_features
        self.name = f"body encoder of family {family.name} (which the adapter was trained on)"

    def view(self, image: np.ndarray, person: Any, features: np.ndarray | None) -> torch.Tensor:
        """What the encoder sees of the picture, and the confidence of its pose."""
        from bolid.views import person_crop, whole_box

        cut, _, inside = person_crop(image, whole_box(person, image.shape[:2]), person.keypoints, self.view_size)
        evidence, confidence = self.encoder.evidence([cut], [inside], None if features is None else [features])
        return torch.cat([evidence[0], confidence])

    def body(self, views: torch.Tensor) -> np.ndarray:
        """The most probable body."""
        from bolid.person import shapes_of_views

        return shapes_of_views(self.encoder, self.file, views[:, :-1], views[:, -1])[0].mean


def open_reader(family: Family, device: str) -> ShapeReader | None:
    """The family's reader of shapes; None where its body encoder is missing, or knows no shape."""
    from bolid.backends.body import BodyEncoder

    if not (family.has("body_shape") and family.has("body_encoder")):
        return None
    try:
        return EncoderShapeReader(BodyEncoder(family.require("body_encoder"), device), family)
    except BolidError:  # fitted for another encoder
        return None
