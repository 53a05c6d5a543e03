"""Train the tiny family's body probe: a picture as the tiny family generates them -> the ratios of the body in it.

    python examples/tiny_family/train_probe.py --photos photos/train --val photos/val --out bolid/tiny/probe

About 20 minutes on one CPU core with the defaults. Run it again after an interruption and it goes on where it stopped.
The probe only measures generated pictures; nothing is trained against it. Half of the pictures it learns from are
shown as the base's autoencoder rebuilds them, for every generated picture comes out of that.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from truth import options, parse, r2, read_resized, read_truth, rebuilt, write_card

from bolid.backends.probe import FILE, KIND, BodyProbe, ProbeNetwork
from bolid.formats.tensors import save_tensors
from bolid.method.keypoints import MIRRORED
from bolid.models.families import get_family
from bolid.run import derive_seed, run_record
from bolid.synth.people import RATIO_NAMES
from bolid.train_adapter.precision import computing

SIZE = get_family("tiny").image_size  # of generated pictures: the probe is for those

CARD = """
Reads ten body ratios (lengths, breadths and girths over stature, volume over stature cubed; of the body without its
clothes) off a picture of a full body or three-quarters of one, at the size that the tiny family generates. A small
ResNet, trained from scratch on renders of Anny's synthetic people; it means nothing for other pictures.

It measures generated pictures. Its own error on renders of people that it was not trained on stands below and in the
file's metadata: compare any figure that it gives with that. The shipped body branch was corrected by its readings.

License: Apache-2.0. The training pictures are renders of Anny (Apache-2.0, shapes CC0).
"""


def usable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A portrait does not show the body."""
    return [row for row in rows if row["attributes"]["framing"] != "portrait"]


def shown(rows: list[dict[str, Any]], seed: int) -> np.ndarray:
    """The pictures to learn from, uint8 [N, *SIZE, 3]: half of them, drawn by the seed, rebuilt."""
    pixels = read_resized(rows, SIZE)
    half = np.random.default_rng(seed).permutation(len(pixels))[::2]
    pixels[half] = rebuilt(pixels[half])
    return pixels


