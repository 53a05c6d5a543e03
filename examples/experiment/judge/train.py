"""Render the judge's own people and train it on them: judge.safetensors.

    python examples/experiment/judge/train.py --work runs/judge

Its people are PEOPLE, which nothing else is trained, fitted or reported on, in the looks of looks.py, rendered at
RENDERED and reduced to SIZE.
With the defaults about half an hour of one CPU core; run it again after an interruption and it goes on. `measure.py`
says how well it reads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tiny_family"))

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from judge.looks import photograph
from judge.network import FILE, KIND, SIZE, JudgeNetwork, Output
from make_population import body_of
from torch import nn

from bolid.body.measurements import NAMES
from bolid.body.mesh import PARAMETERS, body_model
from bolid.body.shape import POWERS, measure_body
from bolid.formats.tensors import save_tensors
from bolid.method.keypoints import MIRRORED
from bolid.run import derive_seed, run_record, sha256_file
from bolid.synth.people import RATIO_NAMES, sample_person
from bolid.synth.render import Renderer
from bolid.train_adapter.precision import computing

PEOPLE = range(40_000, 43_000)
CALIBRATION = range(49_000, 49_060)  # who scale the standard deviations
PHOTOS = 2  # of each
RENDERED = (256, 192)
MASK = (SIZE[0] // 4, SIZE[1] // 4)
MEASURES = NAMES[1:]  # all but the stature
TRUTH = len(RATIO_NAMES) + len(MEASURES) + len(PARAMETERS) - 1


class JudgeBatch(NamedTuple):
    """Pictures uint8 [B, *SIZE, 3] and their truth, as `render` has them; masks in 0..1."""

    pictures: torch.Tensor
    marks: torch.Tensor  # [B, 17, 3]
    joints: torch.Tensor  # [B, 17, 3]
    mask: torch.Tensor  # [B, *MASK]


# ---- data ---------------------------------------------------------------------------------------------------------


def render(work: Path, people: range) -> dict[str, np.ndarray]:
    """The photos of `people` in work/<first>-<stop>/*.npy, rendered where missing.

    images uint8 [N, *SIZE, 3], masks uint8 [N, *MASK], keypoints f32 [N, 17, 3] (x and y in -1..1), joints f32
    [N, 17, 3] (looks.Shot), truth f32 [people, R + K + P - 1].
    """
    folder = work / f"{people.start}-{people.stop}"
    count = len(people) * PHOTOS
    shapes = {
        "images": ((count, *SIZE, 3), np.uint8), "masks": ((count, *MASK), np.uint8),
        "keypoints": ((count, 17, 3), np.float32), "joints": ((count, 17, 3), np.float32),
        "truth": ((len(people), TRUTH), np.float32),
    }  # fmt: skip
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        mode = "r+" if (folder / "truth.npy").is_file() else "w+"
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, dtype, shape)
            for name, (shape, dtype) in shapes.items()
        }
        for row, seed in enumerate(people):
            if arrays["truth"][row].any():  # by an earlier run
                continue
            renderer = Renderer(sample_person(seed), RENDERED)
            for k in range(PHOTOS):
                photo, place = photograph(renderer, k), row * PHOTOS + k
                arrays["images"][place] = cv2.resize(photo.image, SIZE[::-1], interpolation=cv2.INTER_AREA)
                arrays["masks"][place] = photo.mask.reshape(MASK[0], 8, MASK[1], 8).mean((1, 3)).round()
                arrays["joints"][place] = photo.joints
                marks = photo.keypoints
                marks[:, :2] = marks[:, :2] / RENDERED[::-1] * 2 - 1
                arrays["keypoints"][place] = marks
            arrays["truth"][row] = truth_of(renderer)  # last: it says that the photos are there
        for array in arrays.values():
            array.flush()
        (folder / "done").touch()
        print(f"{count} photos rendered, {time.process_time():.0f} s of CPU", flush=True)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}


def truth_of(renderer: Renderer) -> np.ndarray:
    """Ratios, measurements over the stature (the mass over its cube), and parameters without the stature, f32."""
    body = body_of(renderer.person.seed)
    sizes = measure_body(body[None])[0] / body[0] ** POWERS
    return np.array([*(renderer.ratios[name] for name in RATIO_NAMES), *sizes[1:], *body[1:]], np.float32)


def mesh_metric(parameters: np.ndarray, vertices: int = 400) -> torch.Tensor:
    """[P - 1, P - 1] of standardised parameters [n, P - 1]: squared distance of two bodies' meshes, centred and scaled
    alike, to first order and over that of a body to the mean body."""
    chosen = np.random.default_rng(0).permutation(len(body_model().canonical))[:vertices]
    bodies = np.concatenate([np.ones((len(parameters), 1)), parameters], 1)
    parts = []
    for part in np.array_split(bodies, max(len(bodies) // 40, 1)):
        points = body_model().rest(part)[:, chosen]
        points = points - points.mean(1, keepdims=True)
        parts.append(points / np.sqrt((points**2).sum((1, 2), keepdims=True)))
    meshes = np.concatenate(parts).reshape(len(bodies), -1)
    mean, std = parameters.mean(0), parameters.std(0)
    line = np.linalg.lstsq((parameters - mean) / std, meshes - meshes.mean(0), rcond=None)[0]
    metric = line @ line.T
    metric = metric / np.trace(metric) + 0.1 * np.eye(len(metric)) / len(metric)
    return torch.from_numpy(metric).float()


def augmented(batch: JudgeBatch, generator: torch.Generator) -> JudgeBatch:
    """The batch with pictures f32 [B, 3, *SIZE] in -1..1, and truth that fits them.

    Mirrored, moved and scaled; in other light; soft, noisy, coarse in places and compressed, as generated pictures are.
    """
    pixels, marks, joints, mask = batch
    b = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    zoom, mirror, shift = uniform(0.9, 1.1), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0), uniform(-0.06, 0.06, 2)
    affine = torch.zeros(b, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = mirror / zoom, 1 / zoom, shift
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), False), padding_mode="border", align_corners=False)
    grid = F.affine_grid(affine, [b, 1, *MASK], False)
    mask = F.grid_sample(mask[:, None], grid, align_corners=False)[:, 0]
    mirrored = (mirror < 0)[:, None, None]
    marks = torch.where(mirrored, marks[:, MIRRORED], marks)
    places = (marks[..., :2] - shift[:, None]) * torch.stack([mirror * zoom, zoom], -1)[:, None]
    inside = (places.abs() < 1).all(-1, keepdim=True)
    marks = torch.cat([places, marks[..., 2:] * inside], -1)
    joints = torch.where(mirrored, joints[:, MIRRORED] * torch.tensor([-1.0, 1, 1]), joints)
    x = degraded(x, uniform, generator)
    x = x * uniform(0.85, 1.15, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    x = (x + torch.randn(x.shape, generator=generator) * uniform(-0.03, 0.05, 1, 1, 1).clamp(0)).clamp(-1, 1)
    return JudgeBatch(x, marks, joints, mask)


def degraded(x: torch.Tensor, uniform: Callable[..., torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures soft with coarse noise, a quarter from a smaller size, a quarter through JPEG."""
    coarse = torch.randn(len(x), 3, SIZE[0] // 2, SIZE[1] // 2, generator=generator) * uniform(
        -0.05, 0.08, 1, 1, 1
    ).clamp(0)
    soft = F.interpolate(F.avg_pool2d(x, 2) + coarse, SIZE, mode="bilinear")
    x = x + uniform(-0.6, 0.8, 1, 1, 1).clamp(0) * (soft - x)
    quarter = max(len(x) // 4, 1)
    scale = float(torch.rand(1, generator=generator)) * 0.5 + 0.4
    small = F.interpolate(x[:quarter], scale_factor=scale, mode="bilinear", antialias=True)
    x[:quarter] = F.interpolate(small, SIZE, mode="bicubic", antialias=True)
    for picture in x[quarter : 2 * quarter]:
        quality = int(torch.randint(25, 90, (1,), generator=generator))
        pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        coded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        picture.copy_(torch.from_numpy(cv2.imdecode(coded, cv2.IMREAD_COLOR)).permute(2, 0, 1) / 127.5 - 1)
    return x


# ---- training -----------------------------------------------------------------------------------------------------


def losses(out: Output, target: torch.Tensor, metric: torch.Tensor, batch: JudgeBatch) -> dict[str, torch.Tensor]:
    """{name: loss}. `target` [B, R + K + P - 1], standardised."""
    count = out.values.shape[1]
    off = out.values - target[:, :count]
    # Gaussian likelihood, weighted by its own variance so that what is hard is learnt too (Seitzer et al.,
    # arXiv:2203.09168).
    likely = (0.5 * (off**2 * (-out.logvar).exp() + out.logvar) * (0.5 * out.logvar).exp().detach()).mean()
    body = out.body - target[:, count:]
    inside = (batch.marks[..., 2:] > 0).float()
    missed = F.smooth_l1_loss(out.places, batch.marks[..., :2], beta=0.02, reduction="none") * inside
    return {
        "likelihood": likely,
        "body": 0.5 * ((body @ metric) * body).sum(1).mean(),
        "places": 4 * missed.sum() / inside.sum(),
        "joints": 20 * F.smooth_l1_loss(out.joints, batch.joints, beta=0.02),
        "mask": 0.2 * F.binary_cross_entropy_with_logits(out.mask[:, 0], batch.mask),
    }


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of one step: 100 steps of warm-up, a plateau, and down to 0 over the last 30 %. So a training can be made longer
    as long as it has not come to its last part."""
    return peak * min((step + 1) / 100, 1.0, (steps - step) / (0.3 * steps))


def train(args: argparse.Namespace, data: dict[str, np.ndarray]) -> tuple[JudgeNetwork, np.ndarray, np.ndarray]:
    """(network, mean, standard deviation of what it reads)."""
    torch.manual_seed(derive_seed(args.seed, "judge", "init") % 2**32)
    values = len(RATIO_NAMES) + len(MEASURES)
    truth = np.array(data["truth"])
    mean, std = truth.mean(0), truth.std(0)
    targets = torch.from_numpy((truth - mean) / std)
    metric = mesh_metric(truth[:600, values:].astype(np.float64))
    network = JudgeNetwork(values, truth.shape[1] - values).to(memory_format=torch.channels_last).train()
    if args.init is not None:
        known = torch.load(args.init, weights_only=True)["network"]
        network.load_state_dict({**network.state_dict(), **known})
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.05)
    first, settings = 0, [len(truth), args.batch, args.lr, args.seed]
    checkpoint = args.work / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else {}
    if state.get("settings") == settings:  # of another training it is written over
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    count, started = len(data["images"]), time.process_time()
    sums: dict[str, float] = {}
    each = count // args.batch
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "judge", step))
        order = np.random.default_rng(derive_seed(args.seed, "judge", "epoch", step // each)).permutation(count)
        rows = order[step % each * args.batch :][: args.batch]
        found = [torch.from_numpy(data[name][rows]) for name in ("images", "keypoints", "joints", "masks")]
        batch = augmented(JudgeBatch(*found[:3], found[3].float() / 255), generator)
        with computing("cpu"):
            out = network(batch.pictures.contiguous(memory_format=torch.channels_last))
        parts = losses(out, targets[rows // PHOTOS], metric, batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / 100
        if (step + 1) % 100 == 0:
            losses_now = " ".join(f"{name} {value:.4f}" for name, value in sums.items())
            rate = (step + 1 - first) * args.batch / (time.process_time() - started)
            print(f"step {step + 1}/{args.steps} {losses_now} {rate:.0f} pictures/s", flush=True)
            sums = {}
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state["settings"] = settings
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return network.eval(), mean, std


@torch.no_grad()
def sd_scale(network: JudgeNetwork, data: dict[str, np.ndarray], mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """[R + K]: what the network's standard deviations are multiplied by, so that errors over them have variance 1."""
    ratios = []
    for start in range(0, len(data["images"]), 32):
        pixels = torch.from_numpy(np.array(data["images"][start : start + 32]))
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        both = network(x), network(x.flip(-1))
        value = (both[0].values + both[1].values) / 2
        rows = np.arange(start, start + len(x)) // PHOTOS
        target = torch.from_numpy((data["truth"][rows] - mean) / std)[:, : value.shape[1]]
        ratios.append((value - target) * (-(both[0].logvar + both[1].logvar) / 4).exp())
    return torch.cat(ratios).square().mean(0).sqrt().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/judge"), help="renders and checkpoint")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--people", type=int, default=len(PEOPLE))
    parser.add_argument("--init", type=Path, help="checkpoint.pt of another training to begin with")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    people = PEOPLE[: args.people]
    held_back = render(args.work, CALIBRATION)
    network, mean, std = train(args, render(args.work, people))
    tensors = {
        name: value.contiguous().half() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    tensors |= {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
    tensors["sd_scale"] = torch.from_numpy(sd_scale(network, held_back, mean, std))
    config = {
        "names": [RATIO_NAMES, MEASURES, PARAMETERS[1:]], "steps": args.steps, "batch": args.batch, "lr": args.lr,
        "init": None if args.init is None else sha256_file(args.init),
        "people": {"first": people.start, "count": len(people)}, "photos": PHOTOS,
        "calibration": {"first": CALIBRATION.start, "count": len(CALIBRATION)},
    }  # fmt: skip
    save_tensors(args.out, tensors, run_record(KIND, family=None, config=config, seed=args.seed))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {time.process_time() / 60:.0f} minutes of CPU")


if __name__ == "__main__":
    main()
