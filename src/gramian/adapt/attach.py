"""Putting adapters on a model, and what can be done with them there."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gramian.adapt.adapter import Adapter, Context, Start, as_start
from gramian.adapt.gradients import Loss, default_loss, weight_gradients
from gramian.adapt.layer import AdaptedLinear, Edit, base_operator, can_adapt, holdable, layer_shape
from gramian.errors import GramianError, nearest
from gramian.models.walk import matches
from gramian.ops import Operator

if TYPE_CHECKING:
    from gramian.adapt.merge import Merged
    from gramian.models.workload import Workload

Sizes = int | float | Mapping[str, int] | Mapping[str, float]
"""One number, or one for each pattern of layer names; of several patterns that fit a name the longest counts."""


class Adapted:
    """Handle of one adapter on a model; made by ``attach``, ``load`` and ``import_peft``.

    Attributes:
        model: that carries it.
        name: of the adapter; edits of several adapters on one layer are told apart by it.
        layers: the adapted layers, by their name in the model.
        adapters: what each layer's edit was made from, for its penalty, rates and optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: dict[str, AdaptedLinear],
        adapters: dict[str, Adapter],
        wanted: list[tuple[nn.Parameter, bool]],
    ) -> None:
        self.model, self.name, self.layers, self.adapters = model, name, layers, adapters
        self._wanted = wanted
        self._merged: dict[str, nn.Module] = {}

    def __repr__(self) -> str:
        return f"Adapted({self.name!r}, {len(self.layers)} layers, {self.numel} trainable parameters)"

    # What it is made of ----------------------------------------------------------------------------------------------

    @property
    def edits(self) -> dict[str, Edit]:
        """The edit of each layer."""
        return {name: layer.edits[self.name] for name, layer in self.layers.items()}  # type: ignore[misc]

    def delta(self, layer: str) -> Operator:
        """``g (U - U0)`` of a layer, an Operator over the live factors.

        Raises:
            GramianError: no such layer.
        """
        if layer not in self.layers:
            raise GramianError(f"adapter {self.name!r} has no layer {layer!r}{nearest(layer, self.layers)}")
        return self.edits[layer].difference()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter that trains, shared ones once."""
        return list({id(p): p for edit in self.edits.values() for p in edit.trainable().values()}.values())

    @property
    def numel(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.trainable_parameters())

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for any torch optimizer: parameters that share a multiple of `lr` (``Adapter.rates``)."""
        groups: dict[float, dict[int, nn.Parameter]] = {}
        for layer, edit in self.edits.items():
            rates = self.adapters[layer].rates if layer in self.adapters else {}
            for factor, p in edit.trainable().items():
                rate = next((rate for pattern, rate in rates.items() if fnmatch.fnmatchcase(factor, pattern)), 1.0)
                if not any(id(p) in group for group in groups.values()):
                    groups.setdefault(rate, {})[id(p)] = p
        return [{"params": list(group.values()), "lr": lr * rate} for rate, group in groups.items()]

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """The adapter's own optimizer if it has one, else AdamW without weight decay."""
        own = next((a.optimizer for a in self.adapters.values() if a.optimizer is not None), None)
        if own is not None:
            return own(self, lr)
        return torch.optim.AdamW(self.parameter_groups(lr), lr=lr, weight_decay=0.0)

    def penalty(self) -> Tensor:
        """What the adapter adds to the loss; zero if nothing."""
        total = torch.zeros(())
        for layer, edit in self.edits.items():
            penalty = self.adapters[layer].penalty if layer in self.adapters else None
            if penalty is not None:
                total = total.to(edit.update.weight.device) + penalty(edit)
        return total

    def step(self) -> None:
        """Count a step of training: the ramp of the gain goes on. Nothing else moves it."""
        for edit in self.edits.values():
            edit.steps += 1

    # Switching -------------------------------------------------------------------------------------------------------

    def _all(self) -> list[AdaptedLinear]:
        """Every adapted layer of the model, of whatever adapter."""
        found = [module for module in self.model.modules() if isinstance(module, AdaptedLinear)]
        return list({id(layer): layer for layer in (*self.layers.values(), *found)}.values())

    def enable(self) -> None:
        """Let this adapter take part."""
        for layer in self.layers.values():
            layer.off.discard(self.name)
            layer.refresh()
        _fused(self.model)

    def disable(self) -> None:
        """Leave this adapter out: the model's outputs are then bit for bit those without it."""
        for layer in self.layers.values():
            layer.off.add(self.name)
            layer.refresh()
        _fused(self.model)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """``disable`` within a with-block; yields the model."""
        before = {name: self.name in layer.off for name, layer in self.layers.items()}
        self.disable()
        try:
            yield self.model
        finally:
            for name, layer in self.layers.items():
                if not before[name]:
                    layer.off.discard(self.name)
                    layer.refresh()
            _fused(self.model)

    @contextmanager
    def perturbed(self) -> Iterator[nn.Module]:
        """Keep the random masks of ``Adapter.perturb`` in evaluation too: one member of a test-time ensemble a call."""
        for edit in self.edits.values():
            edit.perturbed = True
        try:
            yield self.model
        finally:
            for edit in self.edits.values():
                edit.perturbed = False

    def switch(self, *names: str) -> None:
        """Let exactly these adapters of the model take part, stacked in this order; none for the bare model.

        Raises:
            GramianError: the model has no adapter of that name.
        """
        layers = self._all()
        known = sorted({name for layer in layers for name in layer.order})
        for name in names:
            if name not in known:
                raise GramianError(f"no adapter {name!r}{nearest(name, known)}; the model has {', '.join(known)}")
        for layer in layers:
            layer.order.sort(key=lambda name: names.index(name) if name in names else len(names))
            layer.off = set(layer.order) - set(names)
            layer.refresh()
        _fused(self.model)

    def scale(self, factor: float) -> None:
        """Let the update count `factor` times: 1 as trained, 0 not at all.

        Raises:
            GramianError: not finite.
        """
        if not abs(factor) < float("inf"):
            raise GramianError(f"adapter {self.name!r}: scale {factor}; expected a finite number")
        for edit in self.edits.values():
            edit.factor = float(factor)

    def detach(self) -> nn.Module:
        """Take the adapter off and give the model back as it was, its tensors untouched.

        Raises:
            GramianError: it is merged; unmerge first.
        """
        if self._merged:
            raise GramianError(f"adapter {self.name!r} is merged; call unmerge() before detach()")
        for layer in self.layers.values():
            del layer.edits[self.name]
            layer.order.remove(self.name)
            layer.off.discard(self.name)
            layer.refresh()
            if not layer.order:
                layer.base.train(layer.training)
                exchange(self.model, layer, layer.base)
        for parameter, wanted in self._wanted:
            parameter.requires_grad_(wanted)
        _fused(self.model)
        self.layers, self._wanted = {}, []
        return self.model

    # Merging and files -----------------------------------------------------------------------------------------------

    def merge(self, *, lossy: bool = False, dense: bool = False) -> Merged:
        """Fold all active edits of these layers into plain layers; see ``gramian.adapt.merge.merge``."""
        from gramian.adapt.merge import merge

        return merge(self, lossy=lossy, dense=dense)

    def unmerge(self) -> None:
        """Put the layers with their adapters, and the very bits of the base model, back."""
        from gramian.adapt.merge import unmerge

        unmerge(self)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter; see ``gramian.adapt.files.save``."""
        from gramian.adapt.files import save

        save(self, directory)

    def export_peft(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the adapter for the peft library; see ``gramian.adapt.peft_format.export_peft``."""
        from gramian.adapt.peft_format import export_peft

        export_peft(self, directory, **options)


