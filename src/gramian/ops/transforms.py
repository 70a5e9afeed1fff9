"""Fixed orthonormal transforms: Hadamard, cosine and Fourier. Nothing is stored."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import hadamard_transform, largest_power_of_two
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.operator import Operator, register
from gramian.ops.toeplitz import computable

GEMM_UP_TO = 256
"""Cosine and Fourier transforms of at most this size run as one matrix product. Measured on one core in float32: at 512 it
takes as long as the fast transform at batch 32 and 3.5 times as long at batch 512, a quarter as long at batch 1.
"""
FACTOR = 128
"""A Hadamard matrix runs as a Kronecker product of Hadamard matrices of at most this size, where it has such factors."""

Table = NDArray[np.float64]

_TABLES: OrderedDict[tuple[str, int, torch.dtype, torch.device], Tensor] = OrderedDict()
_MOST_TABLES = 32


def _empty() -> Tensor:
    return torch.empty(0)


class _Transform(Operator):
    """What the transforms share: no numbers are stored, but an empty tensor that says dtype and device."""

    constants: ClassVar[frozenset[str]] = frozenset({"carrier"})
    size: int
    transposed: bool
    carrier: Tensor

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GramianError(f"{self.kind}: size {self.size}; expected at least 1")
        self._check(self.carrier.shape == (0,), "an empty carrier (0,)")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    def transpose(self) -> Self:
        return type(self)(self.size, not self.transposed, self.carrier)  # type: ignore[call-arg]


def _table(name: str, size: int, like: Tensor) -> Tensor:
    """A table of a transform, (size, size), in the dtype of `like`; the last few are kept. Tables are made by numpy: what
    watches torch (a trace, a count of operations) sees no difference between the first product and the next.
    """
    if like.is_meta:
        return like.new_empty(size, size)
    if torch.compiler.is_compiling():
        return torch.from_numpy(_MAKERS[name](size)).to(like)
    key = (name, size, like.dtype, like.device)
    found = _TABLES.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = torch.from_numpy(_MAKERS[name](size)).to(like)
        if type(found) is not Tensor:  # a tensor of a tracing mode must not outlive it
            return found
        _TABLES[key] = found
        if len(_TABLES) > _MOST_TABLES:
            _TABLES.popitem(last=False)
    return found


# Hadamard -----------------------------------------------------------------------------------------------------------


@register
@dataclass(frozen=True, eq=False, repr=False)
class Hadamard(_Transform):
    """An orthonormal Hadamard matrix, entries +-1 / sqrt(n), as a Kronecker product that runs as one small matrix product
    a factor.

    The size is ``2^a m`` with m = 1 or the order of a Paley matrix: ``p + 1`` for a prime p = 3 mod 4 (12, 20, 24, 44, ...)
    or ``2 (p + 1)`` for a prime p = 1 mod 4 (28, 36, ...). For a power of two the order is Sylvester's, that of
    ``scipy.linalg.hadamard`` and ``linalg.hadamard_transform``. There is no Hadamard matrix of most other sizes, and a part
    of a larger one is not orthogonal: such sizes raise. ``Cosine`` exists for every size.

    Args:
        size: n.
        transposed: the transpose.
        carrier: (0,), of the operator's dtype and device.

    Raises:
        GramianError: no such matrix is known here; the message names the nearest sizes.
    """

    kind: ClassVar[str] = "hadamard"
    size: int
    transposed: bool = False
    carrier: Tensor = field(default_factory=_empty)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _hadamard_factors(self.size):
            near = [next((n for n in span if _hadamard_factors(n)), None) for span in _spans(self.size)]
            raise GramianError(
                f"hadamard: no Hadamard matrix of size {self.size} here; the nearest are of "
                f"{' and '.join(str(n) for n in near if n)}. A cosine transform (Cosine) exists for every size"
            )

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == self.size, f"x (..., {self.size})")
        y, left = x, self.size  # the first factor acts on the slowest index
        for factor in _hadamard_factors(self.size):
            left //= factor
            matrix = self._factor(factor, x)
            if left == 1:
                y = y.reshape(-1, factor) @ matrix.mT
            else:
                y = matrix @ y.reshape(-1, factor, left)
        return y.reshape(x.shape)

    def apply_columns(self, x: Tensor) -> Tensor:
        self._check(x.shape[0] == self.size, f"x ({self.size}, B)")
        y, done = x, 1
        for factor in _hadamard_factors(self.size):
            y = self._factor(factor, x) @ y.reshape(done, factor, self.size // (done * factor) * x.shape[1])
            done *= factor
        return y.reshape(x.shape)

    def _factor(self, size: int, like: Tensor) -> Tensor:
        table = _table("hadamard", size, like)
        return table.mT if self.transposed else table

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.size * sum(_hadamard_factors(self.size))


def _spans(size: int) -> tuple[range, range]:
    return range(size - 1, 0, -1), range(size + 1, 2 * size + 2)


def _hadamard_factors(size: int) -> tuple[int, ...]:
    """Sizes of the Kronecker factors, slowest index first; () if there is none."""
    power = largest_power_of_two(size)
    order = size // power
    if order > 1:
        while power > 1 and not _paley_prime(order):
            order, power = order * 2, power // 2
        if not _paley_prime(order):
            return ()
    # Balance the factor that holds the Paley matrix with the rest, then deal the other twos out evenly.
    while order > 1 and power > 1 and 2 * order <= FACTOR and (2 * order <= power or order * power <= FACTOR):
        order, power = order * 2, power // 2
    twos = power.bit_length() - 1
    count = -(-twos // (FACTOR.bit_length() - 1))
    dealt = [2 ** (twos // count + (i < twos % count)) for i in range(count)]
    return (*dealt, order) if order > 1 or not dealt else tuple(dealt)


def _paley_prime(order: int) -> int:
    """The prime of Paley's construction of a Hadamard matrix of `order`, or 0."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        exact = prime + 1 == order if remainder == 3 else 2 * (prime + 1) == order
        if exact and prime > 2 and prime % 4 == remainder and all(prime % d for d in range(2, math.isqrt(prime) + 1)):
            return prime
    return 0


