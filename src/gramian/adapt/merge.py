"""Folding adapters into plain layers, with an account of what rounding loses."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gramian.adapt.attach import exchange
from gramian.adapt.combine import COMBINES
from gramian.adapt.layer import AdaptedLinear, base_operator
from gramian.errors import GramianError
from gramian.models.walk import is_conv1d
from gramian.nn import StructuredLinear, as_linear
from gramian.nn.prepared_linear import is_plain_linear
from gramian.ops import Operator

if TYPE_CHECKING:
    from gramian.adapt.attach import Adapted

LIMIT = 0.05
"""Largest share of an update that a merge may lose to rounding without being told that it may."""
NO_CHANGE = 1e-6
"""An update smaller than this share of its weight is what rounding leaves of an adapter that was not trained."""


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        loss: layer -> ``||stored - (W + D)||_F / ||D||_F``: the share of its change that rounding to the layer's dtype
            lost; 0 where the layer did not change.
    """

    loss: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest loss of a layer."""
        return max(self.loss.values(), default=0.0)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {loss:.2%} of the update lost to rounding" for name, loss in self.loss.items())


@torch.no_grad()
def merge(adapted: Adapted, *, lossy: bool = False, dense: bool = False) -> Merged:
    """Put a plain layer with the edited matrix in the place of each adapted layer, all active edits taken in.

    The matrix is made in float64 and rounded once, to the dtype of the layer's weight. A ``StructuredLinear`` stays one,
    over its operator and the update. The layers with their adapters are kept for ``unmerge``.

    Args:
        adapted: the adapter.
        lossy: accept that rounding loses more than 5 % of a layer's update.
        dense: turn quantised layers into dense ones of float32, and structured ones into dense ones.

    Raises:
        GramianError: already merged, a ramp that is not over, an edit that is no matrix, values that are not finite, a
            tied weight, a quantised layer without `dense`, or a loss above 5 % without `lossy`. Nothing is merged then.
    """
    if adapted._merged:
        raise GramianError(f"adapter {adapted.name!r} is merged already")
    owners: dict[int, int] = {}
    for module in adapted.model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    made: dict[str, nn.Module] = {}
    loss: dict[str, float] = {}
    for name, layer in adapted.layers.items():
        if isinstance(layer.weight, nn.Parameter) and owners.get(id(layer.weight), 0) > 1:
            raise GramianError(
                f"layer {name}: its weight is tied to another layer's, which merging would change or untie"
            )
        made[name], loss[name] = _merged_layer(name, layer, dense)
    report = Merged(loss)
    bad = max(loss, key=lambda name: loss[name], default="")
    if bad and loss[bad] > LIMIT and not lossy:
        above = sum(value > LIMIT for value in loss.values())
        raise GramianError(
            f"layer {bad}: rounding to {_dtype(made[bad])} would lose {loss[bad]:.0%} of its update ({above} of {len(loss)} "
            f"layers lose more than {LIMIT:.0%}); merge a float32 model, keep the adapter apart, or pass lossy=True"
        )
    for name, layer in adapted.layers.items():
        made[name].train(layer.training)
        exchange(adapted.model, layer, made[name])
    adapted._merged = made
    return report


def unmerge(adapted: Adapted) -> None:
    """Put the adapted layers back; the base model's tensors were kept, so its bits are what they were.

    Raises:
        GramianError: not merged, or a merged layer is no longer in the model.
    """
    if not adapted._merged:
        raise GramianError(f"adapter {adapted.name!r} is not merged")
    present = {id(module) for module in adapted.model.modules()}
    for name, plain in adapted._merged.items():
        if id(plain) not in present:
            raise GramianError(
                f"layer {name}: the merged layer is no longer in the model; detach what came on top of it"
            )
    for name, plain in adapted._merged.items():
        adapted.layers[name].train(plain.training)
        exchange(adapted.model, plain, adapted.layers[name])
    adapted._merged = {}


def _merged_layer(name: str, layer: AdaptedLinear, dense: bool) -> tuple[nn.Module, float]:
    """The plain layer and the share of the update that it loses."""
    base = layer.base
    for edit in layer.active:
        if edit.ramp and edit.steps < edit.ramp:
            raise GramianError(
                f"layer {name}: its gain is at step {edit.steps} of a ramp of {edit.ramp}; train on, or merge after that"
            )
        if COMBINES[edit.combine].operator is None:
            raise GramianError(
                f"layer {name}: an edit that combines by {edit.combine!r} is no matrix; it cannot be merged"
            )
    before = base_operator(base)
    plain = is_plain_linear(base) or is_conv1d(base) or type(base.weight) is nn.Parameter
    if not plain and not dense and not isinstance(base, StructuredLinear):
        raise GramianError(f"layer {name}: a {type(base).__name__} has no plain weight to merge into; pass dense=True")
    exact: Operator = before.to(dtype=torch.float64)
    for edit in layer.active:
        make = COMBINES[edit.combine].operator
        assert make is not None
        exact = make(copy.deepcopy(edit).double(), exact)
    wanted, old = exact.dense(), before.dense().double()
    if isinstance(base, StructuredLinear) and not dense:
        kept = exact.to(dtype=before.dtype)
        after: nn.Module = as_linear(kept, base.bias)
        stored = kept.dense()
    else:
        dtype = base.weight.dtype if plain else torch.float32
        stored = wanted.to(dtype)  # type: ignore[arg-type]
        after = _with_weight(base, stored) if plain else _linear(stored, layer.bias)
    for what, matrix in (("", wanted), ("rounded ", stored)):
        bad = ~torch.isfinite(matrix)
        if bool(bad.any()):
            raise GramianError(
                f"layer {name} ({matrix.shape[0]} x {matrix.shape[1]}): {int(bad.sum())} entries of the {what}merged weight "
                f"are not finite (first: {float(matrix[bad][0])}); the adapter or the layer is damaged"
            )
    after.requires_grad_(False)
    change = float((wanted - old).norm())
    if change <= NO_CHANGE * float(old.norm()):
        return after, 0.0
    return after, float((stored.double() - wanted).norm()) / change


def _with_weight(base: nn.Module, weight: Tensor) -> nn.Module:
    """A layer like `base`, sharing all but its weight (out, in)."""
    new = copy.copy(base)
    new._parameters = dict(base._parameters)
    new._parameters["weight"] = nn.Parameter(
        (weight.mT if is_conv1d(base) else weight).contiguous(), requires_grad=False
    )
    return new


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight).clone())
    return layer


def _dtype(module: nn.Module) -> str:
    return str(module.weight.dtype).removeprefix("torch.")


__all__ = ["LIMIT", "Merged", "merge", "unmerge"]
