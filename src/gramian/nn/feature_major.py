"""A chain of layers that keeps its activations feature-major: transposed once on the way in and once on the way out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.nn.structured_linear import StructuredLinear

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip
"""Modules that act on each number alone, so that the layout does not matter to them."""


class FeatureMajor(nn.Sequential):
    """Linear layers and element-wise functions, run on activations (features, batch).

    Products of structured matrices spend much of their time in permuting blocks of a row-major batch; feature-major, the
    blocks are runs of memory and most permutations are views. One layer gains little, for its input and output must be
    transposed; a block (first linear, activation, second linear) pays for that once. The parameters are those of the
    modules, under the names that ``nn.Sequential`` gives.

    Args:
        modules: ``nn.Linear``, ``StructuredLinear`` and element-wise modules, applied in order.

    Raises:
        GramianError: a module of another kind, which may depend on the layout.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As ``nn.Module.add_module``, by which a sequence takes in all that it is given."""
        if not isinstance(module, (nn.Linear, StructuredLinear, *ELEMENTWISE)):
            raise GramianError(
                f"FeatureMajor: module {name} is a {type(module).__name__}; expected nn.Linear, StructuredLinear or "
                "an element-wise module such as nn.GELU"
            )
        super().add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """From x (..., in) to (..., out), as the modules one after the other."""
        y = self.columns(x.reshape(-1, x.shape[-1]).mT).mT
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def columns(self, x: Tensor) -> Tensor:
        """From x (in, B) to (out, B)."""
        for module in self:
            if isinstance(module, StructuredLinear):
                x = module.columns(x)
            elif isinstance(module, nn.Linear):
                x = module.weight @ x if module.bias is None else torch.addmm(module.bias[:, None], module.weight, x)
            else:
                x = module(x)
        return x
