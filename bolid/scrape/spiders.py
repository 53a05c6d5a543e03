"""Spiders: from the pages of a site, or a list of addresses, to photos."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

from parsel import Selector
from scrapy import Request, Spider, signals
from scrapy.crawler import Crawler
from scrapy.exceptions import (
    CannotResolveHostError,
    DownloadCancelledError,
    DownloadConnectionRefusedError,
    DownloadTimeoutError,
    IgnoreRequest,
    ResponseDataLossError,
)
from scrapy.http import HtmlResponse, Response
from scrapy.spidermiddlewares.httperror import HttpError
from scrapy.utils.httpobj import urlparse_cached
from twisted.python.failure import Failure
from w3lib.encoding import html_body_declared_encoding, http_content_type_encoding

from bolid.formats.sites import Site
from bolid.scrape import rules
from bolid.scrape.politeness import EnoughPhotos, Gate, Refused, is_reserved
from bolid.scrape.rules import (
    AGENT,
    LOOP,
    NO_ADDRESS,
    NO_PICTURE,
    NOT_HTML,
    PRIVATE,
    RESERVED,
    ROBOTS,
    TOO_LARGE,
    Manners,
    Sink,
)

_LIST, _PERSON, _MORE, _PAGE, _PHOTO = 0, 10, 20, 30, 40  # priorities: finish a person before the next one


class PhotoSpider(Spider):
    """What lists of addresses and sites have in common: photos."""

    name = AGENT

    def __init__(self, sink: Sink, manners: Manners) -> None:
        super().__init__()
        self.sink, self.manners = sink, manners
        self.gate = Gate(manners.connections, sink.say)
        self.named: set[str] = set()  # hosts, with ports, of the addresses that the user gave
        self.fatal: BaseException | None = None
        self.on_their_way: set[asyncio.Task | None] = set()  # requests
        self._under_way: set[str] = set()  # photos, from the request to the verdict

    @classmethod
    def from_crawler(cls, crawler: Crawler, *args: Any, **kwargs: Any) -> Any:
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.give_up, signal=signals.spider_error)
        return spider

    def give_up(self, failure: Failure) -> None:
        """An error on our side (a full disk, a bug) ends the crawl: no photo is to blame."""
        self.stop(failure.value)

    def stop(self, error: BaseException) -> None:
        """End the crawl because of ``error``. Requests under way are dropped and not counted."""
        if self.fatal is not None:
            return
        self.fatal = error
        for slot in self.crawler.engine.downloader.slots.values():
            slot.delay = 0
        for task in self.on_their_way:
            if task is not None:
                task.cancel()
        self._closing = asyncio.ensure_future(self.crawler.stop_async())

    def photo(self, person: str, url: str, page: str = "", caption: str = "") -> Request | None:
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
                cb_kwargs={"person": person, "source": url, "page": page, "caption": caption},
                meta={"person": person, "dont_cache": True},
                priority=_PHOTO,
                dont_filter=True,  # `wants` knows better
            )
        except ValueError:  # an address no request can be made of
            self.sink.drop(person, url, NO_ADDRESS)
            return None
        self._under_way.add(url)
        return request

    async def parse_photo(self, response: Response, person: str, source: str, page: str, caption: str) -> None:
        try:
            if is_reserved(response):
                self.sink.drop(person, source, RESERVED, refused=True)
            else:
                await self.sink.take(person, source, page, response.body, response.url, caption)
        finally:
            self._under_way.discard(source)

    def photo_failed(self, failure: Failure) -> None:
        kwargs = failure.request.cb_kwargs
        self._under_way.discard(kwargs["source"])
        if not isinstance(failure.value, EnoughPhotos) and self.fatal is None:
            reason, refused, final = _why(failure.value)
            self.sink.drop(kwargs["person"], kwargs["source"], reason, refused=refused, final=final)


def host_of(url: str) -> str:
    """The host of an address, with its port where one is given."""
    try:
        return urlparse_cached(Request(url)).netloc
    except ValueError:
        return ""


def _why(error: BaseException) -> tuple[str, bool, bool]:
    """(reason, whether the owner forbids it, whether another try is useless)."""
    if isinstance(error, Refused):
        return error.reason, error.reason in (ROBOTS, PRIVATE), error.final
    if isinstance(error, HttpError):
        status = error.response.status
        return f"HTTP status {status}", False, 400 <= status < 500 and status not in (408, 425, 429)
    if isinstance(error, IgnoreRequest) and "redirection" in str(error):
        return LOOP, False, True
    if isinstance(error, IgnoreRequest):  # of the decompression: its result is larger than MAX_BYTES
        return TOO_LARGE, False, True
    if isinstance(error, DownloadCancelledError):
        return TOO_LARGE, False, True
    if isinstance(error, DownloadTimeoutError):
        return f"no answer within {rules.TIMEOUT} s", False, False
    if isinstance(error, ResponseDataLossError):
        return "the connection broke off", False, False
    if isinstance(error, CannotResolveHostError):
        return "there is no such host", False, False
    if isinstance(error, DownloadConnectionRefusedError):
        return "the host cannot be reached", False, False
    return f"cannot be fetched ({type(error).__name__})", False, False


class ListSpider(PhotoSpider):
    """Photos by their addresses."""

    def __init__(self, urls: Iterable[tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._urls = urls

    async def start(self) -> AsyncIterator[Request]:
        # A few more than are on their way, so that the longest list takes no memory.
        most = 4 * self.crawler.settings.getint("CONCURRENT_REQUESTS")
        for name, url, caption in self._urls:
            person = self.sink.person(name)
            self.named.add(host_of(url))
            request = None if person is None else self.photo(person, url, caption=caption)
            if request is not None:
                while len(self._under_way) > most:
                    await self.crawler.signals.wait_for(signals.scheduler_empty)
                yield request


class SiteSpider(PhotoSpider):
    """A gallery that a `Site` describes."""

    def __init__(self, site: Site, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.site = site

    async def start(self) -> AsyncIterator[Request]:
        self.named.update(map(host_of, self.site.start))
        for url in self.site.start:
            yield self._page(url, self.parse_list, _LIST)

    def _page(self, url: str, callback: Callable[..., Any], priority: int, **kwargs: Any) -> Request:
        meta = {"page": True, "person": kwargs.get("person", "")}
        return Request(url, callback=callback, errback=self.page_failed, priority=priority, cb_kwargs=kwargs, meta=meta)

    def page_failed(self, failure: Failure) -> None:
        if not isinstance(failure.value, EnoughPhotos) and self.fatal is None:
            reason, refused, _ = _why(failure.value)
            self.sink.lost(reason, failure.request.meta["person"], refused=refused)

    def _readable(self, response: Response) -> HtmlResponse | None:
        """The page in the encoding it says, or else in the site's; None for what is no page, or reserved."""
        person = response.meta["person"]
        if not isinstance(response, HtmlResponse):
            self.sink.lost(NOT_HTML, person)
            return None
        if is_reserved(response):
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
        person = self.sink.person(name, response.url, first_number(_text(page, self.site.photo_count)))
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
    for found in _select(page, selector):
        try:
            if isinstance(found.root, str):
                address, text = found.root, ""
            else:
                address = found.attrib.get("href") or found.attrib.get("src") or ""
                text = _words(found, ".//text()") or found.attrib.get("title") or _words(found, ".//img/@alt")
            url = page.urljoin(address.strip())
        except ValueError:
            continue
        if address.strip() and url.startswith(("http://", "https://")):
            yield url, text


def first_number(text: str) -> int | None:
    """The first whole number in a text: 312, 1 312, 1,312 and 1.312; None without one, or of more than 9 digits."""
    found = re.search(r"\d{1,3}(?:[\s,.]\d{3})+(?!\d)|\d+", text)
    digits = re.sub(r"\D", "", found[0]) if found else ""
    return int(digits) if 0 < len(digits) <= 9 else None


def _text(page: HtmlResponse, selector: str) -> str:
    """The text of the first element that a selector finds, or ""."""
    found = _select(page, selector)
    if not found:
        return ""
    first = found[0]
    return " ".join(first.root.split()) if isinstance(first.root, str) else _words(first, ".//text()")


def _select(page: HtmlResponse, selector: str) -> Sequence[Selector]:
    """What a selector finds; nothing where lxml refuses the page."""
    try:
        return page.css(selector) if selector else []
    except ValueError:
        return []


def _words(element: Selector, texts: str) -> str:
    """The texts in an element, as one line; "" where lxml refuses it (control characters in damaged markup)."""
    try:
        return " ".join("".join(element.xpath(texts).getall()).split())
    except ValueError:
        return ""
