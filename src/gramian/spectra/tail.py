"""Heavy-tail exponents of a spectrum: the power-law fit of WeightWatcher, and its correction for aspect ratio.

An eigenvalue density that falls like ``lambda^-alpha`` above some ``xmin`` is called heavy-tailed; a small alpha means
a heavy tail. The exponent is a description, not a verdict: its level moves with the matrix's aspect ratio (``farms``
takes that out) and with where the tail is cut, so every fit carries its distance to the data and, on request, an
interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import eigvalsh

FLOOR = 1e-5
"""Eigenvalues at or below this count as zero in a fit (WeightWatcher's threshold; absolute, not relative)."""
FEWEST = 50
"""Eigenvalues needed before an exponent is worth stating."""
FARTHEST = 0.2
"""Largest Kolmogorov-Smirnov distance at which the tail is still called a power law."""
STARTS = 48
"""Candidate xmins of each bootstrap sample."""
CHUNK = 1 << 19
"""Entries of the table (xmin, eigenvalue) that are held at a time."""


@dataclass(frozen=True)
class PowerLaw:
    """The fit ``p(x) ~ x^-alpha`` for ``x >= xmin``.

    Attributes:
        alpha: the exponent; nan where nothing could be fitted.
        xmin: where the tail starts, the eigenvalue that gives the least D.
        xmax: the largest eigenvalue.
        D: the Kolmogorov-Smirnov distance of tail and fit, in 0..1.
        sigma: the standard error of alpha at this xmin, ``(alpha - 1) / sqrt(tail)``, for independent eigenvalues.
        tail: how many eigenvalues are at least xmin.
        valid: whether alpha should be quoted at all.
        reason: why not, or an empty string.
        interval: (low, high), the bootstrap confidence interval, if one was asked for.
    """

    alpha: float
    xmin: float
    xmax: float
    D: float
    sigma: float
    tail: int
    valid: bool
    reason: str = ""
    interval: tuple[float, float] | None = None


def fit_power_law(
    eigenvalues: Tensor, *, floor: float = FLOOR, bootstrap: int = 0, level: float = 0.95, seed: int = 0
) -> PowerLaw:
    """Fit a power law to the upper tail (Clauset, Shalizi, Newman 2009): for every eigenvalue as xmin, the maximum
    likelihood exponent ``alpha = 1 + n / sum(ln(x / xmin))``; kept is the xmin whose fit is nearest to the data by
    Kolmogorov-Smirnov distance. The numbers are WeightWatcher 0.7.7's, whose method changes below 20 eigenvalues.

    The bootstrap resamples the eigenvalues and chooses xmin anew, among 48 order statistics. Eigenvalues of a matrix
    repel each other, so they are more regular than independent draws and the interval is, if anything, too wide. An
    alpha outside its own interval rests on an xmin that almost no resampling chooses again.

    Args:
        eigenvalues: (k,) of ``W^T W``, in any order.
        floor: eigenvalues at or below it are left out.
        bootstrap: samples for the interval; 0 for none.
        level: of the interval.
        seed: of the bootstrap.

    Returns:
        The fit; with fewer than 50 eigenvalues above `floor` or a distance above 0.2 it is not ``valid``, and says why.
    """
    values = eigenvalues.detach().flatten().double().cpu()
    values = values[values > floor].sort().values
    count = len(values)
    few = f"{count} eigenvalues above {floor:g}; an exponent needs {FEWEST}" if count < FEWEST else ""
    if count < 3 or bool(values[0] == values[-1]):
        top = float(values[-1]) if count else math.nan
        return PowerLaw(math.nan, math.nan, top, math.nan, math.nan, 0, False, few or "all eigenvalues are equal")
    logs = values.log()
    starts = torch.arange(count - 1)
    alphas, distances = _scan(logs, starts)
    best = int(distances.argmin())
    alpha, distance, tail = float(alphas[best]), float(distances[best]), count - best
    far = f"D {distance:.2f} exceeds {FARTHEST}: the tail is not a power law" if distance > FARTHEST else ""
    interval = None
    if bootstrap and not few:
        generator = torch.Generator().manual_seed(seed)
        # Evenly spaced in the logarithm of the tail's length: a short tail is as likely a choice as a long one.
        lengths = torch.logspace(math.log10(count), math.log10(2), STARTS)
        grid = torch.tensor(sorted({min(count - round(length), count - 2) for length in lengths.tolist()}))
        found = []
        for size in _sizes(bootstrap, max(CHUNK // (count * len(grid)), 1)):
            draws = torch.randint(count, (size, count), generator=generator).sort(-1).values
            sample_alphas, sample_distances = _scan(logs[draws], grid)
            found.append(sample_alphas.gather(-1, sample_distances.argmin(-1, keepdim=True)).flatten())
        outside = (1 - level) / 2
        low, high = torch.cat(found).quantile(torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
        interval = (low, high)
    return PowerLaw(
        alpha,
        float(values[best]),
        float(values[-1]),
        distance,
        (alpha - 1) / math.sqrt(tail),
        tail,
        not few and not far,
        few or far,
        interval,
    )


def _sizes(total: int, most: int) -> list[int]:
    return [min(most, total - done) for done in range(0, total, most)]


def _scan(logs: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent and Kolmogorov-Smirnov distance of the tail from each start.

    Args:
        logs: (..., N) ascending logarithms.
        starts: (G,) ascending indices below N - 1.

    Returns:
        alphas and distances, (..., G); a start whose tail is constant has distance 1.
    """
    count = logs.shape[-1]
    sizes = (count - starts).double()
    suffix = logs.flip(-1).cumsum(-1).flip(-1)
    alphas = 1 + sizes / (suffix[..., starts] - sizes * logs[..., starts])
    distances = torch.ones_like(alphas)
    block = max(CHUNK // (logs.numel()), 1)
    for begin in range(0, len(starts), block):
        part = starts[begin : begin + block]
        first = int(part[0])  # nothing below the block's first start takes part
        places = torch.arange(first, count)
        exponents = logs[..., None, first:] - logs[..., part, None]
        exponents *= 1 - alphas[..., begin : begin + block, None]
        beyond = (places - part[:, None]).double()
        # 1 - survival of the fit - share of the tail below x
        gap = exponents.exp_().neg_().add_(1).sub_(beyond / sizes[begin : begin + block, None]).abs_()
        distances[..., begin : begin + block] = gap.masked_fill_(beyond < 0, 0).amax(-1)
    return alphas, torch.where((alphas > 1) & alphas.isfinite(), distances, torch.ones_like(distances))


def hill(values: Tensor) -> float:
    """Hill's estimate of the exponent on the upper half of positive values (n,): with the median x_i as xmin and k
    values from it upwards, ``alpha = 1 + k / sum(ln(x_j / x_i))``; infinite where they are all equal.
    """
    logs = values.double().sort().values.log()
    upper = logs[len(logs) // 2 :]
    spread = float((upper - upper[0]).sum())
    return 1 + len(upper) / spread if spread > 0 else math.inf


def farms(weight: Tensor, windows: int = 4, aspect: float = 1.0, size: int = 128) -> float:
    """The heavy-tail exponent free of aspect-ratio bias: Hill's estimate on the pooled eigenvalues of windows of one
    fixed aspect ratio (Hu et al. 2025, "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias", FARMS).

    A long Gaussian matrix has a narrow spectrum, hence a large exponent, whatever it has learned; windows of one shape
    make layers of different shapes comparable. The level differs from a fit to the whole matrix: compare it between
    layers, not with the folklore of 2 to 6.

    Windows start evenly spaced along both sides, at most `windows` a side and no more than tile it, so that they
    overlap only where the side is not a multiple.

    Args:
        weight: (out, in).
        windows: at most this many window starts along each side.
        aspect: columns over rows of a window.
        size: rows of a window; smaller where the matrix is. The cap bounds the cost, and pooling makes up for it.

    Raises:
        GramianError: not a matrix, a window count or aspect that is not positive, or fewer than 50 non-zero eigenvalues
            in all windows together.
    """
    if weight.dim() != 2 or windows < 1 or not aspect > 0:
        raise GramianError(
            f"farms: weight {tuple(weight.shape)}, windows {windows}, aspect {aspect}; "
            "expected a matrix, at least one window and a positive aspect"
        )
    out, in_ = weight.shape
    rows = min(size, out, int(in_ / aspect))
    columns = min(int(rows * aspect), in_)
    pooled = torch.empty(0, dtype=torch.float64)
    if rows and columns:
        tiles = torch.stack(
            [
                weight.detach()[top : top + rows, left : left + columns]
                for top in _starts(out, rows, windows)
                for left in _starts(in_, columns, windows)
            ]
        ).double()
        gram = tiles @ tiles.mT if rows <= columns else tiles.mT @ tiles
        pooled = eigvalsh(gram).flatten().cpu()
        # Rounding leaves a Gram's zero eigenvalues at some 1e-16 of the largest.
        pooled = pooled[pooled > 1e-14 * pooled.max()]
    if len(pooled) < FEWEST:
        raise GramianError(
            f"farms: {len(pooled)} non-zero eigenvalues in windows of {rows} x {columns} of a {out} x {in_} matrix; "
            f"expected at least {FEWEST}; an exponent of so small a matrix means nothing"
        )
    return hill(pooled)


def _starts(length: int, window: int, most: int) -> list[int]:
    count = min(most, -(-length // window))
    return [(length - window) * i // max(count - 1, 1) for i in range(count)]
