"""Matching the units of two networks, and merging several fine-tuned networks into one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gramian.compression.match import match_weights, permute
from gramian.compression.merge import ContinualMerge, merge_by_grams
from gramian.errors import GramianError, nearest
from gramian.grams import LayerGrams, collect_layers
from gramian.models.api import as_workload
from gramian.models.walk import bias_of, check_finite, find_layers, is_conv1d, weight_of
from gramian.models.workload import Batch, Workload, first_tensor
from gramian.nn.prepared_linear import is_plain_linear

Module = TypeVar("Module", bound=nn.Module)
RECIPES = ("average", "gram", "gram-two-sided", "opcm")


# Matching ------------------------------------------------------------------------------------------------------------


def match(reference: nn.Module, other: Module, data: Any, *, seed: int = 0, tokenizer: Any = None) -> Module:
    """A copy of `other` that computes the same function with its hidden units in the order of `reference`'s.

    Weight matching (Ainsworth et al. 2023, "Git Re-Basin"): two networks trained from different starts are often joined by a
    straight line of low loss once their units are in one order. Units are the hidden ones of feed-forward parts, gated or
    not: see ``find_units``.

    Args:
        reference: of the same architecture.
        other: left as it was.
        data: a few inputs, as ``collect`` takes them; they only prove which units may be permuted.
        seed: of the search.
        tokenizer: for texts.

    Raises:
        GramianError: no units that may be permuted, or tensors that differ in shape.
    """
    groups = find_units(other, data, tokenizer=tokenizer)
    if not groups:
        raise GramianError(
            "match: no hidden units may be permuted without changing the output; expected linear layers or convolutions "
            "in a row, with nothing between them but elementwise functions and normalisations"
        )
    state = dict(other.state_dict())
    found = match_weights(dict(reference.state_dict()), state, groups, seed=seed)
    return _with_state(other, permute(state, groups, found.orders))


def find_units(model: nn.Module, data: Any, *, tokenizer: Any = None) -> dict[str, list[tuple[str, int]]]:
    """Groups of hidden units that may be put in any order, found by trying.

    A proposal is a linear layer or convolution, those up to two before it whose outputs are as many as its inputs (two for a
    gated pair), and the vectors of that length between them (of a normalisation, say). It is kept if a random permutation of
    all of these leaves the model's output as it was, and one of the writers alone does not.

    Args:
        model: left as it was.
        data: as ``collect`` takes it; two sequences are used.
        tokenizer: for texts.

    Returns:
        Name of the layer that reads the units -> (name in the model's state, dimension) of every place.
    """
    work = as_workload(model, data, tokenizer)
    trial = copy.deepcopy(model).double().eval()  # so that equal and nearly equal outputs differ
    batch = _double(work.head(2))

    @torch.no_grad()
    def forward() -> Tensor:
        return first_tensor(work.run(trial, batch))

    order = _order(trial, forward)
    matrices = [name for name in order if _axes(trial.get_submodule(name)) is not None]
    expected = forward()
    state = trial.state_dict()  # shares memory with the parameters
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, list[tuple[str, int]]] = {}
    written: set[str] = set()
    for position, reader in enumerate(matrices):
        axis = _axis(trial, reader, 1)
        width = state[f"{reader}.weight"].shape[axis]
        before = [
            name
            for name in matrices[max(0, position - 2) : position]
            if state[f"{name}.weight"].shape[_axis(trial, name, 0)] == width and name not in written
        ]
        for writers in dict.fromkeys((tuple(before[-1:]), tuple(before), tuple(before[:1]))):
            if not writers:
                continue
            places = [(f"{name}.weight", _axis(trial, name, 0)) for name in writers]
            places += [(f"{name}.bias", 0) for name in writers if f"{name}.bias" in state]
            for name in order[order.index(writers[0]) : order.index(reader)]:
                if name not in matrices:
                    own = dict(trial.get_submodule(name).state_dict(prefix=f"{name}."))
                    places += [(key, 0) for key, tensor in own.items() if tensor.shape == (width,)]
            shuffled = torch.randperm(width, generator=generator)
            alone = _tried(state, places, shuffled, forward)
            places.append((f"{reader}.weight", axis))
            together = _tried(state, places, shuffled, forward)
            effect = float((alone - expected).norm())
            if effect > 1e-5 * float(expected.norm()) and float((together - expected).norm()) <= 1e-6 * effect:
                groups[reader] = places
                written.update(writers)
                break
    return groups


def _double(batch: Batch) -> Batch:
    """The batch with its floating-point tensors in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if hasattr(batch, "items"):
        return {key: _double(value) for key, value in batch.items()}
    return tuple(_double(value) for value in batch) if isinstance(batch, tuple | list) else batch


def _order(model: nn.Module, forward: Any) -> list[str]:
    """Names of the modules that hold tensors of their own and run once, in the order in which they run."""
    order: list[str] = []
    owners = [n for n, m in model.named_modules() if n and (m._parameters or m._buffers)]
    handles = [model.get_submodule(n).register_forward_hook(lambda *_, n=n: order.append(n)) for n in owners]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in order if order.count(name) == 1]


