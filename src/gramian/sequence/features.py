"""Feature maps of queries and keys: ``phi(q) . phi(k)`` in place of ``exp(q . k)``.

A map without parameters is a plain function of (..., d); one that draws or learns numbers is a module. A map whose features
are exponentials also gives their ``exponents``, so that a layer can keep them in range by quantities of the past alone: the
largest exponent of a query cancels in a normalised output, and that of the keys so far is carried as a scalar gate (see
``mixer.Recurrent``). One maximum over all keys, as in a widely used package, lets later tokens change earlier outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError, nearest
from gramian.linalg import polar
from gramian.ops import Cosine, Dense, Diagonal, Hadamard, Identity, Operator, Permutation, block_diag, kron

FeatureMap = Callable[[Tensor], Tensor]
"""(..., d) -> (..., m)."""

# Without parameters --------------------------------------------------------------------------------------------------


def elu1(x: Tensor) -> Tensor:
    """``1 + elu(x)`` (Katharopoulos et al. 2020, "Transformers are RNNs", eq. 7). x: (..., d)."""
    return F.elu(x) + 1


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``. x: (..., d)."""
    return F.relu(x)


def softmax(x: Tensor) -> Tensor:
    """Positive features that sum to one (Liger 2025). x: (..., d)."""
    return x.softmax(-1)


def unit(x: Tensor) -> Tensor:
    """``x / |x|``. x: (..., d)."""
    return F.normalize(x, dim=-1, eps=1e-6)


def silu_unit(x: Tensor) -> Tensor:
    """``silu(x) / |silu(x)|``: keys of the delta rule (Yang et al. 2024, "Parallelizing linear transformers with the delta
    rule", section 3.3). x: (..., d).
    """
    return unit(F.silu(x))


