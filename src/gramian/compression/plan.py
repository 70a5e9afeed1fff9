"""Which structure and size for every layer, under one budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gramian.compression.allocation import Priced, Problem, resolve_allocation
from gramian.compression.layer import Layer, resolve_weighting
from gramian.compression.options import (
    COSTS,
    JOINT,
    KEEPS,
    SPECIAL,
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
    "params": ("skeleton", *JOINT),
    "flops": ("skeleton", *JOINT),
    "latency": ("skeleton", *JOINT),
    "bytes": ("quantized", "skeleton", "neurons"),
}
"""What ``structures="auto"`` lets compete, by cost; dense always does. Other structures join when named: each of their sizes is
a fit of its own, which takes longer, and on trained weights they rarely beat these. (BLAST comes closest: on the small Llama of
examples/ half the error of low rank at equal parameters, layer by layer; against joint methods the knapsack took none.)"""


@dataclass
class Entry:
    """One decision of a plan.

    Attributes:
        layers: the layers it is about.
        structure: "dense", a structure of ``gramian.ops``, or a joint method.
        size: its size.
        cost: what it costs in the plan's unit (recomputed when the plan is applied).
        predicted: predicted loss increase; under another weighting than "two-sided", error relative to the layer's output.
        heads: for attention methods.
        weighting: which Grams measure an error of a single layer.
    """

    layers: list[str]
    structure: str
    size: Size
    cost: int
    predicted: float
    heads: int = 0
    weighting: str = "two-sided"


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
                        str(raw.get("weighting", "two-sided")),
                    )
                )
                resolve_weighting(entries[-1].weighting)
            except GramianError as error:
                raise GramianError(f"plan {path}: entry {index}: {error}") from None
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise GramianError(f"plan {path}: entry {index}: {error!r}; expected layers, structure, size") from None
        try:
            return cls(str(data["cost"]), float(data["keep"]), int(data["budget"]), entries, data.get("notes", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise GramianError(f"plan {path}: {error!r}; expected cost, keep and budget") from None


ItemKey = tuple[str, ...]
"""("single", layer) or (joint kind, layer, layer, ...)."""


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
        elif name in fittable or name in JOINT or name in SPECIAL:
            out.append(name)
        else:
            known = sorted({*fittable, *JOINT, *SPECIAL, "auto"})
            raise GramianError(f"unknown structure {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return tuple(dict.fromkeys(name for name in out if name != "dense"))


def default_allocation(comparable: Mapping[str, bool]) -> str:
    """How a budget is divided among layers: "exact" where their errors compare, "uniform" where none do.

    Args:
        comparable: by layer name, whether its errors are in the unit of the loss (``Layer.comparable``).

    Raises:
        GramianError: some do and some do not.
    """
    if any(comparable.values()):
        apart = [name for name, fits in comparable.items() if not fits]
        if apart:
            raise GramianError(
                f"layer {apart[0]}: no gradient reached it, so nothing that was measured depends on it; leave it out with "
                "exclude, or measure with an objective that it serves"
            )
        return "exact"
    return "uniform"


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
    weighting: str = "two-sided",
    allocation: str | None = None,
    sensitivity: Mapping[str, float] | None = None,
    fixed: Mapping[str, Any] | None = None,
    threads: int = 2,
    curves: Mapping[ItemKey, Sequence[Priced]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """The plan of least predicted loss within the budget, over all structures and sizes at once.

    Args:
        layers: by name.
        joints: layers with joint options; a layer may be in one of them at most.
        keep: share of the layers' present cost.
        cost: "params", "bytes", "flops" or "latency" (predicted run time on this machine).
        structures: names that compete, or "auto".
        weighting: which Grams measure errors of single layers (``gramian.compression.layer.WEIGHTINGS``).
        allocation: how the budget is divided (``gramian.compression.allocation.ALLOCATIONS``). By default "exact" where
            errors of different layers compare, else (no output gradients, another weighting) "uniform".
        sensitivity: by layer name, for the allocations "measured" and "entropic".
        fixed: entries that every size of a single layer gets, e.g. ``{"feedback": False}``.
        threads: curves computed side by side.
        curves: ready curves of all items (``plan_items``), computed elsewhere; `layers` then need neither values nor
            Grams, and `allocation` is to be said.
        progress: called with the number of finished curves.

    Raises:
        GramianError: bad arguments, or a budget out of reach.
    """
    check_keep(keep)
    methods = resolve_structures(structures, cost)
    layers = {name: layer.weighed(weighting) for name, layer in layers.items()}
    if allocation is None:
        allocation = default_allocation({name: layer.comparable for name, layer in layers.items()})
    allocate = resolve_allocation(allocation)
    groups = _groups(layers, joints, methods)
    heads = {(joint.kind, *joint.layers): joint.heads for joint in joints}
    if curves is None:
        keeps = shares_tried(allocation, keep, cost)
        made: dict[ItemKey, list[Priced]] = {}
        with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
            jobs = {
                item: pool.submit(priced_curve, layers, item, methods, cost, heads.get(item, 0), keeps, fixed)
                for item in plan_items(layers, joints, methods)
            }
            for index, (key, job) in enumerate(jobs.items()):
                made[key] = job.result()
                if progress is not None:
                    progress(index + 1)
        curves = made
    # A layer of few neurons or a narrow head has no smaller joint size: such a branch is none.
    groups = [group[:1] + [branch for branch in group[1:] if all(len(curves[i]) for i in branch)] for group in groups]
    names = [list(dict.fromkeys(name for item in group[0] for name in item[1:])) for group in groups]
    present = [sum(dense_cost(layers[name]).of(cost) for name in members) for members in names]
    budget = int(keep * sum(present))
    candidates = [[[curves[item] for item in branch] for branch in group] for group in groups]
    problem = Problem(candidates, names, layers, cost, keep, budget, present, sensitivity)
    entries: list[Entry] = []
    for group, choice in zip(groups, allocate(problem), strict=True):
        for item, option in zip(group[choice.branch], choice.options, strict=True):
            taken = curves[item][option]
            under = weighting if item[0] == "single" else "two-sided"
            found = (taken.structure, taken.size, taken.cost, taken.error, heads.get(item, 0), under)
            entries.append(Entry(list(item[1:]), *found))
    place = {name: i for i, name in enumerate(layers)}
    entries.sort(key=lambda entry: min(place[name] for name in entry.layers))
    return Plan(cost, keep, budget, entries)


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


def shares_tried(allocation: str, keep: float, cost: str) -> Sequence[float]:
    """Shares of a layer's numbers at which structures that take a fit each are tried: with one share for all layers, only
    near it.
    """
    near = tuple(keep * f for f in (1.0, 0.9, 0.75, 0.5))
    return KEEPS if allocation != "uniform" else near[:1] if cost == "params" else near


def plan_items(layers: Mapping[str, Layer], joints: Sequence[Joint], methods: Sequence[str]) -> list[ItemKey]:
    """Everything that a plan needs a curve of: each layer alone, and the joints whose kind is among `methods`."""
    return list(
        dict.fromkeys(item for group in _groups(layers, joints, methods) for branch in group for item in branch)
    )


def priced_curve(
    layers: Mapping[str, Layer],
    item: ItemKey,
    methods: Sequence[str],
    cost: str,
    heads: int = 0,
    keeps: Sequence[float] = KEEPS,
    fixed: Mapping[str, Any] | None = None,
) -> list[Priced]:
    """``curve`` with every candidate's cost in one unit."""
    found = curve(layers, item, methods, cost, heads, keeps, fixed)
    return [Priced(c.structure, c.size, c.cost.of(cost), c.error) for c in found]


