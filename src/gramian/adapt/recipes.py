"""Published methods as values of ``Adapter``'s axes: ``attach(model, pissa(), rank=16)``.

W is (out, in) = (m, n), r the rank given to ``attach``, s the gain. Each recipe names its paper, its formula, how many
numbers it trains a layer, and where it departs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gramian.adapt.adapter import Adapter, Context, Start, by_group, by_role
from gramian.adapt.attach import attach
from gramian.adapt.initial import (
    core,
    gradient_frame,
    gradient_step,
    input_directions,
    kaiming,
    minor,
    nystrom,
    orthonormal,
    principal,
    principal_frame,
    singular_values,
    skeleton_frame,
    weighted_principal,
    zero_pair,
    zero_pair_orthonormal,
)
from gramian.adapt.inserts import compacter, snnk, surm_insert
from gramian.adapt.mixture import moe_lora
from gramian.adapt.riemannian import TRAINABLE, riemannian, start_at
from gramian.errors import GramianError, nearest
from gramian.ops import (
    BlockDiag,
    BlockLowRank,
    Circulant,
    Dense,
    Diagonal,
    Householder,
    Identity,
    KroneckerSum,
    LowDisplacement,
    MaskedLowRank,
    Operator,
    Orthogonal,
    Product,
    Sum,
    SymmetricLowRank,
    Toeplitz,
    permuted_orthogonal,
)

if TYPE_CHECKING:
    from gramian.adapt.attach import Adapted
    from gramian.adapt.layer import Edit


# Low rank ------------------------------------------------------------------------------------------------------------


def lora(alpha: float = 16.0, dropout: float = 0.0) -> Adapter:
    """LoRA (2021, "LoRA: low-rank adaptation of large language models"): ``W + (alpha / r) B A``, B = 0. Trains r (m +
    n).
    """
    return Adapter(zero_pair, alpha=alpha, dropout=dropout, recipe="lora")


def lora_plus(alpha: float = 16.0, ratio: float = 16.0) -> Adapter:
    """LoRA+ (2024, "LoRA+: efficient low rank adaptation of large models"): LoRA with `ratio` times the learning rate
    for B.
    """
    return Adapter(zero_pair, alpha=alpha, rates={"left": ratio}, recipe="lora_plus")


def rslora(alpha: float = 16.0) -> Adapter:
    """The rule of rsLoRA (2023, "A rank stabilization scaling factor for fine-tuning with LoRA"): LoRA with ``s = alpha /
    sqrt(r)``.
    """
    return Adapter(zero_pair, alpha=alpha, power=0.5, recipe="rslora")


def pissa(exact: bool = False) -> Adapter:
    """PiSSA (2024, "PiSSA: principal singular values and singular vectors adaptation"): ``W - B0 A0 + B A`` from ``B0
    A0``, the best rank-r approximation of W, with s = 1. Trains r (m + n).

    Departures: singular vectors by block Krylov iteration unless `exact`; W stays as it is and ``B0 A0`` is kept
    beside it.
    """
    return Adapter(partial(principal, exact=exact), recipe="pissa")


def mica() -> Adapter:
    """MiCA (2026, "Learn more, forget less"): ``W + B A`` with B the left singular vectors of the smallest singular
    values, frozen, and A = 0. Trains r n.
    """
    return Adapter(minor, trainable=("right",), recipe="mica")


def eva(alpha: float = 1.0) -> Adapter:
    """EVA (2024, "One initialization to rule them all: fine-tuning via explained variance adaptation"): LoRA whose A
    holds the main directions of the inputs. Departure: the same rank in every layer (``auto`` divides ranks up).
    Trains r (m + n).
    """
    return Adapter(input_directions, alpha=alpha, power=0.0, needs=frozenset({"gram_in"}), recipe="eva")


def corda() -> Adapter:
    """CorDA (2024, "CorDA: context-oriented decomposition adaptation of large language models"): PiSSA under the Gram
    of the inputs. Departure: the approximation that is best for the layer's output. Trains r (m + n).
    """
    return Adapter(weighted_principal, needs=frozenset({"gram_in"}), recipe="corda")


def asymmetric_lora(alpha: float = 16.0) -> Adapter:
    """Asymmetric LoRA (2024, "Asymmetry in low-rank adapters of foundation models"): LoRA with A random orthonormal
    rows, frozen. Trains r m; take twice the rank for LoRA's budget on a square layer.
    """
    return Adapter(zero_pair_orthonormal, alpha=alpha, trainable=("left",), recipe="asymmetric_lora")


def singlora(alpha: float = 8.0, ramp: int = 100) -> Adapter:
    """SingLoRA (2025, "SingLoRA: low rank adaptation using a single matrix"): ``W + (alpha / r) u(t) A[:m] A[:n]^T``
    with ``u = min(t / ramp, 1)``. The update of a square layer is positive semi-definite. Trains r max(m, n).
    """

    def start(weight: Tensor, context: Context) -> Operator:
        return SymmetricLowRank.random(context.shape, context.rank, generator=context.generator)

    if ramp < 1:
        raise GramianError(
            f"singlora: ramp {ramp}; expected at least 1 step, without one the model would not start as it was"
        )
    return Adapter(start, alpha=alpha, ramp=ramp, recipe="singlora")


def capaboost(alpha: float = 16.0, copies: int = 2, density: float = 0.5) -> Adapter:
    """CapaBoost (2024, "Increasing model capacity for free: a simple strategy for parameter efficient fine-tuning"):
    ``W + s sum_i (B * M_i)(A * N_i)`` with d = `copies` fixed random masks. Trains r (m + n), has rank d r.

    Departure: the gradient of the shared factors is their true one; the paper's code ties copies by hand.
    """

    def start(weight: Tensor, context: Context) -> Operator:
        (out, in_), r, g = context.shape, context.rank, context.generator
        left, right = torch.zeros(out, r), kaiming(r, in_, g)
        return MaskedLowRank.masked(left, right, copies=copies, density=density, generator=g)

    return Adapter(start, alpha=alpha, recipe="capaboost")


def lora_dropout(alpha: float = 16.0, p: float = 0.3) -> Adapter:
    """LoRA Dropout (2024, "LoRA dropout as a sparsity regularizer for overfitting control"): while training, columns
    of A (inputs) and rows of B (outputs) are dropped with probability p; the rank dimension never is. ``ensemble``
    averages masked models at test time. Trains r (m + n).

    Departure: what is kept is divided by ``1 - p``, so that the merged update is the expectation.
    """
    if not 0 <= p < 1:
        raise GramianError(f"lora_dropout: p {p}; expected at least 0 and below 1")

    def masks(update: Operator) -> Operator:
        left, right = (update.factors()[name] for name in ("left", "right"))
        rows = torch.bernoulli(torch.full_like(left[:, :, :1], 1 - p)) / (1 - p)
        columns = torch.bernoulli(torch.full_like(right[:, :1], 1 - p)) / (1 - p)
        return update.replace(left=left * rows, right=right * columns)

    return Adapter(zero_pair, alpha=alpha, perturb=masks, recipe="lora_dropout")


def ensemble(adapted: Adapted, run: Callable[[nn.Module], Tensor], samples: int = 8) -> Tensor:
    """Mean of ``run(model)`` over `samples` draws of the adapter's masks: LoRA Dropout at test time."""
    with adapted.perturbed() as model, torch.no_grad():
        return torch.stack([run(model) for _ in range(samples)]).mean(0)


