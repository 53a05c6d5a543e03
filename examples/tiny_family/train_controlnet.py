"""Train the tiny family's ControlNets: pictures that follow a drawn skeleton, or the depth map of a body.

    python examples/tiny_family/train_controlnet.py runs/body/train --out runs/controlnet
    cp -r runs/controlnet/export bolid/tiny/controlnet                # when the sheet is good
    python examples/tiny_family/train_controlnet.py photos/train --kind depth --people 150 \\
        --init bolid/tiny/controlnet --strength 1 --steps 300 --batch 16 --lr 1e-3 --out runs/controlnet-depth
    cp -r runs/controlnet-depth/export bolid/tiny/controlnet-depth

Those that ship were made in turns: 450 steps of 20 on skeletons, which had learnt nothing yet, 300 of 16 on depth from
there, and 360 of 16 on skeletons from that.

TRAIN: for openpose the shards that `bolid shard` writes, for depth the photos of `bolid synth` with their truth
(depth_photos.py). The frozen base denoises each photo; the ControlNet (a copy of the base's encoder behind zero
convolutions, Zhang et al., arXiv:2302.05543) sees the photo's keypoints as the family's pose model found them, drawn as
`bolid generate --pose-from` draws them, or the depth of the person's body without clothes, drawn as `--body-from shape`
does. Half of the captions are dropped, so that the pose must come from the condition. The copy is without the
attention, which costs more weights than the rest: the condition needs no text. bf16 where the hardware has it. About
0.6 of a second a step of 32 on one core; 2,000 steps. Resumable: the same command goes on from
OUT/.checkpoint.safetensors.

At the end, and with `--measure-only`: the share of the joints that the pose model finds where they should be in
generated pictures, nearer than a twentieth of the person's height, with the ControlNet (and the photo's caption, the
same without words for the pose, and with those for another pose) and without it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from course import Course
from depth_photos import read_depth_photos
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from truth import store_float8, write_card

from bolid.backends.diffusion import decode_latents, encode_prompts, load_base, load_controlnet
from bolid.backends.pose import PoseModel
from bolid.backends.sampling import Control, Guidance, sample
from bolid.formats.shards import directory_sha256, read_shards
from bolid.method import losses
from bolid.method.keypoints import MIN_CONFIDENCE
from bolid.method.openpose import draw_openpose
from bolid.models.families import Family, get_family
from bolid.run import derive_seed, run_record, sha256_file
from bolid.synth.people import POSE_PHRASES
from bolid.train_adapter.precision import computing

CHANNELS = (16, 32, 48, 64)
"""Of the layers that shrink the skeleton to the latents' size; the published ones have (16, 32, 96, 256)."""

POSE_WORDS = re.compile(rf"(\b(?:wo)?man) ({'|'.join(POSE_PHRASES.values())}),")

USES = {
    "openpose": "a skeleton as OpenPose draws\nit: `bolid generate --pose-from`",
    "depth": "the depth map of a body\nwithout clothes, nearer is brighter: `bolid generate --body-from shape`",
}
PARTS = {"openpose": "controlnet", "depth": "depth_controlnet"}
CARD = """
A ControlNetModel for the base in `../base`, conditioned on {use}.
It has the convolutions of the UNet's encoder without its attention. Matrices are stored as 8-bit floats, which
diffusers converts on loading. Trained by `train_controlnet.py` on renders of synthetic adults; it knows nothing else.

License: Apache-2.0. The training pictures are renders of Anny (Apache-2.0, shapes CC0).
"""


class Data(NamedTuple):
    """N photos."""

    latents: torch.Tensor  # f16 [N,2,C,h,w], the VAE's moments
    captions: list[str]
    keypoints: np.ndarray  # f32 [N,17,3] in pixels
    conditions: np.ndarray  # uint8 [N,H,W,3]: skeletons or depth maps


