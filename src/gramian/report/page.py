"""A self-contained HTML page: one file, no network, light and dark, from a phone to paper.

Text that a caller passes as ``str`` is escaped; only ``Html`` values go into the page as they are. Sections take HTML
bodies, built from ``table``, ``tiles``, ``definitions``, ``code``, ``grid`` and the figures of
``gramian.report.charts``.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeGuard

NOTHING = "\N{EN DASH}"
"""What stands for a value that is missing or not finite."""


class Html(str):
    """Text that is HTML already and must not be escaped again."""

    __slots__ = ()


class Cell(NamedTuple):
    """A table cell whose content and sort key differ; a missing `sort` key sorts last."""

    content: str
    sort: float | str | None
    numeric: bool = False


Value = str | float | Cell | None
"""What a table's row holds: a text (left), a number (right, shown by ``number``), nothing, or a ``Cell``."""


class Tile(NamedTuple):
    """A headline figure: what it is, its value, and a line of detail; `share` in 0..1 draws a bar under it."""

    label: str
    value: str
    detail: str = ""
    share: float | None = None


def escape(value: object) -> Html:
    """`value` as HTML text; an ``Html`` value passes as it is. Characters that HTML forbids show as U+FFFD."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates, which neither HTML nor a terminal may get, as U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def shorten(text: str, limit: int = 96) -> str:
    """`text` with its middle left out when it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (limit - 1 - head) :]}"


def finite(value: float | None) -> TypeGuard[float]:
    """Whether `value` is a number that can be shown."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits (0.00123, 12.3, 4.56e-7); an integer below a million in full (12,345)."""
    if not finite(value):
        return NOTHING
    if isinstance(value, int) and abs(value) < 1_000_000:
        return f"{value:,}"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -4 <= int(exponent) < 6:
        return f"{value:,.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}e{int(exponent)}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in 0..1 as a percentage: 0.4321 gives "43.2 %"."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%" if finite(share) else NOTHING


def count(value: float | None, unit: str = "") -> str:
    """A large count with a decimal prefix: 10616832 gives "10.6 M"; `unit` follows ("B" for bytes)."""
    if not finite(value):
        return NOTHING
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        # 999,950 would round to "1000.0 k": it is 1.0 M.
        if abs(value) >= 0.99995 * 1000**power:
            return f"{value / 1000**power:.1f}\N{NO-BREAK SPACE}{prefix}{unit}"
    return f"{value:.0f}\N{NO-BREAK SPACE}{unit}".rstrip("\N{NO-BREAK SPACE}")


def tiles(items: Iterable[Tile]) -> Html:
    """A row of headline figures."""
    parts = []
    for tile in items:
        bar = ""
        if finite(tile.share):
            bar = f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, tile.share)):.1f}%"></i></span>'
        parts.append(
            f'<div class="tile"><dt>{escape(tile.label)}</dt><dd><b>{escape(tile.value)}</b>{bar}'
            f"<small>{escape(tile.detail)}</small></dd></div>"
        )
    return Html(f'<dl class="tiles">{"".join(parts)}</dl>')


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[Value]],
    *,
    caption: str = "",
    sort: bool = True,
) -> Html:
    """A table that scrolls sideways where it is too wide, and sorts at a click on a heading.

    Args:
        headings: one text per column.
        rows: one value per column.
        caption: a line under the table.
        sort: whether a click on a heading sorts.
    """
    body = []
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(cells) and all(row[i].numeric for row in cells) for i in range(len(headings))]
    for row in cells:
        parts = []
        for index, cell in enumerate(row):
            tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
            kind = ' class="number"' if cell.numeric else ""
            # The shown text is the sort key unless another one is given.
            key = f' data-sort="{escape(_key(cell.sort))}"' if sort and cell.sort != cell.content else ""
            parts.append(f"<{tag}{scope}{kind}{key}>{escape(cell.content)}</{tag}>")
        body.append(f"<tr>{''.join(parts)}</tr>")
    head = "".join(
        f'<th scope="col"{" class=number" if right else ""}>'
        + (f'<button type="button">{escape(text)}</button>' if sort else escape(text))
        + "</th>"
        for text, right in zip(headings, numeric, strict=True)
    )
    foot = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return Html(
        f'<div class="scroll" tabindex="0"><table{" data-sortable" if sort else ""}>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{foot}"
    )


