"""Where an update begins: functions (weight (out, in), context) -> Start, for ``Adapter.start``.

Every start here but ``gradient_step`` leaves the layer's output as it was: the update is zero, or equals the frozen
copy that is subtracted from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian.adapt.adapter import Context, Start
from gramian.adapt.gradients import Loss, default_loss, layer_products
from gramian.errors import GramianError
from gramian.linalg import pivoted_rows, randomised_svd, reduced_rank, svd, svd_of_product, svd_requests, svdvals
from gramian.ops import BlockLowRank, Dense, Diagonal, Operator, Product, cur

StartFunction = Callable[[Tensor, Context], Start | Operator]

CONDITION = 1e6
"""A Nystrom core of a larger condition number is refused: float32 would lose what the factors say."""


# Random factors ------------------------------------------------------------------------------------------------------


def kaiming(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """(rows, columns) uniform within ``1 / sqrt(columns)``: the start of ``nn.Linear``, and of LoRA's A."""
    bound = columns**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def orthonormal(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """(rows, columns) with orthonormal columns, or rows where there are fewer of them."""
    tall = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator)
    q: Tensor = torch.linalg.qr(tall)[0].float()
    return q if rows >= columns else q.mT


def core(left: Tensor, middle: Tensor, right: Tensor) -> Product:
    """``left (out, r) @ middle (r, r) @ right (r, in)``; factors "parts.0.weight", "parts.1.weight", "parts.2.weight"."""
    return Product((Dense(left), Dense(middle), Dense(right)))


# Zero products -------------------------------------------------------------------------------------------------------


def zero_pair(weight: Tensor, context: Context) -> Operator:
    """``B A`` with B = 0 and A by Kaiming's rule: LoRA's start."""
    (out, in_), r = context.shape, context.rank
    return BlockLowRank.low_rank(torch.zeros(out, r), kaiming(r, in_, context.generator))


def zero_pair_orthonormal(weight: Tensor, context: Context) -> Operator:
    """``B A`` with B = 0 and random orthonormal rows in A."""
    (out, in_), r = context.shape, context.rank
    return BlockLowRank.low_rank(torch.zeros(out, r), orthonormal(r, in_, context.generator))


def input_directions(weight: Tensor, context: Context) -> Operator:
    """``B A`` with B = 0 and in A the r main directions of the layer's inputs (EVA, 2024, "One initialization to rule
    them all"). Needs ``gram_in``.
    """
    gram = _needed(context, "gram_in")
    if gram.dim() == 1:
        gram = torch.diag(gram)
    vectors, _, _ = randomised_svd(gram.double(), context.rank, generator=context.generator)
    return BlockLowRank.low_rank(
        weight.new_zeros(context.shape[0], context.rank), vectors[:, : context.rank].mT.to(weight)
    )


# From the weight -----------------------------------------------------------------------------------------------------


