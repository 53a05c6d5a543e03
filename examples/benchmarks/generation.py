"""What the face and the body branch cost at generation, and what computing the conditions once a picture saves.

    python examples/benchmarks/generation.py                      # the tiny family, one thread, about a minute
    python examples/benchmarks/generation.py --family sdxl --device cuda --steps 10 --rounds 3

The same prompts, noise and steps four times, taken in turns, and the median of the rounds: the bare base as diffusers
runs it; diffusers' own two IP-Adapters; the same with `remembered_conditions`, as `bolid generate` runs; and the bare
base with them, too. Ratios to the first. The two with adapters must be bit-equal; if not, that is said.
Processor time on the CPU, which busy neighbours change little, and the clock on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from bolid.backends.base import load_base, quiet_diffusers, remembered_conditions
from bolid.families import get_family
from bolid.method.body_condition import FACE_DIM, build_ip_adapter_image_embeds

PROMPT = "a full body photo of a woman standing, in a red long-sleeved top and blue trousers, on a beach"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    family = get_family(args.family)
    bare, adapted = (load_base(family, args.device, sampler=family.defaults) for _ in range(2))
    with quiet_diffusers():
        adapted.load_ip_adapter(
            [str(family.require(f"{branch}_adapter").parent) for branch in ("face", "body")],
            subfolder=["", ""],
            weight_name=[family.face_adapter.name, family.body_adapter.name],
            image_encoder_folder=None,
        )
    layers = adapted.unet.encoder_hid_proj.image_projection_layers
    body_dim = layers[1].image_embeds.in_features
    vectors = [torch.nn.functional.normalize(torch.randn(FACE_DIM), dim=0), torch.randn(body_dim)]
    guidance = family.guidance
    embeds = build_ip_adapter_image_embeds(vectors, guidance=guidance.up > 1)
    embeds = [embed.to(args.device, adapted.unet.dtype) for embed in embeds]

    def paint(pipe, remember: bool) -> tuple[float, torch.Tensor]:
        height, width = family.image_size
        extra = {"ip_adapter_image_embeds": embeds} if pipe is adapted else {}
        clock = time.process_time if args.device == "cpu" else time.perf_counter
        with quiet_diffusers(), remembered_conditions(pipe) if remember else contextlib.nullcontext():
            start = clock()
            latents = pipe(
                [PROMPT] * args.batch,
                height=height,
                width=width,
                num_inference_steps=args.steps or family.defaults["steps"],
                guidance_scale=guidance.up,
                generator=[torch.Generator().manual_seed(seed) for seed in range(args.batch)],
                output_type="latent",
                **extra,
            ).images
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            return clock() - start, latents

    ways = {
        "the bare base, diffusers' own path": (bare, False),
        "face and body, diffusers' own path": (adapted, False),
        "face and body, conditions computed once": (adapted, True),
        "the bare base, conditions computed once": (bare, True),
    }
    pictures = {name: paint(*way)[1] for name, way in ways.items()}  # the first calls are slower
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds[name].append(paint(*way)[0])
    names = list(ways)
    equal = torch.equal(pictures[names[1]], pictures[names[2]]) and torch.equal(pictures[names[0]], pictures[names[3]])
    first = statistics.median(seconds[names[0]])
    for name in names:
        ratios = [took / base for took, base in zip(seconds[name], seconds[names[0]], strict=True)]
        print(f"{name:42s} {statistics.median(ratios):5.2f} of the bare base ({min(ratios):.2f} to {max(ratios):.2f})")
    saved = statistics.median(b / a for a, b in zip(seconds[names[1]], seconds[names[2]], strict=True))
    print(f"conditions computed once: {saved:.2f} of the time of diffusers' two IP-Adapters")
    print(f"bit-equal to diffusers' own path: {'yes' if equal else 'NO'}")
    print(f"(bare base: {first:.2f} s for {args.batch} pictures; family {family.name}, {args.device})")


if __name__ == "__main__":
    main()
