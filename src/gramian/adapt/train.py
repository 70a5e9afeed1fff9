"""Training what ``attach`` made trainable: warm-up and cosine, clipping, held-out loss, early stop, exact resumption."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gramian.adapt.attach import Adapted
from gramian.adapt.gradients import Loss, default_loss
from gramian.errors import GramianError
from gramian.nn.training import warm_up_cosine

State = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""What a training stands for at a step: tensors, and what JSON can hold."""


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        steps: optimiser steps, at most.
        rate: peak learning rate, reached after `warm_up` of the steps, then a cosine to a tenth of it.
        batch: examples a step (of ``Examples``).
        accumulate: passes a step: a batch of ``Examples`` is cut into so many; of ready batches a step takes so many.
        warm_up: share of the steps over which the rate rises.
        clip: largest norm of the gradient; longer ones are scaled down to it.
        every: steps between two evaluations; 0 for a twentieth of `steps`.
        patience: evaluations in a row that may pass without a better one before training stops; 0 for any number.
        seed: of the order of the data and of dropout.
    """

    steps: int = 200
    rate: float = 3e-4
    batch: int = 16
    accumulate: int = 1
    warm_up: float = 0.06
    clip: float = 1.0
    every: int = 0
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("every", 0), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise GramianError(f"training: {name} {getattr(self, name)}; expected {least} or more")
        if not 0 < self.rate < math.inf:
            raise GramianError(f"training: rate {self.rate:g}; expected a learning rate above 0, e.g. 0.0003")
        if not 0 <= self.warm_up <= 1:
            raise GramianError(f"training: warm_up {self.warm_up:g}; expected a share of the steps, 0 to 1")
        if not self.clip > 0:
            raise GramianError(f"training: clip {self.clip:g}; expected a norm above 0, or inf for none")


@dataclass(frozen=True)
class Examples:
    """Data that batches are drawn from, in a new order every epoch.

    Attributes:
        count: how many there are.
        take: (indices) -> the batch of these.
    """

    count: int
    take: Callable[[list[int]], Any]


@dataclass
class Trained:
    """What came of a training.

    Attributes:
        losses: (step, loss) of every step, the penalty left out; the first step is 1.
        held_out: (step, mean loss on the held-out batches); step 0 is the start.
        best: step whose values the adapter has now.
        stopped: whether training ended early.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    stopped: bool = False


