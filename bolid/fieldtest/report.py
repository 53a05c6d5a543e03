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
from bolid.run import canonical_json, write_atomic

REPORT = "report"
PICTURE_SIDE = 512  # pixels, the longer side of a picture in the page
PHOTO_SIDE = 256


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
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{text}\n</section>" for name, text in sections if text)
    settings = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in data["settings"].items())
    return _PAGE.format(
        title=escape(f"{data['family']}: {_summary(steps)}"), facts=escape(_facts(data)), settings=escape(settings),
        body=body, style=_STYLE,
    )  # fmt: skip


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
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 960px; padding: 28px 20px 60px; background: #fff; color: #1d2327;
  font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; font-weight: 600; margin: 0; }
h2 { font-size: 17px; font-weight: 600; margin: 40px 0 12px; padding-top: 12px; border-top: 1px solid #dfe3e6; }
h3 { font-size: 15px; margin: 24px 0 4px; font-weight: 600; }
p { margin: 6px 0; max-width: 75ch; }
.quiet { color: #5b6770; font-size: 13px; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; border-bottom: 1px solid #edf0f2; }
thead th { font-weight: 600; font-size: 13px; color: #5b6770; border-bottom-color: #c9d0d5; }
tbody th { font-weight: 500; min-width: 130px; overflow-wrap: normal; }
.number { text-align: right; white-space: nowrap; }
.state { white-space: nowrap; }
.state, td.wrong, td.note { font-weight: 500; }
.passed { color: #2e7d4f; } .failed, td.wrong { color: #b3261e; } .running { color: #8a5a00; }
.skipped { color: #5b6770; } td.note { color: #8a5a00; }
pre { overflow-x: auto; background: #f6f7f8; padding: 12px; font-size: 12px; line-height: 1.45; }
details { margin: 6px 0; } summary { cursor: pointer; color: #5b6770; font-size: 13px; }
.groups { display: flex; flex-wrap: wrap; gap: 0 32px; } .groups h3 { margin-top: 6px; }
.row { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0 18px; }
.row img { display: block; max-width: 100%; height: auto; border-radius: 3px; background: #f2f4f5; }
dl { display: grid; grid-template-columns: fit-content(45%) minmax(0, 1fr); gap: 3px 18px; font-size: 14px;
  margin: 6px 0; }
dt { color: #5b6770; } dd { margin: 0; }
@media (max-width: 560px) { body { padding: 18px 14px 40px; } dl { display: block; } dd { margin-bottom: 8px; }
  th, td { padding-right: 9px; font-size: 13.5px; } tbody th { min-width: 92px; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title} · BoLID field test</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="quiet">{facts}</p>
<p class="quiet">{settings}</p>
<p class="quiet">This page holds no path, file name or profile of yours. It shows generated pictures, which may look
like the person of the photos: look at them before you attach it to an issue.</p>
</header>
{body}
</body>
</html>
"""
