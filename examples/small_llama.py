"""A small Llama, trained from nothing on CPython's documentation, for trying out compression of language models offline.

Grouped-query attention, rotary embedding, gated MLP, tied output layer: `LlamaForCausalLM` of about 10 million parameters
with a byte-pair tokenizer of its own. Text: the language reference (``pydoc_data.topics``) and the docstrings of the standard
library. The topics that ``gramian compress`` holds out for measuring are never trained on.

    python examples/small_llama.py            # at most 20 minutes on two cores; later calls find it in the cache
    gramian compress "$(python examples/small_llama.py --print)" --keep 0.5 --out small/

The hidden matrices are trained by Muon (Jordan et al. 2024: momentum, then the nearest orthogonal matrix by Newton-Schulz),
embeddings and norms by Adam; the rate is constant and falls to zero over the last two fifths of the steps.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian.execution.calibration import cache_file
from gramian.models.data import python_topics
from gramian.models.journal import keep, recall
from gramian.sequence.models import train_tokenizer as byte_pair_tokenizer

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data"}
SHAPE = {
    "vocabulary": 2048,
    "hidden": 384,
    "intermediate": 1024,
    "layers": 6,
    "heads": 6,
    "key_value_heads": 2,
}
"""The default model: 10.2 million parameters, 9.4 of them in the linear layers of its blocks."""


def docstrings() -> Iterator[tuple[str, str]]:
    """(top-level module, docstring) for all of the standard library, read from its source: nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield parts[0].removesuffix(".py"), ast.get_docstring(node) or ""


def texts() -> tuple[list[str], list[str]]:
    """Paragraphs for training, and those of other topics held out."""
    corpus = python_topics()
    held_out = set(corpus.held_out)
    seen: dict[str, None] = {}
    for _, document in docstrings():
        for paragraph in inspect.cleandoc(document).split("\n\n"):
            line = " ".join(paragraph.split())
            if len(line) >= 40 and line not in held_out:
                seen[line] = None
    return list(dict.fromkeys([*corpus.calibration, *seen])), corpus.held_out


def train_tokenizer(paragraphs: list[str], vocabulary: int) -> Any:
    """A byte-level byte-pair tokenizer that begins every text with <s>."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pair_tokenizer(paragraphs, vocabulary),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrix with singular values 1: a quintic Newton-Schulz iteration (Jordan et al. 2024)."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, for matrices (Jordan et al. 2024)."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(mean, group["momentum"])
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - 0.01 * group["lr"]).add_(orthogonal(ahead), alpha=-group["lr"] * scale)


def small_llama(
    directory: Path | None = None,
    *,
    steps: int = 360,
    batch: int = 16,
    length: int = 256,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    every: int = 20,
    **shape: int,
) -> Path:
    """The directory of the trained model and its tokenizer, as ``transformers`` saves them; trained when not yet there.

    A killed training goes on from its last checkpoint.

    Args:
        directory: where it goes; by default a folder in the user's cache directory (``GRAMIAN_CACHE``), named after the
            settings and the text.
        steps: of the optimiser.
        batch: sequences a step.
        length: tokens a sequence.
        seed: of the start and of the order of texts.
        progress: called with (step, loss).
        every: steps between checkpoints.
        shape: entries of `SHAPE` to change.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    unknown = shape.keys() - SHAPE.keys()
    if unknown:
        raise TypeError(f"small_llama: unexpected {sorted(unknown)}; expected some of {list(SHAPE)}")
    size = SHAPE | shape
    paragraphs, _ = texts()
    settings = {**size, "steps": steps, "batch": batch, "length": length, "seed": seed}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + "\0".join(paragraphs).encode())
    if directory is None:
        directory = cache_file().parent / f"small-llama-{digest.hexdigest()[:12]}"
    if (directory / "config.json").is_file():
        return directory

    torch.manual_seed(seed)
    order = random.Random(seed)
    tokenizer = train_tokenizer(paragraphs, size["vocabulary"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["key_value_heads"],
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    optimisers = [Muon(matrices, 0.02), torch.optim.AdamW(others, 3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    encoded = tokenizer(paragraphs).input_ids
    need = steps * batch * length + length
    stream: list[int] = []
    while len(stream) < need:
        order.shuffle(encoded)
        stream += [token for text in encoded for token in text]
    tokens = torch.tensor(stream[: steps * batch * length]).view(steps, batch, length)

    partial = directory.with_name(f".{directory.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    state = partial / "training.sealed"
    first = 0
    known = recall(state)
    if known is not None and known[1]["settings"] == digest.hexdigest():
        tensors, first = known[0], known[1]["step"]
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tensors[f"model|{name}"])
        for number, optimiser in enumerate(optimisers):
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                kind, _, rest = key.partition("|")
                if kind == str(number):
                    index, _, name = rest.partition("|")
                    moments.setdefault(int(index), {})[name] = tensor
            optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    rates = [optimiser.param_groups[0].setdefault("initial_lr", optimiser.defaults["lr"]) for optimiser in optimisers]
    for step in range(first, steps):
        decay = min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * decay
        loss = model(input_ids=tokens[step], labels=tokens[step]).loss
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, float(loss.detach()))
        if (step + 1) % every == 0 and step + 1 < steps:
            tensors = {f"model|{name}": p for name, p in model.named_parameters()}
            for number, optimiser in enumerate(optimisers):
                for index, moments in optimiser.state_dict()["state"].items():
                    tensors |= {f"{number}|{index}|{name}": tensor for name, tensor in moments.items()}
            keep(state, tensors, {"step": step + 1, "settings": digest.hexdigest()})
    state.unlink(missing_ok=True)
    model.eval().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(partial, directory)
    return directory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of the model; by default in the cache")
    parser.add_argument("--steps", type=int, default=360, help="optimiser steps (360)")
    parser.add_argument("--print", action="store_true", help="write nothing but the directory to standard output")
    arguments = parser.parse_args()
    start = time.process_time()

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0 or step == 1:
            print(
                f"step {step:4} loss {loss:.3f}  {time.process_time() - start:.0f} s of CPU",
                file=sys.stderr,
                flush=True,
            )

    found = small_llama(arguments.out, steps=arguments.steps, progress=progress)
    if arguments.print:
        print(found)
        return
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(found)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    prompt = tokenizer("The import statement", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=60, do_sample=False)[0], skip_special_tokens=True)
    print(f"{found}\n{sum(p.numel() for p in model.parameters()):,} parameters\n{text}")


if __name__ == "__main__":
    main()
