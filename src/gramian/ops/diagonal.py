"""Diagonal, identity and coordinate-selection operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import psd_solve
from gramian.ops.operator import Operator, Size, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Operator):
    """A square diagonal matrix.

    Args:
        values: (n,).
    """

    kind: ClassVar[str] = "diagonal"
    fittable: ClassVar[bool] = True
    values: Tensor

    def __post_init__(self) -> None:
        self._check(self.values.dim() == 1, "values (n,)")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[0])

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == len(self.values), f"x (..., {len(self.values)})")
        return x * self.values

    def apply_columns(self, x: Tensor) -> Tensor:
        self._check(x.shape[0] == len(self.values), f"x ({len(self.values)}, batch)")
        return x * self.values[:, None]

    def transpose(self) -> Diagonal:
        return self

    def dense(self) -> Tensor:
        return torch.diag(self.values)

    def flops(self, batch: int = 1) -> int:
        return batch * self.shape[0]

    @classmethod
    def fit(
        cls, weight: Tensor, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None, **size: Any
    ) -> Diagonal:
        """Exact weighted optimum: ``(H * G) d = diag(H W G)``, one linear system in the n diagonal entries."""
        if weight.shape[0] != weight.shape[1]:
            raise GramianError(f"diagonal needs a square matrix, found {tuple(weight.shape)}")
        if gram_in is None and gram_out is None:
            return cls(weight.diagonal().clone())
        grams = gram_in, gram_out
        w = weight.to(torch.float64)
        eye = torch.eye(len(w), dtype=w.dtype, device=w.device)
        g, h = (eye if gram is None else torch.diag(gram.to(w)) if gram.dim() == 1 else gram.to(w) for gram in grams)
        values = psd_solve(h * g, (h @ w @ g).diagonal()[:, None])[:, 0]
        return cls(values.to(weight.dtype))

    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Diagonal:
        if shape[0] != shape[1]:
            raise GramianError(f"diagonal needs a square matrix, found {tuple(shape)}")
        return cls(torch.randint(0, 2, (shape[0],), generator=generator).float() * 2 - 1)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        return [{}] if shape[0] == shape[1] and shape[0] <= keep * shape[0] * shape[1] else []


@register
@dataclass(frozen=True, eq=False, repr=False)
class Identity(Operator):
    """The n x n identity: nothing is stored."""

    kind: ClassVar[str] = "identity"
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == self.size, f"x (..., {self.size})")
        return x

    def apply_columns(self, x: Tensor) -> Tensor:
        self._check(x.shape[0] == self.size, f"x ({self.size}, batch)")
        return x

    def transpose(self) -> Identity:
        return self

    def flops(self, batch: int = 1) -> int:
        return 0


@register
@dataclass(frozen=True, eq=False, repr=False)
class Permutation(Operator):
    """Reorders coordinates: ``y[i] = x[index[i]]``.

    Args:
        index: (n,) integers, a permutation of 0..n-1.
    """

    kind: ClassVar[str] = "permutation"
    index: Tensor

    def __post_init__(self) -> None:
        self._check(self.index.dim() == 1 and not self.index.is_floating_point(), "index (n,) of integers")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.index.shape[0], self.index.shape[0])

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == len(self.index), f"x (..., {len(self.index)})")
        return x.index_select(-1, self.index)

    def apply_columns(self, x: Tensor) -> Tensor:
        self._check(x.shape[0] == len(self.index), f"x ({len(self.index)}, batch)")
        return x.index_select(0, self.index)

    def transpose(self) -> Permutation:
        return Permutation(torch.argsort(self.index).to(self.index.dtype))

    def flops(self, batch: int = 1) -> int:
        return 0


@register
@dataclass(frozen=True, eq=False, repr=False)
class Selection(Operator):
    """Picks k of n coordinates, or scatters k into n zeros.

    Args:
        index: (k,) distinct integers in 0..size-1.
        size: n.
        scatter: False for (k, n), ``y[i] = x[index[i]]``; True for its transpose (n, k), ``y[index[i]] = x[i]``.
    """

    kind: ClassVar[str] = "selection"
    index: Tensor
    size: int
    scatter: bool = False

    def __post_init__(self) -> None:
        self._check(
            self.index.dim() == 1 and not self.index.is_floating_point() and self.index.shape[0] <= self.size,
            f"index (k,) of integers with k <= {self.size}",
        )

    @property
    def shape(self) -> tuple[int, int]:
        k = self.index.shape[0]
        return (self.size, k) if self.scatter else (k, self.size)

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == self.shape[1], f"x (..., {self.shape[1]})")
        if not self.scatter:
            return x.index_select(-1, self.index)
        return x.new_zeros(*x.shape[:-1], self.size).index_copy(-1, self.index.long(), x)

    def apply_columns(self, x: Tensor) -> Tensor:
        self._check(x.shape[0] == self.shape[1], f"x ({self.shape[1]}, batch)")
        if not self.scatter:
            return x.index_select(0, self.index)
        return x.new_zeros(self.size, x.shape[1]).index_copy(0, self.index.long(), x)

    def transpose(self) -> Selection:
        return Selection(self.index, self.size, not self.scatter)

    def flops(self, batch: int = 1) -> int:
        return 0
