"""``gramian adapt``, end to end and restartable: a model directory and text in, an adapter out, and a report.

As in ``gramian.models.job``, everything is made in a hidden directory beside the output, whose name holds a fingerprint of
the model, the data and the settings: the adapter as it starts, then the state of training after every evaluation. A killed
run goes on from there and ends with the same bytes. The output appears at the end, by one rename.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian import __version__
from gramian.adapt.adapter import Adapter
from gramian.adapt.attach import Adapted, _check_rank, attach, check_weight, select, start_grams
from gramian.adapt.combine import COMBINES
from gramian.adapt.files import load
from gramian.adapt.layer import Edit, base_operator, can_adapt, layer_shape
from gramian.adapt.peft_format import CONFIG, TENSORS, export_peft, low_rank_factors
from gramian.adapt.planning import auto
from gramian.adapt.recipes import RECIPES, recipe
from gramian.adapt.task import DESCRIPTION, HEAD, TaskModel, accuracy, calibration, open_task, read_texts, split
from gramian.adapt.train import Trained, Training, evaluate, fine_tune
from gramian.errors import GramianError, nearest
from gramian.linalg import svdvals
from gramian.models.api import Progress
from gramian.models.journal import check_out, disk_errors, hash_tensors, keep, publish, recall, workspace, write

START = "start"
"""The first thing in the work directory that is worth keeping."""
EPOCHS = 3
START_BATCHES = 8
"""Batches that a start which depends on data is shown."""
SPECTRUM = 64
"""Singular values of an update that the report holds, at most."""
PEFT_TASKS = {"lm": "CAUSAL_LM", "classify": "SEQ_CLS"}


@dataclass(frozen=True)
class Settings:
    """What the user asked for; with the model and the data it fixes the result.

    Attributes:
        recipe: name of a recipe, or "auto": structure and rank of each layer by its gradient, in LoRA's budget at `rank`.
        options: of the recipe, as JSON values.
        rank: of every layer.
        include, exclude: patterns of layer names.
        task: "lm", "classify", or None to go by the data.
        steps: optimiser steps, or None for `epochs`.
        epochs: passes over the data.
        rate: peak learning rate.
        batch: sequences a step.
        accumulate: passes a step, for less memory.
        max_length: tokens of a sequence, or None for 256 or what the model takes.
        every: steps between evaluations; 0 for a twentieth of all.
        patience: evaluations without a better one before training stops; 0 for any number.
        seed: of everything random.
        merge: also write the model with the adapter folded in.
        lossy: accept that rounding loses more than 5 % of a layer's update in that.
    """

    recipe: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    task: str | None = None
    steps: int | None = None
    epochs: float = EPOCHS
    rate: float = 3e-4
    batch: int = 16
    accumulate: int = 1
    max_length: int | None = None
    every: int = 0
    patience: int = 5
    seed: int = 0
    merge: bool = False
    lossy: bool = False


@dataclass
class AdaptJob:
    """A run of ``gramian adapt``.

    Args:
        model: directory of a Hugging Face or sentence-transformers model; it may be a compressed one.
        data: UTF-8 text, or JSON lines; see ``gramian.adapt.task.read_texts``.
        out: where the result goes; must not exist, or be empty.
        settings: see ``Settings``.
        progress: called with (stage, done, total).
        render: makes ``report.html`` of the report; None for no page.
    """

    model: str
    data: str
    out: Path
    settings: Settings
    progress: Progress = lambda stage, done, total: None
    render: Callable[[dict[str, Any]], str] | None = None
    times: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    # Checks before any work --------------------------------------------------------------------------------------

    def check(self) -> dict[str, Any]:
        """Meet bad input at the door; nothing is computed or written.

        Returns:
            What the run would do, JSON-able.

        Raises:
            GramianError: one line that names the culprit and the remedy.
        """
        s = self.settings
        self.method = self._method()
        if s.rank < 1:
            raise GramianError(f"--rank {s.rank}: expected 1 or more")
        if not 0 <= s.seed < 2**31:
            raise GramianError(f"--seed {s.seed}: expected 0 to {2**31 - 1}")
        if not 0 < s.epochs < math.inf:
            raise GramianError(f"--epochs {s.epochs:g}: expected more than 0")
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("accumulate", 1),
            ("max_length", 2),
            ("every", 0),
            ("patience", 0),
        ):
            value = getattr(s, name)
            if value is not None and value < least:
                raise GramianError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
        if not 0 < s.rate < math.inf:
            raise GramianError(f"--rate {s.rate:g}: expected a learning rate above 0, e.g. 0.0003")
        parent = check_out(self.out)
        texts = read_texts(self.data, s.task)
        self.opened = opened = open_task(self.model, texts.task, texts.names, seed=s.seed)
        model = opened.model
        self.bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        self.parameters = sum(p.numel() for p in model.parameters())
        longest = opened.longest
        if s.max_length is not None and s.max_length > longest:
            raise GramianError(f"--max-length {s.max_length}: the model takes at most {longest} tokens")
        exclude = {name.rpartition(".")[0] for name in opened.head}
        self.exclude = (*s.exclude, *sorted(name for name in exclude if can_adapt(model.get_submodule(name))))
        layers = select(model, s.include, self.exclude)
        combine = "add" if self.method is None else self.method.combine
        for name, module in layers.items():
            _check_rank(name, layer_shape(module), s.rank, combine)
            check_weight(name, base_operator(module).dense())
        self.layers = list(layers)
        if s.merge and COMBINES[combine].operator is None:
            raise GramianError(f"--merge: recipe {s.recipe} changes a layer by no matrix; leave --merge out")
        self.split = split(texts, opened.tokenizer, longest=s.max_length or min(256, longest), batch=s.batch)
        self.texts = texts
        count = self.split.train.count
        self.steps = s.steps or max(1, math.ceil(s.epochs * count / s.batch))
        ramp = 0 if self.method is None else self.method.ramp
        if ramp > self.steps:
            raise GramianError(
                f"--steps {self.steps}: the gain of recipe {s.recipe} rises over {ramp} steps; train longer, or pass --option "
                f"ramp={max(1, self.steps // 4)}"
            )
        if self.split.held_out and self.split.sequences < 8:
            self.warnings.append(
                f"only {self.split.sequences} held-out sequences: the loss on them says little; give more text"
            )
        adapter = sum(4 * s.rank * sum(layer_shape(module)) for module in layers.values())
        need = 24 * adapter + (2 * self.bytes if s.merge else 0)
        free = shutil.disk_usage(parent).free
        if need > free:
            raise GramianError(
                f"--out {self.out}: needs about {need / 1e6:,.0f} MB on disk, {free / 1e6:,.0f} MB are free; choose another "
                "directory"
            )
        return {
            "model": self.model,
            "class": type(model).__name__,
            "task": texts.task,
            "labels": list(texts.names),
            "recipe": s.recipe,
            "rank": s.rank,
            "layers": len(layers),
            "train_sequences": count,
            "train_tokens": self.split.tokens,
            "held_out_sequences": self.split.sequences,
            "steps": self.steps,
            "disk_needed": need,
            "disk_free": free,
        }

    def _method(self) -> Adapter | None:
        """The recipe; None for "auto"."""
        s = self.settings
        key = s.recipe.replace("-", "_").lower()
        if key == "auto":
            if s.options:
                raise GramianError(f"--option {next(iter(s.options))}: recipe auto has none")
            return None
        if key not in RECIPES:
            known = sorted([*RECIPES, "auto"])
            raise GramianError(f"--recipe {s.recipe!r}{nearest(key, known)}; known: {', '.join(known)}")
        try:
            return recipe(key, **s.options)
        except TypeError as error:
            raise GramianError(f"--recipe {s.recipe}: an --option has a value of the wrong kind ({error})") from None

    # The run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Do it all; returns the report.

        Raises:
            GramianError: one line that names the culprit and the remedy; nothing is at ``out`` then.
        """
        started = time.perf_counter()
        self.check()
        work = self.out.absolute().parent / f".{self.out.name}.gramian-{self._fingerprint()}"
        with disk_errors(self.out), workspace(work, START):
            return self._work(work, started)

    def _work(self, work: Path, started: float) -> dict[str, Any]:
        s, opened, held_out = self.settings, self.opened, self.split.held_out
        classify = opened.task == "classify"
        before = {
            "loss": self._stage("evaluate", lambda: evaluate(opened.model, held_out)),
            "accuracy": self._stage("evaluate", lambda: accuracy(opened.model, held_out)) if classify else None,
        }
        adapted = self._stage("start", lambda: self._start(work))
        trained = self._stage("train", lambda: self._train(work, adapted))
        after = {
            "loss": self._stage("evaluate", lambda: evaluate(opened.model, held_out)),
            "accuracy": self._stage("evaluate", lambda: accuracy(opened.model, held_out)) if classify else None,
        }
        if after["loss"] > before["loss"]:
            self.warnings.append("training did not lower the held-out loss; try a lower --rate")
        if s.recipe.replace("-", "_").lower() == "bilora":
            self.warnings.append("bilora was trained in one level; gramian.adapt.recipes.two_level_step has both")
        rows = self._stage("evaluate", lambda: [_row(name, adapted) for name in adapted.layers])
        report = self._report(adapted, trained, rows, {"before": before, "after": after})
        self._stage("save", lambda: self._publish(work, adapted, report, started))
        return report

    def _stage(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start
        return result

    def _fingerprint(self) -> str:
        """Of everything that the result depends on: a run that differs in any of it has a journal of its own."""
        digest = hashlib.sha256(f"adapt {__version__} {torch.__version__}".encode())
        digest.update(json.dumps(asdict(self.settings), sort_keys=True).encode())
        digest.update(Path(self.data).read_bytes())
        digest.update(self.opened.model.config.to_json_string().encode())  # type: ignore[union-attr, operator]
        hash_tensors(digest, self.opened.model.state_dict().items())
        return digest.hexdigest()[:12]

    def _start(self, work: Path) -> Adapted:
        """The adapter as it starts. It is always read from its file, so that a run that goes on has the same one, down to
        how it lies in memory.
        """
        s, model = self.settings, self.opened.model
        if not (work / START).exists():
            self.progress("preparing", 0, 1)
            batches = [self.split.train.take(list(places)) for places in self._first(START_BATCHES)]
            if self.method is None:
                budget = sum(s.rank * sum(layer_shape(model.get_submodule(name))) for name in self.layers)
                plan = auto(model, batches, budget, include=s.include, exclude=self.exclude, seed=s.seed)
                made = plan.attach(model, seed=s.seed)
            else:
                grams = None
                if self.method.needs & {"gram_in", "gram_out"}:
                    grams = start_grams(
                        model,
                        {name: model.get_submodule(name) for name in self.layers},
                        calibration(batches),
                        outputs="gram_out" in self.method.needs,
                        seed=s.seed,
                    )
                made = attach(
                    model,
                    self.method,
                    include=s.include,
                    exclude=self.exclude,
                    rank=s.rank,
                    data=batches,
                    grams=grams,
                    seed=s.seed,
                )
            made.save(work / START)
            made.detach()
            self.progress("preparing", 1, 1)
        return load(model, work / START, adapter=self.method, check=False)

    def _first(self, batches: int) -> list[range]:
        count, size = self.split.train.count, self.settings.batch
        return [range(i * size, min((i + 1) * size, count)) for i in range(batches) if i * size < count]

    def _train(self, work: Path, adapted: Adapted) -> Trained:
        s, path = self.settings, work / "train.sealed"
        settings = Training(
            steps=self.steps,
            rate=s.rate,
            batch=s.batch,
            accumulate=s.accumulate,
            every=s.every,
            patience=s.patience,
            seed=s.seed,
        )
        return fine_tune(
            adapted,
            self.split.train,
            self.split.held_out,
            settings,
            also=self.opened.head_parameters(),
            resume=recall(path),
            checkpoint=lambda tensors, notes: keep(path, tensors, notes),
            progress=lambda step, loss: self.progress("training", step, self.steps),
        )

    # The result --------------------------------------------------------------------------------------------------

    def _publish(self, work: Path, adapted: Adapted, report: dict[str, Any], started: float) -> None:
        final = work / "final"
        shutil.rmtree(final, ignore_errors=True)
        adapted.save(final)
        opened = self.opened
        task = {"task": opened.task, "labels": list(opened.names), "base": self.model, "head": opened.head}
        write(final / DESCRIPTION, (json.dumps(task, indent=1) + "\n").encode())
        head = {name: p.detach().clone().contiguous() for name, p in _named(opened)}
        if head:
            save_file(head, final / HEAD, metadata={"format": "pt"})
        report["peft"] = self._export(work, final, adapted, head)
        if self.settings.merge:
            report["merged"] = self._merge(final, adapted, report)
        report["times"] = {key: round(value, 3) for key, value in self.times.items()}
        report["times"]["total"] = round(time.perf_counter() - started, 3)
        publish(work, final, self.out, report, self.render)

    def _export(self, work: Path, final: Path, adapted: Adapted, head: Mapping[str, Tensor]) -> dict[str, Any]:
        """Files for the peft library where it can hold the adapter; else why it cannot."""
        folder = work / "peft"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            export_peft(
                adapted,
                folder,
                base_model=str(Path(self.model).resolve()),
                task_type=PEFT_TASKS[self.opened.task],
            )
        except GramianError as error:
            return {"written": False, "reason": str(error)}
        tensors = load_file(folder / TENSORS)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if head:  # modules that peft saves whole
            config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in head})
            tensors |= {f"base_model.model.{name}": value for name, value in head.items()}
        save_file(tensors, final / TENSORS, metadata={"format": "pt"})
        write(final / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        shutil.rmtree(folder)
        return {"written": True, "reason": ""}

    def _merge(self, final: Path, adapted: Adapted, report: dict[str, Any]) -> dict[str, Any] | None:
        """Write the merged model; a merge that would lose too much is left out with a warning, for the adapter is made."""
        from gramian.models.huggingface import save_huggingface

        try:
            merged = adapted.merge(lossy=self.settings.lossy)
        except GramianError as error:
            self.warnings.append(f"not merged: {error} (--lossy on the command line)")
            return None
        for row in report["layers"]:
            row["rounding_loss"] = merged.loss[row["name"]]
        kind = {"adapter": {"recipe": self.settings.recipe, "rank": self.settings.rank}}
        save_huggingface(self.opened.model, final / "merged", self.opened.tokenizer, **kind)
        return {"path": str(self.out / "merged"), "worst_rounding_loss": merged.worst}

    def _report(
        self, adapted: Adapted, trained: Trained, rows: list[dict[str, Any]], quality: dict[str, Any]
    ) -> dict[str, Any]:
        opened, head = self.opened, sum(p.numel() for p in self.opened.head_parameters())
        if opened.task == "lm":
            for side in quality.values():
                side["perplexity"] = math.exp(min(side["loss"], 700.0))
        return {
            "schema": 1,
            "gramian_version": __version__,
            "command": "adapt",
            "model": {
                "source": self.model,
                "class": type(opened.model).__name__,
                "parameters": self.parameters,
                "load": self._load_lines(),
            },
            "settings": {**asdict(self.settings), "task": opened.task, "steps": self.steps},
            "data": {
                "source": self.texts.source,
                "labels": list(self.texts.names),
                "train": self.split.train.count,
                "tokens": self.split.tokens,
                "held_out": self.split.sequences,
                "held_out_unused": self.split.dropped,
            },
            "trainable": {
                "adapter": adapted.numel,
                "head": head,
                "share": (adapted.numel + head) / self.parameters,
            },
            "training": {
                "steps": len(trained.losses),
                "best": trained.best,
                "stopped": trained.stopped,
                "loss": [list(pair) for pair in trained.losses],
                "held_out": [list(pair) for pair in trained.held_out],
            },
            "quality": quality,
            "layers": rows,
            "merged": None,
            "warnings": self.warnings,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
            },
        }

    def _load_lines(self) -> list[str]:
        """Python lines that load the result."""
        if self.settings.merge:
            head = "CausalLM" if self.opened.task == "lm" else "SequenceClassification"
            return [
                "import gramian",
                f"from transformers import AutoModelFor{head}",
                f'model = AutoModelFor{head}.from_pretrained("{self.out / "merged"}")',
            ]
        return [
            "from gramian.adapt.task import load_adapted",
            f'model, tokenizer, adapted = load_adapted("{self.model}", "{self.out}")',
        ]


