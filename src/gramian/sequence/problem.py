"""A scan's inputs, checked and in one shape: what every method starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.sequence.transitions import LOWEST, Microstep, Transition, turn


@dataclass(frozen=True)
class Problem:
    """One recurrence with n micro-steps a step.

    Args:
        steps: the normal form, its tensors (batch, time, heads, ...); None where there is none.
        matrices: (batch, time, heads, dk, dk) where there is no normal form.
        key: (batch, time, heads, n, dk), None for the transition's own erase.
        value: (batch, time, heads, n, dv).
        read: (batch, time, heads, dk).
        state: (batch, heads, dk, dv).
        constant: (k, q), each (heads, dk), where both are the same at every step.
        constant_transition: the transition is the same at every step.
    """

    steps: tuple[Microstep, ...] | None
    matrices: Tensor | None
    key: Tensor | None
    value: Tensor
    read: Tensor
    state: Tensor
    constant: tuple[Tensor, Tensor] | None
    constant_transition: bool

    @classmethod
    def make(
        cls, transition: Transition, key: Tensor | None, value: Tensor, read: Tensor, state: Tensor | None
    ) -> Problem:
        """Check the shapes and bring everything to one dtype: float32, or wider where something is."""
        if value.dim() not in (4, 5):
            raise GramianError(
                f"scan: values {tuple(value.shape)}; expected (batch, time, heads, dv), or (batch, time, heads, n, dv) for "
                "the n factors of a product"
            )
        batch, time, heads = value.shape[:3]
        size = read.shape[-1]
        if tuple(read.shape) not in ((batch, time, heads, size), (heads, size)):
            raise GramianError(
                f"scan: read {tuple(read.shape)}; expected {(batch, time, heads, 'dk')} or {(heads, 'dk')} beside values "
                f"{tuple(value.shape)}"
            )
        own = transition._sized(size)
        steps = transition.expand(batch, time, heads).microsteps() if time else transition.microsteps()
        matrices = transition.dense(own).expand(batch, time, heads, own, own) if steps is None else None
        factors = value.shape[3] if value.dim() == 5 else 1
        count = 1 if steps is None else len(steps)
        if value.dim() == 5 and factors != count:
            raise GramianError(f"scan: values for {factors} factors; the transition has {count}")
        if key is None and (steps is None or factors != count or any(step.w is None for step in steps)):
            raise GramianError(
                "scan: write=v alone needs a transition that erases (Householder, HouseholderProduct, DiagonalPlusLowRank "
                f"of rank one) and one value for each of its {count} factors; found {type(transition).__name__} and values "
                f"{tuple(value.shape)}. Give write=(k, v)"
            )
        constant = None
        if key is not None:
            wanted = (*value.shape[:-1], size)
            if key.dim() == 2 and read.dim() == 2:
                constant = (key, read)
            if tuple(key.shape) not in (wanted, (heads, size)):
                raise GramianError(f"scan: write key {tuple(key.shape)}; expected {wanted} or {(heads, size)}")
            if key.dim() == 2:
                key = key if value.dim() == 4 else key[:, None]
                key = key.expand(wanted)
        if state is None:
            state = value.new_zeros(batch, heads, size, value.shape[-1])
        elif tuple(state.shape) != (batch, heads, size, value.shape[-1]):
            raise GramianError(
                f"scan: state {tuple(state.shape)}; expected (batch, heads, dk, dv) = "
                f"{(batch, heads, size, value.shape[-1])}"
            )
        tensors = [x for x in (key, value, read, state, matrices) if x is not None]
        tensors += [x for s in steps or () for x in (s.log_decay, s.a, s.w) if x is not None]
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        if any(s.frame_kind == "phase" for s in steps or ()):
            dtype = torch.promote_types(dtype, torch.complex64)
        real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        if value.dim() == 4:
            value = _last(value, count)
            key = None if key is None else _last(key, count)
        return cls(
            None
            if steps is None
            else tuple(
                dataclasses.replace(
                    s,
                    log_decay=None if s.log_decay is None else s.log_decay.to(real),
                    frame=None if s.frame is None else s.frame.to(real),
                    a=None if s.a is None else s.a.to(dtype),
                    w=None if s.w is None else s.w.to(dtype),
                )
                for s in steps
            ),
            None if matrices is None else matrices.to(dtype),
            None if key is None else key.to(dtype),
            value.to(dtype),
            read.expand(batch, time, heads, size).to(dtype),
            state.to(dtype),
            constant,
            transition.is_time_invariant,
        )

    def flipped(self) -> Problem:
        """The same, from the last step to the first."""
        return self._map(lambda tensor: tensor.flip(1))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        return dataclasses.replace(
            self,
            steps=None if self.steps is None else tuple(step.map(function) for step in self.steps),
            matrices=None if self.matrices is None else function(self.matrices),
            key=None if self.key is None else function(self.key),
            value=function(self.value),
            read=function(self.read),
        )

    def masked(self, mask: Tensor) -> Problem:
        """Padding (False in `mask`, (batch, time)) changes nothing."""
        if mask.shape != self.value.shape[:2]:
            raise GramianError(
                f"scan: mask {tuple(mask.shape)}; expected (batch, time) = {tuple(self.value.shape[:2])}"
            )
        keep = mask[:, :, None, None]
        steps, matrices = self.steps, self.matrices
        if steps is not None:
            steps = tuple(
                dataclasses.replace(
                    step,
                    log_decay=None if step.log_decay is None else step.log_decay.masked_fill(~keep, 0.0),
                    w=None if step.w is None else step.w * keep,
                    frame=None
                    if step.frame is None
                    else step.frame.masked_fill(~keep, 1.0 if step.frame_kind == "sign" else 0.0),
                )
                for step in steps
            )
        if matrices is not None:
            eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
            matrices = torch.where(keep[..., None], matrices, eye)
        key = None if self.key is None else self.key * keep[..., None]
        return dataclasses.replace(
            self, steps=steps, matrices=matrices, key=key, constant=None, constant_transition=False
        )

    def segmented(self, segments: Tensor) -> Problem:
        """The state is forgotten before a step whose number in `segments` (batch, time) differs from the one before."""
        if segments.shape != self.value.shape[:2]:
            raise GramianError(
                f"scan: segments {tuple(segments.shape)}; expected (batch, time) = {tuple(self.value.shape[:2])}"
            )
        start = torch.zeros_like(segments, dtype=torch.bool)
        start[:, 1:] = segments[:, 1:] != segments[:, :-1]
        start = start[:, :, None, None]
        steps, matrices = self.steps, self.matrices
        if matrices is not None:
            matrices = matrices.masked_fill(start[..., None], 0.0)
        if steps is not None:
            first = steps[0]
            decay = first.log_decay
            if decay is None:
                decay = torch.zeros(*self.value.shape[:3], 1, dtype=self.real, device=self.value.device)
            a = first.a
            if a is not None and not first.after_decay:
                a = a.masked_fill(start, 0.0)
            steps = (dataclasses.replace(first, log_decay=decay.masked_fill(start, LOWEST), a=a), *steps[1:])
        return dataclasses.replace(self, steps=steps, matrices=matrices, constant=None, constant_transition=False)

    def checked(self, transition: Transition) -> None:
        """Raise a GramianError where the recurrence can grow or has NaN."""
        for name, tensor in (("write key", self.key), ("value", self.value), ("read", self.read)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise GramianError(f"scan: the {name} has NaN or Inf")
        bound = transition.spectral_bound()
        worst = float(bound.max()) if bound.numel() else 0.0
        if not worst <= 1 + 1e-3:
            raise GramianError(
                f"scan: a transition may have spectral norm {worst:.4g}; expected at most 1: log decays at most 0 and "
                "0 <= strength |key|^2 <= 2 (normalise the keys)"
            )

    @property
    def real(self) -> torch.dtype:
        """The dtype of decays and angles."""
        return torch.float64 if self.value.dtype in (torch.float64, torch.complex128) else torch.float32

    @property
    def writes(self) -> list[tuple[Tensor | None, Tensor]]:
        """(k, v) of each micro-step, (batch, time, heads, d); k None for the erase's own."""
        values = self.value.unbind(3)
        keys = [None] * len(values) if self.key is None else self.key.unbind(3)
        return list(zip(keys, values, strict=True))

    def normal(self) -> Normal:
        """Heads first, micro-steps in a row, frames resolved.

        Raises:
            GramianError: the transition has no normal form.
        """
        if self.steps is None:
            raise GramianError("scan: this transition has no compact form; use method='auto', 'dense' or 'sequential'")
        steps, key, value = self.steps, self.key, self.value
        batch, time, heads, count, _ = value.shape

        def rows(tensors: list[Tensor]) -> Tensor:
            """N tensors (batch, time, heads, d) -> (batch, heads, time * n, d)."""
            return (torch.stack(tensors, 2).flatten(1, 2) if count > 1 else tensors[0]).movedim(2, 1)

        def field(name: str, filler: float = 0.0) -> Tensor | None:
            found = [getattr(step, name) for step in steps]
            known = [x for x in found if x is not None]
            if not known:
                return None
            width = max(x.shape[-1] for x in known)
            like = known[0].new_full((batch, time, heads, width), filler)
            return rows([like if x is None else x.expand(*x.shape[:-1], width) for x in found])

        decaying = [step for step in steps if step.log_decay is not None and step.a is not None]
        after = all(step.after_decay for step in decaying)
        if not after:
            steps = tuple(
                dataclasses.replace(step, a=step.a * step.log_decay.clamp_min(LOWEST).exp(), after_decay=False)
                if step.after_decay and step.a is not None and step.log_decay is not None
                else step
                for step in steps
            )
        a, w, decay = field("a"), field("w"), field("log_decay")
        kind = next((step.frame_kind for step in steps if step.frame_kind), None)
        keys = None if key is None else rows(list(key.unbind(3)))
        reads = self.read.movedim(2, 1)
        turned = None
        if kind is not None:
            frame = field("frame", 1.0 if kind == "sign" else 0.0)
            assert frame is not None
            frame = frame.cumprod(2) if kind == "sign" else frame.double().cumsum(2).remainder(2 * torch.pi).to(frame)
            # In the turned frame S = P S~: vectors go by P^-1, covectors (what reads) by P^T.
            inverse = kind == "rotation"
            keys = None if keys is None else turn(keys, frame, kind, inverse=True)
            w = None if w is None else turn(w, frame, kind, inverse=True)
            a = None if a is None else turn(a, frame, kind, inverse=inverse)
            reads = turn(reads, frame[:, :, count - 1 :: count], kind, inverse=inverse)
            turned = frame[:, :, -1:]
        values = rows(list(value.unbind(3)))
        return Normal(reads, a, w, keys, values, decay, after, count, self.state, turned, kind)


