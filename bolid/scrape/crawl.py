"""Fetching from the web with Scrapy, politely: robots.txt, one request at a time, pauses a server asks for, refusals.

Scrapy runs inside this process with settings of its own and without Twisted's reactor, which could be started only
once; what it fetches through is aiohttp. Its job directory and disk cache are pickles and do not survive a kill, and
its images pipeline writes pictures anew, so what is fetched is settled by a `Sink`, one photo at a time, and pages are
remembered there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from parsel import Selector
from scrapy import Request, Spider, signals
from scrapy.core.downloader.handlers._aiohttp import AiohttpDownloadHandler
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.robotstxt import RobotsTxtMiddleware
from scrapy.exceptions import (
    CannotResolveHostError,
    DownloadCancelledError,
    DownloadConnectionRefusedError,
    DownloadTimeoutError,
    IgnoreRequest,
    ResponseDataLossError,
)
from scrapy.http import Headers, HtmlResponse, Response
from scrapy.responsetypes import responsetypes
from scrapy.spidermiddlewares.httperror import HttpError
from scrapy.utils.httpobj import urlparse_cached
from twisted.python.failure import Failure
from w3lib.encoding import html_body_declared_encoding, http_content_type_encoding

from bolid.errors import BolidError
from bolid.formats.sites import Site

AGENT = "bolid"  # the name that robots.txt may address
MAX_BYTES = 32 * 2**20  # of one photo or page
TIMEOUT = 60  # seconds for one photo or page, all of it
MAX_PAUSE = 600  # seconds; a server that asks for a longer one is left alone until the next run
RETRIES = 2

ROBOTS = "forbidden by robots.txt"
ROBOTS_UNREACHABLE = "the site's robots.txt cannot be fetched"
RESERVED = "reserved by its owner (X-Robots-Tag: noai, noimageai, or TDM-Reservation)"
BUSY = "the server asks to come back later (Retry-After)"
LOOP = "redirects without end"
TOO_LARGE = f"larger than {MAX_BYTES // 2**20} MiB"
NOT_HTML = "not an HTML page"
NO_PICTURE = "no picture on the photo's page"
NO_ADDRESS = "not an http or https address"

_LIST, _PERSON, _MORE, _PAGE, _PHOTO = 0, 10, 20, 30, 40  # priorities: first finish what is begun


class Sink(Protocol):
    """Where a crawl asks what it should fetch, and puts what it has fetched."""

    def person(self, name: str, page: str = "", count: int | None = None) -> str | None:
        """The folder of a person, or None when no photos of them are wanted. ``count``: photos the site says it has."""

    def asks_for(self, name: str) -> bool:
        """Whether a person of this name could be wanted at all."""

    def wants(self, person: str, source: str) -> bool:
        """Whether this photo is yet to be fetched."""

    def full(self, person: str) -> bool:
        """Whether there are enough photos of the person; for "", whether there are enough people."""

    async def take(self, person: str, source: str, page: str, data: bytes) -> None:
        """A photo was fetched."""

    def drop(self, person: str, source: str, reason: str, *, refused: bool = False, final: bool = True) -> None:
        """A photo could not be fetched; ``refused``: somebody does not want it to be."""

    def lost(self, reason: str, person: str, *, refused: bool = False) -> None:
        """A page that would have led to photos (of ``person``, unless "") could not be fetched."""

    def cached_page(self, key: str) -> tuple[str, int, dict[str, list[str]], bytes] | None:
        """A page that was fetched not long ago."""

    def cache_page(self, key: str, url: str, status: int, headers: dict[str, list[str]], body: bytes) -> None:
        """Remember a page."""

    def say(self, text: str) -> None:
        """What the crawl is waiting for."""


@dataclass(frozen=True)
class Manners:
    """How the crawl behaves. ``connections``: to one host at once. ``delay``: seconds between two requests to a host at
    least, from which Scrapy's AutoThrottle goes up where a server is slow; 0 takes AutoThrottle off."""

    contact: str
    connections: int = 1
    delay: float = 1.0
    obey_robots: bool = True
    version: str = ""

    @property
    def user_agent(self) -> str:
        return f"{AGENT}/{self.version} (+{self.contact})"


