"""Elementwise recurrences ``h_t = a_t h_{t-1} + x_t`` by odd-even reduction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_recurrence(decay: Tensor, input: Tensor, state: Tensor | None = None) -> Tensor:
    """``h_t = decay_t * h_{t-1} + input_t`` along axis 1, for every other element on its own.

    Args:
        decay: (batch, time, ...), real or complex; broadcasts to `input`.
        input: (batch, time, ...).
        state: h_0, (batch, ...); None for zero.

    Returns:
        h (batch, time, ...).
    """
    decay = decay.expand_as(input)
    if state is not None and input.shape[1]:
        first = input[:, :1] + decay[:, :1] * state[:, None]
        input = torch.cat((first, input[:, 1:]), 1)
    dtype = torch.promote_types(decay.dtype, input.dtype)
    result: Tensor = _Recurrence.apply(decay.to(dtype), input.to(dtype))  # type: ignore[no-untyped-call]
    return result


class _Recurrence(torch.autograd.Function):
    """dx_t = dh_t + conj(a_{t+1}) dx_{t+1}; da_t = dx_t conj(h_{t-1})."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, input: Tensor) -> Tensor:
        h = _odd_even(decay, input)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        decay, h = ctx.saved_tensors
        ahead = torch.cat((decay[:, 1:], torch.zeros_like(decay[:, :1])), 1).conj()
        dx = _odd_even(ahead.flip(1), grad.flip(1)).flip(1)
        before = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), 1).conj()
        return dx * before, dx


def _odd_even(a: Tensor, x: Tensor) -> Tensor:
    """Pairs are joined, the half as long recurrence is solved, and the steps between are filled in: O(time) work."""
    time = x.shape[1]
    if time < 4:
        steps: list[Tensor] = []
        for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
            steps.append(torch.addcmul(x_t, a_t, steps[-1]) if steps else x_t)
        return torch.stack(steps, 1) if steps else x
    even = time // 2 * 2
    a_odd = a[:, 1:even:2]
    odd = _odd_even(a[:, 0:even:2] * a_odd, torch.addcmul(x[:, 1:even:2], a_odd, x[:, 0:even:2]))
    h = torch.empty_like(x)
    h[:, 1:even:2] = odd
    h[:, 0] = x[:, 0]
    behind = odd[:, : (time - 1) // 2]
    h[:, 2::2] = torch.addcmul(x[:, 2::2], a[:, 2::2], behind)
    return h