def augment(
    pixels: torch.Tensor, keypoints: torch.Tensor, generator: torch.Generator, smallest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B,3,*SIZE] in -1..1 from uint8: mirror, small moves and zooms (`smallest` to 1.06 times), light; blur, noise and
    blocks as in generated and compressed pictures. The keypoints [B,17,3], (x, y) in -1..1 over the picture, move
    along."""
    b = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    zoom, mirror = uniform(smallest, 1.06), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine = torch.zeros(b, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = mirror / zoom, 1 / zoom, uniform(-0.05, 0.05, 2)
    keypoints = torch.where((mirror < 0)[:, None, None], keypoints[:, MIRRORED], keypoints)
    moved = (keypoints[..., :2] - affine[:, None, :, 2]) / torch.stack([affine[:, 0, 0], affine[:, 1, 1]], -1)[:, None]
    keypoints = torch.cat([moved, keypoints[..., 2:]], -1)
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), False), padding_mode="border", align_corners=False)
    soft = F.interpolate(F.interpolate(x, scale_factor=0.7, mode="bilinear"), SIZE, mode="bilinear")
    share = uniform(-0.6, 1, 1, 1, 1).clamp(0)
    x = x + share * (soft - x)
    x = x * uniform(0.88, 1.12, 1, 1, 1) + uniform(-0.08, 0.08, 3, 1, 1)
    # JPEG's errors are smooth within blocks; noise at half size looks much like them, and is far cheaper.
    coarse = torch.randn(b, 3, SIZE[0] // 2, SIZE[1] // 2, generator=generator)
    x = x + F.interpolate(coarse, SIZE, mode="nearest") * uniform(0, 0.05, 1, 1, 1)
    x = (x + torch.randn(x.shape, generator=generator) * uniform(0, 0.04, 1, 1, 1)).clamp(-1, 1)
    return x, keypoints


def train(args: argparse.Namespace) -> tuple[ProbeNetwork, np.ndarray, np.ndarray, int]:
    torch.manual_seed(derive_seed(args.seed, "probe", "init") % 2**32)
    rows = usable(read_truth(args.photos, people=args.people, seed=args.seed))
    truth = np.array([[row["ratios"][name] for name in RATIO_NAMES] for row in rows], np.float32)
    mean, std = truth.mean(0), truth.std(0)
    earlier = BodyProbe(args.init) if args.init else None
    if earlier is not None:
        mean, std = earlier.mean, earlier.std  # what its last layer's numbers mean
    targets = torch.from_numpy((truth - mean) / std)
    marks = torch.tensor([row["keypoints"] for row in rows], dtype=torch.float32)
    marks[..., :2] = marks[..., :2] / torch.tensor([[[row["width"], row["height"]]] for row in rows]) * 2 - 1
    marks[..., 2] = (marks[..., 2] > 0).float()
    network = ProbeNetwork(len(RATIO_NAMES), SIZE)
    if earlier is not None:
        network.load_state_dict(earlier.network.state_dict())
        network.requires_grad_(True)
    # From ratios alone it learnt nothing in 1500 steps: who does not know where a body's parts are can't measure them.
    # So the network also says where the keypoints are; that head is not kept.
    places = nn.Sequential(nn.Flatten(), nn.LazyLinear(2 * marks.shape[1]))
    places(network.body(torch.zeros(2, 3, *SIZE)))
    both = nn.ModuleList([network, places])
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.lr, weight_decay=0.02)
    checkpoint, first = args.work / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        both.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    pixels = torch.from_numpy(shown(rows, args.seed)) if first < args.steps else torch.empty(0)
    network.train().to(memory_format=torch.channels_last)
    started = time.time()
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "probe", step))
        scale = min((step + 1) / 100, 0.01 + 0.5 * (1 + math.cos(math.pi * (step + 1) / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        chosen = torch.randperm(len(rows), generator=generator)[: args.batch]
        x, keypoints = augment(pixels[chosen], marks[chosen], generator, args.smallest)
        with computing("cpu"):
            maps = network.body(x.to(memory_format=torch.channels_last))
            read, found = network.read(maps).float(), places(maps).float().view_as(keypoints[..., :2])
        ratios = F.smooth_l1_loss(read, targets[chosen], beta=0.5)
        misses = F.smooth_l1_loss(found, keypoints[..., :2], beta=0.05, reduction="none")
        missed = (misses * keypoints[..., 2:]).sum() / keypoints[..., 2:].sum().clamp_min(1) / 2
        loss = ratios + args.places_weight * missed
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first) * args.batch / (time.time() - started)
            losses = f"ratios {ratios.item():.4f} places {missed.item():.4f}"
            print(f"step {step + 1}/{args.steps} {losses} {rate:.0f} pictures/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            args.work.mkdir(parents=True, exist_ok=True)
            state = {"network": both.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    if earlier is not None:
        mix(network, earlier.network, args.keep)
    return network.eval(), mean, std, len(rows)


def mix(network: nn.Module, earlier: nn.Module, keep: float) -> None:
    """`keep` of the weights and batch statistics from `earlier`, the rest the network's own: after a training that went
    on from there the mixture knows what both know (Wortsman et al., arXiv:2109.01903)."""
    before = earlier.state_dict()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.lerp_(before[name].to(value), keep)


def export(network: ProbeNetwork, mean: np.ndarray, std: np.ndarray, directory: Path, config: dict, seed: int) -> None:
    tensors = {
        name: value.contiguous().half() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    tensors |= {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
    config = {"ratio_names": RATIO_NAMES, "image_size": SIZE, **config}
    save_tensors(directory / FILE, tensors, run_record(KIND, family="tiny", config=config, seed=seed))


def held_out_error(photos: Path, model: Path, *, people: int | None = 200) -> dict[str, Any]:
    """{"r2": {name: ...}, "rmse": {name: ...}, "mean_r2": ...}: one picture at a time, on people never seen.

    "rebuilt_mean_r2" and "rebuilt_four_mean_r2": of pictures as the base's autoencoder shows them, one and the mean
    reading of four. That is the most that pictures made by the base could reach.
    """
    probe = BodyProbe(model)
    rows = usable(read_truth(photos, people=people))
    pixels = read_resized(rows, SIZE)
    truth = np.array([[row["ratios"][name] for name in probe.ratio_names] for row in rows])
    seen = probe.predict(list(pixels))
    seen_r2 = r2(truth, seen)
    rmse = np.sqrt(((seen - truth) ** 2).mean(0))
    reading = probe.predict(list(rebuilt(pixels)))
    own: dict[Path, list[int]] = {}
    for index, row in enumerate(rows):
        own.setdefault(row["path"].parent, []).append(index)
    fours = [indices[:4] for indices in own.values()]
    true_of, read_of = (np.stack([values[four].mean(0) for four in fours]) for values in (truth, reading))
    return {
        "r2": dict(zip(probe.ratio_names, seen_r2, strict=True)),
        "rmse": dict(zip(probe.ratio_names, rmse.tolist(), strict=True)),
        "mean_r2": float(np.mean(seen_r2)),
        "rebuilt_mean_r2": float(np.mean(r2(truth, reading))),
        "rebuilt_four_mean_r2": float(np.mean(r2(true_of, read_of))),
        "pictures": len(rows),
    }


def figures_of(error: dict[str, Any]) -> dict[str, float]:
    """`held_out_error` as rows of the table."""
    return {
        "mean R2, one picture": error["mean_r2"],
        "mean R2, one picture as the autoencoder rebuilds it": error["rebuilt_mean_r2"],
        "mean R2, mean of four such pictures": error["rebuilt_four_mean_r2"],
        **{f"R2 {name.replace('_', ' ')}": value for name, value in error["r2"].items()},
        "held-out pictures": error["pictures"],
    }


def measure(photos: Path) -> dict[str, float]:
    """The shipped probe's own R2 on held-out photos: overall and for each ratio."""
    return figures_of(held_out_error(photos, get_family("tiny").require("probe")))


