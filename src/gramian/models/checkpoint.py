"""Saving and loading networks with changed layers, for any ``torch.nn.Module``: safetensors and JSON, nothing pickled.

A checkpoint is a directory that holds ``model.safetensors`` and ``gramian.json``. It appears under its name complete or
not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian import __version__
from gramian.errors import GramianError, nearest
from gramian.files import atomic_directory
from gramian.models.swap import check_shape, find_embedding, find_linear, linear_shape, origin, swap
from gramian.nn import StructuredEmbedding, StructuredLinear, prepare

SCHEMA = 1
"""Version of the layout of a checkpoint's description; a larger one is refused."""
WEIGHTS = "model.safetensors"
DESCRIPTION = "gramian.json"

Layers = dict[str, dict[str, Any]]
"""Layer name -> what is needed to build the empty layer; JSON-able."""


def describe(model: nn.Module) -> Layers:
    """The layers of `model` that its own constructor does not make: structured ones, and dense ones of another shape.

    Each entry is ``Operator.config()`` of what the layer holds now, with ``bias``, or for an embedding with
    ``"embedding": true``.
    """
    layers: Layers = {}
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            layers[name] = {**module.op.config(), "bias": module.bias is not None}
        elif isinstance(module, StructuredEmbedding):
            layers[name] = {**module.op.config(), "embedding": True}
        elif isinstance(module, nn.Linear) and origin(module).shape != linear_shape(module):
            shape = list(linear_shape(module))
            factors = {"weight": ["float", *shape]}
            layers[name] = {"kind": "dense", "shape": shape, "factors": factors, "bias": module.bias is not None}
    return layers


def build(name: str, spec: Mapping[str, Any], old: nn.Module) -> nn.Module:
    """An empty layer on the meta device as described by `spec`, to take the place of `old`, in `old`'s dtype.

    Raises:
        GramianError: the description is damaged, of an unknown kind, or does not fit `old`.
    """
    weight = old.weight
    assert isinstance(weight, Tensor)
    table = isinstance(old, nn.Embedding | StructuredEmbedding)
    if table != (spec.get("embedding") is True):
        what = "a linear layer" if table else "an embedding"
        raise GramianError(f"layer {name!r}: the description is of {what}; the model has a {type(old).__name__}")
    try:
        if isinstance(old, nn.Embedding | StructuredEmbedding):
            with torch.device("cpu"):
                made = StructuredEmbedding.from_config(dict(spec), padding_idx=old.padding_idx, dtype=weight.dtype)
            if origin(made).shape != origin(old).shape:
                raise GramianError(f"shape {origin(made).shape}; expected {origin(old).shape}, the model's own")
            return made
        bias, (out, in_) = spec["bias"], spec["shape"]
        if not isinstance(bias, bool):
            raise TypeError(f"bias {bias!r}; expected true or false")
        if spec["kind"] == "dense":
            layer: nn.Module = nn.Linear(in_, out, bias, device="meta", dtype=weight.dtype)
        else:
            # Constants that a structure tabulates must be real numbers even where a loader makes meta tensors.
            with torch.device("cpu"):
                layer = StructuredLinear.from_config(dict(spec), bias=bias, dtype=weight.dtype, device="meta")
    except GramianError as error:
        raise GramianError(f"layer {name!r}: {error}") from error
    except KeyError as error:
        raise GramianError(f"layer {name!r}: the description lacks {error} or names what is not there") from error
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GramianError(f"layer {name!r}: the description is damaged ({reason})") from error
    check_shape(name, linear_shape(layer), origin(old))
    return layer


def check_schema(description: Mapping[str, Any]) -> None:
    """Refuse a description that a newer gramian wrote or that is none.

    Raises:
        GramianError: with the version to install.
    """
    schema, layers = description.get("schema"), description.get("layers")
    if (
        not isinstance(schema, int)
        or not isinstance(layers, Mapping)
        or not all(isinstance(x, Mapping) for x in layers.values())
    ):
        raise GramianError("the description is damaged: expected an integer 'schema' and a mapping 'layers'")
    if schema > SCHEMA:
        wrote = description.get("gramian_version", "a newer version")
        raise GramianError(
            f"schema {schema}, written by gramian {wrote}; this is gramian {__version__}, which reads up to {SCHEMA}: "
            "pip install -U gramian"
        )


