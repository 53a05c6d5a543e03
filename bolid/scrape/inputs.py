"""Inputs of `scrape` that are files: a folder of photos of one's own, and lists of addresses."""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from bolid.errors import BolidError
from bolid.formats.images import PHOTO_SUFFIXES, printable, read_file
from bolid.formats.photos import read_notes
from bolid.scrape.check import Measured
from bolid.scrape.collection import Collection


def import_folder(folder: Path, listed: list[tuple[str, Path]], collection: Collection) -> None:
    """Photos of a folder, in its order. Two threads check them, since decoding is most of the work."""
    collection.total = len(listed)
    waiting: deque[tuple[str, Path, str, Future[tuple[bytes, Measured]]]] = deque()

    def settle() -> None:
        person, path, source, future = waiting.popleft()
        origin = {"file": printable(path.relative_to(folder)), **_earlier(path)}
        try:
            data, measured = future.result()
        except BolidError as error:
            collection.drop(person, source, error.message.partition(":")[0])
            return
        try:
            caption = _caption(path)
        except BolidError as error:
            collection.drop(person, source, error.message, final=False)
            return
        collection.settle(person, origin, source, data, measured, caption)

    def read(path: Path) -> tuple[bytes, Measured]:
        data = read_file(path)
        return data, collection.check(data)

    with ThreadPoolExecutor(2) as pool:
        for name, path in listed:
            person = collection.person(printable(name))
            if person is None:
                continue
            status = path.stat() if path.exists() else path.lstat()  # of a link to nothing: its own
            source = (
                f"{printable(path.absolute())}?{status.st_size}-{status.st_mtime_ns}"  # a changed file is another photo
            )
            if collection.full(person) or not collection.wants(person, source):
                continue
            collection.supersede(printable(path.absolute()))
            waiting.append((person, path, source, pool.submit(read, path)))
            if len(waiting) > 4:
                settle()
        while waiting:
            settle()


def not_read(folder: Path) -> list[str]:
    """Warnings about files and folders that may be photos but are not read."""
    endings: Counter[str] = Counter()
    deeper: list[str] = []
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        for path in place.iterdir() if not place.name.startswith(".") else ():
            if path.name.startswith("."):
                continue
            if path.is_dir() and place != folder:
                deeper.append(path.relative_to(folder).as_posix())
            elif path.is_file() and path.suffix.lower() not in PHOTO_SUFFIXES | {".txt", ".json", ".csv", ".toml"}:
                endings[path.suffix.lower() or path.name] += 1
    warnings = []
    if endings:
        listed = ", ".join(f"{ending}: {number}" for ending, number in endings.most_common(5))
        warnings.append(f"files of other kinds were not read ({listed}); save them as JPEG or PNG if they are photos")
    if deeper:
        listed = ", ".join(sorted(deeper)[:3]) + (", ..." if len(deeper) > 3 else "")
        warnings.append(f"deeper folders were not read ({listed}): only <person>/ is")
    return warnings


def _earlier(path: Path) -> dict[str, str]:
    """The origin of a photo, from the record of an earlier collection beside it."""
    return read_notes(path, ("url", "page", "license", "consent"))


def _caption(path: Path) -> str:
    from bolid.backends.caption import caption_for

    return caption_for(path)


class AddressList:
    """(person, url) from a .txt, .csv or .parquet file, read one by one.

    .txt: an address a line, the person before it; without one all are of the person that the file is named after.
    .csv and .parquet: columns ``person`` and ``url``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise BolidError(f"there is no list {path}", "give a .txt, .csv or .parquet file of people and addresses")
        readers = {".txt": self._txt, ".csv": self._csv, ".parquet": self._parquet}
        if path.suffix.lower() not in readers:
            raise BolidError(f"{path} is no .txt, .csv or .parquet file", "save the list in one of these formats")
        self._read = readers[path.suffix.lower()]
        self._length = sum(1 for _ in self)  # finds mistakes in the file before anything is fetched
        if not self._length:
            raise BolidError(f"there are no addresses in {path}", "write one a line")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for person, url in self._read():
            if url and url.strip():
                yield (person or "").strip() or self._path.stem, url.strip()

    def _txt(self) -> Iterator[tuple[str, str]]:
        for line in self._lines():
            if not line.startswith("#"):
                person, _, url = line.strip().replace("\t", " ").rpartition(" ")
                yield person, url

    def _csv(self) -> Iterator[tuple[str, str]]:
        rows = csv.DictReader(self._lines())
        names = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
        self._columns(names)
        for row in rows:
            yield row[names["person"]] or "", row[names["url"]] or ""

    def _parquet(self) -> Iterator[tuple[str, str]]:
        import polars

        try:
            lazy = polars.scan_parquet(self._path)
            names = {name.lower(): name for name in lazy.collect_schema().names()}
            self._columns(names)
            table = lazy.select(names["person"], names["url"]).collect()
        except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError) as error:
            raise BolidError(f"cannot read {self._path}: {str(error).splitlines()[0]}", "write it again") from error
        for person, url in table.iter_rows():
            yield str(person or ""), str(url or "")

    def _columns(self, names: Iterable[str]) -> None:
        if not {"person", "url"} <= set(names):
            raise BolidError(
                f"{self._path} has the columns {', '.join(sorted(names)) or 'none'}", "it needs the columns person,url"
            )

    def _lines(self) -> Iterator[str]:
        try:
            with open(self._path, encoding="utf-8-sig", newline="") as file:
                yield from file
        except (UnicodeDecodeError, OSError) as error:
            raise BolidError(f"{self._path} is not UTF-8 text", "save it as UTF-8") from error
