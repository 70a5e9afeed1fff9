"""Layers that hold operators."""

from gramian.nn.structured_embedding import StructuredEmbedding, as_embedding
from gramian.nn.structured_linear import StructuredLinear, as_linear

__all__ = ["StructuredEmbedding", "StructuredLinear", "as_embedding", "as_linear"]
