"""Adapters on a model: every way to combine against dense matrices, the base untouched, merging, switching, errors."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gramian.adapt import (
    Adapted,
    AdaptedLinear,
    Adapter,
    Context,
    Start,
    attach,
    by_group,
    by_role,
    everywhere,
    load,
    weight_gradients,
)
from gramian.errors import GramianError
from gramian.nn import StructuredLinear
from gramian.ops import (
    BlockDiag,
    BlockLowRank,
    Circulant,
    Dense,
    Diagonal,
    Identity,
    Operator,
    Product,
    Quantized,
    Sum,
)
from gramian.ops.orthogonal import Orthogonal


def normal(context: Context, *shape: int) -> Tensor:
    return torch.randn(shape, generator=context.generator)


def lora(weight: Tensor, context: Context) -> Operator:
    out, in_ = context.shape
    return BlockLowRank.low_rank(torch.zeros(out, context.rank), normal(context, context.rank, in_) / in_**0.5)


def random_pair(weight: Tensor, context: Context) -> Start:
    """Two factors that are not zero, subtracted."""
    out, in_ = context.shape
    update = BlockLowRank.low_rank(normal(context, out, context.rank), normal(context, context.rank, in_) / in_**0.5)
    return Start(update, update)


def singular(weight: Tensor, context: Context) -> Start:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    r, root = context.rank, (s[: context.rank] / context.gain).sqrt()
    update = BlockLowRank.low_rank(u[:, :r] * root, root[:, None] * vh[:r])
    return Start(update, update)


def three(weight: Tensor, context: Context) -> Start:
    """B N A with a diagonal in between."""
    out, in_ = context.shape
    r = context.rank
    update = Product((Dense(normal(context, out, r)), Diagonal(normal(context, r)), Dense(normal(context, r, in_))))
    return Start(update, update)


def dense(weight: Tensor, context: Context) -> Operator:
    return Dense(torch.zeros(context.shape))


def ring(weight: Tensor, context: Context) -> Start:
    update = Circulant.init(context.shape, generator=context.generator)
    return Start(update, update)


def square_low(side: int) -> Any:
    def start(weight: Tensor, context: Context) -> Operator:
        n = context.shape[side]
        return BlockLowRank.low_rank(torch.zeros(n, context.rank), normal(context, context.rank, n) / n**0.5)

    return start


def rotation(n: int) -> Orthogonal:
    block = next((b for b in (4, 3, 2) if n % b == 0), n)
    return Orthogonal(torch.zeros(n // block, block * (block - 1) // 2), None, "cayley", 4)


def two_rotations(weight: Tensor, context: Context) -> Start:
    out, in_ = context.shape
    return Start(BlockDiag((rotation(out), rotation(in_))), BlockDiag((Identity(out), Identity(in_))))


def bottleneck(weight: Tensor, context: Context) -> Start:
    out, r = context.shape[0], context.rank
    parts = (Dense(torch.zeros(out, r)), Dense(normal(context, r, out) / out**0.5))
    return Start(Product(parts), biases=(torch.zeros(r), torch.zeros(out)))


METHODS = {
    "lora": Adapter(lora, alpha=16.0),
    "pair": Adapter(random_pair, alpha=4.0, power=0.5),
    "singular": Adapter(singular, alpha=3.0),
    "three": Adapter(three),
    "dense": Adapter(dense),
    "circulant": Adapter(ring),
    "left": Adapter(square_low(0), combine="left", alpha=2.0),
    "right": Adapter(square_low(1), combine="right", alpha=2.0),
    "two_sided": Adapter(two_rotations, combine="two_sided"),
    "elementwise": Adapter(lora, combine="elementwise", alpha=2.0),
    "insert": Adapter(bottleneck, combine="insert", activation="gelu"),
}


def moved(adapted: Adapted, amount: float = 0.3) -> None:
    """Change every trainable number, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapted.trainable_parameters():
            p.add_(amount * torch.randn(p.shape, generator=generator).to(p))


def net(out: int = 24, in_: int = 16, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(in_, out, bias), nn.Tanh(), nn.Linear(out, in_, bias)).to(dtype)


