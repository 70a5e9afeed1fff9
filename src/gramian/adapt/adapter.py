"""The axes that every structured fine-tuning method is a point on.

An *edit* changes one linear layer ``y = W x + b``. With an update U and its frozen start U0, both Operators, and a gain g::

    D = g (U - U0)        add           W + D
                          left          (I + D) W
                          right         W (I + D)
                          two_sided     (I + D_out) W (I + D_in),   U = BlockDiag((U_out, U_in))
                          elementwise   W * (1 + D)
                          insert        y + g (up f(down y + b1) + b2),   U = Product((up, down))

The base model's W is never written to. A start that is not zero (singular vectors of W, an identity) is kept beside the
update and subtracted, so that a disabled or detached adapter leaves the very bits that were there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramian.adapt.combine import ACTIVATIONS, COMBINES
from gramian.errors import GramianError, nearest
from gramian.ops import Operator

if TYPE_CHECKING:
    from gramian.adapt.attach import Adapted
    from gramian.adapt.layer import Edit


@dataclass(frozen=True)
class Context:
    """What a start may know of the layer it is made for, besides its weight.

    Args:
        name: dotted name of the layer.
        shape: (out, in).
        rank: asked for at this layer.
        gain: g of this layer at the end of the ramp; a start that must give ``g U0`` divides by it.
        generator: the only source of random numbers, on the CPU, seeded by the run's seed and the layer's name: a layer
            starts the same whatever other layers are adapted.
        role: last part of the name ("q_proj").
        index, count: place among the adapted layers of this role, and how many those are.
        gradient: dL/dW (out, in) summed over the data, as a tensor or as an Operator (a low-rank sketch of it).
        gram_in: (in, in) second moment of the inputs, or its diagonal (in,).
        gram_out: (out, out) second moment of the output gradients, or its diagonal.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    gain: float
    generator: torch.Generator
    role: str = ""
    index: int = 0
    count: int = 1
    gradient: Tensor | Operator | None = None
    gram_in: Tensor | None = None
    gram_out: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """Where the update of one layer begins.

    Args:
        update: U; its factors are copied.
        start: U0, subtracted and frozen; None for zero. The very object `update` stands for the update's own first
            value; a cheaper operator that equals it is welcome (``Identity`` for an orthogonal one).
        biases: b1 (inner,) and b2 (out,) of an insert; () for none.
    """

    update: Operator
    start: Operator | None = None
    biases: tuple[Tensor, ...] = ()


def everywhere(context: Context) -> Hashable:
    """Share key: one array for all layers (of one shape)."""
    return ()


def by_role(context: Context) -> Hashable:
    """Share key: one array for all layers of the same role, such as all "q_proj"."""
    return context.role


def by_group(groups: int) -> Callable[[Context], Hashable]:
    """Share key: the layers of a role are cut into `groups` contiguous groups with one array each."""

    def key(context: Context) -> Hashable:
        return context.role, context.index * groups // max(context.count, 1)

    return key


@dataclass(frozen=True)
class Adapter:
    """A fine-tuning method: one value for each axis.

    Args:
        start: (weight (out, in) in float32 or float64, context) -> where the update begins.
        combine: how the update meets the weight; see the module.
        alpha: the gain is ``alpha / rank ** power`` ; None for a gain of 1.
        power: 1 for LoRA's rule, 0.5 for rsLoRA's, 0 for alpha itself.
        ramp: steps over which the gain rises linearly from 0 (SingLoRA's u(t)); counted by ``Adapted.step``.
        trainable: shell-style patterns of the update's factors that train; the others are frozen.
        share: pattern of factors -> share key of a layer. Layers that give the same key for a factor of the same name
            and shape hold one array, the first layer's.
        dropout: probability of dropping an input coordinate on the way to the update, while training.
        perturb: update -> update, while training: random masks of its factors.
        activation: f of an insert: "gelu", "relu", "silu", "tanh".
        penalty: edit -> scalar to add to the loss (``Adapted.penalty``).
        rates: pattern of factors -> multiple of the learning rate (LoRA+).
        optimizer: (adapted, learning rate) -> optimizer; None for AdamW.
        needs: statistics that `start` uses: "gradient", "sketch" (the best approximation of the gradient of twice the rank,
            made without the whole), "gram_in", "gram_out".
        recipe: name under which this was made, for the record.

    Raises:
        GramianError: an unknown value, or a gain that is not positive and finite.
    """

    start: Callable[[Tensor, Context], Start | Operator]
    combine: str = "add"
    alpha: float | None = None
    power: float = 1.0
    ramp: int = 0
    trainable: tuple[str, ...] = ("*",)
    share: Mapping[str, Callable[[Context], Hashable]] = field(default_factory=dict)
    dropout: float = 0.0
    perturb: Callable[[Operator], Operator] | None = None
    activation: str | None = None
    penalty: Callable[[Edit], Tensor] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    optimizer: Callable[[Adapted, float], torch.optim.Optimizer] | None = None
    needs: frozenset[str] = frozenset()
    recipe: str = ""

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise GramianError(
                f"adapter: combine {self.combine!r}{nearest(self.combine, COMBINES)}; known: {', '.join(COMBINES)}"
            )
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise GramianError(f"adapter: alpha {self.alpha}; expected a positive finite number")
        if not 0 <= self.dropout < 1:
            raise GramianError(f"adapter: dropout {self.dropout}; expected at least 0 and below 1")
        if self.ramp < 0:
            raise GramianError(f"adapter: ramp {self.ramp} steps; expected at least 0")
        if (self.activation is not None) != (self.combine == "insert") or self.activation not in {None, *ACTIVATIONS}:
            raise GramianError(
                f"adapter: combine {self.combine!r} with activation {self.activation!r}; expected one of "
                f"{', '.join(ACTIVATIONS)} with 'insert' and none otherwise"
            )
        unknown = self.needs - {"gradient", "sketch", "gram_in", "gram_out"}
        if unknown:
            raise GramianError(f"adapter: needs {sorted(unknown)}; known: gradient, sketch, gram_in, gram_out")

    def gain(self, rank: int, alpha: float | None = None) -> float:
        """``alpha / rank ** power``; 1 without alpha."""
        alpha = self.alpha if alpha is None else alpha
        return 1.0 if alpha is None else float(alpha / rank**self.power)


def as_start(made: Any, name: str) -> Start:
    """What a start function returned, as a Start.

    Raises:
        GramianError: it is neither.
    """
    if isinstance(made, Operator):
        return Start(made)
    if not isinstance(made, Start):
        raise GramianError(f"layer {name}: the start gave a {type(made).__name__}; expected a Start or an Operator")
    return made
