"""Dense tensor functions: the only place that calls an eigensolver, an SVD or a factorisation.

Everything takes and returns plain tensors; nothing here knows operators, Grams or models.
"""

from gramian.linalg.assignment import linear_assignment
from gramian.linalg.hadamard import hadamard_transform, largest_power_of_two
from gramian.linalg.pivoting import interpolation, pivoted_nystrom, pivoted_rows
from gramian.linalg.randomised import Products, randomised_svd, svd_of_product, svd_requests
from gramian.linalg.spectral import (
    eig,
    eigenvectors,
    eigh,
    eigvalsh,
    polar,
    psd_rank,
    psd_root,
    psd_solve,
    solve,
    svd,
    svdvals,
)
from gramian.linalg.weighted import ReducedRank, reduced_rank, weigh, weighted_error

__all__ = [
    "Products",
    "ReducedRank",
    "eig",
    "eigenvectors",
    "eigh",
    "eigvalsh",
    "hadamard_transform",
    "interpolation",
    "largest_power_of_two",
    "linear_assignment",
    "pivoted_nystrom",
    "pivoted_rows",
    "polar",
    "psd_rank",
    "psd_root",
    "psd_solve",
    "randomised_svd",
    "reduced_rank",
    "solve",
    "svd",
    "svd_of_product",
    "svd_requests",
    "svdvals",
    "weigh",
    "weighted_error",
]
