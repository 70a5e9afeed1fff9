"""Quality of the compressed sentence encoder: published baselines, ours without healing, gradient-free, healed, bytes.

    python benchmarks/encoder.py baselines plain free bytes        (about 10 minutes on two cores)
    python benchmarks/encoder.py heal                              (at most 10 minutes of healing for each of three budgets)
    python benchmarks/encoder.py heal=0.5                          (one of them)

Each part prints a table and writes benchmarks/results/encoder_<part>.json.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch

from common import KEEPS, Encoder, known, write
from gramian.compression import Entry, Layer, Plan, dense_cost, make_plan, plan_recipe, resolve_recipe
from gramian.grams import Grams
from gramian.models.api import apply_built, build_all
from gramian.models.heal import Healing, heal
from gramian.ops import Quantized


def show(name: str, keep: float, row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{name:<44} {keep:<5} cos {row['mean']:.4f}  p5 {row['p5']:.4f}  rel {row['relative_error']:.4f}  "
        f"other kind {row['other_kind']:.4f}" + "".join(f"  {k} {row[k]}" for k in ("used", "seconds") if k in row),
        flush=True,
    )


BASELINES = {
    "plain SVD, uniform rank": "svd",
    "ASVD, uniform rank": "asvd",
    "Fisher-weighted SVD, rows": "fwsvd",
    "Fisher-weighted SVD, rows and columns": "fwsvd-columns",
    "whitened SVD, uniform rank (SVD-LLM)": "svd-llm",
    "centred whitened SVD with bias (LoRD)": "lord",
    "one threshold on normalised singular values (WeLore)": "welore",
}


def baselines(encoder: Encoder, grams: Grams) -> None:
    """What others do, from the same core, no healing: recipes, and two ways to divide the budget of low-rank layers."""
    layers = encoder.layers(grams)
    rows = []

    def add(name: str, keep: float, plan: Plan) -> None:
        row = {"method": name, "keep": keep, **encoder.score(built(encoder, plan, layers)), "used": plan.used}
        rows.append(row)
        show(name, keep, row)

    for name, recipe in BASELINES.items():
        for keep in KEEPS:
            add(name, keep, plan_recipe(resolve_recipe(recipe), layers, [], keep=keep))
    naive = {"structures": "low_rank", "weighting": "input", "allocation": "exact"}
    for keep in KEEPS:
        add("whitened SVD, one budget by relative error (naive)", keep, make_plan(layers, [], keep=keep, **naive))
    for keep in KEEPS:
        plan = make_plan(layers, [], keep=keep, structures="skeleton")
        add("two Grams, one budget, low rank only (skeleton)", keep, plan)
    write("encoder_baselines", rows)


def built(encoder: Encoder, plan: Plan, layers: dict[str, Layer]) -> torch.nn.Module:
    """The model that a plan describes."""
    small = encoder.loaded.copy()
    for _, entry, made in build_all(plan, layers):
        if entry.structure != "dense":
            apply_built(small, made)
    return small


def ours(encoder: Encoder, grams: Grams, part: str, cost: str = "params", keeps: tuple[float, ...] = KEEPS) -> None:
    """The planner over everything that `auto` lets compete."""
    layers = encoder.layers(grams)
    rows = []
    for keep in keeps:
        start = time.perf_counter()
        plan = make_plan(layers, grams.joints, keep=keep, cost=cost)
        small = built(encoder, plan, layers)
        seconds = round(time.perf_counter() - start, 1)
        chosen = Counter(
            entry.structure + (f" {entry.size['bits']} bits" if "bits" in entry.size else "") for entry in plan.entries
        )
        total = sum(dense_cost(layer).of(cost) for layer in layers.values())
        row = {
            "method": f"gramian, {part}",
            "cost": cost,
            "keep": keep,
            **encoder.score(small),
            "used": round(plan.used / total, 5),
            "predicted": plan.predicted,
            "seconds": seconds,
            "chosen": dict(chosen),
        }
        rows.append(row)
        show(row["method"], keep, row)
        print(" " * 8, dict(chosen), flush=True)
    if cost == "bytes":
        rows += rounding(encoder, layers)
    write(f"encoder_{part}", rows)


def rounding(encoder: Encoder, layers: dict[str, Layer]) -> list[dict[str, Any]]:
    """Uniform rounding to 8, 4 and 3 bits, to nearest after rotation and with error feedback, at its own byte count; and
    the planner at exactly those bytes.
    """
    rows = []
    total = sum(dense_cost(layer).bytes for layer in layers.values())
    for bits in (8, 4, 3):
        nearest = {n: (Quantized.fit(layer.weight, bits=bits), layer.bias) for n, layer in layers.items()}
        keep = sum(op.nbytes for op, _ in nearest.values()) / total
        plan = Plan("bytes", keep, 0, [Entry([n], "quantized", {"bits": bits}, 0, 0.0) for n in layers])
        best = make_plan(layers, [], keep=keep, cost="bytes")
        for name, small in (
            (f"uniform rounding to {bits} bits, rotated, to nearest", encoder.with_layers(nearest)),
            (f"uniform rounding to {bits} bits, with feedback", built(encoder, plan, layers)),
            (f"gramian at the bytes of {bits} bits", built(encoder, best, layers)),
        ):
            row = {"method": name, "cost": "bytes", "keep": round(keep, 5), **encoder.score(small)}
            rows.append(row)
            show(name, round(keep, 4), row)
    return rows


MODULES = {
    # Sheet of references: neuron selection in the MLPs (pivoted), per-head joint truncation of value/output and query/key.
    "MLP neurons": (("intermediate.dense", "layer.?.output.dense"), "neurons", (0.7, 0.5, 0.3)),
    "value/output per head": (
        ("attention.self.value", "attention.output.dense"),
        "value_output",
        (22 / 32, 0.5, 9 / 32),
    ),
    "query/key per head": (("attention.self.query", "attention.self.key"), "query_key", (22 / 32, 0.5, 9 / 32)),
}


def modules(encoder: Encoder, grams: Grams) -> None:
    """One kind of module compressed, the rest as it is, every module by the same share."""
    layers = encoder.layers(grams)
    rows = []
    for name, (patterns, kind, keeps) in MODULES.items():
        chosen = {n: layer for n, layer in layers.items() if any(fnmatch(n, f"*{p}") for p in patterns)}
        if kind == "neurons":
            chosen = {n: layer for n, layer in chosen.items() if "attention" not in n}
        for keep in keeps:
            # Indices and dropped dimensions count a little: just enough more room for the reference's own sizes.
            plan = make_plan(chosen, grams.joints, keep=keep * 1.01, structures=kind, allocation="uniform")
            row = {"method": name, "keep": round(keep, 4), **encoder.score(built(encoder, plan, chosen))}
            rows.append(row)
            show(name, round(keep, 2), row)
    write("encoder_modules", rows)


HEALING = {
    0.7: Healing(steps=800),
    0.5: Healing(steps=1200),
    0.3: Healing(steps=500, rate=2e-4),
}
"""At most ten minutes each on two cores. The more was taken away, the further the factors go: a higher rate."""


def healed(encoder: Encoder, grams: Grams, keeps: Sequence[float]) -> None:
    """The plan of `plain`, healed; rows of other budgets stay as they were measured."""
    layers = encoder.layers(grams)
    rows = [row for row in known("encoder_heal") or [] if row["keep"] not in keeps]
    for keep in keeps:
        plan = make_plan(layers, grams.joints, keep=keep)
        small = built(encoder, plan, layers)
        changed = [name for entry in plan.entries if entry.structure != "dense" for name in entry.layers]
        settings = HEALING[keep]
        start = time.perf_counter()
        heal(small, encoder.model, changed, encoder.calibration, settings)
        seconds = round(time.perf_counter() - start, 1)
        row = {
            "method": "gramian, healed",
            "keep": keep,
            **encoder.score(small),
            "steps": settings.steps,
            "rate": settings.rate,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
        }
        rows.append(row)
        show(row["method"], keep, row)
        write("encoder_heal", sorted(rows, key=lambda row: -row["keep"]))


def main(parts: list[str]) -> None:
    """Run the named parts."""
    encoder = Encoder()
    start = time.perf_counter()
    grams = encoder.collect()
    print(f"collect with gradients: {time.perf_counter() - start:.1f} s")
    if "baselines" in parts:
        baselines(encoder, grams)
    if "plain" in parts:
        ours(encoder, grams, "plain")
    if "bytes" in parts:
        ours(encoder, grams, "bytes", cost="bytes", keeps=(0.26, 0.14, 0.1))
    if "flops" in parts:
        ours(encoder, grams, "flops", cost="flops")
    if "free" in parts:
        start = time.perf_counter()
        free = encoder.collect("none")
        print(f"collect without gradients: {time.perf_counter() - start:.1f} s")
        ours(encoder, free, "free")
    if "modules" in parts:
        modules(encoder, grams)
    for part in parts:
        if part.partition("=")[0] == "heal":
            healed(encoder, grams, [float(part[5:])] if part[5:] else KEEPS)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:] or ["baselines", "plain", "free", "bytes"])
