"""Projection with certificates: optimality, monotone polishing, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian.errors import GramianError
from gramian.fitting import fit, polish
from gramian.linalg import pivoted_nystrom, weighted_error
from gramian.ops import BlockLowRank, Dense, KroneckerSum, Sum, structures


def problem(out: int, in_: int, seed: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, in_, generator=generator)
    x = torch.randn(in_, rank or 3 * in_, generator=generator) * torch.logspace(0, -2, in_)[:, None]
    y = torch.randn(out, 3 * out, generator=generator) * torch.logspace(0, -1, out)[:, None]
    return w, x @ x.mT, y @ y.mT


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 10**6), st.booleans())
def test_polish_never_rises(out: int, in_: int, seed: int, deficient: bool) -> None:
    w, g, h = problem(out, in_, seed, rank=max(1, in_ // 3) if deficient else None)
    start = BlockLowRank.fit(w, rank=1, blocks=(min(2, out), min(2, in_)))
    before = float(weighted_error(w - start.dense(), g, h))
    better = polish(start, w, g, h, sweeps=2)
    after = float(weighted_error(w - better.dense(), g, h))
    total = float(weighted_error(w, g, h))
    assert after <= before + 1e-12 * total


@pytest.mark.parametrize("kind", sorted(k for k, c in structures().items() if c.fittable))
def test_grams_help_every_structure(kind: str) -> None:
    w, g, h = problem(48, 48 if kind == "diagonal" else 64, 1)
    cls = structures()[kind]
    for size in cls.sizes(tuple(w.shape), 0.5) or cls.sizes(tuple(w.shape), 2.0)[4:5]:
        plain = cls.fit(w, **size)
        weighted = fit(w, kind, gram_in=g, gram_out=None if kind == "quantized" else h, **size)
        reference = float(weighted_error(w - plain.dense(), g, None if kind == "quantized" else h))
        assert weighted.error <= reference * (1 + 1e-6), size
        assert 0 <= weighted.relative < 1 or kind == "diagonal"
        measured = float(weighted_error(w - weighted.op.dense(), g, None if kind == "quantized" else h))
        assert measured == pytest.approx(weighted.error, rel=1e-6, abs=1e-12)


def test_polish_finds_a_planted_kronecker_sum() -> None:
    torch.manual_seed(0)
    true = KroneckerSum(torch.randn(2, 4, 5), torch.randn(2, 6, 3), 24, 15).to(dtype=torch.float64)
    _, g, h = problem(24, 15, 2)
    start = KroneckerSum.fit(true.dense() + 0.05 * torch.randn(24, 15), terms=2, left=(4, 5))
    before = float(weighted_error(true.dense() - start.dense(), g, h))
    after = polish(start, true.dense(), g, h, sweeps=60, tolerance=1e-12)
    assert float(weighted_error(true.dense() - after.dense(), g, h)) < 1e-3 * before


def test_polish_of_a_sum() -> None:
    w, g, h = problem(20, 30, 5)
    start = Sum(
        (BlockLowRank.fit(w, rank=2), BlockLowRank.fit(w - BlockLowRank.fit(w, rank=2).dense(), rank=1, blocks=(2, 2)))
    )
    before = float(weighted_error(w - start.dense(), g, h))
    after = float(weighted_error(w - polish(start, w, g, h).dense(), g, h))
    assert after < 0.9 * before


def test_two_sided_optimum_cannot_be_polished() -> None:
    w, g, h = problem(30, 20, 3)
    best = fit(w.double(), "block_low_rank", gram_in=g, gram_out=h, rank=4)
    after = polish(best.op, w.double(), g, h, sweeps=5)
    assert float(weighted_error(w.double() - after.dense(), g, h)) == pytest.approx(best.error, rel=1e-8)


def test_bad_input() -> None:
    w = torch.randn(4, 6)
    with pytest.raises(GramianError, match="did you mean skeleton"):
        fit(w, "skeletn", rank=1)
    with pytest.raises(GramianError, match="expected side 6"):
        fit(w, "skeleton", gram_in=torch.eye(5), rank=1)
    with pytest.raises(GramianError, match="NaN"):
        fit(w * float("nan"), "skeleton", rank=1)
    with pytest.raises(GramianError, match="rank 9"):
        fit(w, "skeleton", rank=9)
    assert isinstance(fit(w, "dense").op, Dense)


def brute_order(gram: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """Greedy selection by trying every coordinate: the definition."""
    kept: list[int] = []
    n = len(gram)
    for _ in range(count):
        losses = {}
        for j in range(n):
            if j in kept:
                continue
            k = [*kept, j]
            schur = gram - gram[:, k] @ torch.linalg.pinv(gram[k][:, k]) @ gram[k]
            losses[j] = float((weight * schur).sum())
        kept.append(min(losses, key=losses.get))
    return kept


def test_pivoted_nystrom_is_the_greedy_choice() -> None:
    torch.manual_seed(0)
    x, a = torch.randn(24, 200, dtype=torch.float64), torch.randn(24, 10, dtype=torch.float64)
    gram, weight = x @ x.mT / 200, a @ a.mT
    order, error = pivoted_nystrom(gram, a.mT, block=5)
    assert order[:8].tolist() == brute_order(gram, weight, 8)
    for k in (0, 3, 8, 24):
        kept = order[:k]
        schur = gram - gram[:, kept] @ torch.linalg.pinv(gram[kept][:, kept]) @ gram[kept]
        assert float(error[k]) == pytest.approx(float((weight * schur).sum()), rel=1e-3, abs=1e-4)
    assert sorted(order.tolist()) == list(range(24))


def test_families_go_by_their_own_names() -> None:
    w, g, h = problem(16, 16, 3)
    low = fit(w, "low_rank", gram_in=g, gram_out=h, rank=3).op
    assert torch.equal(low.dense(), fit(w, "block_low_rank", gram_in=g, gram_out=h, rank=3, blocks=(1, 1)).op.dense())
    found = fit(w, "monarch", rank=1, blocks=(4, 4)).op
    assert isinstance(found, BlockLowRank)
    assert found.strided_rows