def _paley(order: int) -> Table:
    """A Hadamard matrix of entries +-1 (Paley 1933), of an order with ``_paley_prime``."""
    p = _paley_prime(order)
    squares = np.full(p, -1.0)
    squares[np.arange(1, p) ** 2 % p] = 1.0
    squares[0] = 0.0
    index = np.arange(p)
    conference = np.ones((p + 1, p + 1))
    conference[0, 0] = 0.0
    conference[1:, 1:] = squares[(index[:, None] - index) % p]
    if p % 4 == 3:
        conference[1:, 0] = -1.0
        return conference + np.eye(p + 1)
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(p + 1), [[1, -1], [-1, -1]])


def _hadamard_table(size: int) -> Table:
    order = size // largest_power_of_two(size)
    while order > 1 and not _paley_prime(order):
        order *= 2
    table: NDArray[Any] = _paley(order) if order > 1 else np.ones((1, 1))
    while len(table) < size:
        table = np.kron([[1, 1], [1, -1]], table)
    return table / math.sqrt(size)


# Cosine and Fourier -------------------------------------------------------------------------------------------------


@register
@dataclass(frozen=True, eq=False, repr=False)
class Cosine(_Transform):
    """The orthonormal discrete cosine transform of type II; its transpose, and inverse, is type III. Any size.

    ``A[k, j] = sqrt((2 - [k = 0]) / n) cos(pi k (2 j + 1) / (2 n))``, as ``scipy.fft.dct(x, norm="ortho")``. Up to
    ``GEMM_UP_TO`` it runs as a matrix product, above by one real Fourier transform of the even entries followed by the odd
    ones in reverse (Makhoul 1980, "A fast cosine transform in one and two dimensions"); half precision in float32.

    Args:
        size: n.
        transposed: type III.
        carrier: (0,), of the operator's dtype and device.
    """

    kind: ClassVar[str] = "cosine"
    size: int
    transposed: bool = False
    carrier: Tensor = field(default_factory=_empty)

    def apply(self, x: Tensor) -> Tensor:
        n = self.size
        self._check(x.shape[-1] == n, f"x (..., {n})")
        if n <= GEMM_UP_TO or x.numel() == 0:
            table = _table("cosine", n, x)
            return x @ (table if self.transposed else table.mT)
        y, even = computable(x), (n + 1) // 2
        half, partners = n // 2 + 1, (n - 1) // 2  # rfft gives frequencies 0 .. n // 2; 1 .. partners have a conjugate
        angle = torch.arange(half, dtype=y.dtype, device=y.device) * (math.pi / (2 * n))
        scale = torch.cat([angle.new_full((1,), math.sqrt(1 / n)), angle.new_full((half - 1,), math.sqrt(2 / n))])
        if self.transposed:
            mirrored = F.pad(y[..., n - half + 1 :].flip(-1), (1, 0))
            spectrum = torch.complex(y[..., :half], -mirrored) * torch.complex(angle.cos() / scale, angle.sin() / scale)
            v = torch.fft.irfft(spectrum, n=n)
            odd = F.pad(v[..., even:].flip(-1), (0, n % 2))
            return torch.stack([v[..., :even], odd], -1).flatten(-2)[..., :n].to(x.dtype)
        v = torch.cat([y[..., ::2], y[..., 1::2].flip(-1)], -1)
        z = torch.fft.rfft(v) * torch.complex(scale * angle.cos(), -scale * angle.sin())
        return torch.cat([z.real, -z.imag[..., 1 : partners + 1].flip(-1)], -1).to(x.dtype)

    def flops(self, batch: int = 1) -> int:
        """2 n^2 as a matrix product; by a real Fourier transform 5/2 n log2 n and a complex product a frequency."""
        return batch * _real_flops(self.size)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Fourier(_Transform):
    """The discrete Fourier transform of real vectors as an orthogonal matrix; any size.

    ``A x = [Re z_0, sqrt(2) Re z_1, ..., Re z_{n/2}, sqrt(2) Im z_1, sqrt(2) Im z_2, ...]`` of the orthonormal
    ``z = rfft(x)``: the real parts of all frequencies, then the imaginary parts that are not always zero; the factor is
    sqrt(2) for frequencies with a conjugate partner. Up to ``GEMM_UP_TO`` a matrix product, above a real Fourier transform;
    half precision in float32. For the complex transform as a structured matrix see ``fourier_blocks``.

    Args:
        size: n.
        transposed: the transpose, which is the inverse.
        carrier: (0,), of the operator's dtype and device.
    """

    kind: ClassVar[str] = "fourier"
    size: int
    transposed: bool = False
    carrier: Tensor = field(default_factory=_empty)

    def apply(self, x: Tensor) -> Tensor:
        n = self.size
        self._check(x.shape[-1] == n, f"x (..., {n})")
        if n <= GEMM_UP_TO or x.numel() == 0:
            table = _table("fourier", n, x)
            return x @ (table if self.transposed else table.mT)
        y = computable(x)
        half, partners = n // 2 + 1, (n - 1) // 2
        root = math.sqrt(2)
        factor = y.new_full((half,), root)
        factor[0] = 1.0
        if n % 2 == 0:
            factor[-1] = 1.0
        if self.transposed:
            imaginary = F.pad(y[..., half:] / root, (1, half - 1 - partners))
            back: Tensor = torch.fft.irfft(torch.complex(y[..., :half] / factor, imaginary), n=n, norm="ortho")
            return back.to(x.dtype)
        z = torch.fft.rfft(y, norm="ortho")
        return torch.cat([z.real * factor, z.imag[..., 1 : partners + 1] * root], -1).to(x.dtype)

    def flops(self, batch: int = 1) -> int:
        """2 n^2 as a matrix product; by a real Fourier transform 5/2 n log2 n and a product a number."""
        return batch * _real_flops(self.size)


