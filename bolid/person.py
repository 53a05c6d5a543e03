"""Photos of one person -> their body and face vectors, for `profile` and `generate --photo`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.models.families import DEFAULT_FAMILY, Family
from bolid.rendered import REFUSED, REFUSED_HINT, refusal
from bolid.run import Progress
from bolid.views import MIN_HEIGHT, NO_MASK

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.backends.body import BodyEncoder
    from bolid.body.shape import Known, Shape
    from bolid.views import PersonRule, View, ViewReader

MAX_SIDE = 1536  # larger photos are reduced to this many pixels, as `extract` does
DUPLICATE = "the same file again"
_GLANCE_SIDE = 128  # pixels: of the copy by which photos are compared
CHANGED = "the file changed while it was read"
FACE_WEIGHT = 8.0
"""Weight of the face in `PersonReader.distances`: a face of cosine 0, in a picture without a body, counts as much as
a body at this distance, in standard deviations of the prior. Chosen by trial on the tiny family."""
GREY_WEIGHT = 0.1
"""Weight of a face in a black-and-white photo, beside one in colour. Recognisers are trained on colour: of 286 faces of
rendered people the cosine to the person's other faces was 0.85 in colour and 0.13 in grey (the tiny family's)."""


@dataclass(frozen=True)
class PhotoReport:
    """One photo's share in a person.

    `weight` in the fused body, `confidence` of its pose, both 0..1; `face`: whether one was found; `down_to`: the
    lowest part of the body that it shows, "feet" to "head" (views.BODY_PARTS); `rejected`: why it was left out, or "";
    `number`, `people`: which of how many people it was, from the left; `grey`: whether it is black and white.
    """

    photo: Path
    weight: float
    confidence: float
    face: bool
    down_to: str = ""
    rejected: str = ""
    number: int = 1
    people: int = 1
    grey: bool = False


@dataclass(frozen=True)
class Person:
    """The vectors of one person. D body dimensions; M accepted photos, in the order of their content hashes."""

    body_mean: torch.Tensor  # f32 [D]
    body_logvar: torch.Tensor  # f32 [D]
    face: torch.Tensor | None  # f32 [512], unit length
    view_weights: torch.Tensor  # f32 [M], summing to 1
    sha256: tuple[str, ...]  # of the accepted photos
    face_model: str  # sha256 of the face recogniser, "" without a face
    reports: tuple[PhotoReport, ...]  # of every photo, in the order given
    views: tuple[torch.Tensor, torch.Tensor]  # what the encoder saw of the photos [M, E], confidence [M]


class PersonReader:
    """Encodes photos of people with the family's models and a body encoder (by default the family's).

    `person`: of several people in a photo the main one, the N-th from the left, or "only": none. `force`: read
    photographs with `tiny`, too. Raises BolidError when the family lacks one of the models.
    """

    def __init__(
        self,
        family: Family,
        device: str = "cpu",
        body_encoder: str | os.PathLike[str] | None = None,
        *,
        person: PersonRule = "main",
        force: bool = False,
    ) -> None:
        from bolid.backends.body import BodyEncoder

        self.family, self.device, self.rule, self.force = family, device, person, force
        self.on_view: Callable[[Path, View | str], None] | None = None  # called with each photo's view, or reason
        self.encoder = BodyEncoder(body_encoder or family.require("body_encoder"), device)

    def of_outlines(self) -> PersonReader:
        """The same with the body encoder of masks, which knows photographs too."""
        return PersonReader(self.family.with_mask_encoder(), self.device, person=self.rule, force=True)

    @functools.cached_property
    def view_reader(self) -> ViewReader:
        """The pose, face and image-text models, loaded at the first photo."""
        from bolid.views import ViewReader

        return ViewReader(self.family, self.device, self.rule)

    def read(self, photos: Sequence[str | os.PathLike[str]], progress: Progress | None = None) -> Person:
        """Fuse the views of photos of one person.

        The photos' order does not matter, to the bit: they are taken in the order of their content hashes. A photo that
        cannot be used, or that is in several files, is reported and left out; BolidError when none remains.
        """
        paths = list(dict.fromkeys(Path(photo) for photo in photos))
        if not paths:
            raise BolidError("no photo given", "name one photo or more, or a folder of them")
        if self.encoder.needs_masks:
            self.family.require("segmentation")
        contents, rejected = _by_content(paths)
        for digest, reason in _copies(contents).items():
            rejected[contents.pop(digest)] = reason
        views = self._views(contents, rejected, progress)
        if not views:
            raise self._none_usable(rejected)
        return self._fuse(paths, contents, views, rejected)

    def _views(
        self, contents: dict[str, Path], rejected: dict[Path, str], progress: Progress | None
    ) -> dict[str, View]:
        """Content hash -> view, in the order of the hashes; the reasons of the others go to `rejected`."""
        views: dict[str, View] = {}
        for number, digest in enumerate(sorted(contents), 1):
            view = self._view(contents[digest], digest)
            if self.on_view is not None:
                self.on_view(contents[digest], view)
            if isinstance(view, str):
                rejected[contents[digest]] = view
            else:
                views[digest] = view
            if progress is not None:
                progress(number, len(contents), "reading photos")
        return views

    def _view(self, path: Path, digest: str) -> View | str:
        """The view of one photo, or why it has none."""
        from bolid.formats.images import decode_image, read_file

        try:
            data = read_file(path)
            if hashlib.sha256(data).hexdigest() != digest:
                return CHANGED
            image = decode_image(data, name="the file", max_side=MAX_SIDE)
        except BolidError as error:
            return error.message
        if max(image.shape[:2]) < MIN_HEIGHT:
            return f"the picture has {image.shape[1]}x{image.shape[0]} pixels only"
        if not self.force and (reason := refusal(image, self.family)):
            return reason
        view = self.view_reader.read([image])[0]  # one photo a batch: its features must not depend on its neighbours
        return NO_MASK if self._lacks_mask(view) else view

    def _lacks_mask(self, view: View | str) -> bool:
        """Whether the body encoder cannot take this view, because it takes masks."""
        return self.encoder.needs_masks and not isinstance(view, str) and view.mask is None

    def _none_usable(self, rejected: dict[Path, str]) -> BolidError:
        from bolid.views import FEWER, NOT_RECOGNISED, SEVERAL, SMALL

        reasons = set(rejected.values())
        hint = "give photos in which the person can be seen at least to the hips"
        if not reasons & {*NOT_RECOGNISED, FEWER, NO_MASK, SMALL}:
            hint = "give pictures: JPEG, PNG, WebP, TIFF, HEIC, AVIF"
        if FEWER in reasons:
            hint = "--select-person main takes the clearest person of each photo; 1 is the first from the left"
        if SEVERAL in reasons:
            hint = "where photos show several people: --select-person main, or 2 for the second from the left"
        if self.family.name == "tiny" and reasons & set(NOT_RECOGNISED):
            hint = "the tiny family knows only rendered people; for real photos choose another: bolid models list"
        if REFUSED in reasons:
            hint = REFUSED_HINT
        listed = "; ".join(f"{path}: {reason}" for path, reason in rejected.items())
        none = "the photo cannot" if len(rejected) == 1 else f"none of the {len(rejected)} photos can"
        return BolidError(f"{none} be used: {listed}", hint)

    def _fuse(
        self, paths: Sequence[Path], contents: dict[str, Path], views: dict[str, View], rejected: dict[Path, str]
    ) -> Person:
        import torch
        import torch.nn.functional as F

        from bolid.backends.body import fuse_views
        from bolid.formats.images import is_grey
        from bolid.views import lowest_part

        found = [self._evidence(view) for view in views.values()]
        evidence, confidence = (torch.cat(parts) for parts in zip(*found, strict=True))
        mean, logvar = (torch.cat(parts) for parts in zip(*map(self.encoder.gaussians, evidence.split(1)), strict=True))
        body_mean, body_logvar, weights = fuse_views(mean, logvar, confidence, self.encoder.prior)
        grey = {digest: is_grey(view.image) for digest, view in views.items()}
        faces = [
            torch.from_numpy(view.face) * (GREY_WEIGHT if grey[digest] else 1)
            for digest, view in views.items()
            if view.face is not None
        ]
        face = F.normalize(torch.stack(faces).mean(0), dim=0) if faces else None
        used = {}
        for (digest, view), weight, sure in zip(views.items(), weights, confidence, strict=True):
            path, (number, people) = contents[digest], view.number
            used[path] = PhotoReport(
                path, float(weight), float(sure), view.face is not None, lowest_part(view.keypoints),
                number=number, people=people, grey=grey[digest],
            )  # fmt: skip
        reports = [used.get(path) or PhotoReport(path, 0.0, 0.0, False, rejected=rejected[path]) for path in paths]
        face_model = self.view_reader.faces.sha256 if faces else ""
        seen = evidence, confidence
        return Person(body_mean, body_logvar, face, weights, tuple(views), face_model, tuple(reports), seen)

    def shapes(
        self, person: Person, known: Mapping[str, Known] | None = None, sex: str | None = None
    ) -> tuple[Shape, Shape]:
        """(what the photos say of the body's shape, what photos and measurements say).

        Raises BolidError for a family whose body encoder knows no shape, and for measurements that no adult has.
        """
        fused = person.body_mean, person.body_logvar
        return shapes_of_views(self.encoder, self.family.require("body_shape"), *person.views, fused, known, sex)

    def distances(
        self, pictures: Sequence[np.ndarray], body: torch.Tensor, face: torch.Tensor | None = None
    ) -> list[float]:
        """Distance of each picture's person, uint8 [H, W, 3], from a person with `body` [D] and `face` [512].

        Euclidean between the bodies, in standard deviations of the prior; infinite where no person is found. The `face`
        (of unit length, by the family's recogniser) adds FACE_WEIGHT * (1 - pose confidence) * (1 - cosine), with a
        cosine of 0 where no face is found. So the face decides for a portrait, the body for a full-body picture.
        """
        import torch

        from bolid.backends.body import fuse_views
        from bolid.views import View

        distances = []
        for view in self.view_reader.read(pictures):
            if not isinstance(view, View) or self._lacks_mask(view):
                distances.append(math.inf)
                continue
            evidence, confidence = self._evidence(view)
            mean, logvar = self.encoder.gaussians(evidence)
            fused, _, _ = fuse_views(mean, logvar, confidence)
            distance = float((fused - body).norm())
            if face is not None:
                cosine = 0.0 if view.face is None else float(torch.from_numpy(view.face) @ face)
                distance += FACE_WEIGHT * (1 - float(confidence)) * (1 - cosine)
            distances.append(distance)
        return distances

    def _evidence(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoder sees of one view [1, E], and its confidence [1]."""
        from bolid.views import person_crop

        if self.encoder.needs_masks and view.mask is not None:
            return self.encoder.mask_evidence([view.mask])
        # The same crop as `shard` makes of training photos.
        image, _, points = person_crop(view.image, view.box, view.keypoints, self.family.view_size)
        return self.encoder.evidence([image], [points], [view.view_features] if self.encoder.needs_features else None)


def shapes_of_views(
    encoder: BodyEncoder,
    file: str | os.PathLike[str],
    evidence: torch.Tensor,
    confidence: torch.Tensor,
    fused: tuple[torch.Tensor, torch.Tensor] | None = None,
    known: Mapping[str, Known] | None = None,
    sex: str | None = None,
) -> tuple[Shape, Shape]:
    """(what views of one person say of the body's shape, what views and measurements say), by a body-shape `file`.

    More than FEW_VIEWS views are read by the file's shape head where it has one, others by their body vector.
    `evidence` [M, E] and `confidence` [M] as of `BodyEncoder.evidence`; `fused`: body_mean and body_logvar [D] if they
    are known already. Raises BolidError for a file of another encoder, and for measurements that no adult has.
    """
    from bolid.backends.body import fuse_views
    from bolid.body.body_vector import FEW_VIEWS, load_body_vectors, load_readings
    from bolid.body.profiles import body_from_vector

    views = len(confidence)
    if views > FEW_VIEWS and (readings := load_readings(file, encoder.space)):
        return body_from_vector(readings.vectors, *readings.read(evidence, confidence), views, known=known, sex=sex)
    prior = encoder.prior
    spread = None if prior is None else (prior.mean.double().numpy(), prior.covariance.double().numpy())
    if fused is None:
        mean, logvar = encoder.gaussians(evidence)
        fused = fuse_views(mean, logvar, confidence, prior)[:2]
    vectors = load_body_vectors(file, encoder.space)
    mean, logvar = (part.double().numpy() for part in fused)
    return body_from_vector(vectors, mean, logvar, views, people=spread, known=known, sex=sex)


def all_photographs(paths: Sequence[Path], family: Family) -> bool:
    """Whether all of the photos that can be read are photographs which `family` does not know."""
    from bolid.formats.images import decode_image, read_file

    refused: list[bool] = []
    for path in paths if family.name == DEFAULT_FAMILY else ():
        with contextlib.suppress(BolidError):
            refused.append(bool(refusal(decode_image(read_file(path), name=str(path), max_side=MAX_SIDE), family)))
            if not refused[-1]:
                return False
    return bool(refused)


def _by_content(paths: Sequence[Path]) -> tuple[dict[str, Path], dict[Path, str]]:
    """(content hash -> the first photo with it, photo -> why it is left out)."""
    from bolid.formats.images import hash_file

    contents: dict[str, Path] = {}
    rejected: dict[Path, str] = {}
    for path in paths:
        try:
            if contents.setdefault(hash_file(path), path) != path:
                rejected[path] = DUPLICATE
        except BolidError as error:
            rejected[path] = error.message
    return contents, rejected


def _copies(contents: Mapping[str, Path]) -> dict[str, str]:
    """Content hash -> why it is left out, of files that hold a photo again, in another format or size: they would count
    as more evidence. The largest one stays.
    """
    import numpy as np

    from bolid.formats.images import MAX_HASH_DISTANCE, difference_hash, glance, read_file

    found: list[tuple[int, str, int]] = []
    for digest, path in contents.items():
        with contextlib.suppress(BolidError):  # `_view` says what is wrong with it
            grey, (width, height), _ = glance(read_file(path), _GLANCE_SIDE)
            found.append((-width * height, digest, difference_hash(np.asarray(grey))))
    kept: dict[str, int] = {}
    copies: dict[str, str] = {}
    for _, digest, fingerprint in sorted(found):
        if not fingerprint:  # a picture of one colour
            continue
        near = (first for first, other in kept.items() if (fingerprint ^ other).bit_count() <= MAX_HASH_DISTANCE)
        if first := next(near, None):
            copies[digest] = f"the same photo as {contents[first].name}"
        else:
            kept[digest] = fingerprint
    return copies