def principal_vectors(weight: Tensor, context: Context, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), s (r,), Vh (r, in) of the largest singular values of the weight."""
    if exact:
        u, s, vh = svd(weight)
        return u[:, : context.rank], s[: context.rank], vh[: context.rank]
    return randomised_svd(weight, context.rank, generator=context.generator)


def principal(weight: Tensor, context: Context, *, exact: bool = False) -> Start:
    """``B = U sqrt(s / g)``, ``A = sqrt(s / g) V^T`` of the r largest singular values of W, which are subtracted
    (PiSSA).
    """
    u, s, vh = principal_vectors(weight, context, exact)
    root = (s / context.gain).sqrt()
    return _subtracted(BlockLowRank.low_rank(u * root, root[:, None] * vh))


def minor(weight: Tensor, context: Context) -> Start:
    """B: the left singular vectors of the r smallest singular values of W; A = 0 (MiCA, 2026, "Learn more, forget
    less").
    """
    u, _, _ = svd(weight)
    return Start(BlockLowRank.low_rank(u[:, -context.rank :], weight.new_zeros(context.rank, context.shape[1])))


def singular_values(weight: Tensor, context: Context) -> Start:
    """``U diag(s / g) V^T`` of the r largest singular values of W, subtracted; factor "parts.1.values" is s (SVFit)."""
    u, s, vh = principal_vectors(weight, context)
    return _subtracted(Product((Dense(u), Diagonal(s / context.gain), Dense(vh))))


def principal_frame(weight: Tensor, context: Context) -> Operator:
    """``(U s) R V^T`` with R = 0 (LoRA-XS)."""
    u, s, vh = principal_vectors(weight, context)
    return core(u * s, weight.new_zeros(context.rank, context.rank), vh)


def nystrom(weight: Tensor, context: Context) -> Start:
    """``(W X) (Y^T W X)^+ (Y^T W)`` of r sketched columns and rows of W, subtracted: the Nystrom approximation of a
    rectangular matrix.

    The columns are ``W X`` with X an orthonormal basis of ``W^T g`` for a Gaussian g (one step of subspace iteration),
    the rows ``Y^T W`` with Y an orthonormal basis of ``W X``; for these two the approximation is the projection of W
    on the columns' span, at most slightly worse than the SVD. Taking the leading rows and columns of W instead, as
    NLoRA does, puts the inverse of a random square block in the middle, and the approximation is off by tens of times
    the weight. Factors are given in the gauge where the outer two have orthonormal columns and rows, so that the
    middle one carries all of the scale.

    Raises:
        GramianError: the core's condition number is above ``CONDITION``: the weight has a lower rank than asked for.
    """
    (out, in_), r = context.shape, context.rank
    probe = weight.mT @ torch.randn(out, r, generator=context.generator).to(weight)
    columns = weight @ torch.linalg.qr(probe)[0]
    left = torch.linalg.qr(columns)[0]
    rows = left.mT @ weight
    basis, triangle = torch.linalg.qr(rows.mT)
    values = svdvals(triangle)
    if not bool(values[-1] * CONDITION > values[0]):
        raise GramianError(
            f"layer {context.name} ({out} x {in_}): the Nystrom core of rank {r} has the condition number "
            f"{float(values[0] / values[-1]):.1e}; "
            f"expected at most {CONDITION:.0e}. Lower the rank, or start from the SVD (pissa)"
        )
    return _subtracted(core(left, triangle.mT / context.gain, basis.mT))


def skeleton(weight: Tensor, context: Context) -> Start:
    """``C U R``, subtracted: columns and rows of W chosen by pivoted QR of W itself, and the best core of rank r between
    them, the truncation of ``C^+ W R^+`` in orthonormal bases.

    A half more columns and rows than r are read: with r of each, no choice that we found (nor exchanges one by one) comes
    within 1.35 of the SVD's error on every weight of a trained encoder.
    """
    r = context.rank
    count = min(r + -(-r // 2), *context.shape)
    columns = torch.linalg.qr(weight[:, pivoted_rows(weight.mT, count)])[0]
    rows = torch.linalg.qr(weight[pivoted_rows(weight, count)].mT)[0]
    u, s, vh = svd(columns.mT @ weight @ rows)
    return _subtracted(core(columns @ u[:, :r], torch.diag(s[:r]) / context.gain, vh[:r] @ rows.mT))


def skeleton_frame(weight: Tensor, context: Context) -> Operator:
    """``C U R`` with U = 0, and the pivoted columns and rows divided by their spectral norms (PMSS)."""
    return cur(weight, context.rank, update=True)


def weighted_principal(weight: Tensor, context: Context) -> Start:
    """The best rank-r approximation of W under the Gram of its inputs, subtracted (as in CorDA, 2024, "Context-oriented
    decomposition adaptation", with its square root in place of the covariance itself: the choice that minimises the
    error of the layer's output). Needs ``gram_in``.
    """
    best = reduced_rank(weight, _needed(context, "gram_in"), context.gram_out)
    r = context.rank
    u, s, vh = svd_of_product(best.left[:, :r], best.right[:r])
    root = (s / context.gain).sqrt()
    return _subtracted(BlockLowRank.low_rank((u * root).to(weight), (root[:, None] * vh).to(weight)))


# From the gradient ---------------------------------------------------------------------------------------------------


def gradient_vectors(context: Context, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, rank), s, Vh (rank, in) of the gradient, whether it is at hand as an array or as a low-rank sketch.

    Raises:
        GramianError: there is no gradient, it is zero, or its sketch has a lower rank than asked for.
    """
    given = context.gradient
    if given is None:
        raise GramianError(f"layer {context.name}: its start uses the gradient; pass data=... (or gradients=...)")
    if isinstance(given, BlockLowRank) and given.blocks == (1, 1):
        u, s, vh = svd_of_product(given.left[0], given.right[0])
        if len(s) < rank:
            raise GramianError(
                f"layer {context.name}: the sketch of its gradient has rank {len(s)}; expected at least {rank}"
            )
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        dense = given.dense() if isinstance(given, Operator) else given
        u, s, vh = randomised_svd(dense, rank, generator=context.generator)
    if not bool(s[0] > 0):
        raise GramianError(f"layer {context.name}: its gradient is zero; leave the layer out or change the data")
    return u, s, vh


def gradient_frame(weight: Tensor, context: Context) -> Operator:
    """``U R V^T`` with R = 0 between the r main singular vectors of the gradient. Needs ``gradient``."""
    u, _, vh = gradient_vectors(context, context.rank)
    return core(u, u.new_zeros(context.rank, context.rank), vh)


def gradient_step(weight: Tensor, context: Context, *, step: float) -> Operator:
    """``U R V^T = -step * best rank-r approximation of sign(gradient) / g``: where Adam's first step would lead. The
    only start that changes the layer's output (LoRA-SB). Needs ``gradient``.
    """
    given = context.gradient
    if given is None:
        raise GramianError(f"layer {context.name}: its start uses the gradient; pass data=... (or gradients=...)")
    sign = (given.dense() if isinstance(given, Operator) else given).sign()
    if not bool(sign.any()):
        raise GramianError(f"layer {context.name}: its gradient is zero; leave the layer out or change the data")
    # The signs of a gradient have a flat tail; the best approximation is wanted to 1e-4, so more than the usual depth.
    u, s, vh = randomised_svd(sign, context.rank, oversampling=20, power_iterations=12, generator=context.generator)
    return core(u, torch.diag(-step * s / context.gain), vh)


def gradient_sketches(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    rank: int | Mapping[str, int],
    loss: Loss = default_loss,
    oversampling: int = 10,
    power_iterations: int = 1,
    seed: int = 0,
) -> dict[str, Operator]:
    """The best rank-r approximation of ``dL/dW`` of every layer, none of which is ever an array: products with a
    gradient, ``G z = sum_t g_t (x_t . z)``, come out of a backward pass that keeps inputs x_t and output gradients g_t
    of one batch. All layers share the 2 (q + 1) passes over the data (RiemannLoRA, 2025, "BackPropRSVD"; here each
    pass enlarges a Krylov space instead of replacing a basis).

    Args:
        model: left as it was.
        layers: linear layers of the model by name.
        data: batches; held in a list, as they are gone through several times.
        rank: of all layers, or of each.
        loss: (model, batch) -> scalar.
        oversampling: p of ``linalg.randomised_svd``.
        power_iterations: q of it.
        seed: of the first blocks.

    Returns:
        For ``attach(gradients=...)``.
    """
    from gramian.adapt.layer import layer_shape

    batches = list(data)
    running = {}
    for index, (name, layer) in enumerate(layers.items()):
        shape = layer_shape(layer)
        wanted = rank if isinstance(rank, int) else rank[name]
        running[name] = svd_requests(
            shape,
            min(wanted, *shape),
            oversampling=oversampling,
            power_iterations=power_iterations,
            generator=torch.Generator().manual_seed(seed + index),
        )
    requests = {name: next(one) for name, one in running.items()}
    found: dict[str, Operator] = {}
    while requests:
        asked = {name: (request.adjoint, request.block) for name, request in requests.items()}
        answers = layer_products(model, {name: layers[name] for name in asked}, batches, asked, loss)
        requests = {}
        for name, answer in answers.items():
            try:
                requests[name] = running[name].send(answer)
            except StopIteration as end:
                u, s, vh = end.value
                found[name] = BlockLowRank.low_rank(u * s, vh)
    return {name: found[name] for name in layers}


# -----------------------------------------------------------------------------------------------------------------------


def _subtracted(update: Operator) -> Start:
    return Start(update, update)


def _needed(context: Context, name: str) -> Tensor:
    value: Tensor | None = getattr(context, name)
    if value is None:
        raise GramianError(f"layer {context.name}: its start uses {name}; pass data=... (or grams=...)")
    return value
