"""Linear recurrences, state-space models and linear attention: one scan over structured transition matrices."""

from gramian.sequence.associative import linear_recurrence
from gramian.sequence.inputs import MixerState
from gramian.sequence.long_convolution import causal_convolution
from gramian.sequence.mixer import SequenceMixer
from gramian.sequence.parallel import combine, parallel_scan, summary
from gramian.sequence.recipes import RECIPES, mixer, structured
from gramian.sequence.scan import scan, step
from gramian.sequence.sequence_map import SequenceMap, sequence_map
from gramian.sequence.state_space import DiagonalStateSpace, hippo, perturb_then_diagonalise, s4d
from gramian.sequence.transitions import (
    Composed,
    DenseTransition,
    DiagonalGate,
    DiagonalPlusLowRank,
    Householder,
    HouseholderProduct,
    Identity,
    Rotation,
    ScalarGate,
    Transition,
)

__all__ = [
    "RECIPES",
    "Composed",
    "DenseTransition",
    "DiagonalGate",
    "DiagonalPlusLowRank",
    "DiagonalStateSpace",
    "Householder",
    "HouseholderProduct",
    "Identity",
    "MixerState",
    "Rotation",
    "ScalarGate",
    "SequenceMap",
    "SequenceMixer",
    "Transition",
    "causal_convolution",
    "combine",
    "hippo",
    "linear_recurrence",
    "mixer",
    "parallel_scan",
    "perturb_then_diagonalise",
    "s4d",
    "scan",
    "sequence_map",
    "step",
    "structured",
    "summary",
]
