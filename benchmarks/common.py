"""What the benchmarks share: the sentence encoder, its data split and its metric."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gramian
from gramian.compression import Layer
from gramian.grams import Grams
from gramian.models.api import planning_layers
from gramian.models.data import standard_library_docstrings
from gramian.models.loading import load_model
from gramian.models.workload import agreement, all_features
from gramian.nn import as_linear
from gramian.ops import Operator

RESULTS = Path(__file__).parent / "results"
KEEPS = (0.7, 0.5, 0.3)


class Encoder:
    """all-MiniLM-L6-v2, calibration on 60 % of the topics of CPython's documentation, quality on 160 held-out paragraphs
    of other topics and on 80 docstring paragraphs of the standard library (text of another kind).
    """

    def __init__(self) -> None:
        self.loaded = load_model(None, None)
        self.model = self.loaded.model
        corpus = self.loaded.corpus
        order = np.random.RandomState(0).permutation(len(corpus.held_out))[:160]
        self.calibration = self.loaded.workload(corpus.calibration)
        self.held_out = self.loaded.workload([corpus.held_out[i] for i in order])
        docstrings = standard_library_docstrings()
        other = np.random.RandomState(0).permutation(len(docstrings))[:80]
        self.other_kind = self.loaded.workload([docstrings[i] for i in other])

    @cached_property
    def references(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the original model on both test sets."""
        return all_features(self.model, self.held_out), all_features(self.model, self.other_kind)

    def collect(self, objective: str = "auto") -> Grams:
        """Grams of the 36 encoder linears."""
        return gramian.collect(self.model, self.calibration, objective=objective, exclude=self.loaded.heads)

    def layers(self, grams: Grams) -> dict[str, Layer]:
        """The 36 layers as the planner sees them."""
        return planning_layers(self.model, grams)

    def with_layers(self, made: Mapping[str, tuple[Operator, Tensor | None]]) -> nn.Module:
        """A copy of the model with some layers replaced."""
        small = self.loaded.copy()
        for name, (op, bias) in made.items():
            small.set_submodule(name, as_linear(op, bias))
        return small

    def score(self, small: nn.Module) -> dict[str, float]:
        """Agreement with the original on held-out topics, and the mean cosine on text of another kind."""
        reference, other = self.references
        out = agreement(reference, all_features(small, self.held_out))
        out["other_kind"] = agreement(other, all_features(small, self.other_kind))["mean"]
        return {key: round(value, 5) for key, value in out.items()}


def known(name: str) -> Any:
    """Results that ``write`` kept; None if there are none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else None


def write(name: str, rows: Any) -> None:
    """Keep results beside the scripts, with what they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    about = {
        "gramian": gramian.__version__,
        "torch": torch.__version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"measured_on": about, "results": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(Path(__file__).parent.parent)}")


def processor() -> str:
    """Instruction set level and architecture; enough to judge timings by."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
