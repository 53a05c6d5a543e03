"""Distil classifier-free guidance into a base: guided pictures by one pass a step instead of two.

    python examples/tiny_family/distill_guidance.py PHOTOS --base base --out distilled --minutes 6

BASE is the OUT of `train_base.py`. The student begins as its UNet and learns the frozen UNet's guided prediction, v of
the empty caption + W * (v of the caption - v of the empty one), at every noise level (Meng et al. 2023,
arXiv:2210.03142, the first stage, one weight W). Half of each batch are noised photos. The other half come
from a pool of pictures that goes through the few-step sampler, one level of FEW_STEPS a training step: so each level
is trained on the student's own output of the level before. Dropped captions keep the base's own prediction.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from timebox import TimeBox
from torch import nn
from train_base import (
    FEW_STEPS,
    TrainingSet,
    add_noise,
    build_scheduler,
    draw_timesteps,
    export,
    pipeline,
    prepare,
    sample_sheet,
)

from bolid.method.losses import x0_from_prediction
from bolid.train_adapter.precision import computing


class Pool:
    """Pictures on their way through the sampler's levels: x0-hat so far, level, and the photos whose captions they have
    (their people stand about there)."""

    def __init__(self, data: TrainingSet, count: int, rng: np.random.Generator) -> None:
        self.data, self.photos = data, data.draw(rng, count)
        self.x0 = self.photos.x0
        self.level = torch.arange(count, device=self.x0.device) % len(FEW_STEPS)

    def advance(self, made: torch.Tensor, rng: np.random.Generator) -> None:
        """Each picture goes on to the next level; after the last one, another begins from noise."""
        self.x0, self.level = made.detach(), self.level + 1
        done = self.level == len(FEW_STEPS)
        self.photos = self.data.draw(rng, len(done)).where(done, self.photos)
        self.level = torch.where(done, 0, self.level)  # at the first level the picture's part is 0


class Distillation:
    """The loss of one step. `empty`: tokens [TOKENS] of the empty caption."""

    def __init__(self, text: nn.Module, teacher: nn.Module, empty: torch.Tensor, weight: float, device: str) -> None:
        self.text, self.teacher, self.empty, self.weight = text, teacher, empty, weight
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.levels = torch.tensor(FEW_STEPS, device=device)

    @torch.no_grad()
    def target(self, noisy: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The teacher's guided v [B, C, h, w]."""
        without = self.text(self.empty[None])[0].expand(len(t), -1, -1)
        both = self.teacher(torch.cat([noisy, noisy]), torch.cat([t, t]), torch.cat([without, hidden])).sample.float()
        v_without, v = both.chunk(2)
        return v_without + self.weight * (v - v_without)

    def __call__(self, student: nn.Module, pool: Pool, data: TrainingSet, rng: np.random.Generator) -> torch.Tensor:
        photos, of_pool = data.draw(rng, len(pool.level)), pool.photos
        x0, weights = torch.cat([photos.x0, pool.x0]), torch.cat([photos.weights, of_pool.weights])
        tokens = torch.cat([photos.tokens, of_pool.tokens])
        t = torch.from_numpy(draw_timesteps(rng, len(photos.x0))).to(x0.device)
        t = torch.cat([t, self.levels[pool.level]])
        generator = torch.Generator(x0.device).manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        noisy = add_noise(x0, noise, t, self.alphas)
        with computing(x0.device):
            with torch.no_grad():
                hidden = self.text(tokens)[0]
            target = self.target(noisy, t, hidden)
            v = student(noisy, t, hidden).sample.float()
        made = x0_from_prediction(v, noisy, self.alphas[t], "v_prediction")
        pool.advance(made[len(photos.x0) :], rng)
        return (weights * (v - target).square()).mean()


def stage_parser(description: str) -> argparse.ArgumentParser:
    """The options of a stage after `train_base.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(init=None)  # the tokenizer is BASE's
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--base", type=Path, required=True, help="OUT of train_base.py, with its export and latents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--limit", type=int, default=40000, help="photos of each folder at most")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--decay", type=float, default=0.99, help="of the moving average")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet-minutes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def options() -> argparse.Namespace:
    parser = stage_parser(__doc__)
    parser.set_defaults(minutes=6.0, sheet_minutes=5.0)
    parser.add_argument("--weight", type=float, default=3.0, help="W of the guidance that is learnt")
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(args.base / "export", torch_dtype=torch.float32)
    teacher = copy.deepcopy(pipe.unet)
    vae: AutoencoderTiny = pipe.vae.eval().to(args.device, memory_format=torch.channels_last)
    text = pipe.text_encoder.eval().requires_grad_(False).to(args.device)
    student = pipe.unet.train().to(args.device, memory_format=torch.channels_last)
    teacher.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)
    data, tokenizer = prepare(args, vae, args.base)
    step = Distillation(text, teacher, data.tokens[0], args.weight, args.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    box = TimeBox(
        {"unet": student}, optimizer, args.out, minutes=args.minutes, device=args.device, flat=0.5, warmup=20,
        decay=args.decay, seed=args.seed,
    )  # fmt: skip

    def save() -> None:
        box.save()
        unet = box.average["unet"]
        sample_sheet(pipeline(vae, text, unet, tokenizer), args.out / f"sheet-{box.step:06d}.png")
        export(vae, text, unet, tokenizer, args.out / "export")

    pool = Pool(data, args.batch // 2, box.rng())
    while box.running():
        loss = step(student, pool, data, box.rng())
        box.update(loss, squared_error=loss)
        if box.due("line", minutes=1):
            print(box.line(samples=box.step * args.batch), flush=True)
        if box.due("sheet", minutes=args.sheet_minutes):
            save()
    save()
    print(box.line(samples=box.step * args.batch), flush=True)


if __name__ == "__main__":
    main()
