"""How operators run: traced work, the cost model, the choice of a form, feature-major chains."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gramian.cli.bench import run_calibrate
from gramian.cli.main import cli
from gramian.compression import Layer, build_entry, dense_cost, make_plan, options
from gramian.errors import GramianError
from gramian.execution import (
    CostModel,
    Form,
    MatrixProduct,
    Pass,
    Prepared,
    calibration,
    candidates,
    choose,
    forms,
    int4,
    native,
    onednn,
    predicted,
    trace,
    work,
)
from gramian.execution.cost_model import features
from gramian.execution.trees import Trees
from gramian.modes import counted
from gramian.nn import FeatureMajor, StructuredLinear, as_linear
from gramian.ops import (
    Blast,
    BlockDiagonal,
    BlockLowRank,
    BlockSparse,
    Dense,
    Operator,
    Product,
    Quantized,
    Selection,
    Skeleton,
    Sum,
    monarch,
)

FLOAT = torch.float32
PASSES = ("copy", "index", "entrywise", "fourier")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def products(op: Operator, batch: int, *, columns: bool = False) -> list[MatrixProduct]:
    return [step for step in work(op, batch, columns=columns) if isinstance(step, MatrixProduct)]


def pretended(rate: float = 1e11, bandwidth: float = 1e10, passes: float = 1e10) -> CostModel:
    """A machine whose products follow a roofline exactly."""
    r = random.Random(0)
    rows = []
    for _ in range(80):
        product = calibration.random_product(r, FLOAT)
        rows.append((product, 2e-6 + product.flops / rate + product.nbytes / bandwidth))
    slow = [(p, 100 * s) for p, s in rows]
    traffic = {kind: [(100.0, 1.0, 1e-6), (1e8, 1.0, 1e8 / passes)] for kind in PASSES}
    traffic["view"] = [(0.0, 1.0, 1e-7)]
    return CostModel({"device": "pretended"}, {"float32": rows, "bfloat16": slow}, traffic)


def test_work_counts_what_the_product_does() -> None:
    (first, second) = products(BlockLowRank.init((64, 96), rank=8), 10)
    assert (first.count, first.m, first.k, first.n) == (1, 10, 96, 8)
    assert (second.count, second.m, second.k, second.n) == (1, 10, 8, 64)
    assert first.right_transposed
    assert not first.left_transposed
    assert not first.strided
    for op in (BlockLowRank.init((64, 96), rank=2, blocks=(4, 4)), BlockDiagonal.init((64, 96), blocks=4)):
        for columns in (False, True):
            assert sum(p.flops for p in products(op, 10, columns=columns)) == op.flops(10)


def test_work_sees_memory_traffic_and_strides() -> None:
    op = BlockLowRank.init((64, 64), rank=1, blocks=(8, 8))
    copied = [step for step in work(op, 32) if isinstance(step, Pass) and step.name != "view"]
    assert copied, "row-major blocks are permuted between the products"
    kept = [step for step in work(op, 32, columns=True) if isinstance(step, Pass) and step.name != "view"]
    assert not kept, f"feature-major blocks are views; found {kept}"
    (product,) = [s for s in work_of_strided() if isinstance(s, MatrixProduct)]
    assert product.strided


def work_of_strided() -> tuple[MatrixProduct | Pass, ...]:
    weight = torch.empty(4, 8, 8, device="meta")
    return trace(lambda x: torch.bmm(x[:, :, ::2], weight), (4, 3, 16), FLOAT)


def test_the_cost_model_learns_a_roofline() -> None:
    model = pretended()
    r = random.Random(1)
    for _ in range(30):
        product = calibration.random_product(r, FLOAT)
        truth = 2e-6 + product.flops / 1e11 + product.nbytes / 1e10
        assert abs(model.seconds([product]) / truth - 1) < 0.05


def test_a_calibration_survives_json(tmp_path: Path) -> None:
    model = pretended()
    path = calibration.save(model, tmp_path / "c.json")
    again = CostModel.from_json(json.loads(path.read_text()))
    product = MatrixProduct(1, 100, 200, 300, False, True, False, FLOAT)
    assert again.seconds([product]) == pytest.approx(model.seconds([product]), rel=1e-9)
    assert again.rooflines == model.rooflines
    with pytest.raises(GramianError, match="version"):
        CostModel.from_json({"version": 0})


def test_a_damaged_calibration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAMIAN_CACHE", str(tmp_path))
    calibration.forget()
    assert calibration.stored() is None
    calibration.cache_file().write_text("{}")
    calibration.forget()
    with pytest.warns(UserWarning, match=r"calibration-.*json: not a calibration"):
        assert calibration.stored() is None
    calibration.forget()


def test_the_faster_form_is_chosen() -> None:
    model = pretended()
    small = Skeleton.init((512, 512), rank=32, generator=seeded())
    form, seconds = choose(small, 512, model=model)
    assert not form.dense
    assert seconds == min(predicted(small, f, 512, FLOAT, model) for f in candidates(small, FLOAT))
    large = Skeleton.init((512, 512), rank=400, generator=seeded())
    assert choose(large, 512, model=model)[0].dense
    # A dtype without a fast kernel runs in float32.
    half, _ = choose(small.to(dtype=torch.bfloat16), 512, model=model)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_is_the_same_product(dtype: torch.dtype) -> None:
    op = BlockLowRank.init((48, 80), rank=2, blocks=(4, 8), generator=seeded()).to(dtype=dtype)
    x, bias = torch.randn(2, 3, 80, generator=seeded()).to(dtype), torch.randn(48, generator=seeded()).to(dtype)
    wanted = x.double() @ op.to(dtype=torch.float64).dense().mT + bias.double()
    for form in candidates(op, dtype):
        y = form.kernel(form.operator(op), dtype)(x, bias)
        assert y.dtype == dtype
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), wanted, rtol=0, atol=0.06 if dtype == torch.bfloat16 else 1e-5)


def test_prepared_decides_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def note(op: Operator, batch: int, dtype: torch.dtype, *, recast: bool) -> tuple[Form, float]:
        assert recast
        seen.append(batch)
        return Form(batch > 16, False, dtype), 0.0

    monkeypatch.setattr("gramian.execution.forms.stored", lambda: None)
    monkeypatch.setattr("gramian.execution.forms.choose", note)
    op = BlockLowRank.init((24, 16), rank=2, generator=seeded())
    ready = Prepared(op)
    for batch in (1, 3, 4, 100, 128, 3):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(ready(x), x @ op.dense().mT)
    assert seen == [1, 4, 128], "once for each power of two"


def test_a_long_dense_product_does_not_run_against_forms_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pretended()
    monkeypatch.setattr("gramian.execution.forms.stored", lambda: model)
    plain, quick, other = (Form(True, False, FLOAT, way) for way in ("plain", "onednn", "turned"))
    asked: list[int] = []

    def pretended_seconds(calls: list[list[Callable[[], object]]]) -> list[float]:
        asked.append(len(calls))
        return [2.0, 1.0, 9.0][: len(calls)]

    monkeypatch.setattr("gramian.execution.forms.in_turn", pretended_seconds)
    for rows, forms_measured, best in ((4, 2, other), (100, 0, quick)):  # of few rows all others are measured
        monkeypatch.setattr(
            "gramian.execution.forms.ranked", lambda *told, recast: {quick: 0.1, other: 0.2, plain: 1.0}
        )
        ready = Prepared(Dense(torch.randn(8, 6)))
        assert ready.settled(torch.randn(rows, 6)) == best
        assert sum(asked) == forms_measured
        asked.clear()


@pytest.mark.parametrize(
    "fastest", [Form(False, False, FLOAT), Form(True, False, FLOAT), Form(True, False, FLOAT, "cut")]
)
def test_what_is_predicted_is_checked_once(monkeypatch: pytest.MonkeyPatch, fastest: Form) -> None:
    """Forms that are predicted close run against each other and the dense product, and the fastest is taken, in every layer
    of its kind.
    """
    model = pretended()
    monkeypatch.setattr("gramian.execution.forms.stored", lambda: model)
    structured, cut, plain = Form(False, False, FLOAT), Form(True, False, FLOAT, "cut"), Form(True, False, FLOAT)
    far = Form(False, True, FLOAT)
    order = {structured: 1.0, cut: 1.1, far: 9.0, plain: 9.5}
    monkeypatch.setattr("gramian.execution.forms.ranked", lambda *told, recast: order)
    monkeypatch.setattr("gramian.execution.forms.LITTLE", 10.0)
    asked: list[int] = []

    def pretended_seconds(calls: list[list[Callable[[], object]]]) -> list[float]:
        asked.append(len(calls))
        return [1.0 if form == fastest else 2.0 for form in (structured, cut, plain)]

    monkeypatch.setattr("gramian.execution.forms.in_turn", pretended_seconds)
    x = torch.randn(16, 48)
    for seed in range(3):
        op = BlockLowRank.init((64, 48), rank=8, generator=seeded(seed))
        ready = Prepared(op)
        assert ready.settled(x) == fastest
        torch.testing.assert_close(ready(x), x @ op.dense().mT)
    assert asked == [3], "once, and what is predicted far behind is left out"
    with FlopCounterMode(display=False) as counter:  # what a counter sees is the product alone
        Prepared(BlockLowRank.init((64, 48), rank=4, generator=seeded()))(x)
    assert counter.get_total_flops() == 16 * 2 * 4 * (64 + 48)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(
    "op",
    [
        Dense(torch.randn(24, 10, generator=seeded())),
        BlockLowRank.init((35, 10), rank=6, generator=seeded()),
        Product((Selection(torch.arange(0, 30, 2, dtype=torch.int32), 31, scatter=True), Dense(torch.randn(15, 10)))),
        Product((Dense(torch.randn(12, 5)), Selection(torch.arange(5, dtype=torch.int32), 10))),
    ],
    ids=["dense", "low rank", "some rows", "some columns"],
)
def test_few_rows_may_run_cut(op: Operator, rows: int) -> None:
    forms = [form for form in candidates(op, FLOAT, rows) if form.way == "cut"]
    assert {form.dense for form in forms} >= {isinstance(op, Dense)}
    x, bias = torch.randn(rows, 10, generator=seeded()), torch.randn(op.shape[0], generator=seeded())
    for form in forms:
        kernel = form.kernel(form.operator(op), FLOAT)
        torch.testing.assert_close(kernel(x, bias), x @ op.dense().mT + bias)
        torch.testing.assert_close(kernel(x[None], None), (x @ op.dense().mT)[None])
        counts = [step.count for step in trace(partial(kernel, bias=None), (rows, 10), FLOAT) if hasattr(step, "m")]
        assert max(counts) > 1, "one batched product"
    assert not any(form.way == "cut" for form in candidates(op, FLOAT, 65))


def test_stacks_of_blocks_run_cut_with_any_number_of_rows() -> None:
    assert any(form.way == "cut" for form in candidates(BlockDiagonal.init((24, 8), blocks=4), FLOAT, 65))


def test_what_cannot_be_cut_runs_whole() -> None:
    assert not any(form.way == "cut" for form in candidates(Dense(torch.randn(11, 4)), FLOAT, 1))
    op = BlockLowRank.init((11, 8), rank=4, generator=seeded())  # one of two factors can
    (form,) = (form for form in candidates(op, FLOAT, 1) if form.way == "cut")
    x = torch.randn(1, 8)
    torch.testing.assert_close(form.kernel(form.operator(op), FLOAT)(x, None), x @ op.dense().mT)


@pytest.mark.skipif(not onednn.present(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize(
    ("op", "how"),
    [
        (Dense(torch.randn(24, 10, generator=seeded())), "always"),
        (BlockLowRank.init((35, 10), rank=6, generator=seeded()), "always"),
        (
            Product(
                (Selection(torch.arange(0, 30, 2, dtype=torch.int32), 31, scatter=True), Dense(torch.randn(15, 10)))
            ),
            "always",
        ),
        (BlockDiagonal.init((23, 10), blocks=3, generator=seeded(), strided_rows=True), "many"),
        (BlockDiagonal.init((23, 10), blocks=4, generator=seeded(), strided_columns=True), "many"),
        (BlockLowRank.init((22, 10), rank=2, blocks=(3, 4), generator=seeded(), strided_rows=True), "many"),
        (Blast.init((22, 10), rank=5, blocks=(4, 3), generator=seeded()), "many"),
        (monarch(torch.randn(2, 6, 5), torch.randn(4, 7, 3)), "many"),
        (BlockDiagonal.init((10, 10), blocks=2, generator=seeded()) + BlockLowRank.init((10, 10), rank=3), "many"),
        (BlockSparse.init((16, 10), keep=0.5, block=(4, 2)), "never"),
    ],
    ids=[
        "dense",
        "low rank",
        "some rows",
        "strided rows",
        "strided columns",
        "blocks",
        "BLAST",
        "Monarch",
        "sum",
        "sparse",
    ],
)
def test_every_way_is_the_same_product(op: Operator, how: str, rows: int) -> None:
    every = candidates(op, FLOAT, rows, libraries=("onednn", "compiled") if native.present() else ("onednn",))
    forms = [form for form in every if form.way != "plain" and (not form.dense or isinstance(op, Dense))]
    ways = [form.way for form in forms]
    assert ("onednn" in ways) == (how == "always" or (how == "many" and rows > 16) or isinstance(op, Sum))
    assert ("turned" in ways) == (how != "never" and rows < 9)
    assert ("cut" in ways) == (how != "never")
    assert ("compiled" in ways) == (how != "never" and native.present())
    x, bias = torch.randn(rows, 10, generator=seeded()), torch.randn(op.shape[0], generator=seeded())
    for form in forms:
        kernel = form.kernel(form.operator(op), FLOAT)
        with torch.no_grad():
            torch.testing.assert_close(kernel(x, bias), x @ op.dense().mT + bias, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(kernel(x[None], None), (x @ op.dense().mT)[None], rtol=1e-4, atol=1e-4)
            for strided in (torch.stack([x, x], -1)[..., 0], x.mT.contiguous().mT, x[:1].expand(rows, 10)):
                torch.testing.assert_close(kernel(strided, None), strided @ op.dense().mT, rtol=1e-4, atol=1e-4)
            assert kernel(x[:0], bias).shape == (0, op.shape[0])
            with FlopCounterMode(display=False) as counter:
                kernel(x, None)
        meta = form.kernel(form.operator(op.to("meta")), FLOAT)
        steps = [s for s in trace(lambda x, k=meta: k(x, None), (rows, 10), FLOAT) if isinstance(s, MatrixProduct)]
        assert {"onednn", "compiled"} & {step.library for step in steps} == {"onednn", "compiled"} & {form.way}
        padded = sum(step.flops for step in steps)
        assert padded == counter.get_total_flops() >= op.runtime().flops(rows) - rows * op.shape[0]
        # Where gradients or function transforms look on, torch's own products.
        y = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(kernel(y, None).sum(), y)
        torch.testing.assert_close(found, op.dense().sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)
        mapped = torch.func.vmap(lambda x, k=kernel: k(x, None))(torch.stack([x, 2 * x]))
        torch.testing.assert_close(mapped[1], 2 * kernel(x, None), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.func.jvp(lambda x, k=kernel: k(x, None), (x,), (x,))[1], kernel(x, None), rtol=1e-4, atol=1e-4
        )
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # the dtype is autocast's
            assert kernel(x, None).dtype == op.apply(x).dtype == torch.bfloat16


@pytest.mark.skipif(not onednn.present(), reason="this torch has no oneDNN")
def test_onednn_competes_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some processors it is twice as fast as torch's own choice; the calibration tells, and predictions follow it."""
    model = pretended()
    op = Dense(torch.randn(512, 512))
    assert not any(form.way == "onednn" for form in forms.ranked(op, 512, FLOAT, model))
    model.products["float32 onednn"] = [
        (replace(p, library="onednn"), s / 2) for p, s in model.products["float32"] if not p.left_transposed
    ]
    model = CostModel.from_json(json.loads(json.dumps(model.to_json())))
    form, seconds = choose(op, 512, model=model)
    assert form == Form(True, False, FLOAT, "onednn")
    assert seconds < 0.6 * predicted(op, Form(True, False, FLOAT), 512, FLOAT, model)
    monkeypatch.setattr(calibration, "LARGEST_FLOPS", 2e7)
    for gains in (True, False):
        monkeypatch.setattr(calibration, "_onednn_gains", lambda gains=gains: gains)
        measured = calibration.calibrate(budget=0.5)
        rows = measured.products.get("float32 onednn", [])
        assert all(p.library == "onednn" and (p.count == 1 or p.m >= onednn.GROUPED_ROWS) for p, _ in rows)
        assert bool(rows) == gains