def msplora(alpha: float = 16.0, groups: int = 2, ranks: tuple[int, int, int] | None = None) -> Adapter:
    """MSPLoRA (2025, "MSPLoRA: a multi-scale pyramid low-rank adaptation"): ``W + s (B_g A_g + B_m A_m + B_l A_l)``:
    one pair for all layers of a role, one for each of `groups` runs of them, one of the layer's own.

    Trains over L layers of a role ``(r_g + groups r_m + L r_l) (m + n)``.

    Args:
        alpha: gain times r.
        groups: of the middle pair.
        ranks: (r_g, r_m, r_l); r, r / 2 and r / 4 (at least 1) by default.
    """

    def start(weight: Tensor, context: Context) -> Operator:
        (out, in_), r, g = context.shape, context.rank, context.generator
        sizes = ranks or (r, max(r // 2, 1), max(r // 4, 1))
        return Sum(tuple(BlockLowRank.low_rank(torch.zeros(out, k), kaiming(k, in_, g)) for k in sizes))

    return Adapter(start, alpha=alpha, share={"parts.0.*": by_role, "parts.1.*": by_group(groups)}, recipe="msplora")


# A core between two frames -------------------------------------------------------------------------------------------


def slora(alpha: float = 16.0) -> Adapter:
    """SLoRA of NLoRA's paper (2025, "NLoRA: Nystrom-initiated low-rank adaptation for large language models"): ``W + s
    B N A`` with B = 0. Trains r (m + n) + r^2.
    """

    def start(weight: Tensor, context: Context) -> Operator:
        (out, in_), r, g = context.shape, context.rank, context.generator
        return core(torch.zeros(out, r), kaiming(r, r, g), kaiming(r, in_, g))

    return Adapter(start, alpha=alpha, recipe="slora")


def nlora() -> Adapter:
    """NLoRA (2025, "NLoRA: Nystrom-initiated low-rank adaptation for large language models"): ``W + B N A`` from a
    Nystrom approximation of W. Trains r (m + n) + r^2.

    Departures: sketched columns and rows in place of the leading ones, the approximation is subtracted, s = 1 (see
    ``initial.nystrom``).
    """
    return Adapter(nystrom, recipe="nlora")


def intermediate_tune() -> Adapter:
    """IntermediateTune of NLoRA's paper: ``nlora`` with only the r x r core trained. Trains r^2."""
    return Adapter(nystrom, trainable=("parts.1.*",), recipe="intermediate_tune")


def lora_xs() -> Adapter:
    """LoRA-XS (2024, "LoRA-XS: low-rank adaptation with extremely small number of parameters"): ``W + U s R V^T``
    between the singular vectors of W. Departure: R = 0, not N(0, 1e-5). Trains r^2.
    """
    return Adapter(principal_frame, trainable=("parts.1.*",), recipe="lora_xs")


def lora_sb(step: float = 1e-4) -> Adapter:
    """LoRA-SB (2024, "Initialization using update approximation is a silver bullet for extremely efficient low-rank
    fine-tuning"): ``W + U R V^T`` from ``-step`` times the best rank-r approximation of sign(dL/dW), not subtracted:
    training starts one simulated step of Adam ahead. Trains r^2. Needs data.
    """
    if not 0 < step < float("inf"):
        raise GramianError(f"lora_sb: step {step}; expected a positive finite number")
    return Adapter(
        partial(gradient_step, step=step), trainable=("parts.1.*",), needs=frozenset({"gradient"}), recipe="lora_sb"
    )


def gradient_core() -> Adapter:
    """``W + U R V^T`` with R = 0 between the singular vectors of dL/dW itself: LoRA-SB's frame without the sign, which
    flattens the spectrum, and without its step (ours). Trains r^2. Needs data.
    """
    return Adapter(gradient_frame, trainable=("parts.1.*",), needs=frozenset({"sketch"}), recipe="gradient_core")


def pmss() -> Adapter:
    """PMSS (2024, "PMSS: pretrained matrices skeleton selection for LLM fine-tuning"): ``W + C U R`` with pivoted
    columns and rows of W, frozen, and U = 0. Departure: C and R are divided by their spectral norms. Trains r^2.
    """
    return Adapter(skeleton_frame, trainable=("core",), recipe="pmss")


def svfit() -> Adapter:
    """SVFit (2024, "SVFit: parameter-efficient fine-tuning of large pre-trained models using singular values"): the r
    largest singular values of W. Trains r. Takes learning rates of 1e-2 and more.
    """
    return Adapter(singular_values, trainable=("parts.1.*",), recipe="svfit")


def lora_mini(alpha: float = 16.0, outer: int | None = None) -> Adapter:
    """LoRA-Mini (2024, "LoRA-Mini: adaptation matrices decomposition and selective training"): ``W + s B' B A A'``
    with random outer factors, frozen, of inner size a = `outer` (4 r by default, at most the layer's sides), and B =
    0. Trains 2 r a.
    """

    def start(weight: Tensor, context: Context) -> Operator:
        (out, in_), r, g = context.shape, context.rank, context.generator
        a = min(outer or 4 * r, out, in_)
        inner = (Dense(torch.zeros(a, r)), Dense(kaiming(r, a, g)))
        return Product((Dense(orthonormal(out, a, g)), *inner, Dense(orthonormal(a, in_, g))))

    return Adapter(start, alpha=alpha, trainable=("parts.1.*", "parts.2.*"), recipe="lora_mini")


def bilora(orthogonality: float = 0.1) -> Adapter:
    """BiLoRA (2024, "BiLoRA: a bi-level optimization framework for overfitting-resilient low-rank adaptation"): ``W +
    P diag(l) Q``; P and Q learn on one part of the data under ``||P^T P - I||^2 + ||Q Q^T - I||^2``, l on the other
    (``two_level_step``). Trains r (m + n + 1).
    """

    def start(weight: Tensor, context: Context) -> Operator:
        (out, in_), r, g = context.shape, context.rank, context.generator
        left, right = orthonormal(out, r, g), orthonormal(r, in_, g)
        return Product((Dense(left), Diagonal(torch.zeros(r)), Dense(right)))

    def penalty(edit: Edit) -> Tensor:
        factors = edit.update.op.factors()
        p, q = factors["parts.0.weight"], factors["parts.2.weight"]
        eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
        return orthogonality * ((p.mT @ p - eye).square().sum() + (q @ q.mT - eye).square().sum())

    return Adapter(start, penalty=penalty, recipe="bilora")


def two_level_optimizers(
    adapted: Adapted, lr: float, upper_lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """AdamW over P and Q, and over the values l, of ``bilora``.

    Raises:
        GramianError: the adapter is not one of ``bilora``.
    """
    lower: list[nn.Parameter] = []
    upper: list[nn.Parameter] = []
    for name, edit in adapted.edits.items():
        for factor, parameter in edit.trainable().items():
            (upper if factor == "parts.1.values" else lower).append(parameter)
        if "parts.1.values" not in edit.trainable():
            raise GramianError(f"layer {name}: two levels need an update P diag(l) Q with l trained; use bilora()")
    return torch.optim.AdamW(lower, lr=lr, weight_decay=0.0), torch.optim.AdamW(upper, lr=upper_lr, weight_decay=0.0)


def two_level_step(
    adapted: Adapted,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    lower: Callable[[], Tensor],
    upper: Callable[[], Tensor],
    *,
    lookahead: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One step of P, Q on the first part of the data, then one of l on the second.

    Args:
        adapted: with ``bilora``.
        optimizers: of ``two_level_optimizers``.
        lower: () -> loss on the first part of the data; the penalty is added here.
        upper: () -> loss on the second part.
        lookahead: xi, the length of the step of P, Q through which l's gradient is taken (DARTS, 2019, second order,
        with the
            Hessian product by central differences); 0 takes them as fixed.

    Returns:
        Both losses, detached.
    """
    first, second = optimizers
    inner = [p for group in first.param_groups for p in group["params"]]
    outer = [p for group in second.param_groups for p in group["params"]]

    def gradients(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def regular() -> Tensor:
        return lower() + adapted.penalty()

    first.zero_grad()
    loss = regular()
    loss.backward()  # type: ignore[no-untyped-call]
    first.step()
    first.zero_grad()

    if lookahead:
        with torch.no_grad():
            kept = [p.clone() for p in inner]
        steps = gradients(regular(), inner)
        _moved(inner, kept, steps, -lookahead)
        value = upper()
        both = gradients(value, [*outer, *inner])
        direct, through = both[: len(outer)], both[len(outer) :]
        norm = torch.sqrt(sum((t.square().sum() for t in through), torch.zeros(())))
        epsilon = float(0.01 / norm.clamp_min(1e-12))
        sides = []
        for sign in (1.0, -1.0):
            _moved(inner, kept, through, sign * epsilon)
            sides.append(gradients(regular(), outer))
        _moved(inner, kept, through, 0.0)
        for p, g, plus, minus in zip(outer, direct, *sides, strict=True):
            p.grad = g - lookahead * (plus - minus) / (2 * epsilon)
    else:
        value = upper()
        for p, g in zip(outer, gradients(value, outer), strict=True):
            p.grad = g
    second.step()
    second.zero_grad()
    return loss.detach(), value.detach()


@torch.no_grad()
def _moved(parameters: list[Tensor], kept: list[Tensor], direction: list[Tensor], step: float) -> None:
    for p, k, d in zip(parameters, kept, direction, strict=True):
        p.copy_(k + step * d)


# Structures of full rank ---------------------------------------------------------------------------------------------


def surm_circulant(std: float = 0.02) -> Adapter:
    """SURM (2024, "Structured unrestricted-rank matrices for parameter-efficient fine-tuning"): ``W + C(b) C(a)``,
    circulant, b = 0. Trains max(m, n) + n. Rectangular ones are cut from square ones (ours).
    """

    def start(weight: Tensor, context: Context) -> Operator:
        out, in_ = context.shape
        a = std * torch.randn(in_, generator=context.generator)
        return Product((Circulant(torch.zeros(max(out, in_)), out, in_), Circulant(a, in_, in_)))

    return Adapter(start, recipe="surm_circulant")


def surm_toeplitz(std: float = 0.02) -> Adapter:
    """SURM with Toeplitz matrices: ``W + T(b) T(a)``, b = 0. Departure: general Toeplitz matrices where the paper's
    are symmetric. Trains (m + n - 1) + (2 n - 1).
    """

    def start(weight: Tensor, context: Context) -> Operator:
        out, in_ = context.shape
        a = std * torch.randn(2 * in_ - 1, generator=context.generator)
        return Product((Toeplitz(torch.zeros(out + in_ - 1), out, in_), Toeplitz(a, in_, in_)))

    return Adapter(start, recipe="surm_toeplitz")


def surm_displacement(std: float = 0.02) -> Adapter:
    """SURM with low displacement rank: ``W + sum_{i <= r} C(g_i) S(h_i)``, circulant times skew-circulant, g = 0.
    Trains r (m + n).
    """

    def start(weight: Tensor, context: Context) -> Operator:
        return LowDisplacement.delta(context.shape, context.rank, std=std, generator=context.generator)

    return Adapter(start, recipe="surm_displacement")


def surm_kronecker() -> Adapter:
    """SURM with one Kronecker product: ``W + B (x) A``, B (m / r, r) zero, A (r, n / r). Trains m + n where r divides
    both (sizes are rounded up otherwise); its rank is r^2 at most.
    """

    def start(weight: Tensor, context: Context) -> Operator:
        (out, in_), r = context.shape, context.rank
        right = kaiming(r, -(-in_ // r), context.generator)
        return KroneckerSum(torch.zeros(1, -(-out // r), r), right[None], out, in_)

    return Adapter(start, recipe="surm_kronecker")


def hut(alpha: float = 16.0) -> Adapter:
    """HUT (2024, "HUT: a more computation efficient fine-tuning method with Hadamard updated transformation"): ``W *
    (1 + s B A)`` with B = 0, as an update that depends on W. Trains r (m + n), changes W by a matrix of rank up to r
    rank(W).

    Departure: the paper's additive term is left out; only its abstract was at hand.
    """
    return Adapter(zero_pair, combine="elementwise", alpha=alpha, recipe="hut")


def _block(context: Context, size: int) -> int:
    """The largest divisor of a side that is not above the rank.

    Raises:
        GramianError: that is 1, and orthogonal blocks of 1 x 1 do nothing.
    """
    block = next(b for b in range(min(context.rank, size), 0, -1) if size % b == 0)
    if block == 1 and size > 1:
        raise GramianError(
            f"layer {context.name} ({context.shape[0]} x {context.shape[1]}): blocks of at most {context.rank} (the rank) "
            f"do not divide its side {size}; raise the rank to a divisor of it or leave the layer out"
        )
    return block


def poet(method: str = "cayley") -> Adapter:
    """POET (2025, "Reparameterized LLM training via orthogonal equivalence transformation"): ``R W P`` with R, P
    block-diagonal orthogonal between random permutations, the identity at first. The rank is the largest side of a
    block; each side of the layer takes its largest divisor b below. Trains (m (b_m - 1) + n (b_n - 1)) / 2.

    ``restart`` merges and draws new permutations. Departures: exactly orthogonal by Cayley's transform (the paper's
    truncated series: "neumann"), from the model's weights (the paper: random ones).
    """

    def start(weight: Tensor, context: Context) -> Start:
        out, in_ = context.shape
        sides = tuple(
            permuted_orthogonal(n, _block(context, n), method=method, generator=context.generator) for n in (out, in_)
        )
        return Start(BlockDiag(sides), BlockDiag((Identity(out), Identity(in_))))

    return Adapter(start, combine="two_sided", recipe="poet")


def oft(method: str = "cayley") -> Adapter:
    """OFT (2023, "Controlling text-to-image diffusion by orthogonal finetuning"), input side: ``W R``, R
    block-diagonal orthogonal with blocks of at most rank; identity at first. Trains n (b - 1) / 2.
    """

    def start(weight: Tensor, context: Context) -> Start:
        n = context.shape[1]
        b = _block(context, n)
        return Start(Orthogonal(torch.zeros(n // b, b * (b - 1) // 2), None, method), Identity(n))

    return Adapter(start, combine="right", recipe="oft")


def hra() -> Adapter:
    """HRA (2024, "Bridging the gap between low-rank and orthogonal adaptation via Householder reflection adaptation"):
    ``W H_1 ... H_r``, equal reflectors in pairs, so that the product starts as the identity; an even rank. Trains r n.
    """

    def start(weight: Tensor, context: Context) -> Start:
        n, r = context.shape[1], context.rank
        if r % 2:
            raise GramianError(f"layer {context.name}: hra with rank {r}; expected an even number of reflectors")
        half = torch.randn(r // 2, n, generator=context.generator) / n**0.5
        return Start(Householder(half.repeat_interleave(2, 0)), Identity(n))

    return Adapter(start, combine="right", recipe="hra")


def prolip(weight: float = 0.1) -> Adapter:
    """ProLIP (2024, "CLIP's visual embedding projector is a few-shot cornucopia"): a dense change D of one projection
    under ``weight ||D||_F^2``; include that layer alone. The paper's weight is 1 / N or 1 / N^2 for N shots. Trains m
    n.
    """
    if not 0 <= weight < float("inf"):
        raise GramianError(f"prolip: weight {weight}; expected a finite number, not negative")

    def start(matrix: Tensor, context: Context) -> Operator:
        return Product((Dense(torch.zeros(context.shape)),))

    def penalty(edit: Edit) -> Tensor:
        return weight * edit.update.op.factors()["parts.0.weight"].square().sum()

    return Adapter(start, penalty=penalty, recipe="prolip")


# The space of one rank -----------------------------------------------------------------------------------------------


def riemann_lora(
    aligned: bool = True, scale: float = 0.1, momentum: float = 0.9, direction: str = "unit", weight_decay: float = 0.0
) -> Adapter:
    """RiemannLoRA (2025, "RiemannLoRA: a unified Riemannian framework for ambiguity-free LoRA optimization"): ``W - X0
    + X`` with X in the space of matrices of rank r, whose steps do not depend on how X is factored. Train it with
    ``adapted.optimizer(lr)``. Trains r (m + n), of which r^2 are the choice of factors.

    Args:
        aligned: start where the tangent space holds most of the gradient (needs data, and sides of at least 2 r), else
        at a
            random point.
        scale: spectral norm of X0.
        momentum: of the heavy ball.
        direction: "unit" (Riemannion) or "gradient".
        weight_decay: on X.
    """
    if not 0 < scale < float("inf"):
        raise GramianError(f"riemann_lora: scale {scale}; expected a positive finite number")
    return Adapter(
        partial(start_at, aligned=aligned, scale=scale),
        trainable=TRAINABLE,
        optimizer=partial(riemannian, momentum=momentum, direction=direction, weight_decay=weight_decay),
        needs=frozenset({"sketch"} if aligned else ()),
        recipe="riemann_lora",
    )


# By name -------------------------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[..., Adapter]] = {
    make.__name__: make
    for make in (
        lora, lora_plus, rslora, pissa, nlora, slora, intermediate_tune, lora_sb, gradient_core, lora_xs, svfit, lora_mini,
        singlora, asymmetric_lora, mica, eva, corda, compacter, surm_circulant, surm_toeplitz, surm_displacement,
        surm_kronecker, surm_insert, hut, pmss, msplora, capaboost, lora_dropout, bilora, moe_lora, riemann_lora, poet, oft,
        hra, prolip, snnk,
    )
}  # fmt: skip
"""Every recipe that is an ``Adapter``, by name."""


def recipe(name: str, **options: Any) -> Adapter:
    """The recipe of that name.

    Raises:
        GramianError: no such recipe (the nearest names), or an option it does not have.
    """
    key = name.replace("-", "_").lower()
    if key not in RECIPES:
        raise GramianError(f"unknown recipe {name!r}{nearest(key, RECIPES)}; known: {', '.join(sorted(RECIPES))}")
    import inspect

    known = inspect.signature(RECIPES[key]).parameters
    for option in options:
        if option not in known:
            raise GramianError(
                f"recipe {key!r} has no option {option!r}{nearest(option, known)}; it has {', '.join(known) or 'none'}"
            )
    return RECIPES[key](**options)


def restart(adapted: Adapted, optimizer: torch.optim.Optimizer | None = None, *, seed: int = 0) -> Adapted:
    """Merge and start the same method again on what came out: POET's merge-then-reinitialise.

    Args:
        adapted: is merged; its ``unmerge`` brings the first model back, once the new adapter is detached.
        optimizer: its parameters become the new ones; moments start anew. Its other groups are dropped.
        seed: of the new permutations; take another one each time.

    Returns:
        The handle of the new adapter.
    """
    edits = adapted.edits
    ranks = {name: edit.rank for name, edit in edits.items()}
    adapters = dict(adapted.adapters)
    adapted.merge(lossy=True)
    made = attach(adapted.model, adapters, include=tuple(ranks), rank=ranks, name=adapted.name, seed=seed)
    if optimizer is not None:
        options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.state.clear()
        optimizer.param_groups.clear()
        for group in made.parameter_groups(float(options["lr"])):
            optimizer.add_param_group({**options, **group})
    return made
