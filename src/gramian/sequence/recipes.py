"""Published layers as choices of a mixer's parts: one short function a paper.

Sizes: `dim` is the width of the model, `heads` H, `key_dim` dk and `value_dim` dv the sizes of one head's keys and values
(dim / heads where not given). `linear` makes every projection, called as ``linear(in, out, bias)``: ``torch.nn.Linear``, or
for any structure of the algebra ``structured("block_low_rank", rank=8)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gramian.errors import GramianError, nearest
from gramian.ops import fourier_blocks
from gramian.sequence import features as maps
from gramian.sequence.cores import BlockAttention, Core, Filter, Recurrent, ThirdOrder
from gramian.sequence.inputs import Inputs
from gramian.sequence.long_convolution import FiniteFilter, GaborKernel, ImplicitKernel, LongKernel
from gramian.sequence.mixer import Output, SequenceMixer
from gramian.sequence.rules import ConstantDecay, DeltaRule, GatedRule, GooseRule, SelectiveDecay, SigmoidDecay
from gramian.sequence.state_space import DiagonalStateSpace

Linear = Callable[[int, int, bool], nn.Module]
"""(in, out, bias) -> a layer."""

# The registry --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A published layer.

    Args:
        name: as in ``mixer(name, ...)``.
        build: the function; its signature is the recipe's options.
        paper: title.
        year: of the paper.
        departs: where this differs from the paper; "" where it does not.
    """

    name: str
    build: Callable[..., SequenceMixer]
    paper: str
    year: int
    departs: str


RECIPES: dict[str, Recipe] = {}


def _recipe(
    paper: str, year: int, departs: str = ""
) -> Callable[[Callable[..., SequenceMixer]], Callable[..., SequenceMixer]]:
    def register(build: Callable[..., SequenceMixer]) -> Callable[..., SequenceMixer]:
        RECIPES[build.__name__] = Recipe(build.__name__, build, paper, year, departs)
        return build

    return register


