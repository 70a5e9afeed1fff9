"""Run time and cost of the main job: stages, factorisations, peak memory, and the compressed model against the original.

    python benchmarks/speed.py          (about 5 minutes on two idle cores)

The machine should be idle: the loaded model's ratio is the median of interleaved runs, the rest are single wall times.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from common import Encoder, write
from gramian.linalg import reduced_rank
from gramian.models.job import Job, Settings


def stages(objective: str) -> dict[str, float]:
    """Seconds of each stage of ``gramian compress --keep 0.5``."""
    with TemporaryDirectory() as folder:
        job = Job(None, None, Path(folder) / "out", Settings(keep=0.5, objective=objective))
        report = job.run()
    times = report["times"]
    times["collect_plan_fit"] = sum(times[key] for key in ("collect", "plan", "fit"))
    return {key: round(value, 2) for key, value in times.items()}


def peak() -> float:
    """Gigabytes that ``gramian compress --keep 0.5`` takes at most, in a process of its own."""
    command = [str(Path(sys.executable).with_name("gramian")), "compress", "--keep", "0.5", "--out"]
    with TemporaryDirectory() as folder:
        subprocess.run([*command, str(Path(folder) / "out")], check=True, capture_output=True)
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2)


def factorisations(encoder: Encoder) -> dict[str, float]:
    """Seconds for the 36 two-sided and one-sided low-rank problems."""
    grams = encoder.collect()
    layers = encoder.layers(grams)
    problems = [(layer.weight, layer.gram_in, layer.gram_out) for layer in layers.values()]
    out = {}
    for name, sides in (("two_sided", 2), ("one_sided", 1)):
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            for weight, g, h in problems:
                reduced_rank(weight, g, h if sides == 2 else None)
            taken.append(time.perf_counter() - start)
        out[name] = round(sorted(taken)[1], 3)
    return out


def loaded(encoder: Encoder, settings: Settings) -> list[dict[str, float]]:
    """Original against compressed, loaded from disk, on random tokens; interleaved, medians."""
    from transformers import AutoModel

    import gramian  # noqa: F401

    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        Job(None, None, out, settings).run()
        small = AutoModel.from_pretrained(out).eval()
    rows = []
    for batch, tokens, repeats in ((1, 16, 60), (1, 128, 40), (16, 128, 15)):
        inputs = encoder.loaded.random_batch(batch, tokens)
        taken: list[list[float]] = [[], []]
        for repeat in range(repeats + 2):
            for which, model in enumerate((encoder.model, small)):
                start = time.perf_counter()
                with torch.inference_mode():
                    model(**inputs)
                if repeat > 1:
                    taken[which].append((time.perf_counter() - start) * 1e3)
        before, after = (sorted(t)[len(t) // 2] for t in taken)
        ratios = sorted(a / b for a, b in zip(*taken, strict=True))
        rows.append(
            {
                "batch": batch,
                "tokens": tokens,
                "before_ms": round(before, 2),
                "after_ms": round(after, 2),
                "faster": round(ratios[len(ratios) // 2], 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure everything and write benchmarks/results/speed.json."""
    encoder = Encoder()
    rows = {"factorisations_36_seconds": factorisations(encoder)}
    print(rows, flush=True)
    rows["stages_with_gradients"] = stages("features")
    rows["stages_without_gradients"] = stages("none")
    print(rows, flush=True)
    rows["loaded_model_at_keep_0.5"] = loaded(encoder, Settings(keep=0.5))
    rows["loaded_model_at_0.27_of_the_bytes"] = loaded(encoder, Settings(keep=0.27, cost="bytes"))
    rows["peak_memory_gb"] = peak()
    print(f"peak memory {rows['peak_memory_gb']} GB")
    write("speed", rows)


if __name__ == "__main__":
    main()
