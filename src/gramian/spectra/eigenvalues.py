"""The eigenvalues of ``W^T W`` and every figure that is a function of them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import eigvalsh, svdvals
from gramian.ops import (
    BlockDiag,
    BlockLowRank,
    Dense,
    Diagonal,
    Identity,
    Kron,
    KroneckerSum,
    Operator,
    Permutation,
    Product,
    Scaled,
    Selection,
    Skeleton,
    Sum,
    Transpose,
)

RESOLVED = 1e-11
"""Smallest eigenvalue, relative to the largest, that the eigenvalues of a float64 Gram matrix still resolve."""
CHUNK = 1 << 21
"""Numbers that are converted to float64 at a time."""
ENTROPY_FLOOR = 1e-10
"""What WeightWatcher 0.7.7 adds to probabilities and ranks before it takes their logarithm."""


@dataclass(frozen=True)
class Spectrum:
    """The squared singular values of a matrix.

    Attributes:
        eigenvalues: (k,) float64, **largest first**, k = min(shape): the eigenvalues of the smaller of ``W^T W`` and
            ``W W^T``. No factor 1/n is applied.
        shape: (out, in) of the matrix.
    """

    eigenvalues: Tensor
    shape: tuple[int, int]

    @property
    def singular_values(self) -> Tensor:
        """(k,) float64, largest first."""
        return self.eigenvalues.sqrt()

    @property
    def norm(self) -> float:
        """The squared Frobenius norm (WeightWatcher's ``norm``)."""
        return float(self.eigenvalues.sum())

    @property
    def largest(self) -> float:
        """The largest eigenvalue, the squared spectral norm (WeightWatcher's ``lambda_max`` and ``spectral_norm``)."""
        return float(self.eigenvalues[0])

    @property
    def nuclear_norm(self) -> float:
        """The sum of the singular values."""
        return float(self.singular_values.sum())

    @property
    def stable_rank(self) -> float:
        """``||W||_F^2 / ||W||_2^2``, between 1 and k; 0 for the zero matrix."""
        return self.norm / self.largest if self.largest > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """``exp(-sum p ln p)`` with ``p = sigma / sum(sigma)``, the singular values, not their squares (Roy and
        Vetterli 2007, "The effective rank"); between 1 and k, 0 for the zero matrix.
        """
        total = self.nuclear_norm
        return math.exp(float(torch.special.entr(self.singular_values / total).sum())) if total > 0 else 0.0

    @property
    def participation_ratio(self) -> float:
        """``(sum lambda)^2 / sum lambda^2``: how many eigenvalues share the energy; 0 for the zero matrix."""
        squares = float(self.eigenvalues.square().sum())
        return self.norm**2 / squares if squares > 0 else 0.0

    @property
    def condition(self) -> float:
        """Largest over smallest singular value; infinite for a rank-deficient matrix."""
        smallest = float(self.eigenvalues[-1])
        return math.sqrt(self.largest / smallest) if smallest > 0 else math.inf

    @property
    def matrix_rank(self) -> int:
        """Singular values above ``max(shape) eps sigma_max`` with eps of float64: the convention of
        ``numpy.linalg.matrix_rank`` and WeightWatcher.
        """
        values = self.singular_values
        return int((values > values[0] * max(self.shape) * torch.finfo(torch.float64).eps).sum())

    @property
    def entropy(self) -> float:
        """``-sum p ln p / ln(matrix_rank)`` with ``p = lambda / sum(lambda)``: WeightWatcher's ``entropy``, with its
        additive floor of 1e-10; between 0 and 1, and 0 below rank two.
        """
        rank = self.matrix_rank
        if rank < 2:
            return 0.0
        p = self.eigenvalues / self.norm + ENTROPY_FLOOR
        return float(-(p * p.log()).sum()) / math.log(rank + ENTROPY_FLOOR)

    def rank_at(self, energy: float) -> int:
        """The fewest eigenvalues that hold the share `energy` (in 0..1) of the squared Frobenius norm."""
        kept = self.eigenvalues.cumsum(0)
        return min(int((kept < energy * kept[-1]).sum()) + 1, len(kept)) if self.norm > 0 else 0


def spectrum(matrix: Tensor | Operator) -> Spectrum:
    """The spectrum of a matrix, computed in float64.

    A structured operator's spectrum comes from its factors where the structure allows: a narrow product from the QR
    factors of its two sides, a block diagonal from its blocks, a Kronecker product from its factors. Anything else is
    made dense first; a dense matrix takes the eigenvalues of its smaller Gram matrix, and a singular value
    decomposition only where that Gram matrix is too ill-conditioned to resolve the smallest ones.

    Args:
        matrix: (out, in), a floating-point tensor or an operator.

    Raises:
        GramianError: not a non-empty floating-point matrix, or an entry is not finite.
    """
    if isinstance(matrix, Tensor):
        if matrix.dim() != 2 or not matrix.is_floating_point() or 0 in matrix.shape:
            raise GramianError(
                f"spectrum: found a {str(matrix.dtype).removeprefix('torch.')} tensor of shape {tuple(matrix.shape)}; "
                "expected a non-empty floating-point matrix (out, in); reshape or slice it"
            )
        matrix = Dense(matrix)
    elif 0 in matrix.shape:
        raise GramianError(f"spectrum: operator {matrix.kind} of shape {matrix.shape}; expected no side of length 0")
    with torch.no_grad():
        values = _eigenvalues(matrix)
    if not bool(values.isfinite().all()):
        raise GramianError(
            f"spectrum: the {matrix.shape[0]} x {matrix.shape[1]} {matrix.kind} matrix holds NaN or Inf; "
            "expected finite numbers; repair or leave out this layer"
        )
    values = values.sort(descending=True).values
    missing = min(matrix.shape) - len(values)
    return Spectrum(torch.cat([values, values.new_zeros(missing)]), matrix.shape)


def _eigenvalues(op: Operator) -> Tensor:
    """The squared singular values of `op`, float64, in any order; zeros of a deficient rank may be left out."""
    if isinstance(op, Dense):
        return _dense(op.weight)
    if isinstance(op, Scaled):
        return _eigenvalues(op.base) * op.factor.double().square()
    if isinstance(op, Transpose):
        return _eigenvalues(op.base)
    if isinstance(op, Diagonal):
        return op.values.double().square()
    if isinstance(op, Identity | Permutation | Selection):
        return torch.ones(min(op.shape), dtype=torch.float64, device=op.device)
    if isinstance(op, BlockDiag):
        return torch.cat([_eigenvalues(part) for part in op.parts])
    if isinstance(op, Kron):
        return torch.outer(_eigenvalues(op.left), _eigenvalues(op.right)).flatten()
    if isinstance(op, KroneckerSum) and op.left.shape[0] == 1 and _unpadded(op):
        return torch.outer(_dense(op.left[0]), _dense(op.right[0])).flatten()
    pair = _narrow(op)
    if pair is not None and pair[0].shape[1] < min(op.shape):
        left, right = (side.double() for side in pair)
        core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.mT, mode="r").R.mT
        # The singular values themselves: squaring the core first would lose the small ones.
        return svdvals(core).square()
    return _dense(op.dense())


