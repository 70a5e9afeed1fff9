"""Toeplitz matrices: one number for each diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.linalg import psd_solve, weigh
from gramian.ops.dense import Dense
from gramian.ops.operator import Operator, Size, register

TRANSFORM_COST = 10.0
"""An operation of a Fourier transform takes as long as so many of a matrix product. Measured on one core in float32:
square Toeplitz matrices of side 512 win by transforms at batch 32 and lose at batch 512, of 1024 they win at every batch.
"""
DIRECT = 4096
"""A weighted fit of at most so many unknowns is one direct solve; above, conjugate gradients."""
STEPS = 50
"""Conjugate-gradient steps of a large weighted fit."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class Toeplitz(Operator):
    """A matrix that is constant along its diagonals: ``A[i, j] = values[i - j + columns - 1]``.

    Large ones multiply by fast Fourier transforms (zero-padded to a cyclic convolution; in float32 where the numbers are
    stored in half precision), small ones as a dense matrix.

    Args:
        values: (rows + columns - 1,): from the top right corner to the bottom left one.
        rows, columns: the shape.
    """

    kind: ClassVar[str] = "toeplitz"
    fittable: ClassVar[bool] = True
    values: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        length = self.rows + self.columns - 1
        self._check(
            min(self.rows, self.columns) > 0 and self.values.dim() == 1 and self.values.shape[0] == length,
            f"values (rows + columns - 1,) for {self.rows} x {self.columns}",
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == self.columns, f"x (..., {self.columns})")
        length = self._length()
        if x.numel() == 0 or dense_wins(self.shape, transform_flops(length)):
            return F.linear(x, self.dense())
        product = torch.fft.rfft(computable(x), n=length) * torch.fft.rfft(computable(self.values), n=length)
        y: Tensor = torch.fft.irfft(product, n=length)[..., self.columns - 1 : self.columns - 1 + self.rows]
        return y.to(x.dtype)

    def transpose(self) -> Toeplitz:
        return Toeplitz(self.values.flip(0), self.columns, self.rows)

    def dense(self) -> Tensor:
        return toeplitz_matrix(self.values, self.columns)

    def _length(self) -> int:
        return fast_length(self.rows + self.columns - 1)

    def runtime(self) -> Operator:
        return Dense(self.dense()) if dense_wins(self.shape, transform_flops(self._length())) else self

    def flops(self, batch: int = 1) -> int:
        """2 out in as a dense product; by transforms two real ones of 5/2 N log2 N each and the product of spectra."""
        by_transforms = transform_flops(self._length())
        return batch * (2 * self.rows * self.columns if dense_wins(self.shape, by_transforms) else by_transforms)

    @classmethod
    def fit(
        cls, weight: Tensor, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None, **size: Any
    ) -> Toeplitz:
        """The optimum: the mean along each diagonal; under Grams the solution of the normal equations (``shift_fit``)."""
        out, in_ = weight.shape
        place = torch.arange(out + in_ - 1, device=weight.device)
        return cls(shift_fit(weight, gram_in, gram_out, place).to(weight), out, in_)

    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Toeplitz:
        """A part of a random circulant matrix that is orthogonal, times sqrt(out / in)."""
        out, in_ = shape
        values = flattened(torch.randn(out + in_ - 1, generator=generator)) * math.sqrt(out / in_)
        return cls(values, out, in_)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        return [{}] if sum(shape) - 1 <= keep * shape[0] * shape[1] else []


# Shared with circulant.py and displacement.py -----------------------------------------------------------------------


def dense_wins(shape: tuple[int, int], flops: int) -> bool:
    """Whether the dense product is faster than Fourier transforms that take `flops` operations a row."""
    return TRANSFORM_COST * flops > 2 * shape[0] * shape[1]


