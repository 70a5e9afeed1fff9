"""Where the matrices of a model come from: a module, or a checkpoint that is read tensor by tensor.

A checkpoint needs no model class. Its structured layers (written by gramian) come back as operators, never as the
factor matrices they are stored in.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gramian.errors import GramianError, nearest
from gramian.nn.structured import Structured
from gramian.ops import Operator, from_config

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDICES = ("I64", "BOOL")
"""Positions and masks, which are no weights."""
_EXPERTS = 512
"""A 3-D tensor with more leading entries than this, or matrices narrower than 16, is a convolution, not experts."""


@dataclass(frozen=True)
class Source:
    """The matrices of a model, by layer name, each read only when asked for.

    Attributes:
        layers: name to a function that gives the matrix (out, in) as a tensor or an operator.
        left_alone: tensors with two or more dimensions that are not reported, each with the reason.
    """

    layers: dict[str, Callable[[], Tensor | Operator]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Tensor | Operator]]:
        return ((name, read()) for name, read in self.layers.items())

    def select(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Source:
        """Only the layers that match a pattern of `include` (all, if there is none) and none of `exclude`.

        Patterns are those of a shell, ``*.query``; a module's name stands for everything inside it.

        Raises:
            GramianError: a pattern matches no layer, or nothing is left.
        """
        for pattern in (*include, *exclude):
            if not any(_matches(name, [pattern]) for name in self.layers):
                raise GramianError(
                    f"pattern {pattern!r} matches none of {len(self.layers)} layers{nearest(pattern, self.layers)}; "
                    "expected a layer's name, or a shell pattern such as '*.query'"
                )
        chosen = {
            name: read
            for name, read in self.layers.items()
            if (not include or _matches(name, include)) and not _matches(name, exclude)
        }
        if not chosen:
            raise GramianError(
                f"include {list(include)} and exclude {list(exclude)} leave none of {len(self.layers)} layers"
            )
        return replace(self, layers=chosen)


def open_source(model: nn.Module | str | Path) -> Source:
    """The matrices of a module, a checkpoint directory or a ``.safetensors`` file.

    Reported are matrices and, slice by slice (``name.0``, ``name.1``, ...), stacks of expert matrices (experts, a, b).
    A tensor shared by two layers is reported once.

    Raises:
        GramianError: no such path, no safetensors file, a file that cannot be read, or no matrix in it.
    """
    source = _from_module(model) if isinstance(model, nn.Module) else _from_checkpoint(Path(model))
    if not source.layers:
        raise GramianError(
            f"{model if not isinstance(model, nn.Module) else type(model).__name__}: found no weight matrix; "
            f"expected 2-D floating-point weights{_aside(source.left_alone)}"
        )
    return source


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in patterns)


def _aside(left_alone: Mapping[str, str]) -> str:
    return (
        "; left alone: " + ", ".join(f"{name} ({why})" for name, why in list(left_alone.items())[:3])
        if left_alone
        else ""
    )


# A module -------------------------------------------------------------------------------------------------------------


def _from_module(model: nn.Module) -> Source:
    source = Source()
    structured: list[str] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if any(map(name.startswith, structured)) or ".parametrizations" in f".{name}":
            continue
        if isinstance(module, Structured):
            structured.append(f"{name}." if name else "")
            source.layers[name or "weight"] = partial(getattr, module, "op")
            continue
        if hasattr(module, "parametrizations") and isinstance(module, nn.Linear | nn.Embedding):
            # A parametrised weight is computed on access; the tensors it is made from are not layers.
            source.layers[name or "weight"] = partial(getattr, module, "weight")
            continue
        for local, weight in module.named_parameters(recurse=False):
            if id(weight) in seen or weight.dim() < 2:
                continue
            seen.add(id(weight))
            full = f"{name}.{local}" if name else local
            if weight.device.type == "meta":
                raise GramianError(
                    f"{full}: found on the meta device; expected numbers; load the model's weights first"
                )
            layer = name if local == "weight" and name else full
            if isinstance(module, nn.modules.conv._ConvNd):
                source.left_alone[layer] = f"a convolution kernel {tuple(weight.shape)}"
            else:
                # transformers' Conv1D stores (in, out).
                turn = type(module).__name__ == "Conv1D"
                dtype = "F32" if weight.is_floating_point() and weight.dtype.itemsize > 1 else str(weight.dtype)
                _add(source, layer, dtype, weight.shape, partial(_parameter, weight, turn))
    return source


def _parameter(weight: Tensor, turn: bool, index: int | None = None) -> Tensor:
    matrix = weight.detach() if index is None else weight.detach()[index]
    return matrix.mT if turn else matrix


def _add(source: Source, layer: str, dtype: str, shape: Sequence[int], read: Callable[..., Tensor]) -> None:
    """Enter a stored tensor: as a layer, as a stack of them (``read(index)`` gives one), or among those left alone."""
    if dtype not in _FLOATS:
        source.left_alone[layer] = f"{dtype} is not one of {', '.join(_FLOATS)}"
    elif len(shape) == 2:
        source.layers[layer] = read
    elif len(shape) == 3 and shape[0] <= _EXPERTS and min(shape[1:]) >= 16:
        for index in range(shape[0]):
            source.layers[f"{layer}.{index}"] = partial(read, index)
    else:
        source.left_alone[layer] = f"shape {tuple(shape)} is neither a matrix nor a stack of expert matrices"


# A checkpoint ---------------------------------------------------------------------------------------------------------


def _from_checkpoint(path: Path) -> Source:
    if not path.exists():
        raise GramianError(
            f"model {str(path)!r}: no such file or directory; expected a checkpoint directory or a .safetensors "
            "file on this machine"
        )
    folder = path if path.is_dir() else path.parent
    files = _files(path)
    header: dict[str, tuple[Path, str, list[int]]] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (a file handle, not a mapping)
                entry = handle.get_slice(name)
                header[name] = (file, entry.get_dtype(), entry.get_shape())
    source = Source()
    layouts, shared = _record(folder) if path.is_dir() else ({}, {})
    for layer in sorted(layouts, key=_natural):
        stored = {
            name[len(layer) + 1 : -len(".weight")]: (file, name)
            for name, (file, _, _) in header.items()
            if name.startswith(f"{layer}.") and name.endswith(".weight") and name != f"{layer}.weight"
        }
        if not any(name.startswith(f"{layer}.") for name in shared):  # else its twin is reported
            source.layers[layer] = partial(_operator, layer, layouts[layer], stored)
    parts = tuple(f"{layer}." for layer in layouts)
    for name in sorted(header, key=_natural):
        file, dtype, shape = header[name]
        if len(shape) >= 2 and 0 not in shape and dtype not in _INDICES and not (parts and name.startswith(parts)):
            _add(source, name.removesuffix(".weight"), dtype, shape, partial(_tensor, file, name))
    return source


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, complete according to its index if it has one."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise GramianError(
                f"model {str(path)!r}: found a {path.suffix or 'nameless'} file; expected .safetensors; a pickled "
                "checkpoint is never loaded: save it again with save_pretrained(..., safe_serialization=True)"
            )
        return [path]
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        listed = _json(indexes[0]).get("weight_map", {})
        files = [path / str(name) for name in dict.fromkeys(listed.values())]
        for file in files:
            if not file.exists():
                raise GramianError(
                    f"{indexes[0]}: lists {file.name}, which is missing; download or copy the whole checkpoint"
                )
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = next(
            (file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in path.glob(f"*.{suffix}")), None
        )
        raise GramianError(
            f"model {str(path)!r}: found {pickled or 'no weights'}; expected *.safetensors"
            + ("; save it again with save_pretrained(..., safe_serialization=True)" if pickled else "")
        )
    return files


def _record(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """How each structured layer of gramian's checkpoint is stored, by layer name, and which tensors are stored once for
    several names (name to the name it is stored under).
    """
    found = _json(folder / "config.json").get("quantization_config", {})
    if not isinstance(found, dict) or found.get("quant_method") != "gramian":
        found = _json(folder / "gramian.json")
    layers, shared = found.get("layers", {}), found.get("shared", {})
    if not isinstance(layers, dict) or not isinstance(shared, dict):
        raise GramianError(f"{folder}: gramian's record of its layers is damaged; copy the checkpoint again")
    # A dense layer of another shape than the model's own class makes is an ordinary tensor here.
    return {name: layout for name, layout in layers.items() if layout.get("kind") != "dense"}, shared


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise GramianError(f"{file}: cannot be read as JSON ({error}); restore the file") from None
    if not isinstance(found, dict):
        raise GramianError(f"{file}: found a JSON {type(found).__name__}; expected an object; restore the file")
    return found


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """An open safetensors file; whatever fails within is a GramianError that names the file."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except Exception as error:
        raise GramianError(
            f"{file}: cannot be read ({error}); the file is truncated or damaged: copy it again"
        ) from None


def _tensor(file: Path, name: str, index: int | None = None) -> Tensor:
    with _open(file) as handle:
        tensor: Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
    return tensor


def _operator(layer: str, layout: Mapping[str, Any], stored: Mapping[str, tuple[Path, str]]) -> Operator:
    """The operator of a structured layer, whose factors are stored as ``layer.<factor>.weight``."""
    try:
        template = from_config(layout)
        factors = {}
        for name, (file, tensor) in stored.items():
            value = _tensor(file, tensor)
            wanted = template.factors().get(name)
            # A factor that acts as one matrix is stored as one, (1, s, t) as (s, t).
            factors[name] = (
                value.reshape(wanted.shape) if wanted is not None and wanted.numel() == value.numel() else value
            )
        return from_config(layout, factors)
    except (GramianError, KeyError, TypeError) as error:
        raise GramianError(
            f"layer {layer!r}: its record does not match its tensors ({error}); copy the checkpoint again"
        ) from None
