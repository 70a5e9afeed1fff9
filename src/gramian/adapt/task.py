"""Fine-tuning tasks of Hugging Face models: their text, their heads, and opening both from files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gramian.adapt.attach import Adapted
from gramian.adapt.files import load, read_json
from gramian.adapt.train import Examples
from gramian.errors import GramianError
from gramian.models.data import read_text
from gramian.models.loading import (
    check_directory,
    check_missing,
    check_shapes,
    read_model,
    read_tokenizer,
)
from gramian.models.walk import find_heads
from gramian.models.workload import Workload, tensor_workload
from gramian.modes import evaluating

TASKS = ("lm", "classify")
HELD_OUT = 256
"""Most held-out sequences that the loss is measured on."""
DESCRIPTION, HEAD = "task.json", "head.safetensors"


# Text ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """What a data file holds.

    Attributes:
        source: its name.
        task: "lm" or "classify".
        texts: documents, or texts to classify.
        labels: of each text, as a place in `names`; () for a language model.
        names: of the labels, sorted.
    """

    source: str
    task: str
    texts: list[str]
    labels: list[int]
    names: tuple[str, ...] = ()


def read_texts(path: str | os.PathLike[str], task: str | None = None) -> Texts:
    """Read training text: plain UTF-8 for a language model, or JSON lines with "text" and, to classify, "label".

    A file whose name ends in .jsonl is read as JSON lines. Without `task`, labels in its first line mean "classify".

    Raises:
        GramianError: missing, binary or empty file, a line that is no such object (with its number), one label alone.
    """
    path = Path(path)
    if task is not None and task not in TASKS:
        raise GramianError(f"--task {task!r}; expected one of {', '.join(TASKS)}")
    text = read_text(path)
    if not text.strip():
        raise GramianError(f"--data {path}: the file is empty; expected UTF-8 text, or JSON lines")
    if path.suffix.lower() not in (".jsonl", ".ndjson") and task != "classify":
        return Texts(str(path), "lm", [text], [])
    rows: list[tuple[str, str]] = []
    for index, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"--data {path}, line {index}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise GramianError(f"{where}: not JSON ({error}); expected one object a line") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise GramianError(f'{where}: expected an object with a string at "text", found {line.strip()[:60]!r}')
        if task is None:
            task = "classify" if "label" in row else "lm"
        label = row.get("label")
        if task == "classify" and (isinstance(label, bool) or not isinstance(label, str | int)):
            raise GramianError(f'{where}: expected a string or whole number at "label", found {label!r}')
        rows.append((row["text"], str(label)))
    if task == "lm":
        return Texts(str(path), "lm", [text for text, _ in rows], [])
    rows = list(dict.fromkeys(rows))  # the same example must not be on both sides of the split
    names = tuple(sorted({label for _, label in rows}, key=lambda name: (not name.isdigit(), name.zfill(20))))
    if len(names) < 2:
        raise GramianError(f"--data {path}: one label only ({names[0]!r}); expected at least two to tell apart")
    return Texts(str(path), "classify", [text for text, _ in rows], [names.index(label) for _, label in rows], names)


@dataclass(frozen=True)
class Split:
    """Text as a model takes it, divided up.

    Attributes:
        train: what batches are drawn from.
        held_out: ready batches.
        sequences: how many held-out sequences those are.
        tokens: in the training part.
        dropped: held-out sequences beyond `HELD_OUT`, which are not used.
    """

    train: Examples
    held_out: list[dict[str, Tensor]]
    sequences: int
    tokens: int
    dropped: int = 0


def split(texts: Texts, tokenizer: Any, *, longest: int, batch: int) -> Split:
    """Tokens, a tenth of them held out. The split does not depend on a seed, so runs can be compared.

    A language model's documents are joined (with the end-of-text token between, if there is one) and cut into sequences of
    `longest` tokens, of which every tenth is held out. Of texts to classify every tenth of each label is.

    Raises:
        GramianError: too little text for a sequence on both sides.
    """
    pad = _pad(tokenizer)
    if texts.task == "lm":
        stream: list[int] = []
        for text in texts.texts:
            ids = list(tokenizer(text).input_ids)
            end = tokenizer.eos_token_id
            stream += ids if end is None or ids[-1:] == [end] else [*ids, end]
        count = len(stream) // longest
        if count < 2:
            raise GramianError(
                f"--data {texts.source}: {len(stream)} tokens are fewer than two sequences of {longest}; give more text or a "
                f"smaller --max-length"
            )
        rows = [stream[i * longest : (i + 1) * longest] for i in range(count)]
        labels: list[int] | None = None
        out = [i for i in range(count) if i % 10 == 1]
    else:
        encoded = tokenizer(texts.texts, truncation=True, max_length=longest)
        rows, labels = [list(ids) for ids in encoded.input_ids], texts.labels
        seen = [0] * len(texts.names)
        out = []
        for i, label in enumerate(labels):
            if seen[label] % 10 == 1:
                out.append(i)
            seen[label] += 1
        if not out:
            raise GramianError(
                f"--data {texts.source}: no label has two examples; give more of each, so that some can be held out"
            )
    aside = set(out)
    inside = [i for i in range(len(rows)) if i not in aside]

    def take(indices: Sequence[int]) -> dict[str, Tensor]:
        return _batch([rows[i] for i in indices], None if labels is None else [labels[i] for i in indices], pad)

    used = out if len(out) <= HELD_OUT else [out[i * len(out) // HELD_OUT] for i in range(HELD_OUT)]
    return Split(
        Examples(len(inside), lambda places: take([inside[i] for i in places])),
        [take(used[i : i + batch]) for i in range(0, len(used), batch)],
        len(used),
        sum(len(rows[i]) for i in inside),
        len(out) - len(used),
    )


def _pad(tokenizer: Any) -> int:
    """The padding token; any other will do where there is none, for its places are masked."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def _batch(rows: Sequence[Sequence[int]], labels: Sequence[int] | None, pad: int) -> dict[str, Tensor]:
    """Token ids and mask (B, T), padded on the right, with labels (B,), or (B, T) for a language model."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    wanted = ids.masked_fill(mask == 0, -100) if labels is None else torch.tensor(labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": wanted}


def calibration(batches: Sequence[dict[str, Tensor]]) -> Workload:
    """Batches without their labels, for the Grams of a start."""
    plain = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    return replace(tensor_workload(plain), mask=lambda batch: batch["attention_mask"], kind="text")


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """Share of the labels that a classifier gets right, in evaluation mode."""
    with evaluating(model):
        right = [int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches]
    return sum(right) / sum(len(batch["labels"]) for batch in batches)


# Models -------------------------------------------------------------------------------------------------------------


@dataclass
class TaskModel:
    """A Hugging Face model with the head of a task.

    Attributes:
        model: in evaluation mode, in the checkpoint's dtype.
        tokenizer: its tokenizer.
        directory: where both are.
        task: "lm" or "classify".
        names: of the labels; () for a language model.
        head: names of the parameters outside the adapted layers that train: a classifier's head.
        new: those of them that are not in the checkpoint.
    """

    model: nn.Module
    tokenizer: Any
    directory: Path
    task: str
    names: tuple[str, ...]
    head: list[str]
    new: list[str]

    @property
    def longest(self) -> int:
        """Tokens that the model takes, at most."""
        config: Any = self.model.config
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**20)

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters named in `head`."""
        return [self.model.get_parameter(name) for name in self.head]


