"""Householder products, orthogonal matrices of a skew parameter, training by orthogonal equivalence, and binding."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor, nn

from gramian import testing
from gramian.errors import GramianError
from gramian.fitting import fit
from gramian.linalg import svdvals, weighted_error
from gramian.nn import Reparametrisation, ReparametrisedLinear
from gramian.nn.reparametrised import unit_rows_
from gramian.ops import Householder, Orthogonal, Scaled, permuted_orthogonal

WIDE = torch.float64


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=WIDE, generator=_seeded(seed))


def _haar(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.atleast_2d(scipy.stats.ortho_group.rvs(n, random_state=seed) if n > 1 else [[1.0]]))


def _gram(n: int, seed: int = 0) -> Tensor:
    samples = _normal(3 * n, n, seed=seed) * torch.logspace(0, -1, n, dtype=WIDE)
    return samples.mT @ samples / len(samples)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def _special(n: int) -> dict[str, Tensor]:
    """Orthogonal matrices with eigenvalues -1, with 1, and with both."""
    eye, q = torch.eye(n, dtype=WIDE), _haar(n)
    order = torch.randperm(n, generator=_seeded(1))
    v = _normal(n, seed=2)
    return {
        "random": q,
        "its negative": -q,
        "mirrored": torch.cat([-q[:1], q[1:]]),
        "identity": eye,
        "minus identity": -eye,
        "permutation": eye[order],
        "signs": eye * torch.where(_normal(n) > 0, 1.0, -1.0),
        "reflection": eye - 2 * torch.outer(v, v) / (v @ v),
        "nearly the identity": torch.from_numpy(scipy.linalg.expm(1e-6 * (q - q.mT).numpy())),
        "nearly minus identity": -torch.from_numpy(scipy.linalg.expm(1e-6 * (q - q.mT).numpy())),
    }


# Householder ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_householder_is_the_product_of_its_reflections(k: int) -> None:
    vectors = _normal(k, 9)
    wanted = torch.eye(9, dtype=WIDE)
    for v in vectors:
        wanted = wanted @ (torch.eye(9, dtype=WIDE) - 2 * torch.outer(v, v) / (v @ v))
    op = Householder(vectors * torch.logspace(-3, 3, k, dtype=WIDE)[:, None])  # lengths do not matter
    assert _relative(op.dense(), wanted) < 1e-13
    assert _relative(op.T.dense(), wanted.mT) < 1e-13
    x = _normal(4, 9)
    assert _relative(op.apply_columns(x.mT), wanted @ x.mT) < 1e-13


def test_a_zero_vector_is_the_identity() -> None:
    vectors = _normal(3, 6)
    vectors[1] = 0
    op = Householder(vectors)
    assert _relative(op.dense(), Householder(vectors[[0, 2]]).dense()) < 1e-14
    grown = vectors.clone().requires_grad_()
    Householder(grown).apply(_normal(2, 6)).square().sum().backward()
    assert grown.grad.isfinite().all()
    assert torch.equal(Householder(torch.zeros(0, 5)).dense(), torch.eye(5))


def test_householder_in_float32_stays_orthogonal() -> None:
    q = Householder.init((256, 256), reflectors=64, generator=_seeded()).dense()
    assert float((q.mT @ q - torch.eye(256)).abs().max()) < 1e-5


@pytest.mark.parametrize("k", [1, 2, 3, 10, 24])
def test_products_of_reflectors_are_recovered(k: int) -> None:
    matrix = Householder(_normal(k, 24)).dense()
    assert _relative(Householder.from_matrix(matrix, k).dense(), matrix) < 1e-13
    assert _relative(Householder.fit(matrix, reflectors=k).dense(), matrix) < 1e-13
    assert _relative(Householder.fit(matrix.float(), reflectors=k).dense(), matrix) < 1e-6
    grams = {"gram_in": _gram(24), "gram_out": _gram(24, 1)}
    assert _relative(Householder.fit(matrix, reflectors=k, **grams).dense(), matrix) < 1e-9
    if k > 1:
        assert _relative(Householder.from_matrix(matrix, k - 1).dense(), matrix) > 1e-3


@pytest.mark.parametrize("name", _special(8))
def test_n_reflectors_hold_every_orthogonal_matrix(name: str) -> None:
    for n in (1, 2, 7, 8):
        q = _special(n)[name]
        assert float((Householder.from_matrix(q).dense() - q).abs().max()) < 1e-12


def test_fewer_reflectors_turn_the_planes_that_turn_furthest() -> None:
    angles = torch.tensor([0.3, 2.0, 1.0, 3.0], dtype=WIDE)
    planes = torch.block_diag(
        *[torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=WIDE) for a in angles]
    )
    basis = _haar(8)
    q = basis @ planes @ basis.mT
    found = Householder.from_matrix(q, 4).dense()
    lost = sum(4 * (1 - math.cos(a)) for a in (0.3, 1.0))  # ||I - R(a)||_F^2 of the planes left out
    assert float((found - q).square().sum()) == pytest.approx(lost, rel=1e-9)


def test_householder_says_what_is_wrong() -> None:
    with pytest.raises(GramianError, match="9 reflectors for \\(8, 8\\); expected a square matrix and 1 to 8"):
        Householder.from_matrix(torch.eye(8), 9)
    with pytest.raises(GramianError, match="differs from I by 3.0e\\+00"):
        Householder.from_matrix(2 * torch.eye(8))
    with pytest.raises(GramianError, match="expected a square"):
        Householder.fit(torch.zeros(4, 6))
    with pytest.raises(GramianError, match="expected a square"):
        Householder.init((4, 6))


# Orthogonal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cayley", "neumann", "exponential"])
def test_orthogonal_is_the_function_of_its_skew_parameter(method: str) -> None:
    upper, b = 0.1 * _normal(3, 10), 5
    signs = torch.where(_normal(15) > 0, 1.0, -1.0)
    blocks = []
    for row in upper:
        s = np.zeros((b, b))
        s[np.triu_indices(b, 1)] = row.numpy()
        s -= s.T
        eye = np.eye(b)
        blocks.append(
            {
                "cayley": lambda s=s, eye=eye: (eye + s) @ np.linalg.inv(eye - s),
                "neumann": lambda s=s, eye=eye: (eye + s) @ (eye + s + s @ s + s @ s @ s),
                "exponential": lambda s=s: scipy.linalg.expm(s),
            }[method]()
        )
    wanted = torch.from_numpy(scipy.linalg.block_diag(*blocks)) * signs
    op = Orthogonal(upper, signs.double(), method, 3)
    assert _relative(op.dense(), wanted) < 1e-13
    assert _relative(op.T.dense(), wanted.mT) < 1e-13
    assert _relative(op.runtime().dense(), wanted) < 1e-13
    off = float((wanted.mT @ wanted - torch.eye(15)).abs().max())
    assert float(op.orthogonality()) == pytest.approx(off, abs=1e-14)
    assert off < (0.1 if method == "neumann" else 1e-13)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
def test_the_truncated_series_is_off_by_a_power(terms: int) -> None:
    skew = 0.05 * _normal(1, 28)
    s = torch.zeros(8, 8, dtype=WIDE)
    s[tuple(torch.triu_indices(8, 8, 1))] = skew[0]
    norm = float(svdvals(s - s.mT)[0])
    matrix = Orthogonal(skew, None, "neumann", terms).dense()
    off = float(svdvals(matrix.mT @ matrix - torch.eye(8))[0])
    power = norm ** (terms + 1)
    assert off == pytest.approx(power**2 if terms % 2 == 0 else 2 * power, rel=0.2 if terms % 2 else 1e-6)


@pytest.mark.parametrize("method", ["cayley", "exponential"])
@pytest.mark.parametrize("name", _special(8))
def test_every_orthogonal_matrix_is_recovered(name: str, method: str) -> None:
    for n in (1, 2, 7, 30):
        q = _special(n)[name]
        assert float((Orthogonal.from_matrix(q, method=method).dense() - q).abs().max()) < 1e-12
        single = Orthogonal.from_matrix(q.float(), method=method)
        assert single.dtype == torch.float32
        assert _relative(single.dense().double(), q) < 5e-6
        assert _relative(Orthogonal.fit(q, method=method).dense(), q) < 1e-12


def test_random_is_uniform() -> None:
    many = Orthogonal.random(3 * 400, block=3, generator=_seeded()).blocks()
    signs = Orthogonal.random(3 * 400, block=3, generator=_seeded()).signs.reshape(-1, 1, 3)
    q = (many * signs).double()
    # Of Haar measure: every entry has mean 0 and variance 1 / n, both determinants are as likely, the trace has variance 1.
    assert float(q.mean(0).abs().max()) < 0.12
    assert float((q.square().mean(0) - 1 / 3).abs().max()) < 0.06
    assert abs(float(torch.linalg.det(q).mean())) < 0.15
    assert float(q.diagonal(dim1=1, dim2=2).sum(1).var()) == pytest.approx(1.0, abs=0.15)
    again = Orthogonal.random(3 * 400, block=3, generator=_seeded()).blocks()
    assert torch.equal(many, again)


def test_blocks_are_recovered_and_projected() -> None:
    blocks = [_haar(4, seed) for seed in range(3)]
    matrix = torch.block_diag(*blocks)
    op = Orthogonal.from_matrix(matrix, block=4)
    assert op.block == 4
    assert op.numel == 3 * 6 + 12
    assert _relative(op.dense(), matrix) < 1e-12
    noisy = matrix + 0.3 * _normal(12, 12)
    found = Orthogonal.fit(noisy, block=4)
    for i, part in enumerate(found.base.dense().reshape(3, 4, 3, 4)[range(3), :, range(3)]):
        polar, _ = scipy.linalg.polar(noisy[4 * i : 4 * i + 4, 4 * i : 4 * i + 4].numpy())
        assert _relative(part, torch.from_numpy(polar)) < 1e-12


def test_fit_is_procrustes_under_an_input_gram() -> None:
    weight, gram = _normal(10, 10), _gram(10, 1)
    found = Orthogonal.fit(weight, gram_in=gram)
    assert isinstance(found, Scaled)
    polar, _ = scipy.linalg.polar((weight @ gram).numpy())
    assert _relative(found.base.dense(), torch.from_numpy(polar)) < 1e-8
    best = float(weighted_error(weight - found.dense(), gram, None))
    for seed in range(20):  # no other orthogonal matrix at its best multiple does better
        q = _haar(10, seed) if seed % 2 else torch.from_numpy(polar) @ torch.linalg.matrix_exp(0.05 * _skew(10, seed))
        c = float(((weight @ gram) * q).sum() / gram.trace())
        assert best <= float(weighted_error(weight - c * q, gram, None))


def _skew(n: int, seed: int) -> Tensor:
    full = _normal(n, n, seed=seed)
    return full - full.mT


@pytest.mark.parametrize("kind", ["orthogonal", "householder"])
def test_fits_under_two_grams_do_not_lose_to_simpler_ones(kind: str) -> None:
    cls: Any = {"orthogonal": Orthogonal, "householder": Householder}[kind]
    size: dict[str, Any] = {"orthogonal": {"block": 6}, "householder": {"reflectors": 5}}[kind]
    weight, g, h = _normal(12, 12), _gram(12, 1), _gram(12, 2)
    both = float(weighted_error(weight - cls.fit(weight, gram_in=g, gram_out=h, **size).dense(), g, h))
    plain = cls.fit(weight, **size).base.dense()
    image = h @ plain @ g
    c = float((image * weight).sum() / (image * plain).sum())
    assert both <= float(weighted_error(weight - c * plain, g, h)) * (1 + 1e-9)
    assert fit(weight, kind, gram_in=g, gram_out=h, **size).error <= both * (1 + 1e-9)


def test_permuted_blocks_start_as_the_identity() -> None:
    op = permuted_orthogonal(12, 4, generator=_seeded())
    assert torch.equal(op.dense(), torch.eye(12))
    turned = op.replace(**{"parts.1.skew": 0.1 * torch.randn(3, 6, generator=_seeded())})
    matrix = turned.dense()
    assert float((matrix.mT @ matrix - torch.eye(12)).abs().max()) < 1e-3
    order = op.parts[2].index
    assert not torch.equal(order, torch.arange(12))
    assert torch.equal((matrix.abs() > 0).sum(1), torch.full((12,), 4))
    for check in (testing.check_product, testing.check_transpose, testing.check_gradients, testing.check_configuration):
        check(turned)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Orthogonal(torch.zeros(2, 4)), "expected skew \\(K, b \\(b - 1\\) / 2\\)"),
        (lambda: Orthogonal(torch.zeros(2, 3), torch.ones(5)), "signs \\(K b,\\)"),
        (lambda: Orthogonal(torch.zeros(2, 3), None, "qr"), "method 'qr'"),
        (lambda: Orthogonal.random(10, block=4), "blocks of 4 in 10; expected one of \\[1, 2, 5, 10\\]"),
        (lambda: Orthogonal.from_matrix(torch.ones(3, 3)), "expected an orthogonal matrix"),
        (lambda: Orthogonal.from_matrix(torch.zeros(3, 4)), "expected a square one"),
        (lambda: Orthogonal.from_matrix(torch.eye(3), method="neumann"), "'neumann' has no inverse"),
        (lambda: Orthogonal.fit(torch.zeros(3, 4)), "expected a square matrix"),
        (lambda: Orthogonal.init((3, 4)), "expected a square one"),
    ],
)
def test_orthogonal_says_what_is_wrong(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(GramianError, match=said):
        make()


# Training by orthogonal equivalence -------------------------------------------------------------------------------------


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 6))


@pytest.mark.parametrize("method", ["neumann", "cayley", "exponential"])
def test_training_keeps_the_spectrum_and_learns(method: str) -> None:
    model, x = _model(), torch.randn(64, 20, generator=_seeded())
    target = torch.randint(0, 6, (64,), generator=_seeded(1))
    before = model(x).detach()
    spectra = [svdvals(layer.weight.double()) for layer in model if isinstance(layer, nn.Linear)]
    hook = Reparametrisation(model, block=8, every=20, method=method, generator=_seeded())
    assert torch.allclose(model(x), before, atol=1e-5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses, merges = [], 0
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        outputs = model(x).detach()
        off = hook.step(optimizer)
        if off is not None:
            merges += 1
            assert _relative(model(x), outputs) < (2e-3 if method == "neumann" else 1e-5)
            assert not any(p.any() for p in hook.parameters())
            assert not any(p in optimizer.state for p in hook.parameters())
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert merges == 3
    assert losses[-1] < 0.9 * losses[0]
    outputs = model(x).detach()
    assert hook.finish() is model
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in model)
    assert _relative(model(x), outputs) < (2e-3 if method == "neumann" else 1e-5)
    for layer, spectrum in zip([layer for layer in model if isinstance(layer, nn.Linear)], spectra, strict=True):
        assert _relative(svdvals(layer.weight.double()), spectrum) < 1e-6


def test_only_turns_and_biases_are_trained() -> None:
    model = _model()
    hook = Reparametrisation(model, block=7, choose=lambda name, layer: name == "0", generator=_seeded())
    layer = model[0]
    assert isinstance(layer, ReparametrisedLinear)
    assert type(model[2]) is nn.Linear
    assert (layer.left.shape, layer.right.shape) == ((4, 15), (4, 10))  # blocks of 6 in 24, of 5 in 20
    assert {name for name, _ in layer.named_parameters()} == {"left", "right", "bias"}
    assert hook.parameters() == [layer.left, layer.right]
    model(torch.ones(2, 20)).sum().backward()
    assert layer.left.grad is not None
    assert layer.right.grad is not None


def test_a_reparametrised_layer_is_saved_and_copied() -> None:
    layer = ReparametrisedLinear(nn.Linear(12, 8), block=4, generator=_seeded())
    nn.init.normal_(layer.left, std=0.1)
    x = torch.randn(3, 12, generator=_seeded())
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
    other = ReparametrisedLinear(nn.Linear(12, 8), block=4, generator=_seeded(5))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.allclose(nn.functional.linear(x, layer.op.dense(), layer.bias), layer(x), atol=1e-6)


def test_merging_warns_when_the_series_is_too_short() -> None:
    model = _model()
    hook = Reparametrisation(model, block=8, generator=_seeded())
    with torch.no_grad():
        model[0].left.normal_(std=0.3, generator=_seeded())
    spectrum = svdvals(model[2].op.dense().double())
    with pytest.warns(
        UserWarning, match="0: R\\^T R differed from I by .* at a merge, more than 1e-03; merge more often"
    ):
        assert hook.merge() > 1e-3
    assert hook.merge() < 1e-12
    assert _relative(svdvals(model[2].op.dense().double()), spectrum) < 1e-6


def test_a_restart_has_unit_rows() -> None:
    model = _model()
    Reparametrisation(model, block=8, restart=True, generator=_seeded())
    assert torch.allclose(model[0].op.dense().norm(dim=1), torch.ones(24), atol=1e-5)
    weight = torch.empty(5, 7)
    assert unit_rows_(weight, _seeded()) is weight


def test_reparametrisation_says_what_is_wrong() -> None:
    with pytest.raises(GramianError, match="no layer chosen"):
        Reparametrisation(_model(), choose=lambda name, layer: False)
    with pytest.raises(GramianError, match="every 0 steps"):
        Reparametrisation(_model(), every=0)
    with pytest.raises(GramianError, match="block 0; expected at least 1"):
        ReparametrisedLinear(nn.Linear(4, 4), block=0)


# Binding ----------------------------------------------------------------------------------------------------------------


def test_json_trees_are_answered_from_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    sys.modules.pop("json_binding", None)
    from json_binding import TREE, Memory, paths  # type: ignore[import-not-found]

    memory = Memory(size=256)
    vector = memory.encode(TREE)
    assert vector.shape == (256,)
    assert len(paths(TREE)) == 11
    assert all(memory.query(vector, path) == value for path, value in paths(TREE))
    deep: Any = "leaf"
    for _ in range(20):
        deep = {"key": deep}
    assert float(memory.encode(deep).norm()) == pytest.approx(1.0, abs=1e-5)
    assert _relative(memory.follow(memory.encode(deep), ["key"] * 20), memory.leaf("leaf")) < 1e-5
    assert not memory.encode({}).any()
