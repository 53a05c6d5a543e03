"""The report of `bolid evaluate --html`: one page that needs nothing but a browser, and no network.

Styles are inline, plots are SVG (plots.py), pictures are data URIs; a content policy forbids everything else.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from html import escape

from bolid.errors import BolidError
from bolid.evaluate.pictures import Picture, PictureFolder
from bolid.evaluate.plots import number, plots, words
from bolid.evaluate.results import DESCRIPTIONS, HIGHER, Difference, Metric, Scored
from bolid.page import html_page
from bolid.run import write_atomic

MOST_PEOPLE, MOST_ROWS = 8, 12  # shown: a report is to be read
THUMBNAIL = 224  # pixels, the height of a picture in the page


def write_report(
    path: str | os.PathLike[str],
    scored: Sequence[Scored],
    differences: Mapping[str, Mapping[str, Difference]],
    references: PictureFolder,
    family: str,
    bounds: Sequence[Scored] = (),
) -> None:
    """Write the page to `path`. `scored`: one method or several; `differences`: of the others from the first.

    `bounds`: what real photos reach, further columns of the figures.
    """
    title = " / ".join(one.name for one in scored)
    first = scored[0].evaluation
    pictures = sum(len(one.pictures) for one in scored)
    people = f"{first.people} {'person' if first.people == 1 else 'people'}"
    shown = f"{pictures} picture{'' if pictures == 1 else 's'}"
    facts = f"{shown} of {people}, {first.references} held-out photos, family {family}"
    sections = [
        ("Figures", _figures(scored, differences, bounds)),
        ("Plots", plots(scored)),
        ("Pictures", _grid(scored, references) if len(scored) == 1 else _side_by_side(scored, references)),
        ("How it was measured", _how(scored)),
    ]
    write_atomic(path, html_page(title, "evaluation", [f"BoLID evaluation: {facts}"], sections, _STYLE))


# ---- figures ------------------------------------------------------------------------------------------------------


def _figures(
    scored: Sequence[Scored],
    differences: Mapping[str, Mapping[str, Difference]],
    bounds: Sequence[Scored],
) -> str:
    evaluations = [one.evaluation for one in scored]
    several, columns = len(scored) + len(bounds) > 1, [*scored, *bounds]
    head = ["metric", *(one.name for one in columns)] if several else ["metric", "value", "95 % interval"]
    rows = []
    missing = []
    for name, metric in evaluations[0].metrics.items():
        if all(evaluation.metrics[name].value is None for evaluation in evaluations):
            missing.append(f"{words(name)}: {escape(metric.note)}")
            continue
        arrow = "↑" if DESCRIPTIONS[name][0] == HIGHER else "↓"
        cells = [f'<th scope="row">{words(name)} <span class="quiet">{arrow}</span></th>']
        for one in columns:
            figure = one.evaluation.metrics[name]
            mark = _mark(differences.get(one.name, {}).get(name))
            interval = "" if figure.low is None else f"{number(figure.low)} to {number(figure.high)}"
            if several:
                cells.append(f"<td>{number(figure.value)}{mark}<br><span class=quiet>{interval}</span></td>")
            else:
                cells += [f"<td>{number(figure.value)}</td>", f"<td class=quiet>{interval}</td>"]
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
    key = "<p class=quiet>↑ more is better, ↓ less is better. Intervals are 95 % intervals."
    if len(scored) > 1:
        key += (
            f" * differs from {escape(scored[0].name)}: paired by person and prompt, p at most 0.05 with "
            "Holm's correction for all differences of this table."
        )
    if bounds:
        key += (
            " Real photos: half of each person's held-out photos, scored against the other half. Strangers: the same "
            "photos, scored as if they showed the next person."
        )
    key += "</p>"
    if missing:
        key += f"<details><summary>Not measured: {len(missing)}</summary><ul>{_items(missing)}</ul></details>"
    return table + key + _ratios(scored) + "".join(map(_measurements, scored))


def _items(texts: Sequence[str]) -> str:
    return "".join(f"<li>{text}</li>" for text in texts)


def _by(metric: Metric) -> str:
    return escape(metric.measured_by) + (f". {escape(metric.note)}" if metric.note else "")


def _mark(difference: Difference | None) -> str:
    return "*" if difference is not None and difference.differs else ""


def _ratios(scored: Sequence[Scored]) -> str:
    """True body ratios beside those measured in the pictures."""
    first = scored[0].evaluation
    if not first.ratios:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in ("body ratio", "true", *(one.name for one in scored)))
    rows = []
    for name, pair in first.ratios.items():
        cells = [f'<th scope="row">{words(name)}</th><td>{number(pair["true"])}</td>']
        for one in scored:
            found = one.evaluation.ratios.get(name)
            off = "" if found is None else f"{found['pictures'] / found['true'] - 1:+.1%}"
            cells.append(
                f"<td>{'–' if found is None else number(found['pictures'])} <span class=quiet>{off}</span></td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=quiet>Body ratios, means over the people, measured in the pictures by the body probe.</p>"
    )


def _measurements(one: Scored) -> str:
    """The true body's measurements beside those measured in the pictures."""
    found = one.evaluation.measurements
    if not found:
        return ""
    titles = ("measurement, cm (kg)", "true", one.name, "mean error", "of as many photos")
    head = "".join(f"<th>{escape(text)}</th>" for text in titles)
    rows = [
        f'<tr><th scope="row">{words(name)}</th>'
        + "".join(f"<td>{row[key]:.1f}</td>" for key in ("true", "pictures", "error", "floor"))
        + "</tr>"
        for name, row in found.items()
    ]
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=quiet>At the true stature, means over the people; what photos are off by is the reader's own "
        "error.</p>"
    )


