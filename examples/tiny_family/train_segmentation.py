"""Train the segmentation network of the tiny family on renders: crop and keypoints -> the person's mask.

    python examples/tiny_family/train_segmentation.py photos/train --out bolid/tiny/segmentation

The masks are the renderer's own. Domain randomisation: the place behind the person is replaced by noise of any
spectrum, stripes, checks or another photo; colours are mixed; cloth gets a texture; blur, noise and hard contrasts.
What is read and rendered is kept in --work, so the same command goes on. About 8 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F

from bolid.backends.segmentation import NETWORK, save_segmenter
from bolid.formats.images import read_photo
from bolid.method.body_views import view_crop
from bolid.method.optim import cosine_schedule
from bolid.method.segmentation import DETAIL, SIZE, MaskNet, loss_mask
from bolid.run import derive_seed, run_record
from bolid.synth.people import sample_person, sample_plan
from bolid.synth.render import Renderer

KEYPOINT_NOISE = 0.012  # standard deviation, in heights of the person: the pose network's


def read_person(folder: Path, photos: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(crops u8 [n, H, W, 3], masks u8 [n, H, W], keypoints f32 [n, 17, 3]) of a person's first photos."""
    seed = int(folder.name[1:])
    rng = np.random.default_rng(derive_seed(seed, "segmentation"))
    files = sorted(folder.glob("*.jpg"))[:photos]
    truth = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    renderer = Renderer(sample_person(seed), (truth[0]["height"], truth[0]["width"]))
    parts = []
    for file, true in zip(files, truth, strict=True):
        mask, points = renderer.outline(sample_plan(renderer.person, true["photo"]))
        points = points.copy()
        points[:, 2] = np.where(points[:, 2] > 0, rng.uniform(0.5, 1.0, 17), 0)
        tall = np.ptp(points[points[:, 2] > 0, 1])
        points[:, :2] += rng.normal(0, KEYPOINT_NOISE * tall, (17, 2))
        crop, inside = view_crop(read_photo(file), points.astype(np.float32), detail=DETAIL)
        cut, _ = view_crop(np.repeat(np.uint8(255) * mask[..., None], 3, 2), points.astype(np.float32), detail=DETAIL)
        parts.append((crop, cut[..., 0], inside))
    crops, masks, keypoints = zip(*parts, strict=True)
    return np.stack(crops), np.stack(masks), np.stack(keypoints)


def read_people(photos: Path, people: int, each: int, work: Path) -> list[torch.Tensor]:
    """Crops, masks and keypoints of all people; kept in `work`, 50 people a file."""
    work.mkdir(parents=True, exist_ok=True)
    folders = sorted(path for path in photos.iterdir() if path.is_dir())[:people]
    parts = []
    for start in range(0, len(folders), 50):
        path = work / f"{folders[start].name}.npz"
        if not path.exists():
            found = [read_person(folder, each) for folder in folders[start : start + 50]]
            crops, masks, keypoints = (np.concatenate(part) for part in zip(*found, strict=True))
            temporary = path.with_suffix(".tmp.npz")
            np.savez(temporary, crops=crops, masks=masks, keypoints=keypoints)
            temporary.replace(path)
        with np.load(path) as stored:
            parts.append([stored[name] for name in ("crops", "masks", "keypoints")])
    return [torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)]


# ---- domain randomisation ------------------------------------------------------------------------------------------