def reference(layer: nn.Linear, adapted: Adapted, name: str, x: Tensor) -> Tensor:
    """The edited layer by its formula, on dense float64 matrices."""
    edit = adapted.edits[name]
    w = layer.weight.double()
    b = torch.zeros(len(w), dtype=w.dtype) if layer.bias is None else layer.bias.double()
    g, x = edit.gain, x.double()

    def minus(u: Operator, u0: Operator | None) -> Tensor:
        d = u.to(dtype=torch.float64).dense()
        if isinstance(u0, Identity):
            return g * (d - torch.eye(len(d), dtype=d.dtype))
        return g * (d if u0 is None else d - u0.to(dtype=torch.float64).dense())

    start = None if edit.start is None else edit.start.op
    if edit.combine == "two_sided":
        outer, inner = (minus(edit.update.op.parts[i], None if start is None else start.parts[i]) for i in (0, 1))
        eye = torch.eye(len(w), dtype=w.dtype), torch.eye(w.shape[1], dtype=w.dtype)
        return x @ ((eye[0] + outer) @ w @ (eye[1] + inner)).T + b
    if edit.combine == "insert":
        up, down = (part.to(dtype=torch.float64).dense() for part in edit.update.op.parts)
        y = x @ w.T + b
        return y + g * (F.gelu(y @ down.T + edit.biases[0].double()) @ up.T + edit.biases[1].double())
    d = minus(edit.update.op, start)
    full = {
        "add": lambda: w + d,
        "left": lambda: w + d @ w,
        "right": lambda: w + w @ d,
        "elementwise": lambda: w + w * d,
    }
    return x @ full[edit.combine]().T + b


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (13, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_each_method_starts_as_the_base_and_follows_its_formula(
    method: str, shape: tuple[int, int], bias: bool
) -> None:
    model = net(*shape, bias=bias)
    x = torch.randn(2, 3, shape[1])
    before = model(x)
    adapted = attach(model, METHODS[method], include=["0"], rank=3)
    assert isinstance(model[0], AdaptedLinear)
    assert (model(x) - before).abs().max() <= 1e-6 * before.abs().max()
    with torch.no_grad():
        assert (model(x) - before).abs().max() <= 1e-6 * before.abs().max()
    moved(adapted)
    base = model[0].base
    wanted = reference(base, adapted, "0", x)
    for grad in (True, False):
        for inputs in (x, x[0], x[0, 0]):
            with torch.set_grad_enabled(grad):
                found = model[0](inputs)
            part = wanted if inputs is x else wanted[0] if inputs is not None and inputs.dim() == 2 else wanted[0, 0]
            assert found.shape == part.shape
            torch.testing.assert_close(found.double(), part, rtol=1e-5, atol=1e-5)
    with adapted.disabled():
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_reaches_every_trainable_factor_and_nothing_else(method: str) -> None:
    model = net().double()
    adapted = attach(model, METHODS[method], rank=2)
    moved(adapted, 0.1)
    x = torch.randn(5, 16, dtype=torch.float64)
    model(x).square().sum().backward()
    trained = {id(p) for p in adapted.trainable_parameters()}
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in trained) == p.requires_grad, name
    p = adapted.trainable_parameters()[0]
    index = (0,) * p.dim()
    step = 1e-6
    with torch.no_grad():
        p[index] += step
        above = model(x).square().sum()
        p[index] -= 2 * step
        slope = (above - model(x).square().sum()) / (2 * step)
    torch.testing.assert_close(slope, p.grad[index], rtol=1e-4, atol=1e-6)


@given(
    st.integers(2, 12),
    st.integers(2, 12),
    st.integers(1, 4),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([1, 2, 3]),
)
@settings(max_examples=40, deadline=None)
def test_stacked_edits_change_the_layer_one_after_another(
    out: int, in_: int, rank: int, method: str, dims: int
) -> None:
    rank = min(rank, out, in_)
    model = nn.Sequential(nn.Linear(in_, out))
    first = attach(model, METHODS["lora"], rank=rank, name="first")
    moved(first)
    middle = nn.Linear(in_, out)
    with torch.no_grad():
        middle.weight.copy_(model[0].base.weight + first.delta("0").dense())
        middle.bias.copy_(model[0].base.bias)
    second = attach(model, METHODS[method], rank=rank, name="second")
    moved(second)
    x = torch.randn(*[2] * (dims - 1), in_)
    torch.testing.assert_close(model(x).double(), reference(middle, second, "0", x), rtol=1e-4, atol=1e-4)


def test_switching_stacking_scaling() -> None:
    model, x = net(), torch.randn(4, 16)
    bare = model(x)
    a = attach(model, METHODS["lora"], rank=2, name="a")
    moved(a)
    with_a = model(x)
    b = attach(model, METHODS["left"], rank=2, name="b", include=["0"])
    moved(b)
    both = model(x)
    b.disable()
    assert torch.equal(model(x), with_a)
    a.switch("b", "a")
    reversed_ = model(x)
    assert not torch.equal(reversed_, both)
    a.switch("a", "b")
    assert torch.equal(model(x), both)
    a.switch()
    assert torch.equal(model(x), bare)
    a.switch("a")
    assert torch.equal(model(x), with_a)
    a.scale(0.0)
    torch.testing.assert_close(model(x), bare)
    a.scale(2.0)
    assert a.delta("0").dense().norm() > 0
    torch.testing.assert_close(a.delta("0").dense(), 2 * METHODS["lora"].gain(2) * a.edits["0"].update.op.dense())
    with pytest.raises(GramianError, match=r"no adapter 'bb' \(did you mean b"):
        a.switch("bb")
    with pytest.raises(GramianError, match="scale nan"):
        a.scale(float("nan"))
    a.detach()
    assert isinstance(model[0], AdaptedLinear)
    assert isinstance(model[2], nn.Linear)
    b.enable()
    b.detach()
    assert torch.equal(model(x), bare)
    assert type(model[0]) is nn.Linear


