"""How an operator runs, decided apart from what it is: traced work, a cost model measured on this machine, a choice."""

from gramian.execution.calibration import cache_file, calibrate, forget, save, stored
from gramian.execution.cost_model import CostModel
from gramian.execution.forms import Form, Prepared, candidates, choose, predicted
from gramian.execution.work import MatrixProduct, Pass, trace, work

__all__ = [
    "CostModel",
    "Form",
    "MatrixProduct",
    "Pass",
    "Prepared",
    "cache_file",
    "calibrate",
    "candidates",
    "choose",
    "forget",
    "predicted",
    "save",
    "stored",
    "trace",
    "work",
]