def computable(x: Tensor) -> Tensor:
    """`x` in a dtype that Fourier transforms and solves take on every device: half precision in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fast_length(n: int) -> int:
    """The smallest number >= n without prime factors above 5: a length that transforms fast."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def transform_flops(length: int) -> int:
    """Operations of a convolution by real transforms of that length: one there, one back, one product of spectra."""
    return int(5 * length * math.log2(max(length, 2))) + 6 * (length // 2 + 1)


def toeplitz_matrix(values: Tensor, columns: int) -> Tensor:
    """The Toeplitz matrices (..., m, columns) of `values` (..., m + columns - 1)."""
    return values.flip(-1).unfold(-1, columns, 1).flip(-2)


def flattened(values: Tensor) -> Tensor:
    """The vectors (..., n) of which circulant matrices are orthogonal, nearest to `values`: all Fourier coefficients
    have modulus one.
    """
    spectrum = torch.fft.rfft(values)
    flat: Tensor = torch.fft.irfft(spectrum / spectrum.abs(), n=values.shape[-1])
    return flat


def diagonal_sums(matrix: Tensor) -> Tensor:
    """Sums along the diagonals of a matrix (m, n), from the top right corner on: (m + n - 1,)."""
    m, n = matrix.shape
    # Rows of m + n places read as rows of m + n - 1 shift by one place a row.
    return F.pad(matrix.flip(1), (0, m)).reshape(-1)[: m * (m + n - 1)].reshape(m, m + n - 1).sum(0)


def shift_fit(weight: Tensor, gram_in: Tensor | None, gram_out: Tensor | None, place: Tensor) -> Tensor:
    """The vector v for which the Toeplitz matrix of ``v[place]`` is nearest to `weight` in the norm of the Grams.

    The normal matrix of the Toeplitz problem is the correlation of the two Grams, ``N[a, b] = sum_ik H[i, k]
    G[i - a, k - b]``: one two-dimensional Fourier transform. Directions that the Grams do not see keep the mean along
    their diagonals.

    Args:
        weight: (m, n).
        gram_in: G (n, n), (n,) or None.
        gram_out: H (m, m), (m,) or None.
        place: (m + n - 1,) indices of unknowns.

    Returns:
        v in float64.
    """
    w = weight.to(torch.float64)
    m, n = w.shape
    unknowns = int(place.max()) + 1

    def fold(values: Tensor) -> Tensor:
        return values.new_zeros(unknowns, *values.shape[1:]).index_add(0, place, values)

    def pull(matrix: Tensor) -> Tensor:
        return fold(diagonal_sums(weigh(weigh(matrix, h, side="out"), g, side="in")))

    v = fold(diagonal_sums(w)) / fold(diagonal_sums(torch.ones_like(w)))
    if gram_in is None and gram_out is None:
        return v
    g, h = (None if gram is None else gram.to(w) for gram in (gram_in, gram_out))
    residual = pull(w - toeplitz_matrix(v[place], n))
    if unknowns <= DIRECT:
        full = [
            torch.eye(d, dtype=w.dtype, device=w.device) if gram is None else gram.diag() if gram.dim() == 1 else gram
            for gram, d in ((g, n), (h, m))
        ]
        spectra = [torch.fft.rfft2(gram, s=(m + n - 1,) * 2) for gram in full]
        normal = torch.fft.irfft2(spectra[1] * spectra[0].conj(), s=(m + n - 1,) * 2).roll((n - 1, n - 1), (0, 1))
        normal = fold(fold(normal).mT)
        return v + psd_solve((normal + normal.mT) / 2, residual[:, None])[:, 0]
    direction, norm = residual, residual.square().sum()
    floor = 1e-24 * norm
    for _ in range(STEPS):
        image = pull(toeplitz_matrix(direction[place], n))
        curvature = direction @ image
        if not (bool(norm > floor) and bool(curvature > 0)):
            break
        step = norm / curvature
        v, residual = v + step * direction, residual - step * image
        fresh = residual.square().sum()
        direction, norm = residual + (fresh / norm) * direction, fresh
    return v
