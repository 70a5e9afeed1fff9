"""Transitions: the structured matrices A_t of a linear recurrence ``S_t = A_t S_{t-1} + B_t``.

A transition holds one matrix of the algebra (``gramian.ops``) a step and head: its tensors have leading dimensions
(batch, time, heads) where it depends on the data and (heads,) where it is the same at every step; (batch, heads) is one
step, for decoding. ``T1 @ T2`` is the product in which T2 acts first: ``Householder(k, beta) @ ScalarGate(g)`` is the
Gated DeltaNet's.

Everything fast runs on one normal form, a product of :class:`Microstep`: a change of frame (signs, phases or rotations),
then a positive diagonal, then at most one rank-one term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops import (
    BlockDiagonal,
    BlockLowRank,
    Dense,
    Diagonal,
    Operator,
    add,
    compose,
)
from gramian.ops import Identity as IdentityOperator

LOWEST = -1000.0
"""Log decays are held above this: ``exp`` of it is zero in every dtype, and differences of sums stay finite."""


@dataclass(frozen=True, eq=False)
class Microstep:
    """``A = (Diag(e^g) - w a^T) F``, or ``(I - w a^T) Diag(e^g) F`` where the erase acts on what the decay left.

    Every field may be None: no decay, no erase, no change of frame.

    Args:
        log_decay: g, (..., dk), or (..., 1) for one decay a head; at most 0 for a stable recurrence.
        a: (..., dk), what the erase reads.
        w: (..., dk), where the erase takes it away.
        after_decay: whether ``a`` reads the decayed state.
        frame: F: signs (..., dk or 1), phases (..., dk) in radians or the angles (..., dk / 2) of rotations.
        frame_kind: "sign", "phase" or "rotation".
    """

    log_decay: Tensor | None = None
    a: Tensor | None = None
    w: Tensor | None = None
    after_decay: bool = True
    frame: Tensor | None = None
    frame_kind: str | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Microstep:
        """The same with `function` applied to every tensor; each has the leading dimensions and one more."""
        mapped: Microstep = _map(self, function)
        return mapped

    def unbind(self, time: int) -> list[Microstep]:
        """One of (batch, heads, ...) for each step of (batch, time, heads, ...)."""
        fields: dict[str, Any] = {
            field.name: value.unbind(1)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return [dataclasses.replace(self, **{name: row[t] for name, row in fields.items()}) for t in range(time)]

    @property
    def scalar_decay(self) -> bool:
        """Whether the decay, if any, is one number a head."""
        return self.log_decay is None or self.log_decay.shape[-1] == 1

    def apply(self, state: Tensor) -> Tensor:
        """``A S``: state (..., dk, dv)."""
        if self.frame is not None:
            state = turn(state.mT, self.frame[..., None, :], self.frame_kind).mT
        seen = state
        if self.log_decay is not None:
            state = state * self.log_decay.clamp_min(LOWEST).exp()[..., None]
        if self.a is not None and self.w is not None:
            read = (self.a[..., None] * (state if self.after_decay else seen)).sum(-2, keepdim=True)
            state = state - self.w[..., None] * read
        return state

    def dense(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(..., size, size)."""
        return self.apply(torch.eye(size, dtype=dtype, device=device))


def turn(x: Tensor, frame: Tensor, kind: str | None, *, inverse: bool = False) -> Tensor:
    """``F x``, or ``F^-1 x``: x (..., dk), frame as in :class:`Microstep`."""
    if kind == "sign":
        return x * frame
    angle = -frame if inverse else frame
    if kind == "phase":
        return x * torch.polar(torch.ones_like(angle), angle)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _map(instance: Any, function: Callable[[Tensor], Tensor]) -> Any:
    changes = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = function(value)
    return dataclasses.replace(instance, **changes)


