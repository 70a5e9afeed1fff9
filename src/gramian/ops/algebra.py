"""Composition with simplification: a handful of rules that always apply, never an open-ended table.

Sums and products are flattened; identities vanish; transposes cancel; diagonals and scalars are folded into a
neighbour that has an exact place for them (dense, low rank, diagonal); permutations compose; Kronecker products of
diagonals are diagonal. A rule never stores more numbers than its operands did, but for that last one, which trades
n m numbers for n + m to stay one multiplication.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.combinators import BlockDiag, Kron, Product, Scaled, Sum
from gramian.ops.dense import Dense
from gramian.ops.diagonal import Diagonal, Identity, Permutation
from gramian.ops.operator import Operator


def transpose(op: Operator) -> Operator:
    """The transpose; the transpose of a product reverses, and two transposes cancel."""
    return op.T


def scale(op: Operator, factor: complex | Tensor) -> Operator:
    """``factor * op``, folded into a factor of `op` where that is exact.

    Raises:
        GramianError: not a number or a tensor of shape (); a complex number times a real operator.
    """
    if not isinstance(factor, int | float | complex) and not (isinstance(factor, Tensor) and factor.dim() == 0):
        found = f"a tensor {tuple(factor.shape)}" if isinstance(factor, Tensor) else type(factor).__name__
        raise GramianError(
            f"{op.kind} * {found}; expected a number (products are written @, Diagonal(d) @ op scales rows)"
        )
    imaginary = factor.is_complex() if isinstance(factor, Tensor) else isinstance(factor, complex)
    if imaginary and not op.dtype.is_complex:
        raise GramianError(f"{op.kind} of {op.dtype} * a complex number; expected op.to(dtype=torch.complex64) first")
    # A Python number is folded as it is: making a tensor of it would cost more than the rest.
    value = factor.to(op.device, op.dtype) if isinstance(factor, Tensor) else factor
    if isinstance(op, Dense):
        return Dense(op.weight * value)
    if isinstance(op, Diagonal):
        return Diagonal(op.values * value)
    if isinstance(op, BlockLowRank):
        return dataclasses.replace(op, left=op.left * value)
    if isinstance(op, Scaled):
        return Scaled(op.factor * value, op.base)
    return Scaled(torch.as_tensor(value, dtype=op.dtype, device=op.device), op)


def add(*ops: Operator) -> Operator:
    """The sum of operators of one shape: nested sums are flattened, dense terms and diagonal terms are merged, and
    low-rank terms are stacked when the stack stays smaller than a dense matrix.

    Raises:
        GramianError: the shapes differ.
    """
    shapes = {op.shape for op in ops}
    if len(shapes) != 1:
        raise GramianError(f"add: shapes {[op.shape for op in ops]}; expected one shape")
    terms: list[Operator] = []
    for op in ops:
        for term in op.parts if isinstance(op, Sum) else (op,):
            for index, known in enumerate(terms):
                merged = _merge(known, term)
                if merged is not None:
                    terms[index] = merged
                    break
            else:
                terms.append(term)
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def _merge(a: Operator, b: Operator) -> Operator | None:
    if isinstance(a, Dense) and isinstance(b, Dense):
        return Dense(a.weight + b.weight)
    if isinstance(a, Diagonal) and isinstance(b, Diagonal):
        return Diagonal(a.values + b.values)
    if (
        isinstance(a, BlockLowRank)
        and isinstance(b, BlockLowRank)
        and a.blocks == b.blocks == (1, 1)
        and (a.rank + b.rank) * sum(a.shape) < a.shape[0] * a.shape[1]
    ):
        return BlockLowRank.low_rank(torch.cat([a.left[0], b.left[0]], 1), torch.cat([a.right[0], b.right[0]], 0))
    return None


def compose(*ops: Operator) -> Operator:
    """The product ``ops[0] @ ops[1] @ ...``, simplified.

    Raises:
        GramianError: inner sizes differ.
    """
    factors: list[Operator] = []
    for op in ops:
        for factor in op.parts if isinstance(op, Product) else (op,):
            if factors and factors[-1].shape[1] != factor.shape[0]:
                raise GramianError(f"compose: {factors[-1].shape} @ {factor.shape}; expected equal inner sizes")
            factors.append(factor)
            while len(factors) > 1:
                fused = _fuse(factors[-2], factors[-1])
                if fused is None:
                    break
                factors[-2:] = [fused]
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _fuse(a: Operator, b: Operator) -> Operator | None:
    """``a @ b`` as one operator where a rule gives one that stores no more than both."""
    if isinstance(a, Dense) and isinstance(b, Dense):
        smaller = a.weight.shape[0] * b.weight.shape[1] <= a.weight.numel() + b.weight.numel()
        return Dense(a.weight @ b.weight) if smaller else None
    if isinstance(a, Identity):
        return b
    if isinstance(b, Identity):
        return a
    if isinstance(a, Scaled) or isinstance(b, Scaled):
        factor = torch.ones((), dtype=a.dtype, device=a.device)
        for op in (a, b):
            factor = factor * op.factor if isinstance(op, Scaled) else factor
        inner = compose(*(op.base if isinstance(op, Scaled) else op for op in (a, b)))
        return scale(inner, factor)
    if isinstance(a, Diagonal) and isinstance(b, Diagonal):
        return Diagonal(a.values * b.values)
    if isinstance(a, Permutation) and isinstance(b, Permutation):
        return Permutation(b.index[a.index.long()])
    if isinstance(a, Diagonal):
        if isinstance(b, Dense):
            return Dense(a.values[:, None] * b.weight)
        if isinstance(b, BlockLowRank) and b.blocks == (1, 1):
            return dataclasses.replace(b, left=a.values[None, :, None] * b.left)
    if isinstance(b, Diagonal):
        if isinstance(a, Dense):
            return Dense(a.weight * b.values)
        if isinstance(a, BlockLowRank) and a.blocks == (1, 1):
            return dataclasses.replace(a, right=a.right * b.values)
    if isinstance(a, Permutation) and isinstance(b, Dense):
        return Dense(b.weight[a.index.long()])
    if isinstance(a, Dense) and isinstance(b, Permutation):
        return Dense(a.weight[:, b.T.index.long()])  # type: ignore[attr-defined]
    if isinstance(b, BlockLowRank) and b.blocks == (1, 1) and isinstance(a, Dense) and a.shape[0] <= a.shape[1]:
        return BlockLowRank.low_rank(a.weight @ b.left[0], b.right[0])
    if isinstance(a, BlockLowRank) and a.blocks == (1, 1) and isinstance(b, Dense) and b.shape[1] <= b.shape[0]:
        return BlockLowRank.low_rank(a.left[0], a.right[0] @ b.weight)
    if isinstance(a, Kron) and isinstance(b, Kron) and a.left.shape[1] == b.left.shape[0]:
        return Kron(compose(a.left, b.left), compose(a.right, b.right))
    return None


def kron(a: Operator, b: Operator) -> Operator:
    """``a (x) b`` in the order of ``torch.kron``; diagonals give a diagonal, identities an identity."""
    if isinstance(a, Identity) and isinstance(b, Identity):
        return Identity(a.size * b.size)
    if isinstance(a, Diagonal | Identity) and isinstance(b, Diagonal | Identity):
        like = a if isinstance(a, Diagonal) else b
        left, right = (
            op.values if isinstance(op, Diagonal) else torch.ones(op.size, dtype=like.dtype, device=like.device)
            for op in (a, b)
        )
        return Diagonal(torch.outer(left, right).reshape(-1))
    return Kron(a, b)


def block_diag(*ops: Operator) -> Operator:
    """`ops` along the diagonal; diagonals merge, and one operator stays itself."""
    if ops and all(isinstance(op, Diagonal) for op in ops):
        return Diagonal(torch.cat([op.values for op in ops]))  # type: ignore[attr-defined]
    return ops[0] if len(ops) == 1 else BlockDiag(tuple(ops))


def trace(op: Operator) -> Tensor:
    """The trace of a square operator, a scalar tensor, without forming a product where the structure gives it.

    Raises:
        GramianError: the operator is not square.
    """
    if op.shape[0] != op.shape[1]:
        raise GramianError(f"trace: shape {op.shape}; expected a square operator")
    if isinstance(op, Sum):
        return torch.stack([trace(part).to(op.device, op.dtype) for part in op.parts]).sum()
    if isinstance(op, Scaled):
        return op.factor * trace(op.base)
    if isinstance(op, Kron) and op.left.shape[0] == op.left.shape[1]:
        return trace(op.left) * trace(op.right)
    return diagonal(op).sum()


def diagonal(op: Operator) -> Tensor:
    """The main diagonal (min(out, in),), without forming the matrix where the structure gives it."""
    if isinstance(op, Diagonal):
        return op.values
    if isinstance(op, Identity):
        return torch.ones(op.size, dtype=op.dtype, device=op.device)
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        k = min(op.shape)
        return (op.left[0][:k] * op.right[0][:, :k].mT).sum(1)
    if isinstance(op, Sum):
        return torch.stack([diagonal(part).to(op.device, op.dtype) for part in op.parts]).sum(0)
    if isinstance(op, Scaled):
        return op.factor * diagonal(op.base)
    return op.dense().diagonal()


__all__ = [
    "add",
    "block_diag",
    "compose",
    "diagonal",
    "kron",
    "scale",
    "trace",
    "transpose",
]
