"""Claim: a dense guide early in training lowers the loss of low-rank layers.

python claims/structured_feed_forward.py
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from record import finish
from tasks import Characters, character_model, fit_characters
from torch import nn

from gramian.nn import guide, structured, unguide

WIDTH, RANK, STEPS, SEEDS, RATE = 512, 32, 1500, (0, 1, 2), 2e-3


def loss(text: Characters, seed: int, kind: str) -> float:
    """Test loss of a character model with two hidden layers: dense, low rank, or low rank with a guide."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        hidden: list[nn.Module] = [structured(WIDTH, WIDTH, "dense", generator=generator) for _ in range(2)]
    else:
        hidden = [structured(WIDTH, WIDTH, "block_low_rank", rank=RANK, generator=generator) for _ in range(2)]
    model = character_model(text, hidden, width=WIDTH)
    if kind == "guided":
        guide(model, STEPS, share=0.5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    value = fit_characters(model, text, optimiser, steps=STEPS, seed=seed)
    unguide(model)
    return value


def run() -> dict[str, Any]:
    """Three ways, over seeds."""
    text = Characters()
    losses = {kind: [loss(text, seed, kind) for seed in SEEDS] for kind in ("dense", "low rank", "guided")}
    gains = [plain - guided for plain, guided in zip(losses["low rank"], losses["guided"], strict=True)]
    gain = statistics.mean(gains)
    return {
        "claim": f"self-guided training lowers the test loss of rank {RANK} layers of width {WIDTH} by over 0.02 nats",
        "paper": "Wei et al. 2024, Building on Efficient Foundations",
        "claimed": "self-guided training closes part of the gap to dense (0.4 points of perplexity at 1.3 B parameters)",
        "measured": {
            "nats a character": {kind: round(statistics.mean(v), 4) for kind, v in losses.items()},
            "gain by seed": [round(g, 4) for g in gains],
        },
        "verdict": "reproduced" if gain > 0.02 and min(gains) > 0 else "partly" if gain > 0 else "not reproduced",
    }


if __name__ == "__main__":
    finish(__file__, run)
