"""Project a dense matrix on a structure, with a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.fitting.multilinear import polish
from gramian.linalg import weighted_error
from gramian.ops import Operator, structure
from gramian.ops.operator import Size, check_size

CLOSED_FORM = frozenset(
    {
        "dense",
        "skeleton",
        "diagonal",
        "quantized",
        "toeplitz",
        "circulant",
        "householder",
        "orthogonal",
        "low_rank_quantized",
    }
)
"""Structures whose own ``fit`` is already the optimum (or not multilinear): nothing to polish."""

FAMILIES: dict[str, Size] = {"low_rank": {"blocks": (1, 1)}, "monarch": {"strided_rows": True}}
"""Block low-rank matrices that the field knows by a name of their own, and what makes them so."""


@dataclass(frozen=True)
class Fitted:
    """A projection and how far it is off.

    Attributes:
        op: the structured matrix.
        error: ``tr(H (W - A) G (W - A)^T)`` of `op` as it is stored, rounding included.
        total: the same with A = 0.
    """

    op: Operator
    error: float
    total: float

    @property
    def relative(self) -> float:
        """``error / total``; 0 when both vanish."""
        return self.error / self.total if self.total > 0 else 0.0


def fit(
    weight: Tensor,
    kind: str,
    *,
    gram_in: Tensor | None = None,
    gram_out: Tensor | None = None,
    sweeps: int = 4,
    **size: Any,
) -> Fitted:
    """Best approximation found of `weight` by the structure `kind` in the two-sided Gram norm.

    The structure's own closed form or start comes first; where that is not the optimum, block-coordinate least squares
    polishes it (``polish``), never above the start. The start without Grams competes too. A structure whose own fit does
    that (``Operator.own_sweeps``) is left to it.

    Args:
        weight: (out, in).
        kind: a registered structure, or one of `FAMILIES`.
        gram_in: (in, in), its diagonal (in,), or None.
        gram_out: (out, out), its diagonal (out,), or None.
        sweeps: of polishing; 0 for none.
        size: what the structure's ``sizes`` lists.

    Raises:
        GramianError: unknown structure or name of a size, NaN or Inf in the weight or a Gram, a weight that is no real
            floating-point matrix, shapes that do not match.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise GramianError(
            f"weight: {weight.dtype} {tuple(weight.shape)}; expected a real floating-point matrix (out, in)"
        )
    weight = weight.detach()
    out, in_ = weight.shape
    for label, gram, length in (("gram_in", gram_in, in_), ("gram_out", gram_out, out)):
        if gram is not None and (gram.shape[0] != length or gram.shape[-1] != length):
            raise GramianError(f"{label} {tuple(gram.shape)} for a weight {out} x {in_}; expected side {length}")
        if gram is not None and not bool(gram.isfinite().all()):
            raise GramianError(f"{label}: NaN or Inf")
    if not bool(weight.isfinite().all()):
        raise GramianError("weight: NaN or Inf")
    if kind in FAMILIES:
        kind, size = "block_low_rank", {**FAMILIES[kind], **size}
    cls = structure(kind)
    check_size(cls, size, (out, in_))
    if cls.own_sweeps:
        size = {**size, "sweeps": cls.own_sweeps * sweeps}
    op = cls.fit(weight, gram_in=gram_in, gram_out=gram_out, **size)
    error = _error(weight, op, gram_in, gram_out)
    finished = (
        bool(cls.own_sweeps)
        or kind in CLOSED_FORM
        or (kind == "block_low_rank" and tuple(size.get("blocks", (1, 1))) == (1, 1))
    )
    weighted = gram_in is not None or gram_out is not None
    if weighted and sweeps and not finished:
        plain = cls.fit(weight, **size)
        plain_error = _error(weight, plain, gram_in, gram_out)
        if plain_error < error:
            op = plain
        op = polish(op, weight, gram_in, gram_out, sweeps=sweeps)
        error = _error(weight, op, gram_in, gram_out)
    total = float(weighted_error(weight, gram_in, gram_out))
    return Fitted(op, error, total)


def _error(weight: Tensor, op: Operator, gram_in: Tensor | None, gram_out: Tensor | None) -> float:
    difference = weight.to(torch.float64) - op.dense().to(torch.float64)
    error = float(weighted_error(difference, gram_in, gram_out))
    return max(error, 0.0) if not math.isnan(error) else math.inf
