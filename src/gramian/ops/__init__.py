"""Structured matrices: one class a storage form, composed by a small algebra."""

from gramian.ops.algebra import add, block_diag, compose, diagonal, kron, scale, trace, transpose
from gramian.ops.blast import Blast
from gramian.ops.block_diagonal import BlockDiagonal, monarch
from gramian.ops.block_low_rank import BlockLowRank
from gramian.ops.block_sparse import BlockSparse
from gramian.ops.butterflies import PixelatedButterfly, butterfly, butterfly_fit, butterfly_twiddles, flat_butterfly
from gramian.ops.circulant import Circulant
from gramian.ops.combinators import BlockDiag, Kron, Product, Scaled, Sum, Transpose
from gramian.ops.cross import Cross, cross_indices, cur
from gramian.ops.dense import Dense
from gramian.ops.diagonal import Diagonal, Identity, Permutation, Selection
from gramian.ops.dictionary import Dictionary
from gramian.ops.displacement import LowDisplacement
from gramian.ops.householder import Householder
from gramian.ops.hypercomplex import HypercomplexBottleneck
from gramian.ops.kronecker import KroneckerSum
from gramian.ops.low_rank_quantized import LowRankQuantized
from gramian.ops.low_rank_sparse import LowRankSparse
from gramian.ops.masked_low_rank import MaskedLowRank
from gramian.ops.mixers import MixerSize, channel_mixing, mixer, mixer_sizes, random_mixer, token_mixing
from gramian.ops.operator import Operator, from_config, register, structure, structures
from gramian.ops.orthogonal import Orthogonal, permuted_orthogonal
from gramian.ops.pauli_strings import PauliSum, pauli, pauli_entries
from gramian.ops.quantized import Quantized
from gramian.ops.semi_structured import SemiStructured
from gramian.ops.skeleton import Skeleton
from gramian.ops.sparse import Sparse
from gramian.ops.symmetric_low_rank import SymmetricLowRank
from gramian.ops.toeplitz import Toeplitz
from gramian.ops.transforms import Cosine, Fourier, Hadamard, fourier_blocks, hadamard_blocks

__all__ = [
    "Blast",
    "BlockDiag",
    "BlockDiagonal",
    "BlockLowRank",
    "BlockSparse",
    "Circulant",
    "Cosine",
    "Cross",
    "Dense",
    "Diagonal",
    "Dictionary",
    "Fourier",
    "Hadamard",
    "Householder",
    "HypercomplexBottleneck",
    "Identity",
    "Kron",
    "KroneckerSum",
    "LowDisplacement",
    "LowRankQuantized",
    "LowRankSparse",
    "MaskedLowRank",
    "MixerSize",
    "Operator",
    "Orthogonal",
    "PauliSum",
    "Permutation",
    "PixelatedButterfly",
    "Product",
    "Quantized",
    "Scaled",
    "Selection",
    "SemiStructured",
    "Skeleton",
    "Sparse",
    "Sum",
    "SymmetricLowRank",
    "Toeplitz",
    "Transpose",
    "add",
    "block_diag",
    "butterfly",
    "butterfly_fit",
    "butterfly_twiddles",
    "channel_mixing",
    "compose",
    "cross_indices",
    "cur",
    "diagonal",
    "flat_butterfly",
    "fourier_blocks",
    "from_config",
    "hadamard_blocks",
    "kron",
    "mixer",
    "mixer_sizes",
    "monarch",
    "pauli",
    "pauli_entries",
    "permuted_orthogonal",
    "random_mixer",
    "register",
    "scale",
    "structure",
    "structures",
    "token_mixing",
    "trace",
    "transpose",
]
