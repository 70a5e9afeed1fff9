"""A matrix with no structure: the baseline every other structure competes with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.ops.operator import Operator, Size, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class Dense(Operator):
    """A plain matrix.

    Args:
        weight: (out, in).
    """

    kind: ClassVar[str] = "dense"
    fittable: ClassVar[bool] = True
    matrices: ClassVar[frozenset[str]] = frozenset({"weight"})
    weight: Tensor

    def __post_init__(self) -> None:
        self._check(self.weight.dim() == 2, "weight (out, in)")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def apply_columns(self, x: Tensor) -> Tensor:
        return self.weight @ x

    def transpose(self) -> Dense:
        return Dense(self.weight.mT)

    def dense(self) -> Tensor:
        return self.weight

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.weight.numel()

    @classmethod
    def fit(
        cls, weight: Tensor, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None, **size: Any
    ) -> Dense:
        return cls(weight.clone())

    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Dense:
        return cls(spectral_normal(shape, generator))

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        return [{}] if keep >= 1 else []


def spectral_normal(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Gaussian matrices (..., out, in) whose spectral norm is near sqrt(out / in).

    std = min(1, sqrt(out / in)) / sqrt(in) (Yang, Simon, Bernstein 2023, "A Spectral Condition for Feature Learning").
    """
    out, in_ = shape[-2:]
    std = min(1.0, math.sqrt(out / max(in_, 1))) / math.sqrt(max(in_, 1))
    return torch.randn(shape, generator=generator) * std
