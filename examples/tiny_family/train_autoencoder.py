"""Train the tiny base's autoencoder: an AutoencoderTiny, 8 times smaller with 12 channels, for 256x192 photos.

    python examples/tiny_family/train_autoencoder.py PHOTOS --out base/vae --minutes 35
    python examples/tiny_family/train_autoencoder.py PHOTOS --out base/vae2 --minutes 25 --init base/vae --adversarial 1

First the whole autoencoder, for what can be rebuilt: L1 + 2 MSE of the picture + L1 of its differences between
neighbours, faces counted more, small ones most; noise on the latents, so that the decoder forgives a diffusion model's
errors. Then the decoder alone, encoder frozen, against a discriminator of patches (hinge loss, R1 penalty, feature
matching), for what can only be made up: eyes, brows, hair. `--init` begins either stage with an exported autoencoder.
Both resume; both run on a CPU core or, with `--device cuda`, a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from timebox import TimeBox
from torch import nn
from truth import read_resized, read_truth

from bolid.train_adapter.precision import computing

ENCODER_BLOCKS, DECODER_BLOCKS = (0, 1, 2, 3), (3, 2, 2, 1)  # by level of resolution
GRID = 8  # pixels a latent position, along each side
ABOUT_FACE = 0.7  # the fraction of crops about a face
R1 = 0.1  # weight of the penalty: what is sharp and what is not differ little


def build(width: int, latent_channels: int) -> AutoencoderTiny:
    """A new autoencoder, `width` channels throughout. It has no normalisation, so the start matters: every convolution
    keeps the variance, every block is the identity."""
    levels = len(ENCODER_BLOCKS)
    model = AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(width,) * levels,
        decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=ENCODER_BLOCKS,
        num_decoder_blocks=DECODER_BLOCKS,
        scaling_factor=1.0,
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for module in model.modules():
        if isinstance(module, AutoencoderTinyBlock):
            nn.init.zeros_(module.conv[-1].weight)
            nn.init.zeros_(module.conv[-1].bias)
    return model


@dataclass
class Photos:
    """Photos of one size, and where their faces are."""

    pictures: torch.Tensor  # uint8 [N, H, W, 3]
    faces: np.ndarray  # int [N, 4]: left, top, right, bottom in pixels; all 0 if unseen
    face_weight: float

    @classmethod
    def read(cls, truth: list[dict[str, Any]], size: tuple[int, int], device: str, face_weight: float) -> Photos:
        return cls(torch.from_numpy(read_resized(truth, size)).to(device), face_boxes(truth, size), face_weight)

    def crops(self, rng: np.random.Generator, count: int, crop: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [count, 3, h, w] in -1..1 and what their pixels count [count, 1, h, w]; half of them mirrored."""
        size = self.pictures.shape[1:3]
        rows = rng.integers(0, len(self.pictures), count)
        corners = crop_corners(rng, self.faces[rows], crop, tuple(size)) // GRID * GRID
        cut = [self.pictures[i, y : y + crop[0], x : x + crop[1]] for i, (y, x) in zip(rows, corners, strict=True)]
        x = torch.stack(cut).permute(0, 3, 1, 2).float() / 127.5 - 1
        weight = torch.ones(count, 1, *crop)
        for mask, (left, top, right, bottom), (y0, x0) in zip(weight, self.faces[rows], corners, strict=True):
            counts = self.face_weight * np.clip(48 / max(1, bottom - top), 1, 3)  # a small face has few pixels
            mask[:, max(0, top - y0) : max(0, bottom - y0), max(0, left - x0) : max(0, right - x0)] = counts
        weight = weight.to(x.device)
        if rng.random() < 0.5:
            x, weight = x.flip(3), weight.flip(3)
        return x.contiguous(memory_format=torch.channels_last), weight


