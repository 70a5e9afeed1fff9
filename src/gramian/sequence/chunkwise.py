"""Parallel inside chunks, one small product a chunk: the compact form of products of rank-one updates.

Inside one chunk, what the erases see solves a unit lower triangular system (Yang et al. 2024,
"Parallelizing linear transformers with the delta rule over sequence length"; with decays, "Gated delta networks", 2025).
It is solved, never inverted by a series: with repeated keys the series overflows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gramian.sequence import decay as decays
from gramian.sequence.problem import Normal
from gramian.sequence.transitions import turn

CHUNK = 64
CHUNK_ON_CPU = 32
"""Where the products are small, half the chunk saves more in the systems than the longer loop over chunks costs."""

CACHED = 2**19
"""On a CPU, so many numbers of each input go through all their steps before the next do: they stay in the cache."""


def chunkwise_scan(normal: Normal, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (batch, time, heads, dv) and the last state (batch, heads, dk, dv)."""
    every, read = normal.count, normal.read
    batch, heads, length = normal.value.shape[:3]
    narrow = read.device.type == "cpu" and read.shape[-1] <= 64
    size = min(chunk or (CHUNK_ON_CPU if narrow else CHUNK), length)
    if normal.log_decay is not None and normal.log_decay.shape[-1] > 1:
        # Halves of halves: a power of two, with a read (of zero) at every step.
        size, stride = 1 << max(size - 1, 0).bit_length(), 1
        if every > 1:
            read = F.pad(read[:, :, :, None], (0, 0, every - 1, 0)).flatten(2, 3)
    else:
        size, stride = -(-size // every) * every, every

    def split(x: Tensor | None, size: int) -> Tensor | None:
        """(batch, heads, length, d) -> (n, N, size, d), contiguous: what follows is then one batched product each."""
        if x is None:
            return None
        short = -x.shape[2] % size
        x = decays.unflatten(F.pad(x, (0, 0, 0, short)) if short else x, 2, -1, size)
        return x.permute(2, 0, 1, 3, 4).contiguous().flatten(1, 2)

    a, w, k, v, g = (split(x, size) for x in (normal.a, normal.w, normal.key, normal.value, normal.log_decay))
    fields = (split(read, size // stride), a, w, k, v, g)
    chunks = -(-length // size)
    cached = max(CACHED // max(batch * heads * size * read.shape[-1], 1), 1) if read.device.type == "cpu" else chunks
    pieces = zip(*([None] * -(-chunks // cached) if x is None else torch.split(x, cached) for x in fields), strict=True)
    state, parts = normal.state.flatten(0, 1), []
    for piece in pieces:
        part, state = _Chunks.apply(*piece, state, normal.after_decay, stride)  # type: ignore[no-untyped-call]
        parts.append(part)
    outputs = torch.cat(parts) if len(parts) > 1 else parts[0]
    outputs = decays.unflatten(outputs, 1, batch, heads).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : read.shape[2]]
    state = decays.unflatten(state, 0, batch, heads)
    if normal.frame is not None:
        state = turn(state.mT, normal.frame, normal.frame_kind).mT
    return outputs[:, every - 1 :: every] if stride < every else outputs, state


class _Chunks(torch.autograd.Function):
    """All of a scan in the compact form, with a backward pass that is linear in time and stores one state a chunk.

    Arguments (n, N, C, d), n chunks of N sequences: reads q (one each `every` steps), erase reads a, erase writes w,
    write keys k (None: w writes v), values v, log decays g; then the first state (N, dk, dv).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        a: Tensor | None,
        w: Tensor | None,
        k: Tensor | None,
        v: Tensor,
        g: Tensor | None,
        state: Tensor,
        after_decay: bool,
        every: int,
    ) -> tuple[Tensor, Tensor]:
        decay = decays.make(g, v.shape[2], every, q)
        before = "erase" if after_decay else "before"
        added = None if k is None else decay.end(k).mT @ v
        spread = new = None
        if a is not None and w is not None:
            right = v if k is None else decay.gram(a, k, before).neg_() @ v
            system = decay.gram(a, w, before)
            # What the erases write is new - P S with spread = -P, for the state S before the chunk.
            spread, new = _solve(system, decay.begin(a, before).neg()), _solve(system, right)
        states, last = _states(decay, state, spread, new, w, added, len(q))
        outputs = decay.begin(q, "after") @ states
        if k is not None:
            _add_product(outputs, decay.gram(q, k, "after"), v)
        if new is not None and w is not None:
            _add_product(outputs, decay.gram(q, w, "after"), new)
        ctx.save_for_backward(q, a, w, k, None if k is None else v, g, states, spread, new)
        ctx.settings = before, every, v.shape[2]
        return outputs, last

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do, dlast = grads[0].contiguous(), grads[1]
        q, a, w, k, v, g, states, spread, new = ctx.saved_tensors
        before, every, size = ctx.settings
        decay = decays.make(g, size, every, q)
        dstates = decay.begin(q, "after").mH @ do
        dnew = None if w is None else decay.gram(q, w, "after").mH @ do
        dend, dstate = _states_backward(decay, dstates, dlast, spread, w, dnew)
        dq = decay.begin(do @ states.mH, "after")
        da = dw = dk = dv = end = None
        if k is not None:
            dk = decay.end(v.conj() @ dend.mT)
            end = _inner(decay, k, dk).sum(2) if g is not None else None
            dv = _add_product(decay.end(k).conj() @ dend, decay.gram(q, k, "after").mH, do)
            decay.gram_backward(do @ v.mH, q, k, "after", dq, dk)
        if dnew is not None:
            dw = decay.end(new.conj() @ dend.mT)
            if g is not None:
                ends = _inner(decay, w, dw).sum(2)
                end = ends if end is None else end + ends
            decay.gram_backward(do @ new.mH, q, w, "after", dq, dw)
            # new = (I + system)^-1 (right - reads S): the gradient of the right side gives the others'.
            dvalues = _solve(decay.gram(a, w, before), dnew, adjoint=True)
            da = decay.begin((dvalues @ states.mH).neg_(), before)
            decay.gram_backward(dvalues @ new.mH, a, w, before, da, dw, -1)
            if k is None or dv is None or dk is None:
                dv = dvalues
            else:
                decay.gram_backward(dvalues @ v.mH, a, k, before, da, dk, -1)
                _add_product(dv, decay.gram(a, k, before).mH, dvalues, -1)
        dg = None
        if g is not None and ctx.needs_input_grad[5]:
            dg = _decay_gradient(decay, (q, dq, every), (a, da, before), ((k, dk), (w, dw)), end, states, dend)
        return dq, da, dw, dk, dv, dg, dstate, None, None


def _solve(system: Tensor, right: Tensor, adjoint: bool = False) -> Tensor:
    """``(I + system)^-1 right``, or with the adjoint; `system` is strictly lower triangular."""
    # Solved from the right for the transpose: rows stay rows, which saves the copies to column order and back.
    across = system.conj() if adjoint else system.mT
    solved: Tensor = torch.linalg.solve_triangular(
        across, right.mT, upper=not adjoint, left=False, unitriangular=True
    ).mT
    return solved


def _add_product(out: Tensor, x: Tensor, y: Tensor, sign: int = 1) -> Tensor:
    """``out += sign * x @ y`` in place, (n, N, ., .) each."""
    out.view(-1, *out.shape[2:]).baddbmm_(x.flatten(0, 1), y.flatten(0, 1), alpha=sign)
    return out


def _states(
    decay: decays.Decay,
    state: Tensor,
    spread: Tensor | None,
    new: Tensor | None,
    w: Tensor | None,
    added: Tensor | None,
    chunks: int,
) -> tuple[Tensor, Tensor]:
    """The states before each chunk (n, N, dk, dv) and the last one; completes what the erases write, `new`, in place."""
    states = state.new_empty(chunks + 1, *state.shape)
    states[0] = state
    w_ends = None if w is None else decay.end(w).mT.unbind()
    each = states.unbind()
    for i in range(chunks):
        before, after = each[i], each[i + 1]
        if decay.total is None:
            after.copy_(before)
        else:
            torch.mul(before, decay.total[i], out=after)
        if added is not None:
            after += added[i]
        if new is not None and spread is not None and w_ends is not None:
            after.baddbmm_(w_ends[i], new[i].baddbmm_(spread[i], before))
    return states[:-1], each[-1].clone()


def _states_backward(
    decay: decays.Decay, dstates: Tensor, dlast: Tensor, spread: Tensor | None, w: Tensor | None, dnew: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk and of the first one; completes `dnew` in place."""
    dend = torch.empty_like(dstates)
    dend[-1] = dlast
    w_ends = None if w is None else decay.end(w).conj().unbind()
    each, after = dstates.unbind(), dend.unbind()
    for i in range(len(each) - 1, -1, -1):
        dstate = after[i - 1] if i else each[0]
        if decay.total is None:
            torch.add(each[i], after[i], out=dstate)
        else:
            torch.addcmul(each[i], after[i], decay.total[i], out=dstate)
        if dnew is not None and spread is not None and w_ends is not None:
            dstate.baddbmm_(spread[i].mH, dnew[i].baddbmm_(w_ends[i], after[i]))
    return dend, each[0]


def _inner(decay: decays.Decay, x: Tensor, dx: Tensor) -> Tensor:
    """The gradient of the log of a factor of x, by channel or, for scalar decays, summed."""
    product = (x.conj() * dx).real if x.is_complex() else x * dx
    return product if isinstance(decay, decays.ChannelDecay) else product.sum(-1, keepdim=True)


def _decay_gradient(
    decay: decays.Decay,
    read: tuple[Tensor, Tensor, int],
    erase: tuple[Tensor | None, Tensor | None, str],
    columns: tuple[tuple[Tensor | None, Tensor | None], ...],
    end: Tensor | None,
    states: Tensor,
    dend: Tensor,
) -> Tensor:
    """Dg from the gradients of what it scales: rows carry ``e^{G_t}``, columns ``e^{-G_j}``, the chunk's end ``e^{G_C}``."""
    q, dq, every = read
    rows = _inner(decay, q, dq)
    sums = F.pad(rows[:, :, :, None], (0, 0, every - 1, 0)).flatten(2, 3) if every > 1 else rows
    for x, dx in columns:
        if x is not None and dx is not None:
            sums = sums - _inner(decay, x, dx)
    a, da, reads = erase
    if a is not None and da is not None:
        rows = _inner(decay, a, da)
        sums = sums + (F.pad(rows[:, :, 1:], (0, 0, 0, 1)) if reads == "before" else rows)
    assert decay.total is not None
    carried = (states.conj() * dend).real if states.is_complex() else states * dend
    carried = carried.sum(-1, keepdim=True) * decay.total
    carried = carried[..., 0] if isinstance(decay, decays.ChannelDecay) else carried.sum(-2)
    last = carried if end is None else carried + end
    # dg_t = sum over rows and columns from t on.
    return sums.flip(2).cumsum(2).flip(2) + last[:, :, None]


def chunkwise_dense(
    matrices: Tensor, key: Tensor, value: Tensor, read: Tensor, state: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Any transition: all chunks advance together, one dense product a step, then the chunks are joined.

    Args:
        matrices: (N, time, dk, dk).
        key: (N, time, dk).
        value: (N, time, dv).
        read: (N, time, dk).
        state: (N, dk, dv).
        chunk: steps a chunk; None for about sqrt(time).

    Returns:
        outputs (N, time, dv) and the last state (N, dk, dv).
    """
    time, size = key.shape[1:]
    steps = chunk or max(int(time**0.5), 1)
    short = -time % steps
    if short:
        eye = torch.eye(size, dtype=matrices.dtype, device=matrices.device).expand(len(matrices), short, size, size)
        matrices = torch.cat((matrices, eye), 1)
        key, value, read = (F.pad(x, (0, 0, 0, short)) for x in (key, value, read))
    matrices, key, value, read = (decays.unflatten(x, 1, -1, steps) for x in (matrices, key, value, read))
    # [product of the transitions | state from zero], advanced by all chunks at once.
    both = torch.cat(
        (
            torch.eye(size, dtype=matrices.dtype, device=matrices.device).expand(*matrices.shape[:2], size, size),
            value.new_zeros(*matrices.shape[:2], size, value.shape[-1]),
        ),
        -1,
    )
    seen = []
    for a, k, v, q in zip(matrices.unbind(2), key.unbind(2), value.unbind(2), read.unbind(2), strict=True):
        both = a @ both
        both = torch.cat((both[..., :size], both[..., size:] + k[..., None] * v[..., None, :]), -1)
        seen.append((q[..., None, :] @ both)[..., 0, :])
    reads = torch.stack(seen, 2)
    states = []
    for moved, added in zip(both[..., :size].unbind(1), both[..., size:].unbind(1), strict=True):
        states.append(state)
        state = moved @ state + added
    outputs = reads[..., :size] @ torch.stack(states, 1) + reads[..., size:]
    return outputs.flatten(1, 2)[:, :time], state
