"""The checks behind ``gramian.testing``."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gramian.errors import GramianError
from gramian.linalg import svdvals, weighted_error
from gramian.nn import StructuredLinear, as_linear
from gramian.ops import Operator, from_config

SHAPES = ((96, 96), (48, 192), (100, 37), (1, 1), (5, 3), (3, 5))
"""(out, in): square, wide, sizes that no block divides, and the smallest."""
KEEPS = (0.1, 0.3, 0.5, 0.9, 1.0, 1.3)
"""Shares of out * in at which candidate sizes are asked for."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative error (Frobenius norm) of a product computed in each dtype."""


def _close(found: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> None:
    """Assert equal shapes and a small relative error."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}; expected {tuple(wanted.shape)}"
    limit = TOLERANCE[found.dtype] if tolerance is None else tolerance
    a, b = found.detach().double(), wanted.detach().double()
    error, size = float((a - b).norm()), float(b.norm())
    assert error <= limit * max(size, 1e-30) or error < 1e-30, f"{what}: relative error {error / max(size, 1e-30):.1e}"


def _raises(action: Callable[[], Any], what: str, kind: type[Exception] = Exception) -> None:
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{what}: nothing was raised; expected {kind.__name__}")


def _normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _matrix(op: Operator) -> Tensor:
    """The dense matrix in float64; one that stores no numbers (an identity) comes in torch's default dtype."""
    matrix = op.dense()
    assert tuple(matrix.shape) == op.shape, f"dense() has shape {tuple(matrix.shape)}; expected {op.shape}"
    return matrix.double()


def _wide(op: Operator) -> Operator:
    """The same operator in float64, free of autograd history."""
    return op.to(dtype=torch.float64).replace(**{name: value.detach().double() for name, value in _floats(op).items()})


def _floats(op: Operator) -> dict[str, Tensor]:
    return {name: value for name, value in op.factors().items() if value.is_floating_point()}


# One operator ----------------------------------------------------------------------------------------------------


def check_product(op: Operator) -> None:
    """``apply`` equals the dense matrix on a vector, a batch, more batch dimensions, an empty batch and strided input,
    and ``@`` takes vectors and matrices in column convention.
    """
    op = _wide(op)
    in_ = op.shape[1]
    matrix = _matrix(op)
    for batch in ((), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)):
        x = _normal(*batch, in_)
        _close(op.apply(x), x @ matrix.mT, f"apply to {(*batch, in_)}")
    x = _normal(in_, 4).mT
    _close(op.apply(x), x @ matrix.mT, "apply to a transposed input")
    _close(op @ x[0], matrix @ x[0], "operator @ vector")
    _close(op @ x.mT, matrix @ x.mT, "operator @ matrix")


def check_columns(op: Operator) -> None:
    """The feature-major product ``apply_columns`` equals the dense matrix on (in, B), also transposed and empty, and passes
    the same gradients.
    """
    op = _wide(op)
    matrix = _matrix(op)
    for batch in (7, 1, 0):
        x = _normal(op.shape[1], batch)
        _close(op.apply_columns(x), matrix @ x, f"apply_columns to {(op.shape[1], batch)}")
    x = _normal(5, op.shape[1]).mT.requires_grad_()
    y = op.apply_columns(x)
    _close(y, matrix @ x, "apply_columns to a transposed input")
    probe = _normal(*y.shape, seed=1)
    if y.requires_grad:
        (gradient,) = torch.autograd.grad((y * probe).sum(), x)
        _close(gradient, matrix.mT @ probe, "gradient of apply_columns")


def check_wrong_input(op: Operator) -> None:
    """Input of another size raises; it is never broadcast, cut or padded in silence."""
    op = _wide(op)
    in_ = op.shape[1]
    for wrong in {in_ + 1, max(in_ - 1, 0), 1, 2 * in_} - {in_}:
        _raises(partial(op.apply, _normal(3, wrong)), f"apply to (3, {wrong}) with in = {in_}")
        _raises(partial(op.apply_columns, _normal(wrong, 3)), f"apply_columns to ({wrong}, 3) with in = {in_}")


