"""One report per layer: its spectrum, its tail, its redundancy, and which structure suits it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import eigvalsh
from gramian.ops import BlockLowRank, BlockSparse, Dense, KroneckerSum, Operator, Skeleton
from gramian.spectra.eigenvalues import Spectrum, smaller_gram, spectrum
from gramian.spectra.tail import FEWEST, PowerLaw, farms, fit_power_law

SUITS = ("skeleton", "block_low_rank", "kronecker", "block_sparse")
"""The structures that are tried on every dense layer."""
BLOCKS = 4
"""Blocks along each side of the block low-rank structure that is tried."""
QUERIES = 256
"""Rows whose nearest neighbour is looked for; evenly spaced where a matrix has more."""
_EMBEDDING = re.compile(r"embed|(^|[._])(emb|wte|wpe|shared)([._]|$)|token_type")


@dataclass(frozen=True)
class LayerReport:
    """What is known about one layer without any data.

    Attributes:
        name: of the layer.
        shape: (out, in) as stored.
        kind: "dense", or the structure of an operator.
        parameters: how many numbers are stored.
        embedding: whether its name says that this is a lookup table, whose rows are not neurons.
        spectrum: of the whole matrix.
        power_law: WeightWatcher's fit, with its interval.
        farms: the exponent corrected for aspect ratio; None where the matrix is too small or flat.
        neighbour_cosine: mean over rows of the largest absolute cosine to another row: 1 where every row has a copy. It
            grows with the number of rows, so compare it between layers of one shape. None for a single row.
        suits: relative Frobenius error ``||W - A||_F / ||W||_F`` of the best member A of each structure that stores at
            most `keep` of the numbers; empty for a layer that is structured already. Data-free, hence a hint only:
            ``gramian compress`` weighs errors with Gram matrices, which may well reverse the order.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    parameters: int
    embedding: bool
    spectrum: Spectrum
    power_law: PowerLaw
    farms: float | None
    neighbour_cosine: float | None
    suits: dict[str, float]

    @property
    def redundancy(self) -> float:
        """``1 - effective_rank / min(shape)``: the share of directions that the spectrum does not use."""
        return 1 - self.spectrum.effective_rank / min(self.shape)

    @property
    def best(self) -> str | None:
        """The structure of least error, or None where none was tried."""
        return min(self.suits, key=self.suits.__getitem__, default=None)

    @property
    def alpha(self) -> float | None:
        """The exponent, or None where the fit is not valid."""
        return self.power_law.alpha if self.power_law.valid else None

    @property
    def alpha_weighted(self) -> float | None:
        """``alpha log10(lambda_max)`` (WeightWatcher's ``alpha_weighted``)."""
        return None if self.alpha is None else self.alpha * math.log10(self.spectrum.largest)

    @property
    def log_alpha_norm(self) -> float | None:
        """``log10(sum lambda^alpha)`` (WeightWatcher's ``log_alpha_norm``)."""
        if self.alpha is None:
            return None
        logs = self.spectrum.eigenvalues.log() * self.alpha
        return float(torch.logsumexp(logs, 0)) / math.log(10)  # lambda^alpha itself may overflow

    @property
    def log_norm(self) -> float | None:
        """``log10 ||W||_F^2`` (WeightWatcher's ``log_norm``); None for the zero matrix."""
        return math.log10(self.spectrum.norm) if self.spectrum.norm > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able data; what is refused, missing or infinite is None."""
        values, fit = self.spectrum, self.power_law
        return {
            "name": self.name,
            "shape": list(self.shape),
            "kind": self.kind,
            "parameters": self.parameters,
            "embedding": self.embedding,
            "effective_rank": values.effective_rank,
            "stable_rank": values.stable_rank,
            "matrix_rank": values.matrix_rank,
            "participation_ratio": values.participation_ratio,
            "rank_90": values.rank_at(0.9),
            "rank_99": values.rank_at(0.99),
            "redundancy": self.redundancy,
            "neighbour_cosine": self.neighbour_cosine,
            "norm": values.norm,
            "log_norm": self.log_norm,
            "lambda_max": values.largest,
            "nuclear_norm": values.nuclear_norm,
            "condition": _finite(values.condition),
            "entropy": values.entropy,
            "alpha": self.alpha,
            "alpha_interval": list(fit.interval) if fit.valid and fit.interval else None,
            "alpha_refused": fit.reason or None,
            "alpha_weighted": self.alpha_weighted,
            "log_alpha_norm": self.log_alpha_norm,
            "alpha_farms": self.farms,
            "D": _finite(fit.D),
            "sigma": _finite(fit.sigma),
            "xmin": _finite(fit.xmin),
            "xmax": _finite(fit.xmax),
            "tail": fit.tail,
            "suits": dict(self.suits),
            "best": self.best,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def inspect_layers(
    named: Iterable[tuple[str, Tensor | Operator]], *, keep: float = 0.5, bootstrap: int = 100, seed: int = 0
) -> list[LayerReport]:
    """A report for every matrix, in order; one matrix is looked at at a time, so a lazy source is never held whole.

    Args:
        named: names and matrices (out, in).
        keep: share of the numbers that the tried structures may store.
        bootstrap: samples for the interval of each exponent; 0 for none.
        seed: of the bootstrap.

    Raises:
        GramianError: a matrix is empty, not floating point or not finite; the message names it.
    """
    return [inspect_layer(name, matrix, keep=keep, bootstrap=bootstrap, seed=seed) for name, matrix in named]


def inspect_layer(
    name: str,
    matrix: Tensor | Operator,
    *,
    keep: float = 0.5,
    bootstrap: int = 100,
    seed: int = 0,
) -> LayerReport:
    """The report of one matrix.

    Args:
        name: of the layer.
        matrix: (out, in).
        keep: share of the numbers that the tried structures may store.
        bootstrap: samples for the interval of the exponent; 0 for none.
        seed: of the bootstrap.

    Raises:
        GramianError: the matrix is empty, not floating point or not finite; the message names it.
    """
    op = matrix if isinstance(matrix, Operator) else None
    try:
        values = spectrum(matrix)
    except GramianError as error:
        raise GramianError(f"layer {name!r}: {error}") from None
    with torch.no_grad():
        weight = matrix.detach() if isinstance(matrix, Tensor) else matrix.dense()
        if weight.dtype.itemsize < 4:
            weight = weight.float()
        plain = op is None or isinstance(op, Dense)
        return LayerReport(
            name,
            values.shape,
            "dense" if op is None else op.kind,
            weight.numel() if op is None else op.numel,
            bool(_EMBEDDING.search(name)),
            values,
            fit_power_law(values.eigenvalues, bootstrap=bootstrap, seed=seed),
            _farms(weight),
            neighbour_cosine(weight),
            structure_errors(weight, keep, values) if plain and values.norm > 0 else {},
        )


def _farms(weight: Tensor) -> float | None:
    if min(weight.shape) < FEWEST:
        return None
    try:
        return _finite(farms(weight))
    except GramianError:  # too few non-zero eigenvalues
        return None


def neighbour_cosine(weight: Tensor) -> float | None:
    """How alike the rows of `weight` (out, in) are: the mean, over at most 256 evenly spaced rows, of the largest
    absolute cosine to any other row; None for a single row.
    """
    out = weight.shape[0]
    if out < 2:
        return None
    rows = F.normalize(weight.float(), dim=1)
    chosen = torch.linspace(0, out - 1, min(out, QUERIES)).round().long()
    nearest = []
    for part in torch.tensor_split(chosen, -(-len(chosen) // 64)):
        cosines = (rows[part] @ rows.mT).abs_()
        cosines[torch.arange(len(part)), part] = -1
        nearest.append(cosines.amax(1))
    return float(torch.cat(nearest).clamp(0, 1).mean())


def structure_errors(weight: Tensor, keep: float = 0.5, values: Spectrum | None = None) -> dict[str, float]:
    """Relative Frobenius error of the best member of each structure that stores at most ``keep * out * in`` numbers.

    Each is the Frobenius optimum that the structure's own ``fit`` finds without Grams, but only its error is computed:
    eigenvalues of a small Gram matrix where ``fit`` needs singular vectors. For "kronecker" with sides that do not
    divide it is an upper bound, which counts the error in the padding.

    Args:
        weight: (out, in), not zero.
        keep: in 0..1.
        values: the spectrum of `weight`, if known.

    Returns:
        errors by structure, in the order of ``SUITS``; a structure without a member of that size is left out.
    """
    shape = (weight.shape[0], weight.shape[1])
    values = spectrum(weight) if values is None else values
    lost = {
        "skeleton": [float(values.eigenvalues[size["rank"] :].sum()) for size in Skeleton.sizes(shape, keep)],
        "block_low_rank": [
            _block_rank_loss(weight, size["rank"])
            for size in BlockLowRank.sizes(shape, keep)
            if size["blocks"] == [BLOCKS, BLOCKS]
        ],
        "kronecker": [_kronecker_loss(weight, **size) for size in KroneckerSum.sizes(shape, keep)],
        "block_sparse": [_block_sparse_loss(weight, **size) for size in BlockSparse.sizes(shape, keep)],
    }
    return {kind: math.sqrt(max(min(losses), 0.0) / values.norm) for kind, losses in lost.items() if losses}


def _tiles(weight: Tensor, height: int, width: int) -> Tensor:
    """`weight` padded with zeros and cut into contiguous tiles: a view (R, height, C, width)."""
    out, in_ = weight.shape
    padded = F.pad(weight, (0, -in_ % width, 0, -out % height)) if in_ % width or out % height else weight
    return padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)


def _tail_energy(matrix: Tensor, rank: int) -> float:
    """The squared Frobenius error of the best rank-`rank` approximation of `matrix`."""
    return float(eigvalsh(smaller_gram(matrix)).clamp_min(0)[rank:].sum())


def _block_rank_loss(weight: Tensor, rank: int) -> float:
    height, width = (-(-length // BLOCKS) for length in weight.shape)
    tiles = _tiles(weight, height, width)
    return sum(_tail_energy(tile, rank) for row in tiles for tile in row.unbind(1))


def _kronecker_loss(weight: Tensor, terms: int, left: list[int]) -> float:
    """Van Loan and Pitsianis (1993): the tail of the matrix whose rows are the vectorised blocks."""
    height, width = (-(-length // count) for length, count in zip(weight.shape, left, strict=True))
    tiles = _tiles(weight, height, width).transpose(1, 2)
    return _tail_energy(tiles.reshape(left[0] * left[1], height * width), terms)


def _block_sparse_loss(weight: Tensor, kept: int, block: list[int]) -> float:
    """What is outside the `kept` blocks of largest energy in every block row."""
    energy = _tiles(weight.square(), *block).sum((1, 3)).double()
    return float(energy.sum() - energy.topk(kept, 1).values.sum())
