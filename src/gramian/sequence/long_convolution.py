"""Convolutions as long as the sequence: the product by Fourier transforms, and kernels given directly or implicitly.

A kernel module gives ``kernel(length)``: (H, length), lag 0 first, from numbers of its own.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.ops import Operator
from gramian.ops.toeplitz import computable, fast_length

# Convolution ---------------------------------------------------------------------------------------------------------


def causal_convolution(u: Tensor, kernel: Tensor, fourier: Operator | None = None) -> Tensor:
    """``y_t = sum_{s <= t} kernel_{t-s} u_s`` along the last axis, zero-padded so that nothing wraps around.

    Args:
        u: (..., T).
        kernel: (..., L), broadcast against u; lags from T on have no effect.
        fourier: the transform to use in place of torch's, a real operator (2 n, 2 n) on real parts followed by imaginary
            parts, n >= T + min(L, T) - 1: ``ops.fourier_blocks(n)`` is the Fourier transform as a block low-rank (Monarch)
            matrix; with other numbers in its blocks it is FlashButterfly's learned one (Fu et al. 2023, "Simple
            hardware-efficient long convolutions for sequence modeling", section 3.3). Its transpose serves as inverse.

    Returns:
        (..., T), in the dtype of u, complex where one of them is; half precision is computed in float32.

    Raises:
        GramianError: the transform is too short.
    """
    time = u.shape[-1]
    x, k = computable(u), computable(kernel[..., :time])
    needed = time + k.shape[-1] - 1
    if fourier is None:
        n = fast_length(needed)
        if x.is_complex() or k.is_complex():
            z: Tensor = torch.fft.ifft(torch.fft.fft(x, n=n) * torch.fft.fft(k, n=n))
            return z[..., :time]
        y: Tensor = _Convolution.apply(x, k, n)  # type: ignore[no-untyped-call]
        return y.to(u.dtype)
    n = fourier.shape[0] // 2
    if n < needed or fourier.shape != (2 * n, 2 * n):
        raise GramianError(
            f"causal_convolution: a transform of shape {fourier.shape}; expected (2 n, 2 n) with n at least {needed}"
        )
    spectra = [fourier.apply(F.pad(part, (0, 2 * n - part.shape[-1]))) for part in (x, k)]
    (a, b), (c, d) = (torch.split(spectrum, n, -1) for spectrum in spectra)
    product = torch.cat([a * c - b * d, a * d + b * c], -1)
    return (fourier.T.apply(product) * math.sqrt(n))[..., :time].to(u.dtype)


class _Convolution(torch.autograd.Function):
    """Real and causal by transforms of length n. Torch's own gradient of ``rfft`` runs a complex transform of the whole length;
    this one takes real ones, and keeps no spectrum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, k: Tensor, n: int) -> Tensor:
        y: Tensor = torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(k, n=n), n=n)
        return y[..., : x.shape[-1]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.n = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (x, k), n = ctx.saved_tensors, ctx.n
        spectrum = _conjugated(torch.fft.rfft(grad, n=n))

        def against(other: Tensor, like: Tensor) -> Tensor:
            product = (spectrum * torch.fft.rfft(other, n=n)).sum_to_size(*like.shape[:-1], n // 2 + 1)
            correlation: Tensor = torch.fft.irfft(_conjugated(product), n=n)
            return correlation[..., : like.shape[-1]]

        wanted = ctx.needs_input_grad
        return (against(k, x) if wanted[0] else None), (against(x, k) if wanted[1] else None), None


def _conjugated(z: Tensor) -> Tensor:
    """In place: spectra are large, and memory is slow."""
    z.imag.neg_()
    return z


def bidirectional(forward: Tensor, backward: Tensor) -> Tensor:
    """One kernel (..., 2 L - 1) over the lags -(L - 1) ... L - 1 of a causal kernel and of one of the future (..., L) each;
    lag 0 is the causal one's alone (the papers' sums of two spectra count it twice).
    """
    return torch.cat([backward[..., 1:].flip(-1), forward], -1)


def two_sided_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """``y_t = sum_s kernel_{t-s} u_s`` with lags of both signs. u: (..., T); kernel: (..., 2 L - 1) as of `bidirectional`."""
    time, reach = u.shape[-1], (kernel.shape[-1] - 1) // 2
    padded = F.pad(u, (0, reach))
    return causal_convolution(padded, kernel)[..., reach : reach + time]


def with_skip(kernel: Tensor, skip: Tensor) -> Tensor:
    """The kernel (H, L) of ``kernel conv u + skip * u``: skip (H,) is a part of lag 0."""
    return kernel + F.pad(skip[:, None], (0, kernel.shape[-1] - 1))


def squash(kernel: Tensor, threshold: float) -> Tensor:
    """Soft threshold ``sign(k) max(|k| - threshold, 0)``: the regulariser of long convolutions (Fu et al. 2023, "Simple
    hardware-efficient long convolutions", eq. 3). kernel: any shape.
    """
    return F.softshrink(kernel, threshold)


def smooth(kernel: Tensor, width: int) -> Tensor:
    """Moving average over an odd number of lags (ibid., section 3.2). kernel: (..., L).

    Raises:
        GramianError: an even width.
    """
    if width < 1 or width % 2 == 0:
        raise GramianError(f"smooth: width {width}; expected an odd number")
    flat = kernel.reshape(-1, 1, kernel.shape[-1])
    return F.avg_pool1d(flat, width, 1, width // 2, count_include_pad=True).reshape(kernel.shape)


# Kernels -------------------------------------------------------------------------------------------------------------


class LongKernel(nn.Module):
    """The kernel itself as parameter, squashed and smoothed (Fu et al. 2023, "Simple hardware-efficient long convolutions for
    sequence modeling"). Train it at a small rate (1e-3).

    Args:
        channels: H.
        length: L; later lags are zero.
        threshold: of `squash`; 0 for none.
        width: of `smooth`; 1 for none.
        dropout: of kernel entries, in training.
        decay: start from ``exp(-(l / L) (H / 2)^(h / H))`` times the noise, as the paper's "double exponential"; else plain.
        generator: of the start.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        threshold: float = 1e-3,
        width: int = 1,
        dropout: float = 0.0,
        decay: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        start = torch.randn(channels, length, generator=generator)
        if decay:
            rate = (channels / 2) ** (torch.arange(channels) / channels)
            start = 0.02 * start * torch.exp(-torch.arange(length) / length * rate[:, None])
        else:
            start = 0.002 * start
        self.values = nn.Parameter(start)
        self.length, self.threshold, self.width, self.dropout = length, threshold, width, dropout

    def forward(self, length: int) -> Tensor:
        """(H, length), or (H, L) where that is shorter."""
        k = smooth(squash(self.values, self.threshold), self.width)
        return F.dropout(k, self.dropout, self.training)[:, :length]


class GaborKernel(nn.Module):
    """FlexConv's kernel (Romero et al. 2022, "FlexConv: continuous kernel convolutions with differentiable kernel sizes"):
    a multiplicative anisotropic Gabor network over positions in [-1, 1], under a Gaussian mask whose width is learned.

    Positions run from the present (lag 0, position -1 here, where the mask has its mean) to the largest lag. The mask is cut
    where it falls below `cut`: the kernel's size is trained.

    Args:
        channels: H.
        length: L, the largest size.
        hidden: width of the network.
        layers: Gabor layers.
        deviation: of the mask at the start, in units of positions.
        cut: see above.
        generator: of the start.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        hidden: int = 32,
        layers: int = 3,
        deviation: float = 0.3,
        cut: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.length, self.cut = length, cut

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=generator) - 1

        # Gamma(6 / (l + 1), 1) by its mean: deterministic given the generator.
        spread = torch.stack([torch.full((hidden,), 6.0 / (layer + 1)) for layer in range(1, layers + 1)])
        self.envelope = nn.Parameter(spread.sqrt() * (0.5 + torch.rand(layers, hidden, generator=generator)))
        self.centre = nn.Parameter(uniform(layers, hidden))
        self.frequency = nn.Parameter(25.6 / math.sqrt(length + 1) * spread * uniform(layers, hidden))
        self.phase = nn.Parameter(math.pi * uniform(layers, hidden))
        bound = math.sqrt(6.0 / hidden)
        self.weight = nn.Parameter(bound * uniform(layers - 1, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers - 1, hidden))
        self.out = nn.Parameter(bound / math.sqrt(length) * uniform(channels, hidden))
        self.log_deviation = nn.Parameter(torch.tensor(math.log(deviation)))

    def size(self) -> int:
        """How many lags the mask leaves."""
        reach = float(self.log_deviation.detach().exp()) * math.sqrt(-2 * math.log(self.cut))
        return max(1, min(self.length, 1 + int(reach * (self.length - 1) / 2)))

    def forward(self, length: int) -> Tensor:
        """(H, the smallest of length, L and the mask's size)."""
        count = min(length, self.length if torch.compiler.is_compiling() else self.size())
        x = -1 + 2 * torch.arange(count, device=self.out.device, dtype=self.out.dtype)[:, None] / max(
            self.length - 1, 1
        )

        def gabor(layer: int) -> Tensor:
            envelope = torch.exp(-0.5 * (self.envelope[layer] * (x - self.centre[layer])).square())
            return envelope * torch.sin(self.frequency[layer] * x + self.phase[layer])

        h = gabor(0)
        for layer in range(1, len(self.phase)):
            h = F.linear(h, self.weight[layer - 1], self.bias[layer - 1]) * gabor(layer)
        mask = torch.exp(-0.5 * ((x[:, 0] + 1) / self.log_deviation.exp()).square())
        return F.linear(h, self.out).mT * mask

    def highest_frequency(self) -> Tensor:
        """An upper bound of the kernel's frequency in cycles over [-1, 1]: FlexConv's regulariser compares it with the
        sampling's limit, (L - 1) / 4 of these cycles a unit.
        """
        deviations = self.envelope.abs() / math.pi
        return (self.frequency.abs() / (2 * math.pi) + deviations).amax(1).sum()


class ImplicitKernel(nn.Module):
    """Hyena's filter (Poli et al. 2023, "Hyena hierarchy", section 3.3), as used by Monarch Mixer: a small network with sine
    activations of the position's Fourier features, under exponential windows of different lengths.

    Args:
        channels: H.
        length: L; later lags are zero.
        hidden: width of the network.
        features: of the position: itself and pairs of cosine and sine; odd.
        frequency: of the sines.
        generator: of the start.
    """

    features: Tensor

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        hidden: int = 16,
        features: int = 5,
        frequency: float = 10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if features < 1 or features % 2 == 0:
            raise GramianError(f"ImplicitKernel: {features} features of the position; expected an odd number")
        self.length = length
        place = torch.arange(length)[:, None] / max(length - 1, 1)
        bands = torch.arange(1, features // 2 + 1) * (2 * math.pi)
        self.register_buffer("features", torch.cat([place, (bands * place).cos(), (bands * place).sin()], 1))
        sizes = [features, hidden, hidden, channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.copy_(bound * (2 * torch.rand(layer.weight.shape, generator=generator) - 1))
                layer.bias.copy_(bound * (2 * torch.rand(layer.bias.shape, generator=generator) - 1))
        self.sine = nn.Parameter(torch.full((2, hidden), frequency))
        # Windows fall to 1 % after 0.3 to 1.5 of the length.
        self.decay = nn.Parameter(-math.log(1e-2) / torch.linspace(0.3, 1.5, channels))

    def forward(self, length: int) -> Tensor:
        """(H, length), or (H, L) where that is shorter."""
        count = min(length, self.length)
        h = self.features[:count].to(self.decay.dtype)
        place = h[:, 0]
        for layer, frequency in zip(self.layers, self.sine, strict=False):
            h = torch.sin(frequency * layer(h))
        k = self.layers[-1](h).mT * torch.exp(-self.decay.abs()[:, None] * place)
        return k / math.sqrt(self.length)  # type: ignore[no-any-return]


# As a layer ----------------------------------------------------------------------------------------------------------


class FiniteFilter(nn.Module):
    """Causal convolution with the kernel of a module, one a channel, plus ``skip * u``. A decoder holds the last L - 1
    inputs.

    Args:
        kernel: ``kernel(length)`` -> (H, at most length); ``kernel.length`` is L.
        channels: H.
        fourier: see ``causal_convolution``; held and trained as a structured layer's factors would be, or None.
    """

    def __init__(self, kernel: nn.Module, channels: int, *, fourier: Operator | None = None) -> None:
        super().__init__()
        self.kernel, self.skip = kernel, nn.Parameter(torch.ones(channels))
        self.fourier = None
        if fourier is not None:
            from gramian.nn import StructuredLinear  # here, so that plain layers import faster

            self.fourier = StructuredLinear(fourier)

    def forward(self, u: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and the last inputs.

        Args:
            u: (batch, time, H).
            state: (batch, H, L - 1), the inputs before, oldest first; None for zeros.
            lengths: (batch,), how many tokens of each row are real (the first ones); None for all.

        Returns:
            y (batch, time, H) in the dtype of u, and the inputs (batch, H, L - 1).
        """
        time, reach = u.shape[1], int(self.kernel.length) - 1  # type: ignore[arg-type]
        columns = computable(u).mT  # (batch, H, time)
        past = columns.new_zeros(*columns.shape[:2], reach) if state is None else state.to(columns)
        long = torch.cat([past, columns], -1)
        kernel = with_skip(computable(self.kernel(reach + 1 if state is not None else time)), computable(self.skip))
        if time == 1:
            y = (long[..., long.shape[-1] - kernel.shape[-1] :] * kernel.flip(-1)).sum(-1, keepdim=True)
        else:
            op = None if self.fourier is None else self.fourier.op
            y = causal_convolution(columns if state is None else long, kernel, op)[..., -time:]
        if lengths is None:
            last = long[..., long.shape[-1] - reach :]
        else:
            places = lengths[:, None] + torch.arange(reach, device=u.device)
            last = long.gather(-1, places[:, None].expand(-1, long.shape[1], -1))
        return y.mT.to(u.dtype), last