def curve(
    layers: Mapping[str, Layer],
    item: ItemKey,
    methods: Sequence[str],
    cost: str,
    heads: int = 0,
    keeps: Sequence[float] = KEEPS,
    fixed: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """All candidates of one item, "as it is" included for single layers."""
    kind, *names = item
    if kind != "single":
        joint = [layers[name].weighed("two-sided") for name in names]
        candidates: list[Candidate] = JOINT[kind](joint, heads).curve(cost)
        return candidates
    layer = layers[names[0]]
    if layer.embedding:
        out = embedding_curve(layer, methods, cost)
    else:
        out = [Candidate("dense", {}, dense_cost(layer), 0.0)]
        for method in methods:
            if method not in JOINT:
                out += single_curve(layer, method, cost, keeps, fixed)
    return [replace(c, size={**c.size, **(fixed or {})}) if c.structure != "dense" else c for c in out]


def build_entry(entry: Entry, layers: Mapping[str, Layer]) -> Built:
    """Make what one entry asks for.

    Raises:
        GramianError: an unknown layer or structure, or a size out of range.
    """
    for name in entry.layers:
        if name not in layers:
            raise GramianError(f"plan: no layer {name!r}{nearest(name, layers)}")
    if entry.structure in JOINT:
        members = [layers[name].weighed("two-sided") for name in entry.layers]
        method = JOINT[entry.structure](members, entry.heads)
        built: Built = method.build(entry.size)
        return built
    if len(entry.layers) != 1:
        raise GramianError(f"plan: structure {entry.structure!r} is for one layer, found {entry.layers}")
    return build_single(layers[entry.layers[0]].weighed(entry.weighting), entry.structure, entry.size)


def count(built: Built) -> Cost:
    """Exact cost of what was built."""
    total = Cost(0, 0, 0)
    for op, _ in built.layers.values():
        total += Cost(op.numel, op.nbytes, op.flops())
    return total
