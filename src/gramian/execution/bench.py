"""Every structure against dense, the hardware's bounds and the peers, on this machine: ``gramian bench``."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError, nearest
from gramian.execution import onednn
from gramian.execution.calibration import alternating, best_seconds, stored
from gramian.execution.forms import EVICTED, Prepared, cold, copies, predicted
from gramian.ops import Blast, BlockDiagonal, BlockLowRank, Dense, Operator, monarch, structures

Call = Callable[[], object]

SLOW = 10
"""Times the dense product: what takes longer is measured apart."""


@dataclass(frozen=True)
class Row:
    """One structure at one size, batch and dtype; seconds are medians of interleaved runs. Of a few rows, where reading the
    weights takes longest, all weights come from memory, as in generation.

    Attributes:
        name: of the structure.
        n: the matrix is n x n.
        batch: rows of x.
        dtype: of weights and activations.
        keep: stored numbers as a share of n^2.
        dense: seconds of ``F.linear`` with the dense matrix in the same dtype.
        rows: seconds of ``op.apply``.
        columns: seconds of ``op.apply_columns`` on activations that are feature-major already.
        chosen: seconds of the form that the execution plan picks, and its name.
        form: that name.
        bound: least possible seconds: operations at the best rate seen here, or the bytes of weights, input and output at
            the rate at which so many are read here again and again, whichever takes longer.
        predicted: seconds that the cost model gives to the chosen form; NaN without a calibration.
        peers: seconds of other libraries and of the papers' own way of writing it, by name.
    """

    name: str
    n: int
    batch: int
    dtype: str
    keep: float
    dense: float
    rows: float
    columns: float
    chosen: float
    form: str
    bound: float
    predicted: float
    peers: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def zoo(n: int, seed: int = 0) -> dict[str, Operator]:
    """Structures of size n x n as the literature uses them, and every registered one at a quarter of the numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, n)
    out: dict[str, Operator] = {
        "low rank, keep 1/2": BlockLowRank.init(shape, rank=n // 4, generator=generator),
        "low rank, keep 1/4": BlockLowRank.init(shape, rank=n // 8, generator=generator),
        "4 x 4 blocks of low rank, keep 1/2": BlockLowRank.init(
            shape, rank=max(1, n // 16), blocks=(4, 4), generator=generator
        ),
        "8 x 8 blocks of low rank, keep 1/4": BlockLowRank.init(
            shape, rank=max(1, n // 64), blocks=(8, 8), generator=generator
        ),
        "BLAST, 8 x 8 blocks, keep 1/4": Blast.init(shape, rank=n // 8, blocks=(8, 8), generator=generator),
        "block diagonal, 4 blocks": BlockDiagonal.init(shape, blocks=4, generator=generator),
        "block diagonal, 16 blocks": BlockDiagonal.init(shape, blocks=16, generator=generator),
    }
    if n % 64 == 0:
        first, second = (torch.randn(64, n // 64, n // 64, generator=generator) / (n // 64) ** 0.5 for _ in range(2))
        out["Monarch, 64 blocks"] = monarch(first, second)
    for kind, cls in structures().items():
        if cls.fittable and kind not in ("dense", "block_low_rank", "block_diagonal", "blast", "quantized"):
            sizes = cls.sizes(shape, 0.25)
            if sizes:
                out[kind.replace("_", " ")] = cls.init(shape, generator=generator, **sizes[0])
    return out


def peak_rate(dtype: torch.dtype, n: int = 1024) -> float:
    """Operations a second of a dense product of n x n matrices, by whichever library is fastest; of large ones: the best that
    this machine does.
    """
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    ways: list[Call] = [partial(torch.mm, a, b)]
    if dtype == torch.float32 and onednn.present():
        ways.append(partial(onednn.linear(b), a, None))
    with torch.inference_mode():
        return 2 * n**3 / min(best_seconds(way) for way in ways for _ in range(3))


def read_rates() -> dict[int, float]:
    """Bytes a second at which so many bytes are read again and again, by whatever reads fastest: what a cache holds comes
    faster. No size's rate is below a larger one's.
    """
    found: dict[int, float] = {}
    fastest = 0.0
    for side in (8192, 4096, 2048, 1024, 512, 256):
        matrix, x = torch.randn(side, side), torch.randn(side)
        reads = (partial(torch.mv, matrix, x), matrix.sum)
        fastest = max(fastest, matrix.nbytes / min(best_seconds(read) for read in reads for _ in range(3)))
        found[matrix.nbytes] = fastest
    return found


def bound(op: Operator, batch: int, rate: float, reads: Mapping[int, float]) -> float:
    """Least possible seconds of a product, see ``Row.bound``.

    Args:
        op: the structure as it runs.
        batch: rows of x.
        rate: operations a second.
        reads: of ``read_rates``.
    """
    moved = op.nbytes + batch * sum(op.shape) * op.dtype.itemsize
    place = max((size for size in reads if size <= moved), default=min(reads))
    return max(op.flops(batch) / rate, moved / reads[place])


def peers(op: Operator, x: Tensor) -> dict[str, Call]:
    """The same product by others: the published way of writing it, torch.sparse, CoLA and linear_operator if installed."""
    from gramian.ops import BlockSparse, KroneckerSum, Product

    out: dict[str, Call] = {}
    if isinstance(op, Product) and all(isinstance(part, BlockDiagonal) for part in op.parts):
        second, first = (part.values for part in op.parts if isinstance(part, BlockDiagonal))
        out["as published (Monarch)"] = partial(_published_monarch, x, first, second)
    if op.kind == "blast":
        factors = op.factors()
        out["as published (BLAST)"] = partial(_published_blast, x, *(factors[k] for k in ("left", "scales", "right")))
    if isinstance(op, BlockSparse) and x.dtype == torch.float32:
        dense = op.dense()
        height, width = op.values.shape[2:]
        if dense.shape[0] % height == 0 and dense.shape[1] % width == 0:
            with warnings.catch_warnings():  # that its sparse tensors are in beta
                warnings.simplefilter("ignore")
                stored_as = dense.to_sparse_bsr((height, width))
            out["torch.sparse (BSR)"] = partial(F.linear, x, stored_as)
    if isinstance(op, KroneckerSum) and op.left.shape[0] == 1 and x.dtype == torch.float32:
        left, right = op.left[0], op.right[0]
        if importlib.util.find_spec("cola") is not None:
            import cola

            product = cola.ops.Kronecker(cola.ops.Dense(left), cola.ops.Dense(right))
            out["CoLA"] = lambda: product @ x.mT
        if importlib.util.find_spec("linear_operator") is not None:
            from linear_operator.operators import DenseLinearOperator, KroneckerProductLinearOperator

            lazy = KroneckerProductLinearOperator(DenseLinearOperator(left), DenseLinearOperator(right))
            out["linear_operator"] = lambda: lazy @ x.mT
    return out


def _published_monarch(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Batch-first blocks with a copy at every permutation, as the research code runs it."""
    (k, _, p), (length, s, r) = first.shape, second.shape
    middle = torch.bmm(x.reshape(-1, k, p).transpose(0, 1), first.transpose(-1, -2))
    middle = middle.transpose(0, 1).reshape(-1, r, length).transpose(-1, -2).contiguous().transpose(0, 1)
    y = torch.bmm(middle, second.transpose(-1, -2))
    return y.permute(1, 2, 0).reshape(-1, s * length)


def _published_blast(x: Tensor, left: Tensor, scales: Tensor, right: Tensor) -> Tensor:
    """The middle step by a broadcast over (rows, columns, batch, rank), as the research code runs it."""
    j, _, q = right.shape
    z = torch.bmm(x.reshape(-1, j, q).transpose(0, 1), right.mT)  # (J, B, r)
    mixed = (scales.permute(1, 2, 0)[:, :, None] * z[None]).sum(1)  # (I, B, r)
    return torch.bmm(mixed, left.mT).transpose(0, 1).reshape(len(x), -1)


def taking_turns(calls: Iterable[Call]) -> Call:
    """Each time the next of the calls; all have been made once, in which a layer chooses its form."""
    every = list(calls)
    for call in every:
        call()
    return alternating(lambda call: call(), every) if len(every) > 1 else every[0]


def interleaved(calls: Mapping[str, Call], *, seconds: float = 0.25, least: int = 5) -> dict[str, float]:
    """Median seconds of each call, taken in turn, so that a busy moment hits all alike. Each runs once untimed before it is
    timed: what the call before it left in the caches would favour some.
    """
    once = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once[name] = time.perf_counter() - start
    groups = {name: max(1, round(2e-4 / max(taken, 1e-7))) for name, taken in once.items()}
    rounds = max(least, min(200, round(seconds / max(sum(once[n] * (groups[n] + 1) for n in calls), 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(groups[name]):
                call()
            taken[name].append((time.perf_counter() - start) / groups[name])
    return {name: statistics.median(values) for name, values in taken.items()}


def bench(
    sizes: Sequence[int] = (512, 1024, 2048),
    batches: Sequence[int] = (1, 32, 512),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    names: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Measure this machine.

    Args:
        sizes: n of the square matrices.
        batches: rows of x.
        dtypes: of weights and activations.
        names: only structures whose name holds one of these, in upper or lower case; all by default.
        progress: called with (done, total).

    Raises:
        GramianError: no structure's name holds one of `names`.
    """
    made = {n: zoo(n) for n in sizes}
    known = list(dict.fromkeys(name for found in made.values() for name in found))
    if unknown := [name for name in names if not any(name.lower() in k.lower() for k in known)]:
        raise GramianError(
            f"no structure's name holds {unknown[0]!r}{nearest(unknown[0], known)}; known: {'; '.join(known)}"
        )
    reads = read_rates()
    rates = {dtype: peak_rate(dtype) for dtype in dtypes}
    out: list[Row] = []
    cases = [(n, dtype) for n in sizes for dtype in dtypes]
    for place, (n, dtype) in enumerate(cases):
        chosen = {k: op for k, op in made[n].items() if not names or any(name.lower() in k.lower() for name in names)}
        weight = (torch.randn(n, n) / n**0.5).to(dtype)
        for index, (name, plain) in enumerate(chosen.items()):
            op = plain.to(dtype=dtype)
            with torch.inference_mode():
                out += [_row(name, op, weight, n, batch, rates[dtype], reads) for batch in batches]
            if progress is not None:
                progress(place * len(chosen) + index + 1, len(cases) * len(chosen))
    return out


def _row(name: str, op: Operator, weight: Tensor, n: int, batch: int, rate: float, reads: Mapping[int, float]) -> Row:
    x = torch.randn(batch, n).to(op.dtype)
    across = x.mT.contiguous()
    ready, model = Prepared(op), stored()
    form = ready.settled(x)
    seconds = predicted(op, form, batch, op.dtype, model) if model else math.nan
    run = op.runtime()
    from_memory = cold(op, batch)

    matrices, running = copies(Dense(weight), from_memory), copies(run, from_memory)
    others = [peers(each, x) for each in copies(op, from_memory)]
    calls = {
        "dense": taking_turns(partial(F.linear, x, each.dense()) for each in matrices),
        "rows": taking_turns(partial(each.apply, x) for each in running),
        "columns": taking_turns(partial(each.apply_columns, across) for each in running),
        "chosen": taking_turns(partial(Prepared(each), x) for each in copies(op, from_memory, ready.nbytes(form))),
        **{peer: taking_turns(found[peer] for found in others) for peer in others[0]},
    }
    # Calls that take very long would leave time for a few rounds only, and disturb what is measured next to them.
    most = SLOW * best_seconds(calls["dense"])
    slow = {name for name, call in calls.items() if best_seconds(call, repeats=1) > most}
    quick = {name: call for name, call in calls.items() if name not in slow}
    took = interleaved(quick) | interleaved({name: calls[name] for name in slow})
    if from_memory:
        reads = {EVICTED: reads[max(reads)]}
    least = bound(run, batch, rate, reads)
    label = f"{'dense' if form.dense else 'structured'}, {'feature' if form.columns else 'row'}-major"
    label += "" if form.way == "plain" else f", {form.way}"
    if form.dtype != op.dtype:
        label += f", {str(form.dtype).removeprefix('torch.')}"
    return Row(
        name, n, batch, str(op.dtype).removeprefix("torch."), op.numel / n**2, took["dense"], took["rows"],
        took["columns"], took["chosen"], label, least, seconds,
        {peer: took[peer] for peer in others[0]},
    )  # fmt: skip


def calibrated() -> bool:
    """Whether this machine has a calibration, so that forms are chosen by predicted time."""
    return stored() is not None
