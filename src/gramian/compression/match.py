"""Weight matching: the order of hidden units in which one network's weights resemble another's most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.errors import GramianError, nearest
from gramian.linalg import linear_assignment

Places = Sequence[tuple[str, int]]
"""Where the units of one group appear: (name of a tensor, its dimension)."""


@dataclass(frozen=True)
class Matching:
    """Orders of the units of each group.

    Attributes:
        orders: group -> (n,) int64; unit i of the reference answers to unit ``orders[group][i]`` of the other network.
        before: sum of the products of matching entries of both networks' tensors, as they came.
        after: the same under `orders`; the squared distance of the two fell by twice the difference.
        sweeps: rounds over all groups, the last of which changed nothing unless they ran out.
    """

    orders: dict[str, Tensor]
    before: float
    after: float
    sweeps: int


def match_weights(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    groups: Mapping[str, Places],
    *,
    seed: int = 0,
    sweeps: int = 100,
) -> Matching:
    """Maximise ``sum_w <A_w, P(B_w)>`` over the permutations P of each group of units (Ainsworth, Hayase and Srinivasa 2023,
    "Git Re-Basin", algorithm 1).

    One group at a time, in random order, until a round changes nothing: the others held, the best permutation is a linear
    assignment. A group that meets itself in one tensor (the stream of a residual network) makes the problem quadratic; its
    step is then taken only if it gains. The answer is a local optimum.

    Args:
        reference: A, tensors by name.
        other: B, of the same shapes.
        groups: where the units of each group appear.
        seed: of the order of visits.
        sweeps: most rounds.

    Raises:
        GramianError: names or shapes differ, a place does not exist, or sizes within a group differ.
    """
    _check(reference, other, groups)
    names = {name for places in groups.values() for name, _ in places}
    fixed = {name: reference[name].detach().double() for name in names}
    moved = {name: other[name].detach().double() for name in names}
    orders = {group: torch.arange(_size(other, places)) for group, places in groups.items()}
    before = _similarity(fixed, moved, names)
    generator = torch.Generator().manual_seed(seed)
    keys, done, changed = list(groups), 0, True
    while changed and done < sweeps:
        changed = False
        done += 1
        for index in torch.randperm(len(keys), generator=generator).tolist():
            places = groups[keys[index]]
            products = sum(
                (_rows(fixed[name], axis) @ _rows(moved[name], axis).mT for name, axis in places),
                torch.zeros((), dtype=torch.float64),
            )
            order = linear_assignment(-products)
            touched = {name for name, _ in places}
            trial = permute({name: moved[name] for name in touched}, {"": places}, {"": order})
            gain = _similarity(fixed, trial, touched) - _similarity(fixed, moved, touched)
            scale = sum(float(fixed[name].norm() * moved[name].norm()) for name in touched)
            if gain > 1e-12 * scale:
                moved |= trial
                orders[keys[index]] = orders[keys[index]][order]
                changed = True
    return Matching(orders, before, _similarity(fixed, moved, names), done)


def permute(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Places], orders: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors with the units of every group in a new order; those that no group names are passed on."""
    out = dict(tensors)
    for group, places in groups.items():
        for name, axis in places:
            out[name] = out[name].index_select(axis, orders[group].to(out[name].device))
    return out


def _rows(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _similarity(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: set[str]) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in sorted(names))


def _size(tensors: Mapping[str, Tensor], places: Places) -> int:
    name, axis = places[0]
    return tensors[name].shape[axis]


def _check(reference: Mapping[str, Tensor], other: Mapping[str, Tensor], groups: Mapping[str, Places]) -> None:
    for group, places in groups.items():
        if not places:
            raise GramianError(f"group {group!r} appears nowhere; expected at least one (tensor, dimension)")
        sizes = set()
        for name, axis in places:
            for tensors, which in ((reference, "reference"), (other, "other network")):
                if name not in tensors:
                    raise GramianError(f"group {group!r}: the {which} has no tensor {name!r}{nearest(name, tensors)}")
            a, b = reference[name], other[name]
            if a.shape != b.shape or not -a.dim() <= axis < a.dim():
                raise GramianError(
                    f"group {group!r}: {name} is {tuple(a.shape)} in the reference and {tuple(b.shape)} in the other; "
                    f"expected equal shapes with a dimension {axis}"
                )
            if not bool(a.isfinite().all() and b.isfinite().all()):
                raise GramianError(f"group {group!r}: {name} holds NaN or Inf")
            sizes.add(a.shape[axis])
        if len(sizes) > 1:
            raise GramianError(f"group {group!r}: its places have {sorted(sizes)} units; expected one size")
