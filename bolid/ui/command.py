"""`bolid ui`: a local page to look and try, with an HTTP API."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from bolid.errors import BolidError

if TYPE_CHECKING:
    import uvicorn

    from bolid.ui.workspace import Workspace


def ui(
    folder: str | os.PathLike[str] = "bolid-ui",
    *,
    port: int = 7860,
    listen: bool = False,
    family: str | None = None,
    device: str = "auto",
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until it is interrupted.

    `folder`: where people and pictures are kept; nothing else is read or written. `listen`: to other machines too, that
    have the token: BOLID_UI_TOKEN, by default a new one. `ready` is called with the page's address once it answers.
    Raises BolidError without gradio, for a port that is taken, and for a family whose models are missing.
    """
    if importlib.util.find_spec("gradio") is None:
        raise BolidError("the page needs gradio, which is not installed", "pip install 'bolid[ui]'")
    from bolid.ui.workspace import Workspace

    host = "0.0.0.0" if listen else "127.0.0.1"
    token = os.environ.get("BOLID_UI_TOKEN") or secrets.token_urlsafe(18) if listen else None
    bound = _bind(host, port)
    workspace = Workspace(folder, family, device)
    for part in ("base", "pose", "face", "image_text", "body_encoder"):
        workspace.family.require(part)
    threading.Thread(target=_warm_up, args=(workspace,), daemon=True).start()  # while gradio is loaded
    import uvicorn

    from bolid.ui.page import make_app

    address = f"http://{socket.gethostname() if listen else '127.0.0.1'}:{bound.getsockname()[1]}/"
    config = uvicorn.Config(make_app(workspace, token), log_level="warning", timeout_graceful_shutdown=2, ws="none")
    server = uvicorn.Server(config)
    if ready is not None:
        threading.Thread(
            target=_when_started, args=(server, ready, address + (f"?token={token}" if token else ""))
        ).start()
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            server.run(sockets=[bound])
    finally:
        workspace.close()


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise BolidError(
            f"port {port} cannot be used: {error.strerror}", "choose another --port; 0 takes one that is free"
        ) from error
    return bound


def _warm_up(workspace: Workspace) -> None:
    try:
        workspace.warm_up()
    except Exception as error:  # the first picture will say it
        logging.getLogger("bolid.ui").warning("the models could not be loaded yet: %s", error)


def _when_started(server: uvicorn.Server, ready: Callable[[str], None], address: str) -> None:
    while not server.started and not server.should_exit:
        time.sleep(0.05)
    if server.started:
        ready(address)
