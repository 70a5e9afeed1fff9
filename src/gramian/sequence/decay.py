"""Products of decays inside chunks, never as a quotient of two: every factor that is formed is at most one.

A Gram matrix ``M[t, j] = sum_d x_td y_jd e^{G_td - G_jd}`` of rows t after columns j needs the decay between the two. With
``G`` a running sum, ``e^{G_t}`` underflows and ``e^{-G_j}`` overflows; here the exponent is a sum over the steps between.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.sequence.transitions import LOWEST

LEAF = 4
"""Channel decays: blocks of so many steps are taken entry by entry."""


def unflatten(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """A view of x with one axis cut in several."""
    cut: Tensor = x.unflatten(axis, sizes)  # type: ignore[no-untyped-call]
    return cut


def make(log_decay: Tensor | None, size: int, every: int, like: Tensor) -> Decay:
    """What the chunks of `size` steps need.

    Args:
        log_decay: (n, N, C, dk or 1), or None.
        size: C.
        every: reads happen at each so many-th step (1 with channel decays).
        like: a tensor of the dtype and device.
    """
    if log_decay is None:
        return Decay(size, every, like)
    log_decay = log_decay.clamp_min(LOWEST)
    return ScalarDecay(log_decay, every) if log_decay.shape[-1] == 1 else ChannelDecay(log_decay)


class Decay:
    """No decay: plain Gram matrices below the diagonal. Its subclasses add factors.

    In every method `reads` says which rows are meant: "after" (the steps where outputs are read, after the step's decay,
    its own column included), "erase" (all steps, after their decay, columns before) or "before" (all steps, before their
    decay, columns before).
    """

    total: Tensor | None = None
    """The decay over a chunk, (n, N, dk or 1, 1)."""

    def __init__(self, size: int, every: int, like: Tensor) -> None:
        t = torch.arange(size, device=like.device)
        self.every = every
        self._keep = {
            "after": (t[every - 1 :: every, None] >= t).to(like.dtype),
            "erase": (t[:, None] > t).to(like.dtype),
        }
        self._keep["before"] = self._keep["erase"]

    def gram(self, x: Tensor, y: Tensor, reads: str) -> Tensor:
        """(n, N, rows, C) of x (n, N, rows, dk) and y (n, N, C, dk)."""
        return (x @ y.mT).mul_(self._factor(reads))

    def gram_backward(
        self, grad: Tensor, x: Tensor, y: Tensor, reads: str, dx: Tensor, dy: Tensor, sign: int = 1
    ) -> None:
        """Add the gradients of x and y, times `sign`, to dx and dy; `grad` is consumed."""
        grad = grad.mul_(self._factor(reads)).flatten(0, 1)
        dx.view(-1, *dx.shape[2:]).baddbmm_(grad, y.conj().flatten(0, 1), alpha=sign)
        dy.view(-1, *dy.shape[2:]).baddbmm_(grad.mT, x.conj().flatten(0, 1), alpha=sign)

    def _factor(self, reads: str) -> Tensor:
        return self._keep[reads]

    def begin(self, x: Tensor, reads: str) -> Tensor:
        """x, decayed from the start of the chunk to the row."""
        return x

    def end(self, y: Tensor) -> Tensor:
        """y, decayed from the column to the end of the chunk."""
        return y


class ScalarDecay(Decay):
    """One decay a step: a matrix of factors for each chunk."""

    def __init__(self, log_decay: Tensor, every: int) -> None:
        size = log_decay.shape[2]
        super().__init__(size, every, log_decay)
        # In float64: a strong decay early in the chunk must not round away weak ones after it.
        sums = log_decay[..., 0].double().cumsum(-1)
        rows = {"after": sums[..., every - 1 :: every], "erase": sums, "before": F.pad(sums[..., :-1], (1, 0))}
        self._rows, self._sums, self._dtype = rows, sums, log_decay.dtype
        self._factors: dict[str, Tensor] = {}
        self._end = (sums[..., -1:] - sums).to(self._dtype).exp_()[..., None]
        self.total = sums[..., -1:, None].to(self._dtype).exp()

    def _factor(self, reads: str) -> Tensor:
        if reads not in self._factors:
            keep = self._keep[reads]
            if reads == "erase" and self.every == 1:
                self._factors[reads] = self._factor("after") * keep
            else:
                rows, columns = self._rows[reads][..., None], self._sums[..., None, :]
                between = keep.new_empty(*columns.shape[:2], *keep.shape)
                torch.sub(rows, columns, out=between)
                # Masked before exp: above the diagonal it would overflow.
                self._factors[reads] = between.masked_fill_(keep == 0, -torch.inf).exp_()
        return self._factors[reads]

    def begin(self, x: Tensor, reads: str) -> Tensor:
        return x * self._rows[reads].to(self._dtype).exp()[..., None]

    def end(self, y: Tensor) -> Tensor:
        return y * self._end


class ChannelDecay(Decay):
    """One decay a step and key channel: halves of halves of the chunk, the later half's rows against the earlier half's
    columns through the decay from the middle, down to blocks of ``LEAF`` steps.
    """

    def __init__(self, log_decay: Tensor) -> None:
        size = log_decay.shape[2]
        self.every = 1
        self.size = size
        self._leaf = min(LEAF, size)
        blocks = unflatten(log_decay, 2, -1, self._leaf)
        # Sums from the start of a block to each step, and from after each step to the block's end: no differences.
        prefix = [blocks[..., 0, :]]
        suffix = [torch.zeros_like(prefix[0])]
        for i in range(1, self._leaf):
            prefix.append(prefix[-1] + blocks[..., i, :])
            suffix.append(suffix[-1] + blocks[..., self._leaf - i, :])
        # For leaf pairs: the decay over the steps after t - distance up to t.
        self._spans = [torch.zeros_like(blocks[..., :1, :])]
        self._spans += [_windows(blocks, distance) for distance in range(1, self._leaf)]
        before, after = torch.stack(prefix, -2), torch.stack(suffix[::-1], -2)
        self._levels: list[tuple[Tensor, Tensor]] = []
        while before.shape[-2] < size:
            self._levels.append((before, after))
            totals = before[..., -1:, :]
            early, late = before[:, :, 0::2], before[:, :, 1::2]
            before = torch.cat((early, late + totals[:, :, 0::2]), -2)
            early, late = after[:, :, 0::2], after[:, :, 1::2]
            after = torch.cat((early + totals[:, :, 1::2], late), -2)
        self._before, self._after = before[:, :, 0], after[:, :, 0]
        self._exps: dict[tuple[int, str], Tensor] = {}
        self.total = self._before[:, :, -1, :, None].exp()

    def _rows(self, level: int, reads: str) -> Tensor:
        """Decays from the middle to the rows of the later halves, (n, N, blocks, half, dk)."""
        key = (level, "before" if reads == "before" else "after")
        if key not in self._exps:
            late = self._levels[level][0][:, :, 1::2]
            if reads == "before":
                late = F.pad(late[..., :-1, :], (0, 0, 1, 0))
            self._exps[key] = late.exp()
        return self._exps[key]

    def _columns(self, level: int) -> Tensor:
        key = (level, "columns")
        if key not in self._exps:
            self._exps[key] = self._levels[level][1][:, :, 0::2].exp()
        return self._exps[key]

    def _near(self, distance: int, reads: str) -> Tensor:
        """Decays between pairs so many steps apart in one leaf, (n, N, leaves, leaf - distance, dk)."""
        key = (-1 - distance, "before" if reads == "before" else "after")
        if key not in self._exps:
            span = self._spans[distance]
            if reads == "before":
                # One step less: over the steps after t - distance up to t - 1.
                span = self._spans[distance - 1][..., : span.shape[-2], :]
            self._exps[key] = span.exp()
        return self._exps[key]

    def _blocks(self, matrix: Tensor, half: int) -> Tensor:
        """View of the blocks (n, N, half, half, pairs) of later halves against earlier ones."""
        cut = unflatten(unflatten(matrix, -1, -1, 2, half), -4, -1, 2, half)
        blocks: Tensor = cut[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)
        return blocks

    def _leaves(self, matrix: Tensor, distance: int) -> Tensor:
        """View of the entries so far below the diagonal inside leaves, (n, N, leaves, leaf - distance)."""
        cut = unflatten(unflatten(matrix, -1, -1, self._leaf), -3, -1, self._leaf)
        leaves: Tensor = cut.diagonal(dim1=2, dim2=4).diagonal(-distance, dim1=2, dim2=3)
        return leaves

    def gram(self, x: Tensor, y: Tensor, reads: str) -> Tensor:
        out = x.new_zeros(*x.shape[:3], self.size)
        for level, (sums, _) in enumerate(self._levels):
            half = sums.shape[-2]
            late = unflatten(x, 2, -1, 2, half)[:, :, :, 1] * self._rows(level, reads)
            early = unflatten(y, 2, -1, 2, half)[:, :, :, 0] * self._columns(level)
            self._blocks(out, half).copy_((late @ early.mT).movedim(2, -1))
        xs, ys = unflatten(x, 2, -1, self._leaf), unflatten(y, 2, -1, self._leaf)
        for distance in range(0 if reads == "after" else 1, self._leaf):
            near = xs[..., distance:, :] * ys[..., : self._leaf - distance, :]
            if distance:
                near = near.mul_(self._near(distance, reads))
            self._leaves(out, distance).copy_(near.sum(-1))
        return out

    def gram_backward(
        self, grad: Tensor, x: Tensor, y: Tensor, reads: str, dx: Tensor, dy: Tensor, sign: int = 1
    ) -> None:
        for level, (sums, _) in enumerate(self._levels):
            half = sums.shape[-2]
            rows, columns = self._rows(level, reads), self._columns(level)
            block = self._blocks(grad, half).movedim(-1, 2).contiguous()
            late = unflatten(x, 2, -1, 2, half)[:, :, :, 1] * rows
            early = unflatten(y, 2, -1, 2, half)[:, :, :, 0] * columns
            unflatten(dx, 2, -1, 2, half)[:, :, :, 1].addcmul_(block @ early.conj(), rows, value=sign)
            unflatten(dy, 2, -1, 2, half)[:, :, :, 0].addcmul_(block.mT @ late.conj(), columns, value=sign)
        xs, ys = unflatten(x, 2, -1, self._leaf), unflatten(y, 2, -1, self._leaf)
        dxs, dys = unflatten(dx, 2, -1, self._leaf), unflatten(dy, 2, -1, self._leaf)
        for distance in range(0 if reads == "after" else 1, self._leaf):
            near = self._leaves(grad, distance)[..., None]
            if distance:
                near = near * self._near(distance, reads)
            dxs[..., distance:, :].addcmul_(near, ys[..., : self._leaf - distance, :].conj(), value=sign)
            dys[..., : self._leaf - distance, :].addcmul_(near, xs[..., distance:, :].conj(), value=sign)

    def begin(self, x: Tensor, reads: str) -> Tensor:
        sums = F.pad(self._before[:, :, :-1], (0, 0, 1, 0)) if reads == "before" else self._before
        return x * sums.exp()

    def end(self, y: Tensor) -> Tensor:
        return y * self._after.exp()


def _windows(blocks: Tensor, distance: int) -> Tensor:
    """Sums over windows of `distance` steps ending at each step from `distance` on: (..., leaf - distance, dk)."""
    length = blocks.shape[-2]
    total = blocks[..., distance:, :]
    for back in range(1, distance):
        total = total + blocks[..., distance - back : length - back, :]
    return total
