"""What a mixer carries and is told, and what it feeds its core: projections, token shift, short convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def split_axes(x: Tensor, *sizes: int) -> Tensor:
    """The last axis as several."""
    return x.reshape(*x.shape[:-1], *sizes)


def widened(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_scale(like: Tensor) -> float:
    """Below every exponent, and such that differences stay finite: the running maximum of no keys."""
    return torch.finfo(like.dtype).min / 4
