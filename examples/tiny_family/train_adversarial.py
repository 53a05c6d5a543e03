"""Finetune a base for few steps without guidance, against a discriminator that sees real photos' latents.

    python examples/tiny_family/train_adversarial.py PHOTOS --base base --start distilled --out few --minutes 10

BASE is the OUT of `train_base.py`, START that of `distill_guidance.py`. The generator is START's UNet: x0-hat from
each of FEW_STEPS' noise levels, noised anew for the next one, as the sampler does it. A pool of pictures goes through
these levels, one a training step, so that each level is trained on what the sampler makes before it, at no further
cost.
The discriminator has a logit at each position of latents noised at random: small convolutions on the frozen UNet's
features (LADD, Sauer et al. 2024, arXiv:2403.12015) and on the latents themselves. Hinge losses. Each step's features
serve both sides, so a step costs two and a half times one of `train_base.py`.
A part of each batch goes on with the diffusion loss on photos, so that the UNet stays a base for any number of steps.
Contrasts drift within minutes: look at each sheet, stop early, and mix the weights with the base's (`--mix`), which
keeps the sharpness and loses the drift.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from distill_guidance import Pool, stage_parser
from timebox import RANK, TimeBox
from torch import nn
from train_base import (
    FEW_STEPS,
    TrainingSet,
    add_noise,
    build_scheduler,
    diffusion_loss,
    draw_timesteps,
    export,
    pipeline,
    prepare,
    sample_sheet,
)

from bolid.method.losses import x0_from_prediction
from bolid.train_adapter.precision import computing


def head(width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(16, width),
        nn.Conv2d(width, 64, 3, stride=stride, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 1, 1),
    )


class Discriminator(nn.Module):
    """Logits of noisy latents [B, C, h, w]: of the latents' neighbourhoods, and of a frozen UNet's features."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        channels, widths = unet.config.in_channels, list(unet.config.block_out_channels)
        inner = [*widths, widths[-1], *reversed(widths[-2:])]  # down blocks, the middle, the two lowest up blocks
        self.heads = nn.ModuleList(head(width) for width in inner)
        self.near = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
        self.far = nn.Sequential(nn.SiLU(), nn.Conv2d(64, 128, 4, stride=2, padding=1))
        self.local = nn.ModuleList([head(64), head(128, stride=2)])
        self.frozen = [copy.deepcopy(unet).eval().requires_grad_(False)]  # in a list: it belongs to no checkpoint

    def features(self, x: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The noisy latents themselves, then the frozen UNet's features of them."""
        unet = self.frozen[0]
        embedding = unet.time_embedding(unet.get_time_embed(x, t))
        found, y = [x], unet.conv_in(x)
        skips = [y]
        for block in unet.down_blocks:
            y, residuals = (
                block(hidden_states=y, temb=embedding, encoder_hidden_states=hidden)
                if hasattr(block, "attentions")
                else block(hidden_states=y, temb=embedding)
            )
            found.append(residuals[0])  # before the level is halved
            skips += residuals
        y = unet.mid_block(y, embedding, encoder_hidden_states=hidden)
        found.append(y)
        for block in unet.up_blocks[:2]:
            taken = skips[-len(block.resnets) :]
            skips = skips[: -len(taken)]
            y = block(
                hidden_states=y, res_hidden_states_tuple=tuple(taken), temb=embedding, encoder_hidden_states=hidden
            )
            found.append(y)
        return found

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits [B, 1, h, w] of each head."""
        near = self.near(features[0])
        local = [self.local[0](near), self.local[1](self.far(near))]
        inner = [head(feature) for head, feature in zip(self.heads, features[1:], strict=True)]
        return [logits.float() for logits in (*local, *inner)]


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean over a head's positions [B, 1, h, w], as much as `weights` [B, 1, H, W] have there."""
    weights = F.adaptive_avg_pool2d(weights, values.shape[2:])
    return (weights * values).sum() / weights.sum()


class AdversarialStep:
    """One step of the generator and one of the discriminator."""

    def __init__(self, text: nn.Module, unet: nn.Module, args: argparse.Namespace) -> None:
        self.text, self.unet, self.args = text, unet, args
        self.discriminator = Discriminator(unet).to(args.device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=args.discriminator_lr, betas=(0.5, 0.98))
        self.alphas = build_scheduler().alphas_cumprod.to(args.device)
        self.levels = torch.tensor(FEW_STEPS, device=args.device)

    def generate(self, pool: Pool, hidden: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x0-hat [B, C, h, w] of the pool's pictures, each noised to its level; and how far the means over 4x4
        positions are from what the base made of them: without that, contrasts grow."""
        t = self.levels[pool.level]
        noisy = add_noise(pool.x0, noise, t, self.alphas)
        a = self.alphas[t].view(-1, 1, 1, 1)
        v = self.unet(noisy, t, hidden).sample.float()
        with torch.no_grad():
            v_of_base = self.discriminator.frozen[0](noisy, t, hidden).sample.float()
        drift = F.avg_pool2d((1 - a).sqrt() * (v - v_of_base), 4).pow(2).mean()
        return x0_from_prediction(v, noisy, a, "v_prediction"), drift

    def __call__(self, pool: Pool, data: TrainingSet, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Losses; "loss" is the generator's. The discriminator has made its step."""
        args, count = self.args, len(pool.level)
        generator = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        real, weights, tokens = data.draw(rng, count)
        noises = torch.randn(3, *real.shape, generator=generator, device=args.device)
        low = torch.from_numpy(rng.integers(10, 350, count)).to(args.device)  # where details stand out from the noise
        with computing(args.device):
            with torch.no_grad():
                hidden, real_hidden = self.text(pool.tokens)[0], self.text(tokens)[0]
                of_real = self.discriminator.features(add_noise(real, noises[2], low, self.alphas), low, real_hidden)
            made, drift = self.generate(pool, hidden, noises[0])
            of_made = self.discriminator.features(add_noise(made, noises[1], low, self.alphas), low, hidden)
            losses = self.discriminate(of_real, [feature.detach() for feature in of_made], weights, pool.weights)
            self.discriminator.requires_grad_(False)
            logits = self.discriminator(of_made)
            adversarial = -torch.stack([weighted_mean(each, pool.weights) for each in logits]).mean()
            self.discriminator.requires_grad_(True)
            part = slice(0, max(1, int(count * args.diffusion)))
            t = torch.from_numpy(draw_timesteps(rng, count)).to(args.device)[part]
            diffusion, _ = diffusion_loss(
                self.unet, real_hidden[part], real[part], t, noises[0][part], weights[part], self.alphas
            )
        pool.advance(made, rng)
        return losses | {
            "loss": args.weight * adversarial + diffusion + args.drift_weight * drift,
            "diffusion": diffusion,
            "drift": drift,
        }

    def discriminate(
        self, real: list[torch.Tensor], made: list[torch.Tensor], *weights: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """A step of the discriminator, on features of real and made pictures; `weights` [B, 1, h, w] say what their
        positions count. Its accuracy near a position, and over all heads."""
        on_real, on_made = self.discriminator(real), self.discriminator(made)
        hinges = [
            weighted_mean(F.relu(1 - a), weights[0]) + weighted_mean(F.relu(1 + b), weights[1])
            for a, b in zip(on_real, on_made, strict=True)
        ]
        hinge = torch.stack(hinges).mean()
        self.optimizer.zero_grad(set_to_none=True)
        hinge.backward()
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        self.optimizer.step()

        def accuracy(real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            right = weighted_mean((real > 0).float(), weights[0]), weighted_mean((made < 0).float(), weights[1])
            return torch.stack(right).mean()

        every = torch.stack([accuracy(a, b) for a, b in zip(on_real, on_made, strict=True)])
        return {"hinge": hinge, "accuracy": every.mean(), "near": every[0], "far": every[1]}


def options() -> argparse.Namespace:
    parser = stage_parser(__doc__)
    parser.set_defaults(lr=4e-5, sheet_minutes=3.0)
    parser.add_argument("--start", type=Path, help="a folder with the export to begin with; by default BASE")
    parser.add_argument("--discriminator-lr", type=float, default=1e-3)
    parser.add_argument("--weight", type=float, default=0.1, help="of the adversarial loss; the diffusion loss's is 1")
    parser.add_argument(
        "--drift-weight", type=float, default=3.0, help="weight of the drift of the picture's coarse values"
    )
    parser.add_argument("--diffusion", type=float, default=0.34, help="fraction of the batch with the diffusion loss")
    parser.add_argument("--mix", type=float, default=0.5, help="exported: the base's weights + this * what was learnt")
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained((args.start or args.base) / "export", torch_dtype=torch.float32)
    vae: AutoencoderTiny = pipe.vae.eval().to(args.device, memory_format=torch.channels_last)
    text, unet = pipe.text_encoder.eval().requires_grad_(False).to(args.device), pipe.unet.train().to(args.device)
    unet.to(memory_format=torch.channels_last)
    data, tokenizer = prepare(args, vae, args.base)
    step = AdversarialStep(text, unet, args)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(0.5, 0.98), weight_decay=0.01, fused=True)
    box = TimeBox(
        {"unet": unet},
        optimizer,
        args.out,
        minutes=args.minutes,
        device=args.device,
        flat=0.5,
        warmup=40,
        decay=args.decay,
        seed=args.seed,
        others={"discriminator": step.discriminator, "discriminator_optimizer": step.optimizer},
    )

    def save() -> None:
        box.save()
        average = copy.deepcopy(step.discriminator.frozen[0])
        with torch.no_grad():
            for ours, made in zip(average.parameters(), box.average["unet"].parameters(), strict=True):
                ours.lerp_(made, args.mix)
        sample_sheet(pipeline(vae, text, average, tokenizer), args.out / f"sheet-{box.step:06d}.png")
        export(vae, text, average, tokenizer, args.out / "export")

    pool = Pool(data, args.batch, box.rng())
    while box.running():
        losses = step(pool, data, box.rng())
        box.update(losses.pop("loss"), **losses)
        if box.due("line", minutes=1):
            print(box.line(samples=box.step * args.batch), flush=True)
        if box.due("sheet", minutes=args.sheet_minutes):
            save()
    if RANK == 0:
        save()
        print(box.line(), flush=True)


if __name__ == "__main__":
    main()