@pytest.mark.skipif(not int4.present(), reason="this torch has no product of 4-bit codes")
def test_codes_of_four_bits_run_as_they_are() -> None:
    half, size = torch.bfloat16, {"bits": 4, "grid": "uniform", "rotate": False, "group": 32}
    op = Quantized.fit(torch.randn(48, 96, generator=seeded()), **size)
    wide = torch.randn(3, 2, 96, generator=seeded())
    x, bias = wide.to(half), torch.randn(48, generator=seeded()).to(half)
    (form,) = (form for form in candidates(op, half, 6) if form.way == "int4")
    runs = form.operator(op)
    kernel = form.kernel(runs, half)
    exact = x.double() @ op.dense().double().mT
    for y, wanted in ((kernel(x, None), exact), (kernel(x, bias), exact + bias)):
        assert y.dtype == half
        assert float((y - wanted).norm() / wanted.norm()) < 6e-3  # of bfloat16: the dense product is as far off
    assert kernel(x[:0], bias).shape == (0, 2, 48)
    for strided in (x.transpose(0, 1), torch.stack([x, x], -1)[..., 0], x[0, 0], x[:, -1:], x[:1].expand(2, 2, 96)):
        assert torch.equal(kernel(strided, None), kernel(strided.contiguous(), None))
    (step,) = (s for s in trace(partial(kernel, bias=None), (6, 96), half) if isinstance(s, MatrixProduct))
    assert step == MatrixProduct(1, 6, 48, 96, False, True, False, half, bits=4)
    assert step.nbytes == 2 * (6 * 96 + 6 * 48) + 96 * 48 // 2
    with FlopCounterMode(display=False) as counter:
        kernel(x, None)
    assert counter.get_total_flops() == step.flops == runs.flops(6)
    copied = runs.replace(**{name: factor.clone() for name, factor in runs.factors().items()})
    assert torch.equal(form.kernel(copied, half)(x, None), kernel(x, None))
    # Where something looks on, the operator's own product, in its own dtype.
    y = wide.clone().requires_grad_()
    (found,) = torch.autograd.grad(runs.apply(y).sum(), y)
    torch.testing.assert_close(found, op.dense().sum(0).expand(3, 2, -1))
    tangent = torch.func.jvp(runs.apply, (wide,), (wide,))[1]
    torch.testing.assert_close(tangent, op.apply(wide))


