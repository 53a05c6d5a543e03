"""`bolid models convert`: YOLO's pose and segmentation weights as folders that BoLID reads."""

from __future__ import annotations

import os
from pathlib import Path

from bolid.errors import BolidError
from bolid.run import atomic_folder, sha256_file


def convert(file: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """YOLO11 weights -> a folder that BoLID reads, which is returned: for pose ultralytics' own (.pt) or exported
    (.onnx), for segmentation the .pt.

    It holds config.json and model.safetensors, or the .onnx as it is. By default beside ``file``, under its name.
    Nothing that the file might ask to be run is run.
    Raises BolidError for another network, a damaged file, and one that holds more than such weights.
    """
    from bolid.backends.pose import read_checkpoint, write_onnx_pose_model, write_pose_model
    from bolid.backends.segmentation import write_yolo_segmenter

    path = Path(file)
    out = Path(out) if out is not None else path.with_suffix("")
    if path.suffix not in (".pt", ".onnx"):
        raise BolidError(
            f"{path} is no .pt and no .onnx file",
            "only YOLO's pose weights need to be converted: yolo11n-pose.pt and the like",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BolidError(f"{out} is already there", "remove it, or name another place with --out")
    checkpoint = read_checkpoint(path) if path.suffix == ".pt" else None
    if out.is_dir():
        out.rmdir()
    with atomic_folder(out) as temporary:
        if checkpoint and checkpoint[0].endswith("-seg.yaml"):
            write_yolo_segmenter(temporary, *checkpoint, source=path.name, sha256=sha256_file(path))
        elif checkpoint:
            write_pose_model(temporary, *checkpoint, source=path.name, sha256=sha256_file(path))
        else:
            write_onnx_pose_model(temporary, path)
    return out
