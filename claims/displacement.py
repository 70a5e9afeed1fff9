"""Claim: low displacement rank beats low rank at equal parameters, on shift-structured matrices and not on Gaussian ones.

python claims/displacement.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.fitting import fit
from gramian.ops import Toeplitz

SIDE, SEEDS = 64, 5


def errors(weight: Tensor, rank: int) -> tuple[float, float]:
    """Relative Frobenius errors of low displacement rank and of low rank, of 2 n rank numbers each."""
    return (
        fit(weight, "low_displacement", rank=rank).relative ** 0.5,
        fit(weight, "block_low_rank", rank=rank).relative ** 0.5,
    )


def median_errors(weights: list[Tensor], rank: int) -> dict[str, float]:
    """Medians over matrices."""
    found = torch.tensor([errors(weight, rank) for weight in weights], dtype=torch.float64).median(0).values
    return {"low displacement": float(found[0]), "low rank": float(found[1])}


def run() -> dict[str, Any]:
    """Project matrices with and without shift structure."""
    draws = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    gaussian = [torch.randn(SIDE, SIDE, dtype=torch.float64, generator=g) for g in draws]
    numbers = [torch.randn(2 * SIDE - 1, dtype=torch.float64, generator=g) for g in draws]
    toeplitz = [Toeplitz(values, SIDE, SIDE).dense() for values in numbers]
    shuffled = [matrix[torch.randperm(SIDE, generator=g)] for matrix, g in zip(toeplitz, draws, strict=True)]
    measured = {
        **{f"Gaussian, rank {rank}": median_errors(gaussian, rank) for rank in (1, 2, 4)},
        "Toeplitz, rank 2": median_errors(toeplitz, 2),
        "inverse of Toeplitz, rank 2": median_errors([torch.linalg.inv(matrix) for matrix in toeplitz], 2),
        "Toeplitz with its rows shuffled, rank 2": median_errors(shuffled, 2),
    }
    exact = all(
        found["low displacement"] < 1e-6 < 0.1 < found["low rank"]
        for name, found in measured.items()
        if "oeplitz, rank" in name
    )
    elsewhere = all(
        abs(found["low displacement"] - found["low rank"]) < 0.02
        for name, found in measured.items()
        if name.startswith("Gaussian")
    )
    return {
        "claim": "at equal parameters, low displacement rank is exact on Toeplitz matrices and their inverses (rank 2) where "
        "low rank is far off, and has no advantage on Gaussian ones",
        "paper": "SURM, Structured Unrestricted-Rank Matrices for parameter-efficient fine-tuning (2024); the restriction to "
        "shift-structured matrices is this project's reading of its claim that the family beats low rank",
        "claimed": {"shift-structured": "exact at rank 2", "Gaussian": "errors within 0.02 of low rank"},
        "measured": measured,
        "note": "rows of a Toeplitz matrix in random order are no member of either family and do not count for the verdict",
        "verdict": "reproduced" if exact and elsewhere else "partly" if exact or elsewhere else "not reproduced",
    }


if __name__ == "__main__":
    result = run()
    print(json.dumps(result, indent=1))
    out = Path(__file__).parent / "results" / "displacement.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
