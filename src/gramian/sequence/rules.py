"""Decays and rules: how projected inputs become one step of a recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError, nearest
from gramian.sequence.inputs import Streams, split_axes, widened
from gramian.sequence.transitions import (
    DiagonalGate,
    DiagonalPlusLowRank,
    Householder,
    HouseholderProduct,
    Identity,
    Rotation,
    ScalarGate,
    Transition,
)

# Decays --------------------------------------------------------------------------------------------------------------


class Decay(Protocol):
    """Log decays of a layer's streams."""

    def __call__(self, streams: Streams) -> Tensor:
        """(batch, time, heads), (batch, time, heads, dk) or (heads,); at most 0."""


class ConstantDecay(nn.Module):
    """One decay a head, the same at every step.

    Args:
        log_decay: (heads,).
        trained: whether it is a parameter.
    """

    log_decay: Tensor

    def __init__(self, log_decay: Tensor, *, trained: bool = False) -> None:
        super().__init__()
        if trained:
            self.log_decay = nn.Parameter(log_decay)
        else:
            self.register_buffer("log_decay", log_decay)

    def forward(self, streams: Streams) -> Tensor:
        """(heads,)."""
        return self.log_decay.clamp_max(0)


class SelectiveDecay(nn.Module):
    """``-exp(rate) softplus(stream + bias)``: Mamba-2's ``dt A``, with the step sizes ``dt`` at hand.

    Args:
        heads: H.
        key_dim: dk for one decay a channel; None for one a head.
        stream: which to read; H or H dk channels.
        rates: smallest and largest ``exp(rate)`` at the start.
        steps: smallest and largest dt at the start.
    """

    def __init__(
        self,
        heads: int,
        key_dim: int | None = None,
        *,
        stream: str = "decay",
        rates: tuple[float, float] = (1.0, 16.0),
        steps: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        self.key_dim, self.stream = key_dim, stream
        self.rate = nn.Parameter(torch.empty(heads).uniform_(*rates).log())
        low, high = (math.log(step) for step in steps)
        step = torch.empty(heads * (key_dim or 1)).uniform_(low, high).exp()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def step(self, streams: Streams) -> Tensor:
        """dt, (batch, time, H) or (batch, time, H, dk), in float32 or wider."""
        raw = streams[self.stream]
        dt = F.softplus(widened(raw) + widened(self.bias))
        return dt if self.key_dim is None else split_axes(dt, -1, self.key_dim)

    def forward(self, streams: Streams) -> Tensor:
        """(batch, time, H) or (batch, time, H, dk)."""
        rate = widened(self.rate).exp()
        return -(rate if self.key_dim is None else rate[:, None]) * self.step(streams)


class SigmoidDecay(nn.Module):
    """``logsigmoid(stream) / temperature``, one decay a channel (GLA; Liger, where the stream is the key).

    Args:
        key_dim: dk.
        stream: which to read; H dk channels.
        temperature: 16 in the papers.
    """

    def __init__(self, key_dim: int, *, stream: str = "decay", temperature: float = 16.0) -> None:
        super().__init__()
        self.key_dim, self.stream, self.temperature = key_dim, stream, temperature

    def forward(self, streams: Streams) -> Tensor:
        """(batch, time, H, dk)."""
        return split_axes(F.logsigmoid(widened(streams[self.stream])), -1, self.key_dim) / self.temperature


# Rules: streams -> one step of a recurrence --------------------------------------------------------------------------


class Recurrence(NamedTuple):
    """What a rule hands to the scan."""

    transition: Transition
    key: Tensor | None
    """(batch, time, heads, [n,] dk); None where the transition's erase says where to write."""
    value: Tensor
    """(batch, time, heads, [n,] dv)."""
    read: Tensor
    """(batch, time, heads, dk)."""
    skip: Tensor | None = None
    """Added to the outputs before the norm."""
    bonus: Tensor | None = None
    """Added after the norm."""


Rule = Callable[[Tensor, Tensor, Tensor, Streams], Recurrence]
"""(q, k, v, streams) -> Recurrence; q, k (batch, time, heads, dk) after the feature maps, v (batch, time, heads, dv)."""


class GatedRule(nn.Module):
    """Linear attention with a decay: ``S_t = gate_t S_{t-1} + k_t v_t^T``.

    Args:
        decay: None for none.
        angles: (dk / 2,) of a rotation a step (rotary positions), or None.
        signed: gates ``2 e^g - 1`` in (-1, 1) in place of ``e^g`` (Grazzi et al. 2025).
        discretised: values are scaled by the decay's step sizes and ``skip * v`` is added (Mamba-2).
        heads: H, with `discretised` only.
    """

    angles: Tensor | None

    def __init__(
        self,
        decay: Decay | None = None,
        *,
        angles: Tensor | None = None,
        signed: bool = False,
        discretised: bool = False,
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.decay, self.signed = decay, signed
        self.register_buffer("angles", angles)
        self.skip = nn.Parameter(torch.ones(heads)) if discretised else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, streams: Streams) -> Recurrence:
        """See ``Rule``."""
        transition = _gate(self.decay, streams, self.signed)
        if self.angles is not None:
            transition = Rotation(self.angles.expand(q.shape[2], -1)) @ transition
        if self.skip is None:
            return Recurrence(transition, k, v, q)
        assert isinstance(self.decay, SelectiveDecay)
        step = self.decay.step(streams)[..., None]
        return Recurrence(transition, k, v * step.to(v.dtype), q, skip=v * self.skip[:, None].to(v.dtype))


def _gate(decay: Decay | None, streams: Streams, signed: bool = False) -> Transition:
    if decay is None:
        return Identity()
    g = decay(streams)
    kind = DiagonalGate if g.dim() == 4 else ScalarGate
    return kind.from_values(2 * g.exp() - 1) if signed else kind(g)


BETAS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "two_sigmoid": lambda x: 2 * torch.sigmoid(x),
    "hard": lambda x: (x / 3 + 1).clamp(0, 2),  # 2 hardsigmoid(x), whose gradient in torch is rounded to float32
}
"""How strongly a key is erased: in (0, 1); in (0, 2), so that eigenvalues reach below 0; in [0, 2], both ends included
(2 exactly is a reflection, which keeps a state for ever: what extrapolates on parity).
"""


