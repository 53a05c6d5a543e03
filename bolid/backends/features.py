"""The features of FID, KID and IS: InceptionV3 as torch-fidelity has it, or the family's own image tower; and LPIPS.

Both map uint8 [H, W, 3] pictures of any sizes to features [N, D]. Every report names its features: figures of different
features cannot be compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bolid.backends.image_text import ImageTextModel
from bolid.errors import BolidError
from bolid.run import home

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's own name
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"  # torchvision's own name


def inception_path() -> Path:
    """Where InceptionV3's weights are looked for; they belong to no family."""
    return home() / "inception" / INCEPTION_FILE


class InceptionFeatures:
    """InceptionV3's 2,048 pool features and its 1,008 unbiased logits, by torch-fidelity.

    Raises BolidError when the weights or torch-fidelity are missing.
    """

    size = 2048
    classes = 1008
    name = "InceptionV3 2015-12-05 (torch-fidelity), 299x299 bilinear without antialiasing, as TensorFlow 1"

    def __init__(self, device: str = "cpu") -> None:
        path = inception_path()
        if not path.is_file():
            raise BolidError(
                f"InceptionV3's weights are missing: looked for {path}",
                f"put torch-fidelity's {INCEPTION_FILE} there, or take --features tower",
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise BolidError("InceptionV3's network needs torch-fidelity", "pip install torch-fidelity") from None
        with _only_weights(path, "InceptionV3's weights"):
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path)).to(device)
        self.device = device

    def encode(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [N, 2048], logits [N, 1008])."""
        found = []
        for image in images:  # sizes differ; the network resizes
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device)
            found.append([part.float().cpu() for part in self.network(pixels)])
        features, logits = zip(*found, strict=True)
        return torch.cat(features), torch.cat(logits)


def alexnet_path() -> Path:
    """Where torchvision keeps AlexNet's weights once it has downloaded them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE


class Lpips:
    """LPIPS (Zhang et al., arXiv:1801.03924) with its learned weights, on AlexNet, by torchmetrics.

    Raises BolidError when AlexNet's weights are missing or are none: nothing is fetched.
    """

    name = "LPIPS 0.1 on AlexNet (torchmetrics), pictures in their own size"
    least_side = 64  # pixels; AlexNet's last map of smaller pictures is empty

    def __init__(self, device: str = "cpu") -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        if not (path := alexnet_path()).is_file():
            raise BolidError(
                f"AlexNet's weights are missing: looked for {path}",
                "python -c 'import torchvision; torchvision.models.alexnet(weights=\"DEFAULT\")' fetches them",
            )
        with _only_weights(path, "AlexNet's weights"):
            self.network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device).net
        self.device = device

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """Of two pictures, uint8 [H, W, 3]; from 0. The second is brought to the size of the first."""
        size = [max(side, self.least_side) for side in first.shape[:2]]
        pair = []
        for image in (first, second):
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device) / 255
            pair.append(F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False))
        with torch.no_grad():
            return float(self.network(*pair, normalize=True))


@contextlib.contextmanager
def _only_weights(path: Path, what: str) -> Iterator[None]:
    """Inside, another library can load the weights file at `path` only as tensors: no code in it runs. Errors become a
    BolidError."""
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, AttributeError) as error:
        raise BolidError(f"{path} does not hold {what}", "fetch it again") from error
    except Exception as error:  # pickle's own class, which nothing here may import
        raise BolidError(f"{path} is damaged or not a weights file: {error}", "fetch it again") from error
    finally:
        if forced is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


def tower_name(family: str, tower: ImageTextModel) -> str:
    """How a report names the family's image tower, with the way pictures are brought to its size."""
    height, width = tower.image_size
    return f"open_clip tower of family {family}, letterboxed to {height}x{width}, bicubic with antialiasing"
