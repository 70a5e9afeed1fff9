"""Claim: Fisher-weighted SVD keeps more accuracy than SVD although its reconstruction error is larger.

python claims/fwsvd.py

As in the paper, a pretrained transformer is fine-tuned as a classifier, and its encoder's linear layers are compressed
without further training. The model is all-MiniLM-L6-v2; the task, to tell from a docstring of the standard library which of 16
modules it documents. That the reconstruction error is larger is no finding (SVD's is the least there is), so accuracy alone
decides.

On small networks for digits the claim did not hold (two hidden layers of 256, pretrained to fill in hidden pixels, fine-tuned
briefly, five seeds: at keep 0.3 .953 against SVD's .960; trained on the task alone .948 against .984).
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from record import finish
from torch import nn

import gramian
from gramian.models.loading import demo_directory
from gramian.models.walk import find_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from small_llama import docstrings

CLASSES, EACH, HELD_OUT, EPOCHS, BATCH, TOKENS, RATE = 16, 160, 600, 3, 16, 48, 1e-4
SEEDS, KEEPS, RECIPES = (0, 1), (0.7, 0.5, 0.3), ("svd", "fwsvd", "fwsvd-columns")
HEADS = ("classifier*", "*pooler*")
Rows = Sequence[tuple[str, int]]


def rows() -> tuple[Rows, Rows]:
    """Texts with their class, to train on and held out: of the modules with most docstrings, at most `EACH`."""
    by_module: dict[str, set[str]] = {}
    for module, text in docstrings():
        if len(text) > 40:
            by_module.setdefault(module, set()).add(text[:400])
    shuffled = random.Random(0)
    found: list[tuple[str, int]] = []
    for label, module in enumerate(sorted(by_module, key=lambda name: -len(by_module[name]))[:CLASSES]):
        texts = sorted(by_module[module])
        shuffled.shuffle(texts)
        found += [(text, label) for text in texts[:EACH]]
    shuffled.shuffle(found)
    return found[HELD_OUT:], found[:HELD_OUT]


class Classifier:
    """The fine-tuned model, and its accuracy on held-out texts."""

    def __init__(self, seed: int) -> None:
        self.train, self.held_out = rows()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(demo_directory())
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(demo_directory(), num_labels=CLASSES)
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
        order = random.Random(seed)
        model.train()
        texts = list(self.train)
        steps, step = EPOCHS * (len(texts) // BATCH), 0
        for _ in range(EPOCHS):
            order.shuffle(texts)
            for i in range(0, len(texts) - BATCH + 1, BATCH):
                batch = texts[i : i + BATCH]
                for group in optimiser.param_groups:
                    group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
                loss = model(**self.inputs(batch), labels=torch.tensor([label for _, label in batch])).loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                step += 1
        self.model: Any = model.eval()

    def inputs(self, batch: Rows) -> dict[str, torch.Tensor]:
        """What the model takes."""
        texts = [text for text, _ in batch]
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """Share of right answers."""
        right = 0
        for i in range(0, len(self.held_out), 50):
            batch = self.held_out[i : i + 50]
            said = model(**self.inputs(batch)).logits.argmax(-1)
            right += int((said == torch.tensor([label for _, label in batch])).sum())
        return right / len(self.held_out)

    def frobenius(self, small: nn.Module) -> float:
        """``sum ||W - A||^2 / sum ||W||^2`` over the compressed layers."""
        lost = total = 0.0
        for name, module in find_layers(self.model, exclude=HEADS).layers.items():
            made = small.get_submodule(name)
            weight = module.weight.detach()
            lost += float((weight - made.op.dense()).square().sum()) if hasattr(made, "op") else 0.0
            total += float(weight.square().sum())
        return lost / total


def run() -> dict[str, Any]:
    """Every recipe at every budget, over seeds."""
    dense: list[float] = []
    found: dict[float, dict[str, list[tuple[float, float]]]] = {keep: {r: [] for r in RECIPES} for keep in KEEPS}
    for seed in SEEDS:
        tuned = Classifier(seed)
        dense.append(tuned.accuracy(tuned.model))
        texts = [text for text, _ in tuned.train[:400]]
        grams = gramian.collect(tuned.model, texts, tokenizer=tuned.tokenizer, exclude=HEADS, seed=seed)
        for keep, by_recipe in found.items():
            for recipe in RECIPES:
                small = gramian.compress(tuned.model, grams=grams, recipe=recipe, keep=keep)
                by_recipe[recipe].append((tuned.accuracy(small), tuned.frobenius(small)))
    measured: dict[str, Any] = {"accuracy of the original": round(statistics.mean(dense), 4)}
    for keep, by_recipe in found.items():
        for what, which in (("accuracy", 0), ("relative squared error", 1)):
            means = {r: round(statistics.mean(row[which] for row in by_recipe[r]), 4) for r in RECIPES}
            measured[f"{what} at keep {keep}"] = means

    def holds(keep: float) -> bool:
        pairs = list(zip(found[keep]["fwsvd"], found[keep]["svd"], strict=True))
        return statistics.mean(f[0] - s[0] for f, s in pairs) > 0 and all(f[1] > s[1] for f, s in pairs)

    held = [keep for keep in KEEPS if holds(keep)]
    return {
        "claim": "a fine-tuned classifier is more accurate than with SVD while the reconstruction error is larger, at keep "
        f"{', '.join(map(str, KEEPS))}",
        "paper": "Hsu et al. 2022, Language model compression with weighted low-rank factorization",
        "claimed": "task accuracy much closer to the original's, at a larger reconstruction error",
        "measured": {**measured, "holds at keep": held},
        "verdict": "reproduced" if len(held) == len(KEEPS) else "partly" if held else "not reproduced",
    }


if __name__ == "__main__":
    finish(__file__, run)
