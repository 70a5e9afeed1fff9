"""Dense to structured: the generic part."""

from gramian.fit.fit import Fitted, fit
from gramian.fit.multilinear import polish

__all__ = ["Fitted", "fit", "polish"]