def save(
    model: nn.Module, directory: str | os.PathLike[str], *, extra: Mapping[str, bytes | str] | None = None
) -> None:
    """Write the tensors of `model` and the description of the layers that gramian changed, atomically.

    The same model gives the same bytes. A tensor that several names share is stored once.

    Args:
        model: any module.
        directory: must not exist, or be empty.
        extra: more files to write there, by name.

    Raises:
        GramianError: the directory is not empty or cannot be written, the state holds NaN or something but tensors.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    used: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise GramianError(f"{name!r} in the model's state is a {type(tensor).__name__}; only tensors can be saved")
        if tensor.is_meta:
            raise GramianError(f"tensor {name!r} is on the meta device and has no values to save")
        _check_finite(name, tensor)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        plain = tensor.detach().cpu().contiguous()
        # safetensors stores whole storages that belong to one tensor; any other view is copied first.
        if plain.untyped_storage().nbytes() != plain.nbytes or plain.data_ptr() in used:
            plain = plain.clone()
        used.add(plain.data_ptr())
        tensors[name] = plain
    description: dict[str, Any] = {"schema": SCHEMA, "gramian_version": __version__, "layers": describe(model)}
    if shared:
        description["shared"] = shared
    with atomic_directory(directory) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for file, content in (extra or {}).items():
            target = partial / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)


def load_into(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Turn a freshly constructed `model` into the one that `save` wrote: its layers exchanged, all its tensors loaded.

    Tensors take the model's devices and dtypes; all linear layers then run as planned (``gramian.prepare``). On an error the
    model is as it was.

    Raises:
        GramianError: anything that does not match: files, names, shapes, kinds, a newer format, NaN.
    """
    folder = Path(directory)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except OSError as error:
        raise GramianError(
            f"{folder / DESCRIPTION} cannot be read ({error.strerror}); expected a gramian checkpoint"
        ) from error
    except ValueError as error:
        raise GramianError(f"{folder / DESCRIPTION} is damaged: {error}") from error
    try:
        check_schema(description if isinstance(description, Mapping) else {})
        replaced = {}
        for name, spec in description["layers"].items():
            old = find_embedding(model, name) if spec.get("embedding") is True else find_linear(model, name)
            replaced[name] = (old, build(name, spec, old))
    except GramianError as error:
        raise GramianError(f"{folder / DESCRIPTION}: {error}") from error
    try:
        stored = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise GramianError(f"{folder / WEIGHTS} is missing or damaged: {error}") from error

    tensors = _match(folder / WEIGHTS, _expected(model, replaced), stored, description.get("shared", {}))
    for old, new in replaced.values():
        assert isinstance(old.weight, Tensor)
        new.to_empty(device=old.weight.device)
        swap(model, old, new)
    model.load_state_dict(tensors)
    prepare(model, recast=False)


def _expected(model: nn.Module, replaced: Mapping[str, tuple[nn.Module, nn.Module]]) -> dict[str, Tensor]:
    """The state that `model` will have once its layers are exchanged; a layer at several names counts at each."""
    fresh = {id(old): new for old, new in replaced.values()}
    expected: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in fresh:
            for key in module.state_dict():
                expected.pop(f"{name}.{key}", None)
            expected |= {f"{name}.{key}": tensor for key, tensor in fresh[id(module)].state_dict().items()}
    return expected


def _match(
    file: Path, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor], shared: Mapping[str, str]
) -> dict[str, Tensor]:
    """The stored tensor for every expected name; names, shapes and kinds of number must agree exactly."""
    if not isinstance(shared, Mapping):
        raise GramianError(f"{file.parent / DESCRIPTION}: 'shared' is damaged; expected a mapping of names")
    out = {}
    for name, wanted in expected.items():
        source = shared.get(name, name)
        if source not in stored:
            raise GramianError(f"{file}: tensor {source!r} of layer {name.rpartition('.')[0]!r} is missing")
        found = stored[source]
        if found.shape != wanted.shape or found.is_floating_point() != wanted.is_floating_point():
            raise GramianError(
                f"{file}: tensor {name!r} is {tuple(found.shape)} {found.dtype}; "
                f"expected {tuple(wanted.shape)} {wanted.dtype}"
            )
        _check_finite(f"{file}: {name}", found)
        out[name] = found
    surplus = [name for name in stored if name not in expected]
    if surplus:
        raise GramianError(
            f"{file}: surplus tensor {surplus[0]!r}{nearest(surplus[0], expected)}, {len(surplus)} in all"
        )
    return out


def _check_finite(name: str, tensor: Tensor) -> None:
    """NaN is never right; an infinity can be (a mask of minus infinity in a buffer)."""
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise GramianError(f"tensor {name!r} holds NaN; train or compress again from a sound model")
