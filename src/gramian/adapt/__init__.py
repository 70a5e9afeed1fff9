"""Fine-tuning by structured updates: one adapter with a few axes, on any model.

The recipes and the planner are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gramian.adapt.adapter import Adapter, Context, Start, by_group, by_role, everywhere
from gramian.adapt.attach import Adapted, attach
from gramian.adapt.files import load
from gramian.adapt.gradients import weight_gradients
from gramian.adapt.layer import AdaptedLinear, Edit
from gramian.adapt.merge import Merged
from gramian.adapt.peft_format import import_peft

if TYPE_CHECKING:
    from gramian.adapt.planning import Plan, auto
    from gramian.adapt.recipes import RECIPES, recipe

_LATE = {
    "Plan": "gramian.adapt.planning",
    "RECIPES": "gramian.adapt.recipes",
    "auto": "gramian.adapt.planning",
    "recipe": "gramian.adapt.recipes",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'gramian.adapt' has no attribute {name!r}")


__all__ = [
    "RECIPES",
    "Adapted",
    "AdaptedLinear",
    "Adapter",
    "Context",
    "Edit",
    "Merged",
    "Plan",
    "Start",
    "attach",
    "auto",
    "by_group",
    "by_role",
    "everywhere",
    "import_peft",
    "load",
    "recipe",
    "weight_gradients",
]