# Attaching ----------------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    adapter: Adapter | Mapping[str, Adapter],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rank: Sizes = 8,
    alpha: Sizes | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss = default_loss,
    gradients: Mapping[str, Tensor | Operator] | None = None,
    grams: Mapping[str, Any] | None = None,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> Adapted:
    """Put an adapter on the linear layers of a model, in place. No tensor of the model changes.

    Args:
        model: any module; it may carry other adapters, and the new one is stacked on them.
        adapter: the method, or methods by pattern of layer names (the longest pattern that fits counts).
        include: patterns of layer names, shell style; a last part of a name ("q_proj") or of a path ("mlp.*") will do.
            () for all linear layers but those of tied weights and the head of a Hugging Face model (what lies outside its
            base model), which `freeze` freezes with the rest: let it train with ``requires_grad_`` where it is new.
        exclude: patterns to leave out; they win.
        rank: of every layer, or by pattern; all other layers then get none.
        alpha: instead of the adapter's, likewise by pattern.
        data: batches for starts that use the gradient or Grams.
        loss: (model, batch) -> scalar, for the gradient; the model's own by default.
        gradients: ready gradients by layer name, as tensors or Operators, instead of `data`.
        grams: ready Grams by layer name (``gramian.collect``), instead of `data`.
        name: of this adapter on the model.
        seed: of random starts; a layer's start depends on it and on the layer's name alone.
        dtype: of the factors; float32 over half-precision weights, else the weight's, by default.
        freeze: stop every other parameter of the model from training; ``detach`` undoes that.

    Returns:
        The handle. Only ``handle.trainable_parameters()`` train.

    Raises:
        GramianError: a pattern that fits no linear layer (nearest names), a rank that a layer does not allow, NaN or Inf
            in a weight, a start that could never learn, missing statistics, a name that is taken.
    """
    check_name(name)
    by_pattern = {"*": adapter} if isinstance(adapter, Adapter) else dict(adapter)
    if isinstance(adapter, Mapping) and not include:
        include = tuple(by_pattern)
    layers = select(model, include, exclude)
    chosen = {layer: _of(by_pattern, layer) for layer in layers}
    ranks = _sizes("rank", rank, layers)
    if isinstance(rank, Mapping):
        layers = {layer: module for layer, module in layers.items() if ranks[layer] is not None}
    alphas = _sizes("alpha", alpha, layers) if alpha is not None else {}
    for layer, module in layers.items():
        if isinstance(module, AdaptedLinear) and name in module.edits:
            raise GramianError(f"layer {layer}: has an adapter {name!r} already; detach it or choose another name")
        _check_rank(layer, layer_shape(module), ranks[layer], _known(chosen[layer], layer).combine)
        if alphas.get(layer) is not None and not 0 < alphas[layer] < float("inf"):
            raise GramianError(f"layer {layer}: alpha {alphas[layer]}; expected a positive finite number")
    needs = {layer: _known(chosen[layer], layer).needs for layer in layers}
    gradients, grams = _statistics(model, layers, needs, ranks, data, loss, gradients or {}, grams, seed)

    roles: dict[str, list[str]] = {}
    for layer in layers:
        roles.setdefault(layer.rpartition(".")[2], []).append(layer)
    shared: dict[Hashable, tuple[nn.Module, str]] = {}
    edits: dict[str, Edit] = {}
    for layer, module in layers.items():
        method = _known(chosen[layer], layer)
        base = module.base if isinstance(module, AdaptedLinear) else module
        weight = base_operator(base).dense().detach()
        check_weight(layer, weight)
        peers = roles[layer.rpartition(".")[2]]
        size = int(ranks[layer])
        context = Context(
            layer,
            layer_shape(base),
            size,
            method.gain(size, alphas.get(layer)),
            torch.Generator().manual_seed(layer_seed(seed, layer)),
            layer.rpartition(".")[2],
            peers.index(layer),
            len(peers),
            gradients.get(layer),
            *_second_moments(None if grams is None or layer not in grams else grams[layer]),
        )
        kind = dtype or (torch.float32 if weight.element_size() < 4 else weight.dtype)
        start = as_start(method.start(weight.to(kind), context), layer)
        edits[layer] = _edit(layer, start, method, context, shared, weight.device, kind)
    return place(model, name, edits, {layer: _known(chosen[layer], layer) for layer in edits}, freeze=freeze)


