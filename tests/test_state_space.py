"""HiPPO matrices, diagonal initialisations, kernels, long convolutions and random features, against independent formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import svdvals
from gramian.ops import fourier_blocks
from gramian.sequence import features
from gramian.sequence.long_convolution import (
    FiniteFilter,
    GaborKernel,
    LongKernel,
    bidirectional,
    causal_convolution,
    smooth,
    squash,
    two_sided_convolution,
)
from gramian.sequence.scan import scan
from gramian.sequence.state_space import (
    DiagonalStateSpace,
    Modes,
    bilinear,
    exponential_moments,
    exponential_sums,
    hippo,
    log_uniform_steps,
    normal_plus_low_rank,
    perturb_then_diagonalise,
    s4d,
    softmax_hold,
    zoh,
)
from gramian.sequence.transitions import DiagonalGate

# HiPPO ------------------------------------------------------------------------------------------------------------------


def test_legs_remembers_warped_legendre_polynomials() -> None:
    a, b = hippo(12)
    n = np.arange(12)
    for t in (0.05, 0.3, 1.0, 2.5):
        found = scipy.linalg.expm(t * a.numpy()) @ b.numpy()
        expected = np.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, 2 * np.exp(-t) - 1) * np.exp(-t)
        assert np.abs(found - expected).max() <= 1e-10


@pytest.mark.parametrize("measure", ["legt", "fout"])
def test_windows_forget(measure: str) -> None:
    """After an impulse, the state is the basis at its age, and leaves after the window's length, the better the more states."""
    a, b = hippo(64, measure)
    inside = scipy.linalg.expm(0.7 * a.numpy()) @ b.numpy()
    outside = scipy.linalg.expm(2.6 * a.numpy()) @ b.numpy()
    assert np.linalg.norm(outside) < 0.35 * np.linalg.norm(inside)
    constant = np.linalg.lstsq(a.numpy(), -b.numpy())[0]  # what a constant input leaves: the constant function
    assert constant[0] == pytest.approx(1, abs=1e-9)
    assert np.abs(constant[1:]).max() <= 1e-9


def test_legs_is_normal_minus_rank_one() -> None:
    for size in (4, 64):
        a, _ = hippo(size)
        values, vectors, p = normal_plus_low_rank(size)
        plus = a + torch.outer(p, p) + torch.eye(size, dtype=torch.float64) / 2
        assert (plus + plus.mT).abs().max() <= 1e-10
        rebuilt = (vectors * values) @ vectors.mH - torch.outer(p, p)
        assert (rebuilt - a).abs().max() <= 1e-10 * size**2


def test_initial_modes() -> None:
    inv, legs, lin = (s4d(64, kind).values for kind in ("inv", "legs", "lin"))
    assert torch.equal(lin.imag, math.pi * torch.arange(32).double())
    top = legs.imag.sort(descending=True).values[:3]
    assert (inv.imag.sort(descending=True).values[:3] / top - 1).abs().max() < 0.1  # S4D-Inv tracks S4D-LegS
    assert torch.equal(s4d(8, "real").values.real, torch.tensor([-1.0, -2, -3, -4], dtype=torch.float64))
    for kind in ("inv", "legs", "lin"):
        assert (s4d(64, kind).values.real + 0.5).abs().max() <= 1e-9


def transfer(modes: Modes, c: Tensor, points: Tensor) -> Tensor:
    """``C (s - A)^{-1} B`` for a readout c of the original states, both of each pair of modes."""
    assert modes.readout is not None
    weights = (c.to(modes.readout) @ modes.readout) * modes.input
    partners = weights.conj() / (points[:, None] - modes.values.conj())
    return (weights / (points[:, None] - modes.values) + partners).sum(1)