def check_transpose(op: Operator) -> None:
    """``T`` is the transpose, twice is the start, and ``<y, A x> = <A^T y, x>``."""
    op = _wide(op)
    matrix = op.dense()
    assert op.T.shape == op.shape[::-1], f"T has shape {op.T.shape}; expected {op.shape[::-1]}"
    _close(op.T.dense(), matrix.mT, "T.dense()")
    _close(op.T.T.dense(), matrix, "T.T.dense()")
    x, y = _normal(op.shape[1]), _normal(op.shape[0], seed=1)
    _close(op.T.apply(y) @ x, y @ op.apply(x), "adjoint dot test", 1e-10)
    assert op.T.numel == op.numel, f"T stores {op.T.numel} numbers; the operator stores {op.numel}"


def check_gradients(op: Operator) -> None:
    """Gradients of ``apply`` with respect to the input and to every trainable factor agree with finite differences."""
    op = _wide(op)
    names = list(op.trainable())
    factors = [op.factors()[name].clone().requires_grad_() for name in names]
    x = _normal(3, op.shape[1]).requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return op.replace(**dict(zip(names, values, strict=True))).apply(x)

    assert torch.autograd.gradcheck(run, (x, *factors), fast_mode=True)


class _ElementwiseCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the results of additions and multiplications."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.mul, torch.ops.aten.div):
            self.total += result.numel()
        return result


