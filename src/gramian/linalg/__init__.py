"""Dense tensor functions: the only place that calls an eigensolver, an SVD or a factorisation.

Everything takes and returns plain tensors; nothing here knows operators, Grams or models.
"""

from gramian.linalg.hadamard import hadamard_transform, largest_power_of_two
from gramian.linalg.pivoting import interpolation, pivoted_nystrom, pivoted_rows
from gramian.linalg.spectral import (
    eigenvectors,
    eigh,
    eigvalsh,
    polar,
    psd_rank,
    psd_root,
    psd_solve,
    svd,
    svdvals,
)
from gramian.linalg.weighted import ReducedRank, reduced_rank, weigh, weighted_error

__all__ = [
    "ReducedRank",
    "eigenvectors",
    "eigh",
    "eigvalsh",
    "hadamard_transform",
    "interpolation",
    "largest_power_of_two",
    "pivoted_nystrom",
    "pivoted_rows",
    "polar",
    "psd_rank",
    "psd_root",
    "psd_solve",
    "reduced_rank",
    "svd",
    "svdvals",
    "weigh",
    "weighted_error",
]
