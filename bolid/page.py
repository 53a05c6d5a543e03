"""An HTML page that needs no other file: `evaluate`'s and `fieldtest`'s reports share its frame and its style."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; background: #fff; color: #1d2327;
  font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; font-weight: 600; margin: 0; }
h2 { font-size: 17px; font-weight: 600; margin: 40px 0 12px; padding-top: 12px; border-top: 1px solid #dfe3e6; }
h3 { font-size: 15px; margin: 24px 0 4px; font-weight: 600; }
p { margin: 6px 0; max-width: 75ch; }
.quiet, .by { color: #5b6770; font-size: 13px; font-weight: 400; }
details { margin: 6px 0; } details, summary { color: #5b6770; font-size: 13px; } summary { cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; border-bottom: 1px solid #edf0f2; }
thead th { font-weight: 600; font-size: 13px; color: #5b6770; border-bottom-color: #c9d0d5; }
tbody th { font-weight: 500; overflow-wrap: normal; }
.row { margin: 6px 0 20px; }
.row img { display: block; max-width: 100%; height: auto; border-radius: 3px; background: #f2f4f5; }
dl { display: grid; gap: 3px 18px; font-size: 14px; margin: 6px 0; } dd { margin: 0; }
@media (max-width: 560px) { body { padding: 18px 14px 40px; } dl { display: block; } dd { margin-bottom: 8px; }
  th, td { padding-right: 9px; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title} · BoLID {kind}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{facts}
</header>
{body}
</body>
</html>
"""


def html_page(title: str, kind: str, facts: list[str], sections: list[tuple[str, str]], style: str) -> str:
    """The page. `kind`: what it is, for the window's title; `facts`: lines below the heading, plain text; `sections`:
    (heading, HTML), those without content are left out; `style`: CSS besides `STYLE`.
    """
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections if content)
    lines = "\n".join(f'<p class="quiet">{escape(fact)}</p>' for fact in facts)
    return _PAGE.format(title=escape(title), kind=kind, facts=lines, body=body, style=STYLE + style)
