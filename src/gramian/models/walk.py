"""Finding the linear layers of any module, and naming what is left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gramian.errors import GramianError, nearest


@dataclass
class Found:
    """The outcome of a walk.

    Attributes:
        layers: linear layers to work on, by name, in module order.
        embeddings: embedding layers to work on, by name.
        left_alone: weights that stay as they are: name and reason.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    embeddings: dict[str, nn.Embedding] = field(default_factory=dict)
    left_alone: list[dict[str, str]] = field(default_factory=list)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the Conv1D of the transformers library: a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether the layer computes ``x W^T + b`` from one plain weight."""
    from gramian.nn import StructuredLinear
    from gramian.nn.prepared_linear import is_plain_linear

    return is_plain_linear(module) or is_conv1d(module) or isinstance(module, StructuredLinear)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the shell-style patterns, or lies inside a module that does."""
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, p + ".*") for p in patterns)


def find_layers(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    smallest: int = 4096,
) -> Found:
    """Every linear layer of `model` that can be compressed, and why the others cannot.

    By default the heads are left out: a layer whose weight is tied to another module's (a language model's output layer),
    and anything with fewer than `smallest` entries.

    Args:
        model: any module.
        include: shell-style patterns of names; () for all.
        exclude: patterns of names to leave alone; they win over `include`.
        embeddings: also list embeddings, but not those of few rows (positions), those that compute more than a look-up,
            and those whose table is tied to another layer's weight.
        smallest: weights with fewer entries are left alone.

    Raises:
        GramianError: a pattern that fits nothing (with the nearest names), or nothing left to compress.
    """
    from gramian.nn.structured import Structured

    found = Found()
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append(f"{name}.{key}" if name else key)
    names = [name for name, _ in model.named_modules()]
    for pattern in (*include, *exclude):
        if not any(matches(name, [pattern]) for name in names):
            raise GramianError(f"pattern {pattern!r} fits no layer{nearest(pattern, names)}")
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Structured))
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if is_linear(module):
            reason = _reason(name, module, owners, include, exclude, smallest)
            if reason:
                found.left_alone.append({"name": name, "reason": reason})
            else:
                found.layers[name] = module
        elif isinstance(module, Structured):
            found.left_alone.append({"name": name, "reason": "already structured"})
        elif isinstance(module, nn.Embedding):
            if embeddings:
                if matches(name, exclude):
                    found.left_alone.append({"name": name, "reason": "excluded"})
                elif include and not matches(name, include):
                    found.left_alone.append({"name": name, "reason": "not included"})
                elif _tied(module, owners):
                    found.left_alone.append({"name": name, "reason": "its weight is tied to another layer's"})
                elif type(module) is not nn.Embedding or module.max_norm is not None:
                    more = "renormalises its rows" if module.max_norm is not None else type(module).__name__
                    found.left_alone.append({"name": name, "reason": f"computes more than a look-up ({more})"})
                elif module.weight.shape[0] > 4 * module.weight.shape[1]:
                    found.embeddings[name] = module
                else:
                    found.left_alone.append({"name": name, "reason": "an embedding of few rows"})
            else:
                tied = _tied(module, owners)
                reason = "its weight is tied to another layer's" if tied else "an embedding (ask with --embeddings)"
                found.left_alone.append({"name": name, "reason": reason})
        else:
            for key, p in module._parameters.items():
                if p is not None and p.dim() >= 2 and p.numel() >= smallest and not _inside(name, found.layers):
                    kind = "fused experts" if p.dim() == 3 else f"a {p.dim()}-dimensional weight"
                    found.left_alone.append(
                        {"name": f"{name}.{key}", "reason": f"{kind} of {type(module).__name__}, not a linear layer"}
                    )
    if not found.layers and not found.embeddings:
        small = [entry["name"] for entry in found.left_alone if entry["reason"].startswith("small")]
        why = f"; {small[0]} is too small (fewer than {smallest} entries)" if small else ""
        raise GramianError(f"nothing to compress: no linear layer is left after include and exclude{why}")
    return found


def _tied(module: nn.Embedding, owners: dict[int, list[str]]) -> bool:
    return len(owners[id(module.weight)]) > 1


def _inside(name: str, layers: dict[str, nn.Module]) -> bool:
    return any(name.startswith(layer + ".") for layer in layers)


def _reason(
    name: str,
    module: nn.Module,
    owners: dict[int, list[str]],
    include: Sequence[str],
    exclude: Sequence[str],
    smallest: int,
) -> str:
    from gramian.nn import StructuredLinear

    if isinstance(module, StructuredLinear):
        return "already structured"
    weight = module.weight
    assert isinstance(weight, Tensor)
    if matches(name, exclude):
        return "excluded"
    if include and not matches(name, include):
        return "not included"
    if len(owners.get(id(weight), [])) > 1:
        others = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
        return f"its weight is tied to {', '.join(others)}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.numel() < smallest:
        return f"small: {weight.numel()} entries"
    return ""


def weight_of(module: nn.Module) -> Tensor:
    """The (out, in) weight of a linear layer or the (rows, width) table of an embedding, a view where possible."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().mT if is_conv1d(module) else weight.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """The (out,) bias or None."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def check_finite(layers: dict[str, nn.Module]) -> None:
    """Raise on a weight or bias that is not finite.

    Raises:
        GramianError: names the layer, how many entries, and what to do.
    """
    for name, module in layers.items():
        for label, tensor in (("weight", module.weight), ("bias", getattr(module, "bias", None))):
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise GramianError(
                    f"layer {name}: {bad} of {tensor.numel()} entries of its {label} are NaN or Inf; "
                    "repair the checkpoint or leave the layer out with --exclude"
                )


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Linear layers outside every repeated block (poolers, classifiers, output heads): left out unless included by name."""
    blocks = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1
    )
    if not blocks:
        return ()
    return tuple(name for name, module in model.named_modules() if is_linear(module) and not name.startswith(blocks))