# ---- pictures -----------------------------------------------------------------------------------------------------


def _grid(scored: Sequence[Scored], references: PictureFolder) -> str:
    """For each person a held-out photo, and the pictures whose body is nearest and farthest."""
    (one,) = scored
    rows = []
    for person in sorted({p for p in one.people if p})[:MOST_PEOPLE]:
        places = [i for i, name in enumerate(one.people) if name == person]
        ranked, by = _ranked(one, places)
        photo = next((p for p in references.pictures if p.person == person), None)
        cells = [_cell(references, photo, "reference photo", person)]
        if len(ranked) == 1:
            cells.append(_cell(one.folder, one.pictures[ranked[0]], "generated", one.pictures[ranked[0]].prompt))
        elif ranked:
            for label, place in ((f"nearest by {by}", ranked[0]), (f"farthest by {by}", ranked[-1])):
                cells.append(_cell(one.folder, one.pictures[place], label, one.pictures[place].prompt))
            for place in ranked[1:-1][: 6 - len(cells)]:
                cells.append(_cell(one.folder, one.pictures[place], "generated", one.pictures[place].prompt))
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


def _side_by_side(scored: Sequence[Scored], references: PictureFolder) -> str:
    """A row for a person and prompt: a held-out photo, then what each method made of it."""
    found: dict[tuple[str, str], dict[int, Picture]] = {}
    for method, one in enumerate(scored):
        for picture, person in zip(one.pictures, one.people, strict=True):
            if person:
                found.setdefault((person, picture.prompt), {}).setdefault(method, picture)
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
        for method, one in enumerate(scored):
            cells.append(_cell(one.folder, found[person, prompt][method], one.name, ""))
        rows.append(f"<p class=prompt>{escape(prompt)}</p><div class=row>{''.join(cells)}</div>")
    return "".join(rows)


def _cell(folder: PictureFolder, picture: Picture | None, label: str, text: str) -> str:
    image = "" if picture is None else _thumbnail(folder, picture, f"{label}: {text}" if text else label)
    words = f"<b>{escape(label)}</b> {escape(text)}"
    return f"<figure class=picture>{image}<figcaption>{words}</figcaption></figure>"


def _thumbnail(folder: PictureFolder, picture: Picture, label: str) -> str:
    from PIL import Image

    try:
        image = Image.fromarray(folder.load(picture))
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


def _how(scored: Sequence[Scored]) -> str:
    evaluation = scored[0].evaluation
    held_out = evaluation.held_out
    if held_out.get("excluded"):
        protocol = f"{held_out['excluded']} reference photos had made a profile and were left out."
    elif held_out.get("checked"):
        protocol = "None of the reference photos had made a profile."
    else:
        protocol = "Which photos made the profiles is not known, so whether any is among the references is not either."
    notes = dict.fromkeys(note for one in scored for note in one.evaluation.notes)
    rejected: dict[str, list[str]] = {}
    for one in scored:
        for reason, names in one.evaluation.rejected.items():
            rejected.setdefault(reason, []).extend(name for name in names if name not in rejected.get(reason, []))
    parts = [f"<p>{escape(protocol)}</p>", *(f"<p>{escape(note)}.</p>" for note in notes)]
    # One method's table says by what, where it is wide enough for that.
    by = '<span class="narrow">' if len(scored) == 1 else "<span>"
    terms = "".join(
        f"<dt>{words(name)}</dt><dd>{escape(DESCRIPTIONS[name][1])}. {by}By: {_by(metric)}</span></dd>"
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


_STYLE = """
.narrow { display: none; }
.scroll { margin: 14px 0 8px; }
table { overflow-wrap: normal; }
td, thead th, tbody th { white-space: nowrap; }
td.by { white-space: normal; min-width: 300px; }
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
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 14px; }
.prompt { margin: 18px 0 6px; }
.picture { max-width: 180px; }
.picture img { width: 100%; }
.picture figcaption { margin: 5px 0 0; line-height: 1.35; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 5; overflow: hidden; }
dl { grid-template-columns: max-content minmax(0, 1fr); }
dt { font-weight: 500; } dd { color: #5b6770; }
@media (max-width: 560px) { table .by { display: none; } .narrow { display: inline; }
  td.quiet { white-space: normal; }
  .row { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; } }
"""
