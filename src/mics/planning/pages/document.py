"""One page of HTML that needs nothing else: text, tables, and figures that plotly draws.

[Note: text that nobody trusts]
Names of runs, models and nodes, samples and configurations are whatever somebody wrote. Each is
escaped where it is put into the page, figures travel as JSON in which no tag can begin, and the
page's own policy runs no script but the two it knows by their hashes and loads nothing from
anywhere: what slipped through would not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.offline

_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 1.5rem auto; }
body { padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0; } .note { font-size: 13px; opacity: .75; }
.lead { border-left: 4px solid #4477aa; padding-left: .8rem; margin: .8rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: .5rem; }
.facts { margin: .8rem 0; } .facts div { background: #8881; border-radius: 8px; }
.facts div { padding: .45rem .7rem; } .facts dt { font-size: 12px; opacity: .75; }
.facts dd { margin: 0; font-size: 1.05rem; font-weight: 600; line-height: 1.3; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: right; padding: 4px 9px; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; } td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
pre { background: #8881; border-radius: 8px; padding: .6rem .8rem; overflow-x: auto; }
pre { font-size: 13px; white-space: pre-wrap; margin: .5rem 0; } summary { cursor: pointer; }
.option { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
@media (max-width: 640px) { .facts { grid-template-columns: 1fr 1fr; } }
.dense { font-size: 12px; width: 100%; } .dense th, .dense td { padding: 4px 5px; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: 12.5px; margin: .2rem 0; }
.legend span { display: inline-block; width: 11px; height: 11px; border-radius: 3px; }
.legend span { margin-right: .4rem; } .less { display: none; }
@media (max-width: 640px) { .more { display: none; } .less { display: block; } }
@media (max-width: 640px) { table { font-size: 12px; } th, td { padding: 4px 5px; } }
@media (max-width: 640px) { td:first-child { white-space: normal; } }
@media (max-width: 640px) { .facts dd { font-size: .95rem; } body { margin: 1rem auto; } }
"""

# A finger that moves over a figure scrolls the page; a mouse zooms. Colours of text follow the
# page, which follows the reader's choice of light or dark.
_DRAW = """
const coarse = matchMedia('(pointer: coarse)').matches || innerWidth <= 640;
function look() {
  const ink = getComputedStyle(document.body).color;
  return {'font.color': ink, 'xaxis.linecolor': ink, 'yaxis.linecolor': ink};
}
const places = document.querySelectorAll('[data-figure]');
for (const place of places) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  if (coarse) {
    figure.layout.dragmode = false;
    figure.layout.font.size = 11;
  }
  Plotly.newPlot(place, figure.data, figure.layout, {
    responsive: true, displayModeBar: false,
  }).then(() => Plotly.relayout(place, look()));
}
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  for (const place of places) Plotly.relayout(place, look());
});
"""


@dataclass(frozen=True)
class Figure:
    """What plotly draws.

    Args:
        data: plotly's traces; text in them is escaped already.
        height: pixels.
        layout: plotly's layout, over that of all figures.
    """

    data: Sequence[Mapping[str, Any]]
    height: int = 320
    layout: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Args:
        heading: plain text.
        figure: to be drawn.
        html: more, made by the functions below.
        note: plain text in small letters, at the end.
    """

    heading: str
    figure: Figure | None = None
    html: str = ""
    note: str = ""


def document(title: str, top: str, sections: Sequence[Section]) -> str:
    """Write the page.

    Args:
        title: plain text.
        top: HTML between the title and the first section, made by the functions below.
        sections: in order.
    """
    figures: list[str] = []
    body = [f"<h1>{escape(title)}</h1>", top]
    for section in sections:
        body.append(f"<section><h2>{escape(section.heading)}</h2>")
        if section.figure is not None:
            name = f"figure-{len(figures)}"
            figures.append(_as_json(name, section.figure))
            height = section.figure.height
            body.append(_legend(section.figure))
            body.append(f'<div data-figure="{name}" style="height:{height}px"></div>')
        body.append(section.html)
        if section.note:
            body.append(f'<p class="note">{escape(section.note)}</p>')
        body.append("</section>")
    scripts = [plotly.offline.get_plotlyjs(), _DRAW] if figures else []
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {' '.join(map(_hash, scripts)) or chr(39) + 'none' + chr(39)}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n"
        + "\n".join(part for part in (*body, *figures) if part)
        + "".join(f"\n<script>{script}</script>" for script in scripts)
        + "\n</body></html>\n"
    )


def facts(pairs: Mapping[str, str]) -> str:
    """Write short facts as tiles: what it is, and its value, plain text both."""
    tiles = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in pairs.items()
    )
    return f'<dl class="facts">{"".join(tiles)}</dl>'


def lead(text: str) -> str:
    """Write the sentence that matters most."""
    return f'<p class="lead">{escape(text)}</p>'


def paragraphs(lines: Sequence[str], *, small: bool = False) -> str:
    """Write lines of plain text."""
    kind = ' class="note"' if small else ""
    return "".join(f"<p{kind}>{escape(line)}</p>" for line in lines)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], on_a_phone: Sequence[str] | None = None
) -> str:
    """Write a table of plain text; one that is too wide for the screen moves by itself.

    Args:
        head: names of the columns.
        rows: cells.
        on_a_phone: columns that a narrow screen shows; all of them by default.
    """
    kinds = ["" if on_a_phone is None or name in on_a_phone else ' class="more"' for name in head]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in pairs)

    lines = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    hint = "" if on_a_phone is None else '<p class="note less">A wider screen shows more.</p>'
    dense = ' class="dense"' if len(head) > 10 else ""
    return f'<div class="wide"><table{dense}><tr>{line("th", head)}</tr>{lines}</table></div>{hint}'


def verbatim(text: str) -> str:
    """Write text as it is, line by line."""
    return f"<pre>{escape(text)}</pre>"


def command(text: str) -> str:
    """Write a command whose lines end between options, not at the hyphens of one."""
    parts: list[str] = []
    for word in text.split(" "):
        if parts and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    spans = (f'<span class="option">{escape(part)}</span>' for part in parts)
    return f"<pre>{' '.join(spans)}</pre>"


def folded(summary: str, html: str) -> str:
    """Hide what few want to read behind a line of plain text."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def _legend(figure: Figure) -> str:
    """Name the traces by their colours; a single one is named by the heading."""
    shown = {}
    for trace in figure.data:
        if trace.get("showlegend", True):
            colour = trace.get("marker", {}).get("color") or trace.get("line", {}).get("color")
            shown[trace["name"]] = trace.get("fillcolor", colour)
    if len(shown) < 2:
        return ""
    parts = (
        f'<div><span style="background:{escape(str(colour))}"></span>{escape(name)}</div>'
        for name, colour in shown.items()
    )
    return f'<div class="legend">{"".join(parts)}</div>'


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _as_json(name: str, figure: Figure) -> str:
    axis = {"automargin": True, "gridcolor": "#8883", "zerolinecolor": "#8886", "ticks": ""}
    axis |= {"tickangle": 0, "separatethousands": True}
    layout: dict[str, Any] = {
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "showlegend": False,  # plotly's own takes half of a phone's screen
        "hoverlabel": {"align": "left"},
        "height": figure.height,
        "autosize": True,
        "bargap": 0.3,
    }
    given = dict(figure.layout or {})
    for side in ("xaxis", "yaxis"):
        layout[side] = {**axis, **given.pop(side, {})}
    text = json.dumps({"data": list(figure.data), "layout": layout | given}, allow_nan=False)
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
