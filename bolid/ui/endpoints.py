"""The page's HTTP API: functions by name, under /gradio_api/call/NAME. docs/guides/page.md has examples.

A job's id is the `event_id` that starting it returns. Files are dicts as Gradio's clients send and take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from bolid.errors import BolidError
from bolid.ui.messages import read_number, readable_errors
from bolid.ui.pictures import Cancelled, GeneratedPicture, PictureRequest
from bolid.ui.workspace import NewPerson, Workspace


class Endpoints:
    """The functions; Gradio reads their names, types and docstrings."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        models: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
        body: dict[str, Any] = {"concurrency_id": "body", "concurrency_limit": 1}
        free: dict[str, Any] = {"concurrency_limit": None}
        functions = (
            (self.people, free), (self.profile, models), (self.synthetic, models), (self.measurements, body),
            (self.edit, body), (self.mannequin, body), (self.generate, models), (self.cancel, free),
            (self.delete, free),
        )  # fmt: skip
        for function, limits in functions:
            gr.api(readable_errors(function), api_name=function.__name__, **limits)

    def people(self) -> list[str]:
        """The names of the people."""
        return self.workspace.people.names()

    def profile(
        self, name: str, photos: list[dict], known: dict[str, str] | None = None, sex: str = ""
    ) -> tuple[dict, dict]:
        """Make a profile of uploaded photos and known measurements ({"height": "172"}).

        Returns the detections and measurements, and the file.
        """
        if not isinstance(photos, list) or not isinstance(known, dict | None):
            raise BolidError("photos is no list, or known no dict", 'give [{"path": ...}, ...] and {"height": "172"}')
        return self._described(self.workspace.create_profile(name, [_path(photo) for photo in photos], known, sex))

    def synthetic(self, name: str, seed: int) -> tuple[dict, dict]:
        """Make a profile of a synthetic person; `seed` from 200000 to 599999. Returns as `profile`."""
        return self._described(self.workspace.create_synthetic(name, read_number("seed", seed, int)))

    def measurements(self, name: str) -> list[dict]:
        """What a person's body measures: name, title, unit, value, sd, percentile."""
        return [_row(row) for row in self.workspace.shape(name, {})[1]]

    def edit(self, name: str, wanted: dict[str, float], new_name: str, hold: bool = True) -> tuple[dict, dict]:
        """Save a person with other measurements ({"waist": 70}, in centimetres) under a new name."""
        got = self.workspace.edit(name, _numbers(wanted), hold, new_name)
        rows = self.workspace.shape(got, {})[1]
        return {"name": got, "measurements": [_row(row) for row in rows]}, _file(self.workspace.people.path(got))

    def mannequin(self, name: str, wanted: dict[str, float] | None = None) -> dict:
        """The body as a GLB file, with other measurements where some are wanted."""
        return _file(self.workspace.mannequin(self.workspace.shape(name, _numbers(wanted or {}))[0]))

    def generate(  # noqa: PLR0913
        self, prompt: str, people: list[str], number: int = 1, seed: int = 0, face_scale: float | None = None,
        body_scale: float | None = None, steps: int | None = None, guidance: float | None = None, negative: str = "",
        few_steps: bool = False, pose: str = "", upscale: int = 1, refine_face: bool = False,
    ) -> Iterator[tuple[dict, list[dict]]]:  # fmt: skip
        """Make pictures. Yields the progress, and the files so far: PNGs that carry their record."""
        job = LocalContext.event_id.get(None) or ""
        request = PictureRequest(
            str(prompt or "").strip(), read_number("face_scale", face_scale), read_number("body_scale", body_scale),
            read_number("number", number, int), read_number("seed", seed, int), read_number("steps", steps, int),
            read_number("guidance", guidance), str(negative or ""), bool(few_steps), pose=str(pose or ""),
            upscale=read_number("upscale", upscale, int), refine_face=bool(refine_face),
        )  # fmt: skip
        if not isinstance(people, list):
            raise BolidError(f"people is {people!r}", 'give a list of names, like ["Anna"]')
        state: dict[str, Any] = {"job": job, "state": "waiting for the models"}
        files: list[dict] = []
        commands: list[str] = []
        yield state, files
        try:
            for event in self.workspace.pictures(job, request, people):
                if isinstance(event, GeneratedPicture):
                    files, commands = [*files, _file(event.path)], [*commands, event.command]
                    state = {**state, "commands": commands}
                else:
                    state = {**state, "state": "sampling", "done": event.done, "total": event.total, "step": event.step,
                             "steps": event.steps}  # fmt: skip
                yield state, files
            yield {**state, "state": "finished", "done": len(files)}, files
        except Cancelled:
            yield {**state, "state": "cancelled", "done": len(files)}, files

    def cancel(self, job: str) -> bool:
        """End a job of `generate` within a step, or before it begins. Returns whether it was under way."""
        return self.workspace.stop(job)

    def delete(self, name: str) -> dict:
        """Delete a person and the pictures of this person."""
        return {"pictures": self.workspace.delete(name), "people": self.workspace.people.names()}

    def _described(self, person: NewPerson) -> tuple[dict, dict]:
        photos = [
            {"photo": photo.name, "weight": photo.report.weight, "face": photo.report.face, "rejected": photo.reason}
            for photo in person.detections
        ]
        description = {
            "name": person.name, "photos": photos, "face": person.result.has_face,
            "uncertainty": person.result.uncertainty, "measurements": [_row(row) for row in person.result.measurements],
        }  # fmt: skip
        return description, _file(self.workspace.people.path(person.name))


def _path(file: Any) -> str:
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        raise BolidError(f"{str(file)[:80]} is no uploaded file", "upload it first, and give its path as {'path': ...}")
    return file["path"]


def _file(path: Path) -> dict:
    """A file as Gradio's clients fetch it."""
    where = str(path.resolve())
    return {
        "path": where,
        "url": f"/gradio_api/file={where}",
        "orig_name": path.name,
        "meta": {"_type": "gradio.FileData"},
    }


def _row(row: Any) -> dict:
    return {
        "name": row.name, "title": row.title, "unit": row.unit, "value": round(row.value, 2), "sd": round(row.sd, 2),
        "percentile": round(row.percentile, 1), "known": row.known,
    }  # fmt: skip


def _numbers(wanted: Any) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in wanted.items()}
    except (AttributeError, TypeError, ValueError):
        raise BolidError(
            f"{str(wanted)[:80]} are no measurements", 'give numbers by name, like {"waist": 70}'
        ) from None
