"""The evaluators of `bolid evaluate`: a family's models, and what they extract from one picture.

Shapes: E embedding, D features, C classes, F = 512 numbers of each face recogniser, W width profile, R body readings,
V numbers of the shape reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bolid.evaluate.shape_reader import open_reader
from bolid.models.families import Family

BATCH = 8
FEATURES = ("auto", "inception", "tower")


@dataclass
class PictureFeatures:
    """What the evaluators extract from one picture; nan where nothing is found."""

    embed: torch.Tensor  # f32 [E], of the image-text model
    features: torch.Tensor  # f32 [D], for FID and KID
    logits: torch.Tensor | None  # f32 [C], of InceptionV3
    face: torch.Tensor  # f32 [F], unit length
    keypoints: torch.Tensor  # f32 [17, 3]; confidence 0 where no person is found
    widths: torch.Tensor  # f32 [W]
    reading: torch.Tensor  # f32 [R]
    view: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # f32 [V], what the shape reader keeps


class BodyReader(Protocol):
    """Reads body ratios [N, R], named `ratio_names`, off pictures (uint8 [H, W, 3])."""

    ratio_names: tuple[str, ...]

    def predict(self, images: Sequence[np.ndarray]) -> np.ndarray: ...  # noqa: D102


class Evaluators:
    """A family's models, and the features of FID, KID and IS.

    `recognisers`: InsightFace packs that recognise faces instead of the family's own, whose detector finds them.
    `body_reader`: (name, reader) instead of the family's body probe.
    Raises BolidError when the family lacks a model.
    """

    def __init__(
        self,
        family: Family,
        device: str,
        features: str,
        recognisers: Sequence[Path] = (),
        body_reader: tuple[str, BodyReader] | None = None,
    ) -> None:
        from bolid.backends.face import Recogniser
        from bolid.backends.features import InceptionFeatures, Lpips, alexnet_path, inception_path, tower_name
        from bolid.backends.image_text import ImageTextModel
        from bolid.backends.people import face_detector, pose_detector

        self.arguments = (family, device, features, recognisers, body_reader)  # for those of another process
        self.family, self.device = family, device
        self.image_text = ImageTextModel(family.require("image_text"), device)
        self.pose = pose_detector(family.require("pose"), device)
        self.faces = face_detector(family.require("face"), device)
        self.recognisers = [Recogniser(path, device) for path in recognisers]
        self.face_evaluator = f"face model of family {family.name}"
        if self.recognisers:
            names = ", ".join(one.name for one in self.recognisers)
            self.face_evaluator = f"mean of {names}; faces found by the {self.face_evaluator}"
        self.tower = tower_name(family.name, self.image_text)
        self.inception: InceptionFeatures | None = None
        self.notes: list[str] = []
        if features == "inception" or (features == "auto" and family.name != "tiny" and inception_path().is_file()):
            self.inception = InceptionFeatures(device)
        elif features == "auto" and family.name != "tiny":
            self.notes.append(
                f"FID, KID and IS are on the family's tower: no InceptionV3 weights at {inception_path()}"
            )
        published = features == "inception" or (features == "auto" and family.name != "tiny")
        self.lpips = Lpips(device) if published and alexnet_path().is_file() else None
        if published and self.lpips is None:
            self.notes.append(f"diversity is on the family's tower: no AlexNet weights at {alexnet_path()}")
        self.feature_name = self.inception.name if self.inception else self.tower
        self.feature_size = self.inception.size if self.inception else self.image_text.embedding_size
        self._texts: dict[str, torch.Tensor] = {}
        self._open_body_evaluator(body_reader)
        self.shape_reader = open_reader(family, device)

    def _open_body_evaluator(self, given: tuple[str, BodyReader] | None) -> None:
        """The reader that was given, else the family's body probe, else its body encoder."""
        from bolid.backends.body import BodyEncoder
        from bolid.backends.probe import BodyProbe
        from bolid.backends.segmentation import load_segmenter

        self.probe: BodyReader | None = None
        self.encoder: BodyEncoder | None = None
        if given is not None:
            self.body_evaluator, self.probe = given
            self.reading_size = len(self.probe.ratio_names)
        elif self.family.probe is not None and self.family.probe.exists():
            self.probe = BodyProbe(self.family.probe, self.device)
            self.body_evaluator = f"body probe of family {self.family.name}"
            self.reading_size = len(self.probe.ratio_names)
        elif "body_encoder" not in self.family.missing():
            self.encoder = BodyEncoder(self.family.require("body_encoder"), self.device)
            if self.encoder.needs_masks:
                self.segmenter = load_segmenter(self.family.require("segmentation"), self.device)
            self.body_evaluator = f"body encoder of family {self.family.name} (which the adapter was trained on)"
            self.reading_size = self.encoder.body_dim
        else:
            self.body_evaluator = "nothing: the family has no probe and no body encoder"
            self.reading_size = 1

    @property
    def fingerprint(self) -> list[Any]:
        """What a cached feature depends on, beside the photo."""
        family, parts = self.family, ("image_text", "pose", "face", "probe", "body_encoder", "body_shape")
        files = []
        for part in parts:
            path = getattr(family, part)
            inside = sorted(path.rglob("*")) if path is not None and path.is_dir() else [path] if path else []
            files += [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in inside if f.is_file()]
        files += [[one.name, one.sha256] for one in self.recognisers]
        return [family.name, self.feature_name, self.body_evaluator, files]

    def perceptual_view(self, image: np.ndarray) -> Any:
        """The input of `perceptual_distance` for a picture, uint8 [H, W, 3]; computed once, since it costs most."""
        return image if self.lpips is not None else [self.image_text.patch_features([image])]

    def perceptual_distance(self, first: Any, second: Any) -> float:
        """LPIPS of two such views, from 0; without AlexNet's weights, its formula on the family's own tower."""
        from bolid.method.metrics import perceptual_distance

        if self.lpips is not None:
            return self.lpips.distance(first, second)
        return float(perceptual_distance(first, second))

    def text(self, text: str) -> torch.Tensor:
        """The embedding of a text, f32 [E]; cached."""
        if text not in self._texts:
            self._texts[text] = self.image_text.encode_text([text]).float().cpu()[0]
        return self._texts[text]

    def extract(self, images: Sequence[np.ndarray], body: bool = True) -> list[PictureFeatures]:
        """The features of each picture, uint8 [H, W, 3]; without `body` neither widths nor reading."""
        from bolid.views import choose_person

        embeds = self.image_text.encode_images(images).float().cpu()
        features, logits = self.inception.encode(images) if self.inception else (embeds, None)
        found = []
        for i, (image, people) in enumerate(zip(images, self.pose.detect(images), strict=True)):
            one = PictureFeatures(
                embeds[i], features[i], None if logits is None else logits[i],
                torch.full((512 * max(1, len(self.recognisers)),), math.nan),
                torch.zeros(17, 3), torch.full((16,), math.nan), torch.full((self.reading_size,), math.nan),
                torch.full((self.shape_reader.size if self.shape_reader else 0,), math.nan),
            )  # fmt: skip
            person = choose_person(people, "main")
            if not isinstance(person, str):
                self._add_person(one, image, person, body)
            found.append(one)
        return found

    def _add_person(self, found: PictureFeatures, image: np.ndarray, person: Any, body: bool) -> None:
        """Face, keypoints, widths and body reading of the person in a picture; the last two only down to the knees."""
        from bolid.backends.silhouette import silhouette
        from bolid.method.keypoints import HEAD, HIPS, KNEES, MIN_CONFIDENCE
        from bolid.method.metrics import width_profile
        from bolid.views import face_of, person_crop, whole_box

        keypoints = person.keypoints
        found.keypoints = torch.from_numpy(keypoints.astype("float32"))
        if (keypoints[HEAD, 2] >= MIN_CONFIDENCE).any():
            face = face_of(person, self.faces.detect(image))
            if face is not None:
                found.face = torch.from_numpy(face.embedding)
                if self.recognisers:  # the cosine of joined unit vectors is the mean of their cosines
                    each = [one.embed(image, face) for one in self.recognisers]
                    found.face = torch.from_numpy(np.concatenate(each)) / len(each) ** 0.5
        if self.shape_reader is not None:
            features = self._pooled(image, keypoints) if self.shape_reader.needs_features else None
            found.view = self.shape_reader.view(image, person, features)
        to_the_knees = (keypoints[list(HIPS), 2] >= MIN_CONFIDENCE).any() and (
            keypoints[list(KNEES), 2] >= MIN_CONFIDENCE
        ).any()
        if not (body and to_the_knees):
            return
        box = whole_box(person, image.shape[:2])
        mask, points = silhouette(image, box, keypoints)
        found.widths = width_profile(torch.from_numpy(mask), torch.from_numpy(points))
        if self.probe is not None:
            found.reading = torch.from_numpy(self.probe.predict([image])[0])
        elif self.encoder is not None and self.encoder.needs_masks:
            view = self.segmenter.segment(image, box, keypoints)
            if view is not None:
                found.reading = self.encoder.encode_masks([view])[0][0]
        elif self.encoder is not None:
            cut, _, inside = person_crop(image, box, keypoints, self.family.view_size)
            pooled = [self._pooled(image, keypoints)] if self.encoder.needs_features else None
            found.reading = self.encoder.encode([cut], [inside], pooled)[0][0]

    def _pooled(self, image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        """The image-text features around each keypoint that is visible, as body encoders take them."""
        from bolid.method.keypoints import MIN_CONFIDENCE

        pooled = self.image_text.views([image], keypoints[None])[1].float().cpu().numpy()[0]
        return pooled * (keypoints[:, 2:] >= MIN_CONFIDENCE)
