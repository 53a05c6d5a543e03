"""The page's tab Person: photos in, what the models detect in them, the mannequin, and sliders that move it."""

from __future__ import annotations

import html
import random
from pathlib import Path
from typing import Any

import gradio as gr

from bolid.errors import BolidError
from bolid.ui.body_sliders import Slider, sliders
from bolid.ui.messages import detections_html, readable_errors
from bolid.ui.workspace import SYNTHETIC, NewPerson, Workspace

_WITHOUT_PHOTOS = """<p class='quiet'>Without photos: a synthetic person is rendered first and has a face; an invented
one is measurements alone.</p>"""
_WELCOME = """<div class='welcome'><h3>Nobody is here yet</h3><ol>
<li>Make somebody: drop photos of one person, or press <b>Synthetic person</b>.{note}</li>
<li>Move the body with sliders, in centimetres.</li>
<li>Open the tab <b>Picture</b> and write a prompt.</li></ol></div>"""
_RENDERED = " This family knows rendered people only: begin with a synthetic one."
_KNOWN = (("height", "cm", "172"), ("waist", "cm", "80±2"), ("weight", "kg", "65"))
_QUESTION = "(name) => name && confirm(`Delete ${name}, and the pictures of this person?`) ? name : ''"


class PersonTab:
    """The components of the tab, and their events."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.sliders = workspace, sliders()
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=330):
                self._new_person()
            with gr.Column(scale=6, min_width=330):
                note = _RENDERED if workspace.family.name == "tiny" else ""
                self.welcome = gr.HTML(_WELCOME.format(note=note), elem_classes="welcome-block")
                with gr.Column(visible=False) as self.body:
                    self._body()
        self.wanted = gr.State({})  # measurement -> cm (kg), of the sliders that were moved
        self._wire()

    # ---- layout

    def _new_person(self) -> None:
        self.person = gr.Dropdown([], label="Person", elem_id="person")
        with gr.Row():
            self.open = gr.UploadButton("Open a profile", file_types=[".safetensors"], size="sm", min_width=90)
            self.download = gr.DownloadButton("Download", size="sm", interactive=False, min_width=80)
            self.delete = gr.Button("Delete", size="sm", elem_id="delete", interactive=False, min_width=60)
        gr.Markdown("### Somebody new")
        self.name = gr.Textbox(label="Name", placeholder="Somebody", max_length=40, elem_id="name")
        self.photos = gr.File(
            label="Photos of one person", file_count="multiple", file_types=["image"], height=150, elem_id="photos"
        )
        self.folder = gr.UploadButton("A folder of photos", file_count="directory", size="sm")
        with gr.Accordion("Known measurements", open=False):
            with gr.Row():
                self.known = {
                    name: gr.Textbox(label=f"{name.capitalize()}, {unit}", placeholder=example, min_width=90)
                    for name, unit, example in _KNOWN
                }
            self.sex = gr.Radio([("not given", ""), "woman", "man"], value="", label="Sex")
        self.make = gr.Button("Make profile", variant="primary", elem_id="make")
        gr.HTML(_WITHOUT_PHOTOS)
        with gr.Row():
            self.synthetic = gr.Button("Synthetic person", elem_id="synthetic", min_width=120)
            self.invent = gr.Button("Invented person", elem_id="invent", min_width=120)
        self.detections = gr.HTML(elem_id="detections")

    def _body(self) -> None:
        self.mannequin = gr.Model3D(
            label="Mannequin: drag to turn it", height=460, clear_color=(0.0, 0.0, 0.0, 0.0), elem_id="mannequin",
            camera_position=(90, 84, None), zoom_speed=0.6, interactive=False,
        )  # fmt: skip
        with gr.Row(elem_classes="measures"):
            self.measures = [
                gr.Slider(s.low, s.high, step=0.1, value=s.low, label=_label(s), interactive=False, buttons=[],
                          min_width=230, elem_id=f"slider-{s.name}") for s in self.sliders
            ]  # fmt: skip
        self.hold = gr.Checkbox(True, label="Hold the other measurements while one moves", container=False)
        with gr.Row(equal_height=False):
            self.new_name = gr.Textbox(label="Save the moved body as", placeholder="Anna slimmer", max_length=40,
                                       min_width=180, scale=3, elem_id="new-name")  # fmt: skip
            self.save = gr.Button("Save", elem_id="save-body", min_width=80)
            self.back = gr.Button("Undo", elem_id="back", min_width=80)

    # ---- events

    def _wire(self) -> None:
        shown = [self.welcome, self.body, self.delete, self.download, self.wanted, self.new_name,
                 *self.measures]  # fmt: skip
        created = [self.person, self.name, self.photos, self.detections]
        models: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        body: dict[str, Any] = {"concurrency_id": "body", "concurrency_limit": 1, "api_visibility": "private"}
        new = [self.name, self.photos, self.sex, *self.known.values()]
        works = {self.make: self._from_photos, self.synthetic: self._synthetic, self.invent: self._invented}
        for button, work in works.items():
            button.click(readable_errors(work), new, created, show_progress_on=[self.detections], **models)
        self.folder.upload(lambda files: files, self.folder, self.photos, api_visibility="private")
        self.open.upload(readable_errors(self._opened), self.open, self.person, api_visibility="private")
        for event in (self.person.change, self.back.click):
            there = event(readable_errors(self._show), self.person, shown, show_progress="hidden", **body)
            there.then(readable_errors(self._mannequin), self.person, self.mannequin, show_progress="hidden", **body)
        for number, slider in enumerate(self.measures):
            slider.input(
                readable_errors(self._mover(number)), [self.person, self.wanted, self.hold, slider],
                [self.mannequin, self.wanted, *self.measures], trigger_mode="always_last", show_progress="hidden",
                **body,
            )  # fmt: skip
        moved = [self.person, self.wanted, self.hold, self.new_name]
        self.save.click(readable_errors(self._save), moved, self.person, show_progress="hidden", **body)
        self.delete.click(
            readable_errors(self._delete), self.person, self.person, js=_QUESTION, show_progress="hidden", **body
        )

    def _from_photos(self, name: str, photos: list[str] | None, sex: str, *known: str) -> Any:
        texts = dict(zip(self.known, known, strict=True))
        if not photos and not any(texts.values()):
            raise BolidError("no photo and no measurement given", "drop photos, or open the known measurements")
        return self._created(self.workspace.create_profile(name or "Somebody", photos or [], texts, sex))

    def _synthetic(self, name: str, *_: Any) -> Any:
        return self._created(self.workspace.create_synthetic(name or "Synthetic", random.choice(SYNTHETIC)))

    def _invented(self, name: str, *_: Any) -> Any:
        return self._created(self.workspace.create_invented(name or "Invented", random.randrange(2**31)))

    def _created(self, person: NewPerson) -> Any:
        result = person.result
        words = f"{person.name} is made of measurements alone: there is no face."
        if person.detections:
            words = f"{result.photos} of {len(person.detections)} photos of {person.name} count; uncertainty "
            words += f"{result.uncertainty:.2f} (1: nothing known). The photos are not needed any more."
        return self._people(person.name), "", None, detections_html(words, person.detections)

    def _opened(self, file: str) -> Any:
        return self._people(self.workspace.open_profile(Path(file)))

    def _people(self, name: str | None = None) -> Any:
        names = self.workspace.people.names()
        return gr.Dropdown(names, value=name if name in names else (names[0] if names else None))

    def _show(self, name: str | None) -> Any:
        if not name:
            buttons = [gr.Button(interactive=False), gr.DownloadButton(interactive=False)]
            return [gr.HTML(visible=True), gr.Column(visible=False), *buttons, {}, "", *self._still()]
        path = self.workspace.people.path(name)
        there = [gr.HTML(visible=False), gr.Column(visible=True), gr.Button(interactive=True)]
        there.append(gr.DownloadButton(value=str(path), interactive=True))
        try:
            _, rows = self.workspace.shape(name, {})
        except BolidError as error:  # of an encoder that knows no shape
            gr.Warning(html.escape(error.message))
            return [*there, {}, "", *self._still()]
        moved = [
            gr.Slider(value=round(row.value, 1), label=_label(slider, row.sd), interactive=True)
            for slider, row in zip(self.sliders, rows, strict=True)
        ]
        return [*there, {}, "", *moved]

    def _mannequin(self, name: str | None) -> str | None:
        """Comes when its place is there: Gradio does not draw one that comes together with it."""
        try:
            return str(self.workspace.mannequin(self.workspace.shape(name, {})[0])) if name else None
        except BolidError:  # `_show` has shown it
            return None

    def _still(self) -> list[Any]:
        """The sliders, which nobody can move."""
        return [gr.Slider(interactive=False) for _ in self.sliders]

    def _mover(self, number: int) -> Any:
        """What a slider does: the body follows, and so do the other sliders."""
        name = self.sliders[number].name

        def move(person: str, wanted: dict[str, float], hold: bool, value: float) -> Any:
            wanted = {**wanted, name: float(value)}
            shape, rows = self.workspace.shape(person, wanted, hold)
            sliders = [gr.skip() if i == number else gr.Slider(value=round(r.value, 1)) for i, r in enumerate(rows)]
            return [str(self.workspace.mannequin(shape)), wanted, *sliders]

        return move

    def _save(self, person: str, wanted: dict[str, float], hold: bool, new_name: str) -> Any:
        return self._people(self.workspace.edit(person, wanted, hold, new_name or f"{person} moved"))

    def _delete(self, name: str) -> Any:
        if not name:
            return gr.skip()
        pictures = self.workspace.delete(name)
        gr.Info(f"{html.escape(name)} is deleted, and {pictures} pictures")
        return self._people()


def _label(slider: Slider, sd: float | None = None) -> str:
    known = "," if sd is None else f" ± {sd:.1f}"
    return f"{slider.title.capitalize()}{known} {slider.unit}"
