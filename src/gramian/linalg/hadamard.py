"""The Walsh-Hadamard transform over the last dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest_power_of_two(n: int) -> int:
    """The largest power of two that divides n (n >= 1)."""
    return n & -n


def hadamard_transform(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension.

    Args:
        x: (..., n) with n a power of two.

    Returns:
        (..., n); the transform is symmetric and its own inverse.

    Raises:
        ValueError: n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard_transform needs a power of two as last dimension, found {n}")
    shape, y, half = x.shape, x, 1
    while half < n:
        y = y.reshape(*shape[:-1], n // (2 * half), 2, half)
        first, second = y[..., 0, :], y[..., 1, :]
        y = torch.stack((first + second, first - second), dim=-2)
        half *= 2
    return y.reshape(shape) / math.sqrt(n)
