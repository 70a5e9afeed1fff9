"""Claim: softmax attention turned into a gated recurrence, without new parameters, recovers most of its quality by a little
low-rank tuning.

python claims/liger.py
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from matryoshka_kv import batches, language_model
from record import finish
from tasks import Characters
from torch import Tensor

from gramian.adapt import attach, recipe
from gramian.models.convert import linearise
from gramian.sequence.models import cross_entropy, text_batches, train

LENGTH, STEPS, RANK, WINDOW = 128, 200, 8, 16


@torch.no_grad()
def perplexity(model: Any, pieces: list[Tensor]) -> float:
    """Of held-out pieces."""
    model.eval()
    losses = [float(cross_entropy(model(ids).logits[:, :-1], ids[:, 1:])) for ids in pieces]
    return math.exp(sum(losses) / len(losses))


def run() -> dict[str, Any]:
    """The same model with its attention, linearised, and tuned; with and without the window."""
    text = Characters()
    teacher = language_model(text)
    held_out = batches(text.test, 8, 16, 99)
    measured: dict[str, Any] = {"softmax attention": round(perplexity(teacher, held_out), 3)}
    recovered = 0.0
    for label, window, share in (("recurrence and window", WINDOW, 0.5), ("recurrence alone", 0, 0.0)):
        model = copy.deepcopy(teacher)
        linearise(model, window=window, share=share)
        before = perplexity(model, held_out)
        adapted = attach(model, recipe("lora"), include=["q_proj", "k_proj", "v_proj"], rank=RANK)
        train(
            model,
            text_batches(text.train, 16, LENGTH),
            steps=STEPS,
            parameters=adapted.parameter_groups(2e-3),
            weight_decay=0.0,
        )
        after = perplexity(model, held_out)
        # In nats: which share of what linearising cost comes back.
        lost, left = (math.log(x / measured["softmax attention"]) for x in (before, after))
        measured[label] = {
            "before tuning": round(before, 3),
            "after tuning": round(after, 3),
            "share of the loss that comes back": round(1 - left / lost, 3),
            "trained parameters": adapted.numel,
        }
        if share:
            recovered = 1 - left / lost
    measured["tuned on, as a share of the training tokens"] = round(STEPS / 800, 3)
    return {
        "claim": f"with a window of {WINDOW} of {LENGTH} tokens and {STEPS} steps of rank {RANK}, at least 90 % of the lost "
        "nats come back",
        "paper": "Lan et al. 2025, Liger",
        "claimed": "93 % of the Transformer's quality with 0.02 % of its training tokens (1 to 8 billion parameters)",
        "measured": measured,
        "verdict": "reproduced" if recovered >= 0.9 else "partly" if recovered >= 0.6 else "not reproduced",
    }


if __name__ == "__main__":
    finish(__file__, run)
