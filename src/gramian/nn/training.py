"""Training structured layers: learning rates a factor, a dense guide, and dense phases before or after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.nn.exchange import exchange
from gramian.nn.initialise import linear_layers
from gramian.nn.prepared_linear import is_plain_linear
from gramian.nn.structured_linear import StructuredLinear, as_linear


def rate_multipliers(layer: StructuredLinear, base_width: int | None = None) -> dict[str, float]:
    """By factor, what to multiply the learning rate of a dense layer with (Adam; Qiu et al. 2024, "Compute Better Spent",
    section 3.3: ``(in / fan_in of the core) / number of cores``).

    Args:
        layer: factors of two or more dimensions (..., fan_out, fan_in) are cores; others keep the base rate.
        base_width: the width at which the base rate was tuned; the rate of hidden layers falls as ``base_width / in``
            (maximal update parametrisation). None: no correction for width.
    """
    cores = {name: value for name, value in layer.op.trainable().items() if value.dim() >= 2}
    width = 1.0 if base_width is None else base_width / layer.in_features
    out = dict.fromkeys(layer.op.trainable(), 1.0)
    for name, value in cores.items():
        out[name] = width * layer.in_features / max(value.shape[-1], 1) / len(cores)
    return out


def parameter_groups(model: nn.Module, rate: float, *, base_width: int | None = None) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: structured factors with their own learning rates, everything else at `rate`.

    Args:
        model: with ``StructuredLinear`` layers.
        rate: of a dense layer (of width `base_width`, where that is given: then ``nn.Linear`` weights are corrected too).
        base_width: see ``rate_multipliers``.

    Returns:
        One group for each learning rate: ``params``, ``lr``, and ``names`` for the reader.
    """
    rates: dict[int, float] = {}
    for _, layer in linear_layers(model):
        if isinstance(layer, StructuredLinear):
            for factor, multiplier in rate_multipliers(layer, base_width).items():
                rates[id(layer._holder(factor).weight)] = rate * multiplier
        elif base_width is not None:
            rates[id(layer.weight)] = rate * base_width / layer.in_features
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = rates.get(id(parameter), rate)
            group = groups.setdefault(own, {"params": [], "lr": own, "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def warm_up_cosine(step: int, steps: int, warm: int, *, floor: float = 0.0) -> float:
    """Multiple of the peak learning rate at a step, counted from 0: up over `warm` steps, then by a cosine down to `floor`."""
    if step < warm:
        return (step + 1) / warm
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class SelfGuided(nn.Module):
    """A structured layer guided by a dense one early in training (Wei et al. 2024, "Building on Efficient Foundations",
    section 3.3): ``a W x + (1 - a) A x``, W starting at A's matrix, a falling from 1 to 0 by a cosine over the first part
    of training; then W is dropped. The structure's poor early loss surface is so bypassed.

    Args:
        layer: the structured layer.
        steps: training steps in all.
        share: of the steps that are guided.
        skip: leave W out of a step with probability 1 - a, to save its operations (the paper's ``reduce_flop``).
    """

    def __init__(self, layer: StructuredLinear, steps: int, *, share: float = 0.5, skip: bool = False) -> None:
        super().__init__()
        if steps < 1 or not 0 < share <= 1:
            raise GramianError(f"SelfGuided: steps {steps}, share {share}; expected steps >= 1 and 0 < share <= 1")
        self.layer = layer
        self.guide = nn.Parameter(layer.op.dense().detach().to(layer.weight.dtype).clone())
        self.steps, self.share, self.skip = steps, share, skip
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self.taken: Tensor

    @property
    def weight_of_guide(self) -> float:
        """Of the guide at this step: a."""
        progress = int(self.taken) / (self.steps * self.share)
        return 0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """As the structured layer; each forward pass in training mode counts as a step."""
        a = self.weight_of_guide
        if self.training:
            self.taken += 1
        y: Tensor = self.layer(x)
        if a == 0 or (self.training and self.skip and float(torch.rand(())) > a):
            return y
        guided = F.linear(x, self.guide, self.layer.bias)
        return a * guided + (1 - a) * y


def guide(model: nn.Module, steps: int, *, share: float = 0.5, skip: bool = False) -> list[str]:
    """Put a ``SelfGuided`` around every structured layer of `model`, in place; call before making the optimizer.

    Returns:
        The names of the layers.
    """
    names = [name for name, layer in linear_layers(model) if isinstance(layer, StructuredLinear)]
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, StructuredLinear)
        exchange(model, layer, SelfGuided(layer, steps, share=share, skip=skip))
    return names


def unguide(model: nn.Module) -> list[str]:
    """Take the guides away again, in place: what is left is the structured model.

    Returns:
        The names of the layers.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SelfGuided)]
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, SelfGuided)
        exchange(model, module, module.layer)
    return names


def to_dense(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Multiply structured layers out, in place, to go on training dense ("reverse sparsification": Dao et al. 2022,
    "Monarch", section 4.2). Make a new optimizer afterwards and keep the learning-rate schedule.

    Args:
        model: its structured layers become ``nn.Linear``.
        names: which; all by default.

    Returns:
        The names of the layers.
    """
    found = [name for name, layer in linear_layers(model) if isinstance(layer, StructuredLinear)]
    chosen = found if names is None else list(names)
    for name in chosen:
        if name not in found:
            raise GramianError(f"to_dense: {name!r} is not a structured layer; expected one of {', '.join(found)}")
        layer = model.get_submodule(name)
        assert isinstance(layer, StructuredLinear)
        exchange(model, layer, layer.to_linear())
    return chosen


def to_structured(
    model: nn.Module, kind: str, sizes: Mapping[str, Mapping[str, Any]] | None = None, **size: Any
) -> list[str]:
    """Project dense layers on a structure, in place: a dense warm start, then structured training.

    Args:
        model: its ``nn.Linear`` layers become structured ones.
        kind: a registered structure.
        sizes: by layer name what the structure's ``sizes`` lists; only these layers change. None: all, with `size`.
        size: of every layer, where `sizes` is None.

    Returns:
        The names of the layers.
    """
    from gramian.fitting import fit

    layers = {name: layer for name, layer in linear_layers(model) if is_plain_linear(layer)}
    chosen = dict.fromkeys(layers, size) if sizes is None else dict(sizes)
    for name, own in chosen.items():
        if name not in layers:
            raise GramianError(f"to_structured: {name!r} is not an nn.Linear; expected one of {', '.join(layers)}")
        layer = layers[name]
        assert isinstance(layer, nn.Linear)
        op = fit(layer.weight.detach(), kind, **own).op
        exchange(model, layer, as_linear(op, None if layer.bias is None else layer.bias.detach()))
    return list(chosen)
