"""Structured matrices: one class a storage form, composed by a small algebra."""

from gramian.ops.algebra import add, block_diag, compose, diagonal, kron, scale, trace, transpose
from gramian.ops.block_diagonal import BlockDiagonal, monarch
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.block_sparse import BlockSparse
from gramian.ops.combinators import BlockDiag, Kron, Product, Scaled, Sum, Transpose
from gramian.ops.dense import Dense
from gramian.ops.diagonal import Diagonal, Identity, Permutation, Selection
from gramian.ops.kronecker import KroneckerSum
from gramian.ops.operator import Operator, from_config, register, structure, structures
from gramian.ops.quantized import Quantized
from gramian.ops.skeleton import Skeleton

__all__ = [
    "BlockDiag",
    "BlockDiagonal",
    "BlockLowRank",
    "BlockSparse",
    "Dense",
    "Diagonal",
    "Identity",
    "Kron",
    "KroneckerSum",
    "Operator",
    "Permutation",
    "Product",
    "Quantized",
    "Scaled",
    "Selection",
    "Skeleton",
    "Sum",
    "Transpose",
    "add",
    "block_diag",
    "compose",
    "diagonal",
    "from_config",
    "kron",
    "monarch",
    "register",
    "scale",
    "structure",
    "structures",
    "trace",
    "transpose",
]
