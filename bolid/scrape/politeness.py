"""Politeness towards web servers: one request at a time, pauses, robots.txt, reserved rights, and no page twice.

Classes here are components of Scrapy; `bolid.scrape.crawl` names them in its settings.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from scrapy import Request, Spider
from scrapy.core.downloader.handlers._aiohttp import AiohttpDownloadHandler
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.robotstxt import RobotsTxtMiddleware
from scrapy.exceptions import IgnoreRequest
from scrapy.http import Headers, HtmlResponse, Response
from scrapy.responsetypes import responsetypes
from scrapy.utils.httpobj import urlparse_cached

from bolid.scrape.rules import AGENT, BUSY, MAX_PAUSE, PRIVATE, ROBOTS, ROBOTS_UNREACHABLE


class Refused(IgnoreRequest):
    """A request that is not made. ``final``: another try is useless."""

    def __init__(self, reason: str, final: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.final = reason, final


class Stopped(IgnoreRequest):
    """The crawl ends before its time."""


class EnoughPhotos(IgnoreRequest):
    """There are enough photos of the person, or enough people."""


class Gate:
    """When a host may be asked: how many requests at once, pauses it asked for with Retry-After, its Crawl-delay.

    Scrapy counts a request from a task of its own, so several of one moment can get past its limit.
    """

    def __init__(self, connections: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(connections))
        self._next: dict[str, float] = {}
        self._spacing: dict[str, float] = {}
        self._closed: set[str] = set()

    def pause(self, host: str, seconds: float) -> None:
        if seconds > MAX_PAUSE:
            self._closed.add(host)
        self._next[host] = max(self._next.get(host, 0.0), time.monotonic() + seconds)

    def space(self, host: str, seconds: float) -> None:
        self._spacing[host] = seconds

    def turn(self, host: str) -> asyncio.Semaphore:
        """Hold it while asking."""
        return self._turns[host]

    async def wait(self, host: str) -> None:
        while (seconds := self._next.get(host, 0.0) - time.monotonic()) > 0:
            if host in self._closed:
                raise Refused(BUSY, final=False)
            if seconds > 2:
                self._say(f"{host} asks for a pause of {seconds:.0f} s")
            await asyncio.sleep(seconds)
        if spacing := self._spacing.get(host):
            self._next[host] = time.monotonic() + spacing


class PoliteHandler(AiohttpDownloadHandler):
    """The last step before a request goes out: it waits for its turn and for the pauses that its host asks for."""

    async def download_request(self, request: Request) -> Response:
        spider, host = self.crawler.spider, urlparse_cached(request).netloc
        task = asyncio.current_task()
        spider.on_their_way.add(task)
        try:
            async with spider.gate.turn(host):
                if spider.fatal is not None:
                    raise Stopped
                await spider.gate.wait(host)
                response = await super().download_request(request)
                if public_only(spider, request) and is_private(response.ip_address):  # its name had another address
                    raise Refused(PRIVATE)
                seconds = _retry_after(response) if response.status in (429, 503) else None
                if seconds is not None:
                    spider.gate.pause(host, seconds)
            return response
        except asyncio.CancelledError:
            raise Stopped from None  # a failure that Scrapy handles; it would wait for ever for a cancelled task
        finally:
            spider.on_their_way.discard(task)


class PublicOnly:
    """Refuses what pages and servers lead to in private networks; only addresses that the user gave may lie there."""

    def __init__(self, crawler: Crawler) -> None:
        self.crawler = crawler

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> PublicOnly:
        return cls(crawler)

    async def process_request(self, request: Request) -> None:
        if public_only(self.crawler.spider, request) and await leads_to_private(request):
            raise Refused(PRIVATE)


def public_only(spider: Any, request: Request) -> bool:
    """Whether this request must not go into a private network. What a proxy does is not known here."""
    named = urlparse_cached(request).netloc in spider.named
    return not (spider.manners.allow_private or named or request.meta.get("proxy"))


async def leads_to_private(request: Request) -> bool:
    """Whether the request's host has an address in a private network. A name that cannot be resolved has none."""
    url = urlparse_cached(request)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.hostname, url.port or 80, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, ValueError):
        return False
    return any(is_private(ipaddress.ip_address(str(address[0]).partition("%")[0])) for *_, address in found)


