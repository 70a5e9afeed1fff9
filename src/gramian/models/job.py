"""The main job, end to end and restartable: a model directory in, a smaller one out, and a report.

Everything is made in a hidden work directory beside the output, whose name holds a fingerprint of the model, the data and
the settings. Each stage leaves a file there before the next begins (the Grams, the plan, every fitted entry, the state of
healing), so a killed run goes on where it was and ends with the same bytes. The output appears at the end, by one rename.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramian import __version__
from gramian.compression import Built, Entry, Layer, Plan, dense_cost, make_plan, op_cost, resolve_structures
from gramian.compression.options import COSTS, JOINT
from gramian.compression.plan import check_keep
from gramian.errors import GramianError, nearest
from gramian.grams import Grams
from gramian.linalg import svdvals
from gramian.models.api import Progress, apply_built, as_layer, build_all, check_plan, collect, planning_layers
from gramian.models.heal import Healing, heal
from gramian.models.journal import damaged, disk_error, keep, recall, workspace, write
from gramian.models.loading import Loaded, load_model
from gramian.models.walk import bias_of, check_finite, find_layers
from gramian.models.workload import Workload, agreement, all_features
from gramian.nn.structured import Structured
from gramian.ops import Operator, from_config, structures

HELD_OUT = 160
"""Most held-out texts that quality is measured on."""
SPECTRUM_POINTS = 33
GRAMS = "grams.sealed"
"""The first file of the work directory that is worth keeping."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for; with the model and the data it fixes the result.

    Attributes:
        keep: share to keep.
        cost: "params", "bytes", "flops" or "latency".
        structures: comma-separated names, or "auto".
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
    """

    model: str | None
    data: str | None
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
            What the run would do, JSON-able: layers, budget, room needed.

        Raises:
            GramianError: one line that names the culprit and the remedy.
        """
        s = self.settings
        check_keep(s.keep)
        methods = resolve_structures(s.structures, s.cost)
        if s.heal < 0:
            raise GramianError(f"--heal {s.heal}: expected 0 or more steps")
        if not 0 < s.rate < math.inf:
            raise GramianError(f"--rate {s.rate:g}: expected a learning rate above 0, e.g. 0.0001")
        if not 0 <= s.seed < 2**31:
            raise GramianError(f"--seed {s.seed}: expected 0 to {2**31 - 1}")
        if s.objective not in ("auto", "features", "lm", "none"):
            raise GramianError(f"--objective {s.objective!r}; expected auto, features, lm or none")
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise GramianError(f"--out {self.out} exists and is no directory; remove it or choose another name")
        if self.out.exists() and any(self.out.iterdir()):
            raise GramianError(f"--out {self.out} exists and is not empty; remove it or choose another directory")
        parent = _existing(self.out.absolute().parent)
        if not parent.is_dir():
            raise GramianError(f"--out {self.out}: {parent} is a file; choose another directory")
        if not os.access(parent, os.W_OK):
            raise GramianError(f"--out {self.out}: no permission to write in {parent}; choose another directory")
        chosen = Plan.load(s.plan) if s.plan else None
        self.loaded = load_model(self.model, self.data)
        heads = () if s.include else self.loaded.heads
        tables = s.embeddings and s.cost not in ("flops", "latency")
        found = find_layers(self.loaded.model, include=s.include, exclude=(*s.exclude, *heads), embeddings=tables)
        if s.embeddings and not tables:
            self.warnings.append("--embeddings has no effect on a budget of FLOPs: a look-up takes none")
        for entry in found.left_alone:
            if entry["name"] in heads:
                entry["reason"] = "a head outside the repeated blocks (name it with --include to take part)"
        chosen_layers = {**found.embeddings, **found.layers}
        check_finite(chosen_layers)
        self.found = found
        layers = {name: as_layer(name, module) for name, module in chosen_layers.items()}
        total = sum(dense_cost(layer).of(s.cost) for layer in layers.values())
        least = sum(_least(layer, methods, s.cost) for layer in layers.values())
        if chosen is not None:
            check_plan(chosen, layers)
            _check_sizes(chosen, layers)
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
        need_memory = 3 * file_bytes + 2 * gram_bytes
        free_memory = _free_memory()
        if free_memory and need_memory > free_memory:
            raise GramianError(
                f"needs about {need_memory / 1e6:,.0f} MB of memory, {free_memory / 1e6:,.0f} MB are free; "
                "leave layers out with --exclude"
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
        }

    # The run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Do it all; returns the report (see ``gramian.report``).

        Raises:
            GramianError: one line that names the culprit and the remedy; nothing is at ``out`` then.
        """
        started = time.perf_counter()
        self.check()
        torch.manual_seed(self.settings.seed)
        calibration = self.loaded.workload(self.loaded.corpus.calibration)
        work = self.out.absolute().parent / f".{self.out.name}.gramian-{self._fingerprint(calibration)}"
        try:
            with workspace(work, GRAMS):
                return self._work(work, calibration, started)
        except Exception as error:
            cause = disk_error(error)
            if cause is None:
                raise
            raise GramianError(
                f"--out {self.out} cannot be written: {cause}; see to that and run the same command again to go on"
            ) from cause

    def _work(self, work: Path, calibration: Workload, started: float) -> dict[str, Any]:
        s, loaded = self.settings, self.loaded
        grams = self._stage("collect", lambda: self._grams(work, calibration))
        layers = planning_layers(loaded.model, grams)
        self._warn_few_tokens(layers)
        chosen = self._stage("plan", lambda: self._plan(work, layers, grams))
        spectra = {name: _spectra(layer) for name, layer in layers.items()}
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
        if s.heal and changed:
            unhealed = quality
            losses = self._stage("heal", lambda: self._heal(work, small, before_model, changed, calibration))
            quality = self._stage("evaluate", lambda: agreement(reference, all_features(small, held_out)))
        speed = self._stage("evaluate", lambda: _speed(before_model, small, loaded))
        self.times["total"] = time.perf_counter() - started
        report = self._report(chosen, layers, built, spectra, small, quality, unhealed, losses, speed, held_out.name)
        self._stage("save", lambda: self._publish(work, small, chosen, report))
        return report

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
        tokens = {f"{i}|{key}": value for i, batch in enumerate(calibration.batches) for key, value in batch.items()}
        for name, tensor in (*self.loaded.model.state_dict().items(), *tokens.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    def _held_out(self) -> list[str]:
        import numpy

        texts = self.loaded.corpus.held_out
        order = numpy.random.RandomState(0).permutation(len(texts))[:HELD_OUT]
        return [texts[i] for i in order]

    def _grams(self, work: Path, calibration: Workload) -> Grams:
        path = work / GRAMS
        known = recall(path)
        if known is not None:
            return Grams.from_state(*known)
        grams = collect(
            self.loaded.model,
            calibration,
            objective=self.settings.objective,
            include=[*self.found.embeddings, *self.found.layers],
            embeddings=bool(self.found.embeddings),
            seed=self.settings.seed,
            progress=self.progress,
        )
        keep(path, grams.state(), grams.describe())
        return grams

    def _plan(self, work: Path, layers: dict[str, Layer], grams: Grams) -> Plan:
        s = self.settings
        if s.plan:
            chosen = Plan.load(s.plan)
            _check_groups(chosen, grams)
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
        count = len(layers)
        chosen = make_plan(
            layers,
            grams.joints,
            keep=s.keep,
            cost=s.cost,
            structures=s.structures,
            progress=lambda done: self.progress("plan", min(done, count), count),
        )
        write(path, chosen.to_json().encode())
        return Plan.load(path)

    def _fit(self, work: Path, chosen: Plan, layers: dict[str, Layer]) -> list[Built]:
        folder = work / "built"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{i:05d}.sealed" for i in range(len(chosen.entries))]
        done = {i: _restored(*known) for i, path in enumerate(paths) if (known := recall(path)) is not None}
        missing = [i for i in range(len(chosen.entries)) if i not in done]
        rest = Plan(chosen.cost, chosen.keep, chosen.budget, [chosen.entries[i] for i in missing])
        for place, _, made in build_all(rest, layers):
            index = missing[place]
            keep(paths[index], *_stored(made))
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

    def _warn_few_tokens(self, layers: dict[str, Layer]) -> None:
        for name, layer in layers.items():
            if layer.grams is not None and layer.grams.tokens < 2 * layer.shape[1]:
                self.warnings.append(
                    f"{name}: {layer.grams.tokens} calibration tokens for {layer.shape[1]} inputs; "
                    "give at least twice as many tokens as inputs"
                )

    def _publish(self, work: Path, small: nn.Module, chosen: Plan, report: dict[str, Any]) -> None:
        final = work / "final"
        shutil.rmtree(final, ignore_errors=True)
        recipe = {**asdict(self.settings), "calibration": self.loaded.corpus.fingerprint}
        recipe["plan"] = bool(self.settings.plan)
        self.loaded.save(small, final, recipe=recipe)
        size = sum(p.stat().st_size for p in final.rglob("*.safetensors"))
        report["size"]["file_after"] = size
        write(final / "plan.json", chosen.to_json().encode())
        write(final / "report.json", json.dumps(finite(report), indent=1, allow_nan=False).encode())
        if self.render is not None:
            write(final / "report.html", self.render(report).encode())
        if self.out.exists():
            self.out.rmdir()
        os.rename(final, self.out)
        shutil.rmtree(work, ignore_errors=True)

    def _report(
        self,
        chosen: Plan,
        layers: dict[str, Layer],
        built: Sequence[Built],
        spectra: dict[str, dict[str, Any]],
        small: nn.Module,
        quality: dict[str, float],
        unhealed: dict[str, float] | None,
        losses: list[tuple[int, float]],
        speed: list[dict[str, float]],
        metric: str,
    ) -> dict[str, Any]:
        rows = []
        for entry, made in zip(chosen.entries, built, strict=True):
            for name in entry.layers:
                layer, op = layers[name], made.layers[name][0]
                before, after = dense_cost(layer), op_cost(op, layer)
                measured = made.error.get(name, 0.0)
                first = name == entry.layers[-1]
                rows.append(
                    {
                        "name": name,
                        "shape": list(layer.shape),
                        "structure": entry.structure,
                        "size": entry.size,
                        "params_before": before.params,
                        "params_after": after.params,
                        "bytes_before": before.bytes,
                        "bytes_after": after.bytes,
                        "flops_before": before.flops,
                        "flops_after": after.flops,
                        **(
                            {"latency_before": before.of("latency"), "latency_after": after.of("latency")}
                            if chosen.cost == "latency"
                            else {}
                        ),
                        "predicted": entry.predicted if first else None,
                        "measured": sum(made.error.values()) if first else None,
                        "relative": measured / max(layer.error(torch.zeros_like(layer.weight)), 1e-300),
                        "joint": [other for other in entry.layers if other != name],
                        **spectra[name],
                    }
                )
        order = {name: i for i, name in enumerate(layers)}
        rows.sort(key=lambda row: order[str(row["name"])])
        total = {
            f"{what}_{when}": sum(int(row[f"{what}_{when}"]) for row in rows)
            for what in ("params", "bytes", "flops", *(["latency"] if chosen.cost == "latency" else []))
            for when in ("before", "after")
        }
        model_before = _parameters(self.loaded.model)
        model_after = _parameters(small)
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
                "structures": list(resolve_structures(s.structures, s.cost)),
                "calibration": {
                    "source": self.loaded.corpus.source,
                    "texts": len(self.loaded.corpus.calibration),
                    "tokens": max((layer.grams.tokens for layer in layers.values() if layer.grams), default=0),
                    "fingerprint": self.loaded.corpus.fingerprint,
                },
            },
            "budget": {"cost": chosen.cost, "keep": chosen.keep, "asked": chosen.budget, "used": used},
            "kept": {
                "layers": used / dense_total,
                "model": model_after / model_before
                if chosen.cost != "bytes"
                else _bytes(small) / _bytes(self.loaded.model),
            },
            "size": {
                **total,
                "model_params_before": model_before,
                "model_params_after": model_after,
                "file_before": self.loaded.file_bytes,
                "file_after": None,
            },
            "quality": {"metric": metric, "held_out": quality, "before_healing": unhealed},
            "predicted": {"plan": chosen.predicted, "built": sum(sum(m.error.values()) for m in built)},
            "speed": speed,
            "layers": rows,
            "left_alone": self.found.left_alone,
            "warnings": self.warnings,
            "heal": {"steps": s.heal, "loss": [[i, v] for i, v in losses]} if s.heal else None,
            "times": {key: round(value, 3) for key, value in self.times.items()},
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
            },
        }


def finite(value: Any) -> Any:
    """The same JSON-able value with NaN and Inf as null: they are not JSON."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _gram_entries(layer: Layer) -> int:
    """Numbers in the Grams of a layer; an embedding's input Gram is diagonal."""
    out, in_ = layer.shape
    return in_ * in_ + (out if layer.embedding else out * out)


