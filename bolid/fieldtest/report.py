"""The field test's report: report.json, and one HTML page that needs nothing but a browser.

Pictures are data URIs; a content policy forbids everything else. Texts are scrubbed (privacy.py) before they are
written, all of them and in one place.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.fieldtest.privacy import Scrubber
from bolid.fieldtest.results import FAILED, PASSED, RUNNING
from bolid.page import html_page
from bolid.run import canonical_json, write_atomic

REPORT = "report"
PICTURE_SIDE = 512  # pixels, the longer side of a picture in the page
PHOTO_SIDE = 256
_PRIVATE = (
    "This page holds no path, file name or profile of yours. It shows generated pictures, which may look like the "
    "person of the photos: look at them before you attach it to an issue."
)


def write_report(out: Path, data: Mapping[str, Any], scrub: Scrubber, photos: Sequence[Path] = ()) -> None:
    """Write out/report.json and out/report.html. ``photos``: those that the page shows."""
    plain = scrub.all_of(json.loads(canonical_json(data)))
    write_atomic(out / f"{REPORT}.json", json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / f"{REPORT}.html", page(plain, out, photos))


def page(data: Mapping[str, Any], out: Path, photos: Sequence[Path] = ()) -> str:
    """The HTML of the report's data."""
    steps = data["steps"]
    sections = [("Steps", _table(steps)), ("What failed", _failures(steps)), ("Pictures", _pictures(steps, out))]
    if photos:
        shown = "".join(_image(photo, "a photo", PHOTO_SIDE) for photo in photos)
        sections.append(("Photos", f"<div class=row>{shown}</div>"))
    sections += [("Figures", _figures(steps)), ("Doctor", _doctor(data["doctor"]))]
    settings = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in data["settings"].items())
    facts = [_facts(data), settings, _PRIVATE]
    return html_page(f"{data['family']}: {_summary(steps)}", "field test", facts, sections, _STYLE)


def _summary(steps: Sequence[Mapping[str, Any]]) -> str:
    failed = sum(step["state"] == FAILED for step in steps)
    running = next((step["title"] for step in steps if step["state"] == RUNNING), "")
    passed = sum(step["state"] == PASSED for step in steps)
    text = f"{passed} steps passed, {failed} failed" if failed else f"{passed} steps passed"
    return f"{text}, not ended" if running else text


def _facts(data: Mapping[str, Any]) -> str:
    ended = data["ended"] or "it has not ended: it still runs, or it was stopped in the last step below"
    return f"BoLID {data['bolid']} field test, {data['started']} to {ended}"


def _table(steps: Sequence[Mapping[str, Any]]) -> str:
    rows, on_device = [], any(step["device_peak"] for step in steps)
    for step in steps:
        reason = f"<br><span class=quiet>{escape(step['reason'])}</span>" if step["reason"] else ""
        rows.append(
            f'<tr><th scope="row">{escape(step["title"])}{reason}</th>'
            f'<td><span class="state {escape(step["state"])}">{escape(step["state"])}</span></td>'
            f"<td class=number>{_seconds(step)}</td><td class=number>{_size(step['host_peak'])}</td>"
            + (f"<td class=number>{_size(step['device_peak'])}</td></tr>" if on_device else "</tr>")
        )
    head = "<th>step</th><th></th><th class=number>seconds</th><th class=number>memory</th>"
    head += "<th class=number>device</th>" if on_device else ""
    text = "Memory: the largest that the process had during the step, what earlier steps left included."
    text += " Device: the largest that tensors had on the GPU." if on_device else ""
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class=quiet>{text}</p>"
    )


def _seconds(step: Mapping[str, Any]) -> str:
    return f"{step['seconds']:.1f}" if step["state"] in (PASSED, FAILED) else "–"


def _size(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _failures(steps: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for step in steps:
        failure = step["failure"]
        if failure:
            hint = f"<p>hint: {escape(failure['hint'])}</p>" if failure["hint"] else ""
            parts.append(
                f"<h3>{escape(step['title'])}</h3><p><b>{escape(failure['kind'])}</b>: {escape(failure['message'])}</p>"
                f"{hint}<details><summary>Traceback</summary><pre>{escape(failure['traceback'])}</pre></details>"
            )
    return "".join(parts)


def _pictures(steps: Sequence[Mapping[str, Any]], out: Path) -> str:
    parts = []
    for step in steps:
        images = "".join(_image(out / name, step["title"], PICTURE_SIDE) for name in step["pictures"])
        if images:
            parts.append(f"<div><h3>{escape(step['title'])}</h3><div class=row>{images}</div></div>")
    return f"<div class=groups>{''.join(parts)}</div>" if parts else ""


def _image(path: Path, label: str, side: int) -> str:
    """A smaller copy of a picture, with nothing of what its file says beside the pixels. "" where it cannot be read."""
    from PIL import Image

    from bolid.formats.images import read_photo

    try:
        image = Image.fromarray(read_photo(path))
    except BolidError:
        return ""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{escape(label)}" width="{image.width}" height="{image.height}" src="data:image/jpeg;base64,{data}">'
    )


def _figures(steps: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for step in steps:
        rows = [(name, value) for name, value in step["figures"].items() if value not in ("", {}, [])]
        if rows:
            terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_text(value))}</dd>" for name, value in rows)
            parts.append(f"<h3>{escape(step['title'])}</h3><dl>{terms}</dl>")
    return "".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _doctor(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    parts = []
    for title, rows in found["sections"].items():
        lines = "".join(
            f'<tr><th scope="row">{escape(row["name"])}</th><td class="wide {escape(row["state"])}">'
            f"{escape(row['value'])}"
            + (f"<br><span class=quiet>{escape(row['advice'])}</span>" if row["advice"] else "")
            + "</td></tr>"
            for row in rows
        )
        parts.append(f"<h3>{escape(title)}</h3><table><tbody>{lines}</tbody></table>")
    return "".join(parts)


_STYLE = """
body { max-width: 960px; }
tbody th { min-width: 130px; }
.number { text-align: right; white-space: nowrap; }
.state { white-space: nowrap; }
.state, td.wrong, td.note { font-weight: 500; }
.passed { color: #2e7d4f; } .failed, td.wrong { color: #b3261e; } .running { color: #8a5a00; }
.skipped { color: #5b6770; } td.note { color: #8a5a00; }
pre { overflow-x: auto; background: #f6f7f8; padding: 12px; font-size: 12px; line-height: 1.45; color: #1d2327; }
.groups { display: flex; flex-wrap: wrap; gap: 0 32px; } .groups h3 { margin-top: 6px; }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
dl { grid-template-columns: fit-content(45%) minmax(0, 1fr); }
dt { color: #5b6770; }
@media (max-width: 560px) { th, td { font-size: 13.5px; } tbody th { min-width: 92px; } }
"""
