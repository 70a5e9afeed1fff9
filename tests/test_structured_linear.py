"""``StructuredLinear`` as a drop-in for ``nn.Linear``: the same numbers whatever is done to it in between."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from safetensors.torch import load, save
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.nn import FeatureMajor, StructuredEmbedding, StructuredLinear, as_linear
from gramian.ops import (
    BlockDiag,
    BlockLowRank,
    BlockSparse,
    Dense,
    Diagonal,
    KroneckerSum,
    Operator,
    Product,
    Quantized,
    Selection,
    Skeleton,
    Sum,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _init(cls: type[Operator], shape: tuple[int, int] = (8, 12), **size: Any) -> Operator:
    return cls.init(shape, generator=torch.Generator().manual_seed(0), **size)


OPERATORS: dict[str, Callable[[], Operator]] = {
    "low rank": lambda: _init(BlockLowRank, rank=2),
    "low rank that runs dense": lambda: _init(BlockLowRank, rank=7),
    "blocks": lambda: _init(BlockLowRank, rank=1, blocks=(2, 2), strided_rows=True),
    "blocks that run dense": lambda: _init(BlockLowRank, rank=4, blocks=(2, 2)),
    "skeleton": lambda: _init(Skeleton, rank=3),
    "skeleton by columns": lambda: _init(Skeleton, shape=(12, 8), rank=3).T,
    "kronecker": lambda: _init(KroneckerSum, terms=1),
    "block sparse": lambda: _init(BlockSparse, kept=1, block=(4, 4)),
    "quantized": lambda: _init(Quantized, bits=4, group=4),
    "sum": lambda: Sum((_init(Quantized, bits=2), _init(BlockLowRank, rank=1))),
    "product": lambda: Product((_init(BlockLowRank, rank=2), Diagonal(normal(12)))),
    "block diagonal": lambda: BlockDiag((_init(Dense, (4, 6)), _init(BlockLowRank, (4, 6), rank=1))),
}
TRAINABLE = [name for name in OPERATORS if name != "quantized"]
every = pytest.mark.parametrize("name", OPERATORS)


def layer_of(name: str, bias: bool = True) -> StructuredLinear:
    op = OPERATORS[name]()
    return StructuredLinear(op, normal(op.shape[0], seed=1) if bias else None)


def reference(layer: StructuredLinear, x: Tensor) -> Tensor:
    """What the layer should compute, from its live factors and nothing else."""
    with torch.no_grad():
        return F.linear(x, layer.op.dense().to(x.dtype), layer.bias)


def assert_current(layer: StructuredLinear, tolerance: float = 1e-5) -> None:
    """The layer agrees with its live factors, with gradients and without, twice."""
    x = normal(3, layer.in_features, seed=9).to(layer.weight.dtype)
    wanted = reference(layer, x)
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(layer(x), wanted, atol=tolerance)
        with torch.inference_mode():
            assert torch.allclose(layer(x), wanted, atol=tolerance)


# Drop-in ------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_linear(name: str, bias: bool) -> None:
    layer = layer_of(name, bias)
    plain = layer.to_linear()
    assert (plain.in_features, plain.out_features) == (layer.in_features, layer.out_features)
    assert (plain.bias is None) == (layer.bias is None)
    for batch in ((), (3,), (2, 3), (0,)):
        x = normal(*batch, layer.in_features)
        wanted = plain(x).detach()
        assert torch.allclose(layer(x), wanted, atol=1e-5)
        assert torch.allclose(layer(x.clone().requires_grad_()), wanted, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(layer(x), wanted, atol=1e-5)


@every
def test_gradients_equal_those_of_the_dense_matrix(name: str) -> None:
    layer = layer_of(name)
    op, x = layer.op, normal(5, layer.in_features).requires_grad_()
    y = F.linear(x, op.dense(), layer.bias)
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad(y.square().sum(), inputs)
    found = torch.autograd.grad(layer(x).square().sum(), inputs)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)


def test_factors_are_copied() -> None:
    op = _init(BlockLowRank, rank=2)
    assert isinstance(op, BlockLowRank)
    before, bias = op.left.clone(), normal(8)
    layer = StructuredLinear(op, bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(op.left, before)
    assert bool(bias.any())
    shared = StructuredLinear(Sum((op, op)))
    assert len({value.data_ptr() for value in shared.state_dict().values() if value.numel()}) == 4
    transposed = as_linear(BlockDiag((Dense(normal(3, 2).mT), Dense(normal(2, 2)))))
    assert all(value.is_contiguous() for value in transposed.state_dict().values())


def test_making_a_layer_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    layer_of("skeleton")
    assert torch.equal(torch.get_rng_state(), state)


def test_as_linear_gives_a_plain_linear_for_a_dense_matrix() -> None:
    weight, bias = normal(3, 4), normal(3)
    layer = as_linear(Dense(weight), bias)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(normal(2, 4)), F.linear(normal(2, 4), weight, bias))
    assert as_linear(Dense(weight)).bias is None
    with torch.no_grad():
        layer.weight.zero_()
    assert bool(weight.any())
    assert isinstance(as_linear(_init(Skeleton, rank=2)), StructuredLinear)


def test_bad_input_is_named() -> None:
    with pytest.raises(GramianError, match=r"bias \(5,\); expected \(8,\)"):
        StructuredLinear(_init(BlockLowRank, rank=2), normal(5))
    with pytest.raises(GramianError, match="as_linear"):
        StructuredLinear(Dense(normal(2, 2)))

    @dataclass(frozen=True, eq=False, repr=False)
    class Unlucky(Diagonal):
        in_features: Tensor = field(default_factory=lambda: torch.ones(1))

    with pytest.raises(GramianError, match="'in_features' of a diagonal operator"):
        StructuredLinear(Unlucky(normal(2)))


def test_children_are_named_like_the_factors_and_matrices_are_linears() -> None:
    layer = layer_of("skeleton")
    assert isinstance(layer.basis, nn.Linear)
    assert isinstance(layer.coefficients, nn.Linear)
    assert not isinstance(layer.order, nn.Linear)
    assert set(dict(layer.named_parameters())) == {"basis.weight", "coefficients.weight", "bias"}
    nested = layer_of("sum")
    assert isinstance(nested.get_submodule("parts.1.left"), nn.Linear)
    assert "skeleton, in_features=12, out_features=8" in repr(layer)


# State --------------------------------------------------------------------------------------------------------------


@every
def test_state_dict_round_trip(name: str) -> None:
    layer, other = layer_of(name), layer_of(name)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    other(normal(2, layer.in_features).requires_grad_())
    assert_current(other)
    other.load_state_dict(layer.state_dict())
    assert_current(other)
    x = normal(2, layer.in_features)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


@every
def test_construction_from_a_description_then_loading(name: str) -> None:
    layer = layer_of(name)
    config, stored = json.loads(json.dumps(layer.config())), save(layer.state_dict())
    hollow = StructuredLinear.from_config(config, bias=True)
    assert {value.device.type for value in hollow.state_dict().values()} == {"meta"}
    hollow.load_state_dict(load(stored), assign=True)
    materialised = StructuredLinear.from_config(config, bias=True).to_empty(device="cpu")
    materialised.load_state_dict(load(stored))
    x = normal(2, layer.in_features)
    with torch.no_grad():
        assert torch.equal(hollow(x), layer(x))
        assert torch.equal(materialised(x), layer(x))
    for key, value in layer.state_dict().items():
        assert materialised.state_dict()[key].dtype == value.dtype
    assert StructuredLinear.from_config(config, bias=False).bias is None


def test_another_class_cannot_load_the_state() -> None:
    """The guard: without this class, ``weight`` (0 elements) does not fit the (out, in) of a plain linear layer."""
    layer = layer_of("low rank")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(12, 8).load_state_dict(layer.state_dict(), strict=False)


@every
def test_copies_are_independent_and_carry_no_cache(name: str) -> None:
    layer = layer_of(name)
    assert_current(layer)
    buffer = io.BytesIO()
    pickle.dump(layer, buffer)
    assert buffer.tell() < 20_000
    for copied in (copy.deepcopy(layer), pickle.loads(buffer.getvalue())):
        assert_current(copied)
        before = layer(normal(2, layer.in_features)).detach()
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2.0)
        assert_current(copied)
        assert torch.equal(layer(normal(2, layer.in_features)), before)
    model = nn.Sequential(layer, layer)
    twin = copy.deepcopy(model)
    assert twin[0] is twin[1]


# The prepared form --------------------------------------------------------------------------------------------------


def _in_place(layer: StructuredLinear) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5)


def _in_place_under_inference_mode(layer: StructuredLinear) -> None:
    with torch.inference_mode():
        for parameter in layer.parameters():
            parameter.add_(0.5)


def _step(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[StructuredLinear], None]:
    def change(layer: StructuredLinear) -> None:
        layer(normal(4, layer.in_features)).square().sum().backward()
        make(layer.parameters(), lr=0.1, **options).step()

    return change


def _load(layer: StructuredLinear) -> None:
    layer.load_state_dict(
        {name: value * 2 if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    )


def _assign(layer: StructuredLinear) -> None:
    state = {name: value * 2 if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _new_parameters(layer: StructuredLinear) -> None:
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() * 2))


def _swap_data(layer: StructuredLinear) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data * 2


def _data_in_place_then_eval(layer: StructuredLinear) -> None:
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    layer.eval()


def _data_in_place_after_training(layer: StructuredLinear) -> None:
    layer(normal(2, layer.in_features).requires_grad_())
    for parameter in layer.parameters():
        parameter.data.mul_(2)


def _buffers(layer: StructuredLinear) -> None:
    for value in layer.buffers():
        if value.is_floating_point():
            value.mul_(2)
        elif value.dtype == torch.uint8:
            value.bitwise_xor_(255)


@pytest.mark.parametrize(
    "change",
    [
        _in_place,
        _in_place_under_inference_mode,
        _step(torch.optim.SGD),
        _step(torch.optim.SGD, foreach=True),
        _step(torch.optim.AdamW, foreach=True),
        _step(torch.optim.Adam, fused=True),
        _load,
        _assign,
        _new_parameters,
        _swap_data,
        _data_in_place_then_eval,
        _data_in_place_after_training,
        _buffers,
    ],
)
@every
def test_no_stale_cache(name: str, change: Callable[[StructuredLinear], None]) -> None:
    layer = layer_of(name)
    x = normal(3, layer.in_features)
    assert_current(layer)
    for _ in range(2):
        with torch.no_grad():
            before = layer(x)
        change(layer)
        assert_current(layer)
        with torch.no_grad():
            moved = not torch.equal(layer(x), before)
        assert moved or change is _buffers


def test_feature_major_products_and_look_ups_see_an_uncounted_change_after_a_pass_with_gradients() -> None:
    layer = StructuredLinear(_init(BlockLowRank, rank=7))
    chain, table = FeatureMajor(layer), StructuredEmbedding(_init(KroneckerSum, terms=1))
    ids = torch.arange(8)
    for module, x in ((chain, normal(3, 12)), (table, ids)):
        with torch.no_grad():
            module(x)
        module(x)
        for parameter in module.parameters():
            parameter.data.mul_(2)
        with torch.no_grad():
            dense = (layer if module is chain else table).op.dense()
            assert torch.allclose(module(x), x @ dense.mT if module is chain else dense[x], atol=1e-5)


def test_a_freed_address_is_not_mistaken_for_the_old_factor() -> None:
    """An allocator hands out the same addresses again; the cache must not take a new factor for an old one."""
    layer = layer_of("low rank that runs dense")
    for step in range(20):
        assert_current(layer)
        for child in (layer.left, layer.right):
            shape = child.weight.shape
            child.weight = nn.Parameter(torch.zeros(1))
            child.weight = nn.Parameter(normal(*shape, seed=step))


@every
def test_prepared_form_is_kept_until_something_changes(name: str) -> None:
    layer = layer_of(name).eval()
    x = normal(2, layer.in_features)
    with torch.no_grad():
        layer(x)
        first = layer.prepared()
        assert layer.bias is not None
        layer.bias.mul_(2.0)
        layer(x)
        assert layer.prepared() is first
        factor = next(value for key, value in layer.state_dict().items() if key not in ("bias", "weight"))
        factor.mul_(1)
        assert layer.prepared() is not first


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name)
    assert_current(layer)
    x = normal(3, layer.in_features)
    wanted = reference(layer, x)
    layer = layer.to(dtype)
    assert layer.weight.dtype == dtype
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert float((y.detach().double() - wanted).norm()) < 0.03 * float(wanted.norm())
    assert layer.to_linear().weight.dtype == dtype
    y = layer.float()(x)
    assert y.dtype == torch.float32
    assert_current(layer)


@every
def test_description_in_another_dtype(name: str) -> None:
    layer = layer_of(name).to(torch.bfloat16)
    hollow = StructuredLinear.from_config(layer.config(), bias=True, dtype=torch.bfloat16)
    assert hollow.weight.dtype == torch.bfloat16
    hollow.load_state_dict(layer.state_dict(), assign=True)
    x = normal(2, layer.in_features).bfloat16()
    with torch.no_grad():
        assert torch.equal(hollow(x), layer(x))


@every
def test_autocast_leaves_no_trace(name: str) -> None:
    layer = layer_of(name)
    x = normal(3, layer.in_features)
    plain = layer.to_linear()
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert layer(x).dtype == plain(x).dtype
    assert_current(layer, 1e-6)


@every
def test_made_and_run_under_inference_mode(name: str) -> None:
    """Tensors made there count no versions, so nothing may be cached on their word."""
    with torch.inference_mode():
        layer = layer_of(name)
        x = normal(3, layer.in_features)
        for _ in range(2):
            wanted = F.linear(x, layer.op.dense(), layer.bias)
            assert torch.allclose(layer(x), wanted, atol=1e-5)
            for parameter in layer.parameters():
                parameter.mul_(2)
    with torch.no_grad():
        assert torch.allclose(layer(x), F.linear(x, layer.op.dense(), layer.bias), atol=1e-4)


def test_a_cache_made_under_inference_mode_serves_training() -> None:
    layer = layer_of("low rank that runs dense").requires_grad_(False)
    x = normal(3, layer.in_features)
    with torch.inference_mode():
        layer(x)
    layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.op.dense().sum(0).expand(3, -1), atol=1e-5)


@every
def test_function_transforms(name: str) -> None:
    layer = layer_of(name)
    x = normal(4, layer.in_features)
    wanted = reference(layer, x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(torch.func.vmap(layer)(x), wanted, atol=1e-5)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    with torch.no_grad():
        layer(x)
        many = {key: torch.stack([value, value * 2]) for key, value in parameters.items()}
        both = torch.func.vmap(lambda values: torch.func.functional_call(layer, values, (x,)))(many)
    assert torch.allclose(both[0], wanted, atol=1e-5)
    assert not torch.allclose(both[1], wanted, atol=1e-3)
    tangents = {key: torch.zeros_like(value) for key, value in parameters.items()}
    tangents["bias"] = torch.ones_like(parameters["bias"])
    _, slope = torch.func.jvp(
        lambda values: torch.func.functional_call(layer, values, (x,)), (parameters,), (tangents,)
    )
    assert torch.allclose(slope, torch.ones_like(slope))
    assert_current(layer)


# Training, compiling, adapting --------------------------------------------------------------------------------------


@every
def test_compiles_in_one_graph(name: str) -> None:
    layer = layer_of(name)
    x = normal(3, layer.in_features)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), reference(layer, x), atol=1e-5)
    compiled(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2.0)
    assert torch.allclose(compiled(x), reference(layer, x), atol=1e-4)


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_lowers_the_loss(name: str) -> None:
    layer = layer_of(name)
    x, target = normal(16, layer.in_features), normal(16, layer.out_features, seed=5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(float((layer(x) - target).square().mean()))
    assert losses[-1] < 0.9 * losses[0]
    assert_current(layer)


class _Doubled(nn.Module):
    """What an adapter library puts in a linear layer's place: it holds the layer and adds to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