def mixer(name: str, dim: int, **options: Any) -> SequenceMixer:
    """The recipe of that name, built.

    Raises:
        GramianError: unknown name; the message lists the nearest ones.
    """
    if name not in RECIPES:
        raise GramianError(f"mixer {name!r} is unknown{nearest(name, RECIPES)}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name].build(dim, **options)


def structured(kind: str, **size: Any) -> Linear:
    """A factory of projections of one structure, for ``linear=``; sizes as the structure's ``sizes`` lists them."""
    from gramian.nn import structured as structured_layer  # here, so that plain layers import faster

    return lambda in_, out, bias: structured_layer(in_, out, kind, bias=bias, **size)


# What they share -----------------------------------------------------------------------------------------------------


def _sizes(dim: int, heads: int, key_dim: int | None, value_dim: int | None) -> tuple[int, int]:
    if heads < 1 or ((key_dim is None or value_dim is None) and dim % heads):
        raise GramianError(f"{heads} heads of dim {dim}; expected a divisor, or key_dim and value_dim")
    return key_dim or dim // heads, value_dim or dim // heads


def _low_rank(
    linear: Linear, dim: int, rank: int, out: int, *, between: nn.Module | None = None, bias: bool
) -> nn.Module:
    return nn.Sequential(linear(dim, rank, False), between or nn.Identity(), linear(rank, out, bias))


def _qkv(
    dim: int, heads: int, key_dim: int, value_dim: int, linear: Linear, copies: int = 1
) -> tuple[dict[str, nn.Module], int]:
    """The projections, and how many channels they have together."""
    sizes = {"q": heads * key_dim, "k": heads * copies * key_dim, "v": heads * copies * value_dim}
    return {name: linear(dim, size, False) for name, size in sizes.items()}, sum(sizes.values())


def _attention(
    dim: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    linear: Linear,
    core: Core,
    *,
    norm: str | None = None,
    gate: str | None = None,
    convolution: int = 0,
    extra: dict[str, nn.Module] | None = None,
    copies: int = 1,
) -> SequenceMixer:
    """q, k, v through a convolution with SiLU (or neither), a core, a norm a head, a gate."""
    projections, channels = _qkv(dim, heads, key_dim, value_dim, linear, copies)
    projections.update(extra or {})
    if gate is not None and "gate" not in projections:
        projections["gate"] = linear(dim, heads * value_dim, False)
    inputs = Inputs(
        projections,
        convolution=convolution,
        convolved=("q", "k", "v") if convolution else (),
        channels=channels,
        activation="silu" if convolution else None,
    )
    return SequenceMixer(
        inputs, core, Output(linear(heads * value_dim, dim, False), heads, value_dim, norm=norm, gate=gate)
    )


# The delta rule ------------------------------------------------------------------------------------------------------


@_recipe("Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024)
def delta_net(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    beta: str = "sigmoid",
    convolution: int = 4,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """DeltaNet: ``S_t = (I - beta k k^T) S_{t-1} + beta k v^T``, unit keys. ``beta="two_sigmoid"`` gives the negative
    eigenvalues of Grazzi et al. 2025, "Unlocking state-tracking in linear RNNs through negative eigenvalues".
    """
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    core = Recurrent(heads, key_dim, DeltaRule(beta=beta), features=maps.unit, scale=key_dim**-0.5, **scan)
    extra = {"beta": linear(dim, heads, False)}
    return _attention(dim, heads, key_dim, value_dim, linear, core, norm="rms", convolution=convolution, extra=extra)


@_recipe("Gated Delta Networks: Improving Mamba2 with Delta Rule", 2025)
def gated_delta_net(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    beta: str = "sigmoid",
    convolution: int = 4,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """Gated DeltaNet: ``S_t = (I - beta k k^T) e^g S_{t-1} + beta k v^T`` with Mamba-2's gate."""
    return _delta_product(dim, heads, key_dim, value_dim, 1, beta, True, convolution, linear, scan)


@_recipe("DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", 2025)
def delta_product(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    householders: int = 2,
    beta: str = "two_sigmoid",
    gated: bool = True,
    output_gate: bool = True,
    convolution: int = 4,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """(Gated) DeltaProduct: n steps of the delta rule a token, so A_t is a product of n Householder matrices.
    ``beta="hard"`` reaches reflections exactly, which the paper's map only approaches. Its word problems are run without decay
    (`gated`) and without `output_gate`.
    """
    return _delta_product(
        dim, heads, key_dim, value_dim, householders, beta, gated, convolution, linear, scan, output_gate=output_gate
    )


def _delta_product(
    dim: int,
    heads: int,
    key_dim: int | None,
    value_dim: int | None,
    n: int,
    beta: str,
    gated: bool,
    convolution: int,
    linear: Linear,
    scan: dict[str, Any],
    *,
    output_gate: bool = True,
) -> SequenceMixer:
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    rule = DeltaRule(beta=beta, decay=SelectiveDecay(heads, rates=(0.01, 16.0)) if gated else None, householders=n)
    core = Recurrent(heads, key_dim, rule, features=maps.unit, scale=key_dim**-0.5, **scan)
    extra = {"beta": linear(dim, heads * n, False)}
    if gated:
        extra["decay"] = linear(dim, heads, False)
    return _attention(
        dim,
        heads,
        key_dim,
        value_dim,
        linear,
        core,
        norm="rms",
        gate="silu" if output_gate else None,
        convolution=convolution,
        extra=extra,
        copies=n,
    )


@_recipe("Kimi Linear: An Expressive, Efficient Attention Architecture", 2025)
def kda(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    beta: str = "sigmoid",
    convolution: int = 4,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """Kimi Delta Attention: Gated DeltaNet with one decay a channel, of a low-rank projection; sigmoid output gate."""
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    rule = DeltaRule(beta=beta, decay=SelectiveDecay(heads, key_dim))
    core = Recurrent(heads, key_dim, rule, features=maps.unit, scale=key_dim**-0.5, **scan)
    extra = {
        "beta": linear(dim, heads, False),
        "decay": _low_rank(linear, dim, key_dim, heads * key_dim, bias=False),
        "gate": _low_rank(linear, dim, value_dim, heads * value_dim, bias=False),
    }
    return _attention(
        dim,
        heads,
        key_dim,
        value_dim,
        linear,
        core,
        norm="rms",
        gate="sigmoid",
        convolution=convolution,
        extra=extra,
    )


@_recipe(
    'RWKV-7 "Goose" with Expressive Dynamic State Evolution',
    2025,
    "the values of the first layer are not mixed into those of later layers; random token shifts at the start",
)
def rwkv7(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    *,
    rank: int = 32,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """RWKV-7's time mixing: token shift, decay a channel, a delta rule whose removal and write keys differ."""
    key_dim, _ = _sizes(dim, heads, key_dim, None)
    width = heads * key_dim
    projections = {
        "q": linear(dim, width, False),
        "k": linear(dim, width, False),
        "v": linear(dim, width, False),
        "decay": _low_rank(linear, dim, rank, width, between=nn.Tanh(), bias=True),
        "rate": _low_rank(linear, dim, rank, width, bias=True),
        "gate": _low_rank(linear, dim, rank, width, between=nn.Sigmoid(), bias=False),
    }
    core = Recurrent(heads, key_dim, GooseRule(heads, key_dim), **scan)
    output = Output(linear(width, dim, False), heads, key_dim, norm="layer", gate="linear", eps=1e-5 * key_dim)
    return SequenceMixer(Inputs(projections, shift=True, dim=dim), core, output)


# Gated linear attention ----------------------------------------------------------------------------------------------


@_recipe("Gated Linear Attention Transformers with Hardware-Efficient Training", 2024)
def gla(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    rank: int = 16,
    temperature: float = 16.0,
    convolution: int = 0,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """GLA: ``S_t = Diag(e^g) S_{t-1} + k v^T``, ``g = logsigmoid(W_2 W_1 x) / 16``. The paper has dk = dv / 2."""
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    rule = GatedRule(SigmoidDecay(key_dim, temperature=temperature))
    core = Recurrent(heads, key_dim, rule, scale=key_dim**-0.5, **scan)
    extra = {"decay": _low_rank(linear, dim, rank, heads * key_dim, bias=True)}
    return _attention(
        dim,
        heads,
        key_dim,
        value_dim,
        linear,
        core,
        norm="rms",
        gate="silu",
        convolution=convolution,
        extra=extra,
    )


@_recipe("Retentive Network: A Successor to Transformer for Large Language Models", 2023)
def retnet(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """RetNet: decays ``1 - 2^{-5-h}``, and rotary positions as a rotation of the state a step."""
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    if key_dim % 2:
        raise GramianError(f"retnet: key_dim {key_dim}; expected an even number, for rotations of pairs")
    # What lies i steps back is seen turned back by i angles: rotary positions of q and k.
    angles = -(1e4 ** -torch.linspace(0, 1, key_dim // 2))
    core = Recurrent(heads, key_dim, GatedRule(_retention(heads), angles=angles), scale=key_dim**-0.5, **scan)
    return _attention(dim, heads, key_dim, value_dim, linear, core, norm="layer", gate="silu")


def _retention(heads: int) -> ConstantDecay:
    return ConstantDecay(torch.log1p(-torch.exp2(-5.0 - torch.arange(heads))))


@_recipe(
    "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality", 2024
)
def mamba2(
    dim: int,
    heads: int | None = None,
    key_dim: int = 64,
    value_dim: int = 64,
    *,
    groups: int = 1,
    signed: bool = False,
    convolution: int = 4,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """Mamba-2 (SSD): ``S_t = e^{dt A} S_{t-1} + B (dt x)^T``, B and C shared by the heads of a group; `key_dim` is the state
    size, `value_dim` the head size, H = 2 dim / value_dim by default. ``signed=True``: gates ``2 e^{dt A} - 1`` (Grazzi et
    al. 2025).
    """
    heads = heads or max(1, 2 * dim // value_dim)
    if heads % groups:
        raise GramianError(f"mamba2: {groups} groups of {heads} heads; expected a divisor")
    inner, shared = heads * value_dim, groups * key_dim
    projections = {
        "gate": linear(dim, inner, False),
        "v": linear(dim, inner, False),
        "k": linear(dim, shared, False),
        "q": linear(dim, shared, False),
        "decay": linear(dim, heads, False),
    }
    inputs = Inputs(
        projections,
        convolution=convolution,
        convolved=("v", "k", "q"),
        channels=inner + 2 * shared,
        activation="silu",
        bias=True,
    )
    rule = GatedRule(SelectiveDecay(heads), signed=signed, discretised=True, heads=heads)
    output = Output(
        linear(inner, dim, False), heads, value_dim, norm="rms", over_heads=True, gate="silu", gate_first=True
    )
    return SequenceMixer(inputs, Recurrent(heads, key_dim, rule, **scan), output)


@_recipe(
    "Liger: Linearizing Large Language Models to Gated Recurrent Structures",
    2025,
    "the recurrence alone; the paper averages it with softmax attention over a sliding window of 64",
)
def liger(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    temperature: float = 16.0,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """Liger's gated recurrence of a softmax-attention layer's own projections: features softmax(q), softmax(k), the decay
    ``logsigmoid(k) / 16`` of the keys themselves. No new parameters.
    """
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    rule = GatedRule(SigmoidDecay(key_dim, stream="k", temperature=temperature))
    core = Recurrent(heads, key_dim, rule, features=maps.softmax, **scan)
    return _attention(dim, heads, key_dim, value_dim, linear, core)


# Linear attention by features ----------------------------------------------------------------------------------------


@_recipe("Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020)
def linear_attention(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    features: maps.FeatureMap | str = "elu1",
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """Linear attention, ``o_t = phi(q) sum phi(k) v^T / phi(q) sum phi(k)``; any positive map, or its name."""
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    chosen = maps.feature_map(features) if isinstance(features, str) else features
    core = Recurrent(heads, key_dim, GatedRule(), features=chosen, normalise=True, **scan)
    return _attention(dim, heads, key_dim, value_dim, linear, core)


@_recipe(
    "Rethinking Attention with Performers", 2021, "keys are stabilised by a running maximum, so nothing leaks back"
)
def performer(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    count: int | None = None,
    orthogonal: bool = True,
    hyperbolic: bool = False,
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """Performer, causal: FAVOR+ features of ``q d^{-1/4}`` and ``k d^{-1/4}``; m = d log d where `count` is not given."""
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    count = count or max(1, math.ceil(key_dim * math.log(key_dim)))
    frequencies = maps.gaussian_frequencies(count, key_dim, orthogonal=orthogonal, generator=generator)
    features = maps.PositiveFeatures(frequencies, hyperbolic=hyperbolic)
    core = Recurrent(heads, key_dim, GatedRule(), features=features, temperature=key_dim**-0.25, normalise=True, **scan)
    return _attention(dim, heads, key_dim, value_dim, linear, core)


@_recipe(
    "On Learning the Transformer Kernel",
    2022,
    "positive features by default (the paper's trigonometric ones may make the normaliser vanish); no generator network",
)
def transformer_kernel(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    count: int | None = None,
    frequencies: str = "mixture",
    components: int = 2,
    trigonometric: bool = False,
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """Attention with a learned spectral density: frequencies of a trained mixture of Gaussians ("mixture"), or Fastfood with
    trained diagonals ("fastfood", `count` a multiple of dk).
    """
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    count = count or 2 * key_dim
    if frequencies not in ("mixture", "fastfood"):
        raise GramianError(f"transformer_kernel: frequencies {frequencies!r}; expected 'mixture' or 'fastfood'")
    drawn: Any = (
        maps.MixtureFrequencies(count, key_dim, components=components, generator=generator)
        if frequencies == "mixture"
        else maps.fastfood_frequencies(count, key_dim, generator=generator)
    )
    kind = maps.TrigonometricFeatures if trigonometric else maps.PositiveFeatures
    core = Recurrent(
        heads,
        key_dim,
        GatedRule(),
        features=kind(drawn, learned=True),
        temperature=key_dim**-0.25,
        normalise=True,
        **scan,
    )
    return _attention(dim, heads, key_dim, value_dim, linear, core)


@_recipe("The Devil in Linear Transformer", 2022)
def transnormer(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    block: int | None = None,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """TransNormer: NormAttention ``RMSNorm(phi(Q) (phi(K)^T V))`` with ``phi = 1 + elu`` and no denominator, whose gradients
    are bounded; with `block` (64 in the paper, for the first half of the layers) DiagAttention, softmax within blocks.
    """
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    if block is not None:
        return _attention(dim, heads, key_dim, value_dim, linear, BlockAttention(heads, block))
    core = Recurrent(heads, key_dim, GatedRule(), features=maps.elu1, **scan)
    return _attention(dim, heads, key_dim, value_dim, linear, core, norm="rms")


@_recipe(
    "DiJiang: Efficient Large Language Models through Compact Kernelization",
    2024,
    "the paper's weighted quasi-Monte Carlo features with equidistributed points, not the released softmax of a random DCT; "
    "normalised, which the norm that follows undoes",
)
def dijiang(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
    **scan: Any,
) -> SequenceMixer:
    """DiJiang: features of a cosine transform, RetNet's decays, norm and gate."""
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    features = maps.CosineFeatures(key_dim, generator=generator)
    core = Recurrent(
        heads,
        key_dim,
        GatedRule(_retention(heads)),
        features=features,
        temperature=key_dim**-0.25,
        normalise=True,
        **scan,
    )
    return _attention(dim, heads, key_dim, value_dim, linear, core, norm="layer", gate="silu")


@_recipe(
    "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation",
    2024,
    "features in place of the paper's polynomial approximation of exp; causal",
)
def third_order_attention(
    dim: int,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    *,
    features: maps.FeatureMap | str = "elu1",
    linear: Linear = nn.Linear,
) -> SequenceMixer:
    """Attention to pairs of tokens in linear time by the Khatri-Rao identity (``mixer.ThirdOrder``)."""
    key_dim, value_dim = _sizes(dim, heads, key_dim, value_dim)
    chosen = maps.feature_map(features) if isinstance(features, str) else features
    extra = {"k2": linear(dim, heads * key_dim, False), "v2": linear(dim, heads * value_dim, False)}
    return _attention(dim, heads, key_dim, value_dim, linear, ThirdOrder(heads, chosen), extra=extra)


# State spaces and long convolutions ----------------------------------------------------------------------------------


def _filtered(dim: int, filter: FiniteFilter | DiagonalStateSpace, linear: Linear) -> SequenceMixer:
    """``GLU(W gelu(filter(x)))``: the layer around S4D and the long convolutions."""
    output = Output(linear(dim, 2 * dim, True), 1, dim, norm=None, activation="gelu", glu=True)
    return SequenceMixer(Inputs({"v": nn.Identity()}), Filter(filter), output)


@_recipe("On the Parameterization and Initialization of Diagonal State Space Models", 2022)
def s4d(
    dim: int,
    *,
    states: int = 64,
    initial: str = "legs",
    discretisation: str = "zoh",
    steps: tuple[float, float] = (1e-3, 1e-1),
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
) -> SequenceMixer:
    """S4D: a diagonal state space a channel; `initial` "legs", "lin", "inv" or "real"."""
    filter = DiagonalStateSpace(
        dim, states, initial=initial, discretisation=discretisation, steps=steps, generator=generator
    )
    return _filtered(dim, filter, linear)


@_recipe(
    "Diagonal State Spaces are as Effective as Structured State Spaces",
    2022,
    "real parts stay negative in both variants; conjugate pairs; GLU after",
)
def dss(
    dim: int,
    *,
    states: int = 64,
    length: int | None = None,
    steps: tuple[float, float] = (1e-3, 1e-1),
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
) -> SequenceMixer:
    """DSS from skew-HiPPO eigenvalues: DSS-exp, or with the `length` of the sequences DSS-softmax."""
    discretisation = "zoh" if length is None else "softmax"
    filter = DiagonalStateSpace(
        dim, states, discretisation=discretisation, length=length, steps=steps, generator=generator
    )
    with torch.no_grad():
        filter.input.copy_(torch.tensor([1.0, 0.0]).expand_as(filter.input))
    return _filtered(dim, filter, linear)


@_recipe(
    "Robustifying State-space Models for Long Sequences via Approximate Diagonalization",
    2024,
    "the perturbation is found by gradient descent from a small random one; the paper does not say how",
)
def s4_ptd(
    dim: int,
    *,
    states: int = 64,
    steps: tuple[float, float] = (1e-3, 1e-1),
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
) -> SequenceMixer:
    """S4-PTD: S4D's layer, started from HiPPO-LegS perturbed so that it can be diagonalised."""
    return _filtered(dim, DiagonalStateSpace(dim, states, initial="ptd", steps=steps, generator=generator), linear)


@_recipe(
    "Simple Hardware-Efficient Long Convolutions for Sequence Modeling",
    2023,
    "one kernel a channel; causal; the learned transform is one block level of FlashButterfly's",
)
def long_conv(
    dim: int,
    *,
    length: int,
    threshold: float = 1e-3,
    width: int = 1,
    dropout: float = 0.2,
    butterfly: bool = False,
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
) -> SequenceMixer:
    """Long convolutions, kernels squashed and smoothed; with `butterfly` the Fourier transform is a block low-rank matrix of
    the algebra with trained blocks, for sequences of at most `length` run at once.
    """
    kernel = LongKernel(dim, length, threshold=threshold, width=width, dropout=dropout, generator=generator)
    fourier = fourier_blocks(2 * length) if butterfly else None
    return _filtered(dim, FiniteFilter(kernel, dim, fourier=fourier), linear)


@_recipe(
    "FlexConv: Continuous Kernel Convolutions with Differentiable Kernel Sizes",
    2022,
    "one-dimensional and causal: the mask has its mean at the present",
)
def flex_conv(
    dim: int,
    *,
    length: int,
    hidden: int = 32,
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
) -> SequenceMixer:
    """FlexConv: kernels of a Gabor network under a Gaussian mask of learned width."""
    return _filtered(dim, FiniteFilter(GaborKernel(dim, length, hidden=hidden, generator=generator), dim), linear)


@_recipe(
    "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture",
    2023,
    "causal, by zero-padded Fourier transforms; the sequence mixer alone (its channel mixer is a block-diagonal feed-forward)",
)
def monarch_mixer(
    dim: int,
    *,
    length: int,
    hidden: int = 16,
    convolution: int = 3,
    generator: torch.Generator | None = None,
    linear: Linear = nn.Linear,
) -> SequenceMixer:
    """M2's sequence mixer: ``q * (K conv (k * v))`` after a short convolution, K Hyena's implicit filter."""
    projections = {name: linear(dim, dim, True) for name in ("q", "k", "v")}
    inputs = Inputs(projections, convolution=convolution, convolved=("q", "k", "v"), channels=3 * dim)
    filter = FiniteFilter(ImplicitKernel(dim, length, hidden=hidden, generator=generator), dim)
    return SequenceMixer(inputs, Filter(filter), Output(linear(dim, dim, True), 1, dim, norm=None))