def _least(layer: Layer, methods: Sequence[str], cost: str) -> int:
    """The cost of the cheapest thing that can be done to a layer alone (a lower bound is enough)."""
    from gramian.compression.options import embedding_sizes, single_curve

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
            for candidate in single_curve(layer, method, cost):
                least = min(least, candidate.cost.of(cost))
        else:
            least = 0  # found out when it is fitted
    return least


def _spectra(layer: Layer) -> dict[str, Any]:
    """What the report shows of a layer's spectrum: remaining energy by rank, without and with the Grams."""
    values = svdvals(layer.weight.double()).square()
    plain = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    weighted = layer.spectrum.errors
    seen = (-weighted.diff()).clamp_min(0)
    place = torch.linspace(0, min(layer.shape), SPECTRUM_POINTS).round().long()
    share = seen / seen.sum().clamp_min(1e-300)
    entropy = -(share.clamp_min(1e-300).log() * share).sum()

    def curve(x: Tensor) -> list[float]:
        return [round(float(v), 6) for v in x[place] / x[0].clamp_min(1e-300)]

    return {
        "effective_rank": float(entropy.exp()),
        "stable_rank": float(values.sum() / values[0].clamp_min(1e-300)),
        "gram_rank": layer.grams.input.rank() if layer.grams is not None else 0,
        "tokens": layer.grams.tokens if layer.grams is not None else 0,
        "spectrum": {"plain": curve(plain), "weighted": curve(weighted)},
    }


