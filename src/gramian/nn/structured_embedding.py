"""Any operator as a drop-in for ``torch.nn.Embedding``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.modes import captured, differentiable
from gramian.nn.structured import Structured
from gramian.ops import BlockLowRank, Dense, Operator, Quantized, from_config


class StructuredEmbedding(Structured):
    """An embedding whose table (rows, width) is an Operator: row r is what ``ids == r`` gives.

    A low-rank table is ``left[ids] @ right``, of a quantized one only the looked-up rows are decoded; any other is made
    dense once, and again when a factor changes.

    The factors are child modules (no ``nn.Linear``: an adapter library cannot wrap them, as a row is looked up, not
    multiplied). As in ``StructuredLinear``, the empty ``weight`` makes a loader that does not know this class fail.

    Args:
        op: shape (num_embeddings, embedding_dim); its factors are copied.
        padding_idx: row that gives no gradients, as in ``nn.Embedding``; negative counts from the end.

    Raises:
        GramianError: no such row, or a factor has the name of an attribute of the layer (``weight`` of a Dense
            operator: use ``as_embedding``).
    """

    def __init__(self, op: Operator, padding_idx: int | None = None) -> None:
        # Libraries take a model's dtype from its first parameter, and a table is often the first layer: scales that are
        # stored in half precision must not speak for the model.
        fixed = [name for name, value in op.trainable().items() if value.dtype != op.dtype]
        names = ("num_embeddings", "embedding_dim", "padding_idx")
        super().__init__(op, linears=False, fixed=fixed, reserved=names)
        self.num_embeddings, self.embedding_dim = op.shape
        if padding_idx is not None and not -op.shape[0] <= padding_idx < op.shape[0]:
            raise GramianError(f"StructuredEmbedding: padding_idx {padding_idx}; expected a row of {op.shape[0]}")
        self.padding_idx = padding_idx % op.shape[0] if padding_idx is not None else None

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "meta",
    ) -> StructuredEmbedding:
        """An uninitialised layer of a recorded structure, ready for a state dict."""
        dtype = dtype or torch.get_default_dtype()
        layer = cls(from_config(config, dtype=dtype, device=device), padding_idx)
        layer.weight = layer.weight.to(dtype)  # factors with a dtype of their own (scales) do not speak for the layer
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """As ``nn.Embedding``: ids (...), integers -> (..., embedding_dim)."""
        found = _rows(self.op, ids)
        if found is None:
            weights, table = self._weights(), None
            if weights is not None and not captured():
                if differentiable(*weights):
                    self._kept.clear()
                else:
                    table = self._kept.get(weights, lambda: self.op.dense())
            found = F.embedding(ids, self.op.dense() if table is None else table)
        if self.padding_idx is not None and found.requires_grad:
            found = torch.where((ids == self.padding_idx)[..., None], found.detach(), found)
        return found.to(self.weight.dtype)

    def to_embedding(self) -> nn.Embedding:
        """The same layer as a plain ``nn.Embedding``."""
        with torch.no_grad():
            return _plain(self.op.dense().to(self.weight.dtype), self.padding_idx)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self._template.kind}, {self.num_embeddings}, {self.embedding_dim}{padding}"


def _rows(op: Operator, ids: Tensor) -> Tensor | None:
    """Rows of the matrix (..., in), without making the others; None where the structure has no such form."""
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        return F.embedding(ids, op.left[0]) @ op.right[0]
    if isinstance(op, Quantized):
        flat = ids.reshape(-1)
        chosen = op.replace(codes=op.codes.index_select(0, flat), scales=op.scales.index_select(0, flat))
        return chosen.dense().reshape(*ids.shape, op.shape[1])
    return None


def lookup_flops(op: Operator) -> int:
    """Floating-point operations a token of looking up one row; a multiply-add counts two."""
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        return 2 * op.rank * op.shape[1]
    if isinstance(op, Quantized):  # scale each level, then undo the rotation
        width = op.shape[1]
        return width + (width * int(math.log2(op.rotation)) + width if op.rotation > 1 else 0)
    return 0


def _plain(table: Tensor, padding_idx: int | None) -> nn.Embedding:
    rows = table.detach().clone(memory_format=torch.contiguous_format)
    return nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=padding_idx)  # type: ignore[no-any-return, no-untyped-call]


def as_embedding(op: Operator, padding_idx: int | None = None) -> nn.Embedding | StructuredEmbedding:
    """A layer for `op`: a plain ``nn.Embedding`` for a dense matrix, a ``StructuredEmbedding`` for any other."""
    return _plain(op.weight, padding_idx) if isinstance(op, Dense) else StructuredEmbedding(op, padding_idx)
