"""Small integers, packed bit by bit into bytes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers (rows, n) below 2^bits, bits 1 to 8, as (rows, ceil(n bits / 8)) uint8, least significant bit first."""
    together, width, wide = _word(bits)
    rows, n = codes.shape
    count = -(-n // together)
    padded = F.pad(codes, (0, count * together - n)).reshape(rows, count, together).to(wide)
    words = (padded << _shifts(together, bits, padded)).sum(-1, dtype=wide)
    parts = (words[..., None] >> _shifts(width, 8, words)) & 255
    return parts.to(torch.uint8).reshape(rows, count * width)[:, : -(-n * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of ``pack``: (rows, ceil(n bits / 8)) -> (rows, n) uint8."""
    together, width, wide = _word(bits)
    (rows, length), count = packed.shape, -(-n // together)
    padded = F.pad(packed, (0, count * width - length)).reshape(rows, count, width).to(wide)
    words = (padded << _shifts(width, 8, padded)).sum(-1, dtype=wide)
    parts: Tensor = (words[..., None] >> _shifts(together, bits, words)) & (2**bits - 1)
    return parts.to(torch.uint8).reshape(rows, count * together)[:, :n]


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """So many integers fill so many whole bytes, which one number of this dtype holds."""
    common = math.gcd(bits, 8)
    width = bits // common
    return 8 // common, width, torch.uint8 if width == 1 else torch.int32 if width <= 3 else torch.int64


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)
