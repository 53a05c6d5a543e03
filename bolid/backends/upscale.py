"""Larger pictures by a super-resolution network: any that `spandrel` knows, as safetensors and never from a pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bolid.errors import BolidError


class Upscaler:
    """A super-resolution network of RGB pictures. `scale`: how many times larger it makes them.

    Raises BolidError for a file that is damaged, and for one that holds no such network.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

        wanted = "give a super-resolution network of RGB pictures that spandrel loads, as .safetensors"
        try:
            model = ModelLoader(device).load_from_state_dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise BolidError(f"the upscaler {path} is not a safetensors file: {error}", wanted) from error
        except (UnsupportedModelError, RuntimeError, KeyError, ValueError) as error:
            raise BolidError(f"{path} holds no upscaler that spandrel knows", wanted) from error
        if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
            raise BolidError(f"{path} is no upscaler of RGB pictures", wanted)
        if model.scale < 2:
            raise BolidError(f"{path} does not enlarge: its scale is {model.scale}", wanted)
        self.model, self.scale = model.eval().float(), model.scale

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], factor: int) -> list[np.ndarray]:
        """Pictures, uint8 [H,W,3], `factor` times larger. Where the network's scale is another, it works until they are
        large enough, and the rest is Lanczos."""
        return [self._enlarge(picture, factor) for picture in pictures]

    def _enlarge(self, picture: np.ndarray, factor: int) -> np.ndarray:
        from PIL import Image

        height, width = (side * factor for side in picture.shape[:2])
        while picture.shape[0] < height:
            x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(self.model.device)
            y = self.model(x.float() / 255)[0].clamp(0, 1)
            picture = (y * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        if picture.shape[0] > height:
            picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
        return picture
