"""Train the tiny family's face models: a detector with five landmarks and a recogniser, as an InsightFace pack.

    python examples/tiny_family/train_face.py --photos photos/train --val photos/val --out bolid/tiny/face

About 25 minutes on a shared CPU core with the defaults. Run it again after an interruption to go on where it stopped.

The detector has the outputs of SCRFD (strides 8, 16 and 32, two anchors a cell: scores, boxes, landmarks) and the
recogniser those of ArcFace (112x112 in, 512 numbers out), so that `insightface.app.FaceAnalysis` runs them unchanged.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from truth import FLIP_LANDMARKS, options, parse, read_image, read_truth, write_card

from bolid.backends.probe import Residual, conv_block
from bolid.run import derive_seed, run_record, sha256_file, write_atomic
from bolid.train_adapter.precision import computing

SIDE = 256  # the detector's input is SIDE x SIDE, fixed: InsightFace scales every picture to it
STRIDES = (8, 16, 32)
# Two anchors a cell: the first for the smaller half of a stride's faces. sqrt(width * height) in pixels, from .. to.
SIZES = (((0, 24), (24, 40)), ((40, 62), (62, 90)), ((90, 130), (130, 999)))
FACE = 112
MARGIN = 8  # pixels around a stored face, to move and zoom within

CARD = """
`det.onnx` finds faces and their five landmarks (SCRFD's outputs; a small convolutional pyramid); `rec.onnx` maps an
aligned 112x112 face to 512 numbers (ArcFace's shape; a small ResNet trained with CosFace). Both were trained from
scratch on renders of Anny's synthetic people and know only those. They hardly find real faces and cannot recognise
them.

`insightface.app.FaceAnalysis(name="<this directory>")` loads and runs them. Weights are stored as fp16 and computed
with as fp32. `bolid.json` holds their checksums.

These people differ in the shape of head and face, skin, hair and eyes. In a full-body photo of 192x256 pixels a face
has 20 to 30 pixels, which show less of that.

License: Apache-2.0 (the weights are ours; InsightFace's code is MIT, and its own weights, which are for non-commercial
research only, are not used). The training pictures are renders of Anny (Apache-2.0, shapes CC0).
"""


# ---------------------------------------------------------------- networks


class Detector(nn.Module):
    """[B,3,H,W] in -1..1 -> per stride: score logits [B,2,h,w], box distances [B,8,h,w], landmarks [B,20,h,w],
    the last two in units of the stride, from the cell's corner (SCRFD's convention)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_block(3, 8, 2), conv_block(8, 24, 2))
        self.c3 = nn.Sequential(conv_block(24, 48, 2), Residual(48))
        self.c4 = nn.Sequential(conv_block(48, 72, 2), Residual(72))
        self.c5 = nn.Sequential(conv_block(72, 96, 2), Residual(96))
        self.lateral = nn.ModuleList(nn.Conv2d(width, 40, 1) for width in (48, 72, 96))
        self.smooth = nn.ModuleList(conv_block(40, 40) for _ in STRIDES)
        self.score = nn.ModuleList(nn.Conv2d(40, 2, 1) for _ in STRIDES)
        self.box = nn.ModuleList(nn.Conv2d(40, 8, 1) for _ in STRIDES)
        self.landmarks = nn.ModuleList(nn.Conv2d(40, 20, 1) for _ in STRIDES)
        for score, box in zip(self.score, self.box, strict=True):
            nn.init.constant_(score.bias, -4.0)  # faces are rare
            nn.init.constant_(box.bias, 1.5)

    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        c3 = self.c3(self.stem(x))
        c4 = self.c4(c3)
        c5 = self.c5(c4)
        p5 = self.lateral[2](c5)
        p4 = self.lateral[1](c4) + F.interpolate(p5, scale_factor=2, mode="nearest")
        p3 = self.lateral[0](c3) + F.interpolate(p4, scale_factor=2, mode="nearest")
        levels = [smooth(p) for smooth, p in zip(self.smooth, (p3, p4, p5), strict=True)]
        return [
            (score(p), box(p), landmarks(p))
            for p, score, box, landmarks in zip(levels, self.score, self.box, self.landmarks, strict=True)
        ]


