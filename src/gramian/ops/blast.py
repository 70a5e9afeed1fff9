"""BLAST: blocks that share bases, ``W_ij = U_i diag(s_ij) V_j`` (Lee, Kwon, Qu, Kim 2024, "BLAST: Block-Level Adaptive
Structured Matrices for Efficient Deep Neural Network Inference", section 2).

All blocks of a block row share the columns of U_i, all blocks of a block column the rows of V_j; only r weights are a
block's own. With all weights one it is a low-rank matrix, with zero weights off the diagonal a block-diagonal one.

The paper fits by preconditioned gradient descent from a small random start. Here (ours): the low-rank optimum as a
start, then exact alternating least squares under both Grams, extrapolated between sweeps; and, where the blocks are no
smaller than r, an algebraic start that recovers a member to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import eigenvectors, psd_solve, reduced_rank, svd, weighted_error
from gramian.ops.block_low_rank import joined, rows_of_blocks
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register

BLOCKS = (2, 4, 8, 16)
"""Numbers of block rows and columns that ``sizes`` offers."""
FEW_ROWS = 8
"""Of x: up to so many, the product copies what lies between its parts."""
DAMPING = 1e-10
"""Of the solves, relative to the mean diagonal."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class Blast(Operator):
    """I x J blocks ``left[i] @ diag(scales[:, i, j]) @ right[j]``.

    Args:
        left: U, (I, p, r): a basis of each block row.
        scales: s, (r, I, J): the weights of each block; r comes first, as the product reads them.
        right: V, (J, r, q): a basis of each block column.
        rows, columns: true size; p and q are rows / I and columns / J rounded up (padding inside the operator).
    """

    kind: ClassVar[str] = "blast"
    fittable: ClassVar[bool] = True
    own_sweeps: ClassVar[int] = 10
    left: Tensor
    scales: Tensor
    right: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        left, scales, right = self.left, self.scales, self.right
        fits = left.dim() == scales.dim() == right.dim() == 3
        if fits:
            (i, p, r), (j, other, q) = left.shape, right.shape
            fits = i > 0 and j > 0 and r == other and scales.shape == (r, i, j)
            fits = fits and p == -(-self.rows // i) and q == -(-self.columns // j)
        sizes = f"p = ceil({self.rows} / I), q = ceil({self.columns} / J)"
        self._check(fits, f"left (I, p, r), scales (r, I, J) and right (J, r, q) with {sizes}")

    @property
    def blocks(self) -> tuple[int, int]:
        """(I, J): how many row and column blocks."""
        return (self.left.shape[0], self.right.shape[0])

    @property
    def rank(self) -> int:
        """r: how many columns each shared basis has."""
        return self.scales.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        """Three batched products. Of many rows the middle one, over r, reads and writes views, so only the result is copied;
        of few, copies are small and products of views take twice as long.
        """
        j, _, q = self.right.shape
        batch = x.shape[:-1]
        if j * q > self.columns:
            x = F.pad(x, (0, j * q - self.columns))
        x = x.reshape(-1, j, q)
        if len(x) <= FEW_ROWS:
            z = torch.bmm(rows_of_blocks(x), self.right.mT)  # (J, B, r)
            z = torch.bmm(rows_of_blocks(z.permute(1, 2, 0)), self.scales.mT)  # (r, B, I)
            y = torch.bmm(rows_of_blocks(z.permute(1, 2, 0)), self.left.mT)  # (I, B, p)
        else:
            z = self.right @ x.permute(1, 2, 0)  # (J, r, B)
            z = self.scales @ z.transpose(0, 1)  # (r, I, B)
            y = z.permute(1, 2, 0) @ self.left.mT  # (I, B, p)
        return joined(y.transpose(0, 1), batch, self.rows)

    def apply_columns(self, x: Tensor) -> Tensor:
        """Nothing is copied: every product reads a view of the one before, with contiguous runs of the batch."""
        (i, p, _), (j, _, q) = self.left.shape, self.right.shape
        batch = x.shape[1]
        if batch == 1:  # batched products with one column are several times slower than with one row
            return self.apply(x.mT).mT
        if j * q > self.columns:
            x = F.pad(x, (0, 0, 0, j * q - self.columns))
        z = self.right @ x.reshape(j, q, batch)  # (J, r, B)
        z = self.scales @ z.transpose(0, 1)  # (r, I, B)
        y = self.left @ z.transpose(0, 1)  # (I, p, B)
        return y.reshape(i * p, batch)[: self.rows]

    def transpose(self) -> Blast:
        return Blast(self.right.mT, self.scales.mT, self.left.mT, self.columns, self.rows)

    def dense(self) -> Tensor:
        full = _Factors(self.left, self.scales.permute(1, 2, 0), self.right).dense()
        return full[: self.rows, : self.columns]

    # Whether to run dense instead is decided in gramian.execution, not here.

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * self.numel

    # Projection --------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        rank: int = 1,
        blocks: tuple[int, int] | list[int] = (8, 8),
        sweeps: int = 30,
        **size: Any,
    ) -> Blast:
        """Alternating least squares from the two-sided low-rank optimum (``linalg.reduced_rank``) with unit scales.

        Each of U_i, V_j and s_ij is in turn the exact minimiser given all others: ``U_i += H_ii^+ (H E G)_i Z_i^T
        (Z_i G Z_i^T)^+`` with the error E and ``Z_i = [diag(s_i1) V_1, ...]``, V_j likewise with the sides exchanged,
        and ``s_ij += (U_i^T H_ii U_i * V_j G_jj V_j^T)^+ diag(U_i^T (H E G)_ij V_j^T)``. The objective never rises, so
        the result is never worse than the low-rank one of equal r. After each sweep a step along the last change is
        tried and kept if it lowers the objective.

        A member with ``r <= min(p, q)`` is recovered to rounding (``_member``). Beyond, the problem resembles a tensor
        decomposition of high rank: the sweeps converge, slowly, and need not find a member.

        Args:
            weight: (out, in).
            gram_in: (in, in), its diagonal (in,), or None.
            gram_out: (out, out), its diagonal (out,), or None.
            rank: r; any positive number, larger than out or in included.
            blocks: (I, J).
            sweeps: at most so many passes over all factors; 0 gives the start.
            size: nothing else.

        Raises:
            GramianError: rank below 1.
        """
        out, in_ = weight.shape
        i, j = _grid(weight.shape, blocks)
        if rank < 1:
            raise GramianError(f"blast: rank {rank}; expected at least 1")
        p, q = -(-out // i), -(-in_ // j)
        w = F.pad(weight.double(), (0, j * q - in_, 0, i * p - out))
        g, h = _padded_gram(gram_in, in_, j * q, w), _padded_gram(gram_out, out, i * p, w)
        found = _low_rank(w, g, h, rank, i, j)
        error = found.error(w, g, h)
        if min(i, j) > 1 and rank <= min(p, q):
            member = _member(w, found)
            if member.error(w, g, h) < error:  # false where it is not finite
                found = member
        found = _alternate(found, w, g, h, sweeps).balanced()
        return cls(
            found.left.to(weight),
            found.scales.permute(2, 0, 1).contiguous().to(weight),
            found.right.to(weight),
            out,
            in_,
        )

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        rank: int = 1,
        blocks: tuple[int, int] | list[int] = (8, 8),
        **size: Any,
    ) -> Blast:
        """Each of the three steps by the spectral rule of its own fan-in and fan-out (ours)."""
        out, in_ = shape
        i, j = _grid(shape, blocks)
        right = spectral_normal((j, rank, -(-in_ // j)), generator)
        scales = spectral_normal((rank, i, j), generator)
        left = spectral_normal((i, -(-out // i), rank), generator)
        return cls(left, scales, right, out, in_)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """For 2 x 2, 4 x 4, 8 x 8 and 16 x 16 blocks of at least two rows and columns, the largest rank that fits."""
        out, in_ = shape
        found: list[Size] = []
        for b in BLOCKS:
            if 2 * b > min(out, in_):
                break
            rank = min(int(keep * out * in_ / (b * (-(-out // b) + -(-in_ // b) + b))), out, in_)
            if rank >= 1:
                found.append({"rank": rank, "blocks": [b, b]})
        return found


class _Factors(NamedTuple):
    """The factors as the solver holds them."""

    left: Tensor  # (I, p, r)
    scales: Tensor  # (I, J, r)
    right: Tensor  # (J, r, q)

    @property
    def T(self) -> _Factors:
        return _Factors(self.right.mT, self.scales.transpose(0, 1), self.left.mT)

    def dense(self) -> Tensor:
        i, p, _ = self.left.shape
        return (self.left @ _rows(self.scales, self.right)).reshape(i * p, -1)

    def error(self, w: Tensor, g: Tensor | None, h: Tensor | None) -> float:
        return float(weighted_error(w - self.dense(), g, h))

    def normalised(self) -> _Factors:
        """The same matrix with basis vectors of length one."""
        a, b = self.left.norm(dim=1), self.right.norm(dim=2)
        left = self.left / a.where(a > 0, torch.ones_like(a))[:, None]
        right = self.right / b.where(b > 0, torch.ones_like(b))[:, :, None]
        return _Factors(left, self.scales * a[:, None] * b, right)

    def balanced(self) -> _Factors:
        """The same matrix with scales of mean square one for each of the r terms, the rest shared by both bases."""
        left, scales, right = self.normalised()
        level = scales.square().mean((0, 1)).sqrt()
        root, safe = level.sqrt(), level.where(level > 0, torch.ones_like(level))
        return _Factors(left * root, scales / safe, right * root[:, None])


def _rows(scales: Tensor, right: Tensor) -> Tensor:
    """``[diag(s_i1) V_1, diag(s_i2) V_2, ...]`` for every i: (I, J, r) and (J, r, q) to (I, r, J q)."""
    i, _, r = scales.shape
    return (scales[..., None] * right).transpose(1, 2).reshape(i, r, -1)


def _grid(shape: tuple[int, ...], blocks: tuple[int, int] | list[int]) -> tuple[int, int]:
    """The number of block rows and columns, at most one a row and column."""
    i, j = (max(1, min(int(b), n)) for b, n in zip(blocks, shape, strict=True))
    return i, j


def _padded_gram(gram: Tensor | None, length: int, padded: int, like: Tensor) -> Tensor | None:
    """The Gram with zeros for padding: what padding holds is free."""
    if gram is None:
        if length == padded:
            return None
        gram = like.new_ones(length)
    extra = padded - length
    return F.pad(gram.to(like), (0, extra) * gram.dim())


def _low_rank(w: Tensor, g: Tensor | None, h: Tensor | None, rank: int, i: int, j: int) -> _Factors:
    """The best rank-r matrix, cut into blocks with unit scales; terms beyond the rank of w are zero."""
    (m, n), best = w.shape, reduced_rank(w, g, h)
    r = min(rank, m, n)
    left, right = w.new_zeros(m, rank), w.new_zeros(rank, n)
    left[:, :r], right[:r] = best.left[:, :r], best.right[:r]
    blocks = right.reshape(rank, j, n // j).transpose(0, 1).contiguous()
    return _Factors(left.reshape(i, m // i, rank), w.new_ones(i, j, rank), blocks)


def _member(w: Tensor, like: _Factors) -> _Factors:
    """The factors of a matrix that is a member with ``r <= min(p, q)``; of any other, no particular ones.

    Block row i spans the columns of U_i and block column j the rows of V_j, so in orthonormal bases P_i, Q_j of these
    every block becomes ``C_ij = A_i D_ij B_j`` with square A_i, B_j and diagonal D_ij. The eigenvectors of
    ``C_11 C_21^{-1} C_22 C_12^{-1} = A_1 (D_11 D_22 / D_21 D_12) A_1^{-1}`` are A_1; then ``D_1j B_j = A_1^{-1} C_1j``
    and ``A_i D_i1 = C_i1 B_1^{-1}``, and the scales are one least-squares problem more.
    """
    (i, p, r), (j, _, q) = like.left.shape, like.right.shape
    tiles = w.reshape(i, p, j, q).transpose(1, 2)  # (I, J, p, q)
    bases_out = svd(tiles.transpose(1, 2).reshape(i, p, j * q))[0][..., :r]  # (I, p, r)
    bases_in = svd(tiles.transpose(0, 1).reshape(j, i * p, q))[2][:, :r]  # (J, r, q)
    core = bases_out.mT[:, None] @ tiles @ bases_in.mT  # (I, J, r, r)
    inverse = torch.linalg.pinv(core[:2, :2])
    mixed = core[0, 0] @ inverse[1, 0] @ core[1, 1] @ inverse[0, 1]
    if not bool(mixed.isfinite().all()):
        return like
    first = eigenvectors(mixed)
    right = torch.linalg.pinv(first) @ core[0]  # (J, r, r)
    left = core[:, 0] @ torch.linalg.pinv(right[0])  # (I, r, r)
    found = _Factors(bases_out @ left, torch.zeros_like(like.scales), right @ bases_in).normalised()
    _solve_scales(found, w.clone(), None, None)  # without Grams each scale is a problem of its own
    return found


def _alternate(found: _Factors, w: Tensor, g: Tensor | None, h: Tensor | None, sweeps: int) -> _Factors:
    """Sweeps of alternating least squares with extrapolation between them."""
    found = found.normalised()
    total, error = float(weighted_error(w, g, h)), found.error(w, g, h)
    stretch = 1.0
    for _ in range(sweeps):
        if not error > 1e-28 * total:
            break
        last = found
        found = _Factors(*(part.clone() for part in last))
        residual = w - found.dense()
        _solve_left(found, residual, g, h)
        _solve_left(found.T, residual.mT, h, g)
        found = found.normalised()
        _solve_scales(found, residual, g, h)
        after = found.error(w, g, h)
        if not after < error:  # as far as rounding lets it go
            return last
        error = after
        # Along the last change as far as it went, or farther while that pays: twice as fast on trained weights.
        further = _Factors(*(new + stretch * (new - old) for new, old in zip(found, last, strict=True)))
        beyond = further.error(w, g, h)
        if beyond < error:
            found, error, stretch = further.normalised(), beyond, stretch * 1.5
        else:
            stretch = max(stretch / 3, 0.5)
    return found


def _weighed_right(right: Tensor, g: Tensor | None) -> Tensor:
    """``V_j G_j,:`` for every j: (J, r, n) under a full Gram, (J, r, q) under one that does not couple blocks."""
    j, _, q = right.shape
    if g is None:
        return right
    return right * g.reshape(j, 1, q) if g.dim() == 1 else right @ g.reshape(j, q, j * q)


def _spans(blocks: int, gram: Tensor | None) -> list[slice]:
    """Which blocks can be solved at once: one by one under a Gram that couples them, else all."""
    if gram is not None and gram.dim() == 2:
        return [slice(i, i + 1) for i in range(blocks)]
    return [slice(0, blocks)]


def damped_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^{-1} right`` for positive semi-definite matrices (..., r, r), slightly damped: a step too short by a hair
    in directions without weight keeps the factors from growing there, and still never raises the objective.
    """
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.cholesky_ex(matrix + (DAMPING * mean + 1e-200) * eye)[0]
    return torch.cholesky_solve(right, factor)


def _solve_left(found: _Factors, error: Tensor, g: Tensor | None, h: Tensor | None) -> None:
    """Each U_i to its optimum, in place, with `error`, W minus the matrix (m, n), kept up to date."""
    left, scales, right = found
    blocks, p, _ = left.shape
    weighed, terms = _weighed_right(right, g), _rows(scales, right)
    tall = error.view(blocks, p, -1)  # (I, p, n); a view, of a transposed error too
    for span in _spans(blocks, h):
        if g is not None and g.dim() == 2:
            image = torch.einsum("ijr,jrn->irn", scales[span], weighed)  # Z_i G
        else:
            image = _rows(scales[span], weighed)
        if h is not None and h.dim() == 2:
            rows = slice(span.start * p, span.stop * p)
            slope = psd_solve(h[rows, rows], h[rows] @ (error @ image[0].mT))[None]
        else:  # a diagonal cancels, and rows without weight may follow any rule
            slope = tall[span] @ image.mT
        change = damped_solve(image @ terms[span].mT, slope.mT).mT
        left[span] += change
        tall[span] -= change @ terms[span]


def _solve_scales(found: _Factors, error: Tensor, g: Tensor | None, h: Tensor | None) -> None:
    """Each s_ij to its optimum, in place, with `error`, W minus the matrix (m, n), kept up to date."""
    left, scales, right = found
    (i_blocks, p, r), (j_blocks, _, q) = left.shape, right.shape
    weighed, coupled = _weighed_right(right, g), g is not None and g.dim() == 2
    own = weighed.reshape(j_blocks, r, j_blocks, q)[range(j_blocks), :, range(j_blocks)] if coupled else weighed
    inner = own @ right.mT  # V_j G_jj V_j^T, (J, r, r)
    tiles = error.view(i_blocks, p, j_blocks, q).transpose(1, 2)  # (I, J, p, q), a view
    for i in _spans(i_blocks, h):
        if h is not None and h.dim() == 2:
            rows = slice(i.start * p, i.stop * p)
            outer = (left[i].mT @ h[rows, rows]) @ left[i]
            seen = (left[i][0].mT @ (h[rows] @ error))[None]
        else:
            weighted = left[i].mT if h is None else left[i].mT * h.reshape(-1, 1, p)
            outer, seen = weighted @ left[i], weighted @ error.view(i_blocks, p, -1)  # (I, r, r), (I, r, n)
        seen_tiles = seen.view(-1, r, j_blocks, q).transpose(1, 2)  # U_i^T (H E)_i, (I, J, r, q), a view
        for j in _spans(j_blocks, g):
            if coupled:
                slope = (seen * weighed[j]).sum(-1)[:, None]
            else:
                slope = (seen_tiles * weighed).sum(-1)  # (I, J, r)
            change = damped_solve(outer[:, None] * inner[j], slope[..., None])
            scales[i, j] += change[..., 0]
            step = change * right[j]  # (I, J, r, q)
            seen_tiles[:, j] -= outer[:, None] @ step
            tiles[i, j] -= left[i][:, None] @ step
