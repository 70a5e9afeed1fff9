"""The page that shows what ``gramian compress`` did: ``render(report)``, from the object of ``schema.json``.

The page stays below 1 MB whatever the model: where it leaves something out it says so, and ``report.json`` has it all.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gramian.report.charts import COLOURS, GREY, Bar, Part, Point, Series, bars, lines, scatter
from gramian.report.page import (
    Cell,
    Html,
    Tile,
    Value,
    chip,
    code,
    count,
    definitions,
    escape,
    finite,
    grid,
    note,
    number,
    page,
    percent,
    shorten,
    table,
    tiles,
)

Json = Mapping[str, Any]

WHEN = ("before", "after")
UNITS = {
    "params": ("parameters", ""),
    "bytes": ("bytes", "B"),
    "flops": ("FLOPs per token", ""),
    "latency": ("nanoseconds for 512 tokens", ""),
}
"""Unit of a budget -> (its name, the unit sign after a decimal prefix)."""

# What keeps the page below 1 MB.
_MOST_LAYERS, _MOST_SPECTRA, _MOST_BLOCKS, _MOST_GROUPS = 500, 48, 48, 16
_MOST_WARNINGS, _MOST_REASONS, _MOST_NAMES = 50, 40, 40


def render(report: Json) -> str:
    """The HTML page for a `report` of ``gramian compress``."""
    model, settings, size = report["model"], report["settings"], report["size"]
    layers = report["layers"]
    colours = structure_colours(layers)
    subtitle = (
        f"{model['class']}, {count(model['parameters'])} parameters. {len(layers)} linear "
        f"layer{'s' if len(layers) != 1 else ''} of {count(size['params_before'])} parameters, "
        f"calibrated on {settings['calibration']['tokens']:,} tokens."
    )
    sections = [
        ("", _headline(report)),
        ("What was chosen", _overview(report, colours)),
        ("Layers", _layers(report, colours)),
        ("Predicted and measured error", _errors(layers, colours)),
        ("Spectra", _spectra(layers)),
        ("Quality and speed", _quality(report)),
        ("Left alone", _left_alone(report["left_alone"])),
        ("How it was made", _settings(report)),
    ]
    if model.get("load"):
        sections.append(("Load the result", code("\n".join(model["load"]))))
    title = f"{shorten(os.path.basename(model['source'].rstrip('/')) or model['source'], 60)}, compressed"
    return page(title, subtitle, [(heading, body) for heading, body in sections if body])


def structure_colours(layers: Sequence[Json]) -> dict[str, str]:
    """Structure -> colour, in the order of appearance; dense layers are grey, for nothing happened to them."""
    names = dict.fromkeys(layer["structure"] for layer in layers)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(name for name in names if name != "dense")}
    return {**colours, **({"dense": GREY} if "dense" in names else {})}


def group_of(name: str) -> str:
    """What the layers of the same role in every block have in common: their name with ``*`` for each number."""
    return re.sub(r"\d+", "*", name)


def block_of(name: str) -> str:
    """The block a layer belongs to: its name up to the first number, or else its first part."""
    found = re.match(r"(?:[^.]+\.)*?[^.]*\d[^.]*(?=\.|$)", name)
    return found.group() if found else name.split(".", 1)[0]


def size_text(size: Json) -> str:
    """``{"rank": 96, "blocks": [4, 4]}`` as "rank 96, blocks 4 × 4", which breaks at commas only."""
    times = "\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}"
    return ", ".join(
        f"{name}\N{NO-BREAK SPACE}{times.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in size.items()
    )


def ratio(after: float | None, before: float | None) -> float | None:
    """``after / before``, or None where that says nothing."""
    return after / before if finite(after) and finite(before) and before > 0 else None


def faster(measurement: Json) -> str:
    """How many times faster the compressed model is: "1.41×"."""
    times = ratio(measurement["before_ms"], measurement["after_ms"])
    return f"{times:.2f}\N{MULTIPLICATION SIGN}" if finite(times) else number(None)


def budget_text(budget: Json) -> str:
    """What was asked and what was used, in one sentence."""
    met = "met" if budget["used"] <= budget["asked"] else "NOT met"
    return (
        f"at most {budget['asked']:,} {UNITS[budget['cost']][0]}, {percent(budget['keep'])} of the chosen layers; used "
        f"{budget['used']:,}, {percent(ratio(budget['used'], budget['asked']))} of the budget: {met}."
    )


def _change(before: float | None, after: float | None, unit: str = "") -> str:
    return f"{count(before, unit)} \N{RIGHTWARDS ARROW} {count(after, unit)}"


def _headline(report: Json) -> str:
    size, kept, cost = report["size"], report["kept"], report["budget"]["cost"]
    name, unit = UNITS[cost]
    whole = f"{_change(size['model_params_before'], size['model_params_after'])} parameters" if cost != "bytes" else ""
    shown = [
        Tile(
            "Kept, chosen layers",
            percent(kept["layers"]),
            f"{_change(size[f'{cost}_before'], size[f'{cost}_after'], unit)} {name if cost != 'bytes' else ''}",
            kept["layers"],
        ),
        Tile("Kept, whole model", percent(kept["model"]), whole, kept["model"]),
    ]
    if finite(size["file_after"]):
        share = ratio(size["file_after"], size["file_before"])
        shown.append(
            Tile("Size on disk", count(size["file_after"], "B"), f"from {count(size['file_before'], 'B')}", share)
        )
    elif cost != "bytes":
        share = ratio(size["bytes_after"], size["bytes_before"])
        detail = f"from {count(size['bytes_before'], 'B')}, chosen layers"
        shown.append(Tile("Size in memory", count(size["bytes_after"], "B"), detail, share))
    if cost != "params":
        share = ratio(size["params_after"], size["params_before"])
        shown.append(Tile("Parameters", count(size["params_after"]), f"from {count(size['params_before'])}", share))
    if cost != "flops":
        share = ratio(size["flops_after"], size["flops_before"])
        shown.append(
            Tile(
                "FLOPs per token",
                count(size["flops_after"]),
                f"from {count(size['flops_before'])}, chosen layers",
                share,
            )
        )
    held_out = report["quality"]["held_out"]
    if held_out is None:
        shown.append(Tile("Quality", "not measured", report["quality"]["metric"]))
    else:
        detail = f"mean {report['quality']['metric']}, {held_out['texts']:,} held-out texts"
        shown.append(Tile("Quality", number(held_out["mean"], 4), detail))
    for measurement in report["speed"][:1]:
        detail = (
            f"{number(measurement['before_ms'])} \N{RIGHTWARDS ARROW} {number(measurement['after_ms'])} ms for "
            f"{measurement['batch']} \N{MULTIPLICATION SIGN} {measurement['tokens']} tokens"
        )
        shown.append(Tile("Speed", faster(measurement), detail))
    budget = report["budget"]
    body = tiles(shown) + '<div class="under">'
    body += note(f"Budget: {budget_text(budget)}", warning=budget["used"] > budget["asked"])
    warnings = report["warnings"]
    body += "".join(note(shorten(text, 500), warning=True) for text in warnings[:_MOST_WARNINGS])
    if len(warnings) > _MOST_WARNINGS:
        body += note(f"{len(warnings) - _MOST_WARNINGS} more warnings are in report.json.")
    return body + "</div>"


def _overview(report: Json, colours: Mapping[str, str]) -> str:
    cost = report["budget"]["cost"]
    name, unit = UNITS[cost]
    blocks, hidden = _gather(report["layers"], block_of, _MOST_BLOCKS)
    groups, hidden_groups = _gather(report["layers"], group_of, _MOST_GROUPS)

    def rows(gathered: Mapping[str, Sequence[Json]], relative: bool) -> list[Bar]:
        prefix = common_prefix(list(gathered))
        made = []
        for label, members in gathered.items():
            before = sum(layer[f"{cost}_before"] for layer in members)
            scale = 1 / before if relative and before else 1.0
            parts = []
            for structure, colour in colours.items():
                after = sum(layer[f"{cost}_after"] for layer in members if layer["structure"] == structure)
                if after:
                    parts.append(Part(after * scale, colour, f"{structure} {count(after, unit)}"))
            after = sum(layer[f"{cost}_after"] for layer in members)
            text = percent(ratio(after, before), 0) if relative else count(after, unit)
            made.append(Bar(label[len(prefix) :] or label, parts, text, before * scale))
        return made

    where = f"{name} kept, by structure; the grey track is what the layers had"
    where += f"; {hidden} more blocks are not shown" if hidden else ""
    over = "share kept, over all blocks" + (f"; {hidden_groups} more kinds are not shown" if hidden_groups else "")
    return Html(
        grid(
            (
                bars(rows(blocks, False), title="Per block", subtitle=where, legend=colours),
                bars(
                    rows(groups, True),
                    title="Per kind of layer",
                    subtitle=over,
                    legend=colours,
                ),
            )
        )
    )


def _layers(report: Json, colours: Mapping[str, str]) -> str:
    cost = report["budget"]["cost"]
    name, unit = UNITS[cost]
    shown, left = _largest(report["layers"], _MOST_LAYERS, f"{cost}_before")
    prefix = common_prefix([layer["name"] for layer in report["layers"]])
    power = _power([layer[key] for layer in shown for key in ("predicted", "measured")])
    rows: list[list[Value]] = []
    for layer in shown:
        before, after = layer[f"{cost}_before"], layer[f"{cost}_after"]
        share = ratio(after, before)
        bar = f'<span class="bar"><i style="width:{100 * min(1.0, share):.0f}%"></i></span>' if finite(share) else ""
        joint = ""
        if layer["joint"]:
            own = layer["name"]
            others = ", ".join(other[len(common_prefix([own, other])) :] for other in layer["joint"][:3])
            more = f" and {len(layer['joint']) - 3} more" if len(layer["joint"]) > 3 else ""
            joint = f"<small>with {escape(shorten(others + more, 60))}</small>"
        out, inputs = layer["shape"]
        label = shorten(layer["name"][len(prefix) :], 64)
        structure = chip(shorten(layer["structure"], 40), colours[layer["structure"]])
        kept = Html(f'<span class="change">{bar}{percent(share)}</span>')
        rows.append(
            [
                # A name breaks after its dots.
                Cell(Html(escape(label).replace(".", ".<wbr>") + joint), label),
                Cell(f"{out} \N{MULTIPLICATION SIGN} {inputs}", out * inputs, numeric=True),
                Cell(structure, layer["structure"]),
                shorten(size_text(layer["size"]), 60),
                Cell(_change(before, after, unit), after, numeric=True),
                Cell(kept, share, numeric=True),
                *(Cell(_fixed(layer[key], power), layer[key], numeric=True) for key in ("predicted", "measured")),
                Cell(percent(layer["relative"]), layer["relative"], numeric=True),
                Cell(_fixed(layer["effective_rank"], 0, 1), layer["effective_rank"], numeric=True),
                Cell(number(layer["gram_rank"]), layer["gram_rank"], numeric=True),
            ]
        )
    times = f" \N{MULTIPLICATION SIGN}1e{power}" if power else ""
    caption = (
        f"Predicted and measured: increase of the loss{times}. Relative error: of the layer's outputs, weighted by "
        "both Gram matrices. Effective rank: of the weight seen through the Grams. Gram rank: directions its inputs "
        "use. Click a heading to sort."
    )
    if prefix:
        caption = f"Names are shown without their common beginning, {shorten(prefix)} {caption}"
    if left:
        caption += f" The {_MOST_LAYERS} largest of {len(shown) + left} layers are shown; report.json has them all."
    headings = (
        "Layer",
        "Shape",
        "Structure",
        "Size",
        name.capitalize() if cost != "flops" else name,
        "Kept",
        f"Predicted{times}",
        f"Measured{times}",
        "Relative error",
        "Effective rank",
        "Gram rank",
    )
    return table(headings, rows, caption=caption)


def _errors(layers: Sequence[Json], colours: Mapping[str, str]) -> str:
    changed = [layer for layer in layers if layer["structure"] != "dense"]
    pairs = [layer for layer in changed if finite(layer["predicted"]) and finite(layer["measured"])]
    if not any(finite(layer["predicted"]) or finite(layer["measured"]) for layer in layers):
        return note("Neither was computed in this run.")
    text = (
        "Predicted: the rise of the loss the plan counted on for a layer. Measured: the same of the layer that was "
        "built in the end. On the diagonal the two agree; below it, the layer came out better than planned."
    )
    if len(pairs) > 2:
        correlation = _rank_correlation([p["predicted"] for p in pairs], [p["measured"] for p in pairs])
        total = ratio(sum(p["measured"] for p in pairs), sum(p["predicted"] for p in pairs))
        text += f" Rank correlation {number(correlation)}; measured total is {percent(total)} of the predicted one."
    shown, left = _largest(changed, _MOST_LAYERS, "predicted")
    points = [
        Point(layer["predicted"], layer["measured"], layer["name"], colours[layer["structure"]]) for layer in shown
    ]
    legend = {name: colour for name, colour in colours.items() if name != "dense"}
    worst, _ = _largest(changed, 15, "measured" if pairs else "predicted", keep_order=False)
    prefix = common_prefix([layer["name"] for layer in layers])
    costly = []
    for layer in worst:
        value = layer["measured"] if pairs else layer["predicted"]
        if finite(value):
            part = Part(value, colours[layer["structure"]], layer["structure"])
            costly.append(Bar(layer["name"][len(prefix) :] or layer["name"], [part], number(value)))
    return Html(
        note(text)
        + grid(
            (
                scatter(
                    points,
                    title="Predicted against measured",
                    subtitle=f"increase of the loss, one point per layer{f', {_MOST_LAYERS} largest' if left else ''}.",
                    x_title="predicted",
                    y_title="measured",
                    legend=legend,
                ),
                bars(
                    costly,
                    title="The costliest layers",
                    subtitle=f"{'measured' if pairs else 'predicted'} increase of the loss",
                    legend=legend,
                ),
            )
        )
    )


def _spectra(layers: Sequence[Json]) -> str:
    known = [layer for layer in layers if layer.get("spectrum")]
    if not known:
        return ""
    shown, left = _largest(known, _MOST_SPECTRA, "predicted")
    text = (
        "Share of the weight's energy that a rank leaves out: of the weight alone, and of the weight seen through its "
        "two Gram matrices, which count what matters for the outputs. The further the second falls below the first, "
        "the more calibration helps. The dashed line is the rank that was chosen, where the structure has one."
    )
    if left:
        text += f" Of {len(known)} layers, the {_MOST_SPECTRA} with the largest predicted error are shown."
    prefix = common_prefix([layer["name"] for layer in layers])
    figures = []
    for layer in shown:
        curves = []
        for key, colour in (("plain", GREY), ("weighted", COLOURS[0])):
            energies = layer["spectrum"].get(key) or []
            step = min(layer["shape"]) / max(1, len(energies) - 1)
            curves.append(Series(key, [(index * step, energy) for index, energy in enumerate(energies)], colour))
        rank = layer["size"].get("rank")
        mark = float(rank) if isinstance(rank, int | float) else None
        figures.append(
            lines(
                curves,
                title=shorten(layer["name"][len(prefix) :] or layer["name"], 48),
                subtitle=_left_out(curves[1].points, mark) or size_text(layer["size"]) or layer["structure"],
                y_range=(0.0, 1.0),
                mark=mark,
                small=True,
            )
        )
    legend = (
        f'<ul class="legend"><li>{chip("weight alone", GREY)}</li>'
        f"<li>{chip('seen through the Grams', COLOURS[0])}</li><li>across: rank</li><li>up: energy left out</li></ul>"
    )
    return Html(note(text) + legend + grid(figures, small=True))


def _left_out(points: Sequence[tuple[float | None, float | None]], rank: float | None) -> str:
    """What the chosen rank leaves out, read off the weighted curve."""
    curve = [(x, y) for x, y in points if finite(x) and finite(y)]
    if rank is None:
        return ""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= rank <= x1:
            return f"rank {rank:g} leaves out {percent(y0 + (y1 - y0) * (rank - x0) / (x1 - x0))}"
    return f"rank {rank:g}"


def _quality(report: Json) -> str:
    quality, parts = report["quality"], []
    columns = [
        (title, quality[key])
        for title, key in (("before healing", "before_healing"), ("compressed", "held_out"))
        if quality[key]
    ]
    if columns:
        names = {
            "mean": f"Mean {quality['metric']}",
            "p5": "5th percentile over the texts",
            "relative_error": "Relative error of the outputs",
            "rank_correlation": "Rank correlation of similarities",
            "neighbours": "Nearest neighbours that stay",
        }
        rows: list[list[Value]] = [
            [name, *(Cell(number(c[key], 4), None, numeric=True) for _, c in columns)] for key, name in names.items()
        ]
        caption = f"Compressed against original, {columns[-1][1]['texts']:,} texts that calibration did not see."
        headings = ["Quality", *(title for title, _ in columns)]
        parts.append(f"<div>{table(headings, rows, caption=caption, sort=False)}</div>")
    if report.get("language"):
        parts.append(_language(report["language"]))
    if report["speed"]:
        rows = [
            [
                f"{m['batch']} \N{MULTIPLICATION SIGN} {m['tokens']}",
                *(Cell(f"{number(m[key])} ms", None, numeric=True) for key in ("before_ms", "after_ms")),
                Cell(faster(m), None, numeric=True),
            ]
            for m in report["speed"]
        ]
        headings = ["Batch \N{MULTIPLICATION SIGN} tokens", "original", "compressed", "faster"]
        machine = f"{report['environment']['platform']}, {report['environment']['threads']} threads"
        caption = (
            f"On {machine}. The original runs as torch does, the compressed model's layers as planned for a machine."
        )
        parts.append(f"<div>{table(headings, rows, caption=caption, sort=False)}</div>")
    heal = report["heal"]
    if heal and heal["loss"]:
        # Enough for the width of the figure.
        every = max(1, len(heal["loss"]) // 400)
        curve = Series("loss", [(step, value) for step, value in heal["loss"][::every]], COLOURS[0])
        values = [value for _, value in curve.points if finite(value) and value > 0]
        log = bool(values) and max(values) > 20 * min(values)
        subtitle = f"loss over {heal['steps']:,} steps"
        chart = lines([curve], title="Healing", subtitle=subtitle, x_title="step", y_title="loss", log_y=log)
        # The tables under one another, the curve beside them.
        parts = [f'<div class="stack">{"".join(parts)}</div>', chart] if parts else [chart]
    return grid(parts) if parts else ""


def _language(language: Json) -> str:
    """What a language model predicts and how fast it generates, before and after."""
    generation = language["generation"] or {"before": None, "after": None, "tokens": 0}
    rows: list[list[Value]] = [
        ["Perplexity", *(Cell(number(language[f"perplexity_{when}"], 4), None, numeric=True) for when in WHEN)],
        [
            "Generated tokens a second, one sequence",
            *(Cell(number(generation[when]), None, numeric=True) for when in WHEN),
        ],
        ["Divergence from the original, nats a token", "", Cell(number(language["divergence"], 3), None, numeric=True)],
        ["Likeliest tokens that stay", "", Cell(percent(language["same_token"]), None, numeric=True)],
    ]
    caption = f"Of the next token, {language['tokens']:,} tokens that calibration did not see."
    return f"<div>{table(('Predictions', 'original', 'compressed'), rows, caption=caption, sort=False)}</div>"


def _left_alone(left: Sequence[Json]) -> str:
    if not left:
        return note("Nothing: every matrix that could be compressed took part.")
    reasons: dict[str, list[str]] = {}
    for item in left:
        reasons.setdefault(item["reason"], []).append(item["name"])
    items = []
    for reason, names in list(reasons.items())[:_MOST_REASONS]:
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        number_of = f" ({len(names)})" if len(names) > 1 else ""
        items.append((shorten(reason, 300) + number_of, ", ".join(map(shorten, names[:_MOST_NAMES])) + more))
    hidden = len(reasons) - len(items)
    return definitions(items) + (note(f"{hidden} more reasons are in report.json.") if hidden else "")


def _settings(report: Json) -> str:
    settings, environment, times = report["settings"], report["environment"], report["times"]
    calibration = settings["calibration"]
    shown = [
        ("Keep", f"{settings['keep']:g} of {UNITS[settings['cost']][0]}"),
        (
            "Structures allowed",
            ", ".join(settings["structures"]) if isinstance(settings["structures"], list) else settings["structures"],
        ),
        ("Objective", settings["objective"]),
        ("Healing steps", number(settings["heal"])),
        ("Seed", str(settings["seed"])),
        ("Calibration text", shorten(calibration["source"], 200)),
        ("Calibration size", f"{calibration['texts']:,} texts, {calibration['tokens']:,} tokens"),
        ("Calibration fingerprint", calibration["fingerprint"]),
    ]
    known = {"keep", "cost", "structures", "objective", "heal", "seed", "calibration"}
    shown += [(key, shorten(str(value), 200)) for key, value in settings.items() if key not in known]
    shown += [
        ("Source", shorten(report["model"]["source"], 200)),
        ("gramian", report["gramian_version"]),
        ("Python", environment["python"]),
        ("PyTorch", environment["torch"]),
        ("Platform", f"{environment['platform']}, {environment['threads']} threads"),
    ]
    phases = ("collect", "plan", "fit", "heal", "evaluate", "save")
    spent = [
        Bar(name, [Part(times[name], COLOURS[0], name)], f"{times[name]:.1f} s")
        for name in phases
        if finite(times.get(name))
    ]
    total = times.get("total")
    taken = bars(spent, title="Time", subtitle=f"{total:.1f} s in all" if finite(total) else "") if spent else ""
    return definitions(shown) + (f'<div class="under">{grid([taken])}</div>' if taken else "")


def _gather(layers: Sequence[Json], key: Callable[[str], str], most: int) -> tuple[dict[str, list[Json]], int]:
    """Layers by the `key` of their name, the first `most` in the order of appearance, and how many are left out."""
    gathered: dict[str, list[Json]] = {}
    for layer in layers:
        gathered.setdefault(key(layer["name"]), []).append(layer)
    return dict(itertools.islice(gathered.items(), most)), max(0, len(gathered) - most)


def _largest(layers: Sequence[Json], most: int, key: str, *, keep_order: bool = True) -> tuple[list[Json], int]:
    """The `most` layers of largest `key`, by default in the model's order, and how many are left out."""
    order = sorted(range(len(layers)), key=lambda i: -layers[i][key] if finite(layers[i][key]) else 0.0)[:most]
    return [layers[i] for i in (sorted(order) if keep_order else order)], max(0, len(layers) - most)