@dataclass(frozen=True)
class Normal:
    """``S <- (Diag(e^g) - w a^T) S + k v^T``, L = time * n micro-steps in a row.

    Args:
        read: (batch, heads, time, dk), after every n-th micro-step.
        a: (batch, heads, L, dk) or None.
        w: (batch, heads, L, dk) or None.
        key: (batch, heads, L, dk); None where w is the key.
        value: (batch, heads, L, dv).
        log_decay: (batch, heads, L, dk or 1) or None.
        after_decay: a reads the decayed state.
        count: n.
        state: (batch, heads, dk, dv).
        frame: (batch, heads, 1, ...): the frame of the last state.
        frame_kind: its kind.
    """

    read: Tensor
    a: Tensor | None
    w: Tensor | None
    key: Tensor | None
    value: Tensor
    log_decay: Tensor | None
    after_decay: bool
    count: int
    state: Tensor
    frame: Tensor | None
    frame_kind: str | None


def _last(tensor: Tensor, count: int) -> Tensor:
    """(batch, time, heads, d) -> (batch, time, heads, n, d), in the last place and zero before."""
    if count == 1:
        return tensor[:, :, :, None]
    zero = torch.zeros_like(tensor)
    return torch.stack((*(zero,) * (count - 1), tensor), 3)
