"""``bolid scrape``: photos of people from a folder, a list of addresses or a gallery, cleaned. Twin of the command.

Whatever it comes from, a photo is looked at once (is it a picture? how large, how sharp, how many people?) and then
either kept, with a record beside it, or dropped, with a reason. Photos are kept one at a time and each at once, so the
same call after a kill goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import csv
import difflib
import hashlib
import json
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import bolid
from bolid.errors import BolidError
from bolid.formats.images import PHOTO_SUFFIXES, decode_image, encode_jpeg, glance, list_photos
from bolid.formats.photos import FAILED, FILTERED, KEPT, PhotoFolder, same_name
from bolid.formats.sites import read_site
from bolid.models.families import get_family
from bolid.run import Progress

# Two photos whose perceptual hashes (signs of a 16x16 DCT) differ in no more of 256 bits are the same photo. Of 40
# rendered people with 8 photos each, two photos of a person differed in 66 bits and more, a copy at 3/4 of the size and
# JPEG quality 50 in 12 at most. Their sharpness was 102 and more, and 19.5 at most when blurred by 1 % of the width.
HASH_SIDE = 16
DUPLICATE_BITS = 24
LOOK_SIDE = 512  # pixels: sharpness is measured on a copy of this size, so that it does not depend on the camera's
POSE_SIDE = 1536  # pixels: what `extract` shows the pose model
MIN_PHOTOS_OF_A_SITE = 100  # the paper's
UNKNOWN = "unknown"
DOCS = "docs/guides/collecting.md says what consent and copyright ask for"

Watermark = Callable[[np.ndarray], str]


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


@dataclass(frozen=True)
class _Filters:
    """What a photo has to be. Each has a name, its *setting*, under which its verdicts are remembered."""

    min_size: int
    min_sharpness: float
    one_person: str  # the family whose pose model looks; "" for off
    watermark: str  # the checker's name; "" for off
    min_photos: int
    max_photos: int | None
    robots: bool

    def settings(self) -> list[str]:
        return [f"{name}={value}" for name, value in vars(self).items()]

    def setting(self, name: str) -> str:
        return f"{name}={getattr(self, name)}"


@dataclass(frozen=True)
class _Look:
    """What a photo shows."""

    sha256: str  # of the original
    bytes: int  # of the original
    format: str  # Pillow's name of it
    width: int
    height: int
    sharpness: float
    phash: int
    reason: str = ""  # why it is dropped; with the setting that it hangs on
    setting: str = ""


def scrape(
    folder: str | os.PathLike[str] | None = None,
    *,
    urls: str | os.PathLike[str] | None = None,
    site: str | None = None,
    person: Sequence[str] | None = None,
    out: str | os.PathLike[str] = "photos",
    min_size: int = 1000,
    min_photos: int | None = None,
    max_photos: int | None = None,
    max_people: int | None = None,
    min_sharpness: float = 20.0,
    one_person: bool = False,
    watermark: Watermark | None = None,
    license: str | None = None,
    consent: str = UNKNOWN,
    contact: str | None = None,
    connections: int = 1,
    delay: float = 1.0,
    ignore_robots: bool = False,
    max_bad: float = 0.05,
    family: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> ScrapeResult:
    """Collect photos into ``out/<person>/<sha16>.jpg``, each with a ``.json`` record, and ``people.csv``.

    One of: ``folder``, of ``<person>/*.jpg`` or of one person's photos; ``urls``, a .txt, .csv or .parquet file of
    (person, url); ``site``, the name of one that comes along or a TOML file. ``person``: only people of these names.
    A JPEG keeps its bytes; other pictures are written as JPEG.

    ``min_size``: pixels of the shorter side. ``min_photos``: people with fewer are left out; by default 100 from a site
    and 1 otherwise. ``min_sharpness``: variance of the Laplacian (Pech-Pacheco et al. 2000) at 512 pixels; 0 is off.
    ``one_person``: the family's pose model must see one person, and enough of them. ``watermark``: any function of a
    picture, uint8 [H, W, 3], that returns why it is to be dropped, or ""; BoLID has none of its own.
    ``contact``: a mail or web address, told to every web server. ``connections``, ``delay``: at once to one host; least
    seconds between two requests to it. ``ignore_robots`` is written into every record.

    Raises TooManyFailed, a BolidError, when no photo could be kept, or when more than ``max_bad`` of all photos and
    more than one could not be fetched or read; what was kept stays.
    """
    ways = [way for way in (folder, urls, site) if way is not None]
    if len(ways) != 1:
        raise BolidError(
            "nothing to collect from" if not ways else "more than one thing to collect from",
            "give a FOLDER of your own photos, or --urls LIST, or --site NAME",
        )
    _check(min_size=min_size, min_photos=min_photos, max_photos=max_photos, max_people=max_people)
    if connections < 1 or delay < 0:
        wrong = f"--connections is {connections}" if connections < 1 else f"--delay is {delay:g}"
        raise BolidError(wrong, "give at least 1" if connections < 1 else "give seconds, 0 or more")
    described = None if site is None else read_site(site)
    if folder is None and not (contact or "").strip():
        raise BolidError(
            "a web server should know whom to write to",
            "give --contact with your mail address or web page (or set BOLID_CONTACT); it goes into the User-Agent",
        )
    contact = " ".join((contact or "").split())
    if folder is not None and Path(folder).resolve() == Path(out).resolve():
        raise BolidError(f"{folder} is both read and written", "choose another --out for the cleaned photos")
    filters = _Filters(
        min_size=min_size,
        min_sharpness=min_sharpness,
        one_person=get_family(family).name if one_person else "",
        watermark=getattr(watermark, "__name__", "on") if watermark else "",
        min_photos=min_photos if min_photos is not None else MIN_PHOTOS_OF_A_SITE if site else 1,
        max_photos=max_photos,
        robots=not ignore_robots,
    )
    if license is None:
        license = described.license if described else UNKNOWN
    marks = {"license": license, "consent": consent, "collected_with": f"bolid {bolid.__version__}"}
    if ignore_robots and folder is None:
        marks["ignored_robots"] = "yes"
    # Both refuse what cannot be read before `out` is made.
    listed = list_photos(folder) if folder is not None else []
    addresses = _Addresses(Path(urls)) if urls is not None else None
    looker = _Looker(filters, watermark, family, device)
    with PhotoFolder(out) as photos:
        keeper = _Keeper(photos, filters, looker, marks, person or (), max_people, progress)
        keeper.begin(from_web=folder is None)
        if folder is not None:
            _import(Path(folder), listed, keeper)
        else:
            from bolid.scrape.crawl import Manners, crawl_site, crawl_urls

            manners = Manners(contact, connections, delay, not ignore_robots, bolid.__version__)
            if addresses is not None:
                keeper.total = len(addresses)
                crawl_urls(addresses, keeper, manners)
            elif described is not None:
                crawl_site(described, keeper, manners)
        result = keeper.finish()
    if folder is not None:
        result.warnings.extend(_not_looked_at(Path(folder)))
    return _judge(result, keeper, max_bad)


def _check(**limits: int | None) -> None:
    for name, value in limits.items():
        if value is not None and value < 1:
            raise BolidError(f"--{name.replace('_', '-')} is {value}", "give at least 1")


def _judge(result: ScrapeResult, keeper: _Keeper, max_bad: float) -> ScrapeResult:
    absent = keeper.not_found()
    if result.photos == 0:
        reasons = {**result.people_dropped, **result.failed, **result.dropped}
        told = ", ".join(f"{reason}: {number}" for reason, number in reasons.items()) or "none were found"
        hint = "give other photos"
        if any("robots.txt" in reason or "reserved" in reason for reason in reasons):
            hint = "the owner does not want it; ask them"
        elif absent:
            told, hint = absent[0], absent[1] or "check how the name is written"
        elif any(reason.startswith("smaller than") for reason in reasons):
            hint = "take larger photos, or lower --min-size"
        elif any("--min-photos" in reason for reason in reasons):
            hint = "lower --min-photos"
        elif result.failed:
            hint = "check the addresses and the site's description; the same command tries again"
        raise TooManyFailed(f"no photos could be kept ({told})", hint, result)
    bad = sum(result.failed.values())
    total = bad + result.photos + sum(result.dropped.values())
    if bad > 1 and bad > max_bad * total:
        raise TooManyFailed(
            f"{bad} of {total} photos could not be fetched or read, more than --max-bad {max_bad:g} allows",
            f"{result.out} is complete without them (reasons in dropped.csv); the same command tries again what may "
            f"work later, or repeat it with --max-bad {bad / total + 0.005:.2f}",
            result,
        )
    if absent:
        result.warnings.append(f"{absent[0]}{': ' + absent[1] if absent[1] else ''}")
    if keeper.marks["license"] == UNKNOWN or keeper.marks["consent"] == UNKNOWN:
        result.warnings.append(f"license or consent is recorded as unknown: say them (--license, --consent); {DOCS}")
    return result


# ------------------------------------------------------------------------------------------------ looking at a photo


class _Looker:
    """What one photo is worth. Called from several threads."""

    def __init__(self, filters: _Filters, watermark: Watermark | None, family: str | None, device: str) -> None:
        self._filters, self._watermark = filters, watermark
        self._pose: Any = None
        self._one_at_a_time = threading.Lock()
        if filters.one_person:
            from bolid.backends.pose import PoseModel
            from bolid.run import pick_device

            self._pose = PoseModel(get_family(family).require("pose"), pick_device(device))

    def __call__(self, data: bytes) -> _Look:
        """Raises BolidError for what is not a whole picture."""
        import cv2
        import imagehash
        from PIL import Image

        grey, (width, height), kind = glance(data, LOOK_SIDE, name="the file")
        sharpness = float(cv2.Laplacian(np.asarray(grey), cv2.CV_16S).var())
        rough = grey.resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.BOX)  # the size that phash works at
        bits = imagehash.phash(rough, hash_size=HASH_SIDE).hash
        phash = int.from_bytes(np.packbits(bits).tobytes(), "big")
        reason, setting = self._reason(data, width, height, sharpness)
        sha256 = hashlib.sha256(data).hexdigest()
        return _Look(sha256, len(data), kind, width, height, round(sharpness, 1), phash, reason, setting)

    def _reason(self, data: bytes, width: int, height: int, sharpness: float) -> tuple[str, str]:
        """(why the photo is dropped, the setting that this hangs on); ("", "") for one that is good."""
        filters = self._filters
        if min(width, height) < filters.min_size:
            return f"smaller than --min-size {filters.min_size}", filters.setting("min_size")
        if sharpness < filters.min_sharpness:
            return f"blurred (--min-sharpness {filters.min_sharpness:g})", filters.setting("min_sharpness")
        if self._pose is None and self._watermark is None:
            return "", ""
        image = decode_image(data, name="the file", max_side=POSE_SIDE)
        if self._pose is not None:
            from bolid.views import choose_person

            with self._one_at_a_time:
                choice = choose_person(self._pose.detect([image])[0], "only")
            if isinstance(choice, str):
                return choice.replace("--select-person only", "--one-person"), filters.setting("one_person")
        if self._watermark is not None and (mark := self._watermark(image)):
            return f"watermark: {mark}", filters.setting("watermark")
        return "", ""


class _Keeper:
    """Decides about every photo and writes it down. It is the `Sink` of a crawl (see `bolid.scrape.crawl`)."""

    def __init__(
        self,
        photos: PhotoFolder,
        filters: _Filters,
        look: _Looker,
        marks: dict[str, str],
        names: Sequence[str],
        max_people: int | None,
        progress: Progress | None,
    ) -> None:
        self.marks, self.total = marks, 0
        self._photos, self._filters, self.look = photos, filters, look
        self._wanted = {same_name(name): name for name in names}
        self._seen: set[str] = set()  # of the wanted names; while some are missing, of all
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
        """Open again what other filters may decide otherwise, and look again at what is there if they have changed."""
        # Of one's own folder, where reading costs nobody anything, also people who had too few photos so far.
        free = [] if from_web else [self._filters.setting("min_photos")]
        self._photos.reopen(setting for setting in self._filters.settings() if setting not in free)
        looks = [self._filters.setting(n) for n in ("min_size", "min_sharpness", "one_person", "watermark")]
        judged_by = json.dumps(looks)
        before = self._photos.note("looks")
        if before and before != judged_by:
            kept = self._photos.kept()
            for number, (person, source, path) in enumerate(kept):
                self._say(number, len(kept), "looking again at what is there")
                look = self.look(path.read_bytes())
                if look.reason:
                    self._photos.take_back(person, source, look.reason, look.setting)
        self._photos.note("looks", judged_by)

    # -- what a crawl asks

    def person(self, name: str, page: str = "", count: int | None = None) -> str | None:
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
        if not self._wanted:
            return True
        # Links often say how many photos there are: "Anna Ivanova (312)".
        names = {same_name(name), re.sub(r"\s*[(\[]?\d+[)\]]?$", "", same_name(name))}
        if len(self._seen) < 100_000:
            self._seen |= names
        return not names.isdisjoint(self._wanted)

    def wants(self, person: str, source: str) -> bool:
        if self._photos.knows(source):
            self._count(person)
            return False
        return True

    def supersede(self, path: Path) -> None:
        """A file has changed: what was decided of it before does not count."""
        self._photos.supersede(str(path))

    def full(self, person: str) -> bool:
        if not person:
            return self._max_people is not None and len(self._names) >= self._max_people
        return self._filters.max_photos is not None and self._photos.count(person) >= self._filters.max_photos

    async def take(self, person: str, source: str, page: str, data: bytes) -> None:
        try:
            look = await asyncio.to_thread(self.look, data)
        except BolidError as error:
            self.drop(person, source, error.message.partition(":")[0])
            return
        async with self._turn:
            await asyncio.to_thread(self.settle, person, {"url": source, "page": page}, source, data, look)

    def drop(self, person: str, source: str, reason: str, *, refused: bool = False, final: bool = True) -> None:
        kind = FILTERED if refused else FAILED
        setting = self._filters.setting("robots") if refused and "robots.txt" in reason else ""
        self._photos.drop(person, source, kind, reason, setting, final)
        self._count(person)

    def lost(self, reason: str, person: str, *, refused: bool = False) -> None:
        self._incomplete.add(person)
        where = self._refused if refused else self._lost
        reason = f"page: {reason}"
        where[reason] = where.get(reason, 0) + 1

    def cached_page(self, key: str) -> tuple[str, int, dict[str, list[str]], bytes] | None:
        return self._photos.page(key)

    def cache_page(self, key: str, url: str, status: int, headers: dict[str, list[str]], body: bytes) -> None:
        self._photos.add_page(key, url, status, headers, body)

    def say(self, text: str) -> None:
        self._say(self._done, self.total, text)

    # -- deciding

    def settle(
        self, person: str, origin: dict[str, str], source: str, data: bytes, look: _Look, caption: str = ""
    ) -> None:
        """Keep a photo that was looked at, or drop it. One at a time: whether it is a duplicate hangs on the others."""
        reason, setting = look.reason, look.setting
        if not reason:
            reason = self._photos.twin(person, look.sha256, look.phash, DUPLICATE_BITS)
        if not reason and self.full(person):
            reason, setting = f"more than --max-photos {self._filters.max_photos}", self._filters.setting("max_photos")
        if reason:
            self._photos.drop(person, source, FILTERED, reason, setting)
        else:
            image = data if look.format in ("JPEG", "MPO") else encode_jpeg(decode_image(data))
            record: dict[str, Any] = {
                "person": self._names.get(person, person),
                **{key: value for key, value in origin.items() if value},
                "sha256": look.sha256,
                "bytes": look.bytes,
                "format": look.format,
                "width": look.width,
                "height": look.height,
                "sharpness": look.sharpness,
                "phash": f"{look.phash:064x}",
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **self.marks,
            }
            for name in ("license", "consent"):  # what an earlier collection knew is better than "unknown"
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
        """(who of --person was not found, whose names come near), if anybody."""
        missing = sorted(self._wanted[name] for name in set(self._wanted) - self._seen)
        if not missing:
            return None
        near = sorted({match for name in missing for match in difflib.get_close_matches(same_name(name), self._seen)})
        return f"found no {' and no '.join(missing)}", f"perhaps you mean {', '.join(near)}" if near else ""


# ----------------------------------------------------------------------------------------------- one's own folder


def _import(folder: Path, listed: list[tuple[str, Path]], keeper: _Keeper) -> None:
    """Photos of a folder, in its order; looked at by two threads, as decoding is most of the work."""
    keeper.total = len(listed)
    waiting: deque[tuple[str, Path, str, Future[tuple[bytes, _Look]]]] = deque()

    def settle() -> None:
        person, path, source, future = waiting.popleft()
        origin = {"file": path.relative_to(folder).as_posix(), **_earlier(path)}
        try:
            data, look = future.result()
        except BolidError as error:
            keeper.drop(person, source, error.message.partition(":")[0])
            return
        keeper.settle(person, origin, source, data, look, _caption(path))

    def read(path: Path) -> tuple[bytes, _Look]:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BolidError(f"the file cannot be read ({error.strerror})") from error
        return data, keeper.look(data)

    with ThreadPoolExecutor(2) as pool:
        for name, path in listed:
            person = keeper.person(name)
            if person is None:
                continue
            status = path.stat()
            source = f"{path.absolute()}?{status.st_size}-{status.st_mtime_ns}"  # changed, it is another photo
            if keeper.full(person) or not keeper.wants(person, source):
                continue
            keeper.supersede(path.absolute())
            waiting.append((person, path, source, pool.submit(read, path)))
            if len(waiting) > 4:
                settle()
        while waiting:
            settle()


def _not_looked_at(folder: Path) -> list[str]:
    """What lies in a folder of photos and may be meant, but is not read."""
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
        warnings.append(
            f"files of other kinds were not looked at ({listed}); save them as JPEG or PNG if they are photos"
        )
    if deeper:
        listed = ", ".join(sorted(deeper)[:3]) + (", ..." if len(deeper) > 3 else "")
        warnings.append(f"deeper folders were not looked at ({listed}): only <person>/ is")
    return warnings


def _earlier(path: Path) -> dict[str, str]:
    """What an earlier collection wrote of a photo's origin beside it."""
    try:
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        names = ("url", "page", "license", "consent")
        return {name: notes[name] for name in names if isinstance(notes.get(name), str)}
    except (OSError, ValueError, AttributeError):
        return {}


def _caption(path: Path) -> str:
    from bolid.backends.caption import caption_for

    return caption_for(path)


# ------------------------------------------------------------------------------------------------- lists of addresses


class _Addresses:
    """(person, url) of a .txt, .csv or .parquet file, read as they are asked for.

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
        self._length = sum(1 for _ in self)  # finds what is wrong with the file before anything is fetched
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
        except (polars.exceptions.PolarsError, OSError) as error:
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
