"""Updates mixed by a gate that looks at the input: ``y = W x + g sum_i p_i(x) B_i A_i x``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gramian.adapt.adapter import Adapter, Context
from gramian.adapt.combine import COMBINES, Below, Combine
from gramian.adapt.initial import kaiming, zero_pair
from gramian.adapt.riemannian import preconditioned
from gramian.errors import GramianError
from gramian.ops import BlockDiag, Dense, Operator

if TYPE_CHECKING:
    from gramian.adapt.layer import Edit


def gate_weights(scores: Tensor, chosen: int) -> Tensor:
    """Softmax over the `chosen` largest of scores (..., E), zero elsewhere: (..., E)."""
    if chosen < scores.shape[-1]:
        least = scores.topk(chosen, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores.softmax(-1)


def mixed(outputs: list[Tensor], weights: Tensor, *, rescaled: bool) -> Tensor:
    """``sum_i p_i E_i``.

    Args:
        outputs: E_i, (..., out) each.
        weights: p, (..., E).
        rescaled: let the gradient reach expert i scaled by ``sqrt(p_i)`` in place of ``p_i``. An expert's step moves
        the sum
            by the square of the scale, so that this is what makes the step of the whole proportional to ``p_i``
            (MoE-LoRA with Riemannian preconditioning, 2025). The value and the gate's gradient stay the same.
    """
    total: Tensor | None = None
    for i, output in enumerate(outputs):
        p = weights[..., i, None]
        if rescaled:
            root = p.clamp_min(1e-12).sqrt().detach()
            term = root * output + (p - root) * output.detach()
        else:
            term = p * output
        total = term if total is None else total + term
    assert total is not None
    return total


def _forward(edit: Edit, below: Below, x: Tensor, *, chosen: int | None = None) -> Tensor:
    y = below(x)
    gate, *experts = edit.update.op.parts  # type: ignore[attr-defined]
    z = edit.dropped(x)
    weights = gate_weights(gate.apply(z), chosen or len(experts))
    delta = mixed([expert.apply(z) for expert in experts], weights, rescaled=True)
    return torch.add(y, delta.to(y.dtype), alpha=edit.gain)


def _shape(update: Operator, shape: tuple[int, int]) -> str:
    fits = isinstance(update, BlockDiag) and len(update.parts) > 1
    if fits:
        gate, *experts = update.parts  # type: ignore[attr-defined]
        fits = gate.shape == (len(experts), shape[1]) and all(expert.shape == shape for expert in experts)
    return "" if fits else f"expected BlockDiag of a gate (experts, {shape[1]}) and experts {shape[0]} x {shape[1]}"


COMBINES["mixture"] = Combine(_shape, _forward, None)
COMBINES["mixture_top2"] = Combine(_shape, partial(_forward, chosen=2), None)


def start_mixture(weight: Tensor, context: Context, *, experts: int) -> Operator:
    """A gate by Kaiming's rule, and experts ``B A`` with B = 0."""
    gate = kaiming(experts, context.shape[1], context.generator)
    return BlockDiag((Dense(gate), *(zero_pair(weight, context) for _ in range(experts))))


def moe_lora(experts: int = 4, alpha: float = 16.0, sparse: bool = False, damping: float = 1e-6) -> Adapter:
    """MoE-LoRA with Riemannian preconditioning (2025, "A stronger mixture of low-rank experts for fine-tuning
    foundation models"): ``y = W x + s sum_i p_i(x) B_i A_i x``. Gradients of a pair are multiplied by the inverse
    Grams of the other factor, and reach expert i scaled by ``sqrt(p_i)``.

    Departures: pairs are found by their structure, not by the order of parameters; AdamW takes the preconditioned
    gradients.

    Args:
        experts: how many.
        alpha: gain times rank.
        sparse: only the best two experts of an input take part.
        damping: d of the preconditioner.
    """
    if experts < 2:
        raise GramianError(f"moe_lora: {experts} experts; expected at least 2")
    return Adapter(
        partial(start_mixture, experts=experts),
        combine="mixture_top2" if sparse else "mixture",
        alpha=alpha,
        optimizer=partial(preconditioned, damping=damping),
        recipe="moe_lora",
    )
