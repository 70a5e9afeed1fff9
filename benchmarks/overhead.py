"""What the algebra costs in Python: microseconds to build and compose operators, and to apply a small one.

python benchmarks/overhead.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common import write
from gramian.ops import BlockDiagonal, BlockLowRank, Dense, Diagonal, Identity, Kron, Operator, Permutation


def microseconds(call: Callable[[], object], group: int = 200, repeats: int = 15) -> float:
    """Median of groups of calls."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(group):
            call()
        taken.append((time.perf_counter() - start) / group * 1e6)
    return round(statistics.median(taken), 2)


def main() -> None:
    """Measure and write benchmarks/results/overhead.json."""
    torch.set_num_threads(1)
    n = 64
    a, b, d = torch.randn(n, n), torch.randn(n, n), torch.randn(n)
    left, right = torch.randn(n, 8), torch.randn(8, n)
    dense, other, diagonal = Dense(a), Dense(b), Diagonal(d)
    low = BlockLowRank.low_rank(left, right)
    blocks = BlockDiagonal(torch.randn(8, 8, 8), n, n)
    turn = Permutation(torch.randperm(n))
    small = Dense(torch.randn(8, 8))
    total, both = low + diagonal, Kron(small, small)
    build: dict[str, Callable[[], Operator]] = {
        "Dense": lambda: Dense(a),
        "BlockLowRank": lambda: BlockLowRank.low_rank(left, right),
        "BlockDiagonal": lambda: BlockDiagonal(blocks.values, n, n),
        "Permutation": lambda: Permutation(turn.index),
        "Dense @ Dense": lambda: dense @ other,
        "low rank @ Diagonal": lambda: low @ diagonal,
        "low rank + Diagonal": lambda: low + diagonal,
        "Dense @ Dense + Diagonal": lambda: dense @ other + diagonal,
        "2.0 * low rank": lambda: 2.0 * low,
        "low rank .T": lambda: low.T,
        "Kron": lambda: Kron(small, small),
        "low rank + Identity": lambda: low + Identity(n),
    }
    rows: dict[str, dict[str, float]] = {"build": {name: microseconds(call) for name, call in build.items()}}
    x = torch.randn(1, n)
    c8 = small.weight
    apply: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "Dense": (lambda: dense.apply(x), lambda: F.linear(x, a)),
        "low rank": (lambda: low.apply(x), lambda: F.linear(F.linear(x, right), left)),
        "Diagonal": (lambda: diagonal.apply(x), lambda: x * d),
        "low rank + Diagonal": (
            lambda: total.apply(x),
            lambda: F.linear(F.linear(x, right), left) + x * d,
        ),
        "Kron 8 x 8 of 8 x 8": (
            lambda: both.apply(x),
            lambda: (c8 @ (x.reshape(1, 8, 8) @ c8.mT)).reshape(1, n),
        ),
        "BlockDiagonal": (
            lambda: blocks.apply(x),
            lambda: (x.reshape(1, 8, 8).transpose(0, 1) @ blocks.values.mT).transpose(0, 1).reshape(1, n),
        ),
    }
    with torch.inference_mode():
        rows["apply"] = {}
        for name, (ours, bare) in apply.items():
            rows["apply"][name] = microseconds(ours)
            rows["apply"][f"{name}, bare tensors"] = microseconds(bare)
            rows["apply"][f"{name}, added"] = round(rows["apply"][name] - rows["apply"][f"{name}, bare tensors"], 2)
    for part, found in rows.items():
        for name, value in found.items():
            print(f"{part:<6} {name:<40} {value:8.2f} us")
    write("overhead", rows)


if __name__ == "__main__":
    main()
