"""Train the tiny family's pose model: YOLO11n-pose, from scratch, with ultralytics' own trainer.

    python examples/tiny_family/train_pose.py --photos photos/train --val photos/val --out bolid/tiny/pose

About an hour on one CPU core with the defaults. Run it again after an interruption and it goes on where it stopped
(at the last finished epoch). First come epochs on pictures of 128 pixels, which cost a quarter, then epochs at 256.
`--init bolid/tiny/pose --small-epochs 0` goes on from the weights that are there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["ULTRALYTICS_SAFE_LOAD"] = "0"  # resuming reads the checkpoints that this very script has written
import cv2
import numpy as np
from truth import options, parse, read_image, read_truth, rebuilt, write_card

from bolid.method.keypoints import MIRRORED
from bolid.models.families import get_family
from bolid.run import derive_seed, run_record, write_atomic
from bolid.train_adapter.precision import computing

IMAGE_SIZE = 256  # longest side, pixels
SMALL_SIZE = 128  # of the first epochs
NETWORK = "yolo11n-pose.yaml"
# Of the keypoint loss, in parts of the person's size. COCO's own say how far apart *people* put a point (up to 0.1 at
# the hips); with them the loss is content with errors as large as the differences between bodies.
SIGMA = 0.025

CARD = """
YOLO11n-pose (ultralytics' own `yolo11n-pose.yaml`, 1 class, 17 COCO keypoints), trained from scratch on renders of
Anny's synthetic people. It knows only that world: do not expect it to find people in real photos.

`model.safetensors` holds the averaged (EMA) weights as fp16, before fusing; `config.json` names the network and the
size of its input. Loaded by `bolid.backends.pose.PoseModel`, with no pickle involved.

License: the network and its trainer are ultralytics', licensed AGPL-3.0, and ultralytics regards models trained with
it as covered by the same license; so these weights are offered under AGPL-3.0. The training pictures are renders of
Anny (Apache-2.0, shapes CC0).
"""


# ---------------------------------------------------------------- the data set, in ultralytics' format


def write_dataset(photos: Path, val: Path, directory: Path, *, pictures: int, reconstructed: float, seed: int) -> Path:
    """`directory`/{train,val}/{images,labels}; returns the data.yaml. A finished one is kept as it is.

    `reconstructed`: the fraction of pictures that pass through the base's autoencoder, as generated ones do.
    """
    description = directory / "data.yaml"
    if description.is_file():
        return description
    shutil.rmtree(directory, ignore_errors=True)
    rng = random.Random(derive_seed(seed, "pose", "data"))
    rows = read_truth(photos, seed=seed)
    rng.shuffle(rows)
    rows = rows[:pictures]
    for index, row in enumerate(rows):
        image, people = read_image(row["path"]), [row]
        kind = rng.random()
        if kind < 0.10:
            image, people = _shrunk(rng, row, rows)
        elif kind < 0.16:
            image, people = _two_people(rng, row, rng.choice(rows))
        elif kind < 0.20:
            image, people = _background(rng, rows, image.shape[:2]), []
        look = rng.random()
        if look < reconstructed:
            height, width = image.shape[:2]
            small = cv2.resize(image, get_family("tiny").image_size[::-1], interpolation=cv2.INTER_AREA)
            image = cv2.resize(rebuilt(small[None])[0], (width, height), interpolation=cv2.INTER_LINEAR)
        elif look < reconstructed + 0.25 * (1 - reconstructed):  # generated pictures are less sharp
            sharpness = rng.uniform(0.375, 0.6)
            small = cv2.resize(image, None, fx=sharpness, fy=sharpness, interpolation=cv2.INTER_AREA)
            image = cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        _write_picture(directory / "train", f"{index:06d}", image, people)
    for index, row in enumerate(read_truth(val, seed=seed)[:200]):
        _write_picture(directory / "val", f"{index:06d}", read_image(row["path"]), [row])
    write_atomic(
        description,
        json.dumps({
            "path": str(directory.resolve()), "train": "train/images", "val": "val/images", "names": {0: "person"},
            "kpt_shape": [17, 3], "flip_idx": MIRRORED,
        }),  # JSON is YAML
    )  # fmt: skip
    return description


def _write_picture(directory: Path, name: str, image: np.ndarray, people: list[dict[str, Any]]) -> None:
    (directory / "images").mkdir(parents=True, exist_ok=True)
    (directory / "labels").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(directory / "images" / f"{name}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 93])
    lines = [label_line(person, image.shape[1], image.shape[0]) for person in people]
    (directory / "labels" / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")


def label_line(person: dict[str, Any], width: int, height: int) -> str:
    """class, box centre and size, then x, y, visibility of each keypoint; all relative to the picture's size."""
    box = np.clip(np.array(person["box"], float), 0, [width, height, width, height])
    values = [(box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height]
    values += [(box[2] - box[0]) / width, (box[3] - box[1]) / height]
    for x, y, visible in person["keypoints"]:
        inside = visible > 0 and 0 <= x < width and 0 <= y < height
        values += [x / width, y / height, int(visible)] if inside else [0, 0, 0]
    return "0 " + " ".join(f"{value:.6g}" for value in values)


def _moved(person: dict[str, Any], scale: float, dx: float, dy: float) -> dict[str, Any]:
    """The truth after the picture was scaled and moved."""
    box = np.array(person["box"], float) * scale + [dx, dy, dx, dy]
    keypoints = np.array(person["keypoints"], float) * [scale, scale, 1] + [dx, dy, 0]
    return {"box": box.tolist(), "keypoints": keypoints.tolist()}


def _background(rng: random.Random, rows: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """A picture without anybody: noise, a flat colour, a gradient, or the strip beside a person, stretched."""
    height, width = size
    kind = rng.randrange(4)
    noise = np.random.default_rng(rng.getrandbits(32))
    if kind == 0:
        grain = noise.integers(0, 256, (rng.choice([height, height // 4, height // 16]), width // 4, 3), np.uint8)
        return cv2.resize(grain, (width, height), interpolation=rng.choice([cv2.INTER_NEAREST, cv2.INTER_CUBIC]))
    if kind == 1:
        colors = noise.integers(0, 256, (rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), 3), np.uint8)
        return cv2.resize(colors, (width, height), interpolation=cv2.INTER_LINEAR)
    for _ in range(20):
        row = rng.choice(rows)
        left, right = max(0, int(row["box"][0]) - 2), min(row["width"], int(row["box"][2]) + 2)
        strip = slice(0, left) if left >= row["width"] - right else slice(right, row["width"])
        image = read_image(row["path"])[:, strip]
        if image.shape[1] >= 16:
            return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.full((height, width, 3), rng.randrange(256), np.uint8)


def _shrunk(rng: random.Random, row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[np.ndarray, list]:
    """The photo at 35 to 85 % of its size, somewhere on a background."""
    image, scale = read_image(row["path"]), rng.uniform(0.35, 0.85)
    height, width = image.shape[:2]
    canvas = _background(rng, rows, (height, width))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    y, x = rng.randint(0, height - small.shape[0]), rng.randint(0, width - small.shape[1])
    canvas[y : y + small.shape[0], x : x + small.shape[1]] = small
    return canvas, [_moved(row, scale, x, y)]


def _two_people(rng: random.Random, first: dict[str, Any], second: dict[str, Any]) -> tuple[np.ndarray, list]:
    """Two photos side by side, each cut to its person and shrunk to half the width."""
    height, width = first["height"], first["width"]
    canvas, people = np.full((height, width, 3), 114, np.uint8), []
    for side, row in enumerate((first, second)):
        half = width // 2
        x0, x1 = max(0, int(row["box"][0]) - 4), min(row["width"], int(row["box"][2]) + 4)
        scale = min(half / (x1 - x0), rng.uniform(0.6, 1.0))
        # The cut-out grows to the shape of the half, so that most of the half is filled.
        x1 = min(row["width"], max(x1, x0 + int(half / scale)))
        x0 = max(0, x1 - int(half / scale))
        cut = cv2.resize(read_image(row["path"])[:, x0:x1], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        cut = cut[:height, :half]
        y = rng.randint(0, height - cut.shape[0])
        canvas[y : y + cut.shape[0], side * half : side * half + cut.shape[1]] = cut
        people.append(_moved(row, scale, side * half - x0 * scale, y))
    return canvas, people


# ---------------------------------------------------------------- training


def train_stage(name: str, data: Path, work: Path, *, start: Any, size: int, epochs: int, args: Any) -> Path:
    """One run of ultralytics' trainer; returns its last checkpoint. A finished stage is not run again.

    `start`: a checkpoint of its trainer, or a network, to go on from; None to start from nothing.
    """
    from ultralytics import YOLO

    last, done = work / name / "weights" / "last.pt", work / name / "done"
    if done.is_file():
        return last
    resume = last.is_file()
    model = YOLO(str(last) if resume else NETWORK, task="pose")
    if start is not None and not resume:
        model.load(str(start) if isinstance(start, Path) else start)
    model.add_callback("on_train_start", _prepare)
    model.train(
        data=str(data), project=str(work.resolve()), name=name, exist_ok=True, resume=resume,
        pretrained=start is not None, imgsz=size, epochs=epochs, batch=args.batch, nbs=args.batch, device="cpu",
        workers=0, cache="ram", rect=True, optimizer="AdamW", lr0=args.lr if start is None else args.lr * 0.75,
        lrf=0.3 if start is None else 0.02, cos_lr=True, warmup_epochs=0.5, warmup_bias_lr=0.01, weight_decay=0.01,
        amp=False, val=False, plots=False, seed=args.seed, mosaic=0.0, close_mosaic=0, scale=0.25, translate=0.08,
        degrees=3.0, hsv_h=0.01, hsv_s=0.3, hsv_v=0.3, fliplr=0.5, box=5.0, pose=18.0, deterministic=False,
        verbose=False,
    )  # fmt: skip
    write_atomic(done, "")
    return last


def _prepare(trainer: Any) -> None:
    """A sharper keypoint loss; and channels last and bfloat16, which ultralytics offers for CUDA only: twice as fast on
    a core that has AMX."""
    import torch

    network = trainer.model.to(memory_format=torch.channels_last)
    network.kpt_oks_sigmas = [SIGMA] * 17  # of the loss alone: validation counts with COCO's
    predict = network.predict

    def predict_in_bfloat16(*args: Any, **kwargs: Any) -> Any:
        with computing("cpu"):
            outputs = predict(*args, **kwargs)
        return _as_float(outputs)

    network.predict = predict_in_bfloat16


def _as_float(outputs: Any) -> Any:
    """The network's outputs in float32, for the loss."""
    if isinstance(outputs, dict):
        return {name: _as_float(value) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_as_float(value) for value in outputs)
    return outputs.float() if hasattr(outputs, "is_floating_point") and outputs.is_floating_point() else outputs


def shipped_network(directory: Path) -> Any:
    """Ultralytics' network with the weights of `directory`, to go on from."""
    from ultralytics.nn.tasks import PoseModel as Network

    network = Network(NETWORK, ch=3, nc=1, data_kpt_shape=(17, 3), verbose=False)
    network.load_state_dict(_unfused(directory))
    return network


def export(checkpoint: Path, directory: Path, *, config: dict[str, Any], seed: int) -> None:
    """The averaged weights of an ultralytics checkpoint as `directory`/model.safetensors (fp16) and config.json."""
    import torch

    from bolid.backends.pose import KIND
    from bolid.formats.tensors import save_tensors

    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = state.get("ema") or state["model"]
    tensors = {
        name: value.contiguous().half() if value.is_floating_point() else value
        for name, value in model.float().state_dict().items()
    }
    record = run_record(KIND, family="tiny", config=config, seed=seed)
    save_tensors(directory / "model.safetensors", tensors, record)
    write_atomic(directory / "config.json", json.dumps({"yaml": NETWORK, "imgsz": IMAGE_SIZE}) + "\n")


def measure(photos: Path, model: Path | None = None, *, pictures: int = 400) -> dict[str, float]:
    """Ultralytics' own validation of `model` on held-out `photos`: OKS mAP and box mAP, 0..1, and false alarms."""
    from ultralytics import YOLO

    from bolid.backends.pose import PoseModel

    model = model or _shipped()
    pose = PoseModel(model)
    with tempfile.TemporaryDirectory() as scratch:
        rows = read_truth(photos)[:pictures]
        for index, row in enumerate(rows):
            _write_picture(Path(scratch) / "val", f"{index:06d}", read_image(row["path"]), [row])
        data = Path(scratch) / "data.yaml"
        data.write_text(json.dumps({
            "path": scratch, "train": "val/images", "val": "val/images", "names": {0: "person"}, "kpt_shape": [17, 3],
            "flip_idx": MIRRORED,
        }))  # fmt: skip
        yolo = YOLO(NETWORK, task="pose")
        yolo.model = shipped_network(model)
        yolo.model.names = {0: "person"}
        metrics = yolo.val(
            data=str(data), imgsz=pose.image_size, batch=16, device="cpu", workers=0, plots=False, verbose=False,
            project=scratch, rect=True,
        )  # fmt: skip
    found = sum(bool(people) for people in pose.detect([read_image(row["path"]) for row in rows]))
    rng = random.Random(0)
    empty = pose.detect([_background(rng, rows, (256, 192)) for _ in range(100)])
    return {
        "OKS mAP50-95": float(metrics.pose.map),
        "OKS mAP50": float(metrics.pose.map50),
        "box mAP50-95": float(metrics.box.map),
        "person found": found / len(rows),
        "false alarms on pictures without anybody": sum(bool(people) for people in empty) / len(empty),
        "held-out pictures": len(rows),
    }


def _unfused(model: Path) -> dict[str, Any]:
    from bolid.backends.pose import KIND
    from bolid.formats.tensors import load_tensors

    return {name: value.float() for name, value in load_tensors(model / "model.safetensors", KIND)[0].items()}


def _shipped() -> Path:
    from bolid.models.families import get_family

    return get_family("tiny").pose


def main() -> None:
    parser = options("pose", __doc__)
    parser.add_argument("--pictures", type=int, default=14000, help="training pictures")
    parser.add_argument("--small-epochs", type=int, default=3, help=f"epochs on pictures of {SMALL_SIZE} pixels")
    parser.add_argument("--epochs", type=int, default=7, help=f"epochs on pictures of {IMAGE_SIZE} pixels")
    parser.add_argument("--init", type=Path, help="start from this pose model instead of from nothing")
    parser.add_argument(
        "--reconstructed", type=float, default=0.0, help="fraction of pictures that pass through the base's autoencoder"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parse(parser)

    started = time.time()
    checkpoint: Any = shipped_network(args.init) if args.init else None
    for name, size, epochs in (("small", SMALL_SIZE, args.small_epochs), ("full", IMAGE_SIZE, args.epochs)):
        if epochs:
            data = write_dataset(
                args.photos,
                args.val,
                args.work / "data",
                pictures=args.pictures,
                reconstructed=args.reconstructed,
                seed=args.seed,
            )
            checkpoint = train_stage(name, data, args.work, start=checkpoint, size=size, epochs=epochs, args=args)
    config = {
        name: getattr(args, name) for name in ("pictures", "reconstructed", "small_epochs", "epochs", "batch", "lr")
    }
    config["init"] = str(args.init or "")
    export(checkpoint, args.out, config=config, seed=args.seed)
    figures = measure(args.val, args.out)
    print(json.dumps(figures, indent=2))
    facts = {
        "data": f"{args.pictures} rendered photos (of which 10 % shrunk onto other backgrounds, 6 % two people, "
        f"4 % nobody; {args.reconstructed:.0%} through the base's autoencoder, "
        "25 % of the others blurred as if enlarged)",
        "epochs": f"{args.small_epochs} at {SMALL_SIZE} pixels, {args.epochs} at {IMAGE_SIZE}; batch {args.batch}, "
        f"AdamW {args.lr}" + (", started from the weights that were shipped before" if args.init else ""),
        "minutes in the last run of the script": round((time.time() - started) / 60, 1),
        "machine": "1 of 2 shared CPU cores",
        "seed": args.seed,
    }
    write_card(args.out, "Tiny pose model", CARD, figures, facts)


if __name__ == "__main__":
    main()
