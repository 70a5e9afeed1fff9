"""One linear layer or embedding as the planner sees it: tensors, never a module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.grams import EmbeddingGrams, LayerGrams
from gramian.linalg import ReducedRank, pivoted_nystrom, psd_root, reduced_rank, weighted_error


@dataclass
class Layer:
    """A weight, its bias and what measures an error in it.

    Attributes:
        name: for messages and the plan.
        weight: (out, in).
        bias: (out,) or None. With a bias, the mean of the error is absorbed by it, and errors are measured centred.
        grams: what calibration saw of the layer, or None: plain Frobenius errors.
        embedding: the weight is a table (rows, width), of which a token looks up one row. As the table's rows are what
            comes in and its columns what goes out, its Grams change sides: G_out is diagonal, the frequency of each row.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    grams: LayerGrams | None = None
    embedding: bool = False

    def __post_init__(self) -> None:
        if self.grams is not None and self.grams.input.size != self.weight.shape[0 if self.embedding else 1]:
            raise GramianError(
                f"layer {self.name}: Gram of size {self.grams.input.size} for a weight {tuple(self.weight.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @cached_property
    def gram_in(self) -> Tensor | None:
        """G_in (in, in): covariance for a layer with a bias, else second moment; slightly shrunk. For an embedding the
        gradients' second moment, or None without gradients.
        """
        if isinstance(self.grams, EmbeddingGrams):
            return self.grams.gram_gradient()
        return None if self.grams is None else self.grams.gram_in(centred=self.bias is not None)

    @cached_property
    def gram_out(self) -> Tensor | None:
        """G_out (out, out), or None without gradients; (out,), a diagonal, for an embedding."""
        if isinstance(self.grams, EmbeddingGrams):
            return self.grams.frequencies()
        return None if self.grams is None else self.grams.gram_out()

    @property
    def mean(self) -> Tensor:
        """(in,) mean input; zeros without calibration."""
        if self.grams is None:
            return torch.zeros(self.shape[1], dtype=torch.float64)
        return self.grams.input.mean

    @property
    def comparable(self) -> bool:
        """Whether errors are predicted loss, so that those of different layers compare."""
        return (self.gram_in if self.embedding else self.gram_out) is not None

    @cached_property
    def unit(self) -> float:
        """What a weighted squared error is multiplied by: 1/2 gives predicted loss; without gradients errors only compare
        relative to the layer's whole output.
        """
        if self.comparable:
            return 0.5
        return 1.0 / max(float(weighted_error(self.weight, self.gram_in, self.gram_out)), 1e-300)

    @cached_property
    def spectrum(self) -> ReducedRank:
        """All best low-rank approximations."""
        return reduced_rank(self.weight, self.gram_in, self.gram_out)

    @cached_property
    def pivots(self) -> tuple[Tensor, Tensor]:
        """Inputs (in,) in the order in which they are worth keeping, and the weighted squared error (in + 1,) when only
        the first k are kept and the weight is refitted to them.

        Raises:
            GramianError: there are no Grams.
        """
        if self.gram_in is None:
            raise GramianError(f"layer {self.name}: choosing among its inputs needs calibration data")
        w, h = self.weight.double(), self.gram_out
        return pivoted_nystrom(self.gram_in, w if h is None else psd_root(h)[0] @ w)

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
        for name in ("spectrum", "pivots", "gram_in", "gram_out"):
            self.__dict__.pop(name, None)
