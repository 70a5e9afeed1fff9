"""Dense to structured: the generic part."""

from gramian.fitting.multilinear import polish
from gramian.fitting.projection import Fitted, fit

__all__ = ["Fitted", "fit", "polish"]
