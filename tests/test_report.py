"""The report: its schema, its page in a real browser, its closing table on terminals of any width."""

from __future__ import annotations

import copy
import html.parser
import io
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

import gramian.report
from gramian.errors import GramianError
from gramian.report import charts, compress_page, page, terminal

KINDS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}


def example(blocks: int = 6, keep: float = 0.5) -> dict:
    """A report as the sentence encoder gives it: neurons picked in the MLPs, skeletons and dense layers elsewhere."""
    rng = random.Random(0)
    layers = []
    for block in range(blocks):
        for kind, (out, inputs) in KINDS.items():
            name = f"encoder.layer.{block}.{kind}"
            total, smaller = out * inputs, min(out, inputs)
            joint: list[str] = []
            if "attention" not in kind and block % 3 != 2:
                neurons = int(1536 * keep * rng.uniform(0.7, 1.3))
                structure, size, after = "neurons", {"neurons": neurons}, neurons * 384
                other = "output.dense" if kind == "intermediate.dense" else "intermediate.dense"
                joint = [f"encoder.layer.{block}.{other}"]
            elif kind.endswith("value") and block == 5:
                structure, size, after = "dense", {}, total
            else:
                rank = int(keep * total / (out + inputs) * rng.uniform(0.7, 1.7) / 8) * 8
                structure, size, after = "skeleton", {"rank": rank}, rank * (out + inputs - rank)
            dense = structure == "dense"
            predicted = 0.0 if dense else 0.004 * math.exp(rng.gauss(0, 0.9)) * (0.6 + 0.3 * block)
            decay = rng.uniform(2.5, 4.5)
            plain = [(1 - i / 32) ** (decay / 1.6) for i in range(33)]
            weighted = [(1 - i / 32) * math.exp(-decay * 2.4 * i / 32) for i in range(33)]
            layers.append(
                {
                    "name": name,
                    "shape": [out, inputs],
                    "structure": structure,
                    "size": size,
                    "params_before": total,
                    "params_after": after,
                    "bytes_before": 4 * total,
                    "bytes_after": 4 * after,
                    "flops_before": 2 * total,
                    "flops_after": 2 * after,
                    "predicted": predicted,
                    "measured": 0.0 if dense else predicted * math.exp(rng.gauss(-0.05, 0.12)),
                    "relative": 0.0 if dense else min(1.0, 0.05 + 3 * predicted),
                    "effective_rank": smaller / decay,
                    "gram_rank": inputs - rng.randrange(12),
                    "spectrum": {"plain": plain, "weighted": weighted},
                    "joint": joint,
                }
            )
    before, after = sum(x["params_before"] for x in layers), sum(x["params_after"] for x in layers)
    rest = 12_095_616
    held_out = {
        "texts": 812,
        "mean": 0.9523,
        "p5": 0.9011,
        "relative_error": 0.3087,
        "rank_correlation": 0.9512,
        "neighbours": 0.8131,
    }
    return {
        "schema": 1,
        "gramian_version": "0.1.0",
        "command": "compress",
        "model": {
            "source": "models/all-MiniLM-L6-v2",
            "class": "BertModel",
            "parameters": before + rest,
            "load": [
                "import gramian",
                "from transformers import AutoModel",
                'model = AutoModel.from_pretrained("small")',
            ],
        },
        "settings": {
            "keep": keep,
            "cost": "params",
            "structures": ["skeleton", "block_low_rank", "neurons"],
            "objective": "features",
            "heal": 600,
            "seed": 0,
            "calibration": {
                "source": "pydoc_data.topics, 60 % of the paragraphs",
                "texts": 1240,
                "tokens": 98_304,
                "fingerprint": "sha256:5f0c7bb1a3e94a20",
            },
        },
        "budget": {"cost": "params", "keep": keep, "asked": math.ceil(after * 1.002), "used": after},
        "kept": {"layers": after / before, "model": (after + rest) / (before + rest)},
        "size": {
            "params_before": before,
            "params_after": after,
            "bytes_before": 4 * before,
            "bytes_after": 4 * after,
            "flops_before": 2 * before,
            "flops_after": 2 * after,
            "model_params_before": before + rest,
            "model_params_after": after + rest,
            "file_before": 4 * (before + rest) + 70_000,
            "file_after": 4 * (after + rest) + 90_000,
        },
        "quality": {
            "metric": "cosine of sentence embeddings",
            "held_out": held_out,
            "before_healing": {**held_out, "mean": 0.9338, "p5": 0.8702, "relative_error": 0.3639},
        },
        "speed": [
            {"batch": 16, "tokens": 128, "before_ms": 412.3, "after_ms": 287.9},
            {"batch": 1, "tokens": 16, "before_ms": 9.81, "after_ms": 8.02},
        ],
        "layers": layers,
        "left_alone": [
            {"name": "embeddings.word_embeddings", "reason": "an embedding; pass --embeddings to include it"},
            {"name": "pooler.dense", "reason": "not used by the outputs that calibration saw"},
        ],
        "warnings": ["encoder.layer.2.output.dense: 98,304 tokens for a Gram of 1,536: shrunk by 0.01"],
        "heal": {
            "steps": 600,
            "loss": [[s, 0.066 + 0.07 * math.exp(-s / 110) + rng.gauss(0, 0.0015)] for s in range(0, 601, 10)],
        },
        "times": {
            "collect": 21.4,
            "plan": 9.7,
            "fit": 6.2,
            "heal": 118.0,
            "evaluate": 8.3,
            "save": 0.9,
            "total": 164.5,
        },
        "environment": {"python": "3.11.2", "torch": "2.13.0", "platform": "Linux x86_64", "threads": 2},
    }
