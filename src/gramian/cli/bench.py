"""``gramian bench``: calibrate the cost model, or measure every structure on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from gramian import __version__
from gramian.errors import GramianError

DTYPES = ("float32", "bfloat16", "float64", "float16")


def run_calibrate(*, json_output: bool = False, budget: float = 17.0) -> None:
    """Measure products and memory traffic for `budget` seconds; keep the cost model in the user's cache directory."""
    from gramian.execution import calibrate, save

    start = time.perf_counter()
    model = calibrate(budget=budget)
    path = save(model)
    facts: dict[str, Any] = {
        "calibration": str(path),
        "seconds": round(time.perf_counter() - start, 1),
        "products": {dtype: len(rows) for dtype, rows in model.products.items()},
        "machine": model.machine,
    }
    if json_output:
        click.echo(json.dumps(facts))
        return
    click.echo(f"measured {sum(facts['products'].values())} products in {facts['seconds']} s\ncalibration  {path}")
    if "compiled" not in model.libraries:
        click.echo(
            "there is no C compiler ($CC, gcc, cc or clang): products of few rows run by torch alone, and slower"
        )


def run_bench(
    out: str | None,
    *,
    sizes: str = "512,1024,2048",
    batches: str = "1,32,512",
    dtypes: str = "float32",
    names: Sequence[str] = (),
    json_output: bool = False,
) -> None:
    """Measure; print a table or one JSON object; write DIR/bench.json and DIR/bench.html.

    Args:
        out: directory for the two files, new or empty; None writes nothing.
        sizes: n of the square matrices, commas between.
        batches: rows of x, likewise.
        dtypes: names of torch's dtypes, likewise.
        names: only structures whose name holds one of these.
        json_output: print one JSON object instead of the table.

    Raises:
        GramianError: bad input; nothing has been written then.
    """
    lengths, rows = numbers(sizes, "--sizes"), numbers(batches, "--batches")
    kinds = [kind.strip() for kind in dtypes.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in DTYPES:
            raise GramianError(f"--dtypes {kind}: expected one of {', '.join(DTYPES)}")
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from gramian.execution.bench import bench, calibrated
    from gramian.execution.calibration import machine
    from gramian.files import atomic_directory
    from gramian.report.bench_page import bench_page

    with nullcontext() if out is None else atomic_directory(out) as folder:
        with Progress(console=Console(stderr=True), disable=json_output, transient=True) as shown:
            task = shown.add_task("measuring", total=None)
            found = bench(
                lengths,
                rows,
                [getattr(torch, kind) for kind in kinds],
                names=names,
                progress=lambda done, total: shown.update(task, completed=done, total=total),
            )
        report: dict[str, Any] = {
            "gramian": __version__,
            "machine": machine(),
            "calibrated": calibrated(),
            "rows": [row.to_json() for row in found],
        }
        if folder is not None:
            (folder / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            page = bench_page(found, machine(), calibrated=calibrated())
            (folder / "bench.html").write_text(page, encoding="utf-8")
    if json_output:
        click.echo(json.dumps(report))
        return
    table = Table(title="speed-up over torch's dense layer")
    for head in ("structure", "n", "batch", "dtype", "keep", "dense ms", "rows", "columns", "chosen", "bound", "form"):
        table.add_column(head, justify="left" if head in ("structure", "dtype", "form") else "right")
    for row in found:
        gains = [f"{row.dense / t:.2f}x" for t in (row.rows, row.columns, row.chosen, row.bound)]
        table.add_row(
            row.name,
            str(row.n),
            str(row.batch),
            row.dtype,
            f"{row.keep:.3f}",
            f"{row.dense * 1e3:.3f}",
            *gains,
            row.form,
        )
    Console(width=150).print(table)
    if out is not None:
        click.echo(f"page  {Path(out) / 'bench.html'}")


def numbers(text: str, option: str) -> list[int]:
    """Positive integers with commas between.

    Raises:
        GramianError: anything else.
    """
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise GramianError(f"{option} {text!r}: expected positive integers with commas between, e.g. 512,1024")
    return found
