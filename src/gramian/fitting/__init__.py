"""Dense to structured: the generic part."""

from gramian.fitting.projection import Fitted, fit
from gramian.fitting.multilinear import polish

__all__ = ["Fitted", "fit", "polish"]
