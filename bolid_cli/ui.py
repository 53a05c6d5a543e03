"""``bolid ui``."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from bolid_cli._console import DeviceOption, FamilyOption, QuietOption, choose_family
from bolid_cli._streams import emit


def ui(
    folder: Annotated[
        Path, typer.Option("--folder", help="Work folder for people and pictures. Nothing else is read or written.")
    ] = Path("bolid-ui"),
    port: Annotated[int, typer.Option(help="Port of the page. 0: one that is free.", min=0, max=65535)] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    listen: Annotated[
        bool,
        typer.Option(
            "--listen", help="Answer to other machines too. They need the token in the address that is printed."
        ),
    ] = False,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Look and try in a browser: a person from photos, sliders in centimetres, pictures, comparisons.

    The page's address goes to standard output. Its functions are an HTTP API too. Ctrl-C ends it; people and pictures
    stay in the folder. With --listen the token is BOLID_UI_TOKEN, or a new one each time. Needs: pip install
    'bolid[ui]'.
    """
    import bolid.ui

    choose_family(family, quiet)

    def ready(address: str) -> None:
        emit(address)
        if browser and not listen:
            webbrowser.open(address)

    bolid.ui.ui(folder, port=port, listen=listen, family=family, device=device, ready=ready)
