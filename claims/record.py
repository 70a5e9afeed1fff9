"""How a claim is recorded: printed, and kept in claims/results/NAME.json, from which docs/claims.md is made."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("reproduced", "partly", "not reproduced")


def finish(script: str, run: Callable[[], dict[str, Any]]) -> None:
    """Run a claim, print what came out and keep it.

    Args:
        script: the claim's file; its name names the result.
        run: gives claim, paper, claimed, measured and verdict.
    """
    start = time.perf_counter()
    found = run()
    missing = {"claim", "paper", "claimed", "measured", "verdict"} - found.keys()
    assert not missing, f"{script}: no {', '.join(missing)}"
    assert found["verdict"] in VERDICTS, f"{script}: verdict {found['verdict']!r}; expected one of {VERDICTS}"
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["measured_on"] = {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(found, indent=1)
    (RESULTS / f"{Path(script).stem}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
