"""The three calls of the Python interface: collect, plan, compress."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor, nn

from gramian.compression import (
    Built,
    Entry,
    Layer,
    Plan,
    Recipe,
    build_entry,
    make_plan,
    plan_recipe,
    resolve_recipe,
    resolve_structures,
)
from gramian.compression.options import check_measurable
from gramian.compression.plan import check_keep
from gramian.compression.plan_checks import check_groups, check_plan, check_sizes
from gramian.errors import GramianError
from gramian.grams import Grams, Joint, LayerGrams, collect_layers
from gramian.models.groups import find_groups
from gramian.models.heal import NOTHING_TO_HEAL, Healing, heal
from gramian.models.swap import replace_embedding, replace_linear
from gramian.models.walk import Found, bias_of, check_finite, find_heads, find_layers, weight_of
from gramian.models.workload import (
    Workload,
    first_tensor,
    is_classifier,
    longest_text,
    takes_padding,
    tensor_workload,
    text_workload,
)
from gramian.nn import prepare

Module = TypeVar("Module", bound=nn.Module)
Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""


def as_workload(model: nn.Module, data: Any, tokenizer: Any = None) -> Workload:
    """Calibration data in any accepted form, as a Workload.

    Args:
        model: a Hugging Face text model if `data` is text.
        data: a Workload; texts (then a tokenizer is needed); or batches: tensors, tuples or mappings.
        tokenizer: of a Hugging Face model.

    Raises:
        GramianError: no data, one text or batch where a list is due, or text without a tokenizer.
    """
    if isinstance(data, Workload):
        return data
    if isinstance(data, str | bytes):
        raise GramianError("calibration data: found one string; expected a list of texts")
    if isinstance(data, Tensor | Mapping):
        raise GramianError(
            f"calibration data: found one {type(data).__name__}; expected a list of batches, e.g. [batch]"
        )
    items = list(data)
    if not items:
        raise GramianError("calibration data is empty")
    if isinstance(items[0], str):
        if tokenizer is None:
            raise GramianError("calibration data is text: pass the model's tokenizer as tokenizer=...")
        return text_workload(
            tokenizer,
            items,
            batch_size=32 if takes_padding(model) else 1,
            longest=longest_text(model),
            language_model=is_language_model(model),
            classifier=is_classifier(model),
        )
    return tensor_workload(items)


def is_language_model(model: nn.Module) -> bool:
    """Whether the model answers with logits over a vocabulary at every token (a causal or masked language model)."""
    name = type(model).__name__
    return any(part in name for part in ("ForCausalLM", "LMHeadModel", "ForMaskedLM"))


def collect(
    model: nn.Module,
    data: Any,
    *,
    objective: str = "auto",
    tokenizer: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    seed: int = 0,
    places: Sequence[int] | None = None,
    centres: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Grams:
    """Input and output-gradient Grams of every linear layer and, if asked, embedding, without labels, in one pass.

    Args:
        model: any module; left as it was.
        data: texts (with `tokenizer`), batches, or a Workload.
        objective: "features" (random probes of the output), "lm" (labels sampled from the model), "none" (no backward
            pass), or "auto".
        tokenizer: for texts.
        include: shell-style patterns of layer names; () for all, but for the heads of a model of transformers: linear layers
            outside its repeated blocks (poolers, classifiers, output layers).
        exclude: patterns to leave out; they win.
        embeddings: also embeddings of many rows (words; not positions) that no other layer shares; a plan made from the
            result then chooses a structure for them too.
        seed: of the random probes.
        places: of these batches among all, where `data` is a share; 0, 1, ... by default.
        centres: ``Grams.centres()`` of another shard, for an exact ``merge``.
        progress: called with ("collect", sequences done, sequences in all).

    Raises:
        GramianError: bad data, NaN or Inf in weights or activations (the layer is named), unknown patterns.
    """
    work = as_workload(model, data, tokenizer)
    found = _chosen(model, include, exclude, embeddings)
    check_finite({**found.layers, **found.embeddings})
    sizes = work.sizes()
    done = iter(_running_sum(sizes))
    grams = collect_layers(
        model,
        {**found.embeddings, **found.layers},
        work.batches,
        run=work.run,
        objective=work.objective(objective),
        mask=work.mask,
        seed=seed,
        places=places,
        centres=centres,
        progress=None if progress is None else lambda _: progress("collect", next(done), sum(sizes)),
    )
    small = work.sample(2)
    grams.joints = find_groups(
        model,
        found.layers,
        lambda: first_tensor(work.run(model, small)).float(),
        {name: layer.site for name, layer in grams.layers.items()},
    )
    return grams


def _chosen(model: nn.Module, include: Sequence[str], exclude: Sequence[str], embeddings: bool = False) -> Found:
    heads = find_heads(model) if not include and hasattr(model, "base_model_prefix") else ()
    return find_layers(model, include=include, exclude=(*exclude, *heads), embeddings=embeddings)


def _running_sum(sizes: Sequence[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        yield total


def planning_layers(model: nn.Module, grams: Grams) -> dict[str, Layer]:
    """The layers that `grams` is about, as the planner sees them.

    Raises:
        GramianError: a layer that `model` does not have.
    """
    modules = dict(model.named_modules())
    missing = [name for name in grams if name not in modules]
    if missing:
        raise GramianError(f"layer {missing[0]} is in the Grams but not in the model; collect from this model")
    return {name: as_layer(name, modules[name], grams[name]) for name in grams}


def as_layer(name: str, module: nn.Module, grams: LayerGrams | None = None) -> Layer:
    """A linear layer or embedding as the planner sees it."""
    return Layer(name, weight_of(module), bias_of(module), grams, isinstance(module, nn.Embedding))


def plan(
    model: nn.Module,
    grams: Grams,
    *,
    keep: float = 0.5,
    cost: str = "params",
    structures: Sequence[str] | str = "auto",
    progress: Progress | None = None,
) -> Plan:
    """The structure and size of every layer that lose least within the budget.

    Args:
        model: what `grams` was collected from.
        grams: from ``collect``.
        keep: share of the layers' cost to keep, above 0 and at most 1.
        cost: "params", "bytes", "flops" or "latency".
        structures: what may compete, by name; dense always does.
        progress: called with ("plan", curves done, curves in all).

    Raises:
        GramianError: bad arguments, or a budget out of reach.
    """
    layers = planning_layers(model, grams)
    count = len(layers)
    return make_plan(
        layers,
        grams.joints,
        keep=keep,
        cost=cost,
        structures=structures,
        progress=None if progress is None else lambda done: progress("plan", min(done, count), count),
    )


def build_all(chosen: Plan, layers: Mapping[str, Layer], threads: int = 2) -> Iterator[tuple[int, Entry, Built]]:
    """Make every entry of a plan, in order; a few are made side by side."""
    check_plan(chosen, layers)
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        jobs = [pool.submit(build_entry, entry, layers) for entry in chosen.entries]
        for index, (entry, job) in enumerate(zip(chosen.entries, jobs, strict=True)):
            yield index, entry, job.result()


def apply_built(model: nn.Module, built: Built) -> None:
    """Put what an entry made into the model, in place."""
    for name, (op, bias) in built.layers.items():
        if isinstance(model.get_submodule(name), nn.Embedding):
            replace_embedding(model, name, op)
        else:
            replace_linear(model, name, op, bias)


def compress(
    model: Module,
    data: Any = None,
    *,
    recipe: str = "auto",
    keep: float = 0.5,
    cost: str | None = None,
    structures: Sequence[str] | str = "auto",
    objective: str = "auto",
    heal_steps: int = 0,
    plan: Plan | None = None,
    grams: Grams | None = None,
    tokenizer: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Module:
    """A smaller copy of `model`: collect, plan, fit and, if asked, heal, in one call.

    Args:
        model: any module; left as it was.
        data: calibration texts, batches or a Workload; may be left out when `grams` is given and nothing is healed, or by a
            recipe that needs none.
        recipe: a published way to do it, by name (``gramian recipes`` lists them), or "auto": everything that the cost
            allows competes. Not used when `plan` is given.
        keep: see ``plan``; not used when `plan` is given.
        cost: likewise; by default "params", or what the recipe lowers.
        structures: see ``plan``; only for recipe "auto".
        objective: see ``collect``; not used when `grams` is given.
        heal_steps: steps of distillation against `model` after fitting (of a recipe's own training, where it has one).
        plan: a ready plan, perhaps edited by hand.
        grams: ready Grams of `model`.
        tokenizer: for texts.
        include: shell-style patterns of layer names; () for all.
        exclude: patterns to leave out; they win.
        embeddings: see ``collect``.
        seed: makes the run repeatable.
        progress: called with (stage, done, total).

    Returns:
        The compressed copy, all of its linear layers running as planned (``gramian.prepare``). Save it with ``gramian.save``
        or, for a Hugging Face model, ``gramian.save_huggingface``.

    Raises:
        GramianError: bad input; what the recipe cannot do; see the stages.
    """
    if isinstance(data, Plan):  # gramian.compress(model, plan, grams=grams)
        data, plan = None, data
    chosen = resolve_recipe(recipe)
    check_keep(keep)
    if heal_steps < 0:
        raise GramianError(f"heal_steps {heal_steps}: expected 0 or more")
    if grams is not None and (include or exclude or embeddings):
        raise GramianError("include, exclude and embeddings choose what is collected; leave them out beside grams=...")
    if plan is None:
        choices = {"include": include, "exclude": exclude, "embeddings": embeddings, "objective": objective}
        cost = chosen.check(cost, structures, **choices)
        resolve_structures(chosen.options(structures)["structures"], cost)
        check_measurable(cost)
        objective = chosen.objective(objective)
    elif grams is None:  # as far as it can be told before the long work
        modules = _chosen(model, include, exclude, embeddings)
        check_sizes(plan, {n: as_layer(n, m) for n, m in (*modules.embeddings.items(), *modules.layers.items())})
    work = None if data is None else as_workload(model, data, tokenizer)
    if chosen.run and plan is None:
        made: Module = called(chosen.run)(
            model, needed(work), keep=keep, cost=cost, heal_steps=heal_steps, seed=seed, progress=progress
        )
        return made
    only = chosen.layers if plan is None else "linear"
    joints: Sequence[Joint] = []
    if grams is not None:
        layers, joints = planning_layers(model, grams), grams.joints
    elif chosen.needs == "nothing" and plan is None:
        found = _chosen(model, include, exclude)
        check_finite(found.layers)
        layers = {name: as_layer(name, module) for name, module in found.layers.items()}
    else:
        if only == "embeddings":
            include = list(_chosen(model, include, exclude, True).embeddings)
            if not include:
                raise GramianError(
                    f"recipe {recipe} is for embeddings of words; this model has none to factor (tied ones cannot be)"
                )
        grams = collect(
            model,
            needed(work),
            objective=objective,
            include=include,
            exclude=exclude,
            embeddings=embeddings or only == "embeddings",
            seed=seed,
            progress=progress,
        )
        layers, joints = planning_layers(model, grams), grams.joints
    if plan is not None:
        check_sizes(plan, layers)
        check_groups(plan, joints)
    else:
        noise = sensitivities(chosen, model, work, layers, seed=seed, progress=progress)
        plan = plan_recipe(chosen, layers, joints, keep=keep, cost=cost, structures=structures, sensitivity=noise)
        heal_steps = heal_steps or chosen.steps
    small = copy.deepcopy(model)
    changed: list[str] = []
    for index, entry, built in build_all(plan, layers):
        if entry.structure != "dense":
            apply_built(small, built)
            changed += entry.layers
        if progress is not None:
            progress("fit", index + 1, len(plan.entries))
    if heal_steps and changed:
        if work is None:
            raise GramianError("healing needs calibration data")
        if not train(chosen, small, model, changed, work, Healing(steps=heal_steps, seed=seed), progress=progress):
            warnings.warn(NOTHING_TO_HEAL, stacklevel=2)
    return prepare(small, recast=False)


def needed(work: Workload | None) -> Workload:
    """The workload, which must be there.

    Raises:
        GramianError: it is not.
    """
    if work is None:
        raise GramianError("compress needs calibration data, or the Grams of an earlier collect (grams=...)")
    return work


def called(path: str) -> Callable[..., Any]:
    """The function "module:name" of a recipe."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def sensitivities(
    recipe: Recipe,
    model: nn.Module,
    work: Workload | None,
    layers: Mapping[str, Layer],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float] | None:
    """What noise in each layer does to the model, for a recipe that divides the budget by it; else None.

    Raises:
        GramianError: it does, and there is no data.
    """
    if recipe.allocation not in ("measured", "entropic"):
        return None
    from gramian.models.depth import block_influence
    from gramian.models.sensitivity import measure

    if work is None:
        raise GramianError(f"recipe {recipe.name} measures the layers' sensitivities and needs calibration data")
    if recipe.allocation == "entropic":
        return block_influence(model, work, list(layers))
    tell = None if progress is None else lambda done: progress("measure", done, len(layers))
    return measure(model, work, list(layers), seed=seed, progress=tell)


def train(
    recipe: Recipe,
    small: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    work: Workload,
    settings: Healing,
    *,
    progress: Progress | None = None,
) -> list[tuple[int, float]]:
    """What follows the fit: the recipe's own training, or healing. Changes `small` in place; (step, loss) of every step."""
    tell = None if progress is None else lambda step, _: progress("heal", step + 1, settings.steps)
    if not recipe.train:
        return heal(small, model, names, work, settings, progress=tell)
    losses: list[tuple[int, float]] = called(recipe.train)(
        small, model, names, work, steps=settings.steps, seed=settings.seed, progress=tell
    )
    return losses


__all__ = ["as_workload", "collect", "compress", "plan"]
