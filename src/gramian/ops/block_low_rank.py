"""Block low-rank matrices: one class for low rank, Monarch, block dense and two-core block tensor-train.

The matrix is cut into J x K blocks of s x p entries and every block has rank t. Rows and columns may be cut in two
ways each: *contiguous* (block j holds rows j s .. j s + s - 1) or *strided* (block j holds rows j, j + J, j + 2J, ...).

    structure                                             J, K, t
    low rank                                              1, 1, r
    block diagonal (b blocks)                             b, b, min(s, p), off-diagonal blocks absent: see BlockDiag
    block dense (Wei et al. 2024, "StructuredFFN")        1, K, r / K
    Monarch (Dao et al. 2022), rows strided               b, b, t
    two-core BTT (Qiu et al. 2024, "Compute Better Spent")  n0, m1, r
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import psd_root, reduced_rank, svd
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class BlockLowRank(Operator):
    """A matrix whose J x K blocks all have rank t.

    Block (j, k) is ``left[j][:, :, k] @ right[k, j]`` with left viewed as (J, s, t, K) and right as (K, J, t, p).

    Args:
        left: (J, s, t * K), rank index outer and column block inner.
        right: (K, J * t, p).
        rows, columns: true size; s and p are rows / J and columns / K rounded up (padding inside the operator).
        strided_rows, strided_columns: how rows and columns are cut into blocks.
    """

    kind: ClassVar[str] = "block_low_rank"
    fittable: ClassVar[bool] = True
    matrices: ClassVar[frozenset[str]] = frozenset({"left", "right"})
    left: Tensor
    right: Tensor
    rows: int
    columns: int
    strided_rows: bool = False
    strided_columns: bool = False

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        fits = left.dim() == 3 and right.dim() == 3
        if fits:
            (j, s, tk), (k, jt, p) = left.shape, right.shape
            fits = j > 0 and k > 0 and tk * j == jt * k and tk % k == 0
            fits = fits and s == -(-self.rows // j) and p == -(-self.columns // k)
        sizes = f"s = ceil({self.rows} / J), p = ceil({self.columns} / K)"
        self._check(fits, f"left (J, s, t K) and right (K, J t, p) with {sizes}")

    # Named constructors ------------------------------------------------------------------------------------------

    @classmethod
    def low_rank(cls, left: Tensor, right: Tensor) -> BlockLowRank:
        """``left (out, r) @ right (r, in)``."""
        return cls(left[None], right[None], left.shape[0], right.shape[1])

    @classmethod
    def monarch(cls, first: Tensor, second: Tensor) -> BlockLowRank:
        """The Monarch matrix ``P L P^T R`` with block-diagonal L and R (Dao et al. 2022, "Monarch", section 3.1), in
        the generalised form of their code: q numbers between the two for each block, rectangular blocks.

        Args:
            first: R, (b, q, in / b): block k maps its slice of the input to q numbers.
            second: L, (b, out / b, q): block j maps every b-th of those b q numbers, from the j-th on, to every b-th
                number of the output, from the j-th on; q must be a multiple of b.

        Raises:
            GramianError: the shapes do not fit together.
        """
        b, q, p = first.shape
        if second.shape[0] != b or second.shape[2] != q or q % b:
            raise GramianError(
                f"monarch: first {tuple(first.shape)} and second {tuple(second.shape)}; expected (b, q, p) and "
                "(b, s, q) with q a multiple of b"
            )
        s, t = second.shape[1], q // b
        # Group j takes the entries i = j, j + b, j + 2b, ... of every first block k, k outermost.
        right = first.reshape(b, t, b, p).transpose(1, 2).reshape(b, b * t, p)
        left = second.reshape(b, s, b, t).transpose(2, 3).reshape(b, s, t * b)
        return cls(left, right, b * s, b * p, strided_rows=True)

    @classmethod
    def block_dense(cls, left: Tensor, right: Tensor) -> BlockLowRank:
        """``left (out, r) @ block_diagonal(right)`` with right (K, r / K, in / K) (Wei et al. 2024, section 3.1)."""
        k, t, p = right.shape
        out, r = left.shape
        if r != k * t:
            raise GramianError(f"block_dense: left {tuple(left.shape)}, right {tuple(right.shape)}; expected r = K t")
        reordered = left.reshape(out, k, t).transpose(1, 2).reshape(1, out, t * k)
        return cls(reordered, right, out, k * p)

    @classmethod
    def btt(cls, left: Tensor, right: Tensor) -> BlockLowRank:
        """Two-core block tensor-train (Qiu et al. 2024, section 2): left (n0, n1, r, m1), right (m1, n0, r, m0)."""
        j, s, t, k = left.shape
        return cls(left.reshape(j, s, t * k), right.reshape(k, j * t, right.shape[3]), j * s, k * right.shape[3])

    # Operator ----------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[int, int]:
        """(J, K): how many row and column blocks."""
        return (self.left.shape[0], self.right.shape[0])

    @property
    def rank(self) -> int:
        """t: the rank of each block."""
        return self.left.shape[2] // self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        (j, _, tk), (k, _, p) = self.left.shape, self.right.shape
        if j == 1 and k == 1:
            return F.linear(F.linear(x, self.right[0]), self.left[0])
        batch = x.shape[:-1]
        if k * p > self.columns:
            x = F.pad(x, (0, k * p - self.columns))
        x = x.reshape(-1, p, k).mT if self.strided_columns else x.reshape(-1, k, p)
        z = torch.bmm(rows_of_blocks(x), self.right.mT)  # (K, B, J t)
        z = z.reshape(k, -1, j, tk // k).permute(1, 2, 3, 0).reshape(-1, j, tk)
        y = torch.bmm(rows_of_blocks(z), self.left.mT)  # (J, B, s)
        y = y.permute(1, 2, 0) if self.strided_rows else y.transpose(0, 1)
        return joined(y, batch, self.rows)

    def apply_columns(self, x: Tensor) -> Tensor:
        """Between the two batched products lies a view: rows of z are contiguous runs of the batch, so nothing is copied
        there. Strided rows or columns cost one copy each, of whole runs of the batch.
        """
        (j, s, tk), (k, _, p) = self.left.shape, self.right.shape
        if j == 1 and k == 1:
            return self.left[0] @ (self.right[0] @ x)
        batch = x.shape[1]
        if batch == 1:  # batched products with one column are several times slower than with one row
            return self.apply(x.mT).mT
        if k * p > self.columns:
            x = F.pad(x, (0, 0, 0, k * p - self.columns))
        blocks = x.reshape(p, k, batch).transpose(0, 1) if self.strided_columns else x.reshape(k, p, batch)
        z = self.right @ blocks  # (K, J t, B)
        t = tk // k
        if j == 1:
            gathered = z.transpose(0, 1).reshape(1, tk, batch) if t > 1 and k > 1 else z.reshape(1, tk, batch)
        elif t == 1:
            gathered = z.transpose(0, 1)  # (J, K, B), a view whose rows are contiguous
        else:
            gathered = z.reshape(k, j, t, batch).permute(1, 2, 0, 3).reshape(j, tk, batch)
        y = self.left @ gathered  # (J, s, B)
        if self.strided_rows:
            y = y.transpose(0, 1)
        return y.reshape(j * s, batch)[: self.rows]

    def transpose(self) -> BlockLowRank:
        (j, s, tk), (k, _, p) = self.left.shape, self.right.shape
        t = tk // k
        left = self.right.reshape(k, j, t, p).permute(0, 3, 2, 1).reshape(k, p, t * j)
        right = self.left.reshape(j, s, t, k).permute(0, 3, 2, 1).reshape(j, k * t, s)
        return BlockLowRank(left, right, self.columns, self.rows, self.strided_columns, self.strided_rows)

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.numel

    @property
    def balanced(self) -> BlockLowRank:
        """The same matrix with equally large factors (each block's two factors share its singular values): the gauge
        for training. The stored gauge of a fit is not balanced.
        """
        (j, s, tk), (k, _, p) = self.left.shape, self.right.shape
        t = tk // k
        left = self.left.reshape(j, s, t, k).permute(0, 3, 1, 2)  # (J, K, s, t)
        right = self.right.reshape(k, j, t, p).transpose(0, 1)  # (J, K, t, p)
        ql, rl = torch.linalg.qr(left.double())
        qr, rr = torch.linalg.qr(right.mT.double())
        u, sigma, vh = svd(rl @ rr.mT)
        root = sigma.sqrt()[..., None, :]
        left, right = (ql @ (u * root)).to(self.left), ((vh.mT * root).mT @ qr.mT).to(self.right)
        grown = left.shape[-1]
        return BlockLowRank(
            left.permute(0, 2, 3, 1).reshape(j, s, grown * k),
            right.transpose(0, 1).reshape(k, j * grown, p),
            *self.shape,
            self.strided_rows,
            self.strided_columns,
        )

    # Projection --------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        rank: int = 1,
        blocks: tuple[int, int] | list[int] = (1, 1),
        strided_rows: bool = False,
        strided_columns: bool = False,
        sweeps: int = 3,
        **size: Any,
    ) -> BlockLowRank:
        """Closed form where one exists, block-coordinate descent elsewhere.

        One block: the two-sided optimum (``linalg.reduced_rank``). No Grams, or Grams that do not couple blocks: the
        blocks are disjoint, so the truncated SVD of each weighted block is the optimum. Otherwise sweeps over column
        blocks k, each solved exactly given the others: the unconstrained optimum of the block column is
        ``A_k + (W - A) G[:, k] G_kk^{-1}``, and its rank-t truncation in the norm of (H_jj, G_kk) is the minimiser; the
        objective with H's diagonal blocks never rises. H's coupling between row blocks is left to
        ``gramian.fit``, which polishes under the whole of it.
        """
        out, in_ = weight.shape
        j, k = (max(1, min(int(b), d)) for b, d in zip(blocks, (out, in_), strict=True))
        if rank < 1:
            raise GramianError(f"block_low_rank: rank {rank}; expected at least 1")
        if j == k == 1:
            best = reduced_rank(weight, gram_in, gram_out)
            r = min(rank, out, in_)
            return cls.low_rank(best.left[:, :r].to(weight), best.right[:r].to(weight))
        s, p = -(-out // j), -(-in_ // k)
        t = min(rank, s, p)
        row_order = block_order(out, j, s, strided_rows)
        column_order = block_order(in_, k, p, strided_columns)
        w = padded(weight.double(), row_order, column_order)  # (J s, K p), blocks contiguous
        g = padded_gram(gram_in, column_order)
        h = padded_gram(gram_out, row_order)
        columns = w.reshape(j, s, k, p)
        root_in = _block_roots(g, k, p, w)
        root_out = _block_roots(h, j, s, w)

        def truncate(target: Tensor, index: int) -> tuple[Tensor, Tensor]:
            """Rank-t factors (J, s, t), (J, t, p) of the block column `target` (J, s, p)."""
            weighted = root_out[0] @ target @ root_in[0][index]
            u, sigma, vh = svd(weighted)
            return root_out[1] @ (u[..., :t] * sigma[..., None, :t]), vh[..., :t, :] @ root_in[1][index]

        found = [truncate(columns[:, :, i], i) for i in range(k)]
        if g is not None and g.dim() == 2:
            approx = torch.cat([(u @ v).reshape(j * s, p) for u, v in found], 1)
            for _ in range(sweeps if k > 1 else 0):
                for i in range(k):
                    span = slice(i * p, (i + 1) * p)
                    inverse = root_in[1][i] @ root_in[1][i]
                    target = approx[:, span] + (w - approx) @ g[:, span] @ inverse
                    u, v = truncate(target.reshape(j, s, p), i)
                    found[i] = (u, v)
                    approx[:, span] = (u @ v).reshape(j * s, p)
        left = torch.stack([u for u, _ in found], -1).reshape(j, s, t * k)  # (J, s, t, K)
        right = torch.stack([v for _, v in found]).reshape(k, j * t, p)  # (K, J, t, p)
        return cls(left.to(weight), right.to(weight), out, in_, strided_rows, strided_columns)

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        rank: int = 1,
        blocks: tuple[int, int] | list[int] = (1, 1),
        strided_rows: bool = False,
        strided_columns: bool = False,
        **size: Any,
    ) -> BlockLowRank:
        """Each core by the spectral rule of its own fan-in and fan-out (Qiu et al. 2024, section 3)."""
        out, in_ = shape
        j, k = blocks
        s, p = -(-out // j), -(-in_ // k)
        right = spectral_normal((k, j * rank, p), generator)
        left = spectral_normal((j, s, rank * k), generator)
        return cls(left, right, out, in_, strided_rows, strided_columns)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """Low rank and, for blocks (2, 2), (4, 4), (8, 8), (16, 16), the largest rank that fits."""
        out, in_ = shape
        found: list[Size] = []
        for b in (1, 2, 4, 8, 16):
            if b > min(out, in_):
                break
            s, p = -(-out // b), -(-in_ // b)
            rank = min(int(keep * out * in_ / (b * b * (s + p))), s, p)
            if rank >= 1:
                found.append({"rank": rank, "blocks": [b, b]})
        return found


def rows_of_blocks(x: Tensor) -> Tensor:
    """(B, b, p) -> (b, B, p), a view of whole rows, copied if need be: batched products read those up to twice as fast as
    block after block.
    """
    return x.contiguous().transpose(0, 1)


def joined(y: Tensor, batch: tuple[int, ...], rows: int) -> Tensor:
    """Blocks (B, ., .) side by side again, without padding: (*batch, rows)."""
    if y.shape[1] * y.shape[2] != rows:
        y = y.reshape(-1, y.shape[1] * y.shape[2])[:, :rows]
    return y.reshape(*batch, rows)


def block_order(length: int, blocks: int, width: int, strided: bool) -> Tensor:
    """For each place of the block-contiguous padded axis, the original coordinate, or -1 for padding."""
    places = (
        torch.arange(blocks * width).reshape(width, blocks).T.reshape(-1) if strided else torch.arange(blocks * width)
    )
    return torch.where(places < length, places, torch.full_like(places, -1))


def padded(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The matrix in the order of ``block_order`` on both sides, zeros in the padding."""
    out = weight[rows.clamp_min(0).to(weight.device)][:, columns.clamp_min(0).to(weight.device)].clone()
    out[(rows < 0).to(weight.device)] = 0
    out[:, (columns < 0).to(weight.device)] = 0
    return out


def padded_gram(gram: Tensor | None, order: Tensor) -> Tensor | None:
    """A Gram (n, n), or its diagonal (n,), in the order of ``block_order``, in float64."""
    if gram is None:
        return None
    gram = gram.double()
    if gram.dim() == 1:
        return torch.where(order.to(gram.device) < 0, gram.new_zeros(()), gram[order.clamp_min(0)])
    return padded(gram, order, order)


def _block_roots(gram: Tensor | None, blocks: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Roots and inverse roots (blocks, width, width) of a Gram's diagonal blocks; the identity for None."""
    if gram is None:
        eye = torch.eye(width, dtype=like.dtype, device=like.device).expand(blocks, width, width)
        return eye, eye
    pairs = []
    for i in range(blocks):
        span = slice(i * width, (i + 1) * width)
        block = torch.diag(gram[span]) if gram.dim() == 1 else gram[span, span]
        pairs.append(psd_root(block))
    return torch.stack([root for root, _ in pairs]), torch.stack([inverse for _, inverse in pairs])
