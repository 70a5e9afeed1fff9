"""Choosing coordinates: pivoted QR of rows, and greedy Nystrom selection under a quadratic objective."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.linalg.spectral import psd_solve


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


def pivoted_nystrom(
    gram: Tensor, reader: Tensor, *, count: int | None = None, block: int = 64, jitter: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """Order coordinates so that keeping the first k of them loses least of what a linear reader makes of them.

    Keeping the set J and predicting the rest linearly from it leaves the error ``tr(Y S_J Y^T)``, Y the reader and S_J the
    Schur complement of gram over J. Each pivot is the coordinate that lowers that error most:
    ``||Y S e_j||^2 / S_jj``. With ``Y = I`` this is greedy column subset selection of ``gram^{1/2}``; with
    ``Y = H^{1/2} W`` the error is measured after the next linear map W, under its output Gram H.

    Rank-one updates of the residual S and of Y S are delayed and applied `block` at a time, so that a pivot costs one
    product with the (m, n) matrix Y S; this changes no result. Works in float32.

    Args:
        gram: (n, n) positive semi-definite second moment of the coordinates.
        reader: (m, n).
        count: how many coordinates to order, from the best on; all by default.
        block: pivots per blocked update.
        jitter: added to the diagonal, relative to its mean, so that exhausted directions stay finite.

    Returns:
        order (count,) int64 and error (count + 1,) float64: ``error[k]`` is what is lost when the first k are kept.
    """
    n = gram.shape[0]
    gram, reader = gram.to(torch.float64), reader.to(torch.float64)
    start = float(((reader @ gram) * reader).sum())
    residual = (gram + jitter * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)).float()
    read = reader.float() @ residual  # Y S (m, n), kept in step with the residual
    alive = torch.ones(n, dtype=torch.bool)
    floor = (residual.diagonal().mean() * jitter * 1e-3).clamp_min(torch.finfo(torch.float32).tiny)
    order: list[int] = []
    gains: list[float] = []
    most = n if count is None else count
    for done in range(0, most, block):
        size = min(block, most - done)
        diagonal = residual.diagonal().clone()
        energy = read.square().sum(0)  # ||Y S e_j||^2
        columns = torch.zeros(size, n)  # scaled pivot columns of S, one a row
        images = torch.zeros(size, len(read))  # Y times them
        for step in range(size):
            j = int((energy / diagonal.clamp_min(floor)).masked_fill_(~alive, -1.0).argmax())
            before = columns[:step]
            scale = diagonal[j].clamp_min(floor).rsqrt()
            column = (residual[j] - before[:, j] @ before) * scale
            image = (read[:, j] - before[:, j] @ images[:step]) * scale
            gain = torch.dot(image, image)
            # ||Z e_j||^2 after Z -= image column^T, with Z = Y S less the delayed updates.
            inner = image @ read - (images[:step] @ image) @ before
            energy = (energy - 2 * column * inner + column.square() * gain).clamp_min_(0)
            diagonal = diagonal - column.square()
            columns[step], images[step] = column, image
            alive[j] = False
            order.append(j)
            gains.append(float(gain))
        residual.addmm_(columns.mT, columns, alpha=-1)
        read.addmm_(images.mT, columns, alpha=-1)
    error = start - torch.tensor([0.0, *gains], dtype=torch.float64).cumsum(0)
    return torch.tensor(order), error.clamp_min(0.0)


def interpolation(gram: Tensor, kept: Tensor, rcond: float = 1e-10) -> Tensor:
    """Best linear prediction P (n, k) of all coordinates from the kept ones: ``gram[:, J] gram[J, J]^+``."""
    return psd_solve(gram[kept][:, kept], gram[kept], rcond).mT
