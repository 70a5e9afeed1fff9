"""The small file in a checkpoint that lets ``trust_remote_code=True`` load it without ``import gramian``."""

from __future__ import annotations

from typing import Any

MODULE = "modeling_gramian"

_HEAD = """# Loads this checkpoint with ``trust_remote_code=True``; its layers need ``pip install gramian``.

import gramian.models.huggingface  # registers the checkpoint's format
from transformers import {imports}
"""

_CLASS = '''

class {name}(_{name}):
    """The library's class; the package imported above rebuilds its compressed layers."""
'''


def remote_code(model: Any) -> tuple[str, dict[str, str]]:
    """The file's text and the ``auto_map`` of config.json, for every auto class that can load `model`'s configuration.

    Both are empty for a model whose class is not part of ``transformers`` (it has a file of its own).
    """
    import transformers
    from transformers.models.auto import modeling_auto

    known = getattr(transformers, type(model).__name__, None)
    if known is None or known not in type(model).__mro__:
        return "", {}
    auto_map: dict[str, str] = {}
    for auto, factory in sorted(vars(modeling_auto).items()):
        mapping = getattr(factory, "_model_mapping", None)
        if mapping is None or type(model.config) not in mapping:
            continue
        found = mapping[type(model.config)]
        classes = list(
            found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else [found]
        )
        names = [cls.__name__ for cls in classes if hasattr(transformers, getattr(cls, "__name__", ""))]
        if names:
            auto_map[auto] = type(model).__name__ if type(model).__name__ in names else names[0]
    names = sorted({*auto_map.values(), type(model).__name__})
    imports = "".join(f"\n    {name} as _{name}," for name in names)
    text = _HEAD.format(imports=f"({imports}\n)") + "".join(_CLASS.format(name=name) for name in names)
    return text, {auto: f"{MODULE}.{name}" for auto, name in auto_map.items()}