def test_perturb_then_diagonalise_keeps_the_system() -> None:
    a, b = hippo(64)
    modes = perturb_then_diagonalise(64)
    assert modes.values.real.max() <= -0.25
    full = torch.cat([modes.readout, modes.readout[:, modes.values.imag > 0].conj()], 1)  # type: ignore[index]
    assert full.shape == (64, 64)
    values = svdvals(full)
    assert values[0] / values[-1] <= 1e3
    diagonal = s4d(64, "legs")
    frequencies = torch.cat([torch.linspace(0, 1500, 400).double(), diagonal.values.imag, modes.values.imag])
    points = 1j * frequencies
    c = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resolvent = torch.linalg.solve(
        points[:, None, None] * torch.eye(64) - a, b.to(torch.complex128).expand(len(points), -1)
    )
    exact = resolvent @ c.to(torch.complex128)
    largest = exact.abs().max()
    assert (transfer(modes, c, points) - exact).abs().max() <= 0.03 * largest
    assert (transfer(diagonal, c, points) - exact).abs().max() > largest  # spikes at the modes


def test_the_normal_part_tends_to_legs_for_smooth_inputs() -> None:
    """S4D-LegS against the whole of HiPPO-LegS, read through the first two states, on damped oscillations: what converges
    weakly (its transfer function at the modes does not, see above).
    """
    points = torch.complex(torch.full((40,), 0.5), torch.linspace(0, 10, 40)).to(torch.complex128)
    errors = []
    for size in (16, 32, 64):
        a, b = hippo(size)
        c = torch.tensor([1.0, 0.5] + [0.0] * (size - 2), dtype=torch.float64)
        system = points[:, None, None] * torch.eye(size) - a
        exact = torch.linalg.solve(system, b.to(torch.complex128).expand(40, -1)) @ c.to(torch.complex128)
        errors.append(float((transfer(s4d(size, "legs"), c, points) - exact).abs().max() / exact.abs().max()))
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