class Refused(IgnoreRequest):
    """A request that is not made. ``final``: nor will it be the next time."""

    def __init__(self, reason: str, final: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.final = reason, final


class _Stopped(IgnoreRequest):
    """The crawl ends before its time."""


class _Enough(IgnoreRequest):
    """There are enough photos of the person, or enough people."""


def crawl_site(site: Site, sink: Sink, manners: Manners) -> None:
    """Follow a site's links to people and their photos; everything comes out through ``sink``."""
    for entry in ("lists", "people", "photos", "next", "person_name", "photo_count", "picture"):
        try:
            Selector(text="<a></a>").css(getattr(site, entry) or "a")
        except Exception as error:  # cssselect's syntax errors, and ValueError for odd pseudo-elements
            raise BolidError(
                f"site {site.name!r}: {entry} = {getattr(site, entry)!r} is no CSS selector: {error}", "correct it"
            ) from error
    _run(_SiteSpider, sink, manners, site=site)


def crawl_urls(urls: Iterable[tuple[str, str]], sink: Sink, manners: Manners) -> None:
    """Fetch photos by (person, address)."""
    _run(_ListSpider, sink, manners, urls=urls)


def _run(spider_class: type[_PhotoSpider], sink: Sink, manners: Manners, **arguments: Any) -> None:
    crawler = Crawler(spider_class, _settings(manners))
    loggers = [logging.getLogger(name) for name in ("scrapy", "twisted", "asyncio", "protego")]
    levels = [(logger, logger.level) for logger in loggers]
    try:
        for logger in loggers:  # failures are told as reasons, each with its photo
            logger.setLevel(logging.CRITICAL + 1)
        asyncio.run(_crawl(crawler, sink=sink, manners=manners, **arguments))
    finally:
        for logger, level in levels:
            logger.setLevel(level)
    spider = crawler.spider
    if isinstance(spider, _PhotoSpider) and spider.fatal is not None:
        raise spider.fatal


async def _crawl(crawler: Crawler, **arguments: Any) -> None:
    """Run it to its end, or until Ctrl-C."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)  # the next one ends everything at once
        if isinstance(crawler.spider, _PhotoSpider) and crawler.crawling:
            crawler.spider.stop(KeyboardInterrupt())
        elif task is not None:
            task.cancel()

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not in the main thread
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        await crawler.crawl_async(**arguments)
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)


def _settings(manners: Manners) -> dict[str, Any]:
    here = __name__
    return {
        "TWISTED_REACTOR_ENABLED": False,
        "TELNETCONSOLE_ENABLED": False,
        "REMOTE_CONTROL_ENABLED": False,
        "MEMUSAGE_ENABLED": False,
        "LOG_ENABLED": False,
        "USER_AGENT": manners.user_agent,
        "ROBOTSTXT_OBEY": manners.obey_robots,
        "COOKIES_ENABLED": False,
        "METAREFRESH_ENABLED": False,
        "CONCURRENT_REQUESTS": max(16, manners.connections),  # of all hosts together
        "CONCURRENT_ITEMS": 1,  # there are none; Scrapy starts as many tasks for every response
        "CONCURRENT_REQUESTS_PER_DOMAIN": manners.connections,
        "DOWNLOAD_DELAY": manners.delay,
        "AUTOTHROTTLE_ENABLED": manners.delay > 0,
        "AUTOTHROTTLE_START_DELAY": manners.delay,
        "AUTOTHROTTLE_TARGET_CONCURRENCY": float(manners.connections),
        "DOWNLOAD_TIMEOUT": TIMEOUT,
        "DOWNLOAD_MAXSIZE": MAX_BYTES,
        "DOWNLOAD_WARNSIZE": 0,
        "DOWNLOAD_VERIFY_CERTIFICATES": True,
        "RETRY_TIMES": RETRIES,
        "REDIRECT_MAX_TIMES": 5,
        "URLLENGTH_LIMIT": 0,  # it would drop requests without a word
        # Pages and photos that are fetched but not yet settled; above it nothing more is fetched.
        "SCRAPER_SLOT_MAX_ACTIVE_SIZE": 2 * MAX_BYTES,
        "SCHEDULER_MEMORY_QUEUE": "scrapy.squeues.FifoMemoryQueue",
        "HTTPCACHE_ENABLED": True,
        "HTTPCACHE_POLICY": f"{here}.PagesOnly",
        "HTTPCACHE_STORAGE": f"{here}.PageStore",
        "DOWNLOAD_HANDLERS": {
            "http": f"{here}.PoliteHandler", "https": f"{here}.PoliteHandler",
            "data": None, "file": None, "ftp": None, "s3": None,
        },
        "DOWNLOADER_MIDDLEWARES": {
            f"{here}.Enough": 90,
            "scrapy.downloadermiddlewares.robotstxt.RobotsTxtMiddleware": None, f"{here}.Robots": 100,
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ politeness


class _Gate:
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
    """The last point before a request goes out: it waits here for as long as its host wants."""

    async def download_request(self, request: Request) -> Response:
        spider, host = self.crawler.spider, urlparse_cached(request).netloc
        task = asyncio.current_task()
        spider.on_their_way.add(task)
        try:
            async with spider.gate.turn(host):
                if spider.fatal is not None:
                    raise _Stopped
                await spider.gate.wait(host)
                response = await super().download_request(request)
                seconds = _retry_after(response) if response.status in (429, 503) else None
                if seconds is not None:
                    spider.gate.pause(host, seconds)
            return response
        except asyncio.CancelledError:
            raise _Stopped from None  # a failure that Scrapy handles; it would wait for ever for a cancelled task
        finally:
            spider.on_their_way.discard(task)


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
            raise _Enough


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


def _reserved(response: Response) -> bool:
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


# ----------------------------------------------------------------------------------------- pages fetched not long ago


class PagesOnly:
    """Scrapy's cache policy: pages that were there, never photos or robots.txt."""

    def __init__(self, settings: Any) -> None:
        pass

    def should_cache_request(self, request: Request) -> bool:
        return request.meta.get("page", False)

    def should_cache_response(self, response: Response, request: Request) -> bool:
        return response.status == 200

    def is_cached_response_fresh(self, cachedresponse: Response, request: Request) -> bool:
        return True  # the sink has thrown old ones away

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


# --------------------------------------------------------------------------------------------------------- spiders


class _PhotoSpider(Spider):
    """What lists of addresses and sites have in common: photos."""

    name = AGENT

    def __init__(self, sink: Sink, manners: Manners) -> None:
        super().__init__()
        self.sink, self.manners = sink, manners
        self.gate = _Gate(manners.connections, sink.say)
        self.fatal: BaseException | None = None
        self.on_their_way: set[asyncio.Task | None] = set()  # requests
        self._under_way: set[str] = set()  # photos, from the request to the verdict

    @classmethod
    def from_crawler(cls, crawler: Crawler, *args: Any, **kwargs: Any) -> Any:
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.give_up, signal=signals.spider_error)
        return spider

    def give_up(self, failure: Failure) -> None:
        """What goes wrong on our side (a full disk, a fault of ours) ends the crawl; it is no property of a photo."""
        self.stop(failure.value)

    def stop(self, error: BaseException) -> None:
        """End the crawl now, because of ``error``. What is on its way is dropped and counts as nothing."""
        if self.fatal is not None:
            return
        self.fatal = error
        for slot in self.crawler.engine.downloader.slots.values():
            slot.delay = 0
        for task in self.on_their_way:
            if task is not None:
                task.cancel()
        self._closing = asyncio.ensure_future(self.crawler.stop_async())

    def photo(self, person: str, url: str, page: str = "") -> Request | None:
        """The request for a photo, or None when it is settled or on its way."""
        if not url.startswith(("http://", "https://")):
            self.sink.drop(person, url, NO_ADDRESS)
            return None
        if url in self._under_way or not self.sink.wants(person, url):
            return None
        try:
            request = Request(
                url,
                callback=self.parse_photo,
                errback=self.photo_failed,
                cb_kwargs={"person": person, "source": url, "page": page},
                meta={"person": person, "dont_cache": True},
                priority=_PHOTO,
                dont_filter=True,  # `wants` knows better
            )
        except ValueError:  # an address no request can be made of
            self.sink.drop(person, url, NO_ADDRESS)
            return None
        self._under_way.add(url)
        return request

    async def parse_photo(self, response: Response, person: str, source: str, page: str) -> None:
        try:
            if _reserved(response):
                self.sink.drop(person, source, RESERVED, refused=True)
            else:
                await self.sink.take(person, source, page, response.body)
        finally:
            self._under_way.discard(source)

    def photo_failed(self, failure: Failure) -> None:
        kwargs = failure.request.cb_kwargs
        self._under_way.discard(kwargs["source"])
        if not isinstance(failure.value, _Enough) and self.fatal is None:
            reason, refused, final = _why(failure.value)
            self.sink.drop(kwargs["person"], kwargs["source"], reason, refused=refused, final=final)


