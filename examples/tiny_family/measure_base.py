"""What the tiny base's pictures show: faces found, by framing, edges beside the renders', and a contact sheet.

    python examples/tiny_family/measure_base.py PHOTOS --vae base/vae      # renders of held-out people, rebuilt
    python examples/tiny_family/measure_base.py PHOTOS --base base/export  # pictures of 64 prompts a framing

PHOTOS are of people that nothing was trained on. "Found" is by the family's own detector at its usual threshold;
nothing of the base was trained by it. The cosine compares the recogniser's embeddings of a render before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionPipeline
from measure import as_asked
from PIL import Image
from train_base import FEW_STEPS
from truth import read_resized, read_truth, rebuilt

from bolid.backends.face import FaceModel
from bolid.models.families import get_family
from bolid.synth.people import attributes, caption, sample_person, sample_plan
from bolid.train_adapter.precision import computing

FRAMINGS = ("full body", "three-quarter", "portrait")
FIRST_PERSON = 110_000  # of the held-out people whose captions are the prompts


def edge_energy(pictures: np.ndarray) -> float:
    """Mean squared difference between neighbours of pictures uint8 [N, H, W, 3]."""
    x = pictures.astype(np.float32) / 255
    return float(np.square(np.diff(x, axis=1)).mean() + np.square(np.diff(x, axis=2)).mean())


def measure_rebuilt(photos: list[dict[str, Any]], vae: AutoencoderTiny, faces: FaceModel, device: str) -> dict:
    """Figures by framing, of renders whose face is found before they are rebuilt."""
    figures = {}
    for framing in FRAMINGS:
        rows = [row for row in photos if row["attributes"]["framing"] == framing and row["face_box"]]
        before = read_resized(rows, (256, 192))
        after = rebuilt(before, vae)
        found = [(faces.detect(a), faces.detect(b)) for a, b in zip(before, after, strict=True)]
        pairs = [(a[0], b[0]) for a, b in found if a and b]
        error = np.square((before.astype(np.float32) - after) / 255).mean((1, 2, 3))
        figures[framing] = {
            "n": len(rows),
            "found before": np.mean([bool(a) for a, _ in found]),
            "found after": np.mean([bool(b) for _, b in found]),
            "cosine": np.mean([a.embedding @ b.embedding for a, b in pairs]),
            "edges": edge_energy(after) / edge_energy(before),
            "psnr": np.mean(-10 * np.log10(error)),
        }
    return figures


def prompts(framing: str, count: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Captions of held-out people, and the attributes that they ask for."""
    people = [sample_person(FIRST_PERSON + i) for i in range(count)]
    plans = [sample_plan(person, 0, framing=framing) for person in people]
    pairs = list(zip(people, plans, strict=True))
    return [caption(*pair) for pair in pairs], [attributes(*pair) for pair in pairs]


def sample(pipe: StableDiffusionPipeline, texts: list[str], seed: int = 0, **sampler: Any) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] of the texts, without guidance; `sampler` as the pipeline takes it."""
    parts = []
    for start in range(0, len(texts), 16):
        batch = texts[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        with computing(pipe.device):
            made = pipe(batch, guidance_scale=0.0, generator=generators, output_type="np", **sampler).images
        parts.append((made * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def load(base: Path, device: str) -> StableDiffusionPipeline:
    """With the sampler that takes x0-hat as the next level's picture and noises it anew."""
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32).to(device)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=1000)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_base(
    pipe: StableDiffusionPipeline, photos: list[dict[str, Any]], faces: FaceModel, count: int, levels: list[int]
) -> dict:
    """Figures by framing and sampler; "as asked" is the image-text model's reading, of as many pictures."""
    figures = {}
    for framing in FRAMINGS[::2]:
        renders = read_resized([row for row in photos if row["attributes"]["framing"] == framing][:count], (256, 192))
        texts, asked = prompts(framing, count)
        for name, sampler in (
            (f"{len(levels)} levels", {"timesteps": levels}),
            ("12 steps", {"num_inference_steps": 12}),
        ):
            made = sample(pipe, texts, **sampler)
            figures[f"{framing}, {name}"] = {
                "n": count,
                "found": np.mean([bool(faces.detect(picture)) for picture in made]),
                "edges": edge_energy(made) / edge_energy(renders),
                **{f"{what} as asked": value for what, value in as_asked(list(made), asked).items()},
            }
    return figures


def contact_sheet(rows: list[np.ndarray], path: Path) -> None:
    """One row of pictures below the other."""
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows])).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vae", type=Path)
    what.add_argument("--base", type=Path)
    parser.add_argument("--people", type=int, help="of PHOTOS, at most")
    parser.add_argument("--count", type=int, default=64, help="pictures a framing")
    parser.add_argument("--levels", type=int, nargs="+", default=list(FEW_STEPS), help="of the few-step sampler")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photos = read_truth(args.photos, people=args.people)
    faces = FaceModel(get_family("tiny").require("face"))
    if args.vae:
        vae = AutoencoderTiny.from_pretrained(args.vae, torch_dtype=torch.float32).eval().to(args.device)
        figures = measure_rebuilt(photos, vae, faces, args.device)
        if args.sheet:
            some = read_resized(
                [r for f in FRAMINGS for r in photos if r["attributes"]["framing"] == f][::7][:8], (256, 192)
            )
            contact_sheet([some, rebuilt(some, vae)], args.sheet)
    else:
        pipe = load(args.base, args.device)
        figures = measure_base(pipe, photos, faces, args.count, args.levels)
        if args.sheet:
            texts = prompts("full body", 5)[0] + prompts("three-quarter", 2)[0] + prompts("portrait", 3)[0]
            contact_sheet([sample(pipe, texts, seed=s, timesteps=args.levels) for s in (0, 1000)], args.sheet)
    rounded = {row: {name: round(float(value), 3) for name, value in r.items()} for row, r in figures.items()}
    print(json.dumps(rounded, indent=1))


if __name__ == "__main__":
    main()
