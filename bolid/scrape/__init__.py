"""`bolid scrape`: photos from a folder, a list of addresses or a gallery, cleaned, deduplicated and on record."""

from __future__ import annotations

from bolid.scrape.command import ScrapeResult, TooManyFailed, scrape

__all__ = ["ScrapeResult", "TooManyFailed", "scrape"]
