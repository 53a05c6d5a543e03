"""The mannequin: front, left side and back of a body in A-pose, with measuring lines and their centimetres."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bolid.body.measurements import MEASUREMENTS, Tape, plane_axes, section
from bolid.body.rendering import View, clay, draw
from bolid.body.shape import within_bounds

if TYPE_CHECKING:
    from PIL import ImageDraw

_SIZE = (1180, 1800)  # height, width
_TOP, _FLOOR = 120, 1090
_COLUMNS = {"front": (0.0, 400), "side": (90.0, 1010), "back": (180.0, 1430)}  # turn, the pixel of the middle
_PAPER, _INK, _LINE = (250, 249, 247), (44, 42, 40), (200, 62, 44)
_SUPERSAMPLING = 2
_GIRTHS = ("neck", "chest", "upper-arm", "waist", "hip", "thigh")


def mannequin(
    tape: Tape, parameters: np.ndarray, values: Sequence[float], sd: Sequence[float], title: str = ""
) -> np.ndarray:
    """uint8 [1180, 1800, 3]: the body with parameters [P], labelled with `values` and `sd` [K] (metres, kilograms)."""
    from PIL import Image, ImageDraw

    body = tape.model.rest(within_bounds(parameters)[None])[0]
    scale = (_FLOOR - _TOP) / max(float(np.ptp(body[:, 2])), 1.55)
    paper = np.full((*_SIZE, 3), _PAPER, np.float64) / 255
    views = {}
    for name, (turn, middle) in _COLUMNS.items():
        fine = View(turn, scale * _SUPERSAMPLING, (middle * _SUPERSAMPLING, _FLOOR * _SUPERSAMPLING),
                    (_SIZE[0] * _SUPERSAMPLING, _SIZE[1] * _SUPERSAMPLING))  # fmt: skip
        buffer = draw(fine, body, tape.model.faces)
        layer = np.concatenate([clay(buffer), buffer.mask[..., None]], 2)
        layer = layer.reshape(_SIZE[0], _SUPERSAMPLING, _SIZE[1], _SUPERSAMPLING, 4).mean((1, 3))
        paper = layer[..., :3] + paper * (1 - layer[..., 3:])
        views[name] = (View(turn, scale, (middle, _FLOOR), _SIZE), buffer)
    picture = Image.fromarray((paper * 255 + 0.5).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    texts = _texts(values, sd)
    _girths(pen, tape, body, views, texts)
    _lengths(pen, tape, body, views, texts)
    pen.text((60, 36), title, _INK, font=_font(30))
    pen.text((60, 76), f"weight {texts['weight']} (volume x 985 kg/m3)", _INK, font=_font(20))
    return np.asarray(picture)


def _texts(values: Sequence[float], sd: Sequence[float]) -> dict[str, str]:
    return {
        row.name: f"{value * row.scale:.1f} ± {error * row.scale:.1f} {row.unit}"
        for row, value, error in zip(MEASUREMENTS, values, sd, strict=True)
    }


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _girths(pen: ImageDraw.ImageDraw, tape: Tape, body: np.ndarray, views: Mapping[str, Any], texts: dict) -> None:
    """The tapes on all three views, and their labels between the front and the side view."""
    rows = []
    for name in _GIRTHS:
        ring = tape_ring(tape, body, name)
        for view, buffer in views.values():
            _line(pen, view, buffer, ring)
        flat = views["front"][0].project(ring)
        rows.append((name, flat[flat[:, 0].argmax(), :2]))
    spots = _apart([float(point[1]) for _, point in rows], 46)
    for (name, point), y in zip(rows, spots, strict=True):
        x = 690
        pen.line([(float(point[0]) + 4, float(point[1])), (x - 34, y), (x - 8, y)], _LINE, 1)
        _label(pen, (x, y), name, texts[name])


def tape_ring(tape: Tape, body: np.ndarray, name: str) -> np.ndarray:
    """The closed line of a girth's tape [n, 3] on one body [V, 3]."""
    from scipy.spatial import ConvexHull

    plane = tape.plane(body, name)
    points = section(body, plane.edges, plane.origin, plane.normal)
    along, across = plane_axes(plane.normal)
    hull = points[ConvexHull(np.stack([points @ along, points @ across], 1)).vertices]
    closed = np.concatenate([hull, hull[:1]])
    parts = [a + np.linspace(0, 1, 12)[:-1, None] * (b - a) for a, b in itertools.pairwise(closed)]
    return np.concatenate([*parts, closed[:1]])


