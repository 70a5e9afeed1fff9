"""Fewer blocks: the result is an ordinary, shallower model.

Shortened LLaMA: Depth Pruning for Large Language Models (Kim et al. 2024) leaves out whole blocks, those without which the
model loses least on calibration text.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.models.api import Progress
from gramian.models.blocks import find_blocks
from gramian.models.heal import Healing, heal
from gramian.models.sensitivity import Distance
from gramian.models.walk import is_linear
from gramian.models.workload import Workload, first_tensor
from gramian.modes import evaluating

Module = TypeVar("Module", bound=nn.Module)


def depth(
    model: Module,
    workload: Workload,
    *,
    keep: float = 0.5,
    cost: str | None = None,
    heal_steps: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    note: Callable[[int, float], None] | None = None,
) -> Module:
    """A copy of `model` with as many blocks as the budget holds.

    The paper scores every block once, by the perplexity without it; here scores are taken again after each removal, as two
    blocks may do the same work, and count the divergence from the original's predictions.

    Args:
        model: with repeated blocks in one ``nn.ModuleList``; left as it was.
        workload: calibration data.
        keep: share of the blocks' parameters to keep.
        cost: "params" or "flops": the same share here.
        heal_steps: steps of distillation, of all linear layers of the blocks that are left.
        seed: of healing.
        progress: called with ("depth", blocks tried, blocks to try).
        note: called with (step, loss) of healing.

    Returns:
        The copy; its attribute ``gramian_blocks`` holds the name of the list and the places that its blocks had.

    Raises:
        GramianError: there are no repeated blocks, or not even one fits.
    """
    name, blocks = find_blocks(model)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    kept = list(range(len(blocks)))
    if min(sizes) > keep * sum(sizes):
        raise GramianError(
            f"keep {keep:g} is less than one of {len(blocks)} blocks; expected at least {1 / len(blocks):.3g}"
        )
    tried = 0
    with evaluating(model):
        distance = Distance(model, workload)
        while sum(sizes[i] for i in kept) > keep * sum(sizes):
            harm = {}
            for gone in kept:
                rest = [i for i in kept if i != gone]
                with _shallower(model, name, rest):
                    harm[gone] = distance(model)
                tried += 1
                if progress is not None:
                    progress("depth", tried, sum(range(len(kept), len(blocks) + 1)))
            kept.remove(min(harm, key=harm.__getitem__))
    small = copy.deepcopy(model)
    _set(small, name, kept)
    small.gramian_blocks = (name, tuple(kept))  # type: ignore[assignment]
    if heal_steps:
        layers = [f"{name}.{n}" for n, m in small.get_submodule(name).named_modules() if is_linear(m)]
        # Hidden states between blocks have no counterpart.
        ends = replace(workload, outputs=lambda m, batch: workload.outputs(m, batch)[:2])

        def tell(step: int, loss: float) -> None:
            if progress is not None:
                progress("heal", step + 1, heal_steps)
            if note is not None:
                note(step, loss)

        heal(small, model, layers, ends, Healing(steps=heal_steps, seed=seed), progress=tell)
    return small


def _set(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Leave only some of the blocks, in place, and make the config and the blocks' own numbers say so."""
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    count = len(blocks)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([blocks[i] for i in kept]))
    for place, old in enumerate(kept):
        for module in blocks[old].modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = place  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, key, type(value)(value[i] for i in kept))
    if getattr(config, "num_hidden_layers", None) == count:
        config.num_hidden_layers = len(kept)


@contextlib.contextmanager
def _shallower(model: nn.Module, name: str, kept: Sequence[int]) -> Iterator[None]:
    """The model with some of its blocks, for a moment."""
    parent, _, leaf = name.rpartition(".")
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    config: Any = getattr(model, "config", None)
    said = None if config is None else dict(vars(config))
    numbers = [(m, m.layer_idx) for m in blocks.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    try:
        _set(model, name, kept)
        yield
    finally:
        setattr(model.get_submodule(parent), leaf, blocks)
        for module, number in numbers:
            module.layer_idx = number
        if said is not None:
            vars(config).update(said)


@torch.no_grad()
def block_influence(
    model: nn.Module, workload: Workload, names: Sequence[str], sequences: int = 32
) -> dict[str, float]:
    """``1 - E cos(x_in, x_out)`` of the block that each layer is in (Block Influence: Men et al. 2024, ShortGPT, eq. 1; what
    MoDeGPT divides its budget by); for layers in no block the mean over all.

    Args:
        model: with repeated blocks in one ``nn.ModuleList``.
        workload: its first sequences are run.
        names: of layers.
        sequences: at most so many.

    Raises:
        GramianError: there are no repeated blocks.
    """
    place, blocks = find_blocks(model)
    sums = torch.zeros(len(blocks), 2, dtype=torch.float64)
    mask: Tensor | None = None

    def hook(index: int) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            cosine = F.cosine_similarity(before.float(), first_tensor(output).float(), dim=-1)
            if mask is not None and mask.shape == cosine.shape:
                cosine = cosine[mask.bool()]
            sums[index] += torch.tensor([float(cosine.sum(dtype=torch.float64)), cosine.numel()], dtype=torch.float64)

        return seen

    handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        with evaluating(model):
            for batch in workload.parts(min(16, sequences))[: max(1, sequences // 16)]:
                mask = workload.mask(batch)
                workload.run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    influence = (1 - sums[:, 0] / sums[:, 1]).tolist()
    mean = sum(influence) / len(influence)
    inside = {f"{place}.{i}.": value for i, value in enumerate(influence)}
    return {n: next((value for start, value in inside.items() if n.startswith(start)), mean) for n in names}


__all__ = ["block_influence", "depth"]
