"""Multiple-choice knapsack: one option a layer, least total error, total cost within the budget.

A *group* may be served in several ways (*branches*): its layers one by one, or some of them by a joint option. A branch is
a list of items, an item a list of options, and exactly one option of every item of the chosen branch is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gramian.errors import GramianError

CELLS = 1 << 15
"""Most cells of the dynamic programme's table; budgets that fit in so many units are solved exactly."""
LARGE = 2000
"""Above so many items the Lagrangian takes over."""


@dataclass(frozen=True)
class Option:
    """A choice: what it costs (a non-negative integer) and what it loses."""

    cost: int
    error: float


Item = Sequence[Option]
Branch = Sequence[Item]
Group = Sequence[Branch]


@dataclass(frozen=True)
class Choice:
    """For one group: the branch taken and, for each of its items, the option taken (indices)."""

    branch: int
    options: tuple[int, ...]


@dataclass(frozen=True)
class Solution:
    """Choices in the groups' order, with their exact totals."""

    choices: list[Choice]
    cost: int
    error: float


def solve(groups: Sequence[Group], budget: int, *, cells: int = CELLS) -> Solution:
    """The least total error within `budget`.

    Dynamic programming over the budget in units of the costs' greatest common divisor: exact. When that takes more than
    `cells` units, costs are rounded up to a coarser unit: the budget still holds, and what is lost is at most what a
    budget smaller by (items x unit) would lose; a final exchange uses up the slack. More than ``LARGE`` items go to
    ``solve_lagrangian``.

    Raises:
        GramianError: even the cheapest options cost more than `budget`; the message gives the least reachable cost.
    """
    least = sum(min(sum(min(o.cost for o in item) for item in branch) for branch in group) for group in groups)
    if least > budget:
        raise GramianError(f"the budget {budget} is out of reach: the cheapest options cost {least}")
    if sum(max(len(branch) for branch in group) for group in groups) > LARGE:
        return solve_lagrangian(groups, budget)
    costs = [o.cost for group in groups for branch in group for item in branch for o in item]
    divisor = math.gcd(*costs) or 1
    unit = divisor if budget // divisor <= cells else -(-budget // cells)
    capacity = budget // unit
    if sum_ceil(groups, unit) > capacity:  # rounding up would make it infeasible: settle for the relaxation
        return solve_lagrangian(groups, budget)
    best = np.zeros(capacity + 1)
    trail: list[tuple[np.ndarray, list[list[np.ndarray]]]] = []
    for group in groups:
        table = np.full(capacity + 1, np.inf)
        taken = np.zeros(capacity + 1, dtype=np.int16)
        choices: list[list[np.ndarray]] = []
        for index, branch in enumerate(group):
            current, steps = best, []
            for item in branch:
                current, chosen = _step(current, item, unit)
                steps.append(chosen)
            better = current < table
            table = np.where(better, current, table)
            taken[better] = index
            choices.append(steps)
        trail.append((taken, choices))
        best = table
    cell = int(np.argmin(best))
    picked: list[Choice] = []
    for group, (taken, choices) in zip(reversed(groups), reversed(trail), strict=True):
        taken_branch = int(taken[cell])
        options: list[int] = []
        for item, chosen in zip(reversed(group[taken_branch]), reversed(choices[taken_branch]), strict=True):
            option = int(chosen[cell])
            options.append(option)
            cell -= -(-item[option].cost // unit)
        picked.append(Choice(taken_branch, tuple(reversed(options))))
    return _exchange(groups, picked[::-1], budget)


def sum_ceil(groups: Sequence[Group], unit: int) -> int:
    """Least total cost in whole units, each option rounded up."""
    return sum(
        min(sum(min(-(-o.cost // unit) for o in item) for item in branch) for branch in group) for group in groups
    )


def _step(best: np.ndarray, item: Item, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Add one item to the table: for every capacity the best option."""
    table = np.full_like(best, np.inf)
    chosen = np.zeros(len(best), dtype=np.int32)
    for index in _undominated(item):
        cost = -(-item[index].cost // unit)
        if cost >= len(best):
            continue
        candidate = best[: len(best) - cost] + item[index].error
        view = table[cost:]
        better = candidate < view
        view[better] = candidate[better]
        chosen[cost:][better] = index
    return table, chosen


def _undominated(item: Item) -> list[int]:
    """Indices of the options that no other beats in both cost and error, by rising cost."""
    order = sorted(range(len(item)), key=lambda i: (item[i].cost, item[i].error))
    kept: list[int] = []
    lowest = math.inf
    for i in order:
        if item[i].error < lowest:
            kept.append(i)
            lowest = item[i].error
    return kept


def solve_lagrangian(groups: Sequence[Group], budget: int) -> Solution:
    """Relaxation: bisect the price of one unit of cost, every group taking its best at that price; then exchange.

    Within the budget always; optimal up to the gap of the relaxation. For thousands of items.
    """

    def at(price: float) -> list[Choice]:
        picked = []
        for group in groups:
            best: tuple[float, Choice] | None = None
            for index, branch in enumerate(group):
                options = [_best_at(item, price) for item in branch]
                value = sum(i[k].error + price * i[k].cost for i, k in zip(branch, options, strict=True))
                if best is None or value < best[0]:
                    best = (value, Choice(index, tuple(options)))
            assert best is not None
            picked.append(best[1])
        return picked

    picked = at(0.0)
    if _totals(groups, picked)[0] > budget:
        low, high = 1e-30, 1.0
        while _totals(groups, at(high))[0] > budget:
            high *= 16
            if high > 1e60:
                break
        for _ in range(200):
            middle = math.sqrt(low * high)
            if _totals(groups, at(middle))[0] > budget:
                low = middle
            else:
                high = middle
            if high / low < 1 + 1e-9:
                break
        picked = at(high)
        if _totals(groups, picked)[0] > budget:
            picked = [_cheapest(group) for group in groups]
    return _exchange(groups, picked, budget)


def _best_at(item: Item, price: float) -> int:
    return min(range(len(item)), key=lambda k: (item[k].error + price * item[k].cost, item[k].cost))


def _cheapest(group: Group) -> Choice:
    def options(branch: Branch) -> tuple[int, ...]:
        return tuple(min(range(len(item)), key=lambda k, item=item: item[k].cost) for item in branch)  # type: ignore[misc]

    costs = [sum(item[k].cost for item, k in zip(branch, options(branch), strict=True)) for branch in group]
    index = costs.index(min(costs))
    return Choice(index, options(group[index]))


def _totals(groups: Sequence[Group], picked: Sequence[Choice]) -> tuple[int, float]:
    cost, error = 0, 0.0
    for group, choice in zip(groups, picked, strict=True):
        for item, option in zip(group[choice.branch], choice.options, strict=True):
            cost += item[option].cost
            error += item[option].error
    return cost, error


def _exchange(groups: Sequence[Group], picked: list[Choice], budget: int) -> Solution:
    """Spend what is left: take, again and again, the affordable change of one item that lowers the error most."""
    cost, error = _totals(groups, picked)
    improved = True
    while improved:
        improved, best = False, (0.0, 0, 0, 0)
        for g, (group, choice) in enumerate(zip(groups, picked, strict=True)):
            for i, (item, option) in enumerate(zip(group[choice.branch], choice.options, strict=True)):
                now = item[option]
                for k, other in enumerate(item):
                    gain = now.error - other.error
                    if gain > best[0] and cost - now.cost + other.cost <= budget:
                        best = (gain, g, i, k)
        if best[0] > 0:
            _, g, i, k = best
            options = list(picked[g].options)
            options[i] = k
            picked[g] = Choice(picked[g].branch, tuple(options))
            cost, error = _totals(groups, picked)
            improved = True
    return Solution(picked, cost, error)
