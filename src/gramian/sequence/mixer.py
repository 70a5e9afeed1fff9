"""One sequence mixer: projections, a short convolution, something that mixes over time, and what follows it.

    x -> streams (linear, after a token shift) -> short convolution -> activation -> core -> norm, gate -> linear

A published layer is a choice of these parts (``recipes``). Every mixer runs whole sequences and, with a state of fixed
size, token by token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError, nearest
from gramian.sequence.features import ExponentialFeatures, FeatureMap
from gramian.sequence.long_convolution import FiniteFilter
from gramian.sequence.scan import scan
from gramian.sequence.state_space import DiagonalStateSpace
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

Streams = Mapping[str, Tensor]
"""Projected inputs by name, each (batch, time, channels)."""


@dataclass(frozen=True)
class MixerState:
    """What a mixer carries from one call to the next.

    Args:
        inputs: the last tokens that the token shift and the short convolution look back at.
        core: what the core carries: a scan's state, a state space's, or a filter's past.
    """

    inputs: tuple[Tensor, ...]
    core: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> MixerState:
        """With `function` applied to every tensor; the first axis of each is the batch."""
        return MixerState(tuple(map(function, self.inputs)), tuple(map(function, self.core)))

    def detach(self) -> MixerState:
        """Cut from the graph, for truncated backpropagation."""
        return self.map(Tensor.detach)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.inputs, *self.core))


class Layout(NamedTuple):
    """Which tokens are real. Padding is at the end of each row here, whatever the caller's mask."""

    keep: Tensor | None = None
    """(batch, time) of bool, or None for all."""
    segments: Tensor | None = None
    """(batch, time): the number changes where another sequence starts."""

    @property
    def lengths(self) -> Tensor | None:
        """(batch,), how many tokens are real."""
        return None if self.keep is None else self.keep.sum(1)


# Looking back a few tokens -------------------------------------------------------------------------------------------