@pytest.mark.parametrize(
    ("name", "child"),
    [
        ("low rank", "left"),
        ("low rank that runs dense", "right"),
        ("skeleton", "basis"),
        ("sum", "parts.1.left"),
        ("product", "parts.0.right"),
    ],
)
def test_a_wrapped_child_takes_part(name: str, child: str) -> None:
    layer = layer_of(name)
    assert_current(layer)
    path, _, last = child.rpartition(".")
    holder = layer.get_submodule(path)
    plain = getattr(holder, last)
    setattr(holder, last, _Doubled(plain))
    factors = layer.op.factors()
    doubled = layer.op.replace(**{child: factors[child] * 2}).dense()
    x = normal(3, layer.in_features)
    wanted = F.linear(x, doubled, layer.bias).detach()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(layer(x), wanted, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), wanted, atol=1e-5)
    plain.weight.data.mul_(2)  # merged, as adapter libraries do it
    setattr(holder, last, plain)
    with torch.no_grad():
        assert torch.allclose(layer(x), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["skeleton by columns", "block diagonal"])
def test_a_wrapped_child_that_cannot_take_part_is_an_error(name: str) -> None:
    layer = layer_of(name)
    child = next(key for key, module in layer.named_modules() if type(module) is nn.Linear)
    path, _, last = child.rpartition(".")
    setattr(layer.get_submodule(path), last, _Doubled(layer.get_submodule(child)))  # type: ignore[arg-type]
    with pytest.raises(GramianError, match="leave its factors out"):
        layer(normal(2, layer.in_features))


