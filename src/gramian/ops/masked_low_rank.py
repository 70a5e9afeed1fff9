"""Several low-rank matrices that share one pair of factors and differ by fixed masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.operator import Operator, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class MaskedLowRank(Operator):
    """``sum_i (left * left_masks[i]) @ (right * right_masks[i])``: of rank up to d r with the parameters of rank r
    (CapaBoost, 2024, "Increasing model capacity for free").

    Args:
        left: (out, r).
        right: (r, in).
        left_masks: (d, out, r) booleans, fixed.
        right_masks: (d, r, in) booleans, fixed.
    """

    kind: ClassVar[str] = "masked_low_rank"
    left: Tensor
    right: Tensor
    left_masks: Tensor
    right_masks: Tensor

    def __post_init__(self) -> None:
        fits = self.left.dim() == self.right.dim() == 2 and self.left.shape[1] == self.right.shape[0]
        for mask, factor in ((self.left_masks, self.left), (self.right_masks, self.right)):
            fits = fits and mask.dim() == 3 and mask.shape[1:] == factor.shape and len(mask) == len(self.left_masks) > 0
        self._check(fits, "left (out, r), right (r, in), left_masks (d, out, r), right_masks (d, r, in)")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0], self.right.shape[1])

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """The same matrix as one pair of rank d r: (out, d r) and (d r, in)."""
        d, out, r = self.left_masks.shape
        left = (self.left * self.left_masks).transpose(0, 1).reshape(out, d * r)
        return left, (self.right * self.right_masks).reshape(d * r, -1)

    def apply(self, x: Tensor) -> Tensor:
        left, right = self._stacked()
        return F.linear(F.linear(x, right), left)

    def apply_columns(self, x: Tensor) -> Tensor:
        left, right = self._stacked()
        return left @ (right @ x)

    def dense(self) -> Tensor:
        left, right = self._stacked()
        return left @ right

    def transpose(self) -> MaskedLowRank:
        return MaskedLowRank(self.right.mT, self.left.mT, self.right_masks.mT, self.left_masks.mT)

    def runtime(self) -> Operator:
        return BlockLowRank.low_rank(*self._stacked())

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * len(self.left_masks) * (self.left.numel() + self.right.numel())

    @classmethod
    def masked(
        cls,
        left: Tensor,
        right: Tensor,
        *,
        copies: int = 2,
        density: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> MaskedLowRank:
        """Independent random masks that keep each entry with probability `density`.

        Raises:
            GramianError: no copies, or a density outside (0, 1].
        """
        if copies < 1 or not 0 < density <= 1:
            raise GramianError(
                f"masked_low_rank: {copies} copies of density {density}; expected at least 1 and a density in (0, 1]"
            )
        masks = [
            (torch.rand(copies, *factor.shape, generator=generator) < density).to(factor.device)
            for factor in (left, right)
        ]
        return cls(left, right, *masks)
