"""The best low-rank approximation of a matrix in a two-sided Gram norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.spectral import eigh, psd_root


class ReducedRank(NamedTuple):
    """All best low-rank approximations of one matrix at once.

    Attributes:
        left: (m, k) and
        right: (k, n) with k = min(m, n): the best rank-r approximation is ``left[:, :r] @ right[:r]``.
        errors: (k + 1,): ``errors[r]`` is exactly the weighted squared error of that approximation.
    """

    left: Tensor
    right: Tensor
    errors: Tensor


def weigh(weight: Tensor, gram: Tensor | None, *, side: str) -> Tensor:
    """``weight @ gram`` (side "in") or ``gram @ weight`` (side "out"); a vector is a diagonal, None the identity."""
    if gram is None:
        return weight
    if side == "in":
        return weight * gram if gram.dim() == 1 else weight @ gram
    return gram[:, None] * weight if gram.dim() == 1 else gram @ weight


def weighted_error(difference: Tensor, gram_in: Tensor | None, gram_out: Tensor | None) -> Tensor:
    """``tr(gram_out D gram_in D^T)``: the squared error of a change D (m, n) of a weight matrix, a scalar tensor."""
    d = difference.to(torch.float64)
    g = None if gram_in is None else gram_in.to(d)
    h = None if gram_out is None else gram_out.to(d)
    return (weigh(d, h, side="out") * weigh(d, g, side="in")).sum()


def reduced_rank(weight: Tensor, gram_in: Tensor | None = None, gram_out: Tensor | None = None) -> ReducedRank:
    """Minimise ``tr(H (W - A) G (W - A)^T)`` over rank(A) <= r, for every r.

    With M = H^{1/2} W G^{1/2} the optimum is the truncated SVD of M, un-weighted (Eckart-Young). Only an eigenproblem
    of the smaller side of W is solved: for m <= n that of ``H^{1/2} W G W^T H^{1/2}`` (m, m), whose top eigenvectors U
    give A = H^{-1/2} U_r U_r^T H^{1/2} W; G enters through a product alone, so it may be singular. The case m > n
    mirrors this. A direction that a root's Gram never saw is projected out of the answer; shrink that Gram first if
    such directions should survive.

    Args:
        weight: (m, n).
        gram_in: G, (n, n), its diagonal (n,), or None for the identity.
        gram_out: H, (m, m), its diagonal (m,), or None for the identity.

    Returns:
        A ReducedRank in float64.
    """
    w = weight.to(torch.float64)
    g = None if gram_in is None else gram_in.to(w)
    h = None if gram_out is None else gram_out.to(w)
    m, n = w.shape
    if m > n:
        flipped = reduced_rank(w.mT, h, g)
        return ReducedRank(flipped.right.mT, flipped.left.mT, flipped.errors)
    root, inverse = (None, None) if h is None else psd_root(h)
    weighted = weigh(w, root, side="out")
    values, vectors = eigh(weigh(weighted, g, side="in") @ weighted.mT)
    tails = values.clamp_min(0).flip(0).cumsum(0).flip(0)
    left = weigh(vectors, inverse, side="out")
    return ReducedRank(left, vectors.mT @ weighted, torch.cat([tails, tails.new_zeros(1)]))
