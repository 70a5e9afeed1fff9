"""One sequence mixer: projections, a short convolution, something that mixes over time, and what follows it.

    x -> streams (linear, after a token shift) -> short convolution -> activation -> core -> norm, gate -> linear

A published layer is a choice of these parts (``recipes``). Every mixer runs whole sequences and, with a state of fixed
size, token by token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.sequence.cores import Core, Recurrent
from gramian.sequence.inputs import Inputs, Layout, MixerState, Streams, no_scale, split_axes, widened

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
        x = x.flatten(-2).contiguous()  # convolutions give time last; gradients of two layouts take ten times as long
        x = x if self.activation is None else ACTIVATIONS[self.activation](x)
        x = self.projection(x)
        return F.glu(x, -1) if self.glu else x

    def _gate(self, streams: Streams, like: Tensor) -> Tensor:
        gate = streams["gate"]
        gate = gate if self.gate == "linear" or self.gate is None else ACTIVATIONS[self.gate](gate)
        return split_axes(gate, *like.shape[-2:])

    def _normed(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        assert self.weight is not None
        y, axes = widened(x), (-2, -1) if self.over_heads else (-1,)
        if self.norm == "layer":
            y = y - y.mean(axes, keepdim=True)
        y = y * (y.square().mean(axes, keepdim=True) + self.eps).rsqrt() * widened(self.weight)
        return (y if self.bias is None else y + widened(self.bias)).to(x.dtype)


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
                scale = torch.full_like(state.core[1], no_scale(state.core[1]))
                scale = scale.index_copy(0, opening, state.core[1][opening])
                state = dataclasses.replace(state, core=(state.core[0], scale))
        y, state = self._run(rows, state, Layout(real))
        return y[row, place].reshape(batch, time, -1), state.map(lambda tensor: tensor[closing])
