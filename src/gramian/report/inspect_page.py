"""The page of ``gramian inspect``: what the spectra of a model's layers look like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from gramian.report.charts import COLOURS, Bar, Part, Series, bars, lines
from gramian.report.page import (
    Cell,
    Html,
    Tile,
    chip,
    count,
    definitions,
    details,
    escape,
    grid,
    note,
    number,
    page,
    percent,
    shorten,
    table,
    tiles,
)
from gramian.spectra import LayerReport
from gramian.spectra.layers import SUITS

ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
BINS = 24
"""Most bins of an eigenvalue density, equally wide on a logarithmic axis."""
DECADES = 1e-4
"""Eigenvalues below this share of the largest are not drawn."""
FOLD = 60
"""More layers than this are folded away under a line of text."""


def inspect_page(model: str, layers: Sequence[LayerReport], left_alone: Mapping[str, str], *, keep: float = 0.5) -> str:
    """The page as one HTML document.

    Args:
        model: what was inspected.
        layers: at least one report.
        left_alone: tensors that are not reported, and why.
        keep: share of the numbers that the tried structures were allowed.
    """
    sections: list[tuple[str, str]] = [("", _headline(layers)), ("Layers", _table(layers))]
    # Two columns that fill the page: their rows line up.
    columns = (
        "display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:20px;align-items:start"
    )
    pair = f'<div style="{columns}">{_exponents(layers)}{_ranks(layers)}</div>'
    sections.append(("Exponents and ranks", _fold(layers, pair)))
    if any(layer.suits for layer in layers):
        sections.append(("Which structure suits", _fold(layers, _heatmap(layers, keep))))
    densities = note(
        "The share of a layer's eigenvalues per decade, on logarithmic axes; the horizontal one shows the eigenvalue's "
        "decimal exponent. The straight line is the fitted power law, from xmin (dashed) on."
    )
    sections.append(("Eigenvalue densities", densities + _fold(layers, grid(map(_density, layers), small=True))))
    if left_alone:
        rows = [[name, reason] for name, reason in left_alone.items()]
        sections.append(("Left alone", table(["tensor", "reason"], rows)))
    sections.append(("How to read this", _glossary(keep)))
    return page(f"Spectra of {model}", "What the weights alone say, without any data.", sections)


def _fold(layers: Sequence[LayerReport], body: str) -> str:
    return body if len(layers) <= FOLD else details(f"{len(layers)} layers", body)


def _headline(layers: Sequence[LayerReport]) -> Html:
    alphas = [layer.alpha for layer in layers if layer.alpha is not None]
    corrected = [layer.farms for layer in layers if layer.farms is not None]
    redundancy = median(layer.redundancy for layer in layers)
    best = Counter(layer.best for layer in layers if layer.best)
    kinds = Counter(layer.kind for layer in layers)
    tables = sum(layer.parameters for layer in layers if layer.embedding)
    items = [
        Tile("Matrices", str(len(layers)), ", ".join(f"{many} {kind}" for kind, many in kinds.most_common(3))),
        Tile("Numbers stored", count(sum(layer.parameters for layer in layers)), f"{count(tables)} in embeddings"),
        Tile("Redundancy", percent(redundancy, 0), "median; 1 \N{MINUS SIGN} effective rank / full rank", redundancy),
        Tile(
            f"Exponent {ALPHA}",
            number(median(alphas)) if alphas else number(None),
            f"median of {len(alphas)}; {len(layers) - len(alphas)} refused" if alphas else "refused for every layer",
        ),
    ]
    if corrected:
        spread = f"{number(min(corrected))} to {number(max(corrected))}"
        items.append(Tile(f"{ALPHA} free of shape", number(median(corrected)), f"median (FARMS); {spread}"))
    if best:
        name, many = best.most_common(1)[0]
        items.append(Tile("Suits most often", _structure(name), f"{many} of {sum(best.values())} layers, without data"))
    return tiles(items)


def _label(name: str) -> str:
    """The end of a long name, which tells layers apart; its beginning is shared by many."""
    return name if len(name) <= 27 else f"\N{HORIZONTAL ELLIPSIS}{name[-26:]}"


def _structure(kind: str) -> str:
    return {"skeleton": "low rank"}.get(kind, kind.replace("_", " "))


def _name(layer: LayerReport) -> Cell:
    mark = ' <small class="muted">embedding</small>' if layer.embedding else ""
    return Cell(Html(f"{escape(layer.name)}{mark}"), layer.name)


def _table(layers: Sequence[LayerReport]) -> Html:
    structured = any(layer.kind != "dense" for layer in layers)
    headings = ["layer", "shape", *(["structure"] if structured else [])]
    headings += ["effective rank", "stable rank", "rank at 90 / 99 %", ALPHA, "95 % interval", "D"]
    headings += [f"{ALPHA} free of shape", "nearest row", "suits"]
    rows: list[list[str | float | Cell | None]] = []
    for layer in layers:
        values, fit = layer.spectrum, layer.power_law
        share = values.effective_rank / min(layer.shape)
        bar = f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
        rank = Html(f'<span class="change">{values.effective_rank:.0f}{bar}</span>')
        interval = Cell(number(None), None, True)
        if fit.valid and fit.interval:
            low, high = fit.interval
            interval = Cell(f"{low:.2f} to {high:.2f}", high - low, True)
        refused = Html(f'<abbr title="{escape(fit.reason)}">refused</abbr>')
        rows.append(
            [
                _name(layer),
                Cell(" \N{MULTIPLICATION SIGN} ".join(map(str, layer.shape)), math.prod(layer.shape), True),
                *([_structure(layer.kind)] if structured else []),
                Cell(rank, share, True),
                Cell(f"{values.stable_rank:.1f}", values.stable_rank, True),
                Cell(f"{values.rank_at(0.9)} / {values.rank_at(0.99)}", values.rank_at(0.9), True),
                Cell(refused if layer.alpha is None else f"{layer.alpha:.2f}", layer.alpha, True),
                interval,
                _decimal(None if math.isnan(fit.D) else fit.D, 3),
                _decimal(layer.farms, 2),
                _decimal(layer.neighbour_cosine, 2),
                number(None) if layer.best is None else _structure(layer.best),
            ]
        )
    return table(
        headings, rows, caption="Click a heading to sort. The bar is the effective rank as a share of full rank."
    )


def _decimal(value: float | None, digits: int) -> Cell:
    return Cell(number(None) if value is None else f"{value:.{digits}f}", value, True)


_STEP = 22.0
"""Height of a row, that of ``charts.bars``, so that figures side by side line up."""
_WIDTH = 500.0


def _exponents(layers: Sequence[LayerReport]) -> Html:
    """Every exponent with its interval, and the corrected one, one row a layer."""
    # Half of an outlying interval would squeeze all others; what runs off the axis ends in an arrow.
    tops = sorted(max(v for v in (layer.alpha, layer.farms, 2.0) if v is not None) for layer in layers)
    high = min(max(4.0, tops[int(0.9 * (len(tops) - 1))] * 1.5), 12.0)
    left = min(190.0, 14 + 6.2 * max(len(_label(layer.name)) for layer in layers))
    height = _STEP * len(layers)

    def at(value: float) -> float:
        return left + (_WIDTH - 10 - left) * (min(max(value, 1.0), high) - 1) / (high - 1)

    body = []
    for tick in range(1, math.floor(high) + 1):
        body.append(f'<path class="rule" d="M{at(tick):.1f},0V{height:.0f}"/>')
        body.append(f'<text x="{at(tick):.1f}" y="{height + 15:.0f}" text-anchor="middle">{tick}</text>')
    body.append(f'<path class="axis" d="M{left:.1f},{height:.0f}H{_WIDTH - 10:.0f}"/>')
    for index, layer in enumerate(layers):
        middle = _STEP * (index + 0.5)
        text = (
            f"{ALPHA} {number(layer.alpha)}"
            if layer.alpha is not None
            else f"{ALPHA} refused ({layer.power_law.reason})"
        )
        body.append(f"<g><title>{escape(layer.name)}: {escape(text)}, free of shape {number(layer.farms)}</title>")
        body.append(f'<text class="label" x="{left - 8:.0f}" y="{middle + 4:.1f}" text-anchor="end">')
        body.append(f"{escape(_label(layer.name))}</text>")
        if layer.alpha is not None and layer.power_law.interval is not None:
            low, top = layer.power_law.interval
            arrow = "m-5,-3.5l5,3.5l-5,3.5" if top > high else ""
            path = f"M{at(low):.1f},{middle}H{at(top):.1f}{arrow}"
            body.append(f'<path class="curve" style="stroke:{COLOURS[0]};opacity:.45" d="{path}"/>')
        if layer.alpha is not None and layer.alpha > high:
            body.append(f'<path fill="{COLOURS[0]}" d="M{_WIDTH - 14:.1f},{middle - 5}l9,5l-9,5z"/>')
        elif layer.alpha is not None:
            body.append(f'<circle class="point" cx="{at(layer.alpha):.1f}" cy="{middle}" r="4" fill="{COLOURS[0]}"/>')
        if layer.farms is not None:
            x, y = at(layer.farms), middle
            diamond = f"M{x:.1f},{y - 4.5}l4.5,4.5l-4.5,4.5l-4.5,-4.5z"
            body.append(f'<path class="point" fill="{COLOURS[1]}" d="{diamond}"/>')
        body.append("</g>")
    keys = (chip(f"{ALPHA} with 95 % interval", COLOURS[0]), chip(f"{ALPHA} free of shape (FARMS)", COLOURS[1]))
    legend = "".join(f"<li>{key}</li>" for key in keys)
    title = "Heavy-tail exponents<small>Small is heavy-tailed. A wide interval means: do not quote this number.</small>"
    return Html(
        f'<figure><figcaption>{title}</figcaption><ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {_WIDTH:g} {height + 18:g}" role="img"><title>Heavy-tail exponents</title>{"".join(body)}'
        "</svg></figure>"
    )


def _ranks(layers: Sequence[LayerReport]) -> Html:
    """Effective and stable rank as shares of full rank, one row a layer."""
    rows = []
    for layer in layers:
        full = min(layer.shape)
        stable, effective = layer.spectrum.stable_rank / full, layer.spectrum.effective_rank / full
        parts = [Part(stable, COLOURS[2], "stable"), Part(max(effective - stable, 0.0), COLOURS[0], "effective")]
        rows.append(Bar(_label(layer.name), parts, f"{layer.spectrum.effective_rank:.0f} of {full}", 1.0))
    return bars(
        rows,
        title="Ranks",
        subtitle="Shares of full rank. Stable rank is small where one direction dominates.",
        legend={"stable rank": COLOURS[2], "effective rank": COLOURS[0]},
    )


def _heatmap(layers: Sequence[LayerReport], keep: float) -> str:
    shown = [layer for layer in layers if layer.suits]
    errors = sorted(error for layer in shown for error in layer.suits.values())
    # One layer that anything suits would leave all others pale.
    low, high = errors[len(errors) // 20], errors[-1]
    rows: list[list[str | float | Cell | None]] = []
    for layer in shown:
        row: list[str | float | Cell | None] = [layer.name]
        for kind in SUITS:
            error = layer.suits.get(kind)
            if error is None:
                row.append(None)
                continue
            strength = 60 * min((high - error) / (high - low), 1.0) if high > low else 0.0
            style = f"background:color-mix(in srgb,var(--c0) {strength:.0f}%,var(--surface))"
            weight = ";font-weight:700" if kind == layer.best else ""
            text = f'<span style="display:block;margin:-6px -14px;padding:6px 14px;{style}{weight}">{error:.3f}</span>'
            row.append(Cell(Html(text), error, True))
        rows.append(row)
    caption = (
        "Relative error in the Frobenius norm of the best approximation that stores at most "
        f"{percent(keep, 0)} of the numbers: stronger colour, smaller error; the smallest of a layer in bold."
    )
    hint = note(
        "Without data every direction of the input counts alike, so this is only a hint: gramian compress weighs "
        "errors with Gram matrices of real inputs and gradients, and often decides otherwise."
    )
    return hint + table(["layer", *map(_structure, SUITS)], rows, caption=caption)


def _density(layer: LayerReport) -> Html:
    """The share of eigenvalues per decade, over the top four decades, and the fitted power law.

    Per decade, not per unit: the bulk is a hump and the tail a line beside it, where a density per unit would give most
    of the picture to the smallest eigenvalues.
    """
    values, fit = layer.spectrum.eigenvalues.cpu(), layer.power_law
    shown = values[values > DECADES * values[0]].log10()
    subtitle = "refused" if layer.alpha is None else f"{ALPHA} {layer.alpha:.2f}, D {fit.D:.2f}"
    curves = []
    if len(shown) > 1 and bool(shown[0] > shown[-1]):
        counts, edges = torch.histogram(shown, max(min(BINS, len(shown) // 8), 4))
        width = float(edges[1] - edges[0]) * len(values)
        middles = ((edges[1:] + edges[:-1]) / 2).tolist()
        density = [(x, many / width) for x, many in zip(middles, counts.tolist(), strict=True) if many]
        curves.append(Series("density", density, COLOURS[0]))
        if layer.alpha is not None:
            scale = math.log(10) * fit.tail / len(values) * (fit.alpha - 1)
            ends = [(math.log10(x), scale * (x / fit.xmin) ** (1 - fit.alpha)) for x in (fit.xmin, fit.xmax)]
            curves.append(Series("power law", ends, COLOURS[1]))
    mark = math.log10(fit.xmin) if layer.alpha is not None else None
    # A zero-width space after each dot: names break there first.
    title = shorten(layer.name, 60).replace(".", ".\u200b")
    return lines(curves, title=title, subtitle=subtitle, log_y=True, mark=mark, small=True)


def _glossary(keep: float) -> Html:
    return definitions(
        [
            (
                "Effective rank",
                "exp of the entropy of the singular values, scaled to sum to one (Roy and Vetterli 2007): how many "
                "directions the matrix really uses.",
            ),
            ("Stable rank", "Sum of the eigenvalues of WᵀW over the largest: small where one direction dominates."),
            ("Rank at 90 / 99 %", "The fewest directions that hold that share of the squared Frobenius norm."),
            (
                f"{ALPHA}, D and the interval",
                "Exponent of a power law fitted to the largest eigenvalues; D is its distance to them. Both are "
                "WeightWatcher's. The interval comes from resampling the eigenvalues, xmin chosen anew each time. "
                "Refused below 50 eigenvalues or above D = 0.2.",
            ),
            (
                f"{ALPHA} free of shape",
                f"A long matrix has a larger {ALPHA} than a square one, whatever it learned. FARMS measures square "
                f"windows, so that layers of different shapes compare. Its level is not that of {ALPHA}: the folklore "
                "of 2 to 6 does not apply.",
            ),
            (
                "Nearest row",
                "Mean of the largest absolute cosine of a row to any other: 1 where every neuron has a copy. It grows "
                "with the number of rows, so compare layers of one shape.",
            ),
            (
                "Suits",
                f"Of four structures at {percent(keep, 0)} of the numbers, the one with the least Frobenius error.",
            ),
        ]
    )
