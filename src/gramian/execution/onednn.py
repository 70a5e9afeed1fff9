"""float32 products by oneDNN, which comes with torch beside its BLAS library.

torch multiplies float32 matrices by MKL, which on processors of other makers than its own leaves half of the vector width
unused. oneDNN, which torch uses for convolutions and for bfloat16, does not: there it is about twice as fast, at the same
precision. Elsewhere the two are alike, so a calibration measures both and forms compete.

None of this has gradients or batching rules: where something looks on, torch's own choice runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gramian.modes import watched

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


def linear(weight: Tensor) -> Kernel:
    """``F.linear`` with a float32 weight (out, in)."""
    multiply = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(weight.dtype)
        if watched(x, weight):
            return F.linear(x, weight, bias)
        y: Tensor = multiply(x, weight, bias, "none", [], "")
        return y

    return product


def batched(values: Tensor) -> Grouped:
    """The product with block-diagonal matrices (groups, s, p) by torch's own choice: one batch of products."""
    groups, s, p = values.shape
    blocks = values.mT

    def product(x: Tensor) -> Tensor:
        if len(x) == 1:  # views alone
            return torch.bmm(x.reshape(groups, 1, p), blocks).view(1, groups * s)
        return torch.bmm(x.reshape(-1, groups, p).transpose(0, 1), blocks).transpose(0, 1).reshape(-1, groups * s)

    return product


def grouped(values: Tensor) -> Grouped:
    """The product with block-diagonal float32 matrices (groups, s, p), as a convolution over rows of one pixel each."""
    groups, s, p = values.shape
    kernel, by_torch = values.reshape(groups * s, p, 1, 1), batched(values)

    def product(x: Tensor) -> Tensor:
        if not len(x) or watched(x, values):
            return by_torch(x)
        image = x.reshape(1, len(x), 1, groups * p).permute(0, 3, 1, 2)  # channels last: a view
        if x.is_meta:
            y = F.conv2d(image, kernel, groups=groups)
        else:
            y = torch.mkldnn_convolution(image, kernel, None, (0, 0), (1, 1), (1, 1), groups)
        return y.permute(0, 2, 3, 1).reshape(-1, groups * s)

    return product


if present():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)  # type: ignore[untyped-decorator]
    def _linear_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: object, **more: object) -> int:
        return 2 * math.prod(x) * weight[0]

    @register_flop_formula(torch.ops.aten.mkldnn_convolution)  # type: ignore[untyped-decorator]
    def _grouped_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: object, **more: object) -> int:
        return 2 * math.prod(x) * weight[0] * weight[1] // x[1]


__all__ = ["batched", "grouped", "linear", "present"]
