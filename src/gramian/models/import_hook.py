"""Telling ``transformers`` about gramian's checkpoints without importing it.

``install`` costs nothing until a program imports ``transformers.quantizers.auto`` (which every model class does): the
hook then registers gramian's loader right after that module has run, and removes itself. It imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import types
import warnings
from collections.abc import Sequence
from typing import Any

_TARGET = "transformers.quantizers.auto"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only the target, through the other finders, and adds the registration to its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self or isinstance(finder, _Finder) else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _after(spec.loader, _register)
                return spec
        return None


def _after(loader: Any, action: Any) -> None:
    """Make `loader` call `action` once it has executed a module; the loader stays what it is for every other use."""
    execute = loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        execute(module)
        action()

    loader.exec_module = exec_module


def _register() -> None:
    uninstall()
    try:
        importlib.import_module("gramian.models.huggingface")  # registers; at its end, if it is itself being imported
    except Exception as error:  # an import of transformers must not fail because of gramian; loading a checkpoint will
        warnings.warn(f"gramian could not register its checkpoints with transformers: {error!r}", stacklevel=2)


_FINDER = _Finder()
_LOCK = threading.Lock()


def install() -> None:
    """Register with ``transformers`` now if it is loaded that far, else as soon as it is. Safe to call again."""
    if hasattr(sys.modules.get(_TARGET), "get_hf_quantizer"):  # the last thing that the module defines
        _register()
        return
    with _LOCK:
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Remove the hook; a registration that has happened stays."""
    with _LOCK:
        if _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)