def test_hooks_and_pruning_of_a_child_are_heard() -> None:
    layer = layer_of("low rank")
    x = normal(2, 12)
    assert_current(layer)
    calls: list[Any] = []
    handle = layer.right.register_forward_hook(lambda *arguments: calls.append(arguments))
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1
    handle.remove()
    nn.utils.prune.l1_unstructured(layer.left, "weight", amount=0.5)
    with torch.no_grad():
        layer.left.weight_orig.mul_(3)
        y = layer(x)
    assert torch.allclose(y, reference(layer, x), atol=1e-5)
    assert int((layer.left.weight == 0).sum()) == 8


def test_peft_adapts_merges_and_unloads() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = layer_of("low rank that runs dense")
            self.second = StructuredLinear(Sum((_init(Quantized, (6, 8), bits=4), _init(BlockLowRank, (6, 8), rank=2))))
            chosen = Selection(torch.tensor([2, 0]), 3, scatter=True)
            self.third = StructuredLinear(Product((chosen, _init(BlockLowRank, (2, 6), rank=1))))

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    model = Model().eval()
    x = normal(4, 12)
    with torch.no_grad():
        before = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["left", "right"], lora_alpha=8))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 12
    with torch.no_grad():
        assert torch.allclose(adapted(x), before, atol=1e-6)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
    for _ in range(3):
        (adapted(x) - 1).square().mean().backward()
        assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = adapted(x)
        assert not torch.allclose(after, before, atol=1e-3)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(x), after, atol=1e-4)
    for module in merged.modules():
        if isinstance(module, StructuredLinear):
            assert_current(module)
