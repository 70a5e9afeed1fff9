"""Dense tensor functions against textbook float64 references, most of them by numpy and scipy."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from gramian.linalg import (
    eigh,
    eigvalsh,
    hadamard_transform,
    interpolation,
    largest_power_of_two,
    pivoted_nystrom,
    pivoted_rows,
    polar,
    psd_rank,
    psd_root,
    psd_solve,
    reduced_rank,
    solve,
    svd,
    svdvals,
    weigh,
    weighted_error,
)

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def tokens(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated activations (count, width) with a mean."""
    mix = normal(width, width, seed=seed + 1) * torch.logspace(0, -1.5, width, dtype=DOUBLE)[:, None]
    return normal(count, width, seed=seed) @ mix + 0.5 * normal(width, seed=seed + 2)


def gram(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def relative(found: Tensor, wanted: Tensor | np.ndarray) -> float:
    wanted = torch.as_tensor(wanted)
    return float((found - wanted).norm() / wanted.norm())


# Reduced rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12), (3, 5), (5, 3), (1, 1)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_reduced_rank_is_the_truncated_svd_in_the_gram_norm(shape: tuple[int, int], two_sided: bool) -> None:
    """H^{-1/2} SVD_r(H^{1/2} W G^{1/2}) G^{-1/2}, for every rank."""
    m, n = shape
    weight, g = normal(m, n), gram(tokens(4 * n, n))
    h = gram(tokens(4 * m, m, seed=5)) if two_sided else torch.eye(m, dtype=DOUBLE)
    root_in, root_out = scipy.linalg.sqrtm(g.numpy()).real, scipy.linalg.sqrtm(h.numpy()).real
    best = reduced_rank(weight, g, h if two_sided else None)
    sigma = np.linalg.svd(root_out @ weight.numpy() @ root_in, compute_uv=False)
    for rank in range(min(m, n) + 1):
        wanted = np.linalg.inv(root_out) @ truncated(root_out @ weight.numpy() @ root_in, rank) @ np.linalg.inv(root_in)
        found = best.left[:, :rank] @ best.right[:rank]
        assert float((found - torch.tensor(wanted)).norm()) < 1e-7 * float(weight.norm())
        tail = float((sigma[rank:] ** 2).sum())
        assert abs(float(best.errors[rank]) - tail) < 1e-12 * float((sigma**2).sum())


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
@pytest.mark.parametrize("kind", ["full", "rank n/3", "diagonal", "none"])
def test_certificate(shape: tuple[int, int], kind: str) -> None:
    """The error measured on the calibration tokens themselves is the tail sum, to 1e-6 relative."""
    m, n = shape
    weight = normal(m, n)
    x = tokens(n // 3 if kind == "rank n/3" else 4 * n, n)
    g = {"full": gram(x), "rank n/3": gram(x), "diagonal": gram(x).diagonal(), "none": None}[kind]
    for h in (None, gram(tokens(m // 3, m, seed=9)), gram(tokens(4 * m, m, seed=9))):
        best = reduced_rank(weight, g, h)
        for rank in (1, 3):
            found = best.left[:, :rank] @ best.right[:rank]
            predicted = float(best.errors[rank])
            assert float(weighted_error(weight - found, g, h)) == pytest.approx(predicted, rel=1e-6)
            if h is None and kind in ("full", "rank n/3"):
                measured = float((x @ (weight - found).mT).square().sum() / len(x))
                assert measured == pytest.approx(predicted, rel=1e-6)


def test_singular_and_zero_grams_do_not_raise() -> None:
    weight = normal(6, 9)
    dead = gram(tokens(40, 9))
    dead[2], dead[:, 2] = 0, 0
    for g, h in itertools.product(
        (dead, torch.zeros(9, 9, dtype=DOUBLE), torch.zeros(9, dtype=DOUBLE)), (None, torch.zeros(6, 6))
    ):
        best = reduced_rank(weight, g, h)
        assert all(value.isfinite().all() for value in best)
        assert float(weighted_error(weight - best.left @ best.right, g, h)) <= 1e-12
    assert float(reduced_rank(weight, dead).errors[-1]) == 0.0


def test_whitened_svd_equals_the_cholesky_form_of_svd_llm() -> None:
    """Wang et al. 2024: S = chol(G), SVD_r(W S) S^{-1}, on a full-rank Gram."""
    for shape in ((24, 32), (32, 24)):
        weight, g = normal(*shape), gram(tokens(400, shape[1]))
        s = np.linalg.cholesky(g.numpy())
        best = reduced_rank(weight, g)
        for rank in (1, 5, 12):
            wanted = truncated(weight.numpy() @ s, rank) @ np.linalg.inv(s)
            assert relative(best.left[:, :rank] @ best.right[:rank], wanted) < 1e-6


def test_centred_whitened_svd_equals_lord() -> None:
    """LoRD (Kaushal et al. 2023): PCA of the centred outputs, U U^T W with a bias U U^T b + (I - U U^T) mean(y)."""
    x, weight, bias = tokens(300, 20), normal(12, 20), normal(12, seed=3)
    mean = x.mean(0)
    covariance = gram(x - mean)
    y = x @ weight.mT + bias
    best = reduced_rank(weight, covariance)
    for rank in (1, 4, 8):
        u = np.linalg.svd((y - y.mean(0)).numpy(), full_matrices=False)[2][:rank].T
        projected = (y - y.mean(0)).numpy() @ u @ u.T + y.mean(0).numpy()
        found = best.left[:, :rank] @ best.right[:rank]
        corrected = bias + (weight - found) @ mean
        assert relative(found, u @ u.T @ weight.numpy()) < 1e-8
        assert relative(x @ found.mT + corrected, projected) < 1e-8


def test_row_weighted_svd_equals_fwsvd() -> None:
    """FWSVD (Hsu et al. 2022): D^{-1} SVD_r(D W), D = diag(sqrt(row importance)): a diagonal output Gram."""
    weight, importance = normal(10, 14), normal(10, seed=4).square() + 0.01
    scale = importance.sqrt().numpy()
    for h in (importance, torch.diag(importance)):
        best = reduced_rank(weight, None, h)
        for rank in (1, 4, 9):
            wanted = truncated(scale[:, None] * weight.numpy(), rank) / scale[:, None]
            assert relative(best.left[:, :rank] @ best.right[:rank], wanted) < 1e-9


def test_weighted_error_and_weigh() -> None:
    d, g, h = normal(4, 6), gram(tokens(30, 6)), gram(tokens(30, 4))
    wanted = np.trace(h.numpy() @ d.numpy() @ g.numpy() @ d.numpy().T)
    assert float(weighted_error(d, g, h)) == pytest.approx(wanted, rel=1e-12)
    diagonal = (g.diagonal(), h.diagonal())
    assert float(weighted_error(d, *diagonal)) == pytest.approx(float(weighted_error(d, *map(torch.diag, diagonal))))
    assert torch.equal(weigh(d, None, side="in"), d)
    assert torch.allclose(weigh(d, g, side="in"), d @ g)
    assert torch.allclose(weigh(d, h, side="out"), h @ d)


# Spectral -----------------------------------------------------------------------------------------------------------


def test_eigenvalues_and_singular_values_come_largest_first() -> None:
    matrix = torch.stack([gram(tokens(30, 6, seed=i)) for i in range(3)])
    values, vectors = eigh(matrix)
    assert bool((values[:, :-1] >= values[:, 1:]).all())
    assert torch.allclose(vectors @ torch.diag_embed(values) @ vectors.mT, matrix)
    assert torch.allclose(eigvalsh(matrix), values)
    skewed = matrix[0] + torch.triu(normal(6, 6), 1)
    assert torch.allclose(
        eigvalsh(skewed), torch.tensor(np.linalg.eigvalsh((skewed + skewed.mT).numpy() / 2)[::-1].copy())
    )
    u, s, vh = svd(normal(2, 5, 3))
    assert torch.allclose((u * s[:, None]) @ vh, normal(2, 5, 3))
    assert torch.allclose(svdvals(normal(2, 5, 3)), s)


def test_polar_is_the_nearest_orthogonal_factor() -> None:
    for shape in ((5, 5), (3, 7), (7, 3)):
        matrix = normal(*shape)
        assert torch.allclose(polar(matrix), torch.tensor(scipy.linalg.polar(matrix.numpy())[0]))


def test_roots_of_singular_matrices() -> None:
    g = gram(tokens(4, 12))
    root, inverse = psd_root(g)
    assert torch.allclose(root @ root, g, atol=1e-12)
    projector = torch.tensor(np.linalg.pinv(g.numpy(), hermitian=True, rcond=1e-10) @ g.numpy())
    assert torch.allclose(root @ inverse, projector, atol=1e-6)
    assert psd_rank(g) == 4
    assert psd_rank(torch.diag(torch.tensor([1.0, 0.0, 2.0]))) == psd_rank(torch.tensor([1.0, 0.0, 2.0])) == 2
    assert psd_rank(torch.zeros(3, 3)) == 0
    values = torch.tensor([4.0, 0.0, -1e-18], dtype=DOUBLE)
    root, inverse = psd_root(values)
    assert root.tolist() == [2.0, 0.0, 0.0]
    assert inverse.tolist() == [0.5, 0.0, 0.0]
    assert not any(part.any() for part in psd_root(torch.zeros(3, 3)))


@pytest.mark.parametrize("count", [60, 4])
def test_solve_is_the_minimum_norm_least_squares_solution(count: int) -> None:
    g = gram(tokens(count, 12))
    right = g @ normal(12, 3, seed=8)
    wanted = np.linalg.lstsq(g.numpy(), right.numpy(), rcond=1e-10)[0]
    assert relative(psd_solve(g, right), wanted) < 1e-7
    assert not psd_solve(torch.zeros(3, 3), torch.zeros(3, 2)).any()


# Hadamard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 16, 256])
def test_hadamard_transform_is_scipys(n: int) -> None:
    x = normal(2, 3, n)
    matrix = torch.tensor(scipy.linalg.hadamard(n), dtype=DOUBLE) / n**0.5
    assert torch.allclose(hadamard_transform(x), x @ matrix)
    assert torch.allclose(hadamard_transform(hadamard_transform(x)), x)


def test_hadamard_transform_needs_a_power_of_two() -> None:
    for n in (0, 3, 12):
        with pytest.raises(ValueError, match="power of two"):
            hadamard_transform(torch.zeros(2, n))
    assert [largest_power_of_two(n) for n in (1, 2, 3, 12, 384, 96)] == [1, 2, 1, 4, 128, 32]


# Pivoting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (12, 12)])
def test_pivoted_rows_are_those_of_pivoted_qr(shape: tuple[int, int]) -> None:
    matrix = normal(*shape) * torch.logspace(0, -2, shape[0], dtype=DOUBLE)[:, None]
    order = scipy.linalg.qr(matrix.numpy().T, pivoting=True, mode="r")[1]
    for count in (1, 4, min(shape)):
        assert pivoted_rows(matrix, count).tolist() == sorted(order[:count].tolist())


def test_pivoted_rows_never_repeat_even_when_rank_runs_out() -> None:
    for matrix in (torch.zeros(5, 4), torch.ones(5, 4), normal(5, 1) @ normal(1, 4)):
        for count in range(1, 5):
            assert len(set(pivoted_rows(matrix, count).tolist())) == count


def _nystrom_error(gram_: np.ndarray, weight: np.ndarray, kept: list[int]) -> float:
    schur = gram_ - gram_[:, kept] @ np.linalg.pinv(gram_[np.ix_(kept, kept)], hermitian=True) @ gram_[kept]
    return float((weight * schur).sum())


@pytest.mark.parametrize("block", [1, 5, 64])
def test_pivoted_nystrom_is_greedy_on_the_true_objective(block: int) -> None:
    g, a = gram(tokens(200, 14)), normal(6, 14, seed=3)
    weight = a.mT @ a
    order, errors = pivoted_nystrom(g, a, block=block)
    assert sorted(order.tolist()) == list(range(14))
    assert errors.shape == (15,)
    total = _nystrom_error(g.numpy(), weight.numpy(), [])
    assert float(errors[0]) == pytest.approx(total)
    for k in range(1, 9):
        kept = order[:k].tolist()
        exact = _nystrom_error(g.numpy(), weight.numpy(), kept)
        assert abs(float(errors[k]) - exact) < 1e-5 * total
        choices = [_nystrom_error(g.numpy(), weight.numpy(), [*kept[:-1], j]) for j in range(14) if j not in kept[:-1]]
        assert exact <= min(choices) + 1e-5 * total
    assert bool((errors[1:] <= errors[:-1] + 1e-9 * total).all())


def test_pivoted_nystrom_takes_singular_and_zero_grams() -> None:
    for g in (gram(tokens(4, 12)), torch.zeros(12, 12, dtype=DOUBLE)):
        order, errors = pivoted_nystrom(g, torch.eye(12, dtype=DOUBLE), block=5)
        assert sorted(order.tolist()) == list(range(12))
        assert bool(errors.isfinite().all())
        assert float(errors[4]) <= 1e-4 * max(float(errors[0]), 1e-30)


def test_interpolation_predicts_the_rest_from_the_kept() -> None:
    x = tokens(300, 10)
    g, kept = gram(x), torch.tensor([7, 2, 5])
    wanted = np.linalg.lstsq(x[:, kept].numpy(), x.numpy(), rcond=None)[0].T
    assert relative(interpolation(g, kept), wanted) < 1e-7
    assert torch.allclose(interpolation(g, kept)[kept], torch.eye(3, dtype=DOUBLE), atol=1e-7)


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("n", [5, 80])
def test_solve(lead: tuple[int, ...], n: int) -> None:
    matrix, right = normal(*lead, n, n) + n * torch.eye(n, dtype=DOUBLE), normal(*lead, n, 3, seed=1)
    wanted = np.linalg.solve(matrix.numpy(), right.numpy())
    torch.testing.assert_close(solve(matrix, right), torch.from_numpy(wanted), rtol=0, atol=1e-12)


def test_solve_holds_with_threads_set_by_hand() -> None:
    """Torch's own batched solve does not (a process of its own: what is set stays)."""
    code = """
import torch
torch.set_num_threads(2)
from gramian.linalg import solve
matrix = torch.eye(384).repeat(4, 1, 1) * 2
print(float((solve(matrix, matrix) - torch.eye(384)).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) == 0.0


def test_rounding_of_a_narrow_dtype_is_no_direction() -> None:
    basis = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    root, inverse = psd_root(basis @ basis.mT)
    assert float(torch.trace(root @ inverse)) == pytest.approx(5, abs=1e-3)
    assert psd_rank(basis @ basis.mT) == 5
