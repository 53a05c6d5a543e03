"""The judge: reads body ratios, measurements and shape off a picture. Only figures.py and release.py use it.

It finds places first and measures them then: a convolutional pyramid draws maps of 17 keypoints and of 16 places of its
own choice, what the pyramid knows at each place becomes a token, and a transformer reads the tokens. The probe is a
residual network without maps and tokens; the two share neither weights nor training pictures.

Shapes: N pictures, R ratios, K measurements over stature (the mass over its cube), P - 1 parameters of the body without
the stature, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bolid.backends.probe import fit
from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors

KIND = "body-judge"
FILE = Path(__file__).with_name("judge.safetensors")
SIZE = (128, 96)  # height and width of its input, to which pictures are scaled
KEYPOINTS, OWN_PLACES = 17, 16
WIDTH = 128


class Reading(NamedTuple):
    """What the judge reads off N pictures."""

    ratios: np.ndarray  # f32 [N, R]
    ratios_sd: np.ndarray  # f32 [N, R]: standard deviations
    measurements: np.ndarray  # f32 [N, K]
    measurements_sd: np.ndarray  # f32 [N, K]
    parameters: np.ndarray  # f32 [N, P - 1]: those whose mesh is nearest


class Judge:
    """The judge read from its file, frozen. `ratio_names`, `measurement_names`, `parameter_names`: what it reads.

    Raises BolidError when the file is missing, damaged or not a judge.
    """

    def __init__(self, file: Path | str = FILE, device: str = "cpu") -> None:
        tensors, self.record = load_tensors(file, KIND)
        self.device = torch.device(device)
        try:
            names = self.record["config"]["names"]
            self.ratio_names, self.measurement_names, self.parameter_names = (tuple(part) for part in names)
            self.mean, self.std = tensors.pop("mean").float().numpy(), tensors.pop("std").float().numpy()
            self.sd_scale = tensors.pop("sd_scale").float().numpy()
            network = JudgeNetwork(len(self.ratio_names) + len(self.measurement_names), len(self.parameter_names))
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BolidError(
                f"{file} does not hold a judge", "train one: examples/experiment/judge/train.py"
            ) from error
        self.network = network.eval().requires_grad_(False).to(self.device)

    def predict(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """f32 [N, R]: the ratios of the person in each picture (uint8 [H, W, 3] RGB, any sizes)."""
        return self.read(images).ratios

    def read(self, images: Sequence[np.ndarray]) -> Reading:
        """All that it reads; averaged over each picture and its mirror image."""
        sizes = len(self.ratio_names), len(self.measurement_names)
        values, spreads, bodies = [np.empty((0, sum(sizes)))], [np.empty((0, sum(sizes)))], []
        bodies.append(np.empty((0, len(self.parameter_names))))
        for start in range(0, len(images), 32):
            pixels = [
                torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
                for image in images[start : start + 32]
            ]
            x = torch.cat([fit(picture, SIZE) for picture in pixels]).to(self.device)
            with torch.no_grad():
                both = [self.network(view) for view in (x, x.flip(-1))]
            values.append(((both[0].values + both[1].values) / 2).cpu().numpy())
            spreads.append(((both[0].logvar + both[1].logvar) / 4).exp().cpu().numpy() * self.sd_scale)
            bodies.append(((both[0].body + both[1].body) / 2).cpu().numpy())
        count = sum(sizes)
        read = np.concatenate(values) * self.std[:count] + self.mean[:count]
        sd = np.concatenate(spreads) * self.std[:count]
        parameters = np.concatenate(bodies) * self.std[count:] + self.mean[count:]
        (ratios, measurements), (ratios_sd, measurements_sd) = (
            np.split(part.astype(np.float32), [sizes[0]], 1) for part in (read, sd)
        )
        return Reading(ratios, ratios_sd, measurements, measurements_sd, parameters.astype(np.float32))


class Output(NamedTuple):
    """Standardised values [B, R + K], their log variances, parameters [B, P - 1]; keypoint places [B, 17, 2] in -1..1;
    joints [B, 17, 3] (`looks.Shot`); mask logits [B, 1, 32, 24]."""

    values: torch.Tensor
    logvar: torch.Tensor
    body: torch.Tensor
    places: torch.Tensor
    joints: torch.Tensor
    mask: torch.Tensor


class JudgeNetwork(nn.Module):
    """[B, 3, *SIZE] in -1..1 -> Output."""

    def __init__(self, values: int, parameters: int) -> None:
        super().__init__()
        self.sizes = [values, values, parameters]
        self.stem = nn.Sequential(unit(3, 24, 2), unit(24, 48, 2))
        self.eighth = nn.Sequential(unit(48, 80, 2), unit(80, 80))
        self.sixteenth = nn.Sequential(unit(80, 112, 2), unit(112, 112))
        self.thirtysecond = nn.Sequential(unit(112, 112, 2), unit(112, 112))
        self.down, self.across, self.aside = nn.Conv2d(112, 64, 1), nn.Conv2d(112, 64, 1), nn.Conv2d(80, 64, 1)
        self.fine = nn.Conv2d(48, 32, 1)
        self.merge = unit(64, 64)
        self.finest = unit(64 + 32, 48)
        self.maps = nn.Conv2d(48, KEYPOINTS + OWN_PLACES + 1, 1)
        self.token = nn.Linear(48 + 64 + 6, WIDTH)
        self.which = nn.Parameter(torch.randn(KEYPOINTS + OWN_PLACES, WIDTH) * 0.02)
        self.whole = nn.Linear(112, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 256, 0.0, "gelu", batch_first=True, norm_first=True)
        self.reader = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * values + parameters))
        self.joints = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))

    def forward(self, x: torch.Tensor) -> Output:
        quarter = self.stem(x)
        eighth = self.eighth(quarter)
        sixteenth = self.sixteenth(eighth)
        last = self.thirtysecond(sixteenth)
        middle = self.across(sixteenth) + F.interpolate(self.down(last), scale_factor=2.0)
        middle = self.merge(self.aside(eighth) + F.interpolate(middle, scale_factor=2.0))
        fine = self.finest(torch.cat([F.interpolate(middle, scale_factor=2.0), self.fine(quarter)], 1))
        maps = self.maps(fine)
        weights = maps[:, :-1].float().flatten(2).softmax(-1)  # [B, T, h w]
        grid = positions(*maps.shape[2:]).to(weights)
        with torch.autocast(x.device.type, enabled=False):  # places need more than bf16's eight bits
            first, second = weights @ grid, weights @ grid**2
        peak = weights.amax(-1, keepdim=True).log() / 4
        entropy = -(weights * (weights + 1e-9).log()).sum(-1, keepdim=True) / 4
        spread = (second - first**2).clamp_min(0).add(1e-6).sqrt()
        coarse = F.adaptive_avg_pool2d(weights.unflatten(-1, maps.shape[2:]), middle.shape[2:]) * 4
        seen = weights @ fine.float().flatten(2).mT, coarse.flatten(2) @ middle.float().flatten(2).mT
        tokens = self.token(torch.cat([*seen, first, spread, peak, entropy], -1)) + self.which
        tokens = torch.cat([self.whole(last.float().mean((2, 3)))[:, None], tokens], 1)
        read = self.reader(tokens)
        values, logvar, body = self.out(read[:, 0]).float().split(self.sizes, 1)
        joints = self.joints(read[:, 1 : KEYPOINTS + 1]).float()
        return Output(values, logvar.clamp(-8, 3), body, first[:, :KEYPOINTS], joints, maps[:, -1:].float())


def positions(height: int, width: int) -> torch.Tensor:
    """(x, y) of the centres of a map's places, in -1..1: [height * width, 2]."""
    y, x = torch.meshgrid(*((torch.arange(n) * 2 + 1) / n - 1 for n in (height, width)), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A 3x3 convolution, batch norm and SiLU; with a skip connection where the shape stays."""
    layers = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )
    return Skip(layers) if inputs == outputs and stride == 1 else layers


class Skip(nn.Module):
    """Layers and a skip connection."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)
