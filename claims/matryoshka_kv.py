"""Claim: trained orthogonal projections keep a language model sound at key-value budgets where principal components alone do
not.

python claims/matryoshka_kv.py
"""

from __future__ import annotations

from typing import Any

import torch
from record import finish
from tasks import Characters
from torch import Tensor

from gramian.models.kv_cache import (
    KeyValueProjection,
    allocate,
    allocate_measured,
    collect_key_values,
    evaluate_key_values,
    predicted_errors,
    principal_bases,
    train_bases,
)

CONTEXT, STEPS, TURNS, BUDGETS = 128, 800, 400, (0.5, 0.37, 0.25)


def batches(part: Tensor, count: int, size: int, seed: int) -> list[Tensor]:
    """Random pieces of a text, (size, CONTEXT) each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        part[torch.randint(len(part) - CONTEXT, (size, 1), generator=generator) + torch.arange(CONTEXT)]
        for _ in range(count)
    ]


def language_model(text: Characters) -> Any:
    """A Llama of three blocks, 128 wide: 4 query and 2 key-value heads of 32 numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=text.size,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step, ids in enumerate(batches(text.train, STEPS, 16, 0)):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * (1 - step / STEPS)
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def stored(model: Any, projection: KeyValueProjection | None, ids: Tensor) -> int:
    """Bytes that a cache holds after these tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if projection is None else projection.cache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def run() -> dict[str, Any]:
    """One model, three budgets, all variants on the same held-out text."""
    text = Characters()
    model = language_model(text)
    calibration, held = batches(text.train, 24, 16, 1), batches(text.test, 6, 16, 2)
    states = collect_key_values(model, calibration)
    starts = {weighting: principal_bases(states, weighting=weighting) for weighting in ("none", "loss")}
    turned = {weighting: train_bases(model, calibration, start, steps=TURNS) for weighting, start in starts.items()}
    plain = stored(model, None, held[0])
    rows: dict[str, dict[str, list[float]]] = {}
    for keep in BUDGETS:
        nearest = round(32 * keep) / 32
        variants = {
            "principal, uniform": starts["none"].uniform(nearest),
            "trained, uniform": turned["none"].uniform(nearest),
        }
        for label, bases in (
            ("principal", starts["none"]),
            ("trained", turned["none"]),
            ("loss-weighted", starts["loss"]),
            ("loss-weighted and trained", turned["loss"]),
        ):
            variants[f"{label}, predicted ranks"] = allocate(
                bases, keep, errors=predicted_errors(bases, states), step=2
            )
        variants["trained, measured ranks"] = allocate_measured(model, calibration[:1], turned["none"], keep)
        rows[str(keep)] = {}
        for label, projection in variants.items():
            found = evaluate_key_values(model, held, projection)
            share = stored(model, projection, held[0]) / plain
            rows[str(keep)][label] = [round(found["perplexity"], 4), round(found["kl"], 5), round(share, 4)]
    whole = evaluate_key_values(model, held, None)["perplexity"]

    def rise(keep: float, label: str) -> float:
        return rows[str(keep)][label][0] - whole

    trained = all(rise(keep, "trained, uniform") < rise(keep, "principal, uniform") for keep in BUDGETS)
    adaptive = all(rise(keep, "trained, measured ranks") < rise(keep, "trained, uniform") for keep in BUDGETS)
    halved = all(rise(keep, "trained, measured ranks") < 0.5 * rise(keep, "principal, uniform") for keep in BUDGETS)
    held_up = [trained, adaptive, halved]
    return {
        "claim": "at every budget, trained bases beat principal ones, measured ranks beat uniform ones, and both together "
        "at least halve the rise of the perplexity",
        "paper": "MatryoshkaKV 2024: Adaptive KV compression via trainable orthogonal projection",
        "claimed": "over 90 % of performance at 0.4 of the cache, where principal components fail",
        "measured": {
            "perplexity with the whole cache": round(whole, 4),
            "perplexity, divergence and share of bytes stored, by budget": rows,
        },
        "verdict": "reproduced" if all(held_up) else "partly" if any(held_up) else "not reproduced",
    }


if __name__ == "__main__":
    finish(__file__, run)
