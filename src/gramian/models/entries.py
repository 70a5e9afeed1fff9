"""What a run keeps and tells of a plan's entries: fitted ones as files, layers' spectra, rows of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian.compression import Built, Entry, Layer, dense_cost, op_cost
from gramian.linalg import svdvals
from gramian.models.walk import bias_of, weight_of
from gramian.nn.structured import Structured
from gramian.ops import Operator, from_config

SPECTRUM_POINTS = 33


def stored(made: Built) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A fitted entry as ``journal.keep`` takes it."""
    tensors: dict[str, Tensor] = {}
    for name, (op, bias) in made.layers.items():
        tensors.update({f"{name}|{key}": value for key, value in op.factors().items()})
        if bias is not None:
            tensors[f"{name}|"] = bias
    return tensors, {"layers": {name: op.config() for name, (op, _) in made.layers.items()}, "error": made.error}


def restored(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Built:
    """Inverse of ``stored``."""
    made: dict[str, tuple[Operator, Tensor | None]] = {}
    for name, config in description["layers"].items():
        own = {key.removeprefix(f"{name}|"): value for key, value in tensors.items() if key.startswith(f"{name}|")}
        bias = own.pop("", None)
        made[name] = (from_config(config, own), bias)
    return Built(made, description["error"])


def layer_facts(layer: Layer) -> dict[str, Any]:
    """What the report shows of a layer whatever becomes of it.

    Returns:
        whole: predicted loss of putting zeros in its place; tokens; gram_rank; and the remaining energy of the spectrum by
        rank without and with the Grams, with the ranks that say how many directions matter.
    """
    values = svdvals(layer.weight.double()).square()
    plain = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    weighted = layer.spectrum.errors
    seen = (-weighted.diff()).clamp_min(0)
    place = torch.linspace(0, min(layer.shape), SPECTRUM_POINTS).round().long()
    share = seen / seen.sum().clamp_min(1e-300)
    entropy = -(share.clamp_min(1e-300).log() * share).sum()

    def curve(x: Tensor) -> list[float]:
        return [round(float(v), 6) for v in x[place] / x[0].clamp_min(1e-300)]

    return {
        "whole": layer.error(torch.zeros_like(layer.weight)),
        "effective_rank": float(entropy.exp()),
        "stable_rank": float(values.sum() / values[0].clamp_min(1e-300)),
        "gram_rank": layer.grams.input.rank() if layer.grams is not None else 0,
        "tokens": layer.grams.tokens if layer.grams is not None else 0,
        "spectrum": {"plain": curve(plain), "weighted": curve(weighted)},
    }


def entry_rows(
    entry: Entry, made: Built, layers: Mapping[str, Layer], facts: Mapping[str, dict[str, Any]], cost: str
) -> list[dict[str, Any]]:
    """The report's rows of one entry, a layer each.

    Args:
        entry: of the plan.
        made: what was fitted for it.
        layers: shapes and dtypes are read, no values.
        facts: ``layer_facts`` by name.
        cost: the plan's.
    """
    rows = []
    for name in entry.layers:
        layer, op = layers[name], made.layers[name][0]
        before, after = dense_cost(layer), op_cost(op, layer)
        first = name == entry.layers[-1]
        latency = {}
        if cost == "latency":
            latency = {"latency_before": before.of("latency"), "latency_after": after.of("latency")}
        # Other weightings measure relative to the layer's output already.
        whole = max(facts[name]["whole"], 1e-300) if entry.weighting == "two-sided" else 1.0
        rows.append(
            {
                "name": name,
                "shape": list(layer.shape),
                "structure": entry.structure,
                "size": entry.size,
                "params_before": before.params,
                "params_after": after.params,
                "bytes_before": before.bytes,
                "bytes_after": after.bytes,
                "flops_before": before.flops,
                "flops_after": after.flops,
                **latency,
                "predicted": entry.predicted if first else None,
                "measured": sum(made.error.values()) if first else None,
                "relative": made.error.get(name, 0.0) / whole,
                "joint": [other for other in entry.layers if other != name],
                **{key: value for key, value in facts[name].items() if key != "whole"},
            }
        )
    return rows


def module_row(layer: Layer, small: nn.Module) -> dict[str, Any]:
    """The report's row of a layer in a model that a recipe made as a whole: what is at its place, if anything.

    Args:
        layer: of the original.
        small: the smaller model.
    """
    present = dict(small.named_modules()).get(_place(layer.name, small) or "?")
    weight = None if present is None else weight_of(present)
    before, after = layer.weight.numel(), 0 if weight is None else weight.numel()
    size = layer.weight.element_size()
    kind = "removed" if weight is None else "dense" if weight.shape == layer.shape else "narrower"
    unknown = ("predicted", "measured", "relative", "effective_rank", "gram_rank", "spectrum")
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "structure": kind,
        "size": {} if weight is None or kind == "dense" else {"shape": list(weight.shape)},
        **{f"{what}_before": scale * before for what, scale in (("params", 1), ("bytes", size), ("flops", 2))},
        **{f"{what}_after": scale * after for what, scale in (("params", 1), ("bytes", size), ("flops", 2))},
        **dict.fromkeys(unknown),
        "joint": [],
        "tokens": 0,
    }


def _place(name: str, small: nn.Module) -> str | None:
    """Where a layer of the original is in a model that may have lost blocks; None for one of those."""
    blocks, kept = getattr(small, "gramian_blocks", ("", ()))
    if not blocks or not name.startswith(f"{blocks}."):
        return name
    number, _, rest = name.removeprefix(f"{blocks}.").partition(".")
    return f"{blocks}.{kept.index(int(number))}.{rest}" if int(number) in kept else None


def parameters(model: nn.Module) -> int:
    """Stored numbers of a model: parameters and the index or code buffers of structured layers."""
    inside = {id(p) for m in model.modules() if isinstance(m, Structured) for p in m.parameters()}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return plain + sum(
        m.op.numel + (bias.numel() if (bias := bias_of(m)) is not None else 0)
        for m in model.modules()
        if isinstance(m, Structured)
    )


def nbytes(model: nn.Module) -> int:
    """Bytes of the same numbers."""
    inside = {id(p) for m in model.modules() if isinstance(m, Structured) for p in m.parameters()}
    plain = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    return plain + sum(
        m.op.nbytes + (bias.nbytes if (bias := bias_of(m)) is not None else 0)
        for m in model.modules()
        if isinstance(m, Structured)
    )
