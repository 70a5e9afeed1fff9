"""Layers that hold operators."""

from gramian.nn.structured_linear import StructuredLinear, as_linear

__all__ = ["StructuredLinear", "as_linear"]
