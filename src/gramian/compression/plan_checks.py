"""Plans that a user wrote or edited, met at the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gramian.compression.layer import Layer
from gramian.compression.options import COSTS, JOINT
from gramian.compression.plan import Plan
from gramian.errors import GramianError, nearest
from gramian.grams import Joint
from gramian.ops import structures


def check_plan(chosen: Plan, layers: Mapping[str, Layer]) -> None:
    """Raise unless every entry names known layers and none twice; layers that no entry names stay as they are.

    Raises:
        GramianError: which name, and the nearest ones.
    """
    seen: set[str] = set()
    for entry in chosen.entries:
        for name in entry.layers:
            if name not in layers:
                raise GramianError(f"plan: no layer {name!r}{nearest(name, layers)}")
            if name in seen:
                raise GramianError(f"plan: layer {name} is in two entries; expected one")
            seen.add(name)


def check_sizes(chosen: Plan, layers: Mapping[str, Layer]) -> None:
    """``check_plan``; and raise on what no fit could make of these layers, before the long work.

    Raises:
        GramianError: which entry, and what is expected.
    """
    check_plan(chosen, layers)
    if chosen.cost not in COSTS:
        raise GramianError(f"plan: unknown cost {chosen.cost!r}; expected one of {', '.join(COSTS)}")
    kinds = {kind: cls for kind, cls in structures().items() if cls.fittable}
    if not chosen.entries:
        raise GramianError("plan: no entries; expected at least one decision")
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
            known = kinds[kind].size_names()
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


def check_groups(chosen: Plan, joints: Sequence[Joint]) -> None:
    """Raise unless the layers that an entry compresses together do belong together in this model.

    Raises:
        GramianError: which entry, and the groups that there are.
    """
    known = {(joint.kind, *joint.layers): joint.heads for joint in joints}
    for entry in chosen.entries:
        heads = known.get((entry.structure, *entry.layers))
        if entry.structure in JOINT and (heads is None or heads not in (0, entry.heads)):
            groups = [f"{kind} of {', '.join(names)}" for kind, *names in known if kind == entry.structure]
            raise GramianError(
                f"plan: {entry.structure} of {', '.join(entry.layers)} with {entry.heads} heads fits no group of this model"
                f"{nearest(f'{entry.structure} of ' + ', '.join(entry.layers), groups)}"
            )
