"""Healing: distil the original model into the compressed one, on the calibration data, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.models.workload import Workload, divergence
from gramian.modes import evaluating
from gramian.nn import StructuredLinear, as_linear
from gramian.nn.exchange import exchange
from gramian.nn.straight_through import StraightThroughDictionary
from gramian.nn.training import warm_up_cosine
from gramian.ops import BlockLowRank, Dictionary, Operator, Skeleton

ANSWERS_KEPT = 2**31
"""Bytes of the teacher's answers that are kept; what goes beyond is asked for again when its turn comes."""

NOTHING_TO_HEAL = "healing trained nothing: the layers that changed have neither factors nor a bias (rounded ones, say)"


@dataclass(frozen=True)
class Healing:
    """How to heal.

    Attributes:
        steps: optimiser steps.
        rate: peak learning rate of AdamW, reached after a tenth of the steps, then a cosine to zero.
        states: weight of matching the last hidden states of every token, beside the features.
        inner: weight of matching the hidden states between layers. Each layer then learns from its own error, which takes
            fewer steps, and less text, than the model's last answer alone.
        seed: of batch order and recombination.
        batch: sequences a step.
        pool: training data as a multiple of the calibration data: beside the texts themselves, recombinations of them
            where the workload can; the teacher answers any input. Its answers are kept in half precision where they fit, up to
            `ANSWERS_KEPT` bytes of them, so it runs once an input, not once a step.
    """

    steps: int = 100
    rate: float = 1e-4
    states: float = 1.0
    inner: float = 1.0
    seed: int = 0
    batch: int = 16
    pool: int = 8