def digest(module: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_leave_every_bit_of_the_base(method: str, dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    wanted = [p.requires_grad for p in model.parameters()]
    before, x = digest(model), torch.randn(8, 16, dtype=dtype)
    y = model(x)
    adapted = attach(model, METHODS[method], rank=4)
    assert {p.dtype for p in adapted.trainable_parameters()} == {torch.float32}
    optimizer = adapted.optimizer(1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x).float() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert model(x).dtype == dtype
    with adapted.disabled():
        assert torch.equal(model(x), y)
    assert adapted.detach() is model
    assert digest(model) == before
    assert torch.equal(model(x), y)
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_a_start_does_not_depend_on_the_other_layers_or_on_the_global_state() -> None:
    model = net()
    both = attach(model, METHODS["pair"], rank=2).delta
    one = {name: attach(copy.deepcopy(net()), METHODS["pair"], rank=2, include=[name]) for name in ("0", "2")}
    for name in ("0", "2"):
        assert torch.equal(
            model.get_submodule(name).edits["default"].update.op.dense(), one[name].edits[name].update.op.dense()
        )
    other = attach(net(), METHODS["pair"], rank=2, seed=1)
    assert not torch.equal(other.edits["0"].update.op.dense(), one["0"].edits["0"].update.op.dense())
    assert both("0").shape == (24, 16)


# The axes ------------------------------------------------------------------------------------------------------------


def test_trainable_rates_and_counts() -> None:
    model = net()
    frozen = attach(model, dataclasses.replace(METHODS["pair"], trainable=("left",)), rank=2)
    assert frozen.numel == 2 * (24 + 16)
    frozen.detach()
    adapted = attach(model, dataclasses.replace(METHODS["lora"], rates={"left": 16.0}), rank=2)
    assert adapted.numel == 2 * 2 * (24 + 16)
    groups = {group["lr"]: sum(p.numel() for p in group["params"]) for group in adapted.parameter_groups(0.5)}
    assert groups == {8.0: 2 * (24 + 16), 0.5: 2 * (24 + 16)}
    with pytest.raises(GramianError, match=r"layer 0: trainable pattern 'lefty' fits no factor.*did you mean left"):
        attach(net(), dataclasses.replace(METHODS["lora"], trainable=("lefty",)), rank=2)
    with pytest.raises(GramianError, match=r"rates pattern 'B'.*found left, right"):
        attach(net(), dataclasses.replace(METHODS["lora"], rates={"B": 2.0}), rank=2)


def deep(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(count)])


def run_deep(model: nn.Sequential, x: Tensor) -> Tensor:
    for block in model:
        x = x + block["q"](x) + torch.tanh(block["v"](x))
    return x


@pytest.mark.parametrize(("key", "arrays"), [(everywhere, 1), (by_role, 2), (by_group(2), 4)])
def test_shared_arrays_are_one_and_get_the_sum_of_the_gradients(key: Any, arrays: int) -> None:
    model, x = deep(), torch.randn(3, 8)
    before = run_deep(model, x)
    adapted = attach(model, dataclasses.replace(METHODS["pair"], share={"right": key}), rank=2)
    assert (run_deep(model, x) - before).abs().max() < 1e-5
    assert adapted.numel == 8 * 16 + arrays * 16
    moved(adapted)
    alone = copy.deepcopy(model)
    for layer in (m for m in alone.modules() if isinstance(m, AdaptedLinear)):  # the same numbers, held apart
        edit = layer.edits["default"]
        edit.share("right", copy.deepcopy(edit.update._holder("right")))
        layer.refresh()
    for m in (model, alone):
        run_deep(m, x).square().sum().backward()
    shared = model[0]["q"].edits["default"].update.right.weight
    ours, apart = ([m for m in each.modules() if isinstance(m, AdaptedLinear)] for each in (model, alone))
    pairs = [[layer.edits["default"].update.right.weight for layer in both] for both in zip(ours, apart, strict=True)]
    owners = [own for one, own in pairs if one is shared]
    total = sum(own.grad for own in owners)
    assert len(owners) == 8 // arrays
    torch.testing.assert_close(shared.grad, total)


def test_the_ramp_moves_by_step_alone_and_must_end_before_a_merge() -> None:
    model, x = net(), torch.randn(2, 16)
    before = model(x)
    adapted = attach(model, dataclasses.replace(METHODS["lora"], ramp=4), rank=2)
    moved(adapted)
    assert torch.equal(model(x), before)  # the gain is 0
    for count in range(1, 6):
        model(x)
        adapted.step()
        assert adapted.edits["0"].gain == METHODS["lora"].gain(2) * min(count / 4, 1)
        if count < 4:
            with pytest.raises(GramianError, match=f"layer 0: its gain is at step {count} of a ramp of 4"):
                adapted.merge()
    adapted.merge()


def test_dropout_and_random_masks_act_in_training_alone() -> None:
    def drop(op: Operator) -> Operator:
        return op.replace(left=op.left * (torch.rand_like(op.left[..., :1]) > 0.5))

    for method in (
        dataclasses.replace(METHODS["lora"], dropout=0.5),
        dataclasses.replace(METHODS["lora"], perturb=drop),
    ):
        model, x = net(), torch.randn(6, 16)
        adapted = attach(model, method, rank=2)
        moved(adapted)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))
        torch.testing.assert_close(
            model[0](x).double(), reference(model[0].base, adapted, "0", x), rtol=1e-5, atol=1e-5
        )
        if method.perturb:
            with adapted.perturbed():
                assert not torch.equal(model(x), model(x))
        adapted.merge()
    wide = attach(nn.Sequential(nn.Linear(4000, 2)), dataclasses.replace(METHODS["lora"], dropout=0.25), rank=1)
    kept = wide.edits["0"].dropped(torch.ones(4000))
    assert abs(float((kept == 0).float().mean()) - 0.25) < 0.03
    torch.testing.assert_close(kept.max(), torch.tensor(4 / 3))


