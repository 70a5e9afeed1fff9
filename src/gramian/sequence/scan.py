"""One scan over structured transitions: ``S_t = A_t S_{t-1} + B_t``, ``o_t = S_t^T q_t``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError, nearest
from gramian.sequence.associative import linear_recurrence
from gramian.sequence.chunkwise import chunkwise_dense, chunkwise_scan
from gramian.sequence.decay import unflatten
from gramian.sequence.long_convolution import causal_convolution
from gramian.sequence.problem import Problem
from gramian.sequence.transitions import LOWEST, Microstep, Transition, turn

METHODS = ("auto", "sequential", "chunkwise", "fft", "associative", "recurrent", "dense")

Write = Tensor | tuple[Tensor, Tensor]


def scan(
    transition: Transition,
    write: Write,
    read: Tensor,
    state: Tensor | None = None,
    method: str = "auto",
    *,
    chunk: int | None = None,
    reverse: bool = False,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run ``S_t = A_t S_{t-1} + k_t v_t^T`` and read ``o_t = S_t^T q_t``; nothing is scaled.

    With ``write=v`` alone the write is the delta rule's: the transition's erase puts v where it reads, for a
    ``Householder(k, beta)``

        S_t = (I - beta k k^T) S_{t-1} + beta k v^T = S_{t-1} + beta k (v - S_{t-1}^T k)^T

    and likewise after a gate (``Householder @ ScalarGate``), for every factor of a ``HouseholderProduct`` and for
    ``DiagonalPlusLowRank`` (whose write key is ``-b``). This is the form to prefer: it costs half of ``write=(beta k, v)``,
    which says the same.

    Args:
        transition: A_t with leading dimensions (batch, time, heads), or (heads,) or () for every step the same.
        write: (k, v) or v. k (batch, time, heads, dk), or (heads, dk) where constant; v (batch, time, heads, dv). Where
            the transition is a product of n Householder matrices, k (batch, time, heads, n, dk) and v
            (batch, time, heads, n, dv) write after each factor; without the axis they write after the last.
        read: q, (batch, time, heads, dk), or (heads, dk) where constant.
        state: S_0, (batch, heads, dk, dv); None for zero.
        method: "sequential" multiplies dense matrices step by step (the reference); "recurrent" does one structured update
            a step; "chunkwise" is parallel inside chunks (compact WY form); "associative" is for diagonal transitions, "fft"
            for those that are the same at every step; "dense" builds the (time, time) matrix; "auto" picks.
        chunk: steps (of one Householder factor each) in a chunk; None for what is fast.
        reverse: run from the last step to the first.
        mask: (batch, time) of bool, False at padding: there the state stays, and the output is zero.
        segments: (batch, time) of integers: the state starts at zero where the number changes (packed sequences).
        check: look for transitions that can grow (a spectral bound above 1 + 1e-3) and for NaN before running.

    Returns:
        outputs (batch, time, heads, dv), in v's dtype; the last state (batch, heads, dk, dv), in float32 or wider.

    Raises:
        GramianError: shapes that do not fit, a method that cannot run this transition, or what `check` found.
    """
    if method not in METHODS:
        raise GramianError(f"scan: method {method!r}{nearest(method, METHODS)}; expected one of {', '.join(METHODS)}")
    key, value = write if isinstance(write, tuple) else (None, write)
    if torch.is_autocast_enabled(value.device.type):  # a state in half precision would lose what it is to carry
        rest = {"chunk": chunk, "reverse": reverse, "mask": mask, "segments": segments, "check": check}
        with torch.autocast(value.device.type, enabled=False):
            return scan(transition, write, read, state, method, **rest)  # type: ignore[arg-type]
    mask = None if mask is None else mask.bool()
    problem = Problem.make(transition, key, value, read, state)
    if check:
        problem.checked(transition)
    if reverse:
        problem = problem.flipped()
        mask = None if mask is None else mask.flip(1)
        segments = None if segments is None else segments.flip(1)
    if mask is not None:
        problem = problem.masked(mask)
    if segments is not None:
        problem = problem.segmented(segments)
    if not value.shape[1]:
        outputs, last = problem.value.flatten(2, 3), problem.state
    else:
        outputs, last = _METHODS[_pick(problem, transition) if method == "auto" else method](problem, chunk)
    if mask is not None:
        outputs = outputs * mask[..., None, None]
    if reverse:
        outputs = outputs.flip(1)
    return outputs if outputs.is_complex() else outputs.to(value.dtype), last