def _axes(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs): dimensions of the weight of a linear layer or plain convolution."""
    if is_plain_linear(module):
        return 0, 1
    if is_conv1d(module):
        return 1, 0
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and getattr(module, "groups", 0) == 1:
        return 0, 1
    return None


def _axis(model: nn.Module, name: str, side: int) -> int:
    axes = _axes(model.get_submodule(name))
    assert axes is not None
    return axes[side]


@torch.no_grad()
def _tried(state: Mapping[str, Tensor], places: Sequence[tuple[str, int]], order: Tensor, forward: Any) -> Tensor:
    """The output with these places permuted; they are put back."""
    before = {name: state[name].clone() for name, _ in places}
    try:
        for name, axis in places:
            state[name].copy_(state[name].index_select(axis, order.to(state[name].device)))
        out = forward()
        assert isinstance(out, Tensor)
        return out
    finally:
        for name, tensor in before.items():
            state[name].copy_(tensor)


# Merging -------------------------------------------------------------------------------------------------------------


def merge(
    models: Sequence[Module],
    recipe: str = "average",
    *,
    base: nn.Module | None = None,
    data: Sequence[Any] | None = None,
    share: float | None = None,
    off_diagonal: float | None = None,
    seed: int = 0,
    tokenizer: Any = None,
) -> Module:
    """One network out of several of the same architecture.

    Recipes:

    * "average": the mean of every tensor. For networks of different starts, ``match`` them first.
    * "gram": each linear layer's weight and bias by least squares on the models' own inputs (RegMean, Jin et al. 2023, with
      the bias as one more input); other tensors are averaged. Every model counts the same, however much data it has.
    * "gram-two-sided": the same with the models' output-gradient Grams, so that outputs which matter more to a model weigh
      more.
    * "opcm": one after another, in the order given, each task vector projected away from the leading subspaces of the sum so
      far (OPCM 2025): needs no data.

    Args:
        models: left as they were; the first one's class is the result's.
        recipe: see above.
        base: what all were fine-tuned from; for "opcm".
        data: for the gram recipes, one set of calibration data (as ``collect`` takes it) for every model.
        share: for "opcm", 0.5 by default; see ``project_out``.
        off_diagonal: for the gram recipes, 0.9 by default; see ``merge_by_grams``.
        seed: of the gradients' probes.
        tokenizer: for texts.

    Raises:
        GramianError: an unknown recipe, something it needs is missing or has no use for, or models that differ in names or
            shapes.
    """
    if recipe not in RECIPES:
        raise GramianError(f"merge: recipe {recipe!r}{nearest(recipe, RECIPES)}; expected one of {', '.join(RECIPES)}")
    models = list(models)
    if not models:
        raise GramianError("merge: no models")
    if (base is None) == (recipe == "opcm"):
        raise GramianError(f"merge: recipe {recipe!r} {'needs base=, the model' if base is None else 'takes no base'}")
    if (data is None) == recipe.startswith("gram"):
        raise GramianError(
            f"merge: recipe {recipe!r} "
            + ("needs data=, one set for every model" if data is None else "takes no data; leave it out")
        )
    for name, value, used in (("share", share, recipe == "opcm"), ("off_diagonal", off_diagonal, data is not None)):
        if value is not None and not used:
            raise GramianError(f"merge: recipe {recipe!r} has no use for {name}; leave it out")
    states = [dict(model.state_dict()) for model in models]
    for index, state in enumerate(states):
        for name in states[0] | state:
            found = [tuple(s[name].shape) if name in s else "missing" for s in (states[0], state)]
            if found[0] != found[1]:
                raise GramianError(
                    f"merge: {name} is {found[0]} in model 0 and {found[1]} in model {index}; expected one architecture"
                )
    if base is not None:
        continual = ContinualMerge(
            _floating(base.state_dict()), _linear_names(base), share=0.5 if share is None else share
        )
        for state in states:
            continual.add(_floating(state))
        return _with_state(models[0], continual.merged())
    merged = {
        name: (sum((state[name].double() for state in states), torch.zeros(())) / len(states)).to(tensor.dtype)
        for name, tensor in _floating(states[0]).items()
    }
    if data is not None:
        if len(data) != len(models):
            raise GramianError(f"merge: {len(data)} sets of data for {len(models)} models; expected one for each")
        two_sided = recipe == "gram-two-sided"
        shrunk = 0.9 if off_diagonal is None else off_diagonal
        merged |= dict(_gram_merged(models, data, two_sided, shrunk, seed, tokenizer))
    return _with_state(models[0], merged)


def _gram_merged(
    models: Sequence[nn.Module],
    data: Sequence[Any],
    two_sided: bool,
    off_diagonal: float,
    seed: int,
    tokenizer: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Weights and biases of the linear layers."""
    layers = [find_layers(model, smallest=1).layers for model in models]
    grams = []
    for model, found, own in zip(models, layers, data, strict=True):
        check_finite(found)
        work: Workload = as_workload(model, own, tokenizer)
        objective = work.objective("auto" if two_sided else "none")
        grams.append(
            collect_layers(model, found, work.batches, run=work.run, objective=objective, mask=work.mask, seed=seed)
        )
    for name, module in layers[0].items():
        own_layers = [found[name] for found in layers]
        bias = bias_of(module)
        seen = [gram[name] for gram in grams]
        weights = [
            weight_of(m).double() if b is None else torch.cat([weight_of(m).double(), b.double()[:, None]], 1)
            for m, b in ((m, bias_of(m)) for m in own_layers)
        ]
        inputs = [_moment(gram, bias is not None) for gram in seen]
        outputs = [gram.gram_out() for gram in seen] if two_sided else None
        joined = merge_by_grams(
            weights,
            inputs,
            None if outputs is None else [gram for gram in outputs if gram is not None],
            off_diagonal=off_diagonal,
        ).weight
        if bias is not None:
            yield f"{name}.bias", joined[:, -1].to(bias.dtype)
            joined = joined[:, :-1]
        weight = joined.to(weight_of(module).dtype)
        yield f"{name}.weight", (weight.mT if is_conv1d(module) else weight).contiguous()


def _moment(gram: LayerGrams, bias: bool) -> Tensor:
    """E[x x^T], with a one at the end of x where the layer has a bias."""
    moment = gram.input.moment()
    if not bias:
        return moment
    mean = gram.input.mean[:, None]
    return torch.cat([torch.cat([moment, mean], 1), torch.cat([mean.mT, mean.new_ones(1, 1)], 1)])


def _linear_names(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name in find_layers(model, smallest=1).layers]


def _floating(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point tensors; one that several names share under its first name only."""
    found: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            found.setdefault(tensor.data_ptr(), name)
    return {name: state[name] for name in found.values()}


def _with_state(model: Module, tensors: Mapping[str, Tensor]) -> Module:
    """A copy of `model` with some of its tensors exchanged."""
    made = copy.deepcopy(model)
    made.load_state_dict(dict(tensors), strict=False)
    return made


__all__ = ["find_units", "match", "merge"]
