"""Matrices of one fixed rank as a curved space: tangents, their transport, retraction, and an optimizer that moves in
it.

A matrix X of rank r has many factor pairs, ``(B M)(M^{-1} A)`` for every invertible M, and Adam on the factors goes
another way for each. Steps in the space itself depend on X alone (RiemannLoRA, 2025, "A unified Riemannian framework
for ambiguity-free LoRA optimization").

Notation: ``X = left @ right^T`` with left (m, r) orthonormal; ``right = basis @ mixing`` with basis (n, r)
orthonormal. A tangent at X is ``d_left basis^T + left d_right^T`` with ``left^T d_left = 0``. All work is O((m + n)
r^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gramian.adapt.adapter import Context, Start
from gramian.adapt.initial import gradient_vectors, orthonormal
from gramian.errors import GramianError
from gramian.linalg import svd_of_product
from gramian.nn.structured import Structured
from gramian.ops import BlockLowRank, Operator, Sum

if TYPE_CHECKING:
    from gramian.adapt.attach import Adapted


@dataclass(frozen=True)
class Point:
    """A matrix of rank r.

    Attributes:
        left: (m, r), orthonormal columns.
        right: (n, r): X = left @ right^T.
        basis: (n, r), orthonormal columns that span those of `right`.
    """

    left: Tensor
    right: Tensor
    basis: Tensor


@dataclass(frozen=True)
class Tangent:
    """``d_left basis^T + left d_right^T`` at a point.

    Attributes:
        d_left: (m, r), orthogonal to the point's `left`.
        d_right: (n, r).
    """

    d_left: Tensor
    d_right: Tensor

    def pair(self, point: Point) -> tuple[Tensor, Tensor]:
        """The tangent as P (m, 2r) and Q (n, 2r) with ``P Q^T`` equal to it."""
        return torch.cat([self.d_left, point.left], 1), torch.cat([point.basis, self.d_right], 1)

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar: the two parts are orthogonal."""
        return (self.d_left.square().sum() + self.d_right.square().sum()).sqrt()


def point(left: Tensor, right: Tensor) -> Point:
    """The point ``left (m, r) @ right (n, r)^T``, whatever the gauge of the pair."""
    u, s, vh = svd_of_product(left, right.mT)
    return Point(u, vh.mT * s, vh.mT)


def project(at: Point, left: Tensor, right: Tensor) -> Tangent:
    """The tangent nearest to ``left (m, k) @ right (n, k)^T``."""
    inner = at.left.mT @ left  # (r, k)
    return Tangent((left - at.left @ inner) @ (right.mT @ at.basis), right @ inner.mT)


def project_gradient(at: Point, times_basis: Tensor, times_left: Tensor) -> Tangent:
    """The tangent nearest to a gradient G of which only ``G @ basis`` (m, r) and ``G^T @ left`` (n, r) are known."""
    return Tangent(times_basis - at.left @ (at.left.mT @ times_basis), times_left)


def transport(tangent: Tangent, old: Point, new: Point) -> Tangent:
    """A tangent at `old` as one at `new`: its projection there."""
    return project(new, *tangent.pair(old))


def retract(at: Point, tangent: Tangent, step: float, shrink: float = 1.0) -> Point:
    """The best rank-r approximation of ``shrink X + step tangent``, by two QR factorisations and an SVD of 2r x 2r.

    Args:
        at: X.
        tangent: at X.
        step: how far; negative for descent.
        shrink: below 1 for weight decay.
    """
    left = torch.cat([at.left, step * tangent.d_left], 1)
    right = torch.cat([shrink * at.right + step * tangent.d_right, at.basis], 1)
    u, s, vh = svd_of_product(left, right.mT)
    r = at.left.shape[1]
    return Point(u[:, :r], vh[:r].mT * s[:r], vh[:r].mT)


def unit_direction(at: Point, tangent: Tangent) -> Tangent:
    """The tangent with its singular values set to one, projected back (Riemannion): the steepest direction in the
    spectral norm, as in Muon.
    """
    u, s, vh = svd_of_product(tangent.pair(at)[0], tangent.pair(at)[1].mT)
    seen = (s > 1e-6 * s[0]).to(s)  # a tangent of lower rank has directions of rounding
    return project(at, u * seen, vh.mT)


