"""The two baselines that come before BoLID: IP-Adapter on CLIP image embeddings, trained as BoLID's adapters are.

    python examples/experiment/baselines.py ip-adapter train/ --out runs/baselines/ip-adapter
    python examples/experiment/baselines.py ip-adapter-attention train/ --out runs/baselines/ip-adapter-attention

`train/` is what `bolid shard` writes. The same base, shards, steps, batches, learning rate, drop-out and leave-one-out
as `bolid train-adapter`, with its functions and defaults; only the condition differs. After a kill, the same command
goes on where it stopped.

ip-adapter: the image embedding of one photo (Ye et al., arXiv:2308.06721; four tokens through one linear layer).
ip-adapter-attention: those of several photos, mixed by one self-attention layer and averaged (the authors' own earlier
method). The condition of both comes from *other* photos of the person than the target; the original IP-Adapter
is conditioned on the target itself, which teaches it to copy.

Shapes: B batch, M photos, E image embedding.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn

from bolid.backends.diffusion import decode_latents, load_base, quiet_diffusers
from bolid.backends.sampling import sample
from bolid.errors import BolidError
from bolid.formats.adapter import nested_state_dict
from bolid.formats.checkpoint import load_checkpoint, save_checkpoint
from bolid.formats.shards import directory_sha256, group_by_person, read_index, read_shards
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.generate import save_picture
from bolid.method import losses
from bolid.method.body_condition import (
    drop_condition,
    initial_state,
    install,
)
from bolid.method.optim import adapter_schedule, update_ema
from bolid.models.families import Family, get_family
from bolid.run import derive_seed, run_record
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import TextStates, batch_rows, without_build
from bolid.train_adapter.denoiser import training_schedule
from bolid.train_adapter.setup import base_sha256

METHODS = ("ip-adapter", "ip-adapter-attention")
KIND = "image-adapter"
FILE = "image.safetensors"
DEFAULTS = TrainAdapterConfig()


class PhotoAttention(nn.Module):
    """Image embeddings of a person's photos [B, M, E], `present` bool [B, M] -> one embedding [B, E].

    One layer of self-attention with a residual, averaged over the photos. It starts as the plain average, and the order
    of the photos does not matter.
    """

    def __init__(self, size: int, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, embeds: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        x = self.norm(embeds)
        mixed, _ = self.attention(x, x, x, key_padding_mask=~present, need_weights=False)
        weights = present.to(embeds) / present.sum(1, keepdim=True)
        return ((embeds + mixed) * weights[..., None]).sum(1)


# ---- training -----------------------------------------------------------------------------------------------------


class Table:
    """Latents, image embeddings and captions of the photos of people with two or more."""

    def __init__(self, train: Path) -> None:
        latents, embeds = [], []
        self.captions: list[str] = []
        self.people: list[np.ndarray] = []  # rows of each person
        for _, group in group_by_person(read_shards(train)):
            if len(group) < 2:
                continue
            if any("latents" not in part.tensors or "image_embed" not in part.tensors for part in group):
                raise BolidError(f"{train} holds no latents or no image embeddings", "give what `bolid shard` writes")
            self.people.append(np.arange(len(self.captions), len(self.captions) + len(group)))
            self.captions += [part.caption for part in group]
            latents += [torch.from_numpy(part.tensors["latents"]) for part in group]
            embeds += [torch.from_numpy(part.tensors["image_embed"]) for part in group]
        if not self.people:
            raise BolidError(f"nobody in {train} has two photos", "collect at least two of each person")
        self.latents, self.embeds = torch.stack(latents), torch.stack(embeds).float()
        self.owner = np.concatenate([np.full(len(rows), person) for person, rows in enumerate(self.people)])


def draw_context(
    table: Table, rows: np.ndarray, most: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row 1 to `most` *other* photos of its person: rows [B, most], and a mask of valid ones, bool."""
    context = torch.zeros(len(rows), most, dtype=torch.long)
    present = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, row in enumerate(rows):
        mates = table.people[table.owner[row]]
        others = mates[mates != row]
        count = int(torch.randint(1, min(most, len(others)) + 1, (1,), generator=generator))
        context[i, :count] = torch.from_numpy(others[torch.randperm(len(others), generator=generator)[:count].numpy()])
        present[i, :count] = True
    return context, present


