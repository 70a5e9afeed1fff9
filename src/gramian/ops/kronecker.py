"""Sums of Kronecker products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import psd_solve, svd
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register

SWEEPS = 200
"""At most so many sweeps of alternating least squares where sizes do not divide."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerSum(Operator):
    """``sum_k left[k] (x) right[k]``, in the order of ``torch.kron``.

    Saves storage more than time: a product costs K (m1 n1 n2 + m1 m2 n2) multiply-adds.

    Args:
        left: (K, m1, n1).
        right: (K, m2, n2).
        rows, columns: true size; m1 m2 and n1 n2 may be larger (padding inside the operator).
    """

    kind: ClassVar[str] = "kronecker"
    fittable: ClassVar[bool] = True
    left: Tensor
    right: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        self._check(
            left.dim() == 3
            and right.dim() == 3
            and left.shape[0] == right.shape[0]
            and left.shape[1] * right.shape[1] >= self.rows
            and left.shape[2] * right.shape[2] >= self.columns,
            f"left (K, m1, n1) and right (K, m2, n2) with m1 m2 >= {self.rows} and n1 n2 >= {self.columns}",
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        (terms, m1, n1), (_, m2, n2) = self.left.shape, self.right.shape
        batch = x.shape[:-1]
        if n1 * n2 > self.columns:
            x = F.pad(x, (0, n1 * n2 - self.columns))
        inner = x.reshape(-1, n1, n2) @ self.right.reshape(terms * m2, n2).mT  # (B, n1, K m2)
        inner = inner.reshape(-1, n1, terms, m2).transpose(1, 2).reshape(-1, terms * n1, m2)
        y = self.left.transpose(0, 1).reshape(m1, terms * n1) @ inner  # (B, m1, m2)
        return y.reshape(-1, m1 * m2)[:, : self.rows].reshape(*batch, self.rows)

    def apply_columns(self, x: Tensor) -> Tensor:
        (terms, m1, n1), (_, m2, n2) = self.left.shape, self.right.shape
        batch = x.shape[1]
        if n1 * n2 > self.columns:
            x = F.pad(x, (0, 0, 0, n1 * n2 - self.columns))
        inner = self.right.reshape(terms * m2, n2) @ x.reshape(n1, n2, batch)  # (n1, K m2, B)
        inner = inner.reshape(n1, terms, m2 * batch).transpose(0, 1).reshape(terms * n1, m2 * batch)
        y = self.left.transpose(0, 1).reshape(m1, terms * n1) @ inner
        return y.reshape(m1 * m2, batch)[: self.rows]

    def transpose(self) -> KroneckerSum:
        return KroneckerSum(self.left.mT, self.right.mT, self.columns, self.rows)

    def dense(self) -> Tensor:
        (_, m1, n1), (_, m2, n2) = self.left.shape, self.right.shape
        full = torch.einsum("kab,kcd->acbd", self.left, self.right).reshape(m1 * m2, n1 * n2)
        return full[: self.rows, : self.columns]

    def flops(self, batch: int = 1) -> int:
        (terms, m1, n1), (_, m2, n2) = self.left.shape, self.right.shape
        return 2 * batch * terms * (m2 * n1 * n2 + m1 * m2 * n1)

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        terms: int = 1,
        left: tuple[int, int] | list[int] | None = None,
        **size: Any,
    ) -> KroneckerSum:
        """The Frobenius optimum by the rearrangement of Van Loan and Pitsianis (1993): the SVD of the matrix whose rows
        are the vectorised blocks. Where the sizes do not divide, what the padding holds is free, and alternating least
        squares over the real entries follow (the error never rises). The Grams are not used here; ``gramian.fit``
        starts from this and polishes.

        Args:
            weight: (out, in).
            gram_in: ignored.
            gram_out: ignored.
            terms: K.
            left: (m1, n1), the size of the left factors; near the square roots of the shape by default.
            size: nothing else.
        """
        out, in_ = weight.shape
        m1, n1 = left if left is not None else (_near_root(out), _near_root(in_))
        if not (1 <= m1 <= out and 1 <= n1 <= in_):
            raise GramianError(f"kronecker: left factor {m1} x {n1} for {out} x {in_}; expected at most that")
        m2, n2 = -(-out // m1), -(-in_ // n1)
        padding = (0, n1 * n2 - in_, 0, m1 * m2 - out)

        def rearrange(matrix: Tensor) -> Tensor:
            padded = F.pad(matrix, padding).reshape(m1, m2, n1, n2)
            return padded.permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)

        target, k = rearrange(weight.double()), min(terms, m1 * n1, m2 * n2)
        u, sigma, vh = svd(target)
        root = sigma[:k].sqrt()
        first, second = u[:, :k] * root, vh[:k] * root[:, None]
        if any(padding):
            real = rearrange(torch.ones_like(weight)) > 0
            error = last = math.inf
            for _ in range(SWEEPS):
                first = _masked_solve(target, real, second)
                second = _masked_solve(target.mT, real.mT, first.mT).mT
                last, error = error, float(((target - first @ second) * real).norm())
                if error > 0.999 * last:
                    break
        return cls(first.mT.reshape(k, m1, n1).to(weight), second.reshape(k, m2, n2).to(weight), out, in_)

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        terms: int = 1,
        left: tuple[int, int] | list[int] | None = None,
        **size: Any,
    ) -> KroneckerSum:
        out, in_ = shape
        m1, n1 = left if left is not None else (_near_root(out), _near_root(in_))
        m2, n2 = -(-out // m1), -(-in_ // n1)
        return cls(
            spectral_normal((terms, m1, n1), generator) / terms**0.5,
            spectral_normal((terms, m2, n2), generator),
            out,
            in_,
        )

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        out, in_ = shape
        m1, n1 = _near_root(out), _near_root(in_)
        each = m1 * n1 + -(-out // m1) * -(-in_ // n1)
        terms = min(int(keep * out * in_ / each), m1 * n1)
        return [{"terms": terms, "left": [m1, n1]}] if terms >= 1 else []


def _masked_solve(target: Tensor, known: Tensor, right: Tensor) -> Tensor:
    """The left (m, k) that brings ``left @ right`` nearest to `target` (m, n) over its `known` entries (m, n)."""
    left = target.new_zeros(len(target), len(right))
    patterns, which = torch.unique(known, dim=0, return_inverse=True)  # few: padding comes in blocks
    for i, seen in enumerate(patterns):
        basis, rows = right[:, seen], which == i
        left[rows] = psd_solve(basis @ basis.mT, basis @ target[rows][:, seen].mT).mT
    return left


def _near_root(n: int) -> int:
    """The divisor of n nearest to its square root from below; the floor of the root when n has none but 1."""
    root = int(n**0.5)
    for divisor in range(root, 0, -1):
        if n % divisor == 0:
            return divisor if divisor > 1 else root
    return 1
