"""Train the tiny family's upscaler: what the autoencoder shows of a photo in, the photo at twice the size out.

    bolid synth --person-seed 0:130 --photos 8 --size 384x512 --out photos/large
    python examples/tiny_family/train_upscaler.py photos/large --vae base/vae --out bolid/tiny/upscaler.safetensors

The network is Real-ESRGAN's compact one (SRVGGNetCompact), as `spandrel` loads it. First the picture loss of
`train_autoencoder.py`, then that and its discriminator (hinge loss, R1 penalty, feature matching). Input and target are
the same photo, so it also undoes the autoencoder's blur. The same command resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact
from timebox import TimeBox
from torch import nn
from train_autoencoder import Adversarial, Discriminator, crop_corners, face_boxes, picture_loss
from truth import read_resized, read_truth, rebuilt

from bolid.train_adapter.precision import computing

FACTOR = 2
FACE_WEIGHT = 4.0
PLAIN = 0.3  # the part of the time without the discriminator


class Pairs:
    """Photos [N, h, w, 3] as the autoencoder shows them, and [N, 2h, 2w, 3] as they are; both uint8."""

    def __init__(self, photos: Path, vae: Path, limit: int, size: tuple[int, int]) -> None:
        truth = read_truth(photos)[:limit]
        large = (FACTOR * size[0], FACTOR * size[1])
        self.wanted = read_resized(truth, large)
        small = np.stack([cv2.resize(x, size[::-1], interpolation=cv2.INTER_AREA) for x in self.wanted])
        autoencoder = AutoencoderTiny.from_pretrained(vae, torch_dtype=torch.float32).eval()
        self.given = rebuilt(small, autoencoder.to(memory_format=torch.channels_last))
        self.faces, self.size = face_boxes(truth, size), size

    def crops(self, rng: np.random.Generator, count: int, crop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Given [count, 3, crop, crop] and wanted, twice as large, in -1..1; what the latter's pixels count."""
        rows = rng.integers(0, len(self.given), count)
        corners = crop_corners(rng, self.faces[rows], (crop, crop), self.size)
        given, wanted, weights = [], [], torch.ones(count, 1, FACTOR * crop, FACTOR * crop)
        for row, (y, x), weight in zip(rows, corners, weights, strict=True):
            given.append(self.given[row, y : y + crop, x : x + crop])
            across, down = slice(FACTOR * x, FACTOR * (x + crop)), slice(FACTOR * y, FACTOR * (y + crop))
            wanted.append(self.wanted[row, down, across])
            left, top, right, bottom = FACTOR * (self.faces[row] - [x, y, x, y]).clip(0)
            weight[:, top:bottom, left:right] = FACE_WEIGHT
        tensors = [torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2).float() / 127.5 - 1 for each in (given, wanted)]
        if rng.random() < 0.5:
            tensors, weights = [each.flip(3) for each in tensors], weights.flip(3)
        x, y = (each.contiguous(memory_format=torch.channels_last) for each in tensors)
        return x, y, weights


def enlarge(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[B, 3, h, w] in -1..1 to [B, 3, 2h, 2w]; the network's own range is 0..1."""
    with computing(x.device):
        return network(x / 2 + 0.5).float() * 2 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/upscaler"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, default=48, help="side of what is given")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--adversarial", type=float, default=0.4)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pairs = Pairs(args.photos, args.vae, args.limit, tuple(args.size))
    network = Compact(num_feat=args.features, num_conv=args.layers, upscale=FACTOR).to(
        memory_format=torch.channels_last
    )
    discriminator = Discriminator().to(memory_format=torch.channels_last)
    adversarial = Adversarial(discriminator, args.lr, args.adversarial)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    box = TimeBox(
        {"network": network},
        optimizer,
        args.work,
        minutes=args.minutes,
        decay=0.995,
        seed=args.seed,
        others={"discriminator": discriminator, "discriminator_optimizer": adversarial.optimizer},
    )

    def export() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        weights = box.average["network"].state_dict()
        save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, args.out)

    began = 0
    while box.running():
        x, wanted, weights = pairs.crops(box.rng(), args.batch, args.crop)
        y = enlarge(network, x)
        if box.fraction < PLAIN:
            loss = picture_loss(y, wanted, weights)
            box.update(loss, picture=loss)
            began = box.step
        else:
            optimizer.zero_grad(set_to_none=True)
            box.update(**adversarial(y, wanted, weights, box.step - began))
        if box.due("save", minutes=2):
            box.save()
            export()
            print(box.line(), flush=True)
    box.save()
    export()
    print(box.line(), flush=True)


if __name__ == "__main__":
    main()
