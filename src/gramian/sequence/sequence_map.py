"""The map of values to outputs that a scan is, as a lazy lower-triangular operator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops import Operator
from gramian.sequence.problem import Problem
from gramian.sequence.scan import attention, scan
from gramian.sequence.transitions import Transition


@dataclass(frozen=True, eq=False, repr=False)
class SequenceMap(Operator):
    """``M[t, j] = q_t^T A_t ... A_{j+1} k_j`` for j <= t and zero after: what a layer's output at t takes from the value at j,
    its implicit attention matrix (Ali et al. 2024, "The hidden attention of Mamba models"). Nothing of size (time, time) is
    formed but by ``dense``.

    Made by :func:`sequence_map`. One head of one sequence; ``factors`` are its keys and reads.

    Args:
        key: (time, dk).
        read: (time, dk).
        transition: leading dimensions (1, time, 1), or (1,) or ().
        transposed: stands for the transpose.
        reverse: the map of the scan from the last step to the first, upper triangular.
    """

    kind: ClassVar[str] = "sequence_map"
    key: Tensor
    read: Tensor
    transition: Transition
    transposed: bool = False
    reverse: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.key.shape[0], self.key.shape[0])

    def apply(self, x: Tensor) -> Tensor:
        """``x M^T``: x (..., time) -> (..., time), a scan whose values are x."""
        self._check(x.shape[-1] == self.shape[1], f"x (..., {self.shape[1]})")
        return self.apply_columns(x.reshape(-1, x.shape[-1]).mT).mT.reshape(x.shape)

    def apply_columns(self, x: Tensor) -> Tensor:
        """``M x``: x (time, B) -> (time, B)."""
        self._check(x.shape[0] == self.shape[1], f"x ({self.shape[1]}, B)")
        if not self.transposed:
            return self._scan(self.transition, self.key, x, self.read)
        return self._adjoint(x)

    def _scan(self, transition: Transition, key: Tensor, value: Tensor, read: Tensor) -> Tensor:
        outputs, _ = scan(
            transition, (key[None, :, None], value[None, :, None]), read[None, :, None], reverse=self.reverse
        )
        return outputs[0, :, 0]

    def _adjoint(self, x: Tensor) -> Tensor:
        """``M^T x``: the scan backwards in time, with the transposed transitions one step later, reads and keys swapped."""
        # A vector-Jacobian product of a map that is linear in its values is exactly that scan.
        with torch.enable_grad():
            zero = torch.zeros_like(x).requires_grad_()
            outputs = self._scan(self.transition, self.key, zero, self.read)
        (adjoint,) = torch.autograd.grad(outputs, zero, x)
        return adjoint

    def transpose(self) -> SequenceMap:
        return SequenceMap(self.key, self.read, self.transition, not self.transposed, self.reverse)

    def dense(self) -> Tensor:
        value = torch.zeros_like(self.key)[None, :, None, :1]
        problem = Problem.make(self.transition, self.key[None, :, None], value, self.read[None, :, None], None)
        matrix = attention(problem.flipped() if self.reverse else problem)[0][0, 0]
        count = problem.value.shape[3]
        full = matrix[:, count - 1 :: count]
        full = full.flip(0, 1) if self.reverse else full
        return full.mT if self.transposed else full

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return dataclasses.replace(
            self, key=moved(self.key), read=moved(self.read), transition=self.transition.map(moved)
        )

    def config(self) -> dict[str, Any]:
        raise GramianError(
            "sequence_map: the map of one input's transitions is not stored; store the layer that makes it"
        )

    def flops(self, batch: int = 1) -> int:
        """Of the recurrent form, 4 dk a step and column beside the transition's own."""
        return 4 * batch * self.key.numel()


def sequence_map(
    transition: Transition, key: Tensor, read: Tensor, *, index: tuple[int, int] = (0, 0), reverse: bool = False
) -> SequenceMap:
    """The map of one head's values (time, ...) to its outputs, as an Operator (time, time).

    Args:
        transition: as for ``scan``.
        key: write keys (batch, time, heads, dk); for a delta rule ``strength * key``.
        read: (batch, time, heads, dk).
        index: (batch, head).
        reverse: of the scan from the last step to the first.

    Raises:
        GramianError: shapes that do not fit.
    """
    if key.dim() != 4 or key.shape != read.shape:
        raise GramianError(
            f"sequence_map: key {tuple(key.shape)} and read {tuple(read.shape)}; expected both (batch, time, heads, dk)"
        )
    batch, head = index
    return SequenceMap(key[batch, :, head], read[batch, :, head], transition.select(batch, head), reverse=reverse)
