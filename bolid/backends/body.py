"""The body encoder as a file: body-encoder.safetensors <-> `method.body_vae.BodyVAE`, and photos -> Gaussians."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.method.body_vae import POOLED, BodyPrior, BodyVAE, aggregated_posterior, fuse, mean_under_prior
from bolid.method.body_views import Views, crop_views, make_views, view_confidence, view_crop
from bolid.method.mask_views import MaskView
from bolid.run import sha256_file

if TYPE_CHECKING:
    from bolid.backends.pose import PoseModel

KIND = "body-encoder"
FEW_VIEWS = 2
"""With so many views or fewer, use the prior of people's bodies: by trial (examples/tiny_family/LEARNT.md)."""
_PRIOR = "population."
_BATCH = 64


def save_body_encoder(
    path: str | os.PathLike[str], model: BodyVAE, record: dict[str, Any], prior: BodyPrior | None = None
) -> None:
    """Write encoder and decoder in f16 and the prior in f32. The record's config has the network's sizes."""
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    if prior is not None:
        tensors |= {_PRIOR + name: value.float() for name, value in prior._asdict().items()}
    save_tensors(path, tensors, {**record, "feature_dim": model.feature_dim})


def read_body_encoder(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], BodyPrior | None, dict[str, Any]]:
    """(the network's tensors in f32; the prior, None where the file has none; the record)."""
    tensors, record = load_tensors(path, KIND)
    fields = {name: tensors.pop(_PRIOR + name) for name in BodyPrior._fields if _PRIOR + name in tensors}
    prior = BodyPrior(**fields) if len(fields) == len(BodyPrior._fields) else None
    return {name: value.float() for name, value in tensors.items()}, prior, record


