"""Circulant matrices: one number for each cyclic diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.ops.dense import Dense
from gramian.ops.operator import Operator, Size, register
from gramian.ops.toeplitz import (
    computable,
    dense_wins,
    flattened,
    shift_fit,
    toeplitz_matrix,
    transform_flops,
)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Circulant(Operator):
    """``A[i, j] = values[(i - j) mod n]``; a rectangular one is the first rows or columns of the square one of its longer
    side n. Large ones multiply by real Fourier transforms of length n, small ones as a dense matrix.

    Args:
        values: (n,) with n = max(rows, columns): the first column of the square matrix.
        rows, columns: the shape.
    """

    kind: ClassVar[str] = "circulant"
    fittable: ClassVar[bool] = True
    values: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        self._check(
            min(self.rows, self.columns) > 0
            and self.values.dim() == 1
            and self.values.shape[0] == max(self.rows, self.columns),
            f"values (max(rows, columns),) for {self.rows} x {self.columns}",
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == self.columns, f"x (..., {self.columns})")
        n = self.values.shape[0]
        if x.numel() == 0 or dense_wins(self.shape, transform_flops(n)):
            return F.linear(x, self.dense())
        product = torch.fft.rfft(computable(x), n=n) * torch.fft.rfft(computable(self.values))
        y: Tensor = torch.fft.irfft(product, n=n)[..., : self.rows]
        return y.to(x.dtype)

    def transpose(self) -> Circulant:
        return Circulant(self.values.flip(0).roll(1), self.columns, self.rows)

    def dense(self) -> Tensor:
        place = _places(self.rows, self.columns, self.values.device)
        return toeplitz_matrix(self.values.index_select(0, place), self.columns)

    def runtime(self) -> Operator:
        return Dense(self.dense()) if dense_wins(self.shape, transform_flops(self.values.shape[0])) else self

    def flops(self, batch: int = 1) -> int:
        """2 out in as a dense product; by transforms two real ones of 5/2 n log2 n each and the product of spectra."""
        by_transforms = transform_flops(self.values.shape[0])
        return batch * (2 * self.rows * self.columns if dense_wins(self.shape, by_transforms) else by_transforms)

    @classmethod
    def fit(
        cls, weight: Tensor, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None, **size: Any
    ) -> Circulant:
        """The optimum: the mean along each cyclic diagonal; under Grams the solution of the normal equations."""
        out, in_ = weight.shape
        values = shift_fit(weight, gram_in, gram_out, _places(out, in_, weight.device))
        return cls(values.to(weight), out, in_)

    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Circulant:
        """Random phases of one modulus: orthogonal when square; times sqrt(out / in)."""
        out, in_ = shape
        return cls(flattened(torch.randn(max(shape), generator=generator)) * math.sqrt(out / in_), out, in_)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        return [{}] if max(shape) <= keep * shape[0] * shape[1] else []


def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """For each diagonal, from the top right corner on, the index of its number."""
    return torch.arange(1 - columns, rows, device=device) % max(rows, columns)
