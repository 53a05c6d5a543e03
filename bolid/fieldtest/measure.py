"""Time and peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from pathlib import Path
from typing import Any

INTERVAL = 0.05  # seconds between two looks at the memory, where the system keeps no peak


class Meter:
    """``with Meter() as measured: ...``; afterwards ``seconds``, ``host_peak`` and ``device_peak`` (bytes or None).

    Of the process: the largest resident memory, which Linux keeps itself; elsewhere it is looked at 20 times a second.
    Of CUDA: the largest memory that tensors had; of MPS, what the driver had, looked at as often.
    """

    seconds = 0.0
    host_peak: int | None = None
    device_peak: int | None = None

    def __enter__(self) -> Meter:
        free_memory()
        self._keeps_peak = _reset_peak()
        if cuda := _cuda():
            for number in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(number)
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._started = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.monotonic() - self._started
        self._ended.set()
        self._watcher.join()
        if self._keeps_peak:
            self.host_peak = _status("VmHWM") or self.host_peak
        if cuda := _cuda():
            peaks = [cuda.max_memory_allocated(number) for number in range(cuda.device_count())]
            self.device_peak = max(peaks, default=None)

    def _watch(self) -> None:
        while True:
            if not self._keeps_peak and (now := _resident()) is not None:
                self.host_peak = max(self.host_peak or 0, now)
            torch = sys.modules.get("torch")
            with contextlib.suppress(Exception):  # torch may be half imported, or without MPS
                if torch is not None and torch.backends.mps.is_available():
                    self.device_peak = max(self.device_peak or 0, torch.mps.driver_allocated_memory())
            if self._ended.wait(INTERVAL):
                return


def free_memory() -> None:
    """Give back what the last step left: tensors in circles of references, and the allocator's cache."""
    gc.collect()
    if cuda := _cuda():
        cuda.empty_cache()


def _cuda() -> Any:
    """torch.cuda where it has a device and has been loaded, else None."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):
        if torch is not None and torch.cuda.is_available():
            return torch.cuda
    return None


def _reset_peak() -> bool:
    """Whether Linux starts a new peak of the resident memory."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmHWM") is not None
    except OSError:
        return False


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _resident() -> int | None:
    try:
        import psutil

        return psutil.Process().memory_info().rss
    except Exception:  # psutil may be missing or broken
        return None