class BodyEncoder:
    """A frozen body encoder. Raises BolidError for a file that is not one."""

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu") -> None:
        tensors, self.prior, self.record = read_body_encoder(path)
        self.sha256 = sha256_file(path)
        self.path, self.device = Path(path), device
        config = self.record.get("config", {})
        try:
            self.model = BodyVAE(
                config["body_dim"], config["width"], view=config["view"], feature_dim=self.record["feature_dim"],
                detail=config.get("detail", 1.0),
            )  # fmt: skip
            self.model.load_state_dict(tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BolidError(
                f"{path} does not hold a body encoder that this version can build", "make it again: bolid train-vae"
            ) from error
        self.model.eval().requires_grad_(False)
        self.to(device)

    def to(self, device: str) -> None:
        """Move the network to a device, in place."""
        self.device = device
        self.model.to(device, memory_format=torch.channels_last)

    @property
    def body_dim(self) -> int:
        """D, the length of a body vector."""
        return self.model.body_dim

    @property
    def space(self) -> str:
        """sha256 of the encoder whose space its vectors lie in: its own, or its teacher's in distillation.
        Vectors, adapters and body shapes of one space go together.
        """
        return self.record.get("space", self.sha256)

    @property
    def inputs(self) -> dict[str, str]:
        """The inputs that a run record names for something made from its vectors."""
        found = {"body_encoder": self.space}
        return found if self.space == self.sha256 else {**found, "body_encoder_file": self.sha256}

    @property
    def needs_features(self) -> bool:
        """Whether its input has the image-text features of a photo, too."""
        return self.model.view in POOLED

    @property
    def needs_masks(self) -> bool:
        """Whether its input is the person's mask: then `encode_masks` replaces `encode`."""
        return self.model.view == "mask"

    @property
    def differentiable(self) -> bool:
        """Whether a gradient passes from the body to the picture's pixels."""
        return self.model.view == "crop"

    @torch.no_grad()
    def encode(
        self,
        images: Sequence[np.ndarray],
        keypoints: Sequence[np.ndarray],
        features: Sequence[np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Photos (uint8 HWC) and keypoints [17, 3] (pixels) => mean, logvar [N, D], confidence [N], on the CPU."""
        evidence, confidence = self.evidence(images, keypoints, features)
        return *self.gaussians(evidence), confidence

    @torch.no_grad()
    def gaussians(self, evidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mean, logvar [N, D] of views, from their evidence [N, E], on the CPU."""
        mean, logvar = self.model.encode_evidence(evidence.to(self.device))
        return mean.cpu(), logvar.cpu()

    @torch.no_grad()
    def evidence(
        self,
        images: Sequence[np.ndarray],
        keypoints: Sequence[np.ndarray],
        features: Sequence[np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network sees of the photos (`BodyVAE.evidence`) [N, E], confidence [N], on the CPU."""
        evidence, confidences = [], []
        for start in range(0, len(images), _BATCH):
            part = slice(start, start + _BATCH)
            pairs = zip(images[part], keypoints[part], strict=True)
            cut = [view_crop(image, points, detail=self.model.detail) for image, points in pairs]
            crops = torch.from_numpy(np.stack([crop for crop, _ in cut])).to(self.device)
            inside = torch.from_numpy(np.stack([points for _, points in cut])).to(self.device)
            pooled = None
            if self.needs_features:
                if features is None:
                    raise ValueError("this body encoder needs the image-text features of the photos")
                pooled = torch.from_numpy(np.stack(features[part])).to(self.device, torch.float32)
            evidence.append(self.model.evidence(make_views(crops, inside, pooled)).cpu())
            confidences.append(view_confidence(inside).cpu())
        return torch.cat(evidence), torch.cat(confidences)

    @torch.no_grad()
    def encode_masks(self, masks: Sequence[MaskView]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`encode` for an encoder of masks: mean, logvar [N, D], confidence [N], on the CPU."""
        evidence, confidence = self.mask_evidence(masks)
        return *self.gaussians(evidence), confidence

    @torch.no_grad()
    def mask_evidence(self, masks: Sequence[MaskView]) -> tuple[torch.Tensor, torch.Tensor]:
        """`evidence` for an encoder of masks."""
        parts = []
        for start in range(0, len(masks), _BATCH):
            batch = masks[start : start + _BATCH]
            crops = torch.from_numpy(np.stack([view.crop(self.model.detail) for view in batch])).to(self.device)
            inside = torch.from_numpy(np.stack([view.keypoints for view in batch])).to(self.device)
            parts.append((self.model.evidence(make_views(crops, inside)), view_confidence(inside)))
        evidence, confidence = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return evidence, confidence

    def read_pixels(
        self, pixel_values: torch.Tensor, pose: PoseModel, view_size: Sequence[int]
    ) -> tuple[torch.Tensor, Views, torch.Tensor]:
        """(mean [B, D], the encoder's input, its confidence 0..1 [B]) of pictures [B, 3, H, W] in -1..1.

        `pose` finds the person. Pictures are resized to the resolution of photos, `view_size` (H, W). Differentiable.
        """
        keypoints, _box, score = pose.best_person(pixel_values)
        scale = view_size[0] / pixel_values.shape[2]
        if scale != 1:
            pixel_values = F.interpolate(pixel_values, tuple(view_size), mode="bilinear", antialias=scale < 1)
        keypoints = keypoints * keypoints.new_tensor([scale, scale, 1])
        mean, views = self.encode_pixels(pixel_values, keypoints)
        return mean, views, score * view_confidence(views.keypoints)

    def encode_pixels(self, pixel_values: torch.Tensor, keypoints: torch.Tensor) -> tuple[torch.Tensor, Views]:
        """(mean [B, D], the encoder's input) of pictures [B, 3, h, w] in -1..1 with keypoints [B, 17, 3] in pixels.

        Differentiable in both. For encoders without image-text features.
        """
        views = make_views(*crop_views(pixel_values, keypoints, detail=self.model.detail))
        return self.model.encode(views)[0], views


def fuse_views(
    mean: torch.Tensor, logvar: torch.Tensor, confidence: torch.Tensor, prior: BodyPrior | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All views of one person, [M, D], [M, D], [M] => body_mean [D], body_logvar [D], view_weights [M] summing to 1.

    A view's weight is its share of the precision that the views add to the prior. With `prior`, the mean of FEW_VIEWS
    views or fewer uses it in place of N(0, I) (`mean_under_prior`). The uncertainty is always that under N(0, I), so
    that another view never raises it.
    """
    body_mean, body_logvar = (part[0] for part in fuse(mean[None], logvar[None], confidence[None]))
    if prior is not None and len(mean) <= FEW_VIEWS:
        body_mean = mean_under_prior(body_mean, body_logvar, prior)
    precision = (torch.exp(-logvar) * confidence[:, None]).sum(-1)
    return body_mean, body_logvar, precision / precision.sum().clamp_min(1e-12)


def fit_body_prior(people: Iterable[Sequence[torch.Tensor]]) -> BodyPrior:
    """The distribution of bodies over people, each given by all views: mean [M, D], logvar [M, D], confidence [M]."""
    fused = [fuse_views(*views)[:2] for views in people]
    return aggregated_posterior(*(torch.stack(part) for part in zip(*fused, strict=True)))
