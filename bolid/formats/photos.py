"""The photo folder that `bolid scrape` writes and `bolid extract` reads. It survives a kill at any moment.

    photos/<person>/<sha16>.jpg     the photo; the original's own bytes where that is a JPEG
    photos/<person>/<sha16>.json    its origin: url or file, sha256 of the original, size, license, ...
    photos/people.csv               the people, and the number of photos of each
    photos/dropped.csv              the photos that were left out, and why
    photos/.scrape.sqlite           every source with a verdict, and the web pages of the last days

``sha16`` is the first 16 hex digits of the original's sha256. The record is written before the photo, the photo before
its row in the database; each is written under a temporary name and renamed. Opening the folder after a kill removes or
adopts what has no row. Photos are not synced one by one, which would take most of the time: a folder that was not
closed is searched for photos that a power cut has truncated.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.images import read_file
from bolid.formats.parsing import parse_json
from bolid.run import disk_errors, write_atomic

PEOPLE = "people.csv"
DROPPED = "dropped.csv"
DATABASE = ".scrape.sqlite"
PAGES_FRESH = 7 * 86400  # seconds that a web page is not fetched again

# What a killed run leaves beside the people's folders, and nothing else.
_LEFTOVER = re.compile(r"\.(people|dropped)(-\d+)?\.bolid-tmp\.csv")

KEPT, FILTERED, FAILED = "kept", "filtered", "failed"
REMOVED = "removed by hand"
SAME_FILE = "the same file again"
NEAR_DUPLICATE = "near-duplicate of another photo of the person"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS people (folder TEXT PRIMARY KEY, name TEXT, page TEXT);
CREATE TABLE IF NOT EXISTS photos (
  source TEXT PRIMARY KEY, person TEXT, kind TEXT, reason TEXT, setting TEXT, final INTEGER,
  sha256 TEXT, phash TEXT, license TEXT, consent TEXT, stored INTEGER);
CREATE INDEX IF NOT EXISTS photos_of ON photos (person, kind);
CREATE INDEX IF NOT EXISTS photos_sha256 ON photos (sha256);
CREATE TABLE IF NOT EXISTS pages (
  key TEXT PRIMARY KEY, url TEXT, status INTEGER, headers TEXT, body BLOB, time REAL);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS forgotten (digest TEXT PRIMARY KEY);
"""


def folder_name(name: str) -> str:
    """The folder of a person called ``name``: one path component that every system allows and none hides.

    Letters of all scripts stay. A name that had to be changed gets 8 digits of its hash, so that two names never share
    a folder.
    """
    wanted = " ".join(unicodedata.normalize("NFC", name).split())
    clean = "".join("_" if c in '<>:"/\\|?*' or unicodedata.category(c)[0] == "C" else c for c in wanted)
    clean = clean.encode()[:80].decode(errors="ignore").strip(" .")
    if clean and clean == wanted and clean.casefold() not in (PEOPLE, DROPPED):
        return clean
    return f"{clean or 'person'}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def same_name(name: str) -> str:
    """A name without capitals, repeated spaces and underscores: equal results mean one person."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


class _Database(sqlite3.Connection):
    """A connection that reports a full disk as a BolidError."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            if "full" not in str(error):
                raise
            raise BolidError(
                "no space left on the disk for what was collected",
                "free some space, then run the same command again: it goes on where it stopped",
            ) from error


def _damaged(database: Path, error: Exception) -> BolidError:
    return BolidError(
        f"{database} is damaged: {error}",
        "remove that file: the photos stay, and are known again from the .json beside each",
    )


