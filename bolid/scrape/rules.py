"""Between a crawl and the photo folder: how a crawl behaves, what it asks, and the reasons it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

AGENT = "bolid"  # the name that robots.txt may address
MAX_BYTES = 32 * 2**20  # of one photo or page
TIMEOUT = 60  # seconds for one photo or page, all of it
MAX_PAUSE = 600  # seconds; a server that asks for a longer one is left alone until the next run
RETRIES = 2

ROBOTS = "forbidden by robots.txt"
ROBOTS_UNREACHABLE = "the site's robots.txt cannot be fetched"
RESERVED = "reserved by its owner (X-Robots-Tag: noai, noimageai, or TDM-Reservation)"
PRIVATE = "led to an address of a private network (--allow-private)"
BUSY = "the server asks to come back later (Retry-After)"
LOOP = "redirects without end"
TOO_LARGE = f"larger than {MAX_BYTES // 2**20} MiB"
NOT_HTML = "not an HTML page"
NO_PICTURE = "no picture on the photo's page"
NO_ADDRESS = "not an http or https address"


class Sink(Protocol):
    """Where a crawl asks what it should fetch, and puts what it has fetched."""

    def person(self, name: str, page: str = "", count: int | None = None) -> str | None:
        """The folder of a person, or None when no photos of them are wanted. ``count``: photos the site says it has."""

    def asks_for(self, name: str) -> bool:
        """Whether photos of a person of this name may be wanted."""

    def wants(self, person: str, source: str) -> bool:
        """Whether this photo is yet to be fetched."""

    def full(self, person: str) -> bool:
        """Whether there are enough photos of the person; for "", whether there are enough people."""

    async def take(self, person: str, source: str, page: str, data: bytes, final: str, caption: str) -> None:
        """A photo was fetched. `final`: the address that redirects led to; `caption`: what the list of addresses says
        of it."""

    def drop(self, person: str, source: str, reason: str, *, refused: bool = False, final: bool = True) -> None:
        """A photo was not fetched. ``refused``: its owner forbids it. ``final``: do not try again in the next run."""

    def lost(self, reason: str, person: str, *, refused: bool = False) -> None:
        """A page that would have led to photos (of ``person``, unless "") could not be fetched."""

    def cached_page(self, key: str) -> tuple[str, int, dict[str, list[str]], bytes] | None:
        """A page that was fetched not long ago."""

    def cache_page(self, key: str, url: str, status: int, headers: dict[str, list[str]], body: bytes) -> None:
        """Remember a page."""

    def say(self, text: str) -> None:
        """Report what the crawl is waiting for."""


@dataclass(frozen=True)
class Manners:
    """How the crawl behaves. ``connections``: to one host at once. ``delay``: seconds between two requests to a host at
    least, from which Scrapy's AutoThrottle goes up where a server is slow; 0 takes AutoThrottle off.
    ``allow_private``: links, redirects and robots.txt may lead to private networks; addresses that the user named
    always may."""

    contact: str
    connections: int = 1
    delay: float = 1.0
    obey_robots: bool = True
    version: str = ""
    allow_private: bool = False

    @property
    def user_agent(self) -> str:
        return f"{AGENT}/{self.version} (+{self.contact})"
