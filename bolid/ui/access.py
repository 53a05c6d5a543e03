"""Who may use the page: this machine alone, or with `--listen` whoever has the token."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

COOKIE = "bolid_token"
LOCAL = ("127.0.0.1", "localhost", "[::1]")

App = Callable[[Mapping[str, Any], Any, Any], Awaitable[None]]


class Access:
    """An ASGI application that lets through to `app` what may pass.

    Without a `token`: requests to a name of this machine, so that no other web page can reach it by a name of its own.
    With one: those that carry it in the header `Authorization: Bearer`, in the cookie, or once as `?token=`, which
    sets the cookie.
    """

    def __init__(self, app: App, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # the page uses no websockets
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            await _answer(send, 403, b"another web page may not use this one\n")
            return
        if self.token is None:
            host = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else "[::1]"
            if host in LOCAL:
                await self.app(scope, receive, send)
            else:
                await _answer(send, 403, b"this page answers to 127.0.0.1 and localhost only\n")
            return
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if self._is_token(query.pop("token", "")):
            where = scope["path"] + (f"?{urlencode(query)}" if query else "")
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            await _answer(send, 303, b"", {"location": where, "set-cookie": cookie})
        elif self._is_token(headers.get("authorization", "").removeprefix("Bearer ")) or self._is_token(
            _cookie(headers)
        ):
            await self.app(scope, receive, send)
        else:
            await _answer(send, 401, b"this page wants a token: open the address that bolid ui has printed\n")

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def _cookie(headers: Mapping[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


async def _answer(send: Any, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    fields = {"content-type": "text/plain; charset=utf-8", **(headers or {})}
    lines = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