class PhotoFolder:
    """A photo folder, open for collecting by one process; use it as a context manager.

    A *source* is a photo's address: a URL, or "<path>?<size>-<time>" of a file. A *setting* is the option, with its
    value, on which a filter's verdict depends. Raises BolidError when another process has the folder open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        database = self.path / DATABASE
        try:
            # Autocommit: every statement is on the disk, whole, when it returns; threads take turns (see scrape.py).
            self._db = sqlite3.connect(
                database, timeout=0, isolation_level=None, check_same_thread=False, factory=_Database
            )
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten, too
            self._db.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise BolidError(
                    f"{self.path} is being written by another `bolid scrape`",
                    "wait for it to end, or choose another --out",
                ) from error
            raise BolidError(f"cannot open {database}: {error}", "choose another --out") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise _damaged(database, error) from error
        with self._damage():
            self._reconcile()
            self.note("open", "yes")

    def __enter__(self) -> PhotoFolder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._damage():
            if isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError):
                raise error
            with disk_errors(self.path), contextlib.suppress(AttributeError):  # Windows has none
                os.sync()
            self.note("open", "")
            self._db.close()

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn what SQLite says of a damaged database into a BolidError."""
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self._db.close()
            raise _damaged(self.path / DATABASE, error) from error

    # ------------------------------------------------------------------------------------------------- people

    def person(self, name: str, page: str = "") -> str:
        """The folder of the person of this name and page. Two people of one name and different pages get two."""
        query = "SELECT folder FROM people WHERE name = ? AND page IN (?, '')"
        if known := self._db.execute(query, (name, page)).fetchone():
            return str(known[0])
        folder = folder_name(name)
        taken = {row[0].casefold() for row in self._db.execute("SELECT folder FROM people")}
        if folder.casefold() in taken:
            folder += "-" + hashlib.sha256(f"{name}\n{page}".encode()).hexdigest()[:8]
        self._db.execute("INSERT INTO people VALUES (?, ?, ?)", (folder, name, page))
        return folder

    def people(self) -> list[tuple[str, str]]:
        """(folder, name) of everybody, in order."""
        return self._db.execute("SELECT folder, name FROM people ORDER BY folder").fetchall()

    def is_forgotten(self, name: str, page: str = "") -> bool:
        """Whether this person was deleted with `--forget`."""
        digests = [_digest(name), _digest(page)] if page else [_digest(name)]
        marks = ",".join("?" * len(digests))
        found = self._db.execute(f"SELECT 1 FROM forgotten WHERE digest IN ({marks})", digests).fetchone()
        return found is not None

    def forget(self, person: str) -> None:
        """Delete everything of the person in folder ``person``.

        A hash of the name stays, so that nothing of them is collected again.
        """
        names = self._db.execute("SELECT name, page FROM people WHERE folder = ?", (person,)).fetchall()
        for text in {person, *(part for row in names for part in row if part)}:
            self._db.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (_digest(text),))
        self._remove_folder(person)
        self._db.execute("DELETE FROM photos WHERE person = ?", (person,))
        self._db.execute("DELETE FROM people WHERE folder = ?", (person,))
        self._db.execute("DELETE FROM pages")  # any of them may name the person
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # ------------------------------------------------------------------------------------------------- photos

    def knows(self, source: str) -> bool:
        """Whether this source has a verdict: kept, or left out."""
        return self._db.execute("SELECT 1 FROM photos WHERE source = ?", (source,)).fetchone() is not None

    def count(self, person: str) -> int:
        """Photos kept of the person."""
        row = self._db.execute("SELECT count(*) FROM photos WHERE person = ? AND kind = 'kept'", (person,)).fetchone()
        return int(row[0])

    def twin(self, person: str, sha256: str, phash: int, bits: int) -> str:
        """Why this photo is a duplicate, or "".

        SAME_FILE: of anybody's; NEAR_DUPLICATE: of a photo of the person, with a perceptual hash that differs in at
        most ``bits`` bits.
        """
        if self._db.execute("SELECT 1 FROM photos WHERE sha256 = ? AND kind = 'kept'", (sha256,)).fetchone():
            return SAME_FILE
        rows = self._db.execute("SELECT phash FROM photos WHERE person = ? AND kind = 'kept'", (person,))
        return NEAR_DUPLICATE if any((int(other, 16) ^ phash).bit_count() <= bits for (other,) in rows) else ""

    def resume(self, person: str, source: str, file: str, sha256: str) -> bool:
        """Whether this file of a folder is the origin of a kept photo whose row does not know its source: the row was
        made anew from the record, or the folder has moved. The row then gets the source.
        """
        query = "SELECT source FROM photos WHERE person = ? AND sha256 = ? AND kind = 'kept'"
        row = self._db.execute(query, (person, sha256)).fetchone()
        if not file or row is None:
            return False
        path = row[0].rpartition("?")[0]
        if row[0] != f"{file}?{sha256}" and ("://" in row[0] or not path.endswith(f"/{file}") or os.path.lexists(path)):
            return False
        self._db.execute("UPDATE photos SET source = ? WHERE source = ?", (source, row[0]))
        return True

    def keep(self, person: str, source: str, image: bytes, record: dict[str, Any], caption: str = "") -> None:
        """Write a photo (JPEG bytes), its record and its caption. ``record``: see ``bolid.scrape``; plain JSON."""
        folder = self._folder(person)
        stem = record["sha256"][:16]
        if caption:
            _write(folder / f"{stem}.txt", caption.encode() + b"\n")
        _write(folder / f"{stem}.json", json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
        _write(folder / f"{stem}.jpg", image)
        self._kept(person, source, record, len(image))

    def _kept(self, person: str, source: str, record: dict[str, Any], size: int) -> None:
        text = [str(record.get(name, "")) for name in ("sha256", "phash", "license", "consent")]
        row = (source, person, *text, size)
        self._db.execute("INSERT OR REPLACE INTO photos VALUES (?, ?, 'kept', '', '', 1, ?, ?, ?, ?, ?)", row)

    def drop(self, person: str, source: str, kind: str, reason: str, setting: str = "", final: bool = True) -> None:
        """Note that a source is left out; unless ``final``, the next run tries it again."""
        self._db.execute(
            "INSERT OR REPLACE INTO photos VALUES (?, ?, ?, ?, ?, ?, '', '', '', '', 0)",
            (source, person, kind, reason, setting, final),
        )

    def kept(self, person: str | None = None) -> list[tuple[str, str, Path]]:
        """(person, source, path of the photo) of all kept photos, or of one person's."""
        where, values = ("AND person = ?", (person,)) if person is not None else ("", ())
        rows = self._db.execute(
            f"SELECT person, source, sha256 FROM photos WHERE kind = 'kept' {where} ORDER BY person, sha256", values
        )
        return [(who, source, self.path / who / f"{sha256[:16]}.jpg") for who, source, sha256 in rows]

    def take_back(self, person: str, source: str, reason: str, setting: str, twins: bool = True) -> None:
        """Drop a photo that was kept. With ``twins``, its duplicates are judged again by the next run."""
        row = self._db.execute("SELECT sha256 FROM photos WHERE source = ?", (source,)).fetchone()
        self.drop(person, source, FILTERED, reason, setting)
        self._remove_files(self.path / person, row[0][:16])
        with contextlib.suppress(OSError):  # others are still in it
            (self.path / person).rmdir()
        if twins:
            query = "DELETE FROM photos WHERE person = ? AND reason IN (?, ?)"
            self._db.execute(query, (person, SAME_FILE, NEAR_DUPLICATE))

    def supersede(self, path: str) -> None:
        """Delete verdicts on earlier versions of a file: sources that begin with its path and a question mark."""
        query = "DELETE FROM photos WHERE kind <> 'kept' AND source >= ? AND source < ?"
        self._db.execute(query, (f"{path}?", f"{path}@"))  # "@" is the next letter

    def reopen(self, settings: Iterable[str]) -> None:
        """Delete verdicts that may differ now: those that depend on other settings, and failures that are not final."""
        self._db.execute("DELETE FROM photos WHERE NOT final")
        settings = list(settings)
        marks = ",".join("?" * len(settings))
        self._db.execute(f"DELETE FROM photos WHERE setting <> '' AND setting NOT IN ({marks})", settings)

    def counts(self) -> dict[str, dict[str, int]]:
        """kind -> reason -> photos."""
        found: dict[str, dict[str, int]] = {KEPT: {}, FILTERED: {}, FAILED: {}}
        query = "SELECT kind, reason, count(*) FROM photos GROUP BY kind, reason ORDER BY count(*) DESC, reason"
        for kind, reason, number in self._db.execute(query):
            found[kind][reason] = number
        return found

    def unsettled(self, person: str) -> bool:
        """Whether a photo of the person is to be tried again."""
        return self._db.execute("SELECT 1 FROM photos WHERE person = ? AND NOT final", (person,)).fetchone() is not None

    def note(self, name: str, value: str | None = None) -> str:
        """Remember a word under ``name`` (unless None); returns what was remembered before."""
        row = self._db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        if value is not None:
            self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))
        return row[0] if row else ""

    def write_tables(self) -> None:
        """people.csv and dropped.csv."""
        people = self._db.execute(
            "SELECT folder, name, count(*), page, group_concat(DISTINCT license), group_concat(DISTINCT consent)"
            " FROM people JOIN photos ON person = folder AND kind = 'kept' GROUP BY folder ORDER BY folder"
        )
        _write_csv(self.path / PEOPLE, ("person", "name", "photos", "page", "license", "consent"), people)
        dropped = self._db.execute(
            "SELECT person, source, reason FROM photos WHERE kind <> 'kept' ORDER BY person, source"
        )
        rows = ((who, source if "://" in source else source.rpartition("?")[0], why) for who, source, why in dropped)
        _write_csv(self.path / DROPPED, ("person", "source", "reason"), rows)

    # -------------------------------------------------------------------------------------------------- pages

    def page(self, key: str) -> tuple[str, int, dict[str, list[str]], bytes] | None:
        """(url, status, headers, body) of a web page that was fetched less than PAGES_FRESH seconds ago."""
        query = "SELECT url, status, headers, body FROM pages WHERE key = ? AND time > ?"
        row = self._db.execute(query, (key, time.time() - PAGES_FRESH)).fetchone()
        try:
            return None if row is None else (row[0], row[1], parse_json(row[2]), row[3])
        except (ValueError, TypeError):  # damaged: it is fetched again
            return None

    def add_page(self, key: str, url: str, status: int, headers: dict[str, list[str]], body: bytes) -> None:
        """Remember a web page."""
        row = (key, url, status, json.dumps(headers), body, time.time())
        self._db.execute("INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?)", row)

    # ------------------------------------------------------------------------------------------------ on disk

    def _folder(self, person: str) -> Path:
        """The person's folder, created if missing. Raises BolidError for a link."""
        folder = self.path / person
        if folder.is_symlink() or folder.parent != self.path:
            raise BolidError(
                f"{folder} is a link that leads out of {self.path}", "remove the link, or choose another --out"
            )
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def _remove_folder(self, person: str) -> None:
        folder = self.path / person
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            with disk_errors(folder):
                shutil.rmtree(folder)

    def _reconcile(self) -> None:
        """Make files and database agree: after a kill, after photos were removed by hand, and without the database."""
        self._db.execute("DELETE FROM pages WHERE time <= ?", (time.time() - PAGES_FRESH,))
        for path in self.path.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink()
        crashed = bool(self.note("open"))
        on_disk: set[tuple[str, str]] = set()
        for folder in self.path.iterdir():
            if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
                on_disk |= {(folder.name, stem) for stem in self._reconcile_folder(folder, crashed)}
        for person, source, path in self.kept():
            if (person, path.stem) not in on_disk:
                self.drop(person, source, FILTERED, REMOVED)

    def _reconcile_folder(self, folder: Path, crashed: bool) -> set[str]:
        """Make one person's files and rows agree; returns the photos that are there. `crashed`: after a power cut."""
        query = "SELECT substr(sha256, 1, 16), source, stored FROM photos WHERE person = ? AND kind = 'kept'"
        known = {stem: (source, size) for stem, source, size in self._db.execute(query, (folder.name,))}
        on_disk: set[str] = set()
        names = set(os.listdir(folder))
        for name in names:
            if re.fullmatch(r"\.[0-9a-f]{16}\.\d+\.tmp\.\w+", name):
                (folder / name).unlink()
                continue
            stem, _, suffix = name.partition(".")
            if suffix != "json" or not re.fullmatch(r"[0-9a-f]{16}", stem):
                continue
            photo = folder / f"{stem}.jpg"
            if photo.name in names and stem in known:
                source, size = known[stem]
                if crashed and photo.stat().st_size < size:
                    self._db.execute("DELETE FROM photos WHERE source = ?", (source,))
                    self._remove_files(folder, stem)
                on_disk.add(stem)
            elif (record := _read_record(folder / name, stem)) is None:
                if crashed and (folder / name).stat().st_size == 0:
                    self._remove_files(folder, stem)
            elif photo.name in names and not (crashed and _is_truncated(photo, record)):
                self._adopt(folder.name, record, photo.stat().st_size)
                on_disk.add(stem)
            else:  # killed before the photo was written, or the photo was removed by hand
                self._remove_files(folder, stem)
        return on_disk

    @staticmethod
    def _remove_files(folder: Path, stem: str) -> None:
        for suffix in (".jpg", ".txt", ".json"):
            (folder / f"{stem}{suffix}").unlink(missing_ok=True)

    def _adopt(self, person: str, record: dict[str, Any], size: int) -> None:
        name = str(record.get("person", person))
        self._db.execute("INSERT OR IGNORE INTO people VALUES (?, ?, '')", (person, name))
        file, url = record.get("file"), record.get("url")
        self._kept(person, f"{file}?{record['sha256']}" if file or not url else str(url), record, size)


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, as far as a kill goes; a power cut may truncate it."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with disk_errors(path):
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _is_truncated(photo: Path, record: dict[str, Any]) -> bool:
    """Whether a power cut has cut this photo: it has the original's bytes, and is neither as long nor the same."""
    if record["format"] != "JPEG" or photo.stat().st_size >= record["bytes"]:
        return False
    return hashlib.sha256(photo.read_bytes()).hexdigest()[:16] != photo.stem


def _read_record(path: Path, stem: str) -> dict[str, Any] | None:
    """A record of ours, or None for other JSON."""
    try:
        record: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        ours = record["sha256"].startswith(stem) and int(record["phash"], 16) >= 0 and record["bytes"] > 0
        return record if ours and isinstance(record["format"], str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_notes(photo: Path, names: Iterable[str]) -> dict[str, str]:
    """The texts called `names` in the .json record beside a photo, as far as there are such."""
    try:
        notes = parse_json(read_file(photo.with_suffix(".json")))
        return {name: notes[name] for name in names if isinstance(notes.get(name), str)}
    except (BolidError, ValueError, AttributeError):
        return {}


def _digest(text: str) -> str:
    return hashlib.sha256(same_name(text).encode()).hexdigest()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _write_csv(path: Path, headers: Iterable[str], rows: Iterator[tuple[Any, ...]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_atomic(path, buffer.getvalue())