def check_name(name: str) -> None:
    """Raise a GramianError unless `name` can name an adapter."""
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise GramianError(f"adapter name {name!r}; expected a plain identifier")


def _known(adapter: Adapter | None, layer: str) -> Adapter:
    if adapter is None:
        raise GramianError(
            f"layer {layer}: no pattern of the mapping of adapters fits it; add one or exclude the layer"
        )
    return adapter


def _edit(
    layer: str,
    start: Start,
    method: Adapter,
    context: Context,
    shared: dict[Hashable, tuple[nn.Module, str]],
    device: torch.device,
    dtype: torch.dtype,
) -> Edit:
    """The edit of one layer, its shared factors taken from the layers before."""
    own = start.start is start.update
    update = holdable(start.update.to(device, dtype))
    keys: dict[str, Hashable] = {}
    for pattern, share in method.share.items():
        for factor in _factors(layer, "share", pattern, update.factors()):
            keys.setdefault(factor, (share(context), factor, tuple(update.factors()[factor].shape)))
    known = {factor: shared[key][0] for factor, key in keys.items() if key in shared}
    update = update.replace(**{f: holder.weight.detach().view(keys[f][2]) for f, holder in known.items()})  # type: ignore
    origin = update if own else None if start.start is None else start.start.to(device, dtype)
    wanted = {f for pattern in method.trainable for f in _factors(layer, "trainable", pattern, update.factors())}
    for pattern in method.rates:
        _factors(layer, "rates", pattern, update.factors())
    try:
        edit = Edit(
            dataclasses.replace(
                start, update=update, start=origin, biases=tuple(b.to(device, dtype) for b in start.biases)
            ),
            context.shape,
            combine=method.combine,
            base_gain=context.gain,
            rank=context.rank,
            ramp=method.ramp,
            trainable=wanted & update.trainable().keys(),
            dropout=method.dropout,
            activation=method.activation,
            perturb=method.perturb,
        )
    except GramianError as error:
        raise GramianError(f"layer {layer}: {error}") from error
    for what, op in (("update", edit.update.op), ("start", edit.start.op if edit.start else None)):
        for factor, value in () if op is None else op.factors().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise GramianError(
                    f"layer {layer} ({context.shape[0]} x {context.shape[1]}): the {what}'s factor {factor!r} is not "
                    f"finite ({float(value[~torch.isfinite(value)][0])}); the weight may be singular or empty"
                )
    for factor, key in keys.items():
        if factor in known:
            edit.share(factor, known[factor])
        else:
            shared[key] = (edit.update._holder(factor), layer)
    return edit


