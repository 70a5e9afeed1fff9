"""Second moments: streaming, mergeable, exact."""

from gramian.grams.collect import Grams, Joint, LayerGrams, collect_layers
from gramian.grams.gram import Gram

__all__ = ["Gram", "Grams", "Joint", "LayerGrams", "collect_layers"]