def main() -> None:
    parser = options("probe", __doc__)
    parser.add_argument("--people", type=int, default=None, help="use at most so many people")
    parser.add_argument("--init", type=Path, help="go on from this probe, say with the photos of other people")
    parser.add_argument("--keep", type=float, default=0.0, help="how much of --init's weights the result keeps, 0 to 1")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--smallest", type=float, default=0.92, help="how small a picture may appear, in parts of it")
    parser.add_argument("--places-weight", type=float, default=5.0, help="weight of saying where the keypoints are")
    args = parse(parser)
    if args.keep and not args.init:
        parser.error("--keep: there are no earlier weights without --init")
    started = time.time()
    network, mean, std, pictures = train(args)
    config = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "smallest": args.smallest, "keep": args.keep}
    export(network, mean, std, args.out, config, args.seed)
    # Measured with the stored weights, then written into the same file.
    error = held_out_error(args.val, args.out)
    export(network, mean, std, args.out, {**config, "held_out_error": error}, args.seed)
    figures = figures_of(error)
    print(json.dumps(figures, indent=2))
    facts = {
        "data": f"{pictures} rendered photos (full bodies and three-quarters) at {SIZE[0]}x{SIZE[1]}",
        **({"from": "an earlier probe of this script"} if args.init else {}),
        **({"mixed": f"{args.keep:g} of that one's weights, the rest what they became"} if args.keep else {}),
        "steps": f"{args.steps} of {args.batch} pictures, AdamW {args.lr}, cosine",
        "minutes in the last run of the script": round((time.time() - started) / 60, 1),
        "machine": "1 of 2 shared CPU cores",
        "seed": args.seed,
    }
    write_card(args.out, "Tiny body probe", CARD, figures, facts)


if __name__ == "__main__":
    main()