def fine_tune(
    adapted: Adapted,
    data: Examples | Sequence[Any],
    held_out: Sequence[Any] = (),
    settings: Training | None = None,
    *,
    loss: Loss = default_loss,
    also: Sequence[nn.Parameter] = (),
    resume: State | None = None,
    checkpoint: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train an adapter, with its own optimizer and penalty if it has them, and leave it at its best.

    The best values are those with the lowest loss on the held-out batches; the start counts too, unless the adapter's
    gain is still on its ramp. Without held-out batches they are the last ones. The result depends on the data, the
    settings and the start alone: a training that goes on from a checkpoint ends with the same bits.

    Args:
        adapted: from ``attach`` or ``load``; its model may be on any device, batches follow it.
        data: examples, or a list of ready batches.
        held_out: batches for the evaluation.
        settings: see ``Training``.
        loss: (model, batch) -> scalar; a Hugging Face model's own by default.
        also: parameters that train beside the adapter, such as those of a new head; AdamW, at the same rate.
        resume: what `checkpoint` was given last.
        checkpoint: called with (tensors, what JSON can hold) after every evaluation but the last; all that resuming needs.
        progress: called with (step, loss).

    Raises:
        GramianError: no data, nothing to train, or a loss that is not finite.
    """
    settings = settings or Training()
    examples = data if isinstance(data, Examples) else None
    count = data.count if isinstance(data, Examples) else len(data)
    if not count:
        raise GramianError("fine_tune: no data; expected at least one batch")
    model = adapted.model
    parameters = [*adapted.trainable_parameters(), *also]
    if not adapted.trainable_parameters():
        raise GramianError(f"adapter {adapted.name!r} has nothing to train")
    for p in also:
        p.requires_grad_(True)
    optimizers = [adapted.optimizer(settings.rate)]
    if also:
        optimizers.append(torch.optim.AdamW(also, lr=settings.rate, weight_decay=0.0))
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    every = settings.every or max(1, settings.steps // 20)
    ramp = max((edit.ramp for edit in adapted.edits.values()), default=0)
    device = parameters[0].device
    kept = _Kept(adapted, also)

    modes = [(module, module.training) for module in model.modules()]
    found, first, best = Trained(), 0, math.inf
    if resume is not None:
        found, first, best = _restore(resume, kept, optimizers)
    try:
        if resume is None and held_out:
            found.held_out.append((0, evaluate(model, held_out, loss)))
            if not ramp:
                best = found.held_out[0][1]
        if resume is None:
            kept.remember()
        for step in range(first + 1, settings.steps + 1):
            factor = _schedule(step - 1, settings)
            for optimizer, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * factor
                optimizer.zero_grad(set_to_none=True)
            _train_mode(model)
            value = 0.0
            with torch.random.fork_rng():
                # A seed for each step: dropout after a resumption is what it would have been without.
                torch.manual_seed(_hash(settings.seed, "dropout", step))
                for indices, share in _passes(step - 1, count, settings, ready=examples is None):
                    batch = data[indices[0]] if examples is None else examples.take(indices)  # type: ignore[index]
                    part = loss(model, _to(batch, device))
                    value += share * float(part.detach())
                    (share * part).backward()  # type: ignore[no-untyped-call]
                penalty = adapted.penalty()
                if penalty.requires_grad:
                    penalty.backward()  # type: ignore[no-untyped-call]
            if not math.isfinite(value):
                raise GramianError(f"training: the loss became {value} at step {step}; lower the learning rate")
            # Parameters that got no gradient (an expert no token chose) stay where they are.
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for optimizer in optimizers:
                optimizer.step()
            adapted.step()
            found.losses.append((step, value))
            if progress is not None:
                progress(step, value)
            if step % every and step < settings.steps:
                continue
            if held_out:
                found.held_out.append((step, evaluate(model, held_out, loss)))
                if not math.isfinite(found.held_out[-1][1]):
                    raise GramianError(f"training: the held-out loss is not finite at step {step}; lower the rate")
                if step >= ramp and found.held_out[-1][1] < best:
                    best, found.best = found.held_out[-1][1], step
                    kept.remember()
                late = sum(at > max(found.best, ramp) for at, _ in found.held_out)
                if settings.patience and late >= settings.patience and step < settings.steps:
                    found.stopped = True
                    break
            else:
                found.best = step
                kept.remember()
            if checkpoint is not None and step < settings.steps:
                state = _state(step, best, found, kept, optimizers)
                checkpoint(*state)
                # The state that a resumed run would have, memory layouts too: rounding can depend on them.
                _restore(state, kept, optimizers)
        if held_out and best == math.inf:  # the ramp was never over
            found.best = found.losses[-1][0] if found.losses else 0
            kept.remember()
        kept.recall(found.best)
    finally:
        for module, mode in modes:
            module.training = mode
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Any], loss: Loss = default_loss) -> float:
    """Mean loss over the batches in evaluation mode, weighted by their number of rows.

    Raises:
        GramianError: no batches.
    """
    if not batches:
        raise GramianError("evaluate: no batches")
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        rows = [_rows(batch) for batch in batches]
        values = [float(loss(model, _to(batch, device))) for batch in batches]
    finally:
        for module, mode in modes:
            module.training = mode
    return math.fsum(n * v for n, v in zip(rows, values, strict=True)) / sum(rows)


class _Kept:
    """The parameters that train, and a copy of their best values."""

    def __init__(self, adapted: Adapted, also: Sequence[nn.Parameter]) -> None:
        self.edits = list(adapted.edits.values())
        # All factors of the updates: an optimizer may move frozen ones too, as a change of their gauge.
        held = [p for edit in self.edits for p in edit.update.parameters()]
        held += [bias for edit in self.edits for bias in edit.biases] + list(also)
        self.live: list[Tensor] = list({id(p): p for p in held}.values())
        self.best: list[Tensor] = []
        self.before = [edit.steps for edit in self.edits]

    def remember(self) -> None:
        self.best = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def recall(self, step: int) -> None:
        self.put(self.best, step)

    @torch.no_grad()
    def put(self, values: Sequence[Tensor], step: int) -> None:
        for p, value in zip(self.live, values, strict=True):
            p.copy_(value)
        for edit, before in zip(self.edits, self.before, strict=True):
            edit.steps = before + step
            edit._kept.clear()


def _schedule(step: int, settings: Training) -> float:
    """Multiple of the peak rate at a step, counted from 0."""
    return warm_up_cosine(step, settings.steps, max(1, round(settings.warm_up * settings.steps)), floor=0.1)


def _passes(step: int, count: int, settings: Training, *, ready: bool) -> list[tuple[list[int], float]]:
    """The indices that each pass of a step takes, and its share of the loss: a function of seed and step alone."""
    size = settings.accumulate if ready else settings.batch
    wanted = range(step * size, (step + 1) * size)
    orders: dict[int, list[int]] = {}
    taken: list[int] = []
    for place in wanted:
        epoch, index = divmod(place, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(_hash(settings.seed, "order", epoch))
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        taken.append(orders[epoch][index])
    part = 1 if ready else -(-size // settings.accumulate)
    return [(taken[i : i + part], len(taken[i : i + part]) / size) for i in range(0, size, part)]


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _train_mode(model: nn.Module) -> None:
    """``train()``, but running statistics, which are the base model's, stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _rows(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        return _rows(next(iter(batch.values())))
    return _rows(batch[0]) if isinstance(batch, tuple | list) else 1


def _state(
    step: int, best: float, found: Trained, kept: _Kept, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for i, (live, good) in enumerate(zip(kept.live, kept.best, strict=True)):
        tensors[f"live|{i}"], tensors[f"best|{i}"] = live.detach().cpu().clone(), good.cpu().clone()
    for which, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                name = f"{which}|{index}|{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
                else:
                    numbers[name] = value
    return tensors, {
        "step": step,
        "best_loss": None if best == math.inf else best,
        "best": found.best,
        "losses": [list(pair) for pair in found.losses],
        "held_out": [list(pair) for pair in found.held_out],
        "numbers": numbers,
    }


def _restore(state: State, kept: _Kept, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Trained, int, float]:
    tensors, notes = state
    count = len(kept.live)
    step = int(notes["step"])
    if sum(name.startswith("live|") for name in tensors) != count:
        raise GramianError("resume: the state is of another adapter")
    kept.put([tensors[f"live|{i}"] for i in range(count)], step)
    kept.best = [tensors[f"best|{i}"].to(kept.live[i].device, copy=True) for i in range(count)]
    values: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in (*tensors.items(), *notes["numbers"].items()):
        which, _, rest = name.partition("|")
        if which.isdigit():
            index, _, key = rest.partition("|")
            values[int(which)].setdefault(int(index), {})[key] = value.clone() if isinstance(value, Tensor) else value
    for optimizer, own in zip(optimizers, values, strict=True):
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
    found = Trained(
        [(int(at), float(value)) for at, value in notes["losses"]],
        [(int(at), float(value)) for at, value in notes["held_out"]],
        int(notes["best"]),
    )
    best = notes["best_loss"]
    return found, step, math.inf if best is None else float(best)


__all__ = ["Examples", "Trained", "Training", "evaluate", "fine_tune"]
