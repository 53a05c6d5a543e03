"""Fetching from the web with Scrapy, politely: robots.txt, one request at a time, pauses a server asks for, refusals.

Scrapy runs inside this process with settings of its own and without Twisted's reactor, which can be started only once;
it fetches through aiohttp. Its job directory and disk cache are pickles and do not survive a kill, and its images
pipeline encodes pictures anew. Therefore a `Sink` takes the photos, one at a time, and remembers the pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterable
from typing import Any

from parsel import Selector
from scrapy.crawler import Crawler

from bolid.errors import BolidError
from bolid.formats.sites import Site
from bolid.scrape import politeness, rules
from bolid.scrape.rules import MAX_BYTES, Manners, Sink
from bolid.scrape.spiders import ListSpider, PhotoSpider, SiteSpider


def crawl_site(site: Site, sink: Sink, manners: Manners) -> None:
    """Follow a site's links to people and their photos; everything comes out through ``sink``."""
    for entry in ("lists", "people", "photos", "next", "person_name", "photo_count", "picture"):
        try:
            Selector(text="<a></a>").css(getattr(site, entry) or "a")
        except Exception as error:  # cssselect's syntax errors, and ValueError for odd pseudo-elements
            raise BolidError(
                f"site {site.name!r}: {entry} = {getattr(site, entry)!r} is no CSS selector: {error}", "correct it"
            ) from error
    _run(SiteSpider, sink, manners, site=site)


def crawl_urls(urls: Iterable[tuple[str, str, str]], sink: Sink, manners: Manners) -> None:
    """Fetch photos by (person, address, caption)."""
    _run(ListSpider, sink, manners, urls=urls)


def _run(spider_class: type[PhotoSpider], sink: Sink, manners: Manners, **arguments: Any) -> None:
    crawler = Crawler(spider_class, _settings(manners))
    loggers = [logging.getLogger(name) for name in ("scrapy", "twisted", "asyncio", "protego")]
    levels = [(logger, logger.level) for logger in loggers]
    try:
        for logger in loggers:  # every failure is recorded with its photo
            logger.setLevel(logging.CRITICAL + 1)
        asyncio.run(_crawl(crawler, sink=sink, manners=manners, **arguments))
    finally:
        for logger, level in levels:
            logger.setLevel(level)
    spider = crawler.spider
    if isinstance(spider, PhotoSpider) and spider.fatal is not None:
        raise spider.fatal


async def _crawl(crawler: Crawler, **arguments: Any) -> None:
    """Run it to its end, or until a signal whose handler raises KeyboardInterrupt: Ctrl-C, or the program's own."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    handlers: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}  # asyncio has put its own there
    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    handlers |= {number: handler for number in numbers if number and callable(handler := signal.getsignal(number))}

    def interrupt(number: int) -> None:
        restore(number)  # the next one ends everything at once
        try:
            handlers[number](number, None)
        except KeyboardInterrupt as error:
            if isinstance(crawler.spider, PhotoSpider) and crawler.crawling:
                crawler.spider.stop(error)
            elif task is not None:
                task.cancel()

    def restore(number: int) -> None:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            if loop.remove_signal_handler(number):
                signal.signal(number, handlers[number])

    for number in handlers:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not in the main thread
            loop.add_signal_handler(number, interrupt, number)
    try:
        await crawler.crawl_async(**arguments)
    finally:
        for number in handlers:
            restore(number)


def _settings(manners: Manners) -> dict[str, Any]:
    here = politeness.__name__
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
        "DOWNLOAD_TIMEOUT": rules.TIMEOUT,
        "DOWNLOAD_MAXSIZE": MAX_BYTES,
        "DOWNLOAD_WARNSIZE": 0,
        "DOWNLOAD_VERIFY_CERTIFICATES": True,
        "RETRY_TIMES": rules.RETRIES,
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
            f"{here}.Enough": 90, f"{here}.PublicOnly": 95,
            "scrapy.downloadermiddlewares.robotstxt.RobotsTxtMiddleware": None, f"{here}.Robots": 100,
        },
    }  # fmt: skip