# The start, and the layout of the update ------------------------------------------------------------------------------


def update_at(at: Point) -> Sum:
    """X as an update whose gradients are those that a step needs.

    ``Z basis^T + left right^T`` with Z = 0: the gradient with respect to Z is ``G basis`` and that with respect to
    right^T is ``left^T G``, so that one ordinary backward pass gives the tangent gradient and no inverse of r x r
    does. Z ("parts.0.left") and right^T ("parts.1.right") train, the frames are moved by ``Riemannian``.
    """
    return Sum(
        (
            BlockLowRank.low_rank(torch.zeros_like(at.left), at.basis.mT.contiguous()),
            BlockLowRank.low_rank(at.left, at.right.mT.contiguous()),
        )
    )


TRAINABLE = ("parts.0.left", "parts.1.right")
"""Of ``update_at``."""


def aligned_point(context: Context, scale: float) -> Point:
    """``scale U_{1..r} V_{r+1..2r}^T`` of the gradient's singular vectors: of all points of rank r, its tangent space
    holds most of the gradient, the sum of its 2 r largest squared singular values (locally optimal initialisation).

    Raises:
        GramianError: no gradient, or a layer with a side below 2 r.
    """
    r, (out, in_) = context.rank, context.shape
    if 2 * r > min(out, in_):
        raise GramianError(
            f"layer {context.name} ({out} x {in_}): rank {r}; the aligned start takes 2 x rank singular vectors, expected a "
            f"rank of at most {min(out, in_) // 2}"
        )
    u, _, vh = gradient_vectors(context, 2 * r)
    basis = vh[r:].mT
    return Point(u[:, :r], scale * basis, basis)


def random_point(context: Context, scale: float) -> Point:
    """``scale U V^T`` with random orthonormal U and V."""
    (out, in_), r = context.shape, context.rank
    basis = orthonormal(in_, r, context.generator)
    return Point(orthonormal(out, r, context.generator), scale * basis, basis)


def start_at(weight: Tensor, context: Context, *, aligned: bool, scale: float) -> Start:
    """The update at an aligned or a random point, which is subtracted."""
    at = aligned_point(context, scale) if aligned else random_point(context, scale)
    at = Point(at.left.to(weight), at.right.to(weight), at.basis.to(weight))
    return Start(update_at(at), BlockLowRank.low_rank(at.left, at.right.mT))


# The optimizer -------------------------------------------------------------------------------------------------------


