"""Second moments: streaming, mergeable, exact."""

from gramian.grams.collect import EmbeddingGrams, Grams, Joint, LayerGrams, collect_layers
from gramian.grams.gram import Gram

__all__ = ["EmbeddingGrams", "Gram", "Grams", "Joint", "LayerGrams", "collect_layers"]
