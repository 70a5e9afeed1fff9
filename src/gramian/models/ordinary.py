"""When a compressed model is just a smaller model of its own class: then it needs nothing of gramian to load."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gramian.models.swap import linear_shape, origin
from gramian.models.walk import is_linear
from gramian.nn.structured import Structured


def become_ordinary(model: Any) -> bool:
    """Give a model of ``transformers`` whose layers were narrowed alike in every block the config that says so, in place.

    Which entry of the config a width is comes from trying: an entry that had the old width gets the new one, and the class
    must then build exactly the layers that the model has.

    Args:
        model: a ``PreTrainedModel``.

    Returns:
        Whether it is an ordinary model now; if not, nothing was changed.
    """
    changed = [m for m in model.modules() if is_linear(m) and hasattr(m, "gramian_origin")]
    if not changed or any(isinstance(m, Structured) for m in model.modules()):
        return False
    widths: dict[int, set[int]] = {}
    for module in changed:
        for now, before in zip(linear_shape(module), origin(module).shape, strict=True):
            if now != before:
                widths.setdefault(before, set()).add(now)
    if any(len(found) != 1 for found in widths.values()) or any(origin(m).transposed for m in changed):
        return False
    config = copy.deepcopy(model.config)
    for before, (now,) in widths.items():
        keys = [key for key, value in vars(config).items() if type(value) is int and value == before]
        fitting = [key for key in keys if _narrows(model, config, key, now)]
        if len(fitting) != 1:
            return False
        setattr(config, fitting[0], now)
    if _shapes(model) != _expected(model, config):
        return False
    model.config = config
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config = config
        for key, value in vars(module).items():
            if type(value) is int and len(widths.get(value, ())) == 1 and key in vars(config):
                setattr(module, key, getattr(config, key))
    for module in changed:
        del module.gramian_origin
    return True


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _expected(model: nn.Module, config: Any) -> dict[str, torch.Size]:
    """What the class builds from a config, without memory."""
    try:
        with torch.device("meta"):
            return _shapes(type(model)(copy.deepcopy(config)))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError):
        return {}


def _narrows(model: nn.Module, config: Any, key: str, now: int) -> bool:
    """Whether the config with another value of `key` builds layers of that shape where the model has them."""
    tried = copy.deepcopy(config)
    setattr(tried, key, now)
    shapes, present, old = _expected(model, tried), _shapes(model), _expected(model, config)
    moved = [name for name in shapes if shapes[name] != old.get(name)]
    return bool(moved) and all(now in present.get(name, ()) for name in moved)


__all__ = ["become_ordinary"]
