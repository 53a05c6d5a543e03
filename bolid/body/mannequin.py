"""The mannequin: front, left side and back of a body in A-pose, with measuring lines and their centimetres."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bolid.body.measurements import MEASUREMENTS, Tape, edges_of, plane_axes, section
from bolid.body.rendering import Buffer, Viewpoint, clay, render_view
from bolid.body.shape import within_bounds
from bolid.formats.images import label_font

_SIZE = (1180, 2120)  # height, width
_TOP, _FLOOR = 130, 1110
_COLUMNS = {"front": (0.0, 390), "side": (90.0, 1060), "back": (180.0, 1710)}  # turn, the pixel of the middle
_REACH = 350  # pixels to each side of the middle
_PAPER, _INK, _LINE = (250, 249, 247), (52, 50, 48), (196, 60, 44)
_SKIN, _SUIT = (0.83, 0.80, 0.77), (0.58, 0.62, 0.66)
_FINE = 2  # drawn so much larger, then made smaller: smooth edges
_GIRTHS = ("neck", "chest", "upper-arm", "waist", "hip", "thigh")
_LABELS = 716  # the pixel at which the girths' labels begin


@dataclass(frozen=True)
class Pen:
    """Draws lines and text in pixels of the finished picture."""

    draw: Any

    def line(self, points: Sequence[Any] | np.ndarray, width: int = 2) -> None:
        """A line through points (x, y)."""
        self.draw.line([(_FINE * float(x), _FINE * float(y)) for x, y in points], _LINE, _FINE * width, joint="curve")

    def dot(self, point: Any, radius: float = 5) -> None:
        """A filled circle."""
        x, y = (_FINE * float(part) for part in point)
        self.draw.ellipse([x - _FINE * radius, y - _FINE * radius, x + _FINE * radius, y + _FINE * radius], _LINE)

    def text(self, at: tuple[float, float], text: str, size: int, color: tuple[int, int, int] = _INK) -> None:
        """Text whose upper left corner is at (x, y)."""
        self.draw.text((_FINE * at[0], _FINE * at[1]), text, color, font=label_font(text, _FINE * size))

    def label(self, at: tuple[float, float], name: str, value: str) -> None:
        """A measurement's name and, below, its value; `at`: the left end of the line between them."""
        self.text((at[0], at[1] - 22), name.replace("-", " "), 17)
        self.text(at, value, 19, _LINE)


def mannequin(
    tape: Tape, parameters: np.ndarray, values: Sequence[float], sd: Sequence[float], title: str = ""
) -> np.ndarray:
    """uint8 [1180, 2120, 3]: the body with parameters [P], labelled with `values` and `sd` [K] (metres, kilograms)."""
    from PIL import Image, ImageDraw

    body = tape.model.rest(within_bounds(parameters)[None])[0]
    scale = (_FLOOR - _TOP) / max(float(np.ptp(body[:, 2])), 1.55)
    paper = np.full((_FINE * _SIZE[0], _FINE * _SIZE[1], 3), _PAPER, np.uint8)
    shown = smoothed(tape, body)
    places = np.concatenate([tape.model.canonical, tape.model.arm[:, None]], 1)
    views = {}
    for name, (turn, middle) in _COLUMNS.items():
        left = middle - _REACH
        size = (_FINE * _SIZE[0], _FINE * 2 * _REACH)
        fine = Viewpoint(turn, scale * _FINE, (_FINE * _REACH, _FINE * _FLOOR), size)
        buffer = render_view(fine, shown, tape.model.faces, places)
        part = paper[:, _FINE * left : _FINE * (middle + _REACH)]
        seen = buffer.values[buffer.mask]
        covered = suit(seen[:, :3], seen[:, 3])[:, None]
        color = np.array(_SKIN) + covered * (np.array(_SUIT) - _SKIN)
        part[buffer.mask] = (clay(buffer, color) * 255).astype(np.uint8)
        views[name] = (Viewpoint(turn, scale, (middle, _FLOOR), _SIZE), buffer, left)
    picture = Image.fromarray(paper)
    pen = Pen(ImageDraw.Draw(picture))
    texts = {
        row.name: f"{value * row.scale:.1f} ± {error * row.scale:.1f} {row.unit}"
        for row, value, error in zip(MEASUREMENTS, values, sd, strict=True)
    }
    _girths(pen, tape, body, views, texts)
    _lengths(pen, tape, body, views, texts)
    pen.text((60, 34), title, 32)
    pen.text((60, 78), f"{texts['weight']}   (volume x 985 kg/m3)   ± is one standard deviation", 18)
    return np.asarray(picture.reduce(_FINE))


# ---- the body -----------------------------------------------------------------------------------------------------


