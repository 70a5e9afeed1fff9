"""Scans whose sequence is split over processes: each runs its own part, and only summaries travel.

A part of a recurrence acts on the state before it as ``S -> P S + H``: P is the product of its transitions, H what it adds to
an empty state. Their size does not depend on the length of the part (Sun et al. 2024, "Linear attention sequence
parallelism").
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gramian.sequence.scan import Write, scan
from gramian.sequence.transitions import Transition


def summary(transition: Transition, write: Write, read: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """What a part of a sequence does to the state: ``S -> P S + H``.

    Args:
        transition: as for ``scan``.
        write: as for ``scan``.
        read: as for ``scan``; only its shape matters.
        chunk: as for ``scan``.

    Returns:
        P (batch, heads, dk, dk) and H (batch, heads, dk, dv).
    """
    key, value = write if isinstance(write, tuple) else (None, write)
    size = read.shape[-1]
    batch, _, heads = value.shape[:3]
    # One scan on [nothing | values] from the state [I | 0].
    wide = torch.cat((value.new_zeros(*value.shape[:-1], size), value), -1)
    eye = torch.eye(size, dtype=value.dtype, device=value.device).expand(batch, heads, size, size)
    start = torch.cat((eye, value.new_zeros(batch, heads, size, value.shape[-1])), -1)
    _, state = scan(transition, wide if key is None else (key, wide), read, start, chunk=chunk)
    return state[..., :size], state[..., size:]


def combine(parts: list[tuple[Tensor, Tensor]], state: Tensor | None = None) -> list[Tensor]:
    """The state before each part and after the last, from the parts' summaries in order.

    Args:
        parts: (P, H) of each part, as from ``summary``.
        state: before the first, (batch, heads, dk, dv); None for zero.
    """
    states = [torch.zeros_like(parts[0][1]) if state is None else state]
    for moved, added in parts:
        states.append(moved @ states[-1] + added)
    return states


def parallel_scan(
    transition: Transition,
    write: Write,
    read: Tensor,
    state: Tensor | None = None,
    *,
    group: Any = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``scan`` of a sequence split over the processes of `group` in order of rank; each gives its own part and gets its own
    outputs. Differentiable: gradients of every part reach every process's inputs when all call backward.

    Args:
        transition: this process's part, as for ``scan``.
        write: this process's part.
        read: this process's part.
        state: before the first part, the same on every process; each gets its own part's gradient of it.
        group: None for the default group.
        chunk: as for ``scan``.

    Returns:
        this part's outputs and the state after the last part.
    """
    moved, added = summary(transition, write, read, chunk=chunk)
    first = torch.zeros_like(added) if state is None else state.to(added.dtype)
    start, last = _Exchange.apply(torch.cat((moved, added), -1), first, group)  # type: ignore[no-untyped-call]
    outputs, _ = scan(transition, write, read, start, chunk=chunk)
    return outputs, last


class _Exchange(torch.autograd.Function):
    """(state before this process's part, state after the last part) from this process's [P | H] and the first state.

    One function, so that every process takes part in the exchange of gradients, the first too, whose state depends on no
    other's summary.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, first: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine.contiguous(), group=group)
        ctx.group = group
        ctx.save_for_backward(first, *parts)
        start, last = _ends(parts, first, dist.get_rank(group))
        return start.clone(), last

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rank = dist.get_rank(ctx.group)
        first, *parts = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            ends = _ends(parts, first, rank)
        dfirst, *dparts = torch.autograd.grad(ends, (first, *parts), grads, materialize_grads=True)
        total = torch.stack(dparts)
        dist.all_reduce(total, group=ctx.group)
        return total[rank], dfirst, None


def _ends(parts: list[Tensor], first: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    size = first.shape[-2]
    states = combine([(part[..., :size], part[..., size:]) for part in parts], first)
    return states[rank], states[-1]
