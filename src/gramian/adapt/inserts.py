"""Small networks after a layer: ``h + U f(D h)`` of its output h. They are no change of a weight and cannot be merged."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gramian.adapt.adapter import Adapter, Context, Start, everywhere
from gramian.adapt.initial import orthonormal
from gramian.errors import GramianError
from gramian.ops import Circulant, Dense, HypercomplexBottleneck, LowDisplacement, Operator, Product, Toeplitz


def start_hypercomplex(weight: Tensor, context: Context, *, factors: int) -> Start:
    """Compacter's bottleneck of width ``rank``; biases zero."""
    out, width = context.shape[0], context.rank
    if out % factors or width % factors:
        raise GramianError(
            f"layer {context.name}: compacter with {factors} factors needs an output size and a rank (the bottleneck's width) "
            f"that it divides; found {out} and {width}"
        )
    made = HypercomplexBottleneck.random(out, width, factors=factors, generator=context.generator)
    made = made.replace(up_left=torch.zeros_like(made.up_left))
    return Start(made, biases=(torch.zeros(width), torch.zeros(out)))


def compacter(factors: int = 4) -> Adapter:
    """Compacter (2021, "Compacter: efficient low-rank hypercomplex adapter layers"): ``h + U gelu(D h + b1) + b2``, U
    and D sums of n Kronecker products ``A_i (x) s_i t_i``; the n x n matrices A_i are shared by both maps and by all
    layers. The rank is the bottleneck's width. Meant for the last linear layers of attention and feed-forward blocks.

    Departure: ``s_i`` of U starts at zero, so that the model starts as it was; the paper starts near that.
    """
    return Adapter(
        partial(start_hypercomplex, factors=factors),
        combine="insert",
        activation="gelu",
        share={"slow": everywhere},
        recipe="compacter",
    )


STRUCTURES = ("circulant", "toeplitz", "displacement", "dense")


def start_bottleneck(weight: Tensor, context: Context, *, structure: str) -> Start:
    """``D (rank, out)`` random and ``U (out, rank)`` zero, both of one structure."""
    out, width, g = context.shape[0], context.rank, context.generator
    down: Operator
    up: Operator
    if structure == "circulant":
        down, up = Circulant.init((width, out), generator=g), Circulant(torch.zeros(out), out, width)
    elif structure == "toeplitz":
        down, up = Toeplitz.init((width, out), generator=g), Toeplitz(torch.zeros(out + width - 1), out, width)
    elif structure == "displacement":
        down, up = (
            LowDisplacement.init((width, out), rank=1, generator=g),
            LowDisplacement.delta((out, width), 1, generator=g),
        )
    else:
        down, up = Dense(orthonormal(width, out, g)), Dense(torch.zeros(out, width))
    return Start(Product((up, down)), biases=(torch.zeros(width), torch.zeros(out)))


def surm_insert(structure: str = "circulant", activation: str = "gelu") -> Adapter:
    """SURM's adapter layers (2024, "Structured unrestricted-rank matrices for parameter-efficient fine-tuning"): ``h +
    U f(D h)`` with structured U and D; "dense" gives the bottleneck of Houlsby et al. 2019. The rank is the
    bottleneck's width.

    Departure: rectangular circulant, Toeplitz and low-displacement maps; the paper's are square.
    """
    if structure not in STRUCTURES:
        raise GramianError(f"surm_insert: structure {structure!r}; expected one of {', '.join(STRUCTURES)}")
    return Adapter(
        partial(start_bottleneck, structure=structure), combine="insert", activation=activation, recipe="surm_insert"
    )


def start_features(weight: Tensor, context: Context) -> Start:
    """Orthogonal Gaussian features of h, frozen, and a read-out of zeros."""
    out, features, g = context.shape[0], context.rank, context.generator
    # Orthogonal rows with the norms of Gaussian ones, over sqrt(M).
    norms = torch.randn(features, out, generator=g).norm(dim=1, keepdim=True)
    down = Dense(orthonormal(features, out, g) * norms / features**0.5)
    return Start(Product((Dense(torch.zeros(out, features)), down)))


def snnk() -> Adapter:
    """SNNK (2024, "Scalable neural network kernels"): ``h + Psi relu(G h) / sqrt(M)`` with M frozen orthogonal
    Gaussian features G and a trained read-out Psi (out, M), which starts at zero. The rank is M, at most the layer's
    output size.
    """
    return Adapter(start_features, combine="insert", activation="relu", trainable=("parts.0.*",), recipe="snnk")
