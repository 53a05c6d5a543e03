"""InstantID (Wang et al., arXiv:2401.07519): a face embedding through decoupled cross-attention, and IdentityNet.

The face embedding becomes tokens that the UNet attends to beside the text (an IP-Adapter). IdentityNet is a ControlNet
on a picture of five face keypoints whose cross-attention sees those face tokens instead of the text. Both are trained,
the UNet is frozen.

Simplified: the tokens come from two linear layers (the paper has a perceiver); the five points are COCO's nose, eyes
and ears (the paper: eyes, nose, corners of the mouth), for these are what shards hold. When it generates, the points
are those of the base's own picture of the same prompt and noise, for a prompt names no points.

Shapes: B batch, T face tokens, C channels of the text states, F = 512.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mechanism import FACE, Draw, Mechanism, Person, Table
from torch import nn

from bolid.backends.sampling import Control
from bolid.method.body_condition import drop_condition, initial_state, install
from bolid.method.keypoints import HEAD, MIN_CONFIDENCE
from bolid.models.families import Family

TOKENS = 16
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
CHANNELS = (16, 32, 48, 64)


def draw_face(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3]: the head's five keypoints [17, 3] (0..1, 0..1, confidence) as discs, joined to the nose."""
    import cv2

    picture = np.zeros((*size, 3), np.uint8)
    points = keypoints[HEAD].copy()
    points[:, :2] *= size[::-1]
    seen = points[:, 2] >= MIN_CONFIDENCE
    places = [tuple(point) for point in points[:, :2].round().astype(int).tolist()]
    for i in range(1, len(points)):
        if seen[0] and seen[i]:
            cv2.line(picture, places[0], places[i], [c * 3 // 5 for c in COLORS[i]], 1)
    for i in np.flatnonzero(seen):
        cv2.circle(picture, places[i], max(1, size[0] // 100), COLORS[i], -1)
    return picture


class IdentityNet(nn.Module):
    """A ControlNet that sees the tokens of the first branch's vectors instead of the text. Called as a ControlNet."""

    def __init__(self, unet: Any, shrink: int) -> None:
        from diffusers import ControlNetModel

        super().__init__()
        self.network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS[: shrink + 1])
        # The face's projection belongs to the UNet: a list hides it from this module's parameters.
        self._unet = [unet]

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def attn_processors(self) -> dict[str, Any]:
        return self.network.attn_processors

    def forward(
        self, z: Any, t: Any, text: Any, image: Any, scale: float = 1.0, *, added_cond_kwargs: Any, **rest: Any
    ):
        faces = added_cond_kwargs["image_embeds"][0].flatten(0, 1)  # [B, F]
        tokens = self._unet[0].encoder_hid_proj.image_projection_layers[0](faces)
        return self.network(z, t, tokens, image, scale, **rest)


class InstantId(Mechanism):
    """See the module."""

    def __init__(self, pipe: Any, family: Family, size: int, seed: int) -> None:
        super().__init__(pipe, family, size, seed)
        shrink = int(np.log2(pipe.vae_scale_factor))
        torch.manual_seed(seed % 2**63)
        self.identity_net = IdentityNet(pipe.unet, shrink)  # before the branch: it has none of its own
        branch = initial_state(pipe.unet, "face", FACE, tokens=TOKENS, seed=seed)
        (face,) = install(pipe.unet, [branch])
        own = {f"identity_net.{name}": p for name, p in self.identity_net.network.named_parameters()}
        self.parameters = {**face, **own}

    def predict(self, table: Table, draw: Draw) -> torch.Tensor:
        faces = drop_condition(table.faces[draw.context[:, 0]][:, None], draw.drop_image)
        maps = np.stack([draw_face(table.keypoints[row].numpy(), self.family.image_size) for row in draw.rows])
        added = {"image_embeds": [faces]}
        down, middle = self.identity_net(
            draw.noisy, draw.timesteps, draw.text, as_pixels(maps), added_cond_kwargs=added, return_dict=False
        )
        return self.unet(
            draw.noisy, draw.timesteps, encoder_hidden_states=draw.text, added_cond_kwargs=added,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample  # fmt: skip

    def vectors(self, person: Person) -> list[torch.Tensor]:
        """The face of the first photo that shows one."""
        shown = [face for face in person.faces if bool(face.any())]
        return [shown[0] if shown else torch.zeros(FACE)]

    def controls(self, person: Person) -> list[Control]:
        maps = [draw_face(keypoints, self.family.image_size) for keypoints in person.head_keypoints]
        return [Control(self.identity_net, as_pixels(np.stack(maps)))]  # type: ignore[arg-type]


def as_pixels(maps: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> f32 [B, 3, H, W] in 0..1."""
    return torch.from_numpy(maps).permute(0, 3, 1, 2).float() / 255
