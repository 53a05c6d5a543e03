"""Messages to clients: errors, progress, and the settings of a picture."""

from __future__ import annotations

import base64
import functools
import html
import inspect
import io
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from bolid.errors import BolidError
from bolid.ui.photos import enlarged
from bolid.ui.pictures import GeneratedPicture, SamplingProgress

if TYPE_CHECKING:
    from bolid.ui.workspace import PhotoDetection

_PREVIEW = 320  # pixels


WITH_TIME = "(...inputs) => [...inputs.slice(0, -1), Date.now()]"
"""JavaScript of a click that starts a job: its time, by the browser's clock, becomes the last input."""
TIME = "() => Date.now()"
"""JavaScript of a click that stops the jobs started before it."""


def _error_message(error: Exception) -> Any:
    """The error as Gradio shows it: a message and a hint, never a stack trace."""
    import gradio as gr

    if isinstance(error, BolidError):
        text = f"{error.message}. {error.hint[:1].upper()}{error.hint[1:]}." if error.hint else error.message
    else:
        logging.getLogger("bolid.ui").error("a fault in bolid", exc_info=error)
        text = f"unexpected {type(error).__name__}: this is a fault in bolid; its terminal shows where"
    return gr.Error(html.escape(text[:1200], quote=False), title="bolid", duration=20, print_exception=False)


def readable_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function or generator: its errors become messages that clients can read."""
    import gradio as gr

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise _error_message(error) from None

        return generator

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise _error_message(error) from None

    return call


def stage_html(picture: GeneratedPicture | SamplingProgress | None = None, words: str = "") -> str:
    """A finished picture, or the preview of an unfinished one with a progress bar and words."""
    bar, image = "", "<div class='empty'></div>"
    if isinstance(picture, GeneratedPicture):
        where = quote(str(picture.path.resolve()))
        image = f"<img alt='{html.escape(picture.request.prompt)}' src='/gradio_api/file={where}'>"
    elif picture is not None:
        share = (picture.done + picture.step / max(picture.steps, 1)) / max(picture.total, 1)
        words = f"picture {picture.done + 1} of {picture.total}, step {picture.step} of {picture.steps}"
        bar = f"<div class='bar'><i style='width:{100 * share:.0f}%'></i></div>"
        if picture.preview is not None:
            image = f"<img alt='preview' src='{_uri(picture.preview)}'>"
    status = f"<div class='words' role='status'>{html.escape(words)}</div>"
    return f"<div class='stage'>{image}{bar}{status}</div>"


def _uri(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    enlarged(Image.fromarray(pixels), _PREVIEW)[0].save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def detections_html(words: str, detections: Sequence[PhotoDetection]) -> str:
    """Words, and the photos with what the models detected."""
    figures = []
    for one in detections:
        report, text = one.report, f"left out: {one.reason}"
        if not one.reason:
            text = f"weight {report.weight:.2f}, {'face' if report.face else 'no face'}, to the {report.down_to}"
        image = f"<img alt='{html.escape(one.name)} as the models saw it' src='{_uri(np.asarray(one.picture))}'>"
        figures.append(f"<figure>{image}<figcaption>{html.escape(text)}</figcaption></figure>")
    grid = f"<div class='detections'>{''.join(figures)}</div>" if figures else ""
    return f"<p class='quiet'>{html.escape(words)}</p>{grid}"


def short(value: Any) -> str:
    """A setting as text; "" for None."""
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def read_number(name: str, value: Any, kind: Callable[[Any], Any] = float) -> Any:
    """A setting that a client gives as number or text; None for none. Raises BolidError for what is no number."""
    try:
        return None if value in (None, "") else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise BolidError(f"{name} is {str(value)[:80]!r}", "give a number") from None


def settings_html(picture: GeneratedPicture) -> str:
    """The settings of a picture, as a list."""
    record = picture.record
    config = record.get("config", {})
    scales = config.get("scales", {})
    rows = {
        "prompt": config.get("prompt"), "read as": config.get("encoded_prompt"), "who": picture.who,
        "strength": ", ".join(f"{branch} {short(scale)}" for branch, scale in scales.items()) or "the base alone",
        "steps": config.get("steps"), "guidance": short(config.get("guidance")), "not to show": config.get("negative"),
        "few steps": "yes" if config.get("few_steps") else None, "pose of": config.get("pose_from"),
        "pose": config.get("pose"), "enlarged": f"{config['upscale']} times" if "upscale" in config else None,
        "small faces": "sampled again" if config.get("refine_face") else None,
        "seed": record.get("seed"), "file": picture.path,
    }  # fmt: skip
    lines = "".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in rows.items() if v not in (None, ""))
    return f"<div class='settings'><dl>{lines}</dl></div>"
