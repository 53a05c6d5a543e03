"""Inputs of `scrape` that are files: a folder of photos of one's own, and lists of addresses."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from bolid.errors import BolidError
from bolid.formats.images import printable, read_file
from bolid.formats.photos import read_notes
from bolid.scrape.check import PhotoQuality
from bolid.scrape.collection import Collection

_LISTS = "a .txt, .csv, .tsv or .parquet file"


def import_folder(folder: Path, listed: list[tuple[str, Path]], collection: Collection) -> int:
    """Photos of a folder, in its order. Two threads check them, since decoding is most of the work.

    Returns how many were not looked at, because their person has all the photos that --max-photos allows.
    """
    from bolid.backends.caption import caption_for

    collection.total, beyond = len(listed), 0
    waiting: deque[tuple[str, Path, str, Future[tuple[bytes, PhotoQuality]]]] = deque()

    def settle() -> None:
        person, path, source, future = waiting.popleft()
        origin = {"file": printable(path.relative_to(folder)), **_earlier(path)}
        try:
            data, measured = future.result()
        except BolidError as error:
            collection.drop(person, source, error.message.partition(":")[0])
            return
        try:
            caption = caption_for(path)
        except BolidError as error:
            collection.drop(person, source, error.message, final=False)
            return
        collection.settle(person, origin, source, data, measured, caption)

    def read(path: Path) -> tuple[bytes, PhotoQuality]:
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
            if not collection.wants(person, source):
                continue
            if collection.full(person):
                beyond += 1
                continue
            collection.supersede(printable(path.absolute()))
            waiting.append((person, path, source, pool.submit(read, path)))
            if len(waiting) > 4:
                settle()
        while waiting:
            settle()
    return beyond


def _earlier(path: Path) -> dict[str, str]:
    """The origin of a photo, from the record of an earlier collection beside it."""
    return read_notes(path, ("url", "page", "license", "consent"))


class AddressList:
    """(person, url, caption) from a .txt, .csv, .tsv or .parquet file, read one by one.

    .txt: an address a line, the person before it. The others: a column ``url``, and if they like ``person`` and
    ``caption`` (or ``text``). Photos without a person are of the one that the file is named after.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise BolidError(f"there is no list {path}", f"give {_LISTS} of addresses and people")
        readers = {".txt": self._txt, ".csv": self._csv, ".tsv": self._csv, ".parquet": self._parquet}
        if path.suffix.lower() not in readers:
            raise BolidError(f"{path} is not {_LISTS}", "save the list in one of these formats")
        self._read = readers[path.suffix.lower()]
        self.unnamed = 0  # photos without a person
        self._length = 0
        for person, _, _ in self:  # finds mistakes in the file before anything is fetched
            self._length += 1
            self.unnamed += person == path.stem
        if not self._length:
            raise BolidError(f"there are no addresses in {path}", "write one a line")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        for person, url, caption in self._read():
            if url and url.strip():
                yield (person or "").strip() or self._path.stem, url.strip(), " ".join((caption or "").split())

    def _txt(self) -> Iterator[tuple[str, str, str]]:
        for line in self._lines():
            if not line.startswith("#"):
                person, _, url = line.strip().replace("\t", " ").rpartition(" ")
                yield person, url, ""

    def _csv(self) -> Iterator[tuple[str, str, str]]:
        rows = csv.DictReader(self._lines(), delimiter="\t" if self._path.suffix.lower() == ".tsv" else ",")
        columns = self._columns({(name or "").strip().lower(): name for name in rows.fieldnames or ()})
        for row in rows:
            person, url, caption = (row[name] or "" if name else "" for name in columns)
            yield person, url, caption

    def _parquet(self) -> Iterator[tuple[str, str, str]]:
        import polars

        try:
            lazy = polars.scan_parquet(self._path)
            columns = self._columns({name.lower(): name for name in lazy.collect_schema().names()})
            table = lazy.select(name for name in columns if name).collect()
        except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError) as error:
            raise BolidError(f"cannot read {self._path}: {str(error).splitlines()[0]}", "write it again") from error
        for row in table.iter_rows(named=True):
            person, url, caption = (str(row[name] or "") if name else "" for name in columns)
            yield person, url, caption

    def _columns(self, names: dict[str, str]) -> tuple[str, str, str]:
        """The columns, as the file writes them, of person, url and caption; "" for one that is not there."""
        if "url" not in names:
            raise BolidError(
                f"{self._path} has the columns {', '.join(sorted(names)) or 'none'}",
                "it needs the column url, and if you like person and caption",
            )
        return names.get("person", ""), names["url"], names.get("caption") or names.get("text", "")

    def _lines(self) -> Iterator[str]:
        try:
            with open(self._path, encoding="utf-8-sig", newline="") as file:
                yield from file
        except (UnicodeDecodeError, OSError) as error:
            raise BolidError(f"{self._path} is not UTF-8 text", "save it as UTF-8") from error
