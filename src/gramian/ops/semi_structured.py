"""N:M sparsity: at most N of every M consecutive entries of a row are not zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops.bits import pack, unpack
from gramian.ops.dense import Dense, spectral_normal
from gramian.ops.operator import Operator, Size, register
from gramian.ops.sparse import pursue

PATTERNS = ((1, 8), (1, 4), (2, 8), (2, 4), (4, 8))
"""(N, M) that ``sizes`` offers."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class SemiStructured(Operator):
    """N:M sparse rows (Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch").

    A storage form: it saves bytes (2:4 in float16: 9/16 of dense), not time. Products run on the dense matrix, as no CPU
    has an instruction for the pattern; a GPU's own 2:4 kernel takes ``torch.sparse.to_sparse_semi_structured`` of
    ``dense()``. The last group of a row may be cut short; its missing columns hold zeros.

    Args:
        values: (out, ceil(in / M) N), group by group.
        positions: (out, ceil(ceil(in / M) N bits / 8)) uint8: the place of each value in its group, ascending; 2 bits
            each for M up to 4, 4 bits for M up to 16, else 8, low bits first.
        columns: in.
        kept: N.
        group: M.
    """

    kind: ClassVar[str] = "semi_structured"
    fittable: ClassVar[bool] = True
    values: Tensor
    positions: Tensor
    columns: int
    kept: int
    group: int

    def __post_init__(self) -> None:
        _check_pattern(self.kept, self.group)
        wide = -(-self.columns // self.group) * self.kept
        self._check(
            self.values.dim() == self.positions.dim() == 2
            and self.values.shape[1] == wide
            and self.positions.shape == (self.values.shape[0], -(-wide * _bits(self.group) // 8))
            and self.positions.dtype == torch.uint8,
            f"values (out, {wide}) and positions (out, {-(-wide * _bits(self.group) // 8)}) of uint8",
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.columns)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype))

    def apply_columns(self, x: Tensor) -> Tensor:
        return self.dense().to(x.dtype) @ x

    def dense(self) -> Tensor:
        out, wide = self.values.shape
        groups = wide // self.kept
        places = unpack(self.positions, _bits(self.group), wide).reshape(out, groups, self.kept)
        full = self.values.new_zeros(out, groups, self.group)
        full = full.scatter(2, places.long(), self.values.reshape(out, groups, self.kept))
        return full.reshape(out, groups * self.group)[:, : self.columns]

    def transpose(self) -> Operator:
        from gramian.ops.combinators import Transpose

        return Transpose(self)

    def runtime(self) -> Operator:
        return Dense(self.dense())

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.shape[0] * self.columns

    @classmethod
    def from_dense(cls, matrix: Tensor, mask: Tensor, kept: int, group: int) -> SemiStructured:
        """The entries of `matrix` (out, in) where `mask` is true, `kept` (or all that exist) in every group.

        Raises:
            GramianError: a group holds another number of true entries.
        """
        _check_pattern(kept, group)
        out, in_ = matrix.shape
        groups = -(-in_ // group)
        fill = groups * group - in_
        chosen = F.pad(mask, (0, fill)).reshape(out, groups, group)
        room = F.pad(torch.ones_like(mask[:1]), (0, fill)).reshape(groups, group).sum(1).clamp_max(kept)
        counts = chosen.sum(2)
        if not torch.equal(counts, room.expand(out, groups)):
            raise GramianError(
                f"semi_structured: {int(counts.min())} to {int(counts.max())} entries a group of {group}; expected {kept}"
            )
        # A short last group is filled up with places beyond the edge, whose values are zero.
        ranked = chosen.to(torch.uint8) * group + torch.arange(group, device=mask.device).flip(0)
        places = ranked.topk(kept, 2).indices.sort(2).values
        values = F.pad(matrix * mask, (0, fill)).reshape(out, groups, group).gather(2, places)
        return cls(values.reshape(out, -1), pack(places.reshape(out, -1), _bits(group)), in_, kept, group)

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        kept: int = 2,
        group: int = 4,
        rounds: int = 4,
        **size: Any,
    ) -> SemiStructured:
        """The largest N of every M weighted magnitudes, refitted to the Grams and chosen again (``ops.sparse.pursue``).

        Exact without Grams and with diagonal ones.
        """
        _check_pattern(kept, group)
        matrix, mask = pursue(weight, largest_of_groups(kept, group), gram_in, gram_out, rounds=rounds)
        return cls.from_dense(matrix.to(weight), mask, kept, group)

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        kept: int = 2,
        group: int = 4,
        **size: Any,
    ) -> SemiStructured:
        """Gaussian values on a random support."""
        mask = largest_of_groups(kept, group)(torch.rand(shape, generator=generator))
        values = spectral_normal(shape, generator) * (group / kept) ** 0.5
        return cls.from_dense(values, mask, kept, group)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        out, in_ = shape
        found: list[Size] = []
        for kept, group in PATTERNS:
            wide = -(-in_ // group) * kept
            if out * (wide + -(-wide * _bits(group) // 8)) <= keep * out * in_:
                found.append({"kept": kept, "group": group})
        return found[::-1]


def largest_of_groups(kept: int, group: int) -> Callable[[Tensor], Tensor]:
    """Select the `kept` largest of every `group` consecutive scores of a row: a boolean mask (out, in)."""

    def select(scores: Tensor) -> Tensor:
        out, in_ = scores.shape
        padded = F.pad(scores, (0, -in_ % group), value=-1.0).reshape(out, -1, group)
        mask = torch.zeros_like(padded, dtype=torch.bool).scatter(2, padded.topk(kept, 2).indices, True)
        return mask.reshape(out, -1)[:, :in_]

    return select


def _check_pattern(kept: int, group: int) -> None:
    if not 1 <= kept <= group <= 256:
        raise GramianError(f"semi_structured: {kept} of every {group}; expected 1 <= kept <= group <= 256")


def _bits(group: int) -> int:
    return 2 if group <= 4 else 4 if group <= 16 else 8