@dataclass(frozen=True, eq=False)
class Transition:
    """A family of structured matrices (dk, dk), one a step and head. Subclasses are frozen dataclasses of tensors."""

    kind: ClassVar[str]
    trailing: ClassVar[int] = 1
    """How many axes of the first tensor follow the leading ones."""

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions: (batch, time, heads), (batch, heads), (heads,) or ()."""
        first = next(value for value in vars(self).values() if isinstance(value, Tensor))
        return tuple(first.shape[: first.dim() - self.trailing])

    @property
    def size(self) -> int | None:
        """dk, or None where any will do."""
        raise NotImplementedError

    @property
    def is_time_invariant(self) -> bool:
        """Whether every step has the same matrix."""
        return len(self.lead) <= 1

    @property
    def is_diagonal(self) -> bool:
        """Whether the matrices are diagonal (real, signed or complex)."""
        return False

    def microsteps(self) -> tuple[Microstep, ...] | None:
        """The normal form, first to act first; None where there is none and scans run on dense matrices."""
        return None

    def spectral_bound(self) -> Tensor:
        """An upper bound (lead) of the spectral norms; the recurrence cannot grow where it is at most 1."""
        raise NotImplementedError

    def dense(self, size: int | None = None) -> Tensor:
        """The matrices, (*lead, dk, dk).

        Raises:
            GramianError: the transition does not know its size and none is given.
        """
        steps = self.microsteps()
        assert steps is not None
        first = next(value for value in vars(self).values() if isinstance(value, Tensor))
        n = self._sized(size)
        full = torch.eye(n, dtype=first.dtype, device=first.device)
        for step in steps:
            full = step.apply(full)
        return full.expand(*self.lead, n, n)

    def at(self, *index: int, size: int | None = None) -> Operator:
        """The matrix at one index (batch, time, head), or (head,) where it is the same at every step, as an Operator."""
        self._indexed(index)
        return self.map(lambda tensor: tensor[index])._operator(self._sized(size))

    def _indexed(self, index: tuple[int, ...]) -> None:
        if len(index) != len(self.lead):
            raise GramianError(f"{self.kind}: index {index}; expected one number for each of {self.lead}")

    def _operator(self, size: int) -> Operator:
        raise NotImplementedError

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same transition with `function` applied to every tensor (indexing, flipping, casting)."""
        mapped: Self = _map(self, function)
        return mapped

    def expand(self, batch: int, time: int, heads: int) -> Self:
        """With leading dimensions (batch, time, heads), without copying.

        Raises:
            GramianError: they do not broadcast to that.
        """
        lead = self.lead
        if len(lead) not in (0, 1, 3) or any(
            have not in (1, want) for have, want in zip(lead[::-1], (heads, time, batch), strict=False)
        ):
            raise GramianError(
                f"{self.kind}: leading dimensions {lead}; expected {(batch, time, heads)}, or ({heads},) for one that is "
                "the same at every step"
            )
        return self.map(lambda tensor: tensor.expand(batch, time, heads, *tensor.shape[len(lead) :]))

    def select(self, batch: int, head: int) -> Self:
        """One sequence and head, as a batch of one with one head."""
        if len(self.lead) == 3:
            return self.map(lambda tensor: tensor[batch : batch + 1, :, head : head + 1])
        return self.map(lambda tensor: tensor[head : head + 1]) if self.lead else self

    def with_time(self) -> Self:
        """One step, (batch, heads), as a sequence of length one."""
        return self.map(lambda tensor: tensor[:, None]) if len(self.lead) == 2 else self

    def _sized(self, size: int | None) -> int:
        found = self.size if self.size is not None else size
        if found is None:
            raise GramianError(f"{self.kind}: it has no size of its own; give size=")
        if size is not None and size != found:
            raise GramianError(f"{self.kind}: it is {found} x {found}; the keys have {size} entries")
        return found

    def __matmul__(self, other: Transition) -> Transition:
        if not isinstance(other, Transition):
            return NotImplemented
        parts = [
            part
            for side in (self, other)
            for part in (side.parts if isinstance(side, Composed) else (side,))
            if not isinstance(part, Identity)
        ]
        return Identity() if not parts else parts[0] if len(parts) == 1 else Composed(tuple(parts))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lead={self.lead}, size={self.size})"


def _check(kind: str, condition: bool, found: str, expected: str) -> None:
    if not condition:
        raise GramianError(f"{kind}: found {found}; expected {expected}")


