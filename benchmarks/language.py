"""Language models: every recipe on one trained small Llama, same calibration, same budget.

    python benchmarks/language.py [MODEL] [quality] [heal] [bytes] [again] [speed] [large]

MODEL is by default the one of examples/small_llama.py (trained when not in the cache, which takes some minutes). quality:
perplexity and divergence at 70 and 50 % of the linears' parameters, without training. heal: the same with ten minutes of
training. bytes: at 27 % of the bytes in bfloat16; again: two of these on calibration texts drawn anew. speed: generation, one
sequence with cached keys and values, of the model compressed to half the FLOPs, both in turn. large: the same of a random model
of 146 million parameters, and in bfloat16 with weights of 4 bits. A row of quality that is in results/language.json already is
left alone: remove that file to measure all anew.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gramian
from common import known, write
from gramian.compression import Entry, Plan
from gramian.compression.recipes import RECIPES
from gramian.errors import GramianError
from gramian.grams import Grams
from gramian.models.heal import Healing, heal
from gramian.models.loading import load_model
from gramian.models.walk import find_layers
from gramian.models.workload import language_agreement
from gramian.nn import prepare

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
KEEPS = (0.7, 0.5)
HEALING = 600.0
"""Seconds of processor time."""
BYTES = 0.27
DRAWS = 6
"""Of the calibration texts, with replacement: what of a difference is their choice."""
RATE = 3e-4
"""Learning rate of healing."""
ORDER = ["auto", "svd-llm", "modegpt", "svd", "asvd", "fwsvd", "fwsvd-columns", "lord", "welore", "depth"]
"""Cheap recipes first."""
CLONE = "gramian.models.clone:clone"
"""Trains from the start: no part of a comparison without training."""


class Small:
    """The model, calibrated on the topics that it was trained on, measured on 160 paragraphs of others."""

    def __init__(self, directory: Path) -> None:
        self.loaded = load_model(str(directory), None)
        self.model = self.loaded.model
        corpus = self.loaded.corpus
        order = np.random.RandomState(0).permutation(len(corpus.held_out))[:160]
        self.calibration = self.loaded.workload(corpus.calibration)
        self.held_out = self.loaded.workload([corpus.held_out[i] for i in order])
        self.all_held_out = self.loaded.workload(corpus.held_out)

    @cached_property
    def grams(self) -> Grams:
        """Collected once for all."""
        return gramian.collect(self.model, self.calibration, exclude=self.loaded.heads)

    def compress(self, **options: Any) -> nn.Module:
        """By ``gramian.compress`` with the common Grams."""
        return gramian.compress(self.model, self.calibration, grams=copy.copy(self.grams), **options)

    def score(self, small: nn.Module, everything: bool = False) -> dict[str, float]:
        """Predictions on the held-out text; `everything`: on all of it, for differences of a thousandth."""
        found = language_agreement(self.model, small, self.all_held_out if everything else self.held_out)
        rise = found["perplexity_after"] - found["perplexity_before"]
        return {**{key: round(value, 5) for key, value in found.items()}, "rise": round(rise, 5)}

    def share(self, small: nn.Module) -> float:
        """Of the linear layers' parameters, what is left."""
        names = tuple(f"{name}." for name in find_layers(self.model, exclude=self.loaded.heads).layers)
        before, after = (
            sum(p.numel() for name, p in m.named_parameters() if name.startswith(names)) for m in (self.model, small)
        )
        return round(after / before, 4)


class Results:
    """What is known so far, on disk after every row."""

    @property
    def rows(self) -> dict[str, Any]:
        """All rows by section; another process may have added some."""
        return known("language") or {}

    def has(self, section: str, key: str) -> bool:
        """Whether an earlier run measured it."""
        return key in self.rows.get(section, {})

    def keep(self, section: str, key: str, row: dict[str, Any]) -> None:
        """Add a row, print and write."""
        print(section, key, row, flush=True)
        rows = self.rows
        rows.setdefault(section, {})[key] = row
        write("language", rows)


def quality(small: Small, results: Results) -> None:
    chosen = [r.name for r in RECIPES.values() if "params" in r.costs and r.layers == "linear" and r.run != CLONE]
    for recipe in sorted(chosen, key=order):
        for keep in KEEPS:
            if results.has("quality", f"{recipe} {keep}"):
                continue
            start = time.process_time()
            try:
                made = small.compress(recipe=recipe, keep=keep, cost="params")
            except GramianError as error:
                results.keep("quality", f"{recipe} {keep}", {"refused": str(error)})
                continue
            row = {**small.score(made), "kept": small.share(made), "seconds": round(time.process_time() - start, 1)}
            results.keep("quality", f"{recipe} {keep}", row)


