"""Several processes on one or more machines (``torchrun``): shares of the text, exact sums, layers fitted side by side.

Every rank loads the model, takes every n-th batch and sends only sums and fitted factors; rank 0 keeps the journal and
writes the result. Batches, their random probes and the centres of gradients are those of a single process, so the sums are
the same up to the order of float64 additions, and so are the plan and the weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from gramian.compression import Built, Layer, Plan, build_entry
from gramian.compression.allocation import Priced
from gramian.compression.plan import Entry, ItemKey, default_allocation, plan_items, priced_curve, shares_tried
from gramian.errors import GramianError
from gramian.grams import Gram, Grams, Joint, collect_layers
from gramian.models.api import Progress
from gramian.models.api import collect as collect_here
from gramian.models.entries import restored, stored
from gramian.models.journal import PassingError
from gramian.models.walk import find_layers
from gramian.models.workload import Workload

Thing = TypeVar("Thing")
PATIENCE = timedelta(hours=1)
"""How long a rank waits for another that neither answers nor ends."""


class LostRankError(PassingError):
    """Another rank ended or does not answer: what is in the journal stays, and the same command goes on from there."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    # What was exchanged last. gloo's threads let go of it some time after; were that the last reference, they would need
    # Python for it, and a process that ends just then is aborted.
    _held: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this process keeps the journal and writes the result."""
        return self.rank == 0

    def share(self, items: Sequence[Thing]) -> Sequence[Thing]:
        """Every n-th item: this rank's."""
        return items[self.rank :: self.size]

    def same(self, content: bytes | None, what: str) -> bytes:
        """Rank 0's content, on every rank.

        Args:
            content: on rank 0.
            what: is being done, for the message.

        Raises:
            LostRankError: a rank is gone.
        """
        if self.size == 1:
            assert content is not None
            return content
        with _speaking(what):
            size = torch.tensor(len(content) if content is not None and self.first else 0, device=_device())
            dist.broadcast(size, 0)
            data = _tensor(content, int(size)) if self.first else torch.empty(int(size), dtype=torch.uint8)
            data = data.to(_device())
            self._held[:] = [size, data]
            dist.broadcast(data, 0)
            return data.cpu().numpy().tobytes()

    def gather(self, content: bytes, what: str) -> list[bytes]:
        """Every rank's content, on every rank.

        Raises:
            LostRankError: a rank is gone.
        """
        if self.size == 1:
            return [content]
        with _speaking(what):
            sizes = [torch.zeros((), dtype=torch.int64, device=_device()) for _ in range(self.size)]
            own = torch.tensor(len(content), device=_device())
            dist.all_gather(sizes, own)
            longest = max(int(size) for size in sizes)
            parts = [torch.empty(longest, dtype=torch.uint8, device=_device()) for _ in range(self.size)]
            data = _tensor(content, longest).to(_device())
            self._held[:] = [own, data, *sizes, *parts]
            dist.all_gather(parts, data)
            return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def sum(self, grams: Grams) -> Grams:
        """Add up what the ranks collected, in place and exactly; the centres must be the same everywhere.

        Raises:
            LostRankError: a rank is gone.
        """
        if self.size == 1:
            return grams
        with _speaking("adding up Grams"):
            done: set[int] = set()
            for layer in grams.layers.values():
                if id(layer.input) not in done:
                    layer.input.all_reduce()
                    done.add(id(layer.input))
                counted = torch.tensor(layer.sequences, dtype=torch.int64, device=layer.input.first.device)
                dist.all_reduce(counted)
                layer.sequences = int(counted)
                if layer.gradient is not None:
                    dist.all_reduce(layer.gradient)
        return grams


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, by the environment; this one alone where there is no such launcher. A
    process group that is there already is used and left alone.

    Raises:
        LostRankError: the others cannot be reached, or the launcher ends this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not (dist.is_available() and dist.is_initialized()):
        yield Ranks()
        return
    own = not dist.is_initialized()
    if own:
        with _speaking("starting"):
            dist.init_process_group("gloo", timeout=PATIENCE)
    here = Ranks(dist.get_rank(), dist.get_world_size())
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _ended)
    try:
        if dist.get_backend() == "gloo":
            with _speaking("starting"):
                dist.monitored_barrier(timeout=PATIENCE)
        yield here
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if own:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _ended(number: int, frame: object) -> None:
    raise LostRankError("the launcher ended this rank, as it does when another one failed; run the same command again")


