"""Dense layers that run as the execution plan says: the same layer, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gramian.execution import Form
from gramian.nn import PreparedLinear, StructuredLinear, prepare, unprepare
from gramian.ops import BlockLowRank

CUT = Form(True, False, torch.float32, "cut")


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product runs cut, whatever this machine would choose."""
    monkeypatch.setattr("gramian.execution.forms.Prepared.settled", lambda self, x: CUT)


def test_prepare_keeps_everything_but_the_class() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
    before, x = copy.deepcopy(model), torch.randn(2, 3, 6)
    assert prepare(model) is model
    assert [type(m) for m in model] == [PreparedLinear, nn.GELU, PreparedLinear]
    assert list(model.state_dict()) == list(before.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x))
        model[0].weight.mul_(2)  # a change is seen
        before[0].weight.mul_(2)
        torch.testing.assert_close(model(x), before(x))
    for trained in (model, before):
        trained(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, before[0].weight.grad)
    assert [type(m) for m in unprepare(model)] == [nn.Linear, nn.GELU, nn.Linear]


def test_prepare_leaves_factors_and_subclasses_alone() -> None:
    attention = nn.MultiheadAttention(4, 2)
    model = nn.ModuleList([StructuredLinear(BlockLowRank.init((8, 6), rank=2)), attention])
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in prepare(model).modules()] == kinds


def test_a_copy_a_cast_and_a_half_precision_input() -> None:
    layer = prepare(nn.Linear(6, 8))
    x = torch.randn(1, 6)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(copy.deepcopy(layer)(x), y)
        torch.testing.assert_close(layer.double()(x.double()), y.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.float()(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), y)
