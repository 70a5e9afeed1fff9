"""Row-major products put together from two words: a matrix times rows, and a stack of blocks times runs of rows.

A *way* says how both are done. The structures that are made of nothing else (low rank, blocks, BLAST, chosen rows or columns,
sums and products of all of these) then run in every way; what is left runs as ``op.apply``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.execution import int4, onednn
from gramian.execution.onednn import Grouped, Kernel
from gramian.ops import Blast, BlockDiagonal, BlockLowRank, Dense, Operator, Product, Selection, Sum
from gramian.ops.blast import FEW_ROWS

PIECES = 8
"""Into so many a matrix is cut, or the next smaller number that divides its rows."""


@dataclass(frozen=True)
class Way:
    """How matrices and stacks of blocks are multiplied.

    Attributes:
        linear: weight (out, in) -> the product of it.
        grouped: values (groups, s, p) -> the product of them; None for ``op.apply``.
        packed: an operator as it is stored -> what runs in its place; None for its run-time form, or the dense matrix.
    """

    linear: Callable[[Tensor], Kernel]
    grouped: Callable[[Tensor], Grouped] | None = None
    packed: Callable[[Operator], Operator] | None = None


def plain(weight: Tensor) -> Kernel:
    """``F.linear``."""
    return lambda x, bias: F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def pieces(weight: Tensor) -> int:
    """Into how many runs of rows a matrix can be cut by views."""
    if not weight.is_contiguous():
        return 1
    return next((n for n in range(PIECES, 1, -1) if len(weight) % n == 0), 1)


def cut(weight: Tensor) -> Kernel:
    """As ``plain``, by one batch of products with pieces of the rows; where those cannot be divided, the same."""
    out, in_ = weight.shape
    count = pieces(weight)
    if count == 1:
        return plain(weight)
    blocks = weight.view(count, out // count, in_).mT

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.bmm(x.reshape(1, -1, in_).expand(count, -1, -1), blocks)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], out)
        return y if bias is None else y + bias.to(y.dtype)

    return product


def turned(weight: Tensor) -> Kernel:
    """As ``cut``, by pieces times the columns of x^T: matrix times vectors, not vectors times matrix."""
    out, in_ = weight.shape
    count = pieces(weight)
    blocks = weight.reshape(count, out // count, in_)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        across = x.reshape(1, -1, in_).mT  # its strides tell a column from a row of one
        y = torch.bmm(blocks, across.expand(count, -1, -1)).permute(2, 0, 1).reshape(*x.shape[:-1], out)
        return y if bias is None else y + bias.to(y.dtype)

    return product


def turned_blocks(values: Tensor) -> Grouped:
    """The same for blocks."""
    groups, s, p = values.shape

    def product(x: Tensor) -> Tensor:
        across = x.reshape(-1, groups, p).transpose(0, 1).mT
        return torch.bmm(values, across).permute(2, 0, 1).reshape(-1, groups * s)

    return product


WAYS = {
    "plain": Way(plain),
    "cut": Way(cut, onednn.batched),  # blocks are cut already
    "turned": Way(turned, turned_blocks),
    "onednn": Way(onednn.linear, onednn.grouped),
    "int4": Way(plain, packed=int4.Int4.of),
}
"""By name."""


def rows(op: Operator, way: Way) -> Kernel:
    """``x A^T + bias``, x (..., in)."""
    if isinstance(op, Dense):
        return way.linear(op.weight)
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        left, right = way.linear(op.left[0]), way.linear(op.right[0])
        return lambda x, bias: left(right(x, None), bias)
    special = _chosen(op, way) if isinstance(op, Product) else None
    steps = None if special or way.grouped is None else _steps(op, way.grouped)
    if steps is not None:
        special = _stepwise(steps)
    elif special is None and isinstance(op, Product | Sum):
        kernels = [rows(part, way) for part in op.parts]
        special = _chained(kernels[::-1]) if isinstance(op, Product) else _added(kernels)
    return special or _applied(op)


def multiplied(op: Operator) -> tuple[list[Tensor], list[Tensor]]:
    """What ``rows`` multiplies by: matrices, and stacks of blocks."""
    matrices: list[Tensor] = []
    stacks: list[Tensor] = []

    def linear(weight: Tensor) -> Kernel:
        matrices.append(weight)
        return plain(weight)

    def grouped(values: Tensor) -> Grouped:
        stacks.append(values)
        return turned_blocks(values)

    rows(op, Way(linear, grouped))
    return matrices, stacks


def _chosen(op: Product, way: Way) -> Kernel | None:
    """Some rows or some columns of a dense matrix: what is left when coordinates were chosen."""
    if len(op.parts) != 2:
        return None
    left, right = op.parts
    if isinstance(left, Selection) and isinstance(right, Dense) and left.scatter:
        some, index, size = way.linear(right.weight), left.index.long(), left.size

        def scattered(x: Tensor, bias: Tensor | None) -> Tensor:
            found = some(x, None)
            y = found.new_zeros(*x.shape[:-1], size).index_copy_(-1, index, found)
            return y if bias is None else y + bias

        return scattered
    if isinstance(left, Dense) and isinstance(right, Selection) and not right.scatter:
        columns, index = way.linear(left.weight), right.index
        return lambda x, bias: columns(x.index_select(-1, index), bias)
    return None


def _applied(op: Operator) -> Kernel:
    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = op.apply(x)
        return y if bias is None else y + bias.to(y.dtype)

    return product


def _chained(kernels: Sequence[Kernel]) -> Kernel:
    """One after the other, the first first."""
    *first, last = kernels

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        for kernel in first:
            x = kernel(x, None)
        return last(x, bias)

    return product


def _added(kernels: Sequence[Kernel]) -> Kernel:
    first, *rest = kernels

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = first(x, bias)
        for kernel in rest:
            y = y + kernel(x, None)
        return y

    return product


Step = Callable[[Tensor], Tensor]
"""(B, numbers) -> (B, other numbers)."""


def _stepwise(steps: Sequence[Step]) -> Kernel:
    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        for step in steps:
            y = step(y)
        y = y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias.to(y.dtype)

    return product


def _steps(op: Operator, grouped: Callable[[Tensor], Grouped]) -> list[Step] | None:
    """The product of a matrix of blocks, or of several; None for any other operator."""
    if isinstance(op, Product):
        steps: list[Step] = []
        for part in reversed(op.parts):
            more = _steps(part, grouped)
            if more is None:
                return None
            steps += more
        return steps
    if isinstance(op, BlockDiagonal):
        b, s, p = op.values.shape
        return [
            *_gathered(b, p, op.columns, op.strided_columns),
            grouped(op.values),
            *_scattered(b, s, op.rows, op.strided_rows),
        ]
    if isinstance(op, BlockLowRank):
        (j, s, tk), (k, _, p) = op.left.shape, op.right.shape
        t = tk // k
        # The ranks of a block side by side: between the products, runs of t numbers move and not single ones.
        left = op.left.reshape(j, s, t, k).mT.reshape(j, s, tk)

        def between(z: Tensor) -> Tensor:
            return z.reshape(-1, k, j, t).transpose(1, 2).reshape(-1, j * tk)

        return [
            *_gathered(k, p, op.columns, op.strided_columns),
            grouped(op.right),
            between,
            grouped(left),
            *_scattered(j, s, op.rows, op.strided_rows),
        ]
    if isinstance(op, Blast):
        (i, s, r), (k, _, p) = op.left.shape, op.right.shape

        def mixed(z: Tensor) -> Tensor:
            if len(z) <= FEW_ROWS:
                z = op.scales @ z.reshape(-1, k, r).permute(2, 1, 0)  # (r, I, B)
                return z.permute(2, 1, 0).reshape(-1, i * r)
            # Turned as a whole, twice: products of views whose numbers lie apart take several times as long.
            across = z.mT.contiguous().view(k, r, -1).transpose(0, 1)  # (r, K, B)
            return (op.scales @ across).transpose(0, 1).reshape(i * r, -1).mT.contiguous()

        return [
            *_gathered(k, p, op.columns, False),
            grouped(op.right),
            mixed,
            grouped(op.left),
            *_scattered(i, s, op.rows, False),
        ]
    return None


def _gathered(count: int, width: int, columns: int, strided: bool) -> list[Step]:
    """(B, columns) -> (B, count * width), block by block."""
    steps: list[Step] = []
    if count * width > columns:
        steps.append(lambda x: F.pad(x, (0, count * width - columns)))
    if strided:
        steps.append(_turned_in_rows(width, count))
    return steps


def _turned_in_rows(long: int, short: int) -> Step:
    """Each row, a matrix (long, short) written row by row, written column by column."""

    def step(x: Tensor) -> Tensor:
        if len(x) == 1:
            return x.reshape(long, short).t().reshape(1, long * short)
        return x.reshape(-1, long, short).mT.reshape(-1, long * short)

    return step


def _scattered(count: int, width: int, rows: int, strided: bool) -> list[Step]:
    """(B, count * width), block by block -> (B, rows)."""
    steps: list[Step] = []
    if strided:
        steps.append(_turned_in_rows(count, width))
    if rows < count * width:
        steps.append(lambda y: y[:, :rows])
    return steps


__all__ = ["WAYS", "Kernel", "Way", "multiplied", "pieces", "rows"]
