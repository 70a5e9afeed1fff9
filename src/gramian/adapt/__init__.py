"""Fine-tuning by structured updates: one adapter with a few axes, on any model."""

from gramian.adapt.adapter import Adapter, Context, Start, by_group, by_role, everywhere
from gramian.adapt.attach import Adapted, attach
from gramian.adapt.files import load
from gramian.adapt.gradients import weight_gradients
from gramian.adapt.layer import AdaptedLinear, Edit
from gramian.adapt.merge import Merged
from gramian.adapt.peft_format import import_peft
from gramian.adapt.planning import Plan, auto
from gramian.adapt.recipes import RECIPES, recipe

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
