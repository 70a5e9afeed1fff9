"""Block-sparse matrices with the same number of kept blocks in every block row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import psd_solve, weigh
from gramian.ops.block_low_rank import joined
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register

GATHERED = 2**23
"""Bytes of activations that are gathered at once: allocators take much larger pieces from the system anew each time, and
touching them for the first time costs more than the product."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class BlockSparse(Operator):
    """Each of R block rows keeps c blocks (the ELL layout of blocks).

    Args:
        values: (R, c, height, width).
        index: (R, c) integers: block column of each kept block, ascending and distinct within a row.
        rows, columns: true size; R height and C width may be larger (padding inside the operator).
    """

    kind: ClassVar[str] = "block_sparse"
    fittable: ClassVar[bool] = True
    values: Tensor
    index: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        self._check(
            self.values.dim() == 4
            and self.index.shape == self.values.shape[:2]
            and not self.index.is_floating_point()
            and self.values.shape[0] * self.values.shape[2] >= self.rows,
            f"values (R, c, height, width) with R height >= {self.rows} and integer index (R, c)",
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def _column_blocks(self) -> int:
        return -(-self.columns // self.values.shape[3])

    def apply(self, x: Tensor) -> Tensor:
        y = self._in_parts(self._row_product, x.reshape(-1, x.shape[-1]), 0)
        return y.reshape(*x.shape[:-1], self.rows)

    def _row_product(self, x: Tensor) -> Tensor:
        r, c, _, width = self.values.shape
        padded = self._column_blocks() * width
        if padded > self.columns:
            x = F.pad(x, (0, padded - self.columns))
        gathered = x.reshape(-1, padded // width, width).index_select(1, self.index.reshape(-1).long())
        gathered = gathered.reshape(-1, r, c * width).transpose(0, 1)  # (R, B, c width)
        y = torch.bmm(gathered, self._rows().mT)  # (R, B, height)
        return joined(y.transpose(0, 1), (len(x),), self.rows)

    def apply_columns(self, x: Tensor) -> Tensor:
        return self._in_parts(self._column_product, x, 1)

    def _column_product(self, x: Tensor) -> Tensor:
        r, c, height, width = self.values.shape
        padded = self._column_blocks() * width
        if padded > self.columns:
            x = F.pad(x, (0, 0, 0, padded - self.columns))
        batch = x.shape[1]
        blocks = x.reshape(padded // width, width, batch)
        gathered = blocks.index_select(0, self.index.reshape(-1)).reshape(r, c * width, batch)
        y = self._rows() @ gathered
        return y.reshape(r * height, batch)[: self.rows]

    def _in_parts(self, product: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
        """The product for parts of the batch, along `dim`, whose gathered copies take at most `GATHERED` bytes."""
        r, c, _, width = self.values.shape
        step = max(1, GATHERED // max(r * c * width * x.element_size(), 1))
        if x.shape[dim] <= step:
            return product(x)
        return torch.cat([product(part) for part in torch.split(x, step, dim)], dim)

    def _rows(self) -> Tensor:
        """The blocks of each block row side by side, (R, height, c width); in the run-time form a view."""
        return self.values.transpose(1, 2).flatten(2)

    def runtime(self) -> BlockSparse:
        """With blocks in memory as products read them: elsewhere every product copies them."""
        return self.replace(values=self.values.transpose(1, 2).contiguous().transpose(1, 2))

    def dense(self) -> Tensor:
        r, _, height, width = self.values.shape
        full = self.values.new_zeros(r, self._column_blocks(), height, width)
        place = self.index.long()[:, :, None, None].expand_as(self.values)
        full = full.scatter_add(1, place, self.values)
        return full.transpose(1, 2).reshape(r * height, -1)[: self.rows, : self.columns]

    def transpose(self) -> Operator:
        from gramian.ops.combinators import Transpose

        return Transpose(self)

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.values.numel()

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        kept: int = 1,
        block: tuple[int, int] | list[int] = (16, 16),
        **size: Any,
    ) -> BlockSparse:
        """Keep, in every block row, the `kept` blocks of largest weighted energy ``||H_ii^{1/2} W_ij G_jj^{1/2}||_F^2``
        (optimal brain damage), then refit the survivors S to the full input Gram: ``W_S = W G[:, S] G_SS^{-1}``
        (optimal brain surgeon), exact when the output Gram does not couple block rows.
        """
        out, in_ = weight.shape
        height, width = (min(int(b), d) for b, d in zip(block, (out, in_), strict=True))
        r, columns = -(-out // height), -(-in_ // width)
        if not 1 <= kept <= columns:
            raise GramianError(f"block_sparse: kept {kept} of {columns} blocks a row; expected 1 to {columns}")
        w = F.pad(weight, (0, columns * width - in_, 0, r * height - out)).double()
        g, h = _pad_gram(gram_in, columns * width), _pad_gram(gram_out, r * height)
        tiles = w.reshape(r, height, columns, width)
        energy = _block_weigh(tiles, g, axis="in") * _block_weigh(tiles, h, axis="out")
        index = energy.sum((1, 3)).topk(kept, dim=1).indices.sort(1).values  # (R, c)
        values = tiles.transpose(1, 2)[torch.arange(r)[:, None], index]  # (R, c, height, width)
        if g is not None and g.dim() == 2:
            image = weigh(w, g, side="in").reshape(r, height, columns * width)
            for i in range(r):
                support = (index[i][:, None] * width + torch.arange(width)).reshape(-1)
                solved = psd_solve(g[support][:, support], image[i][:, support].mT).mT
                values[i] = solved.reshape(height, kept, width).transpose(0, 1)
        return cls(values.to(weight), index.to(torch.int32), out, in_)

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        kept: int = 1,
        block: tuple[int, int] | list[int] = (16, 16),
        **size: Any,
    ) -> BlockSparse:
        out, in_ = shape
        height, width = (min(int(b), d) for b, d in zip(block, shape, strict=True))
        r, columns = -(-out // height), -(-in_ // width)
        index = torch.rand(r, columns, generator=generator).topk(kept, 1).indices.sort(1).values
        scale = (columns / kept) ** 0.5
        values = spectral_normal((out, in_), generator)
        tiles = F.pad(values, (0, columns * width - in_, 0, r * height - out)).reshape(r, height, columns, width)
        chosen = tiles.transpose(1, 2)[torch.arange(r)[:, None], index] * scale
        return cls(chosen, index.to(torch.int32), out, in_)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        out, in_ = shape
        found: list[Size] = []
        for b in (16, 32):
            height, width = min(b, out), min(b, in_)
            r, columns = -(-out // height), -(-in_ // width)
            kept = min(int(keep * out * in_ / (r * (height * width + 1))), columns)
            if kept >= 1:
                found.append({"kept": kept, "block": [height, width]})
        return found


def _pad_gram(gram: Tensor | None, length: int) -> Tensor | None:
    if gram is None:
        return None
    extra = length - gram.shape[0]
    return F.pad(gram.double(), (0, extra) * gram.dim())


def _block_weigh(tiles: Tensor, gram: Tensor | None, *, axis: str) -> Tensor:
    """Apply the diagonal blocks of a Gram to tiles (R, height, C, width) along one axis."""
    if gram is None:
        return tiles
    r, height, c, width = tiles.shape
    if axis == "in":
        if gram.dim() == 1:
            return tiles * gram.reshape(c, width)
        blocks = torch.stack([gram[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(c)])
        return torch.einsum("rhcw,cwv->rhcv", tiles, blocks)
    if gram.dim() == 1:
        return tiles * gram.reshape(r, height, 1, 1)
    blocks = torch.stack([gram[i * height : (i + 1) * height, i * height : (i + 1) * height] for i in range(r)])
    return torch.einsum("rhcw,rhg->rgcw", tiles, blocks)