@pytest.mark.skipif(not int4.present(), reason="this torch has no product of 4-bit codes")
@pytest.mark.parametrize(
    "other", [{"bits": 5}, {"grid": "gaussian"}, {"rotate": True}, {"group": 24}, {"group": 64}, {}, {"rows": 24}]
)
def test_which_codes_run_as_they_are(other: dict[str, Any]) -> None:
    size = {"bits": 4, "grid": "uniform", "rotate": False, "group": 32, "rows": 48, **other}
    op = Quantized.fit(torch.randn(size.pop("rows"), 96, generator=seeded()), **size)
    for dtype, rows in ((torch.bfloat16, 1), (torch.bfloat16, 8), (torch.bfloat16, 9), (FLOAT, 1)):
        fits = not other and dtype == torch.bfloat16 and rows <= 8
        assert any(form.way == "int4" for form in candidates(op, dtype, rows)) == fits


def test_a_rounded_layer_in_half_precision_takes_the_fastest_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pretended()
    model.products["bfloat16"] = [(replace(p, dtype=torch.bfloat16), s) for p, s in model.products["float32"]]
    monkeypatch.setattr(forms, "stored", lambda: model)
    op = Quantized.fit(torch.randn(256, 256, generator=seeded()), bits=4, grid="uniform", rotate=False)
    layer = StructuredLinear(op).to(torch.bfloat16)
    x = torch.randn(1, 256, generator=seeded()).to(torch.bfloat16)
    with torch.no_grad():
        wanted = x.double() @ op.dense().double().mT
        assert float((layer(x) - wanted).norm() / wanted.norm()) < 6e-3
    for dtype in (torch.bfloat16, FLOAT):
        ways = {form.way for form in forms.ranked(op, 1, dtype, model)}
        assert ("int4" in ways) == (dtype == torch.bfloat16 and int4.present())


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    first = StructuredLinear(BlockLowRank.init((96, 48), rank=2, blocks=(4, 4), generator=seeded()), torch.randn(96))
    second = StructuredLinear(monarch(torch.randn(8, 4, 12), torch.randn(4, 16, 8)) @ Dense(torch.eye(96)), None)
    return [first, nn.GELU(), second, nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)]


