"""How much the model's output suffers from noise in one layer: the coefficients of the linearity theorem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.models.walk import weight_of
from gramian.models.workload import Batch, Workload
from gramian.modes import evaluating

LEVELS = (0.1, 0.2)
"""Relative sizes ``||D||_F / ||W||_F`` of the noise."""
SEQUENCES = 32
"""At most so many calibration sequences are used."""


@torch.no_grad()
def measure(
    model: nn.Module,
    workload: Workload,
    names: Sequence[str],
    *,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """alpha_l of ``loss(W + D) - loss(W) ~ sum_l alpha_l t_l^2``, ``t_l = ||D_l||_F / ||W_l||_F`` (the linearity theorem,
    Malinovskii et al. 2024, theorem 1 and section 4): Gaussian noise of a few sizes in one layer at a time, and a line
    through the origin fitted to what it does.

    The loss is the Kullback-Leibler divergence from the model's own predictions where it has token logits, else the
    relative squared error of its features.

    Args:
        model: left as it was.
        workload: its first `SEQUENCES` sequences are run, once for each layer and level.
        names: linear layers.
        levels: of t.
        seed: of the noise.
        progress: called with the number of finished layers.

    Returns:
        By name, at least 1e-12.

    Raises:
        GramianError: the loss became NaN or Inf (the layer is named).
    """
    with evaluating(model):
        distance = Distance(model, workload)
        alphas: dict[str, float] = {}
        for index, name in enumerate(names):
            weight = weight_of(model.get_submodule(name))
            kept = weight.clone()
            generator = torch.Generator().manual_seed(seed * 104729 + index)
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            noise *= kept.norm() / noise.norm().clamp_min(1e-30)
            rises = []
            try:
                for level in levels:
                    weight.copy_(kept + level * noise)
                    rises.append(distance(model))
            finally:
                weight.copy_(kept)
            if not all(math.isfinite(rise) for rise in rises):
                raise GramianError(f"layer {name}: noise of {max(levels):g} of its norm made the loss {max(rises)}")
            above = sum(level**2 * rise for level, rise in zip(levels, rises, strict=True))
            alphas[name] = max(above / sum(level**4 for level in levels), 1e-12)
            if progress is not None:
                progress(index + 1)
    return alphas


class Distance:
    """How far a changed model is from the original: mean Kullback-Leibler divergence of its predictions where there are token
    logits, else mean relative squared error of its features.

    Args:
        model: the original, whose answers are kept.
        workload: its first sequences are run.
        sequences: at most so many.
    """

    def __init__(self, model: nn.Module, workload: Workload, sequences: int = SEQUENCES) -> None:
        self.workload = workload
        parts = workload.parts(min(16, sequences))
        self.batches = parts[: max(1, sequences // 16)]
        with torch.no_grad():
            self.wanted = [self._answer(model, batch) for batch in self.batches]

    def _answer(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.workload.logits is None:
            return self.workload.features(model, batch).float()
        logits, mask = self.workload.logits(model, batch).float(), self.workload.mask(batch)
        return logits.reshape(-1, logits.shape[-1]) if mask is None else logits[mask.bool()]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """That of `model`, in the mode it is in."""
        parts = []
        for batch, before in zip(self.batches, self.wanted, strict=True):
            after = self._answer(model, batch)
            if self.workload.logits is None:
                part = (after - before).square().sum(1) / before.square().sum(1).clamp_min(1e-30)
            else:
                logs = after.log_softmax(-1), before.log_softmax(-1)
                part = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
            parts.append(part)
        return float(torch.cat(parts).double().mean())


__all__ = ["Distance", "measure"]
