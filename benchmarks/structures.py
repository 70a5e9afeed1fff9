"""Structured layers on this machine: speed against dense and the published code, training, the cost model, projections.

    python benchmarks/structures.py [speed decode training model blast]      (about 8 minutes; the machine should be idle)

Medians of interleaved runs. Writes benchmarks/results/structures_<part>.json.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import write
from gramian.execution import CostModel, Prepared, calibrate, candidates, forget, predicted, save
from gramian.execution.bench import bench, interleaved, peak_rate, peers, taking_turns, zoo
from gramian.execution.calibration import Pace, best_seconds, random_product, time_product
from gramian.execution.forms import cold, copies
from gramian.nn import FeatureMajor, StructuredLinear
from gramian.ops import Blast, BlockLowRank, Dense, Operator, structure

TABLE = ["low rank", "blocks of low rank", "BLAST", "block diagonal", "Monarch", "block sparse", "kronecker"]


def speed() -> None:
    """The table of structures, sizes and batches, in float32 and bfloat16; and rectangular, non-dividing sizes.

    Where bfloat16 has no fast kernels (a hundredth of float32's rate and less), its products of large matrices take
    minutes: then it is measured on small ones.
    """
    rows = bench((1000, 1024, 2048), (1, 32, 512), names=TABLE)
    if peak_rate(torch.bfloat16, 256) > 0.1 * peak_rate(torch.float32, 256):
        rows += bench((1000, 1024, 2048), (1, 32, 512), (torch.bfloat16,), names=TABLE)
    else:
        rows += bench((256,), (1, 32), (torch.bfloat16,), names=TABLE)
    out = []
    for row in rows:
        best = min(row.rows, row.columns)
        out.append(row.to_json() | {"faster": row.dense / best, "chosen_faster": row.dense / row.chosen})
        print(
            f"{row.name:<38} n={row.n} B={row.batch:<4} {row.dtype:<9} rows {row.dense / row.rows:6.2f}x columns "
            f"{row.dense / row.columns:6.2f}x chosen {row.dense / row.chosen:6.2f}x bound {row.dense / row.bound:6.2f}x "
            f"({row.form})" + "".join(f"; {k} {row.dense / v:.2f}x" for k, v in row.peers.items()),
            flush=True,
        )
    wide = rectangular()
    slowest = min([*(row["chosen_faster"] for row in out), *wide.values()])
    print(f"the form that the plan chooses is never slower than {slowest:.2f}x of dense")
    write("structures_speed", {"rows": out, "rectangular": wide, "slowest_choice": slowest})


def rectangular() -> dict[str, float]:
    """Times faster than dense of the form that the plan chooses, for matrices that are not square. Of a single row, weights
    come from memory, as where the plan chooses.
    """
    found = {}
    for out, in_ in ((384, 1536), (1536, 384), (1000, 600), (250, 2000)):
        weight = torch.randn(out, in_) / in_**0.5
        for kind in ("block_low_rank", "blast", "block_diagonal", "kronecker"):
            cls = structure(kind)
            op = cls.init((out, in_), **cls.sizes((out, in_), 0.25)[0])
            for batch in (1, 32, 512):
                x = torch.randn(batch, in_)
                with torch.inference_mode():
                    ready = Prepared(op)
                    form = ready.settled(x)
                    few = cold(op, batch)
                    dense = taking_turns(partial(F.linear, x, each.dense()) for each in copies(Dense(weight), few))
                    ops = copies(op, few, ready.nbytes(form))
                    chosen = taking_turns(partial(Prepared(each), x) for each in ops)
                    took = interleaved({"dense": dense, "chosen": chosen})
                label = f"{kind} {out} x {in_} B={batch}"
                found[label] = round(took["dense"] / took["chosen"], 3)
                print(
                    f"{label:<36} chosen {found[label]:6.2f}x ({'dense' if form.dense else 'structured'})", flush=True
                )
    return found


def decode(n: int = 2048, held: float = 256e6) -> None:
    """One row at a time, as in generation: every product meets weights that no cache holds, because each is of the next of
    as many copies as take `held` bytes. Speed over dense, and the share of the rate of a plain read (a sum).
    """
    x = torch.randn(1, n)

    def matrices() -> list[Tensor]:  # of each call its own: what another has just read may still lie in a cache
        return [torch.randn(n, n) for _ in range(round(held / (4 * n * n)))]

    calls = {"dense": taking_turns(partial(F.linear, x, weight) for weight in matrices())}
    calls["dense, ours"] = taking_turns(partial(Prepared(Dense(weight)), x) for weight in matrices())
    calls["a plain read"] = taking_turns(matrix.sum for matrix in matrices())
    nbytes = dict.fromkeys(calls, 4 * n * n)
    with torch.inference_mode():
        for name, op in zoo(n).items():
            if any(part in name for part in TABLE[:5]):
                copies = round(held / op.nbytes)

                def made(op: Operator = op, copies: int = copies) -> list[Operator]:
                    return [op.replace(**{k: f.clone() for k, f in op.factors().items()}) for _ in range(copies)]

                calls[name] = taking_turns(partial(Prepared(each), x) for each in made())
                nbytes[name] = op.nbytes
                for peer in peers(op, x):
                    calls[peer] = taking_turns(peers(each, x)[peer] for each in made())
                    nbytes[peer] = op.nbytes
        took = interleaved(calls, seconds=10.0)
    memory = 4 * n * n / took["a plain read"]
    rows = {
        name: {"faster": round(took["dense"] / seconds, 3), "of_bandwidth": round(nbytes[name] / memory / seconds, 3)}
        for name, seconds in took.items()
    }
    for name, row in rows.items():
        print(
            f"n={n} B=1, weights from memory: {name:<38} {row['faster']:6.2f}x dense, {row['of_bandwidth']:.0%} of bandwidth"
        )
    write("structures_decode", {"gigabytes_per_second": round(memory / 1e9, 2), "rows": rows})


def training(n: int = 2048, batch: int = 512) -> None:
    """Forward and backward through a layer, and through a feature-major block, against dense."""
    size: dict[str, Any] = {"rank": n // 64, "blocks": (8, 8)}
    x = torch.randn(batch, n, requires_grad=True)
    dense = nn.Linear(n, n)
    layer = StructuredLinear(BlockLowRank.init((n, n), **size), torch.zeros(n))
    dense_block = nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.Linear(n, n))
    structured = [StructuredLinear(BlockLowRank.init((n, n), **size), torch.zeros(n)) for _ in range(2)]
    row_block, column_block = (make(structured[0], nn.GELU(), structured[1]) for make in (nn.Sequential, FeatureMajor))

    def step(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            module.zero_grad()
            x.grad = None
            module(x).sum().backward()

        return run

    def columns() -> None:
        layer.zero_grad()
        across.grad = None
        layer.columns(across).sum().backward()

    across = x.detach().mT.contiguous().requires_grad_()
    took = interleaved(
        {
            "dense": step(dense), "rows": step(layer), "columns": columns,
            "dense block": step(dense_block), "row-major block": step(row_block), "feature-major block": step(column_block),
        },
        seconds=12.0,
    )  # fmt: skip
    rows = {
        "layer, row-major": took["dense"] / took["rows"],
        "layer, feature-major": took["dense"] / took["columns"],
        "block, row-major": took["dense block"] / took["row-major block"],
        "block, feature-major": took["dense block"] / took["feature-major block"],
    }
    for name, value in rows.items():
        print(f"forward + backward, 8 x 8 blocks at keep 1/4, n={n} B={batch}: {name:<24} {value:.2f}x")
    write("structures_training", {name: round(value, 3) for name, value in rows.items()})


def in_rounds(calls: Sequence[Callable[[], float]], rounds: int = 5) -> list[float]:
    """The median of what each call measures over rounds of all of them, at the machine's usual pace."""
    pace = Pace()
    found = [[pace.relative(call()) for call in calls] for _ in range(rounds)]
    return [pace.usual * statistics.median(values) for values in zip(*found, strict=True)]


def reference() -> float:
    """Operations a second of one large product: how fast the machine is at this moment."""
    a = torch.ones(1024, 1024)
    return 2 * 1024**3 / min(best_seconds(partial(torch.mm, a, a)) for _ in range(20))


def model(runs: int = 5) -> None:
    """Calibrate, then predict unseen products and structured layers, and which of two is faster.

    A shared machine changes its speed under way, by up to a factor of two, which no calibration can foresee: the medians
    over a few runs are told, and every run.
    """
    found = [_model() for _ in range(runs)]
    numbers = [name for name, value in found[0].items() if isinstance(value, float)]
    medians = {name: round(statistics.median(run[name] for run in found), 4) for name in numbers}
    for name, value in medians.items():
        print(f"{name}: {value} (median of {[run[name] for run in found]})")
    write("structures_model", {"median": medians, "runs": found})


def _model() -> dict[str, Any]:
    speeds = [reference()]
    start = time.perf_counter()
    cost = calibrate()
    seconds = time.perf_counter() - start
    save(cost)
    forget()
    speeds.append(reference())
    r = random.Random(4711)
    products = [random_product(r, torch.float32) for _ in range(30)]
    calls: list[Callable[[], float]] = [partial(time_product, product) for product in products]
    cases: list[tuple[str, float]] = [("", cost.seconds([product])) for product in products]
    with torch.inference_mode():
        for n in (384, 1000, 1536):
            for name, op in zoo(n).items():
                if op.kind in ("diagonal", "toeplitz", "circulant", "low_displacement", "householder", "orthogonal"):
                    continue
                for batch in (16, 256):
                    x = torch.randn(batch, n)
                    for form in candidates(op, torch.float32, batch):
                        if form.dense:
                            continue
                        kernel = form.kernel(form.operator(op), torch.float32)
                        label = f"{name} n={n} B={batch} {'columns' if form.columns else form.way}"
                        cases.append((label, predicted(op, form, batch, torch.float32, cost)))
                        calls.append(partial(best_seconds, partial(kernel, x, None)))
        took = in_rounds(calls, rounds=7)
    speeds.append(reference())
    rows = [(label, said, seconds) for (label, said), seconds in zip(cases, took, strict=True)]
    plain, layers = rows[: len(products)], rows[len(products) :]
    bound = cost.roofline(torch.float32)
    roofline = [("", bound.seconds(p), t) for p, (_, _, t) in zip(products, plain, strict=True)]
    # How much slower than in the calibration the machine was when these products ran.
    pace = statistics.median(t / p for _, p, t in plain)
    pairs = [(a, b) for a, b in combinations(layers, 2) if abs(a[2] - b[2]) > 0.15 * min(a[2], b[2])]
    right = sum((a[1] < b[1]) == (a[2] < b[2]) for a, b in pairs) / len(pairs)
    return {
        "calibration_seconds": round(seconds, 1),
        "products_measured": {dtype: len(found) for dtype, found in cost.products.items()},
        "median_error_held_out": round(held_out(cost), 4),
        "median_error_30_products": median_error(plain),
        "median_error_30_products_at_their_pace": median_error(plain, pace),
        "median_error_roofline": median_error(roofline),
        "median_error_structured": median_error(layers),
        "median_error_structured_at_their_pace": median_error(layers, pace),
        "structured_cases": len(layers),
        "faster_of_two_right": round(right, 4),
        "pairs": len(pairs),
        "pace": round(pace, 3),
        "reference_moved": round(max(speeds) / min(speeds) - 1, 3),
        "worst": sorted(((round(p / t, 2), label) for label, p, t in layers), key=lambda w: abs(w[0] - 1))[-8:],
    }


def median_error(rows: Sequence[tuple[str, float, float]], pace: float = 1.0) -> float:
    """Of (label, predicted, measured), the predictions taken at another pace of the machine."""
    return round(statistics.median(abs(pace * said / took - 1) for _, said, took in rows), 4)


def held_out(cost: CostModel, folds: int = 10) -> float:
    """Median error at the calibration's own float32 products, each predicted by a model that did not learn from it: measured
    in the same seconds, they differ by what the model does not know and not by what the machine did in between.
    """
    rows = cost.products["float32"]
    errors: list[float] = []
    for fold in range(folds):
        rest = [row for i, row in enumerate(rows) if i % folds != fold]
        other = replace(cost, products={"float32": rest}, rooflines={})
        errors += [abs(other.seconds([product]) / took - 1) for product, took in rows[fold::folds]]
    return statistics.median(errors)


def blast() -> None:
    """BLAST against low rank at equal parameters on the encoder's 36 matrices, unweighted."""
    from common import Encoder

    rows = []
    modules = Encoder().model.encoder.named_modules()
    weights = {name: module.weight.detach() for name, module in modules if isinstance(module, nn.Linear)}
    for name, weight in weights.items():
        size = next(s for s in Blast.sizes(tuple(weight.shape), 0.5) if tuple(s["blocks"]) == (8, 8))
        ours = Blast.fit(weight, **size)
        low = structure("block_low_rank").fit(weight, rank=ours.numel // sum(weight.shape))
        errors = [float((op.dense() - weight).norm() / weight.norm()) for op in (ours, low)]
        rows.append({"layer": name, "blast": errors[0], "low_rank": errors[1]})
        print(f"{name:<40} BLAST {errors[0]:.4f} low rank {errors[1]:.4f}", flush=True)
    worse = [row["layer"] for row in rows if row["blast"] > row["low_rank"]]
    print(f"BLAST is worse on {len(worse)} of {len(rows)}: {', '.join(worse)}")
    write("structures_blast", {"rows": rows, "worse": worse})


PARTS = {"speed": speed, "decode": decode, "training": training, "model": model, "blast": blast}

if __name__ == "__main__":
    for part in sys.argv[1:] or ["model", "speed", "decode", "training", "blast"]:
        PARTS[part]()
