"""A picture's settings in the words of AUTOMATIC1111's web UI, which other programs read.

    a portrait of a woman
    Negative prompt: blurred
    Steps: 12, Sampler: DDIM, CFG scale: 3.5, Seed: 7, Size: 96x128, Model: tiny, Person: me, Body scale: 1, ...

The run record says everything; this says what has a name there, and who is shown. A value with a comma, a colon or a
line break is written as JSON, as that program does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SAMPLERS = {
    "DDIMScheduler": "DDIM", "PNDMScheduler": "PLMS", "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a", "LCMScheduler": "LCM", "HeunDiscreteScheduler": "Heun",
    "DPMSolverMultistepScheduler": "DPM++ 2M", "UniPCMultistepScheduler": "UniPC", "LMSDiscreteScheduler": "LMS",
}  # fmt: skip


def parameters_text(record: dict[str, Any], scheduler: str) -> str:
    """The text for a picture's record. `scheduler`: the name of its class in diffusers."""
    config = record["config"]
    cfg, _, interval = str(config["guidance"]).partition("@")
    fields: dict[str, Any] = {
        "Steps": config["steps"],
        "Sampler": _SAMPLERS.get(scheduler, scheduler.removesuffix("Scheduler")),
        "CFG scale": cfg,
        "Seed": record["seed"],
        "Size": config["size"],
        "Model": Path(config.get("base") or record["family"]).stem,
        "Guidance interval": interval,
        "Person": config["person"].removeprefix("the profile ").removesuffix(".safetensors"),
        **{f"{branch.capitalize()} scale": scale for branch, scale in config["scales"].items()},
        "LoRA": " ".join(config["lora"]),
        "Pose from": config.get("pose_from", ""),
        "Version": f"bolid {record['packages'].get('bolid', '')}".strip(),
    }
    lines = [config["prompt"]]
    if config["negative"]:
        lines.append(f"Negative prompt: {config['negative']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value != ""))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