def heal(
    student: nn.Module,
    teacher: nn.Module,
    layers: Sequence[str],
    workload: Workload,
    settings: Healing,
    *,
    resume: Mapping[str, Tensor] | None = None,
    checkpoint: Callable[[dict[str, Tensor]], None] | None = None,
    every: int = 50,
    progress: Callable[[int, float], None] | None = None,
) -> list[tuple[int, float]]:
    """Train the factors (and biases) of `layers` in place, so that `student` reproduces `teacher`.

    Low-rank layers are trained as balanced factor pairs (both factors carry the root of the singular values) and go back
    to their stored gauge at the end: the same matrix to rounding. Layers over a dictionary train the support of their codes
    too, by the straight-through estimator. Everything else in the model stays frozen. The loss is
    ``1 - cos(features)`` (for a language model the Kullback-Leibler divergence of its predictions) plus, where the workload
    shows them, the relative squared errors of the tokens' last and inner hidden states.

    Args:
        student: the compressed model.
        teacher: the original.
        layers: names of the layers that compression changed.
        workload: calibration batches.
        settings: see ``Healing``.
        resume: what `checkpoint` was last given; training goes on from there, with the same result.
        checkpoint: called with the state every `every` steps.
        every: see `checkpoint`.
        progress: called with (step, loss).

    The result is never worse than the start: if the features over the calibration data (some of it) came no
    closer, the start is put back.

    Returns:
        (step, loss) of every step taken here.

    Raises:
        GramianError: the loss became NaN or Inf.
    """
    stored: dict[str, type[Operator]] = {}
    for name in layers:
        module = student.get_submodule(name)
        if isinstance(module, StructuredLinear) and isinstance(module.op, Skeleton):
            with torch.no_grad():
                exchange(student, module, as_linear(module.op.pair().balanced, module.bias))
            stored[name] = Skeleton
        elif isinstance(module, StructuredLinear) and isinstance(module.op, Dictionary):
            exchange(student, module, StraightThroughDictionary(module.op, module.bias))
            stored[name] = Dictionary
    trained: dict[str, nn.Parameter] = {}
    flags = [(p, p.requires_grad) for p in student.parameters()]
    chosen = tuple(f"{name}." for name in layers)
    if not any(key.startswith(chosen) and ".scales." not in key for key, _ in student.named_parameters()):
        return []  # a rounded embedding has no bias either
    for key, p in student.named_parameters():
        if key.startswith(chosen) and ".scales." not in key:
            p.requires_grad_(True)
            trained[key] = p
        else:
            p.requires_grad_(False)
    optimiser = torch.optim.AdamW(trained.values(), lr=settings.rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    first = 0
    if resume is not None:
        first = _restore(resume, trained, optimiser)
    pool = _pool(workload, teacher, settings)
    targets: dict[int, list[Tensor]] = {}
    kept = 0
    history: list[tuple[int, float]] = []
    try:
        with evaluating(student, teacher):
            before = _validate(student, teacher, workload) if resume is None else float(resume["before"])
            if resume is None:
                start = {key: p.detach().clone() for key, p in trained.items()}
            else:
                start = {key: resume[f"start|{key}"] for key in trained}
            for step in range(first, settings.steps):
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate * warm_up_cosine(step, settings.steps, max(1, settings.steps // 10))
                place = _place(step, len(pool), settings.seed)
                batch = pool[place]
                target = targets.get(place)
                if target is None:
                    with torch.no_grad():
                        target = [_halved(t) for t in workload.outputs(teacher, batch)]
                    if kept < ANSWERS_KEPT:
                        targets[place] = target
                        kept += sum(t.nbytes for t in target)
                answer = workload.outputs(student, batch)
                loss = _loss(answer, target, settings.states, settings.inner, workload.logits is not None)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise GramianError(f"healing: the loss became {value} at step {step}; lower the learning rate")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
                optimiser.step()
                history.append((step, value))
                if progress is not None:
                    progress(step, value)
                if checkpoint is not None and (step + 1) % every == 0 and step + 1 < settings.steps:
                    state = _state(step + 1, trained, optimiser)
                    state["before"] = torch.tensor(before, dtype=torch.float64)
                    state.update({f"start|{key}": value for key, value in start.items()})
                    checkpoint(state)
            if not _validate(student, teacher, workload) < before:
                with torch.no_grad():
                    for key, p in trained.items():
                        p.copy_(start[key])
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    for name, kind in stored.items():
        module = student.get_submodule(name)
        if isinstance(module, StraightThroughDictionary):
            exchange(student, module, module.finish())
            continue
        assert kind is Skeleton
        assert isinstance(module, StructuredLinear)
        pair = module.op
        assert isinstance(pair, BlockLowRank)
        with torch.no_grad():
            skeleton = Skeleton.from_pair(pair.left[0], pair.right[0])
            exchange(student, module, as_linear(skeleton, module.bias))
    return history


@torch.no_grad()
def _validate(student: nn.Module, teacher: nn.Module, workload: Workload) -> float:
    """Mean loss of the features (predictions) over at most 64 of the calibration texts, as they are."""
    batches = workload.parts(16)
    batches = batches[:: max(1, len(batches) // 4)][:4]
    losses = []
    for batch in batches:
        answer, target = (workload.outputs(model, batch)[:1] for model in (student, teacher))
        losses.append(float(_loss(answer, target, 0.0, 0.0, workload.logits is not None)))
    return sum(losses) / len(losses)


def _pool(workload: Workload, teacher: nn.Module, settings: Healing) -> list[Any]:
    """The calibration texts and recombinations of them: a function of the seed alone."""
    own = workload.parts(settings.batch)
    pool = list(own)
    for copy in range(1, settings.pool if workload.augment is not None else 1):
        for index, batch in enumerate(own):
            generator = torch.Generator().manual_seed(settings.seed * 104729 + copy * 7919 + index)
            assert workload.augment is not None
            pool.append(workload.augment(teacher, batch, generator))
    return pool


def _place(step: int, count: int, seed: int) -> int:
    """Which batch a step takes: a function of the seed and the step alone, so that a resumed run sees the same ones."""
    epoch, place = divmod(step, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
    return int(order[place])


def _loss(student: list[Tensor], target: list[Tensor], states: float, inner: float, predictions: bool) -> Tensor:
    """Outputs as of ``Workload.outputs``; the first are `predictions` (logits) or features."""
    if predictions:
        loss = divergence(student[0], target[0])
    else:
        loss = (1 - torch.nn.functional.cosine_similarity(student[0].float(), target[0].float(), dim=-1)).mean()
    for weight, part in ((states, slice(1, 2)), (inner, slice(2, None))):
        errors = [
            (s.float() - t.float()).square().sum() / t.float().square().sum().clamp_min(1e-30)
            for s, t in zip(student[part], target[part], strict=True)
        ]
        if weight and errors:
            loss = loss + weight * torch.stack(errors).mean()
    return loss


def _halved(answer: Tensor) -> Tensor:
    """In half precision, or as it is where that overflows."""
    half = answer.half()
    return half if bool(half.isfinite().all()) else answer


def _state(step: int, trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {"step": torch.tensor(step)}
    for key, p in trained.items():
        moments = optimiser.state[p]
        state[f"value|{key}"] = p.detach()
        state[f"first|{key}"] = moments["exp_avg"]
        state[f"second|{key}"] = moments["exp_avg_sq"]
    return state


def _restore(state: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    step = int(state["step"])
    for key, p in trained.items():
        with torch.no_grad():
            p.copy_(state[f"value|{key}"])
        optimiser.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"first|{key}"].clone(),
            "exp_avg_sq": state[f"second|{key}"].clone(),
        }
    return step
