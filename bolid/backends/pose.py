"""Pose detection with YOLO pose networks (17 COCO keypoints), from safetensors or ONNX and never from a pickle.

Shapes: B pictures, K = 17 keypoints, A anchors (all grid cells of the three strides).
Ultralytics' own predictor changes the process's thread count and cannot be differentiated, so the network and the
non-maximum suppression are ultralytics', while resizing and batching are here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bolid.backends.onnx_session import open_session
from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.run import prepare_environment, run_record, write_atomic

prepare_environment()  # ultralytics reads it when it loads

KIND = "pose-weights"
CONFIDENCE = 0.25  # ultralytics' own default for predictions
OVERLAP = 0.6  # boxes that overlap more than this (intersection over union) are the same person
STRIDE = 32  # the network's largest; input sides are multiples of it
WEIGHTS, ONNX, CONFIG = "model.safetensors", "model.onnx", "config.json"
OUTPUT_ROWS = 4 + 1 + 3 * 17  # box, score, keypoints


@dataclass(frozen=True)
class Detection:
    """One detected person. Pixels of the picture that was given."""

    box: np.ndarray  # f32 [4]: left, top, right, bottom
    score: float  # 0..1
    keypoints: np.ndarray  # f32 [17,3]: x, y, confidence 0..1


_PUBLISHED_SIZE = 640  # pixels; what ultralytics trained its own pose weights at
# The classes that an ultralytics YOLO11 pose checkpoint is made of, and nothing else: no function, nothing of builtins.
_ULTRALYTICS_CLASSES = {
    "ultralytics.nn.tasks": ("PoseModel", "SegmentationModel"),
    "ultralytics.nn.modules.conv": ("Conv", "DWConv", "Concat"),
    "ultralytics.nn.modules.block": (
        "Bottleneck", "C2f", "C3", "C3k", "C3k2", "C2PSA", "PSABlock", "Attention", "SPPF", "DFL", "Proto",
    ),
    "ultralytics.nn.modules.head": ("Pose", "Segment", "Detect"),
    "torch.nn.modules.container": ("Sequential", "ModuleList"),
    "torch.nn.modules.conv": ("Conv2d", "ConvTranspose2d"),
    "torch.nn.modules.batchnorm": ("BatchNorm2d",),
    "torch.nn.modules.activation": ("SiLU",),
    "torch.nn.modules.linear": ("Identity",),
    "torch.nn.modules.pooling": ("MaxPool2d",),
    "torch.nn.modules.upsampling": ("Upsample",),
}  # fmt: skip


def read_checkpoint(path: Path | str) -> tuple[str, dict[str, torch.Tensor]]:
    """(ultralytics' yaml, tensors) of a checkpoint as ultralytics publishes it: `yolo11n-pose.pt`, `yolo11n-seg.pt`.

    Such a file is a pickle, which could run anything. torch reads it by its restricted reader (`weights_only=True`),
    which builds tensors, plain containers and the classes named above, and refuses the rest.
    Raises BolidError for a file that holds anything else, is damaged, or is neither a YOLO11 pose network of 17
    keypoints nor a YOLO11 segmentation network of COCO's 80 classes.
    """
    path = Path(path)
    if not path.is_file():
        raise BolidError(f"there is no {path}", "give a file like yolo11n-pose.pt")
    allowed: list[Any] = []
    with same_threads():
        from ultralytics.nn.tasks import PoseModel as Network
        from ultralytics.nn.tasks import SegmentationModel
        from ultralytics.utils import IterableSimpleNamespace

        for module, names in _ULTRALYTICS_CLASSES.items():
            allowed += [getattr(importlib.import_module(module), name) for name in names]
        # numpy's numbers: ultralytics stores its scores as those
        allowed += [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), _numpy_scalar()]
        allowed += [(_numpy_scalar(), "numpy.core.multiarray.scalar")]  # numpy's name for it before 2.0
        # Those of ultralytics 8.3 hold the method `Detect.forward`, which a pickle spells getattr(Detect, "forward").
        allowed += [(_detect_forward, "builtins.getattr")]
        allowed += [IterableSimpleNamespace]
        allowed += [
            (PurePosixPath, f"{module}.{kind}")
            for module in ("pathlib", "pathlib._local")
            for kind in ("PosixPath", "WindowsPath")
        ]  # of the training's folders
        try:
            with torch.serialization.safe_globals(allowed):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle's own class, which nothing here may import, and zip files' of all kinds
            reason = str(error)
            if "Unsupported" in reason or "weights_only" in reason.lower() or "GLOBAL" in reason:
                found = re.search(r"(?:GLOBAL|Unsupported:) ([\w.]+)", reason)
                raise BolidError(
                    f"{path} is refused: it holds {found[1] if found else 'something'} that is no part of pose weights",
                    "fetch the file from ultralytics' own release; nothing of it was run",
                ) from error
            raise BolidError(f"{path} is damaged or no torch file", "fetch it again") from error
        model = (checkpoint.get("ema") or checkpoint.get("model")) if isinstance(checkpoint, dict) else None
        if not isinstance(model, Network | SegmentationModel):
            raise BolidError(f"{path} holds no ultralytics pose network", "give a file like yolo11n-pose.pt")
        # Only the tensors are used. Their network is built anew, and their shapes must be the same.
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        yaml = _yaml_of(tensors, "pose" if isinstance(model, Network) else "seg")
        if yaml:
            if isinstance(model, Network):
                expected = Network(yaml, ch=3, nc=1, data_kpt_shape=(17, 3), verbose=False).state_dict()
            else:
                expected = SegmentationModel(yaml, ch=3, nc=80, verbose=False).state_dict()
            if {name: v.shape for name, v in tensors.items()} == {name: v.shape for name, v in expected.items()}:
                return yaml, tensors
    raise BolidError(
        f"{path} is no YOLO11 pose network for people with 17 keypoints",
        "give one of yolo11{n,s,m,l,x}-pose.pt, or weights that were trained from one of them",
    )


def _detect_forward(owner: Any, name: str) -> Any:
    """Replaces `getattr` while a checkpoint is read: it returns this one method and refuses all others."""
    from ultralytics.nn.modules.head import Detect

    if owner is Detect and name == "forward":
        return Detect.forward
    raise ValueError("Unsupported: getattr of something else than Detect.forward")


def _yaml_of(tensors: Mapping[str, torch.Tensor], task: str) -> str:
    """The YOLO11 that these weights are of, by the width of its first layer and the depth of its first block."""
    first = tensors.get("model.0.conv.weight", torch.empty(0))
    deep = any(name.startswith("model.2.m.1.") for name in tensors)
    scale = {(16, False): "n", (32, False): "s", (64, False): "m", (64, True): "l", (96, True): "x"}.get(
        (len(first), deep)
    )
    return f"yolo11{scale}-{task}.yaml" if scale else ""


def _numpy_scalar() -> Any:
    return np.float64(0).__reduce__()[0]


def write_pose_model(
    directory: Path, yaml: str, tensors: Mapping[str, torch.Tensor], *, source: str = "", sha256: str = ""
) -> None:
    """Write the files that `PoseModel` reads, f16, into `directory`. `source`, `sha256`: of the original weights."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    record = run_record(KIND, family=None, config={"source": source}, inputs={"checkpoint": sha256} if sha256 else {})
    save_tensors(directory / WEIGHTS, half, record)
    write_atomic(directory / CONFIG, json.dumps({"yaml": yaml, "imgsz": _PUBLISHED_SIZE}) + "\n")


def write_onnx_pose_model(directory: Path, file: Path) -> None:
    """Write the files that `PoseModel` reads, from a network that ultralytics or another tool has exported to ONNX."""
    side = OnnxPose(file).size or (_PUBLISHED_SIZE, _PUBLISHED_SIZE)
    shutil.copyfile(file, directory / ONNX)
    write_atomic(directory / CONFIG, json.dumps({"imgsz": max(side)}) + "\n")


def weights_file(path: Path) -> Path:
    """The file with the weights of the pose model in the directory `path`."""
    return path / (ONNX if (path / ONNX).is_file() else WEIGHTS)


class PoseModel:
    """A YOLO pose network read from a directory: `config.json`, and `model.safetensors` (the config says of which
    ultralytics yaml) or else `model.onnx`.

    `network` is the plain torch module in eval mode, convolutions and batch norms fused, frozen; of ONNX there is no
    gradient. Raises BolidError when a file is missing, damaged, not ours, or does not fit the named network.
    """

    network: Callable[[torch.Tensor], Sequence[torch.Tensor]]

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        path = Path(path)
        if (path / "pose.onnx").is_file():
            raise BolidError(
                f"the pose model in {path} is RTMPose, through which no gradient goes",
                "leave out --body-guidance, and train with --id-loss body or --id-weight 0; or take YOLO's",
            )
        self.device = torch.device(device)
        self.fixed_size: tuple[int, int] | None = None  # height and width that the network takes, if no others
        self.differentiable = weights_file(path).name != ONNX
        yaml, self.image_size = read_config(path, "pose", "-pose.yaml" if self.differentiable else "")
        if not self.differentiable:
            self.network = onnx = OnnxPose(path / ONNX, device)
            self.fixed_size = onnx.size
            return
        tensors, _ = load_tensors(path / WEIGHTS, KIND)
        with same_threads():
            from ultralytics.nn.tasks import PoseModel as Network

            try:
                network = Network(yaml, ch=3, nc=1, data_kpt_shape=(17, 3), verbose=False)
                network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
            except (RuntimeError, FileNotFoundError) as error:
                raise BolidError(
                    f"{path / WEIGHTS} does not hold the weights of {yaml}",
                    "model.safetensors and config.json must come from the same training",
                ) from error
            self.network = network.fuse(verbose=False).eval().requires_grad_(False).to(self.device)

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """The people in each picture (uint8 [H,W,3] RGB, any sizes), the most certain first.

        Pictures are scaled so that the longest side is the network's image size. Those of equal shape share a batch,
        and a picture's result does not depend on the rest of the batch.
        """
        from ultralytics.utils.nms import non_max_suppression

        found: list[list[Detection]] = [[] for _ in images]
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) == 0:
                raise BolidError(
                    f"a picture must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}", "decode it as RGB first"
                )
            shapes.setdefault(image.shape[:2], []).append(index)
        with same_threads(), torch.no_grad():
            for (height, width), members in shapes.items():
                scale = self.image_size / max(height, width)
                if self.fixed_size:
                    scale = min(self.fixed_size[0] / height, self.fixed_size[1] / width)
                padded = [letterbox(images[index], scale, self.fixed_size) for index in members]
                batch = torch.stack(padded).to(self.device)
                outputs = non_max_suppression(self.raw(batch), CONFIDENCE, OVERLAP, nc=1, max_time_img=10.0, max_det=50)
                for index, rows in zip(members, outputs, strict=True):
                    found[index] = [_detection(row, scale, width, height) for row in rows.cpu().numpy()]
        return found

    def raw(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 4+1+51, A] from [B,3,H,W] in 0..1, H and W multiples of 32. Differentiable, before any suppression.

        Rows: box centre x, y, width, height; score 0..1; then x, y, confidence 0..1 of each keypoint; in input pixels.
        People are found best at the size of training: scale so that the longest side is `image_size`.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[2] % STRIDE or pixel_values.shape[3] % STRIDE:
            raise BolidError(
                f"the pose network takes [B,3,H,W] with H and W multiples of {STRIDE}, not {list(pixel_values.shape)}",
                "resize or pad the pictures first",
            )
        if pixel_values.requires_grad and not self.differentiable:
            raise BolidError("no gradient goes through a pose model in ONNX", "take one in safetensors")
        return self.network(pixel_values)[0]

    def best_person(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(keypoints [B,17,3], box [B,4], score [B]) of the most certain person in each picture [B,3,H,W] in -1..1.

        Differentiable with respect to the pixels. What `detect` finds first, without suppression: that never removes
        the best. Where nobody is found the score is low. Keypoints and box (left, top, right, bottom) are pixels of
        the given pictures, confidences and scores 0..1.
        """
        height, width = pixel_values.shape[2:]
        scale = self.image_size / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = pixel_values.float() / 2 + 0.5
        if size != (height, width):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=scale < 1, align_corners=False)
        pixels = F.pad(pixels, (0, -size[1] % STRIDE, 0, -size[0] % STRIDE), value=114 / 255)
        with same_threads():
            raw = self.raw(pixels)
        best = raw[:, 4].argmax(-1)
        person = raw[torch.arange(len(raw), device=raw.device), :, best]  # [B,56]
        keypoints = person[:, 5:].unflatten(1, (17, 3)) / person.new_tensor([scale, scale, 1])
        centre, half = person[:, :2], person[:, 2:4] / 2
        return keypoints, torch.cat([centre - half, centre + half], 1) / scale, person[:, 4]


class OnnxPose:
    """A pose network in ONNX, on onnxruntime: pictures [B,3,H,W] in 0..1 -> [raw [B,56,A]], as `PoseModel.raw` has it.

    What `yolo export model=yolo11n-pose.pt format=onnx` makes, with or without `dynamic=True`; not with `nms=True`.
    `size`: (height, width) that it takes, None where any. Raises BolidError for another or damaged network.
    """

    def __init__(self, file: Path, device: str = "cpu") -> None:
        self.session = open_session(file, device)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape, found = (inputs[0].shape, outputs[0].shape) if len(inputs) == len(outputs) == 1 else ([], [])
        self.half = bool(inputs) and inputs[0].type == "tensor(float16)"
        sides = [side if isinstance(side, int) else 0 for side in shape[2:]]
        fits = len(shape) == 4 and shape[1] == 3 and not any(side % STRIDE for side in sides)
        rows = found[1] if len(found) == 3 else None
        if not fits or (isinstance(rows, int) and rows != OUTPUT_ROWS):
            raise BolidError(
                f"{file} is no YOLO pose network for people: it takes {shape} and gives {found}",
                f"it must take [B,3,H,W] and give [B,{OUTPUT_ROWS},A]: "
                "yolo export model=yolo11n-pose.pt format=onnx dynamic=True",
            )
        self.size = (sides[0], sides[1]) if all(sides) else None
        self.one = shape[0] == 1  # picture at a time

    def __call__(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """[raw output [B,56,A]] of pictures [B,3,H,W] in 0..1, without a gradient."""
        array = pixel_values.detach().cpu().numpy().astype(np.float16 if self.half else np.float32)
        name = self.session.get_inputs()[0].name
        parts = [array[i : i + 1] for i in range(len(array))] if self.one else [array]
        raw = np.concatenate([self.session.run(None, {name: part})[0] for part in parts])
        return [torch.from_numpy(raw.astype(np.float32)).to(pixel_values.device)]


def read_config(directory: Path, kind: str, suffix: str = "", others: Collection[str] = ()) -> tuple[str, int]:
    """(network, image size) in the config.json of a "pose" or "segmentation" model, its `kind`.

    The network is an ultralytics yaml that ends with `suffix`, or one of `others`; without a suffix nobody asks for it.
    Raises BolidError for a file that is missing or says something else.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        yaml, size = config["yaml"] if suffix else "", config.get("imgsz", _PUBLISHED_SIZE)
    except OSError as error:
        raise BolidError(
            f"no {kind} model in {directory}: cannot read {CONFIG} ({error.strerror})",
            f"a {kind} model is a directory with {CONFIG} and its weights, like {WEIGHTS}",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BolidError(f"{path} is not a {kind} model's config", 'it needs {"yaml": ..., "imgsz": ...}') from error
    # A path here would make ultralytics read a network description from anywhere.
    if not (isinstance(yaml, str) and (yaml in others or (yaml.endswith(suffix) and Path(yaml).name == yaml))):
        raise BolidError(f"{path} names {yaml!r}", f"name one of ultralytics' networks, like yolo11n{suffix}")
    if not (isinstance(size, int) and size > 0 and size % STRIDE == 0):
        raise BolidError(f"{path}: imgsz is {size!r}", f"write a multiple of {STRIDE}")
    return yaml, size


def letterbox(image: np.ndarray, scale: float, size: tuple[int, int] | None = None) -> torch.Tensor:
    """A picture as YOLO takes it, f32 [3,h,w] in 0..1: scaled, then padded with grey on the right and below.

    To `size`, or to multiples of STRIDE.
    """
    import cv2

    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if scale != 1:
        # INTER_AREA, unlike INTER_LINEAR, does not alias when it shrinks.
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    bottom, right = (size[0] - height, size[1] - width) if size else (-height % STRIDE, -width % STRIDE)
    if bottom or right:
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def _detection(row: np.ndarray, scale: float, width: int, height: int) -> Detection:
    """`row`: x0, y0, x1, y1, score, class, 17 x (x, y, confidence), in network pixels."""
    box = np.clip(row[:4] / scale, 0, [width, height, width, height]).astype(np.float32)
    keypoints = row[6:].reshape(17, 3) / np.array([scale, scale, 1], np.float32)
    return Detection(box=box, score=float(row[4]), keypoints=keypoints.astype(np.float32))


@contextlib.contextmanager
def same_threads() -> Iterator[None]:
    """Restore torch's thread count on leaving: ultralytics changes it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