def _real_flops(n: int) -> int:
    return 2 * n * n if n <= GEMM_UP_TO else int(2.5 * n * math.log2(n)) + 6 * (n // 2 + 1)


def _turns(numerator: NDArray[np.integer[Any]], size: int) -> Table:
    """``2 pi numerator / size`` for integers, reduced exactly first."""
    return (numerator % size).astype(np.float64) * (2 * math.pi / size)


def _cosine_table(size: int) -> Table:
    k = np.arange(size)
    table = np.cos(_turns(np.outer(k, 2 * k + 1), 4 * size)) * math.sqrt(2 / size)
    table[0] = math.sqrt(1 / size)
    return table


def _fourier_table(size: int) -> Table:
    half, partners = size // 2 + 1, (size - 1) // 2
    angle = _turns(np.outer(np.arange(half), np.arange(size)), size)
    cosines = np.cos(angle) * math.sqrt(2 / size)
    cosines[[0, -1] if size % 2 == 0 else [0]] /= math.sqrt(2)
    return np.concatenate([cosines, -np.sin(angle[1 : partners + 1]) * math.sqrt(2 / size)])


_MAKERS = {"hadamard": _hadamard_table, "cosine": _cosine_table, "fourier": _fourier_table}


# As block low-rank matrices -----------------------------------------------------------------------------------------


def hadamard_blocks(size: int) -> BlockLowRank:
    """The orthonormal Hadamard matrix of a power of two as a block low-rank matrix: blocks of rank one with strided rows
    and contiguous columns (a start for training, or a check of a projection; ``Hadamard`` itself stores nothing).

    Raises:
        GramianError: the size is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise GramianError(f"hadamard_blocks: size {size}; expected a power of two")
    q = 2 ** ((size.bit_length() - 1) // 2)
    outer, inner = (hadamard_transform(torch.eye(d)) for d in (size // q, q))
    # H[(i1, i2), (j1, j2)] = outer[i1, j1] inner[i2, j2]: row block i2, column block j1.
    left, right = outer.expand(q, -1, -1), inner.expand(size // q, -1, -1)
    return BlockLowRank(left.contiguous(), right.contiguous(), size, size, strided_rows=True)


def fourier_blocks(size: int, row_blocks: int | None = None) -> BlockLowRank:
    """The orthonormal complex Fourier transform on n numbers, written on 2 n real ones (all real parts, then all imaginary
    parts), as a block low-rank matrix (2 n, 2 n): J x n / J blocks of rank two, rows and columns strided.

    With rows i = a J + j and columns l = b K + k, J K = n, the entry is ``exp(-2 pi i (a k / K + j k / n + j b / J))``: a
    function of a times one of b, so each complex block has rank one, and two as a real one.

    Args:
        size: n.
        row_blocks: J, a divisor of n; by default the one nearest to its root from below.

    Raises:
        GramianError: J does not divide n.
    """
    j_count = row_blocks or next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    if size % j_count:
        raise GramianError(f"fourier_blocks: {j_count} row blocks for size {size}; expected a divisor")
    k_count = size // j_count
    j, k = np.arange(j_count), np.arange(k_count)
    u = -_turns(k[:, None] * k * j_count + j[:, None, None] * k, size)  # (J, a, K)
    v = -_turns(np.outer(j, j), j_count)  # (J, b)
    cos_u, sin_u, cos_v, sin_v = np.cos(u) / math.sqrt(size), np.sin(u) / math.sqrt(size), np.cos(v), np.sin(v)
    # Of each complex block u v^T the real form [[Re, -Im], [Im, Re]]: rank two.
    left = np.block([[cos_u, -sin_u], [sin_u, cos_u]])  # (J, 2 a, 2 K), rank outer
    right = np.stack([np.block([cos_v, -sin_v]), np.block([sin_v, cos_v])], 1).reshape(2 * j_count, -1)
    right = np.tile(right, (k_count, 1, 1))
    dtype = torch.get_default_dtype()
    factors = [torch.from_numpy(factor).to(dtype) for factor in (left, right)]
    return BlockLowRank(factors[0], factors[1], 2 * size, 2 * size, True, True)
