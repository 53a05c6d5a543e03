"""The report of `bolid evaluate --html`: one page that needs nothing but a browser, and no network.

Styles are inline, plots are SVG drawn here, pictures are data URIs; a content policy forbids everything else. Every
plot is as wide as a phone, so that its text is as large there as anywhere.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.evaluate.pictures import Picture, Source
from bolid.evaluate.results import Metric, Scored
from bolid.evaluate.scores import HIGHER
from bolid.run import write_atomic

if TYPE_CHECKING:
    from bolid.evaluate.results import Difference

MOST_PEOPLE, MOST_ROWS, MOST_PROMPTS = 8, 12, 12  # shown; a report is to be read
THUMBNAIL = 224  # pixels, the height of a picture in the page
COLOURS = ("#0f6292", "#c4560f", "#2e7d4f", "#8a4f9e", "#a07a00", "#5b6770")  # told apart by colour-blind eyes too
# In the plots of all methods, where they were measured.
PLOTTED = ("text_score", "image_score", "face_similarity", "bone_ratio_error", "width_profile_distance",
           "body_ratio_error", "body_auc", "copy_paste", "clothing_leak", "disturbance", "kid", "fid")  # fmt: skip

Point = tuple[float, float | None, float | None]  # value, low, high


def write_report(
    path: str | os.PathLike[str],
    scored: Sequence[Scored],
    differences: Mapping[str, Mapping[str, Difference]],
    references: Source,
    descriptions: Mapping[str, tuple[str, str]],
    family: str,
) -> None:
    """Write the page to `path`. `scored`: one method or several; `differences`: of the others from the first."""
    title = " / ".join(one.name for one in scored)
    first = scored[0].evaluation
    if first is None:
        raise ValueError("score the pictures first")
    pictures = sum(len(one.pictures) for one in scored)
    people = f"{first.people} {'person' if first.people == 1 else 'people'}"
    shown = f"{pictures} picture{'' if pictures == 1 else 's'}"
    facts = f"{shown} of {people}, {first.references} held-out photos, family {family}"
    sections = [
        ("Figures", _figures(scored, differences, descriptions)),
        ("Plots", _plots(scored, descriptions)),
        ("Pictures", _grid(scored, references) if len(scored) == 1 else _side_by_side(scored, references)),
        ("How it was measured", _how(scored, descriptions)),
    ]
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections if content)
    write_atomic(path, _PAGE.format(title=escape(title), facts=escape(facts), body=body, style=_STYLE))


# ---- figures ------------------------------------------------------------------------------------------------------


def _figures(
    scored: Sequence[Scored],
    differences: Mapping[str, Mapping[str, Difference]],
    descriptions: Mapping[str, tuple[str, str]],
) -> str:
    evaluations = [one.evaluation for one in scored if one.evaluation is not None]
    several = len(scored) > 1
    head = ["metric", *(one.name for one in scored)] if several else ["metric", "value", "95 % interval"]
    rows = []
    missing = []
    for name, metric in evaluations[0].metrics.items():
        if all(evaluation.metrics[name].value is None for evaluation in evaluations):
            missing.append(f"{_words(name)}: {escape(metric.note)}")
            continue
        arrow = "↑" if descriptions[name][0] == HIGHER else "↓"
        cells = [f'<th scope="row">{_words(name)} <span class="quiet">{arrow}</span></th>']
        for one in scored:
            figure = one.evaluation.metrics[name]  # type: ignore[union-attr]
            mark = _mark(differences.get(one.name, {}).get(name))
            interval = "" if figure.low is None else f"{_number(figure.low)} to {_number(figure.high)}"
            if several:
                cells.append(f"<td>{_number(figure.value)}{mark}<br><span class=quiet>{interval}</span></td>")
            else:
                cells += [f"<td>{_number(figure.value)}</td>", f"<td class=quiet>{interval}</td>"]
        count = " / ".join(dict.fromkeys(str(e.metrics[name].n) for e in evaluations))
        cells.append(f"<td>{count}</td>")
        if not several:
            cells.append(f'<td class="by">{_by(metric)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    cells = [f"<th>{escape(text)}</th>" for text in (*head, "n")]
    if not several:
        cells.append('<th class="by">measured by</th>')
    table = (
        f"<div class=scroll><table><thead><tr>{''.join(cells)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    key = "<p class=quiet>↑ more is better, ↓ less is better. Intervals are 95 % bootstrap intervals."
    if several:
        key += (
            f" * differs from {escape(scored[0].name)}: the interval of the differences, paired by person and prompt, "
            "leaves out 0."
        )
    key += "</p>"
    if missing:
        key += f"<details><summary>Not measured: {len(missing)}</summary><ul>{_items(missing)}</ul></details>"
    return table + key + _ratios(scored)


def _items(texts: Sequence[str]) -> str:
    return "".join(f"<li>{text}</li>" for text in texts)


def _by(metric: Metric) -> str:
    return escape(metric.measured_by) + (f". {escape(metric.note)}" if metric.note else "")


def _mark(difference: Difference | None) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return ""
    return "*" if difference.low > 0 or difference.high < 0 else ""


def _ratios(scored: Sequence[Scored]) -> str:
    """True body ratios beside those read off the pictures."""
    first = scored[0].evaluation
    if first is None or not first.ratios:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in ("body ratio", "true", *(one.name for one in scored)))
    rows = []
    for name, pair in first.ratios.items():
        cells = [f'<th scope="row">{_words(name)}</th><td>{_number(pair["true"])}</td>']
        for one in scored:
            found = one.evaluation.ratios.get(name) if one.evaluation else None
            off = "" if found is None else f"{found['pictures'] / found['true'] - 1:+.1%}"
            cells.append(
                f"<td>{'–' if found is None else _number(found['pictures'])} <span class=quiet>{off}</span></td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=quiet>Body ratios, means over the people, read off the pictures by the body probe.</p>"
    )


# ---- plots --------------------------------------------------------------------------------------------------------


def _plots(scored: Sequence[Scored], descriptions: Mapping[str, tuple[str, str]]) -> str:
    figures = []
    error = "body_error" if all("body_error" in one.scores for one in scored) else "bone_error"
    what = "error of the body ratios" if error == "body_error" else "error of the bone ratios"
    legend = _legend(scored) if len(scored) > 1 else ""
    if len(scored) > 1:
        for name in PLOTTED:
            points = [_point_of(one, name) for one in scored]
            if sum(point is not None for point in points) >= 2:
                better = f"{descriptions[name][0]} is better"
                rows = [
                    (one.name, [(i, point)] if point else [])
                    for i, (one, point) in enumerate(zip(scored, points, strict=True))
                ]
                figures.append(_figure(_dots(rows), _words(name), better))
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


def _point_of(one: Scored, name: str) -> Point | None:
    metric = one.evaluation.metrics.get(name) if one.evaluation else None
    return None if metric is None or metric.value is None else (metric.value, metric.low, metric.high)


def _groups(scored: Sequence[Scored], name: str, key: Callable[[Scored, int], object]) -> dict:
    """What `key` says of a picture -> [(method, mean and interval of `name`)]."""
    from bolid.method.metrics import bootstrap_mean

    found: dict[object, list[tuple[int, Point]]] = {}
    for number, one in enumerate(scored):
        if name not in one.scores:
            continue
        values = one.scores[name]
        members: dict[object, list[int]] = {}
        for i in range(len(one.pictures)):
            if key(one, i) and not math.isnan(values[i]):
                members.setdefault(key(one, i), []).append(i)
        for label, rows in members.items():
            value, low, high = bootstrap_mean(values[rows])
            found.setdefault(label, []).append((number, (value, _finite(low), _finite(high))))
    return found


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _dots(rows: Sequence[tuple[object, Sequence[tuple[int, Point]]]]) -> str:
    """A dot with its interval for each (colour, point) of each row, the row's label above it."""
    points = [point for _, entries in rows for _, point in entries]
    low = min(min(v for v in point if v is not None) for point in points)
    high = max(max(v for v in point if v is not None) for point in points)
    scale, ticks = _axis(low, high, 14, 326)
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
                f"<title>{escape(str(label))}: {_number(value)}</title></circle>"
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
    for number, one in enumerate(scored):
        settings: dict[tuple[str, str], list[int]] = {}
        for i, picture in enumerate(one.pictures):
            scales = picture.scales
            if scales.keys() & {"face", "body"}:  # another's adapter has neither
                face, body = (f"{name} {_scale(scales.get(name, 0.0))}" for name in ("face", "body"))
                settings.setdefault((face, body), []).append(i)
        for (face, body), rows in sorted(settings.items()):
            similarity, off = one.scores["face_similarity"][rows].nanmean(), one.scores[error][rows].nanmean()
            if not (math.isnan(similarity) or math.isnan(off)):
                found.append((float(similarity), float(off), number, face, body))
    if len(found) < 2:
        return None
    across, ticks_x = _axis(min(f[0] for f in found), max(f[0] for f in found), 52, 320)
    up, ticks_y = _axis(min(f[1] for f in found), max(f[1] for f in found), 210, 14)
    parts = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="10" y2="214"/>'
        f'<text class="tick" x="{x:.1f}" y="230">{t}</text>'
        for x, t in ticks_x
    ] + [
        f'<line class="grid" x1="48" x2="326" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick left" x="44" y="{y + 4:.1f}">{t}</text>'
        for y, t in ticks_y
    ]
    for similarity, off, number, face, body in found:
        x, y = across(similarity), up(off)
        half = 3.8 * max(len(face), len(body))  # of the wider line, at most, in any system's sans-serif
        middle = min(max(x, half), 340 - half)
        above = y - 21 if y > 32 else y + 17
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{COLOURS[number % len(COLOURS)]}"/><text class="middle">'
            f'<tspan x="{middle:.1f}" y="{above:.1f}">{escape(face)}, </tspan>'
            f'<tspan x="{middle:.1f}" y="{above + 13:.1f}">{escape(body)}</tspan></text>'
        )
    parts.append('<text class="tick" x="186" y="246">face similarity</text>')
    return _svg(340, 252, "".join(parts))