def test_penalty_and_own_optimizer() -> None:
    method = dataclasses.replace(
        METHODS["pair"],
        penalty=lambda edit: edit.difference().dense().square().sum(),
        optimizer=lambda adapted, lr: torch.optim.SGD(adapted.parameter_groups(lr), lr=lr),
    )
    adapted = attach(net(), method, rank=2)
    assert isinstance(adapted.optimizer(0.1), torch.optim.SGD)
    assert float(adapted.penalty().detach()) < 1e-9
    moved(adapted)
    wanted = sum(float(adapted.delta(n).dense().detach().square().sum()) for n in ("0", "2"))
    assert float(adapted.penalty().detach()) == pytest.approx(wanted, rel=1e-5)


def test_gradients_match_autograd_and_leave_the_model_as_it_was() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    data = [(torch.randn(3, 5, 16), torch.randn(3, 5, 16)) for _ in range(3)]

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch[0]) - batch[1]).square().mean()

    found = weight_gradients(model, {"0": model[0], "2": model[2]}, iter(data), loss)
    assert model[0].weight.requires_grad is False
    assert model[2].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    twin = copy.deepcopy(model).requires_grad_(True)
    for batch in data:
        loss(twin, batch).backward()
    for name in ("0", "2"):
        torch.testing.assert_close(found[name], twin.get_submodule(name).weight.grad, rtol=1e-5, atol=1e-6)

    seen: dict[str, Context] = {}

    def start(weight: Tensor, context: Context) -> Operator:
        seen[context.name] = context
        return lora(weight, context)

    method = Adapter(start, needs=frozenset({"gradient", "gram_in"}))
    with pytest.raises(GramianError, match=r"layer 0: its start uses the gradient; pass data="):
        attach(model, method)
    with pytest.raises(GramianError, match="found no data"):
        attach(model, method, data=[], loss=loss)
    with pytest.raises(GramianError, match="gives no loss on a batch of type tuple"):
        attach(model, method, data=[(torch.randn(2, 16),)])
    inputs = torch.randn(40, 16)
    attach(
        model,
        method,
        data=[inputs],
        loss=lambda m, batch: m(batch).square().sum(),
        grams={"0": inputs.T @ inputs, "2": torch.eye(24)},
    )
    assert seen["0"].gradient is not None
    assert seen["0"].gradient.shape == (24, 16)
    assert torch.equal(seen["0"].gram_in, inputs.T @ inputs)