def _lead_of(**tensors: tuple[Tensor, int]) -> bool:
    """Whether the leading dimensions of the tensors, each with its number of trailing axes, are the same."""
    return len({tuple(tensor.shape[: tensor.dim() - trailing]) for tensor, trailing in tensors.values()}) == 1


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Transition):
    """The identity at every step: linear attention.

    Args:
        width: dk; None for any.
    """

    kind: ClassVar[str] = "identity transition"
    width: int | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        return ()

    @property
    def size(self) -> int | None:
        return self.width

    @property
    def is_diagonal(self) -> bool:
        return True

    def microsteps(self) -> tuple[Microstep, ...]:
        return (Microstep(),)

    def spectral_bound(self) -> Tensor:
        return torch.ones(())

    def dense(self, size: int | None = None) -> Tensor:
        return torch.eye(self._sized(size))

    def _operator(self, size: int) -> Operator:
        return IdentityOperator(size)


@dataclass(frozen=True, eq=False, repr=False)
class ScalarGate(Transition):
    """``s e^g I``: one decay a head (RetNet where constant, Mamba-2 where it depends on the data).

    Args:
        log_decay: g, (*lead), at most 0 for a stable recurrence.
        sign: s, (*lead) of 1 and -1; None for 1.
    """

    kind: ClassVar[str] = "scalar gate"
    trailing: ClassVar[int] = 0
    log_decay: Tensor
    sign: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sign is not None:
            _check(
                self.kind, self.sign.shape == self.log_decay.shape, f"sign {tuple(self.sign.shape)}", "that of decay"
            )

    @property
    def size(self) -> int | None:
        return None

    @property
    def is_diagonal(self) -> bool:
        return True

    def microsteps(self) -> tuple[Microstep, ...]:
        sign = None if self.sign is None else self.sign[..., None].detach()
        return (Microstep(self.log_decay[..., None], frame=sign, frame_kind=None if sign is None else "sign"),)

    def spectral_bound(self) -> Tensor:
        return self.log_decay.exp()

    def _operator(self, size: int) -> Operator:
        value = self.log_decay.exp() if self.sign is None else self.log_decay.exp() * self.sign
        return Diagonal(value.expand(size))

    @classmethod
    def from_values(cls, values: Tensor) -> ScalarGate:
        """The gate with these factors (*lead), which may be negative; zero stands for the least number above it."""
        return cls(*_polar(values))


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalGate(Transition):
    """``Diag(s e^g)``: one decay a key channel (GLA, HGRN2; complex and constant: S4D, DSS, S5).

    Args:
        log_decay: g, (*lead, dk); complex for rotating channels, whose imaginary part is the angle.
        sign: s, (*lead, dk) of 1 and -1; None for 1, and for a complex g.
    """

    kind: ClassVar[str] = "diagonal gate"
    log_decay: Tensor
    sign: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sign is not None:
            _check(self.kind, not self.log_decay.is_complex(), "signs of a complex gate", "them in the imaginary part")
            _check(
                self.kind, self.sign.shape == self.log_decay.shape, f"sign {tuple(self.sign.shape)}", "that of decay"
            )

    @property
    def size(self) -> int:
        return self.log_decay.shape[-1]

    @property
    def is_diagonal(self) -> bool:
        return True

    def microsteps(self) -> tuple[Microstep, ...]:
        if self.log_decay.is_complex():
            return (Microstep(self.log_decay.real, frame=self.log_decay.imag, frame_kind="phase"),)
        sign = None if self.sign is None else self.sign.detach()
        return (Microstep(self.log_decay, frame=sign, frame_kind=None if sign is None else "sign"),)

    def spectral_bound(self) -> Tensor:
        return _real(self.log_decay).amax(-1).exp()

    def values(self) -> Tensor:
        """The diagonals, (*lead, dk)."""
        return self.log_decay.exp() if self.sign is None else self.log_decay.exp() * self.sign

    def dense(self, size: int | None = None) -> Tensor:
        self._sized(size)
        return torch.diag_embed(self.values())

    def _operator(self, size: int) -> Operator:
        return Diagonal(self.values())

    @classmethod
    def from_values(cls, values: Tensor) -> DiagonalGate:
        """The gate with these real diagonals (*lead, dk), which may be negative (``2 e^{dt A} - 1``: Grazzi et al. 2025,
        "Unlocking state-tracking in linear RNNs through negative eigenvalues"); zero stands for the least number above it.
        """
        return cls(*_polar(values))


