"""Learned intervals: a search for the structure of a matrix by gradient descent.

Generalized block-low-rank matrices (Lee, Kim 2024, "Differentiable Learning of Generalized Structured Matrices for
Efficient Deep Neural Networks") are sums of rank-one terms, each alive on an interval of rows and an interval of columns
only: full intervals are low rank, equal ones block-sparse or block low-rank. Where the intervals lie is learned: an
interval's mask is differentiable in its width and location through its Fourier coefficients, smoothed by a Gaussian
that fades (the Gaussian-Dirichlet mask), and a proximal step shrinks the widths to a budget.

From the paper: the structure, the mask, annealing, the proximal step, full-width SVD terms as the start. Ours: the
objective is the Gram-weighted error of one matrix, not a training loss; the shrinkage of a step is the one that meets a
falling budget; and the terms do not run as they are (irregular intervals have no fast product) but are frozen to whole
numbers and gathered into a few blocks, whose ranks are then chosen and fitted anew. What comes out is a sum of
low-rank matrices between selections, made of operators that exist.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.fitting.multilinear import polish
from gramian.linalg import psd_solve, reduced_rank, weigh, weighted_error
from gramian.ops import BlockLowRank, Operator, Product, Selection, Sum

SIGMAS = (1.0, 100.0)
"""The Gaussian's width in frequencies at the start and at the end of the search (log-linear between)."""

WASTE = 1.1
"""Rectangles whose common cover costs at most this many times their own numbers become one in any case."""


class Intervals(NamedTuple):
    """Cyclic intervals on an axis of `length` places, one a term.

    Attributes:
        start: (K,) integers in 0 .. length - 1.
        width: (K,) integers in 0 .. length; interval k holds start, start + 1, ... (width of them), modulo length.
        length: of the axis.
    """

    start: Tensor
    width: Tensor
    length: int

    def places(self, k: int) -> Tensor:
        """The places (width,) of interval k, ascending."""
        start, width = int(self.start[k]), int(self.width[k])
        return (torch.arange(start, start + width) % self.length).sort().values

    def kept(self, chosen: Tensor) -> Intervals:
        """Those of `chosen`, a mask or indices."""
        return Intervals(self.start[chosen], self.width[chosen], self.length)


