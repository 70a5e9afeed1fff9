"""Cross (CUR) approximation: a matrix through some of its own columns and rows.

``A = C U R`` with C columns and R rows of the matrix itself (Mahoney and Drineas 2009). It holds r^2 numbers more than a
factor pair of the same rank and is never closer than the best pair; what it gives is the matrix's own columns and rows,
which PMSS (Wang et al. 2024, "Pretrained Matrices Skeleton Selection for LLM Fine-tuning") keeps frozen and trains U
between. To store a low-rank matrix in few numbers see ``Skeleton``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import pivoted_rows, psd_solve, reduced_rank, svdvals, weigh
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class Cross(Operator):
    """``picked_columns @ core @ picked_rows``; training changes the core alone.

    Args:
        picked_columns: (out, r).
        core: (r, r).
        picked_rows: (r, in).
    """

    kind: ClassVar[str] = "cross"
    fittable: ClassVar[bool] = True
    constants: ClassVar[frozenset[str]] = frozenset({"picked_columns", "picked_rows"})
    picked_columns: Tensor
    core: Tensor
    picked_rows: Tensor

    def __post_init__(self) -> None:
        fits = self.picked_columns.dim() == self.core.dim() == self.picked_rows.dim() == 2
        fits = (
            fits
            and self.picked_columns.shape[1] == self.core.shape[0]
            and self.core.shape[1] == self.picked_rows.shape[0]
        )
        self._check(fits, "picked_columns (out, r), core (r, r) and picked_rows (r, in)")

    @property
    def rank(self) -> int:
        """r: how many columns and rows."""
        return self.core.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.picked_columns.shape[0], self.picked_rows.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, self.picked_rows), self.core), self.picked_columns)

    def apply_columns(self, x: Tensor) -> Tensor:
        return self.picked_columns @ (self.core @ (self.picked_rows @ x))

    def dense(self) -> Tensor:
        return (self.picked_columns @ self.core) @ self.picked_rows

    def transpose(self) -> Cross:
        return Cross(self.picked_rows.mT, self.core.mT, self.picked_columns.mT)

    def runtime(self) -> Operator:
        out, in_ = self.shape
        left, right = self.picked_columns, self.picked_rows
        folded = (left @ self.core, right) if out <= in_ else (left, self.core @ right)
        return BlockLowRank.low_rank(*folded)

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.numel

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        rank: int = 1,
        **size: Any,
    ) -> Cross:
        """Columns and rows by ``cross_indices``, and the core that suits the Grams best: with those, it is the optimum
        ``(C^T H C)^+ C^T H W G R^T (R G R^T)^+``.
        """
        chosen_rows, chosen_columns = cross_indices(weight, rank, gram_in=gram_in, gram_out=gram_out)
        w = weight.detach().double()
        g, h = (None if gram is None else gram.to(w) for gram in (gram_in, gram_out))
        c, r = w[:, chosen_columns], w[chosen_rows]
        left, right = weigh(c, h, side="out"), weigh(r, g, side="in")
        half = psd_solve(left.mT @ c, left.mT @ w @ right.mT)
        core = psd_solve(right @ r.mT, half.mT).mT
        return cls(weight[:, chosen_columns].detach(), core.to(weight), weight[chosen_rows].detach())

    @classmethod
    def init(
        cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, rank: int = 1, **size: Any
    ) -> Cross:
        """Gaussian columns and rows, identity core."""
        out, in_ = shape
        columns, rows = spectral_normal((out, rank), generator), spectral_normal((rank, in_), generator)
        return cls(columns, torch.eye(rank), rows)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        out, in_ = shape
        rank = int((math.sqrt((out + in_) ** 2 + 4 * max(keep, 0.0) * out * in_) - (out + in_)) / 2)
        rank = min(rank, out, in_)
        while rank and rank * (out + in_ + rank) > keep * out * in_:
            rank -= 1
        return [{"rank": rank}] if rank else []


def cross_indices(
    weight: Tensor, rank: int, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows (r,) and columns (r,) of a weight (out, in), ascending, that its best rank-r approximation under the Grams
    passes through well: pivoted QR of that approximation's factors (DEIM-CUR, Sorensen and Embree 2016, with the pivoting
    of Drmac and Gugercin 2016; the weighting is ours).

    Raises:
        GramianError: rank out of range.
    """
    if not 1 <= rank <= min(weight.shape):
        raise GramianError(f"cross: rank {rank} for {tuple(weight.shape)}; expected 1 to {min(weight.shape)}")
    best = reduced_rank(weight.detach(), gram_in, gram_out)
    left, right = (torch.linalg.qr(factor)[0] for factor in (best.left[:, :rank], best.right[:rank].mT))
    return pivoted_rows(left, rank), pivoted_rows(right, rank)


def cur(
    weight: Tensor,
    rank: int,
    *,
    gram_in: Tensor | None = None,
    gram_out: Tensor | None = None,
    update: bool = False,
) -> Cross:
    """``C U R`` of a weight (out, in).

    Args:
        weight: (out, in).
        rank: how many columns and rows.
        gram_in: (in, in), its diagonal (in,), or None.
        gram_out: (out, out), its diagonal (out,), or None.
        update: give the start of an additive update instead, as in PMSS: U zero, C and R frozen. C and R are divided by
            their spectral norms (ours), so that the step of U does not depend on the layer's scale.

    Raises:
        GramianError: rank out of range.
    """
    if not update:
        return Cross.fit(weight, gram_in=gram_in, gram_out=gram_out, rank=rank)
    rows, columns = cross_indices(weight, rank, gram_in=gram_in, gram_out=gram_out)
    c, r = (
        part / svdvals(part.float())[0].clamp_min(1e-30).to(part)
        for part in (weight[:, columns].detach(), weight[rows].detach())
    )
    return Cross(c, weight.new_zeros(rank, rank), r)