@contextlib.contextmanager
def _speaking(what: str) -> Iterator[None]:
    try:
        yield
    except GramianError:
        raise
    except (RuntimeError, ValueError) as error:
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
        raise LostRankError(
            f"{what}: another rank ended or does not answer ({line[:160]}); run the same command again to go on"
        ) from error


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _tensor(content: bytes | None, size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.uint8)
    if content:
        out[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return out


def _packed(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> bytes:
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    note = json.dumps(description).encode()
    return len(note).to_bytes(8, "little") + note + save(whole)


def _unpacked(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    size = int.from_bytes(content[:8], "little")
    return load(content[8 + size :]), json.loads(content[8 : 8 + size])


def share_grams(here: Ranks, known: Grams | None) -> Grams | None:
    """Rank 0's Grams, if it has any (from a journal), on every rank.

    Raises:
        LostRankError: a rank is gone.
    """
    content = _packed(known.state(), known.describe()) if known is not None else b""
    content = here.same(content if here.first else None, "sharing Grams") if here.size > 1 else content
    if known is not None or not content:
        return known
    return Grams.from_state(*_unpacked(content))


def collect(
    here: Ranks,
    model: nn.Module,
    work: Workload,
    *,
    objective: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Grams:
    """``gramian.collect`` by all ranks together: each passes the same model and the same workload and takes a share of its
    batches; each gets the Grams of the whole.

    Args:
        here: from ``ranks``.
        model: see ``gramian.collect``, as for all that follows.
        work: all of the calibration data.
        objective: see there.
        include: see there.
        exclude: see there.
        embeddings: see there.
        seed: see there.
        progress: see there; of this rank's share.

    Raises:
        GramianError: as ``gramian.collect``.
        LostRankError: a rank is gone.
    """
    options: dict[str, Any] = {
        "objective": objective,
        "include": include,
        "exclude": exclude,
        "embeddings": embeddings,
        "seed": seed,
        "progress": progress,
    }
    if here.size == 1:
        return collect_here(model, work, **options)
    centres: dict[str, Tensor] = {}
    if work.objective(objective) is not None:
        content = None
        if here.first:  # a single process centres by the means of the first batch
            found = find_layers(model, include=include, exclude=exclude, embeddings=embeddings)
            begun = collect_layers(model, found.layers, work.batches[:1], run=work.run, mask=work.mask)
            content = save({name: layer.input.mean for name, layer in begun.layers.items()})
        centres = load(here.same(content, "sharing the centres"))
    places = list(here.share(range(len(work.batches))))
    grams = collect_here(
        model,
        replace(work, batches=[work.batches[place] for place in places or [0]]),
        places=places or [0],
        centres=centres,
        **options,
    )
    if not places:  # fewer batches than ranks: the structure without the numbers
        _empty(grams)
    here.sum(grams)
    note = here.same(json.dumps(grams.describe()["joints"]).encode() if here.first else None, "sharing the groups")
    grams.joints = [Joint(j["kind"], tuple(j["layers"]), j["heads"]) for j in json.loads(note)]
    return grams


def _empty(grams: Grams) -> None:
    for layer in grams.layers.values():
        gram: Gram = layer.input
        gram.second.zero_()
        gram.first.zero_()
        gram.count, layer.sequences = 0.0, 0
        if layer.gradient is not None:
            layer.gradient.zero_()


def curves(
    here: Ranks, layers: Mapping[str, Layer], joints: Sequence[Joint], methods: Sequence[str], cost: str, keep: float
) -> dict[ItemKey, list[Priced]]:
    """The curves of all items, each computed by one rank, on every rank.

    Raises:
        LostRankError: a rank is gone.
    """
    items = plan_items(layers, joints, methods)
    heads = {(joint.kind, *joint.layers): joint.heads for joint in joints}
    allocation = default_allocation({name: layer.comparable for name, layer in layers.items()})
    keeps = shares_tried(allocation, keep, cost)
    mine = [priced_curve(layers, item, methods, cost, heads.get(item, 0), keeps) for item in here.share(items)]
    parts = [json.loads(part) for part in here.gather(json.dumps(mine).encode(), "planning")]
    return {
        item: [Priced(*candidate) for candidate in parts[index % here.size][index // here.size]]
        for index, item in enumerate(items)
    }


def share_plan(here: Ranks, chosen: Plan | None) -> Plan:
    """Rank 0's plan on every rank.

    Raises:
        LostRankError: a rank is gone.
    """
    content = None
    if chosen is not None:
        entries = [vars(entry) for entry in chosen.entries]
        content = json.dumps([chosen.cost, chosen.keep, chosen.budget, entries, chosen.notes]).encode()
    cost, keep, budget, entries, notes = json.loads(here.same(content if here.first else None, "sharing the plan"))
    return chosen if chosen is not None else Plan(cost, keep, budget, [Entry(**entry) for entry in entries], notes)


def build_shared(
    here: Ranks, chosen: Plan, layers: Mapping[str, Layer], missing: Sequence[int]
) -> Iterator[tuple[int, Built]]:
    """Make some entries of a plan, in rounds of one a rank.

    Args:
        here: from ``ranks``.
        chosen: the same plan on every rank.
        layers: by name, with Grams.
        missing: indices of the entries to make, on rank 0.

    Yields:
        Index and what was made: all of them on rank 0, none on the others.

    Raises:
        LostRankError: a rank is gone.
    """
    missing = json.loads(here.same(json.dumps(list(missing)).encode() if here.first else None, "fitting"))
    for start in range(0, len(missing), here.size):
        now = missing[start : start + here.size]
        content = b""
        if here.rank < len(now):
            content = _packed(*stored(build_entry(chosen.entries[now[here.rank]], layers)))
        parts = here.gather(content, "fitting")
        if here.first:
            for index, part in zip(now, parts, strict=False):
                yield index, restored(*_unpacked(part))


def check_same(here: Ranks, fingerprint: str) -> None:
    """Raise unless all ranks have the same model, text and settings.

    Raises:
        GramianError: which rank differs.
        LostRankError: a rank is gone.
    """
    seen = here.gather(fingerprint.encode(), "comparing the ranks")
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise GramianError(
                f"rank {rank} has another model, text or settings than rank 0; run the same command on the same files"
            )


__all__ = [
    "LostRankError",
    "Ranks",
    "build_shared",
    "check_same",
    "collect",
    "curves",
    "ranks",
    "share_grams",
    "share_plan",
]
