"""The page of ``gramian bench``: every structure against dense, the bounds and the peers on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gramian.execution.bench import Row
from gramian.execution.forms import COLD_ROWS
from gramian.report.charts import COLOURS, GREY, Bar, Part, bars
from gramian.report.page import Value, definitions, grid, note, number, page, table

WAYS = {"rows": "row-major", "columns": "feature-major", "chosen": "chosen by the execution plan"}


def bench_page(rows: Sequence[Row], machine: Mapping[str, Any], *, calibrated: bool) -> str:
    """The page as one HTML document.

    Args:
        rows: measured, at least one.
        machine: what it was measured on.
        calibrated: whether forms were chosen by predicted time.
    """
    about: str = definitions((key, str(value)) for key, value in machine.items())
    if not calibrated:
        about += note(
            "Not calibrated: forms were chosen by counting operations. Run gramian bench --calibrate first.",
            warning=True,
        )
    about += note(
        "Speed-ups over torch's dense linear layer in the same dtype, medians of runs taken in turn. Bound: operations at "
        "the rate of a large dense product, or weights and activations at the rate at which so many bytes are read, whichever "
        "takes longer. "
        f"Up to {COLD_ROWS} rows, weights come from memory, as in generation. "
        "Feature-major: activations are (features, batch) on both sides, as in a chain of layers."
    )
    sections = [("", about), ("Speed-up over dense", grid(_figures(rows))), ("All figures", _table(rows))]
    return page("Structured matrices on this machine", "gramian bench", sections)


def _figures(rows: Sequence[Row]) -> list[str]:
    cases = sorted({(row.dtype, row.n, row.batch) for row in rows}, key=lambda c: (c[0] != "float32", c[1], c[2]))
    out: list[str] = []
    for dtype, n, batch in cases:
        shown = [row for row in rows if (row.dtype, row.n, row.batch) == (dtype, n, batch)]
        drawn = []
        for row in sorted(shown, key=lambda row: row.chosen):
            gain = row.dense / row.chosen
            colour = COLOURS[0] if gain >= 1 else GREY
            limit = row.dense / row.bound
            drawn.append(Bar(row.name, [Part(gain, colour, "chosen")], f"{gain:.1f}x of {limit:.0f}x", None))
        out.append(bars(drawn, title=f"n = {n}, batch {batch}, {dtype}", subtitle="measured, and the bound"))
    return out


def _table(rows: Sequence[Row]) -> str:
    head = [
        "structure",
        "n",
        "batch",
        "dtype",
        "keep",
        "dense ms",
        *WAYS.values(),
        "form",
        "bound",
        "predicted ms",
        "peers",
    ]
    body: list[list[Value]] = []
    for row in rows:
        others = "; ".join(f"{name} {row.dense / seconds:.2f}x" for name, seconds in row.peers.items())
        gains = [f"{row.dense / getattr(row, way):.2f}x" for way in WAYS]
        body.append(
            [row.name, row.n, row.batch, row.dtype, number(row.keep), number(row.dense * 1e3), *gains, row.form,
             f"{row.dense / row.bound:.1f}x", number(row.predicted * 1e3), others]
        )  # fmt: skip
    return table(head, body)
