"""The main job, end to end and restartable: a model directory in, a smaller one out, and a report.

Everything is made in a hidden work directory beside the output, whose name holds a fingerprint of the model, the data and
the settings. Each stage leaves a file there before the next begins (the Grams, the plan, every fitted entry, the state of
healing), so a killed run goes on where it was and ends with the same bytes. The output appears at the end, by one rename.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian import __version__
from gramian.compression import (
    Built,
    Entry,
    Layer,
    Plan,
    Recipe,
    dense_cost,
    make_plan,
    op_cost,
    resolve_recipe,
    resolve_structures,
)
from gramian.compression.options import JOINT, check_measurable
from gramian.compression.plan import check_keep
from gramian.compression.plan_checks import check_groups, check_sizes
from gramian.errors import GramianError
from gramian.grams import Grams, Joint
from gramian.models import distributed
from gramian.models.api import (
    Progress,
    apply_built,
    as_layer,
    build_all,
    called,
    collect,
    planning_layers,
    sensitivities,
    train,
)
from gramian.models.blocks import Shards, find_blocks
from gramian.models.entries import entry_rows, layer_facts, module_row, nbytes, parameters, restored, stored
from gramian.models.heal import NOTHING_TO_HEAL, Healing, heal
from gramian.models.journal import (
    check_out,
    damaged,
    disk_errors,
    hash_tensors,
    keep,
    publish,
    recall,
    workspace,
    write,
)
from gramian.models.loading import Loaded, load_model
from gramian.models.offload import Offload
from gramian.models.ordinary import become_ordinary
from gramian.models.sentence_encoder import transformer_folder
from gramian.models.walk import check_finite, find_layers
from gramian.models.workload import Workload, agreement, all_features, language_agreement
from gramian.nn import prepare
from gramian.ops import Quantized

GENERATED = 48
"""Tokens that are generated to time it."""
HELD_OUT = 160
"""Most held-out texts that quality is measured on."""
GRAMS = "grams.sealed"
"""The first file of the work directory that is worth keeping."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for; with the model and the data it fixes the result.

    Attributes:
        keep: share to keep.
        cost: "params", "bytes", "flops" or "latency".
        structures: comma-separated names, or "auto".
        recipe: name of a published way to do it, or "auto" (``gramian.compression.recipes``).
        objective: "auto", "features", "lm" or "none".
        heal: steps of distillation.
        rate: peak learning rate of healing.
        seed: makes the run repeatable.
        include, exclude: patterns of layer names.
        embeddings: embeddings take part too, unless the cost is FLOPs, of which a look-up takes none.
        plan: path of an edited plan to carry out, or None.
    """

    keep: float = 0.5
    cost: str = "params"
    structures: str = "auto"
    recipe: str = "auto"
    objective: str = "auto"
    heal: int = 0
    rate: float = 1e-4
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False
    plan: str | None = None


@dataclass
class Job:
    """A run of ``gramian compress``.

    Args:
        model: directory of a Hugging Face or sentence-transformers model, or None for the demo encoder.
        data: text file, or None for CPython's documentation.
        out: where the result goes; must not exist, or be empty.
        settings: see ``Settings``.
        progress: called with (stage, done, total).
        render: makes ``report.html`` of the report; None for no page.
        offload: leave the model on disk and work block by block; the result is the same, but for rounding.
        max_memory: bytes; above them the model is left on disk too.
    """

    model: str | None
    data: str | None
    out: Path
    settings: Settings
    progress: Progress = lambda stage, done, total: None
    render: Callable[[dict[str, Any]], str] | None = None
    offload: bool = False
    max_memory: int | None = None
    times: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    # Checks before any work --------------------------------------------------------------------------------------

    def check(self) -> dict[str, Any]:
        """Meet bad input at the door; nothing is computed or written.

        Returns:
            What the run would do, JSON-able: layers, budget, room needed.

        Raises:
            GramianError: one line that names the culprit and the remedy.
        """
        s = self.settings
        check_keep(s.keep)
        recipe = self.recipe
        if s.plan and (s.recipe != "auto" or s.structures != "auto"):
            raise GramianError("--plan says what is done to every layer; leave out --recipe and --structures beside it")
        recipe.check(
            s.cost, s.structures, include=s.include, exclude=s.exclude, embeddings=s.embeddings, objective=s.objective
        )
        recipe.objective(s.objective)
        methods = resolve_structures(recipe.options(s.structures)["structures"], s.cost)
        check_measurable(s.cost)
        if s.heal < 0:
            raise GramianError(f"--heal {s.heal}: expected 0 or more steps")
        if not 0 < s.rate < math.inf:
            raise GramianError(f"--rate {s.rate:g}: expected a learning rate above 0, e.g. 0.0001")
        if not 0 <= s.seed < 2**31:
            raise GramianError(f"--seed {s.seed}: expected 0 to {2**31 - 1}")
        if s.objective not in ("auto", "features", "lm", "none"):
            raise GramianError(f"--objective {s.objective!r}; expected auto, features, lm or none")
        parent = check_out(self.out)
        chosen = Plan.load(s.plan) if s.plan else None
        self.loaded = load_model(self.model, self.data, skeleton=self.offload or self.max_memory is not None)
        if self.loaded.skeleton and not self.offload and self._memory(whole=True) <= (self.max_memory or 0):
            self.loaded = load_model(self.model, self.data)
        if self.loaded.skeleton:
            self._check_offload()
        if s.recipe != "auto" and (self.loaded.skeleton or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            raise GramianError(
                f"--recipe {s.recipe} runs in one process with the model in memory; leave out --offload, --max-memory and "
                "torchrun, or take --recipe auto"
            )
        heads = () if s.include else self.loaded.heads
        only_tables = recipe.layers == "embeddings"
        tables = (s.embeddings or only_tables) and s.cost not in ("flops", "latency")
        found = find_layers(self.loaded.model, include=s.include, exclude=(*s.exclude, *heads), embeddings=tables)
        if only_tables:
            found.left_alone += [{"name": n, "reason": f"recipe {recipe.name} is for embeddings"} for n in found.layers]
            found.layers = {}
            if not found.embeddings:
                raise GramianError(
                    f"recipe {recipe.name} is for embeddings of words; this model has none to factor (tied ones cannot be)"
                )
        if s.embeddings and not tables:
            self.warnings.append("--embeddings has no effect on a budget of FLOPs: a look-up takes none")
        for entry in found.left_alone:
            if entry["name"] in heads:
                entry["reason"] = "a head outside the repeated blocks (name it with --include to take part)"
        self.warnings += self.loaded.warnings
        self.before = parameters(self.loaded.model), nbytes(self.loaded.model)
        chosen_layers = {**found.embeddings, **found.layers}
        if not self.loaded.skeleton:
            check_finite(chosen_layers)
        self.found = found
        layers = {name: as_layer(name, module) for name, module in chosen_layers.items()}
        total = sum(dense_cost(layer).of(s.cost) for layer in layers.values())
        least = sum(_least(layer, methods, s.cost) for layer in layers.values())
        if chosen is not None:
            check_sizes(chosen, layers)
        elif least > s.keep * total:
            raise GramianError(
                f"--keep {s.keep:g} is out of reach: the smallest options keep {least / total:.4f} of the {s.cost}; "
                "ask for more or allow more structures"
            )
        file_bytes = sum(p.numel() * p.element_size() for p in self.loaded.model.parameters())
        gram_bytes = sum(8 * _gram_entries(layer) for layer in layers.values())
        need_disk = 2 * file_bytes + gram_bytes
        free_disk = shutil.disk_usage(parent).free
        if need_disk > free_disk:
            raise GramianError(
                f"--out {self.out}: needs about {need_disk / 1e6:,.0f} MB on disk, {free_disk / 1e6:,.0f} MB are free; "
                "choose another directory"
            )
        if self.loaded.skeleton:
            need_disk += self._hidden_bytes()
        need_memory = self._memory(whole=not self.loaded.skeleton)
        free_memory = _free_memory()
        if free_memory and need_memory > free_memory:
            raise GramianError(
                f"needs about {need_memory / 1e6:,.0f} MB of memory, {free_memory / 1e6:,.0f} MB are free; "
                + (
                    "leave layers out with --exclude"
                    if self.loaded.skeleton
                    else "read it block by block with --offload"
                )
            )
        return {
            "model": self.loaded.source,
            "layers": len(layers),
            "left_alone": found.left_alone,
            "cost": s.cost,
            "total": total,
            "budget": int(s.keep * total),
            "calibration_texts": len(self.loaded.corpus.calibration),
            "disk_needed": need_disk,
            "disk_free": free_disk,
            "memory_needed": need_memory,
            "memory_free": free_memory,
            "offload": self.loaded.skeleton,
        }

    @property
    def recipe(self) -> Recipe:
        """What the settings name.

        Raises:
            GramianError: unknown name.
        """
        return resolve_recipe(self.settings.recipe)

    def _memory(self, *, whole: bool) -> int:
        """Bytes that the run needs, roughly.

        Args:
            whole: with the model in memory; else block by block.
        """
        model = self.loaded.model
        tables = self.settings.embeddings and self.settings.cost not in ("flops", "latency")
        heads = () if self.settings.include else self.loaded.heads
        exclude = (*self.settings.exclude, *heads)
        found = find_layers(model, include=self.settings.include, exclude=exclude, embeddings=tables)
        grams = {
            name: 8 * _gram_entries(as_layer(name, module))
            for name, module in (*found.embeddings.items(), *found.layers.items())
        }
        if whole:
            numbers = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
            return numbers + 2 * sum(grams.values()) + 20 * self.loaded.batch_entries
        blocks, modules = find_blocks(model)
        widest = 0
        for index, module in enumerate(modules):
            numbers = sum(p.numel() for p in module.parameters())
            own = sum(size for name, size in grams.items() if name.startswith(f"{blocks}.{index}."))
            widest = max(widest, 12 * numbers + 4 * own)
        outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(f"{blocks}."))
        return widest + 4 * outside + 20 * self.loaded.batch_entries

    def _check_offload(self) -> None:
        if self.settings.heal:
            raise GramianError(
                f"--heal {self.settings.heal}: healing needs the whole model in memory, and this run reads it block by "
                "block; leave --heal out, or leave out --offload and --max-memory"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise GramianError("--offload runs in one process; leave it out under torchrun, or run without torchrun")

    def _hidden_bytes(self) -> int:
        """What reaches every block, on disk."""
        tokens = [len(self.loaded.tokenizer(text).input_ids) for text in self.loaded.corpus.calibration[:20]]
        width = int(getattr(self.loaded.config, "hidden_size", 0) or 0)
        mean = min(sum(tokens) / max(len(tokens), 1), self.loaded.longest)
        texts = len(self.loaded.corpus.calibration)
        return int(4 * width * mean * texts * (len(find_blocks(self.loaded.model)[1]) + 3))

    # The run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Do it all; returns the report (see ``gramian.report``).

        Raises:
            GramianError: one line that names the culprit and the remedy; nothing is at ``out`` then.
        """
        with distributed.ranks() as self.ranks:
            return self._run()

    def _run(self) -> dict[str, Any]:
        started = time.perf_counter()
        if not self.ranks.first:
            self.progress = lambda stage, done, total: None
        self.check()
        torch.manual_seed(self.settings.seed)
        calibration = self.loaded.workload(self.loaded.corpus.calibration)
        fingerprint = self._fingerprint(calibration)
        distributed.check_same(self.ranks, fingerprint)
        work = self.out.absolute().parent / f".{self.out.name}.gramian-{fingerprint}"
        if not self.ranks.first:
            return self._help(work, calibration)
        with disk_errors(self.out), workspace(work, GRAMS):
            if self.recipe.run:
                return self._whole(work, calibration, started)
            return (self._stream if self.loaded.skeleton else self._work)(work, calibration, started)

    def _work(self, work: Path, calibration: Workload, started: float) -> dict[str, Any]:
        s, loaded = self.settings, self.loaded
        grams = self._stage("collect", lambda: self._grams(work, calibration))
        layers = planning_layers(loaded.model, grams)
        self._warn_few_tokens(
            {n: (layer.grams.tokens if layer.grams else 0, layer.shape[1]) for n, layer in layers.items()}
        )
        chosen = self._stage("plan", lambda: self._plan(work, layers, grams))
        facts = {name: layer_facts(layer) for name, layer in layers.items()}
        built = self._stage("fit", lambda: self._fit(work, chosen, layers))
        before_model, small = loaded.model, loaded.copy()
        changed: list[str] = []
        for entry, made in zip(chosen.entries, built, strict=True):
            if entry.structure != "dense":
                apply_built(small, made)
                changed += entry.layers
        held_out = loaded.workload(self._held_out())
        reference = self._stage("evaluate", lambda: all_features(before_model, held_out))
        quality = self._stage("evaluate", lambda: agreement(reference, all_features(small, held_out)))
        unhealed = None
        losses: list[tuple[int, float]] = []
        if (s.heal or self.recipe.steps) and changed:
            unhealed = quality
            losses = self._stage("heal", lambda: self._heal(work, small, before_model, changed, calibration))
            if not losses:
                self.warnings.append(NOTHING_TO_HEAL)
            quality = self._stage("evaluate", lambda: agreement(reference, all_features(small, held_out)))
        if not become_ordinary(small):
            prepare(small, recast=False)  # as it will be when loaded
        speed = self._stage("evaluate", lambda: _speed(before_model, small, loaded))
        language = self._stage("evaluate", lambda: _language(before_model, small, held_out, loaded))
        self.times["total"] = time.perf_counter() - started
        rows = [
            row
            for entry, made in zip(chosen.entries, built, strict=True)
            for row in entry_rows(entry, made, layers, facts, chosen.cost)
        ]
        report = self._report(chosen, rows, small, quality, unhealed, losses, speed, held_out.name)
        report["language"] = language
        self._stage("save", lambda: self._publish(work, small, chosen, report))
        return report

    def _whole(self, work: Path, calibration: Workload, started: float) -> dict[str, Any]:
        """``_work`` for a recipe that acts on modules: nothing is fitted layer by layer."""
        s, loaded = self.settings, self.loaded
        model = loaded.model
        options = {"keep": s.keep, "cost": s.cost, "heal_steps": s.heal, "seed": s.seed, "progress": self.progress}
        losses: list[tuple[int, float]] = []

        def note(step: int, loss: float) -> None:
            losses.append((step, loss))

        small = self._stage("fit", lambda: called(self.recipe.run)(model, calibration, **options, note=note))
        held_out = loaded.workload(self._held_out())
        features = self._stage("evaluate", lambda: [all_features(m, held_out) for m in (model, small)])
        quality = agreement(*features) if features[0].shape == features[1].shape else None
        speed = self._stage("evaluate", lambda: _speed(model, small, loaded))
        language = self._stage("evaluate", lambda: _language(model, small, held_out, loaded))
        rows = [module_row(as_layer(name, module), small) for name, module in self.found.layers.items()]
        budget = int(s.keep * sum(row[f"{s.cost}_before"] for row in rows))
        self.times["total"] = time.perf_counter() - started
        chosen = Plan(s.cost, s.keep, budget, [])
        report = self._report(chosen, rows, small, quality, None, losses, speed, held_out.name)
        report["language"] = language
        self._stage("save", lambda: self._publish(work, small, chosen, report))
        return report

    def _stream(self, work: Path, calibration: Workload, started: float) -> dict[str, Any]:
        """``_work`` for a model on disk."""
        s, loaded = self.settings, self.loaded
        held_out = loaded.workload(self._held_out())
        run = Offload(
            loaded.model,
            Shards(loaded.directory),
            self.found,
            work,
            calibration,
            held_out,
            objective=s.objective,
            seed=s.seed,
            progress=self.progress,
        )
        try:
            write(work / GRAMS, b"")  # from here on there is something worth keeping
            self._stage("collect", run.collect)
            self._stage("plan", lambda: run.measure(s.structures, s.cost, s.keep, curves=not s.plan))
            layers = {name: as_layer(name, module) for name, module in run.layers.items()}
            facts = run.facts()
            self._warn_few_tokens({name: (facts[name]["tokens"], layer.shape[1]) for name, layer in layers.items()})
            joints = run.joints()
            chosen = self._stage("plan", lambda: self._choose(work, layers, joints, run.plan))
            rows = self._stage("fit", lambda: run.fit(chosen))
            quality = self._stage("evaluate", lambda: agreement(*run.features()))
            language = self._stage("evaluate", run.language)
            self.times["total"] = time.perf_counter() - started
            report = self._report(chosen, rows, loaded.model, quality, None, [], [], held_out.name)
            report["language"] = language
            self._stage("save", lambda: self._publish(work, loaded.model, chosen, report, run.publish))
        finally:
            run.close()
        return report

    def _help(self, work: Path, calibration: Workload) -> dict[str, Any]:
        """What the ranks do that write nothing: their share of the Grams, the curves and the fits."""
        grams = self._grams(work, calibration)
        layers = planning_layers(self.loaded.model, grams)
        self._fit(work, self._plan(work, layers, grams), layers)
        return {}

    def _stage(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start
        return result

    def _fingerprint(self, calibration: Workload) -> str:
        """Of everything that the result depends on: a run that differs in any of it has a journal of its own."""
        digest = hashlib.sha256(f"{__version__} {torch.__version__}".encode())
        digest.update(json.dumps(asdict(self.settings), sort_keys=True).encode())
        if self.settings.plan:
            digest.update(Path(self.settings.plan).read_bytes())
        digest.update(self.loaded.config.to_json_string().encode())
        if self.loaded.skeleton:  # a journal of another kind, of files too large to read through
            for path in sorted(self.loaded.directory.glob("*.safetensors")):
                state = path.stat()
                digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
        tokens = {f"{i}|{key}": value for i, batch in enumerate(calibration.batches) for key, value in batch.items()}
        state_dict = {} if self.loaded.skeleton else self.loaded.model.state_dict()
        hash_tensors(digest, (*state_dict.items(), *tokens.items()))
        return digest.hexdigest()[:12]

    def _held_out(self) -> list[str]:
        import numpy

        texts = self.loaded.corpus.held_out
        order = numpy.random.RandomState(0).permutation(len(texts))[:HELD_OUT]
        return [texts[i] for i in order]

    def _grams(self, work: Path, calibration: Workload) -> Grams:
        path = work / GRAMS
        known = recall(path) if self.ranks.first else None
        shared = distributed.share_grams(self.ranks, Grams.from_state(*known) if known is not None else None)
        if shared is not None:
            return shared
        grams = (collect if self.ranks.size == 1 else partial(distributed.collect, self.ranks))(
            self.loaded.model,
            calibration,
            objective=self.recipe.objective(self.settings.objective),
            include=[*self.found.embeddings, *self.found.layers],
            embeddings=bool(self.found.embeddings),
            seed=self.settings.seed,
            progress=self.progress,
        )
        if self.ranks.first:
            keep(path, grams.state(), grams.describe())
        return grams

    def _plan(self, work: Path, layers: dict[str, Layer], grams: Grams) -> Plan:
        count = len(layers)

        def make(**options: Any) -> Plan:
            def tell(done: int) -> None:
                self.progress("plan", min(done, count), count)

            return make_plan(layers, grams.joints, **options, progress=tell)

        if self.ranks.size == 1:
            return self._choose(work, layers, grams.joints, make)
        s, ready = self.settings, bool(self.settings.plan) or (work / "plan.json").exists()
        curves = None
        if not json.loads(self.ranks.same(json.dumps(ready).encode(), "planning")):
            curves = distributed.curves(
                self.ranks, layers, grams.joints, resolve_structures(s.structures, s.cost), s.cost, s.keep
            )
        chosen = None
        if self.ranks.first:
            chosen = self._choose(work, layers, grams.joints, partial(make, curves=curves))
        return distributed.share_plan(self.ranks, chosen)

    def _choose(self, work: Path, layers: dict[str, Layer], joints: Sequence[Joint], make: Callable[..., Plan]) -> Plan:
        """The plan that the user gave, or the journal's, or what `make` makes."""
        s = self.settings
        if s.plan:
            chosen = Plan.load(s.plan)
            check_groups(chosen, joints)
            named = {name for entry in chosen.entries for name in entry.layers}
            for name, layer in layers.items():
                if name not in named:
                    chosen.entries.append(Entry([name], "dense", {}, dense_cost(layer).of(chosen.cost), 0.0))
            return chosen
        path = work / "plan.json"
        if path.exists():
            try:
                return Plan.load(path)
            except GramianError as error:
                raise damaged(path, str(error)) from None
        if s.recipe == "auto":
            chosen = make(keep=s.keep, cost=s.cost, structures=s.structures)
        else:
            calibration = self.loaded.workload(self.loaded.corpus.calibration)
            told = (self.recipe, self.loaded.model, calibration, layers)
            noise = sensitivities(*told, seed=s.seed, progress=self.progress)
            chosen = make(keep=s.keep, cost=s.cost, sensitivity=noise, **self.recipe.options(s.structures))
        write(path, chosen.to_json().encode())
        return Plan.load(path)

    def _fit(self, work: Path, chosen: Plan, layers: dict[str, Layer]) -> list[Built]:
        folder = work / "built"
        if not self.ranks.first:
            return [made for _, made in distributed.build_shared(self.ranks, chosen, layers, [])]
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{i:05d}.sealed" for i in range(len(chosen.entries))]
        done = {i: restored(*known) for i, path in enumerate(paths) if (known := recall(path)) is not None}
        missing = [i for i in range(len(chosen.entries)) if i not in done]
        rest = Plan(chosen.cost, chosen.keep, chosen.budget, [chosen.entries[i] for i in missing])
        fresh: Iterator[tuple[int, Built]]
        if self.ranks.size == 1:
            fresh = ((missing[place], made) for place, _, made in build_all(rest, layers))
        else:
            fresh = distributed.build_shared(self.ranks, chosen, layers, missing)
        for index, made in fresh:
            keep(paths[index], *stored(made))
            done[index] = made
            self.progress("fit", len(done), len(chosen.entries))
        for index, entry in enumerate(chosen.entries):
            parts = done[index].layers.items()
            entry.cost = sum(op_cost(op, layers[name]).of(chosen.cost) for name, (op, _) in parts)
            entry.predicted = entry.predicted if entry.structure != "dense" else 0.0
        return [done[i] for i in range(len(chosen.entries))]

    def _heal(
        self, work: Path, small: nn.Module, teacher: nn.Module, changed: list[str], calibration: Workload
    ) -> list[tuple[int, float]]:
        s = self.settings
        if self.recipe.train:
            settings = Healing(steps=s.heal or self.recipe.steps, seed=s.seed)
            return train(self.recipe, small, teacher, changed, calibration, settings, progress=self.progress)
        path = work / "heal.sealed"
        resume, known = recall(path) or (None, {"losses": []})
        losses: list[tuple[int, float]] = [(i, value) for i, value in known["losses"]]

        def note(i: int, value: float) -> None:
            losses.append((i, value))
            self.progress("heal", i + 1, s.heal)

        def checkpoint(state: dict[str, Tensor]) -> None:
            keep(path, state, {"losses": losses})

        settings = Healing(steps=s.heal, rate=s.rate, seed=s.seed)
        heal(small, teacher, changed, calibration, settings, resume=resume, checkpoint=checkpoint, progress=note)
        return losses

    def _warn_few_tokens(self, seen: Mapping[str, tuple[int, int]]) -> None:
        for name, (tokens, inputs) in seen.items():
            if tokens < 2 * inputs:
                self.warnings.append(
                    f"{name}: {tokens} calibration tokens for {inputs} inputs; "
                    "give at least twice as many tokens as inputs"
                )

    def _publish(
        self,
        work: Path,
        small: nn.Module,
        chosen: Plan,
        report: dict[str, Any],
        weights: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        final = work / "final"
        shutil.rmtree(final, ignore_errors=True)
        recipe = {**asdict(self.settings), "calibration": self.loaded.corpus.fingerprint}
        recipe["plan"] = bool(self.settings.plan)
        self.loaded.save(small, final, recipe=recipe)
        weights(transformer_folder(final) if self.loaded.sentence_transformer else final)
        size = sum(p.stat().st_size for p in final.rglob("*.safetensors"))
        report["size"]["file_after"] = size
        if chosen.entries:  # a recipe that acts on the model as a whole leaves no plan to carry out again
            write(final / "plan.json", chosen.to_json().encode())
        publish(work, final, self.out, report, self.render)

    def _report(
        self,
        chosen: Plan,
        rows: list[dict[str, Any]],
        small: nn.Module,
        quality: dict[str, float] | None,
        unhealed: dict[str, float] | None,
        losses: list[tuple[int, float]],
        speed: list[dict[str, float]],
        metric: str,
    ) -> dict[str, Any]:
        order = {name: i for i, name in enumerate((*self.found.embeddings, *self.found.layers))}
        rows = sorted(rows, key=lambda row: order[str(row["name"])])
        total = {
            f"{what}_{when}": sum(int(row[f"{what}_{when}"]) for row in rows)
            for what in ("params", "bytes", "flops", *(["latency"] if chosen.cost == "latency" else []))
            for when in ("before", "after")
        }
        model_before, bytes_before = self.before
        model_after = parameters(small)
        s = self.settings
        used = total[f"{chosen.cost}_after"]
        dense_total = total[f"{chosen.cost}_before"]
        return {
            "schema": 1,
            "gramian_version": __version__,
            "command": "compress",
            "model": {
                "source": self.loaded.source,
                "class": type(self.loaded.model).__name__,
                "parameters": model_before,
                "load": self.loaded.load_lines(self.out),
            },
            "settings": {
                **asdict(s),
                "structures": list(resolve_structures(self.recipe.options(s.structures)["structures"], s.cost)),
                "calibration": {
                    "source": self.loaded.corpus.source,
                    "texts": len(self.loaded.corpus.calibration),
                    "tokens": max((row["tokens"] for row in rows), default=0),
                    "fingerprint": self.loaded.corpus.fingerprint,
                },
            },
            "budget": {"cost": chosen.cost, "keep": chosen.keep, "asked": chosen.budget, "used": used},
            "kept": {
                "layers": used / dense_total,
                "model": model_after / model_before if chosen.cost != "bytes" else nbytes(small) / bytes_before,
            },
            "size": {
                **total,
                "model_params_before": model_before,
                "model_params_after": model_after,
                "file_before": self.loaded.file_bytes,
                "file_after": None,
            },
            "quality": {"metric": metric, "held_out": quality, "before_healing": unhealed},
            "predicted": {"plan": chosen.predicted, "built": sum(row["measured"] or 0.0 for row in rows)},
            "speed": speed,
            "layers": rows,
            "left_alone": self.found.left_alone,
            "warnings": self.warnings,
            "heal": {"steps": s.heal or len(losses), "loss": [[i, v] for i, v in losses]} if s.heal or losses else None,
            "times": {key: round(value, 3) for key, value in self.times.items()},
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
            },
        }


def _gram_entries(layer: Layer) -> int:
    """Numbers in the Grams of a layer; an embedding's input Gram is diagonal."""
    out, in_ = layer.shape
    return in_ * in_ + (out if layer.embedding else out * out)


def _least(layer: Layer, methods: Sequence[str], cost: str) -> int:
    """The cost of the cheapest thing that can be done to a layer alone (a lower bound is enough)."""
    from gramian.compression.options import embedding_sizes

    if layer.embedding:
        return min(price.of(cost) for _, _, price in embedding_sizes(layer, methods, cost))
    least = dense_cost(layer).of(cost)
    for method in methods:
        if method == "skeleton" or method in JOINT:
            m, n = layer.shape
            least = min(
                least,
                {
                    "params": 2 * m + n,
                    "bytes": (m + n) * layer.weight.element_size() + 4 * m,
                    "flops": 2 * (m + n),
                    "latency": 0,  # a product has a start-up time that no rank undercuts; found out when planned
                }[cost],
            )
        elif method == "quantized":
            least = min(least, Quantized.bytes_for(layer.shape, 2) if cost == "bytes" else least)
        else:
            least = 0  # found out when it is fitted
    return least


@torch.inference_mode()
def _speed(before: nn.Module, after: nn.Module, loaded: Loaded) -> list[dict[str, float]]:
    """Median milliseconds of both models on random tokens, taken in turn."""
    rows = []
    for batch, tokens, repeats in ((1, 16, 60), (16, 128, 7)):
        inputs = loaded.random_batch(batch, tokens)
        if inputs is None:
            return []
        taken: list[list[float]] = [[], []]
        for repeat in range(repeats + 3):
            for which, model in enumerate((before, after)):
                start = time.perf_counter()
                model(**inputs)
                if repeat > 2:
                    taken[which].append((time.perf_counter() - start) * 1e3)
        median = [sorted(t)[len(t) // 2] for t in taken]
        tokens = inputs["input_ids"].shape[1]  # fewer where the model takes fewer
        rows.append({"batch": batch, "tokens": tokens, "before_ms": median[0], "after_ms": median[1]})
    return rows


def _language(before: nn.Module, after: nn.Module, held_out: Workload, loaded: Loaded) -> dict[str, Any] | None:
    """Predictions of a language model on held-out text, and tokens a second when it generates (one sequence, keys and values
    cached; both models in turn); None for another kind of model.
    """
    if held_out.logits is None:
        return None
    found: dict[str, Any] = language_agreement(before, after, held_out)
    prompt = loaded.random_batch(1, 16)
    if math.isnan(found["perplexity_before"]) or prompt is None or not getattr(before, "can_generate", bool)():
        return {**found, "generation": None}
    tokens = max(1, min(GENERATED, loaded.longest - prompt["input_ids"].shape[1]))
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    taken: list[list[float]] = [[], []]
    with torch.inference_mode():
        for repeat in range(6):
            for which, model in enumerate((before, after)):
                start = time.perf_counter()
                model.generate(**prompt, **length)  # type: ignore[operator]
                if repeat:
                    taken[which].append(tokens / (time.perf_counter() - start))
    rates = [sorted(rates)[len(rates) // 2] for rates in taken]
    return {**found, "generation": {"tokens": tokens, "before": rates[0], "after": rates[1]}}


def _free_memory() -> int:
    """Bytes of memory that can be had without swapping; 0 if the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


__all__ = ["Job", "Settings"]
