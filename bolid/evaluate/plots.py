"""The plots of the report, as SVG. Each is as wide as a phone, so that its text has one size everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from bolid.evaluate.results import DESCRIPTIONS, Scored

MOST_PROMPTS = 12  # rows in a plot
COLOURS = ("#0f6292", "#c4560f", "#2e7d4f", "#8a4f9e", "#a07a00", "#5b6770")  # distinct to colour-blind eyes too
# In the plots of several methods, where they were measured.
PLOTTED = ("text_score", "image_score", "face_similarity", "bone_ratio_error", "width_profile_distance",
           "body_ratio_error", "body_auc", "copy_paste", "clothing_leak", "disturbance", "kid", "fid")  # fmt: skip

Point = tuple[float, float | None, float | None]  # value, low, high


def plots(scored: Sequence[Scored]) -> str:
    """All plots of a report, HTML: methods side by side, body error by prompt and by photos, face against body."""
    error = "body_error" if all("body_error" in one.scores for one in scored) else "bone_error"
    what = "error of the body ratios" if error == "body_error" else "error of the bone ratios"
    legend = _legend(scored) if len(scored) > 1 else ""
    figures = _method_plots(scored) if len(scored) > 1 else []
    by_prompt = _groups(scored, error, lambda one, i: one.pictures[i].prompt)
    if len(by_prompt) >= 2:
        rows = list(by_prompt.items())[:MOST_PROMPTS]
        rest = f" (the first {len(rows)} of {len(by_prompt)})" if len(by_prompt) > len(rows) else ""
        figures.append(_figure(_dots(rows), "body error by prompt", what + ", picture by picture" + rest, legend))
    by_photos = _groups(scored, error, lambda one, i: len(one.pictures[i].photos_used) or None)
    if len(by_photos) >= 2:
        rows = [(f"{count} photo{'s' if count != 1 else ''}", points) for count, points in sorted(by_photos.items())]
        figures.append(_figure(_dots(rows), "body error by number of photos", what + ", picture by picture", legend))
    if (trade := _trade_off(scored, error)) is not None:
        caption = f"right: the face is nearer; down: less {what}"
        figures.append(_figure(trade, "face against body over the scales", caption, legend))
    return f"<div class=plots>{''.join(figures)}</div>" if figures else ""


def _method_plots(scored: Sequence[Scored]) -> list[str]:
    """The methods side by side, a plot for each of PLOTTED that two or more of them have."""
    figures = []
    for name in PLOTTED:
        points = [_point_of(one, name) for one in scored]
        if sum(point is not None for point in points) >= 2:
            rows = [
                (one.name, [(i, point)] if point else [])
                for i, (one, point) in enumerate(zip(scored, points, strict=True))
            ]
            figures.append(_figure(_dots(rows), words(name), f"{DESCRIPTIONS[name][0]} is better"))
    return figures


def _point_of(one: Scored, name: str) -> Point | None:
    metric = one.evaluation.metrics.get(name)
    return None if metric is None or metric.value is None else (metric.value, metric.low, metric.high)


def _groups(
    scored: Sequence[Scored], name: str, key: Callable[[Scored, int], object]
) -> dict[Any, list[tuple[int, Point]]]:
    """`key` of a picture -> [(method, mean and interval of the score `name`)]."""
    from bolid.method.metrics import bootstrap_mean

    found: dict[Any, list[tuple[int, Point]]] = {}
    for method, one in enumerate(scored):
        if name not in one.scores:
            continue
        values = one.scores[name]
        members: dict[object, list[int]] = {}
        for i in range(len(one.pictures)):
            if key(one, i) and not math.isnan(values[i]):
                members.setdefault(key(one, i), []).append(i)
        for label, rows in members.items():
            value, low, high = bootstrap_mean(values[rows])
            found.setdefault(label, []).append((method, (value, _finite(low), _finite(high))))
    return found


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _dots(rows: Sequence[tuple[object, Sequence[tuple[int, Point]]]]) -> str:
    """A dot with its interval for each (colour, point) of each row, the row's label above it."""
    points = [point for _, entries in rows for _, point in entries]
    low = min(min(v for v in point if v is not None) for point in points)
    high = max(max(v for v in point if v is not None) for point in points)
    scale, ticks = axis(low, high, 14, 326)
    y, parts = 4.0, []
    for label, entries in rows:
        lines = _wrapped(str(label))
        for line in lines:
            y += 14
            parts.append(f'<text x="2" y="{y:.0f}">{escape(line)}</text>')
        y += 4
        for colour, (value, least, most) in entries:
            y += 9
            ink = COLOURS[colour % len(COLOURS)]
            if least is not None and most is not None:
                parts.append(
                    f'<line x1="{scale(least):.1f}" x2="{scale(most):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{ink}" '
                    'stroke-width="2" stroke-opacity=".45"/>'
                )
            parts.append(
                f'<circle cx="{scale(value):.1f}" cy="{y:.1f}" r="4" fill="{ink}">'
                f"<title>{escape(str(label))}: {number(value)}</title></circle>"
            )
        y += 9
    grid = "".join(
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{y:.0f}"/>'
        f'<text class="tick" x="{x:.1f}" y="{y + 15:.0f}">{text}</text>'
        for x, text in ticks
    )
    return _svg(340, y + 22, grid + "".join(parts))


