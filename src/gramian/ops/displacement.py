"""Matrices of low displacement rank: sums of products of a circulant and a skew-circulant matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import svd
from gramian.ops.dense import Dense
from gramian.ops.operator import Operator, Size, register
from gramian.ops.toeplitz import computable, dense_wins, toeplitz_matrix

SWEEPS = 15
"""At most so many sweeps of alternating least squares after the start of a fit."""
WORK = 2**33
"""All sweeps together take about so many multiply-adds (rank^2 out in each); one is always made."""
SMALL = 2**16
"""A matrix of at most so many entries multiplies as a dense one where that is faster. Making a larger one takes as long as
the transforms of half as many rows as it has columns, so that is left to ``runtime``, which makes it once.
"""
CHUNK = 2**22
"""Least-squares problems are set up so many complex numbers at a time."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class LowDisplacement(Operator):
    """``sum_i Z_s(left[i]) P Z_{-s}(right[i])``: the low displacement rank family of SURM ("Structured Unrestricted-Rank
    Matrices", 2024), its Toeplitz-like case.

    ``Z_1(v)`` is the circulant and ``Z_{-1}(v)`` the skew-circulant matrix with first column v, P (out, in) the identity
    cut or padded with zeros. With ``Z_s`` the cyclic down-shift whose corner is s, the displacement
    ``Z_s A - A Z_{-s}`` of a member has rank at most r; Toeplitz matrices have r <= 2, and so do their inverses. The paper
    has square matrices with s = 1; that the same holds for rectangular ones is ours: ``Z_s P - P Z_{-s}`` has rank one.

    Args:
        left: (r, out).
        right: (r, in).
        skew_left: s = -1, the form that transposition gives; also the form in which the displacement determines A when
            out has more factors 2 than in (else an eigenvalue of Z_1 is one of Z_{-1}).
    """

    kind: ClassVar[str] = "low_displacement"
    fittable: ClassVar[bool] = True
    left: Tensor
    right: Tensor
    skew_left: bool = False

    def __post_init__(self) -> None:
        fits = self.left.dim() == 2 and self.right.dim() == 2 and self.left.shape[0] == self.right.shape[0]
        self._check(fits and min(*self.left.shape, *self.right.shape) > 0, "left (r, out) and right (r, in)")

    @classmethod
    def delta(
        cls, shape: tuple[int, int], rank: int, *, std: float = 0.02, generator: torch.Generator | None = None
    ) -> LowDisplacement:
        """SURM's start of an update of a frozen weight: the zero matrix, as ``left = 0``, with right ~ N(0, std^2) to
        let gradients through.
        """
        left, right = torch.zeros(rank, shape[0]), torch.randn(rank, shape[1], generator=generator) * std
        return cls(left, right, _skews_left(shape))

    @property
    def rank(self) -> int:
        """The bound r on the displacement rank."""
        return self.left.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[1], self.right.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        m, n = self.shape
        self._check(x.shape[-1] == n, f"x (..., {n})")
        if x.numel() == 0 or self._runs_dense():
            return F.linear(x, self.dense().to(x.dtype))
        inner = not self.skew_left
        z = _spectrum(computable(x), inner)[..., None, :] * _spectrum(computable(self.right), inner)
        z = _cut(_values(z, n, inner), m)  # (..., r, out)
        y = (_spectrum(z, not inner) * _spectrum(computable(self.left), not inner)).sum(-2)
        return _values(y, m, not inner).to(x.dtype)

    def transpose(self) -> LowDisplacement:
        inner = not self.skew_left
        left, right = _transposed(self.right, inner), _transposed(self.left, not inner)
        return LowDisplacement(left, right, not self.skew_left)

    def dense(self) -> Tensor:
        m, n = self.shape
        inner, right = not self.skew_left, computable(self.right)
        wrapped = -right[:, 1:] if inner else right[:, 1:]
        columns = toeplitz_matrix(torch.cat([wrapped, right], 1), n).mT  # row j: column j of Z_{-s}(right)
        y = _spectrum(_cut(columns, m), not inner) * _spectrum(computable(self.left), not inner)[:, None, :]
        return _values(y.sum(0), m, not inner).mT.to(self.right.dtype)

    def runtime(self) -> Operator:
        return Dense(self.dense()) if dense_wins(self.shape, self._transform_flops()) else self

    def _transform_flops(self) -> int:
        """Per row: r + 1 transforms of each length N (5/2 N log2 N, twice that for the skew one of odd length), and the
        products of spectra.
        """
        skew, real = self.shape if self.skew_left else self.shape[::-1]
        transforms = (1 + skew % 2) * skew * math.log2(max(skew, 2)) + real * math.log2(max(real, 2))
        return int(2.5 * (self.rank + 1) * transforms) + self.rank * 4 * (skew + real)

    def _runs_dense(self) -> bool:
        return self.shape[0] * self.shape[1] <= SMALL and dense_wins(self.shape, self._transform_flops())

    def flops(self, batch: int = 1) -> int:
        """2 out in as a dense product, else those of r + 1 transforms of each length."""
        return batch * (2 * self.shape[0] * self.shape[1] if self._runs_dense() else self._transform_flops())

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        rank: int = 1,
        **size: Any,
    ) -> LowDisplacement:
        """The truncated SVD of the displacement, then alternating least squares; members are recovered. The Grams are not
        used here; ``gramian.fit`` starts from this and polishes.

        Undoing the displacement divides by differences of eigenvalues and so amplifies what was truncated by up to
        out in / (pi gcd(out, in)): the SVD is only a start. In the eigenvectors of Z_s and Z_{-s} a member is the
        elementwise product of a fixed Cauchy-like matrix and ``l r^T``, of rank `rank`, so that each row of l and of r
        is a least-squares problem of `rank` unknowns. Sweeps stop when one lowers the error by less than 1e-4 of itself.

        Args:
            weight: (out, in).
            gram_in: ignored.
            gram_out: ignored.
            rank: r.
            size: nothing else.

        Raises:
            GramianError: rank is below 1.
        """
        if rank < 1:
            raise GramianError(f"low_displacement: rank {rank}; expected at least 1")
        w = weight.to(torch.float64)
        m, n = w.shape
        r = min(rank, m, n)
        skew = _skews_left((m, n))
        sign = -1.0 if skew else 1.0
        down, back = w.roll(1, 0), w.roll(-1, 1)
        down[0] *= sign
        back[:, -1] *= -sign
        u, sigma, vh = svd(down - back)
        root = sigma[:r].sqrt()
        # Z_s P - P Z_{-s} = a b^T.
        a, b = w.new_zeros(m), w.new_zeros(n)
        a[0], b[n - 1] = sign, 1.0
        if m > n:
            a[n] = 1.0
        elif m < n:
            b[m - 1] = 1.0
        else:
            a[0] = 2 * sign
        rows = (_rotate(u[:, :r] * root, skew) / _rotate(a[:, None], skew)).contiguous()  # (m, r)
        columns = _rotate_back(vh[:r].mT * root, not skew) / _rotate_back(b[:, None], not skew)  # (n, r)
        both = [_rotate_back(_rotate(matrix, skew).mT, not skew).mT for matrix in (w, torch.eye(m, n).to(w))]
        target, cauchy = both

        def error(rows: Tensor, columns: Tensor) -> float:
            return float((target - cauchy * (rows @ columns.mT)).abs().square().sum())

        last = error(rows, columns)
        for _ in range(min(SWEEPS, max(1, WORK // (r * r * m * n)))):
            new_rows = _solve_rows(target, cauchy, columns, skew)
            new_columns = _solve_rows(target.mT, cauchy.mT, new_rows, not skew)
            now = error(new_rows, new_columns)
            if not now < last:
                break
            rows, columns, last, before = new_rows, new_columns, now, last
            if now > before * (1 - 1e-4):
                break
        left, right = (_numbers(rows, skew), _numbers(columns, not skew))
        return cls(left.to(weight), right.to(weight), skew)

    @classmethod
    def init(
        cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, rank: int = 1, **size: Any
    ) -> LowDisplacement:
        """Random phases of one modulus: each term is orthogonal when square; their sum is scaled by
        sqrt(out / (in r)).
        """
        skew = _skews_left(shape)
        scale = (shape[0] / (shape[1] * rank)) ** 0.25
        both = []
        for length, twisted in ((shape[0], skew), (shape[1], not skew)):
            spectrum = _spectrum(torch.randn(rank, length, generator=generator), twisted)
            both.append(_values(spectrum / spectrum.abs(), length, twisted) * scale)
        return cls(both[0], both[1], skew)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """The largest rank that fits, at most a quarter of the shorter side: far below that transforms stop paying, and a
        fit takes rank^2 out in operations a sweep.
        """
        rank = min(int(keep * shape[0] * shape[1] / sum(shape)), max(1, min(shape) // 4))
        return [{"rank": rank}] if rank >= 1 else []


def _skews_left(shape: tuple[int, int]) -> bool:
    """Whether out has more factors 2 than in: only then do Z_1 (out, out) and Z_{-1} (in, in) share an eigenvalue."""
    out, in_ = shape
    return (out & -out) > (in_ & -in_)


def _twist(n: int, like: Tensor, count: int | None = None) -> Tensor:
    """The first `count` of ``exp(i pi k / n)``: turns a skew-circulant matrix into a circulant one."""
    angle = torch.arange(count or n, dtype=like.dtype, device=like.device) * (math.pi / n)
    return torch.complex(angle.cos(), angle.sin())


def _spectrum(values: Tensor, skew: bool) -> Tensor:
    """Eigenvalues of the (skew-)circulant matrices of real `values` (..., n); half of them where the rest follow.

    A skew-circulant product is one of polynomials modulo t^n + 1; for even n it is one of complex polynomials of half
    the length modulo t^(n/2) - i, which the numbers ``x_k + i x_(k + n/2)`` stand for.
    """
    n = values.shape[-1]
    spectrum: Tensor
    if not skew:
        spectrum = torch.fft.rfft(values)
    elif n % 2:
        spectrum = torch.fft.fft(values * _twist(n, values))
    else:
        packed = torch.complex(values[..., : n // 2], values[..., n // 2 :])
        spectrum = torch.fft.fft(packed * _twist(n, values, n // 2))
    return spectrum


def _values(spectrum: Tensor, n: int, skew: bool) -> Tensor:
    """The inverse of ``_spectrum``: real (..., n)."""
    back: Tensor
    if not skew:
        back = torch.fft.irfft(spectrum, n=n)
        return back
    back = torch.fft.ifft(spectrum)
    back = back * _twist(n, back.real, back.shape[-1]).conj()
    return back.real if n % 2 else torch.cat([back.real, back.imag], -1)


def _cut(x: Tensor, length: int) -> Tensor:
    """P: the last dimension cut or padded with zeros."""
    extra = length - x.shape[-1]
    return F.pad(x, (0, extra)) if extra > 0 else x[..., :length]


def _transposed(values: Tensor, skew: bool) -> Tensor:
    """The first columns of the transposes."""
    rest = values[:, 1:].flip(1)
    return torch.cat([values[:, :1], -rest if skew else rest], 1)


def _rotate(matrix: Tensor, skew: bool) -> Tensor:
    """``E matrix`` with ``Z_s = E^{-1} diag E`` and E unitary; matrix: (n, k)."""
    twisted = matrix * _twist(len(matrix), matrix.real)[:, None] if skew else matrix
    rotated: Tensor = torch.fft.fft(twisted, dim=0, norm="ortho")
    return rotated


def _rotate_back(matrix: Tensor, skew: bool) -> Tensor:
    """``E^{-T} matrix``; matrix: (n, k)."""
    twisted = matrix * _twist(len(matrix), matrix.real).conj()[:, None] if skew else matrix
    rotated: Tensor = torch.fft.ifft(twisted, dim=0, norm="ortho")
    return rotated


def _numbers(eigenvalues: Tensor, skew: bool) -> Tensor:
    """First columns (r, n) of the matrices with these eigenvalues (n, r)."""
    back: Tensor = torch.fft.ifft(eigenvalues, dim=0)
    return (back * _twist(len(back), back.real).conj()[:, None] if skew else back).real.mT.contiguous()


def _solve_rows(target: Tensor, cauchy: Tensor, columns: Tensor, skew: bool) -> Tensor:
    """The rows (m, r) that bring ``cauchy * (rows columns^T)`` nearest to `target` (m, n): m small systems, of which half
    are solved, as the numbers behind are real and so the other rows are their conjugates.
    """
    (m, n), r = target.shape, columns.shape[1]
    index = torch.arange(m, device=target.device)
    partner = (int(skew) - index) % m
    half = index[index <= partner]
    conjugate = columns.mH
    right = (target[half] * cauchy[half].conj()) @ columns.conj()
    weights = cauchy[half].abs().square()
    solved = []
    for rows, known in zip(*(torch.split(part, max(1, CHUNK // (r * n))) for part in (weights, right)), strict=True):
        normal = (conjugate * rows[:, None, :]) @ columns
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += 1e-15 * diagonal.real.sum(1, keepdim=True).clamp_min(1e-300)  # ranks that members do not use
        solved.append(torch.linalg.solve(normal, known[..., None])[..., 0])
    found = columns.new_empty(m, r)
    found[partner[half]] = torch.cat(solved).conj()
    found[half] = torch.cat(solved)
    return found
