"""Dense layers that run as the execution plan says."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from gramian.execution import Prepared
from gramian.modes import differentiable
from gramian.nn.structured import Keeping, Kept, Structured
from gramian.ops import Dense

Model = TypeVar("Model", bound=nn.Module)


class PreparedLinear(Keeping, nn.Linear):
    """An ``nn.Linear`` that runs, without gradients, in the form that ``gramian.execution`` finds fastest for the batch.

    Few rows of a large matrix, as in generation, take 1/2 to 4/5 of the time on several threads. Parameters and their names
    are those of ``nn.Linear``. There is only a choice with a calibration of this machine (``gramian bench --calibrate``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: x (..., in) -> (..., out)."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if torch.compiler.is_compiling() or differentiable(x, weight, bias) or x.dtype != weight.dtype:
            return super().forward(x)
        prepared = self._kept.get([weight], self._make)
        return super().forward(x) if prepared is None else prepared(x, bias)

    def _make(self) -> Prepared:
        return Prepared(Dense(self.weight.detach()))


def prepare(model: Model) -> Model:
    """Let every ``nn.Linear`` of a model run as a ``PreparedLinear``, in place: the modules, their parameters and hooks stay,
    only their class changes. Subclasses of ``nn.Linear`` and the factors of structured layers stay as they are.

    Args:
        model: a network, or a single layer.

    Returns:
        The same.
    """
    factors = {part for module in model.modules() if isinstance(module, Structured) for part in module.modules()}
    for module in model.modules():
        if type(module) is nn.Linear and module not in factors:
            module.__class__ = PreparedLinear
            module._kept = Kept()  # type: ignore[assignment]
    return model


def unprepare(model: Model) -> Model:
    """Undo ``prepare``, in place; returns the model."""
    for module in model.modules():
        if type(module) is PreparedLinear:
            del module._kept
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
