"""Low rank plus sparse (Han et al. 2024, "SLTrain: a sparse plus low-rank approach for parameter and memory efficient
pretraining").
"""

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
from gramian.ops.sparse import Pursued, Sparse, largest, pursue

SHARES = (0.3, 0.6)
"""Shares of the stored numbers that ``sizes`` gives to the sparse part."""
MOST = 200
"""Sweeps at the very most."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class LowRankSparse(Sum):
    """``B A + S``: a low-rank matrix and k further entries on a fixed support.

    The paper's code forms the dense matrix in every pass, forward and backward; here neither pass does: the low-rank part
    runs as two products and the sparse part as ``sparse_product``, whose gradient for S is ``dW`` at its entries alone.

    Args:
        parts: a BlockLowRank of one block and a Sparse, of one shape.
    """

    kind: ClassVar[str] = "low_rank_sparse"
    fittable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [type(part) for part in self.parts]
        if kinds != [BlockLowRank, Sparse]:
            raise GramianError(f"{self.kind}: parts {[kind.__name__ for kind in kinds]}; expected BlockLowRank, Sparse")

    def transpose(self) -> LowRankSparse:
        return LowRankSparse(tuple(part.T for part in self.parts))

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        rank: int = 1,
        nonzeros: int = 1,
        sweeps: int = 6,
        **size: Any,
    ) -> LowRankSparse:
        """Alternate between the two-sided low-rank optimum of ``W - S`` (``linalg.reduced_rank``, exact) and a sparse
        approximation of ``W - L`` under the full Grams (``pursue``, from the former S); the best pair is kept. It goes
        on beyond `sweeps` while each turn halves the error, as it does near an exact member.
        """
        out, in_ = weight.shape
        if not (1 <= rank <= min(out, in_) and 1 <= nonzeros <= out * in_):
            raise GramianError(
                f"{cls.kind}: rank {rank} and {nonzeros} nonzeros for {out} x {in_}; expected 1 to {min(out, in_)} and "
                f"1 to {out * in_}"
            )
        w = weight.detach().double()
        sparse: Pursued | None = None
        best: tuple[float, Tensor, Tensor, Pursued] | None = None
        nothing = float(weighted_error(w, gram_in, gram_out))
        for sweep in range(MOST):
            found = reduced_rank(w if sparse is None else w - sparse.matrix, gram_in, gram_out)
            left, right = found.left[:, :rank], found.right[:rank]
            rest = w - left @ right
            sparse = pursue(rest, largest(nonzeros), gram_in, gram_out, start=sparse, rounds=1)
            error = float(weighted_error(rest - sparse.matrix, gram_in, gram_out))
            before = math.inf if best is None else best[0]
            if error < before:
                best = (error, left, right, sparse)
            if not error < before * (1 - 1e-6) or error <= 1e-30 * nothing:
                break
            if sweep + 1 >= sweeps and (sweep == 0 or error > 0.5 * before):
                break
        assert best is not None
        _, left, right, sparse = best
        pair = BlockLowRank.low_rank(left.to(weight), right.to(weight))
        return cls((pair, Sparse.from_dense(sparse.matrix.to(weight), sparse.support)))

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        rank: int = 1,
        nonzeros: int = 1,
        start: str = "spectral",
        **size: Any,
    ) -> LowRankSparse:
        """S uniform in +-1 / sqrt(in) on a uniformly random support, as in the paper.

        Args:
            shape: (out, in).
            generator: of random numbers.
            rank: of B A.
            nonzeros: of S; the paper's density is 0.03.
            start: "spectral": B and A by the spectral rule of their own shapes. "sltrain": the paper's, B zero and A
                uniform in +-1 / sqrt(in); its factor alpha / rank on B A is left to the learning rate of B.
            size: nothing else.

        Raises:
            GramianError: unknown start.
        """
        out, in_ = shape
        bound = 1 / math.sqrt(in_)
        if start == "spectral":
            pair = BlockLowRank.init(shape, rank=rank, generator=generator)
        elif start == "sltrain":
            right = (2 * torch.rand(rank, in_, generator=generator) - 1) * bound
            pair = BlockLowRank.low_rank(torch.zeros(out, rank), right)
        else:
            raise GramianError(f"{cls.kind}: start {start!r}; expected 'spectral' or 'sltrain'")
        sparse = Sparse.init(shape, nonzeros=nonzeros, generator=generator)
        values = (2 * torch.rand(len(sparse.values), generator=generator) - 1) * bound
        return cls((pair, sparse.replace(values=values)))

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        out, in_ = shape
        found: list[Size] = []
        for share in SHARES:
            budget = keep * out * in_ - out
            nonzeros = min(int(share * budget / 2), out * in_)
            rank = min(int((budget - 2 * nonzeros) / (out + in_)), out, in_)
            if nonzeros >= 1 and rank >= 1:
                found.append({"rank": rank, "nonzeros": nonzeros})
        return found