def order(name: str) -> int:
    """Cheap ones first."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


def healed(small: Small, results: Results) -> None:
    """`HEALING` seconds of processor time, whatever a step costs: the steps are counted on a few first."""
    for keep in KEEPS:
        if results.has("heal", f"auto {keep}"):
            continue
        made = small.compress(recipe="auto", keep=keep, cost="params")
        before = dict(small.model.named_modules())
        changed = [n for n, m in made.named_modules() if hasattr(m, "gramian_origin") and n in before]
        start = time.process_time()
        heal(copy.deepcopy(made), small.model, changed, small.calibration, Healing(steps=5, rate=RATE))
        steps = max(20, int(5 * HEALING / (time.process_time() - start)))
        start = time.process_time()
        heal(made, small.model, changed, small.calibration, Healing(steps=steps, rate=RATE))
        seconds = round(time.process_time() - start, 1)
        row = {**small.score(made), "kept": small.share(made), "steps": steps, "seconds": seconds}
        results.keep("heal", f"auto {keep}", row)


def in_bytes(small: Small, results: Results) -> None:
    half = copy.deepcopy(small.model).to(torch.bfloat16)
    grams = small.grams
    names = list(grams)
    made = {"higgs, 4 bits everywhere": gramian.compress(half, four_bits(names, scaling="rms"), grams=grams)}
    for recipe in ("auto", "higgs", "gptq"):
        made[recipe] = gramian.compress(half, small.calibration, grams=grams, recipe=recipe, keep=BYTES, cost="bytes")
    before = sum(p.numel() * 2 for n, p in half.named_parameters() if n.removesuffix(".weight") in names)
    starts = tuple(f"{name}." for name in names)
    for label, model in made.items():
        state = model.state_dict()
        stored = sum(t.numel() * t.element_size() for n, t in state.items() if n.startswith(starts))
        results.keep(
            "bytes", label, {**small.score(model.float(), everything=True), "bytes": round(stored / before, 4)}
        )


def four_bits(names: list[str], **size: Any) -> Plan:
    """Every layer rounded to 4 bits, to the nearest level."""
    size = {"bits": 4, "feedback": False, **size}
    return Plan("bytes", BYTES, 0, [Entry([name], "quantized", size, 0, 0.0) for name in names])


def again(small: Small, results: Results) -> None:
    texts = small.loaded.corpus.calibration
    half = copy.deepcopy(small.model).to(torch.bfloat16)
    scores: dict[str, list[dict[str, float]]] = {"auto": [], "gptq": []}
    for draw in range(DRAWS):
        chosen = np.random.RandomState(draw).choice(len(texts), len(texts))
        calibration = small.loaded.workload([texts[i] for i in chosen])
        grams = gramian.collect(small.model, calibration, exclude=small.loaded.heads)
        for recipe, found in scores.items():
            made = gramian.compress(half, calibration, grams=grams, recipe=recipe, keep=BYTES, cost="bytes", seed=draw)
            found.append(small.score(made.float(), everything=True))
            rises = [score["rise"] for score in found]
            row: dict[str, Any] = {"rise": round(statistics.mean(rises), 5), "rises": rises}
            row["divergence"] = round(statistics.mean(score["divergence"] for score in found), 5)
            results.keep("bytes, calibration drawn again", recipe, row)


def speed(small: Small, results: Results) -> None:
    made = small.compress(recipe="auto", keep=0.5, cost="flops")
    row = generation(small.model, made, small.loaded.random_batch(1, 16), tokens=48)
    results.keep("speed", "auto, half the FLOPs", {**row, **small.score(made), "layers": kinds(made)})


def large(small: Small, results: Results) -> None:
    """Random weights: speed does not depend on them. Where matrices and not the framework take the time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 2048}
    config = LlamaConfig(**shape, num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=256)
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 2048, (4, 64))} for _ in range(4)]
    prompt = {"input_ids": batches[0]["input_ids"][:1, :16], "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    count = sum(p.numel() for p in model.parameters())

    def measure(label: str, before: nn.Module, made: nn.Module) -> None:
        row = generation(before, made, prompt, tokens=24)
        results.keep(
            "speed", f"{count / 1e6:.0f} M parameters, {label}", {**row, "parameters": count, "layers": kinds(made)}
        )

    grams = gramian.collect(model, batches, exclude=["lm_head"], objective="none")
    measure("half the FLOPs", model, gramian.compress(model, grams=grams, keep=0.5, cost="flops"))
    even = four_bits(list(grams), rotate=False, grid="uniform")  # as gptq stores them, sooner made
    rotated = four_bits(list(grams))  # as auto does
    measure("4 bits, rotated", model, gramian.compress(model, rotated, grams=grams))
    half = model.to(torch.bfloat16)
    measure("bfloat16, 4 bits", half, gramian.compress(half, even, grams=grams))
    measure("bfloat16, 4 bits, rotated", half, gramian.compress(half, rotated, grams=grams))


def generation(model: nn.Module, made: nn.Module, prompt: dict[str, Any], tokens: int) -> dict[str, float]:
    """Tokens a second of both, and of the original with its layers prepared as a compressed model's are; in turn, medians."""
    models = {"before": model, "after": made, "before, prepared": prepare(copy.deepcopy(model), recast=False)}
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in range(11):
            for name, each in models.items():
                start = time.perf_counter()
                each.generate(**prompt, **options)
                if repeat > 1:
                    taken[name].append(time.perf_counter() - start)
    rates = {name: tokens / statistics.median(seconds) for name, seconds in taken.items()}
    ratios = {"ratio": rates["after"] / rates["before"], "prepared alone": rates["before, prepared"] / rates["before"]}
    return {key: round(value, 3) for key, value in (rates | ratios).items()}


def kinds(made: nn.Module) -> dict[str, int]:
    """How many layers became what."""
    return dict(
        Counter(m.op.kind if hasattr(m, "op") else "narrower" for m in made.modules() if hasattr(m, "gramian_origin"))
    )


SECTIONS = {"quality": quality, "heal": healed, "bytes": in_bytes, "again": again, "speed": speed, "large": large}


def main() -> None:
    arguments = sys.argv[1:]
    wanted = [a for a in arguments if a in SECTIONS] or list(SECTIONS)
    folders = [a for a in arguments if a not in SECTIONS]
    if folders:
        directory = Path(folders[0])
    else:
        from small_llama import small_llama

        directory = small_llama()
    small, results = Small(directory), Results()
    results.keep("model", "original", small.score(small.model))
    for section in wanted:
        SECTIONS[section](small, results)


if __name__ == "__main__":
    main()
