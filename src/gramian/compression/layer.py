"""One linear layer as the planner sees it: tensors, never a module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.grams import LayerGrams
from gramian.linalg import ReducedRank, reduced_rank, weighted_error


@dataclass
class Layer:
    """A weight, its bias and what measures an error in it.

    Attributes:
        name: for messages and the plan.
        weight: (out, in).
        bias: (out,) or None. With a bias, the mean of the error is absorbed by it, and errors are measured centred.
        grams: what calibration saw of the layer, or None: plain Frobenius errors.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    grams: LayerGrams | None = None

    def __post_init__(self) -> None:
        if self.grams is not None and self.grams.input.size != self.weight.shape[1]:
            raise GramianError(
                f"layer {self.name}: Gram of size {self.grams.input.size} for a weight {tuple(self.weight.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @cached_property
    def gram_in(self) -> Tensor | None:
        """G_in (in, in): covariance for a layer with a bias, else second moment; slightly shrunk."""
        return None if self.grams is None else self.grams.gram_in(centred=self.bias is not None)

    @cached_property
    def gram_out(self) -> Tensor | None:
        """G_out (out, out), or None without gradients."""
        return None if self.grams is None else self.grams.gram_out()

    @property
    def mean(self) -> Tensor:
        """(in,) mean input; zeros without calibration."""
        if self.grams is None:
            return torch.zeros(self.shape[1], dtype=torch.float64)
        return self.grams.input.mean

    @cached_property
    def unit(self) -> float:
        """What a weighted squared error is multiplied by: 1/2 gives predicted loss; without gradients errors only compare
        relative to the layer's whole output.
        """
        if self.gram_out is not None:
            return 0.5
        return 1.0 / max(float(weighted_error(self.weight, self.gram_in, None)), 1e-300)

    @cached_property
    def spectrum(self) -> ReducedRank:
        """All best low-rank approximations."""
        return reduced_rank(self.weight, self.gram_in, self.gram_out)

    def error(self, approximation: Tensor) -> float:
        """Predicted loss of putting a dense `approximation` (out, in) in the weight's place."""
        return self.unit * max(
            float(weighted_error(self.weight.double() - approximation.double(), self.gram_in, self.gram_out)), 0.0
        )

    def corrected_bias(self, approximation: Tensor) -> Tensor | None:
        """The bias that keeps the mean output: ``b + (W - A) mean``."""
        if self.bias is None:
            return None
        shift = (self.weight.double() - approximation.double()) @ self.mean.to(self.weight.device)
        return (self.bias.double() + shift).to(self.bias.dtype)

    def release(self) -> None:
        """Forget what is cached; it is computed again when asked."""
        for name in ("spectrum", "gram_in", "gram_out"):
            self.__dict__.pop(name, None)
