"""Training a dense-times-sparse factorisation on the task itself."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.nn.structured_linear import StructuredLinear
from gramian.ops import BlockLowRank, Dictionary
from gramian.ops.dictionary import straight_through


class StraightThroughDictionary(nn.Module):
    """A linear layer over a ``Dictionary`` whose support is learned too: the straight-through factoriser of Chand et al.
    2023, "DSFormer", section on STF.

    Codes are kept dense; the forward pass uses the few largest of every row, and their gradient passes to all of them as
    if nothing had been cut, so that an atom left out can come back. ``finish`` gives the layer that stores the few alone.

    Args:
        op: the start. Codes it does not hold start at zero.
        bias: (out,) or None; copied.
    """

    bias: nn.Parameter | None

    def __init__(self, op: Dictionary, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (op.shape[0],):
            raise GramianError(f"StraightThroughDictionary: bias {tuple(bias.shape)}; expected ({op.shape[0]},)")
        self.out_features, self.in_features = op.shape
        self.nonzeros = op.coefficients.shape[2]
        self.latent = nn.Parameter(op.pair().left.detach().clone())
        self.basis = nn.Parameter(op.basis.detach().clone())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, atoms: int, nonzeros: int, blocks: int = 1) -> Self:
        """Start from the projection of a dense layer."""
        op = Dictionary.fit(linear.weight.detach(), atoms=atoms, nonzeros=nonzeros, blocks=blocks)
        return cls(op, linear.bias)

    @property
    def op(self) -> Dictionary:
        """The operator as it stands, on the support of this moment."""
        return Dictionary.from_latent(self.latent, self.basis, self.nonzeros, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: x (..., in) -> (..., out)."""
        left, right = straight_through(self.latent, self.nonzeros), self.basis.flatten(0, 1)[None]
        y = BlockLowRank(left, right, self.out_features, self.in_features).apply(x)
        return y if self.bias is None else y + self.bias

    def finish(self) -> StructuredLinear:
        """The layer that holds the chosen codes alone."""
        with torch.no_grad():
            return StructuredLinear(self.op, self.bias)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        blocks, atoms, _ = self.basis.shape
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, atoms={atoms}, nonzeros={self.nonzeros}, blocks={blocks}"
