"""Gallery sites described in data: which links lead to people, to their photos, and to the picture itself.

A site is a TOML file (docs/guides/collecting.md; ``bolid/sites/theplace.toml`` is one). Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.parsing import read_toml

SITES = Path(__file__).parent.parent / "sites"


@dataclass(frozen=True)
class Site:
    """CSS selectors of a gallery. One takes links (``href``), pictures (``src``), or what its ``::attr(...)`` says."""

    name: str
    start: tuple[str, ...]  # addresses to begin at
    people: str  # links to people, on the start pages and the lists
    photos: str  # on a person's page: links to photo pages, or (without `picture`) to the pictures themselves
    lists: str = ""  # links from the start pages to lists of people, e.g. one a letter
    next: str = ""  # links to further pages of a list or of a person
    person_name: str = ""  # on a person's page; else the text of the link that led there
    photo_count: str = ""  # on a person's page: the text whose first number says how many photos there are
    picture: str = ""  # on a photo page: the picture
    encoding: str = ""  # of pages that do not say theirs
    license: str = "unknown"  # of the photos, where the site says it for all
    thumbnail: tuple[str, str] = ("", "")  # regular expression and replacement: a thumbnail's address -> the photo's


def read_site(name: str) -> Site:
    """The site called ``name`` that comes with BoLID, or the one that the TOML file ``name`` describes.

    Raises BolidError that says which line of the description is missing or wrong.
    """
    path = Path(name)
    if not name.endswith(".toml"):
        path = SITES / f"{name}.toml"
        known = sorted(site.stem for site in SITES.glob("*.toml"))
        if name not in known:
            raise BolidError(
                f"there is no site called {name!r}",
                f"known are: {', '.join(known)}; or describe it in a .toml file (docs/guides/collecting.md)",
            )
    return _site(path, read_toml(path, "site file", "check the path"))


def _site(path: Path, data: dict[str, Any]) -> Site:
    known = {field.name for field in fields(Site)}
    if unknown := sorted(set(data) - known):
        raise BolidError(f"{path}: unknown entry {unknown[0]!r}", f"known are: {', '.join(sorted(known))}")
    data = {"name": path.stem, **data}
    for needed in ("start", "people", "photos"):
        if not data.get(needed):
            raise BolidError(f"{path}: {needed!r} is missing", "docs/guides/collecting.md shows a whole description")
    for key, value in data.items():
        if key in ("start", "thumbnail"):
            good = isinstance(value, list) and all(isinstance(part, str) for part in value)
            if key == "thumbnail" and good:
                good = len(value) == 2
            if not good:
                wanted = 'a list of addresses: ["https://..."]' if key == "start" else '["pattern", "replacement"]'
                raise BolidError(f"{path}: {key!r} is {value!r}", f"write {wanted}")
        elif not isinstance(value, str):
            raise BolidError(f"{path}: {key!r} is {value!r}", "write a text in quotes")
    for address in data["start"]:
        if not address.startswith(("http://", "https://")):
            raise BolidError(f"{path}: 'start' has {address!r}", "an address begins with http:// or https://")
    entries: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    site = Site(**entries)
    try:
        re.compile(site.thumbnail[0])
        re.sub(site.thumbnail[0], site.thumbnail[1], "")
    except (re.error, IndexError) as error:
        raise BolidError(f"{path}: 'thumbnail' is no regular expression: {error}", "correct it") from error
    if site.encoding:
        try:
            "".encode(site.encoding)
        except (LookupError, ValueError) as error:
            raise BolidError(f"{path}: unknown encoding {site.encoding!r}", 'write e.g. "windows-1251"') from error
    return site
