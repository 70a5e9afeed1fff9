"""Steps among matrices of one rank: geometry against float64 references, invariance, and starts made without an array."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gramian.adapt import attach
from gramian.adapt.adapter import Context
from gramian.adapt.initial import gradient_sketches, gradient_step, nystrom, skeleton
from gramian.adapt.recipes import lora, moe_lora, recipe, riemann_lora
from gramian.adapt.riemannian import (
    Point,
    Riemannian,
    aligned_point,
    factor_pairs,
    point,
    precondition_,
    project,
    project_gradient,
    retract,
    transport,
    unit_direction,
    update_at,
)
from gramian.errors import GramianError
from gramian.linalg import Products, randomised_svd, svd_of_product
from gramian.nn.structured import Structured


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_point(m: int = 20, n: int = 14, r: int = 3) -> Point:
    return point(seeded(m, r), seeded(n, r, seed=1))


def dense(at: Point) -> Tensor:
    return at.left @ at.right.mT


# Singular values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (30, 20), (7, 1)])
def test_randomised_svd_of_a_decaying_spectrum(shape: tuple[int, int]) -> None:
    m, n = shape
    k = min(shape)
    u, _ = torch.linalg.qr(seeded(m, k))
    v, _ = torch.linalg.qr(seeded(n, k, seed=1))
    values = 0.9 ** torch.arange(k, dtype=torch.float64)
    matrix = (u * values) @ v.mT
    rank = min(5, k)
    calls: list[int] = []
    counted = Products(shape, lambda x: calls.append(x.shape[1]) or matrix @ x.double(), lambda y: matrix.mT @ y)  # type: ignore
    for given in (matrix, counted):
        left, s, right = randomised_svd(given, rank, power_iterations=4, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(s, values[:rank], rtol=1e-6)
        best = (u[:, :rank] * values[:rank]) @ v[:, :rank].mT
        assert float(((left * s) @ right - best).norm()) < 1e-4 * float(best.norm())
        assert float((left.mT @ left - torch.eye(rank)).abs().max()) < 1e-10
    assert len(calls) == (5 if k > 100 else 1)  # power iterations + 1; a small one is had whole


def test_randomised_svd_of_a_rank_deficient_matrix() -> None:
    matrix = (seeded(200, 2) @ seeded(2, 150, seed=1)).float()
    u, s, vh = randomised_svd(matrix, 4, oversampling=2, power_iterations=2)
    assert float(s[2]) < 1e-4 * float(s[0])
    assert float(((u * s) @ vh - matrix).norm()) < 1e-5 * float(matrix.norm())
    assert float((vh @ vh.mT - torch.eye(4)).abs().max()) < 1e-4
    with pytest.raises(ValueError, match=r"rank 151 of a matrix 200 x 150"):
        randomised_svd(matrix, 151)


def test_svd_of_product() -> None:
    left, right = seeded(20, 6), seeded(6, 4, seed=1)
    u, s, vh = svd_of_product(left, right)
    assert u.shape == (20, 4)
    assert torch.allclose((u * s) @ vh, left @ right)
    assert torch.allclose(s, torch.linalg.svdvals(left @ right)[:4])


# Geometry -------------------------------------------------------------------------------------------------------------


def tangent_projector(at: Point) -> tuple[Tensor, Tensor]:
    return at.left @ at.left.mT, at.basis @ at.basis.mT


def test_projection_against_its_formula() -> None:
    at, z = some_point(), seeded(20, 14, seed=3)
    p, q = tangent_projector(at)
    wanted = p @ z + z @ q - p @ z @ q
    u, s, vh = torch.linalg.svd(z, full_matrices=False)
    for found in (project(at, u * s, vh.mT), project_gradient(at, z @ at.basis, z.mT @ at.left)):
        a, b = found.pair(at)
        assert torch.allclose(a @ b.mT, wanted)
        assert torch.allclose(found.norm(), wanted.norm())
        assert float((at.left.mT @ found.d_left).abs().max()) < 1e-12


def test_retraction_is_the_truncated_svd() -> None:
    at = some_point()
    tangent = project(at, seeded(20, 5, seed=4), seeded(14, 5, seed=5))
    a, b = tangent.pair(at)
    full = 0.9 * dense(at) - 0.3 * a @ b.mT
    u, s, vh = torch.linalg.svd(full)
    new = retract(at, tangent, -0.3, 0.9)
    assert torch.allclose(dense(new), (u[:, :3] * s[:3]) @ vh[:3])
    assert torch.allclose(new.left.mT @ new.left, torch.eye(3, dtype=torch.float64))
    moved = transport(tangent, at, new)
    p, q = tangent_projector(new)
    z = a @ b.mT
    c, d = moved.pair(new)
    assert torch.allclose(c @ d.mT, p @ z + z @ q - p @ z @ q)


def test_unit_direction_has_singular_values_near_one() -> None:
    at = some_point()
    tangent = project(at, seeded(20, 5, seed=4), seeded(14, 5, seed=5))
    made = unit_direction(at, tangent)
    a, b = made.pair(at)
    values = torch.linalg.svdvals(a @ b.mT)[:6]
    assert float(values[0]) < 1.5
    assert float(values[-1]) > 0.5
    c, d = tangent.pair(at)
    assert float((a @ b.mT * (c @ d.mT)).sum()) > 0  # uphill with the tangent


# Invariance -----------------------------------------------------------------------------------------------------------


def trajectory(scales: Tensor, kind: str, steps: int = 20) -> Tensor:
    """The update after some steps of least squares, from one X0 in a gauge scaled by `scales`."""
    torch.manual_seed(0)
    m, n, r = 24, 18, 4
    left, right = torch.randn(m, r) / m**0.5, torch.randn(n, r) / n**0.5
    left, right = left * scales, right / scales
    x, y = torch.randn(60, n), torch.randn(60, m)
    if kind == "adam":
        pair = [left.clone().requires_grad_(), right.clone().requires_grad_()]
        optimizer: torch.optim.Optimizer = torch.optim.Adam(pair, 1e-2)
        make = lambda: pair[0] @ pair[1].T  # noqa: E731
    else:
        held = Structured(update_at(point(left, right)), linears=True, fixed=["parts.0.right", "parts.1.left"])
        optimizer = Riemannian([held], 1e-2 if kind == "unit" else 3e-2, direction=kind)
        make = lambda: held.op.dense()  # noqa: E731
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(x @ make().T, y).backward()
        optimizer.step()
    return make().detach().double()


@pytest.mark.parametrize("kind", ["unit", "gradient"])
def test_steps_do_not_depend_on_the_gauge(kind: str) -> None:
    ones, scaled = torch.ones(4), torch.logspace(-1, 1, 4)
    plain = trajectory(ones, kind)
    start = trajectory(ones, kind, steps=0)
    assert float((plain - start).norm()) > 0.05 * float(start.norm())
    assert float((trajectory(scaled, kind) - plain).norm()) <= 1e-3 * float(plain.norm())


def test_adam_on_factors_does_depend_on_it() -> None:
    plain = trajectory(torch.ones(4), "adam")
    assert float((trajectory(torch.logspace(-1, 1, 4), "adam") - plain).norm()) > 0.3 * float(plain.norm())


def test_the_optimizer_takes_the_documented_step() -> None:
    at = point(torch.randn(12, 2), torch.randn(9, 2))
    held = Structured(update_at(at), linears=True, fixed=["parts.0.right", "parts.1.left"])
    optimizer = Riemannian([held], 0.1, momentum=0.0, direction="gradient", weight_decay=0.5)
    weights = torch.randn(12, 9)
    (held.op.dense() * weights).sum().backward()
    optimizer.step()
    tangent = project_gradient(at, weights @ at.basis, weights.T @ at.left)
    assert torch.allclose(held.op.dense(), dense(retract(at, tangent, -0.1, 0.95)), atol=1e-5)


def test_riemannian_refuses_what_it_cannot_move() -> None:
    model = nn.Sequential(nn.Linear(9, 12))
    adapted = attach(model, lora(), rank=2)
    with pytest.raises(GramianError, match=r"expected that of riemann_lora"):
        Riemannian([edit.update for edit in adapted.edits.values()], 0.1)


def test_the_optimizer_resumes_from_its_state() -> None:
    def run(stop: int | None) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 12))
        adapted = attach(model, riemann_lora(aligned=False), rank=2)
        optimizer = adapted.optimizer(0.05)
        x = torch.randn(40, 10)
        for step in range(8):
            if step == stop:
                state = optimizer.state_dict()
                optimizer = adapted.optimizer(0.05)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        return adapted.delta("0").dense().detach()

    assert torch.equal(run(None), run(4))


# Preconditioning ------------------------------------------------------------------------------------------------------


def test_preconditioned_gradients() -> None:
    left, right = (nn.Parameter(t) for t in (seeded(9, 3), seeded(3, 7, seed=1)))
    left.grad, right.grad = seeded(9, 3, seed=2), seeded(3, 7, seed=3)
    g_left, g_right = left.grad.clone(), right.grad.clone()
    precondition_(left, right, 1e-3)
    eye = 1e-3 * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(right.grad, torch.linalg.inv(left.T @ left + eye) @ g_right)
    assert torch.allclose(left.grad, g_left @ torch.linalg.inv(right @ right.T + eye))


def test_pairs_are_found_by_structure() -> None:
    model = nn.Sequential(nn.Linear(9, 12))
    adapted = attach(model, moe_lora(experts=3), rank=2)
    pairs = factor_pairs(adapted.edits["0"].update)
    assert [(left.shape, right.shape) for left, right in pairs] == [((12, 2), (2, 9))] * 3
    assert all(any(p is left for p in adapted.trainable_parameters()) for left, _ in pairs)
    frozen = attach(nn.Sequential(nn.Linear(9, 12)), recipe("asymmetric_lora"), rank=2)
    assert factor_pairs(frozen.edits["0"].update) == []
    with pytest.raises(GramianError, match="no pair"):
        recipe("moe_lora").optimizer(frozen, 0.1)  # type: ignore[misc]


# Starts from the gradient ---------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(120, 150), nn.Tanh(), nn.Linear(150, 90))


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :90]).square().mean()


def batches() -> list[Tensor]:
    return [torch.randn(32, 120, generator=torch.Generator().manual_seed(i)) for i in range(2)]


class Largest(TorchDispatchMode):
    """Whether an operation makes an array of one of the shapes (or its transpose)."""

    def __init__(self, shapes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes | {shape[::-1] for shape in shapes}
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, tuple | list) else (out,):
            fresh = isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
            if fresh and tuple(t.shape) in self.shapes:
                self.made.append(str(func))
        return out


def test_sketched_gradients_and_the_aligned_start() -> None:
    model = network()
    layers = {"0": model[0], "2": model[2]}  # type: ignore[index]
    passes: list[int] = []

    def counted(model: nn.Module, batch: Tensor) -> Tensor:
        passes.append(1)
        return squares(model, batch)

    r, q = 4, 1
    with Largest({(150, 120), (90, 150)}) as watch:
        sketches = gradient_sketches(model, layers, batches(), rank=2 * r, loss=counted, power_iterations=q)
    assert watch.made == []
    assert len(passes) == 2 * (q + 1) * len(batches())
    exact = network()
    for batch in batches():
        squares(exact, batch).backward()
    for name in layers:
        gradient = exact[int(name)].weight.grad.double()  # type: ignore[index]
        context = Context(name, tuple(gradient.shape), r, 1.0, torch.Generator(), gradient=sketches[name])  # type: ignore[arg-type]
        at = aligned_point(context, 0.1)
        tangent = project_gradient(at, gradient.float() @ at.basis, gradient.float().mT @ at.left)
        most = torch.linalg.svdvals(gradient)[: 2 * r].square().sum()
        assert float(tangent.norm() ** 2 / most) >= 0.98
        ideal = aligned_point(Context(name, context.shape, r, 1.0, torch.Generator(), gradient=gradient), 0.1)
        tangent = project_gradient(ideal, gradient @ ideal.basis, gradient.mT @ ideal.left)
        assert float(tangent.norm() ** 2 / most) == pytest.approx(1, abs=1e-4)
        assert torch.allclose(torch.linalg.svdvals(dense(at))[:r], torch.full((r,), 0.1), atol=1e-5)


@pytest.mark.parametrize("shape", [(384, 384), (300, 37)])
def test_lora_sb_starts_at_its_formula(shape: tuple[int, int]) -> None:
    gradient = seeded(*shape)
    u, s, vh = torch.linalg.svd(gradient.sign())
    wanted = -0.01 * (u[:, :8] * s[:8]) @ vh[:8]
    context = Context("layer", shape, 8, 0.5, torch.Generator().manual_seed(0), gradient=gradient)
    found = 0.5 * gradient_step(torch.zeros(shape, dtype=torch.float64), context, step=0.01).dense()  # type: ignore[operator]
    assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())


# Starts from rows and columns ---------------------------------------------------------------------------------------


def test_nystrom_and_skeleton_near_the_svd_or_an_error() -> None:
    # Singular values like those of trained weights: a head, and a tail that falls slowly.
    left, right = (torch.linalg.qr(seeded(n, 64, seed=n))[0] for n in (96, 64))
    weight = (left * torch.arange(1, 65, dtype=torch.float64) ** -0.5) @ right.mT
    best = float(torch.linalg.svdvals(weight)[8:].square().sum().sqrt())
    for start, factor in ((nystrom, 1.2), (skeleton, 1.35)):
        context = Context("layer", (96, 64), 8, 2.0, torch.Generator().manual_seed(0))
        made = start(weight, context)
        assert float((weight - 2.0 * made.update.dense()).norm()) <= factor * best
    flat = seeded(96, 3) @ seeded(3, 64, seed=1)
    with pytest.raises(GramianError, match=r"layer .* condition number [\d.]+e\+\d+"):
        nystrom(flat, Context("layer", (96, 64), 8, 1.0, torch.Generator().manual_seed(0)))
