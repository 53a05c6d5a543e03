"""Image-text embeddings with open_clip models read from a local directory (config, safetensors, tokenizer).

Shapes: N pictures or texts, E embedding dimension, C patch features, (h, w) patch positions, K = 17 keypoints.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bolid.errors import BolidError
from bolid.formats.tensors import METADATA_KEY, load_tensors, read_header

KIND = "image-text-weights"
WEIGHTS = "open_clip_model.safetensors"


class ImageTextModel:
    """An open_clip model, frozen and in eval mode (`network`): embeddings of pictures and texts, features of patches.

    `half`: what is not differentiated is computed in half precision, by default on CUDA; results are float32 always.
    Raises BolidError when a file is missing, damaged or does not fit the config.
    """

    def __init__(self, path: Path | str, device: str = "cpu", half: bool | None = None) -> None:
        path = Path(path)
        for name in ("open_clip_config.json", WEIGHTS):
            if not (path / name).is_file():
                raise BolidError(
                    f"no image-text model in {path}: {name} is missing",
                    "an image-text model is a directory in open_clip's layout, with safetensors weights",
                )
        if METADATA_KEY in (read_header(path / WEIGHTS).get("__metadata__") or {}):
            load_tensors(path / WEIGHTS, KIND)  # ours: open_clip would not notice a flipped bit, the checksum does
        self.device = torch.device(device)
        self._half = self.device.type == "cuda" if half is None else half
        with _quiet_open_clip():
            import open_clip

            # open_clip reports a wrong file as almost any kind of exception.
            try:
                network = open_clip.create_model(f"local-dir:{path}", device=device)
                self.tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
            except Exception as error:
                raise BolidError(
                    f"open_clip cannot load the model in {path}: {error}",
                    "config, weights and tokenizer must come from the same training",
                ) from error
        self.network = network.eval().requires_grad_(False)
        settings = network.visual.preprocess_cfg
        size = settings["size"]
        self.image_size: tuple[int, int] = tuple(size) if isinstance(size, list | tuple) else (size, size)  # h, w
        self._squash = settings.get("resize_mode") == "squash"
        self._fill = settings.get("fill_color", 0) / 255
        self._mean = torch.tensor(settings["mean"], device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(settings["std"], device=self.device).view(1, 3, 1, 1)

    @property
    def logit_scale(self) -> float:
        """What a cosine similarity is multiplied with before a softmax."""
        return float(self.network.logit_scale.exp())

    # ---- whole pictures and texts

    def encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """[N,E], L2-normed, of uint8 [H,W,3] RGB pictures of any sizes."""
        if not images:
            return torch.empty(0, self.embedding_size)
        with torch.no_grad(), self._precision():
            return self._unit(self._embed(self._batch(images)))

    def encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B,E], L2-normed, of [B,3,H,W] in -1..1. Differentiable with respect to the pixels."""
        return self._embed(self._fit(pixel_values.float() / 2 + 0.5))

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """[N,E], L2-normed. What goes beyond the context length is cut off."""
        with torch.no_grad():
            return self.network.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True)

    @property
    def embedding_size(self) -> int:
        """E."""
        return int(self.network.visual.output_dim)

    # ---- patches

    def patch_features(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """[N,C,h,w]: the image tower's features at each place of the *letterboxed* picture (`to_patches` maps to it).

        For a convolutional tower these are its feature maps at strides 8 and 16, one above the other; for a
        transformer the patch tokens of its last block.
        """
        with torch.no_grad():
            return self._patches(self._batch(images))

    def to_patches(self, points: np.ndarray, height: int, width: int) -> np.ndarray:
        """Where pixels (x, y) [...,2] of a picture of this size lie on the letterboxed picture, both from 0 to 1."""
        across, down = self._scales(height, width)
        offset = [(self.image_size[1] - width * across) / 2, (self.image_size[0] - height * down) / 2]
        return (np.asarray(points, np.float64) * [across, down] + offset) / [self.image_size[1], self.image_size[0]]

    def views(
        self, images: Sequence[np.ndarray], keypoints: np.ndarray, sigma: float = 0.045
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(`encode_images` [N,E]; patch features averaged with a Gaussian around each keypoint [N,K,C]), in one pass
        through the image tower (BoLID section 5.2).

        `keypoints` [N,K,2 or 3] in pixels of each picture; `sigma` relative to the network's (longer) input side.
        A keypoint outside the picture gets the features of the nearest place; weigh it by its confidence.
        """
        with torch.no_grad():
            with self._precision():
                pixels = self._batch(images)
                if not self._convolutional:
                    embeddings, patches = self._embed(pixels), self._patches(pixels)
                else:
                    # Index 4 too: open_clip skips the layers after the last index, and the embedding needs them.
                    maps = self.network.visual.forward_intermediates(pixels, indices=[2, 3, 4])
                    patches = self._pyramid(maps["image_intermediates"][:2])
                    embeddings = F.normalize(maps["image_features"], dim=-1)
            return self._unit(embeddings), self._at_keypoints(patches.float(), images, keypoints, sigma)

    def _at_keypoints(
        self, features: torch.Tensor, images: Sequence[np.ndarray], keypoints: np.ndarray, sigma: float
    ) -> torch.Tensor:
        rows, columns = features.shape[2:]
        places = np.stack(
            [self.to_patches(points[:, :2], *image.shape[:2]) for image, points in zip(images, keypoints, strict=True)]
        )  # [N,K,2]
        points = torch.as_tensor(places.clip(0, 1), dtype=features.dtype, device=features.device)
        x = (torch.arange(columns, device=features.device) + 0.5) / columns
        y = (torch.arange(rows, device=features.device) + 0.5) / rows
        across = -((x - points[..., :1]) ** 2) / (2 * sigma**2)  # [N,K,w]
        down = -((y - points[..., 1:]) ** 2) / (2 * sigma**2)  # [N,K,h]
        weights = (down[..., :, None] + across[..., None, :]).flatten(2).softmax(-1)  # [N,K,h*w], sums to 1
        return weights @ features.flatten(2).transpose(1, 2)

    # ---- inside

    def _precision(self) -> contextlib.AbstractContextManager:
        """Half precision inside, where it is wanted: float16 on CUDA, bfloat16 on the CPU, which has no float16."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype) if self._half else contextlib.nullcontext()

    def _unit(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Of length 1 in float32, also after half precision."""
        return F.normalize(embeddings.float(), dim=-1) if self._half else embeddings

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.encode_image(pixels, normalize=True)

    def _scales(self, height: int, width: int) -> tuple[float, float]:
        """(across, down): network pixels per picture pixel."""
        down, across = self.image_size[0] / height, self.image_size[1] / width
        return (across, down) if self._squash else (min(across, down), min(across, down))

    def _batch(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        # One at a time: sizes differ, and a picture's features must not depend on its neighbours.
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device) for image in images]
        return torch.cat([self._fit(tensor.float() / 255) for tensor in tensors])

    def _fit(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B,3,*image_size] normalised, from [B,3,H,W] in 0..1: scaled to fit, centred, the rest filled.

        Within rounding what open_clip's own transform does (resize mode "longest" or "squash"), but differentiable.
        A model made for "shortest" (crop to the centre) is letterboxed too: a cut-off head is no good here.
        """
        height, width = pixels.shape[2:]
        across, down = self._scales(height, width)
        size = max(1, round(height * down)), max(1, round(width * across))
        if size != (height, width):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        bottom, right = self.image_size[0] - size[0], self.image_size[1] - size[1]
        if bottom or right:
            left, top = right // 2, bottom // 2
            pixels = F.pad(pixels, (left, right - left, top, bottom - top), value=self._fill)
        return (pixels - self._mean) / self._std

    @property
    def _convolutional(self) -> bool:
        """open_clip's ModifiedResNet: a stem, then layers 1 to 4."""
        return hasattr(self.network.visual, "layer3")

    @staticmethod
    def _pyramid(maps: Sequence[torch.Tensor]) -> torch.Tensor:
        fine, coarse = maps
        coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([fine, coarse], dim=1)

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        visual = self.network.visual
        if self._convolutional:
            maps = visual.forward_intermediates(pixels, indices=[2, 3], intermediates_only=True)
            return self._pyramid(maps["image_intermediates"])
        last = visual.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][-1]
        if last.ndim == 3:  # tokens, without those that are no patches
            side = math.isqrt(last.shape[1])
            last = last[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return last


@contextlib.contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip logs through the root logger, which would reach the user's terminal."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
