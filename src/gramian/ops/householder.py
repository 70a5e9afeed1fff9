"""Products of Householder reflectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import eigh, polar
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.combinators import Scaled, Sum
from gramian.ops.diagonal import Identity
from gramian.ops.operator import Operator, Size, register
from gramian.ops.orthogonal import check_orthogonal, orthogonal_fit
from gramian.ops.toeplitz import computable


@register
@dataclass(frozen=True, eq=False, repr=False)
class Householder(Operator):
    """The orthogonal matrix ``H_1 H_2 ... H_k`` with ``H_i = I - 2 v_i v_i^T / ||v_i||^2``.

    Products run in the compact WY form: with unit rows v_i of V the matrix is ``I - V^T T V``, T upper triangular with
    ``T^{-1} = I / 2 + triu(V V^T, 1)`` (Joffrain et al. 2006, "Accumulating Householder transformations, revisited"). The
    lengths of the vectors do not matter; a zero vector is the identity.

    Args:
        vectors: (k, n).
    """

    kind: ClassVar[str] = "householder"
    fittable: ClassVar[bool] = True
    vectors: Tensor

    def __post_init__(self) -> None:
        self._check(self.vectors.dim() == 2 and self.vectors.shape[1] > 0, "vectors (k, n)")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.vectors.shape[1], self.vectors.shape[1])

    def _compact(self) -> tuple[Tensor, Tensor]:
        """V (k, n) with unit rows and ``T V``, (k, n): the matrix is ``I - V^T (T V)``."""
        v = computable(self.vectors)
        v = v * v.square().sum(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny).rsqrt()
        eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
        t = torch.linalg.solve_triangular((v @ v.mT).triu(1) + 0.5 * eye, eye, upper=True)
        tv = t @ v  # faster than a triangular solve with n right sides
        return v.to(self.vectors.dtype), tv.to(self.vectors.dtype)

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == self.shape[1], f"x (..., {self.shape[1]})")
        v, tv = self._compact()
        return x - (x @ tv.mT) @ v

    def apply_columns(self, x: Tensor) -> Tensor:
        self._check(x.shape[0] == self.shape[1], f"x ({self.shape[1]}, B)")
        v, tv = self._compact()
        return x - v.mT @ (tv @ x)

    def transpose(self) -> Householder:
        return Householder(self.vectors.flip(0))

    def runtime(self) -> Operator:
        """``I - V^T (T V)`` with the triangular solve done."""
        if not len(self.vectors):
            return self
        v, tv = self._compact()
        return Sum((Identity(self.shape[0]), BlockLowRank.low_rank(-v.mT, tv)))

    def flops(self, batch: int = 1) -> int:
        k, n = self.vectors.shape
        return batch * (4 * k * n + n)

    @classmethod
    def from_matrix(cls, matrix: Tensor, reflectors: int | None = None) -> Householder:
        """The product of `reflectors` reflectors near an orthogonal `matrix` (n, n): equal to it, to rounding, where
        ``matrix - I`` has at most that rank (Scherk: no product of fewer reflectors is).

        The reflectors live in the eigenvectors of ``(Q + Q^T) / 2`` with the smallest eigenvalues, the planes that Q turns
        furthest; there Q is a small orthogonal matrix, and Householder QR factors it.

        Args:
            matrix: (n, n), orthogonal.
            reflectors: k; n by default.

        Raises:
            GramianError: the matrix is not square or not orthogonal to 1e-3, or k is not in 1..n.
        """
        q = matrix.to(torch.float64)
        basis = _turned(q, reflectors)
        return cls((_reflectors(polar(basis.mT @ q @ basis)) @ basis.mT).to(matrix))

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        reflectors: int | None = None,
        **size: Any,
    ) -> Scaled:
        """The best multiple ``c Q`` (a ``Scaled``; Q is its ``base``) of the Q that ``orthogonal_fit`` finds. For a target
        M the family's member is: the k planes that the polar factor of M turns furthest, and within them the polar
        factor of M there. Orthogonal inputs that are products of k reflectors are recovered.
        """

        def project(target: Tensor) -> Tensor:
            basis = _turned(polar(target), reflectors)
            eye = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
            rest = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
            return rest + basis @ (polar(basis.mT @ target @ basis) - eye) @ basis.mT

        factor, q = orthogonal_fit(weight, gram_in, gram_out, project)
        return Scaled(factor.to(weight), cls.from_matrix(q, reflectors).to(dtype=weight.dtype))

    @classmethod
    def init(
        cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, reflectors: int = 1, **size: Any
    ) -> Householder:
        """Reflectors of random directions.

        Raises:
            GramianError: the shape is not square.
        """
        if shape[0] != shape[1]:
            raise GramianError(f"householder: shape {tuple(shape)}; expected a square one")
        return cls(torch.randn(reflectors, shape[1], generator=generator) / shape[1] ** 0.5)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """The largest number of reflectors that fits, its half and its quarter; square shapes only."""
        out, in_ = shape
        most = min(int((keep * out * in_ - 1) // in_), in_) if out == in_ else 0
        return [{"reflectors": k} for k in dict.fromkeys((most, most // 2, most // 4)) if k >= 1]


def _turned(q: Tensor, reflectors: int | None) -> Tensor:
    """An orthonormal basis (n, k) of what an orthogonal matrix (n, n) turns furthest."""
    n = len(q)
    k = n if reflectors is None else reflectors
    if q.shape != (n, n) or not 1 <= k <= n:
        raise GramianError(f"householder: {k} reflectors for {tuple(q.shape)}; expected a square matrix and 1 to {n}")
    check_orthogonal(q)
    _, vectors = eigh((q + q.mT) / 2)
    return vectors[:, n - k :]


def _reflectors(q: Tensor) -> Tensor:
    """The k vectors (k, k), zero where a reflector is idle, of an orthogonal matrix (k, k): Householder QR, in which the
    i-th reflector takes the i-th column to the i-th unit vector itself, not its negative.
    """
    rest, k = q.clone(), len(q)
    vectors = torch.zeros_like(q)
    for i in range(k):
        v = rest[i:, i].clone()
        below = v[1:].square().sum()
        # v_0 - 1 without cancellation, as ||v|| = 1.
        v[0] = torch.where(v[0] > 0, -below / (v[0] + (v[0] ** 2 + below).sqrt()), v[0] - (v[0] ** 2 + below).sqrt())
        square = v.square().sum()
        if bool(square > 1e-30):
            rest[i:, i:] -= torch.outer(v * (2 / square), v @ rest[i:, i:])
            vectors[i, i:] = v
    return vectors