@pytest.mark.parametrize("grad", [True, False])
def test_a_feature_major_chain_is_the_chain(grad: bool) -> None:
    modules = layers()
    chain, plain = FeatureMajor(*modules), nn.Sequential(*modules)
    x = torch.randn(2, 7, 48, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(chain(x), plain(x), rtol=1e-4, atol=1e-5)
        if grad:
            wanted = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
            found = torch.autograd.grad(chain(x).square().sum(), [x, *chain.parameters()])
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert list(chain.state_dict()) == list(plain.state_dict())


def test_a_feature_major_chain_refuses_what_depends_on_the_layout() -> None:
    with pytest.raises(GramianError, match="module 1 is a LayerNorm"):
        FeatureMajor(nn.Linear(3, 3), nn.LayerNorm(3))


def test_monarch_of_any_number_of_blocks() -> None:
    k, q, p, length = 8, 4, 6, 16
    s, r = 5, k * q // length
    first, second = torch.randn(k, q, p, dtype=torch.float64), torch.randn(length, s, r, dtype=torch.float64)
    x = torch.randn(3, k * p, dtype=torch.float64)
    # The published algorithm: blocks, a transposition of the flat middle, blocks, a transposition.
    middle = torch.einsum("kqp,bkp->bkq", first, x.reshape(3, k, p)).reshape(3, r, length).transpose(1, 2)
    wanted = torch.einsum("lsr,blr->bls", second, middle).transpose(1, 2).reshape(3, length * s)
    op = monarch(first, second)
    torch.testing.assert_close(op.apply(x), wanted)
    assert op.numel == first.numel() + second.numel()
    with pytest.raises(GramianError, match="k q = l r"):
        monarch(first, second[:3])


def test_calibration_measures_quickly_and_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LARGEST_FLOPS", 2e7)
    model = calibration.calibrate(budget=1.0)
    assert len(model.products["float32"]) >= 24
    assert len(model.products["bfloat16"]) >= 24
    small = MatrixProduct(1, 8, 8, 8, False, False, False, FLOAT)
    large = MatrixProduct(1, 256, 256, 256, False, False, False, FLOAT)
    assert 0 < model.seconds([small]) < model.seconds([large])
    assert len(features(small)) == len(features(large))
    assert all(map(math.isfinite, features(small)))


def test_layers_run_with_a_stored_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAMIAN_CACHE", str(tmp_path))
    calibration.forget()
    calibration.save(pretended())
    layer = as_linear(Skeleton.init((64, 48), rank=4, generator=seeded()), torch.randn(64))
    assert isinstance(layer, StructuredLinear)
    x = torch.randn(5, 48)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_linear()(x))
    calibration.forget()


