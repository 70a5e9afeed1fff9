"""Who gets how much of a budget: one knapsack over everything, or one of the rules that papers use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.compression.knapsack import Choice, Group, Option, solve
from gramian.compression.layer import Layer
from gramian.errors import GramianError, nearest
from gramian.linalg import svdvals
from gramian.ops.operator import Size


class Priced(NamedTuple):
    """A candidate with its cost in the plan's unit; JSON-able."""

    structure: str
    size: Size
    cost: int
    error: float


@dataclass(frozen=True)
class Problem:
    """What is to be divided.

    Attributes:
        groups: of branches of items of candidates; exactly one branch of each is taken.
        names: the layers of each group.
        layers: by name.
        cost: what is counted.
        keep: the share.
        budget: that share of all layers' present cost.
        present: present cost of each group.
        sensitivity: by layer name, what "entropic" and "measured" go by.
    """

    groups: Sequence[Sequence[Sequence[Sequence[Priced]]]]
    names: Sequence[Sequence[str]]
    layers: Mapping[str, Layer]
    cost: str
    keep: float
    budget: int
    present: Sequence[int]
    sensitivity: Mapping[str, float] | None = None

    def priced(self, scales: Sequence[float] | None = None) -> list[Group]:
        """The candidates as the knapsack takes them; `scales` multiplies the errors of each group."""
        factors = [1.0] * len(self.groups) if scales is None else scales
        return [
            [[[Option(c.cost, factor * c.error) for c in item] for item in branch] for branch in group]
            for group, factor in zip(self.groups, factors, strict=True)
        ]

    def scores(self) -> Tensor:
        """(groups,) mean sensitivity of each group's layers.

        Raises:
            GramianError: one is missing.
        """
        known = self.sensitivity or {}
        for name in self.layers:
            if name not in known:
                raise GramianError(f"allocation: no sensitivity of layer {name}{nearest(name, known)}")
        return torch.tensor([sum(known[n] for n in names) / len(names) for names in self.names], dtype=torch.float64)


def exact(problem: Problem) -> list[Choice]:
    """The least total error within the budget: a knapsack. Errors of different layers must compare.

    Raises:
        GramianError: the budget is out of reach.
    """
    return _knapsack(problem, problem.priced())


def uniform(problem: Problem) -> list[Choice]:
    """The same share for every group. Groups to which nothing can be done stay as they are, and the others make room for them.

    Raises:
        GramianError: a group cannot become so small (it is named).
    """
    free, keep = _room(problem)
    return _by_shares(problem, torch.where(free, keep, 1.0).tolist())


def measured(problem: Problem) -> list[Choice]:
    """A knapsack over ``alpha_l t_l^2``: relative errors times sensitivities measured on the model (the linearity theorem,
    Malinovskii et al. 2024, eq. 4).

    Raises:
        GramianError: the errors are not relative; a sensitivity is missing; the budget is out of reach.
    """
    if any(layer.comparable for layer in problem.layers.values()):
        raise GramianError("allocation 'measured' multiplies relative errors; take a weighting other than 'two-sided'")
    return _knapsack(problem, problem.priced(problem.scores().tolist()))


def entropic(problem: Problem) -> list[Choice]:
    """Shares by a softmax of the layers' importance (MoDeGPT, Lin et al. 2024, eq. 10): what matters little shrinks most.
    Groups to which nothing can be done stay as they are, and the others make room for them.

    Raises:
        GramianError: a sensitivity is missing; a group cannot become as small as its share.
    """
    free, keep = _room(problem)
    sizes = torch.tensor(problem.present, dtype=torch.float64)
    shares = torch.ones_like(sizes)
    shares[free] = entropic_shares(problem.scores()[free], keep, sizes=sizes[free])
    return _by_shares(problem, shares.tolist())


