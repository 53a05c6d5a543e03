"""Finetune a base for few steps without guidance, against a discriminator that sees real photos' latents.

    python examples/tiny_family/train_adversarial.py PHOTOS --base base --out base-few --minutes 15

BASE is the OUT of `train_base.py`. The generator is its UNet: x0-hat from each of FEW_STEPS' noise levels, noised anew
for the next one, as the sampler does it. A pool of pictures goes through these levels, one a training step, so that
each level is trained on what the sampler makes before it, at no further cost.
The discriminator is a copy of the UNet's down path and middle, trained on, with a logit at each position of each level,
of latents noised at random (LADD, Sauer et al. 2024, arXiv:2403.12015). Hinge losses; in place of the R1 penalty its
approximation by a difference (APT, Lin et al. 2025, arXiv:2501.08316): equal logits for latents that hardly differ.
A part of each batch goes on with the diffusion loss on photos, so that the UNet stays a base for any number of steps.
Stop when the discriminator is at chance (accuracy near 0.5): from there on pictures only grow harder.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from timebox import RANK, TimeBox
from torch import nn
from train_base import (
    FEW_STEPS,
    TrainingSet,
    build_scheduler,
    diffusion_loss,
    draw_timesteps,
    export,
    pipeline,
    prepare,
    sample_sheet,
)

from bolid.train_adapter.precision import computing


class Discriminator(nn.Module):
    """Logits of noisy latents [B, C, h, w] with their texts: [B, positions], of all levels of resolution."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet)
        self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out = nn.ModuleList(), None, None
        widths = [*unet.config.block_out_channels, unet.config.block_out_channels[-1]]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(16, width), nn.SiLU(), nn.Conv2d(width, 1, 1)) for width in widths
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        embedding = self.unet.time_embedding(self.unet.get_time_embed(x, t))
        x, logits = self.unet.conv_in(x), []
        for block, head in zip(self.unet.down_blocks, self.heads, strict=False):
            x, residuals = block(hidden_states=x, temb=embedding, encoder_hidden_states=hidden)
            logits.append(head(residuals[0]).flatten(1))  # before the level is halved
        x = self.unet.mid_block(x, embedding, encoder_hidden_states=hidden)
        return torch.cat([*logits, self.heads[-1](x).flatten(1)], 1).float()


class Pool:
    """Pictures on their way through the sampler's levels: x0-hat so far, level, tokens."""

    def __init__(self, data: TrainingSet, count: int, rng: np.random.Generator) -> None:
        self.data = data
        self.x0, _, self.tokens = data.draw(rng, count)
        self.level = torch.arange(count, device=self.x0.device) % len(FEW_STEPS)

    def advance(self, made: torch.Tensor, rng: np.random.Generator) -> None:
        """Each picture goes on to the next level; after the last one, another begins from noise."""
        self.x0, self.level = made.detach(), self.level + 1
        done = self.level == len(FEW_STEPS)
        _, _, tokens = self.data.draw(rng, len(done))
        self.tokens = torch.where(done[:, None], tokens, self.tokens)
        self.level = torch.where(done, 0, self.level)  # at the first level the picture's part is 0


class AdversarialStep:
    """One step of the generator and one of the discriminator."""

    def __init__(self, text: nn.Module, unet: nn.Module, args: argparse.Namespace) -> None:
        self.text, self.unet, self.args = text, unet, args
        self.discriminator = Discriminator(unet).to(args.device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=args.discriminator_lr, betas=(0.5, 0.98))
        self.alphas = build_scheduler().alphas_cumprod.to(args.device)
        self.levels = torch.tensor(FEW_STEPS, device=args.device)

    def noised(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def generate(self, pool: Pool, hidden: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x0-hat [B, C, h, w] of the pool's pictures, each noised to its level."""
        t = self.levels[pool.level]
        noisy = self.noised(pool.x0, t, noise)
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * noisy - (1 - a).sqrt() * self.unet(noisy, t, hidden).sample.float()

    def __call__(self, pool: Pool, data: TrainingSet, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Losses; "loss" is the generator's. The discriminator has made its step."""
        args, count = self.args, len(pool.level)
        generator = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        real, weights, tokens = data.draw(rng, count)
        noises = torch.randn(3, *real.shape, generator=generator, device=args.device)
        low = torch.from_numpy(rng.integers(20, 600, count)).to(args.device)  # where details are told from noise
        with computing(args.device):
            with torch.no_grad():
                hidden, real_hidden = self.text(pool.tokens)[0], self.text(tokens)[0]
            made = self.generate(pool, hidden, noises[0])
            noisy_made = self.noised(made, low, noises[1])
            losses = self.discriminate(
                self.noised(real, low, noises[2]), noisy_made.detach(), low, real_hidden, hidden, generator
            )
            adversarial = -self.discriminator(noisy_made, low, hidden).mean()
            part = slice(0, max(1, int(count * args.diffusion)))
            t = torch.from_numpy(draw_timesteps(rng, count)).to(args.device)[part]
            diffusion, _ = diffusion_loss(
                self.unet, real_hidden[part], real[part], t, noises[0][part], weights[part], self.alphas
            )
        pool.advance(made, rng)
        return losses | {"loss": args.weight * adversarial + diffusion, "diffusion": diffusion}

    def discriminate(self, real, made, t, real_hidden, hidden, generator) -> dict[str, torch.Tensor]:
        both, texts = torch.cat([real, made]), torch.cat([real_hidden, hidden])
        logits = self.discriminator(both, t.repeat(2), texts)
        moved = both + self.args.smooth_sigma * torch.randn(both.shape, generator=generator, device=both.device)
        smooth = (self.discriminator(moved, t.repeat(2), texts) - logits).pow(2).mean()
        on_real, on_made = logits.chunk(2)
        hinge = F.relu(1 - on_real).mean() + F.relu(1 + on_made).mean()
        self.optimizer.zero_grad(set_to_none=True)
        (hinge + self.args.smooth * smooth).backward()
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        self.optimizer.step()
        accuracy = ((on_real.mean(1) > 0).float().mean() + (on_made.mean(1) < 0).float().mean()) / 2
        return {"hinge": hinge, "accuracy": accuracy, "smooth": smooth}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="OUT of train_base.py, with its export and latents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--limit", type=int, default=40000)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--discriminator-lr", type=float, default=1e-4)
    parser.add_argument("--weight", type=float, default=0.1, help="of the adversarial loss; the diffusion loss's is 1")
    parser.add_argument("--diffusion", type=float, default=0.34, help="fraction of the batch with the diffusion loss")
    parser.add_argument("--smooth", type=float, default=50.0, help="weight of the approximate R1 penalty")
    parser.add_argument("--smooth-sigma", type=float, default=0.05, help="how far latents are moved for it")
    parser.add_argument("--decay", type=float, default=0.99, help="of the moving average")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.init = None
    return args


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(args.base / "export", torch_dtype=torch.float32)
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
        decay=args.decay,
        seed=args.seed,
        others={"discriminator": step.discriminator, "discriminator_optimizer": step.optimizer},
    )

    def save() -> None:
        box.save()
        average = box.average["unet"]
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
