"""What training the adapters of SD 1.5 and SDXL takes on one card: counted, or with a card at hand measured beside it.

    python examples/benchmarks/cost.py > examples/benchmarks/cost.md
    python examples/benchmarks/cost.py --device cuda              # the same networks, random weights, real steps

The networks are built from the published configurations on the meta device, where nothing is computed
(bolid/train_adapter/step_cost.py, whose tests hold the count against real steps of small networks). Three minutes, no
accelerator.
A card also holds what a count does not see: CUDA itself (about 0.5 GB), kernels' work space and fragmentation.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from bolid.train_adapter.precision import attention_kernel, computing
from bolid.train_adapter.step_cost import adapted_network, step_cost, text_state_width, unet_inputs

GB = 1e9
BODY_DIM, FACE_TOKENS, LENGTH = 64, 4, 77
# What unet/config.json says beyond the defaults of diffusers' class.
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
# name, card in GB, UNet, latents, text encoders, batch, and the (rank of K/V, checkpointing) that are compared
BASES = (
    ("SD 1.5, 512x512", 12, SD15, (4, 64, 64), (CLIP_L,), 4),
    ("SDXL, 1024x1024", 24, SDXL, (4, 128, 128), (CLIP_L, CLIP_BIG_G), 1),
)
RECIPES = ((0, False), (0, True), (64, False), (64, True))


def text_cost(encoders: tuple[dict[str, int], ...]) -> tuple[int, int]:
    """(floating-point operations of a caption, parameters) of the text encoders."""
    flops = parameters = 0
    for settings in encoders:
        with torch.device("meta"):
            encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **settings))
            tokens = torch.zeros(1, LENGTH, dtype=torch.long)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                encoder(tokens)
        flops += counter.get_total_flops()
        parameters += sum(parameter.numel() for parameter in encoder.parameters())
    return flops, parameters


def build(config: dict[str, Any], rank: int, checkpointing: bool) -> tuple[Any, list[torch.nn.Parameter]]:
    """The UNet with both branches, on the meta device, and what learns."""
    return adapted_network(
        config, BODY_DIM, face_tokens=FACE_TOKENS, kv_rank=rank, precision="bf16", gradient_checkpointing=checkpointing
    )


def row_start(name: str, batch: int, rank: int, checkpointing: bool) -> str:
    """What is compared, the first columns of both tables."""
    kind = f"rank {rank}" if rank else "full"
    return f"| {name}, {batch} | {kind} | {'yes' if checkpointing else 'no'}"


def counted(unet: torch.nn.Module, branches: list[torch.nn.Parameter], peak: int) -> tuple[int, int, int]:
    """Bytes of (the frozen base, the adapters with their optimizer and average, both and the pass at its height)."""
    trained = sum(p.numel() * p.element_size() for p in branches)
    frozen = sum(p.numel() * p.element_size() for p in unet.parameters()) - trained
    return frozen, 4 * trained, frozen + 4 * trained + peak


def measured(
    unet: torch.nn.Module, branches: list[torch.nn.Parameter], latents: tuple[int, ...], batch: int, device: str,
    rounds: int = 6,
) -> tuple[int, float]:  # fmt: skip
    """(bytes on the card at their height, seconds of a step: the median) of steps on random weights and numbers.

    The step is train-adapter's: forward and backward pass in bf16, clipping, fused AdamW, moving average.
    """
    torch.cuda.reset_peak_memory_stats()
    unet.to_empty(device=device)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
    average = [parameter.detach().clone() for parameter in branches]
    optimizer = torch.optim.AdamW(branches, lr=1e-6, fused=True)
    positions = latents[1] * latents[2]
    with torch.device(device):
        noisy, timesteps, conditions = unet_inputs(unet, latents, LENGTH, batch)
    for zeros in (noisy, conditions["encoder_hidden_states"]):
        zeros.normal_()
    seconds = []
    for _ in range(2 + rounds):  # the first ones allocate and choose kernels
        torch.cuda.synchronize()
        start = time.perf_counter()
        with computing(device, "bf16", positions):
            loss = unet(noisy, timesteps, **conditions).sample.float().square().mean()
        with attention_kernel(torch.device(device), "bf16", positions):  # a checkpointed block computes again
            loss.backward()
        torch.nn.utils.clip_grad_norm_(branches, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, [parameter.detach() for parameter in branches], 0.001)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return torch.cuda.max_memory_allocated(), statistics.median(seconds[2:])


def measure_all(device: str) -> None:
    """Prints the table of what was counted beside what a card really takes."""
    print(f"Measured on one {torch.cuda.get_device_name()}, random weights, torch {torch.__version__}.\n")
    print(
        "| base, batch | K/V | checkpointing | counted, GB | measured, GB | photos a second | against full, without |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, _card, config, latents, _encoders, batch in BASES:
        first = None
        for rank, checkpointing in RECIPES:
            unet, branches = build(config, rank, checkpointing)
            peak = step_cost(unet, latents, LENGTH, batch, "bf16", "cuda").peak
            total = counted(unet, branches, peak)[2]
            highest, seconds = measured(unet, branches, latents, batch, device)
            first = first or seconds
            print(
                f"{row_start(name, batch, rank, checkpointing)} | {total / GB:.1f} | "
                f"{highest / GB:.1f} | {batch / seconds:.2f} | {first / seconds:.2f} |",
                flush=True,
            )
            del unet, branches
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda: measure there, beside the count")
    if device := parser.parse_args().device:
        measure_all(device)
        return
    print("# What training the adapters takes on one card\n")
    print("Made by `examples/benchmarks/cost.py`, which **counts** on networks without data: nothing ran on a card.")
    print("bf16 frozen base, float32 adapters (weights, two moments of AdamW, moving average), latents and text states")
    print("cached. GB are 10^9 bytes; a card also needs about 0.5 GB for CUDA itself and its kernels' work space.\n")
    print("| base, batch | K/V | checkpointing | base | adapters | activations and gradients | total | fits |")
    print("|---|---|---|---|---|---|---|---|")
    notes = []
    for name, card, config, latents, encoders, batch in BASES:
        for rank, checkpointing in RECIPES:
            unet, branches = build(config, rank, checkpointing)
            cost = step_cost(unet, latents, LENGTH, batch, "bf16", "cuda", flops=not rank and not checkpointing)
            frozen, trained, total = (part / GB for part in counted(unet, branches, cost.peak))
            fits = f"{'yes' if total + 0.5 < card else 'no'}, {card} GB"
            print(
                f"{row_start(name, batch, rank, checkpointing)} | {frozen:.1f} | "
                f"{trained:.1f} | {cost.peak / GB:.1f} | {total:.1f} | {fits} |",
                flush=True,
            )
            if cost.flops is not None:
                flops, parameters = text_cost(encoders)
                share = flops * batch / cost.flops
                kept = text_state_width(unet.config, LENGTH) * 2
                notes.append(
                    f"- {name}: {cost.flops / batch / 1e12:.2f} TFLOP a photo, forward and backward; text encoders, if "
                    f"captions are not cached, take {flops / 1e12:.3f} more ({share:.1%}) and "
                    f"{parameters * 2 / GB:.1f} GB of the card; a cached caption {kept / 1e3:.0f} kB of main memory."
                )
            print(name, rank, checkpointing, file=sys.stderr, flush=True)
    print("\nWhat is computed:\n")
    print("\n".join(notes))


if __name__ == "__main__":
    main()