def texture(n: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures of noise with a spectrum of 1/f^a, stripes and checks: [n, 3, H, W] in -1..1."""
    h, w = SIZE
    frequency = torch.sqrt(torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.rfftfreq(w)[None] ** 2)
    exponent = 2.5 * torch.rand(n, 1, 1, 1, generator=generator)
    white = torch.fft.rfft2(torch.randn(n, 3, h, w, generator=generator))
    noise = torch.fft.irfft2(white / frequency.clamp_min(1 / h) ** exponent, s=SIZE)
    noise = noise / noise.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-0.75, 0.75, w), indexing="ij")
    angle, period = 2 * math.pi * torch.rand(n, 1, 1, generator=generator), torch.rand(n, 1, 1, generator=generator)
    period = 3 * 20**period
    along, across = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    stripes = (math.pi * period * along).sin().sign()
    stripes = stripes * torch.where(
        torch.rand(n, 1, 1, generator=generator) < 0.5, (math.pi * period * across).sin().sign(), torch.ones(1)
    )
    share = (torch.rand(n, 1, 1, 1, generator=generator) - 0.4).clamp_min(0)
    mean = 2 * torch.rand(n, 3, 1, 1, generator=generator) - 1
    contrast = 0.05 + 0.6 * torch.rand(n, 1, 1, 1, generator=generator)
    return (mean + contrast * noise + share * stripes[:, None]).clamp(-1, 1)


def randomise(crops: torch.Tensor, masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crops [N, 3, H, W] in -1..1 with other places, colours, cloth and cameras; masks [N, H, W] 0..1."""
    n = len(crops)

    def chance(probability: float) -> torch.Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator) < probability).float()

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    mask = masks[:, None]
    mix = torch.eye(3) + 0.4 * torch.randn(n, 3, 3, generator=generator)
    mix = mix / mix.sum(-1, keepdim=True).abs().clamp_min(0.5)
    person = torch.einsum("nij,njhw->nihw", mix, crops) * uniform(0.5, 1.5, 1, 1, 1) + uniform(-0.4, 0.4, 1, 1, 1)
    person = torch.where(chance(0.3) > 0, crops, person)
    person = person + chance(0.5) * uniform(0.05, 0.5, 1, 1, 1) * texture(n, generator)
    behind = torch.where(chance(0.5) > 0, texture(n, generator), crops[torch.randperm(n, generator=generator)])
    behind = torch.where(chance(0.3) > 0, crops, behind)
    picture = person * mask + behind * (1 - mask)
    grey = picture.mean(1, keepdim=True).expand_as(picture)
    picture = torch.where(chance(0.15) > 0, grey, picture)
    small = F.interpolate(F.interpolate(picture, scale_factor=0.5, mode="area"), SIZE, mode="bilinear")
    picture = torch.where(chance(0.2) > 0, small, picture)
    picture = picture + chance(0.5) * uniform(0, 0.15, 1, 1, 1) * torch.randn(picture.shape, generator=generator)
    return picture.clamp(-1, 1)


def moved(
    crops: torch.Tensor, masks: torch.Tensor, keypoints: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half of them mirrored; the keypoints shaken, some lost."""
    flip = torch.rand(len(crops), generator=generator) < 0.5
    crops = torch.where(flip[:, None, None, None], crops.flip(-1), crops)
    masks = torch.where(flip[:, None, None], masks.flip(-1), masks)
    keypoints = torch.where(flip[:, None, None], keypoints * torch.tensor([-1.0, 1.0, 1.0]), keypoints)
    shaken = keypoints[..., :2] + 0.015 * torch.randn(keypoints[..., :2].shape, generator=generator)
    lost = torch.rand(keypoints[..., 2:].shape, generator=generator) < 0.05
    return crops, masks, torch.cat([shaken, keypoints[..., 2:] * ~lost], -1)


# ---- training ------------------------------------------------------------------------------------------------------


def train(data: list[torch.Tensor], steps: int, batch: int, seed: int) -> MaskNet:
    """The network after so many steps of AdamW."""
    torch.manual_seed(derive_seed(seed, "segmentation", "init"))
    net = MaskNet().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    started, average = time.monotonic(), 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(derive_seed(seed, "segmentation", step))
        rows = torch.randint(len(data[0]), (batch,), generator=generator)
        crops = data[0][rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        crops, masks, keypoints = moved(crops, data[1][rows].float() / 255, data[2][rows], generator)
        crops = randomise(crops, masks, generator)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * cosine_schedule(step, steps, warmup=30, floor=0.01)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(crops, keypoints)
        loss = loss_mask(logits.float(), masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        average = value if step == 0 else 0.95 * average + 0.05 * value
        if step % 50 == 49:
            print(f"{step + 1} loss {average:.4f} {time.monotonic() - started:.0f} s", flush=True)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--people", type=int, default=800)
    parser.add_argument("--each", type=int, default=3, help="photos of each person")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read_people(args.photos, args.people, args.each, args.work)
    print(f"{len(data[0])} crops", flush=True)
    net = train(data, args.steps, args.batch, args.seed)
    config = {"people": args.people, "each": args.each, "steps": args.steps, "batch": args.batch}
    save_segmenter(args.out, net, run_record(NETWORK, family="tiny", config=config, seed=args.seed))


if __name__ == "__main__":
    main()