def test_grams_are_collected_when_a_start_wants_them() -> None:
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64)), {}

    def start(weight: Tensor, context: Context) -> Operator:
        seen[context.name] = context
        return lora(weight, context)

    x = torch.randn(500, 64)
    attach(model, Adapter(start, needs=frozenset({"gram_in", "gram_out"})), data=[x[:250], x[250:]])
    wanted = x.T @ x / 500
    assert (seen["0"].gram_in - wanted).norm() < 1e-3 * wanted.norm()
    assert seen["2"].gram_out.shape == (64, 64)


# Merging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name != "insert"])
def test_merge_gives_the_same_outputs_and_unmerge_the_same_bits(method: str) -> None:
    model = net()
    adapted = attach(model, METHODS[method], rank=3)
    moved(adapted, 0.2)
    before, x = digest(model), torch.randn(9, 16)
    y, exact = model(x), copy.deepcopy(model).double()(x.double())
    report = adapted.merge()
    assert type(model[0]) is nn.Linear
    assert set(report.loss) == {"0", "2"}
    assert report.worst < 1e-5
    assert (model(x) - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert "0: 0.00% of the update" in str(report)
    with pytest.raises(GramianError, match="merged already"):
        adapted.merge()
    with pytest.raises(GramianError, match="is merged; call unmerge"):
        adapted.detach()
    adapted.unmerge()
    assert digest(model) == before
    assert torch.equal(model(x), y)
    with pytest.raises(GramianError, match="is not merged"):
        adapted.unmerge()


@pytest.mark.parametrize(("ratio", "low", "high"), [(4e-4, 0.92, 0.96), (4e-3, 0.38, 0.46), (4e-2, 0.03, 0.05)])
def test_a_lossy_merge_is_reported_and_refused(ratio: float, low: float, high: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512)).to(torch.bfloat16)
    adapted = attach(model, METHODS["lora"], rank=16)
    with torch.no_grad():
        edit = adapted.edits["0"]
        edit.update.left.weight.normal_()
        size = edit.difference().dense().square().mean().sqrt()
        edit.update.left.weight.mul_(ratio * model[0].weight.float().square().mean().sqrt() / size)
    if high > 0.05:
        with pytest.raises(GramianError, match=r"layer 0: rounding to bfloat16 would lose \d\d% of its update"):
            adapted.merge()
        assert isinstance(model[0], AdaptedLinear)
    report = adapted.merge(lossy=True)
    assert low <= report.worst <= high


def test_merge_refuses_what_is_no_matrix_or_not_finite_or_tied() -> None:
    adapted = attach(net(), METHODS["insert"], rank=2)
    with pytest.raises(GramianError, match="layer 0: an edit that combines by 'insert' is no matrix"):
        adapted.merge()
    adapted = attach(net(), METHODS["lora"], rank=2)
    moved(adapted)
    with torch.no_grad():
        adapted.edits["2"].update.left.weight[3, 1] = float("nan")
    with pytest.raises(GramianError, match=r"layer 2 \(16 x 24\): 24 entries of the merged weight .*first: nan"):
        adapted.merge()
    model = nn.ModuleDict({"table": nn.Embedding(20, 8), "head": nn.Linear(8, 20, False)})
    model["head"].weight = model["table"].weight
    with pytest.raises(GramianError, match="layer head: its weight is tied"):
        attach(model, METHODS["lora"], include=["head"], rank=2).merge()


# Layers of every kind ------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A weight-only quantised layer as other libraries have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["conv1d", "structured", "quantized", "foreign"])
def test_each_method_on_every_kind_of_layer(kind: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 24)
    layer: nn.Module
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(24, 16)
        nn.init.normal_(layer.weight, std=0.2)
    elif kind == "structured":
        layer = StructuredLinear(BlockLowRank.fit(linear.weight.detach(), rank=6), linear.bias.detach())
    elif kind == "quantized":
        layer = StructuredLinear(Quantized.fit(linear.weight.detach(), bits=8), linear.bias.detach())
    else:
        layer = Int8Linear(linear)
    model = nn.Sequential(layer)
    x = torch.randn(5, 16)
    before, bits = model(x), digest(model)
    plain = nn.Linear(16, 24)
    with torch.no_grad():
        plain.bias.copy_(model(torch.zeros(16)))
        plain.weight.copy_((model(torch.eye(16)) - plain.bias).T)
    adapted = attach(model, METHODS[method], rank=3)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    moved(adapted)
    y = model(x)
    torch.testing.assert_close(y.double(), reference(plain, adapted, "0", x), rtol=1e-4, atol=1e-5)
    adapted.save(tmp_path / "saved")
    if method != "insert":
        adapted.merge(dense=kind == "foreign")
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        assert (
            isinstance(model[0], nn.Linear if kind == "foreign" or method == "elementwise" else type(layer))
            or kind == "conv1d"
        )
        adapted.unmerge()
    adapted.detach()
    assert digest(model) == bits
    load(model, tmp_path / "saved")
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