def test_bench_measures_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    result = CliRunner().invoke(
        cli,
        [
            "bench",
            "--sizes",
            "64",
            "--batches",
            "1,4",
            "--only",
            "low rank",
            "--only",
            "Monarch",
            "--out",
            str(out),
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    rows = report["rows"]
    assert {(row["n"], row["batch"]) for row in rows} == {(64, 1), (64, 4)}
    assert all(row[way] > 0 for row in rows for way in ("dense", "rows", "columns", "chosen", "bound"))
    assert any("as published (Monarch)" in row["peers"] for row in rows)
    assert json.loads((out / "bench.json").read_text())["rows"] == rows
    assert "Speed-up over dense" in (out / "bench.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "many"], "--sizes 'many'"),
        (["--batches", "0"], "--batches '0'"),
        (["--dtypes", "int8"], "--dtypes int8"),
        (
            ["--sizes", "8", "--batches", "1", "--only", "low rank", "--only", "monrach"],
            "no structure's name holds 'monrach'",
        ),
    ],
)
def test_bench_refuses_bad_input(options: list[str], said: str, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    result = CliRunner().invoke(cli, ["bench", *options, "--out", str(out)])
    assert result.exit_code == 2
    assert said in result.stderr
    assert not out.exists()


def test_calibrate_keeps_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAMIAN_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "LARGEST_FLOPS", 2e7)
    calibration.forget()
    run_calibrate(json_output=True, budget=0.5)
    assert calibration.stored() is not None
    calibration.forget()


def test_a_budget_of_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAMIAN_CACHE", str(tmp_path))
    monkeypatch.setattr(options, "_NANOSECONDS", {})
    calibration.forget()
    layers = {
        name: Layer(name, torch.randn(256, 192, generator=seeded(i)) * 10.0**-i, None) for i, name in enumerate("ab")
    }
    with pytest.raises(GramianError, match="not calibrated"):
        make_plan(layers, [], keep=0.5, cost="latency", allocation="exact")
    calibration.save(pretended())
    before = sum(dense_cost(layer).of("latency") for layer in layers.values())
    assert before == pytest.approx(
        2e9 * (2e-6 + 2 * 512 * 256 * 192 / 1e11 + 4 * (512 * 448 + 256 * 192) / 1e10), rel=0.2
    )
    plan = make_plan(layers, [], keep=0.8, cost="latency", allocation="exact")
    assert 0 < plan.used <= plan.budget <= 0.8 * before
    built = [build_entry(entry, layers) for entry in plan.entries]
    again = sum(options.nanoseconds(op) for made in built for op, _ in made.layers.values())
    assert again == plan.used, "what was built is what was planned"
    calibration.forget()


def test_tracing_on_several_threads_leaves_no_mode_behind() -> None:
    op = BlockLowRank.init((48, 40), rank=3, blocks=(2, 2))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: work(op, 7), range(200)))
    assert all(steps == found[0] for steps in found)
    assert not counted()
    with FlopCounterMode(display=False):
        assert counted()
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(counted).result(), "a mode is of its thread"
    assert not counted()


