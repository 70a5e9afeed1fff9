"""Coordinates of tokens that a factored embedding has not seen."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError


def new_rows(
    coordinates: Tensor, known: Tensor, new: Tensor, *, neighbours: int = 10, temperature: float = 0.1
) -> Tensor:
    """Rows of F for new tokens of a table F P, from vectors that know both vocabularies (OFA, Liu et al. 2024, eq. 3).

    A new token's row is the mean of its nearest known tokens' rows, weighted by ``softmax(cosine / temperature)``.

    Args:
        coordinates: F, (rows, r).
        known: (rows, d) external vectors of the same tokens.
        new: (n, d) external vectors of the new ones.
        neighbours: how many known tokens a mean takes, at most.
        temperature: of the softmax.

    Returns:
        (n, r).

    Raises:
        GramianError: shapes that do not fit.
    """
    if known.shape[0] != coordinates.shape[0] or known.shape[-1] != new.shape[-1]:
        raise GramianError(
            f"new_rows: coordinates {tuple(coordinates.shape)}, known {tuple(known.shape)}, new {tuple(new.shape)}; expected "
            "as many known vectors as coordinates, and vectors of one length"
        )
    cosine = F.normalize(new.double(), dim=1) @ F.normalize(known.double(), dim=1).mT
    near = cosine.topk(min(neighbours, len(known)), 1)
    weights = (near.values / temperature).softmax(1).to(coordinates)
    return (weights[:, :, None] * coordinates[near.indices]).sum(1)
