"""Row-major products put together from two words: a matrix times rows, and a stack of blocks times runs of rows.

A *way* says how both are done, or a whole chain of them. The structures that are made of nothing else (low rank, blocks, BLAST,
chosen rows or columns, sums and products of all of these: ``execution.steps``) then run in every way; what is left runs as
``op.apply``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.execution import codes, compiled, int4, onednn
from gramian.execution.onednn import Grouped, Kernel
from gramian.execution.steps import Matrix, Mixed, Placed, Stack, Step, Swapped, Taken, steps_of
from gramian.ops import Operator, Product, Sum
from gramian.ops.blast import FEW_ROWS

PIECES = 8
"""Into so many a matrix is cut, or the next smaller number that divides its rows."""


@dataclass(frozen=True)
class Way:
    """How matrices and stacks of blocks are multiplied.

    Attributes:
        linear: weight (out, in) -> the product of it.
        grouped: values (groups, s, p) -> the product of them; None for ``op.apply``.
        packed: an operator as it is stored, and the dtype of x -> what runs in its place; None for its run-time form, or the
            dense matrix.
        chain: all steps at once, given also (out, in) and how torch does it; it may refuse. None for one after the other.
    """

    linear: Callable[[Tensor], Kernel]
    grouped: Callable[[Tensor], Grouped] | None = None
    packed: Callable[[Operator, torch.dtype], Operator] | None = None
    chain: Callable[[Sequence[Step], tuple[int, int], Kernel], Kernel | None] | None = None


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
    "compiled": Way(plain, chain=compiled.chain),
    "codes": Way(plain, packed=codes.Codes.of),
}
"""By name."""


def rows(op: Operator, way: Way) -> Kernel:
    """``x A^T + bias``, x (..., in)."""
    steps = steps_of(op, in_runs=way.grouped is not None)
    if steps is not None:
        whole = None if way.chain is None else way.chain(steps, op.shape, rows(op, WAYS["plain"]))
        if whole is not None:
            return whole
        if way.grouped is not None or not any(isinstance(step, Stack) for step in steps):
            return _stepwise(steps, way)
    if isinstance(op, Product | Sum):
        kernels = [rows(part, way) for part in op.parts]
        return _chained(kernels[::-1]) if isinstance(op, Product) else _added(kernels)
    return _then_added(op.apply)


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


Move = Callable[[Tensor], Tensor]
"""x (..., numbers) -> (..., other numbers)."""


def _stepwise(steps: Sequence[Step], way: Way) -> Kernel:
    """One step after the other; the bias with the last, where that is a matrix."""
    *first, last = steps
    moves = [_move(step, way) for step in first]
    end = way.linear(last.weight) if isinstance(last, Matrix) else _then_added(_move(last, way))
    if all(isinstance(step, Matrix | Taken | Placed) for step in steps):

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            for move in moves:
                x = move(x)
            return end(x, bias)

        return product

    def flat(x: Tensor, bias: Tensor | None) -> Tensor:
        y = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        for move in moves:
            y = move(y)
        y = end(y, bias)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])

    return flat


def _then_added(move: Move) -> Kernel:
    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = move(x)
        return y if bias is None else y + bias.to(y.dtype)

    return product


def _move(step: Step, way: Way) -> Move:
    """How torch does a step: on rows (B, numbers), or of any shape where all steps are of matrices and chosen places."""
    if isinstance(step, Matrix):
        multiply = way.linear(step.weight)
        return lambda x: multiply(x, None)
    if isinstance(step, Stack):
        assert way.grouped is not None
        return way.grouped(step.values)
    if isinstance(step, Mixed):
        return _mixed(step.scales)
    if isinstance(step, Swapped):
        return _swapped(step)
    if isinstance(step, Taken):
        return lambda x: x.index_select(-1, step.index)
    if isinstance(step, Placed):
        index = step.index.long()
        return lambda x: x.new_zeros(*x.shape[:-1], step.size).index_copy_(-1, index, x)

    def resized(x: Tensor) -> Tensor:
        more = step.size - x.shape[-1]
        return F.pad(x, (0, more)) if more > 0 else x[:, : step.size]

    return resized


def _swapped(step: Swapped) -> Move:
    long, short, run = step.long, step.short, step.run

    def turned(x: Tensor) -> Tensor:
        if len(x) == 1:
            return x.reshape(long, short).t().reshape(1, long * short)
        return x.reshape(-1, long, short).mT.reshape(-1, long * short)

    def moved(x: Tensor) -> Tensor:
        return x.reshape(-1, long, short, run).transpose(1, 2).reshape(-1, long * short * run)

    return turned if run == 1 else moved


def _mixed(scales: Tensor) -> Move:
    r, i, k = scales.shape

    def mixed(z: Tensor) -> Tensor:
        if len(z) <= FEW_ROWS:
            z = scales @ z.reshape(-1, k, r).permute(2, 1, 0)  # (r, I, B)
            return z.permute(2, 1, 0).reshape(-1, i * r)
        # Turned as a whole, twice: products of views whose numbers lie apart take several times as long.
        across = z.mT.contiguous().view(k, r, -1).transpose(0, 1)  # (r, K, B)
        return (scales @ across).transpose(0, 1).reshape(i * r, -1).mT.contiguous()

    return mixed


__all__ = ["WAYS", "Kernel", "Way", "multiplied", "pieces", "rows"]
