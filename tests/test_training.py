"""Training structured layers from scratch: starts, learning rates, guides, dense phases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.nn import (
    SelfGuided,
    StructuredLinear,
    as_linear,
    guide,
    identity_,
    linear_layers,
    parameter_groups,
    rate_multipliers,
    spectral_,
    structured,
    to_dense,
    to_structured,
    unguide,
    unit_variance_,
)
from gramian.nn.initialise import spectral_norm
from gramian.ops import BlockLowRank, Dense, Identity, Kron, Skeleton


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    return nn.Sequential(
        structured(24, 48, "block_low_rank", rank=2, blocks=(4, 4), generator=seeded()),
        nn.GELU(),
        nn.Linear(48, 10),
    )


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("block_low_rank", {"rank": 2, "blocks": (4, 4)}),
        ("block_low_rank", {"rank": 5}),
        ("kronecker", {"terms": 2}),
        ("block_sparse", {"kept": 2}),
        ("dense", {}),
    ],
)
@pytest.mark.parametrize("shape", [(96, 96), (32, 128), (128, 32)])
def test_a_new_layer_meets_the_spectral_condition(kind: str, size: dict[str, object], shape: tuple[int, int]) -> None:
    layer = structured(shape[1], shape[0], kind, generator=seeded(), **size)
    matrix = layer.weight if isinstance(layer, nn.Linear) else layer.op.dense()
    norm = float(torch.linalg.matrix_norm(matrix.detach().double(), 2))
    assert norm == pytest.approx((shape[0] / shape[1]) ** 0.5, rel=0.05)
    assert layer.bias is not None
    assert not layer.bias.any()


def test_the_spectral_norm_needs_no_dense_matrix() -> None:
    op = Kron(Dense(torch.diag(torch.tensor([3.0, 1.0]))), Dense(torch.diag(torch.tensor([1.0, 0.2, 0.1]))))
    assert spectral_norm(op) == pytest.approx(3.0, rel=1e-4)
    assert spectral_norm(Dense(torch.zeros(3, 4))) == 0.0
    layer = as_linear(BlockLowRank.low_rank(torch.randn(6, 2), torch.randn(2, 4)))
    assert spectral_norm(spectral_(layer, 5.0).op) == pytest.approx(5.0, rel=1e-3)


def test_unit_variance_of_every_layer() -> None:
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(7.0)
    x = torch.randn(256, 24, generator=seeded())
    reached = unit_variance_(model, lambda: model(x))
    assert list(reached) == ["0", "2"]
    first = model[0](x)
    assert abs(float(first.var()) - 1) < 0.1
    assert abs(float(model(x).var()) - 1) < 0.1


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (16, 24)])
def test_identity_start(shape: tuple[int, int]) -> None:
    wanted = torch.zeros(shape)
    wanted[torch.arange(shape[0]), torch.arange(shape[0]) % shape[1]] = 1
    dense = identity_(nn.Linear(shape[1], shape[0]), 0.5)
    torch.testing.assert_close(dense.weight.detach(), 0.5 * wanted)
    layer = identity_(structured(shape[1], shape[0], "kronecker", terms=4, left=(4, 4), generator=seeded()))
    assert isinstance(layer, StructuredLinear)
    torch.testing.assert_close(layer.op.dense().detach(), wanted, rtol=0, atol=1e-4)


def test_a_structure_that_cannot_hold_the_identity_says_so() -> None:
    with pytest.raises(GramianError, match="misses the identity"):
        identity_(structured(16, 16, "block_low_rank", rank=2, generator=seeded()))


def test_rates_of_factors_follow_their_own_width() -> None:
    layer = as_linear(BlockLowRank.init((64, 48), rank=2, blocks=(4, 4), generator=seeded()), torch.zeros(64))
    assert isinstance(layer, StructuredLinear)
    # right (4, 8, 12): fan-in 12; left (4, 16, 8): fan-in 8; two cores.
    assert rate_multipliers(layer) == {"left": 48 / 8 / 2, "right": 48 / 12 / 2}
    assert rate_multipliers(layer, base_width=24)["right"] == 48 / 12 / 2 / 2


def test_groups_hold_every_parameter_once() -> None:
    model = network()
    groups = parameter_groups(model, 0.01, base_width=24)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["2.weight"] == pytest.approx(0.01 * 24 / 48)
    assert rates["2.bias"] == rates["0.bias"] == 0.01
    optimiser = torch.optim.Adam(groups)
    model(torch.randn(3, 24)).sum().backward()
    optimiser.step()


def test_layers_inside_a_structured_layer_are_not_layers() -> None:
    low_rank = as_linear(BlockLowRank.low_rank(torch.randn(6, 2), torch.randn(2, 4)))
    assert [name for name, _ in linear_layers(nn.Sequential(low_rank, nn.Linear(6, 1)))] == ["0", "1"]


def test_a_guide_starts_at_the_structure_and_fades() -> None:
    model = network()
    x = torch.randn(5, 24, generator=seeded())
    before = model(x)
    assert guide(model, 20, share=0.5) == ["0"]
    guided = model[0]
    assert isinstance(guided, SelfGuided)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        guided.guide.add_(1.0)
    weights = []
    for _ in range(12):
        weights.append(guided.weight_of_guide)
        model(x)
    assert weights[0] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))  # one pass went before
    assert weights == sorted(weights, reverse=True)
    assert guided.weight_of_guide == 0
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert unguide(model) == ["0"]
    assert isinstance(model[0], StructuredLinear)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_the_guide_mixes_as_the_paper_says() -> None:
    layer = as_linear(Skeleton.init((6, 5), rank=2, generator=seeded()), torch.randn(6))
    assert isinstance(layer, StructuredLinear)
    guided = SelfGuided(layer, 10, share=1.0)
    guided.taken.fill_(4)
    a = 0.5 * (1 + math.cos(math.pi * 0.4))
    with torch.no_grad():
        guided.guide.normal_()
    x = torch.randn(3, 5)
    matrix = a * guided.guide + (1 - a) * layer.op.dense()
    torch.testing.assert_close(guided(x), x @ matrix.mT + layer.bias)
    with pytest.raises(GramianError, match="steps 0"):
        SelfGuided(layer, 0)


def test_dense_phases_keep_the_function() -> None:
    model = network()
    x = torch.randn(5, 24, generator=seeded())
    before: Tensor = model(x)
    assert to_dense(model) == ["0"]
    assert isinstance(model[0], nn.Linear)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    # The matrix is a member of the structure, so that projecting it back loses nothing.
    assert to_structured(model, "block_low_rank", {"0": {"rank": 2, "blocks": (4, 4)}}) == ["0"]
    assert isinstance(model[0], StructuredLinear)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
    with pytest.raises(GramianError, match="'2' is not a structured layer"):
        to_dense(model, ["2"])
    with pytest.raises(GramianError, match="'0' is not an nn.Linear"):
        to_structured(model, "block_low_rank", {"0": {"rank": 1}})


def test_identity_has_no_rates() -> None:
    layer = as_linear(Identity(4))
    assert isinstance(layer, StructuredLinear)
    assert rate_multipliers(layer) == {}


def test_every_term_of_a_sum_is_scaled_alike() -> None:
    for kind, size in (("low_rank_sparse", {"rank": 4, "nonzeros": 300}), ("low_rank_quantized", {"rank": 4})):
        layer = structured(64, 64, kind, bias=False, generator=seeded(), **size)
        before = layer.op.dense().detach().clone()
        assert float(torch.linalg.matrix_norm(before, 2)) == pytest.approx(1, rel=1e-2)
        spectral_(layer, 0.1)
        assert torch.allclose(layer.op.dense(), 0.1 * before / float(torch.linalg.matrix_norm(before, 2)), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("block_low_rank", {"rank": 4, "blocks": (4, 4), "strided_rows": True}),
        ("block_low_rank", {"rank": 3, "blocks": (3, 3)}),
        ("orthogonal", {}),
        ("householder", {"reflectors": 2}),
        ("low_rank_sparse", {"rank": 2, "nonzeros": 30}),
        ("dictionary", {"atoms": 16, "nonzeros": 1}),
    ],
)
def test_the_identity_keeps_the_layout_of_the_layer(kind: str, size: dict[str, Any]) -> None:
    n = 9 if size.get("blocks") == (3, 3) else 16
    layer = identity_(structured(n, n, kind, bias=False, generator=seeded(), **size))
    x = torch.randn(5, n)
    assert torch.allclose(layer(x), x, atol=1e-5)


def test_what_a_structure_would_ignore_is_refused() -> None:
    with pytest.raises(GramianError, match="unknown size 'ranks' .did you mean rank"):
        structured(16, 16, "block_low_rank", ranks=8)
    with pytest.raises(GramianError, match="square"):
        structured(3, 5, "diagonal")


def test_phases_change_a_shared_layer_at_all_its_names_and_nothing_else() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "frozen": nn.Linear(8, 8).requires_grad_(False)}).eval()
    assert to_structured(model, "block_low_rank", rank=4) == ["a", "frozen"]
    assert model["a"] is model["b"]
    assert isinstance(model["b"], StructuredLinear)
    assert not model["a"].training
    assert all(p.requires_grad for p in model["a"].parameters())
    assert not any(p.requires_grad for p in model["frozen"].parameters())
    guide(model, 4)
    assert model["a"] is model["b"]
    assert isinstance(model["b"], SelfGuided)
    unguide(model)
    to_dense(model)
    assert model["a"] is model["b"]
    assert isinstance(model["b"], nn.Linear)
    with pytest.raises(GramianError, match="the model itself"):
        to_dense(structured(8, 8, "block_low_rank", rank=2))


def test_attention_and_encoders_run_after_a_phase() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert to_structured(encoder, "block_low_rank", rank=4) == ["linear1", "linear2"]
    x = torch.randn(2, 3, 16)
    encoder(x).sum().backward()
    with torch.no_grad():
        assert encoder.eval()(x).shape == x.shape
