"""Products with a rounded matrix as it is stored, by kernels compiled on the user's machine: ``c/codes.c``.

Of a few rows the weights are read as codes of 2 to 8 bits and become numbers in registers; the rotation is applied to x. So a
product takes the time of reading a quarter to a sixteenth of the bytes of float32, in either grid, rotated or not. Of many rows
some outputs' weights become numbers in memory at a time, and nothing dense is kept.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.execution import onednn
from gramian.execution.calibration import stored
from gramian.execution.native import DTYPES, library, readable
from gramian.ops import Operator, Quantized
from gramian.ops.bits import unpack
from gramian.ops.quantized import grid_levels

FEW_ROWS = 32
"""Of more rows, turning codes into numbers once, for dense products, is faster."""
NUMBERS = 2**19
"""So many at a time: what a cache holds."""


def able(op: Operator, dtype: torch.dtype) -> bool:
    """Whether the kernel knows the operator; it is another question whether there is the kernel."""
    return isinstance(op, Quantized) and dtype in DTYPES and min(op.shape) > 0


class _Codes(ctypes.Structure):
    """``Codes`` of codes.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "levels", "signs")),
        *((name, ctypes.c_int64) for name in ("out", "in", "bits", "group", "rounds", "rotation", "half")),
    ]


@dataclass(frozen=True, eq=False, repr=False)
class Codes(Operator):
    """A rounded matrix in the order that the kernel reads: made to run, never stored.

    Args:
        source: the matrix as it is stored; for products that the kernel cannot take.
        codes: (tiles, groups, words of a group, lanes) int32: 32 // bits codes of one output in a word, lowest bits first.
        scales: (tiles, groups, lanes) float32.
        levels: the grid, filled up to 16 numbers; none of an even one, whose scales are of a step of one.
        signs: (rounds, in) of +-1, float32.
        runs_in: the dtype of x, and of the product.
    """

    kind: ClassVar[str] = "codes"
    source: Quantized
    codes: Tensor
    scales: Tensor
    levels: Tensor
    signs: Tensor
    runs_in: torch.dtype

    @classmethod
    def of(cls, op: Operator, dtype: torch.dtype) -> Codes:
        """The same matrix (``able``), to multiply x of that dtype."""
        assert isinstance(op, Quantized)
        loaded = library()
        lanes, each = 16 if loaded is None else int(loaded.gramian_lanes()), 32 // op.bits
        (out, in_), group, even = op.shape, op.group, op.grid == "uniform"
        tiles, groups, words = -(-out // lanes), -(-in_ // group), -(-group // each)
        if op.codes.is_meta:
            codes = op.codes.new_empty((tiles, groups, words, lanes), dtype=torch.int32)
            scales = op.scales.new_empty((tiles, groups, lanes), dtype=torch.float32)
            none = scales.new_empty(0)
            return cls(op, codes, scales, none, none, dtype)
        codes = op.codes.new_zeros((tiles, groups, words, lanes), dtype=torch.int32)
        step = max(1, NUMBERS // (lanes * max(in_, 1)))
        for first in range(0, tiles, step):  # some outputs at a time: apart, codes take 4 to 16 times the bytes
            part = op.codes[first * lanes : (first + step) * lanes]
            whole = F.pad(unpack(part, op.bits, in_).int(), (0, groups * group - in_, 0, -len(part) % lanes))
            whole = F.pad(whole.view(-1, lanes, groups, group), (0, words * each - group))
            for place, digit in enumerate(whole.view(-1, lanes, groups, words, each).unbind(-1)):
                codes[first : first + step] |= (digit << place * op.bits).permute(0, 2, 3, 1)
        scales = op.scales.float() * (2 / (2**op.bits - 1) if even else 1)
        scales = F.pad(scales, (0, 0, 0, tiles * lanes - out)).view(tiles, lanes, groups).mT.contiguous()
        levels = grid_levels(op.grid, op.bits).float()
        levels = levels[:0] if even else F.pad(levels, (0, max(0, 16 - len(levels))))
        signs = op.rotation_signs(torch.float32).contiguous()
        return cls(op, codes, scales, levels, signs, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of x."""
        return self.runs_in

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Of what is read."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.levels, self.signs))

    @cached_property
    def _about(self) -> _Codes:
        op, pointers = self.source, (self.codes, self.scales, self.levels, self.signs)
        return _Codes(
            *(tensor.data_ptr() if tensor.numel() else None for tensor in pointers),
            *(*op.shape, op.bits, op.group, op.rounds, op.rotation, self.runs_in == torch.bfloat16),
        )

    def apply(self, x: Tensor) -> Tensor:
        """``x A^T``: x (..., in) -> (..., out)."""
        (out, in_), loaded = self.shape, library()
        rows = math.prod(x.shape[:-1])
        if x.is_meta and rows <= FEW_ROWS:
            made: Tensor = torch.ops.gramian.few_rows(x, [x.new_empty(1, out, in_)], out, self.source.bits)
            return made
        if x.is_meta:
            return self._multiply(x, x.new_empty(out, in_).clone())  # making the numbers is a pass over them
        if loaded is None or not readable(x, self.runs_in):
            return self.source.apply(x)
        x, threads, about = x.contiguous(), torch.get_num_threads(), ctypes.addressof(self._about)
        y = x.new_empty((*x.shape[:-1], out))
        if rows <= FEW_ROWS:
            failed = loaded.gramian_codes(about, rows, x.data_ptr(), y.data_ptr(), threads)
        else:
            turned = torch.empty_like(x) if self.source.rotation > 1 else x
            failed = turned is not x and loaded.gramian_rotate(about, rows, x.data_ptr(), turned.data_ptr(), threads)
            tiles, _, _, lanes = self.codes.shape
            step = max(1, min(NUMBERS // in_ // lanes, tiles))
            weights = x.new_empty(step * lanes * in_)
            for first in range(0, tiles, step):
                count = min(step, tiles - first)
                loaded.gramian_decode(about, first, count, weights.data_ptr(), threads)
                part = weights[: count * lanes * in_].view(in_, count * lanes).mT[: out - first * lanes]
                y.view(rows, out)[:, first * lanes :][:, : len(part)] = self._multiply(turned.view(rows, in_), part)
        if failed:
            raise MemoryError(f"a product of {rows} rows by a matrix {self.shape} of {self.source.bits} bits an entry")
        return y

    def _multiply(self, x: Tensor, weights: Tensor) -> Tensor:
        """A dense product in the way that is faster for many rows."""
        model = stored()
        if model is not None and "onednn" in model.libraries and self.runs_in == torch.float32 and onednn.present():
            return onednn.linear(weights)(x, None)
        return F.linear(x, weights)

    def flops(self, batch: int = 1) -> int:
        """As of the dense matrix."""
        return 2 * batch * self.shape[0] * self.shape[1]


__all__ = ["FEW_ROWS", "Codes", "able"]
