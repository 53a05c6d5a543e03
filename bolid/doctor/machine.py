"""The machine and the environment variables that matter. Standard library only."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from bolid.doctor.rows import NOTE, OK, WRONG, Row, gigabytes
from bolid.models.families import chosen_family, commercial_use
from bolid.run import home

OLDEST_PYTHON = (3, 11)
LEAST_MEMORY = 4e9  # bytes; the chain on `tiny` takes about 2
_YES = ("1", "ON", "YES", "TRUE")


def machine() -> list[Row]:
    """Python, system, processor, memory and free disk space."""
    version = platform.python_version()
    old = sys.version_info[:2] < OLDEST_PYTHON
    advice = f"install Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer" if old else ""
    rows = [
        Row("Python", f"{version}, {sys.executable or 'embedded'}", WRONG if old else OK, advice),
        Row("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        _processor(),
        _memory(),
    ]
    folders = {"models": home(), "working folder": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    return rows + [_disk(f"disk, {name}", folder) for name, folder in folders.items()]


def _processor() -> Row:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    text = f"{usable} cores" if usable == cores else f"{usable} of {cores} cores usable"
    return Row("processor", text, details={"cores": cores, "usable": usable})


def _memory() -> Row:
    total, available = memory()
    if total is None:
        return Row("memory", "unknown")
    text = gigabytes(total) + ("" if available is None else f", {gigabytes(available)} available")
    details = {"total": total, "available": available}
    if total < LEAST_MEMORY:
        return Row("memory", text, NOTE, f"less than {gigabytes(LEAST_MEMORY)}: close other programs", details)
    return Row("memory", text, details=details)


def memory() -> tuple[int | None, int | None]:
    """(total, available) main memory in bytes, by the container's limit where there is one; None: unknown."""
    total = available = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        total, available = known.get("MemTotal"), known.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        try:
            import psutil

            total, available = psutil.virtual_memory().total, psutil.virtual_memory().available
        except Exception:  # psutil is another library's, and may be missing or broken
            return None, None
    limit = _number("/sys/fs/cgroup/memory.max") or _number("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if total is not None and limit is not None and limit < total:
        used = _number("/sys/fs/cgroup/memory.current") or _number("/sys/fs/cgroup/memory/memory.usage_in_bytes") or 0
        total, available = limit, min(available or limit, max(0, limit - used))
    return total, available


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return None


def free_space(folder: Path) -> int | None:
    """Free bytes on the disk of a folder, which need not exist yet; None where that cannot be asked."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _disk(name: str, folder: Path) -> Row:
    free = free_space(folder)
    text = f"{folder}: {'unknown' if free is None else gigabytes(free) + ' free'}"
    details = {"folder": str(folder), "free": free}
    if free is not None and free < 1e9:
        return Row(name, text, NOTE, "free some space: a step that runs out of it stops", details)
    return Row(name, text, details=details)


# ------------------------------------------------------------------------------------------------- the environment

_SHOWN = (
    "BOLID_HOME", "BOLID_FAMILY", "BOLID_COMMERCIAL", "BOLID_DEBUG", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT",
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LD_PRELOAD",
    "PYTHONPATH",
)  # fmt: skip
_SECRET = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def environment() -> list[Row]:
    """Environment variables that change what bolid does. Of tokens and proxies only that they are set."""
    rows = [_omp_wait_policy()]
    name, source = chosen_family()
    rows.append(Row("family in use", f"{name}, chosen by: {source}"))
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in _YES
    if offline:
        rows.append(Row("HF_HUB_OFFLINE", "set", NOTE, "the Hugging Face Hub is not asked: unset it to pull"))
    if commercial_use():
        rows.append(Row("commercial use", "models that forbid it are refused"))
    rows += [Row(name, value) for name in _SHOWN if (value := os.environ.get(name))]
    rows += [Row(name, "set") for name in _SECRET if os.environ.get(name)]
    return rows


def _omp_wait_policy() -> Row:
    value = os.environ.get("OMP_WAIT_POLICY", "")
    if value.upper() == "PASSIVE":
        return Row("OMP_WAIT_POLICY", value)
    why = "set it to PASSIVE: waiting threads that spin can make a shared processor 30 times slower"
    return Row("OMP_WAIT_POLICY", value or "not set", NOTE, why)
