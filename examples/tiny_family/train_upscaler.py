"""Train the tiny family's upscaler: a picture as the base makes it in, the photo at twice the size out.

    bolid synth --person-seed 0:140 --photos 8 --size 384x512 --out photos/large
    bolid synth --person-seed 100100:100130 --photos 6 --size 384x512 --out photos/large-val
    python examples/tiny_family/train_upscaler.py photos/large --val photos/large-val --base bolid/tiny/base \\
        --out bolid/tiny/upscaler.safetensors

Each photo is noised to one of the base's last levels and denoised from there, so that it keeps its layout and has the
base's blur; the photo itself is the target, and the network learns to undo that blur as well (as Real-ESRGAN does with
its degradations, Wang et al., arXiv:2107.10833). The network is Real-ESRGAN's compact one (SRVGGNetCompact), as
`spandrel` loads it. First the picture loss of `train_autoencoder.py`, then that and its discriminator (hinge loss, R1
penalty, feature matching). The same command resumes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from measure_base import FRAMINGS, edge_energy, load
from safetensors.torch import load_file, save_file
from spandrel.architectures.Compact import Compact
from timebox import TimeBox
from torch import nn
from train_autoencoder import Adversarial, Discriminator, crop_corners, face_boxes, picture_loss
from train_base import FEW_STEPS
from truth import read_resized, read_truth, write_card

from bolid.backends.face import FaceModel
from bolid.backends.upscale import Upscaler
from bolid.models.families import get_family
from bolid.train_adapter.precision import computing

FACTOR = 2
FACE_WEIGHT = 4.0
CARD = """
`upscaler.safetensors`: pictures of the base in `base/`, twice as large (`bolid generate --upscale 2`, or 4). The
network is Real-ESRGAN's compact one (SRVGGNetCompact, 32 features, 10 layers, fp16); spandrel loads it. It learnt on
renders that the base had noised and denoised, so it also undoes the base's blur. Of a face that the picture only hints
at it makes up the features. It knows only rendered synthetic people.

License: Apache-2.0. The training pictures are renders of Anny (Apache-2.0, shapes CC0); the command is in
`examples/tiny_family/train_upscaler.py`. Figures: bicubic interpolation / the upscaler.
"""
LATER = (6, 7)  # indices of FEW_STEPS: from which levels photos are denoised
PLAIN = 0.1  # the part of the time without the discriminator


@torch.no_grad()
def denoised(photos: np.ndarray, captions: list[str], base: Path) -> np.ndarray:
    """Photos, uint8 [N, h, w, 3], noised to one of the levels LATER, each in turn, and denoised from there."""
    pipe = load(base, "cpu")
    scale, made = pipe.vae.config.scaling_factor, np.empty_like(photos)
    generator = torch.Generator().manual_seed(0)
    for i, level in enumerate(LATER):
        rows = np.arange(i, len(photos), len(LATER))
        for batch in np.split(rows, range(16, len(rows), 16)):
            text, _ = pipe.encode_prompt([captions[row] for row in batch], pipe.device, 1, False)
            pixels = pipe.image_processor.preprocess(photos[batch].astype(np.float32) / 255)
            pipe.scheduler.set_timesteps(timesteps=list(FEW_STEPS[level:]))
            with computing(pipe.device):
                latents = scale * pipe.vae.encode(pixels).latents.float()
                noise = torch.randn(latents.shape, generator=generator)
                latents = pipe.scheduler.add_noise(latents, noise, pipe.scheduler.timesteps[:1])
                for t in pipe.scheduler.timesteps:
                    prediction = pipe.unet(latents, t, text).sample.float()
                    latents = pipe.scheduler.step(prediction, t, latents, generator, return_dict=False)[0]
                pictures = pipe.vae.decode(latents / scale).sample.float()
            made[batch] = (pipe.image_processor.postprocess(pictures, "np") * 255).round()
    return made


class Pairs:
    """Photos [N, h, w, 3] as the base makes them, and [N, 2h, 2w, 3] as they are; both uint8. `cache`: a file for the
    former."""

    def __init__(self, photos: Path, base: Path, limit: int, size: tuple[int, int], cache: Path) -> None:
        truth = read_truth(photos)[:limit]
        large = (FACTOR * size[0], FACTOR * size[1])
        self.wanted = read_resized(truth, large)
        if not cache.exists():
            small = np.stack([cv2.resize(x, size[::-1], interpolation=cv2.INTER_AREA) for x in self.wanted])
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, denoised(small, [row["caption"] for row in truth], base))
        self.given = np.load(cache)
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


def measure(val: Path, base: Path, upscaler: Path, size: tuple[int, int]) -> dict[str, str]:
    """Photos of held-out people as the base makes them, enlarged: by bicubic interpolation / by the upscaler."""
    truth = read_truth(val)
    wanted = read_resized(truth, (FACTOR * size[0], FACTOR * size[1]))
    small = np.stack([cv2.resize(x, size[::-1], interpolation=cv2.INTER_AREA) for x in wanted])
    given = denoised(small, [row["caption"] for row in truth], base)
    bicubic = [cv2.resize(x, wanted.shape[2:0:-1], interpolation=cv2.INTER_CUBIC) for x in given]
    ways = [np.stack(bicubic), np.stack(Upscaler(upscaler)(list(given), FACTOR))]
    faces = FaceModel(get_family("tiny").require("face"))
    figures = {}
    for framing in FRAMINGS:
        rows = [i for i, row in enumerate(truth) if row["attributes"]["framing"] == framing and row["face_box"]]
        errors = [np.square((made[rows].astype(np.float32) - wanted[rows]) / 255).mean((1, 2, 3)) for made in ways]
        measured = {
            "PSNR, dB": [np.mean(-10 * np.log10(error)) for error in errors],
            "edges over the photos'": [edge_energy(made[rows]) / edge_energy(wanted[rows]) for made in ways],
            "face found": [np.mean([bool(faces.detect(made[row])) for row in rows]) for made in ways],
        }
        for name, values in measured.items():
            figures[f"{framing} (n {len(rows)}): {name}"] = " / ".join(f"{value:.3g}" for value in values)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--val", type=Path, help="photos of held-out people, for the figures of the model card")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/upscaler"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--limit", type=int, default=1200)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, default=48, help="side of what is given")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--adversarial", type=float, default=0.4)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--init", type=Path, help="go on from this upscaler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    facts = train(args)
    if args.val:
        figures = measure(args.val, args.base, args.out, tuple(args.size))
        print(json.dumps(figures, indent=1))
        write_card(args.out.parent, "Tiny upscaler", CARD, figures, facts, f"{args.out.stem}.md")


def train(args: argparse.Namespace) -> dict[str, str | int]:
    """Writes OUT; what the model card says of the training."""
    pairs = Pairs(args.photos, args.base, args.limit, tuple(args.size), args.work / "given.npy")
    network = Compact(num_feat=args.features, num_conv=args.layers, upscale=FACTOR)
    if args.init:
        network.load_state_dict(load_file(args.init))
    network = network.to(memory_format=torch.channels_last)
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
    return {
        "photos": len(pairs.given),
        "CPU minutes": args.minutes,
        "steps": f"{box.step} of {args.batch} crops of {args.crop}x{args.crop}, {PLAIN:.0%} of the time without the "
        "discriminator",
    }


if __name__ == "__main__":
    main()
