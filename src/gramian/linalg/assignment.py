"""The linear assignment problem, exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def linear_assignment(cost: Tensor) -> Tensor:
    """The permutation of least total cost, by shortest augmenting paths (Jonker and Volgenant 1987).

    Dual prices u, v with ``u_i + v_j <= cost_ij`` are kept, tight on the pairs assigned so far; every row left over joins
    by a shortest path of reduced costs (Dijkstra). O(n^3), the innermost loop in numpy.

    Args:
        cost: (n, n), finite.

    Returns:
        (n,) int64, on the CPU: the column of each row.

    Raises:
        ValueError: not square or not finite.
    """
    c = cost.detach().to("cpu", torch.float64).numpy()
    if c.ndim != 2 or c.shape[0] != c.shape[1] or not np.isfinite(c).all():
        raise ValueError(f"linear_assignment needs a finite square matrix, found {tuple(cost.shape)}")
    n = len(c)
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    u = c.min(1)
    slack = c - u[:, None]
    v = slack.min(0)
    slack -= v
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for i in range(n):
        for j in np.flatnonzero(slack[i] == 0).tolist():
            if row_of[j] < 0:
                row_of[j], column_of[i] = i, j
                break
    for free in np.flatnonzero(column_of < 0).tolist():
        distance, previous = np.full(n, np.inf), np.full(n, -1)
        # `ahead` is `distance` where a column is not yet settled, infinity where it is.
        ahead, settled = np.full(n, np.inf), np.zeros(n, dtype=bool)
        i, length = free, 0.0
        while True:
            through = c[i] - v
            through += length - u[i]
            through[settled] = np.inf
            closer = through < ahead
            ahead[closer] = through[closer]
            previous[closer] = i
            j = int(ahead.argmin())
            length = distance[j] = ahead[j]
            settled[j], ahead[j] = True, np.inf
            if row_of[j] < 0:
                break
            i = int(row_of[j])
        sink = j
        inner = np.flatnonzero(settled & (row_of >= 0))
        gain = length - distance[inner]
        u[free] += length
        u[row_of[inner]] += gain
        v[inner] -= gain
        j = sink
        while True:
            i = int(previous[j])
            row_of[j] = i
            column_of[i], j = j, int(column_of[i])
            if i == free:
                break
    return torch.from_numpy(column_of)