def look_back(x: Tensor, past: Tensor | None, count: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """X with the `count` tokens before it, and the last `count` real ones.

    Args:
        x: (batch, time, channels).
        past: (batch, count, channels), or None for zeros.
        count: how far to look.
        layout: of the rows.

    Returns:
        (batch, count + time, channels) and (batch, count, channels).
    """
    past = x.new_zeros(x.shape[0], count, x.shape[2]) if past is None else past.to(x.dtype)
    long = torch.cat([past, x], 1)
    if layout.lengths is None:
        return long, long[:, long.shape[1] - count :]
    places = layout.lengths[:, None] + torch.arange(count, device=x.device)
    return long, long.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


class ShortConvolution(nn.Module):
    """Causal depthwise convolution, one filter of `width` taps a channel.

    Args:
        channels: C.
        width: taps.
        bias: whether there is one.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, past: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """x: (batch, time, C) -> the same, and the last ``width - 1`` inputs."""
        time, reach = x.shape[1], self.width - 1
        long, last = look_back(x, past, reach, layout)
        y = x * self.weight[:, reach].to(x.dtype)
        for lag in range(1, reach + 1):
            seen = long[:, reach - lag : reach - lag + time]
            if layout.segments is not None and lag < time:
                same = F.pad(layout.segments[:, lag:] == layout.segments[:, :-lag], (lag, 0))
                same[:, :lag] = layout.segments[:, :lag] == layout.segments[:, :1]  # the past belongs to the first one
                seen = seen * same[..., None]
            y = y + seen * self.weight[:, reach - lag].to(x.dtype)
        return (y if self.bias is None else y + self.bias.to(y.dtype)), last


class Inputs(nn.Module):
    """Streams of a sequence: ``activation(convolution(projection(x)))``.

    Args:
        projections: by name, each (..., dim) -> (..., channels).
        convolution: taps of the short convolution; 0 for none.
        convolved: names of the streams that it and the activation act on, in this order; their channels are `channels`.
        channels: of the convolved streams.
        activation: "silu" or None.
        shift: a token shift before every projection, ``x_t + mu * (x_{t-1} - x_t)`` with a trained mu (..., dim).
        dim: of x, with `shift` only.
        bias: of the convolution.
    """

    def __init__(
        self,
        projections: Mapping[str, nn.Module],
        *,
        convolution: int = 0,
        convolved: Collection[str] = (),
        channels: int = 0,
        activation: str | None = None,
        shift: bool = False,
        dim: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(projections)
        self.convolved, self.activation = tuple(convolved), activation
        self.convolution = ShortConvolution(channels, convolution, bias=bias) if convolution else None
        self.shift = nn.ParameterDict({name: torch.rand(dim) for name in projections}) if shift else None

    def forward(
        self, x: Tensor, past: tuple[Tensor, ...], layout: Layout
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """x: (batch, time, dim) -> the streams, and the tokens to look back at."""
        taken, kept = list(past), []
        streams: dict[str, Tensor] = {}
        if self.shift is None:
            streams = {name: project(x) for name, project in self.projections.items()}
        else:
            long, last = look_back(x, taken.pop(0) if taken else None, 1, layout)
            kept.append(last)
            before = long[:, :-1]
            if layout.segments is not None:
                before = (
                    before * F.pad(layout.segments[:, 1:] == layout.segments[:, :-1], (1, 0), value=True)[..., None]
                )
            for name, project in self.projections.items():
                streams[name] = project(x + (before - x) * self.shift[name].to(x.dtype))
        if self.convolution is not None:
            sizes = [streams[name].shape[-1] for name in self.convolved]
            joined = torch.cat([streams[name] for name in self.convolved], -1)
            joined, last = self.convolution(joined, taken.pop(0) if taken else None, layout)
            kept.append(last)
            streams.update(zip(self.convolved, torch.split(joined, sizes, -1), strict=True))
        if self.activation == "silu":
            streams.update({name: F.silu(streams[name]) for name in self.convolved})
        return streams, tuple(kept)


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
        dt = F.softplus(_wide(raw) + _wide(self.bias))
        return dt if self.key_dim is None else _split(dt, -1, self.key_dim)

    def forward(self, streams: Streams) -> Tensor:
        """(batch, time, H) or (batch, time, H, dk)."""
        rate = _wide(self.rate).exp()
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
        return _split(F.logsigmoid(_wide(streams[self.stream])), -1, self.key_dim) / self.temperature


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
        beta = BETAS[self.beta](_wide(streams["beta"]))
        n = self.householders
        erase: Transition
        if n == 1:
            erase = Householder(k, beta.to(k.dtype))
        else:
            v, beta = _split(v, n, -1), _split(beta, -1, n)
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
        decay = -math.exp(-0.5) * torch.sigmoid(_split(_wide(streams["decay"]), *shape))
        rate = torch.sigmoid(_split(streams["rate"], *shape))
        kappa = F.normalize(k * self.removal.to(k.dtype), dim=-1)
        key = k * (1 + (rate - 1) * self.replacement.to(k.dtype))
        bonus = (q * key * self.bonus.to(k.dtype)).sum(-1, keepdim=True) * v
        return Recurrence(DiagonalPlusLowRank(decay, -kappa, kappa * rate), key, v, q, bonus=bonus)


# Cores: what mixes over time -----------------------------------------------------------------------------------------


class Core(Protocol):
    """Streams to outputs (batch, time, heads, dv), a bonus for after the norm (or None), and what to carry."""

    packs: bool
    """Whether it takes packed rows as they are."""

    def __call__(
        self, streams: Streams, carried: tuple[Tensor, ...], layout: Layout
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Run the tokens of `streams` after what was carried."""


class Recurrent(nn.Module):
    """A scan of the rule's transitions over the streams "q", "k" and "v".

    Args:
        heads: H; q and k may have fewer (each then serves equally many heads in a row).
        key_dim: dk of q and k, before the feature maps.
        rule: streams -> transition, key, value, read.
        features: of q and k; None for none.
        temperature: factor of q and k before the feature maps, or None.
        scale: factor of q after them, or None.
        normalise: divide by the sum of the weights, carried as one more value channel. Exponential features are kept in
            range by the running maximum of the keys' exponents, a scalar gate: exact, and of the past alone.
        method: of ``scan``.
        chunk: of ``scan``.
    """

    def __init__(
        self,
        heads: int,
        key_dim: int,
        rule: Rule,
        *,
        features: FeatureMap | None = None,
        temperature: float | None = None,
        scale: float | None = None,
        normalise: bool = False,
        method: str = "auto",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.rule = heads, key_dim, rule
        self.features, self.temperature, self.scale, self.normalise = features, temperature, scale, normalise
        self.method, self.chunk = method, chunk
        self.exponential = isinstance(features, ExponentialFeatures)
        self.packs = not self.exponential
        if self.exponential and not (normalise and isinstance(rule, GatedRule)):
            raise GramianError("exponential features need a normalised output and a rule without erasure")

    def forward(
        self, streams: Streams, carried: tuple[Tensor, ...], layout: Layout
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """See ``Core``."""
        v = _split(streams["v"], self.heads, -1)
        q, k = (self._heads(streams[name]) for name in ("q", "k"))
        if self.temperature is not None:
            q, k = q * self.temperature, k * self.temperature
        state = carried[0] if carried else None
        shift: Tensor | None = None
        top: tuple[Tensor, ...] = ()
        if self.exponential:
            q, k, shift, top = self._exponential(q, k, carried[1] if carried else None, layout)
        elif self.features is not None:
            q, k = self.features(q), self.features(k)
        if self.scale is not None:
            q = q * self.scale
        made: Recurrence = self.rule(q, k, v, streams)
        transition = made.transition if shift is None else made.transition @ ScalarGate(shift)
        value = made.value
        if self.normalise:
            value = torch.cat([value, value.new_ones(*value.shape[:-1], 1)], -1)
        method = "recurrent" if v.shape[1] == 1 and self.method == "auto" else self.method
        write = value if made.key is None else (made.key, value)
        out, state = scan(
            transition, write, made.read, state, method, chunk=self.chunk, mask=layout.keep, segments=layout.segments
        )
        if self.normalise:
            total = out[..., -1:]
            out = out[..., :-1] / torch.where(total == 0, torch.ones_like(total), total)
        return (out if made.skip is None else out + made.skip), made.bonus, (state, *top)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, time, channels) -> (batch, time, heads, [n,] dk)."""
        n = self.rule.householders if isinstance(self.rule, DeltaRule) else 1
        x = _split(x, -1, self.key_dim)
        if n > 1 and x.shape[-2] == self.heads * n:
            return x.reshape(*x.shape[:2], self.heads, n, self.key_dim)
        groups = x.shape[-2]
        return x if groups == self.heads else x.repeat_interleave(self.heads // groups, -2)

    def _exponential(
        self, q: Tensor, k: Tensor, top: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Features of q over their largest, of k over the largest of all keys so far; the log decays that change from one
        such scale to the next; the scale to carry, (batch, heads).
        """
        assert isinstance(self.features, ExponentialFeatures)
        read, write = (self.features.exponents(_wide(x)) for x in (q, k))
        read = (read - read.detach().amax(-1, keepdim=True)).exp()
        largest = write.detach().amax(-1)
        if layout.keep is not None:
            largest = largest.masked_fill(~layout.keep[..., None], _no_scale(largest))
        before = largest[:, :1] if top is None else top[:, None]
        scales = torch.cat([before, largest], 1).cummax(1).values
        write = (write - scales[:, 1:, :, None]).clamp_max(0.0).exp()
        return read.to(q.dtype), write.to(k.dtype), scales[:, :-1] - scales[:, 1:], (scales[:, -1],)


class Filter(nn.Module):
    """A convolution or a state space, the same at every step, over the stream "v"; with "q" and "k" the gated form
    ``q * filter(k * v)`` (Hyena, H3, Monarch Mixer).

    Args:
        filter: (batch, time, channels), state, lengths -> the same and a state.
    """

    packs = False

    def __init__(self, filter: FiniteFilter | DiagonalStateSpace) -> None:
        super().__init__()
        self.filter = filter

    def forward(
        self, streams: Streams, carried: tuple[Tensor, ...], layout: Layout
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """See ``Core``; one head."""
        u = streams["v"] if "k" not in streams else streams["k"] * streams["v"]
        if layout.keep is not None:
            u = u * layout.keep[..., None]
        y, state = self.filter(u, carried[0] if carried else None, layout.lengths)
        return (streams["q"] * y if "q" in streams else y)[..., None, :], None, (state,)


class ThirdOrder(nn.Module):
    """Attention of every token to all pairs of tokens up to it, by features (Alman and Song 2024, "How to capture
    higher-order correlations? Generalizing matrix softmax attention to Kronecker computation"):
    ``o_t = q_t^T ((K1 (/) K2)^T (V1 (/) V2)) / sum``, (/) the column-wise Kronecker product over pairs. By
    ``(K1 (/) K2)^T (V1 (/) V2) = (K1^T V1) * (K2^T V2)`` the pairs are never formed: two linear-attention states, multiplied
    entry by entry. Streams "q", "k", "v", "k2", "v2".

    Args:
        heads: H.
        features: positive, of q, k and k2.
        chunk: tokens whose states are held at once.
    """

    packs = False

    def __init__(self, heads: int, features: FeatureMap, *, chunk: int = 16) -> None:
        super().__init__()
        self.heads, self.features, self.chunk = heads, features, chunk

    def forward(
        self, streams: Streams, carried: tuple[Tensor, ...], layout: Layout
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """See ``Core``."""
        parts = {name: _split(streams[name], self.heads, -1) for name in _THIRD}
        q, keys = self.features(_wide(parts["q"])), [self.features(_wide(parts[name])) for name in ("k", "k2")]
        if layout.keep is not None:
            keys = [key * layout.keep[..., None, None] for key in keys]
        values = [F.pad(_wide(parts[name]), (0, 1), value=1.0) for name in ("v", "v2")]
        states = list(carried) or [q.new_zeros(q.shape[0], *q.shape[2:], value.shape[-1]) for value in values]
        outputs = []
        for start in range(0, q.shape[1], self.chunk):
            piece = slice(start, start + self.chunk)
            for i in range(2):
                written = keys[i][:, piece, :, :, None] * values[i][:, piece, :, None, :]
                written = torch.cat([states[i][:, None], written], 1).cumsum(1)
                states[i] = written[:, -1]
                outputs.append(written[:, 1:])
            second, first = outputs.pop(), outputs.pop()
            outputs.append((q[:, piece, :, None] @ (first * second))[..., 0, :])
        out = torch.cat(outputs, 1)
        total = out[..., -1:]
        out = out[..., :-1] / torch.where(total == 0, torch.ones_like(total), total)
        return out.to(streams["v"].dtype), None, tuple(states)


_THIRD = ("q", "k", "v", "k2", "v2")


class BlockAttention(nn.Module):
    """Causal softmax attention within blocks of tokens, none across (TransNormer's DiagAttention).

    Args:
        heads: H.
        block: tokens in a block; what a decoder holds.
    """

    packs = False

    def __init__(self, heads: int, block: int = 64) -> None:
        super().__init__()
        self.heads, self.block = heads, block

    def forward(
        self, streams: Streams, carried: tuple[Tensor, ...], layout: Layout
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """See ``Core``."""
        now = torch.cat([streams[name] for name in ("q", "k", "v")], -1)
        batch, time, _ = now.shape
        size, device = self.block, now.device
        # Rows start inside a block: (batch, size) tokens held and how many of them are real.
        held = carried[0].to(now.dtype) if carried else now.new_zeros(batch, size, now.shape[-1])
        filled = carried[1] if carried else torch.zeros(batch, dtype=torch.long, device=device)
        place = torch.arange(size + time, device=device)
        source = torch.where(place < filled[:, None], place, size + place - filled[:, None]).clamp_max(size + time - 1)
        rows = torch.cat([held, now], 1).gather(1, source[..., None].expand(-1, -1, now.shape[-1]))
        count = -(-(size + time) // size)
        padded = F.pad(rows, (0, 0, 0, count * size - rows.shape[1]))
        q, k, v = (
            x.reshape(batch, count, size, self.heads, -1).transpose(2, 3)
            for x in torch.split(padded, [streams[name].shape[-1] for name in ("q", "k", "v")], -1)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(2, 3).flatten(1, 2)
        taken = filled[:, None] + torch.arange(time, device=device)
        out = out.gather(1, taken[..., None, None].expand(-1, -1, *out.shape[2:]))
        total = filled + (time if layout.lengths is None else layout.lengths)
        start = total // size * size
        kept = (start[:, None] + torch.arange(size, device=device)).clamp_max(padded.shape[1] - 1)
        held = padded.gather(1, kept[..., None].expand(-1, -1, now.shape[-1]))
        return out, None, (held, total - start)


# After the core ------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu}


class Output(nn.Module):
    """Norm, gate and projection of a core's outputs.

    Args:
        projection: (..., heads * dv) -> (..., dim), or twice that with `glu`.
        heads: H.
        value_dim: dv.
        norm: "rms", "layer" (with mean and bias) or None.
        over_heads: one norm over all heads in place of one a head.
        gate: activation of the stream "gate": a name of ``ACTIVATIONS``, "linear", or None for no gate.
        gate_first: gate before the norm (Mamba-2).
        activation: of what enters the projection, or None.
        glu: gated linear unit after the projection.
        eps: of the norm.
    """

    def __init__(
        self,
        projection: nn.Module,
        heads: int,
        value_dim: int,
        *,
        norm: str | None = "rms",
        over_heads: bool = False,
        gate: str | None = None,
        gate_first: bool = False,
        activation: str | None = None,
        glu: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if norm not in ("rms", "layer", None):
            raise GramianError(f"norm {norm!r}; expected 'rms', 'layer' or None")
        self.projection, self.norm, self.over_heads = projection, norm, over_heads
        self.gate, self.gate_first, self.activation, self.glu, self.eps = gate, gate_first, activation, glu, eps
        self.weight = None
        self.bias = None
        if norm is not None:
            # Norms of heads share one weight where it is a plain scale, as in the papers; with a bias each has its own.
            shape = (heads, value_dim) if over_heads or norm == "layer" else (value_dim,)
            self.weight = nn.Parameter(torch.ones(shape))
            self.bias = nn.Parameter(torch.zeros(shape)) if norm == "layer" else None

    def forward(self, x: Tensor, bonus: Tensor | None, streams: Streams) -> Tensor:
        """x: (batch, time, heads, dv) -> (batch, time, dim)."""
        gate = self._gate(streams, x) if self.gate is not None else None
        if gate is not None and self.gate_first:
            x = x * gate
        x = self._normed(x)
        x = x if bonus is None else x + bonus
        if gate is not None and not self.gate_first:
            x = x * gate
        x = x.flatten(-2)
        x = x if self.activation is None else ACTIVATIONS[self.activation](x)
        x = self.projection(x)
        return F.glu(x, -1) if self.glu else x

    def _gate(self, streams: Streams, like: Tensor) -> Tensor:
        gate = streams["gate"]
        gate = gate if self.gate == "linear" or self.gate is None else ACTIVATIONS[self.gate](gate)
        return _split(gate, *like.shape[-2:])

    def _normed(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        assert self.weight is not None
        y, axes = _wide(x), (-2, -1) if self.over_heads else (-1,)
        if self.norm == "layer":
            y = y - y.mean(axes, keepdim=True)
        y = y * (y.square().mean(axes, keepdim=True) + self.eps).rsqrt() * _wide(self.weight)
        return (y if self.bias is None else y + _wide(self.bias)).to(x.dtype)


# The mixer -----------------------------------------------------------------------------------------------------------


class SequenceMixer(nn.Module):
    """A layer that mixes over time, causally: sequences in parallel, or token by token with a state of fixed size.

    Args:
        inputs: x to streams.
        core: streams to outputs.
        output: outputs to y.
    """

    def __init__(self, inputs: Inputs, core: Core, output: Output) -> None:
        super().__init__()
        self.inputs, self.core, self.output = inputs, core, output

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, MixerState]:
        """Outputs of a sequence, and the state after it.

        Args:
            x: (batch, time, dim).
            state: of the tokens before; None at the start.
            mask: (batch, time) of bool, False at padding, wherever it is: the layer is as if those tokens were not there,
                and gives zero for them.
            segments: (batch, time) of integers, for several sequences packed in a row: a new one starts where the number
                changes. `state` belongs to the first, what is returned to the last.

        Returns:
            y (batch, time, dim) and the state.

        Raises:
            GramianError: shapes that do not fit.
        """
        if x.dim() != 3:
            raise GramianError(
                f"SequenceMixer: x {tuple(x.shape)}; expected (batch, time, dim); step() takes single tokens"
            )
        for name, given in (("mask", mask), ("segments", segments)):
            if given is not None and given.shape != x.shape[:2]:
                raise GramianError(f"SequenceMixer: {name} {tuple(given.shape)}; expected {tuple(x.shape[:2])}")
        if x.shape[1] == 0:
            raise GramianError("SequenceMixer: a sequence without tokens; expected at least one")
        if segments is not None:  # consecutive numbers: two sequences may have the same one
            segments = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)).long().cumsum(1)
        if mask is not None:
            return self._masked(x, state, mask.bool(), segments)
        if segments is not None and not getattr(self.core, "packs", False):
            return self._unpacked(x, state, segments)
        return self._run(x, state, Layout(None, segments))

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """One token. x: (batch, dim); state: of the tokens before, None at the start. Returns y (batch, dim) and the state."""
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state

    def _run(self, x: Tensor, state: MixerState | None, layout: Layout) -> tuple[Tensor, MixerState]:
        streams, inputs = self.inputs(x, state.inputs if state else (), layout)
        with torch.autocast(x.device.type, enabled=False):  # a core picks its own precision
            y, bonus, core = self.core(streams, state.core if state else (), layout)
        return self.output(y, bonus, streams), MixerState(inputs, core)

    def _masked(
        self, x: Tensor, state: MixerState | None, mask: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        """Real tokens first, in order; back to their places afterwards."""
        order = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices
        back = order.argsort(1)

        def moved(tensor: Tensor, places: Tensor) -> Tensor:
            return tensor.gather(1, places[..., None].expand(-1, -1, tensor.shape[2]))

        keep = mask.gather(1, order)
        x = moved(x, order) * keep[..., None]  # padding may hold anything finite
        if segments is not None:
            last = (keep.sum(1, keepdim=True) - 1).clamp_min(0)
            segments = segments.gather(1, order)
            segments = torch.where(keep, segments, segments.gather(1, last))
            if not getattr(self.core, "packs", False):
                y, state = self._unpacked(x, state, segments, keep)
                return moved(y * keep[..., None], back), state
        y, state = self._run(x, state, Layout(keep, segments))
        return moved(y * keep[..., None], back), state

    def _unpacked(
        self, x: Tensor, state: MixerState | None, segments: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, MixerState]:
        """Packed sequences as rows of their own."""
        batch, time, dim = x.shape
        starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        row = starts.flatten().cumsum(0) - 1  # (batch * time,): which sequence a token belongs to
        first = starts.flatten().nonzero()[:, 0]
        place = torch.arange(batch * time, device=x.device) - first[row]
        count, longest = len(first), int(place.max()) + 1
        rows = x.new_zeros(count, longest, dim).index_put((row, place), x.flatten(0, 1))
        real = torch.zeros(count, longest, dtype=torch.bool, device=x.device)
        real[row, place] = True if keep is None else keep.flatten()
        opening, closing = row[::time], row[time - 1 :: time]
        if state is not None:
            state = state.map(lambda tensor: tensor.new_zeros(count, *tensor.shape[1:]).index_copy(0, opening, tensor))
            if isinstance(self.core, Recurrent) and self.core.exponential:
                scale = torch.full_like(state.core[1], _no_scale(state.core[1]))
                scale = scale.index_copy(0, opening, state.core[1][opening])
                state = dataclasses.replace(state, core=(state.core[0], scale))
        y, state = self._run(rows, state, Layout(real))
        return y[row, place].reshape(batch, time, -1), state.map(lambda tensor: tensor[closing])


def _split(x: Tensor, *sizes: int) -> Tensor:
    """The last axis as several."""
    return x.reshape(*x.shape[:-1], *sizes)


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _no_scale(like: Tensor) -> float:
    """Below every exponent, and such that differences stay finite: the running maximum of no keys."""
    return torch.finfo(like.dtype).min / 4