def check_counts(op: Operator) -> None:
    """``numel`` and ``nbytes`` are those of the stored tensors (a packed uint8 factor may hold several numbers an
    element), and ``flops`` grows with the batch by what the product runs: at least its matrix products, at most those
    and its elementwise work.
    """
    factors = op.factors().values()
    stored = sum(value.numel() for value in factors)
    packed = any(value.dtype == torch.uint8 for value in factors)
    assert op.numel == stored or (packed and op.numel > stored), f"numel {op.numel}; the factors hold {stored}"
    size = sum(value.numel() * value.element_size() for value in factors)
    assert op.nbytes == size, f"nbytes {op.nbytes}; the factors take {size}"

    def run(batch: int) -> tuple[int, int]:
        x = _normal(batch, op.shape[1]).to(op.dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as products, _ElementwiseCount() as elementwise:
            op.apply(x)
        return products.get_total_flops(), elementwise.total

    (first, some), (second, more) = run(8), run(24)
    claimed = op.flops(24) - op.flops(8)
    assert claimed == 16 * op.flops(1), f"flops {op.flops(1)} for one row, {claimed} for 16"
    products, elementwise = second - first, more - some
    assert products <= claimed <= products + elementwise, (
        f"flops {claimed} for 16 rows; measured {products} in matrix products and {elementwise} elementwise"
    )


def check_configuration(op: Operator) -> None:
    """``config`` survives JSON and gives the operator back, with its numbers or on the meta device; tensors that are
    missing, surplus or of another shape are refused.
    """
    config = json.loads(json.dumps(op.config()))
    factors = op.factors()
    again = from_config(config, factors)
    assert type(again) is type(op), f"from_config gives a {type(again).__name__}; expected {type(op).__name__}"
    assert again.config() == op.config(), f"config {again.config()} after a round trip; expected {op.config()}"
    _close(again.dense(), op.dense(), "from_config(config, factors)", 0.0)
    hollow = from_config(config, dtype=op.dtype)
    assert hollow.shape == op.shape, f"shape {hollow.shape} without numbers; expected {op.shape}"
    for name, value in hollow.factors().items():
        assert value.device.type == "meta", f"factor {name!r} is on {value.device}; expected meta"
        like = factors[name]
        assert value.shape == like.shape, (
            f"factor {name!r} has shape {tuple(value.shape)}; expected {tuple(like.shape)}"
        )
        assert value.dtype == like.dtype, f"factor {name!r} has dtype {value.dtype}; expected {like.dtype}"
    found, wanted = (hollow.numel, hollow.nbytes), (op.numel, op.nbytes)
    assert found == wanted, f"numel and nbytes {found} without numbers; expected {wanted}"
    _raises(lambda: from_config(config, {**factors, "surplus": torch.zeros(1)}), "a surplus factor", GramianError)
    for name, value in factors.items():
        others = {key: tensor for key, tensor in factors.items() if key != name}
        _raises(partial(from_config, config, others), f"without factor {name!r}", GramianError)
        longer = {**factors, name: torch.cat([value.reshape(-1), value.new_zeros(1)])}
        _raises(partial(from_config, config, longer), f"factor {name!r} of another shape", GramianError)
    wrong = {**config, "shape": [op.shape[0] + 1, op.shape[1]]}
    _raises(lambda: from_config(wrong, factors), "a description of another shape", GramianError)


def check_replace(op: Operator) -> None:
    """``replace`` takes every factor by name, keeps the rest, changes nothing in place and refuses unknown names."""
    op = _wide(op)
    matrix = op.dense().clone()
    for name, value in op.factors().items():
        _close(op.replace(**{name: value.clone()}).dense(), matrix, f"replace of {name!r} by itself", 0.0)
    for name, value in op.trainable().items():
        changed = op.replace(**{name: value + _normal(*value.shape)})
        assert type(changed) is type(op), f"replace gives a {type(changed).__name__}"
        assert list(changed.factors()) == list(op.factors()), f"replace gives factors {list(changed.factors())}"
        if value.numel():
            assert not torch.equal(changed.factors()[name], value), f"replace of {name!r} had no effect"
    _close(op.dense(), matrix, "the operator after replace", 0.0)
    _raises(lambda: op.replace(no_such_factor=matrix), "replace of an unknown factor", GramianError)
    for names in (op.trainable(), op.linear_factors()):
        assert names.keys() <= op.factors().keys(), f"{names.keys() - op.factors().keys()} are no factors"


def check_dtypes(op: Operator) -> None:
    """In every dtype the product has that dtype and is right to its precision; integer factors stay as they are."""
    exact = _wide(op)
    x = _normal(4, op.shape[1])
    matrix = _matrix(exact)
    wanted = x @ matrix.mT
    # Rounding errors are relative to the terms of each sum, not to a sum in which they cancel.
    scale = float((x.abs() @ matrix.abs().mT).norm()) / max(float(wanted.norm()), 1e-30)
    for dtype in TOLERANCE:
        cast = op.to(dtype=dtype)
        for name, value in cast.factors().items():
            kept = op.factors()[name]
            assert value.dtype == (dtype if kept.is_floating_point() else kept.dtype), f"factor {name!r}: {value.dtype}"
        y = cast.apply(x.to(dtype))
        assert y.dtype == dtype, f"apply to {dtype} gives {y.dtype}"
        _close(y, wanted, f"apply in {dtype}", TOLERANCE[dtype] * max(scale, 1.0))


def check_copies(op: Operator) -> None:
    """``pickle``, ``torch.save`` of the factors and ``deepcopy`` give an equal operator that shares no memory."""
    buffer = io.BytesIO()
    torch.save(op.factors(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    for name, value in op.factors().items():
        assert torch.equal(loaded[name], value), f"factor {name!r} changed when saved"
    for copied in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert copied.config() == op.config(), f"config {copied.config()} of a copy; expected {op.config()}"
        for name, value in copied.factors().items():
            original = op.factors()[name]
            assert torch.equal(value, original), f"factor {name!r} changed in a copy"
            assert not value.numel() or value.data_ptr() != original.data_ptr(), f"factor {name!r} is shared by a copy"


def check_compile(op: Operator) -> None:
    """``torch.compile`` takes the product in one graph, without a break, and gives the same numbers."""
    x = _normal(3, op.shape[1]).to(op.dtype)
    torch._dynamo.reset()
    compiled = torch.compile(op.apply, fullgraph=True, backend="aot_eager")
    _close(compiled(x), op.apply(x), "compiled product")


def check_vmap(op: Operator) -> None:
    """``torch.func.vmap`` over one and two batch dimensions equals the batched product."""
    op = _wide(op)
    x = _normal(2, 3, op.shape[1])
    _close(torch.func.vmap(op.apply)(x[0]), op.apply(x[0]), "vmap")
    _close(torch.func.vmap(torch.func.vmap(op.apply))(x), op.apply(x), "vmap of vmap")


def check_runtime(op: Operator) -> None:
    """The form that runs fastest is the same matrix."""
    op = _wide(op)
    fast = op.runtime()
    _close(fast.dense(), op.dense(), "runtime()")
    _close(fast.apply(x := _normal(5, op.shape[1])), x @ _matrix(op).mT, "product of runtime()")


def check_layer(op: Operator) -> None:
    """As a layer it computes ``x A^T + bias`` with and without gradients, gives every trainable factor a gradient, and
    its state dict fills a layer made from the configuration alone.
    """
    op = _wide(op)
    x, bias = _normal(2, 3, op.shape[1]), _normal(op.shape[0], seed=1)
    layer = as_linear(op, bias)
    wanted = x @ _matrix(op).mT + bias
    y = layer(x)
    _close(y, wanted, "layer with gradients")
    with torch.no_grad():
        _close(layer(x), wanted, "layer without gradients")
        _close(layer(x), wanted, "layer without gradients, again")
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"parameter {name!r} has no gradient"
    if isinstance(layer, StructuredLinear):
        count = len(list(layer.parameters()))
        assert count == len(op.trainable()) + 1, f"{count} parameters; expected {list(op.trainable())} and a bias"
        config = json.loads(json.dumps(layer.config()))
        empty = StructuredLinear.from_config(config, bias=True, dtype=torch.float64)
        empty.load_state_dict(layer.state_dict(), assign=True)
        _close(empty(x), wanted, "layer from its configuration and state dict")


operator_checks: tuple[Callable[[Operator], None], ...] = (
    check_product,
    check_columns,
    check_wrong_input,
    check_transpose,
    check_gradients,
    check_counts,
    check_configuration,
    check_replace,
    check_dtypes,
    check_copies,
    check_compile,
    check_vmap,
    check_runtime,
    check_layer,
)
"""Every check of one operator."""


def check_operator(op: Operator) -> None:
    """Run every check of ``operator_checks``.

    Raises:
        AssertionError: the first check that fails, and what it found.
    """
    for check in operator_checks:
        check(op)


# One structure ---------------------------------------------------------------------------------------------------


def _candidates(cls: type[Operator]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """(shape, size) pairs: at every shape the sizes of a small and of a larger budget."""
    for shape in SHAPES:
        seen: list[dict[str, Any]] = []
        for keep in KEEPS:
            for size in cls.sizes(shape, keep):
                if size not in seen:
                    seen.append(size)
        # The smallest and the two largest: families of sizes run to dozens.
        for size in seen if len(seen) <= 3 else [seen[0], *seen[-2:]]:
            yield shape, size


def _grams(n: int, seed: int) -> dict[str, Tensor | None]:
    """Gram matrices (n, n) or diagonals (n,) of the kinds that occur, by name."""
    spread = torch.logspace(0, -1, n, dtype=torch.float64)
    samples = _normal(4 * n, n, seed=seed) * spread
    few = samples[: max(n // 3, 1)]
    full = samples.mT @ samples / len(samples)
    return {
        "none": None,
        "full": full,
        "rank n/3": few.mT @ few / len(few),
        "diagonal": full.diagonal().clone(),
        "zero": torch.zeros_like(full),
    }


def check_sizes(cls: type[Operator]) -> None:
    """``sizes`` keeps its promise at every shape and budget: what ``init`` and ``fit`` make of a size stores at most
    ``keep * out * in`` numbers; a size is JSON-able; no budget raises, and a generous one offers something.
    """
    for shape in SHAPES:
        weight = _normal(*shape, dtype=torch.float32)
        built: dict[str, int] = {}
        for keep in (0.0, 1e-4, *KEEPS):
            for size in cls.sizes(shape, keep):
                key = json.dumps(size, sort_keys=True)
                assert json.loads(key) == size, f"size {size} changes in JSON"
                if key not in built:
                    built[key] = max(cls.init(shape, **size).numel, cls.fit(weight, **size).numel)
                limit = keep * shape[0] * shape[1]
                assert built[key] <= limit, f"{size} at {shape} stores {built[key]}; keep {keep} allows {limit:.1f}"
    square = (96, 96)
    assert cls.sizes(square, 1.3), f"no size at {square} with keep 1.3"


def check_init(cls: type[Operator]) -> None:
    """``init`` follows its generator, and its spectral norm is near sqrt(out / in)."""
    for shape, size in _candidates(cls):
        first, again, other = (cls.init(shape, generator=torch.Generator().manual_seed(s), **size) for s in (0, 0, 1))
        assert first.shape == shape, f"init of {size} at {shape} has shape {first.shape}"
        _close(again.dense(), first.dense(), f"init of {size} at {shape} with the same seed", 0.0)
        if min(shape) >= 48:
            assert not torch.equal(other.dense(), first.dense()), f"init of {size} at {shape} ignores its generator"
            norm = float(svdvals(first.dense().double())[0]) / (shape[0] / shape[1]) ** 0.5
            assert 0.2 < norm < 5.0, f"init of {size} at {shape}: spectral norm {norm:.2f} sqrt(out / in)"


def check_members(cls: type[Operator]) -> None:
    """``fit`` recovers a member: to 1e-5 in float32 and 1e-10 in float64, without Grams and with full-rank ones."""
    for shape, size in _candidates(cls):
        member = cls.init(shape, generator=torch.Generator().manual_seed(0), **size)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            matrix = member.to(dtype=dtype).dense()
            found = cls.fit(matrix, **size)
            assert found.dtype == dtype, f"fit of a {dtype} matrix is {found.dtype}"
            _close(found.dense(), matrix, f"fit of a member, {size} at {shape} in {dtype}", tolerance)
        gram_in, gram_out = _grams(shape[1], 1)["full"], _grams(shape[0], 2)["full"]
        found = cls.fit(matrix, gram_in=gram_in, gram_out=gram_out, **size)
        _close(found.dense(), matrix, f"fit of a member under Grams, {size} at {shape}", 1e-8)


def check_fit(cls: type[Operator]) -> None:
    """``fit`` takes Grams of every kind (full, rank-deficient, diagonal, zero, one side or both) without raising, gives
    a finite member of the right shape and dtype, and does no worse than the zero matrix: in the norm of the Grams, or,
    where they make no difference to it, in the plain one.
    """
    for shape, size in _candidates(cls):
        weight = _normal(*shape)
        plain = cls.fit(weight, **size).dense()
        inputs, outputs = _grams(shape[1], 1), _grams(shape[0], 2)
        for name_in, name_out in zip(inputs, [*list(outputs)[1:], "none"], strict=True):
            where = f"{size} at {shape} with input Gram {name_in} and output Gram {name_out}"
            grams = inputs[name_in], outputs[name_out]
            found = cls.fit(weight, gram_in=grams[0], gram_out=grams[1], **size)
            matrix = found.dense()
            assert found.shape == shape, f"{where}: shape {found.shape}"
            assert matrix.isfinite().all(), f"{where}: not finite"
            if torch.equal(matrix, plain):
                grams = None, None
            error = float(weighted_error(weight - matrix.double(), *grams))
            nothing = float(weighted_error(weight, *grams))
            assert error <= nothing * (1 + 1e-9), f"{where}: error {error:.3g}; the zero matrix has {nothing:.3g}"


structure_checks: tuple[Callable[[type[Operator]], None], ...] = (check_sizes, check_init, check_members, check_fit)
"""Every check of a structure that dense matrices can be projected on."""


def check_structure(cls: type[Operator], *, exact: bool = True) -> None:
    """Run every check of ``structure_checks``.

    Args:
        cls: a structure with ``fit``, ``init`` and ``sizes``.
        exact: False leaves ``check_members`` out, for a structure whose ``fit`` searches (the scales of rounding, say)
            and so does not promise to find a member again.

    Raises:
        AssertionError: the first check that fails, and what it found.
    """
    for check in structure_checks:
        if exact or check is not check_members:
            check(cls)