@dataclass(frozen=True, eq=False, repr=False)
class Rotation(Transition):
    """Rotations of the channel pairs (2i, 2i + 1). A scan with a constant angle is rotary position embedding.

    Args:
        angle: (*lead, dk / 2), radians.
    """

    kind: ClassVar[str] = "rotation"
    angle: Tensor

    @property
    def size(self) -> int:
        return 2 * self.angle.shape[-1]

    def microsteps(self) -> tuple[Microstep, ...]:
        return (Microstep(frame=self.angle, frame_kind="rotation"),)

    def spectral_bound(self) -> Tensor:
        return self.angle.new_ones(self.lead)

    def _operator(self, size: int) -> Operator:
        cos, sin = self.angle.cos(), self.angle.sin()
        blocks = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
        return BlockDiagonal(blocks, size, size)


@dataclass(frozen=True, eq=False, repr=False)
class Householder(Transition):
    """``I - beta k k^T``: the delta rule's erase (DeltaNet); a reflection where ``beta |k|^2 = 2``.

    Args:
        key: k, (*lead, dk).
        strength: beta, (*lead); the eigenvalue ``1 - beta |k|^2`` is in [-1, 1] where ``0 <= beta |k|^2 <= 2``.
    """

    kind: ClassVar[str] = "householder transition"
    key: Tensor
    strength: Tensor

    def __post_init__(self) -> None:
        _check(
            self.kind,
            _lead_of(key=(self.key, 1), strength=(self.strength, 0)),
            f"key {tuple(self.key.shape)} and strength {tuple(self.strength.shape)}",
            "(..., dk) and (...)",
        )

    @property
    def size(self) -> int:
        return self.key.shape[-1]

    def microsteps(self) -> tuple[Microstep, ...]:
        return (Microstep(a=self.key, w=self.strength[..., None] * self.key),)

    def spectral_bound(self) -> Tensor:
        return (1 - self.strength * self.key.square().sum(-1)).abs().clamp_min(1)

    def _operator(self, size: int) -> Operator:
        write = (-self.strength * self.key)[:, None]
        return add(IdentityOperator(size), BlockLowRank.low_rank(write, self.key[None]))


