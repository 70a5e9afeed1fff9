"""``auto``: which structure, and of what size, each layer's update gets under one budget of trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gramian.adapt.adapter import Adapter
from gramian.adapt.attach import Adapted, attach, select
from gramian.adapt.gradients import Loss, default_loss
from gramian.adapt.initial import gradient_sketches
from gramian.adapt.layer import layer_shape
from gramian.adapt.recipes import gradient_core, surm_circulant, surm_toeplitz
from gramian.compression.knapsack import Option, solve
from gramian.errors import GramianError
from gramian.linalg import svdvals
from gramian.ops import BlockLowRank, Circulant, Operator, Toeplitz


@dataclass(frozen=True)
class Choice:
    """What one layer gets.

    Attributes:
        recipe: its name; "none" leaves the layer alone.
        rank: r.
        parameters: how many numbers train.
        captured: share of the layer's gradient (squared norm) that the update can follow.
    """

    recipe: str
    rank: int
    parameters: int
    captured: float


@dataclass(frozen=True)
class Plan:
    """Choices for a model; ``attach`` carries them out.

    Attributes:
        choices: by layer name; layers left alone are in it too.
        parameters: in all.
        captured: share of the gradient of all layers (squared norm).
        gradients: sketches that the starts use.
    """

    choices: dict[str, Choice]
    parameters: int
    captured: float
    gradients: dict[str, Operator]

    def attach(self, model: nn.Module, *, name: str = "default", seed: int = 0) -> Adapted:
        """Put the planned adapters on the model."""
        chosen = {layer: choice for layer, choice in self.choices.items() if choice.recipe != "none"}
        adapters: dict[str, Adapter] = {layer: _MAKE[choice.recipe]() for layer, choice in chosen.items()}
        ranks = {layer: choice.rank for layer, choice in chosen.items()}
        gradients = {layer: self.gradients[layer] for layer in chosen}
        return attach(model, adapters, include=tuple(chosen), rank=ranks, gradients=gradients, name=name, seed=seed)


_MAKE = {"gradient_core": gradient_core, "surm_circulant": surm_circulant, "surm_toeplitz": surm_toeplitz}


def auto(
    model: nn.Module,
    data: Iterable[Any],
    budget: int,
    *,
    loss: Loss = default_loss,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Plan:
    """Choose an update for every layer so that together they follow as much of the gradient as `budget` parameters can.

    To first order a small step along the gradient G, restricted to the directions an update can take, lowers the loss
    by the squared norm of G's projection on them. For an r x r core between G's own singular vectors that is the sum
    of r squared singular values, the eigenvalues of the gradient Gram ``G^T G``, at r^2 parameters; for a circulant or
    Toeplitz update it is the squared norm of the projection. One structure and size a layer, or none, is a
    multiple-choice knapsack, solved exactly.

    Args:
        model: left as it is.
        data: batches for the gradient.
        budget: most parameters to train.
        loss: (model, batch) -> scalar.
        include: patterns of layers, as for ``attach``.
        exclude: likewise.
        seed: of the sketches.

    Raises:
        GramianError: a budget below one parameter, or a gradient that is zero everywhere.
    """
    if budget < 1:
        raise GramianError(f"auto: budget {budget}; expected at least 1 parameter")
    layers = select(model, include, exclude)
    most = math.isqrt(budget)
    ranks = {name: min(most, *layer_shape(layer)) for name, layer in layers.items()}
    gradients = gradient_sketches(model, layers, data, rank=ranks, loss=loss, power_iterations=2, seed=seed)
    options: dict[str, list[Choice]] = {}
    totals: dict[str, float] = {}
    for name, gradient in gradients.items():
        options[name], totals[name] = _options(gradient, layer_shape(layers[name]))
    whole = sum(totals.values())
    if not whole > 0:
        raise GramianError("auto: the gradient is zero in every layer; change the data or the loss")
    groups = [
        [[[Option(choice.parameters, totals[name] / whole * (1 - choice.captured)) for choice in choices]]]
        for name, choices in options.items()
    ]
    solution = solve(groups, budget)
    chosen = {
        name: choices[picked.options[0]]
        for (name, choices), picked in zip(options.items(), solution.choices, strict=True)
    }
    return Plan(chosen, solution.cost, 1 - solution.error, gradients)


def _options(gradient: Operator, shape: tuple[int, int]) -> tuple[list[Choice], float]:
    """What a layer could get, and the squared norm of its (sketched) gradient."""
    assert isinstance(gradient, BlockLowRank)
    values = svdvals(gradient.left[0].double()).square()
    total = float(values.sum())
    found = [Choice("none", 0, 0, 0.0)]
    if not total > 0:
        return found, 0.0
    sums = (values.cumsum(0) / total).tolist()
    found += [Choice("gradient_core", r + 1, (r + 1) ** 2, min(sums[r], 1.0)) for r in range(len(sums))]
    dense: Tensor = gradient.dense()
    out, in_ = shape
    for recipe, kind, parameters in (
        ("surm_circulant", Circulant, max(out, in_) + in_),
        ("surm_toeplitz", Toeplitz, out + 3 * in_ - 2),
    ):
        projected = kind.fit(dense).dense().double().square().sum()
        found.append(Choice(recipe, 1, parameters, float(projected) / total))
    return found, total


def report(plan: Plan) -> list[Mapping[str, Any]]:
    """One JSON-able row a layer: name, recipe, rank, parameters, captured."""
    return [{"layer": name, **vars(choice)} for name, choice in plan.choices.items()]
