"""`bolid scrape`: photos from a folder, a list of addresses or a gallery, cleaned, deduplicated and on record."""

from __future__ import annotations

from bolid.scrape.collection import ScrapeResult, TooManyFailed
from bolid.scrape.command import scrape

__all__ = ["ScrapeResult", "TooManyFailed", "scrape"]
