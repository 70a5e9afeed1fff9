"""Adapters on disk: safetensors and JSON, with a fingerprint of the base model that is checked on load.

A file holds values, never the recipe that made them: a start that took random numbers, data or a decomposition is read
back bit for bit and not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian import __version__
from gramian.adapt.adapter import Adapter, Start
from gramian.adapt.attach import check_name, place
from gramian.adapt.layer import AdaptedLinear, Edit, base_operator, can_adapt, layer_shape
from gramian.errors import GramianError, nearest
from gramian.files import atomic_directory
from gramian.ops import Operator, from_config

if TYPE_CHECKING:
    from gramian.adapt.attach import Adapted

SCHEMA = 1
"""Version of the layout; a larger one is refused."""
WEIGHTS = "adapter.safetensors"
DESCRIPTION = "adapter.json"


def save(adapted: Adapted, directory: str | os.PathLike[str]) -> None:
    """Write an adapter, atomically; the same adapter gives the same bytes. An array that layers share is stored once.

    Raises:
        GramianError: the directory is not empty or cannot be written, or a factor is not finite.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[int, str] = {}
    layers: dict[str, Any] = {}
    for name, edit in adapted.edits.items():
        parts: list[tuple[str, Tensor, Tensor]] = []
        for part, held in (("update", edit.update), ("start", edit.start)):
            if held is not None:
                op = held.op
                for factor, value in op.factors().items():
                    weight = held._holder(factor).weight
                    assert isinstance(weight, Tensor)
                    parts.append((f"{name}.{part}.{factor}", value, weight))
        parts += [(f"{name}.biases.{i}", bias, bias) for i, bias in enumerate(edit.biases)]
        for key, value, owner in parts:
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise GramianError(f"{key} holds NaN or Inf; the adapter is damaged, train it again")
            if id(owner) in owners:
                shared[key] = owners[id(owner)]
            else:
                owners[id(owner)] = key
                tensors[key] = value.detach().cpu().contiguous().clone()
        layers[name] = {
            "update": edit.update.op.config(),
            "start": None if edit.start is None else edit.start.op.config(),
            "biases": len(edit.biases),
            "trainable": sorted(edit.training_factors),
            **{key: getattr(edit, key) for key in _SETTINGS},
            "base": fingerprint(adapted.layers[name].base),
        }
    recipes = {adapter.recipe for adapter in adapted.adapters.values()}
    description = {
        "schema": SCHEMA,
        "gramian_version": __version__,
        "name": adapted.name,
        "recipe": recipes.pop() if len(recipes) == 1 else "",
        "layers": layers,
        "shared": shared,
    }
    with atomic_directory(directory) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")


_SETTINGS = ("combine", "base_gain", "rank", "ramp", "steps", "factor", "dropout", "activation")


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    adapter: Adapter | None = None,
    check: bool = True,
    freeze: bool = True,
) -> Adapted:
    """Attach what ``save`` wrote to the model it was trained on.

    Args:
        model: the base model; it may carry other adapters.
        directory: from ``save``.
        name: of the adapter on the model; the stored one by default.
        adapter: the method, to train on with its penalty, rates, random masks and optimizer, which are code and not in
            the file.
        check: refuse a base model whose weights are not those that the adapter was trained on.
        freeze: as in ``attach``.

    Raises:
        GramianError: files missing or damaged, a newer format, layers that the model lacks or that have another shape, a
            base model with other weights.
    """
    folder = Path(directory)
    description = read_json(folder / DESCRIPTION, "an adapter of gramian")
    schema, layers, shared = (description.get(key) for key in ("schema", "layers", "shared"))
    if not isinstance(schema, int) or not isinstance(layers, Mapping) or not isinstance(shared, Mapping):
        raise GramianError(f"{folder / DESCRIPTION} is damaged: expected 'schema', 'layers' and 'shared'")
    if schema > SCHEMA:
        raise GramianError(
            f"{folder / DESCRIPTION}: schema {schema}, written by gramian {description.get('gramian_version')}; this is "
            f"gramian {__version__}, which reads up to {SCHEMA}: pip install -U gramian"
        )
    tensors = read_tensors(folder / WEIGHTS)
    for key, source in shared.items():
        if source not in tensors:
            raise GramianError(f"{folder / WEIGHTS}: tensor {source!r} is missing")
        tensors[key] = tensors[source]
    name = name or str(description.get("name"))
    bases = find_bases(model, list(layers), name)
    different: list[str] = []
    edits: dict[str, Edit] = {}
    for layer, spec in layers.items():
        edits[layer] = _edit(folder, layer, spec, tensors, bases[layer], adapter)
        if check and spec["base"] != fingerprint(bases[layer]):
            different.append(layer)
    left = [key for key in tensors if key not in shared]
    used = {f"{layer}.{key}" for layer, edit in edits.items() for key in _keys(edit)}
    surplus = [key for key in left if key not in used]
    if surplus:
        raise GramianError(f"{folder / WEIGHTS}: surplus tensor {surplus[0]!r}{nearest(surplus[0], used)}")
    if different:
        first = different[0]
        stored, now = layers[first]["base"], fingerprint(bases[first])
        what = f"dtype {now['dtype']}, not {stored['dtype']}" if now["dtype"] != stored["dtype"] else "other weights"
        raise GramianError(
            f"{folder}: the adapter was trained on another base model: {len(different)} of {len(layers)} layers differ, first "
            f"{first} ({what}); load the right base, or pass check=False"
        )
    for key, source in shared.items():
        owner, other = _locate(edits, source), _locate(edits, key)
        if owner and other:
            other[0].share(other[1], owner[0].update._holder(owner[1]))
    return place(model, name, edits, dict.fromkeys(edits, adapter) if adapter else {}, freeze=freeze, probe=False)


