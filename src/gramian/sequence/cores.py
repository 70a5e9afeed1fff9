"""Cores: what mixes over time. A recurrence, a convolution, third-order attention, attention inside blocks."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.sequence.features import ExponentialFeatures, FeatureMap
from gramian.sequence.inputs import Layout, Streams, no_scale, split_axes, widened
from gramian.sequence.long_convolution import FiniteFilter
from gramian.sequence.rules import DeltaRule, GatedRule, Recurrence, Rule
from gramian.sequence.scan import scan
from gramian.sequence.state_space import DiagonalStateSpace
from gramian.sequence.transitions import ScalarGate


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
        v = split_axes(streams["v"], self.heads, -1)
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
        x = split_axes(x, -1, self.key_dim)
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
        read, write = (self.features.exponents(widened(x)) for x in (q, k))
        read = (read - read.detach().amax(-1, keepdim=True)).exp()
        largest = write.detach().amax(-1)
        if layout.keep is not None:
            largest = largest.masked_fill(~layout.keep[..., None], no_scale(largest))
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
        parts = {name: split_axes(streams[name], self.heads, -1) for name in _THIRD}
        q, keys = self.features(widened(parts["q"])), [self.features(widened(parts[name])) for name in ("k", "k2")]
        if layout.keep is not None:
            keys = [key * layout.keep[..., None, None] for key in keys]
        values = [F.pad(widened(parts[name]), (0, 1), value=1.0) for name in ("v", "v2")]
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