def _cell(value: Value) -> Cell:
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell(NOTHING, None, numeric=True)
    if isinstance(value, str):
        return Cell(value, value)
    return Cell(number(value), value, numeric=True)


def _key(key: float | str | None) -> str:
    if isinstance(key, float | int):
        return repr(key) if math.isfinite(key) else ""
    return key or ""


def definitions(items: Iterable[tuple[str, str]]) -> Html:
    """Names and their values, in as many columns as there is room for."""
    return Html(
        '<dl class="definitions">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
        + "</dl>"
    )


def code(text: str) -> Html:
    """A block of code."""
    return Html(f"<pre><code>{escape(text)}</code></pre>")


def note(text: str, *, warning: bool = False) -> Html:
    """A paragraph of explanation, or a warning that stands out."""
    return Html(f'<p class="{"warning" if warning else "note"}">{escape(text)}</p>')


def chip(text: str, colour: str = "var(--c0)") -> Html:
    """A small label with a dot of `colour` (a CSS colour, ``var(--c0)`` .. ``var(--c7)``)."""
    return Html(f'<span class="chip"><i style="background:{escape(colour)}"></i>{escape(text)}</span>')


def grid(figures: Iterable[str], *, small: bool = False) -> Html:
    """Figures (HTML) side by side as far as there is room; `small` for small multiples."""
    return Html(f'<div class="grid{" small" if small else ""}">{"".join(figures)}</div>')


def details(summary: str, body: str) -> Html:
    """HTML `body` folded away under a line of text."""
    return Html(f"<details><summary>{escape(summary)}</summary>{body}</details>")


def page(title: str, subtitle: str, sections: list[tuple[str, str]]) -> str:
    """A complete HTML document.

    Args:
        title: heading and window title; escaped.
        subtitle: the line under it; escaped.
        sections: (heading, body). The heading is escaped and, if empty, left out; the body is HTML.
    """
    links, parts = [], []
    for index, (heading, body) in enumerate(sections):
        if heading:
            links.append(f'<a href="#s{index}">{escape(heading)}</a>')
        parts.append(f'<section id="s{index}">{f"<h2>{escape(heading)}</h2>" if heading else ""}{body}</section>')
    navigation = f'<nav aria-label="Sections">{"".join(links)}</nav>' if len(links) > 2 else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="gramian">
<link rel="icon" href="data:,">
<title>{escape(title)} · gramian</title>
<style>{_STYLE}</style>
</head>
<body>
<header><p class="brand">gramian</p><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p>
{navigation}</header>
<main>{"".join(parts)}</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