class DeltaRule(nn.Module):
    """``S_t = H_n ... H_1 gate_t S_{t-1}`` with ``H_j = I - beta_j k_j k_j^T``, each writing ``beta_j k_j v_j^T``.

    Args:
        beta: a name of ``BETAS``; the stream "beta" has heads * n channels.
        decay: None for none; it acts first.
        householders: n; with more than one, keys and values have n dk and n dv channels a head.
    """

    def __init__(self, *, beta: str = "sigmoid", decay: Decay | None = None, householders: int = 1) -> None:
        super().__init__()
        if beta not in BETAS:
            raise GramianError(f"beta {beta!r} is unknown{nearest(beta, BETAS)}; expected one of {', '.join(BETAS)}")
        self.beta, self.decay, self.householders = beta, decay, householders

    def forward(self, q: Tensor, k: Tensor, v: Tensor, streams: Streams) -> Recurrence:
        """See ``Rule``."""
        beta = BETAS[self.beta](widened(streams["beta"]))
        n = self.householders
        erase: Transition
        if n == 1:
            erase = Householder(k, beta.to(k.dtype))
        else:
            v, beta = split_axes(v, n, -1), split_axes(beta, -1, n)
            erase = HouseholderProduct(k, beta.to(k.dtype))
        return Recurrence(erase @ _gate(self.decay, streams), None, v, q)


class GooseRule(nn.Module):
    """RWKV-7's generalised delta rule: ``S_t = (Diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T``.

    With ``w = exp(-e^{-1/2} sigmoid(.))``, kappa the unit vector of ``k * removal``, ``k~ = k (1 + (a - 1) * replacement)``
    and the bonus ``(r . (rho * k~)) v`` after the norm. Streams "decay" and "rate" (a, before its sigmoid).

    Args:
        heads: H.
        key_dim: dk.
    """

    def __init__(self, heads: int, key_dim: int) -> None:
        super().__init__()
        self.removal = nn.Parameter(torch.full((heads, key_dim), 0.85))
        self.replacement = nn.Parameter(torch.ones(heads, key_dim))
        self.bonus = nn.Parameter(torch.full((heads, key_dim), -0.04))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, streams: Streams) -> Recurrence:
        """See ``Rule``."""
        shape = self.removal.shape
        decay = -math.exp(-0.5) * torch.sigmoid(split_axes(widened(streams["decay"]), *shape))
        rate = torch.sigmoid(split_axes(streams["rate"], *shape))
        kappa = F.normalize(k * self.removal.to(k.dtype), dim=-1)
        key = k * (1 + (rate - 1) * self.replacement.to(k.dtype))
        bonus = (q * key * self.bonus.to(k.dtype)).sum(-1, keepdim=True) * v
        return Recurrence(DiagonalPlusLowRank(decay, -kappa, kappa * rate), key, v, q, bonus=bonus)
