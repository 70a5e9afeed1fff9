"""The page that shows what ``gramian adapt`` did: ``render(report)``, from its ``report.json``.

The page stays small whatever the model: where it leaves something out it says so, and ``report.json`` has it all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from gramian.report.charts import COLOURS, GREY, Bar, Part, Series, bars, lines
from gramian.report.compress_page import block_of, common_prefix, group_of
from gramian.report.page import (
    Tile,
    Value,
    code,
    count,
    definitions,
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

_MOST_LAYERS, _MOST_SPECTRA, _MOST_GROUPS, _MOST_POINTS = 500, 48, 24, 400


def render(report: Json) -> str:
    """The HTML page for a `report` of ``gramian adapt``."""
    model, settings, data = report["model"], report["settings"], report["data"]
    name = shorten(os.path.basename(model["source"].rstrip("/")) or model["source"], 60)
    what = f"{len(data['labels'])} labels" if data["labels"] else "language modelling"
    subtitle = (
        f"{model['class']}, {count(model['parameters'])} parameters. Recipe {settings['recipe']}, rank {settings['rank']}, "
        f"{what}: {data['train']:,} sequences of {data['tokens']:,} tokens in all, {data['held_out']:,} held out."
    )
    sections = [
        ("", _headline(report)),
        ("Loss", _losses(report["training"])),
        ("Where the budget went", _budget(report["layers"])),
        ("Spectra of the updates", _spectra(report["layers"])),
        ("Layers", _layers(report)),
        ("How it was made", _settings(report)),
        ("Load the result", code("\n".join(model["load"]))),
    ]
    return page(f"{name}, adapted", subtitle, [(heading, body) for heading, body in sections if body])


def _headline(report: Json) -> str:
    trainable, training = report["trainable"], report["training"]
    before, after = report["quality"]["before"], report["quality"]["after"]
    shown = [
        Tile(
            "Trainable parameters",
            count(trainable["adapter"]),
            f"{percent(trainable['share'], 2)} of the model"
            + (f", with {count(trainable['head'])} of the head" if trainable["head"] else ""),
            trainable["share"],
        ),
        Tile("Held-out loss", number(after["loss"], 4), f"{number(before['loss'], 4)} before"),
    ]
    if "perplexity" in after:
        shown.append(Tile("Perplexity", number(after["perplexity"], 4), f"{number(before['perplexity'], 4)} before"))
    if after["accuracy"] is not None:
        shown.append(
            Tile("Accuracy", percent(after["accuracy"]), f"{percent(before['accuracy'])} before", after["accuracy"])
        )
    stopped = "stopped early" if training["stopped"] else "ran to the end"
    shown.append(Tile("Steps", f"{training['steps']:,}", f"{stopped}; best at step {training['best']:,}"))
    if report["merged"]:
        lost = percent(report["merged"]["worst_rounding_loss"], 3)
        shown.append(Tile("Merged", "yes", f"rounding lost at most {lost} of an update"))
    notes = "".join(note(warning, warning=True) for warning in report["warnings"][:50])
    if not report["peft"]["written"]:
        notes += note(f"No files for the peft library: {report['peft']['reason']}")
    return tiles(shown) + notes


def _losses(training: Json) -> str:
    losses = training["loss"]
    stride = max(1, -(-len(losses) // _MOST_POINTS))
    means = []
    for first in range(0, len(losses), stride):
        part = losses[first : first + stride]
        means.append((part[-1][0], sum(value for _, value in part) / len(part)))
    series = [
        Series("training", means, GREY),
        Series("held out", [(step, value) for step, value in training["held_out"]], COLOURS[0]),
    ]
    subtitle = "the line marks the step whose values were kept"
    if stride > 1:
        subtitle += f"; training: means of {stride} steps"
    return grid([lines(series, title="Loss", subtitle=subtitle, x_title="step", y_title="nats", mark=training["best"])])


def _budget(layers: Sequence[Json]) -> str:
    """What each role and each block got of the trainable parameters, and how much of the change it made with them."""
    total = sum(layer["trainable"] for layer in layers)
    energy = sum((layer["change_norm"] or 0.0) ** 2 for layer in layers)
    figures = []
    for title, key in (("By role", group_of), ("By block", block_of)):
        groups: dict[str, list[Json]] = {}
        for layer in layers:
            groups.setdefault(key(layer["name"]), []).append(layer)
        if len(groups) < 2:
            continue
        prefix = common_prefix(list(groups))
        shown = list(groups.items())[:_MOST_GROUPS]
        rest = len(groups) - len(shown)
        for what, entry, power, whole, colour in (
            ("trainable parameters", "trainable", 1, total, COLOURS[0]),
            ("squared norm of the change", "change_norm", 2, energy, COLOURS[1]),
        ):
            rows = []
            for name, members in shown:
                share = sum((float(layer[entry] or 0.0)) ** power for layer in members) / whole if whole else 0.0
                rows.append(Bar(name[len(prefix) :] or name, [Part(share, colour, what)], percent(share)))
            subtitle = f"share of the {what}" + (f"; {rest} more are in report.json" if rest else "")
            figures.append(bars(rows, title=title, subtitle=subtitle))
    return grid(figures) if figures else ""


def _spectra(layers: Sequence[Json]) -> str:
    drawn = [layer for layer in layers if layer["spectrum"]]
    if not drawn:
        return ""
    shown = sorted(drawn, key=lambda layer: -(layer["relative"] or 0.0))[:_MOST_SPECTRA]
    kept = {layer["name"] for layer in shown}
    figures = [
        lines(
            [Series("", [(i + 1, value) for i, value in enumerate(layer["spectrum"])], COLOURS[0])],
            title=shorten(layer["name"], 48),
            subtitle=f"{percent(layer['relative'], 2)} of the weight, stable rank {number(layer['stable_rank'])}",
            small=True,
            y_range=(0.0, 1.05 * max(layer["spectrum"]) or 1.0),
        )
        for layer in drawn
        if layer["name"] in kept
    ]
    text = (
        "Singular values of the change of each weight, largest first. A flat spectrum that ends at the rank says that more "
        "rank would be used; one that falls off early, that less would do."
    )
    if len(drawn) > len(shown):
        text += f" Shown: the {len(shown)} layers of the largest relative change; report.json has all."
    return note(text) + grid(figures, small=True)


def _layers(report: Json) -> str:
    layers = report["layers"]
    merged = any(finite(layer["rounding_loss"]) for layer in layers)
    head = ["layer", "shape", "recipe", "structure", "rank", "trainable", "change / weight", "stable rank"]
    rows: list[list[Value]] = []
    for layer in layers[:_MOST_LAYERS]:
        out, in_ = layer["shape"]
        row: list[Value] = [layer["name"], f"{out} \N{MULTIPLICATION SIGN} {in_}", layer["recipe"], layer["structure"]]
        row += [layer["rank"], layer["trainable"], layer["relative"], layer["stable_rank"]]
        rows.append([*row, layer["rounding_loss"]] if merged else row)
    more = len(layers) - len(rows)
    caption = (
        "change / weight: Frobenius norms. Stable rank: squared Frobenius over squared spectral norm of the change."
    )
    if merged:
        caption += " Rounding: share of the change that merging lost."
    if more:
        caption += f" {more} more layers are in report.json."
    return table([*head, "rounding"] if merged else head, rows, caption=caption)


def _settings(report: Json) -> str:
    settings, environment = report["settings"], report["environment"]
    shown = [
        (key.replace("_", " "), _text(value)) for key, value in settings.items() if value not in (None, [], (), {}, "")
    ]
    shown += [("data", report["data"]["source"]), ("gramian", report["gramian_version"])]
    shown += [(key, _text(value)) for key, value in environment.items()]
    shown += [(f"seconds, {key}", number(value)) for key, value in report.get("times", {}).items()]
    return definitions(shown)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
