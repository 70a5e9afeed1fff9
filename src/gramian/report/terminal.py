"""The closing table of ``gramian compress`` on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gramian.report.compress_page import UNITS, budget_text, common_prefix, faster, group_of, ratio, size_text
from gramian.report.page import count, finite, number, percent, printable, shorten

_NARROW = 72
"""Columns below which only what cannot be missed is shown."""


def summary(report: Mapping[str, Any], console: Console) -> None:
    """Print what was asked and met, before and after, and what each kind of layer became."""
    size, kept, budget = report["size"], report["kept"], report["budget"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for heading in ("before", "after", "kept"):
        table.add_column(heading, justify="right", no_wrap=True)

    def row(name: str, before: str, after: str, share: str, style: str = "") -> None:
        table.add_row(*(Text(text) for text in (name, before, after, share)), style=style)

    def change(name: str, key: str, unit: str = "") -> None:
        before, after = size[f"{key}_before"], size[f"{key}_after"]
        if after is not None:
            row(name, count(before, unit), count(after, unit), percent(ratio(after, before)))

    change("parameters, chosen layers", "params")
    change("parameters, whole model", "model_params")
    change("bytes, chosen layers", "bytes", "B")
    change("file on disk", "file", "B")
    change("FLOPs per token, chosen layers", "flops")
    for m in report["speed"]:
        name = f"time, {m['batch']} \N{MULTIPLICATION SIGN} {m['tokens']} tokens"
        row(name, f"{number(m['before_ms'])} ms", f"{number(m['after_ms'])} ms", f"{faster(m)} speed")
    console.print()
    console.print(table)
    console.print()
    unit = UNITS[budget["cost"]][0]
    whole = "bytes" if budget["cost"] == "bytes" else "parameters"
    _line(
        console,
        "Kept",
        f"{percent(kept['layers'])} of the chosen layers ({unit}), {percent(kept['model'])} of the whole model ({whole})",
    )
    _line(console, "Budget", budget_text(budget), "" if budget["used"] <= budget["asked"] else "yellow")
    _line(console, "Quality", _quality(report["quality"]))
    if report.get("language"):
        _line(console, "Predictions", _predictions(report["language"]))
    console.print()
    console.print(_groups(report, narrow=console.width < _NARROW))
    if report["left_alone"]:
        reasons = Counter(item["reason"] for item in report["left_alone"])
        _line(
            console, "Left alone", "; ".join(f"{many} \N{MULTIPLICATION SIGN} {why}" for why, many in reasons.items())
        )
    for warning in report["warnings"]:
        _line(console, "Warning", warning, "yellow")


def _line(console: Console, name: str, text: str, style: str = "") -> None:
    console.print(Text.assemble((f"{name}: ", "bold"), (shorten(printable(text), 400), style)), soft_wrap=False)


def _quality(quality: Mapping[str, Any]) -> str:
    held_out, before = quality["held_out"], quality["before_healing"]
    if held_out is None:
        return "not measured"
    text = f"mean {quality['metric']} {number(held_out['mean'], 4)}"
    if before is not None:
        text += f" ({number(before['mean'], 4)} before healing)"
    return f"{text}, 5th percentile {number(held_out['p5'], 4)}, on {held_out['texts']:,} held-out texts"


def _predictions(language: Mapping[str, Any]) -> str:
    text = f"divergence {number(language['divergence'], 3)} nats, {percent(language['same_token'])} of likeliest tokens stay"
    if finite(language["perplexity_before"]):
        spread = f" (+- {number(language['rise_error'], 2)})" if "rise_error" in language else ""
        both = [number(language[f"perplexity_{when}"], 4) for when in ("before", "after")]
        text = f"perplexity {' to '.join(both)}{spread}, {text}"
    speed = language["generation"]
    return text + (f", {number(speed['before'])} to {number(speed['after'])} tokens/s" if speed else "")


def _groups(report: Mapping[str, Any], *, narrow: bool) -> Table:
    """One row per kind of layer: how many became what, of which sizes, and the share kept."""
    cost = report["budget"]["cost"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer in report["layers"]:
        groups.setdefault(group_of(layer["name"]), []).append(layer)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    prefix = common_prefix(list(groups))
    heading = f"layers of {shorten(printable(prefix.removesuffix('.')), 60)}" if prefix else "layers"
    table.add_column(Text(heading), overflow="fold")
    table.add_column("became", overflow="fold")
    table.add_column("kept", justify="right", no_wrap=True)
    if not narrow:
        table.add_column("sizes", overflow="fold")
        table.add_column("relative error", justify="right", no_wrap=True)
    for name, members in list(groups.items())[:_MOST_GROUPS]:
        structures = Counter(layer["structure"] for layer in members)
        share = ratio(sum(m[f"{cost}_after"] for m in members), sum(m[f"{cost}_before"] for m in members))
        cells = [
            shorten(printable(name[len(prefix) :]), 60),
            ", ".join(f"{many} {shorten(printable(structure), 30)}" for structure, many in structures.most_common()),
            percent(share),
        ]
        if not narrow:
            errors = [m["relative"] for m in members if finite(m["relative"])]
            cells += [_sizes(members), percent(sum(errors) / len(errors)) if errors else number(None)]
        table.add_row(*(Text(cell) for cell in cells))
    if len(groups) > _MOST_GROUPS:
        table.add_row(f"{len(groups) - _MOST_GROUPS} more kinds are in report.json")
    return table


_MOST_GROUPS = 24


def _sizes(members: list[Mapping[str, Any]]) -> str:
    """``rank 48..128`` where a number varies over the layers, else the value itself."""
    values: dict[str, list[Any]] = {}
    for layer in members:
        for key, value in layer["size"].items():
            values.setdefault(key, []).append(value)
    texts = []
    for key, found in values.items():
        if all(isinstance(value, int | float) for value in found):
            low, high = min(found), max(found)
            texts.append(f"{key} {low}" if low == high else f"{key} {low}..{high}")
        else:
            texts.append(size_text({key: found[0]}) + (" and others" if any(v != found[0] for v in found) else ""))
    return shorten(printable(", ".join(texts)), 60)