def read_data(source: Path, family: Family, args: argparse.Namespace, people: int | None = None) -> Data:
    """The photos of `source`, for depth of so many `people`; kept in --out where it takes long to make them."""
    if args.kind == "depth":
        photos = read_depth_photos(source, family, args.out, people, args.seed)
        return Data(torch.from_numpy(photos.latents), photos.captions.tolist(), photos.keypoints, photos.depth)
    latents, captions, keypoints, skeletons = [], [], [], []
    for photo in read_shards(source):
        scale = family.image_size[0] / photo.meta["height"]
        points = photo.tensors["keypoints"] * np.array([scale, scale, 1], np.float32)
        latents.append(torch.from_numpy(photo.tensors["latents"]))
        captions.append(photo.caption)
        keypoints.append(points)
        skeletons.append(draw_openpose(points, family.image_size))
    return Data(torch.stack(latents), captions, np.stack(keypoints), np.stack(skeletons))


def as_condition(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B,H,W,3] -> f32 [B,3,H,W] in 0..1, as diffusers' pipelines hand it over."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def build(unet: UNet2DConditionModel, shrink: int) -> ControlNetModel:
    """A ControlNet on the convolutions of the UNet's encoder and middle. Latents are 2 ** shrink times smaller."""
    config = unet.config
    network = ControlNetModel(
        in_channels=config.in_channels,
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        conditioning_embedding_out_channels=CHANNELS[: shrink + 1],
    )
    missing, _ = network.load_state_dict(unet.state_dict(), strict=False)
    assert all(name.startswith("controlnet_") for name in missing), missing
    return network


def with_pose(caption: str, phrase: str = "") -> str:
    """The caption with other words for the pose, or with none. A portrait's has none to begin with."""
    return POSE_WORDS.sub(rf"\1{' ' if phrase else ''}{phrase},", caption)


def other_pose(caption: str, draw: float) -> str:
    """The caption with the words for another pose, which one by `draw` in 0..1."""
    found = POSE_WORDS.search(caption)
    phrases = [phrase for phrase in POSE_PHRASES.values() if found and phrase != found[2]]
    return with_pose(caption, phrases[int(draw * len(phrases))]) if phrases else caption


