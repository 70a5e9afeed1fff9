"""The two maps of a bottleneck made of parametrised hypercomplex multiplications."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops.kronecker import KroneckerSum
from gramian.ops.operator import Operator, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class HypercomplexBottleneck(Operator):
    """``up @ down`` with ``down = sum_i slow[i] (x) down_left[i] down_right[i]`` and ``up`` of the same `slow`
    (Compacter, 2021, "Efficient low-rank hypercomplex adapter layers").

    Both maps read one array `slow`, which layers may share as well. ``parts`` is (up, down), for a non-linearity
    between.

    Args:
        slow: (n, n, n): the n matrices A_i.
        down_left: (n, w / n, k), down_right: (n, k, in / n).
        up_left: (n, out / n, k), up_right: (n, k, w / n); w is the width between, k the rank of the fast weights.
    """

    kind: ClassVar[str] = "hypercomplex_bottleneck"
    slow: Tensor
    down_left: Tensor
    down_right: Tensor
    up_left: Tensor
    up_right: Tensor

    def __post_init__(self) -> None:
        n = len(self.slow)
        fast = (self.down_left, self.down_right, self.up_left, self.up_right)
        fits = self.slow.shape == (n, n, n) and n > 0 and all(f.dim() == 3 and len(f) == n for f in fast)
        fits = fits and self.down_left.shape[2] == self.down_right.shape[1]
        fits = fits and self.up_left.shape[2] == self.up_right.shape[1]
        fits = fits and self.up_right.shape[2] == self.down_left.shape[1]
        self._check(
            fits, "slow (n, n, n), down_left (n, w / n, k), down_right (n, k, in / n), up_left, up_right likewise"
        )

    @property
    def parts(self) -> tuple[KroneckerSum, KroneckerSum]:
        """(up, down)."""
        return self._sum(self.up_left, self.up_right), self._sum(self.down_left, self.down_right)

    def _sum(self, left: Tensor, right: Tensor) -> KroneckerSum:
        n = len(self.slow)
        return KroneckerSum(self.slow, left @ right, n * left.shape[1], n * right.shape[2])

    @property
    def shape(self) -> tuple[int, int]:
        n = len(self.slow)
        return (n * self.up_left.shape[1], n * self.down_right.shape[2])

    def apply(self, x: Tensor) -> Tensor:
        up, down = self.parts
        return up.apply(down.apply(x))

    def apply_columns(self, x: Tensor) -> Tensor:
        up, down = self.parts
        return up.apply_columns(down.apply_columns(x))

    def transpose(self) -> HypercomplexBottleneck:
        return HypercomplexBottleneck(
            self.slow.mT, self.up_right.mT, self.up_left.mT, self.down_right.mT, self.down_left.mT
        )

    def flops(self, batch: int = 1) -> int:
        return sum(part.flops(batch) for part in self.parts)

    @classmethod
    def random(
        cls,
        size: int,
        width: int,
        *,
        factors: int = 4,
        rank: int = 1,
        slow: float = 1e-4,
        generator: torch.Generator | None = None,
    ) -> HypercomplexBottleneck:
        """Compacter's start: fast weights by Glorot's rule (gain sqrt 2), slow ones uniform within `slow`.

        Args:
            size: in = out.
            width: w.
            factors: n.
            rank: k.
            slow: bound of the slow weights.
            generator: on the CPU.

        Raises:
            GramianError: n divides one of the sizes not.
        """
        n = factors
        if n < 1 or size % n or width % n:
            raise GramianError(
                f"hypercomplex_bottleneck: {n} factors of sizes {size} and {width}; expected a divisor of both"
            )

        def glorot(rows: int, columns: int) -> Tensor:
            bound = (12 / (rows + columns)) ** 0.5
            return torch.empty(n, rows, columns).uniform_(-bound, bound, generator=generator)

        matrices = torch.empty(n, n, n).uniform_(-slow, slow, generator=generator)
        return cls(
            matrices,
            glorot(width // n, rank),
            glorot(rank, size // n),
            glorot(size // n, rank),
            glorot(rank, width // n),
        )
