"""The libraries: versions, pairs that are known not to work, and whether each can be imported.

Each import happens in a process of its own, so that a library that crashes takes nothing with it. Run as
``python -m bolid.doctor.libraries NAME...`` this module is that process: it writes one line of JSON a library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bolid.doctor.rows import NOTE, OK, WRONG, Row, gigabytes

PATIENCE = 180.0  # seconds for one import


@dataclass(frozen=True)
class Library:
    """``module`` is imported and ``attribute`` taken from it, which is where a lazy package loads the rest."""

    module: str
    package: str  # its name on the index
    used_by: str
    attribute: str = ""
    needed: bool = True


# In this order: what fails first is the cause of what fails after it.
LIBRARIES = (
    Library("numpy", "numpy", "all"),
    Library("PIL.Image", "pillow", "all"),
    Library("cv2", "opencv-python", "extract"),
    Library("torch", "torch", "all"),
    Library("torchvision", "torchvision", "extract"),
    Library("safetensors.torch", "safetensors", "all"),
    Library("transformers", "transformers", "generate", "CLIPTextModel"),
    Library("diffusers", "diffusers", "generate", "StableDiffusionXLPipeline"),
    Library("peft", "peft", "generate --lora"),
    Library("accelerate", "accelerate", "train-adapter"),
    Library("ultralytics", "ultralytics", "extract", "YOLO"),
    Library("onnxruntime", "onnxruntime", "extract"),
    Library("insightface.app", "insightface", "extract", "FaceAnalysis"),
    Library("open_clip", "open_clip_torch", "extract"),
    Library("torchmetrics", "torchmetrics", "evaluate"),
    Library("huggingface_hub", "huggingface_hub", "models pull"),
    Library("anny", "anny", "synth", needed=False),
    Library("warp", "warp-lang", "synth", needed=False),
    Library("scrapy", "scrapy", "scrape", needed=False),
    Library("polars", "polars", "scrape", needed=False),
)


# --------------------------------------------------------------------------------------------------------- versions


@dataclass(frozen=True)
class Trouble:
    """Versions that are known not to work together. ``found``: package -> version => whether it is so here."""

    found: Callable[[Mapping[str, str]], bool]
    packages: str
    reason: str
    advice: str
    state: str = WRONG


_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python")


def _cpu_build(version: str) -> bool:
    return version.endswith("+cpu")


TROUBLES = (
    Trouble(
        lambda v: _cpu_build(v.get("torch", "")) and bool(v.get("torchvision")) and not _cpu_build(v["torchvision"]),
        "torch+cpu with a torchvision for CUDA",
        "the CPU-only torch lacks the operators that this torchvision was built for: it does not import",
        "pip install --force-reinstall torch torchvision (the plain ones run on a CPU too)",
    ),
    Trouble(
        lambda v: bool(v.get("typer")) and _numbers(v["typer"]) < (0, 29),
        "typer before 0.29",
        "hints about mistyped options leave out what may be given",
        "pip install -U typer",
        NOTE,
    ),
    Trouble(
        lambda v: bool(v.get("onnxruntime") and v.get("onnxruntime-gpu")),
        "onnxruntime and onnxruntime-gpu",
        "both write the same files: which of them is loaded is chance",
        "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
        NOTE,
    ),
    Trouble(
        lambda v: sum(package in v for package in _OPENCV) > 1,
        "two builds of OpenCV",
        "they write the same files: removing or updating one breaks the other",
        "pip uninstall all of them, then: pip install opencv-python",
        NOTE,
    ),
)
_OTHERS = ("onnxruntime-gpu", *_OPENCV, "typer")


def versions() -> dict[str, str]:
    """Package -> version, of the installed ones that matter here."""
    found = {}
    for package in dict.fromkeys([*(library.package for library in LIBRARIES), *_requirements(), *_OTHERS]):
        try:
            found[package] = importlib.metadata.version(package) or ""
        except Exception:  # not installed, or its metadata are damaged
            continue
    return {package: version for package, version in found.items() if version}


def _requirements() -> dict[str, str]:
    """Package -> what bolid's own metadata ask of its version, such as ">=2.8". {} where they cannot be read."""
    import re

    try:
        lines = importlib.metadata.requires("bolid") or []
    except Exception:
        return {}
    plain = [line for line in lines if "extra ==" not in line]
    matches = [re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*\(?([^;)]*)", line) for line in plain]
    return {match[1]: match[2].strip() for match in matches if match}


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: "2.15.0+cu130" => (2, 15, 0)."""
    parts = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def package_rows(found: Mapping[str, str]) -> list[Row]:
    """Packages that are missing or too old, and known troubles; one line of praise where there are none.

    Needed are the libraries of LIBRARIES; the lower bounds are those of bolid's own metadata.
    """
    rows, wanted = [], _requirements()
    needed = {library.package for library in LIBRARIES if library.needed}
    for package in dict.fromkeys([*(library.package for library in LIBRARIES), *wanted]):
        bound, have = wanted.get(package, ""), found.get(package)
        lowest = bound.removeprefix(">=") if bound.startswith(">=") else ""
        install = f"pip install '{package}{bound}'"
        if have is None:
            rows.append(Row(package, "not installed", WRONG if package in needed else NOTE, install))
        elif lowest and _numbers(have) < _numbers(lowest):
            rows.append(Row(package, f"{have}, and {bound} is needed", WRONG, install))
    for trouble in TROUBLES:
        if trouble.found(found):
            rows.append(Row(trouble.packages, trouble.reason, trouble.state, trouble.advice))
    names = ("torch", "torchvision", "diffusers", "transformers", "ultralytics", "insightface", "onnxruntime", "typer")
    shown = ", ".join(f"{package} {found[package]}" for package in names if package in found)
    return [Row("versions", shown or "unknown", OK, "", dict(found)), *rows]


# ---------------------------------------------------------------------------------------------------------- imports

_MARK = "bolid-doctor:"


def try_imports(libraries: Sequence[Library] = LIBRARIES, patience: float = PATIENCE) -> Iterator[dict[str, Any]]:
    """Import each library in another process; yields {"module", "seconds", "error"} for each, as it comes.

    ``error``: "" where it works. A dict {"device": ...} comes after torch. A library that kills the process, or
    takes longer than ``patience`` seconds, is reported so, and a new process goes on with the next.
    """
    left = [library.module for library in libraries]
    while left:
        for answer in _answers(left, patience):
            if "module" in answer:
                left.remove(answer["module"])
            yield answer


def _answers(modules: list[str], patience: float) -> Iterator[dict[str, Any]]:
    """Of one process. Its end before the last module is an answer about the module that it was at."""
    package_folder = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-P", "-m", "bolid.doctor.libraries", *modules]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    errors: list[str] = []
    listener = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    listener.start()
    done: set[str] = set()
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(patience, give_up)
    timer.start()
    try:
        for line in process.stdout or ():
            if line.startswith(_MARK):
                timer.cancel()
                answer = json.loads(line.removeprefix(_MARK))
                done.add(answer.get("module", ""))
                yield answer
                timer = threading.Timer(patience, give_up)
                timer.start()
        process.wait()
        listener.join(5)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    at = next((module for module in modules if module not in done), None)
    if at is not None:
        how = f"took more than {patience:.0f} s" if late.is_set() else f"ended Python, status {process.returncode}"
        last = next((line.strip() for line in reversed(errors) if line.strip()), "")
        yield {"module": at, "seconds": None, "error": f"{how}{': ' + last if last and not late.is_set() else ''}"}


def _import_all(modules: Sequence[str]) -> None:
    """In the other process: import, and write what happened."""
    known = {library.module: library for library in LIBRARIES}
    for name in modules:
        started, error = time.monotonic(), ""
        library = known.get(name, Library(name, name, ""))
        try:
            module = importlib.import_module(name)
            if library.attribute:
                getattr(module, library.attribute)
        except BaseException as caught:  # a broken library may raise anything, SystemExit too
            lines = str(caught).strip().splitlines() or [""]
            error = f"{type(caught).__name__}: {lines[0]}"
        _answer({"module": name, "seconds": round(time.monotonic() - started, 2), "error": error})
        if name == "torch" and not error:
            _answer({"device": _devices()})
        if name == "onnxruntime" and not error:
            _answer({"onnxruntime": sys.modules[name].get_available_providers()})


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{_MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()


def _devices() -> dict[str, Any]:
    """What torch can compute on, tried with a small product."""
    import torch

    found: list[dict[str, Any]] = []
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name in [f"cuda:{i}" for i in range(cuda)] + (["mps"] if torch.backends.mps.is_available() else []):
        entry: dict[str, Any] = {"device": name}
        try:
            if name != "mps":
                properties = torch.cuda.get_device_properties(name)
                free, total = torch.cuda.mem_get_info(name)
                capability = f"{properties.major}.{properties.minor}"
                entry |= {"name": properties.name, "total": total, "free": free, "capability": capability}
                entry["bf16"] = torch.cuda.is_bf16_supported()
            ones = torch.ones(8, 8, device=name)
            entry["error"] = "" if float((ones @ ones).sum()) == 512 else "it computes a wrong product"
        except Exception as error:
            entry["error"] = str(error).splitlines()[0]
        found.append(entry)
    return {
        "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "found": found,
        "threads": torch.get_num_threads(), "driver": Path("/proc/driver/nvidia/version").exists(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- as rows


def import_rows(answers: Sequence[Mapping[str, Any]], libraries: Sequence[Library] = LIBRARIES) -> list[Row]:
    """The libraries that do not import, and one line for those that do."""
    known = {library.module: library for library in libraries}
    rows, good, seconds = [], 0, 0.0
    for answer in answers:
        if "module" not in answer:
            continue
        library = known[answer["module"]]
        seconds += answer["seconds"] or 0.0
        if not answer["error"]:
            good += 1
            continue
        state = WRONG if library.needed else NOTE
        advice = f"pip install --force-reinstall {library.package}; without it this fails: {library.used_by}"
        rows.append(Row(library.module, answer["error"], state, advice, dict(answer)))
    return [Row("imported", f"{good} of {len(known)} libraries in {seconds:.0f} s"), *rows]


def device_rows(answers: Sequence[Mapping[str, Any]], megabytes: int = 0) -> list[Row]:
    """What torch and onnxruntime compute on. ``megabytes``: of the family's base, 0 for a small one."""
    devices = next((answer["device"] for answer in answers if "device" in answer), None)
    if devices is None:
        return [Row("torch", "cannot be asked", WRONG, "see above: torch does not import")]
    built = f"CUDA {devices['cuda']}" if devices["cuda"] else f"ROCm {devices['hip']}" if devices["hip"] else "CPU only"
    rows = [Row("torch", f"{devices['torch']}, built for {built}", details=dict(devices))]
    for found in devices["found"]:
        memory = f"{gigabytes(found['free'])} free of {gigabytes(found['total'])}" if "total" in found else ""
        bf16 = ("bf16" if found["bf16"] else "no bf16") if "bf16" in found else ""
        text = ", ".join(filter(None, (found.get("name", ""), memory, bf16)))
        if found["error"]:
            advice = "--device cpu, or another build of torch"
            rows.append(Row(found["device"], f"does not compute: {found['error']}", WRONG, advice))
        elif megabytes and found.get("total", megabytes * 2e6) < 1.3e6 * megabytes:
            advice = f"the base alone takes {gigabytes(megabytes * 1e6)}: generate --offload"
            rows.append(Row(found["device"], text, NOTE, advice))
        else:
            rows.append(Row(found["device"], text))
    if not devices["found"]:
        text, advice = f"cpu, {devices['threads']} threads", ""
        if devices["driver"] and not devices["cuda"]:
            advice = "this machine has an NVIDIA driver, but torch is built without CUDA: install a plain torch"
        elif devices["driver"]:
            advice = f"torch cannot use this machine's NVIDIA driver: it may be older than CUDA {devices['cuda']}"
        elif megabytes:
            advice = "one picture of a full-size base takes minutes to hours on a CPU"
        rows.append(Row("device", text, NOTE if advice else OK, advice))
    providers = next((answer["onnxruntime"] for answer in answers if "onnxruntime" in answer), None)
    if providers is not None:
        card = any(found["device"] != "mps" for found in devices["found"])
        on_cpu = card and "CUDAExecutionProvider" not in providers
        advice = "faces are found on the CPU: onnxruntime-gpu in place of onnxruntime is faster" if on_cpu else ""
        rows.append(Row("onnxruntime", ", ".join(providers), NOTE if on_cpu else OK, advice))
    return rows


if __name__ == "__main__":
    _import_all(sys.argv[1:])
