"""float32 products by oneDNN, which comes with torch beside its BLAST library.

torch multiplies float32 matrices by MKL, which on processors of other makers than its own leaves half of the vector width
unused. oneDNN, which torch uses for convolutions and for bfloat16, does not: there it is about twice as fast, at the same
precision. Elsewhere the two are alike, so a calibration measures both and forms compete.

None of this has gradients or batching rules; callers ask ``able`` first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from gramian.modes import differentiable
from gramian.ops import Blast, BlockDiagonal, BlockLowRank, Operator

Kernel = Callable[[Tensor, Tensor | None], Tensor]
"""(x (..., in), bias (out,) or None) -> y (..., out)."""

Grouped = Callable[[Tensor], Tensor]
"""x (B, groups * p) -> y (B, groups * s): each run of p numbers of a row by a matrix of its own."""

GROUPED_ROWS = 16
"""``grouped`` products of fewer rows are slower than anything else."""


@lru_cache
def present() -> bool:
    """Whether this torch has oneDNN and the operation behind ``linear``, which torch.compile uses and no page documents."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def able(*tensors: Tensor) -> bool:
    """Whether the products here can take these: no gradient, forward-mode tangent or function transform looks on."""
    return not (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or differentiable(*tensors)
    )


def linear(weight: Tensor) -> Kernel:
    """``F.linear`` with a float32 weight (out, in)."""
    multiply = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(weight.dtype)
        if not able(x, weight):
            return F.linear(x, weight, bias)
        y: Tensor = multiply(x, weight, bias, "none", [], "")
        return y

    return product


def grouped(values: Tensor) -> Grouped:
    """The product with block-diagonal float32 matrices (groups, s, p), as a convolution over rows of one pixel each."""
    groups, s, p = values.shape
    kernel = values.reshape(groups * s, p, 1, 1)

    def product(x: Tensor) -> Tensor:
        if not len(x) or not able(x, values):
            blocks = x.reshape(-1, groups, p).transpose(0, 1)
            return torch.bmm(blocks, values.mT).transpose(0, 1).reshape(-1, groups * s)
        image = x.reshape(1, len(x), 1, groups * p).permute(0, 3, 1, 2)  # channels last: a view
        if x.is_meta:
            y = F.conv2d(image, kernel, groups=groups)
        else:
            y = torch.mkldnn_convolution(image, kernel, None, (0, 0), (1, 1), (1, 1), groups)
        return y.permute(0, 2, 3, 1).reshape(-1, groups * s)

    return product


def blocks(op: Operator, grouped: Callable[[Tensor], Grouped]) -> Kernel | None:
    """The row-major product of a matrix of blocks, by `grouped`; None for any other operator."""
    chain = _chain(op, grouped)
    if chain is None:
        return None

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = x.reshape(-1, x.shape[-1])
        for step in chain:
            y = step(y)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias.to(y.dtype)

    return product


def _chain(op: Operator, grouped: Callable[[Tensor], Grouped]) -> list[Callable[[Tensor], Tensor]] | None:
    if isinstance(op, BlockDiagonal):
        b, s, p = op.values.shape
        return [
            _gathered(b, p, op.columns, op.strided_columns),
            grouped(op.values),
            _scattered(b, s, op.rows, op.strided_rows),
        ]
    if isinstance(op, BlockLowRank):
        (j, s, tk), (k, _, p) = op.left.shape, op.right.shape
        t = tk // k
        # The ranks of a block side by side: between the products, runs of t numbers move and not single ones.
        left = op.left.reshape(j, s, t, k).mT.reshape(j, s, tk)

        def between(z: Tensor) -> Tensor:
            return z.reshape(-1, k, j, t).transpose(1, 2).reshape(-1, j * tk)

        return [
            _gathered(k, p, op.columns, op.strided_columns),
            grouped(op.right),
            between,
            grouped(left),
            _scattered(j, s, op.rows, op.strided_rows),
        ]
    if isinstance(op, Blast):
        (i, s, r), (k, _, p) = op.left.shape, op.right.shape

        def mixed(z: Tensor) -> Tensor:
            z = op.scales @ z.reshape(-1, k, r).permute(2, 1, 0)  # (r, I, B)
            return z.permute(2, 1, 0).reshape(-1, i * r)

        return [
            _gathered(k, p, op.columns, False),
            grouped(op.right),
            mixed,
            grouped(op.left),
            _scattered(i, s, op.rows, False),
        ]
    return None


def _gathered(count: int, width: int, columns: int, strided: bool) -> Callable[[Tensor], Tensor]:
    """(B, columns) -> (B, count * width), block by block."""

    def gather(x: Tensor) -> Tensor:
        if count * width > columns:
            x = F.pad(x, (0, count * width - columns))
        return x.reshape(-1, width, count).mT.reshape(-1, count * width) if strided else x

    return gather


def _scattered(count: int, width: int, rows: int, strided: bool) -> Callable[[Tensor], Tensor]:
    """(B, count * width), block by block -> (B, rows)."""

    def scatter(y: Tensor) -> Tensor:
        y = y.reshape(-1, count, width).mT.reshape(-1, count * width) if strided else y
        return y[:, :rows] if rows < count * width else y

    return scatter


if present():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)  # type: ignore[untyped-decorator]
    def _linear_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: object, **more: object) -> int:
        return 2 * _numbers(x) * weight[0]

    @register_flop_formula(torch.ops.aten.mkldnn_convolution)  # type: ignore[untyped-decorator]
    def _grouped_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: object, **more: object) -> int:
        return 2 * _numbers(x) * weight[0] * weight[1] // x[1]


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


__all__ = ["able", "blocks", "grouped", "linear", "present"]