def _line(pen: ImageDraw.ImageDraw, view: View, buffer: Any, points: np.ndarray, width: int = 3) -> None:
    """A line in space, where the body does not hide it."""
    flat = view.project(points)
    at = (flat[:, :2] * _SUPERSAMPLING).astype(int).clip(0, np.array(buffer.depth.shape[::-1]) - 1)
    seen = flat[:, 2] < buffer.depth[at[:, 1], at[:, 0]] + 0.012
    for (a, b), visible in zip(itertools.pairwise(flat), seen, strict=False):
        if visible:
            pen.line([tuple(a[:2]), tuple(b[:2])], _LINE, width)


def _lengths(pen: ImageDraw.ImageDraw, tape: Tape, body: np.ndarray, views: Mapping[str, Any], texts: dict) -> None:
    """Heights beside the side view; shoulders and arm on the back view."""
    side, back = views["side"][0], views["back"][0]
    top, floor = float(body[:, 2].max()), 0.0
    chin, crotch = (float(tape.point(body, name)[2]) for name in ("chin", "crotch"))
    flat = side.project(body)[:, 0]
    right = float(flat.max()) + 30
    for name, x, low, high in (
        ("height", right + 50, floor, top), ("head", right, chin, top), ("inseam", right, floor, crotch),
    ):  # fmt: skip
        a, b = (side.project(np.array([[0, 0, z]]))[0, 1] for z in (low, high))
        pen.line([(x, a), (x, b)], _LINE, 2)
        for y in (a, b):
            pen.line([(x - 7, y), (x + 7, y)], _LINE, 2)
        where = (x + 12, (a + b) / 2 + (90 if name == "height" else 0))
        _label(pen, where, name, texts[name])
    acromion, other, elbow, wrist = (
        tape.point(body, name) for name in ("acromion", "right acromion", "elbow", "wrist")
    )
    behind = np.array([0, 0.2, 0])
    for name, line in (("shoulders", [acromion, other]), ("arm", [acromion, elbow, wrist])):
        points = back.project(np.array(line) + behind)[:, :2]
        pen.line([tuple(point) for point in points], _LINE, 3)
        for x, y in points:
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], _LINE)
        if name == "shoulders":
            x, y = float(points[:, 0].max()), float(points[0, 1])
            pen.line([(x + 6, y - 6), (x + 90, y - 46), (x + 100, y - 46)], _LINE, 1)
            _label(pen, (x + 106, y - 46), name, texts[name])
        else:
            x, y = points[1]
            pen.line([(x - 6, y), (x - 40, y - 70)], _LINE, 1)
            _label(pen, (x - 130, y - 96), name, texts[name])


def _label(pen: ImageDraw.ImageDraw, at: tuple[float, float], name: str, text: str) -> None:
    x, y = at
    pen.text((x, y - 21), name, _INK, font=_font(17))
    pen.text((x, y), text, _LINE, font=_font(19))


def _apart(values: list[float], gap: float) -> list[float]:
    """The values moved as little as it takes to be `gap` apart, in their order."""
    order = np.argsort(values)
    moved = np.array(values, float)[order]
    for _ in range(100):
        for i in range(len(moved) - 1):
            short = gap - (moved[i + 1] - moved[i])
            if short > 0:
                moved[i] -= short / 2
                moved[i + 1] += short / 2
    result = np.empty(len(values))
    result[order] = moved
    return result.tolist()
