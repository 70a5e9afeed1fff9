"""Adapters in the files of the peft library, both ways. The library itself is not needed.

Its LoRA format says that layer n of the model gets ``W + (alpha_n / r_n) B_n A_n``: a configuration as JSON, and two
matrices a layer as safetensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gramian.adapt.adapter import Start
from gramian.adapt.attach import place
from gramian.adapt.combine import COMBINES
from gramian.adapt.files import base_device, find_bases, read_json, read_tensors
from gramian.adapt.layer import Edit, base_operator, layer_shape
from gramian.errors import GramianError
from gramian.files import atomic_directory
from gramian.linalg import svd
from gramian.models.walk import is_conv1d
from gramian.ops import BlockLowRank, Operator, Product, Scaled, Sum

if TYPE_CHECKING:
    from gramian.adapt.attach import Adapted

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@torch.no_grad()
def export_peft(
    adapted: Adapted,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the adapter as a LoRA checkpoint of the peft library, which then gives the same outputs on the same base.

    Two factors go out as they are. A frozen start doubles the rank: ``[B, -B0] [A; A0]``. Any other change of W is written
    through its exact low-rank factors, if it has them.

    Args:
        adapted: the adapter.
        directory: must not exist, or be empty.
        base_model: name or path of the base model, for the configuration.
        task_type: "CAUSAL_LM", "SEQ_CLS", ..., for peft's Auto classes.

    Raises:
        GramianError: a layer's change is no matrix, or its rank is so high that two factors are no smaller than W.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, edit in adapted.edits.items():
        left, right, gain = _peft_factors(name, adapted, edit)
        ranks[name], alphas[name] = right.shape[0], _alpha(gain, right.shape[0])
        tensors[f"{PREFIX}{name}.lora_A.weight"] = right.detach().cpu().contiguous().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = left.detach().cpu().contiguous().clone()
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise GramianError(f"{key} holds NaN or Inf; the adapter is damaged, train it again")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    inside = tuple(f"{name}." for name in adapted.layers)
    others = [n for n, _ in adapted.model.named_modules() if n not in adapted.layers and not n.startswith(inside)]
    loose = any(other.endswith("." + name) for name in adapted.layers for other in others)
    conv = {is_conv1d(layer.base) for layer in adapted.layers.values()}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model or getattr(adapted.model, "name_or_path", "") or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(edit.dropout for edit in adapted.edits.values()),
        # A list is matched against the ends of names too; where that would hit other layers, one regular expression.
        "target_modules": "|".join(map(re.escape, adapted.layers)) if loose else list(adapted.layers),
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "fan_in_fan_out": conv == {True},
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    with atomic_directory(directory) as partial:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _alpha(gain: float, rank: int) -> float:
    """The alpha for which ``alpha / rank`` is exactly `gain`, if a float is."""
    near = gain * rank
    return next((a for a in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if a / rank == gain), near)


def _peft_factors(name: str, adapted: Adapted, edit: Edit) -> tuple[Tensor, Tensor, float]:
    """B (out, k), A (k, in) and a gain g with ``g B A`` the change that the edit makes to W."""
    if COMBINES[edit.combine].operator is None:
        raise GramianError(
            f"layer {name}: an edit that combines by {edit.combine!r} is no matrix; peft's LoRA cannot hold it"
        )
    if edit.combine == "add":
        found = low_rank_factors(edit.update.op)
        if found is not None and edit.start is not None:
            start = low_rank_factors(edit.start.op)
            found = None if start is None else (torch.cat([found[0], -start[0]], 1), torch.cat([found[1], start[1]]))
        if found is not None:
            return *found, edit.gain
    weight = base_operator(adapted.layers[name].base).to(dtype=torch.float64)
    make = COMBINES[edit.combine].operator
    assert make is not None
    change = (make(edit, weight).dense() - weight.dense()).double()
    left, sigma, right = svd(change)
    out, in_ = change.shape
    rank = max(1, int((sigma > 1e-6 * sigma[0]).sum()))
    if rank * (out + in_) >= out * in_:
        raise GramianError(
            f"layer {name} ({out} x {in_}): the change has rank {rank}, and LoRA factors of that rank are no smaller than the "
            "weight; merge the adapter instead, or keep it in gramian's own files"
        )
    root = sigma[:rank].sqrt()
    dtype = edit.update.weight.dtype
    return (left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype), 1.0


def low_rank_factors(op: Operator) -> tuple[Tensor, Tensor] | None:
    """B (out, k) and A (k, in) with ``B A`` the operator, read off its form; None where the form gives none."""
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        return op.left[0], op.right[0]
    if isinstance(op, Scaled):
        inner = low_rank_factors(op.base)
        return None if inner is None else (op.factor * inner[0], inner[1])
    if isinstance(op, Sum):
        parts = [low_rank_factors(part) for part in op.parts]
        if any(part is None for part in parts):
            return None
        return torch.cat([p[0] for p in parts if p], 1), torch.cat([p[1] for p in parts if p])
    if isinstance(op, Product):
        narrow = min(range(len(op.parts)), key=lambda i: min(op.parts[i].shape))
        inner = low_rank_factors(op.parts[narrow])
        if inner is not None:
            left, right = inner
            for part in reversed(op.parts[:narrow]):
                left = part.apply_columns(left)
            for part in op.parts[narrow + 1 :]:
                right = part.T.apply(right)
            return left, right
        if len(op.parts) > 1:
            cut = min(range(1, len(op.parts)), key=lambda i: op.parts[i].shape[0])
            if op.parts[cut].shape[0] < min(op.shape):
                return Product(op.parts[:cut]).dense(), Product(op.parts[cut:]).dense()
    return None


# Reading ------------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
    "use_bdlora": (None, False, {}),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
}
"""Options of peft's LoRA under which a checkpoint is more than pairs of factors, and the values that mean "no"."""


