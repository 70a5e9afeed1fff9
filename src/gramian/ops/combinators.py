"""Operators made of operators: sums, products, transposes, multiples, Kronecker products and block diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops.operator import Operator, register


class _Composite(Operator):
    """What operators made of a tuple ``parts`` share."""

    parts: tuple[Operator, ...]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    def __post_init__(self) -> None:
        if not self.parts:
            raise GramianError(f"{self.kind}: no parts; expected at least one")

    def _dense_parts(self) -> list[Tensor]:
        """Each part's matrix; parts that store no numbers (an identity) follow the dtype and device of the others."""
        return [part.dense().to(self.device, self.dtype) for part in self.parts]


@register
@dataclass(frozen=True, eq=False, repr=False)
class Sum(_Composite):
    """``parts[0] + parts[1] + ...``, all of one shape."""

    kind: ClassVar[str] = "sum"
    parts: tuple[Operator, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({part.shape for part in self.parts}) != 1:
            raise GramianError(f"sum: shapes {[part.shape for part in self.parts]}; expected one shape")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def apply(self, x: Tensor) -> Tensor:
        y = self.parts[0].apply(x)
        for part in self.parts[1:]:
            y = y + part.apply(x)
        return y

    def apply_columns(self, x: Tensor) -> Tensor:
        y = self.parts[0].apply_columns(x)
        for part in self.parts[1:]:
            y = y + part.apply_columns(x)
        return y

    def dense(self) -> Tensor:
        first, *others = self._dense_parts()
        for other in others:
            first = first + other
        return first

    def transpose(self) -> Operator:
        return Sum(tuple(part.T for part in self.parts))

    def runtime(self) -> Operator:
        from gramian.ops.algebra import add

        return add(*(part.runtime() for part in self.parts))

    def flops(self, batch: int = 1) -> int:
        return sum(part.flops(batch) for part in self.parts) + batch * self.shape[0] * (len(self.parts) - 1)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Product(_Composite):
    """``parts[0] @ parts[1] @ ...``: the last part acts first."""

    kind: ClassVar[str] = "product"
    parts: tuple[Operator, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for a, b in zip(self.parts, self.parts[1:], strict=False):
            if a.shape[1] != b.shape[0]:
                raise GramianError(f"product: {a.shape} @ {b.shape}; expected equal inner sizes")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.parts[0].shape[0], self.parts[-1].shape[1])

    def apply(self, x: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part.apply(x)
        return x

    def apply_columns(self, x: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part.apply_columns(x)
        return x

    def dense(self) -> Tensor:
        full = self.parts[-1].dense().to(self.device, self.dtype)
        for part in reversed(self.parts[:-1]):
            full = part.apply(full.mT).mT
        return full

    def transpose(self) -> Operator:
        return Product(tuple(part.T for part in reversed(self.parts)))

    def runtime(self) -> Operator:
        from gramian.ops.algebra import compose

        return compose(*(part.runtime() for part in self.parts))

    def flops(self, batch: int = 1) -> int:
        return sum(part.flops(batch) for part in self.parts)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Transpose(Operator):
    """The transpose of a structure that has no transposed form of its own; products run on the dense matrix."""

    kind: ClassVar[str] = "transpose"
    base: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape[::-1]

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.base.dense().to(x.dtype)

    def apply_columns(self, x: Tensor) -> Tensor:
        return self.base.dense().to(x.dtype).mT @ x

    def transpose(self) -> Operator:
        return self.base

    def dense(self) -> Tensor:
        return self.base.dense().mT

    def runtime(self) -> Operator:
        from gramian.ops.dense import Dense

        return Dense(self.dense())

    @property
    def numel(self) -> int:
        return self.base.numel

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.shape[0] * self.shape[1]


@register
@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Operator):
    """``factor * base``; factor is a scalar tensor of shape ()."""

    kind: ClassVar[str] = "scaled"
    factor: Tensor
    base: Operator

    def __post_init__(self) -> None:
        self._check(self.factor.dim() == 0, "a scalar factor")

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def apply(self, x: Tensor) -> Tensor:
        return self.factor * self.base.apply(x)

    def apply_columns(self, x: Tensor) -> Tensor:
        return self.factor * self.base.apply_columns(x)

    def dense(self) -> Tensor:
        return self.factor * self.base.dense().to(self.device, self.dtype)

    def transpose(self) -> Operator:
        return Scaled(self.factor, self.base.T)

    @property
    def numel(self) -> int:
        return self.base.numel + 1

    def flops(self, batch: int = 1) -> int:
        return self.base.flops(batch) + batch * self.shape[0]


@register
@dataclass(frozen=True, eq=False, repr=False)
class Kron(Operator):
    """``left (x) right`` of any two operators, in the order of ``torch.kron``."""

    kind: ClassVar[str] = "kron"
    left: Operator
    right: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        (a, b), (c, d), batch = self.left.shape, self.right.shape, x.shape[:-1]
        rows = batch.numel()
        y = self.right.apply(x.reshape(rows * b, d)).reshape(rows, b, c)
        y = self.left.apply(y.mT.reshape(rows * c, b)).reshape(rows, c, a)
        return y.mT.reshape(*batch, a * c)

    def apply_columns(self, x: Tensor) -> Tensor:
        """The left factor needs no copy: its columns are whole runs of (right, batch)."""
        (a, b), (c, d), batch = self.left.shape, self.right.shape, x.shape[1]
        first = x.reshape(b, d, batch).transpose(0, 1).reshape(d, b * batch)
        y = self.right.apply_columns(first).reshape(c, b, batch).transpose(0, 1)
        return self.left.apply_columns(y.reshape(b, c * batch)).reshape(a * c, batch)

    def dense(self) -> Tensor:
        left, right = (op.dense().to(self.device, self.dtype) for op in (self.left, self.right))
        # torch.kron refuses some strides, even of tensors that call themselves contiguous.
        return (left[:, None, :, None] * right[:, None, :]).reshape(self.shape)

    def transpose(self) -> Operator:
        return Kron(self.left.T, self.right.T)

    @property
    def numel(self) -> int:
        return self.left.numel + self.right.numel

    def flops(self, batch: int = 1) -> int:
        return self.right.flops(batch * self.left.shape[1]) + self.left.flops(batch * self.right.shape[0])


@register
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiag(_Composite):
    """``parts`` along the diagonal; they may be rectangular and of different sizes."""

    kind: ClassVar[str] = "block_diag"
    parts: tuple[Operator, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return (sum(part.shape[0] for part in self.parts), sum(part.shape[1] for part in self.parts))

    def apply(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, [part.shape[1] for part in self.parts], dim=-1)
        return torch.cat([part.apply(piece) for part, piece in zip(self.parts, pieces, strict=True)], dim=-1)

    def apply_columns(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, [part.shape[1] for part in self.parts])
        return torch.cat([part.apply_columns(piece) for part, piece in zip(self.parts, pieces, strict=True)])

    def dense(self) -> Tensor:
        full: Tensor = torch.block_diag(*self._dense_parts())  # type: ignore[no-untyped-call]
        return full

    def transpose(self) -> Operator:
        return BlockDiag(tuple(part.T for part in self.parts))

    def flops(self, batch: int = 1) -> int:
        return sum(part.flops(batch) for part in self.parts)
