"""The page's tab Picture: a prompt and people in, pictures out, to repeat, compare and copy as a command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from bolid.body.mesh import poses
from bolid.errors import BolidError
from bolid.run import LARGEST_SEED
from bolid.ui.messages import TIME, WITH_TIME, read_number, readable_errors, settings_html, short, stage_html
from bolid.ui.naming import POSED
from bolid.ui.pictures import MAX_PICTURES, NOBODY, UPSCALES, Cancelled, GeneratedPicture, PictureRequest
from bolid.ui.workspace import Workspace

_SIDE = 560  # pixels: pictures before and after are shown so high


class PictureTab:
    """The components of the tab, and their events."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=330):
                self._form()
            with gr.Column(scale=7, min_width=330):
                self._results()
        self.pictures = gr.State([])  # GeneratedPicture, the newest first
        self.chosen, self.marked = gr.State(None), gr.State(None)  # GeneratedPicture
        self.requested_at = gr.Number(visible=False)  # milliseconds
        self._wire()

    # ---- layout

    def _form(self) -> None:
        family = self.workspace.family
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, elem_id="prompt", autofocus=True,
            value=POSED.format("woman"),
        )  # fmt: skip
        self.who = gr.Dropdown([], label="Who", info="each in pictures of their own; empty: nobody in particular",
                               multiselect=True, elem_id="who")  # fmt: skip
        with gr.Row():
            self.pose = gr.Dropdown([("as prompted", ""), *((pose, pose) for pose in poses())], value="",
                                    label="Pose", min_width=200, elem_id="pose",
                                    visible=family.has("depth_controlnet"))  # fmt: skip
            self.size = gr.Dropdown(_sizes(*family.image_size), value=1, label="Size", min_width=200, elem_id="size",
                                    visible=family.has("upscaler"))  # fmt: skip
        with gr.Row(elem_classes="strengths"):
            usual = {branch: float(family.defaults.get(f"{branch}_scale", 1.0)) for branch in ("face", "body")}
            self.face, self.body = (
                gr.Slider(0, 1.5, value=usual[b], step=0.05, label=f"{b.capitalize()} strength", min_width=200,
                          buttons=[], elem_id=f"{b}-scale") for b in ("face", "body")
            )  # fmt: skip
        with gr.Row():
            self.number = gr.Slider(1, MAX_PICTURES, value=1, step=1, label="Pictures", min_width=200, buttons=[])
            self.seed = gr.Textbox("0", label="Seed", max_length=19, min_width=200, elem_id="seed")
        with gr.Accordion("More settings", open=False, elem_id="more"):
            self.photo = gr.File(label="Pose of the person in this photo", file_types=["image"], height=150,
                                 visible=family.has("controlnet"))  # fmt: skip
            with gr.Row():
                # Texts: a number field that is empty comes as 0.
                usual_guidance = family.defaults.get("guidance", 5)
                self.steps, self.guidance = (
                    gr.Textbox(label=label, placeholder=f"usual: {value}", max_length=8, min_width=110)
                    for label, value in (("Steps", family.steps), ("Guidance", usual_guidance))
                )
            self.negative = gr.Textbox(label="What not to show")
            self.refine = gr.Checkbox(False, label="Sample small faces again, larger", elem_id="refine-face")
            self.few = gr.Checkbox(False, label="Few steps: faster, without guidance", visible=bool(family.few_steps))
        with gr.Row():
            self.start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=140)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=80)
        self.form = {
            "prompt": self.prompt, "face_scale": self.face, "body_scale": self.body, "number": self.number,
            "seed": self.seed, "steps": self.steps, "guidance": self.guidance, "negative": self.negative,
            "few_steps": self.few, "pose_from": self.photo, "pose": self.pose, "upscale": self.size,
            "refine_face": self.refine,
        }  # fmt: skip

    def _results(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=250):
                self.stage = gr.HTML(stage_html(), elem_id="stage")
            with gr.Column(scale=5, min_width=300, visible=False) as self.details:
                self.settings = gr.HTML(elem_id="settings")
                self.command = gr.Textbox(label="As a command", lines=2, interactive=False, buttons=["copy"],
                                          elem_id="command")  # fmt: skip
                with gr.Row():
                    self.again = gr.Button("Repeat", elem_id="repeat", min_width=90)
                    self.mark = gr.Button("Mark to compare", elem_id="mark", min_width=90)
                self.before = gr.Button("Compare with the base", elem_id="compare-base")
                self.beside = gr.Button("Compare with the marked one", visible=False, elem_id="compare-marked")
        self.slider = gr.ImageSlider(label="Before and after", visible=False, max_height=_SIDE, interactive=False,
                                     elem_id="before-after", buttons=["fullscreen"])  # fmt: skip
        self.gallery = gr.Gallery(
            label="Pictures, the newest first", columns=5, height="auto", object_fit="contain", format="png",
            interactive=False, elem_id="gallery", preview=False, allow_preview=False, visible=False,
        )  # fmt: skip

    # ---- events

    def _wire(self) -> None:
        models: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private",
                                  "js": WITH_TIME, "show_progress_on": [self.stage]}  # fmt: skip
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        form = [self.who, *self.form.values()]
        shown = [self.stage, self.details, self.settings, self.command, self.chosen, self.slider]
        out = [*shown, self.gallery, self.pictures]
        refill = self.again.click(readable_errors(self._refill), self.chosen, form, **quick)
        for trigger in (self.start.click, self.prompt.submit, refill.then):
            trigger(readable_errors(self._generate), [self.pictures, self.chosen, *form, self.requested_at], out,
                    trigger_mode="multiple", **models)  # a click while one is ending counts  # fmt: skip
        self.before.click(
            readable_errors(self._with_base), [self.chosen, self.requested_at], [self.stage, self.slider], **models
        )
        self.stop.click(self._stop, self.requested_at, None, js=TIME, **quick)
        self.gallery.select(readable_errors(self._choose), self.pictures, shown, **quick)
        self.mark.click(
            lambda picture: (picture, gr.Button(visible=True)), self.chosen, [self.marked, self.beside], **quick
        )
        self.beside.click(readable_errors(self._side_by_side), [self.marked, self.chosen], self.slider, **quick)

    def _request(self, **form: Any) -> PictureRequest:
        """What is in the form, by the names of `PictureRequest`."""
        seed = (form["seed"] or "").strip()
        if not seed.isdecimal():
            raise BolidError(f"the seed is {seed!r}", f"give a whole number from 0 to {LARGEST_SEED}")
        photo = form["pose_from"]
        form |= {
            "prompt": (form["prompt"] or "").strip(), "negative": (form["negative"] or "").strip(), "seed": int(seed),
            "number": int(form["number"]), "steps": read_number("steps", form["steps"], int),
            "guidance": read_number("guidance", form["guidance"]),
            "pose_from": None if photo is None else self.workspace.keep_pose(Path(photo)), "pose": form["pose"] or "",
        }  # fmt: skip
        return PictureRequest(**form)

    def _generate(
        self,
        session: gr.Request,
        pictures: list[GeneratedPicture],
        chosen: GeneratedPicture | None,
        who: list[str],
        *form: Any,
    ) -> Iterator[Any]:
        *settings, requested_at = form
        request, nothing = self._request(**dict(zip(self.form, settings, strict=True))), [gr.skip()] * 7
        yield [stage_html(words="the models are getting ready"), *nothing]
        try:
            for event in self.workspace.pictures(_job(session), request, who or [], requested_at):
                if isinstance(event, GeneratedPicture):
                    pictures, chosen = [event, *pictures], event
                    yield [*self._details(event), _gallery(pictures), pictures]
                else:
                    yield [stage_html(event), *nothing]
        except Exception as error:
            yield [stage_html(chosen, words="stopped"), *nothing]
            if not isinstance(error, Cancelled):
                raise

    def _stop(self, session: gr.Request, until: float) -> None:
        """End what was begun until then. The stage is the run's own to write, so that its last words are the last."""
        self.workspace.stop(_job(session), until)

    def _details(self, picture: GeneratedPicture) -> list[Any]:
        shown = [
            gr.Column(visible=True),
            settings_html(picture),
            picture.command,
            picture,
            gr.ImageSlider(visible=False),
        ]
        return [stage_html(picture), *shown]

    def _choose(self, pictures: list[GeneratedPicture], event: gr.SelectData) -> list[Any]:
        chosen = pictures[event.index]
        if not chosen.path.exists():
            raise BolidError("this picture was deleted", "choose another one")
        return self._details(chosen)

    def _refill(self, picture: GeneratedPicture) -> list[Any]:
        """The form with the settings of a picture."""
        names = [] if picture.who == NOBODY else [self.workspace.people.path(picture.who).stem]
        shown: dict[str, Any] = {name: short(getattr(picture.request, name)) for name in ("seed", "steps", "guidance")}
        shown["pose_from"] = picture.request.pose_from and str(picture.request.pose_from)
        return [names, *({**vars(picture.request), **shown}[name] for name in self.form)]

    def _with_base(self, session: gr.Request, picture: GeneratedPicture, requested_at: float) -> Iterator[Any]:
        """The same prompt and seed without anybody, beside the picture."""
        request = replace(picture.request, face_scale=None, body_scale=None)
        try:
            for event in self.workspace.pictures(_job(session), request, [], requested_at):
                if isinstance(event, GeneratedPicture):
                    yield [stage_html(picture), self._side_by_side(event, picture)]
                else:
                    yield [stage_html(event), gr.skip()]
        except Exception as error:
            yield [stage_html(picture, words="stopped"), gr.skip()]
            if not isinstance(error, Cancelled):
                raise

    def _side_by_side(self, left: GeneratedPicture, right: GeneratedPicture) -> Any:
        from PIL import Image

        images = [Image.open(one.path).convert("RGB") for one in (left, right)]
        width, height = max(image.size for image in images)
        size = round(_SIDE * width / height), _SIDE
        shown = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
        return gr.ImageSlider(tuple(shown), visible=True, label=f"{_named(left)} | {_named(right)}")


def _sizes(height: int, width: int) -> list[tuple[str, int]]:
    """(what the page says, how many times enlarged) for each size of the pictures."""
    return [(f"{width * times} x {height * times}", times) for times in UPSCALES]


def _gallery(pictures: list[GeneratedPicture]) -> Any:
    return gr.Gallery([(str(one.path), _named(one)) for one in pictures], visible=len(pictures) > 1)


def _named(picture: GeneratedPicture) -> str:
    scales = picture.record.get("config", {}).get("scales", {})
    words = ", ".join(f"{branch} {scale}" for branch, scale in scales.items() if scale != 1.0)
    return ("the base" if picture.who == NOBODY else picture.who) + (f" ({words})" if words else "")


def _job(session: gr.Request) -> str:
    return f"page {session.session_hash}"