def _factors(layer: str, axis: str, pattern: str, factors: Mapping[str, Tensor]) -> list[str]:
    found = [factor for factor in factors if fnmatch.fnmatchcase(factor, pattern)]
    if not found:
        raise GramianError(
            f"layer {layer}: {axis} pattern {pattern!r} fits no factor of the update{nearest(pattern, factors)}; "
            f"found {', '.join(factors)}"
        )
    return found


def place(
    model: nn.Module,
    name: str,
    edits: Mapping[str, Edit],
    adapters: Mapping[str, Adapter],
    *,
    freeze: bool = True,
    probe: bool = True,
) -> Adapted:
    """Put ready edits on a model.

    Raises:
        GramianError: an edit that no gradient can ever reach (`probe`).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, AdaptedLinear] = {}
    for layer, edit in edits.items():
        found = modules[layer]
        layers[layer] = found if isinstance(found, AdaptedLinear) else AdaptedLinear(found)
        if probe and edit.trainable():
            _probe(layer, layers[layer], edit)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    if freeze:
        model.requires_grad_(False)
    for layer, edit in edits.items():
        wrapper = layers[layer]
        if modules[layer] is not wrapper:
            exchange(model, modules[layer], wrapper)
        edit.train(wrapper.training)
        wrapper.edits[name] = edit
        wrapper.order.append(name)
        wrapper.refresh()
    _fused(model)
    return Adapted(model, name, layers, dict(adapters), wanted if freeze else [])


def _probe(layer: str, wrapper: AdaptedLinear, edit: Edit) -> None:
    """Refuse an edit whose trainable factors all have a gradient of exactly zero, for any input: it would never move."""
    out, in_ = wrapper.out_features, wrapper.in_features
    trial = AdaptedLinear(wrapper.base)
    trial.active = (edit,)
    ramp, edit.ramp, training = edit.ramp, 0, edit.training
    edit.eval()
    like = edit.update.weight
    generator = torch.Generator().manual_seed(0)
    try:
        base = wrapper.weight
        dtype = base.dtype if isinstance(base, Tensor) and base.is_floating_point() else like.dtype
        x = torch.randn(4, in_, generator=generator).to(like.device, dtype)
        with torch.enable_grad():
            y = trial.run(x, 1).float()
            cotangent = torch.randn(4, out, generator=generator).to(y)
            total = (y * cotangent).sum()
            grads = torch.autograd.grad(total, list(edit.trainable().values()), allow_unused=True)
    finally:
        edit.ramp = ramp
        edit.train(training)
    if not any(g is not None and bool((g != 0).any()) for g in grads):
        norm = float(base_operator(wrapper.base).dense().norm())
        raise GramianError(
            f"layer {layer} ({out} x {in_}, weight of norm {norm:.3g}): every trainable factor of this start has a gradient "
            "of exactly 0, so it would never learn; leave the layer out or use a start that does not depend on the weight"
        )


def select(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The layers to adapt by name, adapted ones as they are, in module order; each module once.

    Raises:
        GramianError: a pattern that fits no linear layer (with the nearest names), or nothing left.
    """
    linears: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    from gramian.nn.structured import Structured

    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, AdaptedLinear | Structured):
            inside = (*inside, name + ".")
        if name and (isinstance(module, AdaptedLinear) or can_adapt(module)):
            linears[name] = module
    if not linears:
        raise GramianError(f"{type(model).__name__} has no linear layer to adapt")
    for pattern in (*include, *exclude):
        if not any(fits(name, pattern) for name in linears):
            last = {part for name in linears for part in (name, name.rpartition(".")[2])}
            other = [type(m).__name__ for name, m in model.named_modules() if name and fits(name, pattern)]
            what = f"no linear layer (only {', '.join(sorted(set(other)))})" if other else "no layer"
            raise GramianError(f"pattern {pattern!r} fits {what}{nearest(pattern, last)}; {len(linears)} linear layers")
    if not include:
        owners = _owners(model)
        linears = {n: m for n, m in linears.items() if not _in_head(model, n) and not _tied(m, owners)} or linears
    found = {
        name: module
        for name, module in linears.items()
        if (not include or any(fits(name, p) for p in include)) and not any(fits(name, p) for p in exclude)
    }
    if not found:
        raise GramianError("no layer is left after include and exclude")
    return found


