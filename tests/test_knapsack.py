"""The planner's knapsack against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from gramian.compression.knapsack import Option, solve, solve_lagrangian
from gramian.errors import GramianError


def random_groups(seed: int) -> tuple[list, int]:
    r = random.Random(seed)
    groups = [
        [
            [[Option(r.randint(0, 30), r.random()) for _ in range(r.randint(1, 4))] for _ in range(r.randint(1, 2))]
            for _ in range(r.randint(1, 2))
        ]
        for _ in range(4)
    ]
    return groups, r.randint(10, 120)


def brute_force(groups: list, budget: int) -> float | None:
    combined = []
    for group in groups:
        options = []
        for branch in group:
            for picked in itertools.product(*branch):
                options.append((sum(o.cost for o in picked), sum(o.error for o in picked)))
        combined.append(options)
    feasible = (
        sum(error for _, error in picked)
        for picked in itertools.product(*combined)
        if sum(cost for cost, _ in picked) <= budget
    )
    return min(feasible, default=None)


def test_equals_brute_force_on_1000_instances() -> None:
    solved = 0
    for seed in range(2000):
        if solved == 1000:
            break
        groups, budget = random_groups(seed)
        best = brute_force(groups, budget)
        if best is None:
            with pytest.raises(GramianError, match="out of reach"):
                solve(groups, budget)
            continue
        found = solve(groups, budget)
        assert found.cost <= budget
        assert found.error == pytest.approx(best, abs=1e-12)
        relaxed = solve_lagrangian(groups, budget)
        assert relaxed.cost <= budget
        assert found.error <= relaxed.error + 1e-12
        solved += 1
    assert solved == 1000


def test_coarse_units_never_exceed_the_budget() -> None:
    r = random.Random(1)
    groups = [[[[Option(r.randint(1, 10**7), r.random()) for _ in range(20)]]] for _ in range(30)]
    for share in (0.2, 0.5, 0.9):
        budget = int(share * sum(max(o.cost for o in g[0][0]) for g in groups))
        coarse, fine = solve(groups, budget, cells=500), solve(groups, budget)
        assert coarse.cost <= budget
        assert fine.cost <= budget
        assert fine.error <= coarse.error + 1e-9


def test_choices_add_up() -> None:
    groups, budget = random_groups(3)
    found = solve(groups, budget)
    picked = [
        item[k]
        for group, choice in zip(groups, found.choices, strict=True)
        for item, k in zip(group[choice.branch], choice.options, strict=True)
    ]
    assert sum(o.cost for o in picked) == found.cost
    assert sum(o.error for o in picked) == pytest.approx(found.error)


def test_thousands_of_items_go_to_the_lagrangian() -> None:
    r = random.Random(2)
    groups = [[[[Option(c, 1 / (c + 1) * r.random()) for c in range(0, 50, 10)]]] for _ in range(2500)]
    found = solve(groups, 2500 * 20)
    assert found.cost <= 2500 * 20
    assert found.cost > 2500 * 20 - 50
