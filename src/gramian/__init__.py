"""gramian: structured matrices and Gram matrices for machine learning.

Everything is imported when it is first used, so that ``import gramian`` costs next to nothing; it also arranges that the
transformers library, once imported, can load checkpoints that gramian wrote.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gramian.errors import GramianError

__version__ = "0.1.0"

_WHERE = {
    "Gram": "gramian.grams",
    "Grams": "gramian.grams",
    "Operator": "gramian.ops",
    "Plan": "gramian.compression",
    "StructuredEmbedding": "gramian.nn",
    "StructuredLinear": "gramian.nn",
    "Workload": "gramian.models.workload",
    "collect": "gramian.models.api",
    "compress": "gramian.models.api",
    "fit": "gramian.fitting",
    "load_into": "gramian.models.checkpoint",
    "match": "gramian.models.merging",
    "merge": "gramian.models.merging",
    "plan": "gramian.models.api",
    "prepare": "gramian.nn",
    "save": "gramian.models.checkpoint",
    "save_huggingface": "gramian.models.huggingface",
    "save_sentence_transformer": "gramian.models.sentence_encoder",
    "spectrum": "gramian.spectra",
}

if TYPE_CHECKING:
    from gramian.compression import Plan
    from gramian.fitting import fit
    from gramian.grams import Gram, Grams
    from gramian.models.api import collect, compress, plan
    from gramian.models.checkpoint import load_into, save
    from gramian.models.huggingface import save_huggingface
    from gramian.models.merging import match, merge
    from gramian.models.sentence_encoder import save_sentence_transformer
    from gramian.models.workload import Workload
    from gramian.nn import StructuredEmbedding, StructuredLinear, prepare
    from gramian.ops import Operator
    from gramian.spectra import spectrum


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'gramian' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_WHERE, "GramianError", "__version__"])


def _install_hook() -> None:
    from gramian.models.import_hook import install

    install()


_install_hook()

__all__ = [
    "Gram",
    "GramianError",
    "Grams",
    "Operator",
    "Plan",
    "StructuredEmbedding",
    "StructuredLinear",
    "Workload",
    "__version__",
    "collect",
    "compress",
    "fit",
    "load_into",
    "match",
    "merge",
    "plan",
    "prepare",
    "save",
    "save_huggingface",
    "save_sentence_transformer",
    "spectrum",
]