def _parameters(model: nn.Module) -> int:
    """Stored numbers of a model: parameters and the index or code buffers of structured layers."""
    inside = {id(p) for m in model.modules() if isinstance(m, Structured) for p in m.parameters()}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    structured = sum(
        m.op.numel + (bias.numel() if (bias := bias_of(m)) is not None else 0)
        for m in model.modules()
        if isinstance(m, Structured)
    )
    return plain + structured


def _bytes(model: nn.Module) -> int:

    inside = {id(p) for m in model.modules() if isinstance(m, Structured) for p in m.parameters()}
    plain = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    return plain + sum(
        m.op.nbytes + (bias.nbytes if (bias := bias_of(m)) is not None else 0)
        for m in model.modules()
        if isinstance(m, Structured)
    )


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


def _stored(made: Built) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A fitted entry as ``keep`` takes it."""
    tensors: dict[str, Tensor] = {}
    for name, (op, bias) in made.layers.items():
        tensors.update({f"{name}|{key}": value for key, value in op.factors().items()})
        if bias is not None:
            tensors[f"{name}|"] = bias
    return tensors, {"layers": {name: op.config() for name, (op, _) in made.layers.items()}, "error": made.error}


def _restored(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Built:
    """Inverse of ``_stored``."""
    made: dict[str, tuple[Operator, Tensor | None]] = {}
    for name, config in description["layers"].items():
        own = {key.removeprefix(f"{name}|"): value for key, value in tensors.items() if key.startswith(f"{name}|")}
        bias = own.pop("", None)
        made[name] = (from_config(config, own), bias)
    return Built(made, description["error"])


def _check_sizes(chosen: Plan, layers: Mapping[str, Layer]) -> None:
    """Raise on what no fit could make of these layers, before the long work.

    Raises:
        GramianError: which entry, and what is expected.
    """
    if chosen.cost not in COSTS:
        raise GramianError(f"plan: unknown cost {chosen.cost!r}; expected one of {', '.join(COSTS)}")
    kinds = {kind: cls for kind, cls in structures().items() if cls.fittable}
    for index, entry in enumerate(chosen.entries):
        kind, shapes = entry.structure, [layers[name].shape for name in entry.layers]
        where = f"plan: entry {index} ({', '.join(entry.layers)})"
        if not shapes:
            raise GramianError(f"plan: entry {index} names no layer")
        if kind == "dense":
            continue
        if kind in JOINT:
            limits = {"width": shapes[-1][1]} if kind == "neurons" else {"dimensions": shapes[0][0]}
            known = {*limits, "bits"}
        elif kind in kinds:
            if len(shapes) > 1:
                raise GramianError(f"{where}: {kind} is for one layer, found {len(shapes)}")
            limits = {"rank": min(shapes[0])}
            known = set(inspect.signature(kinds[kind].fit).parameters) - {"weight", "gram_in", "gram_out", "size"}
        else:
            raise GramianError(f"{where}: unknown structure {kind!r}{nearest(kind, [*kinds, *JOINT])}")
        for key in entry.size:
            if key not in known:
                raise GramianError(f"{where}: {kind}: unknown size {key!r}; expected {', '.join(sorted(known))}")
        if "bits" in entry.size:
            limits["bits"] = 8
        for key, most in limits.items():
            value = entry.size.get(key)
            if key in known and not (type(value) is int and 1 <= value <= most):
                raise GramianError(f"{where}: {kind}: {key} {value}; expected 1 to {most}")


def _check_groups(chosen: Plan, grams: Grams) -> None:
    """Raise unless the layers that an entry compresses together do belong together in this model.

    Raises:
        GramianError: which entry, and the groups that there are.
    """
    known = {(joint.kind, *joint.layers): joint.heads for joint in grams.joints}
    for entry in chosen.entries:
        if entry.structure in JOINT and known.get((entry.structure, *entry.layers)) != entry.heads:
            groups = [f"{kind} of {', '.join(names)}" for kind, *names in known if kind == entry.structure]
            raise GramianError(
                f"plan: {entry.structure} of {', '.join(entry.layers)} with {entry.heads} heads fits no group of this model"
                f"{nearest(f'{entry.structure} of ' + ', '.join(entry.layers), groups)}"
            )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


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
