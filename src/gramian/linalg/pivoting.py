"""Choosing coordinates: pivoted QR of rows, and greedy Nystrom selection under a quadratic objective."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.linalg.spectral import psd_root


def pivoted_rows(matrix: Tensor, count: int) -> Tensor:
    """Indices of `count` rows that span the row space well: Businger-Golub pivoting (QR with column pivoting of the
    transpose).

    Args:
        matrix: (m, n); rank at least `count` for a meaningful choice.
        count: how many rows, at most min(m, n).

    Returns:
        (count,) int64, ascending.
    """
    work = matrix.to(torch.float64).clone()
    norms = work.square().sum(1)
    chosen = torch.zeros(len(work), dtype=torch.bool, device=work.device)
    for _ in range(count):
        pivot = norms.masked_fill(chosen, -1).argmax()
        direction = work[pivot] / norms[pivot].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        projection = work @ direction
        work -= torch.outer(projection, direction)
        # Recomputed, not down-dated: cheap here, and immune to cancellation.
        norms = work.square().sum(1)
        chosen[pivot] = True
    return chosen.nonzero().squeeze(1)


def pivoted_nystrom(gram: Tensor, weight: Tensor, *, block: int = 64, jitter: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Order coordinates so that keeping the first k of them loses least of a quadratic objective.

    Keeping the set J and predicting the rest linearly from it leaves the error ``tr(weight S_J)`` with S_J the Schur
    complement of gram over J. Each pivot is the coordinate whose elimination lowers that error most. With
    ``weight = I`` this is greedy column subset selection of ``gram^{1/2}``; with ``weight = A^T H A`` the error is
    measured after the next linear map A under the output Gram H.

    The rank-one updates of the residual and of its product with `weight` are delayed and applied `block` at a time,
    so that nearly all work is matrix products; this changes no result.

    Args:
        gram: (n, n) positive semi-definite second moment of the coordinates.
        weight: (n, n) positive semi-definite.
        block: pivots per blocked update.
        jitter: added to the diagonal, relative to its mean, so that exhausted directions stay finite.

    Returns:
        order (n,) int64 and error (n + 1,) float64: ``error[k]`` is what is lost when the first k are kept.
    """
    n = gram.shape[0]
    gram = gram.to(torch.float64)
    start = float((weight.to(torch.float64) * gram).sum())
    residual = (gram + jitter * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)).float()
    weight = weight.float()
    product = residual @ weight  # residual @ weight, kept in step with residual
    alive = torch.ones(n, dtype=torch.bool)
    diagonal = residual.diagonal().clone()
    cross = (product * residual).sum(1)  # (S A S)_jj
    floor = (diagonal.mean() * jitter * 1e-3).clamp_min(torch.finfo(torch.float32).tiny)
    order: list[int] = []
    gains: list[float] = []
    done = 0
    while done < n:
        size = min(block, n - done)
        u = torch.zeros(n, size)  # scaled pivot columns of the residual
        ua = torch.zeros(n, size)  # weight @ u
        for step in range(size):
            score = (cross / diagonal.clamp_min(floor)).masked_fill(~alive, -1.0)
            j = int(score.argmax())
            column = residual[:, j] - u[:, :step] @ u[j, :step]
            pivot = column[j].clamp_min(floor)
            column = column / pivot.sqrt()
            # weight @ column: one matrix-vector product per pivot.
            image = product[j] - ua[:, :step] @ u[j, :step]
            image = image / pivot.sqrt()
            energy = torch.dot(column, image)  # u^T A u: the drop of the objective
            gains.append(float(energy))
            order.append(j)
            alive[j] = False
            # diag(S') = diag(S) - u^2;  diag(S' A S') = diag(SAS) - 2 u * (S A u) + u^2 * (u^T A u)
            sau = residual @ image - u[:, :step] @ (u[:, :step].T @ image)
            cross = cross - 2 * column * sau + column.square() * energy
            diagonal = diagonal - column.square()
            u[:, step] = column
            ua[:, step] = image
        residual -= u @ u.T
        product -= u @ ua.T
        residual = (residual + residual.T) / 2
        diagonal = residual.diagonal().clone()
        cross = (product * residual).sum(1)
        done += size
    error = start - torch.tensor([0.0, *gains], dtype=torch.float64).cumsum(0)
    return torch.tensor(order), error.clamp_min(0.0)


def interpolation(gram: Tensor, kept: Tensor, rcond: float = 1e-10) -> Tensor:
    """Best linear prediction P (n, k) of all coordinates from the kept ones: ``gram[:, J] gram[J, J]^+``."""
    _, inverse = psd_root(gram[kept][:, kept], rcond)
    return gram[:, kept] @ inverse @ inverse
