"""Dense times row-sparse (Chand et al. 2023, "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight
Factorization"): every row of a block of rows is a combination of a few of the block's atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import psd_solve, reduced_rank, weigh, weighted_error
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.dense import spectral_normal
from gramian.ops.operator import Operator, Size, register
from gramian.ops.sparse import Pursued, pursue

RATIOS = (0.2, 0.35)
"""Codes a row as shares of the atoms, as ``sizes`` offers them: the best of those tried on layers of an encoder."""
TRIAL = 3
"""Sweeps after which the better of the two starts goes on."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class Dictionary(Operator):
    """R blocks of rows, each ``C D`` with D (d, in) dense and C (out / R, d) with exactly s entries a row.

    A storage form: the product runs as a block low-rank one of rank d, with C filled up by zeros (``pair()``).

    The paper has this form and the straight-through training (``nn.StraightThroughDictionary``); its factors are sized and
    started as suits it. The Gram-weighted fit and the stored layout are ours.

    Args:
        basis: (R, d, in), the atoms of each block.
        coefficients: (R, ceil(out / R), s).
        index: (R, ceil(out / R), s) integers: the atom of each coefficient, distinct within a row; uint8 for up to 256
            atoms, int16 for up to 32768.
        rows: out.
    """

    kind: ClassVar[str] = "dictionary"
    fittable: ClassVar[bool] = True
    basis: Tensor
    coefficients: Tensor
    index: Tensor
    rows: int

    def __post_init__(self) -> None:
        basis, coefficients, index = self.basis, self.coefficients, self.index
        self._check(
            basis.dim() == coefficients.dim() == 3
            and index.shape == coefficients.shape
            and not index.is_floating_point()
            and len(basis) == len(coefficients) > 0
            and coefficients.shape[1] == -(-self.rows // len(basis)),
            f"basis (R, d, in), coefficients and integer index (R, ceil({self.rows} / R), s)",
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.basis.shape[2])

    def pair(self) -> BlockLowRank:
        """The same matrix with C filled up by zeros."""
        blocks, atoms, in_ = self.basis.shape
        filled = self.coefficients.new_zeros(blocks, self.coefficients.shape[1], atoms)
        filled = filled.scatter(2, self.index.long(), self.coefficients)
        return BlockLowRank(filled, self.basis.reshape(1, blocks * atoms, in_), self.rows, in_)

    def apply(self, x: Tensor) -> Tensor:
        return self.pair().apply(x)

    def apply_columns(self, x: Tensor) -> Tensor:
        return self.pair().apply_columns(x)

    def dense(self) -> Tensor:
        return self.pair().dense()

    def transpose(self) -> Operator:
        from gramian.ops.combinators import Transpose

        return Transpose(self)

    def runtime(self) -> Operator:
        return self.pair().runtime()

    def flops(self, batch: int = 1) -> int:
        blocks, atoms, in_ = self.basis.shape
        return 2 * batch * blocks * atoms * (in_ + self.coefficients.shape[1])

    @classmethod
    def from_latent(cls, latent: Tensor, basis: Tensor, nonzeros: int, rows: int) -> Dictionary:
        """Keep the `nonzeros` largest of every row of latent (R, ceil(rows / R), d)."""
        atoms = basis.shape[1]
        index = latent.abs().topk(nonzeros, 2).indices.sort(2).values
        dtype = torch.uint8 if atoms <= 2**8 else torch.int16 if atoms <= 2**15 else torch.int32
        return cls(basis, latent.gather(2, index), index.to(dtype), rows)

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        atoms: int = 1,
        nonzeros: int = 1,
        blocks: int = 1,
        sweeps: int = 8,
        **size: Any,
    ) -> Dictionary:
        """Alternate between codes and atoms, each under both Grams.

        Given D, the codes are a sparse approximation of the full least-squares codes under the Gram ``D G D^T``
        (``ops.sparse.pursue``, from the former codes); given C, the best atoms are ``(C^T H C)^+ C^T H W`` whatever G.
        Neither raises the error. It starts from the best low-rank factors and from rows of the weight, and goes on with
        the better. Blocks of rows are fitted one by one, as if H did not couple them.
        """
        out, in_ = weight.shape
        height = -(-out // blocks)
        if not (1 <= nonzeros <= atoms and 1 <= blocks <= out):
            raise GramianError(
                f"dictionary: {nonzeros} of {atoms} atoms in {blocks} blocks for {out} x {in_}; expected 1 <= nonzeros <= "
                f"atoms and 1 <= blocks <= {out}"
            )
        w = F.pad(weight.detach().double(), (0, 0, 0, blocks * height - out))
        g, h = (None if gram is None else gram.to(w) for gram in (gram_in, gram_out))
        extra = blocks * height - out
        h = h if h is None else F.pad(h, (0, extra) * h.dim())
        codes, bases = [], []
        for first in range(0, blocks * height, height):
            span = slice(first, first + height)
            own = None if h is None else h[span] if h.dim() == 1 else h[span, span]
            problem = _Block(w[span], g, own, atoms, nonzeros)
            starts = [problem.improve(start, min(TRIAL, sweeps)) for start in problem.starts()]
            found = problem.improve(min(starts, key=lambda state: state[0]), max(sweeps - TRIAL, 0))
            codes.append(found[2].matrix)
            bases.append(found[1])
        return cls.from_latent(torch.stack(codes).to(weight), torch.stack(bases).to(weight), nonzeros, out)

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        atoms: int = 1,
        nonzeros: int = 1,
        blocks: int = 1,
        **size: Any,
    ) -> Dictionary:
        """Atoms and filled-up codes by the spectral rule of their own shapes, codes on a random support."""
        out, in_ = shape
        basis = spectral_normal((blocks, atoms, in_), generator)
        latent = spectral_normal((blocks, -(-out // blocks), atoms), generator)
        chosen = torch.rand(latent.shape, generator=generator).topk(nonzeros, 2).indices
        values = latent.gather(2, chosen) * (atoms / nonzeros) ** 0.5
        return cls.from_latent(torch.zeros_like(latent).scatter(2, chosen, values), basis, nonzeros, out)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """One block of rows: more blocks save index bits, and cost accuracy on the layers measured."""
        out, in_ = shape
        found: list[Size] = []
        for ratio in RATIOS:
            atoms = min(int(keep * out * in_ / (in_ + 2 * out * ratio)), out)
            nonzeros = min(int((keep * out - atoms) * in_ / (2 * out)), atoms)
            if atoms >= 1 and nonzeros >= 1:
                found.append({"atoms": atoms, "nonzeros": nonzeros, "blocks": 1})
        return found


def straight_through(latent: Tensor, nonzeros: int) -> Tensor:
    """The `nonzeros` largest of every row of latent (..., d), zero elsewhere; its gradient passes to all of latent as if
    nothing had been cut.
    """
    kept = latent.detach()
    index = kept.abs().topk(nonzeros, -1).indices
    hard = torch.zeros_like(kept).scatter(-1, index, kept.gather(-1, index))
    return hard + (latent - latent.detach())


_State = tuple[float, Tensor, Pursued]
"""Error, atoms (d, in) and codes (height, d)."""


class _Block:
    """One block of rows: ``min tr(H (W - C D) G (W - C D)^T)`` over D and C with a few entries a row."""

    def __init__(self, w: Tensor, g: Tensor | None, h: Tensor | None, atoms: int, nonzeros: int) -> None:
        self.w, self.g, self.h, self.atoms = w, g, h, atoms
        self.select = largest_of_rows(nonzeros)

    def starts(self) -> list[_State]:
        """From the two-sided low-rank optimum, and from rows of the weight, evenly spread over all of them."""
        best = reduced_rank(self.w, self.g, self.h).right[: self.atoms]
        picks = torch.linspace(0, len(self.w) - 1, self.atoms, dtype=torch.float64).round().long().to(self.w.device)
        rows = self.w[picks]
        missing = self.atoms - len(best)
        found = []
        for basis in (torch.cat([best, rows[:missing]]) if missing else best, rows):
            found.append(self._coded(basis, None))
        return found

    def _coded(self, basis: Tensor, former: Tensor | None) -> _State:
        """The best codes found for these atoms: from the former support, unless a fresh one is better."""
        weighted = weigh(basis, self.g, side="in")
        lengths = (weighted * basis).sum(1).clamp_min(0).sqrt()
        lengths = torch.where(lengths > 1e-12 * lengths.max(), lengths, 1.0)
        basis, weighted = basis / lengths[:, None], weighted / lengths[:, None]
        metric = weighted @ basis.mT
        full = psd_solve(metric, weighted @ self.w.mT).mT
        start = None
        if former is not None:
            moved = former * lengths
            start = Pursued(moved, former != 0)
        codes = pursue(full, self.select, metric, self.h, start=start, rounds=1)
        return self._error(codes.matrix, basis), basis, codes

    def _error(self, codes: Tensor, basis: Tensor) -> float:
        return float(weighted_error(self.w - codes @ basis, self.g, self.h))

    def improve(self, state: _State, sweeps: int) -> _State:
        """Sweeps over atoms and codes; one that does not lower the error is undone and ends them."""
        for _ in range(sweeps):
            codes = state[2].matrix
            weighted = weigh(codes, self.h, side="out")
            basis = psd_solve(weighted.mT @ codes, weighted.mT @ self.w)
            fresh = self._coded(basis, codes)
            if not fresh[0] < state[0]:
                break
            state = fresh
        return state


def largest_of_rows(count: int) -> Callable[[Tensor], Tensor]:
    """Select the `count` largest scores of every row: a boolean mask."""

    def select(scores: Tensor) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count, 1).indices, True)

    return select
