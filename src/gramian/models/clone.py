"""A narrower residual stream: an ordinary model of smaller hidden size, its weights projected from the original's.

A Token is Worth over 1,000 Tokens: Efficient Knowledge Distillation through Low-Rank Clone (Hao et al. 2025). With the
original's weights W frozen, the student's are ``W P`` where they read the stream and ``P^T W`` where they write it; the
projections P (d, d') are trained, so that the student predicts as the original does and its inner states are the
original's, and then multiplied in.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.grams import Gram
from gramian.linalg import eigh
from gramian.models.api import Progress
from gramian.models.walk import is_linear
from gramian.models.workload import Workload, divergence, first_tensor
from gramian.modes import evaluating

Module = TypeVar("Module", bound=nn.Module)
STATES = 1.0
"""Weight of the relative squared errors of what the linear layers write, beside the divergence of the predictions."""
RATE = 1e-3
"""Peak learning rate of the projections."""
STEPS = 100
"""Of training where the user names none: the start alone is no model to use."""
BATCH = 16
"""Sequences a step."""


def clone(
    model: Module,
    workload: Workload,
    *,
    keep: float = 0.5,
    cost: str | None = None,
    heal_steps: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    note: Callable[[int, float], None] | None = None,
) -> Module:
    """A smaller model of the same class, of hidden size ``keep d``.

    Every projection starts as the principal directions of the residual stream (the states between blocks). The scales of the
    norms are folded into the layers that read them first, for a norm commutes with a rotation only without scales.

    Args:
        model: a language model of ``transformers`` whose norms have scales and no shifts and whose heads have a width of
            their own in its config; left as it was.
        workload: calibration text.
        keep: share of the linear layers' parameters in the blocks, to which the hidden size is proportional.
        cost: "params" or "flops": the same share here.
        heal_steps: steps of training; 0 for `STEPS`.
        seed: of the order of the text.
        progress: called with ("heal", step, steps).
        note: called with (step, loss) of training.

    Raises:
        GramianError: not such a model.
    """
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    if workload.logits is None or config is None or getattr(config, "hidden_size", None) is None:
        raise GramianError(f"recipe low-rank-clone is for language models of transformers; found a {kind}")
    wide = int(config.hidden_size)
    narrow = max(8, int(keep * wide) // 8 * 8)
    if narrow >= wide:
        return copy.deepcopy(model)
    student, sides = _student(model, wide, narrow)
    folded = copy.deepcopy(model).eval()
    _fold(folded, workload, wide)
    weights = {name: p.detach() for name, p in folded.named_parameters()}
    start, gain = _directions(folded, workload, wide, narrow)
    norms = {name for name, side in sides.items() if side == (0,) and weights[name].dim() == 1}
    trained: dict[str, nn.Parameter] = {}
    for name, side in sides.items():
        if side:
            value = gain * weights[name].mean().expand(narrow) if name in norms else start
            trained[name] = nn.Parameter(value.to(weights[name], copy=True))
    with evaluating(model):
        _train(student, model, workload, weights, sides, norms, trained, heal_steps or STEPS, seed, progress, note)
    with torch.no_grad():
        for name, value in _projected(weights, sides, norms, trained).items():
            student.get_parameter(name).copy_(value)
    training = {name: module.training for name, module in model.named_modules()}
    for name, module in student.named_modules():
        module.training = training.get(name, model.training)
    return student


def _student(model: Module, wide: int, narrow: int) -> tuple[Module, dict[str, tuple[int, ...]]]:
    """An unfilled student, and by parameter which axis is the residual stream: () for none.

    Raises:
        GramianError: the class builds other layers than narrower ones.
    """
    config: Any = copy.deepcopy(model.config)
    config.hidden_size = narrow
    kind = type(model).__name__
    if getattr(config, "head_dim", None) is None:
        raise GramianError(
            f"recipe low-rank-clone: heads of {kind} have no width of their own (head_dim in its config), so they would "
            "narrow with the hidden size; take recipe modegpt"
        )
    with torch.random.fork_rng(devices=[]):  # a constructor draws values, all of which are replaced
        student: Module = type(model)(config)
    student.to(next(model.parameters()).dtype).eval()
    sides: dict[str, tuple[int, ...]] = {}
    old = dict(model.named_parameters())
    for name, p in student.named_parameters():
        before = tuple(old[name].shape) if name in old else ()
        axes = tuple(i for i, (a, b) in enumerate(zip(before, p.shape, strict=False)) if a != b)
        fits = len(before) == p.dim() and all(before[i] == wide and p.shape[i] == narrow for i in axes)
        if not fits or len(axes) > 1:
            raise GramianError(
                f"recipe low-rank-clone: {name} of {kind} is {before}, and {tuple(p.shape)} with hidden_size {narrow}; "
                f"expected one axis of {wide} to shrink at most"
            )
        sides[name] = axes
    return student, sides


def _fold(model: nn.Module, workload: Workload, wide: int) -> None:
    """Move the scales of norms of width `wide` into the linear layers that read them, found by running.

    Raises:
        GramianError: a norm with a shift, or a scale that something else reads.
    """
    written: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept, or others would take their places
    readers: dict[nn.Module, list[nn.Module]] = {}

    def wrote(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        written[tensor.data_ptr()] = (module, tensor)

    def reads(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].data_ptr() in written and args[0].shape[-1] == wide:
            readers.setdefault(written[args[0].data_ptr()][0], []).append(module)

    handles = []
    for module in model.modules():
        if is_linear(module):
            handles.append(module.register_forward_pre_hook(reads))
        elif any(name == "weight" and p.shape == (wide,) for name, p in module.named_parameters(recurse=False)):
            if getattr(module, "bias", None) is not None:
                found = type(module).__name__
                raise GramianError(f"recipe low-rank-clone: a {found} shifts; expected norms with scales alone")
            handles.append(module.register_forward_hook(wrote))
    assert workload.logits is not None
    batch = workload.head(1)
    with torch.no_grad():
        try:
            before = workload.logits(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        owners = [id(p) for m in model.modules() for p in m._parameters.values()]
        for norm, layers in readers.items():
            if any(owners.count(id(layer.weight)) > 1 for layer in layers):
                continue  # a table that is the input's too: its norm keeps its scale
            for layer in dict.fromkeys(layers):
                layer.weight.mul_(norm.weight)  # type: ignore[operator, arg-type]
            norm.weight.fill_(1.0)  # type: ignore[operator]
        after = workload.logits(model, batch)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.std())):
        raise GramianError(
            f"recipe low-rank-clone: the scales of {type(model).__name__}'s norms are read by more than linear layers"
        )


def _directions(model: nn.Module, workload: Workload, wide: int, narrow: int) -> tuple[Tensor, float]:
    """(d, d') principal directions of the states between blocks, each block's of equal weight, and the norms' new scale.

    A norm of d' coordinates divides by their root mean square: ``sqrt(d' / d)`` over the root of the captured share of the
    energy times the old one.
    """
    total = torch.zeros(wide, wide, dtype=torch.float64)
    with torch.no_grad():
        grams: list[Gram] = []
        for batch in workload.batches:
            states = model(**batch, output_hidden_states=True).hidden_states[:-1]
            mask = workload.mask(batch)
            grams = grams or [Gram(wide) for _ in states]
            for gram, state in zip(grams, states, strict=True):
                gram.update(state.reshape(-1, wide) if mask is None else state[mask.bool()])
        for gram in grams:
            moment = gram.moment()
            total += moment / moment.diagonal().sum().clamp_min(1e-300)
    values, vectors = eigh(total)
    share = float(values[:narrow].sum() / values.sum())
    return vectors[:, :narrow], math.sqrt(wide / narrow * share)


def _projected(
    weights: Mapping[str, Tensor],
    sides: Mapping[str, tuple[int, ...]],
    norms: set[str],
    trained: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The student's parameters."""
    out: dict[str, Tensor] = {}
    for name, axes in sides.items():
        if not axes:
            out[name] = weights[name]
        elif name in norms:
            out[name] = trained[name]
        else:
            out[name] = weights[name] @ trained[name] if axes == (1,) else trained[name].mT @ weights[name]
    return out


