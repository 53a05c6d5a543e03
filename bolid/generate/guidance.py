"""Losses on a person's face and body, for guidance: `backends.loss_guidance` moves a picture down their gradient.

Shapes: N pictures, (h, w) latent positions, D body dimension, R measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bolid.backends.face import DifferentiableFaces
from bolid.backends.loss_guidance import GuidanceLoss
from bolid.backends.pose import PoseModel, weights_file
from bolid.errors import BolidError
from bolid.generate.identity import Identity, check_comparable
from bolid.method import losses
from bolid.run import sha256_file

if TYPE_CHECKING:
    from bolid.backends.body import BodyEncoder
    from bolid.models.families import Family
    from bolid.person import PersonReader
    from bolid.scales import Scale

MakeLoss = Callable[..., GuidanceLoss]
"""Makes the loss of a person's vector and its `weight`."""


@dataclass(frozen=True)
class FaceGuidanceLoss:
    """L_face + `detection_weight` L_found of a `face` [512] of unit length. It moves the head alone."""

    faces: DifferentiableFaces
    face: torch.Tensor
    weight: Scale
    step: float = 0.15
    momentum: float = 0.5
    keeps_noise: bool = True
    detection_weight: float = 0.5  # where no face is detected, L_face has no gradient

    def __call__(self, pixels: torch.Tensor, latent_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the loss [N], the head's mask [N,1,h,w]) of pictures [N,3,H,W] in -1..1."""
        embeds, score, landmarks = self.faces.detect_and_embed(pixels)
        loss = losses.loss_face(embeds, self.face[None])
        loss = loss + self.detection_weight * losses.loss_face_detection(score, torch.ones_like(score))
        return loss, head_mask(landmarks, pixels.shape[2:], latent_size)


@dataclass(frozen=True)
class BodyGuidanceLoss:
    """The mean squared difference of the body encoder's reading and a `body` [D], both through `readout` [R, D]:
    measurements over the stature, in standard deviations (`bolid.body.body_vector.BodyVectors.readout`).

    It moves all of the picture, by the confidence of the pose.
    """

    encoder: BodyEncoder
    pose: PoseModel
    readout: torch.Tensor
    view_size: tuple[int, int]
    body: torch.Tensor
    weight: Scale
    step: float = 0.05
    # Momentum or kept noise make bodies no more like the person (examples/tiny_family/LEARNT.md).
    momentum: float = 0.0
    keeps_noise: bool = False

    def __call__(self, pixels: torch.Tensor, latent_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the loss [N], the pose's confidence everywhere [N,1,h,w]) of pictures [N,3,H,W] in -1..1."""
        mean, _, confidence = self.encoder.read_pixels(pixels, self.pose, self.view_size)
        loss = ((mean - self.body[None]) @ self.readout.T).square().mean(-1)
        return loss, confidence.detach()[:, None, None, None].expand(-1, 1, *latent_size)


def guidance_for(
    part: str, family: Family, people: Sequence[Identity], reader: Callable[[], PersonReader], device: str
) -> tuple[MakeLoss, dict[str, str]]:
    """(the maker of guidance losses on people's "face" or "body"; name -> sha256 of its models).

    Raises BolidError where a person has none, or one that the family's models do not know.
    """
    option = f"--{part}-guidance"
    for person in people:
        if not person.vectors:
            raise BolidError(
                f"{option} needs a person, but nobody is to be shown", "add --profile or --photo, or leave it out"
            )
        if part not in person.vectors:
            raise BolidError(
                f"{option} needs a {part}, and {person.name} has none",
                f"leave it out, or make the profile from photos that show the {part}",
            )
    if part == "body":
        check_comparable(option, people, "body encoder", reader().encoder.space, family)
        return body_guidance(family, reader().encoder, device)
    make, used = face_guidance(family, device)
    check_comparable(option, people, "face model", used["guidance_face"], family)
    return make, used


def face_guidance(family: Family, device: str = "cpu") -> tuple[MakeLoss, dict[str, str]]:
    """`guidance_for` faces. Raises BolidError where the family has no face model, or none with a gradient."""
    # Of all sizes: in a full-body picture the face is small.
    faces = DifferentiableFaces(family.require("face"), device, all_sizes=True)
    used = {"guidance_face": faces.sha256, "guidance_face_detector": faces.detector_sha256}
    return functools.partial(FaceGuidanceLoss, faces), used


def body_guidance(family: Family, encoder: BodyEncoder, device: str = "cpu") -> tuple[MakeLoss, dict[str, str]]:
    """`guidance_for` bodies, with the family's body `encoder`, what it says of the shape, and the pose model.

    Raises BolidError when one is missing or passes no gradient.
    """
    from bolid.body.body_vector import load_body_vectors
    from bolid.body.shape import population

    pose, file = PoseModel(family.require("pose"), device), family.require("body_shape")
    if not encoder.differentiable or not pose.differentiable:
        raise BolidError(
            f"--body-guidance needs a gradient, which the models of family '{family.name}' do not give",
            "it takes a body encoder trained with --view crop, and a pose model in safetensors",
        )
    used = {
        "guidance_body_encoder": encoder.sha256,
        "guidance_pose": sha256_file(weights_file(family.pose)),
        "guidance_body_shape": sha256_file(file),
    }
    rows = load_body_vectors(file, encoder.space).readout(population().shape)
    readout = torch.from_numpy(rows).float().to(device)
    return functools.partial(BodyGuidanceLoss, encoder, pose, readout, family.view_size), used


HEAD_SIZE = 3.0  # standard deviation of `head_mask`, in mean distances of the landmarks from their middle


def head_mask(landmarks: torch.Tensor, size: Sequence[int], latent_size: Sequence[int]) -> torch.Tensor:
    """A Gaussian around the face with `landmarks` [N,5,2], in pixels of pictures of `size` (H, W), on the latent
    positions: 1 at the middle of the landmarks, [N,1,h,w]."""
    middle = landmarks.mean(dim=1)
    spread = (landmarks - middle[:, None]).norm(dim=2).mean(dim=1).clamp_min(1e-3)
    y, x = (
        (torch.arange(positions).to(landmarks) + 0.5) * pixels / positions
        for positions, pixels in zip(latent_size, size, strict=True)
    )
    distance = (y[:, None] - middle[:, 1, None, None]).square() + (x - middle[:, 0, None, None]).square()
    return (-distance / (2 * (HEAD_SIZE * spread[:, None, None]).square())).exp()[:, None]
