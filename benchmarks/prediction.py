"""Does the predicted loss rank layers and plans?

(a) One layer at a time at half its size: predicted against measured change of the embeddings, rank correlation over the
36 layers. (b) Random plans with a mix of sizes: predicted total against measured change, over 20 plans.

    python benchmarks/prediction.py
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from common import Encoder, write
from gramian.compression import Entry, Layer, Plan, build_entry
from gramian.models.api import apply_built
from gramian.models.workload import Workload, all_features, spearman


def part_of(encoder: Encoder) -> Workload:
    """The first 96 held-out paragraphs."""
    return replace(encoder.held_out, batches=encoder.held_out.batches[:3])


def change(encoder: Encoder, layers: dict[str, Layer], plan: Plan, before: Tensor) -> tuple[float, float]:
    """(predicted, measured) loss: half the mean squared change of the unit embeddings on held-out text."""
    small = encoder.loaded.copy()
    predicted = 0.0
    for entry in plan.entries:
        built = build_entry(entry, layers)
        predicted += sum(built.error.values())
        apply_built(small, built)
    after = all_features(small, part_of(encoder))
    return predicted, float((before - after).square().sum(1).mean() / 2)


def rank_at(layer: Layer, keep: float) -> int:
    """Largest skeleton rank within `keep`."""
    from gramian.ops import Skeleton

    return int(Skeleton.sizes(layer.shape, keep)[0]["rank"])


def main() -> None:
    """Run both parts."""
    encoder = Encoder()
    grams = encoder.collect()
    layers = encoder.layers(grams)
    before = all_features(encoder.model, part_of(encoder))
    single = []
    for name, layer in layers.items():
        plan = Plan("params", 0.5, 0, [Entry([name], "skeleton", {"rank": rank_at(layer, 0.5)}, 0, 0.0)])
        predicted, measured = change(encoder, layers, plan, before)
        single.append({"layer": name, "predicted": predicted, "measured": measured})
        print(f"{name:<45} predicted {predicted:.5f} measured {measured:.5f}", flush=True)
    order = spearman(*(torch.tensor([row[key] for row in single]) for key in ("predicted", "measured")))
    print(f"36 single layers: rank correlation {order:.3f}")
    r = random.Random(0)
    plans = []
    for index in range(20):
        centre = r.uniform(0.25, 0.85)
        entries = []
        for name, layer in layers.items():
            keep = min(max(r.gauss(centre, 0.2), 0.1), 1.0)
            if keep < 0.95:
                entries.append(Entry([name], "skeleton", {"rank": rank_at(layer, keep)}, 0, 0.0))
        predicted, measured = change(encoder, layers, Plan("params", 1.0, 0, entries), before)
        plans.append({"plan": index, "predicted": predicted, "measured": measured})
        print(f"plan {index:<3} predicted {predicted:.4f} measured {measured:.4f}", flush=True)
    over = spearman(*(torch.tensor([row[key] for row in plans]) for key in ("predicted", "measured")))
    print(f"20 random plans: rank correlation {over:.3f}")
    write("prediction", {"single": single, "plans": plans, "spearman_single": order, "spearman_plans": over})


if __name__ == "__main__":
    main()
