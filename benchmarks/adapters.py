"""What an adapter costs: against the plain layer and against the peft library, interleaved in one run, one thread.

Process CPU time of one thread, so that other work on the machine counts little; the median of pairwise differences (or
ratios) of neighbouring measurements. Also import time in fresh processes.

python benchmarks/adapters.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import peft
import torch
from torch import Tensor, nn

from common import write
from gramian.adapt import Adapter, Context, Start, attach
from gramian.ops import BlockLowRank

RANK = 8


def factors(weight: Tensor, context: Context) -> BlockLowRank:
    """Two random factors, none of them zero."""
    out, in_ = context.shape
    left = torch.randn(out, context.rank, generator=context.generator)
    return BlockLowRank.low_rank(left, torch.randn(context.rank, in_, generator=context.generator) / in_)


def pair(weight: Tensor, context: Context) -> Start:
    """The same with a frozen start."""
    update = factors(weight, context)
    return Start(update, update)


def layers(d: int) -> dict[str, nn.Module]:
    """One d x d layer, bare and adapted in every way."""

    def fresh() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(d, d))

    bare, low, two, off, merged = (fresh() for _ in range(5))
    attach(low, Adapter(factors, alpha=16.0), rank=RANK)
    attach(two, Adapter(pair, alpha=16.0), rank=RANK)
    attach(off, Adapter(factors, alpha=16.0), rank=RANK).disable()
    attach(merged, Adapter(factors, alpha=16.0), rank=RANK).merge()
    bare.requires_grad_(False)
    config = {"r": RANK, "lora_alpha": 16, "target_modules": ["0"]}
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(**config)).base_model.model
    dora = peft.get_peft_model(fresh(), peft.LoraConfig(use_dora=True, **config)).base_model.model
    models = {"bare": bare, "gramian": low, "gramian, start subtracted": two, "gramian, disabled": off}
    models |= {"gramian, merged": merged, "peft LoRA": theirs, "peft DoRA": dora}
    return {name: model[0] for name, model in models.items()}


def interleaved(calls: Mapping[str, Callable[[], object]], group: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds of one call, `repeats` times, the contestants in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(group):
                call()
            taken[name].append((time.process_time() - start) / group * 1e6)
    return taken


def forward(d: int, batch: int, group: int, repeats: int, gradients: bool) -> dict[str, dict[str, float]]:
    """Each contestant's time, what it adds to the bare layer, and the ratio."""
    x = torch.randn(batch, d)
    with torch.set_grad_enabled(gradients):
        contestants = {name: (lambda layer=layer: layer(x)) for name, layer in layers(d).items()}
        taken = interleaved(contestants, group, repeats)
    bare = taken["bare"]
    return {
        name: {
            "microseconds": round(statistics.median(times), 1),
            "added": round(statistics.median(t - b for t, b in zip(times, bare, strict=True)), 1),
            "added, least": round(min(times) - min(bare), 1),
            "ratio": round(statistics.median(t / b for t, b in zip(times, bare, strict=True)), 3),
        }
        for name, times in taken.items()
    }


def import_seconds(module: str, repeats: int = 7) -> float:
    """CPU seconds that importing a module adds to torch, in fresh processes; median."""
    code = f"import torch, time; t = time.process_time(); import {module}; print(time.process_time() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(repeats)
    ]
    return round(statistics.median(float(run.stdout) for run in runs), 3)


def main() -> None:
    """Measure and write benchmarks/results/adapters.json."""
    torch.set_num_threads(1)
    results: dict[str, object] = {
        "import over torch, CPU seconds": {m: import_seconds(m) for m in ("gramian.adapt", "peft")},
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "rank": RANK,
    }
    for name, sizes in {
        "d 64, batch 1": (64, 1, 300, 41),
        "d 1024, batch 32": (1024, 32, 4, 61),
        "d 1024, batch 256": (1024, 256, 1, 31),
    }.items():
        for gradients in (False, True):
            label = f"{name}, {'with' if gradients else 'without'} gradients"
            results[label] = rows = forward(*sizes, gradients)
            for contestant, row in rows.items():
                print(
                    f"{label:<38} {contestant:<28} {row['microseconds']:10.1f} us {row['added']:+9.1f} x{row['ratio']:.3f}"
                )
    write("adapters", results)


if __name__ == "__main__":
    main()
