"""The place of shards: a folder of this machine, or an object store that fsspec knows, like ``s3://bucket/shards``.

A remote directory is written tar by tar: each is made in a scratch file and sent when it is finished. It is read
through copies of its tars in ``BOLID_HOME/shards``, named by their sha256, so that training fetches each tar once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from bolid.errors import BolidError
from bolid.run import atomic_path, home, only_writer

__all__ = ["alone", "fetch", "is_remote", "place", "remote_errors", "send"]


def place(where: str | os.PathLike[str]) -> Path:
    """The path of a shard directory. For a URL it is a ``upath.UPath``, which does what a Path does.

    Raises BolidError for a kind of URL that no installed package knows.
    """
    text = str(where)
    if "://" not in text:
        return Path(where)
    from upath import UPath

    kind = text.partition("://")[0]
    try:
        path: Any = UPath(text.rstrip("/"))
        path.fs  # noqa: B018  # loads the package that speaks this protocol
    except (ImportError, ValueError) as error:
        raise BolidError(
            f"cannot reach {text}: {error}",
            "pip install 'bolid[s3]'" if kind in ("s3", "s3a") else f"install fsspec's package for {kind}://",
        ) from error
    return cast(Path, path)  # UPath is no subclass, and is one in all but name


def is_remote(path: Path) -> bool:
    """Whether the path lies in an object store."""
    return "://" in str(path)


def alone(directory: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Keep other processes of this machine from writing a shard directory. Object stores have no locks.

    Raises BolidError where another process writes it.
    """
    return contextlib.nullcontext() if is_remote(place(directory)) else only_writer(directory, folder=True)


@contextlib.contextmanager
def remote_errors(path: Path) -> Iterator[None]:
    """Turn what the store's own package raises (no network, no credentials, no such bucket) into a BolidError."""
    try:
        yield
    except (BolidError, KeyboardInterrupt):
        raise
    except Exception as error:  # every package has its own classes, many of them not OSErrors
        if not is_remote(path):
            raise
        raise BolidError(
            f"cannot reach {path}: {type(error).__name__}: {error}",
            "check the address, the credentials and the network, then run the same command again: it goes on where it "
            "stopped",
        ) from error


def send(file: Path, path: Path) -> None:
    """Put the local ``file`` at ``path`` in its store, whole or not at all."""
    with remote_errors(path), open(file, "rb") as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)


def fetch(path: Path, sha256: str, size: int) -> Path:
    """A local copy of the tar at ``path``, which the index says has this hash and size. Raises BolidError."""
    copy = home() / "shards" / f"{sha256}.tar"
    if not (copy.is_file() and copy.stat().st_size == size):
        with atomic_path(copy) as temporary, remote_errors(path):
            with path.open("rb") as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
    return copy