def test_work_is_the_same_in_inference_mode() -> None:
    op = BlockLowRank.init((48, 40), rank=3, blocks=(2, 2))
    low = BlockLowRank.init((48, 40), rank=5)
    expected = [work(op, 7), work(low, 7), work(Dense(torch.ones(8, 6)), 3)]
    with torch.inference_mode():
        assert [work(op, 7), work(low, 7), work(Dense(torch.ones(8, 6)), 3)] == expected


def test_trees_learn_a_function_with_steps() -> None:
    generator = np.random.default_rng(0)
    x = generator.random((600, 3))
    y = np.where(x[:, 1] > 0.5, 1.0, 0.0) + 0.2 * x[:, 0]
    trees = Trees.learn(x, y)
    fresh = generator.random((200, 3))
    wanted = np.where(fresh[:, 1] > 0.5, 1.0, 0.0) + 0.2 * fresh[:, 0]
    assert np.abs(trees(fresh) - wanted).mean() < 0.05
    assert y.min() <= trees(fresh).min() <= trees(fresh).max() <= y.max(), "means of what was seen"
    np.testing.assert_array_equal(trees(fresh), Trees.learn(x, y)(fresh))


@pytest.mark.parametrize("leaf", [1, 3])
def test_a_leaf_holds_enough_samples(leaf: int) -> None:
    x = np.random.default_rng(1).random((50, 2))
    y = x.sum(1)
    trees = Trees.learn(x, y, trees=4, leaf=leaf)
    leaves = trees.feature < 0
    assert leaves.sum() <= 4 * 50 // leaf
    if leaf == 1:
        np.testing.assert_allclose(trees(x), y)
    else:
        assert np.abs(trees(x) - y).max() > 0


