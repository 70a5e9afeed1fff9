"""Sparse structures against brute force, closed forms and torch's own layers."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gramian.errors import GramianError
from gramian.fitting import fit
from gramian.linalg import reduced_rank, weighted_error
from gramian.nn import GrowAndPrune, StraightThroughDictionary, StructuredLinear
from gramian.ops import (
    BlockLowRank,
    BlockSparse,
    Cross,
    Dictionary,
    LowRankSparse,
    Operator,
    SemiStructured,
    Sparse,
    cross_indices,
    cur,
)
from gramian.ops.dictionary import straight_through
from gramian.ops.semi_structured import largest_of_groups
from gramian.ops.sparse import SLICE, largest, pursue, sparse_inner, sparse_product

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=DOUBLE)


def gram(n: int, seed: int = 0, samples: int | None = None) -> Tensor:
    """A second moment (n, n) with a decaying spectrum, not aligned with the axes."""
    x = normal(samples or 4 * n, n, seed=seed) @ torch.diag(torch.logspace(0, -1, n, dtype=DOUBLE))
    x = x @ torch.linalg.qr(normal(n, n, seed=seed + 1))[0]
    return x.mT @ x / len(x)


def error(w: Tensor, found: Operator | Tensor, g: Tensor | None = None, h: Tensor | None = None) -> float:
    matrix = found if isinstance(found, Tensor) else found.dense()
    return float(weighted_error(w - matrix.double(), g, h))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).norm()) <= tolerance * max(float(wanted.double().norm()), 1e-300)


def optimum_on(support: Tensor, w: Tensor, g: Tensor, h: Tensor | None = None) -> Tensor:
    """The best matrix on a support by one dense least-squares problem in its entries: an independent reference."""
    rows, columns = support.nonzero(as_tuple=True)
    side = np.eye(len(w)) if h is None else h.numpy()
    metric = torch.tensor(np.kron(side, g.numpy()))
    places = rows * w.shape[1] + columns
    right = (metric @ w.reshape(-1))[places]
    values = torch.linalg.lstsq(metric[places][:, places], right[:, None]).solution[:, 0]
    return torch.zeros(w.numel(), dtype=DOUBLE).index_copy(0, places, values).reshape(w.shape)


# Sparse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, SLICE, SLICE + 1, 3 * SLICE + 5])
@pytest.mark.parametrize("by_columns", [False, True])
def test_sparse_product_is_the_dense_one(batch: int, by_columns: bool) -> None:
    matrix = normal(37, 51) * (torch.rand(37, 51, generator=seeded()) < 0.2)
    matrix[5:9] = 0
    op = Sparse.from_dense(matrix.mT.contiguous()).T if by_columns else Sparse.from_dense(matrix)
    close(op.dense(), matrix, 0.0)
    x = normal(batch, 51)
    close(op.apply(x), x @ matrix.mT)
    close(op.apply_columns(x.mT), matrix @ x.mT)
    close(op.apply_columns(x.mT.contiguous()), matrix @ x.mT)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        close(op.to(dtype=dtype).apply(x.to(dtype)), x @ matrix.mT, tolerance)


def test_sparse_gradients_are_the_dense_ones_and_form_no_dense_matrix() -> None:
    """Forward and backward count 6 k B operations, not 6 m n B, and nothing of size m n is made."""
    out, in_, batch, k = 40, 60, 70, 100
    op = Sparse.init((out, in_), nonzeros=k, generator=seeded()).to(dtype=DOUBLE)
    values, x, probe = op.values.clone().requires_grad_(), normal(batch, in_).requires_grad_(), normal(batch, out)
    with FlopCounterMode(display=False) as counter:
        op.replace(values=values).apply(x).backward(probe)
    assert counter.get_total_flops() == 6 * k * batch
    dense = op.dense().requires_grad_()
    other = x.detach().clone().requires_grad_()
    F.linear(other, dense).backward(probe)
    close(x.grad, other.grad)
    rows, columns = (op.dense() != 0).nonzero(as_tuple=True)
    close(values.grad, dense.grad[rows, columns])


def test_sparse_gradients_of_gradients_and_function_transforms() -> None:
    op = Sparse.init((7, 11), nonzeros=20, generator=seeded()).to(dtype=DOUBLE)
    values, x = op.values.clone().requires_grad_(), normal(3, 11).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, v: op.replace(values=v).apply(x), (x, values))

    def loss(values: Tensor, x: Tensor) -> Tensor:
        return op.replace(values=values).apply(x).square().sum()

    def reference(values: Tensor, x: Tensor) -> Tensor:
        return (x @ op.replace(values=values).dense().mT).square().sum()

    several, inputs = normal(4, 20, seed=1), normal(4, 3, 11, seed=2)
    x, values = x.detach(), values.detach()
    func = torch.func
    for one, two, dims in ((several, x, (0, None)), (values, inputs, (None, 0)), (several, inputs, (0, 0))):
        close(func.vmap(func.grad(loss), dims)(one, two), func.vmap(func.grad(reference), dims)(one, two))
    close(func.jacrev(func.grad(loss))(values, x), func.hessian(reference)(values, x))
    close(func.jacrev(op.apply)(x[0]), op.dense())
    with pytest.raises(GramianError, match="one support"):
        index = op.index.int()[None].expand(2, -1)
        func.vmap(lambda i: sparse_product(x.mT, values, i, op.starts), 0)(index)


def test_sparse_inner_is_the_sampled_outer_product() -> None:
    op = Sparse.init((9, 6), nonzeros=17, generator=seeded()).to(dtype=DOUBLE)
    g, x = normal(9, 130), normal(6, 130, seed=1)
    rows, columns = (op.dense() != 0).nonzero(as_tuple=True)
    close(sparse_inner(g, x, op.index.int(), op.starts), (g @ x.mT)[rows, columns])
    low = sparse_inner(g.bfloat16(), x.bfloat16(), op.index.int(), op.starts)
    close(low, (g @ x.mT)[rows, columns], 2e-2)


def test_sparse_trains_in_a_compiled_layer() -> None:
    layer = StructuredLinear(Sparse.init((12, 20), nonzeros=40, generator=seeded()), torch.zeros(12))
    plain = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(70, 20).float()
    for module in (compiled, plain):
        module(x).square().sum().backward()
    for found, wanted in zip(layer.parameters(), plain.parameters(), strict=True):
        close(found.grad, wanted.grad, 1e-5)


def test_sparse_counts_one_and_a_half_words_an_entry() -> None:
    op = Sparse.init((64, 64), nonzeros=1000, generator=seeded())
    assert op.numel == 2 * 1000 + 64
    assert op.nbytes == 6 * 1000 + 4 * 64
    assert op.T.nbytes == op.nbytes
    assert op.density == 1000 / 4096
    wide = Sparse.from_dense(torch.eye(2, 2**15 + 1))
    assert wide.index.dtype == torch.int32
    close(wide.T.apply(torch.ones(2)), wide.dense().sum(0), 0.0)


@pytest.mark.parametrize("weighted", ["none", "diagonal"])
def test_sparse_fit_is_optimal_without_coupling(weighted: str) -> None:
    w = normal(3, 4)
    g, h = (None, None) if weighted == "none" else (normal(4, seed=1).square(), normal(3, seed=2).square())
    for k in (1, 3, 6):
        found = error(w, Sparse.fit(w, gram_in=g, gram_out=h, nonzeros=k), g, h)
        best = math.inf
        for places in itertools.combinations(range(12), k):
            mask = torch.zeros(12).index_fill(0, torch.tensor(places), 1).reshape(3, 4)
            best = min(best, error(w, w * mask, g, h))
        assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("two_sided", [False, True])
def test_sparse_refit_reaches_the_closed_form(two_sided: bool) -> None:
    w, g, h = normal(6, 9), gram(9), gram(6, 5) if two_sided else None
    found = pursue(w, largest(20), g, h, steps=200)
    assert int(found.support.sum()) == 20
    close(found.matrix, optimum_on(found.support, w, g, h), 1e-7)


def test_choosing_again_beats_wanda_with_refit() -> None:
    w, g = normal(48, 64), gram(64)
    once = pursue(w, largest(600), g, rounds=0, steps=64)
    mask = largest(600)(w.abs() * g.diagonal().sqrt())
    assert torch.equal(once.support, mask)
    errors = [error(w, pursue(w, largest(600), g, rounds=rounds, steps=64).matrix, g) for rounds in range(5)]
    assert errors[0] == pytest.approx(error(w, once.matrix, g))
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0] < 0.9 * error(w, w * mask, g)


def test_singular_and_zero_grams() -> None:
    w = normal(10, 14)
    few = gram(14, samples=4)
    op = Sparse.fit(w, gram_in=few, nonzeros=60)
    assert error(w, op, few) < 1e-2 * error(w, torch.zeros_like(w), few)
    for kind, size in (("sparse", {"nonzeros": 9}), ("semi_structured", {}), ("dictionary", {"atoms": 2})):
        found = fit(w, kind, gram_in=torch.zeros_like(few), **size)
        assert found.op.dense().isfinite().all()


def test_impossible_sizes_are_refused() -> None:
    w = normal(4, 6)
    for action in (
        lambda: Sparse.fit(w, nonzeros=25),
        lambda: Sparse.fit(w, nonzeros=0),
        lambda: LowRankSparse.fit(w, rank=5, nonzeros=3),
        lambda: LowRankSparse.init((4, 6), start="zero"),
        lambda: LowRankSparse((Sparse.fit(w), Sparse.fit(w))),
        lambda: SemiStructured.fit(w, kept=5, group=4),
        lambda: SemiStructured.from_dense(w, torch.ones_like(w, dtype=torch.bool), 2, 4),
        lambda: Dictionary.fit(w, atoms=2, nonzeros=3),
        lambda: Cross.fit(w, rank=5),
    ):
        with pytest.raises(GramianError, match="expected|parts"):
            action()


# Low rank plus sparse ---------------------------------------------------------------------------------------------


def test_low_rank_sparse_recovers_what_can_be_told_apart() -> None:
    generator = seeded()
    low = normal(96, 4) @ normal(4, 96, seed=1) / 10
    spikes = Sparse.init((96, 96), nonzeros=400, generator=generator).to(dtype=DOUBLE)
    w = low + spikes.replace(values=spikes.values.sign() * 3).dense()
    found = LowRankSparse.fit(w, rank=4, nonzeros=400)
    close(found.dense(), w, 1e-6)
    close(found.parts[0].dense(), low, 1e-6)


def test_low_rank_sparse_beats_both_its_parts_at_equal_numbers() -> None:
    """A matrix that is neither: a decaying spectrum with heavy-tailed entries, under a Gram."""
    low = normal(64, 64) @ torch.diag(torch.logspace(0, -2, 64, dtype=DOUBLE)) @ normal(64, 64, seed=1) / 8
    w, g = low + 0.1 * normal(64, 64, seed=2) ** 3, gram(64, seed=3)
    sweeps = [error(w, LowRankSparse.fit(w, gram_in=g, rank=10, nonzeros=400, sweeps=s), g) for s in (1, 2, 6)]
    assert sweeps[0] > sweeps[1] > sweeps[2]
    rank, nonzeros = 10 + 400 * 2 // 128, (10 * 128 + 2 * 400) // 2
    assert sweeps[2] < error(w, BlockLowRank.fit(w, gram_in=g, rank=rank), g)
    assert sweeps[2] < error(w, Sparse.fit(w, gram_in=g, nonzeros=nonzeros), g)


def test_low_rank_sparse_of_the_paper() -> None:
    op = LowRankSparse.init((48, 64), rank=6, nonzeros=92, start="sltrain", generator=seeded())
    low, sparse = op.parts
    assert not low.dense().any()
    assert len(sparse.values) == 92 == round(0.03 * 48 * 64)
    bound = 1 / math.sqrt(64)
    assert 0.8 * bound < float(sparse.values.abs().max()) <= bound
    assert 0.8 * bound < float(low.right.abs().max()) <= bound
    # dB = dW A^T, dA = B^T dW, dS = dW[support]
    low = low.replace(left=normal(1, 48, 6).float())
    op = LowRankSparse((low, sparse))
    layer = StructuredLinear(op)
    x, probe = normal(20, 64).float(), normal(20, 48, seed=1).float()
    layer(x).backward(probe)
    whole = probe.mT @ x
    gradients = {
        name: p.grad.reshape(op.factors()[name.removesuffix(".weight")].shape) for name, p in layer.named_parameters()
    }
    close(gradients["parts.0.left.weight"][0], whole @ low.right[0].mT, 1e-5)
    close(gradients["parts.0.right.weight"][0], low.left[0].mT @ whole, 1e-5)
    rows, columns = (sparse.dense() != 0).nonzero(as_tuple=True)
    close(gradients["parts.1.values.weight"], whole[rows, columns], 1e-5)


# N:M --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "group", "columns"), [(2, 4, 12), (1, 4, 10), (4, 8, 19), (3, 5, 7), (2, 32, 40)])
def test_semi_structured_keeps_the_best_of_every_group(kept: int, group: int, columns: int) -> None:
    w, d = normal(5, columns), normal(columns, seed=1).square() + 0.1
    for g in (None, d):
        wanted = torch.zeros_like(w)
        for row, first in itertools.product(range(5), range(0, columns, group)):
            span = range(first, min(first + group, columns))
            score = {j: float(w[row, j].abs() * (1 if g is None else g[j].sqrt())) for j in span}
            for j in sorted(span, key=lambda j: -score[j])[:kept]:
                wanted[row, j] = w[row, j]
        found = SemiStructured.fit(w, gram_in=g, kept=kept, group=group)
        close(found.dense(), wanted, 0.0)


def test_semi_structured_refit_is_optimal_on_its_support() -> None:
    w, g = normal(6, 12), gram(12)
    found = pursue(w, largest_of_groups(2, 4), g, steps=100)
    assert (found.support.reshape(6, 3, 4).sum(2) == 2).all()
    close(found.matrix, optimum_on(found.support, w, g), 1e-7)
    op = SemiStructured.fit(w, gram_in=g)
    assert error(w, op, g) < error(w, SemiStructured.fit(w), g)


def test_semi_structured_bytes() -> None:
    half = SemiStructured.init((128, 256), kept=2, group=4).to(dtype=torch.float16)
    assert half.nbytes == 128 * 256 * 2 * 9 // 16
    assert SemiStructured.init((128, 256), kept=4, group=8).nbytes == 128 * 128 * 4 + 128 * 64
    assert SemiStructured.init((4, 64), kept=2, group=32).positions.shape == (4, 4)


# Dictionary -------------------------------------------------------------------------------------------------------


def test_dictionary_by_its_definition() -> None:
    op = Dictionary.init((7, 9), atoms=4, nonzeros=2, blocks=3, generator=seeded()).to(dtype=DOUBLE)
    wanted = torch.zeros(7, 9, dtype=DOUBLE)
    for row, s in itertools.product(range(7), range(2)):
        block, inside = divmod(row, 3)
        wanted[row] += op.coefficients[block, inside, s] * op.basis[block, int(op.index[block, inside, s])]
    close(op.dense(), wanted)
    assert op.numel == 3 * 4 * 9 + 2 * 3 * 3 * 2
    assert op.index.dtype == torch.uint8
    assert Dictionary.init((300, 9), atoms=257).index.dtype == torch.int16


def test_dictionary_finds_planted_atoms() -> None:
    """Rows that are multiples of few atoms, the simplest case: recovered whatever the Gram."""
    generator = seeded()
    atoms = normal(4, 24)
    which = torch.randint(4, (60,), generator=generator)
    w = (normal(60, seed=1).sign() * (1 + torch.rand(60, generator=generator)))[:, None] * atoms[which]
    for g in (None, gram(24)):
        found = Dictionary.fit(w, gram_in=g, atoms=4, nonzeros=2)
        assert error(w, found, g) <= 1e-12 * error(w, torch.zeros_like(w), g)


@pytest.mark.parametrize("two_sided", [False, True])
def test_dictionary_sweeps_never_raise_the_error(two_sided: bool) -> None:
    w, g, h = normal(40, 24), gram(24), gram(40, 7) if two_sided else None
    size = {"atoms": 12, "nonzeros": 3}
    errors = [error(w, Dictionary.fit(w, gram_in=g, gram_out=h, sweeps=s, **size), g, h) for s in (0, 1, 3, 8)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    # With all atoms in use it is a low-rank matrix, and as good as the best.
    full = Dictionary.fit(w, gram_in=g, gram_out=h, atoms=5, nonzeros=5)
    assert error(w, full, g, h) == pytest.approx(float(reduced_rank(w, g, h).errors[5]), rel=1e-6)


def test_straight_through() -> None:
    latent = normal(2, 3, 6).requires_grad_()
    hard = straight_through(latent, 2)
    values = latent.detach()
    assert ((hard != 0).sum(-1) == 2).all()
    kept = hard.detach() != 0
    close(hard.detach()[kept], values[kept], 0.0)
    smallest = values.abs().masked_fill(~kept, math.inf).amin(-1)
    assert (smallest > values.abs().masked_fill(kept, 0).amax(-1)).all()
    probe = normal(2, 3, 6, seed=1)
    hard.backward(probe)
    close(latent.grad, probe, 0.0)


def test_straight_through_layer_learns_its_support() -> None:
    """The task's own support is found from a start that has another one, and ``finish`` is the same function."""
    target = Dictionary.init((30, 16), atoms=6, nonzeros=2, generator=seeded())
    start = Dictionary.init((30, 16), atoms=6, nonzeros=2, generator=seeded(1))
    layer = StraightThroughDictionary(start.replace(basis=target.basis), torch.zeros(30))
    before = layer.op.index.clone()
    x = torch.randn(256, 16, generator=seeded(2))
    wanted = target.apply(x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        loss = F.mse_loss(layer(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert not torch.equal(layer.op.index, before)
    finished = layer.finish()
    assert isinstance(finished.op, Dictionary)
    close(finished(x), layer(x), 1e-5)
    linear = nn.Linear(16, 30)
    close(StraightThroughDictionary.from_linear(linear, atoms=16, nonzeros=16)(x), linear(x), 1e-4)


# Cross ------------------------------------------------------------------------------------------------------------


def test_cross_takes_rows_and_columns_of_the_matrix_and_the_best_core() -> None:
    w, g, h = normal(14, 10), gram(10), gram(14, 3)
    rows, columns = cross_indices(w, 4, gram_in=g, gram_out=h)
    op = cur(w, 4, gram_in=g, gram_out=h)
    close(op.picked_columns, w[:, columns], 0.0)
    close(op.picked_rows, w[rows], 0.0)
    metric = torch.tensor(np.kron(h.numpy(), g.numpy()))
    design = torch.tensor(np.kron(w[:, columns].numpy(), w[rows].mT.numpy()))
    core = torch.linalg.solve(design.mT @ metric @ design, design.mT @ metric @ w.reshape(-1)).reshape(4, 4)
    close(op.core, core, 1e-7)
    assert error(w, op, g, h) >= float(reduced_rank(w, g, h).errors[4])
    assert list(op.trainable()) == ["core"]
    assert op.runtime().numel == 4 * 24


def test_cross_of_a_low_rank_matrix_is_exact() -> None:
    w = normal(30, 3) @ normal(3, 20, seed=1)
    close(cur(w, 3).dense(), w, 1e-9)
    close(cur(w, 3, gram_in=gram(20)).dense(), w, 1e-9)


def test_cross_choice_is_better_than_chance() -> None:
    w = normal(40, 40) @ torch.diag(torch.logspace(0, -3, 40, dtype=DOUBLE)) @ normal(40, 40, seed=1)
    found = error(w, cur(w, 8))
    by_chance = []
    for seed in range(20):
        rows, columns = (torch.randperm(40, generator=seeded(seed + s))[:8] for s in (0, 100))
        c, r = w[:, columns], w[rows]
        by_chance.append(error(w, c @ torch.linalg.pinv(c) @ w @ torch.linalg.pinv(r) @ r))
    assert found < sorted(by_chance)[2]


def test_cross_as_the_start_of_an_update() -> None:
    w = normal(12, 9).float() * 50
    op = cur(w, 3, update=True)
    assert not op.dense().any()
    for part in (op.picked_columns, op.picked_rows):
        assert float(torch.linalg.matrix_norm(part, 2)) == pytest.approx(1, rel=1e-5)
    layer = StructuredLinear(op)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["core.weight"]


# Growing and pruning ----------------------------------------------------------------------------------------------


def block_layer(out: int, in_: int, block: tuple[int, int], seed: int = 0) -> StructuredLinear:
    columns = -(-in_ // block[1])
    weight = torch.randn(out, in_, generator=seeded(seed)) / math.sqrt(in_)
    return StructuredLinear(BlockSparse.fit(weight, kept=columns, block=block), torch.zeros(out))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, hook: GrowAndPrune, x: Tensor, y: Tensor, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)  # kept alive over the change, as training loops do
        loss.backward()
        optimizer.step()
        hook.step()


def test_one_change_by_hand() -> None:
    """Kept by norm, regrown by the dense gradient at zero; the optimizer's state follows the blocks."""
    layer = block_layer(7, 22, (4, 3))  # 2 x 8 blocks, padded both ways
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    hook = GrowAndPrune(layer, optimizer, steps=10, sparsity=0.75, every=2, freeze=0.2, grow=0.5)
    x, y = normal(30, 22).float(), normal(30, 7, seed=1).float()
    parameter = layer.get_submodule("values").weight
    optimizer.zero_grad()
    F.mse_loss(layer(x), y).backward()
    optimizer.step()
    assert hook.step() is False
    dense = nn.Linear(22, 7)
    with torch.no_grad():
        dense.weight.copy_(layer.op.dense())
        dense.bias.copy_(layer.bias)
    optimizer.zero_grad()
    F.mse_loss(dense(x), y).backward()
    F.mse_loss(layer(x), y).backward()
    optimizer.step()
    before, state = layer.op, {k: v.clone() for k, v in optimizer.state[parameter].items()}
    assert hook.step() is True
    kept = round((1 - hook.target("")) * 8)
    assert hook.target("") == pytest.approx(0.75 - 0.75 * (1 - 2 / 8) ** 3)
    grown = round(0.5 * kept)
    grown = min(grown, 8 - kept)
    assert 0 < grown < kept < 8
    gradient = F.pad(dense.weight.grad, (0, 2, 0, 1)).reshape(2, 4, 8, 3).transpose(1, 2)
    for row in range(2):
        norms = before.values[row].square().sum((1, 2))
        strongest = set(norms.topk(kept).indices.tolist())
        rest = sorted(set(range(8)) - strongest, key=lambda j: -float(gradient[row, j].square().sum()))
        assert set(layer.op.index[row].tolist()) == strongest | set(rest[:grown])
        for place, block in enumerate(layer.op.index[row].tolist()):
            fresh = block not in strongest
            old = torch.zeros(4, 3) if fresh else before.values[row, block]
            close(layer.op.values[row, place], old, 0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = torch.zeros(4, 3) if fresh else state[key][row, block]
                close(optimizer.state[parameter][key][row, place], moment, 0.0)
    assert layer.get_submodule("values").weight is parameter
    assert optimizer.state[parameter]["step"] == state["step"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-1),
        lambda p: torch.optim.Adafactor(p, lr=1e-1),
    ],
    ids=["SGD", "AdamW", "RMSprop", "Adagrad", "Adafactor"],
)
def test_any_optimizer_reaches_the_sparsity_and_learns(make: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block_layer(32, 32, (4, 4)), nn.ReLU(), block_layer(8, 32, (4, 4), 1))
    x = torch.randn(200, 32, generator=seeded(2))
    y = x[:, :8] * x[:, 8:16]
    optimizer = make(model.parameters())  # type: ignore[operator]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 60)
    hook = GrowAndPrune(model, optimizer, steps=60, sparsity=0.75, every=7)
    first = float(F.mse_loss(model(x), y))
    for _ in range(3):
        train(model, optimizer, hook, x, y, 20)
        schedule.step()
    assert float(F.mse_loss(model(x), y)) < first
    for layer in hook.layers.values():
        assert layer.op.index.shape[1] == 2
        assert (layer.op.index.diff(dim=1) > 0).all()
    saved = copy.deepcopy(model.state_dict())
    empty = StructuredLinear.from_config(model[0].config(), bias=True)
    empty.load_state_dict({k.removeprefix("0."): v for k, v in saved.items() if k.startswith("0.")}, assign=True)
    close(empty(x), model[0](x), 1e-6)


def test_hooks_wait_for_the_steps_that_need_them_and_gradients_accumulate() -> None:
    layer = block_layer(8, 16, (4, 4))
    hook = GrowAndPrune(layer, None, steps=20, sparsity=0.5, every=5, freeze=0.25)
    x = normal(12, 16).float()
    watched, changed = [], []
    for step in range(1, 21):
        watched.append(bool(layer._forward_hooks))
        for part in x.chunk(3):
            layer(part).square().sum().backward()
        if watched[-1]:
            wanted = (2 * layer(x)).detach().mT @ x
            close(hook._gradients[""], wanted, 1e-4)
        changed.append(hook.step())
        assert step in (5, 10, 15) or not changed[-1]
    assert [i + 1 for i, on in enumerate(watched) if on] == [5, 10]
    assert [i + 1 for i, on in enumerate(changed) if on] == [5, 10, 15]
    assert layer.op.index.shape[1] == 2


def test_grow_and_prune_goes_on_where_it_stopped() -> None:
    x, y = normal(40, 16).float(), normal(40, 8, seed=1).float()

    def fresh() -> tuple[StructuredLinear, torch.optim.Optimizer, GrowAndPrune]:
        layer = block_layer(8, 16, (4, 4))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        return layer, optimizer, GrowAndPrune(layer, optimizer, steps=30, sparsity=0.5, every=5)

    whole, optimizer, hook = fresh()
    train(whole, optimizer, hook, x, y, 12)
    state, config = copy.deepcopy((hook.state_dict(), whole.state_dict())), whole.config()
    train(whole, optimizer, hook, x, y, 18)
    resumed = StructuredLinear.from_config(config, bias=True)
    resumed.load_state_dict(state[1], assign=True)
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    hook = GrowAndPrune(resumed, optimizer, steps=30, sparsity=0.5, every=5)
    hook.load_state_dict(state[0])
    train(resumed, optimizer, hook, x, y, 18)
    close(resumed.op.dense(), whole.op.dense(), 1e-6)


def test_grow_and_prune_refuses() -> None:
    layer = block_layer(8, 16, (4, 4))
    with pytest.raises(GramianError, match="sparsity 1.0"):
        GrowAndPrune(layer, None, steps=10, sparsity=1.0)
    with pytest.raises(GramianError, match="block-sparse layers: none"):
        GrowAndPrune(nn.Linear(4, 4), None, steps=10, sparsity=0.5)
    with pytest.raises(GramianError, match="other to thin out"):
        GrowAndPrune(layer, None, steps=10, sparsity=0.5, layers=["other"])
    hook = GrowAndPrune(layer, None, steps=10, sparsity=0.5, every=1)
    with pytest.raises(GramianError, match="no gradient passed"):
        hook.step()
