"""Claim: once their hidden units are put in one order, two independently trained classifiers are joined by a straight line
of low loss, though their distance hardly falls.

python claims/weight_matching.py
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from record import finish
from tasks import accuracy, digits, fit_digits
from torch import Tensor, nn

from gramian.linalg import svd
from gramian.models.merging import match, merge

WIDTH, PAIRS, STEPS, POINTS = 512, 3, 600, 25


def train(seed: int) -> nn.Sequential:
    """A classifier with two hidden layers, from its own start and its own order of images."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    fit_digits(model, torch.optim.Adam(model.parameters(), lr=1e-3), steps=STEPS, seed=seed)
    return model


@torch.no_grad()
def barrier(a: nn.Module, b: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest rise of the loss on the straight line from a to b above the line between their losses."""
    between, losses = copy.deepcopy(a), []
    for i in range(POINTS):
        t = i / (POINTS - 1)
        for p, first, second in zip(between.parameters(), a.parameters(), b.parameters(), strict=True):
            p.copy_(torch.lerp(first, second, t))
        losses.append(float(F.cross_entropy(between(x), y)))
    return max(
        loss - (1 - i / (POINTS - 1)) * losses[0] - i / (POINTS - 1) * losses[-1] for i, loss in enumerate(losses)
    )


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module) -> float:
    """Between the parameters."""
    return float(sum((p - q).square().sum() for p, q in zip(a.parameters(), b.parameters(), strict=True)) ** 0.5)


@torch.no_grad()
def alignment(a: nn.Module, b: nn.Module, above: float) -> float:
    """How well singular directions of the middle layer with values above a share of the largest agree, 1 for the same."""
    (u, s, vh), (u2, s2, vh2) = (svd(model[2].weight.double()) for model in (a, b))
    first, second = s > above * s[0], s2 > above * s2[0]
    products = (u[:, first].mT @ u2[:, second]) * (vh[first] @ vh2[second].mT)
    scale = float(s[first].square().sum() * s2[second].square().sum()) ** 0.5
    return float(s[first] @ products @ s2[second]) / scale


def run() -> dict[str, Any]:
    """Three pairs."""
    x, y, test_x, test_y = digits()
    rows = []
    for pair in range(PAIRS):
        a, b = train(2 * pair), train(2 * pair + 1)
        moved = match(a, b, [x[:8]])
        rows.append(
            {
                "barrier on training images": [barrier(a, b, x, y), barrier(a, moved, x, y)],
                "barrier on test images": [barrier(a, b, test_x, test_y), barrier(a, moved, test_x, test_y)],
                "distance": [distance(a, b), distance(a, moved)],
                "alignment of directions above 0.3": [alignment(a, b, 0.3), alignment(a, moved, 0.3)],
                "alignment of all directions": [alignment(a, b, 0.0), alignment(a, moved, 0.0)],
                "test accuracy of both, of their mean, of the matched mean": [
                    accuracy(m, test_x, test_y) for m in (a, b, merge([a, b]), merge([a, moved]))
                ],
            }
        )
    measured = {
        name: [round(statistics.mean(row[name][i] for row in rows), 4) for i in range(len(rows[0][name]))]
        for name in rows[0]
    }
    removed = {
        part: round(
            min(1 - row[f"barrier on {part} images"][1] / row[f"barrier on {part} images"][0] for row in rows), 4
        )
        for part in ("training", "test")
    }
    nearer = round(1 - measured["distance"][1] / measured["distance"][0], 4)
    held = [min(removed.values()) >= 0.8, nearer < 0.2]
    return {
        "claim": "matching removes at least 80 % of the barrier between two classifiers of width 512, distance falls < 20 %",
        "paper": "Ainsworth et al. 2023, Git Re-Basin; Ito et al. 2024, Analysis of linear mode connectivity",
        "claimed": "no barrier after weight matching of wide networks; it aligns the leading singular directions, while the "
        "distance hardly falls",
        "measured": {
            "means of three pairs, before and after": measured,
            "least share of the barrier removed": removed,
            "share by which the distance fell": nearer,
        },
        "verdict": "reproduced" if all(held) else "partly" if held[0] else "not reproduced",
    }


if __name__ == "__main__":
    finish(__file__, run)
