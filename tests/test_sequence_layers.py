"""Sequence mixers: what all of them promise, and each against its paper's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.nn import StructuredLinear
from gramian.sequence.cores import Recurrent
from gramian.sequence.features import PositiveFeatures, gaussian_frequencies
from gramian.sequence.inputs import Layout, MixerState
from gramian.sequence.mixer import SequenceMixer
from gramian.sequence.recipes import RECIPES, mixer, structured
from gramian.sequence.rules import GatedRule

DIM, TIME = 16, 37
OPTIONS: dict[str, dict[str, Any]] = {
    "delta_product": {"householders": 2, "beta": "hard"},
    "mamba2": {"key_dim": 8, "value_dim": 8, "groups": 2},
    "rwkv7": {"rank": 4},
    "gla": {"rank": 4},
    "s4d": {"states": 8},
    "dss": {"states": 8, "length": TIME},
    "s4_ptd": {"states": 8},
    "long_conv": {"length": 24, "dropout": 0.0},
    "flex_conv": {"length": 24},
    "monarch_mixer": {"length": 24},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, OPTIONS.get(name, {})) for name in RECIPES} | {
    "delta_net, negative eigenvalues": ("delta_net", {"beta": "two_sigmoid"}),
    "delta_product, one, no gate": ("delta_product", {"householders": 1, "gated": False}),
    "mamba2, signed": ("mamba2", {"key_dim": 8, "value_dim": 8, "signed": True}),
    "performer, hyperbolic": ("performer", {"hyperbolic": True, "count": 8}),
    "transformer_kernel, fastfood": ("transformer_kernel", {"frequencies": "fastfood", "count": 8}),
    "transnormer, diagonal": ("transnormer", {"block": 8}),
    "dss, exponential": ("dss", {"states": 8}),
    "s4d, bilinear": ("s4d", {"states": 8, "initial": "lin", "discretisation": "bilinear"}),
}
each = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, dtype: torch.dtype = torch.float64) -> SequenceMixer:
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    return mixer(name, DIM, **options).to(dtype).eval()


def tokens(batch: int = 2, time: int = TIME, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def same_state(found: MixerState, expected: MixerState, tolerance: float) -> None:
    for a, b in zip((*found.inputs, *found.core), (*expected.inputs, *expected.core), strict=True):
        close(a, b, tolerance)


# What every mixer promises --------------------------------------------------------------------------------------------


@each
@torch.no_grad()
def test_token_by_token_is_the_sequence(variant: str) -> None:
    layer, x = build(variant, torch.float32), tokens(dtype=torch.float32)
    expected, end = layer(x)
    assert expected.shape == x.shape
    state, outputs, sizes = None, [], set()
    for t in range(TIME):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
        sizes.add(state.nbytes)
    assert len(sizes) == 1  # constant memory
    close(torch.stack(outputs, 1), expected, 1e-5)
    assert state is not None
    if variant != "transnormer, diagonal":  # what is beyond the block in hand is of no account
        same_state(state, end, 1e-5)


@each
@torch.no_grad()
def test_splitting_a_sequence_changes_nothing(variant: str) -> None:
    layer, x = build(variant), tokens()
    expected, _ = layer(x)
    state, outputs = None, []
    for piece in x.split([1, 19, 5, 12], 1):
        y, state = layer(piece, state)
        outputs.append(y)
    close(torch.cat(outputs, 1), expected, 1e-10)


@each
@torch.no_grad()
def test_no_token_changes_an_earlier_output(variant: str) -> None:
    layer, x = build(variant), tokens()
    before, _ = layer(x)
    for t in (0, 16, 36):
        changed = x.clone()
        changed[:, t] *= 1e3
        after, _ = layer(changed)
        assert (after[:, :t] - before[:, :t]).abs().sum() <= 1e-8
        assert (after[:, t:] - before[:, t:]).abs().max() > 1e-8


@each
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(variant: str) -> None:
    layer, x = build(variant), tokens(3)
    _, start = layer(tokens(3, 5) * 0.5)
    mask = torch.ones(3, TIME, dtype=torch.bool)
    mask[0, :9] = False  # on the left
    mask[1, 20:] = False  # on the right
    mask[2, ::3] = False  # anywhere
    for state in (None, start):
        y, end = layer(x, state, mask=mask)
        again, _ = layer(torch.where(mask[..., None], x, 7.0), state, mask=mask)
        assert torch.equal(y, again)
        for row in range(3):
            own = None if state is None else state.map(lambda tensor, row=row: tensor[row : row + 1])
            expected, last = layer(x[row : row + 1, mask[row]], own)
            close(y[row : row + 1, mask[row]], expected, 1e-9)
            assert not y[row, ~mask[row]].any()
            y_next, _ = layer.step(x[:, 0], end)
            expected_next, _ = layer.step(x[row : row + 1, 0], last)
            close(y_next[row : row + 1], expected_next, 1e-9)


@each
@torch.no_grad()
def test_packed_sequences_do_not_meet(variant: str) -> None:
    layer, x = build(variant), tokens()
    _, start = layer(tokens(2, 5) * 0.5)
    cuts = [0, 11, 12, 30, TIME]
    segments = torch.zeros(2, TIME, dtype=torch.long)
    for i, cut in enumerate(cuts):
        segments[:, cut:] = i % 2
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[1, 33:] = False
    for given in (None, mask):
        y, end = layer(x, start, mask=given, segments=segments)
        for i in range(4):
            piece, last = layer(x[:, cuts[i] : cuts[i + 1]], start if i == 0 else None)
            real = slice(0, 1) if given is not None and i == 3 else slice(0, 2)
            close(y[real, cuts[i] : cuts[i + 1]], piece[real], 1e-9)
        close(layer.step(x[:, 0], end)[0][:1], layer.step(x[:, 0], last)[0][:1], 1e-9)


@each
def test_every_parameter_has_a_gradient(variant: str) -> None:
    layer, x = build(variant), tokens().requires_grad_()
    y, _ = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0 or name.endswith("mean"), name


@each
@torch.no_grad()
def test_half_precision_is_near(variant: str) -> None:
    layer, x = build(variant, torch.float32), tokens(dtype=torch.float32)
    expected, _ = layer(x)
    half = build(variant, torch.float32).bfloat16()
    y, _ = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() <= 0.1 * expected.norm()
    step, _ = half.step(x[:, 0].bfloat16())
    assert step.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
    assert (y.float() - expected).norm() <= 0.1 * expected.norm()


# Each against its paper, token by token in float64 ---------------------------------------------------------------------


def projected(layer: SequenceMixer, x: Tensor) -> dict[str, Tensor]:
    return {name: project(x) for name, project in layer.inputs.projections.items()}


def convolved(layer: SequenceMixer, streams: dict[str, Tensor], silu: bool = True) -> dict[str, Tensor]:
    conv = layer.inputs.convolution
    assert conv is not None
    x = torch.cat([streams[name] for name in layer.inputs.convolved], -1)
    y = torch.zeros_like(x) if conv.bias is None else conv.bias.expand_as(x).clone()
    for t in range(x.shape[1]):
        for lag in range(min(conv.width, t + 1)):
            y[:, t] += conv.weight[:, conv.width - 1 - lag] * x[:, t - lag]
    y = y * torch.sigmoid(y) if silu else y
    sizes = [streams[name].shape[-1] for name in layer.inputs.convolved]
    return streams | dict(zip(layer.inputs.convolved, y.split(sizes, -1), strict=True))


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:-1], count, -1)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def group_norm(x: Tensor, layer: SequenceMixer) -> Tensor:
    out = layer.output
    assert out.weight is not None
    assert out.bias is not None
    y = torch.nn.functional.group_norm(
        x.flatten(0, 1).flatten(1), x.shape[2], out.weight.flatten(), out.bias.flatten(), out.eps
    )
    return y.reshape(x.shape)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def recur(transition: Any, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """`transition(t)`: (batch, heads, dk, dk) matrices; k, v, q (batch, time, heads, d)."""
    state, outputs = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=v.dtype), []
    for t in range(k.shape[1]):
        state = transition(t) @ state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None] @ state)[..., 0, :])
    return torch.stack(outputs, 1)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def softplus_decay(layer: SequenceMixer, raw: Tensor) -> tuple[Tensor, Tensor]:
    decay = layer.core.rule.decay
    step = torch.log1p(torch.exp(raw + decay.bias))
    return step, -decay.rate.exp()


def delta_reference(layer: SequenceMixer, x: Tensor, n: int, factor: str, gate: str | None) -> Tensor:
    s, count = convolved(layer, projected(layer, x)), 4
    maps = {
        "sigmoid": torch.sigmoid,
        "two": lambda b: 2 * torch.sigmoid(b),
        "hard": lambda b: 2 * ((b + 3) / 6).clamp(0, 1),
    }
    q, v = heads(s["q"], count), heads(s["v"], count).unflatten(-1, (n, -1))
    k = unit(heads(s["k"], count).unflatten(-1, (n, -1)))
    beta = maps[factor](s["beta"]).unflatten(-1, (count, n))
    q = unit(q) * q.shape[-1] ** -0.5
    if gate is None:
        g = torch.zeros(*x.shape[:2], count, 1, dtype=x.dtype)
    elif gate == "head":
        step, rate = softplus_decay(layer, s["decay"])
        g = (step * rate)[..., None]
    else:
        step, rate = softplus_decay(layer, s["decay"])
        g = heads(step, count) * rate[:, None]
    state = torch.zeros(x.shape[0], count, k.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        state = g[:, t].exp()[..., None] * state
        for j in range(n):
            key, strength = k[:, t, :, j], beta[:, t, :, j, None, None]
            householder = eye(k.shape[-1]) - strength * key[..., :, None] * key[..., None, :]
            state = householder @ state + strength * key[..., :, None] * v[:, t, :, j, None, :]
        outputs.append((state * q[:, t, ..., None]).sum(-2))
    o = rms(torch.stack(outputs, 1), layer.output.weight)
    if "gate" in s:
        z = heads(s["gate"], count)
        o = o * (torch.sigmoid(z) if gate == "channel" else silu(z))
    return layer.output.projection(o.flatten(2))


def rwkv7_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    mu, p, rule, count = layer.inputs.shift, layer.inputs.projections, layer.core.rule, 4
    assert mu is not None
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    s = {name: p[name](x + (before - x) * mu[name]) for name in p}
    r, k, v, w, a = (heads(s[name], count) for name in ("q", "k", "v", "decay", "rate"))
    w = torch.exp(-torch.exp(-torch.nn.functional.softplus(-w) - 0.5))  # the official code's form
    a = torch.sigmoid(a)
    kappa = unit(k * rule.removal)
    k = k * (1 + (a - 1) * rule.replacement)

    def transition(t: int) -> Tensor:
        removal = (kappa[:, t] * a[:, t])[..., :, None] * kappa[:, t, :, None, :]
        return torch.diag_embed(w[:, t]) - removal

    o = group_norm(recur(transition, k, v, r), layer)
    o = o + (r * k * rule.bonus).sum(-1, keepdim=True) * v
    return layer.output.projection(o.flatten(2) * s["gate"])


def mamba2_reference(layer: SequenceMixer, x: Tensor, groups: int, signed: bool) -> Tensor:
    s = convolved(layer, projected(layer, x))
    step, rate = softplus_decay(layer, s["decay"])
    count = step.shape[-1]
    v = heads(s["v"], count)
    b, c = (heads(s[name], groups).repeat_interleave(count // groups, 2) for name in ("k", "q"))
    gate = torch.exp(step * rate)
    gate = 2 * gate - 1 if signed else gate
    y = recur(lambda t: gate[:, t, :, None, None] * eye(b.shape[-1]), b * step[..., None], v, c)
    y = y + v * layer.core.rule.skip[:, None]
    y = y.flatten(2) * silu(s["gate"])
    return layer.output.projection(rms(y, layer.output.weight.flatten()))


def gla_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    s, count = projected(layer, x), 4
    q, k, v, g = (heads(s[name], count) for name in ("q", "k", "v", "decay"))
    gate = torch.sigmoid(g) ** (1 / 16)
    o = recur(lambda t: torch.diag_embed(gate[:, t]), k, v, q * q.shape[-1] ** -0.5)
    return layer.output.projection((rms(o, layer.output.weight) * silu(heads(s["gate"], count))).flatten(2))


def retnet_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    """The parallel form: ``((Q Theta) (K conj(Theta))^T * D) V``, with complex numbers for pairs of channels."""
    s, count, time = projected(layer, x), 4, x.shape[1]
    q, k, v = (heads(s[name], count).transpose(1, 2) for name in ("q", "k", "v"))
    dk = q.shape[-1]
    theta = 1e4 ** -torch.linspace(0, 1, dk // 2)
    turn = torch.polar(torch.ones(time, dk // 2).double(), torch.arange(time)[:, None] * theta.double())
    q, k = (torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) * turn for z in (q, k))
    scores = (q @ k.mH).real / dk**0.5
    gamma = 1 - 2.0 ** (-5 - torch.arange(count).double())
    lag = torch.arange(time)[:, None] - torch.arange(time)
    scores = scores * torch.where(lag >= 0, gamma[:, None, None] ** lag.clamp_min(0), 0.0)
    o = group_norm((scores @ v).transpose(1, 2), layer)
    return layer.output.projection((o * silu(heads(s["gate"], count))).flatten(2))


def attention_reference(layer: SequenceMixer, x: Tensor, phi: Any, *, temperature: float = 1.0) -> Tensor:
    """All pairs: ``sum phi(q_t) . phi(k_j) v_j`` over j <= t, divided by the sum of the weights."""
    s, count = projected(layer, x), 4
    q, k, v = (heads(s[name], count).transpose(1, 2) for name in ("q", "k", "v"))
    weights = (phi(q * temperature) @ phi(k * temperature).mT).tril()
    return ((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2)


def elu1(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def positive(frequencies: Tensor, hyperbolic: bool = False) -> Any:
    def phi(x: Tensor) -> Tensor:
        w = x @ frequencies.mT
        w = torch.cat([w, -w], -1) if hyperbolic else w
        return torch.exp(w - x.square().sum(-1, keepdim=True) / 2) / w.shape[-1] ** 0.5

    return phi


def dense_frequencies(layer: SequenceMixer) -> Tensor:
    held = layer.core.features.frequencies
    if hasattr(held, "noise"):
        which = torch.arange(len(held.noise)) % len(held.mean)
        return held.mean[which] + held.log_deviation[which].exp() * held.noise
    return held.weight if isinstance(held, torch.nn.Linear) else held.op.dense()


def plain(layer: SequenceMixer, o: Tensor) -> Tensor:
    return layer.output.projection(o.flatten(2))


def transnormer_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    s, count = projected(layer, x), 4
    q, k, v = (heads(s[name], count).transpose(1, 2) for name in ("q", "k", "v"))
    o = ((elu1(q) @ elu1(k).mT).tril() @ v).transpose(1, 2)
    return plain(layer, rms(o, layer.output.weight))


def block_reference(layer: SequenceMixer, x: Tensor, block: int) -> Tensor:
    s, count, time = projected(layer, x), 4, x.shape[1]
    q, k, v = (heads(s[name], count).transpose(1, 2) for name in ("q", "k", "v"))
    t = torch.arange(time)
    seen = (t[:, None] >= t) & (t[:, None] // block == t // block)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return plain(layer, (weights @ v).transpose(1, 2))


def dijiang_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    s, count, time = projected(layer, x), 4, x.shape[1]
    q, k, v = (heads(s[name], count).transpose(1, 2) for name in ("q", "k", "v"))
    d, maps = q.shape[-1], layer.core.features
    n = torch.arange(d).double()
    dct = torch.cos(torch.pi * n[:, None] * (2 * n + 1) / (2 * d)) * (2 / d) ** 0.5
    dct[0] /= 2**0.5
    q, k = (maps.log_weight.exp() * torch.exp((z * d**-0.25) @ dct.mT * maps.quantiles) for z in (q, k))
    lag = torch.arange(time)[:, None] - torch.arange(time)
    gamma = 1 - 2.0 ** (-5 - torch.arange(count).double())
    weights = (q @ k.mT) * torch.where(lag >= 0, gamma[:, None, None] ** lag.clamp_min(0), 0.0)
    o = group_norm(((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2), layer)
    return plain(layer, o * silu(heads(s["gate"], count)))


def liger_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    s, count = projected(layer, x), 4
    q, k, v = (heads(s[name], count) for name in ("q", "k", "v"))
    gate = torch.sigmoid(k) ** (1 / 16)
    return plain(layer, recur(lambda t: torch.diag_embed(gate[:, t]), k.softmax(-1), v, q.softmax(-1)))


def third_order_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    """Every pair of tokens up to t, one by one."""
    s, count = projected(layer, x), 4
    q, k, v, k2, v2 = (heads(s[name], count) for name in ("q", "k", "v", "k2", "v2"))
    q, k, k2 = elu1(q), elu1(k), elu1(k2)
    outputs = []
    for t in range(x.shape[1]):
        weights = torch.einsum("bhd,bihd,bjhd->bhij", q[:, t], k[:, : t + 1], k2[:, : t + 1])
        numbers = torch.einsum("bhij,bihe,bjhe->bhe", weights, v[:, : t + 1], v2[:, : t + 1])
        outputs.append(numbers / weights.sum((-1, -2))[..., None])
    return plain(layer, torch.stack(outputs, 1))


def glu(layer: SequenceMixer, y: Tensor) -> Tensor:
    y = layer.output.projection(0.5 * y * (1 + torch.erf(y / 2**0.5)))
    first, second = y.chunk(2, -1)
    return first * torch.sigmoid(second)


def state_space_reference(layer: SequenceMixer, x: Tensor, discretisation: str) -> Tensor:
    """The recurrence, one complex mode at a time; discretised from scratch."""
    f = layer.core.filter
    values = torch.complex(-f.log_decay.exp(), f.frequency)
    b, c = torch.view_as_complex(f.input), torch.view_as_complex(f.readout)
    dt = f.log_step.exp()[:, None]
    if discretisation == "bilinear":
        a, b = (1 + dt * values / 2) / (1 - dt * values / 2), dt * b / (1 - dt * values / 2)
    else:
        a = torch.exp(dt * values)
        b = b / values / sum(a**r for r in range(TIME)) if discretisation == "softmax" else b * (a - 1) / values
    state, outputs = torch.zeros(x.shape[0], *a.shape, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        state = a * state + b * x[:, t, :, None]
        outputs.append(2 * (c * state).sum(-1).real + f.skip * x[:, t])
    return glu(layer, torch.stack(outputs, 1))


def convolution_reference(u: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    y = u * skip
    for lag in range(min(u.shape[1], kernel.shape[1])):
        y[:, lag:] += kernel[:, lag] * u[:, : u.shape[1] - lag]
    return y


def long_conv_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    f = layer.core.filter
    raw = f.kernel.values
    kernel = raw.sign() * (raw.abs() - 1e-3).clamp_min(0)
    return glu(layer, convolution_reference(x, kernel, f.skip))


def flex_conv_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    f = layer.core.filter
    k, rows = f.kernel, []
    for lag in range(k.length):
        place = -1 + 2 * lag / (k.length - 1)
        g = [
            torch.exp(-0.5 * (k.envelope[i] * (place - k.centre[i])) ** 2)
            * torch.sin(k.frequency[i] * place + k.phase[i])
            for i in range(3)
        ]
        h = g[0]
        for i in (1, 2):
            h = (k.weight[i - 1] @ h + k.bias[i - 1]) * g[i]
        mask = torch.exp(-((place + 1) ** 2) / (2 * k.log_deviation.exp() ** 2))
        rows.append(k.out @ h * mask * (mask >= 0.1))
    assert 1 < k.size() < k.length
    return glu(layer, convolution_reference(x, torch.stack(rows, 1), f.skip))


def monarch_reference(layer: SequenceMixer, x: Tensor) -> Tensor:
    s, f = convolved(layer, projected(layer, x), silu=False), layer.core.filter
    k, length = f.kernel, f.kernel.length
    place = torch.arange(length, dtype=torch.float64)[:, None] / (length - 1)
    bands = 2 * torch.pi * torch.arange(1, 3)
    h = torch.cat([place, (bands * place).cos(), (bands * place).sin()], 1).float().double()
    for i in range(2):
        h = torch.sin(k.sine[i] * (h @ k.layers[i].weight.mT + k.layers[i].bias))
    h = h @ k.layers[2].weight.mT + k.layers[2].bias
    kernel = (h * torch.exp(-k.decay.abs() * place.float().double())).mT / length**0.5
    return layer.output.projection(s["q"] * convolution_reference(s["k"] * s["v"], kernel, f.skip))


REFERENCES: dict[str, Any] = {
    "delta_net": lambda layer, x: delta_reference(layer, x, 1, "sigmoid", None),
    "delta_net, negative eigenvalues": lambda layer, x: delta_reference(layer, x, 1, "two", None),
    "gated_delta_net": lambda layer, x: delta_reference(layer, x, 1, "sigmoid", "head"),
    "delta_product": lambda layer, x: delta_reference(layer, x, 2, "hard", "head"),
    "delta_product, one, no gate": lambda layer, x: delta_reference(layer, x, 1, "two", None),
    "kda": lambda layer, x: delta_reference(layer, x, 1, "sigmoid", "channel"),
    "rwkv7": rwkv7_reference,
    "gla": gla_reference,
    "retnet": retnet_reference,
    "mamba2": lambda layer, x: mamba2_reference(layer, x, 2, False),
    "mamba2, signed": lambda layer, x: mamba2_reference(layer, x, 1, True),
    "liger": liger_reference,
    "linear_attention": lambda layer, x: plain(layer, attention_reference(layer, x, elu1)),
    "performer": lambda layer, x: plain(
        layer, attention_reference(layer, x, positive(dense_frequencies(layer)), temperature=4**-0.25)
    ),
    "performer, hyperbolic": lambda layer, x: plain(
        layer, attention_reference(layer, x, positive(dense_frequencies(layer), True), temperature=4**-0.25)
    ),
    "transformer_kernel": lambda layer, x: plain(
        layer, attention_reference(layer, x, positive(dense_frequencies(layer)), temperature=4**-0.25)
    ),
    "transformer_kernel, fastfood": lambda layer, x: plain(
        layer, attention_reference(layer, x, positive(dense_frequencies(layer)), temperature=4**-0.25)
    ),
    "transnormer": transnormer_reference,
    "transnormer, diagonal": lambda layer, x: block_reference(layer, x, 8),
    "dijiang": dijiang_reference,
    "third_order_attention": third_order_reference,
    "s4d": lambda layer, x: state_space_reference(layer, x, "zoh"),
    "s4d, bilinear": lambda layer, x: state_space_reference(layer, x, "bilinear"),
    "dss": lambda layer, x: state_space_reference(layer, x, "softmax"),
    "dss, exponential": lambda layer, x: state_space_reference(layer, x, "zoh"),
    "s4_ptd": lambda layer, x: state_space_reference(layer, x, "zoh"),
    "long_conv": long_conv_reference,
    "flex_conv": flex_conv_reference,
    "monarch_mixer": monarch_reference,
}


@each
@torch.no_grad()
def test_the_layer_is_the_papers_formula(variant: str) -> None:
    """Constants that are buffers or initial values in float32 (angles, decays, quantiles) bound the agreement of some."""
    layer, x = build(variant), tokens()
    y, _ = layer(x)
    rough = variant in ("retnet", "dijiang", "monarch_mixer")
    close(y, REFERENCES[variant](layer, x), 1e-6 if rough else 1e-10)


def test_every_recipe_is_tested_and_says_what_it_is() -> None:
    assert set(REFERENCES) == set(VARIANTS)
    for recipe in RECIPES.values():
        assert 2018 <= recipe.year <= 2026
        assert recipe.paper
        assert recipe.build.__doc__


# Against the transformers library ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_gated_delta_net_is_that_of_qwen() -> None:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=DIM,
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    ours = mixer("gated_delta_net", DIM, heads=4, key_dim=8, value_dim=6).eval()
    p = ours.inputs.projections
    rows = theirs.in_proj_qkvz.weight.unflatten(0, (4, 28)).split([8, 8, 6, 6], 1)
    for name, part in zip(("q", "k", "v", "gate"), rows, strict=True):
        p[name].weight.copy_(part.flatten(0, 1))
    beta, decay = theirs.in_proj_ba.weight.unflatten(0, (4, 2)).unbind(1)
    p["beta"].weight.copy_(beta)
    p["decay"].weight.copy_(decay)
    ours.inputs.convolution.weight.copy_(theirs.conv1d.weight[:, 0])
    ours.core.rule.decay.rate.copy_(theirs.A_log)
    ours.core.rule.decay.bias.copy_(theirs.dt_bias)
    ours.output.weight.copy_(theirs.norm.weight)
    ours.output.projection.load_state_dict(theirs.out_proj.state_dict())
    ours.output.eps = config.rms_norm_eps
    x = tokens(dtype=torch.float32)
    close(ours(x)[0], theirs(x), 1e-4)  # they add 1e-6 under the root of |k|^2


@torch.no_grad()
def test_mamba2_is_that_of_transformers() -> None:
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=DIM, expand=2, num_heads=4, head_dim=8, state_size=6, n_groups=1, chunk_size=16, num_hidden_layers=1
    )
    theirs = Mamba2Mixer(config, 0).eval()
    ours = mixer("mamba2", DIM, key_dim=6, value_dim=8).eval()
    parts = theirs.in_proj.weight.split([32, 32, 6, 6, 4])
    for name, part in zip(("gate", "v", "k", "q", "decay"), parts, strict=True):
        ours.inputs.projections[name].weight.copy_(part)
    ours.inputs.convolution.weight.copy_(theirs.conv1d.weight[:, 0])
    ours.inputs.convolution.bias.copy_(theirs.conv1d.bias)
    ours.core.rule.decay.rate.copy_(theirs.A_log)
    ours.core.rule.decay.bias.copy_(theirs.dt_bias)
    ours.core.rule.skip.copy_(theirs.D)
    ours.output.weight.copy_(theirs.norm.weight.reshape(4, 8))
    ours.output.projection.load_state_dict(theirs.out_proj.state_dict())
    ours.output.eps = config.layer_norm_epsilon
    x = tokens(dtype=torch.float32)
    close(ours(x)[0], theirs(x), 1e-5)


@torch.no_grad()
def test_kda_is_that_of_kimi() -> None:
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig

    torch.manual_seed(0)
    config = KimiLinearConfig(
        hidden_size=DIM, linear_num_heads=4, linear_head_dim=8, linear_conv_kernel_dim=4, num_hidden_layers=1
    )
    theirs = modeling.KimiLinearDeltaAttention(config, 0).eval()
    theirs.forget_gate.A_log.uniform_(0, 2)
    theirs.forget_gate.dt_bias.uniform_(-4, 0)
    ours = mixer("kda", DIM, heads=4, key_dim=8, value_dim=8).eval()
    p = ours.inputs.projections
    for name, part in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "beta": "b_proj"}.items():
        p[name].load_state_dict(getattr(theirs, part).state_dict())
    for name, pair in {
        "decay": (theirs.forget_gate.f_a_proj, theirs.forget_gate.f_b_proj),
        "gate": (theirs.g_a_proj, theirs.g_b_proj),
    }.items():
        p[name][0].load_state_dict(pair[0].state_dict())
        p[name][2].load_state_dict(pair[1].state_dict())
    ours.inputs.convolution.weight.copy_(theirs.conv1d.weight[:, 0])
    ours.core.rule.decay.rate.copy_(theirs.forget_gate.A_log.flatten())
    ours.core.rule.decay.bias.copy_(theirs.forget_gate.dt_bias)
    ours.output.weight.copy_(theirs.o_norm.weight)
    ours.output.projection.load_state_dict(theirs.o_proj.state_dict())
    ours.output.eps = config.rms_norm_eps
    x = tokens(dtype=torch.float32)
    close(ours(x)[0], theirs(x), 1e-4)


# Gradients, compilation, structures, errors -----------------------------------------------------------------------------


@each
def test_gradients_are_those_of_the_formula(variant: str) -> None:
    layer = build(variant)
    found, expected = (tokens(1, 21).requires_grad_() for _ in range(2))
    weight = torch.randn(1, 21, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (layer(found)[0] * weight).sum().backward()
    ours = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    (REFERENCES[variant](layer, expected) * weight).sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    tolerance = 1e-5 if variant in ("retnet", "dijiang", "monarch_mixer") else 1e-8
    close(found.grad, expected.grad, tolerance)
    for name, p in layer.named_parameters():
        if p.grad is not None:
            close(ours[name], p.grad, tolerance)


@pytest.mark.parametrize("variant", ["delta_net", "gla", "mamba2", "rwkv7", "performer", "s4d", "long_conv"])
def test_compiling_changes_nothing(variant: str) -> None:
    layer, x = build(variant, torch.float32), tokens(dtype=torch.float32)
    expected, _ = layer(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    y, _ = torch.compile(layer, backend="aot_eager")(x)
    close(y, expected, 1e-5)
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        if name in gradients:
            close(p.grad, gradients[name], 1e-4)


@pytest.mark.parametrize("variant", ["gated_delta_net", "mamba2", "rwkv7", "s4d"])
def test_projections_of_any_structure(variant: str) -> None:
    name, options = VARIANTS[variant]
    layer = mixer(name, DIM, **options, linear=structured("block_low_rank", rank=2))
    kinds = {part.op.kind for part in layer.modules() if isinstance(part, StructuredLinear)}
    assert kinds == {"block_low_rank"}
    x = tokens(dtype=torch.float32)
    y, _ = layer(x)
    assert y.shape == x.shape
    state = None
    with torch.no_grad():
        for t in range(5):
            step, state = layer.step(x[:, t], state)
    close(step, y[:, 4].detach(), 1e-5)


@torch.no_grad()
def test_methods_of_the_scan_agree() -> None:
    for name in ("gated_delta_net", "gla", "retnet", "rwkv7"):
        outputs = []
        for method in ("sequential", "chunkwise"):
            torch.manual_seed(0)
            outputs.append(mixer(name, DIM, method=method).double()(tokens())[0])
        close(outputs[0], outputs[1], 1e-10)


def test_what_does_not_fit_is_refused() -> None:
    layer = build("delta_net")
    x = tokens()
    with pytest.raises(GramianError, match="did you mean delta_net"):
        mixer("deltanet", DIM)
    with pytest.raises(GramianError, match="step\\(\\) takes single tokens"):
        layer(x[0])
    with pytest.raises(GramianError, match="mask"):
        layer(x, mask=torch.ones(2, TIME - 1, dtype=torch.bool))
    with pytest.raises(GramianError, match="at least one"):
        layer(x[:, :0])
    with pytest.raises(GramianError, match="5 heads of dim 16"):
        mixer("gla", DIM, heads=5)
    with pytest.raises(GramianError, match="did you mean two_sigmoid"):
        mixer("delta_net", DIM, beta="twosigmoid")
    with pytest.raises(GramianError, match="even number"):
        mixer("retnet", DIM, key_dim=3, value_dim=4)
    with pytest.raises(GramianError, match="3 groups"):
        mixer("mamba2", DIM, value_dim=8, groups=3)
    with pytest.raises(GramianError, match="did you mean .*elu1"):
        mixer("linear_attention", DIM, features="elu")
    with pytest.raises(GramianError, match="normalised"):
        Recurrent(2, 4, GatedRule(), features=PositiveFeatures(gaussian_frequencies(4, 4)))


@torch.no_grad()
def test_hard_beta_keeps_a_reflection_for_ever() -> None:
    """One head, keys (1, 0) and beta 2 at ones: the state's sign is the parity of 2000 bits."""
    layer = mixer(
        "delta_product", 2, heads=1, key_dim=2, value_dim=2, householders=1, gated=False, convolution=0, beta="hard"
    )
    p = layer.inputs.projections
    for name in ("q", "k", "v"):
        p[name].weight.zero_()
    p["k"].weight[0, 1] = p["q"].weight[0, 1] = 1.0
    p["beta"].weight.copy_(torch.tensor([[6.0, -3.0]]))  # hardsigmoid is 0 at -3, 1 from 3 on
    bits = torch.randint(0, 2, (1, 2000), generator=torch.Generator().manual_seed(0))
    x = torch.stack([bits.float(), torch.ones(1, 2000)], -1)
    streams, _ = layer.inputs(x, (), Layout())
    start = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    o, _, _ = layer.core(streams, (start,), Layout())
    expected = (1 - 2 * (bits.cumsum(1) % 2)).float() * 2**-0.5
    torch.testing.assert_close(o[0, :, 0, 0], expected[0], rtol=1e-4, atol=1e-4)
