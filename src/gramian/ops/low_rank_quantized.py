"""Low rank plus rounded (Leconte et al. 2024, "ReALLM"; Guo et al. 2024, "LQ-LoRA"; Li et al. 2023, "LoftQ")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import reduced_rank, weighted_error
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.combinators import Sum
from gramian.ops.operator import Size, register
from gramian.ops.quantized import Quantized

SHARES = (1 / 64, 1 / 16)
"""Ranks that ``sizes`` offers, as shares of the smaller side."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class LowRankQuantized(Sum):
    """``L + Q``: a few directions in full precision, the rest rounded to a grid.

    Args:
        parts: a BlockLowRank of one block and a Quantized, of one shape.
    """

    kind: ClassVar[str] = "low_rank_quantized"
    fittable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [type(part) for part in self.parts]
        if kinds != [BlockLowRank, Quantized]:
            raise GramianError(
                f"{self.kind}: parts {[kind.__name__ for kind in kinds]}; expected BlockLowRank, Quantized"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        rank: int = 1,
        bits: int = 4,
        sweeps: int = 3,
        **size: Any,
    ) -> LowRankQuantized:
        """Alternate between the two-sided low-rank optimum of ``W - Q`` (``linalg.reduced_rank``, exact) and rounding
        ``W - L`` with error feedback (``Quantized.fit``), from Q = 0; the best pair is kept, so that more sweeps never
        raise the error.

        Args:
            weight: (out, in).
            gram_in: (in, in), its diagonal (in,), or None.
            gram_out: (out, out), its diagonal (out,), or None.
            rank: of L.
            bits: of Q, 2 to 8.
            sweeps: turns at most; it ends where one does not pay.
            size: of Q, as ``Quantized.fit`` takes it (group, grid, rotate, seed, ...).

        Raises:
            GramianError: rank out of range.
        """
        out, in_ = weight.shape
        if not 1 <= rank <= min(out, in_):
            raise GramianError(f"{cls.kind}: rank {rank} for {out} x {in_}; expected 1 to {min(out, in_)}")
        w = weight.detach().double()
        best: tuple[float, BlockLowRank, Quantized] | None = None
        rounded: Tensor | None = None
        for _ in range(max(sweeps, 1)):
            found = reduced_rank(w if rounded is None else w - rounded, gram_in, gram_out)
            pair = BlockLowRank.low_rank(found.left[:, :rank], found.right[:rank]).balanced.to(dtype=weight.dtype)
            rest = w - pair.dense().double()
            made = Quantized.fit(rest.to(weight.dtype), gram_in=gram_in, gram_out=gram_out, bits=bits, **size)
            rounded = made.dense().double()
            error = float(weighted_error(rest - rounded, gram_in, gram_out))
            before = math.inf if best is None else best[0]
            if error < before:
                best = (error, pair, made)
            if not error < before * (1 - 1e-3):
                break
        assert best is not None
        return cls(best[1:])

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        rank: int = 1,
        bits: int = 4,
        **size: Any,
    ) -> LowRankQuantized:
        """L by the spectral rule, Q that of a Gaussian matrix; both scaled so that the sum keeps the variance of one."""
        pair = BlockLowRank.init(shape, rank=rank, generator=generator)
        rest = Quantized.init(shape, generator=generator, bits=bits, **size)
        half = 0.5**0.5
        return cls((pair.replace(left=pair.left * half), rest.replace(scales=rest.scales * half)))

    @classmethod
    def size_names(cls) -> set[str]:
        return super().size_names() | Quantized.size_names()

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """As of ``Quantized``: what is rounded keeps a code an entry, so `keep` must be above one."""
        found: list[Size] = []
        rounded = Quantized.sizes(shape, keep)
        if not rounded:
            return found
        out, in_ = shape
        codes = out * in_ + out * -(-in_ // 128) + (in_ if in_ % 2 == 0 else 0)
        for share in SHARES[::-1]:
            rank = max(1, round(share * min(shape)))
            if codes + rank * (out + in_) <= keep * out * in_:
                found += [{"rank": rank, "bits": bits} for bits in (4, 3, 2)]
        return found
