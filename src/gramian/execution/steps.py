"""What a row-major product is made of: matrices, stacks of blocks, and numbers that move between them.

Operators made of nothing else are taken apart here, once; how each step is done is a *way's* business (``execution.kernels``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gramian.ops import Blast, BlockDiagonal, BlockLowRank, Dense, Operator, Product, Selection


@dataclass(frozen=True, eq=False)
class Matrix:
    """Times a matrix: weight (out, in)."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class Stack:
    """Each run of p numbers times a matrix of its own: values (groups, s, p)."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class Mixed:
    """The rank numbers of each of K blocks become those of each of I: z (K, r) -> ``sum_k scales[r, i, k] z[k, r]`` (I, r).

    Attributes:
        scales: (r, I, K).
    """

    scales: Tensor


@dataclass(frozen=True)
class Swapped:
    """Numbers (long, short, run), written one after the other, as (short, long, run)."""

    long: int
    short: int
    run: int = 1


@dataclass(frozen=True)
class Resized:
    """Zeros added at the end, or numbers taken away there, until there are `size`."""

    size: int


@dataclass(frozen=True, eq=False)
class Taken:
    """The numbers at some places: index (k,)."""

    index: Tensor


@dataclass(frozen=True, eq=False)
class Placed:
    """Numbers to some places, all different, among `size` zeros: index (k,)."""

    index: Tensor
    size: int


Step = Matrix | Stack | Mixed | Swapped | Resized | Taken | Placed


def steps_of(op: Operator, *, in_runs: bool = True) -> list[Step] | None:
    """The steps of ``x A^T``, the first first; None for an operator that is made of anything else.

    Args:
        op: in its run-time form.
        in_runs: where blocks of a higher rank meet, factors are copied, if need be, so that runs of numbers move and not
            single ones.
    """
    if isinstance(op, Dense):
        return [Matrix(op.weight)]
    if isinstance(op, Selection):
        return [Placed(op.index, op.size) if op.scatter else Taken(op.index)]
    if isinstance(op, Product):
        steps: list[Step] = []
        for part in reversed(op.parts):
            more = steps_of(part, in_runs=in_runs)
            if more is None:
                return None
            steps += more
        return steps
    if isinstance(op, BlockDiagonal):
        b, s, p = op.values.shape
        return [
            *_gathered(b, p, op.columns, op.strided_columns),
            Stack(op.values),
            *_scattered(b, s, op.rows, op.strided_rows),
        ]
    if isinstance(op, BlockLowRank):
        if op.blocks == (1, 1):
            return [Matrix(op.right[0]), Matrix(op.left[0])]
        (j, s, tk), (k, _, p) = op.left.shape, op.right.shape
        t = tk // k
        if in_runs and t > 1:  # the ranks of a block side by side
            left, between = op.left.reshape(j, s, t, k).mT.reshape(j, s, tk), Swapped(k, j, t)
        else:
            left, between = op.left, Swapped(k, j * t)
        return [
            *_gathered(k, p, op.columns, op.strided_columns),
            Stack(op.right),
            between,
            Stack(left),
            *_scattered(j, s, op.rows, op.strided_rows),
        ]
    if isinstance(op, Blast):
        (i, s, _), (k, _, p) = op.left.shape, op.right.shape
        return [
            *_gathered(k, p, op.columns, False),
            Stack(op.right),
            Mixed(op.scales),
            Stack(op.left),
            *_scattered(i, s, op.rows, False),
        ]
    return None


def _gathered(count: int, width: int, columns: int, strided: bool) -> list[Step]:
    """The columns, block by block."""
    padded: list[Step] = [Resized(count * width)] if count * width > columns else []
    return [*padded, Swapped(width, count)] if strided else padded


def _scattered(count: int, width: int, rows: int, strided: bool) -> list[Step]:
    """The rows, from block by block."""
    turned: list[Step] = [Swapped(count, width)] if strided else []
    return [*turned, Resized(rows)] if rows < count * width else turned


__all__ = ["Matrix", "Mixed", "Placed", "Resized", "Stack", "Step", "Swapped", "Taken", "steps_of"]
