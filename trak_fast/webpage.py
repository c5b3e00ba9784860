"""The frame, the style sheet and the looks of a chart that the pages of `trak-fast demo` and `trak-fast bench` share.

Such a page needs no other file and reads well in light and dark.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#7d7d7d"
"""Color of text in charts, as far from white as from black: charts are transparent and shown on either."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #22262b; --soft: #666d75; --line: #dfe2e6; --fill: #f4f5f7;
  --blue: #2f6fb5; --red: #c43d2f; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --text: #dfe2e6; --soft: #9aa1a9; --line: #33383f;
  --fill: #1f2227; --blue: #6ea8e6; --red: #f07f6e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .85rem; }
.chart { width: 100%; max-width: 50rem; height: auto; display: block; margin: 1rem 0; }
.numbers td, .numbers th { padding: .3rem 1.4rem .3rem 0; border-top: 1px solid var(--line); }
.numbers td + td, .numbers th + th { text-align: right; white-space: nowrap; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }
"""


def document(title: str, body: str, style: str, script: str = "") -> str:
    """Puts the frame of a page around its body. A browser refuses such a page to load anything or to run other scripts.

    Args:
        title: Title of the browser's window, as text.
        body: HTML.
        style: CSS that only this page needs.
        script: JavaScript that runs once the body is there.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ending = ""
    if script:
        policy += f"; script-src 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        ending = f"<script>{script}</script>\n"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{one_line(STYLE + style)}</style>
</head>
<body>
{body}
{ending}</body>
</html>
"""


def one_line(text: str) -> str:
    """Sets CSS or SVG in one line."""
    return " ".join(text.split())


def dress(axes: Axes, x: str, y: str) -> None:
    """Gives a chart its labels, and the looks that suit light and dark."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
