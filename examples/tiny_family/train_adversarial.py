"""Finetune a base for few steps without guidance, against a discriminator that sees real photos' latents.

    python examples/tiny_family/train_adversarial.py PHOTOS --base base --start distilled --out few --minutes 25
    python examples/tiny_family/train_adversarial.py PHOTOS --base base --start few --out base-for-branches \
        --train train/ --adapter adapter/

BASE is the OUT of `train_base.py`, START that of `distill_guidance.py`. The generator is START's UNet: x0-hat from
each of FEW_STEPS' noise levels, noised anew for the next one, as the sampler does it. A pool of pictures goes through
these levels, one a training step, so that each level is trained on what the sampler makes before it, at no further
cost.
The discriminator has a logit at each position of latents noised at random: small convolutions on the latents, and on
the features of a copy of the UNet's first half, which learns too (SDXL-Lightning, Lin et al. 2024, arXiv:2402.13929,
section 3.2). Hinge losses. A part of each batch goes on with the diffusion loss on photos, so that the UNet stays a
base for any number of steps.
With --adapter, the face and the body branch are in the UNet and in the discriminator in PEOPLE of the steps, frozen,
with vectors of the photos' people: so the base learns to draw well under them, too. The people are those of the
training shards.
Contrasts drift in time: look at each sheet. `--mix` below 1 exports weights between START's and what was learnt.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from distill_guidance import Pool, stage_parser
from timebox import RANK, WORLD, TimeBox, average_gradients
from torch import distributed, nn
from train_base import (
    FEW_STEPS,
    Photos,
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
from truth import read_truth

from bolid.backends.body import BodyEncoder
from bolid.formats.adapter import load_adapter, nested_state_dict
from bolid.method.body_condition import BRANCHES, install
from bolid.method.losses import x0_from_prediction
from bolid.models.families import get_family
from bolid.train_adapter.data import AdapterTable, fuse_context, read_table
from bolid.train_adapter.precision import computing

VECTORS = 4  # of each person and branch, each from other photos


@dataclass
class Given:
    """What the UNet is given, a row for each picture."""

    text: torch.Tensor  # [B, L, E]
    person: list[torch.Tensor]  # a face [B, 1, 512] and a body [B, 1, D], where the branches are installed

    @property
    def added(self) -> dict[str, list[torch.Tensor]]:
        """As diffusers' UNets take it."""
        return {"image_embeds": self.person}

    def at(self, part: slice) -> Given:
        """Of a part of the pictures."""
        return Given(self.text[part], [vectors[part] for vectors in self.person])


