"""What the training scripts of the perception models share: options, the rendered photos with their truth, the cards.

A photo directory is what `bolid synth` writes: `<person>/<name>.jpg`, `.txt` (caption) and `.json` (truth).
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bolid.errors import BolidError
from bolid.run import write_atomic

FLIP_LANDMARKS = [1, 0, 2, 4, 3]  # left eye, right eye, nose, mouth left, mouth right


def options(part: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all these scripts have; `part` is the model's folder in bolid/tiny."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path("photos/train"), help="photos of the training people")
    parser.add_argument("--val", type=Path, default=Path("photos/val"), help="photos of held-out people")
    parser.add_argument("--work", type=Path, default=Path("runs") / part, help="checkpoints, and data made on the way")
    parser.add_argument("--out", type=Path, default=Path("bolid/tiny") / part, help="where the weights go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run instead of going on with it")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options, after an earlier run was forgotten if they say so."""
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    return args


def read_truth(photos: Path, *, people: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The truth of every photo under `photos`, each with its "path" (the jpg) and "caption".

    People come in a seeded random order, and `people` limits their number; one person's photos stay together.
    Raises BolidError when there are none. A photo without its truth (still being rendered, say) is left out.
    """
    directories = sorted(path for path in Path(photos).iterdir() if path.is_dir()) if Path(photos).is_dir() else []
    random.Random(seed).shuffle(directories)
    rows = [row for directory in directories[:people] for row in _read_person(directory)]
    if not rows:
        raise BolidError(f"no rendered photos under {photos}", "render some first: examples/tiny_family/make_photos.sh")
    return rows


def _read_person(directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(directory.glob("*.json")):
        image, text = path.with_suffix(".jpg"), path.with_suffix(".txt")
        if not (image.is_file() and text.is_file()):
            continue
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # half written
        if "keypoints" in row:
            yield {**row, "path": image, "caption": text.read_text(encoding="utf-8").strip()}


def read_image(path: Path) -> np.ndarray:
    """uint8 [H,W,3], RGB."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_resized(rows: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """uint8 [N,h,w,3], RGB: all the photos of `rows` at one size (height, width), by area averaging."""
    stack = np.empty((len(rows), *size, 3), np.uint8)
    for image, row in zip(stack, rows, strict=True):
        photo = read_image(row["path"])
        if photo.shape[:2] != size:
            import cv2

            photo = cv2.resize(photo, size[::-1], interpolation=cv2.INTER_AREA)
        image[:] = photo
    return stack


def rebuilt(pixels: np.ndarray, vae: Any = None) -> np.ndarray:
    """Pictures, uint8 [N,h,w,3], encoded and decoded by an autoencoder: by default the tiny base's, of its size."""
    import torch

    from bolid.train_adapter.precision import computing

    vae, parts = vae or _autoencoder(), []
    for batch in torch.from_numpy(pixels).split(64):
        x = (batch.to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1).to(memory_format=torch.channels_last)
        with torch.no_grad(), computing(vae.device):
            y = vae(x).sample.float().clamp(-1, 1)
        parts.append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


@functools.cache
def _autoencoder() -> Any:
    import torch
    from diffusers import AutoencoderTiny

    from bolid.models.families import get_family

    vae = AutoencoderTiny.from_pretrained(get_family("tiny").require("base") / "vae").eval()
    return vae.to(memory_format=torch.channels_last)


def r2(truth: np.ndarray, predicted: np.ndarray) -> list[float]:
    """`bolid.method.metrics.r2_scores` of arrays [N, R]: R numbers."""
    import torch

    from bolid.method.metrics import r2_scores

    return r2_scores(torch.from_numpy(truth).double(), torch.from_numpy(predicted).double()).tolist()


def store_float8(folder: Path, chosen: Callable[[str], bool] = lambda name: True) -> None:
    """Keep the matrices of a diffusers network in `folder`, those whose names are `chosen`, as 8-bit floats (e4m3):
    half the size of float16. diffusers converts them on loading, whatever dtype is asked for.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "diffusion_pytorch_model.safetensors"
    weights = {
        name: weight.to(torch.float8_e4m3fn) if weight.ndim > 1 and chosen(name) else weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file.with_suffix(".tmp"), metadata={"format": "pt"})
    file.with_suffix(".tmp").chmod(0o644)
    file.with_suffix(".tmp").replace(file)


def write_card(
    directory: Path, title: str, body: str, figures: dict[str, Any], facts: dict[str, Any], name: str = "README.md"
) -> None:
    """The model card: what it is, how it was trained, and the figures measured on held-out people."""
    training = "\n".join(f"- {name}: {_number(value)}" for name, value in facts.items())
    table = "\n".join(f"| {name} | {_number(value)} |" for name, value in figures.items())
    write_atomic(
        Path(directory) / name,
        f"# {title}\n\n{body.strip()}\n\n## Training\n\n{training}\n\n"
        f"## Measured on held-out synthetic people\n\n| figure | value |\n| --- | --- |\n{table}\n",
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