class Riemannian(torch.optim.Optimizer):
    """Steps in the space of matrices of rank r, for updates in the layout of ``update_at``.

    Args:
        updates: ``edit.update`` of each edit.
        lr: length of a step; with direction "unit" the spectral norm of the change.
        momentum: of the heavy ball; it is transported from tangent space to tangent space.
        direction: "unit" (Riemannion) or "gradient" (plain Riemannian descent).
        weight_decay: X shrinks by ``1 - lr * weight_decay`` a step.

    Raises:
        GramianError: an update of another layout, or a value out of range.
    """

    def __init__(
        self,
        updates: list[Structured],
        lr: float,
        *,
        momentum: float = 0.9,
        direction: str = "unit",
        weight_decay: float = 0.0,
    ) -> None:
        if direction not in ("unit", "gradient"):
            raise GramianError(f"Riemannian: direction {direction!r}; expected 'unit' or 'gradient'")
        if not (lr > 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise GramianError(
                f"Riemannian: lr {lr}, momentum {momentum}, weight decay {weight_decay}; expected lr above 0, momentum in "
                "[0, 1), weight decay not negative"
            )
        groups: list[dict[str, Any]] = []
        for update in updates:
            names = ("parts.0.left", "parts.0.right", "parts.1.left", "parts.1.right")
            if list(update.op.factors()) != list(names):
                raise GramianError(
                    f"Riemannian: an update with the factors {list(update.op.factors())}; expected that of riemann_lora"
                )
            # The two that have gradients come first: what other code takes for this group's parameters.
            zero, basis, left, right = (update._holder(name).weight for name in names)
            groups.append({"params": [zero, right, basis, left]})
        super().__init__(groups, {"lr": lr, "momentum": momentum, "direction": direction, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every update that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            zero, right, basis, left = group["params"]
            if zero.grad is None or right.grad is None:
                continue
            at = Point(left, right.mT, basis.mT)
            tangent = project_gradient(at, zero.grad, right.grad.mT)
            state = self.state[zero]
            if "d_left" in state:
                before = Tangent(state["d_left"], state["d_right"])
                old = Point(state["left"], state["right"], state["basis"])
                moved = transport(before, old, at)
                beta = group["momentum"]
                tangent = Tangent(beta * moved.d_left + tangent.d_left, beta * moved.d_right + tangent.d_right)
            direction = unit_direction(at, tangent) if group["direction"] == "unit" else tangent
            if group["momentum"]:
                state.update(d_left=tangent.d_left, d_right=tangent.d_right)
                state.update(left=left.clone(), right=right.mT.clone(), basis=basis.mT.clone())
            new = retract(at, direction, -group["lr"], 1 - group["lr"] * group["weight_decay"])
            zero.zero_()
            left.copy_(new.left)
            right.copy_(new.right.mT)
            basis.copy_(new.basis.mT)
        return loss


def riemannian(adapted: Adapted, lr: float, **options: Any) -> Riemannian:
    """``Riemannian`` over the edits of an adapter."""
    return Riemannian([edit.update for edit in adapted.edits.values()], lr, **options)


# A preconditioner for factor pairs ------------------------------------------------------------------------------------


def factor_pairs(update: Structured) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The (left, right) parameters of every low-rank pair in an update of which both train."""
    found = []
    for name in update.op.factors():
        if name == "left" or name.endswith(".left"):
            prefix = name[: -len("left")]
            owner: Operator = update.op
            for part in filter(None, prefix.split(".")):
                owner = owner[int(part)] if isinstance(owner, tuple) else getattr(owner, part)
            pair = update._holder(name).weight, update._holder(prefix + "right").weight
            if isinstance(owner, BlockLowRank) and owner.blocks == (1, 1) and all(p.requires_grad for p in pair):
                found.append(pair)
    return found  # type: ignore[return-value]


class Preconditioned(torch.optim.AdamW):
    """AdamW after ``g_A <- (B^T B + d I)^{-1} g_A`` and ``g_B <- g_B (A A^T + d I)^{-1}`` for each pair B A (Zhang and
    Pilanci 2024, "Riemannian preconditioned LoRA for fine-tuning foundation models"). Other parameters take plain
    AdamW steps.

    Args:
        groups: parameters, as for AdamW.
        pairs: (left, right) of the pairs among them.
        damping: d.
        options: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        pairs: list[tuple[nn.Parameter, nn.Parameter]],
        *,
        damping: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.pairs, self.damping = pairs, damping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; gradients of the pairs are changed in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for left, right in self.pairs:
                precondition_(left, right, self.damping)
        super().step()
        return loss


@torch.no_grad()
def precondition_(left: nn.Parameter, right: nn.Parameter, damping: float) -> None:
    """Multiply the gradients of a pair, in place, by the inverse r x r Grams of the other factor.

    Args:
        left: B (out, r).
        right: A (r, in).
        damping: d, added to both Grams: while B is still zero it is all there is of one.
    """
    if left.grad is None or right.grad is None:
        return
    eye = damping * torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    right.grad.copy_(torch.linalg.solve(left.mT @ left + eye, right.grad))
    left.grad.copy_(torch.linalg.solve(right @ right.mT + eye, left.grad.mT).mT)


def preconditioned(adapted: Adapted, lr: float, damping: float = 1e-6) -> Preconditioned:
    """``Preconditioned`` over the edits of an adapter; its rates per factor hold."""
    pairs = [pair for edit in adapted.edits.values() for pair in factor_pairs(edit.update)]
    if not pairs:
        raise GramianError(f"adapter {adapted.name!r}: no pair of low-rank factors that both train to precondition")
    return Preconditioned(adapted.parameter_groups(lr), pairs, damping=damping, lr=lr, weight_decay=0.0)
