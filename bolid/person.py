"""Photos of one person -> what is known of their body and face. `profile` and `generate --reference` share it."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.run import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.views import View, ViewReader

MAX_SIDE = 1536  # larger photos are reduced to this many pixels, as `extract` does
DUPLICATE = "the same file again"
_BATCH = 8
FACE_WEIGHT = 8.0
"""How many standard deviations of the body a face counts that is nothing like the person's, where no body is seen. By
trial on the tiny family (examples/tiny_family/LEARNT.md)."""


@dataclass(frozen=True)
class PhotoReport:
    """One photo's part in a person. `down_to`: the lowest part of the body that it shows, "feet" to "head" (of
    views.PAIRS). `rejected` says why it has no part."""

    photo: Path
    weight: float
    confidence: float
    face: bool
    down_to: str = ""
    rejected: str = ""


@dataclass(frozen=True)
class Person:
    """D body dimensions, M accepted photos, in the order of their content hashes."""

    body_mean: torch.Tensor  # f32 [D]
    body_logvar: torch.Tensor  # f32 [D]
    face: torch.Tensor | None  # f32 [512], unit length
    view_weights: torch.Tensor  # f32 [M], summing to 1
    sha256: tuple[str, ...]  # of the accepted photos
    face_model: str  # sha256 of the recogniser that `face` is of, "" without a face
    reports: tuple[PhotoReport, ...]  # of every photo, in the order given


class PersonReader:
    """Looks at pictures of people with the family's models and the body encoder (by default the family's).

    Raises BolidError when the family lacks one of them.
    """

    def __init__(self, family: Family, device: str = "cpu", body_encoder: str | os.PathLike[str] | None = None) -> None:
        from bolid.backends.body import BodyEncoder

        self.family, self.device = family, device
        self.encoder = BodyEncoder(body_encoder or family.require("body_encoder"), device)

    @functools.cached_property
    def view_reader(self) -> ViewReader:
        """The models that see, loaded when the first photo is there to be seen."""
        from bolid.views import ViewReader

        return ViewReader(self.family, self.device)

    def read(self, photos: Sequence[str | os.PathLike[str]], progress: Progress | None = None) -> Person:
        """Fuse what photos of one person show.

        The order of the photos does not matter, to the bit: they are taken in the order of their content hashes.
        A photo that cannot be used is reported and left out; BolidError when none remains.
        """
        import torch
        import torch.nn.functional as F

        from bolid.backends.body import fuse_views
        from bolid.formats.images import decode_image
        from bolid.views import NOT_RECOGNISED, seen_down_to

        paths = [Path(photo) for photo in photos]
        if not paths:
            raise BolidError("no photo given", "name one photo or more, or a folder of them")
        reasons: dict[Path, str] = {}
        contents: dict[str, Path] = {}
        for path in paths:
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise BolidError(
                    f"cannot read {path}: {error.strerror}", "check the path and its permissions"
                ) from error
            if contents.setdefault(digest, path) != path:
                reasons[path] = DUPLICATE

        views: dict[str, View] = {}
        ordered = sorted(contents)
        for start in range(0, len(ordered), _BATCH):
            decoded = {}
            for digest in ordered[start : start + _BATCH]:
                path = contents[digest]
                try:
                    decoded[digest] = decode_image(path.read_bytes(), name=str(path), max_side=MAX_SIDE)
                except BolidError as error:
                    reasons[path] = error.message
            # One at a time: a photo's numbers must not depend on which others share its batch.
            for digest, picture in decoded.items():
                view = self.view_reader.read([picture])[0]
                if isinstance(view, str):
                    reasons[contents[digest]] = view
                else:
                    views[digest] = view
            if progress is not None:
                progress(min(start + _BATCH, len(ordered)), len(ordered), "looking at photos")
        if not views:
            unknown = self.family.name == "tiny" and any(reason in NOT_RECOGNISED for reason in reasons.values())
            listed = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
            raise BolidError(
                f"none of the {len(paths)} photos can be used: {listed}",
                "the tiny family knows only rendered people; for real photos choose another: bolid models list"
                if unknown
                else "give photos in which the person can be seen at least to the hips",
            )

        gaussians = [self._encode(view) for view in views.values()]
        mean, logvar, confidence = (torch.cat(parts) for parts in zip(*gaussians, strict=True))
        body_mean, body_logvar, weights = fuse_views(mean, logvar, confidence, self.encoder.population)
        faces = [torch.from_numpy(view.face) for view in views.values() if view.face is not None]
        face = F.normalize(torch.stack(faces).mean(0), dim=0) if faces else None

        seen = {
            contents[digest]: PhotoReport(
                contents[digest], float(weight), float(sure), view.face is not None, seen_down_to(view.keypoints)
            )
            for (digest, view), weight, sure in zip(views.items(), weights, confidence, strict=True)
        }
        reports = [seen.get(path) or PhotoReport(path, 0.0, 0.0, False, rejected=reasons[path]) for path in paths]
        face_model = self.view_reader.faces.sha256 if faces else ""
        return Person(body_mean, body_logvar, face, weights, tuple(views), face_model, tuple(reports))

    def distances(
        self, pictures: Sequence[np.ndarray], body: torch.Tensor, face: torch.Tensor | None = None
    ) -> list[float]:
        """Between c_body as each of the pictures, uint8 [H, W, 3], shows it and `body` [D]: Euclidean, in units of the
        prior's standard deviation; infinite where no person can be seen. With a `face` [512], of unit length and by the
        family's recogniser, FACE_WEIGHT * (1 - pose confidence) * (1 - cosine) more, where no face is found as of a
        cosine of 0: a portrait is chosen by the face, a full-body picture by the body.
        """
        import torch

        from bolid.backends.body import fuse_views
        from bolid.views import View

        distances = []
        for view in self.view_reader.read(pictures):
            if not isinstance(view, View):
                distances.append(math.inf)
                continue
            mean, logvar, confidence = self._encode(view)
            seen, _, _ = fuse_views(mean, logvar, confidence)
            distance = float((seen - body).norm())
            if face is not None:
                cosine = 0.0 if view.face is None else float(torch.from_numpy(view.face) @ face)
                distance += FACE_WEIGHT * (1 - float(confidence)) * (1 - cosine)
            distances.append(distance)
        return distances

    def _encode(self, view: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """mean, logvar [1, D] and confidence [1] of one view."""
        from bolid.views import person_crop

        # Cut as `shard` cuts training photos, so that a person looks here as they looked there.
        image, _, points = person_crop(view.image, view.box, view.keypoints, self.family.view_size)
        return self.encoder.encode([image], [points], [view.view_features] if self.encoder.needs_features else None)
