"""The losses on x_gen, the generated picture: L_id and L_CLIP (BoLID Eq. 14), L_face and L_det. One object each.

Frozen networks compare x_gen with the photo whose place it takes, or with the person. The photo is decoded from its own
latents, so that a perfect prediction costs exactly nothing. The formulas are in `method/losses.py`.

A new loss: a class with `inputs` and `__call__(x_gen) -> [B]`, `NAME_weight` in config.py, a line in `pixel_losses`.

Shapes: B pictures, C latent channels, (h, w) latent positions, (H, W) pixels, D body dimension, E embedding dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.run import sha256_file
from bolid.train_adapter.config import TrainAdapterConfig

if TYPE_CHECKING:
    import torch

    from bolid.backends.body import BodyEncoder
    from bolid.backends.face import DifferentiableFaces
    from bolid.backends.pose import PoseModel

MIN_FACE_SCORE = 0.5  # detector score from which a photo shows a face


class GeneratedPictures:
    """x_gen and everything that a loss may compare it with."""

    def __init__(
        self, decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, photos: torch.Tensor,
        rows: Sequence[int], captions: Sequence[str], bodies: torch.Tensor, faces: torch.Tensor,
        generators: Sequence[torch.Generator] = (),
    ) -> None:  # fmt: skip
        self.pixels = decode(latents)  # [B,3,H,W] in -1..1
        self.rows, self.captions = rows, captions  # of the photos, B; "" is no caption
        self.bodies = bodies  # [B, D] of the people; zeros: the null condition
        self.faces = faces  # [B, 512] of the people, L2-normed; zeros: the null condition
        self.generators = generators  # B: augment x_gen before a loss, drawn from these; none: do not
        self._decode, self._photos = decode, photos  # latents [B,C,h,w]
        self._decoded: dict[int, torch.Tensor] = {}

    def photo(self, i: int) -> torch.Tensor:
        """Pixels of photo `i`, [1,3,H,W]. Decoded alone: rounding depends on what shares a batch, and a resumed run
        decodes others."""
        if i not in self._decoded:
            self._decoded[i] = self._decode(self._photos[i : i + 1])
        return self._decoded[i]

    def augmented(self) -> torch.Tensor:
        """The pictures, each randomly mirrored, shrunk and moved, where `generators` are given."""
        return random_affine(self.pixels, self.generators) if self.generators else self.pixels


class PixelLoss(Protocol):
    """A loss on x_gen."""

    inputs: dict[str, str]  # name -> sha256 of the frozen models

    def __call__(self, x_gen: GeneratedPictures) -> torch.Tensor:
        """The loss of each picture, [B], without its weight."""


class PhotoFeatures:
    """What a frozen network computes of the photos, each photo once: `encode` [1,3,H,W] => tensors [1, ...]."""

    def __init__(self, encode: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
        self._encode = encode
        self._known: dict[int, tuple[torch.Tensor, ...]] = {}

    def __call__(self, x_gen: GeneratedPictures) -> list[torch.Tensor]:
        """[B, ...] each."""
        import torch

        for i, row in enumerate(x_gen.rows):
            if row not in self._known:
                with torch.no_grad():
                    self._known[row] = tuple(part[0] for part in self._encode(x_gen.photo(i)))
        return [torch.stack(parts) for parts in zip(*(self._known[row] for row in x_gen.rows), strict=True)]


# ---- L_id ---------------------------------------------------------------------------------------------------------


class KeypointLoss:
    """L_id of the paper: the 12 body keypoints of x_gen against the photo's, in body heights (Eq. 14, second term)."""

    def __init__(self, pose: PoseModel, inputs: dict[str, str]) -> None:
        self.pose, self.inputs = pose, inputs
        self._of_photos = PhotoFeatures(pose.best_person)

    def __call__(self, x_gen: GeneratedPictures) -> torch.Tensor:
        """The loss of each picture, [B]."""
        keypoints, _box, score = self.pose.best_person(x_gen.pixels)
        target, box, target_score = self._of_photos(x_gen)
        # Weighted by the detector's scores: what is not recognised as a person counts little.
        return self.compare(keypoints, target, box) * score.detach() * target_score

    def compare(self, keypoints: torch.Tensor, target: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
        """Keypoints [B,17,3] of x_gen and of the photo, the photo's person box [B,4] => [B]."""
        from bolid.method import losses

        return losses.loss_keypoints(keypoints, target, box[:, 3] - box[:, 1])


class BoneRatioLoss(KeypointLoss):
    """L_id on ratios of bone lengths, which place, scale and in-plane pose do not change. Not in the paper."""

    def compare(self, keypoints: torch.Tensor, target: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
        """Keypoints [B,17,3] of x_gen and of the photo, the photo's person box [B,4] => [B]."""
        from bolid.method import losses

        return losses.loss_bone_ratios(keypoints, target)


class BodyLoss:
    """L_id by the body encoder: x_gen's body against the person's, as the VAE's decoder draws both. Not in the paper.

    Raises BolidError for an encoder of masks or image-text features, which pass no gradient to the picture.
    """

    def __init__(
        self, pose: PoseModel, body_encoder: BodyEncoder, view_size: Sequence[int], inputs: dict[str, str]
    ) -> None:
        if not body_encoder.differentiable:
            raise BolidError(
                f"--id-loss body: {body_encoder.path} takes masks or image-text features, which pass no gradient",
                "give a body encoder trained with --view crop",
            )
        self.pose, self.body_encoder, self.view_size, self.inputs = pose, body_encoder, view_size, inputs

    def __call__(self, x_gen: GeneratedPictures) -> torch.Tensor:
        """The loss of each picture, [B]."""
        from bolid.method.body_vae import body_distance

        mean, views, confidence = self.body_encoder.read_pixels(x_gen.augmented(), self.pose, self.view_size)
        distance = body_distance(self.body_encoder.model, mean, x_gen.bodies, views)
        return distance * confidence.detach() * x_gen.bodies.any(1)


# ---- L_CLIP -------------------------------------------------------------------------------------------------------


class ClipLoss:
    """L_CLIP: one minus the cosine of x_gen's embedding with the caption's, the photo's, or both (Eq. 14, third term).

    `target`: "text", "image" or "both". Without a caption the text's part is 0.
    """

    def __init__(self, image_text: Any, target: str, inputs: dict[str, str]) -> None:
        self.image_text, self.target, self.inputs = image_text, target, inputs
        self._of_photos = PhotoFeatures(lambda pixels: (image_text.encode_pixels(pixels),))
        self._of_caption = functools.cache(lambda caption: image_text.encode_text([caption])[0])

    def __call__(self, x_gen: GeneratedPictures) -> torch.Tensor:
        """The loss of each picture, [B]."""
        import torch

        from bolid.method import losses

        embeds = self.image_text.encode_pixels(x_gen.pixels)
        parts = []
        if self.target != "image":
            has_text = torch.tensor([bool(caption) for caption in x_gen.captions], device=embeds.device)
            texts = torch.stack([self._of_caption(caption) for caption in x_gen.captions])
            parts.append(losses.loss_clip(embeds, texts) * has_text)
        if self.target != "text":
            parts.append(losses.loss_clip(embeds, self._of_photos(x_gen)[0]))
        return torch.stack(parts).mean(0)


# ---- faces, not in the paper --------------------------------------------------------------------------------------


class FaceLoss:
    """L_face: one minus the cosine of x_gen's face with the person's (PuLID's ID loss, Guo et al. 2024, section 3.2).

    Only where the person's face is known and the *photo* shows one: by x_gen's own face, generating none would pay.
    """

    def __init__(self, faces: DifferentiableFaces, photo_scores: PhotoFeatures, inputs: dict[str, str]) -> None:
        self.face_model, self.photo_scores, self.inputs = faces, photo_scores, inputs

    def __call__(self, x_gen: GeneratedPictures) -> torch.Tensor:
        """The loss of each picture, [B]."""
        from bolid.method import losses

        counted, _ = faces_counted(x_gen, self.photo_scores)
        return losses.loss_face(self.face_model(x_gen.pixels), x_gen.faces) * counted


class FaceDetectionLoss:
    """L_det: the log ratio of the face detector's scores of the photo and of x_gen, where the photo's is higher."""

    def __init__(self, faces: DifferentiableFaces, photo_scores: PhotoFeatures, inputs: dict[str, str]) -> None:
        self.face_model, self.photo_scores, self.inputs = faces, photo_scores, inputs

    def __call__(self, x_gen: GeneratedPictures) -> torch.Tensor:
        """The loss of each picture, [B]."""
        from bolid.method import losses

        counted, photo_score = faces_counted(x_gen, self.photo_scores)
        score = self.face_model.certainty(x_gen.augmented())
        return losses.loss_face_detection(score, photo_score) * counted


def faces_counted(x_gen: GeneratedPictures, photo_scores: PhotoFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """(which pictures must show a known face, bool [B]; the face detector's score of their photos [B])."""
    (score,) = photo_scores(x_gen)
    return (score >= MIN_FACE_SCORE) & x_gen.faces.any(1), score


# ---- which losses a training has ----------------------------------------------------------------------------------


def pixel_losses(
    config: TrainAdapterConfig, family: Family, body_encoder: BodyEncoder | None = None, device: str = "cpu"
) -> dict[str, PixelLoss]:
    """The losses whose weight in `config` is not 0, by the name of the weight: "id", "clip", "face", "face_detection".

    Raises BolidError when the family lacks a model, or has one that passes no gradient.
    """
    found: dict[str, PixelLoss] = {}
    if config.id_weight:
        found["id"] = _identity_loss(config.id_loss, family, body_encoder, device)
    if config.clip_weight:
        from bolid.backends.image_text import WEIGHTS, ImageTextModel

        path = family.require("image_text")
        model = ImageTextModel(path, device)
        found["clip"] = ClipLoss(model, config.clip_target, {"image_text": sha256_file(path / WEIGHTS)})
    if config.faces:
        from bolid.backends.face import DifferentiableFaces

        faces = DifferentiableFaces(family.require("face"), device)
        inputs = {"face": faces.sha256, "face_detector": faces.detector_sha256}
        scores = PhotoFeatures(lambda pixels: (faces.certainty(pixels),))
        if config.face_weight:
            found["face"] = FaceLoss(faces, scores, inputs)
        if config.face_detection_weight:
            found["face_detection"] = FaceDetectionLoss(faces, scores, inputs)
    return found


def _identity_loss(kind: str, family: Family, body_encoder: BodyEncoder | None, device: str) -> PixelLoss:
    pose, inputs = _pose_model(family.require("pose"), device)
    if kind == "keypoints":
        return KeypointLoss(pose, inputs)
    if kind == "bone-ratios":
        return BoneRatioLoss(pose, inputs)
    if body_encoder is None:
        raise ValueError("L_id by the body encoder needs the body encoder")
    return BodyLoss(pose, body_encoder, family.view_size, inputs)


def _pose_model(path: Path, device: str) -> tuple[PoseModel, dict[str, str]]:
    from bolid.backends.pose import PoseModel, weights_file

    pose = PoseModel(path, device)
    if not pose.differentiable:
        raise BolidError(
            f"L_id needs a gradient, which a pose model in ONNX has not ({path})",
            "take one in safetensors: bolid models convert yolo11n-pose.pt",
        )
    return pose, {"pose": sha256_file(weights_file(path))}


# ---- augmentation -------------------------------------------------------------------------------------------------

MIN_SCALE, MAX_SHIFT = 0.75, 0.05  # of a picture in its frame; the shift of its middle, in fractions of the frame


def random_affine(pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Each picture [B,3,H,W] mirrored or not, shrunk and moved a little; beyond its edge the edge is repeated.

    Nothing here changes a body. It takes away what pleases a network in one place only (expectation over
    transformation, Athalye et al. 2018).
    """
    import torch
    import torch.nn.functional as F

    drawn = torch.stack([torch.rand(4, generator=generator) for generator in generators]).to(pixels)
    shrink = 1 / (MIN_SCALE + (1 - MIN_SCALE) * drawn[:, 0])
    affine = pixels.new_zeros(len(pixels), 2, 3)
    affine[:, 0, 0] = torch.where(drawn[:, 1] < 0.5, shrink, -shrink)
    affine[:, 1, 1] = shrink
    affine[:, :, 2] = 2 * MAX_SHIFT * (2 * drawn[:, 2:] - 1)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
