"""Eigenvalues, singular values, roots and solves of dense matrices.

Rank deficiency is normal here: a Gram matrix of fewer tokens than channels, or behind a LayerNorm, is singular.
Eigenvalues below ``rcond * largest`` count as zero and are left out of inverses; nothing is added to a diagonal
unless the caller asks for it, and no Cholesky factorisation is used where it could fail.
"""

from __future__ import annotations

import torch
from torch import Tensor

RCOND = 1e-12
"""Relative eigenvalue threshold below which a direction counts as unseen (float64)."""


def _threshold(eigenvalues: Tensor, rcond: float) -> float:
    """`rcond`, or what rounding alone makes of zero in the dtype of the n eigenvalues where that is more."""
    return max(rcond, len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mH) / 2


def eigenvectors(matrix: Tensor) -> Tensor:
    """Real parts of the eigenvectors (n, n), in columns, of a general square matrix: all of them where it is known to have
    real eigenvalues.
    """
    vectors: Tensor = torch.linalg.eig(matrix).eigenvectors
    return vectors.real


def eig(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n) and eigenvectors (..., n, n), in columns of length one, of a general square matrix; complex.

    Differentiable where the eigenvalues are distinct, for functions that do not depend on the phases of the vectors.
    """
    values, vectors = torch.linalg.eig(matrix)
    return values, vectors


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of a symmetric, or Hermitian, matrix.

    Args:
        matrix: (..., n, n); only its symmetric, or Hermitian, part is used.

    Returns:
        values (..., n), largest first, and vectors (..., n, n) in the matching columns.
    """
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    return values.flip(-1), vectors.flip(-1)


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues (..., n) of a symmetric, or Hermitian, matrix (..., n, n), largest first."""
    values: Tensor = torch.linalg.eigvalsh(_symmetric(matrix))
    return values.flip(-1)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition ``matrix = U diag(s) Vh``.

    Args:
        matrix: (..., m, n).

    Returns:
        U (..., m, k), s (..., k) descending, Vh (..., k, n) with k = min(m, n).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def svdvals(matrix: Tensor) -> Tensor:
    """Singular values (..., k), largest first, of matrix (..., m, n); k = min(m, n)."""
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns: ``U Vh`` of the SVD. matrix: (..., m, n)."""
    u, _, vh = svd(matrix)
    return u @ vh


def psd_root(matrix: Tensor, rcond: float = RCOND) -> tuple[Tensor, Tensor]:
    """Symmetric square root and pseudo-inverse root of a positive semi-definite matrix.

    Args:
        matrix: (n, n), or (n,) for a diagonal one.
        rcond: eigenvalues below ``rcond * largest`` are treated as zero in the inverse.

    Returns:
        root and inverse root, each of the shape of `matrix`.
    """
    if matrix.dim() == 1:
        root = matrix.clamp_min(0).sqrt()
        seen = matrix > rcond * matrix.max().clamp_min(0)
        return root, torch.where(seen, 1 / root.where(seen, torch.ones_like(root)), torch.zeros_like(root))
    values, vectors = eigh(matrix)
    root, inverse = psd_root(values, _threshold(values, rcond))
    return (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT


def psd_solve(matrix: Tensor, right: Tensor, rcond: float = RCOND) -> Tensor:
    """Minimum-norm solution X (n, k) of ``matrix X = right`` for a positive semi-definite matrix (n, n).

    A well-conditioned system takes one factorisation; otherwise an eigenvalue decomposition drops the directions
    below ``rcond * largest``.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed):
        diagonal = factor.diagonal()
        if bool(diagonal.min() ** 2 > 1e-9 * diagonal.max() ** 2):
            return torch.cholesky_solve(right, factor)
    values, vectors = eigh(matrix)
    seen = values > _threshold(values, rcond) * values[0].clamp_min(0)
    inverse = torch.where(seen, 1 / values.where(seen, torch.ones_like(values)), torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.mT @ right))


LARGEST_TOGETHER = 64
"""Sides of matrices that torch's batched LU is trusted with, see ``solve``."""


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^{-1} right``: (..., n, n) and (..., n, m) -> (..., n, m).

    ``torch.linalg.solve``, but larger matrices of a batch one by one on a CPU: with threads set by hand, torch factors several
    at once in ways that MKL does not allow, and fails, hangs or is wrong (pytorch issue 142815, open in 2.13).
    """
    if matrix.dim() == 2 or matrix.device.type != "cpu" or matrix.shape[-1] <= LARGEST_TOGETHER:
        solved: Tensor = torch.linalg.solve(matrix, right)
        return solved
    pairs = zip(matrix.flatten(0, -3), right.flatten(0, -3), strict=True)
    return torch.stack([torch.linalg.solve(*pair) for pair in pairs]).reshape(right.shape)


def psd_rank(matrix: Tensor, rcond: float = 1e-10) -> int:
    """How many eigenvalues of a positive semi-definite matrix (n, n), or diagonal (n,), are above `rcond` times the largest."""
    if matrix.dim() == 1:
        return int((matrix > rcond * matrix.max().clamp_min(0)).sum())
    values = eigvalsh(matrix)
    return psd_rank(values, _threshold(values, rcond))
