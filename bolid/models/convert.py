"""`bolid models convert`: published files as files that BoLID reads.

Weights of YOLO (pose and segmentation) and of Mask R-CNN, FaceID-Portrait adapters.
"""

from __future__ import annotations

import os
from pathlib import Path

from bolid.errors import BolidError
from bolid.models.sources import PORTRAIT_FACE_MODEL
from bolid.run import atomic_folder, run_record, sha256_file

_FAMILIES = {768: "sd15", 2048: "sdxl"}  # by the width of the text states that an adapter stands beside


def convert(
    file: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, family: str | None = None
) -> Path:
    """Weights of YOLO11 for pose (.pt, .onnx) or segmentation (.pt), of torchvision's Mask R-CNN (.pth) -> a folder; a
    FaceID-Portrait adapter (.bin) -> a file. Returns it.

    By default beside ``file``, under its name. ``family``: of an adapter, by default the one whose base it fits, sd15
    or sdxl. Nothing that the file might ask to be run is run.
    Raises BolidError for another network, a damaged file, and one that holds more than such weights.
    """
    path = Path(file)
    if path.suffix == ".bin":
        return _convert_adapter(path, Path(out) if out is not None else path.with_suffix(".safetensors"), family)
    from bolid.backends import mask_rcnn
    from bolid.backends.pose import read_checkpoint, write_onnx_pose_model, write_pose_model
    from bolid.backends.segmentation import write_segmenter

    out = Path(out) if out is not None else path.with_suffix("")
    if path.suffix not in (".pt", ".pth", ".onnx"):
        raise BolidError(
            f"{path} is no .pt, .pth, .onnx or .bin file",
            "convert takes YOLO's weights (yolo11n-pose.pt and the like), torchvision's Mask R-CNN (.pth) and "
            "ip-adapter-faceid-portrait_*.bin",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BolidError(f"{out} is already there", "remove it, or name another place with --out")
    checkpoint = read_checkpoint(path) if path.suffix == ".pt" else None
    if path.suffix == ".pth":
        checkpoint = mask_rcnn.NAME, mask_rcnn.read_weights(path)
    if out.is_dir():
        out.rmdir()
    with atomic_folder(out) as temporary:
        if checkpoint and not checkpoint[0].endswith("-pose.yaml"):
            write_segmenter(temporary, *checkpoint, source=path.name, sha256=sha256_file(path))
        elif checkpoint:
            write_pose_model(temporary, *checkpoint, source=path.name, sha256=sha256_file(path))
        else:
            write_onnx_pose_model(temporary, path)
    return out


def _convert_adapter(path: Path, out: Path, family: str | None) -> Path:
    """A face branch that records whose embeddings it understands: those of buffalo_l's recogniser."""
    from bolid.formats.adapter import adapter_kind, read_portrait_adapter, save_adapter

    if out.exists():
        raise BolidError(f"{out} is already there", "remove it, or name another place with --out")
    tensors = read_portrait_adapter(path)
    width = tensors["image_proj.norm.weight"].shape[0]
    if family is None and width not in _FAMILIES:
        raise BolidError(f"{path} is for a base whose text states have {width} channels", "name its --family")
    inputs = {"checkpoint": sha256_file(path), "face_model": PORTRAIT_FACE_MODEL}
    config = {"source": path.name, "face_pack": "buffalo_l"}
    record = run_record(adapter_kind("face"), family=family or _FAMILIES[width], config=config, inputs=inputs)
    save_adapter(out, tensors, record)
    return out
