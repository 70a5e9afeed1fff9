"""The kernels for a few rows that are compiled on the user's machine, and what happens where they cannot be."""

from __future__ import annotations

import copy
import math
import random
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gramian.execution import (
    CostModel,
    Form,
    MatrixProduct,
    Pass,
    Prepared,
    calibration,
    candidates,
    choose,
    codes,
    compiled,
    forms,
    kernels,
    native,
    trace,
)
from gramian.execution.steps import Matrix, Placed, Stack, Taken, steps_of
from gramian.nn import StructuredLinear, prepare
from gramian.ops import Blast, BlockDiagonal, BlockLowRank, Dense, Operator, Product, Quantized, Selection, monarch

FLOAT, HALF = torch.float32, torch.bfloat16
needs_compiler = pytest.mark.skipif(not native.present(), reason="there is no C compiler here")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(op: Operator, dtype: torch.dtype = FLOAT) -> kernels.Kernel:
    form = Form(False, False, dtype, "compiled")
    return form.kernel(form.operator(op), dtype)


def one_call(op: Operator) -> bool:
    """Whether all of the product is one call of the kernel."""
    steps = steps_of(op, in_runs=False)
    return steps is not None and compiled.chain(steps, op.shape, lambda x, bias: x) is not None


@st.composite
def operators(draw: st.DrawFn) -> Operator:
    out, in_ = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    generator = seeded(draw(st.integers(0, 2**20)))
    blocks = (draw(st.integers(1, min(out, 5))), draw(st.integers(1, min(in_, 5))))
    rank, strided = (
        draw(st.integers(1, 4)),
        {"strided_rows": draw(st.booleans()), "strided_columns": draw(st.booleans())},
    )
    kind = draw(st.sampled_from(["dense", "low rank", "blocks", "BLAST", "diagonal", "chosen", "product"]))
    if kind == "dense":
        return Dense(torch.randn(out, in_, generator=generator))
    if kind == "low rank":
        return BlockLowRank.init((out, in_), rank=rank, generator=generator)
    if kind == "blocks":
        return BlockLowRank.init((out, in_), rank=rank, blocks=blocks, generator=generator, **strided)
    if kind == "BLAST":
        return Blast.init((out, in_), rank=rank, blocks=blocks, generator=generator)
    if kind == "diagonal":
        return BlockDiagonal.init((out, in_), blocks=min(blocks), generator=generator, **strided)
    chosen = torch.randperm(in_, generator=generator)[: max(1, in_ // 2)].int()
    placed = torch.randperm(out, generator=generator)[: max(1, out // 2)].int()
    middle = Dense(torch.randn(len(placed), len(chosen), generator=generator))
    if kind == "chosen":
        return Product((Selection(placed, out, scatter=True), middle, Selection(chosen, in_)))
    first = BlockDiagonal.init((len(chosen), in_), blocks=min(len(chosen), blocks[1]), generator=generator, **strided)
    return Product((Dense(torch.randn(out, len(placed), generator=generator)), middle, first))


@needs_compiler
@settings(deadline=None, max_examples=120)
@given(operators(), st.integers(0, 15), st.booleans(), st.sampled_from([FLOAT, HALF]), st.integers(0, 99))
def test_it_is_the_product_in_double_precision(
    op: Operator, rows: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    op = op.to(dtype=dtype).runtime()  # some products are one matrix then, in that dtype
    assert one_call(op)
    x = torch.randn(rows, op.shape[1], generator=seeded(seed)).to(dtype)
    bias = torch.randn(op.shape[0], generator=seeded(seed + 1)).to(dtype) if biased else None
    exact = op.to(dtype=torch.float64)
    wanted = exact.apply(x.double()) + (0 if bias is None else bias.double())
    scale = exact.dense().abs().sum(1).max() * x.double().abs().max() if rows else torch.tensor(1.0)
    with torch.no_grad():
        y = whole(op, dtype)(x, bias)
        shaped = whole(op, dtype)(x[None], bias)
    assert y.dtype == dtype
    assert torch.equal(shaped[0], y)
    # Sums are in float32; one rounding to bfloat16 at the end.
    rounding = 2.0**-8 * wanted.abs() if dtype == HALF else torch.zeros_like(wanted)
    assert bool(((y.double() - wanted).abs() <= rounding + 3e-6 * (1 + scale)).all())


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits() -> None:
    op = monarch(torch.randn(8, 32, 16, generator=seeded()), torch.randn(16, 24, 16, generator=seeded()))
    x, run, before = torch.randn(5, 128, generator=seeded()), whole(op), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@needs_compiler
def test_callers_on_several_threads_do_not_meet() -> None:
    op = Blast.init((200, 300), rank=16, blocks=(4, 3), generator=seeded())
    run, xs = whole(op), torch.randn(64, 2, 300, generator=seeded())
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        wanted = [run(x, None) for x in xs]
        for found in (list(pool.map(partial(run, bias=None), xs)) for _ in range(5)):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    weight = torch.eye(24).to(dtype)
    x = torch.zeros(2, 24, dtype=dtype)
    x[0, 3], x[1, 5] = math.nan, math.inf
    y = whole(Dense(weight), dtype)(x, None)
    assert y[0].isnan().all()
    assert y[1, 5] == math.inf
    assert torch.equal(y.isnan(), (x @ weight.mT).isnan())


@needs_compiler
def test_bfloat16_rounds_as_torch_does() -> None:
    values = torch.randn(4096, generator=seeded()) * torch.logspace(-30, 30, 4096)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38])])
    weight = torch.tensor([[1.0, 2.0**-9]], dtype=HALF)  # a sum of two needs more digits than bfloat16 has
    x = torch.stack([values.to(HALF), values.to(HALF)], -1)
    y = whole(Dense(weight), HALF)(x, None)
    assert torch.equal(y[:, 0], (x.float() @ weight.float().mT)[:, 0].to(HALF))


@needs_compiler
def test_what_the_kernel_is_not_for() -> None:
    def asked(*steps: Matrix | Stack | Taken | Placed, shape: tuple[int, int]) -> bool:
        return compiled.chain(steps, shape, lambda x, bias: x) is not None

    weight = torch.randn(6, 8)
    assert asked(Matrix(weight), shape=(6, 8))
    assert not asked(Matrix(weight.double()), shape=(6, 8))
    assert not asked(Matrix(weight.mT), shape=(8, 6)), "its rows are not contiguous: a copy would be hidden"
    assert not asked(Matrix(weight[:0]), shape=(0, 8))
    assert not asked(Taken(torch.arange(8)), shape=(8, 8)), "nothing is multiplied"
    twice = Taken(torch.tensor([0, 1, 1]))
    assert asked(twice, Matrix(weight[:, :3].contiguous()), shape=(6, 8)), "of x, numbers may be taken twice"
    assert not asked(Matrix(weight), twice, Matrix(torch.randn(2, 3)), shape=(2, 8))
    assert asked(Stack(weight.expand(4, 6, 8)), shape=(24, 32)), "one matrix for every run"
    shared = Stack(weight.expand(4, 6, 8))
    run = compiled.chain([shared], (24, 32), lambda x, bias: x)
    assert run is not None
    x = torch.randn(3, 32)
    torch.testing.assert_close(run(x, None), (x.view(3, 4, 8) @ weight.mT).reshape(3, 24))


@needs_compiler
def test_weights_are_read_where_they_are() -> None:
    op = BlockLowRank.init((32, 48), rank=2, blocks=(4, 4), generator=seeded())
    run, x = whole(op), torch.randn(2, 48, generator=seeded())
    with torch.no_grad():
        before = run(x, None)
        op.left.mul_(2)
        torch.testing.assert_close(run(x, None), 2 * before)
        op.left.set_(torch.zeros_like(op.left))  # in other memory from now on
        assert torch.equal(run(x, None), torch.zeros(2, 32))


@st.composite
def rounded(draw: st.DrawFn) -> Quantized:
    out, in_ = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    return Quantized.fit(
        torch.randn(out, in_, generator=seeded(draw(st.integers(0, 2**20)))),
        bits=draw(st.integers(2, 8)),
        group=draw(st.sampled_from([1, 7, 32, 128])),
        grid=draw(st.sampled_from(["uniform", "gaussian"])),
        rotate=draw(st.booleans()),
        rotation=draw(st.sampled_from([2, 8, 128])),
        rounds=draw(st.integers(1, 2)),
    )


@needs_compiler
@settings(deadline=None, max_examples=120)
@given(rounded(), st.sampled_from([*range(10), 20, 32, 33, 50]), st.sampled_from([FLOAT, HALF]), st.integers(0, 99))
def test_codes_run_as_they_are(op: Quantized, rows: int, dtype: torch.dtype, seed: int) -> None:
    form = Form(False, False, dtype, "codes")
    x = torch.randn(rows, op.shape[1], generator=seeded(seed)).to(dtype)
    wanted = x.double() @ op.dense().double().mT
    run = form.kernel(form.operator(op), dtype)
    at_a_time = 1024 if seed % 2 else codes.NUMBERS  # of many rows some outputs
    with torch.no_grad(), patch.object(codes, "NUMBERS", at_a_time):
        y, shaped = run(x, None), run(x[None], torch.ones(op.shape[0], dtype=dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(shaped[0], y + 1)
    dense = op.dense().double()
    allowed = 3e-6 * dense.abs().sum(1).max() * (x.double().abs().max() if rows else 1) + 0 * wanted
    if dtype == HALF:  # one rounding at the end; of many rows what is multiplied is rounded too
        spread = x.double().norm(dim=1)[:, None] * dense.norm(dim=1) if rows > codes.FEW_ROWS else 0
        allowed += 2.0**-8 * (wanted.abs() + spread)
    assert bool(((y.double() - wanted).abs() <= allowed).all())


@needs_compiler
def test_codes_run_where_nothing_looks_on() -> None:
    op = Quantized.fit(torch.randn(40, 64, generator=seeded()), bits=3)
    (form,) = (form for form in candidates(op, FLOAT, 4, libraries=["compiled"]) if form.way == "codes")
    assert not any(form.way == "codes" for form in candidates(op, FLOAT, 4))
    assert any(form.way == "codes" for form in candidates(op, FLOAT, 900, libraries=["compiled"]))
    assert not any(form.way == "codes" for form in candidates(op, torch.float64, 4, libraries=["compiled"]))
    runs = form.operator(op)
    kernel, x = form.kernel(runs, FLOAT), torch.randn(4, 64, generator=seeded())
    assert runs.nbytes == 4 * (48 * 7 + 48) + 4 * (16 + 64) if runs.codes.shape[3] == 16 else runs.nbytes > 0
    torch.testing.assert_close(kernel(x, None), op.apply(x))
    with FlopCounterMode(display=False) as counter:
        kernel(x, None)
    assert counter.get_total_flops() == runs.flops(4)
    y = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(kernel(y, None).sum(), y)
    torch.testing.assert_close(found, op.dense().sum(0).expand(4, -1))
    mapped = torch.func.vmap(lambda x: kernel(x, None))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(mapped[1], 2 * kernel(x, None), rtol=1e-4, atol=1e-5)
    for strided in (torch.stack([x, x], -1)[..., 0], x.mT.contiguous().mT, x[:1].expand(4, 64)):
        torch.testing.assert_close(kernel(strided, None), op.apply(strided), rtol=1e-4, atol=1e-5)
    meta = form.kernel(form.operator(op.to("meta")), FLOAT)
    (step,) = trace(lambda x: meta(x, None), (4, 64), FLOAT)
    assert step == MatrixProduct(1, 4, 40, 64, False, True, False, FLOAT, "compiled", 3)
    assert step.nbytes == 4 * 4 * (64 + 40) + 64 * 40 * 3 // 8
    passed, *_, product = trace(lambda x: meta(x, None), (400, 64), FLOAT)  # the numbers are made, then multiplied
    assert isinstance(passed, Pass)
    assert passed.nbytes == 2 * 4 * 40 * 64
    assert product == MatrixProduct(1, 400, 40, 64, False, True, False, FLOAT)
    copied = runs.replace(**{name: factor.clone() for name, factor in runs.factors().items()})
    assert torch.equal(form.kernel(copied, FLOAT)(x, None), kernel(x, None))


def test_a_rounded_matrix_stays_codes_where_that_is_nearly_as_fast() -> None:
    plain, on_codes, int4, cut = (
        Form(way in ("plain", "cut"), False, FLOAT, way) for way in ("plain", "codes", "int4", "cut")
    )
    for seconds, best in (
        ({plain: 1.0, on_codes: 1.9}, on_codes),
        ({plain: 1.0, on_codes: 2.1}, plain),
        ({plain: 1.0, on_codes: 0.5, int4: 0.45}, int4),
        ({on_codes: 0.5, cut: 0.45}, on_codes),
        ({plain: 1.0, cut: 0.97}, plain),
        ({plain: 1.0, cut: 0.9}, cut),
        ({cut: 0.9}, cut),
    ):
        assert forms.taken(seconds, plain, on_codes) == best


@needs_compiler
@pytest.mark.parametrize("rows", [3, 100])
def test_nothing_dense_is_kept_of_codes(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    op = Quantized.fit(torch.randn(48, 64, generator=seeded()), bits=4)
    ready, x = Prepared(op), torch.randn(rows, 64, generator=seeded())
    monkeypatch.setattr(ready, "settled", lambda x: Form(False, False, FLOAT, "codes"))
    with torch.no_grad():
        torch.testing.assert_close(ready(x), op.apply(x))
    assert [type(kept) for kept in ready._running.values()] == [codes.Codes]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, and the kernel looked for anew."""
    monkeypatch.setenv("GRAMIAN_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    native.library.cache_clear()


def test_without_a_compiler_all_runs_as_before(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not native.present()
    assert not any(library == "compiled" for _, library, _ in calibration._kinds())
    x = torch.randn(3, 10, generator=seeded())
    op = BlockLowRank.init((12, 10), rank=2, generator=seeded())
    torch.testing.assert_close(whole(op)(x, None), op.apply(x))
    # A calibration of the day when there was one.
    rows = [(MatrixProduct(1, 2, n, n, False, True, False, FLOAT, "compiled"), 1e-9) for n in range(8, 40)]
    model = CostModel({}, {"float32": [(p, 1e-3) for p, _ in rows], "float32 compiled": rows}, {
        kind: [(1.0, 1.0, 1e-9), (1e8, 1.0, 1e-9)] for kind in ("copy", "index", "entrywise", "fourier", "view")
    })  # fmt: skip
    assert model.libraries == {"compiled"}
    assert {form.way for form in forms.ranked(op, 2, FLOAT, model)}.isdisjoint({"compiled"})


def test_a_compiler_that_fails_leaves_nothing(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken compiler"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    for command in (f"'{broken}' --flag", str(tmp_path / "nowhere")):
        monkeypatch.setenv("CC", command)
        native.library.cache_clear()
        assert not native.present()
        assert not elsewhere.exists() or not list(elsewhere.iterdir())


@needs_compiler
def test_a_damaged_library_is_made_again(elsewhere: Path) -> None:
    path = native.build()
    assert path is not None
    assert path.parent == elsewhere
    path.write_bytes(b"not a library")
    assert not native.present()
    native.library.cache_clear()
    assert native.present()
    assert list(elsewhere.iterdir()) == [path]
    built = path.stat().st_mtime_ns
    assert native.build() == path
    assert path.stat().st_mtime_ns == built, "once"


@needs_compiler
def test_it_competes_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LARGEST_FLOPS", 2e7)
    model = calibration.calibrate(budget=1.0)
    for dtype in compiled.DTYPES:
        rows = model.products[f"{str(dtype).removeprefix('torch.')} compiled"]
        assert len(rows) >= 24
        assert all(p.library == "compiled" and p.m <= compiled.MOST_ROWS for p, _ in rows)
    r = random.Random(0)
    fast = [(calibration.random_product(r, FLOAT, library="compiled"), 1e-9) for _ in range(40)]
    model = CostModel(model.machine, model.products | {"float32 compiled": fast}, model.passes)
    op = BlockLowRank.init((64, 64), rank=4, blocks=(4, 4), generator=seeded())
    assert choose(op, 4, model=model)[0].way == "compiled"
    assert choose(op, 2 * compiled.MOST_ROWS, model=model)[0].way != "compiled"


@needs_compiler
def test_a_layer_that_ran_compiled_is_copied_and_changed_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prepared, "settled", lambda self, x: Form(self.op.kind == "dense", False, FLOAT, "compiled"))
    layer = StructuredLinear(BlockLowRank.init((24, 16), rank=2, generator=seeded()), torch.randn(24))
    plain = prepare(torch.nn.Linear(16, 24))
    x = torch.randn(2, 16, generator=seeded())
    for module in (layer, plain):
        with torch.no_grad():
            before = module(x)
            again = copy.deepcopy(module)
            assert torch.equal(again(x), before)
            for parameter in again.parameters():
                parameter.mul_(0)
            assert torch.equal(again(x), torch.zeros(2, 24))
            assert torch.equal(module(x), before)
        (found,) = torch.autograd.grad(module(x.requires_grad_()).sum(), x)
        assert found.shape == x.shape
        x = x.detach()