def _unpadded(op: KroneckerSum) -> bool:
    (_, m1, n1), (_, m2, n2) = op.left.shape, op.right.shape
    return (m1 * m2, n1 * n2) == op.shape


def _narrow(op: Operator) -> tuple[Tensor, Tensor] | None:
    """Factors ``left (out, r) @ right (r, in)`` of an operator that is a product through r coordinates, else None."""
    if isinstance(op, Skeleton):
        op = op.pair()
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        return op.left[0, : op.rows], op.right[0, :, : op.columns]
    if isinstance(op, Scaled):
        pair = _narrow(op.base)
        return None if pair is None else (pair[0] * op.factor, pair[1])
    if isinstance(op, Sum):
        pairs = [_narrow(part) for part in op.parts]
        known = [pair for pair in pairs if pair is not None]
        if len(known) == len(pairs):
            return torch.cat([left for left, _ in known], 1), torch.cat([right for _, right in known], 0)
    if isinstance(op, Product) and len(op.parts) > 1:
        waist = min(range(1, len(op.parts)), key=lambda i: op.parts[i].shape[0])
        first, second = Product(op.parts[:waist]), Product(op.parts[waist:])
        if op.parts[waist].shape[0] < min(op.shape):
            return first.dense(), second.dense()
    return None


def _dense(weight: Tensor) -> Tensor:
    """The squared singular values of a matrix (m, n), float64, largest first."""
    gram = smaller_gram(weight)
    if not bool(gram.isfinite().all()):
        return gram.diagonal().clone()  # the caller reports it; an eigensolver would fail without a name
    values = eigvalsh(gram).clamp_min(0)
    if bool(values[-1] < RESOLVED * values[0]):
        return svdvals(weight.detach().double()).square()
    return values


def smaller_gram(weight: Tensor) -> Tensor:
    """``W^T W`` or ``W W^T``, whichever is smaller, in float64, of a matrix (m, n); converts a slice at a time, so that
    an embedding table is never copied whole.
    """
    tall = weight.detach() if weight.shape[0] >= weight.shape[1] else weight.detach().mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    step = max(CHUNK // tall.shape[1], 1)
    for start in range(0, tall.shape[0], step):
        wide = tall[start : start + step].double()
        gram.addmm_(wide.mT, wide)
    return gram