def is_private(address: ipaddress.IPv4Address | ipaddress.IPv6Address | None) -> bool:
    """Whether an address is not of the public internet: private, loopback, link-local, shared, multicast, reserved."""
    mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    return mapped is not None and (not mapped.is_global or mapped.is_multicast)


class Enough:
    """Drops what is not needed any more: of people with enough photos, and new people when there are enough."""

    def __init__(self, crawler: Crawler) -> None:
        self.crawler = crawler

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Enough:
        return cls(crawler)

    def process_request(self, request: Request) -> None:
        person = request.meta.get("person")
        if person is not None and self.crawler.spider.sink.full(person):
            raise EnoughPhotos


class Robots(RobotsTxtMiddleware):
    """Scrapy's robots.txt, and what RFC 9309 says of one that cannot be fetched: then everything is forbidden."""

    async def process_request(self, request: Request) -> None:
        if request.meta.get("dont_obey_robotstxt"):
            return
        await self.robot_parser(request)
        # Not what that returns: of several requests that wait for one robots.txt all but the first are given None.
        rules = self._parsers[urlparse_cached(request).netloc]
        if rules is None:
            raise Refused(ROBOTS_UNREACHABLE, final=False)
        if not rules.allowed(request.url, AGENT):
            raise Refused(ROBOTS)

    async def _parse_robots(self, response: Response, netloc: str, request: Request) -> None:
        if response.status >= 500 or response.status == 429:
            self._robots_error(IgnoreRequest(), netloc)
            return
        if response.status >= 400:  # there is none: nothing is forbidden
            response = response.replace(body=b"")
        await super()._parse_robots(response, netloc, request)
        delay = getattr(getattr(self._parsers[netloc], "rp", None), "crawl_delay", lambda agent: None)(AGENT)
        if delay:
            self.crawler.spider.gate.space(netloc, min(float(delay), MAX_PAUSE))


def _retry_after(response: Response) -> float | None:
    """Seconds that a Retry-After header (a number, or a date) asks for; None without one."""
    text = (response.headers.get("Retry-After") or b"").decode("latin-1").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def is_reserved(response: Response) -> bool:
    """Whether the owner keeps this for other uses than training: X-Robots-Tag noai or noimageai, TDM-Reservation 1;
    on a page also as meta elements."""
    words = b",".join(response.headers.getlist("X-Robots-Tag")).decode("latin-1")
    reservation = (response.headers.get("TDM-Reservation") or b"").decode("latin-1")
    if isinstance(response, HtmlResponse):
        for meta in response.css("meta[name][content]"):
            name = meta.attrib["name"].strip().lower()
            if name in ("robots", AGENT):
                words += "," + meta.attrib["content"]
            elif name == "tdm-reservation":
                reservation = meta.attrib["content"]
    directives = {word.strip().lower() for word in re.split(r"[,:;]", words)}
    return not directives.isdisjoint({"noai", "noimageai"}) or reservation.strip() == "1"


class PagesOnly:
    """Scrapy's cache policy: pages that were there, never photos or robots.txt."""

    def __init__(self, settings: Any) -> None:
        pass

    def should_cache_request(self, request: Request) -> bool:
        return request.meta.get("page", False)

    def should_cache_response(self, response: Response, request: Request) -> bool:
        return response.status == 200

    def is_cached_response_fresh(self, cachedresponse: Response, request: Request) -> bool:
        return True  # the sink forgets old pages

    def is_cached_response_valid(self, cachedresponse: Response, response: Response, request: Request) -> bool:
        return False


class PageStore:
    """Scrapy's cache storage: the sink."""

    def __init__(self, settings: Any) -> None:
        pass

    def open_spider(self, spider: Spider) -> None:
        self._fingerprinter = spider.crawler.request_fingerprinter

    def close_spider(self, spider: Spider) -> None:
        pass

    def retrieve_response(self, spider: Any, request: Request) -> Response | None:
        found = spider.sink.cached_page(self._fingerprinter.fingerprint(request).hex())
        if found is None:
            return None
        url, status, headers, body = found
        kind = responsetypes.from_args(headers=Headers(headers), url=url, body=body)
        return kind(url=url, status=status, headers=headers, body=body)

    def store_response(self, spider: Any, request: Request, response: Response) -> None:
        headers = {
            name.decode("latin-1"): [value.decode("latin-1") for value in values]
            for name, values in response.headers.items()
        }
        key = self._fingerprinter.fingerprint(request).hex()
        spider.sink.cache_page(key, response.url, response.status, headers, response.body)
