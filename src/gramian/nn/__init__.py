"""Layers that hold operators, and what training them from scratch needs."""

from gramian.nn.feature_major import FeatureMajor
from gramian.nn.grow_and_prune import GrowAndPrune
from gramian.nn.initialise import identity_, linear_layers, spectral_, structured, unit_variance_
from gramian.nn.prepared_linear import PreparedLinear, prepare, unprepare
from gramian.nn.reparametrised import Reparametrisation, ReparametrisedLinear
from gramian.nn.straight_through import StraightThroughDictionary
from gramian.nn.structured_embedding import StructuredEmbedding, as_embedding
from gramian.nn.structured_linear import StructuredLinear, as_linear
from gramian.nn.training import (
    SelfGuided,
    guide,
    parameter_groups,
    rate_multipliers,
    to_dense,
    to_structured,
    unguide,
)

__all__ = [
    "FeatureMajor",
    "GrowAndPrune",
    "PreparedLinear",
    "Reparametrisation",
    "ReparametrisedLinear",
    "SelfGuided",
    "StraightThroughDictionary",
    "StructuredEmbedding",
    "StructuredLinear",
    "as_embedding",
    "as_linear",
    "guide",
    "identity_",
    "linear_layers",
    "parameter_groups",
    "prepare",
    "rate_multipliers",
    "spectral_",
    "structured",
    "to_dense",
    "to_structured",
    "unguide",
    "unit_variance_",
    "unprepare",
]
