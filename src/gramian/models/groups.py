"""Layers that can be compressed together, found by trying.

A proposal (these layers feed that one; these are the heads) comes from the order in which layers ran and their sizes. It is
kept only if the model's own output proves it: for neurons, slicing them out equals zeroing what reads them; for attention
heads, rotating what a head writes and what reads it changes nothing; where rotary embedding forbids that, leaving pairs of
coordinates out of the queries equals leaving them out of the keys. Fewer key and value heads than query heads are found by
their widths. Any module qualifies, no architecture is listed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.grams import Joint
from gramian.linalg import polar
from gramian.models import walk
from gramian.models.blocks import find_blocks
from gramian.modes import evaluating
from gramian.nn.structured import Structured

HEAD_ATTRIBUTES = ("num_attention_heads", "num_heads", "n_heads", "n_head")
HALF = (torch.float16, torch.bfloat16)
CLOSE = 1e-3
"""Most that two proofs' outputs may differ, as a share of a change that must show. On random models exact options differ by
less than 1e-5 in float32, others by more than 1e-1; a deep model's rounding, and small changes, need the room between."""


def find_groups(
    model: nn.Module, layers: Mapping[str, nn.Module], forward: Callable[[], Tensor], sites: Mapping[str, str]
) -> list[Joint]:
    """The joint options of `layers`.

    A model in half precision is tried in float32: its rounding is larger than what tells equal from nearly equal.

    Args:
        model: in the state it will be compressed in; left exactly as found.
        layers: linear layers by name.
        forward: runs `model` on a small batch and returns its output. One token a sequence tells nothing of attention
            (``Workload.telling``).
        sites: layer name -> name of the first layer that reads the same input (``LayerGrams.site``).
    """
    with evaluating(model), torch.no_grad(), _widened(model, forward):
        order = _call_order(layers, forward)
        reference = forward()
        found = _neurons(model, layers, order, sites, forward)
        used = {name for joint in found for name in joint.layers}
        found += _attention(model, layers, order, sites, forward, reference, used)
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
        width = walk.weight_of(layers[down]).shape[1]
        before = [n for n in order[max(0, position - 2) : position] if walk.weight_of(layers[n]).shape[0] == width]
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
    width = walk.weight_of(layers[down]).shape[1]
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(width, generator=generator)[: max(1, width // 2)].sort().values
    zeroed = torch.zeros_like(_weight(layers[down]))
    zeroed[:, kept] = _weight(layers[down])[:, kept]
    reference = forward()
    with _swapped(model, {down: _linear(zeroed, _bias(layers[down]))}):
        expected = forward()
    sliced = {down: _linear(_weight(layers[down])[:, kept], _bias(layers[down]))}
    for up in ups:
        bias = _bias(layers[up])
        sliced[up] = _linear(_weight(layers[up])[kept], None if bias is None else bias[kept])
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
        # Three layers that read one input, called in a row: query, key and value in some order.
        trio = [n for n in order if sites.get(n) == sites.get(first) and n not in used]
        heads = _heads(model, first)
        if len(trio) != 3 or trio[0] != first or heads < 1:
            continue
        after = order[max(order.index(n) for n in trio) + 1 :][:1]
        scores = next(
            (
                Joint(kind, pair, heads)
                for kind, changed in SCORES.items()
                for pair in itertools.permutations(trio, 2)
                if _fits(layers, pair[0], pair[1], heads) and changed(model, layers, pair, heads, forward, reference)
            ),
            None,
        )
        if scores:
            found.append(scores)
        reads = after if after and after[0] not in used else []
        for value in [n for n in trio if scores is None or n not in scores.layers]:
            fits = bool(reads) and _fits(layers, reads[0], value, heads, reads=True)
            if fits and _rotates_value(model, layers, (value, reads[0]), heads, forward, reference):
                found.append(Joint("value_output", (value, reads[0]), heads))
                break
        used.update(n for joint in found for n in joint.layers)
    return found


def _fits(layers: Mapping[str, nn.Module], wide: str, narrow: str, heads: int, *, reads: bool = False) -> bool:
    """Whether `narrow` writes whole heads, of which every one serves equally many of the `heads` heads that `wide` writes
    (or `reads`).
    """
    size, rows = walk.weight_of(layers[wide]).shape[1 if reads else 0], walk.weight_of(layers[narrow]).shape[0]
    return (
        size % heads == 0
        and rows % (size // heads) == 0
        and heads % max(rows // (size // heads), 1) == 0
        and rows <= size
    )


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


Change = Callable[
    [nn.Module, Mapping[str, nn.Module], tuple[str, str], int, Callable[[], Tensor], Tensor],
    bool,
]


def _rotates_scores(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    pair: tuple[str, str],
    heads: int,
    forward: Callable[[], Tensor],
    reference: Tensor,
) -> bool:
    """Whether one orthogonal matrix a key head, applied to its queries and keys, leaves the model's output as it was."""
    query, key = (layers[n] for n in pair)
    turns, turned = _turns(_weight(query).shape[0] // heads, _weight(key), heads)
    changed = {pair[0]: _turned(query, turned), pair[1]: _turned(key, turns)}
    return _undone(model, changed, pair[0], forward, reference)


def _rotates_value(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    pair: tuple[str, str],
    heads: int,
    forward: Callable[[], Tensor],
    reference: Tensor,
) -> bool:
    """The same for what a value head writes and what the output layer reads of it."""
    value, output = (layers[n] for n in pair)
    turns, turned = _turns(_weight(output).shape[1] // heads, _weight(value), heads)
    changed = {pair[0]: _turned(value, turns), pair[1]: _linear(_weight(output) @ turned.mT, _bias(output))}
    return _undone(model, changed, pair[0], forward, reference)


def _turns(width: int, narrow: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """A random rotation of each key or value head, and of the query heads that share it."""
    generator = torch.Generator().manual_seed(0)
    groups = len(narrow) // width
    turns = polar(torch.randn(groups, width, width, generator=generator)).to(narrow)
    repeated = turns.repeat_interleave(heads // groups, 0)
    return torch.block_diag(*turns), torch.block_diag(*repeated)  # type: ignore[no-untyped-call]


def _turned(layer: nn.Module, turn: Tensor) -> nn.Linear:
    bias = _bias(layer)
    return _linear(turn @ _weight(layer), None if bias is None else turn @ bias)


def _undone(
    model: nn.Module, changed: Mapping[str, nn.Module], first: str, forward: Callable[[], Tensor], reference: Tensor
) -> bool:
    """Whether all changes together leave the output as it was, while the first alone does not."""
    with _swapped(model, {first: changed[first]}):
        alone = forward()
    with _swapped(model, changed):
        return _same(forward(), reference, alone)


def _leaves_out(neighbours: bool) -> Change:
    def same_from_both_sides(
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        pair: tuple[str, str],
        heads: int,
        forward: Callable[[], Tensor],
        reference: Tensor,
    ) -> bool:
        """Whether queries without some pairs of coordinates give what keys without them give."""
        width = _weight(layers[pair[0]]).shape[0] // heads
        if width % 2:
            return False
        groups = _weight(layers[pair[1]]).shape[0] // width
        kept = torch.rand(groups, width // 2, generator=torch.Generator().manual_seed(0)) < 0.5
        both = kept.repeat_interleave(2, 1) if neighbours else kept.repeat(1, 2)
        masks = (both.repeat_interleave(heads // groups, 0).flatten(), both.flatten())
        outputs = []
        for name, mask in zip(pair, masks, strict=True):
            with _swapped(model, {name: _turned(layers[name], torch.diag(mask).to(_weight(layers[name])))}):
                outputs.append(forward())
        return _same(outputs[0], outputs[1], reference)

    return same_from_both_sides


SCORES: dict[str, Change] = {
    "query_key": _rotates_scores,
    "rotary_halves": _leaves_out(neighbours=False),
    "rotary_neighbours": _leaves_out(neighbours=True),
}
"""What may be done to queries and keys, the best first, and how to tell: (model, layers, (query, key), heads, forward,
reference) -> whether this model allows it."""


def _same(a: Tensor, b: Tensor, other: Tensor) -> bool:
    """Whether a equals b, judged by how far `other` is: the output after a change that must show if the test can see it."""
    effect = (other - b).norm()
    return a.shape == b.shape and bool(effect > 1e-5 * b.norm()) and bool((a - b).norm() <= CLOSE * effect)


def _weight(layer: nn.Module) -> Tensor:
    """The weight (out, in), not in half precision."""
    return _wide(walk.weight_of(layer))


def _bias(layer: nn.Module) -> Tensor | None:
    """The bias (out,), not in half precision."""
    bias = walk.bias_of(layer)
    return None if bias is None else _wide(bias)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in HALF else value


@contextlib.contextmanager
def _widened(model: nn.Module, forward: Callable[[], Tensor]) -> Iterator[None]:
    """Run `model` in float32 for a while: what lies outside its repeated blocks at once, of the blocks one at a time. A
    model that cannot run so (a dtype is written into its code) runs as it is.
    """
    try:
        blocks = find_blocks(model)[1]
    except GramianError:
        blocks = []
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    if not any(
        value.dtype in HALF and not value.is_meta for value in itertools.chain(model.parameters(), model.buffers())
    ):
        yield
        return
    held: list[_Place] = []

    def enter(block: nn.Module, args: Any) -> None:
        _restore(held)
        held.extend(_widen(block.modules()))

    def widen_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wide = [_wide(value) if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        return tuple(wide[: len(args)]), dict(zip(kwargs, wide[len(args) :], strict=True))

    with contextlib.ExitStack() as stack:
        whole: list[_Place] = _widen(outside)
        stack.callback(_restore, whole)
        stack.callback(_restore, held)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
        stack.callback(model.register_forward_pre_hook(widen_inputs, with_kwargs=True).remove)
        try:
            forward()
        except (RuntimeError, ValueError, TypeError):
            stack.close()
        yield


_Place = tuple[nn.Module, dict[str, Any], str, Tensor]
"""Module, its parameters or buffers, a name and the value that belongs there."""


def _widen(modules: Iterable[nn.Module]) -> list[_Place]:
    """Put float32 copies in the place of parameters and buffers in half precision.

    Returns:
        what was there, for ``_restore``.
    """
    found: list[_Place] = []
    for module in modules:
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for values in holders:
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dtype in HALF and not value.is_meta:
                    found.append((module, values, name, value))
                    wide = value.detach().float()
                    values[name] = nn.Parameter(wide, requires_grad=False) if isinstance(value, nn.Parameter) else wide
    return found


def _restore(places: list[_Place]) -> None:
    for module, values, name, value in places:
        values[name] = value
        if isinstance(module, Structured):
            module._kept.clear()  # holds on to the copies
    places.clear()


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
