"""Dense layers that run as the execution plan says: the same layer, the same numbers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gramian
from gramian.execution import Form
from gramian.execution.forms import candidates
from gramian.nn import PreparedLinear, StructuredLinear, prepare, unprepare
from gramian.ops import BlockLowRank, Dense

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


def test_half_precision_is_copied_only_where_that_is_allowed() -> None:
    op = Dense(torch.randn(6, 8, dtype=torch.bfloat16))
    kinds = {recast: {form.dtype for form in candidates(op, op.dtype, 4, recast=recast)} for recast in (True, False)}
    assert kinds == {True: {torch.bfloat16, torch.float32}, False: {torch.bfloat16}}
    layer = nn.Linear(6, 8)
    for recast in (True, False):
        prepare(layer, recast=recast)
        with torch.no_grad():
            layer(torch.randn(1, 6))
        assert layer._kept._made._recast is recast


def test_prepared_layers_are_linear_layers_to_everything_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 128)).eval()
    x = torch.randn(256, 128)
    small = gramian.compress(model, [x], keep=0.5, structures="low_rank")
    again = gramian.compress(prepare(model), [x], keep=0.5, structures="low_rank")
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))
    part = gramian.compress(model, [x], keep=0.5, structures="low_rank", include=["0"])
    assert [type(m) for m in part] == [StructuredLinear, nn.GELU, PreparedLinear]
    assert [type(m) for m in gramian.compress(part, [x], keep=0.5)][2] is StructuredLinear


@pytest.mark.parametrize("structure", [{}, {"blocks": (2, 2)}])
def test_a_trace_holds_the_parameters_and_nothing_of_this_machine(structure: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), StructuredLinear(BlockLowRank.init((4, 8), rank=2, **structure))).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that are constants, and of torch.jit itself
        traced = torch.jit.trace(prepare(model), torch.randn(3, 6))
        torch.testing.assert_close(traced(torch.ones(2, 6)), model(torch.ones(2, 6)))
    assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        before = model(torch.ones(2, 6))
        traced.get_parameter("0.weight").zero_()
        traced.get_parameter("0.bias").zero_()
        assert not torch.equal(model(torch.ones(2, 6)), before)
        assert not traced(torch.ones(2, 6)).any()


def test_tensors_of_other_libraries_are_left_to_them() -> None:
    layer = prepare(nn.Linear(6, 8, bias=False))
    layer._parameters["weight"] = Counting(torch.randn(8, 6))
    with torch.no_grad():
        layer(torch.randn(1, 6))
    assert Counting.products == 1


class Counting(nn.Parameter):
    """Knows its own product."""

    products = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.products += function is nn.functional.linear
        return super().__torch_function__(function, types, args, kwargs or {})


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
