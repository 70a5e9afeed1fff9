"""Training block-sparse layers whose blocks come and go (Okanovic et al. 2025, "BLaST: High Performance Inference and
Pretraining using BLock Sparse Transformers").
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.nn.structured_linear import StructuredLinear
from gramian.ops import BlockSparse, from_config


class GrowAndPrune:
    """A training hook that thins block-sparse layers out while they train::

        hook = GrowAndPrune(model, optimizer, steps=1000, sparsity=0.9)
        for batch in data:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            hook.step()

    Every `every` steps each block row keeps its blocks of largest norm and regrows, at zero, the blocks whose gradient is
    largest among the rest. The share of blocks that is not kept follows
    ``s(i) = s_max + (s_init - s_max) (1 - i / (T (1 - d)))^3`` and the last change, without regrowth, comes at step
    T (1 - d); from then on the layers have the sparsity asked for.

    The gradient of a block that is not there needs the layer's input and output gradient: hooks watch them in the one
    backward pass (or passes, where gradients accumulate) before each change, and at no other time.

    The schedule and "keep by norm, regrow by gradient" are the paper's. An equal number of blocks in every block row is
    ours (it is what runs as one batched product), and so is `grow`. Parameters stay the same objects; they change their
    length, as do the tensors of that length in the optimizer's state, with zeros for new blocks. State of another form (a
    factored second moment) starts afresh. An optimizer that keeps all parameters in one flat vector (L-BFGS) and
    ``DistributedDataParallel``, which lays out its buckets in advance, cannot follow.

    Args:
        model: every ``StructuredLinear`` over a ``BlockSparse`` in it takes part, from the number of blocks it has (start
            dense with ``kept`` the number of block columns).
        optimizer: of the model's parameters, or None.
        steps: T, training steps in all.
        sparsity: s_max, share of blocks that are absent in the end; at least one block a row stays.
        every: steps between changes.
        freeze: d, share of the steps at the end without changes.
        grow: blocks regrown for each block kept. They are stored on top of the schedule until the next change.
        layers: names of the layers to take, if not all.

    Raises:
        GramianError: a setting is out of range, or there is no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        steps: int,
        sparsity: float,
        every: int = 25,
        freeze: float = 0.25,
        grow: float = 0.5,
        layers: Iterable[str] | None = None,
    ) -> None:
        if not (steps >= 1 and every >= 1 and 0 <= sparsity < 1 and 0 <= freeze < 1 and grow >= 0):
            raise GramianError(
                f"GrowAndPrune: steps {steps}, every {every}, sparsity {sparsity}, freeze {freeze}, grow {grow}; expected "
                "steps and every >= 1, sparsity and freeze in [0, 1), grow >= 0"
            )
        found = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, StructuredLinear) and module.config()["kind"] == BlockSparse.kind
        }
        chosen = list(found) if layers is None else list(layers)
        unknown = [name for name in chosen if name not in found]
        if unknown or not chosen:
            raise GramianError(
                f"GrowAndPrune: {', '.join(unknown) or 'no layer'} to thin out; found block-sparse layers: "
                f"{', '.join(found) or 'none'}. Make some with nn.structured or StructuredLinear(BlockSparse.fit(...))"
            )
        self.layers = {name: found[name] for name in chosen}
        self.optimizer = optimizer
        self.sparsity, self.every, self.grow = sparsity, every, grow
        self.last = max(1, round(steps * (1 - freeze)))
        self.taken = 0
        self._initial = {name: 1 - _op(layer).index.shape[1] / _columns(layer) for name, layer in self.layers.items()}
        self._gradients: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._watch()

    def _due(self, step: int) -> bool:
        return step == self.last or (step < self.last and step % self.every == 0)

    def target(self, name: str) -> float:
        """The share of absent blocks that the schedule asks of a layer at this step."""
        left = max(0.0, 1 - self.taken / self.last)
        return self.sparsity + (self._initial[name] - self.sparsity) * left**3

    def step(self) -> bool:
        """Call after every step of the optimizer.

        Returns:
            Whether blocks have changed.

        Raises:
            GramianError: blocks were to be regrown in a layer that took no part in the backward pass.
        """
        self.taken += 1
        due = self._due(self.taken)
        if due:
            unseen = [name for name in self.layers if name not in self._gradients]
            if self._hooks and unseen:
                raise GramianError(
                    f"GrowAndPrune: no gradient passed through layer {unseen[0]!r} before step {self.taken}; expected a "
                    "forward call and a backward pass (FeatureMajor runs past the hooks of its layers). Use grow=0, or "
                    "leave the layer out of layers"
                )
            for name, layer in self.layers.items():
                self._change(name, layer)
        self._watch()
        return due

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on; the layers' own blocks are in the model's configuration."""
        return {"taken": self.taken, "initial": dict(self._initial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.taken = int(state["taken"])
        self._initial = {name: float(state["initial"][name]) for name in self.layers}
        self._watch()

    def _watch(self) -> None:
        """Hooks on the layers if the step to come is followed by a change; none otherwise."""
        for hook in self._hooks:
            hook.remove()
        self._gradients.clear()
        self._hooks = []
        if self._due(self.taken + 1) and self.taken + 1 < self.last and self.grow > 0:
            self._hooks = [
                layer.register_forward_hook(partial(self._forward, name)) for name, layer in self.layers.items()
            ]

    def _forward(self, name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._backward, name, arguments[0].detach()))  # type: ignore[no-untyped-call]

    def _backward(self, name: str, x: Tensor, gradient: Tensor) -> None:
        found = gradient.detach().flatten(0, -2).float().mT @ x.flatten(0, -2).float()
        self._gradients[name] = self._gradients[name] + found if name in self._gradients else found

    @torch.no_grad()
    def _change(self, name: str, layer: StructuredLinear) -> None:
        op, columns = _op(layer), _columns(layer)
        r, c, height, width = op.values.shape
        kept = min(c, max(1, round((1 - self.target(name)) * columns)))
        gradient = self._gradients.get(name)
        grown = min(round(self.grow * kept), columns - kept) if gradient is not None else 0
        strongest = op.values.float().square().sum((2, 3)).topk(kept, 1).indices  # (R, kept)
        index = op.index.long().gather(1, strongest)
        source = strongest
        if grown and gradient is not None:
            tiles = F.pad(gradient, (0, columns * width - op.columns, 0, r * height - op.rows))
            energy = tiles.reshape(r, height, columns, width).square().sum((1, 3))
            fresh = energy.scatter(1, index, -1.0).topk(grown, 1).indices
            index = torch.cat([index, fresh], 1)
            source = torch.cat([source, torch.full_like(fresh, c)], 1)  # place c: the zeros appended below
        index, order = index.sort(1)
        source = source.gather(1, order)

        def moved(tensor: Tensor) -> Tensor:
            padded = torch.cat([tensor, tensor.new_zeros(r, 1, height, width)], 1)
            return padded.gather(1, source[:, :, None, None].expand(-1, -1, height, width))

        parameter = layer.get_submodule("values").weight
        assert isinstance(parameter, nn.Parameter)
        state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim():
                if value.shape != parameter.shape:
                    state.clear()
                    break
                state[key] = moved(value)
        _restructure(layer, op.replace(values=moved(parameter), index=index.to(op.index.dtype)))


def _op(layer: StructuredLinear) -> BlockSparse:
    op = layer.op
    assert isinstance(op, BlockSparse)
    return op


def _columns(layer: StructuredLinear) -> int:
    """How many block columns there are."""
    return -(-layer.in_features // _op(layer).values.shape[3])


def _restructure(layer: StructuredLinear, op: BlockSparse) -> None:
    """Give a layer an operator of the same factors with other shapes; its parameters stay the same objects."""
    for name, value in op.factors().items():
        holder = layer.get_submodule(name)
        assert isinstance(holder.weight, Tensor)
        if isinstance(holder.weight, nn.Parameter):
            # A graph that is still alive (a loss not yet thrown away) holds the node that accumulates this gradient, made
            # for the old shape; torch makes a new one when the dtype changes, if only for a moment.
            other = torch.float32 if value.dtype != torch.float32 else torch.float64
            holder.weight.data = torch.empty(0, dtype=other, device=value.device)
            holder.weight.data, holder.weight.grad = value.detach(), None
        else:
            holder.weight = value
    layer._config = op.config()
    layer._template = from_config(layer._config)
    layer._shapes = {name: tuple(value.shape) for name, value in op.factors().items()}
    layer._kept.clear()
