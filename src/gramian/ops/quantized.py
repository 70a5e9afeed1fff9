"""Group-wise rounding to a grid of 2 to 8 bits, optionally after a random-sign Hadamard rotation of the input.

    A = Q S,   Q[i, j] = scale[i, j // group] * level[code[i, j]],   S = blockwise Hadamard of random signs, or I

The rotation makes the entries nearly Gaussian, so a grid that is optimal for a Gaussian is nearly optimal for them, and
the rounding error relative to the weight is a constant of the grid (Malinovskii et al. 2024, "Pushing the Limits of
Large Language Model Quantization via the Linearity Theorem", HIGGS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import hadamard_transform, largest_power_of_two, solve
from gramian.ops.bits import pack, unpack
from gramian.ops.dense import Dense, spectral_normal
from gramian.ops.operator import Operator, Size, register

GRIDS = ("uniform", "gaussian")
DAMPING = 1e-2
"""Added to the input Gram's diagonal, relative to its mean, before error feedback."""
BLOCK = 128
"""Columns whose updates are gathered into one matrix product."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class Quantized(Operator):
    """A matrix rounded to a few bits per entry.

    Args:
        codes: (out, ceil(in * bits / 8)) uint8, the grid indices packed bit by bit along the input.
        scales: (out, ceil(in / group)) floating point.
        signs: (rounds ceil(in / 8),) uint8, packed random signs of each round of the rotation; empty for none.
        columns: in.
        bits: 2 to 8.
        group: input channels that share a scale.
        grid: "uniform" (equally spaced levels) or "gaussian" (Lloyd-Max levels of a unit Gaussian).
        rotation: block length of the Hadamard rotation, a power of two that divides in; 1 for none.
    """

    kind: ClassVar[str] = "quantized"
    fittable: ClassVar[bool] = True
    codes: Tensor
    scales: Tensor
    signs: Tensor
    columns: int
    bits: int
    group: int
    grid: str = "gaussian"
    rotation: int = 1

    def __post_init__(self) -> None:
        self._check(
            self.codes.dim() == 2
            and 2 <= self.bits <= 8
            and self.codes.shape[1] == -(-self.columns * self.bits // 8)
            and self.scales.shape == (self.codes.shape[0], -(-self.columns // self.group))
            and self.grid in GRIDS
            and self.columns % self.rotation == 0,
            f"bits 2 to 8, grid in {GRIDS}, rotation that divides {self.columns}, codes (out, in bits / 8), "
            "scales (out, in / group)",
        )
        grid_levels(self.grid, self.bits)  # found once, before any compiled code needs it

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """float32 when the scales are in half precision (their storage format), else the scales' own dtype."""
        return torch.float32 if self.scales.dtype == torch.float16 else self.scales.dtype

    def with_codes(self, codes: Tensor, scales: Tensor) -> Quantized:
        """The same format with other integer codes (out, in) and scales (out, groups), stored in half precision."""
        return self.replace(codes=pack(codes, self.bits), scales=scales.to(self.scales.dtype))

    @property
    def rounds(self) -> int:
        """How often the rotation changes signs and transforms."""
        return len(self.signs) // max(-(-self.columns // 8), 1)

    def rotation_signs(self, dtype: torch.dtype) -> Tensor:
        """(rounds, in) of +-1."""
        return unpack(self.signs.reshape(self.rounds, -(-self.columns // 8)), 1, self.columns).to(dtype) * 2 - 1

    def rotate(self, x: Tensor) -> Tensor:
        """``x S^T``: x (..., in) -> (..., in)."""
        if self.rotation == 1:
            return x
        for signs in self.rotation_signs(x.dtype):
            y = (x * signs).reshape(*x.shape[:-1], self.columns // self.rotation, self.rotation)
            x = hadamard_transform(y).reshape(x.shape)
        return x

    def rounded(self) -> Tensor:
        """Q: the rounded matrix (out, in), in rotated coordinates."""
        codes = unpack(self.codes, self.bits, self.columns)
        levels = grid_levels(self.grid, self.bits).to(self.scales.device, self.dtype)
        values = levels.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)
        return values * _spread(self.scales.to(self.dtype), self.group, self.columns)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(self.rotate(x), self.rounded().to(x.dtype))

    def transpose(self) -> Operator:
        from gramian.ops.combinators import Transpose

        return Transpose(self)

    def dense(self) -> Tensor:
        rounded = self.rounded()
        if self.rotation == 1:
            return rounded
        # A = Q S with S = H D (of the last round first) and H symmetric: rows of Q are Hadamard-transformed, then signed.
        for signs in self.rotation_signs(rounded.dtype).flip(0):
            blocks = rounded.reshape(len(rounded), self.columns // self.rotation, self.rotation)
            rounded = hadamard_transform(blocks).reshape(rounded.shape) * signs
        return rounded

    def runtime(self) -> Operator:
        return Dense(self.dense())

    @property
    def numel(self) -> int:
        """How many weights are stored: one a matrix entry, the scales, and the signs if there are any."""
        return self.shape[0] * self.columns + self.scales.numel() + self.rounds * self.columns

    def flops(self, batch: int = 1) -> int:
        rotation = self.rounds * (self.columns * int(math.log2(self.rotation)) + self.columns)
        return batch * (2 * self.shape[0] * self.columns + rotation)

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        bits: int = 4,
        group: int = 128,
        grid: str = "gaussian",
        rotate: bool = True,
        feedback: bool = True,
        passes: int = 3,
        scaling: str = "best",
        rotation: int = 128,
        rounds: int = 1,
        seed: int = 0,
        **size: Any,
    ) -> Quantized:
        """Round to the grid; with an input Gram, let later columns make up for the errors of earlier ones.

        The error ``tr(D G D^T)`` couples the columns of one row. A first pass rounds column by column and moves each
        column's target by the errors already made (GPTQ, Frantar et al. 2023; the LDLQ of QuIP, Chee et al. 2023).
        Further `passes` are coordinate descent on the same objective: refit every scale (least squares), then visit
        each column again and round it to its best level given all others; the objective never rises. Both work with a
        slightly damped Gram; a row that ends worse than its rounding to nearest in the Gram itself keeps the latter.

        Rows are treated apart, so `gram_out` does not enter. Scales are stored in half precision: entries far below
        1e-4 want rescaling first.

        Args:
            weight: (out, in).
            gram_in: (in, in), its diagonal (in,), or None to round to nearest.
            gram_out: ignored.
            bits: 2 to 8.
            group: input channels that share a scale.
            grid: "uniform" or "gaussian".
            rotate: rotate the input by a random-sign Hadamard transform first.
            feedback: use `gram_in`'s off-diagonal; False rounds to nearest.
            passes: coordinate-descent passes after the first.
            scaling: "best": each group's scale is searched; "rms": it is the root mean square of the group, for which the
                relative error of a Gaussian grid is its constant (``grid_error``).
            rotation: longest block of the rotation: it takes the largest power of two that divides in, up to this.
            rounds: of signs and transform. One turns a row that is a single spike into numbers of one size; two make it nearly
                Gaussian.
            seed: of the random signs.
            size: nothing else.
        """
        if not 2 <= bits <= 8:
            raise GramianError(f"quantized: bits {bits}; expected 2 to 8")
        if grid not in GRIDS:
            raise GramianError(f"quantized: grid {grid!r}; expected one of {GRIDS}")
        if scaling not in ("best", "rms"):
            raise GramianError(f"quantized: scaling {scaling!r}; expected 'best' or 'rms'")
        if rotation < 1 or rotation & (rotation - 1):
            raise GramianError(f"quantized: rotation {rotation}; expected a power of two")
        if rounds < 1:
            raise GramianError(f"quantized: rounds {rounds}; expected at least 1")
        in_ = weight.shape[1]
        group = min(group, max(in_, 1))
        block = min(largest_power_of_two(in_), rotation) if rotate and in_ else 1
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (rounds, in_), generator=generator) if block > 1 else torch.empty(0, in_).long()

        def turn(x: Tensor) -> Tensor:
            for turned in (signs * 2 - 1).to(x):
                x = hadamard_transform((x * turned).reshape(len(x), in_ // block, block)).reshape(x.shape)
            return x

        w = turn(weight.double())
        gram = None
        if gram_in is not None:
            full = torch.diag(gram_in) if gram_in.dim() == 1 else gram_in
            gram = turn(turn(full.double()).mT.contiguous())
        levels = grid_levels(grid, bits).double()
        # A channel that calibration never used still gets a sensible scale.
        importance = None if gram is None else gram.diagonal() + DAMPING * gram.diagonal().mean().clamp_min(1e-30)
        scales = _root_mean_squares(w, group) if scaling == "rms" else _scales(w, levels, group, importance)
        codes = _nearest(w / _spread(scales, group, in_), levels)
        if gram is not None and feedback:
            rounded = _round_with_feedback(w, gram, scales, levels, group, passes)
            errors = [_row_errors(w - levels[c] * _spread(s, group, in_), gram) for c, s in ((codes, scales), rounded)]
            better = (errors[1] < errors[0])[:, None]
            codes, scales = torch.where(better, rounded[0], codes), torch.where(better, rounded[1], scales)
        return cls(
            pack(codes, bits),
            scales.to(torch.float16),
            pack(signs, 1).flatten(),
            in_,
            bits,
            group,
            grid,
            block,
        )

    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Quantized:
        return cls.fit(spectral_normal(shape, generator), **size)

    @classmethod
    def bytes_for(cls, shape: tuple[int, int], bits: int, group: int = 128, rounds: int = 1) -> int:
        """Bytes a member of this size stores: codes, half-precision scales and packed signs."""
        out, in_ = shape
        signs = rounds * -(-in_ // 8) if in_ % 2 == 0 else 0  # an odd length is not rotated
        return out * -(-in_ * bits // 8) + 2 * out * -(-in_ // min(group, max(in_, 1))) + signs

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """Rounding saves bytes, not numbers: every entry keeps a code and the scales come on top, so `keep` must be
        above one.
        """
        out, in_ = shape
        numel = out * in_ + out * -(-in_ // 128) + (in_ if in_ % 2 == 0 else 0)
        return [{"bits": b} for b in range(8, 1, -1)] if numel <= keep * out * in_ else []


_LEVELS: dict[tuple[str, int], list[float]] = {}
"""Grids already found, as plain numbers: a table that compiled code can read as constants."""


def grid_levels(grid: str, bits: int) -> Tensor:
    """The levels (2^bits,) of a grid, ascending float64.

    "uniform": equally spaced in [-1, 1], symmetric about zero. "gaussian": the Lloyd-Max quantiser of a unit Gaussian,
    the fixed point of "boundaries half-way between levels, levels at the mean of their cell".
    """
    if (grid, bits) not in _LEVELS:
        _LEVELS[grid, bits] = _find_levels(grid, bits).tolist()
    return torch.tensor(_LEVELS[grid, bits], dtype=torch.float64)


def _find_levels(grid: str, bits: int) -> Tensor:
    count = 2**bits
    uniform: Tensor = (2 * torch.arange(count, dtype=torch.float64) - (count - 1)) / (count - 1)
    if grid == "uniform":
        return uniform
    cdf = torch.special.ndtr
    # Panter-Dite companding is close to the optimum, so Newton's method on the fixed point converges in a few steps.
    levels: Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count) * math.sqrt(3)
    edge = torch.tensor([40.0], dtype=torch.float64)

    def gap(points: Tensor) -> Tensor:
        bounds = torch.cat([-edge, (points[1:] + points[:-1]) / 2, edge])
        density = torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi)
        mass = cdf(bounds[1:]) - cdf(bounds[:-1])
        # Upper tails by symmetry: 1 - cdf loses all digits there.
        mass = torch.where(bounds[:-1] > 0, cdf(-bounds[:-1]) - cdf(-bounds[1:]), mass)
        return points - (density[:-1] - density[1:]) / mass

    for _ in range(60):
        step = torch.linalg.solve(torch.func.jacrev(gap)(levels), gap(levels))
        # Half of the least spacing: the levels stay in order.
        limit = float((levels[1:] - levels[:-1]).min()) / 2
        levels = levels - step * min(1.0, limit / max(float(step.abs().max()), 1e-300))
        if float(step.abs().max()) < 1e-12:
            break
    return (levels - levels.flip(0)) / 2


def grid_error(grid: str, bits: int, group: int = 0) -> float:
    """Mean squared error of the grid on a unit Gaussian at the best scale: t^2 of the linearity theorem.

    Args:
        grid: its name.
        bits: 2 to 8.
        group: of so many Gaussian numbers divided by their root mean square (``scaling="rms"``), a Gaussian grid at scale
            one: they lie on a sphere, whose tails are shorter, by some 2 % of the error at 128. 0 for a Gaussian.
    """
    levels = grid_levels(grid, bits)
    if group:
        points = torch.linspace(-1, 1, 100_001, dtype=torch.float64)[1:-1] * math.sqrt(group)
        density = ((group - 3) / 2 * torch.log1p(-points.square() / group)).exp()
        return float((density * (points - levels[_nearest(points, levels)]).square()).sum() / density.sum())
    points = torch.special.ndtri((torch.arange(40_001, dtype=torch.float64) + 0.5) / 40_001)
    scales = torch.ones(1) if grid == "gaussian" else torch.linspace(1.0, 5.0, 81)
    return min(float((points - levels[_nearest(points / s, levels)] * s).square().mean()) for s in scales.tolist())


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def _spread(scales: Tensor, group: int, columns: int) -> Tensor:
    return scales.repeat_interleave(group, 1)[:, :columns]


def _grouped(w: Tensor, group: int) -> Tensor:
    out, in_ = w.shape
    groups = -(-in_ // group)
    return F.pad(w, (0, groups * group - in_)).reshape(out, groups, group)


def _root_mean_squares(w: Tensor, group: int) -> Tensor:
    """(out, groups), as half precision holds them."""
    sizes = _grouped(torch.ones_like(w[:1]), group).sum(-1)
    return (_grouped(w, group).square().sum(-1) / sizes).sqrt().half().double().clamp_min(2**-24)


def _scales(w: Tensor, levels: Tensor, group: int, importance: Tensor | None) -> Tensor:
    """The scale (out, groups) of least (importance-weighted) squared error among a fan of candidates."""
    tiles = _grouped(w, group)
    weights = torch.ones_like(tiles) if importance is None else _grouped(importance[None], group).expand_as(tiles)
    top = tiles.abs().amax(-1) / levels[-1]
    best = torch.full_like(top, math.inf)
    found = top.clone()
    candidates = [top * f for f in torch.linspace(0.4, 1.0, 9).tolist()]
    if float(levels[-1]) > 1.0 + 1e-9:  # a Gaussian grid: its natural scale is the standard deviation
        rms = tiles.square().mean(-1).sqrt()
        candidates = [top, *(rms * f for f in torch.linspace(0.85, 1.15, 7).tolist())]
    for scale in candidates:
        scale = scale.half().double()
        safe = scale.clamp_min(1e-30)[..., None]
        error = ((tiles - levels[_nearest(tiles / safe, levels)] * safe).square() * weights).sum(-1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found.half().double().clamp_min(2**-24)


def _round_with_feedback(
    w: Tensor, gram: Tensor, scales: Tensor, levels: Tensor, group: int, passes: int
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales of a small ``tr((W - Q) G (W - Q)^T)``."""
    out, in_ = w.shape
    damp = DAMPING * gram.diagonal().mean().clamp_min(1e-30)
    gram = gram + damp * torch.eye(in_, dtype=gram.dtype, device=gram.device)
    spread = _spread(scales, group, in_)
    # Largest diagonal first: the columns that matter most are rounded while others can still make up for them.
    order = gram.diagonal().argsort(descending=True)
    codes = torch.zeros(out, in_, dtype=torch.int64, device=w.device)
    inverse = torch.linalg.inv(gram[order][:, order])
    feedback = torch.linalg.cholesky(inverse).mT  # upper: row j carries the error of column j forward
    # One column of the weight is one contiguous row of these.
    target = w[:, order].mT.contiguous()
    by_column = spread[:, order].mT.contiguous()
    chosen = torch.zeros(in_, out, dtype=torch.int64, device=w.device)
    for start in range(0, in_, BLOCK):
        stop = min(start + BLOCK, in_)
        errors = torch.zeros(stop - start, out, dtype=w.dtype, device=w.device)
        for j in range(start, stop):
            code = _nearest(target[j] / by_column[j], levels)
            chosen[j] = code
            error = (target[j] - levels[code] * by_column[j]) / feedback[j, j]
            errors[j - start] = error
            target[j + 1 : stop].addr_(feedback[j, j + 1 : stop], error, alpha=-1)
        target[stop:] -= feedback[start:stop, stop:].mT @ errors
    codes[:, order] = chosen.mT
    for _ in range(passes):
        scales = _refit_scales(w, gram, levels[codes], scales, group)
        spread = _spread(scales, group, in_)
        if not _descend(w, gram, codes, spread, levels):
            break
    return codes, _refit_scales(w, gram, levels[codes], scales, group)


def _row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """``diag(D G D^T)`` (out,)."""
    return ((difference @ gram) * difference).sum(1)


def _refit_scales(w: Tensor, gram: Tensor, values: Tensor, scales: Tensor, group: int) -> Tensor:
    """Least-squares scales for fixed codes, rounded to half precision; rows that would not gain keep theirs."""
    in_, groups = w.shape[1], scales.shape[1]
    member = torch.zeros(in_, groups, dtype=w.dtype, device=w.device)
    member[torch.arange(in_), torch.arange(in_) // group] = 1
    parts = _grouped(values, group)
    padded = F.pad(gram, (0, groups * group - in_, 0, groups * group - in_)).reshape(groups, group, groups, group)
    normal = torch.einsum("oag,agbh,obh->oab", parts, padded, parts)
    right = ((w @ gram) * values) @ member
    eye = torch.eye(groups, dtype=w.dtype, device=w.device)
    ridge = 1e-9 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * eye
    fresh = solve(normal + ridge + 1e-30 * eye, right[..., None])[..., 0].half().double()

    def objective(s: Tensor) -> Tensor:
        return torch.einsum("oa,oab,ob->o", s, normal, s) - 2 * (s * right).sum(1)

    better = (objective(fresh) < objective(scales)) & (fresh > 0).all(1) & fresh.isfinite().all(1)
    return torch.where(better[:, None], fresh, scales)


def _descend(w: Tensor, gram: Tensor, codes: Tensor, spread: Tensor, levels: Tensor) -> bool:
    """One pass of coordinate descent over the columns, in place on `codes`; whether any code changed."""
    out, in_ = w.shape
    # One column of the weight is one contiguous row of these.
    chosen, by_column = codes.mT.contiguous(), spread.mT.contiguous()
    pull = gram @ (w.mT - levels[chosen] * by_column)  # (in, out), kept in step block by block
    inverse = 1 / gram.diagonal()
    before = chosen.clone()
    for start in range(0, in_, BLOCK):
        stop = min(start + BLOCK, in_)
        moves = torch.zeros(stop - start, out, dtype=w.dtype, device=w.device)
        local, inner = pull[start:stop].clone(), gram[start:stop, start:stop].contiguous()
        for i, j in enumerate(range(start, stop)):
            old = levels[chosen[j]] * by_column[j]
            code = _nearest((old + local[i] * inverse[j]) / by_column[j], levels)
            move = old - levels[code] * by_column[j]  # change of the residual
            chosen[j] = code
            moves[i] = move
            local[i + 1 :].addr_(inner[i, i + 1 :], move)
        pull += gram[:, start:stop] @ moves
    codes.copy_(chosen.mT)
    return not torch.equal(before, chosen)
