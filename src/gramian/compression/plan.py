"""Which structure and size for every layer, under one budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gramian.compression.knapsack import Option, Solution, solve
from gramian.compression.layer import Layer
from gramian.compression.options import (
    COSTS,
    JOINT,
    Built,
    Candidate,
    Cost,
    build_single,
    dense_cost,
    embedding_curve,
    single_curve,
)
from gramian.errors import GramianError, nearest
from gramian.grams import Joint
from gramian.ops import structures as registered
from gramian.ops.operator import Size

SCHEMA = 1
AUTO = {
    "params": ("skeleton", "neurons", "query_key", "value_output"),
    "flops": ("skeleton", "neurons", "query_key", "value_output"),
    "latency": ("skeleton", "neurons", "query_key", "value_output"),
    "bytes": ("quantized", "skeleton", "neurons"),
}
"""What ``structures="auto"`` lets compete, by cost; dense always does. Other structures join when named: each of their sizes is
a fit of its own, which takes longer, and on trained weights they rarely beat these."""


@dataclass
class Entry:
    """One decision of a plan.

    Attributes:
        layers: the layers it is about.
        structure: "dense", a structure of ``gramian.ops``, or a joint method.
        size: its size.
        heads: for attention methods.
        cost: what it costs in the plan's unit (recomputed when the plan is applied).
        predicted: predicted loss increase.
    """

    layers: list[str]
    structure: str
    size: Size
    cost: int
    predicted: float
    heads: int = 0


@dataclass
class Plan:
    """A readable, editable plan.

    Attributes:
        cost: "params", "bytes", "flops" or "latency" (predicted run time on this machine).
        keep: share of the chosen layers' cost to keep.
        budget: that share in units of cost.
        entries: decisions; every chosen layer is in exactly one.
        notes: free text for people; ignored.
    """

    cost: str
    keep: float
    budget: int
    entries: list[Entry]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Total cost."""
        return sum(entry.cost for entry in self.entries)

    @property
    def predicted(self) -> float:
        """Total predicted loss increase."""
        return sum(entry.predicted for entry in self.entries)

    def to_json(self) -> str:
        """Pretty JSON, one entry a line."""
        head = {
            "gramian": "plan",
            "schema": SCHEMA,
            "cost": self.cost,
            "keep": self.keep,
            "budget": self.budget,
            "used": self.used,
            "predicted": self.predicted,
            "notes": self.notes,
        }
        lines = ",\n    ".join(json.dumps(asdict(entry)) for entry in self.entries)
        return json.dumps(head, indent=2)[:-2] + f',\n  "entries": [\n    {lines}\n  ]\n}}\n'

    def save(self, path: str | Path) -> None:
        """Write ``to_json``."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan, perhaps edited by hand.

        Raises:
            GramianError: not a plan, a newer schema, or a malformed entry (which one is said).
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise GramianError(f"plan {path}: {error}") from None
        if not isinstance(data, dict) or data.get("gramian") != "plan":
            raise GramianError(f'plan {path}: not a plan file (no "gramian": "plan")')
        if data.get("schema") != SCHEMA:
            raise GramianError(f"plan {path}: schema {data.get('schema')}; this gramian reads {SCHEMA}")
        entries = []
        for index, raw in enumerate(data.get("entries", [])):
            try:
                entries.append(
                    Entry(
                        [str(name) for name in raw["layers"]],
                        str(raw["structure"]),
                        dict(raw.get("size", {})),
                        int(raw.get("cost", 0)),
                        float(raw.get("predicted", 0.0)),
                        int(raw.get("heads", 0)),
                    )
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise GramianError(f"plan {path}: entry {index}: {error!r}; expected layers, structure, size") from None
        try:
            return cls(str(data["cost"]), float(data["keep"]), int(data["budget"]), entries, data.get("notes", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise GramianError(f"plan {path}: {error!r}; expected cost, keep and budget") from None


def resolve_structures(names: Sequence[str] | str, cost: str) -> tuple[str, ...]:
    """The methods that compete, checked.

    Raises:
        GramianError: unknown cost or structure name.
    """
    if cost not in COSTS:
        raise GramianError(f"unknown cost {cost!r}; expected one of {', '.join(COSTS)}")
    if isinstance(names, str):
        names = [name for name in names.replace(" ", "").split(",") if name]
    out: list[str] = []
    fittable = [kind for kind, cls in registered().items() if cls.fittable]
    for name in names:
        if name == "auto":
            out.extend(AUTO[cost])
        elif name in fittable or name in JOINT:
            out.append(name)
        else:
            known = sorted({*fittable, *JOINT, "auto"})
            raise GramianError(f"unknown structure {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return tuple(dict.fromkeys(name for name in out if name != "dense"))


def check_keep(keep: float) -> float:
    """Raise unless 0 < keep <= 1.

    Raises:
        GramianError: out of range.
    """
    if not 0 < keep <= 1:
        raise GramianError(f"keep {keep:g}: expected a share above 0 and at most 1, e.g. 0.5")
    return keep


def make_plan(
    layers: Mapping[str, Layer],
    joints: Sequence[Joint],
    *,
    keep: float,
    cost: str = "params",
    structures: Sequence[str] | str = "auto",
    uniform: bool | None = None,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """The plan of least predicted loss within the budget, over all structures and sizes at once.

    Args:
        layers: by name.
        joints: layers with joint options; a layer may be in one of them at most.
        keep: share of the layers' present cost.
        cost: "params", "bytes", "flops" or "latency" (predicted run time on this machine).
        structures: names that compete, or "auto".
        uniform: give every group its own share of the budget instead of one budget for all. By default only when errors
            of different layers do not compare: without output gradients.
        threads: curves computed side by side.
        progress: called with the number of finished curves.

    Raises:
        GramianError: bad arguments, or a budget out of reach.
    """
    check_keep(keep)
    methods = resolve_structures(structures, cost)
    if uniform is None:
        uniform = not all(layer.comparable for layer in layers.values())
    groups = _groups(layers, joints, methods)
    total = sum(dense_cost(layer).of(cost) for layer in layers.values())
    budget = int(keep * total)
    heads = {(joint.kind, *joint.layers): joint.heads for joint in joints}
    items = dict.fromkeys(item for group in groups for branch in group for item in branch)
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        jobs = {item: pool.submit(curve, layers, item, methods, cost, heads.get(item, 0)) for item in items}
        curves: dict[tuple[str, ...], list[Candidate]] = {}
        for index, (key, job) in enumerate(jobs.items()):
            curves[key] = job.result()
            if progress is not None:
                progress(index + 1)
    priced = [
        [[[Option(c.cost.of(cost), c.error) for c in curves[item]] for item in branch] for branch in group]
        for group in groups
    ]
    if uniform:
        choices = []
        for group, options in zip(groups, priced, strict=True):
            members = {name for item in group[0] for name in item[1:]}
            share = int(keep * sum(dense_cost(layers[name]).of(cost) for name in members))
            choices += solve([options], share).choices
        solution = Solution(choices, 0, 0.0)
    else:
        try:
            solution = solve(priced, budget)
        except GramianError as error:
            least = int(str(error).rsplit(" ", 1)[-1])
            raise GramianError(
                f"keep {keep:g} is out of reach: the smallest options keep {least / total:.4f} of the {cost}; "
                "ask for more or allow more structures"
            ) from None
    entries: list[Entry] = []
    for group, choice in zip(groups, solution.choices, strict=True):
        for item, option in zip(group[choice.branch], choice.options, strict=True):
            candidate = curves[item][option]
            names = list(item[1:])
            priced_at = candidate.cost.of(cost)
            entries.append(
                Entry(names, candidate.structure, candidate.size, priced_at, candidate.error, heads.get(item, 0))
            )
    place = {name: i for i, name in enumerate(layers)}
    entries.sort(key=lambda entry: min(place[name] for name in entry.layers))
    return Plan(cost, keep, budget, entries)


ItemKey = tuple[str, ...]
"""("single", layer) or (joint kind, layer, layer, ...)."""


def _groups(layers: Mapping[str, Layer], joints: Sequence[Joint], methods: Sequence[str]) -> list[list[list[ItemKey]]]:
    """Groups of branches of items. A group with a joint option has two branches: one by one, or together."""
    groups: list[list[list[ItemKey]]] = []
    done: set[str] = set()
    for joint in joints:
        if joint.kind not in methods or any(name not in layers or name in done for name in joint.layers):
            continue
        groups.append([[("single", name) for name in joint.layers], [(joint.kind, *joint.layers)]])
        done.update(joint.layers)
    groups += [[[("single", name)]] for name in layers if name not in done]
    return groups


def curve(
    layers: Mapping[str, Layer], item: ItemKey, methods: Sequence[str], cost: str, heads: int = 0
) -> list[Candidate]:
    """All candidates of one item, "as it is" included for single layers."""
    kind, *names = item
    if kind != "single":
        candidates: list[Candidate] = JOINT[kind]([layers[name] for name in names], heads).curve(cost)
        return candidates
    layer = layers[names[0]]
    if layer.embedding:
        return embedding_curve(layer, methods, cost)
    out = [Candidate("dense", {}, dense_cost(layer), 0.0)]
    for method in methods:
        if method not in JOINT:
            out += single_curve(layer, method, cost)
    return out


def build_entry(entry: Entry, layers: Mapping[str, Layer]) -> Built:
    """Make what one entry asks for.

    Raises:
        GramianError: an unknown layer or structure, or a size out of range.
    """
    for name in entry.layers:
        if name not in layers:
            raise GramianError(f"plan: no layer {name!r}{nearest(name, layers)}")
    if entry.structure in JOINT:
        method = JOINT[entry.structure]([layers[name] for name in entry.layers], entry.heads)
        built: Built = method.build(entry.size)
        return built
    if len(entry.layers) != 1:
        raise GramianError(f"plan: structure {entry.structure!r} is for one layer, found {entry.layers}")
    return build_single(layers[entry.layers[0]], entry.structure, entry.size)


def count(built: Built) -> Cost:
    """Exact cost of what was built."""
    total = Cost(0, 0, 0)
    for op, _ in built.layers.values():
        total += Cost(op.numel, op.nbytes, op.flops())
    return total