def measure(family: Family, data: Data, args: argparse.Namespace) -> dict[str, float]:
    """Joints found where they belong, with and without OUT/export, in up to `--measure` pictures; writes a sheet."""
    captions, keypoints, conditions = data.captions, data.keypoints, data.conditions
    pipe = load_base(family, sampler=family.defaults)
    network = load_controlnet(
        pipe, dataclasses.replace(family, **{PARTS[args.kind]: args.out / "export"}), PARTS[args.kind]
    )
    pose = PoseModel(family.require("pose"))
    rows = np.random.default_rng(7).permutation(len(captions))[: args.measure]
    ways = {
        "with it": captions,
        "with it, no words for the pose": [with_pose(caption) for caption in captions],
        "with it, words for another pose": [other_pose(caption, 0.5) for caption in captions],
        "without": captions,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    sheet = [np.concatenate(list(conditions[rows[:8]]), 1)]
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        for name, prompts in ways.items():
            control = Control(network, as_condition(conditions[part]))
            latents = sample(
                pipe,
                [prompts[row] for row in part],
                size=family.image_size,
                steps=family.schedule,
                guidance=Guidance(family.guidance),
                generators=[torch.Generator().manual_seed(int(row)) for row in part],
                controls=[] if name == "without" else [control],
            )
            images = decode_latents(pipe, latents)
            if start == 0:
                sheet.append(np.concatenate(images[:8], 1))
            for row, people in zip(part, pose.detect(images), strict=True):
                seen = keypoints[row][:, 2] >= MIN_CONFIDENCE
                asked = keypoints[row][seen, :2]
                near = np.zeros(len(asked), bool)
                if people:
                    size = np.ptp(asked[:, 1])
                    near = np.linalg.norm(people[0].keypoints[seen, :2] - asked, axis=1) < 0.05 * size
                found[name].append(float(near.mean()))
    Image.fromarray(np.concatenate(sheet)).save(args.out / "sheet.png")
    return {f"joints where they belong, {name}": round(float(np.mean(v)), 4) for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("--kind", choices=tuple(USES), default="openpose")
    parser.add_argument("--people", type=int, help="of the photos for depth; by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/controlnet"))
    parser.add_argument("--val", type=Path, help="the same of other people, for the figures; by default TRAIN")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--strength",
        type=float,
        default=2.0,
        help="what the output layers are multiplied with at the end: they begin at 0",
    )
    parser.add_argument("--caption-dropout", type=float, default=0.5)
    parser.add_argument("--init", type=Path, help="go on from this export (with --strength 1)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--family", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint-minutes", type=float, default=3)
    parser.add_argument("--measure", type=int, default=64, metavar="N", help="pictures for the figures at the end")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    family = get_family(args.family)
    if not args.measure_only:
        train(family, args)
    if args.measure_only or args.measure:
        data = read_data(args.val or args.train, family, args, max(args.measure // 4, 1))
        figures = measure(family, data, args)
        print(json.dumps(figures))
        facts = json.loads((args.out / "facts.json").read_text())
        write_card(
            args.out / "export", f"Tiny {args.kind} ControlNet", CARD.format(use=USES[args.kind]), figures, facts
        )


def start(unet: UNet2DConditionModel, shrink: int, init: Path | None) -> ControlNetModel:
    """The network at the beginning of the training."""
    if init is None:
        return build(unet, shrink)
    return ControlNetModel.from_pretrained(init, torch_dtype=torch.float32)


def train(family: Family, args: argparse.Namespace) -> None:
    """Train, and write OUT/export and OUT/facts.json."""
    device = torch.device(args.device)
    pipe = load_base(family, args.device)
    data = read_data(args.train, family, args, args.people)
    texts = sorted({"", *data.captions})
    states = torch.cat([encode_prompts(pipe, texts[i : i + 64])[0] for i in range(0, len(texts), 64)])
    row_of = {text: row for row, text in enumerate(texts)}
    network = start(pipe.unet, round(math.log2(family.image_size[0] / data.latents.shape[-2])), args.init)
    network.to(device).train().requires_grad_(True)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    names = ("kind", "people", "steps", "batch", "lr", "strength", "caption_dropout", "precision")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    inputs = {} if args.kind == "depth" else {"train": directory_sha256(args.train)}
    if args.init:
        inputs["init"] = sha256_file(args.init / "diffusion_pytorch_model.safetensors")
    record = run_record("controlnet", family=family, config=settings, seed=args.seed, inputs=inputs)
    course = Course(
        dict(network.named_parameters()), dict(average.named_parameters()), record,
        args.out / ".checkpoint.safetensors", steps=args.steps, lr=args.lr, weight_decay=0.01, warmup=100, ema=0.999,
        checkpoint_minutes=args.checkpoint_minutes,
    )  # fmt: skip
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    while course.step < args.steps:
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "controlnet", course.step))
        rows = torch.randint(0, len(data.latents), (args.batch,), generator=generator)
        moments = data.latents[rows].float()
        clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        # More noise than not: that is where the layout, and so the pose, is decided.
        t = torch.sigmoid(0.5 + 1.2 * torch.randn(args.batch, generator=generator))
        t = (t * schedule.config.num_train_timesteps).long().clamp(0, schedule.config.num_train_timesteps - 1)
        dropped = torch.rand(args.batch, generator=generator) < args.caption_dropout
        pairs = zip(rows.tolist(), dropped, strict=True)
        hidden = states[[row_of["" if drop else data.captions[row]] for row, drop in pairs]].to(device)
        noisy, target = (
            part.to(device)
            for part in (schedule.add_noise(clean, noise, t), losses.diffusion_target(schedule, clean, noise, t))
        )
        t, condition = t.to(device), as_condition(data.conditions[rows.numpy()]).to(device)
        with computing(device, args.precision):
            down, mid = network(noisy, t, hidden, condition, return_dict=False)
            prediction = pipe.unet(
                noisy, t, hidden, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample
        kind = schedule.config.prediction_type
        course.update(losses.loss_diffusion(prediction, target, losses.alpha_bar(schedule, t), kind, 0.0))
    facts = {"photos": len(data.captions), "seed": args.seed, **settings}
    export(average, args, facts | ({"from": "an earlier one of this script"} if args.init else {}))
    course.finished()


def export(network: ControlNetModel, args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Write OUT/export, with the output layers times --strength, and OUT/facts.json."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith(("controlnet_down_blocks.", "controlnet_mid_block.")):
                weight *= args.strength
    network.half().save_pretrained(args.out / "export")
    store_float8(args.out / "export")
    (args.out / "facts.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
