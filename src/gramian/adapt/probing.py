"""A head on frozen features that reads their second moments as well as their mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError


class MomentProbe(nn.Module):
    """Moment probing (2023, "Tuning pre-trained model via moment probing"): the mean of a linear reading of the mean
    token and one of the cross-covariances between neighbouring heads of the tokens.

    Tokens are reduced to heads of `size` numbers, each normalised; the covariance (size, size) of each head with the
    next over the tokens is l2-normalised, shrunk by two 3 x 3 convolutions of stride 2, and read.

    Args:
        features: width of a token.
        classes: outputs.
        heads: at least 2.
        size: of a head, at least 7.

    Raises:
        GramianError: too few or too small heads.
    """

    def __init__(self, features: int, classes: int, *, heads: int = 4, size: int = 128) -> None:
        super().__init__()
        if heads < 2 or size < 7:
            raise GramianError(f"MomentProbe: {heads} heads of {size}; expected at least 2 of at least 7")
        self.heads, self.size = heads, size
        self.reduce = nn.Linear(features, heads * size)
        self.norm = nn.LayerNorm(size)
        self.shrink = nn.Sequential(
            nn.Conv2d(heads - 1, heads - 1, 3, stride=2), nn.GELU(), nn.Conv2d(heads - 1, heads - 1, 3, stride=2)
        )
        side = ((size - 3) // 2 + 1 - 3) // 2 + 1
        self.second = nn.Linear((heads - 1) * side * side, classes)
        self.first = nn.Linear(features, classes)

    def moments(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-covariances (batch, heads - 1, size, size) of tokens (batch, tokens, features), of unit norm.

        Args:
            tokens: (batch, tokens, features).
            mask: (batch, tokens), non-zero at real tokens.
        """
        z = self.norm(self.reduce(tokens).unflatten(-1, (self.heads, self.size)))  # (b, t, h, s)
        weight = torch.ones_like(tokens[..., 0]) if mask is None else mask.to(tokens)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        mean = torch.einsum("bt,bths->bhs", weight, z)
        centred = z - mean[:, None]
        covariance = torch.einsum("bt,bthi,bthj->bhij", weight, centred[:, :, :-1], centred[:, :, 1:])
        unit: Tensor = F.normalize(covariance.flatten(1), dim=1).view_as(covariance)
        return unit

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, tokens, features) -> (batch, classes)."""
        weight = torch.ones_like(tokens[..., 0]) if mask is None else mask.to(tokens)
        mean = (weight[..., None] * tokens).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)
        read: Tensor = self.second(self.shrink(self.moments(tokens, mask)).flatten(1))
        plain: Tensor = self.first(mean)
        return (read + plain) / 2
