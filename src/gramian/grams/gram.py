"""A symmetric positive semi-definite second moment, accumulated over a stream."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import psd_rank, psd_root


class Gram:
    """Sum of ``x x^T`` over samples, with their sum and count.

    Products are taken in float32 (or the input's own precision if wider) and added up in float64, whatever the
    input's dtype, under autocast too. Sums are additive: shards, batches and ranks merge to the result of one pass.

    Args:
        size: d.
        kind: "dense" keeps (d, d); "diagonal" keeps (d,).

    Attributes:
        second: (d, d) or (d,) float64, the sum of ``weight * x x^T``.
        first: (d,) float64, the sum of ``weight * x``.
        count: the sum of weights.
    """

    def __init__(self, size: int, kind: str = "dense", device: torch.device | str = "cpu") -> None:
        if kind not in ("dense", "diagonal"):
            raise GramianError(f"Gram: kind {kind!r}; expected 'dense' or 'diagonal'")
        shape = (size, size) if kind == "dense" else (size,)
        self.second = torch.zeros(shape, dtype=torch.float64, device=device)
        self.first = torch.zeros(size, dtype=torch.float64, device=device)
        self.count = 0.0

    @property
    def size(self) -> int:
        """D."""
        return self.first.shape[0]

    @property
    def kind(self) -> str:
        """Either "dense" or "diagonal"."""
        return "dense" if self.second.dim() == 2 else "diagonal"

    def update(self, x: Tensor, weight: Tensor | None = None) -> Self:
        """Add samples.

        Args:
            x: (n, d).
            weight: (n,) non-negative, or None for ones.

        Raises:
            GramianError: wrong width, or NaN or Inf among the samples.
        """
        if x.dim() != 2 or x.shape[1] != self.size:
            raise GramianError(f"Gram.update: x {tuple(x.shape)}; expected (n, {self.size})")
        x = x.detach()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        with torch.autocast(x.device.type, enabled=False):
            weighted = x if weight is None else x * weight.to(x)[:, None]
            second = weighted.mT @ x if self.second.dim() == 2 else (weighted * x).sum(0)
        self.add(second, weighted.sum(0, dtype=torch.float64), len(x) if weight is None else float(weight.sum()))
        return self

    def add(self, second: Tensor, first: Tensor, count: float) -> None:
        """Add a ready sum of products; the place where bad numbers are caught.

        Raises:
            GramianError: NaN or Inf in the sums.
        """
        if not bool(first.isfinite().all()) or not bool(
            second.diagonal().isfinite().all() if second.dim() == 2 else second.isfinite().all()
        ):
            raise GramianError("NaN or Inf among the samples of a Gram; look at the layer's input for overflow")
        self.second += second
        self.first += first
        self.count += count

    def merge(self, other: Gram) -> Self:
        """Add another Gram of the same size and kind.

        Raises:
            GramianError: sizes or kinds differ.
        """
        if other.second.shape != self.second.shape:
            raise GramianError(
                f"Gram.merge: {other.kind} of size {other.size} into {self.kind} of size {self.size}; expected the same"
            )
        self.second += other.second
        self.first += other.first
        self.count += other.count
        return self

    def all_reduce(self) -> Self:
        """Sum over all ranks of the default ``torch.distributed`` group; nothing to do without one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            count = torch.tensor(self.count, dtype=torch.float64, device=self.first.device)
            for tensor in (self.second, self.first, count):
                torch.distributed.all_reduce(tensor)
            self.count = float(count)
        return self

    @property
    def mean(self) -> Tensor:
        """(d,) mean of the samples."""
        return self.first / max(self.count, 1e-300)

    def moment(self) -> Tensor:
        """Mean of ``x x^T``, (d, d) or (d,)."""
        second = self.second / max(self.count, 1e-300)
        return (second + second.mT) / 2 if second.dim() == 2 else second

    def covariance(self) -> Tensor:
        """Mean of ``(x - mean)(x - mean)^T``, (d, d) or (d,)."""
        mean = self.mean
        return self.moment() - (torch.outer(mean, mean) if self.second.dim() == 2 else mean.square())

    def rank(self) -> int:
        """How many input directions the samples have shown: eigenvalues above 1e-6 of the largest, what float32 products
        can tell from rounding.
        """
        return psd_rank(self.moment(), 1e-6)

    def root(self) -> Tensor:
        """Symmetric square root of the second moment."""
        return psd_root(self.moment())[0]

    def inv_root(self) -> Tensor:
        """Pseudo-inverse of ``root()``: directions that were never seen stay zero."""
        return psd_root(self.moment())[1]

    def state(self) -> dict[str, Tensor]:
        """Plain tensors for a file, for ``from_state`` to read back; the live sums, so write them before the next update."""
        return {
            "second": self.second,
            "first": self.first,
            "count": torch.tensor(self.count, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Gram:
        """Inverse of ``state``."""
        gram = cls(state["first"].shape[0], "dense" if state["second"].dim() == 2 else "diagonal")
        gram.second, gram.first, gram.count = state["second"], state["first"], float(state["count"])
        return gram

    def __repr__(self) -> str:
        return f"Gram({self.kind}, size={self.size}, count={self.count:g})"


def shrink(moment: Tensor, amount: float) -> Tensor:
    """``moment + amount * mean(diagonal) * I``: the prior that unseen directions carry a little energy.

    Args:
        moment: (d, d), or (d,) for a diagonal.
        amount: relative, e.g. 1e-3; towards infinity the weighting vanishes.
    """
    if moment.dim() == 1:
        return moment + amount * moment.mean()
    level = amount * moment.diagonal().mean()
    return moment + level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
