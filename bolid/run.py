"""Run records (which every artefact carries), seeds by name, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bolid.errors import BolidError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
LARGEST_SEED = 2**63 - 1

Progress = Callable[[int, int, str], None]
"""How a long function reports: (done, total, what it is doing). ``total`` 0: not known."""

# The libraries whose version can change what an artefact holds.
_RECORDED_PACKAGES = (
    "bolid", "torch", "diffusers", "transformers", "ultralytics", "insightface", "open_clip_torch",
    "onnxruntime", "numpy", "pillow", "safetensors",
)  # fmt: skip


def home() -> Path:
    """Where full-size weights and the remembered family live: BOLID_HOME, by default ~/.cache/bolid."""
    return Path(os.environ.get("BOLID_HOME") or Path.home() / ".cache" / "bolid")


def prepare_environment() -> None:
    """Set what torch, ultralytics and others read from the environment when they load. What the user has set stays.

    Called by the ``bolid`` program when it starts, by ``bolid.api`` before it loads a command, and before ultralytics
    is imported. Thread policies have no effect on a torch that is loaded already.
    """
    defaults = {
        # Spinning OpenMP threads made one forward pass 30 times slower as soon as anything else used the CPU.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": "1",
        # Never let ultralytics install packages, run pickled code, phone home or write into the user's home.
        "YOLO_AUTOINSTALL": "false",
        "YOLO_OFFLINE": "true",
        "YOLO_VERBOSE": "false",
        "ULTRALYTICS_SAFE_LOAD": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",  # it warns at length when worker processes start
        "YOLO_CONFIG_DIR": str(home().absolute()),  # ultralytics makes a folder and a settings file there
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory for the next tensors, instead of giving it back to the system at
    once: a picture of `tiny` takes 6 % less CPU time. Nothing elsewhere, or where the user has set MALLOC_*.

    For programs: a library leaves its process's allocator alone.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD
    mallopt(-2, 64 << 20)  # M_TOP_PAD
    mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for the purpose that ``names`` spell, e.g. ``derive_seed(seed, "train-vae", step)``.

    Equal arguments give equal seeds on every machine; a new purpose never shifts the seeds of the others.
    """
    digest = hashlib.sha256(canonical_json([seed, *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def canonical_json(obj: Any) -> str:
    """JSON with sorted keys and no spaces: equal objects, equal bytes. Takes dataclasses, paths, numpy numbers."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if isinstance(obj, os.PathLike) or hasattr(obj, "protocol"):  # a UPath of an object store
        return str(obj)
    if hasattr(obj, "tolist"):  # numpy scalars and arrays
        return obj.tolist()
    raise TypeError(f"{type(obj).__name__} does not belong in a record")


def run_record(
    kind: str, *, family: Any, config: Any = None, seed: int | None = None, inputs: dict[str, str] | None = None
) -> dict[str, Any]:
    """The record an artefact carries in its one metadata key ``bolid``.

    ``kind``: "profile", "adapter", ...; ``family``: a Family or its name; ``config``: a dataclass or a dict;
    ``inputs``: name -> sha256 of what went in. The result holds plain JSON values only.
    """
    record = {
        "kind": kind,
        "version": FORMAT_VERSION,
        "family": getattr(family, "name", family),
        "config": {} if config is None else config,
        "seed": seed,
        "inputs": inputs or {},
        "packages": _versions(),
    }
    return json.loads(canonical_json(record))


@functools.cache
def _versions() -> dict[str, str]:
    import importlib.metadata

    packages = {}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return packages


def run_differences(found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """The fields in which two run records differ, package versions aside. Settings and inputs are listed one by one."""
    result = []
    for name in ("family", "config", "seed", "inputs"):
        old, new = found.get(name), record.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            result += [
                key for key in sorted({*old, *new}) if canonical_json(old.get(key)) != canonical_json(new.get(key))
            ]
        else:
            result.append(name)
    return result


def pick_device(name: str = "auto") -> str:
    """A torch device name that works here: ``auto`` is cuda or mps where there is one, else cpu.

    Raises BolidError for a device that this machine lacks.
    """
    prepare_environment()
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.empty(0, device=name).is_meta:
            raise NotImplementedError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BolidError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}", "try --device cpu, or --device auto"
        ) from error
    return name


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut (where the system can)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left", "permission denied" and the like into a BolidError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BolidError(
                f"no space left on the disk while writing {path}",
                "free some space, then run the same command again: it goes on where it stopped",
            ) from error
        if error.errno in _CANNOT_WRITE or (error.errno == errno.ENOENT and _is_made_for(path, error)):
            inside = home().absolute() in path.absolute().parents
            raise BolidError(
                f"cannot write {path}: {error.strerror}",
                "set BOLID_HOME to a folder that can be written"
                if inside
                else "choose another --out, or change the permissions",
            ) from error
        raise


def _is_made_for(path: Path, error: OSError) -> bool:
    """Whether the file or folder that could not be made is `path`, its temporary file, or a folder above it."""
    failed, path = Path(os.fsdecode(error.filename or "")).absolute(), path.absolute()
    return not path.parent.is_dir() or failed.parent == path.parent or failed in path.parents


_CANNOT_WRITE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


@contextlib.contextmanager
def _temporary(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside ``path``, to be filled and renamed; gone afterwards.

    It is .NAME.bolid-tmp.SUFFIX: whoever writes ``path`` next takes over what a killed process has left. While another
    writer holds it, .NAME-2.bolid-tmp.SUFFIX is taken, and so on. Raises OSError where it cannot be made.
    """
    for place in _temporary_names(path, folder):
        lock = _Lock(place, folder)
        if lock.held and not folder and place.stat().st_nlink > 1:  # killed after `claim`: it is the finished file, too
            place.unlink()
            lock.release()
            lock = _Lock(place)
        if lock.held:
            break
    try:
        if folder:
            for old in place.iterdir():
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        else:
            os.truncate(place, 0)
        yield place
    finally:
        if lock.is_of(place):  # not yet renamed
            shutil.rmtree(place, ignore_errors=True) if folder else place.unlink()
        lock.release()


def _temporary_names(path: Path, folder: bool = False) -> Iterator[Path]:
    """The names that `_temporary` tries, in this order."""
    suffix = "" if folder else path.suffix
    stem = path.name.removesuffix(suffix)
    if len(os.fsencode(stem)) > 180:  # a file's name has 255 bytes at most
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
    if fcntl is None:
        stem += f"-{os.getpid()}-{threading.get_ident()}"
    for number in itertools.count(1):
        yield path.with_name(f".{stem}{f'-{number}' if number > 1 else ''}.bolid-tmp{suffix}")


class _Lock:
    """A file or folder, made where there is none. `held` unless another process or thread holds it, or it is a link.

    A kill lets it go. Where a file system knows no locks, nobody else is taken to write.
    """

    def __init__(self, place: Path, folder: bool = False) -> None:
        if folder:
            place.mkdir(parents=True, exist_ok=True)
        self.held, self.descriptor = True, -1
        if fcntl is None:
            if not folder:
                place.touch()
            return
        flags = os.O_NOFOLLOW | (os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT)
        try:
            self.descriptor = os.open(place, flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            self.held = False
            return
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = self.is_of(place)  # or its holder has renamed or removed it meanwhile
        except BlockingIOError:
            self.held = False
        except OSError:
            pass
        if not self.held:
            self.release()

    def is_of(self, place: Path) -> bool:
        """Whether ``place`` is still what was locked."""
        try:
            state = os.stat(place)
        except FileNotFoundError:
            return False
        return self.descriptor < 0 or os.path.samestat(os.fstat(self.descriptor), state)

    def release(self) -> None:
        """Let others have it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)


@contextlib.contextmanager
def only_writer(out: str | os.PathLike[str], *, folder: bool) -> Iterator[None]:
    """Keep other processes from writing ``out``, a file or a folder. Raises BolidError where one does already.

    A folder is made, and locked itself; it goes again if it is still empty at the end. For a file there is
    .NAME.bolid-lock beside it until then.
    """
    out = Path(out)
    place, new = out.resolve() if folder else out.with_name(f".{out.name}.bolid-lock"), not out.exists()
    with disk_errors(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _Lock(place, folder)
    if not lock.held:
        raise BolidError(f"another process is writing {out}", "wait until it has ended, or choose another --out")
    try:
        yield
    finally:
        if not folder and lock.is_of(place):
            place.unlink()
        elif folder and new:
            with contextlib.suppress(OSError):  # not empty
                place.rmdir()
        lock.release()


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process has left of ``path`` beside it. Where it has left nothing, nothing is written."""
    if os.path.lexists(next(_temporary_names(path))):
        with contextlib.suppress(OSError), _temporary(path):
            pass


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """``with atomic_path("a.json") as temporary:`` write to ``temporary``; on success it is synced and renamed.

    ``path`` either keeps its old content or gets all of the new one; a failure removes the temporary file. Its name
    keeps the suffix, since many writers choose their format by it. A symbolic link is written through. Raises
    BolidError where ``path`` is a folder, a device or a pipe, or cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        if path.is_symlink():
            path = path.resolve()
        if path.is_dir():
            raise BolidError(f"{path} is a folder", "give the name of a file")
        if path.exists() and not path.is_file():
            raise BolidError(f"{path} is a device, a pipe or a socket", "give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_directory(path.parent)


@contextlib.contextmanager
def unfinished(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file beside ``path``, with its ending, to be written and renamed or linked; gone afterwards."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            yield temporary


def claim(temporary: Path, path: Path) -> bool:
    """Give a whole file its name ``path``, unless that is taken: True where it was free."""
    try:
        os.link(temporary, path)
        sync_directory(path.parent)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        with disk_errors(path):
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                return False
            os.replace(temporary, path)
    return True


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which is renamed to ``path`` at the end; a failure leaves nothing."""
    path = Path(path)
    with disk_errors(path), _temporary(path, folder=True) as temporary:
        yield temporary
        os.rename(temporary, path)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file at once, or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
