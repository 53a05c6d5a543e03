"""Train the tiny base's autoencoder: an AutoencoderTiny, 8x smaller with 12 channels, on 64x64 crops of 128x96 photos.

    python examples/tiny_family/train_autoencoder.py PHOTOS --out base/vae --minutes 20

Expected time: 20 minutes on one core. Resumable: the same command goes on from OUT/checkpoint.pt's step.
Loss: L1 + 2 MSE of the picture + L1 of its differences between neighbours (edges: without them eyes and mouths fade),
all counted `--face-weight` times in a face; with noise on the latents (sigma 0.03) so that the decoder forgives the
small errors that a diffusion model makes, and a weak L2 on the latents so that they keep a unit scale.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from truth import read_resized, read_truth

from bolid.train_adapter.precision import computing


def build(width: int, latent_channels: int) -> AutoencoderTiny:
    """A new autoencoder, `width` channels throughout."""
    model = AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 2, 2, 1),
        scaling_factor=1.0,
    )
    # It has no normalisation, so the start matters: every convolution keeps the variance, every block is the identity.
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for module in model.modules():
        if isinstance(module, AutoencoderTinyBlock):
            torch.nn.init.zeros_(module.conv[-1].weight)
            torch.nn.init.zeros_(module.conv[-1].bias)
    return model


def psnr(model: AutoencoderTiny, pictures: np.ndarray) -> float:
    """Mean PSNR in dB over pictures uint8 [N, h, w, 3]."""
    with torch.no_grad():
        x = torch.from_numpy(pictures).to(model.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = model.decode(model.encode(x).latents).sample.clamp(-1, 1)
        mse = ((x - y) / 2).pow(2).mean((1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())


def face_boxes(photos: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Where the faces are, in pixels of a picture of `size`: int [N, 4], left, top, right, bottom; all 0 if unseen."""
    boxes = np.zeros((len(photos), 4), np.int64)
    for box, photo in zip(boxes, photos, strict=True):
        if photo["face_box"]:
            across, down = size[1] / photo["width"], size[0] / photo["height"]
            left, top, right, bottom = np.array(photo["face_box"]) * [across, down, across, down]
            box[:] = max(0, left), max(0, top), min(size[1], math.ceil(right)), min(size[0], math.ceil(bottom))
    return boxes


def crop_corners(rng: np.random.Generator, boxes: np.ndarray, crop: int, size: tuple[int, int]) -> np.ndarray:
    """Top and left of a crop of each picture, int [N, 2]: half of them anywhere, half of them about the face."""
    room = np.array(size) - crop
    anywhere = rng.integers(0, room + 1, (len(boxes), 2))
    middles = np.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]], 1) // 2
    about_face = np.clip(middles - crop // 2 + rng.integers(-crop // 4, crop // 4 + 1, anywhere.shape), 0, room)
    chosen = (rng.random(len(boxes)) < 0.5) & boxes.any(1)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--held-out", type=Path, help="photos of other people, for the PSNR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--limit", type=int, default=12000, help="photos to load at most")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 96), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--width", type=int, default=64, help="channels of every layer")
    parser.add_argument("--latent-channels", type=int, default=12)
    parser.add_argument("--face-weight", type=float, default=4.0, help="how often a face's pixels count in the loss")
    parser.add_argument("--init", type=Path, help="start from this autoencoder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    size, crop, batch, device = tuple(args.size), args.crop, args.batch, args.device
    photos = read_truth(args.photos)[: args.limit]
    pictures, faces = read_resized(photos, size), face_boxes(photos, size)
    held_out = read_resized(read_truth(args.held_out)[:64], size) if args.held_out else pictures[:64]
    model = AutoencoderTiny.from_pretrained(args.init) if args.init else build(args.width, args.latent_channels)
    model.to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    step, spent = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        for name, item in (("model", model), ("average", average), ("optimizer", optimizer)):
            item.load_state_dict(state[name])
        step, spent = state["step"], state["spent"]
    began, last = time.time() - spent, time.time()
    losses = []
    while (spent := time.time() - began) < args.minutes * 60:
        rng = np.random.default_rng([args.seed, step])
        part = min(1.0, spent / (args.minutes * 60))
        warmup = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = args.lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part)))
        rows = rng.integers(0, len(pictures), batch)
        corners = crop_corners(rng, faces[rows], crop, size)
        crops = [pictures[i, t : t + crop, le : le + crop] for i, (t, le) in zip(rows, corners, strict=True)]
        x = torch.from_numpy(np.stack(crops))
        weight = torch.ones(batch, 1, crop, crop)
        for mask, (left, top, right, bottom), (t, le) in zip(weight, faces[rows], corners, strict=True):
            mask[:, max(0, top - t) : max(0, bottom - t), max(0, left - le) : max(0, right - le)] = args.face_weight
        x = x.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if rng.random() < 0.5:
            x, weight = x.flip(3), weight.flip(3)
        x = x.to(memory_format=torch.channels_last)
        with computing(device):
            latents = model.encode(x).latents
            noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)).to(device)
            y = model.decode(latents + 0.03 * noise).sample
        latents, y = latents.float(), y.float()
        loss = picture_loss(y, x, weight.to(device)) + 2e-3 * (latents.pow(2) - 1).relu().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        step += 1
        if time.time() - last > 90:
            last = time.time()
            parts = {"model": model, "average": average, "optimizer": optimizer}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": step, "spent": spent}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            print(
                f"{spent / 60:.1f} min, step {step}, {step * batch / (time.time() - began):.0f} crops/s, "
                f"loss {np.mean(losses[-200:]):.4f}, held-out PSNR {psnr(average, held_out):.2f} dB",
                flush=True,
            )
    with torch.no_grad():
        x = (
            torch.from_numpy(pictures[:: max(1, len(pictures) // 256)]).to(device).permute(0, 3, 1, 2).float() / 127.5
            - 1
        )
        deviation = float(average.encode(x).latents.std())
    # The pipeline multiplies latents by the scaling factor: unit variance for the diffusion model.
    average.register_to_config(scaling_factor=round(1 / deviation, 5))
    average.save_pretrained(args.out)
    figures = {
        "psnr_db": round(psnr(average, held_out), 2),
        "steps": step,
        "crops": step * batch,
        "minutes": round(spent / 60, 1),
    }
    (args.out / "figures.json").write_text(json.dumps(figures) + "\n")
    print(figures)


if __name__ == "__main__":
    main()
