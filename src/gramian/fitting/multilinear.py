"""Block-coordinate least squares for any operator that is multilinear in its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.linalg import weigh, weighted_error
from gramian.ops import Operator


@torch.inference_mode(False)
def polish(
    op: Operator,
    weight: Tensor,
    gram_in: Tensor | None = None,
    gram_out: Tensor | None = None,
    *,
    sweeps: int = 4,
    steps: int = 12,
    tolerance: float = 1e-4,
) -> Operator:
    """Lower ``tr(H (W - A) G (W - A)^T)`` from the start `op`, never above it.

    Every structure here is linear (a sum: affine) in each of its factors, so with the others fixed each factor is a
    linear least-squares problem. It is solved by conjugate gradients on the normal equations, with products by automatic
    differentiation of ``dense()``; each step minimises exactly along its direction, so the objective cannot rise.

    Args:
        op: the start.
        weight: (out, in).
        gram_in: (in, in), its diagonal (in,), or None.
        gram_out: (out, out), its diagonal (out,), or None.
        sweeps: passes over all factors.
        steps: conjugate-gradient steps a factor.
        tolerance: stop when a sweep lowers the objective by less than this share.

    Returns:
        An operator of the same structure and dtype.
    """
    # Copies: a tensor made under ``torch.inference_mode`` could not take part in differentiation.
    w = weight.detach().to(torch.float64, copy=True)
    g, h = (None if gram is None else gram.detach().to(w, copy=True) for gram in (gram_in, gram_out))
    start, op = op, op.replace(**{name: value.detach().clone() for name, value in op.factors().items()})
    op = op.to(dtype=torch.float64)
    names = list(op.trainable())
    before = float(weighted_error(w - op.dense(), g, h))
    first = before
    for _ in range(sweeps if len(names) else 0):
        for name in names:
            op = op.replace(**{name: _solve_factor(op, name, w, g, h, steps)})
        after = float(weighted_error(w - op.dense(), g, h))
        if not after < before * (1 - tolerance):
            break
        before = after
    rounded = op.to(dtype=start.dtype)
    return rounded if float(weighted_error(w - rounded.dense(), g, h)) < first else start


def _solve_factor(op: Operator, name: str, w: Tensor, g: Tensor | None, h: Tensor | None, steps: int) -> Tensor:
    """Minimise over one factor, from where it is."""
    factor = op.factors()[name].detach().clone().requires_grad_()
    with torch.enable_grad():
        dense = op.replace(**{name: factor}).dense()

    def weighed(direction: Tensor) -> Tensor:
        return weigh(weigh(direction, h, side="out"), g, side="in")

    def pull(weighted: Tensor) -> Tensor:
        """The adjoint of factor -> dense matrix."""
        return torch.autograd.grad(dense, factor, weighted, retain_graph=True)[0]

    # A sum holds other terms too: the dense matrix is affine in one factor, and this is its constant part.
    constant = op.replace(**{name: torch.zeros_like(factor)}).dense()
    residual = weighed(w - dense.detach())  # H (W - A) G: the only form in which it is needed
    gradient = pull(residual)
    direction, norm = gradient, gradient.square().sum()
    scale = float(norm)
    value = factor.detach().clone()
    for _ in range(steps):
        if float(norm) <= 1e-24 * max(scale, 1e-300):
            break
        image = op.replace(**{name: direction}).dense() - constant
        weighted = weighed(image)
        curvature = (image * weighted).sum()
        if not float(curvature) > 0:
            break
        step = norm / curvature
        value = value + step * direction
        residual = residual - step * weighted
        gradient = pull(residual)
        fresh = gradient.square().sum()
        direction = gradient + (fresh / norm) * direction
        norm = fresh
    return value
