"""BoLID: personalised pictures of people that keep the body as well as the face.

``bolid.api`` has the chain from photos to pictures as functions. The modules are called like the commands of the
``bolid`` program. ``import bolid`` loads no library and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from bolid.errors import BolidError

__version__ = "0.1.0"
__all__ = ["BolidError", "__version__", "api"]


def __getattr__(name: str) -> Any:
    if name == "api":
        return importlib.import_module("bolid.api")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
