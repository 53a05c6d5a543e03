"""The photo folder that a run of `scrape` fills: which people and photos are wanted, kept or dropped, and why."""

from __future__ import annotations

import asyncio
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.images import decode_image, encode_jpeg
from bolid.formats.photos import FAILED, FILTERED, KEPT, PhotoFolder, same_name
from bolid.run import Progress
from bolid.scrape.check import MAX_PHASH_DISTANCE, Filters, PhotoChecker, PhotoQuality
from bolid.scrape.rules import PRIVATE, ROBOTS

UNKNOWN = "unknown"


@dataclass(frozen=True)
class ScrapeResult:
    """What is in the folder after the run, and what is not."""

    out: Path
    people: int
    photos: int
    new: int  # photos kept in this run
    dropped: dict[str, int]  # reason -> photos that were filtered out
    failed: dict[str, int]  # reason -> photos (and pages) that could not be fetched or read
    people_dropped: dict[str, int]  # reason -> people
    warnings: list[str] = field(default_factory=list)


class TooManyFailed(BolidError):
    """More photos failed than ``max_bad`` allows, or none could be kept. ``result``: what there is."""

    def __init__(self, message: str, hint: str, result: ScrapeResult) -> None:
        super().__init__(message, hint)
        self.result = result


class Collection:
    """The photo folder during one run: decides about every photo and records it. It is the `Sink` of a crawl."""

    def __init__(
        self,
        photos: PhotoFolder,
        filters: Filters,
        check: PhotoChecker,
        marks: dict[str, str],
        names: Sequence[str],
        max_people: int | None,
        progress: Progress | None,
    ) -> None:
        self.marks, self.total = marks, 0
        self._photos, self._filters, self.check = photos, filters, check
        self._wanted = {same_name(name): name for name in names}
        self._found: set[str] = set()  # names of people that the run came across
        self._max_people, self._progress = max_people, progress
        self._people: dict[tuple[str, str], str | None] = {}  # (name, page) of this run -> folder, or None: not wanted
        self._names: dict[str, str] = {}  # folder -> name, of the people of this run
        self._people_dropped: dict[str, int] = {}
        self._lost: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._incomplete: set[str] = set()  # people of whom a page is missing
        self._new = self._done = 0
        self._turn = asyncio.Lock()

    def begin(self, from_web: bool) -> None:
        """Reopen verdicts of filters that have changed, and check the photos that are there again."""
        # In a folder of one's own also people who had too few photos so far: reading again costs no server anything.
        free = [] if from_web else [self._filters.setting("min_photos")]
        self._photos.reopen(setting for setting in self._filters.settings() if setting not in free)
        names = ("min_size", "min_sharpness", "one_person", "photographs", "watermark")
        looks = [self._filters.setting(name) for name in names]
        judged_by = json.dumps(looks)
        before = self._photos.note("looks")
        if before and before != judged_by:
            kept = self._photos.kept()
            for number, (person, source, path) in enumerate(kept):
                self._say(number, len(kept), "checking the photos that are there")
                measured = self.check(path.read_bytes())
                if measured.reason:
                    self._photos.take_back(person, source, measured.reason, measured.setting)
        self._photos.note("looks", judged_by)

    # -- the Sink of a crawl

    def person(self, name: str, page: str = "", count: int | None = None) -> str | None:
        """The folder of the person called `name`; None where nobody more is wanted."""
        if (name, page) not in self._people:
            self._people[name, page] = self._accept(name, page, count)
        return self._people[name, page]

    def _accept(self, name: str, page: str, count: int | None) -> str | None:
        if not self.asks_for(name):
            return None
        reason = ""
        if self._photos.is_forgotten(name, page):
            reason = "forgotten on request (--forget)"
        elif count is not None and count < self._filters.min_photos:
            reason = f"fewer than --min-photos {self._filters.min_photos} photos on the site"
        elif self.full(""):
            reason = f"more than --max-people {self._max_people}"
        if reason:
            self._people_dropped[reason] = self._people_dropped.get(reason, 0) + 1
            return None
        if count is not None:
            self.total += min(count, self._filters.max_photos or count)
        folder = self._photos.person(name, page)
        self._names[folder] = name
        return folder

    def asks_for(self, name: str) -> bool:
        """Whether a person of this name is wanted."""
        if not self._wanted:
            return True
        # Links often say how many photos there are: "Anna Ivanova (312)".
        names = {same_name(name), re.sub(r"\s*[(\[]?\d+[)\]]?$", "", same_name(name))}
        if len(self._found) < 100_000:
            self._found |= names
        return not names.isdisjoint(self._wanted)

    def wants(self, person: str, source: str) -> bool:
        """Whether the photo from `source` still has to be fetched."""
        if self._photos.knows(source):
            self._count(person)
            return False
        return True

    def supersede(self, path: str) -> None:
        """A file has changed: its earlier verdicts do not count."""
        self._photos.supersede(path)

    def full(self, person: str) -> bool:
        """Whether the person, or with no name the collection, has all the photos it may have."""
        if not person:
            return self._max_people is not None and len(self._names) >= self._max_people
        return self._filters.max_photos is not None and self._photos.count(person) >= self._filters.max_photos

    async def take(self, person: str, source: str, page: str, data: bytes, final: str, caption: str) -> None:
        """Check a photo that was fetched, and store or drop it. `final`: the address that redirects led to."""
        try:
            measured = await asyncio.to_thread(self.check, data)
        except BolidError as error:
            self.drop(person, source, error.message.partition(":")[0])
            return
        async with self._turn:
            origin = {"url": source, "final_url": final if final != source else "", "page": page}
            await asyncio.to_thread(self.settle, person, origin, source, data, measured, caption)

    def drop(self, person: str, source: str, reason: str, *, refused: bool = False, final: bool = True) -> None:
        """Record that a photo was not kept: `refused` by a rule, or failed."""
        kind = FILTERED if refused else FAILED
        rule = {ROBOTS: "robots", PRIVATE: "public_only"}.get(reason) if refused else None
        setting = self._filters.setting(rule) if rule else ""
        self._photos.drop(person, source, kind, reason, setting, final)
        self._count(person)

    def lost(self, reason: str, person: str, *, refused: bool = False) -> None:
        """Record a page that could not be read, so photos of `person` may be missing."""
        self._incomplete.add(person)
        where = self._refused if refused else self._lost
        reason = f"page: {reason}"
        where[reason] = where.get(reason, 0) + 1

    def cached_page(self, key: str) -> tuple[str, int, dict[str, list[str]], bytes] | None:
        """A page of the last week: (URL, status, headers, body), or None."""
        return self._photos.page(key)

    def cache_page(self, key: str, url: str, status: int, headers: dict[str, list[str]], body: bytes) -> None:
        """Keep a page for a week."""
        self._photos.add_page(key, url, status, headers, body)

    def say(self, text: str) -> None:
        """Report progress."""
        self._say(self._done, self.total, text)

    # -- deciding

    def settle(
        self, person: str, origin: dict[str, str], source: str, data: bytes, measured: PhotoQuality, caption: str = ""
    ) -> None:
        """Keep or drop a photo that was measured. One at a time, since a duplicate depends on the other photos."""
        reason, setting = measured.reason, measured.setting
        if not reason and self._photos.resume(person, source, origin.get("file", ""), measured.sha256):
            self._count(person)
            return
        if not reason:
            reason = self._photos.twin(person, measured.sha256, measured.phash, MAX_PHASH_DISTANCE)
        if not reason and self.full(person):
            reason, setting = f"more than --max-photos {self._filters.max_photos}", self._filters.setting("max_photos")
        if reason:
            self._photos.drop(person, source, FILTERED, reason, setting)
        else:
            image = data if measured.format in ("JPEG", "MPO") else encode_jpeg(decode_image(data))
            record: dict[str, Any] = {
                "person": self._names.get(person, person),
                **{key: value for key, value in origin.items() if value},
                "sha256": measured.sha256,
                "bytes": measured.bytes,
                "format": measured.format,
                "width": measured.width,
                "height": measured.height,
                "sharpness": measured.sharpness,
                "phash": f"{measured.phash:064x}",
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **self.marks,
            }
            for name in ("license", "consent"):  # the record of an earlier collection is better than "unknown"
                if record[name] == UNKNOWN and origin.get(name):
                    record[name] = origin[name]
            self._photos.keep(person, source, image, record, caption)
            self._new += 1
        self._count(person)

    def _count(self, person: str) -> None:
        self._done += 1
        self._say(self._done, self.total, person)

    def _say(self, done: int, total: int, text: str) -> None:
        if self._progress:
            self._progress(done, total, text)

    # -- at the end

    def finish(self) -> ScrapeResult:
        """Leave out people with too few photos, write the tables, count."""
        few = f"person with fewer than --min-photos {self._filters.min_photos} photos"
        people = 0
        for folder, _ in self._photos.people():
            kept = self._photos.count(folder)
            incomplete = folder in self._incomplete or self._photos.unsettled(folder)
            if kept < self._filters.min_photos and not incomplete:
                for person, source, _ in self._photos.kept(folder):
                    self._photos.take_back(person, source, few, self._filters.setting("min_photos"), twins=False)
                kept = 0
            people += kept > 0
        self._photos.write_tables()
        counts = self._photos.counts()
        return ScrapeResult(
            out=self._photos.path,
            people=people,
            photos=sum(counts[KEPT].values()),
            new=self._new,
            dropped={**counts[FILTERED], **self._refused},
            failed={**counts[FAILED], **self._lost},
            people_dropped=self._people_dropped,
        )

    def not_found(self) -> tuple[str, str] | None:
        """(who of --person was not found, similar names), if anybody is missing."""
        missing = sorted(self._wanted[name] for name in set(self._wanted) - self._found)
        if not missing:
            return None
        near = sorted({match for name in missing for match in difflib.get_close_matches(same_name(name), self._found)})
        return f"found no {' and no '.join(missing)}", f"perhaps you mean {', '.join(near)}" if near else ""