def train_baseline(
    method: str, train: Path, out: Path, *, steps: int, batch_size: int, seed: int = 0, family: str | None = None
) -> Path:
    """Train one baseline and write out/image.safetensors. The same call after a kill goes on."""
    config = TrainAdapterConfig(steps=steps, batch_size=batch_size)
    chosen = get_family(family or read_index(train)["record"]["family"])
    table = Table(train)
    pipe = load_base(chosen, "cpu")
    unet = pipe.unet.to(memory_format=torch.channels_last)
    text_states = TextStates(pipe, table.captions)
    size = table.embeds.shape[1]
    (branch,) = install(unet, [initial_state(unet, "body", size, seed=derive_seed(seed, method))])
    torch.manual_seed(derive_seed(seed, method, "attention") % 2**63)
    attention = PhotoAttention(size) if method == "ip-adapter-attention" else None
    parameters = {**branch, **({f"attention.{n}": p for n, p in attention.named_parameters()} if attention else {})}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    inputs = {"train": directory_sha256(train), "base": base_sha256(chosen)}
    settings = {"method": method, "steps": steps, "batch_size": batch_size}
    record = run_record(KIND, family=chosen, config=settings, seed=seed, inputs=inputs)
    tensors = {**parameters, **{f"average.{name}": value for name, value in average.items()}}
    checkpoint = out / ".checkpoint.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    step = load_checkpoint(checkpoint, record, tensors, optimizer)
    schedule = training_schedule(pipe)
    usable = np.concatenate(table.people)
    saved = started = time.monotonic()
    recent = math.nan
    while step < steps:
        generator = torch.Generator().manual_seed(derive_seed(seed, method, step))
        rows = usable[batch_rows(len(usable), batch_size, step, seed)]
        most = 1 if attention is None else min(config.max_context, max(map(len, table.people)) - 1)
        context, present = draw_context(table, rows, most, generator)
        embeds = table.embeds[context]
        condition = embeds[:, 0] if attention is None else attention(embeds, present)
        dropped = torch.rand(4, batch_size, generator=generator)
        drop_all = dropped[0] < config.all_dropout
        drop_text, drop_image = (
            drop_all | (dropped[1] < config.text_dropout),
            drop_all | (dropped[2] < config.body_dropout),
        )
        lose_build = (dropped[3] < config.build_word_dropout) & ~drop_image
        captions = [
            "" if no_text else without_build(table.captions[row]) if no_build else table.captions[row]
            for row, no_text, no_build in zip(rows, drop_text.tolist(), lose_build.tolist(), strict=True)
        ]
        moments = table.latents[rows].float()
        latents = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (batch_size,), generator=generator)
        prompt_embeds, pooled = text_states(captions)
        if pooled is not None:
            raise BolidError(f"the base of family {chosen.name} is an SDXL", "this baseline is for SD 1.x bases")
        noise_pred = unet(
            schedule.add_noise(latents, noise, timesteps).to(memory_format=torch.channels_last), timesteps,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={"image_embeds": [drop_condition(condition[:, None], drop_image)]},
        ).sample  # fmt: skip
        target = losses.diffusion_target(schedule, latents, noise, timesteps)
        alphas = losses.alpha_bar(schedule, timesteps)
        loss = losses.loss_diffusion(noise_pred, target, alphas, schedule.config.prediction_type, config.min_snr_gamma)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * adapter_schedule(step, config.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        step += 1
        update_ema(average, parameters, step, config.ema)
        value = float(loss.detach())
        recent = value if math.isnan(recent) else 0.99 * recent + 0.01 * value
        if not math.isfinite(recent):
            raise BolidError(f"the training diverged at step {step}", "take fewer steps, or another seed")
        if time.monotonic() - saved > 60 * config.checkpoint_minutes:
            save_checkpoint(checkpoint, step, record, tensors, optimizer)
            saved = time.monotonic()
            print(f"{method}: step {step}, loss {recent:.4f}, {saved - started:.0f} s", flush=True)
    save_tensors(out / FILE, {name: value.half() for name, value in average.items()}, record)
    checkpoint.unlink(missing_ok=True)
    return out / FILE


# ---- use ----------------------------------------------------------------------------------------------------------


class Baseline:
    """A trained baseline in its family's pipeline."""

    def __init__(self, path: Path, family: Family | None = None) -> None:
        tensors, self.record = load_tensors(path, KIND)
        self.family = family or get_family(self.record["family"])
        parts = {name: value.float() for name, value in tensors.items()}
        attention = {name.removeprefix("attention."): v for name, v in parts.items() if name.startswith("attention.")}
        adapter = {name: value for name, value in parts.items() if not name.startswith("attention.")}
        self.size = adapter["image_proj.proj.weight"].shape[1]
        self.attention = PhotoAttention(self.size).eval() if attention else None
        if self.attention is not None:
            self.attention.load_state_dict(attention)
        self.pipe: Any = load_base(self.family, sampler=self.family.defaults)
        with quiet_diffusers():
            self.pipe.load_ip_adapter(
                [nested_state_dict(adapter)], subfolder=[""], weight_name=[""], image_encoder_folder=None
            )
        self.pipe.set_ip_adapter_scale([1.0])

    @torch.no_grad()
    def condition(self, embeds: torch.Tensor) -> torch.Tensor:
        """Image embeddings of a person's photos [M, E], unit length -> [E]. Without attention, of the first photo."""
        if self.attention is None:
            return embeds[0]
        return self.attention(embeds[None], torch.ones(1, len(embeds), dtype=torch.bool))[0]

    def generate(
        self, prompts: list[str], out: Path, condition: torch.Tensor, *, n: int, seed: int, photos: dict[str, str],
        name: str,
    ) -> list[Path]:  # fmt: skip
        """`n` pictures of each prompt, with `bolid generate`'s seeds and settings. `photos`: hashes, for the record."""
        steps, guidance = int(self.family.defaults.get("steps", 30)), self.family.guidance
        jobs = [(index, number) for index in range(len(prompts)) for number in range(n)]
        seeds = [derive_seed(seed, "generate", index, number) for index, number in jobs]
        latents = sample(
            self.pipe, [prompts[index] for index, _ in jobs], size=self.family.image_size, steps=steps,
            guidance=guidance, generators=[torch.Generator().manual_seed(s) for s in seeds], vectors=[condition],
        )  # fmt: skip
        pictures = decode_latents(self.pipe, latents)
        paths = []
        settings = {
            "steps": steps,
            "guidance": guidance.plain(),
            "negative": "",
            "scales": {"image": 1.0},
            "person": name,
        }
        for (index, number), picture_seed, picture in zip(jobs, seeds, pictures, strict=True):
            config = {"prompt": prompts[index], **settings}
            record = run_record("picture", family=self.family, config=config, seed=picture_seed, inputs=photos)
            paths.append(out / f"{index:03d}-{number}.png")
            save_picture(paths[-1], picture, record)
        return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("train", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps)
    parser.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(
        train_baseline(args.method, args.train, args.out, steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    )


if __name__ == "__main__":
    main()