def _keys(edit: Edit) -> list[str]:
    held = [("update", edit.update), ("start", edit.start)]
    keys = [f"{part}.{factor}" for part, h in held if h is not None for factor in h._shapes]
    return keys + [f"biases.{i}" for i in range(len(edit.biases))]


def _locate(edits: Mapping[str, Edit], key: str) -> tuple[Edit, str] | None:
    """The edit and the factor of its update that a tensor's name stands for."""
    for layer, edit in edits.items():
        factor = key.removeprefix(f"{layer}.update.")
        if factor != key and factor in edit.update._shapes:
            return edit, factor
    return None


def _edit(
    folder: Path, layer: str, spec: Any, tensors: Mapping[str, Tensor], base: nn.Module, adapter: Adapter | None
) -> Edit:
    def operator(part: str) -> Operator | None:
        if spec[part] is None:
            return None
        prefix = f"{layer}.{part}."
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        return from_config(spec[part], own)

    shape = layer_shape(base)
    try:
        update, start = operator("update"), operator("start")
        if update is None:
            raise GramianError("the update is missing")
        biases = tuple(tensors[f"{layer}.biases.{i}"] for i in range(spec["biases"]))
        unknown = set(spec["trainable"]) - set(update.factors())
        if unknown:
            raise GramianError(f"trainable factors {sorted(unknown)}; found {', '.join(update.factors())}")
        settings = {key: spec[key] for key in _SETTINGS if key not in ("steps", "factor")}
        device = base_device(base)
        edit = Edit(
            Start(update.to(device), None if start is None else start.to(device), tuple(b.to(device) for b in biases)),
            shape,
            trainable=spec["trainable"],
            perturb=None if adapter is None else adapter.perturb,
            **settings,
        )
        edit.steps, edit.factor = int(spec["steps"]), float(spec["factor"])
        if not isinstance(spec["base"], Mapping) or "dtype" not in spec["base"]:
            raise KeyError("base")
    except GramianError as error:
        raise GramianError(f"{folder}: layer {layer} ({shape[0]} x {shape[1]}): {error}") from error
    except KeyError as error:
        raise GramianError(f"{folder}: layer {layer}: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise GramianError(f"{folder}: layer {layer}: the description is damaged ({error})") from error
    return edit


# What reading any adapter takes -------------------------------------------------------------------------------------


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        GramianError: missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GramianError(f"{path} cannot be read ({error.strerror}); expected {what}") from error
    except ValueError as error:
        raise GramianError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise GramianError(f"{path} is damaged: found a {type(found).__name__}; expected an object")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file without NaN or Inf.

    Raises:
        GramianError: missing, damaged, or not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise GramianError(f"{path} is missing or damaged: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise GramianError(f"{path}: tensor {name!r} {tuple(tensor.shape)} holds NaN or Inf; the file is damaged")
    return dict(tensors)


def find_bases(model: nn.Module, layers: list[str], name: str) -> dict[str, nn.Module]:
    """The layers of `model` that carry no edits, by name; what is underneath for adapted ones.

    Raises:
        GramianError: a layer that the model lacks (with the nearest names), is not linear, or has an adapter `name`.
    """
    check_name(name)
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for layer in layers:
        module = modules.get(layer)
        if module is None:
            known = [n for n, m in modules.items() if isinstance(m, AdaptedLinear) or can_adapt(m)]
            raise GramianError(f"the adapter is for a layer {layer!r}, which the model lacks{nearest(layer, known)}")
        if isinstance(module, AdaptedLinear):
            if name in module.edits:
                raise GramianError(f"layer {layer}: has an adapter {name!r} already; detach it or pass another name=")
            module = module.base
        elif not can_adapt(module):
            raise GramianError(f"layer {layer} is a {type(module).__name__}; the adapter is for a linear layer")
        found[layer] = module
    if not found:
        raise GramianError("the adapter is for no layer at all; its description is damaged")
    return found


def base_device(base: nn.Module) -> torch.device:
    """Where a layer's tensors are."""
    return next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))


@torch.no_grad()
def fingerprint(base: nn.Module) -> dict[str, str]:
    """What tells one base layer from another: a hash of the bytes, dtypes and shapes of its tensors, and the dtype."""
    state = {name: value for name, value in base.state_dict().items() if value is not None}
    if not all(isinstance(value, Tensor) for value in state.values()):  # packed weights of a quantised layer
        state = {"weight": base_operator(base).dense()}
    digest, kinds = hashlib.sha256(), []
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        kinds.append(str(tensor.dtype).removeprefix("torch."))
        digest.update(f"{name} {kinds[-1]} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {"sha256": digest.hexdigest(), "dtype": kinds[-1] if kinds else ""}


__all__ = ["DESCRIPTION", "SCHEMA", "WEIGHTS", "load", "save"]