def predict(unet: nn.Module, noisy: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
    """v [B, C, h, w]."""
    return unet(noisy, t, given.text, added_cond_kwargs=given.added).sample.float()


# ---- the discriminator --------------------------------------------------------------------------------------------


def head(width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(16, width),
        nn.Conv2d(width, 64, 3, stride=stride, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 1, 1),
    )


class Discriminator(nn.Module):
    """Logits of noisy latents [B, C, h, w]: of the latents' neighbourhoods, and of the features of a copy of the UNet's
    first half, at each of its levels."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        channels, widths = unet.config.in_channels, list(unet.config.block_out_channels)
        self.frozen = [copy.deepcopy(unet).eval().requires_grad_(False)]  # in a list: it belongs to no checkpoint
        self.unet = copy.deepcopy(unet).train().requires_grad_(True)
        self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out = nn.ModuleList(), None, None
        self.heads = nn.ModuleList(head(width) for width in [*widths, widths[-1]])  # down blocks, the middle
        self.near = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
        self.far = nn.Sequential(nn.SiLU(), nn.Conv2d(64, 128, 4, stride=2, padding=1))
        self.local = nn.ModuleList([head(64), head(128, stride=2)])

    @property
    def base(self) -> nn.Module:
        """The UNet as it was."""
        return self.frozen[0]

    def features(self, x: torch.Tensor, t: torch.Tensor, given: Given) -> list[torch.Tensor]:
        """Of each level and the middle."""
        unet = self.unet
        hidden = unet.process_encoder_hidden_states(given.text, given.added)
        embedding = unet.time_embedding(unet.get_time_embed(x, t))
        found, y = [], unet.conv_in(x)
        for block in unet.down_blocks:
            y, residuals = (
                block(hidden_states=y, temb=embedding, encoder_hidden_states=hidden)
                if hasattr(block, "attentions")
                else block(hidden_states=y, temb=embedding)
            )
            found.append(residuals[0])  # before the level is halved
        return [*found, unet.mid_block(y, embedding, encoder_hidden_states=hidden)]

    def forward(self, x: torch.Tensor, t: torch.Tensor, given: Given) -> list[torch.Tensor]:
        """Logits [B, 1, h, w] of each head."""
        near = self.near(x)
        local = [self.local[0](near), self.local[1](self.far(near))]
        inner = [head(feature) for head, feature in zip(self.heads, self.features(x, t, given), strict=True)]
        return [logits.float() for logits in (*local, *inner)]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For an optimizer: the UNet's copy learns at a tenth of the rate."""
        new = [p for name, p in self.named_parameters() if not name.startswith("unet.")]
        return [{"params": list(self.unet.parameters()), "lr": lr / 10}, {"params": new, "lr": lr}]


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean over a head's positions [B, 1, h, w], as much as `weights` [B, 1, H, W] have there."""
    weights = F.adaptive_avg_pool2d(weights, values.shape[2:])
    return (weights * values).sum() / weights.sum()


class AdversarialStep:
    """One step of the generator and one of the discriminator."""

    def __init__(self, text: nn.Module, unet: nn.Module, args: argparse.Namespace) -> None:
        self.text, self.unet, self.args = text, unet, args
        self.discriminator = Discriminator(unet).to(args.device)
        groups = self.discriminator.parameter_groups(args.discriminator_lr)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.0, 0.98))
        self.alphas = build_scheduler().alphas_cumprod.to(args.device)
        self.levels = torch.tensor(FEW_STEPS, device=args.device)

    @torch.no_grad()
    def given(self, photos: Photos) -> Given:
        """Their captions' text states and their people."""
        return Given(self.text(photos.tokens)[0], photos.person)

    def generate(self, pool: Pool, given: Given, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x0-hat [B, C, h, w] of the pool's pictures, each noised to its level; and how far the means over 4x4
        positions are from what the base made of them: without that, contrasts grow."""
        t = self.levels[pool.level]
        noisy = add_noise(pool.x0, noise, t, self.alphas)
        a = self.alphas[t].view(-1, 1, 1, 1)
        v = predict(self.unet, noisy, t, given)
        with torch.no_grad():
            v_of_base = predict(self.discriminator.base, noisy, t, given)
        drift = F.avg_pool2d((1 - a).sqrt() * (v - v_of_base), 4).pow(2).mean()
        return x0_from_prediction(v, noisy, a, "v_prediction"), drift

    def __call__(self, pool: Pool, data: TrainingSet, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Losses; "loss" is the generator's. The discriminator has made its step."""
        args, count, discriminator = self.args, len(pool.level), self.discriminator
        generator = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        photos = data.draw(rng, count)
        noises = torch.randn(3, *photos.x0.shape, generator=generator, device=args.device)
        low = torch.from_numpy(rng.integers(10, 350, count)).to(args.device)  # where details stand out from the noise
        with computing(args.device):
            of_pool, of_photos = self.given(pool.photos), self.given(photos)
            made, drift = self.generate(pool, of_pool, noises[0])
            noisy = add_noise(made, noises[1], low, self.alphas)
            on_real = discriminator(add_noise(photos.x0, noises[2], low, self.alphas), low, of_photos)
            on_made = discriminator(noisy.detach(), low, of_pool)
            losses = self.discriminate(on_real, on_made, photos.weights, pool.photos.weights)
            discriminator.requires_grad_(False)
            logits = discriminator(noisy, low, of_pool)
            adversarial = -torch.stack([weighted_mean(each, pool.photos.weights) for each in logits]).mean()
            discriminator.requires_grad_(True)
            part = slice(0, max(1, int(count * args.diffusion)))
            t, given = torch.from_numpy(draw_timesteps(rng, count)).to(args.device)[part], of_photos.at(part)
            diffusion, _ = diffusion_loss(
                self.unet, given.text, photos.x0[part], t, noises[0][part], photos.weights[part], self.alphas,
                given.added,
            )  # fmt: skip
        pool.advance(made, rng)
        return losses | {
            "loss": args.weight * adversarial + diffusion + args.drift_weight * drift,
            "diffusion": diffusion,
            "drift": drift,
        }

    def discriminate(
        self, on_real: list[torch.Tensor], on_made: list[torch.Tensor], *weights: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """A step of the discriminator by its logits of real and made pictures; `weights` [B, 1, h, w] say what their
        positions count. Its accuracy near a position, and over all heads."""
        hinges = [
            weighted_mean(F.relu(1 - a), weights[0]) + weighted_mean(F.relu(1 + b), weights[1])
            for a, b in zip(on_real, on_made, strict=True)
        ]
        hinge = torch.stack(hinges).mean()
        self.optimizer.zero_grad(set_to_none=True)
        hinge.backward()
        parameters = list(self.discriminator.parameters())
        if WORLD > 1:
            average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()

        def accuracy(real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            right = weighted_mean((real > 0).float(), weights[0]), weighted_mean((made < 0).float(), weights[1])
            return torch.stack(right).mean()

        every = torch.stack([accuracy(a, b) for a, b in zip(on_real, on_made, strict=True)])
        return {"hinge": hinge, "accuracy": every.mean(), "near": every[0], "far": every[1]}


# ---- the branches -------------------------------------------------------------------------------------------------


def person_vectors(table: AdapterTable, photos: list[dict[str, Any]], rng: np.random.Generator) -> list[torch.Tensor]:
    """For each photo VECTORS faces [N, K, 512] and bodies [N, K, D] of its person, each of some of the person's photos;
    zeros for people whom the table does not hold."""
    faces, bodies = (torch.zeros(len(table.names), VECTORS, t.shape[1]) for t in (table.face, table.body_mean))
    for person, rows in enumerate(table.people):
        for k in range(VECTORS):
            chosen = torch.from_numpy(rng.permutation(rows)[: rng.integers(1, len(rows) + 1)])[None]
            mean, _, face = fuse_context(table, chosen, torch.ones_like(chosen, dtype=torch.bool))
            bodies[person, k], faces[person, k] = mean[0], face[0]
    place = {name: i for i, name in enumerate(table.names)}
    owner = [place.get(photo["path"].parent.name, -1) for photo in photos]
    known = torch.tensor(owner) >= 0
    return [known[:, None, None] * vectors[owner] for vectors in (faces, bodies)]


def install_branches(unet: UNet2DConditionModel, adapter: Path) -> None:
    """Put an adapter's two branches into `unet`, frozen."""
    states = []
    for branch in BRANCHES:
        tensors, _ = load_adapter(adapter / f"{branch}.safetensors", branch)
        states.append(nested_state_dict({name: value.float() for name, value in tensors.items()}))
    for parameters in install(unet, states):
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def use_branches(unet: nn.Module, on: bool) -> None:
    """Whether the branches that are installed take part."""
    for name, processor in unet.attn_processors.items():
        if not name.endswith("attn1.processor"):
            processor.scale = [float(on)] * len(BRANCHES)


def with_people(data: TrainingSet, photos: list[dict[str, Any]], args: argparse.Namespace) -> list[TrainingSet]:
    """Every photo, with zeros for people; and the photos of the people of the training shards, with their vectors."""
    table = read_table(args.train, BodyEncoder(get_family("tiny").require("body_encoder")))
    vectors = [v.to(args.device) for v in person_vectors(table, photos, np.random.default_rng(args.seed))]
    known = vectors[1].flatten(1).any(1).cpu().numpy() * data.probabilities
    return [
        dataclasses.replace(data, person=[torch.zeros_like(v) for v in vectors]),
        dataclasses.replace(data, person=vectors, probabilities=known / known.sum()),
    ]


# ---- the training -------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = stage_parser(__doc__)
    parser.set_defaults(lr=7e-5, minutes=25.0, sheet_minutes=5.0)
    parser.add_argument("--start", type=Path, help="a folder with the export to begin with; by default BASE")
    parser.add_argument("--discriminator-lr", type=float, default=1e-3)
    parser.add_argument("--weight", type=float, default=0.1, help="of the adversarial loss; the diffusion loss's is 1")
    parser.add_argument(
        "--drift-weight", type=float, default=3.0, help="weight of the drift of the picture's coarse values"
    )
    parser.add_argument("--diffusion", type=float, default=0.34, help="fraction of the batch with the diffusion loss")
    parser.add_argument("--mix", type=float, default=1.0, help="exported: START's weights + this * what was learnt")
    parser.add_argument("--adapter", type=Path, help="folder of two branches that take part")
    parser.add_argument("--train", type=Path, help="training shards of their people")
    parser.add_argument("--people", type=float, default=0.6, help="fraction of the steps with branches")
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if WORLD > 1:
        distributed.init_process_group("gloo")
    pipe = StableDiffusionPipeline.from_pretrained((args.start or args.base) / "export", torch_dtype=torch.float32)
    vae: AutoencoderTiny = pipe.vae.eval().to(args.device, memory_format=torch.channels_last)
    text, unet = pipe.text_encoder.eval().requires_grad_(False).to(args.device), pipe.unet.train().to(args.device)
    unet.to(memory_format=torch.channels_last)
    start = copy.deepcopy(unet)
    data, tokenizer = prepare(args, vae, args.base)
    sets = [data]
    if args.adapter:
        install_branches(unet, args.adapter)
        photos = [row for folder in args.photos for row in read_truth(folder)[: args.limit]]
        sets = with_people(data, photos, args)
    step = AdversarialStep(text, unet, args)
    learning = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.lr, betas=(0.5, 0.98), weight_decay=0.01, fused=True)
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
        average, learnt = copy.deepcopy(start), box.average["unet"].state_dict()
        with torch.no_grad():
            for name, ours in average.state_dict().items():
                ours.lerp_(learnt[name], args.mix)
        sample_sheet(pipeline(vae, text, average, tokenizer), args.out / f"sheet-{box.step:06d}.png")
        export(vae, text, average, tokenizer, args.out / "export")

    pools = [Pool(each, args.batch, box.rng()) for each in sets]
    while box.running():
        which = len(sets) - 1 if np.random.default_rng([args.seed, box.step]).random() < args.people else 0
        if args.adapter:
            for network in (unet, step.discriminator.unet, step.discriminator.base):
                use_branches(network, which == 1)
        losses = step(pools[which], sets[which], box.rng())
        box.update(losses.pop("loss"), **losses)
        if box.due("line", minutes=1):
            print(box.line(samples=box.step * args.batch * WORLD), flush=True)
        if box.due("sheet", minutes=args.sheet_minutes):
            save()
    if RANK == 0:
        save()
        print(box.line(), flush=True)


if __name__ == "__main__":
    main()
