"""What the face and the body branch cost at generation, and what computing the conditions once a picture saves.

    python examples/benchmarks/generation.py                      # the tiny family, one thread, about a minute
    python examples/benchmarks/generation.py --family sdxl --device cuda --steps 10 --rounds 3
    python examples/benchmarks/generation.py --random-sdxl --device cuda --steps 10    # without its weights

The same prompts, noise and steps, taken in turns, and the median of the rounds: the bare base as diffusers runs it;
diffusers' own two IP-Adapters; the same with `cache_conditions`, as `bolid generate` runs; the bare base with
it, too; and, where the family is not random, `--face-guidance 1`, `--body-guidance 1` and both. Ratios to the first.
The two with adapters must be bit-equal; if not, it prints so. Processor time on the CPU, which busy neighbours change
little, and the clock on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cost import BODY_DIM, FACE_TOKENS, SDXL

from bolid.backends.attention import cache_conditions
from bolid.backends.body import BodyEncoder
from bolid.backends.diffusion import load_base, quiet_diffusers
from bolid.backends.loss_guidance import GuidanceLoss
from bolid.backends.sampling import Guidance, sample
from bolid.generate.guidance import body_guidance, face_guidance
from bolid.method.body_condition import FACE_DIM, build_ip_adapter_image_embeds
from bolid.models.families import Family, get_family
from bolid.scales import Scale, parse_person_guidance
from bolid.train_adapter.step_cost import adapted_network

DTYPE = torch.float16  # of --random-sdxl
PROMPT = "a full body photo of a woman standing, in a red long-sleeved top and blue trousers, on a beach"


def stored(family: Family, device: str, with_branches: bool = False) -> Any:
    """The family's pipeline, with its adapters as diffusers loads them."""
    pipe = load_base(family, device, sampler=family.defaults)
    if with_branches:
        with quiet_diffusers():
            pipe.load_ip_adapter(
                [str(family.require(f"{branch}_adapter").parent) for branch in ("face", "body")],
                subfolder=["", ""],
                weight_name=[family.face_adapter.name, family.body_adapter.name],
                image_encoder_folder=None,
            )
    return pipe


def random_sdxl(device: str, with_branches: bool = False) -> Any:
    """SDXL's UNet in half precision, its numbers random, in a pipeline without text encoders."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    if with_branches:
        unet, _ = adapted_network(SDXL, BODY_DIM, face_tokens=FACE_TOKENS)
    else:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(SDXL)
    unet = unet.to(DTYPE).to_empty(device=device).requires_grad_(False).eval()
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    vae = AutoencoderKL(block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        vae=vae.to(device, DTYPE), unet=unet, scheduler=EulerDiscreteScheduler(), **nothing
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="tiny")
    parser.add_argument("--random-sdxl", action="store_true", help="SDXL's architecture with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    family = get_family("sdxl" if args.random_sdxl else args.family)
    if args.random_sdxl:
        bare, adapted = random_sdxl(args.device), random_sdxl(args.device, with_branches=True)
        states, pooled = (torch.randn(args.batch, *shape).to(args.device, DTYPE) for shape in ((77, 2048), (1280,)))
        text, negative = (states, pooled), (torch.zeros_like(states), torch.zeros_like(pooled))
        given = {
            "prompt_embeds": states, "negative_prompt_embeds": negative[0],
            "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative[1],
        }  # fmt: skip
    else:
        bare, adapted = stored(family, args.device), stored(family, args.device, with_branches=True)
        text, negative = [PROMPT] * args.batch, ""
        given = {"prompt": text}
    layers = adapted.unet.encoder_hid_proj.image_projection_layers
    body_dim = layers[1].image_embeds.in_features
    vectors = [torch.nn.functional.normalize(torch.randn(FACE_DIM), dim=0), torch.randn(body_dim)]
    guidance = family.guidance
    embeds = build_ip_adapter_image_embeds(vectors, guidance=guidance.value > 1)
    embeds = [embed.to(args.device, adapted.unet.dtype) for embed in embeds]

    steps, size = args.steps or family.steps, family.image_size
    cached = {id(pipe): copy.copy(pipe) for pipe in (bare, adapted)}
    for pipe in cached.values():
        pipe.unet = copy.deepcopy(pipe.unet)
        cache_conditions(pipe.unet)

    def run(pipe, cache: bool, *losses: GuidanceLoss) -> tuple[float, torch.Tensor]:
        """(seconds, latents), by diffusers' own call or by ours."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(args.batch)]
        clock = time.process_time if args.device == "cpu" else time.perf_counter
        start = clock()
        if cache:
            latents = sample(
                cached[id(pipe)], text, size=size, steps=steps,
                guidance=Guidance(Scale(*[guidance.value] * 3), negative), generators=generators,
                vectors=vectors if pipe is adapted else [], losses=losses,
            )  # fmt: skip
        else:
            extra = {"ip_adapter_image_embeds": embeds} if pipe is adapted else {}
            with quiet_diffusers():
                latents = pipe(
                    **given, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=guidance.value,
                    generator=generators, output_type="latent", **extra,
                ).images  # fmt: skip
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return clock() - start, latents

    ways: dict[str, tuple[Any, ...]] = {
        "the bare base, diffusers' own path": (bare, False),
        "face and body, diffusers' own path": (adapted, False),
        "face and body, conditions computed once": (adapted, True),
        "the bare base, conditions computed once": (bare, True),
    }
    if not args.random_sdxl:
        face, body = (vector.to(args.device) for vector in vectors)
        face_loss, _ = face_guidance(family, args.device)
        body_loss, _ = body_guidance(family, BodyEncoder(family.require("body_encoder"), args.device), args.device)
        losses = {
            "face": face_loss(face, parse_person_guidance(1, "face")),
            "body": body_loss(body, parse_person_guidance(1, "body")),
        }
        for part, loss in losses.items():
            ways[f"face and body, --{part}-guidance 1"] = adapted, True, loss
        ways["face and body, both guidances"] = adapted, True, *losses.values()
    pictures = {name: run(*way)[1] for name, way in ways.items()}  # the first calls are slower
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds[name].append(run(*way)[0])
    names = list(ways)
    equal = torch.equal(pictures[names[1]], pictures[names[2]]) and torch.equal(pictures[names[0]], pictures[names[3]])
    first = statistics.median(seconds[names[0]])
    for name in names:
        ratios = [took / base for took, base in zip(seconds[name], seconds[names[0]], strict=True)]
        print(f"{name:42s} {statistics.median(ratios):5.2f} of the bare base ({min(ratios):.2f} to {max(ratios):.2f})")
    saved = statistics.median(b / a for a, b in zip(seconds[names[1]], seconds[names[2]], strict=True))
    print(f"conditions computed once: {saved:.2f} of the time of diffusers' two IP-Adapters")
    print(f"bit-equal to diffusers' own path: {'yes' if equal else 'NO'}")
    name = f"{family.name} of random weights" if args.random_sdxl else family.name
    print(f"(bare base: {first:.2f} s for {args.batch} pictures; family {name}, {args.device})")


if __name__ == "__main__":
    main()