@dataclass(frozen=True, eq=False, repr=False)
class HouseholderProduct(Transition):
    """``H_n ... H_2 H_1`` with ``H_j = I - beta_j k_j k_j^T``: DeltaProduct's transition (Siems et al. 2025).

    Args:
        keys: (*lead, n, dk); ``keys[..., 0, :]`` acts first.
        strengths: (*lead, n).
    """

    kind: ClassVar[str] = "householder product"
    trailing: ClassVar[int] = 2
    keys: Tensor
    strengths: Tensor

    def __post_init__(self) -> None:
        _check(
            self.kind,
            _lead_of(keys=(self.keys, 1), strengths=(self.strengths, 0)) and self.keys.dim() > 1,
            f"keys {tuple(self.keys.shape)} and strengths {tuple(self.strengths.shape)}",
            "(..., n, dk) and (..., n)",
        )

    @property
    def size(self) -> int:
        return self.keys.shape[-1]

    def microsteps(self) -> tuple[Microstep, ...]:
        erased = self.strengths[..., None] * self.keys
        return tuple(Microstep(a=a, w=w) for a, w in zip(self.keys.unbind(-2), erased.unbind(-2), strict=True))

    def spectral_bound(self) -> Tensor:
        return (1 - self.strengths * self.keys.square().sum(-1)).abs().clamp_min(1).prod(-1)

    def _operator(self, size: int) -> Operator:
        parts = [Householder(key, beta)._operator(size) for key, beta in zip(self.keys, self.strengths, strict=True)]
        return compose(*reversed(parts))


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalPlusLowRank(Transition):
    """``Diag(e^g) + sum_i b_i a_i^T``: rank one is RWKV-7's transition and covers every delta rule.

    Scans of rank one run chunk by chunk in the compact form; of a higher rank, on dense matrices.

    Args:
        log_decay: g, (*lead, dk).
        a: (*lead, dk), or (*lead, rank, dk): what is read.
        b: like a: where it is written.
    """

    kind: ClassVar[str] = "diagonal plus low rank"
    log_decay: Tensor
    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in (self.log_decay, self.a, self.b)]
        extra = self.a.dim() - self.log_decay.dim()
        _check(
            self.kind,
            self.a.shape == self.b.shape
            and extra in (0, 1)
            and shapes[0][:-1] == shapes[1][: self.a.dim() - 1 - extra]
            and shapes[0][-1] == shapes[1][-1],
            f"log_decay {shapes[0]}, a {shapes[1]} and b {shapes[2]}",
            "(..., dk) and twice (..., dk) or (..., rank, dk)",
        )

    @property
    def size(self) -> int:
        return self.log_decay.shape[-1]

    @property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The factors (a, b) with the axis of the rank."""
        one = self.a.dim() == self.log_decay.dim()
        return (self.a[..., None, :], self.b[..., None, :]) if one else (self.a, self.b)

    def microsteps(self) -> tuple[Microstep, ...] | None:
        a, b = self._pairs
        if a.shape[-2] != 1:
            return None
        return (Microstep(self.log_decay, a=a[..., 0, :], w=-b[..., 0, :], after_decay=False),)

    def spectral_bound(self) -> Tensor:
        a, b = self._pairs
        lengths: Tensor = (a.norm(dim=-1) * b.norm(dim=-1)).sum(-1)
        return self.log_decay.amax(-1).exp() + lengths

    def dense(self, size: int | None = None) -> Tensor:
        self._sized(size)
        a, b = self._pairs
        return torch.diag_embed(self.log_decay.exp()) + b.mT @ a

    def _operator(self, size: int) -> Operator:
        a, b = self._pairs
        return add(Diagonal(self.log_decay.exp()), BlockLowRank.low_rank(b.mT, a))


@dataclass(frozen=True, eq=False, repr=False)
class DenseTransition(Transition):
    """Any matrices.

    Args:
        matrix: (*lead, dk, dk).
    """

    kind: ClassVar[str] = "dense transition"
    trailing: ClassVar[int] = 2
    matrix: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.matrix.shape)
        _check(self.kind, len(shape) > 1 and shape[-1] == shape[-2], f"matrix {shape}", "(..., dk, dk)")

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    def spectral_bound(self) -> Tensor:
        # ||A||_2^2 <= ||A||_1 ||A||_inf: a bound without a singular value.
        entries = self.matrix.abs()
        return (entries.sum(-1).amax(-1) * entries.sum(-2).amax(-1)).sqrt()

    def dense(self, size: int | None = None) -> Tensor:
        self._sized(size)
        return self.matrix

    def _operator(self, size: int) -> Operator:
        return Dense(self.matrix)


@dataclass(frozen=True, eq=False, repr=False)
class Composed(Transition):
    """``parts[0] @ parts[1] @ ...``: the last part acts first. Written ``T1 @ T2``."""

    kind: ClassVar[str] = "composed transition"
    parts: tuple[Transition, ...]

    def __post_init__(self) -> None:
        sizes = {part.size for part in self.parts} - {None}
        _check(self.kind, len(sizes) <= 1, f"sizes {sorted(s for s in sizes if s)}", "one size")

    @property
    def lead(self) -> tuple[int, ...]:
        return _broadcast(*(part.lead for part in self.parts))

    @property
    def size(self) -> int | None:
        return next((part.size for part in self.parts if part.size is not None), None)

    @property
    def is_diagonal(self) -> bool:
        return all(part.is_diagonal for part in self.parts)

    @property
    def is_time_invariant(self) -> bool:
        return all(part.is_time_invariant for part in self.parts)

    def map(self, function: Callable[[Tensor], Tensor]) -> Composed:
        return Composed(tuple(part.map(function) for part in self.parts))

    def expand(self, batch: int, time: int, heads: int) -> Composed:
        return Composed(tuple(part.expand(batch, time, heads) for part in self.parts))

    def select(self, batch: int, head: int) -> Composed:
        return Composed(tuple(part.select(batch, head) for part in self.parts))

    def with_time(self) -> Composed:
        return Composed(tuple(part.with_time() for part in self.parts))

    def microsteps(self) -> tuple[Microstep, ...] | None:
        found: list[Microstep] = []
        for part in reversed(self.parts):
            steps = part.microsteps()
            if steps is None:
                return None
            for step in steps:
                merged = _merge(found[-1], step) if found else None
                found[-1:] = [merged] if merged is not None else [*found[-1:], step]
        frames = {step.frame_kind for step in found} - {None}
        if len(frames) > 1 or ("rotation" in frames and not all(step.scalar_decay for step in found)):
            return None  # the frames do not commute with the decays: only dense matrices say what happens
        return tuple(found)

    def spectral_bound(self) -> Tensor:
        bound = self.parts[0].spectral_bound()
        for part in self.parts[1:]:
            bound = bound * part.spectral_bound()
        return bound

    def dense(self, size: int | None = None) -> Tensor:
        n = self._sized(size)
        full = self.parts[0].dense(n)
        for part in self.parts[1:]:
            next_ = part.dense(n)
            dtype = torch.promote_types(full.dtype, next_.dtype)
            full = full.to(dtype) @ next_.to(dtype)
        return full

    def at(self, *index: int, size: int | None = None) -> Operator:
        self._indexed(index)
        n = self._sized(size)
        parts = [part.at(*index[len(index) - len(part.lead) :], size=n) for part in self.parts]
        if any(factor.is_complex() for part in parts for factor in part.factors().values()):
            # A product of operators computes in the dtype of its real factors.
            full = torch.eye(n, dtype=torch.complex128)
            for part in reversed(parts):
                matrix = part.dense()
                full = matrix.to(torch.complex128) @ full.to(matrix.device)
            return Dense(full)
        return compose(*parts)


def _merge(first: Microstep, then: Microstep) -> Microstep | None:
    """``then @ first`` as one micro-step, or None where it takes two."""
    if then.frame is not None:
        # The frame of one micro-step acts before its decay; past an erase, or past other decays, it cannot be moved.
        if first.frame is not None or first.a is not None or not (first.scalar_decay or then.frame_kind != "rotation"):
            return None
        first = dataclasses.replace(first, frame=then.frame, frame_kind=then.frame_kind)
    if first.log_decay is None or then.log_decay is None:
        decay = then.log_decay if first.log_decay is None else first.log_decay
    else:
        decay = first.log_decay + then.log_decay
    if then.a is None:
        if first.w is None or then.log_decay is None:
            return dataclasses.replace(first, log_decay=decay)
        if first.log_decay is not None and first.after_decay:
            return None
        # D2 (D1 - w a^T) = D2 D1 - (D2 w) a^T
        return dataclasses.replace(first, log_decay=decay, w=first.w * _decay(then), after_decay=False)
    if first.a is not None:
        return None
    if first.log_decay is None or then.log_decay is None or then.after_decay:
        # With one decay, (I - w a^T) D1; with both, (I - w a^T) D2 D1.
        after = then.after_decay or then.log_decay is None
        return dataclasses.replace(first, log_decay=decay, a=then.a, w=then.w, after_decay=after)
    # (D2 - w a^T) D1 = D2 D1 - w (D1 a)^T
    return dataclasses.replace(first, log_decay=decay, a=then.a * _decay(first), w=then.w, after_decay=False)


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _decay(step: Microstep) -> Tensor:
    assert step.log_decay is not None
    return step.log_decay.clamp_min(LOWEST).exp()


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _polar(values: Tensor) -> tuple[Tensor, Tensor]:
    sign = torch.where(values < 0, -1.0, 1.0).to(values)
    return values.abs().clamp_min(torch.finfo(values.dtype).tiny).log(), sign
