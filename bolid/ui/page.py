"""The page: three tabs over one workspace, and its HTTP API."""

from __future__ import annotations

import os
from typing import Any

import bolid
from bolid.ui.access import Access
from bolid.ui.photos import MAX_BYTES
from bolid.ui.workspace import Workspace

MAX_WAITING = 64  # clients in the queue


def make_page(workspace: Workspace) -> Any:
    """The page as Gradio's Blocks."""
    import gradio as gr

    from bolid.ui.compare_tab import CompareTab
    from bolid.ui.endpoints import Endpoints
    from bolid.ui.naming import POSED, PROMPT, name_person
    from bolid.ui.person_tab import PersonTab
    from bolid.ui.picture_tab import PictureTab

    note = "its models know rendered people only" if workspace.family.name == "tiny" else ""
    with gr.Blocks(title="BoLID", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(
            "<h1>BoLID</h1><p>Pictures of people that keep the body as well as the face. "
            f"<span class='by'>Family {workspace.family.name}{': ' + note if note else ''}.</span></p>",
            elem_id="head",
        )  # fmt: skip
        with gr.Tabs():
            with gr.Tab("Person", id="person"):
                person = PersonTab(workspace)
            with gr.Tab("Picture", id="picture"):
                picture = PictureTab(workspace)
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(workspace)
        Endpoints(workspace)

        everywhere = [person.person, picture.who, compare.who, compare.report_person]

        def people(now: str | None, *chosen: Any) -> list[Any]:
            """Every list of people, with what is chosen in it kept as far as it is there."""
            names = workspace.people.names()
            now = now if now in names else (names[0] if names else None)
            several = [[name for name in one or [] if name in names] for one in chosen[:2]]
            several = [one if len(one) > 1 or not now else [now] for one in several]
            return [gr.Dropdown(names, value=value) for value in (now, *several, now)]

        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        page.load(people, everywhere, everywhere, **quick)
        person.person.change(lambda now, *chosen: people(now, *chosen)[1:], everywhere, everywhere[1:], **quick)
        name_person(workspace, person.person, {picture.prompt: POSED, compare.prompt: PROMPT})
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=True)
    return page


def make_app(workspace: Workspace, token: str | None = None) -> Any:
    """The page as an ASGI application, with its limits: who may use it, and how large a file may be."""
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.uploads.resolve())  # before Gradio is loaded
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import fastapi
    import gradio as gr

    from bolid.ui.theme import CSS, NO_REQUESTS, theme

    page = make_page(workspace)
    served = [
        str(folder.resolve()) for folder in (workspace.people.profiles, workspace.people.pictures, workspace.poses)
    ]
    app = gr.mount_gradio_app(
        fastapi.FastAPI(title="BoLID", version=bolid.__version__, openapi_url=None), page, path="/",
        allowed_paths=served, max_file_size=MAX_BYTES, theme=theme(), css=CSS, head=NO_REQUESTS, show_error=True,
        footer_links=[], run_history=False, ssr_mode=False, pwa=False, enable_monitoring=False,
    )  # fmt: skip
    page.has_launched = True  # Gradio checks the paths of files only then
    return Access(app, token)