# Nothing may be fetched: a page that tried to would fail here, not on the reader's aeroplane.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root{
--paper:#fcfcfb;--surface:#fff;--ink:#1b1e23;--muted:#5f6773;--faint:#8b929c;--line:#e3e5e8;--grid:#eceef0;
--accent:#2b5fc7;--track:#e9ebee;--warn:#9a5b00;--warn-paper:#fdf4e3;
--c0:#2b5fc7;--c1:#d9772b;--c2:#1f9583;--c3:#8a57b8;--c4:#c2433a;--c5:#8f7a1c;--c6:#3d93c4;--c7:#9aa1ab;
--mono:ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
@media(prefers-color-scheme:dark){:root{
--paper:#131518;--surface:#1a1d21;--ink:#e6e8eb;--muted:#a0a8b3;--faint:#7b838e;--line:#2c3036;--grid:#25292e;
--accent:#7ea6f4;--track:#2a2f36;--warn:#f0b95a;--warn-paper:#2a2213;
--c0:#7ea6f4;--c1:#f0a05f;--c2:#4fc4b0;--c3:#bd93e6;--c4:#ee7d74;--c5:#cdb64f;--c6:#79c3ec;--c7:#78808b}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 var(--sans);font-variant-numeric:tabular-nums}
header,main{max-width:1240px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
main{padding-bottom:64px}
.brand{margin:0 0 6px;font:600 12px/1 var(--mono);letter-spacing:.08em;color:var(--accent)}
h1{margin:0;font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.015em;overflow-wrap:anywhere;text-wrap:balance}
.subtitle{margin:6px 0 0;color:var(--muted);max-width:80ch;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:20px;padding:10px 0;border-top:1px solid var(--line);
border-bottom:1px solid var(--line);font-size:13px}
a{color:var(--accent);text-decoration:none}
nav a{color:var(--muted)}
a:hover{text-decoration:underline}
section{margin-top:44px;scroll-margin-top:16px}
section:first-child{margin-top:28px}
.under{margin-top:14px}
.under .note{margin-bottom:8px}
h2{margin:0 0 12px;font-size:18px;line-height:1.3;font-weight:650;letter-spacing:-.005em}
h3{margin:24px 0 8px;font-size:14px;font-weight:650}
p{margin:0 0 12px}
.note,.caption{color:var(--muted);max-width:84ch}
.caption{margin-top:8px;font-size:13px}
.warning{margin:0 0 8px;padding:9px 14px;border-left:3px solid var(--warn);background:var(--warn-paper);
border-radius:0 4px 4px 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));margin:0;background:var(--surface);
border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tile{margin:0 -1px -1px 0;padding:14px 16px 13px;border:solid var(--line);border-width:0 1px 1px 0}
.tile dt{font-size:12.5px;color:var(--muted)}
.tile dd{margin:0}
.tile b{display:block;margin-top:3px;font-size:25px;line-height:1.2;font-weight:620;letter-spacing:-.02em}
.tile small{display:block;margin-top:4px;font-size:12.5px;line-height:1.4;color:var(--muted)}
.bar{display:block;height:4px;margin:6px 0 2px;border-radius:2px;background:var(--track);overflow:hidden}
.bar i{display:block;height:100%;border-radius:2px;background:var(--accent)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--surface)}
.scroll:focus-visible,button:focus-visible,summary:focus-visible,a:focus-visible{
outline:2px solid var(--accent);outline-offset:1px}
table{width:100%;border-collapse:collapse;font-size:13px;line-height:1.4}
th,td{padding:6px 10px;text-align:left;font-weight:400;vertical-align:middle;border-top:1px solid var(--grid)}
thead th{padding:0;border:0;border-bottom:1px solid var(--line);font-size:12.5px;
color:var(--muted);background:var(--surface);
vertical-align:bottom}
table:not([data-sortable]) thead th{padding:8px 10px}
tbody tr:first-child>*{border-top:0}
tbody tr>:first-child,table:not([data-sortable]) thead th:first-child,thead th:first-child button{padding-left:16px}
tbody tr>:last-child,table:not([data-sortable]) thead th:last-child,thead th:last-child button{padding-right:16px}
tbody th,td{overflow-wrap:break-word}
tbody th{min-width:9em}
th:first-child{position:sticky;left:0;z-index:1;background:var(--surface)}
tbody tr:hover>*{background:color-mix(in srgb,var(--accent) 5%,var(--surface))}
.number{text-align:right}
td.number{white-space:nowrap}
thead button{all:unset;box-sizing:border-box;width:100%;padding:8px 10px;cursor:pointer}
thead button::after{content:"";display:inline-block;width:1em;margin-right:-1em;text-align:center;font-size:10px}
th[aria-sort] button{color:var(--ink)}
th[aria-sort=ascending] button::after{content:"\\25B2"}
th[aria-sort=descending] button::after{content:"\\25BC"}
.chip{display:inline-flex;align-items:center;gap:6px;white-space:nowrap}
.chip i{flex:none;width:9px;height:9px;border-radius:2px}
.change{display:flex;align-items:center;justify-content:flex-end;gap:10px;white-space:nowrap}
.change .bar{flex:none;width:56px;margin:0;height:5px}
td small,th small{display:block;white-space:nowrap;color:var(--muted)}
.stack{display:grid;gap:14px;min-width:0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:20px;align-items:start}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,165px),1fr));gap:14px 16px}
figure{margin:0;min-width:0;padding:14px 16px 12px;border:1px solid var(--line);border-radius:8px;
background:var(--surface);break-inside:avoid}
.small figure{padding:0;border:0;background:none}
figcaption{margin-bottom:6px;font-size:13.5px;font-weight:600;overflow-wrap:anywhere}
figcaption small{display:block;font-size:12.5px;font-weight:400;color:var(--muted)}
.small figcaption{margin-bottom:2px;font-size:11.5px;font-weight:500;line-height:1.3}
.small figcaption small{font-size:11.5px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px var(--sans);fill:var(--muted);font-variant-numeric:tabular-nums}
svg .label{fill:var(--ink)}
svg .axis{stroke:var(--faint);stroke-width:1;fill:none}
svg .rule{stroke:var(--grid);stroke-width:1;fill:none}
svg .mark{stroke:var(--faint);stroke-width:1;stroke-dasharray:3 3;fill:none}
svg .curve{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round}
svg .point{stroke:var(--surface);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:3px 16px;margin:0 0 8px;padding:0;list-style:none;
font-size:12.5px;color:var(--muted)}
.definitions{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr));gap:0 28px;margin:0}
.definitions div{padding:7px 0;border-top:1px solid var(--line)}
.definitions dt{font-size:12.5px;color:var(--muted)}
.definitions dd{margin:0;overflow-wrap:anywhere}
pre{margin:0 0 12px;padding:12px 16px;overflow-x:auto;border:1px solid var(--line);border-radius:8px;
background:var(--surface);font:13px/1.55 var(--mono)}
summary{padding:4px 0;cursor:pointer;color:var(--muted)}
details[open]>summary{margin-bottom:8px}
@media(max-width:900px){
.grid:not(.small) svg{max-width:620px}
.grid:not(.small) svg text{font-size:12.5px}}
@media(max-width:560px){
header,main{padding-left:16px;padding-right:16px}
header{padding-top:24px}
h1{font-size:23px}
section{margin-top:34px}
.tiles{grid-template-columns:1fr 1fr}
.tile{padding:11px 12px}
.tile b{font-size:21px}
.grid.small{grid-template-columns:1fr 1fr}
figure{padding:12px 10px 10px}
th,td,thead button,table:not([data-sortable]) thead th{padding-left:10px;padding-right:10px}}
@media print{
:root{--paper:#fff;--surface:#fff;--ink:#000;--muted:#444;--faint:#777;--line:#ccc;--grid:#e4e4e4;--accent:#2b5fc7;
--track:#e4e4e4;--warn:#9a5b00;--warn-paper:#fdf4e3;
--c0:#2b5fc7;--c1:#d9772b;--c2:#1f9583;--c3:#8a57b8;--c4:#c2433a;--c5:#8f7a1c;--c6:#3d93c4;--c7:#9aa1ab}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{font-size:10.5pt}
header,main{max-width:none;padding:0}
nav{display:none}
h2,h3{break-after:avoid}
tr,.tiles,.warning{break-inside:avoid}
.scroll{overflow:visible}
table{font-size:7.5pt}
th,td,thead button{padding-left:4px!important;padding-right:4px!important}
thead th{font-size:7pt}
tbody th{min-width:0}
.change .bar{display:none}}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    body.append(...[...body.rows].sort((left, right) => {
      const a = key(left, column), b = key(right, column);
      if (a === "" || b === "") return (a === "") - (b === "");
      return order * (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b);
    }));
  }));
  table.dataset.sortable = "ready";
}
"""
