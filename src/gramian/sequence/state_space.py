"""Linear time-invariant state spaces ``x' = A x + B u, y = C x``: initial matrices, discretisations, kernels, the layer.

Initialisers are pure functions of sizes (float64). A diagonal state space holds one of each pair of conjugate modes; a sum
over modes is twice its real part.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError, nearest
from gramian.linalg import eig, eigh
from gramian.ops.toeplitz import computable
from gramian.sequence.long_convolution import causal_convolution, with_skip

# HiPPO ---------------------------------------------------------------------------------------------------------------


def hippo(size: int, measure: str = "legs") -> tuple[Tensor, Tensor]:
    """State matrix A (n, n) and input B (n,) whose states are the coefficients of the past in orthogonal functions.

    * "legs": Legendre polynomials over the whole past, exponentially warped once time-invariant (Gu et al. 2020, "HiPPO",
      theorem 2; Gu et al. 2023, "How to train your HiPPO", theorem 4): ``e^{tA} B = sqrt(2n + 1) P_n(2 e^{-t} - 1) e^{-t}``;
    * "legt": Legendre polynomials over a window of length 2 (HiPPO, theorem 1);
    * "fout": Fourier functions over a window of length 2 ("How to train your HiPPO", theorem 6).

    Args:
        size: n; even for "fout".
        measure: see above.

    Raises:
        GramianError: unknown measure, or an odd size for "fout".
    """
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    if measure == "legs":
        return -(torch.outer(root, root).tril(-1) + torch.diag(n + 1)), root
    if measure == "legt":
        sign = (-1.0) ** (n[:, None] - n)
        return -torch.outer(root, root) * torch.where(n[:, None] < n, sign, 1.0) / 2, root / 2
    if measure != "fout":
        raise GramianError(f"hippo: measure {measure!r}; expected 'legs', 'legt' or 'fout'")
    if size % 2:
        raise GramianError(f"hippo: size {size}; expected an even one for 'fout'")
    # Constant, then pairs of cosine and sine; the sine of frequency zero is never driven.
    frequency = torch.stack([torch.zeros(size // 2), torch.arange(size // 2)], 1).flatten()[1:].to(n)
    b = torch.zeros_like(n)
    b[::2] = math.sqrt(2)
    b[0] = 1
    turning = torch.diag(frequency, -1) - torch.diag(frequency, 1)
    return math.pi * turning - torch.outer(b, b), b


class NormalPlusLowRank(NamedTuple):
    """``A = V diag(values) V^H - p p^T`` with a unitary V."""

    values: Tensor
    """(n,), complex; in conjugate pairs."""
    vectors: Tensor
    """V, (n, n), complex."""
    low_rank: Tensor
    """p, (n,), real."""


def normal_plus_low_rank(size: int) -> NormalPlusLowRank:
    """HiPPO-LegS as a normal matrix minus a rank-one one (Gu et al. 2022, "Efficiently modeling long sequences with
    structured state spaces", appendix C): ``A + p p^T = -I/2 + skew`` with ``p_n = sqrt(n + 1/2)``.
    """
    a, _ = hippo(size)
    p = (torch.arange(size, dtype=torch.float64) + 0.5).sqrt()
    skew = a + torch.outer(p, p) + torch.eye(size, dtype=torch.float64) / 2
    imaginary, vectors = eigh(-1j * skew)
    return NormalPlusLowRank(torch.complex(torch.full_like(imaginary, -0.5), imaginary), vectors, p)


# Diagonal initialisations --------------------------------------------------------------------------------------------


class Modes(NamedTuple):
    """A diagonal state space of n real states, one of each pair of conjugate modes: ``y = 2 Re sum_m C_m x_m``."""

    values: Tensor
    """Eigenvalues, (m,), complex, with negative real parts; m = n / 2, or a few more where some eigenvalues are real."""
    input: Tensor
    """B, (m,), complex."""
    readout: Tensor | None = None
    """Reads the original states: ``C`` (n,) in the original basis is ``C @ readout`` (m,). None where there is none."""


def s4d(size: int, kind: str = "legs") -> Modes:
    """Initial modes of S4D (Gu et al. 2022, "On the parameterization and initialization of diagonal state space models",
    section 4).

    * "lin": ``-1/2 + i pi m``;
    * "inv": ``-1/2 + i (n / pi) (n / (2 m + 1) - 1)``;
    * "legs": the normal part of HiPPO-LegS, with its input (the paper's B = 1 is the others');
    * "real": ``-(m + 1)``.

    Args:
        size: n, even.
        kind: see above.

    Raises:
        GramianError: odd size or unknown kind.
    """
    if size < 2 or size % 2:
        raise GramianError(f"s4d: size {size}; expected an even number")
    m = torch.arange(size // 2, dtype=torch.float64)
    half, ones = torch.full_like(m, -0.5), torch.ones(size // 2, dtype=torch.complex128)
    if kind == "lin":
        return Modes(torch.complex(half, math.pi * m), ones)
    if kind == "inv":
        return Modes(torch.complex(half, size / math.pi * (size / (2 * m + 1) - 1)), ones)
    if kind == "real":
        return Modes(torch.complex(-(m + 1), torch.zeros_like(m)), ones)
    if kind != "legs":
        raise GramianError(f"s4d: kind {kind!r}; expected 'lin', 'inv', 'legs' or 'real'")
    parts = normal_plus_low_rank(size)
    kept = parts.values.imag > 0
    order = parts.values.imag[kept].argsort()
    vectors = parts.vectors[:, kept][:, order]
    # Without the rank-one part the input is halved: the kernel of the normal part then tends to that of LegS.
    return Modes(parts.values[kept][order], vectors.mH @ (hippo(size)[1] / 2).to(vectors), vectors)


@functools.lru_cache(maxsize=16)
def perturb_then_diagonalise(
    size: int,
    *,
    weight: float = 0.3,
    start: float = 1e-4,
    margin: float = 0.3,
    steps: int = 300,
    seed: int = 0,
) -> Modes:
    """Modes of HiPPO-LegS perturbed by the E that trades the condition of the eigenvectors against its size: S4-PTD (Yu et
    al. 2024, "Robustifying state-space models for long sequences via approximate diagonalization").

    LegS itself cannot be diagonalised in floating point; its normal part can, but is another system. Here
    ``min_E log cond_F(V) + weight log |E|_F`` over real E by Adam, eigenvalues held left of ``-margin`` (ours: the paper
    gives no algorithm). A few seconds for 64 states; the last 16 results are kept.

    Args:
        size: n, even.
        weight: of the size of E.
        start: size of the random E to start from, relative to A in spectral norm.
        margin: of the eigenvalues' real parts.
        steps: of Adam.
        seed: of the start.
    """
    if size < 2 or size % 2:
        raise GramianError(f"perturb_then_diagonalise: size {size}; expected an even number")
    a, b = hippo(size)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scale = start * float(torch.linalg.matrix_norm(a, 2) / torch.linalg.matrix_norm(noise, 2))
    with torch.enable_grad():
        e = (scale * noise).requires_grad_()
        optimizer = torch.optim.Adam([e], lr=RATE * scale)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            values, vectors = eig(a + e)
            condition = vectors.abs().square().sum() * torch.linalg.inv(vectors).abs().square().sum()
            loss = condition.log() / 2 + weight * e.norm().log() + 10 * (values.real + margin).relu().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    values, vectors = eig(a + e.detach())
    inputs = torch.linalg.solve(vectors, b.to(vectors))
    kept = values.imag >= 0
    share = torch.where(values.imag[kept] > 0, 1.0, 0.5)  # a real eigenvalue has no partner
    return Modes(values[kept], inputs[kept] * share, vectors[:, kept])


RATE = 0.3
"""First learning rate of ``perturb_then_diagonalise``, relative to the entries of the first E."""


def log_uniform_steps(
    count: int, shortest: float = 1e-3, longest: float = 1e-1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Logarithms (count,) of step sizes, uniform between those of the two: a step of dt sees a past of about 1 / dt tokens
    ("How to train your HiPPO", section 4).
    """
    low, high = math.log(shortest), math.log(longest)
    return low + (high - low) * torch.rand(count, generator=generator)


# Discretisations and kernels -----------------------------------------------------------------------------------------


def zoh(values: Tensor, inputs: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: ``log a = dt values``, ``b = inputs (e^{dt values} - 1) / values``; exact for piecewise constant
    inputs, by a series where dt values is small.

    Args:
        values: (..., m), complex.
        inputs: (..., m), complex.
        step: dt, (...,).

    Returns:
        log a and b, (..., m).
    """
    z = step[..., None] * values
    return z, inputs * step[..., None] * _phi(z)


def bilinear(values: Tensor, inputs: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Tustin's rule: ``a = (1 + dt values / 2) / (1 - dt values / 2)``, ``b = dt inputs / (1 - dt values / 2)``. As `zoh`."""
    half = step[..., None] * values / 2
    return ((1 + half) / (1 - half)).log(), inputs * step[..., None] / (1 - half)


def softmax_hold(values: Tensor, inputs: Tensor, step: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """DSS-softmax (Gupta et al. 2022, "Diagonal state spaces are as effective as structured state spaces", proposition 1):
    the powers of every mode are normalised to sum to one over `length` steps. For values with negative real parts.
    """
    z = step[..., None] * values
    return z, inputs / values * torch.expm1(z) / torch.expm1(length * z)


def _phi(z: Tensor) -> Tensor:
    """``(e^z - 1) / z``, complex."""
    small = z.abs() < 1e-2
    safe = torch.where(small, torch.ones_like(z), z)
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return torch.where(small, series, (safe.exp() - 1) / safe)


Tables = tuple[Tensor, Tensor]
"""Powers of modes at whole blocks, (..., rows, m), and within one, (..., block, m)."""


def exponential_tables(exponents: Tensor, length: int) -> Tables:
    """``e^{exponents i P}`` and ``e^{exponents j}``, P about the root of `length`: all that `exponential_sums` and
    `exponential_moments` need of the exponents, to share between them. Made in double the precision, so that the phases of
    long kernels stay exact.
    """
    block = math.isqrt(max(length - 1, 0)) + 1
    rows = max(1, -(-length // block))
    fine = exponents.to(torch.complex128)
    places = torch.arange(max(block, rows), dtype=torch.float64, device=exponents.device)
    outer = (fine[..., None, :] * (block * places[:rows, None])).exp()
    inner = (fine[..., None, :] * places[:block, None]).exp()
    return outer.to(exponents.dtype), inner.to(exponents.dtype)


def exponential_sums(exponents: Tensor, weights: Tensor, length: int, tables: Tables | None = None) -> Tensor:
    """``K[l] = 2 Re sum_m weights_m e^{exponents_m l}`` for l = 0 ... length - 1: the kernel of a diagonal state space.

    With l = i P + j it is one real matrix product of tables of length / P and P rows: exponentials fall from ``length`` to
    about ``2 sqrt(length)`` a mode.

    Args:
        exponents: (..., m), complex.
        weights: (..., m), complex; may have more leading dimensions than `exponents`.
        length: L.
        tables: of the same exponents and length, if there are any.

    Returns:
        (..., L), real, in the precision of `weights`.
    """
    outer, inner = tables or exponential_tables(exponents, length)
    left, right = weights[..., None, :] * outer, inner.mT
    product = torch.cat([left.real, -left.imag], -1) @ torch.cat([right.real, right.imag], -2)
    return 2 * product.flatten(-2)[..., :length]


def exponential_moments(exponents: Tensor, signal: Tensor, tables: Tables | None = None) -> Tensor:
    """``sum_t e^{exponents_m (L - 1 - t)} signal_t``, the adjoint of `exponential_sums`: the state that a signal leaves.

    Args:
        exponents: (H, m), complex.
        signal: (batch, H, L), real, oldest entry first.
        tables: of the same exponents and length, if there are any.

    Returns:
        (batch, H, m), complex.
    """
    batch, channels, length = signal.shape
    outer, inner = (table.flip(-2) for table in tables or exponential_tables(exponents, length))
    rows, block = outer.shape[-2], inner.shape[-2]
    if rows * block > length:
        signal = F.pad(signal, (rows * block - length, 0))
    blocks = signal.movedim(1, 0).reshape(channels, batch * rows, block)
    sums = blocks @ torch.cat([inner.real, inner.imag], -1)
    real, imaginary = sums.reshape(channels, batch, rows, -1).chunk(2, -1)
    return (outer[:, None] * torch.complex(real, imaginary)).sum(2).movedim(1, 0)


# The layer -----------------------------------------------------------------------------------------------------------

DISCRETISATIONS = ("zoh", "bilinear", "softmax")
INITIAL = ("legs", "inv", "lin", "real", "ptd")


class DiagonalStateSpace(nn.Module):
    """One diagonal state space a channel: ``x' = diag(values) x + B u, y = 2 Re C x + D u``.

    Sequences run as a convolution with the kernel, single tokens as the recurrence. Parameters are ``log(-Re values)``,
    ``Im values``, B and C as pairs of real numbers, ``log dt`` and D; train all but C and D at a small rate (1e-3) and
    without weight decay, as the papers do.

    Args:
        channels: H.
        states: n, real states a channel.
        initial: modes to start from: "legs", "inv", "lin", "real" (`s4d`), "ptd" (`perturb_then_diagonalise`).
        discretisation: "zoh", "bilinear", or "softmax" (DSS), which needs `length`.
        steps: shortest and longest dt.
        length: of the sequences to normalise for, "softmax" only.
        generator: of C and dt.

    Raises:
        GramianError: unknown names, or "softmax" without a length.
    """

    def __init__(
        self,
        channels: int,
        states: int = 64,
        *,
        initial: str = "legs",
        discretisation: str = "zoh",
        steps: tuple[float, float] = (1e-3, 1e-1),
        length: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if initial not in INITIAL:
            expected = ", ".join(INITIAL)
            raise GramianError(f"initial {initial!r} is unknown{nearest(initial, INITIAL)}; expected one of {expected}")
        if discretisation not in DISCRETISATIONS or (discretisation == "softmax") != (length is not None):
            raise GramianError(
                f"discretisation {discretisation!r} with length {length}; expected one of {', '.join(DISCRETISATIONS)}, and "
                "a length for 'softmax' only"
            )
        modes = perturb_then_diagonalise(states) if initial == "ptd" else s4d(states, initial)
        count = len(modes.values)
        if initial == "ptd":
            assert modes.readout is not None
            original = torch.randn(channels, states, generator=generator, dtype=torch.float64)
            readout = original.to(modes.readout) @ modes.readout
        else:
            parts = torch.randn(2, channels, count, generator=generator) * math.sqrt(0.5)
            readout = torch.complex(parts[0], parts[1])
        self.discretisation, self.length = discretisation, length
        self.log_step = nn.Parameter(log_uniform_steps(channels, *steps, generator=generator))
        self.log_decay = nn.Parameter(_float(modes.values.real.neg().log()).expand(channels, -1).clone())
        self.frequency = nn.Parameter(_float(modes.values.imag).expand(channels, -1).clone())
        self.input = nn.Parameter(_float(torch.view_as_real(modes.input)).expand(channels, -1, -1).clone())
        self.readout = nn.Parameter(_float(torch.view_as_real(readout.resolve_conj())))
        self.skip = nn.Parameter(torch.randn(channels, generator=generator))

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """``log a``, b and C of the recurrence ``x_t = a x_{t-1} + b u_t, y_t = 2 Re C x_t``; each (H, m), complex."""
        values = torch.complex(-computable(self.log_decay).exp(), computable(self.frequency))
        inputs, step = torch.view_as_complex(computable(self.input)), computable(self.log_step).exp()
        if self.discretisation == "softmax":
            assert self.length is not None
            pair = softmax_hold(values, inputs, step, self.length)
        else:
            pair = (zoh if self.discretisation == "zoh" else bilinear)(values, inputs, step)
        return (*pair, torch.view_as_complex(computable(self.readout)))

    def kernel(self, length: int) -> Tensor:
        """The response to an impulse, without D: (H, length)."""
        exponents, inputs, readout = self.discrete()
        return exponential_sums(exponents, inputs * readout, length)

    def forward(self, u: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and the state after the sequence.

        Args:
            u: (batch, time, H).
            state: (batch, H, m), complex; None for zero.
            lengths: (batch,), how many tokens of each row are real (the first ones); None for all.

        Returns:
            y (batch, time, H) in the dtype of u, and the state (batch, H, m).
        """
        exponents, inputs, readout = self.discrete()
        length = u.shape[1]
        columns = computable(u).mT.contiguous()  # (batch, H, time)
        if length == 1 and lengths is None:
            new = inputs * columns
            new = new if state is None else exponents.exp() * state + new
            y = 2 * (readout * new).sum(-1, keepdim=True).real + computable(self.skip)[:, None] * columns
        else:
            tables = exponential_tables(exponents, length)
            kernel = exponential_sums(exponents, inputs * readout, length, tables)
            y = causal_convolution(columns, with_skip(kernel, computable(self.skip)))
            if state is not None:
                y = y + exponential_sums(exponents, readout * exponents.exp() * state, length, tables)
            new = inputs * exponential_moments(exponents, at_the_end(columns, lengths), tables)
            if state is not None:
                taken = torch.full_like(u[:, 0, 0], length, dtype=torch.float32) if lengths is None else lengths
                new = new + (exponents * taken[:, None, None]).exp() * state
        return y.mT.to(u.dtype), new


def at_the_end(columns: Tensor, lengths: Tensor | None) -> Tensor:
    """The real entries of each row moved to its end, zeros before them.

    Args:
        columns: (batch, H, time).
        lengths: (batch,), how many entries are real (the first ones); None for all.
    """
    if lengths is None:
        return columns
    time = columns.shape[-1]
    places = (torch.arange(time, device=columns.device) - time + lengths[:, None])[:, None]
    taken = columns.gather(-1, places.clamp_min(0).expand_as(columns))
    return taken * (places >= 0)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.get_default_dtype())