def interval_mask(width: Tensor, location: Tensor, length: int, sigma: float = math.inf) -> Tensor:
    """The Gaussian-Dirichlet mask of cyclic intervals, differentiable in width and location.

    The Fourier coefficients of the indicator of {l, ..., l + w - 1} are
    ``exp(-i pi f (2 l + w - 1) / n) sin(pi f w / n) / sin(pi f / n)``, defined for real l and w too; here they are damped
    by ``exp(-f^2 / 2 sigma^2)``.

    Args:
        width: (...,) w, from 0 to n.
        location: (...,) l.
        length: n.
        sigma: in frequencies; infinity for no damping.

    Returns:
        (..., n); for whole numbers and without damping exactly 0 or 1.
    """
    n = length
    f = torch.arange(1, n // 2 + 1, dtype=width.dtype, device=width.device)
    w, place = width[..., None], location[..., None]
    size = torch.sin(math.pi * f * w / n) / torch.sin(math.pi * f / n)
    if math.isfinite(sigma):
        size = size * torch.exp(-(f**2) / (2 * sigma**2))
    angle = math.pi * f * (2 * place + w - 1) / n
    cosine, sine = torch.cat([w, size * angle.cos()], -1), torch.cat([torch.zeros_like(w), size * angle.sin()], -1)
    mask: Tensor = torch.fft.irfft(torch.complex(cosine, -sine), n=n).abs()
    return mask


def learn_intervals(
    weight: Tensor,
    budget: int,
    *,
    gram_in: Tensor | None = None,
    gram_out: Tensor | None = None,
    terms: int | None = None,
    steps: int = 300,
    rate: float = 0.05,
) -> tuple[Intervals, Intervals]:
    """Search the intervals of rank-one terms that suit a matrix under a budget of numbers.

    Args:
        weight: (out, in).
        budget: the sum of all widths, of rows and of columns, at the end.
        gram_in: (in, in), its diagonal (in,), or None.
        gram_out: (out, out), its diagonal (out,), or None.
        terms: K at the start; by default twice what the budget buys at full width.
        steps: of Adam. Two thirds of them shrink the widths to the budget, the rest settle there.
        rate: of Adam for a width or location as a share of its axis, and for factors relative to their size.

    Returns:
        The intervals of rows and of columns, each (K',) with K' <= K: terms that shrank to nothing are gone.

    Raises:
        GramianError: the budget is below one row and one column entry.
    """
    out, in_ = weight.shape
    if budget < 2:
        raise GramianError(f"learn_intervals: budget {budget}; expected at least 2")
    w = weight.float()
    g, h = (None if gram is None else gram.to(w) / gram.abs().max().clamp_min(1e-30) for gram in (gram_in, gram_out))
    k = max(1, min(terms or 2 * -(-budget // (out + in_)), out, in_))
    best = reduced_rank(weight, gram_in, gram_out)
    size = best.right[:k].norm(dim=1).clamp_min(1e-30).sqrt()
    scale = float(size.mean())
    left = (best.left[:, :k] * size).mT.float() / scale  # (K, out)
    right = (best.right[:k] / size[:, None]).float() / scale
    # All in units of their axis, so that one rate suits all: rows' widths, columns' widths, then both locations.
    widths, locations = torch.ones(2, k, device=w.device), torch.zeros(2, k, device=w.device)
    parameters = [tensor.requires_grad_() for tensor in (left, right, widths, locations)]
    left, right, widths, locations = parameters
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
    lengths = torch.tensor([[float(out)], [float(in_)]], device=w.device)
    total = float(weighted_error(w, g, h)) or 1.0
    for step in range(steps):
        done = step / max(steps - 1, 1)
        sigma = SIGMAS[0] * (SIGMAS[1] / SIGMAS[0]) ** done
        optimizer.param_groups[0]["lr"] = rate * (1 - 0.9 * done)
        optimizer.zero_grad()
        with torch.enable_grad():
            first = _terms(left, widths[0] * out, locations[0] * out, sigma)
            second = _terms(right, widths[1] * in_, locations[1] * in_, sigma)
            error = w - scale**2 * first.mT @ second
            loss = (weigh(error, h, side="out") * weigh(error, g, side="in")).sum() / total
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            full = float((out + in_) * k)
            allowed = budget + max(0.0, 1 - 1.5 * done) * max(full - budget, 0.0)
            widths.copy_(_shrunk(widths, lengths, allowed))
    with torch.no_grad():
        width = (widths * lengths).round().long()
        start = (locations * lengths).round().long()
    found = [Intervals(start[i].cpu() % n, width[i].clamp(0, n).cpu(), n) for i, n in enumerate((out, in_))]
    alive = (found[0].width > 0) & (found[1].width > 0)
    return found[0].kept(alive), found[1].kept(alive)


def _terms(vectors: Tensor, width: Tensor, location: Tensor, sigma: float) -> Tensor:
    return vectors * interval_mask(width, location, vectors.shape[1], sigma)


def _shrunk(widths: Tensor, lengths: Tensor, allowed: float) -> Tensor:
    """The proximal step of the total width: every width less by the same number of places, cut to 0 .. 1, so that at
    most `allowed` places remain.
    """

    def left(less: float) -> Tensor:
        return (widths - less / lengths).clamp(0, 1)

    low, high = 0.0, 2 * float(lengths.max())
    if float((left(low) * lengths).sum()) <= allowed:
        return left(low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float((left(middle) * lengths).sum()) > allowed else (low, middle)
    return left(high)


def interval_blocks(
    weight: Tensor,
    budget: int,
    *,
    gram_in: Tensor | None = None,
    gram_out: Tensor | None = None,
    blocks: int = 6,
    terms: int | None = None,
    steps: int = 300,
    sweeps: int = 12,
) -> Operator:
    """Learn where a matrix has its energy, and emit a structure of at most `budget` numbers that runs.

    The learned intervals (``learn_intervals``) are gathered into at most `blocks` rectangles, the most alike first;
    the whole matrix is one more. Each rectangle holds a low-rank matrix. In turn, ranks are bought one at a time, each
    time the one that lowers the error most for its numbers; each rectangle is refitted exactly given the others; and
    its sides are moved to the interval that is worth most at the going price of a number. ``fitting.polish`` ends it.
    Plain low rank at the same budget competes: the result is never worse.

    Args:
        weight: (out, in).
        budget: numbers that the operator may store, indices of the rectangles included.
        gram_in: (in, in), its diagonal (in,), or None.
        gram_out: (out, out), its diagonal (out,), or None.
        blocks: most rectangles besides the whole matrix; each is two small products and two gathers at run time.
        terms: of the search.
        steps: of the search.
        sweeps: of choosing ranks, refitting and moving sides.

    Returns:
        A ``Sum`` of low-rank matrices, each between ``Selection`` operators where it is not the whole matrix (one alone
        without the Sum), in the weight's dtype.

    Raises:
        GramianError: the budget is below rank one, out + in.
    """
    out, in_ = weight.shape
    if budget < out + in_:
        raise GramianError(f"interval_blocks: budget {budget}; expected at least out + in = {out + in_}")
    w = weight.double()
    g, h = (None if gram is None else gram.to(w) for gram in (gram_in, gram_out))
    best = reduced_rank(w, g, h)
    r = min(budget // (out + in_), out, in_)
    found: Operator = BlockLowRank.low_rank(best.left[:, :r], best.right[:r])
    rows, columns = learn_intervals(weight, budget, gram_in=g, gram_out=h, terms=terms, steps=steps)
    rectangles = [
        (i.to(w.device), j.to(w.device))
        for i, j in zip(*_gather(rows, columns, blocks), strict=True)
        if len(i) * len(j) < out * in_  # the whole matrix is there anyway
    ]
    if rectangles:
        whole = (torch.arange(out, device=w.device), torch.arange(in_, device=w.device))
        searched = _Rectangles(w, g, h, [whole, *rectangles]).fit(budget, sweeps)
        searched = polish(searched, w, g, h)
        if _error(w, searched, g, h) < _error(w, found, g, h):
            found = searched
    return found.to(dtype=weight.dtype)


def _error(w: Tensor, op: Operator, g: Tensor | None, h: Tensor | None) -> float:
    return float(weighted_error(w - op.dense(), g, h))


def _gather(rows: Intervals, columns: Intervals, blocks: int) -> tuple[list[Tensor], list[Tensor]]:
    """At most `blocks` rectangles that cover the terms' own, as places of rows and of columns: again and again the two
    whose common cover is the least larger than their own become one, farther while it is hardly larger.
    """
    start = torch.stack([rows.start, columns.start]).double()  # (2, K)
    width = torch.stack([rows.width, columns.width]).double()
    length = torch.tensor([[rows.length], [columns.length]], dtype=torch.float64)
    count = torch.ones(start.shape[1], dtype=torch.float64)
    while start.shape[1] > 1:
        # The shorter of the two arcs that cover a pair: from one's start or from the other's.
        ahead = (start[:, None, :] - start[:, :, None]) % length[..., None]  # (2, K, K)
        forward = torch.maximum(width[:, :, None], ahead + width[:, None, :])
        backward = forward.mT
        cover = torch.minimum(torch.minimum(forward, backward), length[..., None])
        both = count[:, None] + count
        numbers = count * width.sum(0)
        waste = both * cover.sum(0) / (numbers[:, None] + numbers)  # 1 for equal intervals
        waste.fill_diagonal_(math.inf)
        a, b = divmod(int(waste.argmin()), len(count))
        if len(count) <= blocks and float(waste[a, b]) > WASTE:
            break
        start[:, a] = torch.where(forward[:, a, b] <= backward[:, a, b], start[:, a], start[:, b])
        width[:, a], count[a] = cover[:, a, b], both[a, b]
        rest = torch.arange(len(count)) != b
        start, width, count = start[:, rest], width[:, rest], count[rest]
    merged = [Intervals(start[i].long(), width[i].long(), n) for i, n in enumerate((rows.length, columns.length))]
    rows_of, columns_of = ([side.places(k) for k in range(len(count))] for side in merged)
    return rows_of, columns_of


class _Rectangles:
    """Low-rank matrices on given rectangles of one matrix, with ranks to be chosen."""

    def __init__(self, w: Tensor, g: Tensor | None, h: Tensor | None, rectangles: list[tuple[Tensor, Tensor]]) -> None:
        self.w, self.g, self.h = w, g, h
        self.rectangles = rectangles
        self.pairs = [(w.new_zeros(len(i), 0), w.new_zeros(0, len(j))) for i, j in rectangles]

    def price(self, k: int) -> tuple[int, int]:
        """(numbers for a rectangle's places, numbers for each rank)."""
        sides = [len(places) for places in self.rectangles[k]]
        return sum(s for s, n in zip(sides, self.w.shape, strict=True) if s < n), sum(sides)

    def target(self, k: int, error: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What rectangle k would hold if its rank were free, given the others, and the Grams that measure it there:
        ``A_k + H_II^{-1} (H E G)_IJ G_JJ^{-1}``.
        """
        i, j = self.rectangles[k]
        step = error[i]
        g, h = self.g, self.h
        if h is not None:
            h = h[i] if h.dim() == 1 else h[i][:, i]
            if h.dim() == 2 and self.h is not None:
                step = psd_solve(h, self.h[i] @ error)
        if g is None or g.dim() == 1:
            return self.matrix(k) + step[:, j], None if g is None else g[j], h
        inner = g[j][:, j]
        return self.matrix(k) + psd_solve(inner, (step @ g[:, j]).mT).mT, inner, h

    def matrix(self, k: int) -> Tensor:
        left, right = self.pairs[k]
        return left @ right

    def fit(self, budget: int, sweeps: int) -> Operator:
        """Buy ranks, refit and move sides, in turn; the best that was within the budget."""
        error = self.w.clone()
        best, lowest = self.operator(), math.inf
        for sweep in range(sweeps):
            # The whole matrix, which is the first, waits: it would take what rectangles explain better once they settle.
            competing = range(sweep < sweeps // 3, len(self.rectangles))
            ranks, price = self._ranks(budget, error, competing)
            for k in range(len(self.rectangles)):
                error = self._refit(k, ranks[k], error)
            now = float(weighted_error(error, self.g, self.h))
            if now < lowest:
                best, lowest = self.operator(), now
            for k in range(1, len(self.rectangles)):
                if ranks[k]:
                    error = self._move(k, price, error)
        return best

    def _move(self, k: int, price: float, error: Tensor) -> Tensor:
        """Give rectangle k the interval of rows that is worth most for its columns' factor, then likewise of columns.

        With the columns' factor fixed, a row's best entries lower the error by an amount of its own (where the output
        Gram does not couple rows; its diagonal stands in where it does), and cost rank + 1 numbers: the best interval is
        the one of largest sum of worth less cost.
        """
        i, j = self.rectangles[k]
        rest = error.clone()
        rest[i[:, None], j] += self.matrix(k)
        left, right = self.pairs[k]
        i, left = _best_side(rest, right, j, self.g, self.h, price)
        j, right = _best_side(rest.mT, left.mT, i, self.h, self.g, price)
        self.rectangles[k], self.pairs[k] = (i, j), (left, right.mT)
        rest[i[:, None], j] -= self.matrix(k)
        return rest

    def _refit(self, k: int, rank: int, error: Tensor) -> Tensor:
        i, j = self.rectangles[k]
        before = self.matrix(k)
        best = reduced_rank(*self.target(k, error))
        self.pairs[k] = best.left[:, :rank], best.right[:rank]
        error = error.clone()
        error[i[:, None], j] += before - self.matrix(k)
        return error

    def _ranks(self, budget: int, error: Tensor, competing: range) -> tuple[list[int], float]:
        """A rank for each rectangle, 0 for those not competing, by what it lowers the rectangle's error for its numbers, the
        others as they are; and the least that was paid for: error a number. A rectangle's places are paid with its first
        rank.
        """
        gains = []
        for k in range(len(self.rectangles)):
            errors = reduced_rank(*self.target(k, error)).errors
            gains.append(errors[:-1] - errors[1:])
        ranks, spent, paid = [0] * len(gains), 0, math.inf
        while True:
            offers = []
            for k in competing:
                gain = gains[k]
                places, each = self.price(k)
                # Several ranks at once, as many as are worth most together: the first bears the price of the places.
                most = min(len(gain) - ranks[k], (budget - spent - (0 if ranks[k] else places)) // each)
                if most > 0:
                    counts = torch.arange(1, most + 1)
                    prices = counts * each + (0 if ranks[k] else places)
                    worth = gain[ranks[k] :][:most].cumsum(0) / prices.to(gain)
                    t = int(worth.argmax())
                    if float(worth[t]) > 0:
                        offers.append((float(worth[t]), k, t + 1, int(prices[t])))
            if not offers:
                return ranks, paid if math.isfinite(paid) else 0.0
            worth_of, k, count, price = max(offers)
            paid = min(paid, worth_of)
            ranks[k] += count
            spent += price

    def operator(self) -> Operator:
        """The sum of what has a rank."""
        (out, in_), parts = self.w.shape, []
        for (i, j), (left, right) in zip(self.rectangles, self.pairs, strict=True):
            if not left.shape[1]:
                continue
            chain: list[Operator] = [BlockLowRank.low_rank(left, right)]
            if len(i) < out:
                chain.insert(0, Selection(i.to(torch.int32), out, scatter=True))
            if len(j) < in_:
                chain.append(Selection(j.to(torch.int32), in_))
            parts.append(chain[0] if len(chain) == 1 else Product(tuple(chain)))
        if not parts:
            return BlockLowRank.low_rank(self.w.new_zeros(out, 1), self.w.new_zeros(1, in_))
        return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def _best_side(
    rest: Tensor, right: Tensor, j: Tensor, g: Tensor | None, h: Tensor | None, price: float
) -> tuple[Tensor, Tensor]:
    """The rows on which `right` (r, |J|), on columns `j`, is worth its numbers, and its left factor there (|I|, r).

    Args:
        rest: (m, n), what the rectangle is to fit.
        right: its factor.
        j: places of the factor's columns.
        g: the Gram that couples columns, or None.
        h: the Gram of the rows, or None.
        price: error a number.
    """
    if g is None or g.dim() == 1:
        inner = right if g is None else right * g[j]
        slope = rest[:, j] @ inner.mT
        system = inner @ right.mT
    else:
        slope = rest @ (g[:, j] @ right.mT)
        system = right @ g[j][:, j] @ right.mT
    left = psd_solve(system, slope.mT).mT  # (m, r)
    worth = (left * slope).sum(1)
    if h is not None:
        worth = worth * (h if h.dim() == 1 else h.diagonal())
    start, width = _best_arc(worth - price * (right.shape[0] + 1))
    places = (torch.arange(start, start + width, device=rest.device) % len(rest)).sort().values
    return places, left[places]


def _best_arc(values: Tensor) -> tuple[int, int]:
    """Start and width (at least 1) of the cyclic interval of `values` (n,) with the largest sum."""
    n = len(values)

    def best(values: Tensor) -> tuple[float, int, int]:
        sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
        lowest, where = sums[:-1].cummin(0)
        end = int((sums[1:] - lowest).argmax())
        return float(sums[end + 1] - lowest[end]), int(where[end]), end + 1 - int(where[end])

    inside, start, width = best(values)
    outside, gap, gap_width = best(-values)
    if float(values.sum()) + outside > inside and gap_width < n:
        return (gap + gap_width) % n, n - gap_width
    return start, width