def fits(name: str, pattern: str) -> bool:
    """Whether a dotted name, or the end of it from a dot on, fits a shell-style pattern, or lies in a module that does."""
    return matches(name, (pattern, "*." + pattern))


def _in_head(model: nn.Module, name: str) -> bool:
    """Whether a layer of a Hugging Face model lies outside its base model: an output or classification layer."""
    base = getattr(model, "base_model_prefix", "")
    inside = isinstance(base, str) and base and isinstance(getattr(model, base, None), nn.Module)
    return bool(inside) and not name.startswith(f"{base}.")


def _owners(model: nn.Module) -> dict[int, int]:
    count: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                count[id(p)] = count.get(id(p), 0) + 1
    return count


def _tied(module: nn.Module, owners: Mapping[int, int]) -> bool:
    return any(p is not None and owners.get(id(p), 0) > 1 for p in module._parameters.values())


def _of(by_pattern: Mapping[str, Any], name: str) -> Any:
    found = [pattern for pattern in by_pattern if fits(name, pattern)]
    return by_pattern[max(found, key=len)] if found else None


def _sizes(what: str, given: Sizes, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The number for each layer; None where no pattern fits."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(layers, given)
    for pattern, value in given.items():
        if not any(fits(name, pattern) for name in layers):
            last = {part for name in layers for part in (name, name.rpartition(".")[2])}
            raise GramianError(f"{what} {pattern!r}: {value} fits none of the chosen layers{nearest(pattern, last)}")
    return {name: _of(given, name) for name in layers}


def _check_rank(layer: str, shape: tuple[int, int], rank: Any, combine: str) -> None:
    out, in_ = shape
    limits = {"left": out, "insert": out, "right": in_, "two_sided": max(out, in_)}
    most = limits.get(combine, min(out, in_))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise GramianError(f"layer {layer} ({out} x {in_}): rank {rank}; expected a whole number from 1 to {most}")


def check_weight(layer: str, weight: Tensor) -> None:
    """Raise on a weight that is not finite or has no values.

    Raises:
        GramianError: names the layer, its shape, how many entries and the first of them.
    """
    shape = f"{weight.shape[0]} x {weight.shape[1]}"
    if weight.is_meta:
        raise GramianError(f"layer {layer} ({shape}) is on the meta device; load the model's weights first")
    bad = ~torch.isfinite(weight)
    if bool(bad.any()):
        raise GramianError(
            f"layer {layer} ({shape}): {int(bad.sum())} entries of its weight are not finite (first: "
            f"{float(weight[bad][0])}); repair the checkpoint or leave the layer out with exclude"
        )


def layer_seed(seed: int, layer: str) -> int:
    """A seed for one layer of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{layer}".encode()).digest()[:7], "big")


def _second_moments(grams: Any) -> tuple[Tensor | None, Tensor | None]:
    """(in, in) and (out, out) of a layer's ``LayerGrams``; a tensor is the first of the two."""
    if grams is None or isinstance(grams, Tensor):
        return grams, None
    return grams.input.moment(), None if grams.gradient is None else grams.gram_out()


def start_grams(
    model: nn.Module, layers: Mapping[str, nn.Module], work: Workload, *, outputs: bool, seed: int
) -> Mapping[str, Any]:
    """Grams that a start uses, by layer; those of the outputs' gradients only with `outputs`."""
    from gramian.grams.collect import collect_layers

    objective = work.objective("features" if outputs else "none")
    found = collect_layers(model, layers, work.batches, run=work.run, objective=objective, mask=work.mask, seed=seed)
    return found.layers


def _statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    needs: Mapping[str, frozenset[str]],
    ranks: Mapping[str, int],
    data: Iterable[Any] | None,
    loss: Loss,
    gradients: Mapping[str, Tensor | Operator],
    grams: Mapping[str, Any] | None,
    seed: int,
) -> tuple[Mapping[str, Tensor | Operator], Mapping[str, Any] | None]:
    """Gradients and Grams that the starts use, taken from the data where they were not given."""
    wants = [n for n in layers if needs[n] & {"gradient", "sketch"}]
    missing = [name for name in wants if name not in gradients]
    batches = None if data is None else list(data)
    if missing:
        if batches is None:
            raise GramianError(f"layer {missing[0]}: its start uses the gradient; pass data=... (or gradients=...)")
        from gramian.adapt.initial import gradient_sketches

        whole = {name: layers[name] for name in missing if "gradient" in needs[name]}
        thin = {name: layers[name] for name in missing if name not in whole}
        if whole:
            gradients = {**gradients, **weight_gradients(model, whole, batches, loss)}
        if thin:  # 2 r singular vectors: what starts at a point of rank r can use
            most = {name: 2 * ranks[name] for name in thin}
            gradients = {**gradients, **gradient_sketches(model, thin, batches, rank=most, loss=loss, seed=seed)}
    for name in wants:
        known = gradients[name]
        if tuple(known.shape) != layer_shape(layers[name]):
            raise GramianError(f"layer {name}: gradient {tuple(known.shape)}; expected {layer_shape(layers[name])}")
    if any(needs[name] & {"gram_in", "gram_out"} for name in layers) and grams is None:
        if batches is None:
            raise GramianError("this adapter's start uses Grams; pass data=... (or grams=gramian.collect(...))")
        from gramian.models.workload import tensor_workload

        wanted = {name: module for name, module in layers.items() if needs[name] & {"gram_in", "gram_out"}}
        outputs = any("gram_out" in needs[name] for name in wanted)
        grams = start_grams(model, wanted, tensor_workload(batches), outputs=outputs, seed=seed)
    for name in layers:
        if needs[name] & {"gram_in", "gram_out"} and (grams is None or name not in grams):
            raise GramianError(
                f"layer {name}: its start uses Grams and there is none for it{nearest(name, grams or ())}"
            )
    return gradients, grams


# The model's own modules ---------------------------------------------------------------------------------------------


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at every name that `old` has in `model`."""
    for module in list(model.modules()):
        if module is new:
            continue
        for key, child in list(module._modules.items()):
            if child is old:
                module._modules[key] = new


def _fused(model: nn.Module) -> None:
    """PyTorch's fused encoder kernels read ``linear1.weight`` past the layer's forward: off where an edit is active."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            live = any(isinstance(m, AdaptedLinear) and m.active for m in module.modules())
            before = module.__dict__.setdefault("_gramian_fused", module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0 if live else before
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            live = any(isinstance(m, AdaptedLinear) and m.active for m in module.modules())
            before = module.__dict__.setdefault("_gramian_fused", module.use_nested_tensor)
            module.use_nested_tensor = False if live else before


__all__ = ["Adapted", "attach", "place", "select"]
