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

import numpy as np

from bolid.errors import BolidError
from bolid.run import sha256_file

CHECKSUMS = "bolid.json"  # {"record": ..., "sha256": {file name: hash}}; packs from elsewhere have none
CONFIDENCE = 0.5  # InsightFace's own default
EMBEDDING_SIZE = 512


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

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        path = Path(path)
        files = sorted(path.glob("*.onnx")) if path.is_dir() else []
        if not files:
            raise BolidError(
                f"no face model in {path}: it holds no .onnx file", "give a directory like InsightFace's packs"
            )
        _check_sums(path, files)
        cpu = not device.startswith("cuda")
        with _quiet_insightface():
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
                self.network.prepare(ctx_id=-1 if cpu else 0, det_thresh=CONFIDENCE, det_size=(640, 640))
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
        with _quiet_insightface():
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
def _quiet_insightface() -> Iterator[None]:
    """InsightFace prints, and the scikit-image it uses warns at every face."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
