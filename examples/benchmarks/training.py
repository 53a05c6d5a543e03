"""How much a training step gains from cached features, and what the pixel losses add to it.

    python examples/benchmarks/training.py                       # the tiny family's networks
    python examples/benchmarks/training.py --shape sd15          # SD-1.5-shaped networks of random numbers, 12 GiB
    python examples/benchmarks/training.py --shape sd15 --device cuda --batch-size 8 --size 512 512 --rounds 10

Side by side, in turns, in one run, on the same network and data:

- `train-adapter`'s own step: latents, text states and the person's vectors are read from memory;
- the step of a trainer that encodes the photo (VAE), its caption (text encoder) and a reference photo (image tower)
  every time, as IP-Adapter's own trainer does: the goal is 1.5 times as many photos a second as that;
- `train-adapter`'s step with captions encoded at every step (`--text-cache 0`), all else read: the cache's worth;
- `train-adapter`'s step with L_id and L_CLIP on (tiny only; they need real pose and image-text models), spread over
  `pixel_every` steps: the goal is at most 25 % more than without.

Times are processor time of one thread, or on a GPU the clock; the best of each, which busy neighbours change little;
only the ratios mean something. The pixel losses' targets count as known, as they are from the second epoch on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from bolid.backends.diffusion import encode_latents, load_base, quiet_diffusers
from bolid.method.body_condition import initial_state, install
from bolid.models.families import Family, get_family
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import AdapterTable, TextStates, batch_rows, draw_batch, photo_generators
from bolid.train_adapter.decoder import LatentDecoder
from bolid.train_adapter.denoiser import Denoiser
from bolid.train_adapter.objective import Objective
from bolid.train_adapter.pixel_losses import ClipLoss, pixel_losses
from bolid.train_adapter.precision import attention_kernel, choose_precision, computing, store_frozen
from bolid.train_adapter.rollouts import make_rollout

BODY_DIM = 32


def sd15_pipeline(device: torch.device) -> tuple[Any, Callable[[torch.Tensor], Any]]:
    """A pipeline with the shapes of Stable Diffusion 1.5, and IP-Adapter's image tower (ViT-H/14), weights random."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    tokenizer = load_base(get_family("tiny")).tokenizer
    tokenizer.model_max_length = 77
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ends
    )
    vision = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        image_size=224, projection_dim=1024,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        unet=UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(vision).requires_grad_(False).eval()
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    pipe.to(device)
    tower.to(device)
    return pipe, lambda pixels: tower(torch.nn.functional.interpolate(pixels, (224, 224))).image_embeds


def random_table(pictures: np.ndarray, latents: torch.Tensor, people: int) -> AdapterTable:
    """Photos of `people` people, everything but their latents random."""
    n = len(pictures)
    generator = torch.Generator().manual_seed(0)
    return AdapterTable(
        latents.half(),
        [f"a full body photo of a tall slim woman waving in a red top, number {i}" for i in range(n)],
        torch.randn(n, BODY_DIM, generator=generator),
        torch.randn(n, BODY_DIM, generator=generator) - 1,
        torch.rand(n, generator=generator),
        torch.nn.functional.normalize(torch.randn(n, 512, generator=generator), dim=-1),
        list(np.arange(n).reshape(people, -1)),
        [f"person {i}" for i in range(people)],
    )