def _trade_off(scored: Sequence[Scored], error: str) -> str | None:
    """Mean face similarity against mean body error, a point for every setting of the scales; None below two."""
    found: list[tuple[float, float, int, str, str]] = []
    for method, one in enumerate(scored):
        settings: dict[tuple[str, str], list[int]] = {}
        for i, picture in enumerate(one.pictures):
            scales = picture.scales
            if scales.keys() & {"face", "body"}:  # another's adapter has neither
                face, body = (f"{name} {_scale(scales.get(name, 0.0))}" for name in ("face", "body"))
                settings.setdefault((face, body), []).append(i)
        for (face, body), rows in sorted(settings.items()):
            similarity, off = one.scores["face_similarity"][rows].nanmean(), one.scores[error][rows].nanmean()
            if not (math.isnan(similarity) or math.isnan(off)):
                found.append((float(similarity), float(off), method, face, body))
    if len(found) < 2:
        return None
    across, ticks_x = axis(min(f[0] for f in found), max(f[0] for f in found), 52, 320)
    up, ticks_y = axis(min(f[1] for f in found), max(f[1] for f in found), 210, 14)
    parts = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="10" y2="214"/>'
        f'<text class="tick" x="{x:.1f}" y="230">{t}</text>'
        for x, t in ticks_x
    ] + [
        f'<line class="grid" x1="48" x2="326" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick left" x="44" y="{y + 4:.1f}">{t}</text>'
        for y, t in ticks_y
    ]
    for similarity, off, method, face, body in found:
        x, y = across(similarity), up(off)
        half = 3.8 * max(len(face), len(body))  # of the wider line, at most, in any system's sans-serif
        middle = min(max(x, half), 340 - half)
        above = y - 21 if y > 32 else y + 17
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{COLOURS[method % len(COLOURS)]}"/><text class="middle">'
            f'<tspan x="{middle:.1f}" y="{above:.1f}">{escape(face)}, </tspan>'
            f'<tspan x="{middle:.1f}" y="{above + 13:.1f}">{escape(body)}</tspan></text>'
        )
    parts.append('<text class="tick" x="186" y="246">face similarity</text>')
    return _svg(340, 252, "".join(parts))


def _scale(value: object) -> str:
    """A number, or whatever else a record says of a scale, short enough for a plot."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)[:24]


def axis(low: float, high: float, start: float, end: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """(value -> place, [(place, text)]) with a little air and round ticks."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - max(abs(low) * 0.1, 0.01), high + max(abs(high) * 0.1, 0.01)
    air = 0.06 * (high - low)
    low, high = low - air, high + air
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(n for n in (1, 2, 5, 10) if (high - low) / (step * n) <= 4.5)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    values = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return place, [(place(value), f"{value + 0.0:.{digits}f}") for value in values]


def _svg(width: float, height: float, content: str) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">{content}</svg>'


def _figure(svg: str, title: str, caption: str, legend: str = "") -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>{legend}{svg}</figure>"


def _legend(scored: Sequence[Scored]) -> str:
    items = "".join(
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(one.name)}</span>'
        for i, one in enumerate(scored)
    )
    return f"<div class=legend>{items}</div>"


def _wrapped(text: str, width: int = 48, most: int = 3) -> list[str]:
    """Words in lines of at most so many letters; SVG does not wrap."""
    lines = [""]
    for word in text.split() or [""]:
        if len(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word[:width])
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " …"]


def words(name: str) -> str:
    """A metric's name as words, escaped for HTML."""
    return escape(name.replace("_", " "))


def number(value: float | None) -> str:
    """A value with as many digits as it deserves; a dash for None."""
    if value is None:
        return "–"
    digits = 1 if abs(value) >= 100 else 3 if abs(value) >= 0.1 or abs(value) < 0.00005 else 4
    return f"{round(value, digits) + 0.0:.{digits}f}"