def suit(canonical: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """[...], 0..1: how far the mannequin's suit covers points of canonical coordinates [..., 3].

    It has no sleeves and short legs. `arm` [...]: how far a point is of an arm.
    """
    z = canonical[..., 2]
    inside = np.minimum(np.minimum(z - 0.432, 0.765 - z), 0.04 * (0.5 - arm))
    return np.clip(inside / 0.001 + 0.5, 0, 1)


def smoothed(tape: Tape, body: np.ndarray) -> np.ndarray:
    """The body [V, 3] with the pelvis' surface between the legs smoothed, for pictures alone."""
    part, moved, neighbours = _smoothing(tape)
    smooth = body.copy()
    for _ in range(30):
        smooth[moved] += part * (neighbours @ smooth - smooth[moved])
    return smooth


@functools.cache
def _smoothing(tape: Tape) -> tuple[np.ndarray, np.ndarray, Any]:
    """How far [M, 1] which vertices [M] move to the mean of their neighbours, a sparse matrix [M, V]."""
    import scipy.sparse

    edges = edges_of(tape.model.faces)
    both = np.concatenate([edges, edges[:, ::-1]])
    neighbours = scipy.sparse.csr_matrix((np.ones(len(both)), (both[:, 0], both[:, 1])))
    neighbours = scipy.sparse.diags(1 / np.asarray(neighbours.sum(1)).ravel()) @ neighbours
    x, _, z = tape.model.canonical.T
    part = np.exp(-(((z - 0.487) / 0.022) ** 4) - (x / 0.018) ** 4)
    moved = np.flatnonzero(part)
    return part[moved, None], moved, neighbours.tocsr()[moved]


# ---- lines and labels ---------------------------------------------------------------------------------------------


def _girths(pen: Pen, tape: Tape, body: np.ndarray, views: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """The tapes on all three views, and their labels between the front and the side view."""
    rows = []
    for name in _GIRTHS:
        ring = tape_ring(tape, body, name)
        for view, buffer, left in views.values():
            _visible_line(pen, view, buffer, left, ring)
        flat = views["front"][0].project(ring)
        rows.append((name, flat[flat[:, 0].argmax(), :2]))
    spots = _apart([float(point[1]) for _, point in rows], 50)
    for (name, (x, y)), spot in zip(rows, spots, strict=True):
        pen.line([(x + 5, y), (_LABELS - 40, spot), (_LABELS - 8, spot)], 1)
        pen.label((_LABELS, spot), name, texts[name])


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


def _visible_line(pen: Pen, view: Viewpoint, buffer: Buffer, left: int, points: np.ndarray) -> None:
    """A line in space [n, 3], where the body does not hide it."""
    flat = view.project(points)
    at = ((flat[:, :2] - [left, 0]) * _FINE).astype(int).clip(0, np.array(buffer.depth.shape[::-1]) - 1)
    shown = flat[:, 2] < buffer.depth[at[:, 1], at[:, 0]] + 0.012
    for visible, run in itertools.groupby(zip(flat, shown, strict=True), key=lambda pair: bool(pair[1])):
        line = [point[:2] for point, _ in run]
        if visible and len(line) > 1:
            pen.line(line, 3)


def _lengths(pen: Pen, tape: Tape, body: np.ndarray, views: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Heights beside the side view; shoulders and arm on the back view."""
    side, back = views["side"][0], views["back"][0]
    top = float(body[:, 2].max())
    chin, crotch = (float(tape.point(body, name)[2]) for name in ("chin", "crotch"))
    right = float(side.project(body)[:, 0].max()) + 40
    for name, x, low, high, lower in (
        ("height", right + 165, 0.0, top, 170), ("head", right, chin, top, 0), ("inseam", right, 0.0, crotch, 0),
    ):  # fmt: skip
        a, b = (float(side.project(np.array([[0, 0, z]]))[0, 1]) for z in (low, high))
        pen.line([(x, a), (x, b)])
        for y in (a, b):
            pen.line([(x - 7, y), (x + 7, y)])
        pen.label((x + 14, (a + b) / 2 + lower), name, texts[name])
    shoulder, other, elbow, wrist = (
        back.project(tape.point(body, name)[None])[0, :2] for name in ("acromion", "right acromion", "elbow", "wrist")
    )
    for points in ([shoulder, other], [shoulder, elbow, wrist]):
        pen.line(points, 3)
        for point in points:
            pen.dot(point)
    x, y = other
    pen.line([(x + 7, y - 6), (x + 60, y - 50), (x + 90, y - 50)], 1)
    pen.label((x + 98, y - 50), "shoulders", texts["shoulders"])
    x, y = (shoulder + elbow) / 2
    pen.line([(x - 6, y - 6), (x - 50, y - 70), (x - 62, y - 70)], 1)
    pen.label((x - 196, y - 70), "arm", texts["arm"])


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