def test_constant_features_cannot_divide() -> None:
    x, y = np.ones((10, 2)), np.arange(10.0)
    np.testing.assert_allclose(Trees.learn(x, y)(x), 4.5)


def test_passes_know_how_much_lies_side_by_side() -> None:
    """Permuted copies and gathers of short pieces are slower than of long ones."""

    def runs(call: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
        return [s.run for s in trace(call, (6, 4, 8), FLOAT) if isinstance(s, Pass) and s.name != "view"]

    index = torch.empty(4, dtype=torch.int64, device="meta")
    assert runs(lambda x: x.clone()) == [6 * 4 * 8 * 4]
    assert runs(lambda x: x.transpose(0, 1).contiguous()) == [8 * 4]
    assert runs(lambda x: x.mT.contiguous()) == [4]
    assert runs(lambda x: x.mT + x.mT) == [6 * 4 * 8 * 4], "in memory order on both sides"
    assert runs(lambda x: x.index_select(1, index)) == [8 * 4]
    assert runs(lambda x: x[:, index]) == [8 * 4]
    assert runs(lambda x: x[..., index]) == [4]


def test_a_pass_between_two_measured_runs() -> None:
    model = pretended()
    model.passes["copy"] = [(1e3, 4.0, 4e-6), (1e5, 4.0, 4e-4), (1e3, 64.0, 1e-6), (1e5, 64.0, 1e-4)]

    def seconds(nbytes: int, run: int) -> float:
        return model.seconds([Pass("clone", nbytes, run, FLOAT)])

    assert seconds(1000, 4) == pytest.approx(4e-6)
    assert seconds(10_000, 64) == pytest.approx(1e-5)
    assert seconds(10_000, 16) == pytest.approx(2e-5), "halfway in the logarithms of both"
    assert seconds(1_000_000, 4096) == pytest.approx(1e-3), "beyond both: at the last rate"
