"""A few rows times a matrix of 4-bit codes, by the kernel that torch has for it on CPUs: the weights are read as they are
stored, a quarter of the bytes of bfloat16 (Shen et al. 2023, "Efficient LLM Inference on CPUs").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gramian.modes import watched
from gramian.ops import Operator, Quantized
from gramian.ops.bits import unpack

GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale."""
OUT = 16
"""The outputs must be a multiple of so many."""


@lru_cache
def present() -> bool:
    """Whether this torch has the kernel."""
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def able(op: Operator, dtype: torch.dtype) -> bool:
    """Whether the kernel knows the format: 4 bits, equally spaced levels, no rotation; and is fast, as in bfloat16 alone."""
    return (
        present()
        and isinstance(op, Quantized)
        and dtype == torch.bfloat16
        and (op.bits, op.grid, op.rotation) == (4, "uniform", 1)
        and op.group in GROUPS
        and op.shape[1] % op.group == 0
        and op.shape[0] % OUT == 0
    )


@dataclass(frozen=True, eq=False, repr=False)
class Int4(Operator):
    """A rounded matrix in the order that the kernel of this machine reads: made to run, never stored.

    Args:
        source: the matrix as it is stored; for products that the kernel cannot take.
        codes: (out, in / 2) uint8.
        affine: (in / group, out, 2) bfloat16, the step between levels and the level of code 8.
    """

    kind: ClassVar[str] = "int4"
    source: Quantized
    codes: Tensor
    affine: Tensor

    @classmethod
    def of(cls, op: Operator, dtype: torch.dtype = torch.bfloat16) -> Int4:
        """The same matrix (``able``); its scales in bfloat16, as in the dense matrix of a model in that dtype."""
        assert isinstance(op, Quantized)
        codes = unpack(op.codes, 4, op.columns).int()
        half = (op.scales / 15).to(torch.bfloat16)  # levels are scale * (2 code - 15) / 15
        affine = torch.stack([2 * half, half], -1).transpose(0, 1).contiguous()
        return cls(op, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), affine)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16."""
        return self.affine.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Of what is read."""
        return self.codes.nbytes + self.affine.nbytes

    def apply(self, x: Tensor) -> Tensor:
        """``x A^T``: x (..., in) bfloat16 -> (..., out)."""
        if watched(x) or x.numel() == 0:
            return self.source.apply(x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # the kernel takes no other
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.source.group, self.affine)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def flops(self, batch: int = 1) -> int:
        """As of the dense matrix."""
        return 2 * batch * self.shape[0] * self.shape[1]


if present():

    @register_flop_formula(torch.ops.aten._weight_int4pack_mm_for_cpu)  # type: ignore[untyped-decorator]
    def _flops(x: tuple[int, ...], codes: tuple[int, ...], *rest: object, **more: object) -> int:
        return 2 * x[0] * x[1] * codes[0]


__all__ = ["Int4", "able", "present"]