def _train(
    student: nn.Module,
    teacher: nn.Module,
    workload: Workload,
    weights: Mapping[str, Tensor],
    sides: Mapping[str, tuple[int, ...]],
    norms: set[str],
    trained: Mapping[str, nn.Parameter],
    steps: int,
    seed: int,
    progress: Progress | None,
    note: Callable[[int, float], None] | None,
) -> None:
    """Train the projections against the teacher's predictions and the outputs of its linear layers.

    What a layer writes is compared as it is where both models have it in the same coordinates, and through the layer's own
    projection where it goes to the residual stream.

    Raises:
        GramianError: the loss became NaN or Inf.
    """
    optimiser = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    parts = workload.parts(BATCH)
    generator = torch.Generator().manual_seed(seed)
    head = student.get_output_embeddings()  # type: ignore[operator]
    names = [n for n, m in student.named_modules() if is_linear(m) and m is not head and f"{n}.weight" in trained]
    logits = workload.logits
    assert logits is not None
    order: list[int] = []
    for step in range(steps):
        rate = min(1.0, (step + 1) / max(1, steps // 10))
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = RATE * rate
        order = order or torch.randperm(len(parts), generator=generator).tolist()
        batch = parts[order.pop()]
        mask = workload.mask(batch)
        real = torch.ones(batch["input_ids"].shape, dtype=torch.bool) if mask is None else mask.bool()
        with torch.no_grad(), _written(teacher, names) as wanted:
            target = logits(teacher, batch)[real]
        values = _projected(weights, sides, norms, trained)
        with _written(student, names) as found:
            answer = torch.func.functional_call(student, values, kwargs=dict(batch), tie_weights=True).logits[real]
        loss = divergence(answer, target)
        errors = []
        for name in names:
            mine, theirs = found[name][real], wanted[name][real]
            if mine.shape[-1] != theirs.shape[-1]:
                theirs = theirs @ trained[f"{name}.weight"].detach()
            errors.append(F.mse_loss(mine.float(), theirs.float()) / theirs.float().square().mean().clamp_min(1e-30))
        loss = loss + STATES * torch.stack(errors).mean()
        if not math.isfinite(float(loss.detach())):
            raise GramianError(f"low-rank-clone: the loss became {float(loss)} at step {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimiser.step()
        if note is not None:
            note(step, float(loss.detach()))
        if progress is not None:
            progress("heal", step + 1, steps)


@contextlib.contextmanager
def _written(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What some layers write in a forward pass, by name."""
    found: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        return lambda module, args, output: found.__setitem__(name, output)

    handles = [model.get_submodule(name).register_forward_hook(noting(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["clone"]