class _AsScrfd(nn.Module):
    """The nine outputs in SCRFD's order and layout: [cells * 2, 1 | 4 | 10], the two anchors of a cell in a row."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        levels = self.detector(x)
        scores = [score.permute(0, 2, 3, 1).reshape(-1, 1).sigmoid() for score, _, _ in levels]
        boxes = [box.permute(0, 2, 3, 1).reshape(-1, 4) for _, box, _ in levels]
        landmarks = [points.permute(0, 2, 3, 1).reshape(-1, 10) for _, _, points in levels]
        return (*scores, *boxes, *landmarks)


class Recogniser(nn.Module):
    """[B,3,112,112] in -1..1 -> [B,512]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_block(3, 16, 2), conv_block(16, 32, 2), Residual(32),
            conv_block(32, 64, 2), Residual(64), Residual(64), conv_block(64, 128, 2), Residual(128), Residual(128),
            nn.Conv2d(128, 128, 7, groups=128, bias=False), nn.BatchNorm2d(128), nn.Flatten(),
            nn.Linear(128, 512, bias=False), nn.BatchNorm1d(512),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


# ---------------------------------------------------------------- the detector's training


def detector_targets(
    box: np.ndarray, landmarks: np.ndarray, height: int, width: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each stride: labels [2,h,w] (1 face, 0 none, -1 does not count) and the face's 14 numbers, in pixels.

    A face belongs to the anchors of its size, and to the cells near its middle.
    """
    size = math.sqrt(max(1.0, (box[2] - box[0]) * (box[3] - box[1])))
    middle = (box[:2] + box[2:]) / 2
    levels = []
    for stride, ranges in zip(STRIDES, SIZES, strict=True):
        rows, columns = height // stride, width // stride
        y, x = np.mgrid[:rows, :columns] * stride
        distance = np.maximum(abs(x - middle[0]), abs(y - middle[1])) / size
        near = distance <= max(0.22, distance.min() + 1e-6)
        labels = np.zeros((2, rows, columns), np.float32)
        for anchor, (low, high) in enumerate(ranges):
            if low * 0.85 <= size < high * 1.15:
                labels[anchor][distance < 0.5] = -1
                labels[anchor][near] = 1
            elif low * 0.6 <= size < high * 1.6:
                labels[anchor][near] = -1
        levels.append((labels, np.concatenate([box, landmarks.ravel()]).astype(np.float32)))
    return levels


def augment_photo(
    image: np.ndarray, row: dict[str, Any], rng: random.Random
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """(uint8 picture, face box or None, landmarks): zoomed, moved, mirrored, with other light, sometimes blurred."""
    height, width = image.shape[:2]
    zoom = math.exp(rng.uniform(math.log(0.6), math.log(1.7)))
    box, points = row["face_box"], row["face_landmarks"]
    has_face = box is not None and points is not None
    if has_face and rng.random() < 0.8:  # keep the face in the picture
        x = rng.uniform(0.25, 0.75) * width - (box[0] + box[2]) / 2 * zoom
        y = rng.uniform(0.15, 0.7) * height - (box[1] + box[3]) / 2 * zoom
        if rng.random() < 0.5:  # or as it was
            zoom = zoom**0.3
            x, y = (1 - zoom) * width / 2 + rng.uniform(-8, 8), (1 - zoom) * height / 2 + rng.uniform(-8, 8)
    else:
        x, y = rng.uniform(-0.5, 0.5) * width, rng.uniform(-0.5, 0.5) * height
    mirror = rng.random() < 0.5
    matrix = np.array([[-zoom if mirror else zoom, 0, width - 1 - x if mirror else x], [0, zoom, y]], np.float32)
    image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (3, 3), 0)
    light = np.array([rng.uniform(0.8, 1.2) * rng.uniform(0.95, 1.05) for _ in range(3)], np.float32)
    image = np.clip(image * light + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    if not has_face:
        return image, None, None
    corners = np.array(box, np.float32).reshape(2, 2) @ matrix[:, :2].T + matrix[:, 2]
    new_box = np.concatenate([corners.min(0), corners.max(0)])
    new_points = np.array(points, np.float32) @ matrix[:, :2].T + matrix[:, 2]
    if mirror:
        new_points = new_points[FLIP_LANDMARKS]
    inside = (new_points >= 0).all(1) & (new_points[:, 0] < width) & (new_points[:, 1] < height)
    if inside.sum() < 3:
        return image, None, None
    return image, new_box, new_points


def detector_loss(outputs: list, targets: list[list[tuple[np.ndarray, np.ndarray]]]) -> torch.Tensor:
    """Focal loss on the scores; 1 - GIoU and landmark distance (over the face's size) on the cells of faces."""
    scores, boxes, points, total = 0.0, [], [], 0
    for level, stride in enumerate(STRIDES):
        score, box, landmark = outputs[level]
        labels = torch.from_numpy(np.stack([target[level][0] for target in targets]))
        probability = score.sigmoid()
        cross = F.binary_cross_entropy_with_logits(score, labels.clamp(0), reduction="none")
        weight = torch.where(labels > 0, 0.5 * (1 - probability) ** 2, 0.5 * probability**2) * (labels >= 0)
        scores = scores + (weight.detach() * cross).sum()
        found = (labels > 0).nonzero()
        total += len(found)
        if not len(found):
            continue
        b, anchor, y, x = found.T
        truth = torch.from_numpy(np.stack([target[level][1] for target in targets]))[b]
        center = torch.stack([x, y], 1).float() * stride
        distances = box.unflatten(1, (2, 4))[b, anchor, :, y, x] * stride
        predicted = torch.cat([center - distances[:, :2], center + distances[:, 2:]], 1)
        boxes.append(1 - _giou(predicted, truth[:, :4]))
        size = ((truth[:, 2] - truth[:, 0]) * (truth[:, 3] - truth[:, 1])).clamp(1).sqrt()
        offsets = landmark.unflatten(1, (2, 10))[b, anchor, :, y, x].unflatten(1, (5, 2)) * stride + center[:, None]
        error = (offsets - truth[:, 4:].unflatten(1, (5, 2))).abs().mean((1, 2)) / size
        points.append(error)
    count = max(1, total)
    if not boxes:
        return scores / count
    return 4 * scores / count + 2 * torch.cat(boxes).mean() + 6 * torch.cat(points).mean()


def _giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(0).prod(1)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(0).prod(1)
    union = (a[:, 2:] - a[:, :2]).clamp(0).prod(1) + (b[:, 2:] - b[:, :2]).clamp(0).prod(1) - overlap
    return overlap / union.clamp(1e-6) - (hull - union) / hull.clamp(1e-6)


def train_detector(rows: list[dict[str, Any]], args: argparse.Namespace) -> Detector:
    torch.manual_seed(derive_seed(args.seed, "face", "detector") % 2**32)
    network = Detector()
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.01)
    first = _resume(args.work / "detector.pt", network, optimizer)
    if first >= args.detector_steps:
        return network.eval()
    images = [read_image(row["path"]) for row in rows]
    network.train().to(memory_format=torch.channels_last)
    started = time.time()
    for step in range(first, args.detector_steps):
        rng = random.Random(derive_seed(args.seed, "detector", step))
        _schedule(optimizer, args.lr, step, args.detector_steps)
        batch, targets = [], []
        for index in rng.sample(range(len(rows)), min(args.detector_batch, len(rows))):
            image, box, points = augment_photo(images[index], rows[index], rng)
            height, width = image.shape[:2]
            batch.append(image)
            if box is None or points is None:
                empty = np.zeros(14, np.float32)
                targets.append([(np.zeros((2, height // s, width // s), np.float32), empty) for s in STRIDES])
            else:
                targets.append(detector_targets(box, points, height, width))
        pixels = (torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() - 127.5) / 128
        with computing("cpu"):
            levels = network(pixels.to(memory_format=torch.channels_last))
        loss = detector_loss([tuple(part.float() for part in level) for level in levels], targets)
        _step(loss, network, optimizer)
        _report("detector", step, args.detector_steps, first, started, args.detector_batch, loss)
        if (step + 1) % 200 == 0 or step + 1 == args.detector_steps:
            _save(args.work / "detector.pt", network, optimizer, step + 1)
    return network.eval()


# ---------------------------------------------------------------- the recogniser's training


def stored_face(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """InsightFace's aligned face with a margin around it: uint8 [FACE + 2 MARGIN]^2."""
    from insightface.utils.face_align import estimate_norm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = estimate_norm(np.asarray(landmarks, np.float32), FACE)
    matrix = matrix + np.array([[0, 0, MARGIN], [0, 0, MARGIN]])
    return cv2.warpAffine(image, matrix, (FACE + 2 * MARGIN, FACE + 2 * MARGIN), borderValue=0.0)


def train_recogniser(rows: list[dict[str, Any]], args: argparse.Namespace) -> Recogniser:
    torch.manual_seed(derive_seed(args.seed, "face", "recogniser") % 2**32)
    rows = [row for row in rows if row["face_landmarks"] is not None]
    people = {person: index for index, person in enumerate(dict.fromkeys(row["person"] for row in rows))}
    labels = torch.tensor([people[row["person"]] for row in rows])
    network, centers = Recogniser(), nn.Linear(512, len(people), bias=False)
    both = nn.ModuleDict({"network": network, "centers": centers})
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.lr, weight_decay=0.02)
    first = _resume(args.work / "recogniser.pt", both, optimizer)
    if first >= args.recogniser_steps:
        return network.eval()
    faces = torch.from_numpy(np.stack([stored_face(read_image(row["path"]), row["face_landmarks"]) for row in rows]))
    both.train().to(memory_format=torch.channels_last)
    started = time.time()
    for step in range(first, args.recogniser_steps):
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "recogniser", step))
        _schedule(optimizer, args.lr, step, args.recogniser_steps)
        chosen = torch.randperm(len(rows), generator=generator)[: args.recogniser_batch]
        pixels = _augment_faces(faces[chosen], generator).to(memory_format=torch.channels_last)
        with computing("cpu"):
            embedding = network(pixels)
        embedding = F.normalize(embedding.float(), dim=-1)
        cosine = embedding @ F.normalize(centers.weight, dim=-1).T
        # CosFace (Wang et al. 2018, eq. 4); the margin grows, since with many people it is too hard at first.
        margin = 0.25 * min(1.0, step / (0.6 * args.recogniser_steps))
        target = labels[chosen]
        loss = F.cross_entropy(28.0 * (cosine - margin * F.one_hot(target, len(people))), target)
        _step(loss, both, optimizer)
        _report("recogniser", step, args.recogniser_steps, first, started, args.recogniser_batch, loss)
        if (step + 1) % 200 == 0 or step + 1 == args.recogniser_steps:
            _save(args.work / "recogniser.pt", both, optimizer, step + 1)
    return network.eval()


def _augment_faces(faces: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[B,3,FACE,FACE] in -1..1 from stored faces: landmark errors as a detector makes them, mirror, light, blur."""
    b, side = len(faces), faces.shape[1]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    x = faces.permute(0, 3, 1, 2).float() / 127.5 - 1
    angle, zoom = uniform(-0.08, 0.08), uniform(0.94, 1.06) * FACE / side
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine = torch.stack([
        torch.stack([zoom * angle.cos() * mirror, -zoom * angle.sin(), uniform(-0.05, 0.05)], 1),
        torch.stack([zoom * angle.sin() * mirror, zoom * angle.cos(), uniform(-0.05, 0.05)], 1),
    ], 1)  # fmt: skip
    x = F.grid_sample(x, F.affine_grid(affine, [b, 3, FACE, FACE], False), align_corners=False)
    soft = F.interpolate(F.interpolate(x, scale_factor=0.3, mode="area"), (FACE, FACE), mode="bilinear")
    x = torch.where(uniform(0, 1, 1, 1, 1) < 0.25, soft, x)
    return ((x + 1) * uniform(0.85, 1.15, 1, 1, 1) * uniform(0.97, 1.03, 3, 1, 1) - 1).clamp(-1, 1)


# ---------------------------------------------------------------- both


def _schedule(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    scale = min((step + 1) / 100, 0.01 + 0.5 * (1 + math.cos(math.pi * (step + 1) / steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr * scale


def _step(loss: torch.Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()


def _report(name: str, step: int, steps: int, first: int, started: float, batch: int, loss: torch.Tensor) -> None:
    if (step + 1) % 50 == 0:
        rate = (step + 1 - first) * batch / (time.time() - started)
        print(f"{name} {step + 1}/{steps} loss {loss.item():.3f} {rate:.0f} pictures/s", flush=True)


def _resume(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    temporary.replace(path)


def export_onnx(network: nn.Module, pixels: torch.Tensor, path: Path, outputs: list[str]) -> None:
    """An ONNX file with the weights as fp16; the graph casts them back, which onnxruntime does once, when it loads."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    temporary = path.with_suffix(".tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval().to(memory_format=torch.contiguous_format), (pixels,), str(temporary), dynamo=False,
            opset_version=17, input_names=["input.1"], output_names=outputs,
        )  # fmt: skip
    model = onnx.load(temporary)
    temporary.unlink()
    graph, casts, weights = model.graph, [], []
    for weight in graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype != np.float32 or array.size < 64:
            weights.append(weight)
            continue
        weights.append(numpy_helper.from_array(array.astype(np.float16), weight.name + "_fp16"))
        casts.append(helper.make_node("Cast", [weight.name + "_fp16"], [weight.name], f"cast_{weight.name}",
                                      to=TensorProto.FLOAT))  # fmt: skip
    nodes = [*casts, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(weights)
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    write_atomic(path, model.SerializeToString())


def export(detector: Detector | None, recogniser: Recogniser | None, directory: Path, config: dict, seed: int) -> None:
    from bolid.backends.face import CHECKSUMS

    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    if detector is not None:
        export_onnx(_AsScrfd(detector), torch.zeros(1, 3, SIDE, SIDE), directory / "det.onnx", names)
    if recogniser is not None:
        export_onnx(recogniser, torch.zeros(1, 3, FACE, FACE), directory / "rec.onnx", ["embedding"])
    sums = {file.name: sha256_file(file) for file in sorted(directory.glob("*.onnx"))}
    record = run_record("face-weights", family="tiny", config=config, seed=seed)
    write_atomic(directory / CHECKSUMS, json.dumps({"record": record, "sha256": sums}, indent=1, sort_keys=True) + "\n")


def measure(photos: Path, model: Path | None = None, *, people: int = 150) -> dict[str, float]:
    """Detection recall by framing (a face found that overlaps the true one by half), landmark error over the face's
    size, and the verification rate at 1 % false accepts, all through InsightFace on held-out people."""
    from bolid.backends.face import FaceModel
    from bolid.models.families import get_family

    network = FaceModel(model or get_family("tiny").face)
    rows = [row for row in read_truth(photos, people=people) if row["face_box"] is not None]
    recall: dict[str, list[bool]] = {}
    errors, false_alarms, embeddings, owners, framings = [], 0, [], [], []
    for row in rows:
        faces = network.detect(read_image(row["path"]))
        truth, framing = np.array(row["face_box"], np.float32), row["attributes"]["framing"]
        hits = [face for face in faces if _iou(face.box, truth) >= 0.5]
        recall.setdefault(framing, []).append(bool(hits))
        false_alarms += len(faces) - len(hits)
        if hits:
            size = math.sqrt((truth[2] - truth[0]) * (truth[3] - truth[1]))
            errors.append(np.linalg.norm(hits[0].landmarks - np.array(row["face_landmarks"]), axis=1).mean() / size)
            embeddings.append(hits[0].embedding)
            owners.append(row["person"])
            framings.append(framing)
    figures: dict[str, float] = {
        f"detection recall, {name}": float(np.mean(found)) for name, found in sorted(recall.items())
    }
    near = [hit for name, found in recall.items() if name != "full body" for hit in found]
    figures["detection recall, portraits and three-quarters"] = float(np.mean(near)) if near else float("nan")
    figures["false alarms a picture"] = false_alarms / len(rows)
    figures["landmark error over face size"] = float(np.mean(errors)) if errors else float("nan")
    if embeddings:
        stack, person, framing = np.stack(embeddings), np.array(owners), np.array(framings)
        figures["TAR at FAR 1 %, all detected faces"] = _tar(stack, person)
        close = framing != "full body"
        figures["TAR at FAR 1 %, portraits and three-quarters"] = _tar(stack[close], person[close])
    figures["held-out people"] = len(set(owners))
    return figures


def _tar(embeddings: np.ndarray, person: np.ndarray, far: float = 0.01) -> float:
    """The share of same-person pairs above the similarity that 1 % of the pairs of two people exceed."""
    a, b = np.triu_indices(len(embeddings), 1)
    similarity, same = (embeddings @ embeddings.T)[a, b], person[a] == person[b]
    if not same.any() or same.all():
        return float("nan")
    return float((similarity[same] > np.quantile(similarity[~same], 1 - far)).mean())


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    overlap = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(overlap / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap))


def main() -> None:
    parser = options("face", __doc__)
    parser.add_argument("--people", type=int, default=2000, help="use at most so many people")
    parser.add_argument("--detector-photos", type=int, default=4000, help="photos for the detector")
    parser.add_argument("--detector-steps", type=int, default=1200)
    parser.add_argument("--detector-batch", type=int, default=16)
    parser.add_argument("--recogniser-steps", type=int, default=1400)
    parser.add_argument("--recogniser-batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parse(parser)
    started = time.time()
    rows = read_truth(args.photos, people=args.people, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    config = {name: getattr(args, name) for name in
              ("detector_steps", "detector_batch", "recogniser_steps", "recogniser_batch", "lr")}  # fmt: skip
    detector = train_detector(rows[: args.detector_photos], args)
    export(detector, None, args.out, config, args.seed)
    recogniser = train_recogniser(rows, args)
    export(detector, recogniser, args.out, config, args.seed)
    figures = measure(args.val, args.out)
    print(json.dumps(figures, indent=2))
    facts = {
        "data": f"{len(rows)} rendered photos of {len({row['person'] for row in rows})} people at 256x192",
        "detector": f"{args.detector_steps} steps of {args.detector_batch} photos, AdamW {args.lr}, cosine",
        "recogniser": f"{args.recogniser_steps} steps of {args.recogniser_batch} faces, AdamW {args.lr}, cosine",
        "minutes in the last run of the script": round((time.time() - started) / 60, 1),
        "machine": "1 of 2 shared CPU cores",
        "seed": args.seed,
    }
    write_card(args.out, "Tiny face models", CARD, figures, facts)


if __name__ == "__main__":
    main()
