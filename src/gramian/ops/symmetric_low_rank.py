"""Low rank with one factor on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.operator import Operator, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class SymmetricLowRank(Operator):
    """``A[:rows] @ A[:columns]^T``: symmetric positive semi-definite when square, a corner of such a matrix otherwise
    (SingLoRA, 2025, "Low rank adaptation using a single matrix").

    Args:
        factor: A, (max(rows, columns), r).
        rows, columns: the shape.
    """

    kind: ClassVar[str] = "symmetric_low_rank"
    factor: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        fits = self.factor.dim() == 2 and min(self.rows, self.columns) > 0
        fits = fits and self.factor.shape[0] == max(self.rows, self.columns)
        self._check(fits, f"factor (max(rows, columns), r) for {self.rows} x {self.columns}")

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.factor.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.factor[: self.columns], self.factor[: self.rows])

    def apply_columns(self, x: Tensor) -> Tensor:
        return self.factor[: self.rows] @ (self.factor[: self.columns].mT @ x)

    def dense(self) -> Tensor:
        return self.factor[: self.rows] @ self.factor[: self.columns].mT

    def transpose(self) -> SymmetricLowRank:
        return SymmetricLowRank(self.factor, self.columns, self.rows)

    def runtime(self) -> Operator:
        return BlockLowRank.low_rank(self.factor[: self.rows], self.factor[: self.columns].mT)

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.rank * (self.rows + self.columns)

    @classmethod
    def random(cls, shape: tuple[int, int], rank: int, *, generator: torch.Generator | None = None) -> SymmetricLowRank:
        """Entries uniform within ``sqrt(1 / r)``: Kaiming's rule for a layer that reads r numbers, as SingLoRA has it."""
        bound = rank**-0.5
        factor = torch.empty(max(shape), rank).uniform_(-bound, bound, generator=generator)
        return cls(factor, *shape)
