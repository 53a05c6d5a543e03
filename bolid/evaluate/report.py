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
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections if content)
    write_atomic(path, _PAGE.format(title=escape(title), facts=escape(facts), body=body, style=_STYLE))


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
    return table + key + _ratios(scored)


def _items(texts: Sequence[str]) -> str:
    return "".join(f"<li>{text}</li>" for text in texts)


def _by(metric: Metric) -> str:
    return escape(metric.measured_by) + (f". {escape(metric.note)}" if metric.note else "")


def _mark(difference: Difference | None) -> str:
    return "*" if difference is not None and difference.differs else ""


def _ratios(scored: Sequence[Scored]) -> str:
    """True body ratios beside those read off the pictures."""
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
        "<p class=quiet>Body ratios, means over the people, read off the pictures by the body probe.</p>"
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