def _scale(value: object) -> str:
    """A number, or whatever else a record says of a scale, short enough for a plot."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)[:24]


def _axis(
    low: float, high: float, start: float, end: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
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


# ---- pictures -----------------------------------------------------------------------------------------------------


def _grid(scored: Sequence[Scored], references: Source) -> str:
    """For each person a held-out photo, and the pictures whose body is nearest and farthest."""
    (one,) = scored
    rows = []
    for person in sorted({p for p in one.people if p})[:MOST_PEOPLE]:
        places = [i for i, name in enumerate(one.people) if name == person]
        ranked, by = _ranked(one, places)
        photo = next((p for p in references.pictures if p.person == person), None)
        cells = [_cell(references, photo, "reference photo", person)]
        if len(ranked) == 1:
            cells.append(_cell(one.source, one.pictures[ranked[0]], "generated", one.pictures[ranked[0]].prompt))
        elif ranked:
            for label, place in ((f"nearest by {by}", ranked[0]), (f"farthest by {by}", ranked[-1])):
                cells.append(_cell(one.source, one.pictures[place], label, one.pictures[place].prompt))
            for place in ranked[1:-1][: 6 - len(cells)]:
                cells.append(_cell(one.source, one.pictures[place], "generated", one.pictures[place].prompt))
        rows.append(f"<div class=row>{''.join(cells)}</div>")
    return "".join(rows)


def _ranked(one: Scored, places: Sequence[int]) -> tuple[list[int], str]:
    """Places from the nearest to the farthest, and by what."""
    for name, by, sign in (("body_error", "body", 1), ("bone_error", "body", 1), ("image_score", "image", -1)):
        if name in one.scores:
            known = [i for i in places if not math.isnan(one.scores[name][i])]
            if len(known) >= 2:
                return sorted(known, key=lambda i: sign * float(one.scores[name][i])), by
    return list(places), "order"


def _side_by_side(scored: Sequence[Scored], references: Source) -> str:
    """A row for a person and prompt: a held-out photo, then what each method made of it."""
    found: dict[tuple[str, str], dict[int, Picture]] = {}
    for number, one in enumerate(scored):
        for picture, person in zip(one.pictures, one.people, strict=True):
            if person:
                found.setdefault((person, picture.prompt), {}).setdefault(number, picture)
    pairs = [pair for pair in found if len(found[pair]) == len(scored)]
    # One prompt of every person first, another one each time: many people and many prompts in few rows.
    people = sorted({person for person, _ in pairs})
    prompts = {person: [prompt for who, prompt in pairs if who == person] for person in people}
    turns = max((len(theirs) for theirs in prompts.values()), default=0)
    order = [
        (person, prompts[person][(turn + i) % len(prompts[person])])
        for turn in range(turns)
        for i, person in enumerate(people)
        if turn < len(prompts[person])
    ]
    rows = []
    for person, prompt in order[:MOST_ROWS]:
        photo = next((p for p in references.pictures if p.person == person), None)
        cells = [_cell(references, photo, "reference photo", person)]
        for number, one in enumerate(scored):
            cells.append(_cell(one.source, found[person, prompt][number], one.name, ""))
        rows.append(f"<p class=prompt>{escape(prompt)}</p><div class=row>{''.join(cells)}</div>")
    return "".join(rows)


def _cell(source: Source, picture: Picture | None, label: str, text: str) -> str:
    image = "" if picture is None else _thumbnail(source, picture, f"{label}: {text}" if text else label)
    words = f"<b>{escape(label)}</b> {escape(text)}"
    return f"<figure class=picture>{image}<figcaption>{words}</figcaption></figure>"


def _thumbnail(source: Source, picture: Picture, label: str) -> str:
    from PIL import Image

    try:
        image = Image.fromarray(source.load(picture))
    except BolidError:
        return ""
    image.thumbnail((THUMBNAIL * 2, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{escape(label)}" width="{image.width}" height="{image.height}" src="data:image/jpeg;base64,{data}">'
    )


# ---- how ----------------------------------------------------------------------------------------------------------


def _how(scored: Sequence[Scored], descriptions: Mapping[str, tuple[str, str]]) -> str:
    evaluation = scored[0].evaluation
    if evaluation is None:
        return ""
    held_out = evaluation.held_out
    if held_out.get("excluded"):
        protocol = f"{held_out['excluded']} reference photos had made a profile and were left out."
    elif held_out.get("checked"):
        protocol = "None of the reference photos had made a profile."
    else:
        protocol = "Which photos made the profiles is not known, so whether any is among the references is not either."
    notes = dict.fromkeys(note for one in scored if one.evaluation for note in one.evaluation.notes)
    rejected: dict[str, list[str]] = {}
    for one in scored:
        for reason, names in (one.evaluation.rejected if one.evaluation else {}).items():
            rejected.setdefault(reason, []).extend(name for name in names if name not in rejected.get(reason, []))
    parts = [f"<p>{escape(protocol)}</p>", *(f"<p>{escape(note)}.</p>" for note in notes)]
    # One method's table says by what, where it is wide enough for that.
    by = '<span class="narrow">' if len(scored) == 1 else "<span>"
    terms = "".join(
        f"<dt>{_words(name)}</dt><dd>{escape(descriptions[name][1])}. {by}By: {_by(metric)}</span></dd>"
        for name, metric in evaluation.metrics.items()
    )
    parts.append(f"<dl>{terms}</dl>")
    if rejected:
        items = [
            f"{escape(reason)}: {escape(', '.join(names[:5]))}{' …' if len(names) > 5 else ''}"
            for reason, names in rejected.items()
        ]
        parts.append(f"<h3>Left out</h3><ul>{_items(items)}</ul>")
    return "".join(parts)


def _words(name: str) -> str:
    return escape(name.replace("_", " "))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    digits = 1 if abs(value) >= 100 else 3 if abs(value) >= 0.1 or abs(value) < 0.00005 else 4
    return f"{round(value, digits) + 0.0:.{digits}f}"


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; background: #fff; color: #1d2327;
  font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; font-weight: 600; margin: 0; }
h2 { font-size: 17px; font-weight: 600; margin: 40px 0 12px; padding-top: 12px; border-top: 1px solid #dfe3e6; }
h3 { font-size: 15px; margin: 24px 0 4px; }
p { margin: 6px 0; max-width: 75ch; }
.quiet, .by { color: #5b6770; font-size: 13px; }
.narrow { display: none; }
details { margin: 6px 0; color: #5b6770; font-size: 13px; } summary { cursor: pointer; }
.scroll { overflow-x: auto; margin: 14px 0 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; border-bottom: 1px solid #edf0f2; }
td { white-space: nowrap; }
td.by { white-space: normal; min-width: 300px; }
thead th { font-weight: 600; font-size: 13px; color: #5b6770; border-bottom-color: #c9d0d5; white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 28px 32px;
  align-items: start; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; color: #5b6770; margin-bottom: 6px; }
figcaption b { color: #1d2327; font-weight: 600; }
svg { display: block; width: 100%; max-width: 380px; height: auto; }
svg text { font: 11.5px system-ui, "Helvetica Neue", Arial, sans-serif; fill: #1d2327; }
svg text.tick { fill: #5b6770; text-anchor: middle; font-size: 11px; }
svg text.left { text-anchor: end; }
svg text.middle { text-anchor: middle; }
svg .grid { stroke: #e6eaed; stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin-bottom: 4px; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 5px; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 14px; margin: 4px 0 22px; }
.prompt { margin: 18px 0 6px; }
.picture { max-width: 180px; }
.picture img { display: block; width: 100%; height: auto; border-radius: 3px; background: #f2f4f5; }
.picture figcaption { margin: 5px 0 0; line-height: 1.35; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 5; overflow: hidden; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px; font-size: 14px; }
dt { font-weight: 500; } dd { margin: 0; color: #5b6770; }
@media (max-width: 560px) { body { padding: 18px 14px 40px; } dl { display: block; } dd { margin-bottom: 8px; }
  table .by { display: none; } .narrow { display: inline; }
  th, td { padding-right: 10px; } td.quiet { white-space: normal; }
  .row { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title} · BoLID evaluation</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="quiet">BoLID evaluation: {facts}</p>
</header>
{body}
</body>
</html>
"""
