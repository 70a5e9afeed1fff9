"""Compression of a model larger than memory: one block at a time, everything else on disk.

A sweep forwards keeps what reaches every block. A second one backwards recomputes each block with gradients: the
objective is taken at the end, and what it says about a block's input becomes the objective of the block before it
(``<block(h), g>``, whose gradient is the chain rule). So ``collect_layers`` sees each block exactly as it would in one
pass over the whole model. Curves, fits and the shards of the result follow block by block; in between only curves stay
in memory.

Each step leaves files in the work directory before the next begins, so a killed run goes on where it was. Peak memory is
a few times the widest block in float32 with its Grams, the layers outside the blocks, and one batch; depth adds the
candidates of the plan (some hundred bytes each) and the rows of the report.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gramian.compression import Entry, Layer, Plan, make_plan, op_cost, resolve_structures
from gramian.compression.allocation import Priced
from gramian.compression.plan import ItemKey, default_allocation, plan_items, priced_curve, shares_tried
from gramian.errors import GramianError
from gramian.files import flush
from gramian.grams import Grams, Joint, collect_layers
from gramian.models.api import Progress, apply_built, as_layer, build_all
from gramian.models.blocks import INDEX, Blocks, Shards, outside, resident, sources, state_of
from gramian.models.checkpoint import build, describe
from gramian.models.entries import entry_rows, layer_facts, restored, stored
from gramian.models.groups import find_groups
from gramian.models.journal import damaged, keep, recall, write
from gramian.models.swap import swap
from gramian.models.walk import Found, check_finite
from gramian.models.workload import Batch, Workload, first_tensor, language_agreement
from gramian.nn.structured import Structured

EARLY, LATE = "early", "late"
"""The parts of a model outside its blocks: what runs before them, and the rest."""


class Offload:
    """One run over a model on disk.

    Args:
        model: a skeleton with its parameters on the meta device; it becomes the skeleton of the compressed model.
        checkpoint: its tensors.
        found: the layers to work on.
        work: the work directory; what is there is not made again.
        calibration: texts that Grams are collected on.
        held_out: texts that quality is measured on.
        objective: see ``Workload.objective``.
        seed: of the random probes.
        progress: called with (stage, done, total).

    Raises:
        GramianError: the model has no chain of blocks, or tensors are missing.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Shards,
        found: Found,
        work: Path,
        calibration: Workload,
        held_out: Workload,
        *,
        objective: str = "auto",
        seed: int = 0,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self.model, self.checkpoint, self.work, self.seed, self.progress = model, checkpoint, work, seed, progress
        self.calibration, self.held_out = calibration, held_out
        self.probe = calibration.objective(objective)
        self.layers: dict[str, nn.Module] = {**found.embeddings, **found.layers}
        self.embeddings = set(found.embeddings)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.where = sources(model, checkpoint)
        self.blocks = Blocks(model)
        inside = f"{self.blocks.name}."
        rest = [name for name in self.where if not name.startswith(inside)]
        small = calibration.head(1)
        with (
            resident(model, [*rest, *self._state(0)], checkpoint, self.where, widen=self.dtype),
            torch.no_grad(),
        ):
            self.blocks.check(lambda: calibration.run(model, small))
            early, late = outside(self.blocks, lambda: calibration.run(model, small))
        self.modules = {EARLY: early, LATE: late}
        names = list(self.layers)
        self.parts: dict[str, list[str]] = {EARLY: [n for n in names if n in early]}
        for index in range(len(self.blocks)):
            prefix = self.blocks.prefix(index)
            self.parts[f"{index:05d}"] = [n for n in names if n.startswith(prefix)]
        self.parts[LATE] = [n for n in names if n in late]
        for folder in ("hidden", "grams", "curves", "built", "shards"):
            (work / folder).mkdir(exist_ok=True)

    # Pieces of the model -----------------------------------------------------------------------------------------

    def _state(self, part: int | str) -> list[str]:
        if isinstance(part, str) and not part.isdigit():
            return state_of(self.model, self.modules[part])
        index = int(part)
        return list(self.blocks.modules[index].state_dict(prefix=self.blocks.prefix(index), keep_vars=True))

    def _resident(self, *parts: int | str) -> Any:
        """Parts with their values in float32, ready to run."""
        names = [name for part in parts for name in self._state(part)]
        return resident(self.model, names, self.checkpoint, self.where, widen=self.dtype)

    def _stored(self, part: str) -> Any:
        """A part with its values as they are in the checkpoint."""
        return resident(self.model, self._state(part), self.checkpoint, self.where)

    def _planning(self, part: str, grams: Grams | None) -> dict[str, Layer]:
        """A resident part's layers, as the planner sees them."""
        return {n: as_layer(n, self.layers[n], None if grams is None else grams[n]) for n in self.parts[part]}

    # Hidden states -----------------------------------------------------------------------------------------------

    def _path(self, kind: str, level: int, batch: int) -> Path:
        return self.work / "hidden" / f"{kind}-{level:05d}-{batch:05d}.sealed"

    def _put(self, kind: str, level: int, batch: int, value: Tensor) -> None:
        keep(self._path(kind, level, batch), {"value": value.detach()}, {})

    def _get(self, kind: str, level: int, batch: int) -> Tensor:
        path = self._path(kind, level, batch)
        found = recall(path)
        if found is None:
            raise damaged(path.parent, f"{path.name} is missing; remove the folder {path.parents[1]}")
        return found[0]["value"]

    def _drop(self, kind: str, level: int) -> None:
        for path in (self.work / "hidden").glob(f"{kind}-{level:05d}-*.sealed"):
            path.unlink()

    def _sweep(
        self, kinds: Mapping[str, Workload], use: Callable[..., Any], *, history: str = "", stage: str = "collect"
    ) -> None:
        """Run every block on the states that reach it, and keep what it returns for the next.

        Args:
            kinds: names of sets of states, and their batches.
            use: makes parts resident.
            history: of this set all levels stay, of the others the last.
            stage: for the progress.
        """
        last = len(self.blocks)

        def whole(level: int) -> bool:
            return all(
                self._path(kind, level, j).exists() for kind, work in kinds.items() for j in range(len(work.batches))
            )

        first = next((level for level in range(last, -1, -1) if whole(level)), None)
        with torch.no_grad(), use(EARLY):
            if first is None:
                for kind, work in kinds.items():
                    for j, batch in enumerate(work.batches):
                        if not self._path(kind, 0, j).exists():
                            self._put(kind, 0, j, self.blocks.enter(partial(work.run, self.model, batch)))
                first = 0
            for level in range(first, last):
                with use(level):
                    if use == self._resident:
                        check_finite({n: self.layers[n] for n in self.parts[f"{level:05d}"]})
                    for kind, work in kinds.items():
                        for j, batch in enumerate(work.batches):
                            if not self._path(kind, level + 1, j).exists():
                                hidden = self._get(kind, level, j)
                                made = self.blocks.through(level, partial(work.run, self.model, batch), hidden)
                                self._put(kind, level + 1, j, made)
                for kind in kinds:
                    if kind != history:
                        self._drop(kind, level)
                self.progress(stage, level + 1, last * (2 if stage == "collect" else 1))

    def _ended(self, kind: str, batch: int) -> Any:
        return self.blocks.ending(self._get(kind, len(self.blocks), batch))

    # Stages ------------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """The Grams and joints of every part, as files; and what the model makes of the held-out texts."""
        depth, work = len(self.blocks), self.calibration
        grams = {part: self.work / "grams" / f"{part}.sealed" for part in self.parts}
        reference = self.work / "reference.sealed"
        if not grams[LATE].exists() or not reference.exists():
            self._sweep({"text": work, "held": self.held_out}, self._resident, history="text")
            with self._resident(EARLY, LATE):
                check_finite({n: self.layers[n] for part in (EARLY, LATE) for n in self.parts[part]})
                keep(reference, {"features": self._features("held")}, {})
                self._collect(LATE, grams[LATE], self._end, lambda m, j: self._run_end(j), self._small_end)
        for level in range(depth - 1, -1, -1):
            part = f"{level:05d}"
            if not grams[part].exists():
                with self._resident(EARLY, level):
                    self._collect(part, grams[part], self._middle(level), self._run_middle(level), self._small(level))
            self._drop("slope", level + 1)
            self._drop("text", level + 1)
            self.progress("collect", 2 * depth - level, 2 * depth)
        if not grams[EARLY].exists():
            with self._resident(EARLY):
                self._collect(EARLY, grams[EARLY], self._begin, lambda m, j: self._enter(j), self._small_begin)
        self._drop("slope", 0)
        self._drop("text", 0)

    def _collect(
        self,
        part: str,
        path: Path,
        objective: Callable[[nn.Module, int, torch.Generator], Tensor],
        run: Callable[[nn.Module, int], Any],
        forward: Callable[[], Tensor],
    ) -> None:
        """One part's Grams: a batch is its number. The states that enter the part keep their gradients as files."""
        chosen = {name: self.layers[name] for name in self.parts[part]}
        needed = self.probe is not None and (part != EARLY or chosen)
        if not chosen and not needed:
            keep(path, {}, Grams().describe())
            return
        work = self.calibration
        grams = collect_layers(
            self.model,
            chosen,
            range(len(work.batches)),
            run=run,
            objective=objective if self.probe is not None else None,
            mask=lambda j: work.mask(work.batches[j]),
            seed=self.seed,
        )
        linears = {name: module for name, module in chosen.items() if name not in self.embeddings}
        if linears:
            sites = {name: layer.site for name, layer in grams.layers.items()}
            grams.joints = find_groups(self.model, linears, forward, sites)
        keep(path, grams.state(), grams.describe())

    def _batch(self, j: int) -> Batch:
        return self.calibration.batches[j]

    def _slope(self, level: int, j: int, hidden: Tensor) -> Tensor:
        """`hidden` as a leaf whose gradient becomes a file."""
        if level > 0 or self.parts[EARLY]:
            hidden = hidden.requires_grad_()
            hidden.register_hook(lambda gradient: self._put("slope", level, j, gradient))  # type: ignore[no-untyped-call]
        return hidden

    def _end(self, model: nn.Module, j: int, generator: torch.Generator) -> Tensor:
        assert self.probe is not None
        with self.blocks.ending(self._slope(len(self.blocks), j, self._get("text", len(self.blocks), j))):
            return self.probe(model, self._batch(j), generator)

    def _run_end(self, j: int) -> Any:
        with self._ended("text", j):
            return self.calibration.run(self.model, self._batch(j))

    def _small_end(self) -> Tensor:
        small, (place, which) = self.calibration.sample(2), self.calibration.telling(2)
        with self.blocks.ending(self._get("text", len(self.blocks), place)[which]):
            return first_tensor(self.calibration.run(self.model, small)).float()

    def _through(self, level: int, batch: Batch, hidden: Tensor) -> Tensor:
        return self.blocks.through(level, lambda: self.calibration.run(self.model, batch), hidden)

    def _middle(self, level: int) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
        def objective(model: nn.Module, j: int, generator: torch.Generator) -> Tensor:
            hidden = self._slope(level, j, self._get("text", level, j))
            return (self._through(level, self._batch(j), hidden) * self._get("slope", level + 1, j)).sum()

        return objective

    def _run_middle(self, level: int) -> Callable[[nn.Module, int], Any]:
        return lambda model, j: self._through(level, self._batch(j), self._get("text", level, j))

    def _small(self, level: int) -> Callable[[], Tensor]:
        place, which = self.calibration.telling(2)
        small, hidden = self.calibration.sample(2), self._get("text", level, place)[which]
        return lambda: self._through(level, small, hidden)

    def _enter(self, j: int) -> Tensor:
        return self.blocks.enter(lambda: self.calibration.run(self.model, self._batch(j)))

    def _small_begin(self) -> Tensor:
        return self.blocks.enter(partial(self.calibration.run, self.model, self.calibration.sample(2)))

    def _begin(self, model: nn.Module, j: int, generator: torch.Generator) -> Tensor:
        return (self._enter(j) * self._get("slope", 0, j)).sum()

    @torch.no_grad()
    def _features(self, kind: str) -> Tensor:
        out = []
        for j, batch in enumerate(self.held_out.batches):
            with self._ended(kind, j):
                out.append(self.held_out.features(self.model, batch).float())
        return torch.cat(out)

    def _grams(self, part: str) -> Grams:
        known = recall(self.work / "grams" / f"{part}.sealed")
        assert known is not None
        return Grams.from_state(*known)

    def joints(self) -> list[Joint]:
        """Layers that can be compressed together, in the order in which a whole model's are found."""
        found = [joint for part in [*list(self.parts)[1:], EARLY] for joint in self._described(part)]
        return sorted(found, key=lambda joint: joint.kind != "neurons")

    def _described(self, part: str) -> list[Joint]:
        known = self._facts(part)["joints"]
        return [Joint(j["kind"], tuple(j["layers"]), j["heads"]) for j in known]

    @property
    def allocation(self) -> str:
        """How the budget is divided: errors of different layers compare where they have output gradients."""
        comparable: dict[str, bool] = {}
        for part, names in self.parts.items():
            held = _header(self.work / "grams" / f"{part}.sealed")
            comparable |= {name: f"{name}|gradient" in held for name in names}
        return default_allocation(comparable)

    def measure(self, structures: str, cost: str, keep: float, *, curves: bool) -> None:
        """What the planner and the report need of every layer, as files.

        Args:
            structures: names that compete.
            cost: the plan's.
            keep: the plan's.
            curves: False for a plan that is there already.
        """
        methods = resolve_structures(structures, cost)
        keeps = shares_tried(self.allocation, keep, cost)
        for done, part in enumerate(self.parts):
            path = self.work / "curves" / f"{part}.json"
            if not path.exists():
                grams = self._grams(part)
                with self._stored(part):
                    layers = self._planning(part, grams)
                    heads = {(joint.kind, *joint.layers): joint.heads for joint in grams.joints}
                    items = plan_items(layers, grams.joints, methods) if curves else []
                    priced = [
                        [item, priced_curve(layers, item, methods, cost, heads.get(item, 0), keeps)] for item in items
                    ]
                    facts = {name: layer_facts(layer) for name, layer in layers.items()}
                joints = grams.describe()["joints"]
                content = {"curves": priced, "facts": facts, "joints": joints}
                write(path, json.dumps(content).encode())
            self.progress("plan", done + 1, len(self.parts))

    def _facts(self, part: str) -> dict[str, Any]:
        path = self.work / "curves" / f"{part}.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise damaged(path, str(error)) from None

    def facts(self) -> dict[str, dict[str, Any]]:
        """``layer_facts`` of every layer."""
        return {name: fact for part in self.parts for name, fact in self._facts(part)["facts"].items()}

    def plan(self, *, keep: float, cost: str, structures: str) -> Plan:
        """The same plan that a model in memory gets; after ``measure``.

        Raises:
            GramianError: a budget out of reach.
        """
        layers = {name: as_layer(name, module) for name, module in self.layers.items()}
        return make_plan(
            layers,
            self.joints(),
            keep=keep,
            cost=cost,
            structures=structures,
            allocation=self.allocation,
            curves=_Curves(self),
        )

    def fit(self, chosen: Plan) -> list[dict[str, Any]]:
        """Carry the plan out: the compressed model's tensors become shards, the skeleton becomes its skeleton.

        Returns:
            The report's rows.

        Raises:
            GramianError: an entry whose layers lie in several parts.
        """
        place = {name: part for part, names in self.parts.items() for name in names}
        entries: dict[str, list[tuple[int, Entry]]] = {part: [] for part in self.parts}
        for index, entry in enumerate(chosen.entries):
            owners = {place[name] for name in entry.layers}
            if len(owners) > 1:
                raise GramianError(f"plan: {', '.join(entry.layers)} lie in several blocks; offload fits one at a time")
            entries[owners.pop()].append((index, entry))
        rows: list[dict[str, Any]] = []
        done = 0
        for part in self.parts:
            note = self.work / "shards" / f"{part}.json"
            if not note.exists():
                self._fit_part(part, entries[part], chosen, note)
            try:
                known = json.loads(note.read_text(encoding="utf-8"))
            except ValueError as error:
                raise damaged(note, str(error)) from None
            for (_, entry), (cost, predicted) in zip(entries[part], known["entries"], strict=True):
                entry.cost, entry.predicted = cost, predicted
            for name, spec in known["layers"].items():
                old = self.model.get_submodule(name)
                swap(self.model, old, build(name, spec, old))
            rows += known["rows"]
            done += len(entries[part])
            self.progress("fit", done, len(chosen.entries))
        return rows

    def _fit_part(self, part: str, entries: list[tuple[int, Entry]], chosen: Plan, note: Path) -> None:
        paths = {index: self.work / "built" / f"{index:05d}.sealed" for index, _ in entries}
        done = {index: restored(*known) for index, path in paths.items() if (known := recall(path)) is not None}
        missing = [(index, entry) for index, entry in entries if index not in done]
        grams = self._grams(part) if missing else None
        facts = self._facts(part)["facts"]
        with self._stored(part):
            layers = self._planning(part, grams)
            rest = Plan(chosen.cost, chosen.keep, chosen.budget, [entry for _, entry in missing])
            for number, _, made in build_all(rest, layers):
                keep(paths[missing[number][0]], *stored(made))
                done[missing[number][0]] = made
            rows, priced = [], []
            before: dict[str, nn.Module] = {}
            for index, entry in entries:
                made = done[index]
                cost = sum(op_cost(op, layers[name]).of(chosen.cost) for name, (op, _) in made.layers.items())
                entry.cost, entry.predicted = cost, entry.predicted if entry.structure != "dense" else 0.0
                priced.append((entry.cost, entry.predicted))
                rows += entry_rows(entry, made, layers, facts, chosen.cost)
                if entry.structure != "dense":
                    before |= {name: self.model.get_submodule(name) for name in made.layers}
                    apply_built(self.model, made)
            try:
                found = {name: describe(self.model.get_submodule(name)) for name in before}
                specs = {name: spec[""] for name, spec in found.items() if spec}
                changed = tuple(f"{name}." for name in before)
                state = self.model.state_dict()
                names = dict.fromkeys([*self._state(part), *(name for name in state if name.startswith(changed))])
                tensors = {
                    name: state[name].contiguous()
                    for name in names
                    if name in state and self.where.get(name, name) == name
                }
                del state
                path = note.with_suffix(".safetensors")
                partial = path.with_suffix(".partial")
                save_file(tensors, partial, metadata={"format": "pt"})
                flush(partial)
                partial.rename(path)
            finally:
                for name, old in before.items():
                    swap(self.model, self.model.get_submodule(name), old)
        content = {"layers": specs, "rows": rows, "entries": priced}
        write(note, json.dumps(content).encode())

    def features(self) -> tuple[Tensor, Tensor]:
        """(texts, d) features of the held-out texts, of the original and of the compressed model; after ``fit``."""
        known = recall(self.work / "reference.sealed")
        assert known is not None
        path = self.work / "features.sealed"
        done = recall(path)
        if done is None:
            use = self._compressed()
            self._sweep({"small": self.held_out}, use, stage="evaluate")
            with use(EARLY, LATE):
                keep(path, {"features": self._features("small")}, {})
            done = recall(path)
            assert done is not None
        return known[0]["features"], done[0]["features"]

    @torch.no_grad()
    def language(self) -> dict[str, Any] | None:
        """``language_agreement`` on the held-out texts, after ``features``; None for another kind of model, or where
        layers outside the blocks were changed (only one head fits in memory).
        """
        read = self.held_out.logits
        if read is None or any(isinstance(m, Structured) for m in self._outer()):
            return None
        before, after = nn.Identity(), nn.Identity()  # stand for the models, of which one head is here
        kinds = {id(before): "held", id(after): "small"}
        place = {id(batch): j for j, batch in enumerate(self.held_out.batches)}

        def logits(which: nn.Module, batch: Batch) -> Tensor:
            with self._ended(kinds[id(which)], place[id(batch)]):
                return read(self.model, batch)

        with self._compressed()(EARLY, LATE):
            causal = "Masked" not in type(self.model).__name__
            found = language_agreement(before, after, replace(self.held_out, logits=logits), causal=causal)
        return {**found, "generation": None}

    def _outer(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for part in (EARLY, LATE) for name in self.parts[part]]

    def _compressed(self) -> Callable[..., Any]:
        """Makes parts of the compressed model resident, in float32."""
        shards = Shards(self.work / "shards")
        where = sources(self.model, shards)

        def use(*parts: int | str) -> Any:
            names = [name for part in parts for name in self._compressed_state(part)]
            return resident(self.model, names, shards, where, widen=self.dtype)

        return use

    def _compressed_state(self, part: int | str) -> list[str]:
        """The state of a part whose layers were exchanged."""
        if not isinstance(part, str):
            return self._state(part)
        inside = tuple(f"{name}." for name in self.parts[part])
        return list(
            dict.fromkeys(
                [
                    *state_of(self.model, self.modules[part]),
                    *(name for name in self.model.state_dict(keep_vars=True) if name.startswith(inside)),
                ]
            )
        )

    def publish(self, directory: Path) -> None:
        """Move the shards into `directory` under the names that loaders expect, with their index. May be done again."""
        parts = [p for p in self.parts if (self.work / "shards" / f"{p}.safetensors").exists()]
        weights: dict[str, str] = {}
        total = 0
        for number, part in enumerate(parts):
            path = self.work / "shards" / f"{part}.safetensors"
            name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
            header = _header(path)
            weights |= dict.fromkeys(header, name)
            total += sum(end - start for start, end in header.values())
            try:
                (directory / name).hardlink_to(path)
            except OSError:  # a file system without links
                shutil.copyfile(path, directory / name)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        write(directory / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())

    def close(self) -> None:
        """Give the blocks their own forward back."""
        self.blocks.close()


class _Curve(Sequence[Priced]):
    """One curve, read from its file when looked at."""

    def __init__(self, read: Callable[[], list[Priced]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Priced]:
        return iter(self._read())

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())


class _Curves(Mapping[ItemKey, Sequence[Priced]]):
    """Curves by item, read from their files again and again: no more than one part's are in memory."""

    def __init__(self, run: Offload) -> None:
        self._run = run
        self._place = {
            tuple(item): (part, number)
            for part in run.parts
            for number, (item, _) in enumerate(run._facts(part)["curves"])
        }
        self._held: tuple[str, list[Any]] = ("", [])

    def __getitem__(self, item: ItemKey) -> Sequence[Priced]:
        return _Curve(partial(self._curve, *self._place[item]))

    def _curve(self, part: str, number: int) -> list[Priced]:
        if self._held[0] != part:
            self._held = part, self._run._facts(part)["curves"]
        return [Priced(*candidate) for candidate in self._held[1][number][1]]

    def __iter__(self) -> Iterator[ItemKey]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def _header(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor names of a safetensors file, and where their bytes begin and end."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: tuple(part["data_offsets"]) for name, part in header.items() if name != "__metadata__"}


__all__ = ["Offload"]
