"""Low rank in identity gauge: the same rank-r matrix stored with r (m + n - r) numbers instead of r (m + n).

A rank-r matrix has r rows that span all others: ``A = P [I; T] B`` with B (r, n) those rows, T (m - r, r) the
coefficients of the remaining rows, and P the permutation that puts rows back in place. Pivoting keeps |T| near one.
It is a storage format: products run on the factor pair or on the dense matrix (``runtime``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import pivoted_rows, reduced_rank
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class Skeleton(Operator):
    """A rank-r matrix through r of its rows (or, transposed, of its columns).

    Args:
        basis: (r, in), the spanning rows; for ``by_columns`` (r, out), the spanning columns.
        coefficients: (out - r, r): the other rows are ``coefficients @ basis``; for ``by_columns`` (in - r, r).
        order: (out,) integers: row ``order[i]`` of the matrix is row i of ``[basis; coefficients @ basis]``; for
            ``by_columns`` (in,) likewise.
        by_columns: the stored matrix is the transpose of the row form.
    """

    kind: ClassVar[str] = "skeleton"
    fittable: ClassVar[bool] = True
    matrices: ClassVar[frozenset[str]] = frozenset({"basis", "coefficients"})
    basis: Tensor
    coefficients: Tensor
    order: Tensor
    by_columns: bool = False

    def __post_init__(self) -> None:
        fits = self.basis.dim() == 2 and self.coefficients.dim() == 2 and self.order.dim() == 1
        if fits:
            r = self.basis.shape[0]
            fits = self.coefficients.shape[1] == r and self.order.shape[0] == self.coefficients.shape[0] + r
        self._check(fits, "basis (r, n), coefficients (m - r, r), order (m,)")

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.basis.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.order.shape[0], self.basis.shape[1])
        return shape[::-1] if self.by_columns else shape

    def pair(self) -> BlockLowRank:
        """The same matrix as a factor pair of r (m + n) numbers."""
        eye = torch.eye(self.rank, dtype=self.basis.dtype, device=self.basis.device)
        stacked = torch.cat([eye, self.coefficients])
        left = torch.zeros_like(stacked).index_copy(0, self.order.long(), stacked)
        if self.by_columns:
            return BlockLowRank.low_rank(self.basis.mT, left.mT)
        return BlockLowRank.low_rank(left, self.basis)

    def apply(self, x: Tensor) -> Tensor:
        pair = self.pair()
        return F.linear(F.linear(x, pair.right[0]), pair.left[0])

    def apply_columns(self, x: Tensor) -> Tensor:
        pair = self.pair()
        return pair.left[0] @ (pair.right[0] @ x)

    def transpose(self) -> Skeleton:
        return Skeleton(self.basis, self.coefficients, self.order, not self.by_columns)

    def dense(self) -> Tensor:
        pair = self.pair()
        return pair.left[0] @ pair.right[0]

    def runtime(self) -> Operator:
        return self.pair()

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.rank * sum(self.shape)

    @classmethod
    def from_pair(cls, left: Tensor, right: Tensor) -> Skeleton:
        """The skeleton of ``left (m, r) @ right (r, n)``, exact to rounding; `left` must have full column rank.

        Raises:
            GramianError: r exceeds min(m, n).
        """
        m, r = left.shape
        if r > min(m, right.shape[1]):
            raise GramianError(f"skeleton: rank {r} exceeds the smaller side of {m} x {right.shape[1]}")
        wide = left.double()
        # Any invertible mixing of the factors gives the same skeleton; an orthonormal basis is the stable one.
        basis, mixing = torch.linalg.qr(wide)
        pivots = pivoted_rows(basis, r)
        others = torch.ones(m, dtype=torch.bool, device=left.device)
        others[pivots] = False
        rest = others.nonzero().squeeze(1)
        coefficients = torch.linalg.solve(basis[pivots].mT, basis[rest].mT).mT
        rows = basis[pivots] @ (mixing @ right.double())
        return cls(rows.to(right), coefficients.to(left), torch.cat([pivots, rest]).to(torch.int32))

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        rank: int = 1,
        **size: Any,
    ) -> Skeleton:
        """The two-sided low-rank optimum (``linalg.reduced_rank``) in identity gauge."""
        if not 1 <= rank <= min(weight.shape):
            raise GramianError(f"skeleton: rank {rank} for {tuple(weight.shape)}; expected 1 to {min(weight.shape)}")
        best = reduced_rank(weight, gram_in, gram_out)
        return cls.from_pair(best.left[:, :rank].to(weight), best.right[:rank].to(weight))

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        rank: int = 1,
        **size: Any,
    ) -> Skeleton:
        out, in_ = shape
        return cls.from_pair(spectral_normal((out, rank), generator), spectral_normal((rank, in_), generator))

    @classmethod
    def count(cls, shape: tuple[int, int], rank: int) -> int:
        """How many numbers a rank-`rank` member stores, the row order included."""
        return rank * (shape[0] + shape[1] - rank) + shape[0]

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        out, in_ = shape
        budget = keep * out * in_ - out
        total = out + in_
        if total * total < 4 * budget:
            rank = min(shape)
        else:
            rank = min(math.floor((total - math.sqrt(total * total - 4 * max(budget, 0))) / 2), *shape)
        while rank > 0 and cls.count(shape, rank) > keep * out * in_:
            rank -= 1
        return [{"rank": rank}] if rank >= 1 else []
