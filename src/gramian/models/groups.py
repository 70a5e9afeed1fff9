"""Layers that can be compressed together, found by trying.

A proposal (these layers feed that one; these are the heads) comes from the order in which layers ran and their sizes. It is
kept only if the model's own output proves it: for neurons, slicing them out equals zeroing what reads them; for attention
heads, rotating what a head writes and what reads it changes nothing. Any module qualifies, no architecture is listed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian.grams import Joint
from gramian.linalg import polar
from gramian.models.walk import bias_of, weight_of

HEAD_ATTRIBUTES = ("num_attention_heads", "num_heads", "n_heads", "n_head")


def find_groups(
    model: nn.Module, layers: Mapping[str, nn.Module], forward: Callable[[], Tensor], sites: Mapping[str, str]
) -> list[Joint]:
    """The joint options of `layers`.

    Args:
        model: in the state it will be compressed in; left exactly as found.
        layers: linear layers by name.
        forward: runs `model` on a small batch and returns its output.
        sites: layer name -> name of the first layer that reads the same input (``LayerGrams.site``).
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            order = _call_order(layers, forward)
            reference = forward()
            found = _neurons(model, layers, order, sites, forward)
            used = {name for joint in found for name in joint.layers}
            found += _attention(model, layers, order, sites, forward, reference, used)
    finally:
        model.train(training)
    return found


def _call_order(layers: Mapping[str, nn.Module], forward: Callable[[], Tensor]) -> list[str]:
    order: list[str] = []
    handles = [m.register_forward_hook(lambda *_, n=name: order.append(n)) for name, m in layers.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return order if len(order) == len(set(order)) else []


def _neurons(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    order: list[str],
    sites: Mapping[str, str],
    forward: Callable[[], Tensor],
) -> list[Joint]:
    found: list[Joint] = []
    taken: set[str] = set()
    for position, down in enumerate(order):
        width = weight_of(layers[down]).shape[1]
        before = [n for n in order[max(0, position - 2) : position] if weight_of(layers[n]).shape[0] == width]
        if not before or down in taken:
            continue
        last = before[-1]
        # A gated pair reads one input and writes two sets of the same neurons.
        ups = tuple(n for n in before if sites.get(n) == sites.get(last) and n not in taken)
        for proposal in {ups, (last,)} if last not in taken else ():
            if proposal and _slices(model, layers, proposal, down, forward):
                found.append(Joint("neurons", (*proposal, down)))
                taken.update((*proposal, down))
                break
    return found


def _slices(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ups: tuple[str, ...],
    down: str,
    forward: Callable[[], Tensor],
) -> bool:
    """Whether removing half of the neurons equals zeroing the columns that read them."""
    width = weight_of(layers[down]).shape[1]
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(width, generator=generator)[: max(1, width // 2)].sort().values
    zeroed = torch.zeros_like(weight_of(layers[down]))
    zeroed[:, kept] = weight_of(layers[down])[:, kept]
    reference = forward()
    with _swapped(model, {down: _linear(zeroed, bias_of(layers[down]))}):
        expected = forward()
    sliced = {down: _linear(weight_of(layers[down])[:, kept], bias_of(layers[down]))}
    for up in ups:
        bias = bias_of(layers[up])
        sliced[up] = _linear(weight_of(layers[up])[kept], None if bias is None else bias[kept])
    with _swapped(model, sliced):
        try:
            actual = forward()
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    return _same(actual, expected, reference)


def _attention(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    order: list[str],
    sites: Mapping[str, str],
    forward: Callable[[], Tensor],
    reference: Tensor,
    used: set[str],
) -> list[Joint]:
    found: list[Joint] = []
    for first in order:
        # Three layers of one shape that read one input, called in a row: query, key and value in some order.
        trio = [n for n in order if sites.get(n) == sites.get(first) and n not in used]
        if len(trio) != 3 or trio[0] != first:
            continue
        shape = weight_of(layers[first]).shape
        if any(weight_of(layers[n]).shape != shape for n in trio):
            continue
        heads = _heads(model, first)
        after = order[max(order.index(n) for n in trio) + 1 :][:1]
        if heads < 1 or shape[0] % heads:
            continue
        pairs = [(a, b) for i, a in enumerate(trio) for b in trio[i + 1 :]]
        query_key = next(
            (p for p in pairs if _rotates(model, layers, p, heads, forward, reference, out=True)),
            None,
        )
        if query_key:
            found.append(Joint("query_key", query_key, heads))
        candidates = [n for n in trio if not query_key or n not in query_key]
        reads = bool(after) and weight_of(layers[after[0]]).shape[1] == shape[0] and after[0] not in used
        for value in candidates if reads else ():
            if _rotates(model, layers, (value, after[0]), heads, forward, reference, out=False):
                found.append(Joint("value_output", (value, after[0]), heads))
                break
        used.update(n for joint in found for n in joint.layers)
    return found


def _heads(model: nn.Module, name: str) -> int:
    """Attention heads, from the nearest enclosing module (or its config) that says."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module: Any = model.get_submodule(".".join(parts[:depth]))
        for owner in (module, getattr(module, "config", None)):
            for attribute in HEAD_ATTRIBUTES:
                value = getattr(owner, attribute, None)
                if isinstance(value, int):
                    return value
    return 0


def _rotates(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    pair: tuple[str, str],
    heads: int,
    forward: Callable[[], Tensor],
    reference: Tensor,
    *,
    out: bool,
) -> bool:
    """Whether one orthogonal matrix a head, applied to what both layers write (`out`) or to what the first writes and the
    second reads, leaves the model's output as it was.
    """
    first, second = (weight_of(layers[n]) for n in pair)
    width = first.shape[0] // heads
    generator = torch.Generator().manual_seed(0)
    turns = polar(torch.randn(heads, width, width, generator=generator)).to(first)
    turn = torch.block_diag(*turns)  # type: ignore[no-untyped-call]
    bias = bias_of(layers[pair[0]])
    changed = {pair[0]: _linear(turn @ first, None if bias is None else turn @ bias)}
    bias = bias_of(layers[pair[1]])
    if out:
        changed[pair[1]] = _linear(turn @ second, None if bias is None else turn @ bias)
    else:
        changed[pair[1]] = _linear(second @ turn.mT, bias)
    with _swapped(model, {pair[0]: changed[pair[0]]}):
        alone = forward()
    with _swapped(model, changed):
        return _same(forward(), reference, alone)


def _same(a: Tensor, b: Tensor, other: Tensor) -> bool:
    """Whether a equals b, judged by how far `other` is: the output after a change that must show if the test can see it."""
    effect = (other - b).norm()
    return a.shape == b.shape and bool(effect > 1e-5 * b.norm()) and bool((a - b).norm() <= 1e-2 * effect)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@contextlib.contextmanager
def _swapped(model: nn.Module, changed: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some, for a moment."""
    before = {name: model.get_submodule(name) for name in changed}
    try:
        for name, module in changed.items():
            _put(model, name, module)
        yield
    finally:
        for name, module in before.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


__all__ = ["Joint", "find_groups"]