def threshold(problem: Problem) -> list[Choice]:
    """One cut through all layers' normalised singular values (WeLore, Jaiswal et al. 2024, section 3).

    Layer l gets rank ``#{i : (s_i - s_min) / (s_max - s_min) >= k}``, with the one k that meets the budget; a layer whose
    factors would store no less than its matrix stays dense. No data, no errors.

    Raises:
        GramianError: a candidate other than dense has no rank; the budget is out of reach.
    """
    items: list[list[Priced]] = []
    profiles: list[Tensor] = []
    for group, names in zip(problem.groups, problem.names, strict=True):
        item = list(group[0][0])
        if len(names) > 1 or any(c.structure != "dense" and "rank" not in c.size for c in item):
            raise GramianError(f"allocation 'threshold' chooses ranks; {names[0]} is offered structures without one")
        items.append(item)
        values = svdvals(problem.layers[names[0]].weight.double())
        profiles.append((values - values[-1]) / (values[0] - values[-1]).clamp_min(1e-300))
    prices = [[c.cost for c in item] for item in items]

    def at(cut: float) -> tuple[int, list[int]]:
        picked = []
        for item, price, profile in zip(items, prices, profiles, strict=True):
            rank = max(int((profile >= cut).sum()), 1)
            dense = next(i for i, c in enumerate(item) if c.structure == "dense")
            able = [i for i, c in enumerate(item) if i != dense and c.size["rank"] <= rank and price[i] < price[dense]]
            best = max(able, key=lambda i: item[i].size["rank"], default=dense)
            enough = best != dense and item[best].size["rank"] == rank
            picked.append(best if enough else dense)
        return sum(price[i] for price, i in zip(prices, picked, strict=True)), picked

    low, high = 0.0, 1.0 + 1e-9
    if at(high)[0] > problem.budget:
        least = at(high)[0] / max(sum(problem.present), 1)
        raise GramianError(
            f"keep {problem.keep:g} is out of reach: ranks of one keep {least:.4f} of the {problem.cost}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0] <= problem.budget else (middle, high)
    return [Choice(0, (i,)) for i in at(high)[1]]


ALLOCATIONS: dict[str, Callable[[Problem], list[Choice]]] = {
    "exact": exact,
    "uniform": uniform,
    "threshold": threshold,
    "entropic": entropic,
    "measured": measured,
}
"""By name."""


def resolve_allocation(name: str) -> Callable[[Problem], list[Choice]]:
    """The rule of that name.

    Raises:
        GramianError: unknown name; the message lists the nearest ones.
    """
    if name not in ALLOCATIONS:
        raise GramianError(f"unknown allocation {name!r}{nearest(name, ALLOCATIONS)}; known: {', '.join(ALLOCATIONS)}")
    return ALLOCATIONS[name]


def entropic_shares(
    importance: Tensor, keep: float, *, temperature: float = 0.1, most: float = 0.8, sizes: Tensor | None = None
) -> Tensor:
    """Kept shares (n,) of n blocks, of mean `keep`: the removed share is ``n (1 - keep) softmax(-importance / temperature)``.

    Where the softmax asks to remove more than `most` of a block, the surplus is spread over the others.

    Args:
        importance: (n,), e.g. ``1 - E cos(x_in, x_out)`` of each block.
        keep: above 0, at most 1.
        temperature: epsilon; towards infinity all shares are equal.
        most: largest removed share of one block, raised to ``1 - keep`` where that is larger.
        sizes: (n,) of the blocks; None for equal ones.

    Returns:
        (n,) float64; ``sum(sizes * shares) = keep * sum(sizes)``.
    """
    weights = torch.ones_like(importance, dtype=torch.float64) if sizes is None else sizes.double()
    weights = weights / weights.sum()
    wish = (-importance.double() / temperature).softmax(0).clamp_min(1e-12)
    removed, limit = 1 - keep, max(most, 1 - keep)
    low, high = 0.0, limit / float(wish.min())
    for _ in range(200):  # the level at which capped wishes add up to what must go
        middle = (low + high) / 2
        low, high = (
            (middle, high) if float((weights * (middle * wish).clamp_max(limit)).sum()) < removed else (low, middle)
        )
    return 1 - (high * wish).clamp_max(limit)


def _room(problem: Problem) -> tuple[Tensor, float]:
    """Which groups can shrink (groups,), and the share of them that is left when the others stay as they are.

    Raises:
        GramianError: nothing is left.
    """
    sizes = torch.tensor(problem.present, dtype=torch.float64)
    least = [min(sum(min(c.cost for c in item) for item in branch) for branch in group) for group in problem.groups]
    free = torch.tensor([a < b for a, b in zip(least, problem.present, strict=True)])
    keep = float((problem.keep * sizes.sum() - sizes[~free].sum()) / sizes[free].sum()) if bool(free.any()) else 0.0
    if keep <= 0:
        raise GramianError(
            f"keep {problem.keep:g} is out of reach: {int((~free).sum())} of {len(free)} groups of layers stay as they are; "
            "ask for more or allow more structures"
        )
    return free, keep


def _knapsack(problem: Problem, groups: list[Group]) -> list[Choice]:
    try:
        return solve(groups, problem.budget).choices
    except GramianError as error:
        least = int(str(error).rsplit(" ", 1)[-1])
        raise GramianError(
            f"keep {problem.keep:g} is out of reach: the smallest options keep {least / sum(problem.present):.4f} of the "
            f"{problem.cost}; ask for more or allow more structures"
        ) from None


def _by_shares(problem: Problem, shares: Sequence[float]) -> list[Choice]:
    """Each group alone, within its own share."""
    choices: list[Choice] = []
    for group, names, present, share in zip(problem.priced(), problem.names, problem.present, shares, strict=True):
        try:
            choices += solve([group], int(share * present)).choices
        except GramianError as error:
            least = int(str(error).rsplit(" ", 1)[-1]) / max(present, 1)
            raise GramianError(
                f"keep {share:.4g} is out of reach for {', '.join(names)}: its smallest option keeps {least:.4f} of the "
                f"{problem.cost}; ask for more or allow more structures"
            ) from None
    return choices


__all__ = ["ALLOCATIONS", "Priced", "Problem", "entropic_shares", "resolve_allocation"]
