"""``bolid scrape``: photos of people from a folder, a list of addresses or a gallery, cleaned. Twin of the command.

Every photo is checked once and then either kept, with a record beside it, or dropped, with a reason. Each photo is
written at once, so the same call after a kill goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bolid
from bolid.errors import BolidError
from bolid.formats.images import list_photos, unread_files
from bolid.formats.photos import PhotoFolder
from bolid.formats.sites import Site, read_site
from bolid.models.families import DEFAULT_FAMILY, get_family
from bolid.rendered import REFUSED, REFUSED_HINT
from bolid.run import Progress
from bolid.scrape.check import Filters, PhotoChecker, Watermark
from bolid.scrape.collection import UNKNOWN, Collection, ScrapeResult, TooManyFailed
from bolid.scrape.inputs import AddressList, import_folder
from bolid.scrape.rules import RESERVED, ROBOTS, Manners

MIN_PHOTOS_OF_A_SITE = 100  # the paper's
DOCS = "docs/guides/collecting.md says what consent and copyright ask for"


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
    force: bool = False,
    watermark: Watermark | None = None,
    license: str | None = None,
    consent: str = UNKNOWN,
    contact: str | None = None,
    connections: int = 1,
    delay: float = 1.0,
    ignore_robots: bool = False,
    allow_private: bool = False,
    max_bad: float = 0.05,
    family: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> ScrapeResult:
    """Collect photos into ``out/<person>/<sha16>.jpg``, each with a ``.json`` record, and ``people.csv``.

    One of: ``folder``, of ``<person>/*.jpg`` or of one person's photos; ``urls``, a .txt, .csv, .tsv or .parquet file
    of (person, url, caption); ``site``, the name of one that comes along or a TOML file. ``person``: only people of
    these names.
    A JPEG keeps its bytes; other pictures are written as JPEG.

    ``min_size``: pixels of the shorter side. ``min_photos``: people with fewer are left out; by default 100 from a site
    and 1 otherwise. ``min_sharpness``: variance of the Laplacian (Pech-Pacheco et al. 2000) at 512 pixels; 0 is off.
    ``one_person``: the family's pose model must see one person, and enough of them; `tiny` sees none in photographs,
    and drops them unless ``force`` is given. ``watermark``: any function of a
    picture, uint8 [H, W, 3], that returns why it is to be dropped, or ""; BoLID has none of its own.
    ``contact``: a mail or web address, sent to every web server. ``connections``: requests to one host at a time.
    ``delay``: seconds between two requests to a host, at least. ``ignore_robots`` is written into every record.
    ``allow_private``: links and redirects may lead to private networks; addresses that you give yourself always may.

    Raises TooManyFailed, a BolidError, when no photo could be kept, or when more than ``max_bad`` of all photos and
    more than one could not be fetched or read; what was kept stays.
    """
    _check_inputs(folder, urls, site, out, contact)
    _check_limits(min_size=min_size, min_photos=min_photos, max_photos=max_photos, max_people=max_people)
    if connections < 1 or not 0 <= delay < float("inf"):
        wrong = f"--connections is {connections}" if connections < 1 else f"--delay is {delay:g}"
        raise BolidError(wrong, "give at least 1" if connections < 1 else "give seconds, 0 or more")
    described = None if site is None else read_site(site)
    filters = Filters(
        min_size=min_size,
        min_sharpness=min_sharpness,
        one_person=get_family(family).name if one_person else "",
        photographs=DEFAULT_FAMILY if one_person and not force and get_family(family).name == DEFAULT_FAMILY else "",
        watermark=getattr(watermark, "__name__", "on") if watermark else "",
        min_photos=min_photos if min_photos is not None else MIN_PHOTOS_OF_A_SITE if site else 1,
        max_photos=max_photos,
        robots=not ignore_robots,
        public_only=not allow_private,
    )
    if license is None:
        license = described.license if described else UNKNOWN
    marks = {"license": license, "consent": consent, "collected_with": f"bolid {bolid.__version__}"}
    if ignore_robots and folder is None:
        marks["ignored_robots"] = "yes"
    # Both refuse what cannot be read before `out` is made.
    listed = list_photos(folder) if folder is not None else []
    addresses = AddressList(Path(urls)) if urls is not None else None
    checker = PhotoChecker(filters, watermark, family, device)
    with PhotoFolder(out) as photos:
        collection = Collection(photos, filters, checker, marks, person or (), max_people, progress)
        collection.begin(from_web=folder is None)
        if folder is not None:
            beyond = import_folder(Path(folder), listed, collection)
        else:
            name = " ".join((contact or "").split())
            manners = Manners(name, connections, delay, not ignore_robots, bolid.__version__, allow_private)
            _crawl(addresses, described, collection, manners)
        result = collection.finish()
    if folder is not None:
        result.warnings.extend(_unread(Path(folder)))
        if beyond:
            result.warnings.append(f"{beyond} photos were not looked at: their people have --max-photos {max_photos}")
    if urls is not None and addresses is not None and addresses.unnamed:
        result.warnings.append(
            f"{urls} names no person for {addresses.unnamed} of its photos: they count as {Path(urls).stem}'s"
        )
    return _judge(result, collection, max_bad)


def _unread(folder: Path) -> list[str]:
    """Warnings about what lies in the folder and is not read."""
    warnings = []
    for reason, names in unread_files(folder).items():
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        warnings.append(f"not read: {len(names)} ({listed}): {reason}")
    return warnings


def _check_inputs(folder: Any, urls: Any, site: Any, out: Any, contact: str | None) -> None:
    """Raises BolidError unless there is exactly one input, somewhere else than ``out``, and a contact for the web."""
    ways = [way for way in (folder, urls, site) if way is not None]
    if len(ways) != 1:
        raise BolidError(
            "nothing to collect from" if not ways else "more than one thing to collect from",
            "give a FOLDER of your own photos, or --urls LIST, or --site NAME",
        )
    if folder is None and not (contact or "").strip():
        raise BolidError(
            "a web server should know whom to write to",
            "give --contact with your mail address or web page (or set BOLID_CONTACT); it goes into the User-Agent",
        )
    if folder is not None and Path(folder).resolve() == Path(out).resolve():
        raise BolidError(f"{folder} is both read and written", "choose another --out for the cleaned photos")


def _crawl(addresses: AddressList | None, site: Site | None, collection: Collection, manners: Manners) -> None:
    from bolid.scrape.crawl import crawl_site, crawl_urls  # Scrapy takes a second to load

    if addresses is not None:
        collection.total = len(addresses)
        crawl_urls(addresses, collection, manners)
    elif site is not None:
        crawl_site(site, collection, manners)


def _check_limits(**limits: int | None) -> None:
    for name, value in limits.items():
        if value is not None and value < 1:
            raise BolidError(f"--{name.replace('_', '-')} is {value}", "give at least 1")


def _judge(result: ScrapeResult, collection: Collection, max_bad: float) -> ScrapeResult:
    absent = collection.not_found()
    if result.photos == 0:
        reasons = {**result.people_dropped, **result.failed, **result.dropped}
        counts = ", ".join(f"{reason}: {number}" for reason, number in reasons.items()) or "none were found"
        hint = "give other photos"
        if any(ROBOTS in reason or RESERVED in reason for reason in reasons):
            hint = "the owner does not allow it; ask them"
        elif absent:
            counts, hint = absent[0], absent[1] or "check how the name is written"
        elif any(reason.startswith("smaller than") for reason in reasons):
            hint = "take larger photos, or lower --min-size"
        elif any("--min-photos" in reason for reason in reasons):
            hint = "lower --min-photos"
        elif REFUSED in reasons:
            hint = f"{REFUSED_HINT}, and without --one-person people are not counted"
        elif result.failed:
            hint = "check the addresses and the site's description; the same command tries again"
        raise TooManyFailed(f"no photos could be kept ({counts})", hint, result)
    bad = sum(result.failed.values())
    total = bad + result.photos + sum(result.dropped.values())
    if bad > 1 and bad > max_bad * total:
        raise TooManyFailed(
            f"{bad} of {total} photos could not be fetched or read, more than --max-bad {max_bad:g} allows",
            f"{result.out} is complete without them (reasons in dropped.csv); the same command tries again what may "
            f"work later, or repeat it with --max-bad {bad / total + 0.005:.2f}",
            result,
        )
    if refused := result.dropped.get(REFUSED):
        result.warnings.append(f"{refused} pictures were dropped: {REFUSED}; {REFUSED_HINT}")
    if absent:
        result.warnings.append(f"{absent[0]}{': ' + absent[1] if absent[1] else ''}")
    if collection.marks["license"] == UNKNOWN or collection.marks["consent"] == UNKNOWN:
        result.warnings.append(f"license or consent is recorded as unknown: say them (--license, --consent); {DOCS}")
    return result