def tensor_product(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Row-wise (face-splitting) product: ``f(x, y) . f(x', y') = (x . x') (y . y')``; with y left out ``(x . x')^2``.

    Args:
        x: (..., d).
        y: (..., e); by default x.

    Returns:
        (..., d e).
    """
    return (x[..., :, None] * (x if y is None else y)[..., None, :]).flatten(-2)


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Column-wise Kronecker product of a (..., n, d) and b (..., m, d): (..., n m, d), row (i, j) is ``a_i * b_j``.

    ``khatri_rao(a, b)^T khatri_rao(c, e) = (a^T c) * (b^T e)``: what makes attention over pairs of tokens linear.
    """
    return (a[..., :, None, :] * b[..., None, :, :]).flatten(-3, -2)


# Frequencies ---------------------------------------------------------------------------------------------------------


def gaussian_frequencies(
    count: int, size: int, *, orthogonal: bool = True, generator: torch.Generator | None = None
) -> Dense:
    """Rows w_i ~ N(0, I), independent or orthogonal within blocks of `size` (Choromanski et al. 2021, "Rethinking attention
    with Performers", section 2.4): random rotations, rows scaled by independent chi(size) lengths.

    Returns:
        (count, size).
    """
    rows = torch.randn(count, size, generator=generator, dtype=torch.float64)
    if orthogonal:
        blocks = torch.randn(-(-count // size), size, size, generator=generator, dtype=torch.float64)
        rows = polar(blocks).reshape(-1, size)[:count] * rows.norm(dim=1, keepdim=True)
    return Dense(rows.to(torch.get_default_dtype()))


def fastfood_frequencies(count: int, size: int, *, generator: torch.Generator | None = None) -> Operator:
    """Nearly Gaussian rows by ``S H G P H B`` (Le, Sarlos, Smola 2013, "Fastfood"): random signs B, a permutation P, Gaussian
    G and chi-distributed S between Hadamard transforms H; ``count / size`` such blocks one above the other. The diagonals
    are what a learned version trains (Chowdhury et al. 2022, "Learning the transformer kernel").

    Args:
        count: m, a multiple of `size`.
        size: d, for which a Hadamard matrix exists.
        generator: of the draws.

    Returns:
        (count, size).

    Raises:
        GramianError: m is not a multiple of d, or there is no Hadamard matrix of that size.
    """
    if count < 1 or count % size:
        raise GramianError(f"fastfood_frequencies: {count} features of size {size}; expected a multiple of {size}")

    def block() -> Operator:
        gauss = torch.randn(size, generator=generator)
        lengths = torch.randn(size, size, generator=generator).norm(dim=1) * (math.sqrt(size) / gauss.norm())
        signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        shuffle = Permutation(torch.randperm(size, generator=generator))
        mixing = Hadamard(size)
        made: Operator = Diagonal(lengths) @ mixing @ Diagonal(gauss) @ shuffle @ mixing @ Diagonal(signs)
        return made

    blocks = [block() for _ in range(count // size)]
    if len(blocks) == 1:
        return blocks[0]
    stacked: Operator = block_diag(*blocks) @ kron(Dense(torch.ones(len(blocks), 1)), Identity(size))
    return stacked


class MixtureFrequencies(nn.Module):
    """Frequencies drawn from a learned mixture of Gaussians: ``w = mu_c + sigma_c * n`` with fixed draws n, so that the
    spectral density is trained (Chowdhury et al. 2022, "Learning the transformer kernel", GMM-RKS). x (..., d) -> (..., m).

    Args:
        count: m; the draws go to the components in turn.
        size: d.
        components: of the mixture, diagonal covariances.
        generator: of the draws.
    """

    noise: Tensor

    def __init__(self, count: int, size: int, *, components: int = 2, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.mean = nn.Parameter(0.1 * torch.randn(components, size, generator=generator))
        self.log_deviation = nn.Parameter(torch.zeros(components, size))
        self.register_buffer("noise", gaussian_frequencies(count, size, generator=generator).weight)

    def frequencies(self) -> Tensor:
        """(m, d)."""
        which = torch.arange(len(self.noise), device=self.noise.device) % len(self.mean)
        return self.mean[which] + self.log_deviation.exp()[which] * self.noise

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T``."""
        return F.linear(x, self.frequencies().to(x.dtype))


# With parameters -----------------------------------------------------------------------------------------------------


class ExponentialFeatures(nn.Module):
    """Features that are exponentials, given by their exponents."""

    def exponents(self, x: Tensor) -> Tensor:
        """Logarithms of the features. x: (..., d) -> (..., m)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The features themselves, unscaled: they overflow where ``exponents`` does not."""
        return self.exponents(x).exp()


class PositiveFeatures(ExponentialFeatures):
    """FAVOR+: ``m^{-1/2} exp(w_i . x - |x|^2 / 2)``, unbiased for ``exp(x . y)`` (Choromanski et al. 2021, "Rethinking
    attention with Performers", lemma 1); hyperbolic ones add the features of -x, at half the variance and less.

    Args:
        frequencies: w, an operator (m, d) or a module (..., d) -> (..., m).
        hyperbolic: 2 m features.
        learned: whether an operator's factors are trained.
    """

    def __init__(self, frequencies: Operator | nn.Module, *, hyperbolic: bool = False, learned: bool = False) -> None:
        super().__init__()
        self.frequencies, self.hyperbolic = _held(frequencies, learned), hyperbolic

    def exponents(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., m), or (..., 2 m) for hyperbolic ones."""
        w = _projected(self.frequencies, x)
        w = torch.cat([w, -w], -1) if self.hyperbolic else w
        return w - x.square().sum(-1, keepdim=True) / 2 - math.log(w.shape[-1]) / 2  # type: ignore[no-any-return]


class TrigonometricFeatures(nn.Module):
    """``m^{-1/2} e^{|x|^2 / 2} [cos(w_i . x), sin(w_i . x)]``, unbiased for ``exp(x . y)``; without the exponential (`kernel`
    "gaussian") for ``exp(-|x - y|^2 / 2)``: random Fourier features (Rahimi and Recht 2007). They may be negative: the sum
    that normalises attention can vanish.

    Args:
        frequencies: w, an operator (m, d) or a module (..., d) -> (..., m); `MixtureFrequencies` learns the kernel.
        kernel: "softmax" or "gaussian".
        learned: whether an operator's factors are trained.
    """

    def __init__(self, frequencies: Operator | nn.Module, *, kernel: str = "gaussian", learned: bool = False) -> None:
        super().__init__()
        if kernel not in ("softmax", "gaussian"):
            raise GramianError(f"TrigonometricFeatures: kernel {kernel!r}; expected 'softmax' or 'gaussian'")
        self.frequencies, self.kernel = _held(frequencies, learned), kernel

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., 2 m)."""
        w = _projected(self.frequencies, x)
        features = torch.cat([w.cos(), w.sin()], -1) / math.sqrt(w.shape[-1])
        return features if self.kernel == "gaussian" else features * (x.square().sum(-1, keepdim=True) / 2).exp()


class CosineFeatures(ExponentialFeatures):
    """Frequency-domain features ``D exp(T C x)``: C the cosine transform, T the Gaussian quantiles of equidistributed
    points, D trained positive weights (Chen et al. 2024, "DiJiang", weighted quasi-Monte Carlo). m = d, no matrix product
    stored.

    Args:
        size: d.
        generator: of the order of the points.
    """

    quantiles: Tensor

    def __init__(self, size: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        points = (torch.randperm(size, generator=generator).double() + 0.5) / size
        self.register_buffer("quantiles", torch.special.ndtri(points).to(torch.get_default_dtype()))
        self.log_weight = nn.Parameter(torch.full((size,), -math.log(size) / 2))
        self.size = size

    def exponents(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return Cosine(self.size).apply(x) * self.quantiles.to(x.dtype) + self.log_weight.to(x.dtype)


class FeedForwardFeatures(nn.Module):
    """``softplus(W x + b)``: a trained positive map ("Trainable feed-forward kernel" 2023).

    Args:
        size: d.
        count: m.
    """

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, count)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., m)."""
        return F.softplus(_projected(self.linear, x))


def _held(frequencies: Operator | nn.Module, learned: bool) -> nn.Module:
    if isinstance(frequencies, nn.Module):
        return frequencies
    from gramian.nn import as_linear  # here, so that plain layers import faster

    return as_linear(frequencies).requires_grad_(learned)


def _projected(layer: nn.Module, x: Tensor) -> Tensor:
    """``W x + b`` in the dtype of x, whatever the layer's: exponents need the precision that the caller chose."""
    op = getattr(layer, "op", None)
    if isinstance(op, Operator):
        return op.to(dtype=x.dtype).apply(x)
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
    made: Tensor = layer(x)
    return made


FUNCTIONS: dict[str, FeatureMap] = {
    "elu1": elu1,
    "relu": relu,
    "silu_unit": silu_unit,
    "softmax": softmax,
    "tensor_product": tensor_product,
    "unit": unit,
}
"""The maps without parameters, by name."""


def feature_map(name: str) -> FeatureMap:
    """The map without parameters of that name.

    Raises:
        GramianError: unknown name; the message lists the nearest ones.
    """
    if name not in FUNCTIONS:
        known = ", ".join(FUNCTIONS)
        raise GramianError(f"feature map {name!r} is unknown{nearest(name, FUNCTIONS)}; expected one of {known}")
    return FUNCTIONS[name]
