"""Several fine-tuned weights into one: least squares over their Grams, and one after another by orthogonal projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.errors import GramianError, nearest
from gramian.linalg import psd_solve, svd, weighted_error

TOLERANCE = 1e-10
"""Relative residual at which the conjugate gradients of a two-sided merge stop."""


class GramMerge(NamedTuple):
    """A merged weight.

    Attributes:
        weight: (m, n) float64.
        error: ``sum_i tr(H_i (W - W_i) G_i (W - W_i)^T)``, the least there is.
        residual: relative residual of the normal equations; what rounding leaves, unless the iteration was cut short.
    """

    weight: Tensor
    error: float
    residual: float


def merge_by_grams(
    weights: Sequence[Tensor],
    grams_in: Sequence[Tensor],
    grams_out: Sequence[Tensor] | None = None,
    *,
    off_diagonal: float = 1.0,
    iterations: int = 1000,
) -> GramMerge:
    """The W that answers as every W_i does on that model's own inputs: least ``sum_i ||H_i^{1/2} (W - W_i) G_i^{1/2}||^2``.

    Without output Grams this is RegMean (Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models",
    eq. 2): ``W sum G_i = sum W_i G_i``, one positive semi-definite solve. With them (a Kronecker-factored Laplace
    approximation of every model's loss) the equations ``sum H_i W G_i = sum H_i W_i G_i`` do not separate; conjugate
    gradients solve them, preconditioned by the mean Grams, which is exact where the models' Grams are proportional.

    W is sought as a correction of the plain mean, so that directions which no Gram has seen keep the mean of the weights.

    Args:
        weights: W_i (m, n).
        grams_in: G_i (n, n).
        grams_out: H_i (m, m), or None for the identity.
        off_diagonal: multiplies the entries of each G_i off its diagonal; the paper's guard, 0.9 there.
        iterations: most steps of conjugate gradients.

    Raises:
        GramianError: numbers or shapes that do not fit together, or NaN.
    """
    _check(weights, grams_in, grams_out)
    if not 0 <= off_diagonal <= 1:
        raise GramianError(f"off_diagonal {off_diagonal}; expected 0 to 1")
    w = [weight.detach().double() for weight in weights]
    g = [gram.double() * off_diagonal + (1 - off_diagonal) * gram.double().diagonal().diag() for gram in grams_in]
    mean = sum(w, torch.zeros_like(w[0])) / len(w)
    total = sum(g, torch.zeros_like(g[0]))
    if grams_out is None:
        right = sum(((x - mean) @ gram for x, gram in zip(w, g, strict=True)), torch.zeros_like(mean))
        merged = mean + psd_solve(total, right.mT).mT
        left = sum(((merged - x) @ gram for x, gram in zip(w, g, strict=True)), torch.zeros_like(mean))
        residual = float(left.norm() / right.norm().clamp_min(torch.finfo(torch.float64).tiny))
        errors = [weighted_error(merged - x, gram, None) for x, gram in zip(w, g, strict=True)]
        return GramMerge(merged, float(sum(errors)), residual)
    h = [gram.double() for gram in grams_out]
    total_out = sum(h, torch.zeros_like(h[0]))

    def apply(x: Tensor) -> Tensor:
        return sum((out @ x @ in_ for out, in_ in zip(h, g, strict=True)), torch.zeros_like(x))

    # An approximation that only steers the iteration, so that an explicit inverse does no harm.
    inverse_out, inverse_in = (psd_solve(x, torch.eye(len(x)).to(x)) for x in (total_out, total))

    def precondition(x: Tensor) -> Tensor:
        return inverse_out @ x @ inverse_in

    right = sum((out @ (x - mean) @ in_ for out, x, in_ in zip(h, w, g, strict=True)), torch.zeros_like(mean))
    correction, residual = _conjugate_gradients(apply, precondition, right, iterations)
    merged = mean + correction
    errors = [weighted_error(merged - x, in_, out) for x, in_, out in zip(w, g, h, strict=True)]
    return GramMerge(merged, float(sum(errors)), residual)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor, iterations: int
) -> tuple[Tensor, float]:
    """Solution and true relative residual of ``apply(x) = right``, both maps positive semi-definite."""
    x, r = torch.zeros_like(right), right.clone()
    norm = float(right.norm())
    if norm == 0:
        return x, 0.0
    z = precondition(r)
    p, rho = z, (r * z).sum()
    for _ in range(iterations):
        if float(r.norm()) <= TOLERANCE * norm or not bool(rho > 0):
            break
        image = apply(p)
        step = rho / (p * image).sum()
        x, r = x + step * p, r - step * image
        z = precondition(r)
        rho, before = (r * z).sum(), rho
        p = z + rho / before * p
    return x, float((right - apply(x)).norm()) / norm


def _check(weights: Sequence[Tensor], grams_in: Sequence[Tensor], grams_out: Sequence[Tensor] | None) -> None:
    count = len(weights)
    if count == 0 or len(grams_in) != count or (grams_out is not None and len(grams_out) != count):
        found = f"{count} weights, {len(grams_in)} input Grams"
        found += "" if grams_out is None else f", {len(grams_out)} output Grams"
        raise GramianError(f"merge: {found}; expected one of each for every model")
    m, n = weights[0].shape
    for i, weight in enumerate(weights):
        shapes = [("weight", weight, (m, n)), ("input Gram", grams_in[i], (n, n))]
        if grams_out is not None:
            shapes.append(("output Gram", grams_out[i], (m, m)))
        for what, tensor, shape in shapes:
            if tuple(tensor.shape) != shape:
                raise GramianError(f"merge: {what} {i} is {tuple(tensor.shape)}; expected {shape}")
            if not bool(tensor.isfinite().all()):
                raise GramianError(f"merge: {what} {i} holds NaN or Inf")


# One after another ---------------------------------------------------------------------------------------------------


def project_out(update: Tensor, earlier: Tensor, *, share: float = 0.5) -> Tensor:
    """`update` without what it has in the leading subspaces of `earlier`.

    With ``earlier = U S V^T`` and M = U^T update V, the block of M of the leading directions, those that together hold at
    most `share` of the sum of the singular values, and all of M's diagonal are taken out (OPCM 2025, "Merging models on the
    fly without retraining", section 4). The result is orthogonal to `earlier`.

    Args:
        update: (m, n), a task vector.
        earlier: (m, n), what was merged before.
        share: 0 takes out the diagonal alone, 1 everything within both singular spaces.

    Returns:
        (m, n) float64.

    Raises:
        GramianError: shapes differ, or `share` is not between 0 and 1.
    """
    if update.shape != earlier.shape or update.dim() != 2:
        raise GramianError(
            f"project_out: {tuple(update.shape)} and {tuple(earlier.shape)}; expected two equal matrices"
        )
    _check_share(share)
    u, s, vh = svd(earlier.detach().double())
    new = update.detach().double()
    seen = s > s[:1] * 1e-12  # beyond these, directions are arbitrary
    u, s, vh = u[:, seen], s[seen], vh[seen]
    middle = u.mT @ new @ vh.mT
    split = len(s) if share == 1 else int((s.cumsum(0) <= share * s.sum()).sum())
    taken = middle.diagonal().diag()
    taken[:split, :split] = middle[:split, :split]
    return new - u @ taken @ vh


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise GramianError(f"share {share}; expected 0 to 1")


class ContinualMerge:
    """Models merged one after another as they come, in the memory of two of them (OPCM 2025, algorithm 1).

    A matrix's task vector, fine-tuned less base, is added after ``project_out`` against the sum so far; other tensors' are
    added as they are. The merged model is the base and that sum, scaled to the mean norm of the task vectors (over all
    tensors together).

    Args:
        base: the tensors that all models were fine-tuned from.
        matrices: names of those that are weights of linear layers.
        share: see ``project_out``; None adds all task vectors as they are (task arithmetic at OPCM's scale).

    Raises:
        GramianError: an unknown name, or `share` is not between 0 and 1.
    """

    def __init__(self, base: Mapping[str, Tensor], matrices: Collection[str], *, share: float | None = 0.5) -> None:
        for name in matrices:
            if name not in base:
                raise GramianError(f"ContinualMerge: no tensor {name!r}{nearest(name, base)}")
        if share is not None:
            _check_share(share)
        self.base = {name: tensor.detach() for name, tensor in base.items()}
        self.matrices, self.share = frozenset(matrices), share
        self.sum = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self.base.items()}
        self.norms: list[float] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Merge the next model.

        Raises:
            GramianError: names or shapes are not the base's, or NaN.
        """
        if set(tensors) != set(self.base):
            odd = sorted(set(tensors) ^ set(self.base))
            raise GramianError(f"ContinualMerge: tensor {odd[0]!r} is in one of base and model only; expected the same")
        updates = {}
        for name, tensor in tensors.items():
            if tensor.shape != self.base[name].shape or not bool(tensor.isfinite().all()):
                raise GramianError(
                    f"ContinualMerge: {name} is {tuple(tensor.shape)}; expected {tuple(self.base[name].shape)}, finite"
                )
            updates[name] = tensor.detach().double() - self.base[name].double()
        self.norms.append(_norm(updates))
        for name, update in updates.items():
            if self.share is not None and len(self.norms) > 1 and name in self.matrices:
                update = project_out(update, self.sum[name], share=self.share)
            self.sum[name] = self.sum[name] + update

    def merged(self) -> dict[str, Tensor]:
        """The merged tensors, in the base's dtypes.

        Raises:
            GramianError: nothing was added.
        """
        if not self.norms:
            raise GramianError("ContinualMerge: no model yet; add one first")
        norm = _norm(self.sum)
        scale = sum(self.norms) / len(self.norms) / norm if norm > 0 else 0.0
        return {name: (tensor.double() + scale * self.sum[name]).to(tensor.dtype) for name, tensor in self.base.items()}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))