def _why(error: BaseException) -> tuple[str, bool, bool]:
    """(reason, whether somebody refuses, whether it will be so the next time)."""
    if isinstance(error, Refused):
        return error.reason, error.reason == ROBOTS, error.final
    if isinstance(error, HttpError):
        status = error.response.status
        return f"HTTP status {status}", False, 400 <= status < 500 and status not in (408, 425, 429)
    if isinstance(error, IgnoreRequest):  # RedirectMiddleware's
        return LOOP, False, True
    if isinstance(error, DownloadCancelledError):
        return TOO_LARGE, False, True
    if isinstance(error, DownloadTimeoutError):
        return f"no answer within {TIMEOUT} s", False, False
    if isinstance(error, ResponseDataLossError):
        return "the connection broke off", False, False
    if isinstance(error, CannotResolveHostError):
        return "there is no such host", False, False
    if isinstance(error, DownloadConnectionRefusedError):
        return "the host cannot be reached", False, False
    return f"cannot be fetched ({type(error).__name__})", False, False


class _ListSpider(_PhotoSpider):
    """Photos by their addresses."""

    def __init__(self, urls: Iterable[tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._urls = urls

    async def start(self) -> AsyncIterator[Request]:
        # A few more than are on their way, so that the longest list takes no memory.
        most = 4 * self.crawler.settings.getint("CONCURRENT_REQUESTS")
        for name, url in self._urls:
            person = self.sink.person(name)
            request = None if person is None else self.photo(person, url)
            if request is not None:
                while len(self._under_way) > most:
                    await self.crawler.signals.wait_for(signals.scheduler_empty)
                yield request


class _SiteSpider(_PhotoSpider):
    """A gallery that a `Site` describes."""

    def __init__(self, site: Site, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.site = site

    async def start(self) -> AsyncIterator[Request]:
        for url in self.site.start:
            yield self._page(url, self.parse_list, _LIST)

    def _page(self, url: str, callback: Callable[..., Any], priority: int, **kwargs: Any) -> Request:
        meta = {"page": True, "person": kwargs.get("person", "")}
        return Request(url, callback=callback, errback=self.page_failed, priority=priority, cb_kwargs=kwargs, meta=meta)

    def page_failed(self, failure: Failure) -> None:
        if not isinstance(failure.value, _Enough) and self.fatal is None:
            reason, refused, _ = _why(failure.value)
            self.sink.lost(reason, failure.request.meta["person"], refused=refused)

    def _readable(self, response: Response) -> HtmlResponse | None:
        """The page in the encoding it says, or else in the site's; None for what is no page, or reserved."""
        person = response.meta["person"]
        if not isinstance(response, HtmlResponse):
            self.sink.lost(NOT_HTML, person)
            return None
        if _reserved(response):
            self.sink.lost(RESERVED, person, refused=True)
            return None
        header = (response.headers.get("Content-Type") or b"").decode("latin-1")
        declared = http_content_type_encoding(header) or html_body_declared_encoding(response.body)
        return response if declared or not self.site.encoding else response.replace(encoding=self.site.encoding)

    def parse_list(self, response: Response) -> Iterator[Request]:
        page = self._readable(response)
        if page is None:
            return
        for url, _ in _links(page, self.site.lists):
            yield self._page(url, self.parse_list, _LIST)
        for url, _ in _links(page, self.site.next):
            yield self._page(url, self.parse_list, _LIST)
        for url, text in _links(page, self.site.people):
            if not text or self.sink.asks_for(text):
                yield self._page(url, self.parse_person, _PERSON, name=text)

    def parse_person(self, response: Response, name: str) -> Iterator[Request]:
        page = self._readable(response)
        if page is None:
            return
        name = _text(page, self.site.person_name) or name.strip(" /") or response.url.rstrip("/").rpartition("/")[2]
        person = self.sink.person(name, response.url, _number(_text(page, self.site.photo_count)))
        if person is not None:
            yield from self._photos(page, person)

    def parse_more(self, response: Response, person: str) -> Iterator[Request]:
        page = self._readable(response)
        if page is not None:
            yield from self._photos(page, person)

    def _photos(self, page: HtmlResponse, person: str) -> Iterator[Request]:
        for url, _ in _links(page, self.site.photos):
            if self.site.picture:
                yield self._page(url, self.parse_photo_page, _PAGE, person=person)
            elif request := self.photo(person, self._full_size(url), page.url):
                yield request
        for url, _ in _links(page, self.site.next):
            yield self._page(url, self.parse_more, _MORE, person=person)

    def parse_photo_page(self, response: Response, person: str) -> Iterator[Request]:
        page = self._readable(response)
        if page is None:
            return
        found = next(_links(page, self.site.picture), None)
        if found is None:
            self.sink.lost(NO_PICTURE, person)
        elif request := self.photo(person, self._full_size(found[0]), page.url):
            yield request

    def _full_size(self, url: str) -> str:
        pattern, replacement = self.site.thumbnail
        return re.sub(pattern, replacement, url) if pattern else url


def _links(page: HtmlResponse, selector: str) -> Iterator[tuple[str, str]]:
    """(absolute http address, text) of what a selector finds: attribute values, or elements' href or src."""
    for found in page.css(selector) if selector else ():
        if isinstance(found.root, str):
            address, text = found.root, ""
        else:
            address = found.attrib.get("href") or found.attrib.get("src") or ""
            text = " ".join("".join(found.xpath(".//text()").getall()).split())
            text = text or found.attrib.get("title") or found.xpath("string(.//img/@alt)").get() or ""
        try:
            url = page.urljoin(address.strip())
        except ValueError:
            continue
        if address.strip() and url.startswith(("http://", "https://")):
            yield url, text


def _number(text: str) -> int | None:
    """The first whole number in a text: 312, 1 312, 1,312 and 1.312; None without one."""
    found = re.search(r"\d{1,3}(?:[\s,.]\d{3})+(?!\d)|\d+", text)
    return int(re.sub(r"\D", "", found[0])) if found else None


def _text(page: HtmlResponse, selector: str) -> str:
    """The text of the first element that a selector finds, or ""."""
    found = page.css(selector) if selector else []
    if not found:
        return ""
    first = found[0]
    text = first.root if isinstance(first.root, str) else "".join(first.xpath(".//text()").getall())
    return " ".join(text.split())