def test_a_foreign_layer_is_not_turned_dense_without_being_told() -> None:
    adapted = attach(nn.Sequential(Int8Linear(nn.Linear(16, 24))), METHODS["lora"], rank=2)
    with pytest.raises(GramianError, match="layer 0: a Int8Linear has no plain weight to merge into; pass dense=True"):
        adapted.merge()


def test_the_fused_encoder_kernel_does_not_pass_the_adapter_by() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = model(x)
        adapted = attach(model, METHODS["lora"], include=["linear1", "linear2"], rank=2)
        torch.testing.assert_close(model(x), fast)
        moved(adapted)
        assert (model(x) - fast).abs().max() > 1e-2
        with adapted.disabled():
            assert torch.equal(model(x), fast)
        adapted.detach()
        assert torch.equal(model(x), fast)
    assert not [n for n, m in model.named_modules() if "out_proj" in n and isinstance(m, AdaptedLinear)]


def test_a_layer_at_two_names_is_adapted_once() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": linear, "b": linear})
    adapted = attach(model, METHODS["lora"], rank=2)
    assert model["a"] is model["b"]
    assert adapted.numel == 2 * 16
    adapted.detach()
    assert model["a"] is model["b"] is linear


# Where models run ----------------------------------------------------------------------------------------------------


def tiny(kind: str) -> tuple[Any, dict[str, Tensor]]:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    if kind == "llama":
        config = t.LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2)
        model = t.LlamaForCausalLM(config)
    elif kind == "bert":
        model = t.BertForSequenceClassification(t.BertConfig(**sizes, intermediate_size=64))
    else:
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32))
    ids = torch.randint(0, 50, (2, 9))
    labels = torch.tensor([0, 1]) if kind == "bert" else ids
    return model.eval(), {"input_ids": ids, "labels": labels}


LAYERS = {"llama": 14, "bert": 13, "gpt2": 8}


