"""Networks in ONNX on onnxruntime, one thread each: spinning threads would take the core from the other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bolid.errors import BolidError


def open_session(file: Path, device: str = "cpu") -> Any:
    """An onnxruntime session of `file`. Raises BolidError for a file that it cannot load."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    gpu = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    try:
        return onnxruntime.InferenceSession(str(file), options, [*gpu, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, one for each way a file can be wrong
        raise BolidError(
            f"onnxruntime cannot load {file}: {str(error).splitlines()[0]}", "export or copy it again"
        ) from error