def common_prefix(names: Sequence[str]) -> str:
    """What all `names` begin with, up to and with a dot; empty for a single name."""
    if len(names) < 2:
        return ""
    # Of the first and the last in alphabetical order, what agrees is what agrees in all.
    pairs = zip(min(names).split(".")[:-1], max(names).split(".")[:-1], strict=False)
    return "".join(f"{first}." for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _power(values: Sequence[float | None]) -> int | None:
    """The power of ten, a multiple of three, by which a column is best divided; None if no power suits its range."""
    sizes = sorted(abs(value) for value in values if finite(value) and value != 0)
    power = 3 * math.floor(math.log10(sizes[-1]) / 3) if sizes else 0
    return power if not sizes or sizes[len(sizes) // 4] >= 0.01 * 10.0**power else None


def _fixed(value: float | None, power: int | None, digits: int = 2) -> str:
    """``value / 10^power`` with so many `digits` after the point that a column of them lines up."""
    if not finite(value) or power is None:
        return number(value)
    scaled = value / 10.0**power
    return f"<{10.0**-digits:g}" if 0 < scaled < 0.5 * 10.0**-digits else f"{scaled:,.{digits}f}"


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; ties get their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        # A value's first and last place: bisecting would do, a dictionary is shorter.
        lowest = {value: place for place, value in reversed(list(enumerate(ordered)))}
        highest = {value: place for place, value in enumerate(ordered)}
        return [(lowest[value] + highest[value]) / 2 - (len(values) - 1) / 2 for value in values]

    a, b = ranks(first), ranks(second)
    norm = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else None
