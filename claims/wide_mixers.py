"""Claim: at a fixed number of connections, a wider (sparser) mixer layer is better, until optimisation suffers.

python claims/wide_mixers.py
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import torch
from record import finish
from tasks import accuracy, digits, fit_digits
from torch import nn

from gramian.nn import StructuredLinear, spectral_
from gramian.ops import MixerSize, mixer_sizes, random_mixer

CONNECTIONS, SEEDS, STEPS = 65536, (0, 1, 2), 250


def network(size: MixerSize, seed: int) -> nn.Sequential:
    """64 -> width -> width -> 10, the hidden layer a random permuted mixer pair of that many tokens and channels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pair = random_mixer((size.channels, size.channels), (size.tokens, size.tokens), generator=generator)
    hidden = StructuredLinear(pair, torch.zeros(size.width))
    spectral_(hidden)
    first, last = nn.Linear(64, size.width), nn.Linear(size.width, 10)
    # The layers at the ends stay as they start: what is compared is the hidden layer's number of connections.
    first.requires_grad_(requires_grad=False)
    return nn.Sequential(first, nn.GELU(), hidden, nn.GELU(), last)


def run() -> dict[str, Any]:
    """Test accuracy along the widths that the connections allow."""
    _, _, x, y = digits()
    sizes = sorted(mixer_sizes(CONNECTIONS), key=lambda size: size.width)
    few = [size for size in sizes if size.tokens in (1, 2, 4, 8, 16, 32) and size.tokens <= size.channels]
    found: dict[int, float] = {}
    for size in few:
        scores = []
        for seed in SEEDS:
            model = network(size, seed)
            trained = [p for p in model.parameters() if p.requires_grad]
            fit_digits(model, torch.optim.Adam(trained, lr=2e-3), steps=STEPS, seed=seed)
            scores.append(accuracy(model, x, y))
        found[size.width] = round(statistics.mean(scores), 4)
    widths = sorted(found)
    rises = found[widths[-1]] - found[widths[0]]
    order = sum(found[b] >= found[a] - 0.002 for a, b in pairwise(widths)) / max(1, len(widths) - 1)
    return {
        "claim": f"with {CONNECTIONS} connections in the hidden layer, test accuracy on digits rises with its width",
        "paper": "Hayase & Karakida 2024, Understanding MLP-Mixer as a wide and sparse MLP",
        "claimed": "accuracy rises with the effective width at fixed connections and peaks where tokens and channels are alike",
        "measured": {
            "test accuracy by width": {str(w): found[w] for w in widths},
            "share of steps that rise": round(order, 2),
        },
        "verdict": "reproduced" if rises > 0.01 and order >= 0.8 else "partly" if rises > 0 else "not reproduced",
    }


if __name__ == "__main__":
    finish(__file__, run)
