"""Singular values and vectors at the top of a large matrix, or of one that is known through its products alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.spectral import eigh, svd


class Products(NamedTuple):
    """A matrix (m, n) that need not exist as an array.

    Attributes:
        shape: (m, n).
        apply: x (n, k) -> the matrix times x, (m, k).
        adjoint: y (m, k) -> the transposed matrix times y, (n, k).
    """

    shape: tuple[int, int]
    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]


def randomised_svd(
    matrix: Tensor | Products,
    rank: int,
    *,
    oversampling: int = 10,
    power_iterations: int = 6,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values and their vectors, by block Krylov iteration (Musco and Musco 2015,
    "Randomized block Krylov methods for stronger and faster approximate singular value decomposition").

    From a Gaussian block of k = rank + oversampling columns the blocks ``A x, A A^T A x, ...`` are made, each
    orthogonal to those before, and A is projected on all of them. No product is wasted: those that make the next block
    are those that project, so that q power iterations take q + 1 products with A and q + 1 with its transpose, of k
    columns each. All blocks are kept, where a plain power iteration keeps the last: what counts on a flat spectrum, as
    of a random matrix.

    Args:
        matrix: (m, n), or its products. A small array, whose Krylov blocks would fill it, is decomposed exactly.
        rank: how many, at most min(m, n).
        oversampling: columns more than `rank`.
        power_iterations: q.
        generator: of the first block; on the CPU, so that every device draws the same numbers.

    Returns:
        U (m, rank), s (rank,) descending and Vh (rank, n); in float32 for half precision, else in the matrix's dtype
        (for products, in that of the answers).

    Raises:
        ValueError: the rank is not in 1..min(m, n).
    """
    m, n = matrix.shape
    if isinstance(matrix, Tensor):
        array = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
        _check(rank, (m, n))
        width, blocks = _sizes((m, n), rank, oversampling, power_iterations)
        if 2 * blocks * width >= min(m, n):
            u, s, vh = svd(array)
            return u[:, :rank], s[:rank], vh[:rank]
        matrix = Products((m, n), lambda x: array @ x.to(array), lambda y: array.mT @ y)
    requests = svd_requests(
        (m, n), rank, oversampling=oversampling, power_iterations=power_iterations, generator=generator
    )
    request = next(requests)
    while True:
        try:
            request = requests.send((matrix.adjoint if request.adjoint else matrix.apply)(request.block))
        except StopIteration as end:
            found: tuple[Tensor, Tensor, Tensor] = end.value
            return found


class Request(NamedTuple):
    """What ``svd_requests`` wants next: the matrix, or its transpose, times a block.

    Attributes:
        adjoint: the transpose is meant.
        block: (n, k), or (m, k) for the transpose.
    """

    adjoint: bool
    block: Tensor


def svd_requests(
    shape: tuple[int, int],
    rank: int,
    *,
    oversampling: int = 10,
    power_iterations: int = 6,
    generator: torch.Generator | None = None,
) -> Generator[Request, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """``randomised_svd`` turned inside out: it yields the products it needs and is sent their results, so that the
    products of many matrices can be had in one go (the gradients of all layers of a model in one backward pass).

    Raises:
        ValueError: the rank is not in 1..min(m, n).
    """
    _check(rank, shape)
    width, blocks = _sizes(shape, rank, oversampling, power_iterations)
    left: list[Tensor] = []
    right: list[Tensor] = []
    block = torch.randn(shape[1], width, generator=generator)
    for _ in range(blocks):
        left.append(_orthonormal((yield Request(False, block)), left))
        right.append((yield Request(True, left[-1])))
        block = _orthonormal(right[-1], [])
    basis, projected = torch.cat(left, 1), torch.cat(right, 1)  # A^T basis = projected, (n, K)
    # An eigenproblem of K x K in place of an SVD of n x K; in float64 squaring costs the singular values no accuracy.
    wide = projected.double()
    values, vectors = eigh(wide.mT @ wide)
    vectors, s = vectors[:, :rank], values[:rank].clamp_min(0).sqrt()
    v = wide @ (vectors / s.clamp_min(torch.finfo(torch.float64).tiny))
    if bool(s[-1] <= 1e-6 * s[0]):  # directions of a singular value near zero are not orthogonal yet, or zero
        v, triangle = torch.linalg.qr(v)
        v = v * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return (basis.double() @ vectors).to(basis), s.to(basis), v.mT.to(basis)


def _check(rank: int, shape: tuple[int, int]) -> None:
    if not 1 <= rank <= min(shape):
        raise ValueError(f"randomised_svd: rank {rank} of a matrix {shape[0]} x {shape[1]}; expected 1 to {min(shape)}")


def _sizes(shape: tuple[int, int], rank: int, oversampling: int, power_iterations: int) -> tuple[int, int]:
    """Columns of a block, and how many blocks; where they would hold more than the smaller side, one block of all of it."""
    width, blocks = rank + oversampling, power_iterations + 1
    return (width, blocks) if width * blocks <= min(shape) else (min(shape), 1)


def _orthonormal(block: Tensor, before: list[Tensor]) -> Tensor:
    """An orthonormal basis of `block` (m, k), orthogonal to the orthonormal blocks `before`."""
    for _ in range(2 if before else 1):  # once more: what was small next to the first projection counts afterwards
        for other in before:
            block = block - other @ (other.mT @ block)
        block = torch.linalg.qr(block)[0]
    return block


def svd_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``left (m, k) @ right (k, n)`` without the m x n array: two QR
    factorisations and an SVD of k x k.

    Returns:
        U (m, r), s (r,) descending and Vh (r, n) with r = min(k, m, n).
    """
    first, r = torch.linalg.qr(left)
    second, t = torch.linalg.qr(right.mT)
    u, s, vh = svd(r @ t.mT)
    return first @ u, s, vh @ second.mT