@pytest.mark.parametrize("kind", LAYERS)
def test_hugging_face_models_in_one_call(kind: str) -> None:
    model, batch = tiny(kind)
    before, bits = model(**batch), digest(model)
    adapted = attach(model, METHODS["singular"], rank=2)
    assert len(adapted.layers) == LAYERS[kind]  # not the head
    torch.testing.assert_close(model(**batch).logits, before.logits, rtol=1e-4, atol=1e-5)
    model.train()
    optimizer = adapted.optimizer(1e-2)
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    after = model(**batch)
    assert after.loss < before.loss
    adapted.merge()
    torch.testing.assert_close(model(**batch).logits, after.logits, rtol=1e-4, atol=1e-5)
    adapted.unmerge()
    adapted.detach()
    assert digest(model) == bits
    assert torch.equal(model(**batch).logits, before.logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    grads = []
    for reentrant in (None, False, True):
        model, batch = tiny(kind)
        adapted = attach(model, METHODS["pair"], rank=2)
        moved(adapted, 0.05)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**batch).loss.backward()
        grads.append([p.grad for p in adapted.trainable_parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_and_bfloat16() -> None:
    model, batch = tiny("llama")
    adapted = attach(model, METHODS["lora"], rank=2)
    moved(adapted, 0.1)
    full = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch).logits
    assert (mixed.float() - full).norm() < 0.03 * full.norm()
    half = attach(tiny("llama")[0].to(torch.bfloat16), METHODS["lora"], rank=2)
    moved(half, 0.1)
    found = half.model(**batch).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("method", ["lora", "pair", "left", "two_sided", "elementwise", "insert"])
def test_torch_compile_makes_one_graph(method: str) -> None:
    model, x = net(), torch.randn(4, 16)
    adapted = attach(model, METHODS[method], rank=2)
    moved(adapted)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in adapted.trainable_parameters()]
    for p in adapted.trainable_parameters():
        p.grad = None
    model(x).square().sum().backward()
    for p, grad in zip(adapted.trainable_parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def _rank(rank: int, folder: str) -> None:
    os.environ.update({"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = net()
    adapted = attach(model, dataclasses.replace(METHODS["pair"], share={"left": everywhere}), rank=2)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(adapted.parameter_groups(0.1), lr=0.1)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        ddp(x[4 * rank : 4 * rank + 4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([p.detach() for p in adapted.trainable_parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file")
def test_distributed_training_is_the_training_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), 2)
    model = net()
    adapted = attach(model, dataclasses.replace(METHODS["pair"], share={"left": everywhere}), rank=2)
    optimizer = torch.optim.SGD(adapted.parameter_groups(0.1), lr=0.1)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for p, q, whole in zip(a, b, adapted.trainable_parameters(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, whole.detach(), rtol=1e-5, atol=1e-6)


def test_copies_are_independent_and_keep_sharing() -> None:
    model, x = deep(2), torch.randn(2, 8)
    adapted = attach(model, dataclasses.replace(METHODS["lora"], share={"right": everywhere}), rank=2)
    moved(adapted)
    with torch.no_grad():
        y = run_deep(model, x)
    twin = copy.deepcopy(model)
    assert sum(p.requires_grad for p in twin.parameters()) == sum(p.requires_grad for p in model.parameters())
    moved(adapted)
    with torch.no_grad():
        assert torch.equal(run_deep(twin, x), y)
        assert not torch.equal(run_deep(model, x), y)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(run_deep(twin, x), run_deep(model, x))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert run_deep(half, x.bfloat16()).dtype == torch.bfloat16


def test_what_is_cached_without_gradients_follows_every_change() -> None:
    model, x = net(), torch.randn(3, 16)
    adapted = attach(model, METHODS["pair"], rank=2)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with torch.no_grad():
            found = model(x)
            for a, b in zip(twin.parameters(), model.parameters(), strict=True):
                a.copy_(b)
        torch.testing.assert_close(found, twin(x).detach())
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), twin(x) + 0 * found, rtol=10, atol=10)


def test_hooks_of_the_base_layer_still_run() -> None:
    model, x, seen = net(), torch.randn(3, 16), []
    attach(model, METHODS["lora"], rank=2)
    model[0].base.register_forward_hook(lambda m, i, o: seen.append(1))
    model(x)
    assert seen == [1]
    model[2].base.forward = types.MethodType(lambda self, z: F.linear(z, self.weight, self.bias) + 7, model[2].base)
    wanted = model(x)
    del model[2].base.forward
    torch.testing.assert_close(wanted, model(x) + 7)


# Errors --------------------------------------------------------------------------------------------------------------


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.ModuleDict({"query": nn.Linear(32, 24), "value": nn.Linear(32, 24), "norm": nn.LayerNorm(24)})
    )


def spoiled(value: float) -> nn.Sequential:
    model = small()
    with torch.no_grad():
        model[0]["value"].weight[2, 5] = value
    return model


def zeroed() -> nn.Sequential:
    model = small()
    with torch.no_grad():
        model[0]["value"].weight.zero_()
    return model


def broken_merge() -> None:
    adapted = attach(small(), METHODS["lora"], rank=2)
    with torch.no_grad():
        adapted.edits["0.value"].update.right.weight.fill_(float("inf"))
    adapted.merge()


TEN = {
    "one of two targets is wrong": (
        lambda: attach(small(), METHODS["lora"], include=["query", "vlaue"]),
        r"pattern 'vlaue' fits no layer \(did you mean value",
    ),
    "rank too large": (
        lambda: attach(small(), METHODS["lora"], rank=64),
        r"layer 0\.query \(24 x 32\): rank 64; expected a whole number from 1 to 24",
    ),
    "rank too large for a decomposition": (
        lambda: attach(small(), METHODS["singular"], rank={"query": 4, "value": 25}),
        r"layer 0\.value \(24 x 32\): rank 25; expected a whole number from 1 to 24",
    ),
    "alpha zero": (lambda: Adapter(singular, alpha=0), r"alpha 0; expected a positive"),
    "alpha negative": (
        lambda: attach(small(), METHODS["singular"], rank=2, alpha={"*": 4.0, "0.value": -16.0}),
        r"layer 0\.value: alpha -16\.0; expected a positive",
    ),
    "NaN weight": (
        lambda: attach(spoiled(float("nan")), METHODS["lora"], rank=2),
        r"layer 0\.value \(24 x 32\): 1 entries of its weight are not finite \(first: nan\)",
    ),
    "infinite weight": (
        lambda: attach(spoiled(float("-inf")), METHODS["singular"], rank=2),
        r"layer 0\.value \(24 x 32\): 1 entries of its weight are not finite \(first: -inf\)",
    ),
    "a start that cannot learn": (
        lambda: attach(zeroed(), METHODS["singular"], rank=2),
        r"layer 0\.value \(24 x 32, weight of norm 0\): every trainable factor of this start has a gradient of exactly 0",
    ),
    "merging what is not finite": (
        broken_merge,
        r"layer 0\.value \(24 x 32\): 768 entries of the merged weight .* nan",
    ),
    "a rank for no layer": (
        lambda: attach(small(), METHODS["lora"], rank={"query": 4, "key": 2}),
        r"rank 'key': 2 fits none of the chosen layers",
    ),
}


@pytest.mark.parametrize("case", TEN)
def test_what_the_peft_library_accepts_silently_is_an_error(case: str) -> None:
    call, message = TEN[case]
    with pytest.raises(GramianError, match=message):
        call()


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = zeroed()
    before = [type(m) for m in model.modules()]
    with pytest.raises(GramianError):
        attach(model, METHODS["singular"], rank=2)
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_more_errors_at_the_door() -> None:
    with pytest.raises(GramianError, match="has no linear layer to adapt"):
        attach(nn.Sequential(nn.ReLU()), METHODS["lora"])
    with pytest.raises(GramianError, match=r"pattern '0\.norm' fits no linear layer \(only LayerNorm\)"):
        attach(small(), METHODS["lora"], include=["0.norm"])
    with pytest.raises(GramianError, match="no layer is left"):
        attach(small(), METHODS["lora"], exclude=["*"])
    with pytest.raises(GramianError, match="adapter name 'a b'"):
        attach(small(), METHODS["lora"], name="a b")
    with pytest.raises(GramianError, match="adapter name 'keys'"):
        attach(small(), METHODS["lora"], name="keys")
    model = small()
    attach(model, METHODS["lora"], rank=2)
    with pytest.raises(GramianError, match=r"layer 0\.query: has an adapter 'default' already"):
        attach(model, METHODS["lora"], rank=2)
    with pytest.raises(GramianError, match="layer 0.query: the start gave a Tensor"):
        attach(small(), Adapter(lambda w, c: w))  # type: ignore[arg-type, return-value]
    with pytest.raises(GramianError, match=r"layer 0\.query: update .* combine 'left': expected 24 x 24"):
        attach(small(), Adapter(lora, combine="left"), rank=2)
    with pytest.raises(GramianError, match=r"combine 'ad' \(did you mean add"):
        Adapter(lora, combine="ad")
    with pytest.raises(GramianError, match="activation 'gelu'"):
        Adapter(lora, activation="gelu")
    with pytest.raises(GramianError, match="dropout 1"):
        Adapter(lora, dropout=1.0)
    with pytest.raises(GramianError, match="ramp -1"):
        Adapter(lora, ramp=-1)
    with pytest.raises(GramianError, match=r"needs \['hessian'\]"):
        Adapter(lora, needs=frozenset({"hessian"}))
    with pytest.raises(GramianError, match="on the meta device"):
        with torch.device("meta"):
            empty = nn.Sequential(nn.Linear(8, 8))
        attach(empty, METHODS["lora"], rank=2)
    with pytest.raises(GramianError, match=r"factor 'left' is not finite \(nan\)"):
        attach(small(), Adapter(lambda w, c: BlockLowRank.low_rank(w[:, :2] / 0 * 0, w[:2])), rank=2)
    with pytest.raises(GramianError, match=r"layer 0.query: gradient \(3, 3\); expected \(24, 32\)"):
        attach(
            small(),
            Adapter(lora, needs=frozenset({"gradient"})),
            gradients=dict.fromkeys(("0.query", "0.value"), torch.zeros(3, 3)),
        )
    with pytest.raises(GramianError, match="adapter 'default' has no layer 'query'"):
        attach(small(), METHODS["lora"], rank=2).delta("query")


def test_methods_by_pattern() -> None:
    model = small()
    adapted = attach(model, {"query": METHODS["lora"], "value": METHODS["left"]}, rank={"query": 3, "value": 2})
    assert {n: (e.combine, e.rank) for n, e in adapted.edits.items()} == {"0.query": ("add", 3), "0.value": ("left", 2)}
    only = attach(small(), METHODS["lora"], rank={"value": 2})
    assert list(only.layers) == ["0.value"]


def test_sums_of_products_run_as_they_are() -> None:
    def start(weight: Tensor, context: Context) -> Start:
        parts = tuple(random_pair(weight, context).update for _ in range(3))
        return Start(Sum(parts), Sum(parts))

    model, x = net(), torch.randn(3, 16)
    adapted = attach(model, Adapter(start), rank=2)
    moved(adapted)
    torch.testing.assert_close(model[0](x).double(), reference(model[0].base, adapted, "0", x), rtol=1e-5, atol=1e-5)


def test_a_model_with_adapters_does_not_load_as_one_without(tmp_path: Path) -> None:
    import transformers as t

    model, _ = tiny("bert")
    attach(model, METHODS["lora"], rank=2)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match="mismatch"):
        t.BertForSequenceClassification.from_pretrained(tmp_path / "model")


def test_merging_what_was_not_trained_loses_nothing() -> None:
    from gramian.adapt import recipe

    model = net()
    before = model[0].weight.detach().clone()
    assert attach(model, recipe("pissa"), rank=2).merge().worst == 0
    torch.testing.assert_close(model[0].weight, before, rtol=0, atol=1e-6)
