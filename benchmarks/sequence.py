"""Scans against their peers: forward and backward, process CPU time, one thread, interleaved.

The delta rule beside the chunked PyTorch implementation of transformers (the one that runs without a GPU) and beside causal
``scaled_dot_product_attention``; then what gates, Householder products and general transitions cost beside the plain delta
rule; exactness under stress; saved memory; import time.

OMP_NUM_THREADS=1 python benchmarks/sequence.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import write
from gramian.sequence import (
    DiagonalGate,
    DiagonalPlusLowRank,
    Householder,
    HouseholderProduct,
    Identity,
    ScalarGate,
    scan,
)

HEADS, WIDTH = 4, 64
LENGTHS = (512, 1024, 2048, 8192)
REPEATS = {512: 9, 1024: 9, 2048: 9, 8192: 7}


def inputs(length: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    lead = (1, length, HEADS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen)

    made = {
        "q": F.normalize(normal(*lead, WIDTH), dim=-1),
        "k": F.normalize(normal(*lead, WIDTH), dim=-1),
        "v": normal(*lead, WIDTH),
        "beta": uniform(*lead),
        "scalar": -0.1 * uniform(*lead),
        "diagonal": -0.1 * uniform(*lead, WIDTH),
        "keys": F.normalize(normal(*lead, 2, WIDTH), dim=-1),
        "values": normal(*lead, 2, WIDTH),
        "betas": uniform(*lead, 2),
    }
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def transformers_chunked() -> Callable[..., Any]:
    from transformers.models.qwen3_next import modeling_qwen3_next

    function: Callable[..., Any] = modeling_qwen3_next.torch_chunk_gated_delta_rule
    # Past the decorator that would pick a GPU kernel package where one can be imported.
    return getattr(function, "__wrapped__", function)


def calls(x: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    peer = transformers_chunked()
    none = torch.zeros_like(x["beta"])
    q, k, v, beta = x["q"], x["k"], x["v"], x["beta"]
    delta = Householder(k, beta)
    return {
        "delta rule": lambda: scan(delta, v, q)[0],
        "transformers": lambda: peer(q, k, v, none, beta)[0],
        "attention": lambda: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ),
        "gated delta rule": lambda: scan(delta @ ScalarGate(x["scalar"]), v, q)[0],
        "two Householder": lambda: scan(HouseholderProduct(x["keys"], x["betas"]), x["values"], q)[0],
        "diagonal gate (GLA)": lambda: scan(DiagonalGate(x["diagonal"]), (k, v), q)[0],
        "delta @ diagonal (KDA)": lambda: scan(delta @ DiagonalGate(x["diagonal"]), v, q)[0],
        "diagonal plus rank one": lambda: scan(DiagonalPlusLowRank(x["diagonal"], -k, beta[..., None] * k), (k, v), q)[
            0
        ],
        "linear attention": lambda: scan(Identity(), (k, v), q)[0],
    }


def milliseconds(
    functions: dict[str, Callable[[], Tensor]], leaves: list[Tensor], repeats: int, backward: bool
) -> dict[str, dict[str, float]]:
    """Least and median CPU time of each, one round of all after another."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            for leaf in leaves:
                leaf.grad = None
            with torch.set_grad_enabled(backward):
                start = time.process_time()
                out = function()
                if backward:
                    out.backward(torch.ones_like(out))
                spent = time.process_time() - start
            if turn:
                taken[name].append(spent * 1e3)
    return {
        name: {"least": round(min(row), 2), "median": round(statistics.median(row), 2)} for name, row in taken.items()
    }


def saved_megabytes(function: Callable[[], Tensor]) -> float:
    """What autograd keeps for the backward pass."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return round(sum(seen.values()) / 2**20, 2)


def stress() -> dict[str, float]:
    """Relative error of float32 against float64 step by step: one key, 4096 times."""
    gen = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(WIDTH, generator=gen), dim=0).expand(1, 4096, 1, WIDTH)
    q, v = (torch.randn(1, 4096, 1, WIDTH, generator=gen) for _ in range(2))
    errors = {}
    for name, beta in (("beta 2", torch.full((1, 4096, 1), 2.0)), ("beta U(0, 2)", 2 * torch.rand(1, 4096, 1))):
        found, _ = scan(Householder(key, beta), v, q)
        wanted, _ = scan(Householder(key.double(), beta.double()), v.double(), q.double(), method="recurrent")
        errors[name] = float((found - wanted).abs().max() / wanted.abs().max())
    return errors


def import_seconds(statement: str) -> float:
    """Least CPU time of a fresh interpreter."""
    code = f"import torch, time; s = time.process_time(); {statement}; print(time.process_time() - s)"
    return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))


def main() -> None:
    """Measure and write benchmarks/results/sequence.json."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"heads": HEADS, "width": WIDTH, "forward and backward": {}, "forward": {}}
    for length in LENGTHS:
        x = inputs(length)
        functions = calls(x)
        for backward, part in ((True, "forward and backward"), (False, "forward")):
            row = milliseconds(functions, list(x.values()), REPEATS[length], backward)
            results[part][str(length)] = row
            for name, times in row.items():
                print(f"{part:<21} {length:>5} {name:<24} {times['least']:>9.1f} ms", flush=True)
    both = results["forward and backward"]

    def least(length: int, name: str) -> float:
        return float(both[str(length)][name]["least"])

    results["ratios"] = {
        "transformers / delta rule, 2048": least(2048, "transformers") / least(2048, "delta rule"),
        "transformers / delta rule, 8192": least(8192, "transformers") / least(8192, "delta rule"),
        "attention / delta rule, 1024": least(1024, "attention") / least(1024, "delta rule"),
        "attention / delta rule, 8192": least(8192, "attention") / least(8192, "delta rule"),
        "delta rule, 8192 / 2048": least(8192, "delta rule") / least(2048, "delta rule"),
        **{
            f"{name} / delta rule, 2048": least(2048, name) / least(2048, "delta rule")
            for name in (
                "gated delta rule",
                "two Householder",
                "diagonal gate (GLA)",
                "delta @ diagonal (KDA)",
                "diagonal plus rank one",
                "linear attention",
            )
        },
    }
    x = inputs(2048)
    functions = calls(x)
    results["saved MiB, 2048"] = {
        name: saved_megabytes(functions[name])
        for name in ("delta rule", "gated delta rule", "transformers", "attention")
    }
    results["stress"] = stress()
    results["import seconds over torch"] = import_seconds("import gramian.sequence")
    for part in ("ratios", "saved MiB, 2048", "stress"):
        results[part] = {name: round(value, 6) for name, value in results[part].items()}
        for name, value in results[part].items():
            print(f"{part:<18} {name:<42} {value:.4g}")
    print(f"import {results['import seconds over torch']:.3f} s")
    write("sequence", results)


if __name__ == "__main__":
    main()