def step(transition: Transition, write: Write, read: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of :func:`scan`, for decoding: the same arguments without their time axis.

    Args:
        transition: leading dimensions (batch, heads), (heads,) or ().
        write: (k, v) or v; k (batch, heads, dk) or (heads, dk), v (batch, heads, dv), or with an axis of factors before
            the last of each.
        read: (batch, heads, dk), or (heads, dk).
        state: (batch, heads, dk, dv); None for zero.

    Returns:
        output (batch, heads, dv) and the next state.
    """

    def timed(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 2 else tensor[:, None]

    written: Write = (timed(write[0]), write[1][:, None]) if isinstance(write, tuple) else write[:, None]
    outputs, state = scan(transition.with_time(), written, timed(read), state, "recurrent")
    return outputs[:, 0], state


def _pick(problem: Problem, transition: Transition) -> str:
    if problem.value.shape[1] == 1:
        return "recurrent"
    if problem.constant is not None and transition.is_time_invariant and transition.is_diagonal:
        return "fft"
    if transition.is_diagonal and problem.value.shape[-1] == 1 and problem.steps is not None:
        return "associative"
    return "chunkwise"


def _rows(problem: Problem) -> list[list[tuple[Microstep | Tensor, Tensor, Tensor]]]:
    """(factor, key, value) of each micro-step of each step; what is unbound once has a backward pass linear in time."""
    time = problem.value.shape[1]
    columns = []
    for j, (key, value) in enumerate(problem.writes):
        if problem.steps is None:
            assert problem.matrices is not None
            assert key is not None
            factors: list[Microstep | Tensor] = list(problem.matrices.unbind(1))
        else:
            step = problem.steps[j]
            factors = [*step.unbind(time)]
            key = step.w if key is None else key
            assert key is not None
        columns.append(list(zip(factors, key.unbind(1), value.unbind(1), strict=True)))
    return [list(row) for row in zip(*columns, strict=True)]


def _loop(problem: Problem, dense: bool) -> tuple[Tensor, Tensor]:
    state, outputs = problem.state, []
    for row, read in zip(_rows(problem), problem.read.unbind(1), strict=True):
        for factor, key, value in row:
            if isinstance(factor, Tensor):
                state = factor @ state
            elif dense:
                state = factor.dense(state.shape[-2], state.dtype, state.device) @ state
            else:
                state = factor.apply(state)
            state = state + key[..., None] * value[..., None, :]
        outputs.append((read[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1), state


def _sequential(problem: Problem, chunk: int | None) -> tuple[Tensor, Tensor]:
    return _loop(problem, dense=True)


def _recurrent(problem: Problem, chunk: int | None) -> tuple[Tensor, Tensor]:
    return _loop(problem, dense=False)


def _chunkwise(problem: Problem, chunk: int | None) -> tuple[Tensor, Tensor]:
    batch = len(problem.value)
    if problem.steps is not None:
        return chunkwise_scan(problem.normal(), chunk)
    assert problem.matrices is not None
    assert problem.key is not None
    flat = (problem.matrices, problem.key[:, :, :, 0], problem.value[:, :, :, 0], problem.read)
    matrices, key, value, read = (tensor.movedim(2, 1).flatten(0, 1) for tensor in flat)
    outputs, state = chunkwise_dense(matrices, key, value, read, problem.state.flatten(0, 1), chunk)
    return unflatten(outputs, 0, batch, -1).movedim(1, 2), unflatten(state, 0, batch, -1)


def _diagonals(problem: Problem, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (batch, time, heads, dk or 1), keys and values of a diagonal transition of one micro-step."""
    steps = problem.steps
    if steps is None or len(steps) != 1 or steps[0].a is not None or steps[0].frame_kind == "rotation":
        raise GramianError(f"scan: method {method!r} needs a diagonal transition; use 'chunkwise' or 'auto'")
    assert problem.key is not None
    step = steps[0]
    one = torch.ones(*problem.value.shape[:3], 1, dtype=problem.real, device=problem.value.device)
    factor = one if step.log_decay is None else step.log_decay.clamp_min(LOWEST).exp()
    if step.frame is not None:
        factor = turn(factor, step.frame, step.frame_kind)
    return factor, problem.key[:, :, :, 0], problem.value[:, :, :, 0]


def _associative(problem: Problem, chunk: int | None) -> tuple[Tensor, Tensor]:
    factor, key, value = _diagonals(problem, "associative")
    states = linear_recurrence(factor[..., None], key[..., None] * value[..., None, :], problem.state)
    return (problem.read[..., None, :] @ states)[..., 0, :], states[:, -1]


def _fft(problem: Problem, chunk: int | None) -> tuple[Tensor, Tensor]:
    if not problem.constant_transition:
        raise GramianError("scan: method 'fft' needs a transition that is the same at every step; use 'auto'")
    _, key, value = _diagonals(problem, "fft")
    time = value.shape[1]
    size = key.shape[-1]
    ages = torch.arange(time + 1, dtype=problem.real, device=value.device)
    step = problem.steps[0] if problem.steps else None
    assert step is not None
    # Powers of the (constant) factors: (heads, dk, time + 1), through one exponential each.
    log = step.log_decay
    log = ages.new_zeros(key.shape[2], 1) if log is None else log[0, 0].clamp_min(LOWEST)
    powers = (log[..., None] * ages).exp()
    if step.frame is not None and step.frame_kind == "sign":
        powers = powers * torch.where(ages % 2 == 1, step.frame[0, 0, :, :, None], 1.0)
    elif step.frame is not None:
        angle = (step.frame[0, 0, :, :, None].double() * ages).remainder(2 * torch.pi).to(problem.real)
        powers = torch.polar(powers, angle)
    powers = powers.expand(-1, size, -1)
    decayed = powers[..., 1:].permute(2, 0, 1)[None]
    if problem.constant is not None:
        k, q = problem.constant
        kernel = torch.einsum("hd,hdt->ht", (k * q).to(value.dtype), powers[..., :time].to(value.dtype))
        outputs = causal_convolution(value.permute(0, 2, 3, 1), kernel[:, None]).permute(0, 3, 1, 2)
    else:
        moved = (key[..., None] * value[..., None, :]).permute(0, 2, 3, 4, 1)
        states = causal_convolution(moved, powers[..., :time][:, :, None])
        outputs = torch.einsum("bthd,bhdet->bthe", problem.read, states)
    outputs = outputs + torch.einsum("bthd,bhde->bthe", problem.read * decayed, problem.state)
    arriving = key * powers[..., :time].flip(-1).permute(2, 0, 1)[None]
    last = powers[..., time, None] * problem.state + torch.einsum("bthd,bthe->bhde", arriving, value)
    return outputs, last


def _dense(problem: Problem, chunk: int | None) -> tuple[Tensor, Tensor]:
    matrix, reach, weights, moved = attention(problem)
    values = problem.value.movedim(2, 1).flatten(2, 3)
    outputs = matrix @ values + reach @ problem.state
    return outputs.movedim(1, 2), weights @ values + moved @ problem.state


def attention(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What outputs and the last state take from values and the first state.

    Returns:
        outputs from values (batch, heads, time, time * n), outputs from the state (batch, heads, time, dk), the last state
        from values (batch, heads, dk, time * n) and from the first (batch, heads, dk, dk).
    """
    batch, time, heads, count, _ = problem.value.shape
    size = problem.read.shape[-1]
    eye = torch.eye(size, dtype=problem.read.dtype, device=problem.read.device)
    # [product of the transitions so far | weights of the values so far]
    both = eye.expand(batch, heads, size, size)
    rows = []
    for t, (row, read) in enumerate(zip(_rows(problem), problem.read.unbind(1), strict=True)):
        for factor, key, _ in row:
            both = factor @ both if isinstance(factor, Tensor) else factor.apply(both)
            both = torch.cat((both, key[..., None]), -1)
        rows.append(F.pad((read[..., None, :] @ both)[..., 0, :], (0, (time - t - 1) * count)))
    full = torch.stack(rows, 2)
    return full[..., size:], full[..., :size], both[..., size:], both[..., :size]


_METHODS: dict[str, Callable[[Problem, int | None], tuple[Tensor, Tensor]]] = {
    "sequential": _sequential,
    "recurrent": _recurrent,
    "chunkwise": _chunkwise,
    "associative": _associative,
    "fft": _fft,
    "dense": _dense,
}