def face_boxes(photos: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Where the faces are, in pixels of a picture of `size`: int [N, 4], left, top, right, bottom; all 0 if unseen."""
    boxes = np.zeros((len(photos), 4), np.int64)
    for box, photo in zip(boxes, photos, strict=True):
        if photo["face_box"]:
            across, down = size[1] / photo["width"], size[0] / photo["height"]
            left, top, right, bottom = np.array(photo["face_box"]) * [across, down, across, down]
            box[:] = max(0, left), max(0, top), min(size[1], np.ceil(right)), min(size[0], np.ceil(bottom))
    return boxes


def crop_corners(
    rng: np.random.Generator, boxes: np.ndarray, crop: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Top and left of a crop of each picture, int [N, 2]: ABOUT_FACE of them about the face, the others anywhere."""
    room, sides = np.array(size) - crop, np.array(crop)
    anywhere = rng.integers(0, room + 1, (len(boxes), 2))
    middles = np.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]], 1) // 2
    shift = rng.integers(-sides // 4, sides // 4 + 1, anywhere.shape)
    about_face = np.clip(middles - sides // 2 + shift, 0, room)
    chosen = (rng.random(len(boxes)) < ABOUT_FACE) & boxes.any(1)
    return np.where(chosen[:, None], about_face, anywhere)


def picture_loss(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + L1 of the differences between neighbours; y, x [B, 3, h, w] in -1..1, weight [B, 1, h, w]."""
    error = y - x
    across, down = error.diff(dim=3).abs(), error.diff(dim=2).abs()
    return (
        (weight * (error.abs() + 2 * error.pow(2))).mean()
        + (weight[..., 1:] * across).mean()
        + (weight[..., 1:, :] * down).mean()
    )


class Reconstruction:
    """Step of the first stage: the whole autoencoder against the picture loss."""

    def __init__(self, model: AutoencoderTiny, noise: float) -> None:
        self.model, self.noise = model, noise

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The losses by name; what is minimised is their sum."""
        with computing(x.device):
            latents = self.model.encode(x).latents.float()
            noise = torch.randn(latents.shape, generator=generator, device=x.device)
            y = self.model.decode(latents + self.noise * noise).sample.float()
        return {"picture": picture_loss(y, x, weight), "scale": 2e-3 * (latents.pow(2) - 1).relu().mean()}


class Discriminator(nn.Module):
    """Real or rebuilt, patch by patch: [B, 3, h, w] in -1..1 -> logits [B, 1, h/16, w/16], and all layers' features.
    It sees the picture and, ten times louder, what a blur takes from it: there lies the difference."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        widths = (6, width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, 0.2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = []
        x = torch.cat([x, 10 * (x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))], 1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x).float(), features


class Adversarial:
    """A discriminator's part in a network that makes pictures, faces counted more in all losses.

    The adversarial gradient at the picture is scaled to `weight` times the picture loss's (as VQGAN scales it at its
    last layer, Esser et al. 2021), so neither outgrows the other.
    """

    def __init__(self, discriminator: Discriminator, lr: float, weight: float) -> None:
        self.discriminator, self.weight = discriminator, weight
        self.optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2 * lr, betas=(0.5, 0.98), weight_decay=1e-4)

    def __call__(self, y: torch.Tensor, x: torch.Tensor, counts: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """Leaves gradients on what made `y` [B, 3, h, w], which should be `x`; `counts` [B, 1, h, w]. Figures for the
        log."""
        shown = y.detach().float().requires_grad_()
        reconstruction = picture_loss(shown, x, counts)
        (direct,) = torch.autograd.grad(reconstruction, shown)
        with computing(x.device):
            logits, features = self.discriminator(shown)
            with torch.no_grad():
                _, wanted = self.discriminator(x)
        patches = F.adaptive_avg_pool2d(counts, logits.shape[2:])
        matching = sum(F.l1_loss(ours.float(), real.float()) for ours, real in zip(features, wanted, strict=True))
        (against,) = torch.autograd.grad(2 * matching - (patches * logits).mean(), shown)
        scale = self.weight * min(1.0, step / 200) * direct.norm() / against.norm().clamp(min=1e-12)
        y.backward((direct + scale * against).to(y.dtype))
        figures = self._discriminate(x, shown.detach(), patches, step)
        return {"picture": reconstruction, "matching": matching, **figures}

    def _discriminate(
        self, x: torch.Tensor, y: torch.Tensor, patches: torch.Tensor, step: int
    ) -> dict[str, torch.Tensor]:
        """Hinge loss; every eighth step the R1 penalty on the real pictures' gradient (Mescheder et al. 2018)."""
        with computing(x.device):
            real, made = self.discriminator(torch.cat([x, y]))[0].chunk(2)
        hinge = (patches * (F.relu(1 - real) + F.relu(1 + made))).mean() / patches.mean()
        loss = hinge
        if step % 8 == 0:
            x = x[: max(1, len(x) // 2)].detach().requires_grad_()
            logits = self.discriminator(x)[0].mean((1, 2, 3))
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            loss = hinge + 8 * R1 * slope.pow(2).sum((1, 2, 3)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        accuracy = ((real > 0).float().mean() + (made < 0).float().mean()) / 2
        return {"hinge": hinge, "accuracy": accuracy}


def decode_noised(model: AutoencoderTiny, x: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Second stage: `x` [B, 3, h, w] encoded, noised and decoded; the gradient is the decoder's."""
    with torch.no_grad(), computing(x.device):
        latents = model.encode(x).latents.float()
    # From none to twice the mean noise: a denoiser's errors differ from picture to picture.
    sigma = 2 * noise * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    latents += sigma * torch.randn(latents.shape, generator=generator, device=x.device)
    with computing(x.device):
        return model.decode(latents).sample


@torch.no_grad()
def psnr(model: AutoencoderTiny, pictures: torch.Tensor) -> float:
    """Mean PSNR in dB over pictures uint8 [N, h, w, 3]."""
    values = []
    for batch in pictures.split(16):
        x = (batch.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with computing(x.device):
            y = model.decode(model.encode(x).latents).sample.float().clamp(-1, 1)
        values.append(-10 * torch.log10(((x - y) / 2).pow(2).mean((1, 2, 3))))
    return float(torch.cat(values).mean())


@torch.no_grad()
def set_scale(model: AutoencoderTiny, photos: Photos) -> None:
    """Choose the scaling factor that gives the diffusion model latents of unit variance."""
    x = photos.pictures[:: max(1, len(photos.pictures) // 128)].permute(0, 3, 1, 2).float() / 127.5 - 1
    with computing(x.device):
        deviation = torch.cat([model.encode(part).latents.float() for part in x.split(16)]).std()
    model.register_to_config(scaling_factor=round(1 / float(deviation), 5))


def export(model: AutoencoderTiny, out: Path) -> None:
    """Write a directory that `AutoencoderTiny.from_pretrained` loads."""
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config.pop("block_out_channels", None)  # derived; diffusers warns of it when it loads the file
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def start(args: argparse.Namespace) -> AutoencoderTiny:
    """The autoencoder to train: a new one, or `--init`."""
    if args.init:
        return AutoencoderTiny.from_pretrained(args.init, torch_dtype=torch.float32)
    return build(args.width, args.latent_channels)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--held-out", type=Path, help="photos of other people, for the PSNR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--limit", type=int, default=12000, help="photos to load at most")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--width", type=int, default=64, help="channels of every layer")
    parser.add_argument("--latent-channels", type=int, default=12)
    parser.add_argument("--face-weight", type=float, default=4.0, help="how often a face's pixels count in the loss")
    parser.add_argument("--noise", type=float, default=0.05, help="on the latents, standard deviation")
    parser.add_argument("--init", type=Path, help="start from this autoencoder")
    parser.add_argument("--adversarial", type=float, default=0.0, help="second stage: weight of the discriminator")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    size = tuple(args.size)
    photos = Photos.read(read_truth(args.photos)[: args.limit], size, args.device, args.face_weight)
    held_out = photos.pictures[:64]
    if args.held_out:
        held_out = Photos.read(read_truth(args.held_out)[:64], size, args.device, args.face_weight).pictures
    model = start(args).to(args.device, memory_format=torch.channels_last).train()
    others: dict[str, Any] = {}
    if args.adversarial:
        model.encoder.requires_grad_(False)
        discriminator = Discriminator().to(args.device, memory_format=torch.channels_last)
        adversarial = Adversarial(discriminator, args.lr, args.adversarial)
        others = {"discriminator": discriminator, "discriminator_optimizer": adversarial.optimizer}
    else:
        reconstruction = Reconstruction(model, args.noise)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    box = TimeBox(
        {"model": model},
        optimizer,
        args.out,
        minutes=args.minutes,
        device=args.device,
        decay=0.995,
        seed=args.seed,
        others=others,
    )
    while box.running():
        rng = box.rng()
        whole = box.step % 8 == 7  # a whole picture is three crops of 128x128
        crop = (
            (args.batch, (args.crop,) * 2)
            if not whole
            else (max(1, args.batch * args.crop**2 // (size[0] * size[1])), size)
        )
        x, weight = photos.crops(rng, *crop)
        generator = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        if args.adversarial:
            optimizer.zero_grad(set_to_none=True)
            y = decode_noised(model, x, args.noise, generator)
            box.update(**adversarial(y, x, weight, box.step))
        else:
            losses = reconstruction(x, weight, generator)
            box.update(sum(losses.values()), **losses)
        if box.due("save", minutes=2):
            box.save()
            print(box.line(psnr=f"{psnr(box.average['model'], held_out):.2f} dB"), flush=True)
            export(box.average["model"], args.out)
    box.save()
    if not args.adversarial:  # else the encoder and its scale are frozen
        set_scale(box.average["model"], photos)
    export(box.average["model"], args.out)
    figures = {"psnr_db": round(psnr(box.average["model"], held_out), 2), "steps": box.step, "minutes": args.minutes}
    (args.out / "figures.json").write_text(json.dumps(figures) + "\n")
    print(figures)


if __name__ == "__main__":
    main()
