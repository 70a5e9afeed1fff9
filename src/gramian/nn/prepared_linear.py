"""Dense layers that run as the execution plan says."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import Tensor, nn

from gramian.execution import Prepared
from gramian.modes import captured, differentiable
from gramian.nn.structured import Keeping, Kept, Structured
from gramian.ops import Dense

Model = TypeVar("Model", bound=nn.Module)


class PreparedLinear(Keeping, nn.Linear):
    """An ``nn.Linear`` that runs, without gradients, in the form that ``gramian.execution`` finds fastest for the batch.

    Few rows of a large matrix, as in generation, take 1/2 to 4/5 of the time on several threads. Parameters and their names
    are those of ``nn.Linear``. There is only a choice with a calibration of this machine (``gramian bench --calibrate``).

    Attributes:
        recast: half precision may run in float32: see ``prepare``.
    """

    recast: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: x (..., in) -> (..., out)."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        # Another library's tensor (quantised, sharded) is multiplied in its own way.
        if type(weight) is not nn.Parameter or x.dtype != weight.dtype or captured() or differentiable(x, weight, bias):
            return super().forward(x)
        prepared = self._kept.get([weight], self._make)
        return super().forward(x) if prepared is None else prepared(x, bias)

    def _make(self) -> Prepared:
        return Prepared(Dense(self.weight.detach()), recast=self.recast)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is an ``nn.Linear``, prepared or not, and no other subclass: a module that holds one of those may read
    its weight past its forward, as ``nn.MultiheadAttention`` does.
    """
    return type(module) in (nn.Linear, PreparedLinear)


def prepare(model: Model, *, recast: bool = True) -> Model:
    """Let every ``nn.Linear`` of a model run as a ``PreparedLinear``, in place: the modules, their parameters and hooks stay,
    only their class changes. Subclasses of ``nn.Linear`` and the factors of structured layers stay as they are.

    ``gramian.compress`` and what loads a compressed checkpoint do this, without `recast`.

    Args:
        model: a network, or a single layer.
        recast: a layer in half precision may keep a copy in float32 where that multiplies faster. The copy takes twice the
            layer's bytes, and is made again when the weight changes, but not when that is done through ``weight.data``.

    Returns:
        The same.
    """
    factors = {part for module in model.modules() if isinstance(module, Structured) for part in module.modules()}
    for module in model.modules():
        if is_plain_linear(module) and module not in factors:
            module.__class__ = PreparedLinear
            module._kept = Kept()  # type: ignore[assignment]
            module.recast = recast  # type: ignore[assignment]
    return model


def unprepare(model: Model) -> Model:
    """Undo ``prepare``, in place; returns the model."""
    for module in model.modules():
        if type(module) is PreparedLinear:
            del module._kept
            module.__dict__.pop("recast", None)
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
