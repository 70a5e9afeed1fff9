"""Butterfly matrices, and the pixelated butterfly: block-sparse on a fixed butterfly mask plus low rank.

A butterfly matrix (Dao, Gu, Eichhorn, Rudra, Re 2019, "Learning Fast Algorithms for Linear Transforms Using Butterfly
Factorizations", section 3) of size n = 2^L is a product of L sparse factors; factor l mixes the pairs of coordinates
that are 2^l apart. Run one by one, the factors cost more time than the dense matrix at the sizes of layers. Multiplied
out by halves they are the two block-diagonal factors of a ``BlockLowRank`` of rank one (Dao et al. 2022, "Monarch",
section 3): that is what is made of them here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import reduced_rank, svd, weighted_error
from gramian.ops.blast import damped_solve
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.block_sparse import BlockSparse
from gramian.ops.combinators import Sum
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register

MASK_SHARE = 0.75
"""Of a budget, at most this share goes to the blocks of a pixelated butterfly, the rest to its rank. (Ours; we did not
check the constant against the paper.)"""


# Butterfly ------------------------------------------------------------------------------------------------------------


def butterfly(twiddles: Tensor) -> BlockLowRank:
    """The butterfly matrix ``B_{L-1} ... B_1 B_0`` as two block-diagonal factors.

    ``B_l`` maps each pair (x[i], x[i + 2^l]), where bit l of i is zero, by a 2 x 2 matrix of its own. The lower half of
    the levels mixes within contiguous runs of 2^ceil(L / 2) coordinates, the upper half within strided ones.

    Args:
        twiddles: (L, 2^L / 2, 2, 2): ``twiddles[l, a 2^l + b]`` belongs to the pair i = a 2^(l + 1) + b, b < 2^l. The
            order of the published code (``increasing_stride``).

    Returns:
        Shape (2^L, 2^L), differentiable in the twiddles.

    Raises:
        GramianError: the twiddles have another shape.
    """
    levels = twiddles.shape[0] if twiddles.dim() == 4 else 0
    if levels < 1 or tuple(twiddles.shape) != (levels, 2 ** (levels - 1), 2, 2):
        raise GramianError(f"butterfly: twiddles {tuple(twiddles.shape)}; expected (L, 2^L / 2, 2, 2)")
    n, low = 2**levels, (levels + 1) // 2
    p, s = 2**low, 2 ** (levels - low)
    # A level acts alike on every run: rows of the merged block come from applying the levels to unit vectors.
    first = _apply_levels(torch.eye(p).to(twiddles).repeat(1, s), twiddles[:low], 0)  # column c of every block, (p, n)
    right = first.reshape(p, s, p).permute(1, 2, 0)  # (K, p out, p in)
    units = torch.eye(s).to(twiddles).repeat_interleave(p, 1)  # (s, n)
    second = _apply_levels(units, twiddles[low:], low)
    left = second.reshape(s, s, p).permute(2, 1, 0)  # (J, s out, s in)
    return BlockLowRank(left.contiguous(), right.contiguous(), n, n, strided_rows=True)


def _apply_levels(x: Tensor, twiddles: Tensor, start: int) -> Tensor:
    """Levels start, start + 1, ... applied to the rows of x (B, n)."""
    shape = x.shape
    for level, pairs in enumerate(twiddles, start):
        x = x.reshape(shape[0], -1, 2, 2**level)
        mixing = pairs.reshape(-1, 2**level, 2, 2).permute(0, 2, 3, 1)  # (runs, out, in, 2^level)
        x = (mixing * x[:, :, None]).sum(3)
    return x.reshape(shape)


def butterfly_fit(weight: Tensor, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None) -> BlockLowRank:
    """The projection on the two-factor form, of which every butterfly matrix is a member.

    Without Grams it is the exact optimum (rank-one truncation of disjoint blocks), so a butterfly is recovered to
    rounding. Any shape: the runs are powers of two near the square roots of the sides, padded.

    Args:
        weight: (out, in).
        gram_in: (in, in), its diagonal (in,), or None.
        gram_out: (out, out), its diagonal (out,), or None.

    Returns:
        About 2 sqrt(out in) max(out, in) numbers; ``butterfly_twiddles`` gives the 2 n log2(n) of a true butterfly.
    """
    out, in_ = weight.shape
    low = (max(in_ - 1, 1).bit_length() + 1) // 2
    width = min(2**low, in_)  # of a run of the input; as many strided row blocks
    blocks = (min(width, out), -(-in_ // width))
    return BlockLowRank.fit(weight, gram_in=gram_in, gram_out=gram_out, rank=1, blocks=blocks, strided_rows=True)


def butterfly_twiddles(weight: Tensor) -> Tensor:
    """The twiddles of a butterfly matrix by recursive splitting (Le, Zheng, Riccietti, Gribonval 2022, "Fast learning of
    fast transforms, with guarantees"): each split is one projection on the two-factor form, whose factors are
    butterflies of half as many levels. Exact for a butterfly, whatever its scale; for another matrix each split is
    optimal, their sequence is not.

    Args:
        weight: (n, n) with n = 2^L, L at least 1.

    Returns:
        (L, n / 2, 2, 2), in the dtype of `weight`, as ``butterfly`` takes them.

    Raises:
        GramianError: not square, or not a power of two.
    """
    n = weight.shape[0]
    levels = n.bit_length() - 1
    if weight.dim() != 2 or weight.shape[1] != n or n != 2**levels or n < 2:
        raise GramianError(f"butterfly_twiddles: weight {tuple(weight.shape)}; expected (n, n), n = 2, 4, 8, ...")
    return _split(weight.double()[None])[0].to(weight)


def _split(matrices: Tensor) -> Tensor:
    """Twiddles (N, L, n / 2, 2, 2) of each of N matrices (N, n, n)."""
    count, n, _ = matrices.shape
    levels = n.bit_length() - 1
    if levels == 1:
        return matrices[:, None, None]
    low = (levels + 1) // 2
    p, s = 2**low, 2 ** (levels - low)
    # Block (j, k) holds rows j, j + p, ... and columns k p, ..., k p + p - 1.
    tiles = matrices.reshape(count, s, p, s, p).permute(0, 2, 3, 1, 4)  # (N, J, K, s, p)
    u, sigma, vh = svd(tiles)
    root = sigma[..., 0].sqrt()[..., None]
    left = (u[..., 0] * root).transpose(2, 3)  # (N, J, s, K)
    right = (vh[..., 0, :] * root).transpose(1, 2)  # (N, K, J, p)
    upper = _split(left.reshape(count * p, s, s)).reshape(count, p, levels - low, s // 2, 2, 2)
    lower = _split(right.reshape(count * s, p, p)).reshape(count, s, low, p // 2, 2, 2)
    # The runs of a lower level follow one another; an upper level's pair a 2^l + b of offset j is (a 2^l + b) p + j.
    return torch.cat(
        [
            lower.transpose(1, 2).reshape(count, low, n // 2, 2, 2),
            upper.permute(0, 2, 3, 1, 4, 5).reshape(count, levels - low, n // 2, 2, 2),
        ],
        1,
    )


# Pixelated butterfly --------------------------------------------------------------------------------------------------


def flat_butterfly(rows: int, columns: int, levels: int) -> Tensor:
    """The fixed mask of the pixelated butterfly (Dao, Chen, Liang et al. 2022, "Pixelated Butterfly", section 3.2): on a
    grid of 2^m x 2^m, place (i, j) is on if i = j or i = j xor 2^l for an l < `levels`: the first-order part of a
    product of factors ``I + B_l``. A rectangular grid is that one stretched (each place repeated, as in their code).

    Args:
        rows: of the grid, at least 1.
        columns: of the grid, at least 1.
        levels: at most m, where 2^m is the largest power of two within both.

    Returns:
        (rows, c) int32: which columns are on, ascending. Where the sides are not multiples of 2^m, places nearest to the
        diagonal fill rows up to the same count (ours).

    Raises:
        GramianError: `levels` is negative or above m.
    """
    m = min(rows, columns).bit_length() - 1
    if not 0 <= levels <= m:
        raise GramianError(f"flat_butterfly: {levels} levels on a grid {rows} x {columns}; expected 0 to {m}")
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    apart = (row * 2**m // rows) ^ (column * 2**m // columns)
    on = (apart == 0) | ((apart & (apart - 1) == 0) & (apart < 2**levels))
    off_diagonal = (row / rows - column / columns).abs()  # below 1
    count = int(on.sum(1).max())
    chosen: Tensor = (on.double() - off_diagonal).topk(count, 1).indices.sort(1).values
    return chosen.to(torch.int32)


@register
@dataclass(frozen=True, eq=False, repr=False)
class PixelatedButterfly(Sum):
    """A block-sparse matrix on the ``flat_butterfly`` mask plus a low-rank one (Dao et al. 2022, section 3).

    The paper's ``gamma B + (1 - gamma) U V^T`` with a learned scalar gamma is the same set of matrices: gamma is part of
    the factors here. A sum in every respect; the class is what ``fit``, ``init`` and ``sizes`` hang on.

    Args:
        parts: (BlockSparse, BlockLowRank).
    """

    kind: ClassVar[str] = "pixelated_butterfly"
    fittable: ClassVar[bool] = True
    parts: tuple[Operator, ...]

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        levels: int = 1,
        rank: int = 1,
        block: int = 16,
        sweeps: int = 30,
        **size: Any,
    ) -> PixelatedButterfly:
        """The blocks fit whatever the low-rank part leaves under them, so without Grams, or under diagonal ones, only the
        rest of the matrix counts: low-rank completion, by alternating least squares from the best low-rank matrix.

        Full Grams couple the two: from there, or from the two-sided low-rank optimum if that is better, alternate
        between the low-rank part, exact for what the blocks leave (``linalg.reduced_rank``), and the blocks, refitted
        a block row at a time. In both, a step along the last change is tried after each sweep and kept if it lowers the
        objective, which never rises: the result is never worse than low rank alone at equal rank.

        Args:
            weight: (out, in).
            gram_in: (in, in), its diagonal (in,), or None.
            gram_out: (out, out), its diagonal (out,), or None.
            levels: of the mask.
            rank: of the low-rank part; at least 1, cut to the smaller side.
            block: side of a block; cut to the sides of the matrix.
            sweeps: at most so many of either kind.
            size: nothing else.

        Raises:
            GramianError: rank below 1, or more levels than the grid of blocks has.
        """
        if rank < 1:
            raise GramianError(f"pixelated_butterfly: rank {rank}; expected at least 1")
        rank = min(rank, *weight.shape)
        problem = _Problem(weight, gram_in, gram_out, levels, block)
        # Weighted completion is the objective, or near it; the plain one conditions better and finds members.
        starts = [problem.completed(rank, sweeps, weighted) for weighted in problem.weightings]
        pairs = [(problem.filled(low), low) for low in starts]
        if problem.coupled:
            pairs.append((problem.nothing, problem.low_rank(problem.nothing, rank)))
        values, low = min(pairs, key=lambda pair: problem.error(*pair))
        if problem.coupled:
            values, low = problem.alternate(values, low, sweeps)
        sparse = BlockSparse(values.to(weight), problem.index, *weight.shape)
        return cls((sparse, BlockLowRank.low_rank(low[0].to(weight), low[1].to(weight))))

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        levels: int = 1,
        rank: int = 1,
        block: int = 16,
        **size: Any,
    ) -> PixelatedButterfly:
        """Both parts by the spectral rule, the blocks scaled by 1 / sqrt(density), each with half of the variance."""
        out, in_ = shape
        index, height, width = _grid(shape, levels, block)
        columns, kept = -(-in_ // width), index.shape[1]
        std = spectral_normal((out, in_), generator)
        tiles = F.pad(std, (0, columns * width - in_, 0, len(index) * height - out))
        tiles = tiles.reshape(len(index), height, columns, width).transpose(1, 2)
        values = tiles[torch.arange(len(index))[:, None], index.long()] * (columns / kept / 2) ** 0.5
        rank = min(rank, out, in_)
        left, right = spectral_normal((out, rank), generator), spectral_normal((rank, in_), generator)
        return cls((BlockSparse(values, index, out, in_), BlockLowRank.low_rank(left * 0.5**0.5, right)))

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """For blocks of 16 and 32, the most levels within ``MASK_SHARE`` of the budget, and the rank that fills it."""
        out, in_ = shape
        found: list[Size] = []
        for block in (16, 32):
            if 2 * block > min(out, in_):
                break
            most = min(-(-out // block), -(-in_ // block)).bit_length() - 1
            for levels in range(most, -1, -1):
                index, height, width = _grid(shape, levels, block)
                numbers = index.numel() * (height * width + 1)
                rank = min(int((keep * out * in_ - numbers) / (out + in_)), out, in_)
                if numbers <= MASK_SHARE * keep * out * in_ and rank >= 1:
                    found.append({"levels": levels, "rank": rank, "block": block})
                    break
        return found


def _grid(shape: tuple[int, ...], levels: int, block: int) -> tuple[Tensor, int, int]:
    """The mask over the blocks of a matrix, and a block's height and width."""
    height, width = (min(block, n) for n in shape)
    return flat_butterfly(-(-shape[0] // height), -(-shape[1] // width), levels), height, width


_Pair = tuple[Tensor, Tensor]


class _Problem:
    """The least-squares problem of the blocks and of the low-rank part, in float64."""

    def __init__(
        self, weight: Tensor, gram_in: Tensor | None, gram_out: Tensor | None, levels: int, block: int
    ) -> None:
        self.weight = weight.double()
        self.gram_in, self.gram_out = (None if gram is None else gram.double() for gram in (gram_in, gram_out))
        index, *self.size = _grid(weight.shape, levels, block)
        self.index = index.to(weight.device)
        self.nothing = self.weight.new_zeros(*self.index.shape, *self.size)

    @property
    def weightings(self) -> list[bool]:
        """Which completions are worth a try."""
        return [False] if self.gram_in is None and self.gram_out is None else [False, True]

    @property
    def coupled(self) -> bool:
        """Whether an error under one block matters for another."""
        return any(gram is not None and gram.dim() == 2 for gram in (self.gram_in, self.gram_out))

    def rest(self, values: Tensor) -> Tensor:
        return self.weight - BlockSparse(values, self.index, *self.weight.shape).dense()

    def error(self, values: Tensor, low: _Pair) -> float:
        return float(weighted_error(self.rest(values) - low[0] @ low[1], self.gram_in, self.gram_out))

    def low_rank(self, values: Tensor, rank: int) -> _Pair:
        """The best low-rank partner of the blocks."""
        best = reduced_rank(self.rest(values), self.gram_in, self.gram_out)
        return best.left[:, :rank], best.right[:rank]

    def completed(self, rank: int, sweeps: int, weighted: bool) -> _Pair:
        """The low-rank matrix (m, r), (r, n) nearest off the blocks, if `weighted` by the diagonals of the Grams."""
        (m, n), (height, width), (r, _) = self.weight.shape, self.size, self.index.shape
        c = -(-n // width)
        a, b = (
            (gram.diagonal() if gram.dim() == 2 else gram).clamp_min(0)
            if gram is not None and weighted
            else self.weight.new_ones(length)
            for gram, length in ((self.gram_out, m), (self.gram_in, n))
        )
        a, b = a.sqrt()[:, None], b.sqrt()
        target = F.pad(a * self.weight * b, (0, c * width - n, 0, r * height - m))
        off = target.new_ones(r, c).scatter_(1, self.index.long(), 0.0)
        mask = off.repeat_interleave(height, 0).repeat_interleave(width, 1)
        best = reduced_rank(target)
        left, right = best.left[:, :rank], best.right[:rank]

        def half(left: Tensor, right: Tensor, target: Tensor, off: Tensor, mask: Tensor) -> Tensor:
            """The best `left` for `right`: one system a block row, of the columns off its blocks."""
            tiles = right.reshape(rank, off.shape[1], -1).transpose(0, 1)
            systems = (off @ (tiles @ tiles.mT).flatten(1)).reshape(-1, rank, rank)
            slope = ((target - left @ right) * mask) @ right.mT
            change = damped_solve(systems, slope.reshape(len(systems), -1, rank).mT)
            return left + change.mT.reshape(left.shape)

        def error(left: Tensor, right: Tensor) -> float:
            return float(((target - left @ right) * mask).square().sum())

        total, now, stretch = float(target.square().sum()), error(left, right), 1.0
        for _ in range(sweeps):
            last = left, right
            left = half(left, right, target, off, mask)
            right = half(right.mT, left.mT, target.mT, off.mT, mask.mT).mT
            after = error(left, right)
            if not after < now:
                left, right = last
                break
            now = after
            further = left + stretch * (left - last[0]), right + stretch * (right - last[1])
            beyond = error(*further)
            if beyond < now:
                (left, right), now, stretch = further, beyond, stretch * 1.5
            else:
                stretch = max(stretch / 3, 0.5)
            if now <= 1e-28 * total:
                break
        return left[:m] * torch.where(a > 0, 1 / a, 0.0), right[:, :n] * torch.where(b > 0, 1 / b, 0.0)

    def filled(self, low: _Pair) -> Tensor:
        """The blocks that leave no error under themselves: their optimum where nothing couples."""
        (m, n), (height, width) = self.weight.shape, self.size
        r, c = len(self.index), -(-n // width)
        rest = F.pad(self.weight - low[0] @ low[1], (0, c * width - n, 0, r * height - m))
        tiles = rest.reshape(r, height, c, width).transpose(1, 2)
        return tiles[torch.arange(r, device=tiles.device)[:, None], self.index.long()]

    def refit(self, values: Tensor, low: _Pair) -> Tensor:
        """The blocks of each block row in turn at their optimum: ``+= H_ii^{-1} (H E G)_{i, S} G_SS^{-1}``."""
        (m, n), (height, width), g, h = self.weight.shape, self.size, self.gram_in, self.gram_out
        error = self.rest(values) - low[0] @ low[1]
        values = values.clone()
        for i, row in enumerate(self.index.long()):
            rows = slice(i * height, min((i + 1) * height, m))
            support = (row[:, None] * width + torch.arange(width, device=row.device)).reshape(-1)
            real = support < n
            support = support[real]
            change = error[rows]
            if h is not None and h.dim() == 2:
                change = damped_solve(h[rows, rows], h[rows] @ error)
            if g is not None and g.dim() == 2:
                change = damped_solve(g[support][:, support], (change @ g[:, support]).mT).mT
            else:
                change = change[:, support]
            error[rows, support] -= change
            flat = values.new_zeros(height, len(real))
            flat[: len(change), real] = change
            values[i] += flat.reshape(height, len(row), width).transpose(0, 1)
        return values

    def alternate(self, values: Tensor, low: _Pair, sweeps: int) -> tuple[Tensor, _Pair]:
        """Blocks and low-rank part in turn; the extrapolation is of the blocks, which determine the other."""
        rank, error, stretch = low[1].shape[0], self.error(values, low), 1.0
        for _ in range(sweeps):
            refitted = self.refit(values, low)
            fresh = self.low_rank(refitted, rank)
            after = self.error(refitted, fresh)
            if not after < error:
                break
            further = refitted + stretch * (refitted - values)
            values, low, error = refitted, fresh, after
            beyond = self.low_rank(further, rank)
            reached = self.error(further, beyond)
            if reached < error:
                values, low, error, stretch = further, beyond, reached, stretch * 1.5
            else:
                stretch = max(stretch / 3, 0.5)
        return values, low