def step(
    objective: Objective, config: TrainAdapterConfig, parameters: list[torch.nn.Parameter], optimizer: Any,
    number: int, pixels: bool,
) -> None:  # fmt: skip
    table, denoiser = objective.table, objective.denoiser
    rows = batch_rows(len(table.captions), config.batch_size, number, 0)
    batch = draw_batch(table, rows, config, photo_generators(0, number * config.batch_size, config.batch_size))
    values = objective(batch, with_pixels=pixels)
    with attention_kernel(denoiser.device, config.precision, denoiser.positions):
        values["loss"].backward()
    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--size", type=int, nargs=2, help="height and width of the photos; default: the family's")
    parser.add_argument("--batch-size", type=int, help="default: 24, for sd15 1")
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each kind")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    family: Family = get_family(args.shape)
    height, width = args.size or family.image_size
    config = TrainAdapterConfig(
        batch_size=args.batch_size or (24 if args.shape == "tiny" else 1), id_weight=1.0, clip_weight=0.1,
        precision=choose_precision(args.precision, args.device),
    )  # fmt: skip
    losses: dict[str, Any] = {}
    if args.shape == "tiny":
        pipe, losses = load_base(family, args.device), pixel_losses(config, family, device=args.device)
        assert isinstance(losses["clip"], ClipLoss)
        tower = losses["clip"].image_text.encode_pixels
    else:
        pipe, tower = sd15_pipeline(device)
    people = max(2, config.batch_size // 4)
    pictures = np.random.default_rng(0).integers(0, 256, (4 * people, height, width, 3), dtype=np.uint8)
    with computing(device, config.precision, 1):
        latents = torch.cat([encode_latents(pipe, pictures[i : i + 1]) for i in range(len(pictures))]).cpu()
    table = random_table(pictures, latents, people)
    denoiser = Denoiser(pipe, table, TextStates(pipe, table.captions), family, config, device)
    rollout = make_rollout(pipe, denoiser, table, family, config)
    decode = LatentDecoder(family, pipe.vae, device=args.device) if losses else None
    objective = Objective(denoiser, table, config, losses, rollout, decode)
    with quiet_diffusers():
        unet = pipe.unet.to(memory_format=torch.channels_last)
        branches = install(
            unet, [initial_state(unet, "face", 512, tokens=config.face_tokens), initial_state(unet, "body", BODY_DIM)]
        )
    parameters = [parameter.requires_grad_(True) for branch in branches for parameter in branch.values()]
    store_frozen(unet, config.precision)
    # Nothing is learnt here: what counts is the time.
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    cached = denoiser.text_states
    uncached = TextStates(pipe, table.captions, limit=0)

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def own(number: int) -> None:
        step(objective, config, parameters, optimizer, number, False)

    def texts(number: int) -> None:
        denoiser.text_states = uncached
        with computing(device, config.precision, denoiser.positions):
            step(objective, config, parameters, optimizer, number, False)
        denoiser.text_states = cached

    def encoding(number: int) -> None:
        rows = batch_rows(len(table.captions), config.batch_size, number, 0)
        with torch.no_grad(), computing(device, config.precision, denoiser.positions):
            encode_latents(pipe, pictures[rows])
            tower(torch.from_numpy(pictures[rows[::-1]]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1)
        texts(number)

    def with_pixels(number: int) -> None:
        step(objective, config, parameters, optimizer, number, True)

    kinds = {"own": own, "texts": texts, "encoding": encoding} | ({"pixels": with_pixels} if losses else {})
    best: dict[str, float] = {}
    first = 2 if losses else 1  # the slow first steps; and where the targets become known
    for number in range(first + args.rounds):
        for name, kind in kinds.items():
            start = clock()
            kind(number % 2)
            if number >= first:
                best[name] = min(best.get(name, float("inf")), clock() - start)
    per_photo = {name: config.batch_size / seconds for name, seconds in best.items()}
    print(
        f"{args.shape}, {height}x{width}, batches of {config.batch_size}, {config.precision}, "
        f"{'one CPU thread' if device.type == 'cpu' else torch.cuda.get_device_name()}"
    )
    print(f"train-adapter's step       {per_photo['own']:8.2f} photos/s")
    print(
        f"captions at every step     {per_photo['texts']:8.2f} photos/s: cached is "
        f"{best['texts'] / best['own']:.3f} times as fast"
    )
    ratio = best["encoding"] / best["own"]
    print(
        f"encoding at every step     {per_photo['encoding']:8.2f} photos/s: train-adapter is {ratio:.2f} times as fast"
    )
    if "pixels" in best:
        more = (best["pixels"] / best["own"] - 1) / config.pixel_every
        print(f"with L_id and L_CLIP       {per_photo['pixels']:8.2f} photos/s in a step that has them;")
        print(f"                           {more:8.1%} more a step on average, one in {config.pixel_every} having them")


if __name__ == "__main__":
    main()
