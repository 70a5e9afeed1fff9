"""The ways an update meets the weight of a layer, each written once: its product, its matrix, and as an operator.

Another way (a mixture with a gate, say) is another entry of ``COMBINES``; adding, switching, saving and loading then work
for it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.ops import BlockDiag, Identity, Operator, compose

if TYPE_CHECKING:
    from gramian.adapt.layer import Edit

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Below(Protocol):
    """What an edit changes: the layer with the edits before this one."""

    @property
    def bias(self) -> Tensor | None:
        """(out,) or None."""

    def __call__(self, x: Tensor) -> Tensor:
        """X (..., in) -> (..., out), bias included."""

    def weight(self) -> Tensor:
        """The dense matrix (out, in)."""


@dataclass(frozen=True)
class Combine:
    """One way to combine.

    Args:
        shape: (update, (out, in)) -> the shape that is wrong and what it should be, or "".
        forward: (edit, below, x (..., in)) -> (..., out).
        operator: (edit, W) -> the edited matrix as an Operator; None where no matrix stands for the edit.
    """

    shape: Callable[[Operator, tuple[int, int]], str]
    forward: Callable[[Edit, Below, Tensor], Tensor]
    operator: Callable[[Edit, Operator], Operator] | None


def _expect(shape: tuple[int, int]) -> str:
    return f"expected {shape[0]} x {shape[1]}"


def _same(update: Operator, shape: tuple[int, int]) -> str:
    return "" if update.shape == shape else _expect(shape)


# add ----------------------------------------------------------------------------------------------------------------


def _add(edit: Edit, below: Below, x: Tensor) -> Tensor:
    return edit.add_to(below(x), x)


def _add_operator(edit: Edit, weight: Operator) -> Operator:
    return weight + edit.difference()


# left, right, two sides ---------------------------------------------------------------------------------------------


def _left(edit: Edit, below: Below, x: Tensor) -> Tensor:
    y = below(x)
    bias = below.bias
    if bias is None:
        return edit.add_to(y, y)
    return edit.add_to(y, y - bias.to(y.dtype))


def _left_operator(edit: Edit, weight: Operator) -> Operator:
    return compose(edit.plus_identity(weight.shape[0]), weight)


def _right(edit: Edit, below: Below, x: Tensor) -> Tensor:
    return below(edit.add_to(x, x))


def _right_operator(edit: Edit, weight: Operator) -> Operator:
    return compose(weight, edit.plus_identity(weight.shape[1]))


def _square(side: int) -> Callable[[Operator, tuple[int, int]], str]:
    def check(update: Operator, shape: tuple[int, int]) -> str:
        wanted = (shape[side], shape[side])
        return "" if update.shape == wanted else _expect(wanted)

    return check


def _two_sided(edit: Edit, below: Below, x: Tensor) -> Tensor:
    y = below(edit.add_to(x, x, part=1))
    bias = below.bias
    return edit.add_to(y, y if bias is None else y - bias.to(y.dtype), part=0)


def _two_sided_operator(edit: Edit, weight: Operator) -> Operator:
    out, in_ = weight.shape
    return compose(edit.plus_identity(out, part=0), weight, edit.plus_identity(in_, part=1))


def _two_sided_shape(update: Operator, shape: tuple[int, int]) -> str:
    out, in_ = shape
    fits = isinstance(update, BlockDiag) and [part.shape for part in update.parts] == [(out, out), (in_, in_)]
    return "" if fits else f"expected BlockDiag of {out} x {out} and {in_} x {in_}"


# elementwise --------------------------------------------------------------------------------------------------------


def _elementwise(edit: Edit, below: Below, x: Tensor) -> Tensor:
    weight = below.weight()
    delta = edit.difference().dense().to(weight.dtype)
    return F.linear(x, torch.addcmul(weight, weight, delta).to(x.dtype), below.bias)


def _elementwise_operator(edit: Edit, weight: Operator) -> Operator:
    from gramian.ops import Dense

    dense = weight.dense()
    return Dense(torch.addcmul(dense, dense, edit.difference().dense().to(dense)))


# insert -------------------------------------------------------------------------------------------------------------


def _insert(edit: Edit, below: Below, x: Tensor) -> Tensor:
    y = below(x)
    up, down = edit.update.op.parts  # type: ignore[attr-defined]
    inner = down.apply(edit.dropped(y))
    if edit.biases:
        inner = inner + edit.biases[0]
    z = up.apply(ACTIVATIONS[str(edit.activation)](inner))
    if edit.biases:
        z = z + edit.biases[1]
    return torch.add(y, z, alpha=edit.gain).to(y.dtype)


def _insert_shape(update: Operator, shape: tuple[int, int]) -> str:
    out = shape[0]
    fits = len(getattr(update, "parts", ())) == 2 and update.shape == (out, out)
    return "" if fits else f"expected an operator of two parts (up, down), {out} x {out} in all"


COMBINES: dict[str, Combine] = {
    "add": Combine(_same, _add, _add_operator),
    "left": Combine(_square(0), _left, _left_operator),
    "right": Combine(_square(1), _right, _right_operator),
    "two_sided": Combine(_two_sided_shape, _two_sided, _two_sided_operator),
    "elementwise": Combine(_same, _elementwise, _elementwise_operator),
    "insert": Combine(_insert_shape, _insert, None),
}


def is_identity(op: Operator) -> bool:
    """Whether this is the identity by its form."""
    return isinstance(op, Identity)
