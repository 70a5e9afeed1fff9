"""``gramian inspect``: the spectra of a model, on the terminal, as JSON and as a page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramian import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from gramian.spectra import LayerReport

_WIDE = 132
"""Columns that the whole table takes; a narrower terminal sees fewer figures."""
KEEP = 0.5
"""Share of the numbers that the tried structures may store."""


def run_inspect(
    model: str | None,
    out: str | None,
    *,
    json_output: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> None:
    """Inspect a checkpoint; print a table or one JSON object; write DIR/inspect.json and DIR/inspect.html.

    Args:
        model: checkpoint directory or ``.safetensors`` file; None for the demo's sentence encoder.
        out: directory for the two files, new or empty; None writes nothing.
        json_output: print one JSON object instead of the table.
        include: shell patterns of the layers to look at; all by default.
        exclude: shell patterns of the layers to leave out.

    Raises:
        GramianError: bad input; nothing has been written then.
    """
    from gramian.files import atomic_directory
    from gramian.models.loading import demo_directory
    from gramian.report.inspect_page import inspect_page
    from gramian.spectra import inspect_layer, open_source

    path = demo_directory() if model is None else Path(model)
    title = "all-MiniLM-L6-v2" if model is None else path.resolve().name
    # Entered before the work: a directory that cannot be used is found out at once.
    with nullcontext() if out is None else atomic_directory(out) as folder:
        started = time.perf_counter()
        source = open_source(path).select(include, exclude)
        named = _progress(source, len(source.layers), quiet=json_output)
        layers = [inspect_layer(name, matrix, keep=KEEP) for name, matrix in named]
        report = _report(title, layers, source.left_alone, time.perf_counter() - started)
        if folder is not None:
            (folder / "inspect.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            page = inspect_page(title, layers, source.left_alone, keep=KEEP)
            (folder / "inspect.html").write_text(page, encoding="utf-8")
    if json_output:
        print(json.dumps(report))
        return
    from rich.console import Console

    console = Console()  # output that goes to a file has no edge to wrap at
    if not console.is_terminal:
        console = Console(width=max(console.width, _WIDE))
    _print(console, report)
    if out is not None:
        console.print(
            f"Written to {Path(out) / 'inspect.html'} and inspect.json", soft_wrap=True, highlight=False, markup=False
        )


def _progress(items: Any, total: int, *, quiet: bool) -> Any:
    """`items`, with a progress bar on stderr if a person is watching."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, "Inspecting", total, console=console, transient=True, disable=quiet or not console.is_terminal)


def _report(model: str, layers: Sequence[LayerReport], left_alone: Mapping[str, str], seconds: float) -> dict[str, Any]:
    from statistics import median

    alphas = [layer.alpha for layer in layers if layer.alpha is not None]
    corrected = [layer.farms for layer in layers if layer.farms is not None]
    return {
        "schema": 1,
        "gramian": __version__,
        "model": model,
        "keep": KEEP,
        "summary": {
            "matrices": len(layers),
            "parameters": sum(layer.parameters for layer in layers),
            "redundancy": median(layer.redundancy for layer in layers),
            "alpha": median(alphas) if alphas else None,
            "alpha_refused": len(layers) - len(alphas),
            "alpha_farms": median(corrected) if corrected else None,
        },
        "layers": [layer.to_dict() for layer in layers],
        "left_alone": dict(left_alone),
        "seconds": round(seconds, 3),
    }


def _print(console: Console, report: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    def figure(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold", min_width=20)
    wide = console.width >= _WIDE
    headings = ["shape", "effective rank", *(["stable", "rank 99%"] if wide else []), "alpha"]
    for heading in [*headings, *(["interval"] if wide else []), "FARMS", "suits"]:
        table.add_column(heading, justify="left" if heading == "suits" else "right", no_wrap=True)
    for layer in report["layers"]:
        interval, best = layer["alpha_interval"], layer["best"]
        table.add_row(
            Text(layer["name"]),
            "x".join(map(str, layer["shape"])),
            f"{layer['effective_rank']:.0f} {100 * (1 - layer['redundancy']):3.0f}%",
            *([figure(layer["stable_rank"], 1), str(layer["rank_99"])] if wide else []),
            figure(layer["alpha"], 2),
            *(["" if interval is None else f"{interval[0]:.1f}..{interval[1]:.1f}"] if wide else []),
            figure(layer["alpha_farms"], 2),
            Text(f"is {layer['kind']}" if best is None else f"{best} {layer['suits'][best]:.3f}"),
        )
    console.print(table)
    summary = report["summary"]
    console.print(
        f"\n{summary['matrices']} matrices, {summary['parameters']:,} numbers in {report['seconds']:.1f} s. "
        f"Median redundancy {summary['redundancy']:.2f}, exponent {figure(summary['alpha'], 2)} "
        f"({summary['alpha_refused']} refused), free of shape (FARMS) {figure(summary['alpha_farms'], 2)}.",
        highlight=False,
    )
    console.print(
        f"'suits' is the least Frobenius error at {KEEP:.0%} of the numbers, without data: a hint. "
        "gramian compress decides with Gram matrices.",
        style="dim",
        highlight=False,
    )
    if report["left_alone"]:
        names = list(report["left_alone"])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        console.print(Text(f"Left alone: {', '.join(names[:4])}{more}"))
