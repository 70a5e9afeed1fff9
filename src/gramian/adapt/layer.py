"""A linear layer with edits on top; the layer underneath is not touched."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.adapt.adapter import Start
from gramian.adapt.combine import COMBINES
from gramian.errors import GramianError
from gramian.models.swap import linear_shape, linear_weight
from gramian.models.walk import is_linear
from gramian.modes import captured, differentiable
from gramian.nn.structured import Keeping, Structured
from gramian.ops import BlockLowRank, Dense, Diagonal, Identity, Operator, Product, Sum

Chain = tuple[tuple[bool, nn.Module], ...]
"""What acts on x one after another: (is it a matrix, the module that holds its weight)."""


class Edit(Keeping):
    """One change of one linear layer; see ``gramian.adapt.adapter`` for what the parts mean.

    Args:
        start: the update, what is subtracted, and biases.
        shape: (out, in) of the layer.
        combine, dropout, ramp, activation, perturb: as in ``Adapter``.
        base_gain: the gain at the end of the ramp.
        rank: asked for.
        trainable: names of the update's factors that train; None for all that can.

    Raises:
        GramianError: an operator's shape does not suit the way to combine.
    """

    def __init__(
        self,
        start: Start,
        shape: tuple[int, int],
        *,
        combine: str = "add",
        base_gain: float = 1.0,
        rank: int = 1,
        ramp: int = 0,
        trainable: Collection[str] | None = None,
        dropout: float = 0.0,
        activation: str | None = None,
        perturb: Callable[[Operator], Operator] | None = None,
    ) -> None:
        super().__init__()
        update, origin = start.update, start.start
        for op in (update, origin):
            wrong = "" if op is None else COMBINES[combine].shape(op, shape)
            if wrong:
                raise GramianError(f"update {op!r} of a layer {shape[0]} x {shape[1]}, combine {combine!r}: {wrong}")
        update = holdable(update)
        self.training_factors = frozenset(update.trainable() if trainable is None else trainable)
        fixed = set(update.factors()) - self.training_factors
        self.update = Structured(update, linears=True, fixed=fixed)
        self.start = None if origin is None else _frozen(holdable(origin))
        self.biases = nn.ParameterList([nn.Parameter(bias.detach().clone()) for bias in start.biases])
        self.combine, self.base_gain, self.rank, self.ramp = combine, base_gain, rank, ramp
        self.dropout, self.activation, self.perturb = dropout, activation, perturb
        self.factor, self.steps, self.perturbed = 1.0, 0, False
        self.replan()

    @property
    def gain(self) -> float:
        """G now, the ramp and the user's scale taken in."""
        if self.ramp:
            return self.base_gain * self.factor * min(self.steps / self.ramp, 1.0)
        return self.base_gain * self.factor

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by factor (and "biases.0", "biases.1")."""
        found = {n: self.update._holder(n).weight for n in self.update._shapes if n in self.training_factors}
        found |= {f"biases.{i}": bias for i, bias in enumerate(self.biases)}
        return found  # type: ignore[return-value]

    def share(self, name: str, holder: nn.Module) -> None:
        """Hold the factor `name` in a module that another edit owns."""
        path, _, last = name.rpartition(".")
        (self.update._holder(path) if path else self.update)._modules[last] = holder
        self.replan()

    # As operators ----------------------------------------------------------------------------------------------------

    def difference(self, part: int | None = None) -> Operator:
        """``g (U - U0)`` over the live factors; of a two-sided edit, one of the two."""
        update = _part(self.update.op, part)
        if self.start is not None:
            update = update - _part(self.start.op, part)
        return self.gain * update

    def plus_identity(self, size: int, part: int | None = None) -> Operator:
        """``I + g (U - U0)``; the update itself where its start is the identity and the gain one."""
        if self.gain == 1 and self.start is not None and isinstance(_part(self.start.op, part), Identity):
            return _part(self.update.op, part)
        return Identity(size) + self.difference(part)

    def two_factors(self) -> tuple[Edit, dict[str, Any], dict[str, Any]] | None:
        """The edit itself and where its A and B live, if it is ``W + g (B A - B0 A0)`` and nothing more."""
        ours, theirs = self._plans[None] if self.combine == "add" else (None, None)
        if ours is None or not _is_pair(ours) or self.perturb is not None:
            return None
        if self.start is not None and (theirs is None or not _is_pair(theirs)):
            return None
        (_, first), (_, second) = ours[0]
        return self, first._parameters, second._parameters

    def stacked(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor] | None:
        """``[A; A0]`` and ``[B, -B0]^T``, kept until a factor changes: two products instead of four where nothing trains.
        None where a change could not be seen.
        """

        def stack() -> tuple[Tensor, Tensor]:
            theirs = self._plans[None][1]
            assert theirs is not None
            (_, first), (_, second) = theirs[0]
            # Alternating, so that at the start each term meets its opposite before rounding can add up.
            rights = torch.stack([right, first.weight], 1).flatten(0, 1)  # type: ignore[list-item]
            lefts = torch.stack([left, -second.weight], 2).flatten(1).t()  # type: ignore[operator]
            return rights, lefts

        return self._kept.get([right, left], stack)

    # As a product ----------------------------------------------------------------------------------------------------

    def replan(self) -> None:
        """Find the chains of plain matrices that the update and its start are made of, if they are."""
        parts = (0, 1) if self.combine == "two_sided" else (None,)
        self._plans = {part: (_chains(self.update, part), _chains(self.start, part)) for part in parts}

    def add_to(self, y: Tensor, x: Tensor, part: int | None = None) -> Tensor:
        """``y + g (U - U0) x``: x (..., in), y (..., out)."""
        if self.dropout:
            x = self.dropped(x)
        dtype = self.update.weight.dtype
        z = x if x.dtype == dtype else x.to(dtype)
        ours, theirs = self._plans[part]
        if ours is None or (self.perturb is not None and (self.training or self.perturbed)):
            op = self.update.op
            if self.perturb is not None and (self.training or self.perturbed):
                op = self.perturb(op)
            delta = _part(op, part).apply(z)
        else:
            delta = _run(ours, z)
        if self.start is not None:
            delta = delta - (_part(self.start.op, part).apply(z) if theirs is None else _run(theirs, z))
        total = torch.add(y, delta, alpha=self.gain)
        return total if total.dtype == y.dtype else total.to(y.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """X after dropout, while training, in the dtype of the update."""
        x = F.dropout(x, self.dropout, self.training and self.dropout > 0)
        return x.to(self.update.weight.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"combine={self.combine}, rank={self.rank}, gain={self.gain:g}"


class _Below:
    """A layer with its first `count` active edits."""

    __slots__ = ("count", "layer")

    def __init__(self, layer: AdaptedLinear, count: int) -> None:
        self.layer, self.count = layer, count

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias
        return bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer.run(x, self.count)

    def weight(self) -> Tensor:
        return self.layer.operator(self.count).dense()


class AdaptedLinear(nn.Module):
    """Takes the place of a linear layer while adapters are attached to it.

    ``base`` is the layer that was there, ``edits`` holds the edits by adapter name, ``active`` are those that take part,
    in order: each sees the layer that the ones before it make.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.edits = nn.ModuleDict()
        self.order: list[str] = []
        self.off: set[str] = set()
        self.active: tuple[Edit, ...] = ()
        self._two: tuple[Edit, dict[str, Any], dict[str, Any]] | None = None
        self.out_features, self.in_features = layer_shape(base)
        self.train(base.training)

    @property
    def weight(self) -> Any:
        """The base layer's, for code that reads its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base layer's: edits leave it alone."""
        return getattr(self.base, "bias", None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # As in ``Structured``: a loader that does not know this class meets a tensor that cannot fit and fails, instead of
        # starting the base layer from random weights.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = torch.empty(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Set ``active`` from the order of the adapters and those that are off."""
        self.active = tuple(self.edits[name] for name in self.order if name not in self.off)  # type: ignore[misc]
        self._two = self.active[0].two_factors() if len(self.active) == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) -> (..., out)."""
        if self._two is None or captured():
            return self.run(x, len(self.active))
        # One edit of two plain factors, by far the most common, at the least cost in Python: module calls and attribute
        # look-ups would take longer than the products of a small batch.
        edit, first, second = self._two
        right, left = first.get("weight"), second.get("weight")
        if right is None or left is None or x.dtype is not right.dtype or (edit.dropout and self.training):
            return self.run(x, 1)
        if edit.start is None:
            left = left.t()
        else:
            if differentiable(x, right, left):
                edit._kept.clear()
                return self.run(x, 1)
            both = edit.stacked(right, left)
            if both is None:
                return self.run(x, 1)
            right, left = both
        base = self._modules["base"]
        assert base is not None
        weight = base._parameters.get("weight") if type(base) is nn.Linear and _unwatched(base) else None
        y = base(x) if weight is None else F.linear(x, weight, base._parameters["bias"])
        inner = F.linear(x, right)
        if y.dtype is not inner.dtype:
            return torch.add(y, inner @ left, alpha=edit.gain).to(y.dtype)
        if y.dim() == 2:
            return torch.addmm(y, inner, left, alpha=edit.gain)
        rows = torch.addmm(y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1]), left, alpha=edit.gain)
        return rows.view(y.shape)

    def run(self, x: Tensor, count: int) -> Tensor:
        """The product with the first `count` active edits."""
        active = self.active
        if count == 1 and active[0].combine == "add":
            return active[0].add_to(self.base(x), x)
        if count == 0:
            y: Tensor = self.base(x)
            return y
        edit = active[count - 1]
        return COMBINES[edit.combine].forward(edit, _Below(self, count - 1), x)

    def operator(self, count: int | None = None) -> Operator:
        """The matrix with the first `count` (or all) active edits.

        Raises:
            GramianError: no matrix stands for an edit.
        """
        op = base_operator(self.base)
        for edit in self.active if count is None else self.active[:count]:
            make = COMBINES[edit.combine].operator
            if make is None:
                raise GramianError(f"an edit that combines by {edit.combine!r} is no matrix and cannot be merged")
            op = make(edit, op)
        return op


def holdable(op: Operator) -> Operator:
    """The operator in a form whose factors can be child modules: a lone dense matrix becomes a product of one."""
    return Product((op,)) if isinstance(op, Dense) else op


def _frozen(op: Operator) -> Structured:
    return Structured(op, linears=True, fixed=list(op.factors()))


def _part(op: Operator, part: int | None) -> Operator:
    return op if part is None else op.parts[part]  # type: ignore[attr-defined, no-any-return]


def _chains(held: Structured | None, part: int | None) -> tuple[Chain, ...] | None:
    """The terms of a sum of products of plain matrices and diagonals; None for any other operator."""
    if held is None:
        return None
    prefix = "" if part is None else f"parts.{part}."
    return _terms(held, _part(held._template, part), prefix)


def _terms(held: Structured, op: Operator, prefix: str) -> tuple[Chain, ...] | None:
    if isinstance(op, Sum):
        terms: list[Chain] = []
        for i, piece in enumerate(op.parts):
            found = _terms(held, piece, f"{prefix}parts.{i}.")
            if found is None:
                return None
            terms += found
        return tuple(terms)
    chain = _chain(held, op, prefix)
    return None if chain is None else (chain,)


def _chain(held: Structured, op: Operator, prefix: str) -> Chain | None:
    if isinstance(op, Identity):
        return ()
    if isinstance(op, Dense):
        return ((True, held._holder(prefix + "weight")),)
    if isinstance(op, Diagonal):
        return ((False, held._holder(prefix + "values")),)
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        return ((True, held._holder(prefix + "right")), (True, held._holder(prefix + "left")))
    if isinstance(op, Product):
        links: list[tuple[bool, nn.Module]] = []
        for i, piece in reversed(list(enumerate(op.parts))):
            found = _chain(held, piece, f"{prefix}parts.{i}.")
            if found is None:
                return None
            links += found
        return tuple(links)
    return None


def _is_pair(chains: tuple[Chain, ...]) -> bool:
    return len(chains) == 1 and [matrix for matrix, _ in chains[0]] == [True, True]


def _run(chains: tuple[Chain, ...], x: Tensor) -> Tensor:
    total: Tensor | None = None
    for chain in chains:
        z = x
        for matrix, holder in chain:
            z = F.linear(z, holder.weight) if matrix else z * holder.weight  # type: ignore[arg-type, operator]
        total = z if total is None else total + z
    assert total is not None
    return total


def _unwatched(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


# Any linear layer ---------------------------------------------------------------------------------------------------


def can_adapt(module: nn.Module) -> bool:
    """Whether the module maps (..., in) to (..., out) by one matrix: nn.Linear and its (quantised) kin, Conv1D,
    StructuredLinear. Attention's own output projection is read past its forward and is not one.
    """
    if is_linear(module):
        return True
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear | AdaptedLinear):
        return False
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    if is_linear(module):
        return linear_shape(module)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


@torch.no_grad()
def base_operator(module: nn.Module) -> Operator:
    """The matrix of a layer: its own operator, its weight, or for a (quantised) class of another library what it makes
    of the identity.
    """
    from gramian.nn import StructuredLinear

    if isinstance(module, StructuredLinear):
        return module.op
    if is_linear(module) or (type(module.weight) is nn.Parameter and module.weight.is_floating_point()):
        return Dense(linear_weight(module)[0].detach())
    eye = torch.eye(layer_shape(module)[1])
    zero = module(torch.zeros_like(eye[:1]))
    return Dense((module(eye) - zero).mT)