def import_peft(
    model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default", freeze: bool = True
) -> Adapted:
    """Attach a LoRA checkpoint of the peft library: LoRA and rsLoRA, with rank and alpha patterns.

    Args:
        model: the base model.
        directory: with adapter_config.json and adapter_model.safetensors.
        name: of the adapter on the model.
        freeze: as in ``gramian.adapt.attach``.

    Raises:
        GramianError: another method than LoRA, an option that makes it more than two factors a layer, factors relative to a
            base that peft rewrote (PiSSA and its kin, not converted), files or layers that are missing or do not fit.
    """
    folder = Path(directory)
    config = read_json(folder / CONFIG, "a LoRA checkpoint of peft")
    if str(config.get("peft_type")).upper() != "LORA":
        raise GramianError(
            f"{folder / CONFIG}: peft_type {config.get('peft_type')!r}; only 'LORA' is two factors a layer"
        )
    for option, plain in _PLAIN.items():
        if config.get(option) not in plain:
            raise GramianError(f"{folder / CONFIG}: {option} is {config[option]!r}; only plain LoRA can be imported")
    begin = config.get("init_lora_weights", True)
    if (
        isinstance(begin, str) and begin.partition("_")[0] in ("pissa", "olora", "corda", "loftq")
    ) or begin == "lora_ga":
        raise GramianError(
            f"{folder / CONFIG}: init_lora_weights {begin!r}: the factors belong to a base that peft rewrote; save "
            "it there with path_initial_model_for_weight_conversion and import that"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder / TENSORS).items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if not found:
            raise GramianError(
                f"{folder / TENSORS}: tensor {key!r}; expected {PREFIX}<layer>.lora_A.weight or lora_B.weight"
            )
        pairs.setdefault(found[1], {})[found[2]] = tensor
    bases = find_bases(model, list(pairs), name)
    edits: dict[str, Edit] = {}
    for layer, pair in pairs.items():
        out, in_ = layer_shape(bases[layer])
        if pair.keys() != {"A", "B"}:
            raise GramianError(f"{folder / TENSORS}: layer {layer} has only lora_{next(iter(pair))}")
        left, right = pair["B"], pair["A"]
        fits = left.dim() == right.dim() == 2 and (left.shape[0], right.shape[1]) == (out, in_)
        if not fits or left.shape[1] != right.shape[0]:
            raise GramianError(
                f"layer {layer} ({out} x {in_}): lora_B {tuple(left.shape)}, lora_A {tuple(right.shape)}; expected ({out}, r), "
                f"(r, {in_})"
            )
        rank = _pattern(config.get("rank_pattern"), layer, config.get("r"))
        alpha = _pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
        if rank != right.shape[0]:
            raise GramianError(f"layer {layer} ({out} x {in_}): factors of rank {right.shape[0]}; {CONFIG} says {rank}")
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise GramianError(f"layer {layer}: lora_alpha {alpha!r}; expected a number")
        gain = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        dtype = torch.float32 if right.element_size() < 4 else right.dtype
        update = BlockLowRank.low_rank(left, right).to(base_device(bases[layer]), dtype)
        edits[layer] = Edit(
            Start(update), (out, in_), base_gain=gain, rank=rank, dropout=float(config.get("lora_dropout") or 0.0)
        )
    return place(model, name, edits, {}, freeze=freeze, probe=False)


def _pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of the layer's name, by the library's rule."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


__all__ = ["export_peft", "import_peft", "low_rank_factors"]
