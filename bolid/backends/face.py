"""Face detection and recognition with InsightFace, from a local directory of ONNX files.

Any pack that `insightface.app.FaceAnalysis` loads will do: an SCRFD-shaped detector with five landmarks and an
ArcFace-shaped recogniser of 512 numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bolid.errors import BolidError
from bolid.run import sha256_file

if TYPE_CHECKING:
    import torch

CHECKSUMS = "bolid.json"  # {"record": ..., "sha256": {file name: hash}}; packs from elsewhere have none
CONFIDENCE = 0.5  # InsightFace's own default
EMBEDDING_SIZE = 512
LARGE = 0.15  # of a picture's height; smaller faces are too coarse for a recogniser
ALIGNED = 112  # pixels; sides of a recogniser's input


@dataclass(frozen=True)
class Face:
    """One detected face. Pixels of the picture that was given."""

    box: np.ndarray  # f32 [4]: left, top, right, bottom
    score: float  # 0..1
    landmarks: np.ndarray  # f32 [5,2]: the eyes, the nose, the mouth's corners, each pair from left to right
    embedding: np.ndarray  # f32 [512], L2-normed


class FaceModel:
    """An InsightFace pack, ready to run. `sha256` is its recogniser's: embeddings of another one mean something else.

    Raises BolidError when the directory has no ONNX files, or they are damaged or of the wrong shapes.
    """

    def __init__(self, path: Path | str, device: str = "cpu", confidence: float = CONFIDENCE) -> None:
        path = Path(path)
        files = sorted(path.glob("*.onnx")) if path.is_dir() else []
        if not files:
            raise BolidError(
                f"no face model in {path}: it holds no .onnx file", "give a directory like InsightFace's packs"
            )
        if (path / "yunet.onnx").is_file():
            raise BolidError(
                f"the face model in {path} has YuNet for a detector, through which no gradient goes",
                "leave out --face-guidance, --face-weight and --found-weight, or take an InsightFace pack of your own",
            )
        _check_sums(path, files)
        cpu = not device.startswith("cuda")
        with quiet_insightface():
            import onnxruntime
            from insightface.app import FaceAnalysis

            options = onnxruntime.SessionOptions()
            # One thread, and no spinning ones: they would take the core from the other models.
            options.intra_op_num_threads = 1
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            providers = ["CPUExecutionProvider"] if cpu else ["CUDAExecutionProvider", "CPUExecutionProvider"]
            # InsightFace and onnxruntime report a wrong file as almost any kind of exception, bare asserts too.
            try:
                self.network = FaceAnalysis(
                    name=str(path),
                    allowed_modules=["detection", "recognition"],
                    providers=providers,
                    sess_options=options,
                )
                self.network.prepare(ctx_id=-1 if cpu else 0, det_thresh=confidence, det_size=(640, 640))
            except Exception as error:
                raise BolidError(
                    f"InsightFace cannot load the face model in {path}: {str(error) or type(error).__name__}",
                    "an InsightFace pack has a detector with five landmarks and a recogniser, both as .onnx files",
                ) from error
        recogniser, landmarks = self.network.models.get("recognition"), self.network.det_model.use_kps
        size = recogniser.output_shape[-1] if recogniser is not None else None
        if size != EMBEDDING_SIZE or not landmarks:
            raise BolidError(
                f"the face model in {path} does not fit: embedding size {size}, landmarks {landmarks}",
                f"it needs a detector with five landmarks and a recogniser of {EMBEDDING_SIZE} numbers",
            )
        self.sha256 = sha256_file(recogniser.model_file)

    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces in a picture (uint8 [H,W,3] RGB), the most certain first."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) == 0:
            raise BolidError(
                f"a picture must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}", "decode it as RGB first"
            )
        with quiet_insightface():
            found = self.network.get(np.ascontiguousarray(image[..., ::-1]))  # InsightFace takes BGR
        faces = [
            Face(
                box=face.bbox.astype(np.float32),
                score=float(face.det_score),
                landmarks=face.kps.astype(np.float32),
                embedding=(face.embedding / max(np.linalg.norm(face.embedding), 1e-12)).astype(np.float32),
            )
            for face in found
        ]
        return sorted(faces, key=lambda face: -face.score)


class Recogniser:
    """The recogniser of another InsightFace pack, for faces that some detector has found. `name`: the pack's folder.

    Raises BolidError as `FaceModel` does.
    """

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        pack = FaceModel(path, device)
        self.name, self.sha256 = Path(path).resolve().name, pack.sha256
        self._network = pack.network.models["recognition"]

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        """f32 [512], L2-normed, of a face in a picture (uint8 [H,W,3] RGB)."""
        from insightface.app.common import Face as InsightFace

        found = InsightFace(bbox=face.box, kps=face.landmarks, det_score=face.score)
        with quiet_insightface():
            self._network.get(np.ascontiguousarray(image[..., ::-1]), found)
        return (found.embedding / max(np.linalg.norm(found.embedding), 1e-12)).astype(np.float32)


class DifferentiableFaces:
    """The most confident face in each picture, its embedding and its score, with a gradient to the pixels.

    A pack's detector and recogniser in torch, translated from ONNX. Only faces as high as LARGE count; with `all_sizes`
    smaller ones too, with a score that falls in proportion to their height.
    `sha256`, `detector_sha256`: of the recogniser and the detector. Raises BolidError for networks that onnx2torch
    cannot translate.
    """

    def __init__(self, path: Path | str, device: str = "cpu", all_sizes: bool = False) -> None:
        self.all_sizes = all_sizes
        faces = FaceModel(path, device)
        recogniser, self.scrfd = faces.network.models["recognition"], faces.network.det_model
        self.sha256, self.detector_sha256 = faces.sha256, sha256_file(Path(self.scrfd.model_file))
        self.mean, self.std = recogniser.input_mean / 255, recogniser.input_std / 255
        self.recogniser, self.detector = (
            _in_torch(Path(model.model_file)).eval().requires_grad_(False).to(device)
            for model in (recogniser, self.scrfd)
        )

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeddings [B,512], L2-normed, of the most confident face in pictures [B,3,H,W] in -1..1, whatever its score;
        zeros where the score is 0. Up to rounding a picture's result does not depend on the rest of the batch.
        """
        import torch

        with torch.no_grad():
            score, landmarks = self._surest(pixel_values.float())
        return self._recognise(pixel_values.float(), score, landmarks)

    def certainty(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The detector's score of the most confident face in such pictures, 0..1, with a gradient. [B]"""
        return self._surest(pixel_values.float())[0]

    def detect_and_embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings and scores of such pictures, with a gradient, and landmarks [B,5,2] in pixels, without one."""
        score, landmarks = self._surest(pixel_values.float())
        return self._recognise(pixel_values.float(), score, landmarks), score, landmarks.detach()

    def _recognise(self, pictures: torch.Tensor, score: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        aligned = (_align(pictures, landmarks.detach().cpu().numpy()) / 2 + 0.5 - self.mean) / self.std
        embeddings = F.normalize(torch.func.vmap(self.recogniser)(aligned[:, None])[:, 0], dim=-1)
        return embeddings * (score > 0)[:, None]

    def _surest(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [B], landmarks [B,5,2] in pixels) of pictures [B,3,H,W], resized and padded as `detect` does."""
        import torch
        import torch.nn.functional as F

        width, height = self.scrfd.input_size
        scale = min(height / pictures.shape[2], width / pictures.shape[3])
        # InsightFace's mean and std are of pixels 0..255, and it pads with black.
        inputs = ((pictures + 1) * 127.5 - self.scrfd.input_mean) / self.scrfd.input_std
        inputs = F.interpolate(inputs, scale_factor=scale, mode="bilinear", align_corners=False, antialias=scale < 1)
        black = -self.scrfd.input_mean / self.scrfd.input_std
        inputs = F.pad(inputs, (0, width - inputs.shape[3], 0, height - inputs.shape[2]), value=black)
        outputs = torch.func.vmap(self.detector)(inputs[:, None])  # the file's network takes one picture at a time
        best, landmarks = pictures.new_zeros(len(pictures)), pictures.new_zeros(len(pictures), 5, 2)
        each = torch.arange(len(pictures), device=pictures.device)
        for i, stride in enumerate(self.scrfd._feat_stride_fpn):
            # For each anchor: its score, the distances to the box's left, top, right and bottom, the landmarks.
            score, sides, points = (
                part.reshape(len(pictures), -1, part.shape[-1]) for part in outputs[i :: self.scrfd.fmc]
            )
            height = (sides[..., 1] + sides[..., 3]).detach() * stride / (LARGE * scale * pictures.shape[2])
            counts = height.clamp(0, 1) if self.all_sizes else height >= 1
            highest, place = (score[..., 0] * counts).max(dim=1)
            cell = place // self.scrfd._num_anchors
            corner = torch.stack([cell % (width // stride), cell // (width // stride)], dim=1).to(points)
            found = (corner[:, None] + points[each, place].view(-1, 5, 2)) * stride / scale
            landmarks = torch.where((highest > best)[:, None, None], found, landmarks)
            best = torch.maximum(best, highest)
        return best, landmarks


def _align(pictures: torch.Tensor, landmarks: np.ndarray) -> torch.Tensor:
    """[B,3,112,112] of pictures [B,3,H,W] with landmarks [B,5,2]: the face as InsightFace's norm_crop turns and scales
    it, differentiable. Landmarks that are all 0 (no face) cut out the picture's corner."""
    import torch
    import torch.nn.functional as F
    from insightface.utils.face_align import estimate_norm

    height, width = pictures.shape[2:]
    forth = np.tile(np.eye(3), (len(pictures), 1, 1))  # pixels of the picture -> of the crop
    with quiet_insightface():
        for matrix, points in zip(forth, landmarks, strict=True):
            if points.any():
                matrix[:2] = estimate_norm(points, ALIGNED)
    # Both in grid_sample's coordinates, -1..1 from one outer edge to the other.
    source = np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])
    crop = np.array([[ALIGNED / 2, 0, (ALIGNED - 1) / 2], [0, ALIGNED / 2, (ALIGNED - 1) / 2], [0, 0, 1]])
    back = torch.from_numpy((source @ np.linalg.inv(forth) @ crop)[:, :2]).to(pictures)
    grid = F.affine_grid(back, [len(pictures), 3, ALIGNED, ALIGNED], align_corners=False)
    return F.grid_sample(pictures + 1, grid, align_corners=False) - 1  # black outside, as norm_crop has it


def _in_torch(file: Path) -> torch.nn.Module:
    """A network in ONNX as a torch module."""
    import onnx
    from onnx2torch import convert

    model = onnx.load(file)
    weights = {weight.name: weight for weight in model.graph.initializer}
    # Weights in half precision are cast where they are used; onnx2torch wants them as they are used.
    for node in [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in weights]:
        array = onnx.numpy_helper.to_array(weights[node.input[0]]).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
        model.graph.node.remove(node)
    try:
        return convert(model)
    except (NotImplementedError, KeyError, ValueError, RuntimeError) as error:
        raise BolidError(
            f"onnx2torch cannot translate {file}: {error}",
            "leave out --face-guidance, --face-weight and --found-weight, or take another face pack",
        ) from error


def _check_sums(path: Path, files: list[Path]) -> None:
    """onnxruntime does not notice a flipped bit in the weights."""
    if not (path / CHECKSUMS).is_file():
        return
    try:
        sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))["sha256"]
        missing = sorted(set(sums) - {file.name for file in files})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BolidError(f"{path / CHECKSUMS} is damaged", "make or copy the face model again") from error
    if missing:
        raise BolidError(f"the face model in {path} is incomplete: {missing[0]} is missing", "copy it again")
    for file in files:
        if file.name in sums and hashlib.sha256(file.read_bytes()).hexdigest() != sums[file.name]:
            raise BolidError(
                f"{file} is damaged: its content does not match the checksum in {CHECKSUMS}", "make or copy it again"
            )


@contextlib.contextmanager
def quiet_insightface() -> Iterator[None]:
    """InsightFace prints, and the scikit-image it uses warns at every face."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