def open_task(directory: str | os.PathLike[str], task: str, names: Sequence[str] = (), *, seed: int = 0) -> TaskModel:
    """Open a model directory for a task; to classify, with a new head unless the checkpoint has one for as many labels.

    Args:
        directory: of a Hugging Face or sentence-transformers model; it may be a compressed one.
        task: "lm" or "classify".
        names: of the labels.
        seed: of a new head.

    Raises:
        GramianError: not a model directory, damaged files, or a model without a causal language-model head for "lm".
    """
    directory = Path(directory)
    inner, _, named = check_directory(directory)
    import transformers

    import gramian.models.huggingface  # compressed checkpoints  # noqa: F401

    if task == "lm":
        cls = getattr(transformers, named, None)
        if not ("CausalLM" in named or "LMHeadModel" in named) or cls is None:
            raise GramianError(
                f"MODEL {directory} is a {named or 'model of no known class'}; a causal language model is needed "
                '(LlamaForCausalLM, ...), or JSON lines with "text" and "label" and --task classify'
            )
        model, missing, mismatched = read_model(directory, inner, cls)
        check_shapes(directory, mismatched)
        heads = find_heads(model)
        check_missing(directory, missing, heads)
        return TaskModel(model.eval(), read_tokenizer(directory, inner), directory, task, (), [], [])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing, mismatched = read_model(
            directory,
            inner,
            transformers.AutoModelForSequenceClassification,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    heads = find_heads(model)
    check_shapes(directory, [entry for entry in mismatched if entry[0].rpartition(".")[0] not in heads])
    check_missing(directory, missing, heads)
    new = sorted({*missing, *(key for key, *_ in mismatched)})
    base = str(model.base_model_prefix)
    inside = f"{base}." if base and hasattr(model, base) else ""  # without one, only what is new counts as the head
    head = [name for name, _ in model.named_parameters() if name in new or not name.startswith(inside)]
    tokenizer = read_tokenizer(directory, inner)
    if getattr(model.config, "pad_token_id", None) is None:  # decoders find a row's last token by it
        model.config.pad_token_id = _pad(tokenizer)  # type: ignore[union-attr]
    return TaskModel(model.eval(), tokenizer, directory, task, tuple(names), head, new)


def load_adapted(model: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> tuple[Any, Any, Adapted]:
    """The model, its tokenizer and the adapter that ``gramian adapt`` trained, put together, with the head if it has one.

    Args:
        model: directory of the base model.
        adapter: what ``--out`` named.

    Raises:
        GramianError: files that are missing, damaged, or belong to another base model.
    """
    folder = Path(adapter)
    description = read_json(folder / DESCRIPTION, "what gramian adapt wrote")
    if description.get("task") not in TASKS:
        raise GramianError(f"{folder / DESCRIPTION}: task {description.get('task')!r}; expected {' or '.join(TASKS)}")
    opened = open_task(model, str(description["task"]), [str(name) for name in description.get("labels", ())])
    adapted = load(opened.model, folder)
    if opened.head:
        try:
            stored = load_file(folder / HEAD)
        except (OSError, ValueError) as error:
            raise GramianError(f"{folder / HEAD} is missing or damaged: {error}") from error
        for name in opened.head:
            parameter = opened.model.get_parameter(name) if name in stored else None
            if parameter is None or parameter.shape != stored[name].shape:
                raise GramianError(f"{folder / HEAD}: {name!r} is missing or of another shape")
            with torch.no_grad():
                parameter.copy_(stored[name])
    return opened.model, opened.tokenizer, adapted


__all__ = ["TASKS", "Split", "TaskModel", "Texts", "load_adapted", "open_task", "read_texts", "split"]
