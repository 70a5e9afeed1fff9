"""Equal dense blocks along the diagonal, rows and columns cut contiguously or strided.

Two of them, one strided, make a Monarch matrix of any number of blocks (``monarch``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import psd_solve
from gramian.ops.block_low_rank import BlockLowRank, block_order, joined, padded, padded_gram, rows_of_blocks
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Operator):
    """b blocks of s x p, one batched product. For blocks that are operators of any kind and size see ``BlockDiag``.

    Args:
        values: (b, s, p).
        rows, columns: true size; s and p are rows / b and columns / b rounded up (padding inside the operator).
        strided_rows, strided_columns: block j holds rows j, j + b, ... instead of j s .. j s + s - 1; likewise columns.
    """

    kind: ClassVar[str] = "block_diagonal"
    fittable: ClassVar[bool] = True
    values: Tensor
    rows: int
    columns: int
    strided_rows: bool = False
    strided_columns: bool = False

    def __post_init__(self) -> None:
        fits = self.values.dim() == 3 and self.values.shape[0] > 0
        if fits:
            b, s, p = self.values.shape
            fits = s == -(-self.rows // b) and p == -(-self.columns // b)
        self._check(fits, f"values (b, s, p) with s = ceil({self.rows} / b), p = ceil({self.columns} / b)")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        b, _, p = self.values.shape
        batch = x.shape[:-1]
        if b * p > self.columns:
            x = F.pad(x, (0, b * p - self.columns))
        x = x.reshape(-1, p, b).mT if self.strided_columns else x.reshape(-1, b, p)
        y = torch.bmm(rows_of_blocks(x), self.values.mT)  # (b, B, s)
        y = y.permute(1, 2, 0) if self.strided_rows else y.transpose(0, 1)
        return joined(y, batch, self.rows)

    def apply_columns(self, x: Tensor) -> Tensor:
        b, s, p = self.values.shape
        batch = x.shape[1]
        if b * p > self.columns:
            x = F.pad(x, (0, 0, 0, b * p - self.columns))
        blocks = x.reshape(p, b, batch).transpose(0, 1) if self.strided_columns else x.reshape(b, p, batch)
        y = self.values @ blocks  # (b, s, B)
        if self.strided_rows:
            y = y.transpose(0, 1)
        return y.reshape(b * s, batch)[: self.rows]

    def transpose(self) -> BlockDiagonal:
        return BlockDiagonal(self.values.mT, self.columns, self.rows, self.strided_columns, self.strided_rows)

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.values.numel()

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        blocks: int = 1,
        strided_rows: bool = False,
        strided_columns: bool = False,
        **size: Any,
    ) -> BlockDiagonal:
        """Without coupling between blocks, the blocks themselves; else ``W_j,: G_:,j G_jj^{-1}`` a block row j: the
        optimum where the output Gram does not couple block rows.
        """
        out, in_ = weight.shape
        b = max(1, min(blocks, out, in_))
        s, p = -(-out // b), -(-in_ // b)
        row_order, column_order = block_order(out, b, s, strided_rows), block_order(in_, b, p, strided_columns)
        w = padded(weight.double(), row_order, column_order)
        g = padded_gram(gram_in, column_order)
        places = torch.arange(b)
        values = w.reshape(b, s, b, p)[places, :, places]
        if g is not None and g.dim() == 2:
            image = (w @ g).reshape(b, s, b, p)[places, :, places]
            within = g.reshape(b, p, b, p)[places, :, places]
            values = torch.stack([psd_solve(gram, rows.mT).mT for gram, rows in zip(within, image, strict=True)])
        return cls(values.to(weight), out, in_, strided_rows, strided_columns)

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        blocks: int = 1,
        strided_rows: bool = False,
        strided_columns: bool = False,
        **size: Any,
    ) -> BlockDiagonal:
        """Every block by the spectral rule of its own sides."""
        out, in_ = shape
        b = max(1, min(blocks, out, in_))
        values = spectral_normal((b, -(-out // b), -(-in_ // b)), generator)
        return cls(values, out, in_, strided_rows, strided_columns)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """The fewest blocks that fit the budget, which store the most, and the next power of two."""
        out, in_ = shape
        found: list[Size] = []
        powers = [2**i for i in range(min(out, in_).bit_length())]
        for counts in (range(1, min(out, in_) + 1), powers):
            for b in counts:
                if b <= min(out, in_) and b * -(-out // b) * -(-in_ // b) <= keep * out * in_:
                    if {"blocks": b} not in found:
                        found.append({"blocks": b})
                    break
        return found


def monarch(first: Tensor, second: Tensor) -> Operator:
    """The Monarch matrix ``P L P^T R`` with block-diagonal L and R (Dao et al. 2022, "Monarch", section 3.1), in the
    generalised form of their code: any number of blocks on each side, rectangular blocks.

    Args:
        first: R, (k, q, p): block i maps its slice of the input to q numbers.
        second: L, (l, s, r) with l r = k q: block j maps every l-th of those numbers, from the j-th on, to every l-th
            number of the output, from the j-th on.

    Returns:
        A BlockLowRank where every block of R reaches every block of L equally often (k = l, q a multiple of k), else a
        product of two BlockDiagonals.

    Raises:
        GramianError: the shapes do not fit together.
    """
    if first.dim() != 3 or second.dim() != 3 or first[..., 0].numel() != second[:, 0].numel():
        raise GramianError(
            f"monarch: first {tuple(first.shape)} and second {tuple(second.shape)}; expected (k, q, p) and (l, s, r) "
            "with k q = l r"
        )
    (k, q, p), (length, s, _) = first.shape, second.shape
    if k == length and q % k == 0:
        return BlockLowRank.monarch(first, second)
    from gramian.ops.combinators import Product

    outer = BlockDiagonal(second, length * s, k * q, strided_rows=True, strided_columns=True)
    return Product((outer, BlockDiagonal(first, k * q, k * p)))
