"""The page's tab Compare: a grid over two settings, and the report of `bolid evaluate`."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from bolid.ui.messages import TIME, WITH_TIME, readable_errors, stage_html
from bolid.ui.naming import PROMPT
from bolid.ui.pictures import Cancelled
from bolid.ui.workspace import Workspace

_AXES = {
    "body strength": "body-scale", "face strength": "face-scale", "guidance": "guidance", "steps": "steps",
    "seed": "seed",
}  # fmt: skip

_REPORT = """### Report
How near the pictures of the tab Picture come to a person, by photos that did not make the profile. Of a synthetic
person such photos are rendered."""


class CompareTab:
    """The components of the tab, and their events."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=330):
                self.prompt = gr.Textbox(PROMPT.format("woman"), label="Prompt", lines=2, elem_id="compare-prompt")
                self.who = gr.Dropdown([], label="Who", multiselect=True, elem_id="compare-who")
                with gr.Row():
                    self.across = gr.Dropdown(list(_AXES), value="body strength", label="Across", min_width=150)
                    self.across_values = gr.Textbox("0, 0.5, 1", label="Its values", min_width=130)
                with gr.Row():
                    self.down = gr.Dropdown(["nothing", *_AXES], value="seed", label="Down", min_width=150)
                    self.down_values = gr.Textbox("1, 2", label="Its values", min_width=130)
                with gr.Row():
                    self.start = gr.Button("Make the grid", variant="primary", elem_id="make-grid", min_width=140)
                    self.stop = gr.Button("Stop", min_width=80)
            with gr.Column(scale=6, min_width=330):
                self.progress = gr.HTML()
                self.contact_sheet = gr.Image(label="Grid", type="filepath", format="png", interactive=False,
                                              elem_id="sheet", buttons=["download", "fullscreen"])  # fmt: skip
        gr.Markdown(_REPORT)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=330):
                self.report_person = gr.Dropdown([], label="Person", elem_id="report-person")
                self.photos = gr.File(
                    label="Other photos of this person", file_count="multiple", file_types=["image"], height=150
                )
                self.evaluate = gr.Button("Make the report", elem_id="make-report")
            with gr.Column(scale=6, min_width=330):
                self.report = gr.HTML(elem_id="report", elem_classes="report")
        self._wire()

    def _wire(self) -> None:
        models: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        requested_at = gr.Number(visible=False)  # milliseconds
        form = [self.prompt, self.who, self.across, self.across_values, self.down, self.down_values]
        self.start.click(
            readable_errors(self._grid), [*form, requested_at], [self.progress, self.contact_sheet], js=WITH_TIME,
            show_progress_on=[self.progress], **models,
        )  # fmt: skip
        self.stop.click(
            self._stop, requested_at, None, js=TIME, queue=False, api_visibility="private", show_progress="hidden"
        )
        self.evaluate.click(readable_errors(self._report), [self.report_person, self.photos], self.report, **models)

    def _grid(
        self,
        session: gr.Request,
        prompt: str,
        who: list[str],
        across: str,
        across_values: str,
        down: str,
        down_values: str,
        requested_at: float,
    ) -> Iterator[Any]:
        axes = {_AXES[across]: across_values or ""}
        if down in _AXES:
            axes[_AXES[down]] = down_values or ""
        try:
            for event in self.workspace.grid(_job(session), prompt or "", who or [], axes, requested_at):
                yield [stage_html(event), gr.skip()] if not isinstance(event, str) else ["", event]
        except Exception as error:
            yield [stage_html(words="stopped"), gr.skip()]
            if not isinstance(error, Cancelled):
                raise

    def _stop(self, session: gr.Request, until: float) -> None:
        self.workspace.stop(_job(session), until)

    def _report(self, name: str | None, photos: list[str] | None) -> str:
        page = self.workspace.report(name or "", photos or [])
        return f"<iframe title='report' sandbox='' srcdoc='{html.escape(page)}'></iframe>"


def _job(session: gr.Request) -> str:
    return f"grid {session.session_hash}"
