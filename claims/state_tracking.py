"""Claim: eigenvalues in [-1, 1] and products of reflections decide which groups a linear recurrence can follow.

python claims/state_tracking.py [TARGET ...]    (all of ``gramian reproduce`` by default; about 25 minutes of processor time)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from record import RESULTS, finish

from gramian.cli.reproduce import TARGETS, reproduce


def brief(values: dict[str, Any]) -> dict[str, Any]:
    """What a run came to: products right by length of words, or states right of a construction."""
    if "accuracy" not in values:
        return {"states right": round(values["states"], 4)}
    right = {f"right at {length}": round(shares["tokens"], 4) for length, shares in values["accuracy"].items()}
    return {**right, "trained at": values["reached"], "steps": values["steps"], "CPU s": values["cpu_seconds"]}


def run() -> dict[str, Any]:
    """Every target asked for; those measured earlier stay."""
    torch.set_num_threads(1)
    known = RESULTS / "state_tracking.json"
    measured: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))["measured"] if known.is_file() else {}
    for name in sys.argv[1:] or TARGETS:
        found = reproduce(name, say=lambda line: print(line, file=sys.stderr, flush=True))
        measured[name] = {
            **{label: brief(values) for label, values in found["measured"].items()},
            "cpu_seconds": found["cpu_seconds"],
            "verdict": found["verdict"],
        }
    held = [name in measured and measured[name]["verdict"] == "reproduced" for name in TARGETS]
    return {
        "claim": "parity needs negative eigenvalues; S3, S4 and A5 two reflections a token; S5 four",
        "paper": "Grazzi et al. 2025, Unlocking state-tracking; Siems et al. 2025, DeltaProduct",
        "claimed": "[0, 1] cannot learn parity, [-1, 1] can; n_h = 2 solves S3, S4 and A5, n_h = 4 solves S5",
        "measured": measured,
        "verdict": "reproduced" if all(held) else "partly" if any(held) else "not reproduced",
    }


if __name__ == "__main__":
    finish(__file__, run)