def _named(opened: TaskModel) -> list[tuple[str, nn.Parameter]]:
    return list(zip(opened.head, opened.head_parameters(), strict=True))


@torch.no_grad()
def _row(name: str, adapted: Adapted) -> dict[str, Any]:
    """What became of one layer: sizes, and the spectrum of the change of its matrix where it has one."""
    edit, layer = adapted.edits[name], adapted.layers[name]
    shape = layer_shape(layer)
    values = change_spectrum(edit, layer.base)
    weight = float(base_operator(layer.base).dense().norm())
    norm = None if values is None else float(values.norm())
    method = adapted.adapters.get(name)
    return {
        "name": name,
        "shape": list(shape),
        "recipe": method.recipe if method else "",
        "structure": type(edit.update.op).__name__,
        "combine": edit.combine,
        "rank": edit.rank,
        "trainable": sum(p.numel() for p in edit.trainable().values()),
        "weight_norm": weight,
        "change_norm": norm,
        "relative": norm / weight if norm is not None and weight else None,
        # ||D||_F^2 / ||D||_2^2: how many directions carry the change.
        "stable_rank": float(norm**2 / values[0] ** 2) if values is not None and norm else None,
        "spectrum": None if values is None else [float(v) for v in values[:SPECTRUM]],
        "rounding_loss": None,
    }


@torch.no_grad()
def change_spectrum(edit: Edit, base: nn.Module) -> Tensor | None:
    """Singular values of the change that an edit makes to a layer's matrix, largest first; None for one that is no matrix."""
    make = COMBINES[edit.combine].operator
    if make is None:
        return None
    factors = low_rank_factors(edit.difference()) if edit.combine == "add" else None
    if factors is not None and factors[0].shape[1] < min(edit.difference().shape):
        # The singular values of B A are those of the small product of the two triangles.
        left, right = (torch.linalg.qr(f.double()).R for f in (factors[0], factors[1].mT))
        return svdvals(left @ right.mT)
    weight = base_operator(base).to(dtype=torch.float64)
    return svdvals(make(edit, weight).dense().double() - weight.dense())


__all__ = ["AdaptJob", "Settings", "change_spectrum"]