# Kernels ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 400), seed=st.integers(0, 1000))
def test_two_levels_are_the_vandermonde_sum(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.complex(-torch.rand(3, 5, generator=generator), 6 * torch.randn(3, 5, generator=generator)).to(
        torch.complex128
    )
    w = torch.complex(*torch.randn(2, 2, 3, 5, generator=generator).double()).to(torch.complex128)
    powers = torch.exp(z[..., None] * torch.arange(length))
    expected = 2 * (w[..., None] * powers).sum(-2).real
    torch.testing.assert_close(exponential_sums(z, w, length), expected, rtol=1e-9, atol=1e-9)
    signal = torch.randn(2, 3, length, generator=generator).double()
    moments = (powers * signal.flip(-1)[:, :, None].to(powers)).sum(-1)
    torch.testing.assert_close(exponential_moments(z, signal), moments, rtol=1e-9, atol=1e-9)


def test_float32_kernel_of_16384() -> None:
    layer = DiagonalStateSpace(8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, b, c = (x.to(torch.complex128) for x in layer.discrete())
        exact = 2 * torch.einsum("hn,hnl->hl", b * c, torch.exp(z[..., None] * torch.arange(16384))).real
        assert (layer.kernel(16384) - exact).abs().max() <= 5e-6


def test_kernel_gradients() -> None:
    z = torch.complex(-torch.rand(2, 3).double(), torch.randn(2, 3).double()).requires_grad_()
    w = torch.complex(*torch.randn(2, 2, 3).double().unbind()).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, w: exponential_sums(z, w, 11), (z, w))
    signal = torch.randn(1, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, s: torch.view_as_real(exponential_moments(z, s)), (z, signal))


def test_discretisations() -> None:
    values = torch.complex(torch.tensor([-0.5, -2.0, -1e-9]).double(), torch.tensor([3.0, 0.0, 1e-9]).double())
    b = torch.complex(torch.ones(3).double(), torch.tensor([0.0, 1.0, -1.0]).double())
    step = torch.tensor(0.1, dtype=torch.float64)
    z, inputs = zoh(values, b, step)
    for i in range(3):  # x(dt) of x' = v x + b from 0, by the matrix exponential of the augmented system
        system = np.array([[values[i].item(), b[i].item()], [0, 0]])
        exact = scipy.linalg.expm(0.1 * system)
        assert abs(z[i].exp().item() - exact[0, 0]) <= 1e-13
        assert abs(inputs[i].item() - exact[0, 1]) <= 1e-13
    z, inputs = bilinear(values, b, step)
    for i in range(3):
        v = values[i].item()
        assert abs(z[i].exp().item() - (1 + 0.05 * v) / (1 - 0.05 * v)) <= 1e-13
        assert abs(inputs[i].item() - 0.1 * b[i].item() / (1 - 0.05 * v)) <= 1e-13
    z, inputs = softmax_hold(values[:2], b[:2], step, 20)
    for i in range(2):
        weights = np.exp(0.1 * values[i].item() * np.arange(20))
        assert abs(inputs[i].item() - b[i].item() / values[i].item() / weights.sum()) <= 1e-12


def test_steps_are_log_uniform() -> None:
    steps = log_uniform_steps(20000, 1e-3, 1e-1, generator=torch.Generator().manual_seed(0))
    assert steps.exp().min() >= 0.999e-3
    assert steps.exp().max() <= 1.001e-1
    assert float((steps < math.log(1e-2)).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_layer_is_a_scan_of_complex_gates() -> None:
    layer = DiagonalStateSpace(3, 8, generator=torch.Generator().manual_seed(0)).double()
    u = torch.randn(2, 50, 3, dtype=torch.float64)
    z, b, c = layer.discrete()
    # One head a channel; b and c are constant keys and reads.
    outputs, state = scan(DiagonalGate(z), (b, u[..., None].to(z)), c, method="sequential")
    found, end = layer(u)
    torch.testing.assert_close(found, 2 * outputs[..., 0].real + layer.skip * u, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(end, state[..., 0], rtol=1e-9, atol=1e-10)


def test_bad_state_spaces_are_refused() -> None:
    with pytest.raises(GramianError, match="did you mean legs"):
        DiagonalStateSpace(4, 8, initial="leg")
    with pytest.raises(GramianError, match="length"):
        DiagonalStateSpace(4, 8, discretisation="softmax")
    with pytest.raises(GramianError, match="even"):
        s4d(7)
    with pytest.raises(GramianError, match="'legs', 'legt' or 'fout'"):
        hippo(8, "lagt")
    with pytest.raises(GramianError, match="even"):
        hippo(7, "fout")


# Long convolutions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "length"), [(1, 1), (1, 5), (17, 17), (17, 40), (40, 9)])
def test_convolution_is_causal_and_exact(time: int, length: int) -> None:
    u, k = torch.randn(2, 3, time).double(), torch.randn(3, length).double()
    expected = np.stack([[np.convolve(u[b, h], k[h])[:time] for h in range(3)] for b in range(2)])
    np.testing.assert_allclose(causal_convolution(u, k), expected, atol=1e-12)
    two = bidirectional(k, torch.randn(3, length).double())
    full = np.stack(
        [[np.convolve(u[b, h], two[h])[length - 1 : length - 1 + time] for h in range(3)] for b in range(2)]
    )
    np.testing.assert_allclose(two_sided_convolution(u, two), full, atol=1e-12)


def test_gradients_of_the_convolution() -> None:
    u, k = torch.randn(2, 3, 7).double().requires_grad_(), torch.randn(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(causal_convolution, (u, k))
    assert torch.autograd.gradgradcheck(causal_convolution, (u, k))
    one = torch.func.vmap(lambda row: causal_convolution(row, k))(u)
    torch.testing.assert_close(one, causal_convolution(u, k))


def test_convolution_by_the_algebras_fourier_blocks() -> None:
    u, k = torch.randn(2, 3, 30).double(), torch.randn(3, 30).double()
    fourier = fourier_blocks(64).to(dtype=torch.float64)
    torch.testing.assert_close(causal_convolution(u, k, fourier), causal_convolution(u, k), rtol=1e-5, atol=1e-5)
    with pytest.raises(GramianError, match="at least 59"):
        causal_convolution(u, k, fourier_blocks(50))
    layer = FiniteFilter(LongKernel(3, 30, threshold=0.0), 3, fourier=fourier_blocks(60))
    layer(torch.randn(1, 30, 3))[0].square().sum().backward()
    assert layer.fourier is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.fourier.parameters())


def test_squash_and_smooth() -> None:
    k = torch.tensor([[0.5, -0.2, 0.05, -2.0]])
    torch.testing.assert_close(squash(k, 0.1), torch.tensor([[0.4, -0.1, 0.0, -1.9]]))
    expected = torch.tensor([[0.3, 0.35, -2.15, -1.95]]) / 3
    torch.testing.assert_close(smooth(k, 3), expected)
    with pytest.raises(GramianError, match="odd"):
        smooth(k, 4)


def test_flexconv_learns_its_size_and_bounds_its_frequency() -> None:
    kernel = GaborKernel(2, 101, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    sizes = []
    for deviation in (0.05, 0.2, 5.0):
        kernel.log_deviation.data.fill_(math.log(deviation))
        sizes.append(kernel(101).shape[1])
    assert sizes[0] < sizes[1] < sizes[2] == 101
    spectrum = torch.fft.rfft(kernel(101), n=2000).abs().square()
    cycles = torch.arange(1001) / 2000 * 50  # a unit of position has 50 steps
    inside = spectrum[:, cycles <= float(kernel.highest_frequency())].sum() / spectrum.sum()
    assert inside > 0.95


# Features ---------------------------------------------------------------------------------------------------------------


def kernel_entries(kind: str, x: Tensor, y: Tensor, draws: int, count: int, orthogonal: bool) -> Tensor:
    """`draws` independent estimates of exp(x . y)."""
    generator = torch.Generator().manual_seed(1)
    if orthogonal:  # each draw has whole blocks
        assert count % len(x) == 0
        rows = features.gaussian_frequencies(draws * count, len(x), generator=generator).weight
        w = rows.double().reshape(draws, count, len(x))
    else:
        w = torch.randn(draws, count, len(x), generator=generator, dtype=torch.float64)
    a, b = w @ x, w @ y
    half = ((x @ x + y @ y) / 2).exp()
    if kind == "trigonometric":
        return half * (a - b).cos().mean(1)
    if kind == "positive":
        return (a + b).exp().mean(1) / half
    return (a + b).cosh().mean(1) / half


def test_random_features_have_the_papers_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, generator=generator, dtype=torch.float64).unbind()
    x, y = 0.8 * x / x.norm(), 0.6 * y / y.norm()  # the fourth moments are e^(4 |x + y|^2) times the squares of these
    exact, z, delta = (x @ y).exp(), ((x + y) @ (x + y)), ((x - y) @ (x - y))
    trigonometric = z.exp() / exact**2 * (1 - (-delta).exp()) ** 2 / 2
    hyperbolic = z.exp() * exact**2 * (1 - (-z).exp()) ** 2 / 2
    positive = z.exp() * exact**2 * (1 - (-z).exp())
    for kind, expected in (("trigonometric", trigonometric), ("hyperbolic", hyperbolic), ("positive", positive)):
        found = (kernel_entries(kind, x, y, 400000, 1, False) - exact).square().mean()
        assert float(found / expected) == pytest.approx(1, abs=0.05), kind
        mean = kernel_entries(kind, x, y, 400000, 1, False).mean()
        assert float(mean / exact) == pytest.approx(1, abs=0.01), kind


def test_orthogonal_frequencies_do_better() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, generator=generator, dtype=torch.float64).unbind()
    x, y = 0.5 * x / x.norm(), 0.5 * y / y.norm()
    exact = (x @ y).exp()
    for kind in ("trigonometric", "positive"):
        free, orthogonal = (
            (kernel_entries(kind, x, y, 20000, 8, how) - exact).square().mean() for how in (False, True)
        )
        assert orthogonal < 0.95 * free, kind


def test_feature_modules_estimate_the_softmax_kernel() -> None:
    torch.manual_seed(0)
    x, y = (0.15 * torch.randn(2, 20, 16).double()).unbind()
    exact = (x @ y.mT).exp()
    many = features.gaussian_frequencies(2048, 16).to(dtype=torch.float64)
    fast = features.fastfood_frequencies(2048, 16).to(dtype=torch.float64)
    for made in (
        features.PositiveFeatures(many),
        features.PositiveFeatures(many, hyperbolic=True),
        features.TrigonometricFeatures(many, kernel="softmax"),
        features.PositiveFeatures(fast),
    ):
        assert ((made(x) @ made(y).mT) / exact - 1).abs().max() < 0.15
    gaussian = torch.exp(-torch.cdist(x, y).square() / 2)
    made = features.TrigonometricFeatures(many)
    assert (made(x) @ made(y).mT - gaussian).abs().max() < 0.05


def test_fastfood_rows_are_gaussian_lengths() -> None:
    rows = features.fastfood_frequencies(64 * 40, 64, generator=torch.Generator().manual_seed(0)).dense()
    assert rows.shape == (2560, 64)
    assert float(rows.norm(dim=1).mean()) == pytest.approx(math.sqrt(64), rel=0.02)
    assert float(rows.std()) == pytest.approx(1, rel=0.03)
    with pytest.raises(GramianError, match="multiple of 64"):
        features.fastfood_frequencies(100, 64)


def test_khatri_rao_makes_pairs_linear() -> None:
    k1, k2, v1, v2 = torch.randn(4, 7, 5, dtype=torch.float64)
    pairs = features.khatri_rao(k1, k2)
    assert pairs.shape == (49, 5)
    assert torch.equal(pairs[1 * 7 + 3], k1[1] * k2[3])
    found = pairs.mT @ features.khatri_rao(v1, v2)
    torch.testing.assert_close(found, (k1.mT @ v1) * (k2.mT @ v2), rtol=1e-10, atol=1e-10)
    x, y = torch.randn(2, 6, dtype=torch.float64)
    assert float(features.tensor_product(x) @ features.tensor_product(y)) == pytest.approx(float(x @ y) ** 2)


def test_plain_maps() -> None:
    x = torch.tensor([[-2.0, 0.5, 3.0]])
    torch.testing.assert_close(features.elu1(x), torch.tensor([[math.exp(-2), 1.5, 4.0]]))
    assert torch.equal(features.relu(x), torch.tensor([[0.0, 0.5, 3.0]]))
    assert float(features.softmax(x).sum()) == pytest.approx(1)
    for unit in (features.unit, features.silu_unit):
        assert float(unit(x).norm()) == pytest.approx(1)
    assert features.FeedForwardFeatures(3, 5)(x).shape == (1, 5)
    with pytest.raises(GramianError, match="did you mean .*elu1"):
        features.feature_map("elu")


@pytest.mark.parametrize("factor", [1.0, 6.0, 30.0])
def test_causal_favor_survives_large_keys(factor: float) -> None:
    """float32 against float64 by all pairs, in logarithms, with keys that grow: no maximum over the future is needed."""
    from gramian.sequence.recipes import mixer

    torch.manual_seed(0)
    layer = mixer("performer", 16, heads=2, count=32)
    x = torch.randn(1, 60, 16) * torch.linspace(0.2, 1, 60)[:, None] * factor
    with torch.no_grad():
        y, _ = layer(x)
        q, k, v = (layer.inputs.projections[name](x).double().unflatten(-1, (2, 8)).transpose(1, 2) for name in "qkv")
        made = layer.core.features.double()
        a, b = (made.exponents(z * 8**-0.25) for z in (q, k))
        scores = torch.logsumexp(a[..., :, None, :] + b[..., None, :, :], -1)
        lower = torch.ones(60, 60).tril() > 0
        out = scores.masked_fill(~lower, -torch.inf).softmax(-1) @ v
        expected = layer.output.projection.double()(out.transpose(1, 2).flatten(2))
    assert torch.isfinite(y).all()
    assert (y - expected).abs().max() <= 1e-4 * max(1.0, factor) * expected.abs().max()


def test_points_of_dijiang_are_equidistributed() -> None:
    quantiles = features.CosineFeatures(16).quantiles.sort().values
    for low, high in itertools.pairwise(torch.special.ndtr(quantiles)):
        assert float(high - low) == pytest.approx(1 / 16, abs=1e-6)
