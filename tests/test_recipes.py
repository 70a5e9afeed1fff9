"""Every recipe against its paper's formula in float64, the ways to divide a budget, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import gramian
from gramian.compression import (
    ALLOCATIONS,
    RECIPES,
    WEIGHTINGS,
    Entry,
    Layer,
    Plan,
    build_entry,
    entropic_shares,
    find_recipes,
    make_plan,
    new_rows,
    plan_recipe,
    resolve_recipe,
    resolve_structures,
)
from gramian.compression.options import COSTS, monarch_sizes
from gramian.errors import GramianError
from gramian.grams import EmbeddingGrams, Gram, LayerGrams
from gramian.models.api import planning_layers
from gramian.models.heal import Healing, heal
from gramian.models.job import Job, Settings
from gramian.models.reconstruct import ScaledRounding, block_of, reconstruct
from gramian.models.sensitivity import measure
from gramian.models.workload import tensor_workload
from gramian.nn import PreparedLinear, StructuredLinear
from gramian.ops import BlockLowRank, Dictionary, LowRankQuantized, Quantized
from gramian.ops.quantized import grid_error, grid_levels

LOW_RANK = ("svd", "asvd", "svd-llm", "fwsvd", "fwsvd-columns", "lord")


def correlated(count: int, width: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """(count, width) float64 samples with a mean, whose directions differ much in energy."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    scale = torch.logspace(0, -2, width, dtype=torch.float64)
    if rank is not None:
        scale[rank:] = 0
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (x * scale + 0.3 * scale) @ turn


def seen(x: Tensor, slopes: Tensor | None = None) -> LayerGrams:
    """Grams of inputs x (n, in) and of gradients D (sequences, out, in) of the weight."""
    grams = LayerGrams(Gram(x.shape[1]).update(x))
    if slopes is not None:
        grams.gradient = (slopes @ slopes.mT).sum(0)
        grams.sequences = len(slopes)
    return grams


def one_layer(out: int, in_: int, *, bias: bool = True, rank: int | None = None) -> tuple[Layer, Tensor, Tensor]:
    """A layer with Grams, its inputs and its weight's gradients."""
    generator = torch.Generator().manual_seed(out + in_)
    weight = torch.randn(out, in_, generator=generator, dtype=torch.float64)
    x = correlated(400, in_, seed=1, rank=rank)
    slopes = torch.randn(50, out, in_, generator=generator, dtype=torch.float64)
    slopes = slopes * torch.logspace(0, -1.5, out, dtype=torch.float64)[:, None]
    b = torch.randn(out, generator=generator, dtype=torch.float64) if bias else None
    return Layer("layer", weight, b, seen(x, slopes)), x, slopes


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def reference(name: str, w: Tensor, x: Tensor, slopes: Tensor, rank: int) -> Tensor:
    """The papers' own formulas, with their inverses."""
    if name == "svd":
        return truncated(w, rank)
    if name == "asvd":
        s = x.square().mean(0).sqrt().sqrt()
        return truncated(w * s, rank) / s
    if name == "svd-llm":
        s = torch.linalg.cholesky(x.mT @ x / len(x))
        return truncated(w @ s, rank) @ torch.linalg.inv(s)
    f = slopes.square().mean(0).sum(1).sqrt()[:, None]
    if name == "fwsvd":
        return truncated(f * w, rank) / f
    if name == "fwsvd-columns":
        c = x.var(0, correction=0).sqrt()
        return truncated(f * w * c, rank) / f / c
    assert name == "lord"
    y = x @ w.mT
    values, vectors = torch.linalg.eigh(torch.cov(y.mT))
    top = vectors[:, values.argsort(descending=True)[:rank]]
    return top @ top.mT @ w


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_recipes_are_their_papers_formulas(name: str, shape: tuple[int, int]) -> None:
    layer, x, slopes = one_layer(*shape)
    plan = plan_recipe(RECIPES[name], {"layer": layer}, [], keep=0.5)
    (entry,) = plan.entries
    rank = int(0.5 * shape[0] * shape[1] / sum(shape))
    assert (entry.structure, entry.size["rank"], entry.weighting) == ("block_low_rank", rank, RECIPES[name].weighting)
    built = build_entry(entry, {"layer": layer})
    op, bias = built.layers["layer"]
    wanted = reference(name, layer.weight, x, slopes, rank)
    assert float((op.dense() - wanted).norm() / wanted.norm()) < 1e-8
    assert built.error["layer"] == pytest.approx(entry.predicted, rel=1e-8)
    assert layer.bias is not None
    expected = layer.bias + (layer.weight - wanted) @ x.mean(0) if name == "lord" else layer.bias
    assert bias is not None
    assert float((bias - expected).abs().max()) < 1e-8


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_whitened_error_on_the_data_is_the_tail_of_squared_singular_values(
    shape: tuple[int, int], rank: int | None
) -> None:
    """Also where the data spans a third of the inputs: no Cholesky factor exists."""
    layer, x, _ = one_layer(*shape, rank=rank)
    keep = 0.15
    plan = plan_recipe(RECIPES["svd-llm"], {"layer": layer}, [], keep=keep)
    op, bias = build_entry(plan.entries[0], {"layer": layer}).layers["layer"]
    kept = plan.entries[0].size["rank"]
    measured = float(((x @ layer.weight.mT + layer.bias) - (x @ op.dense().mT + bias)).square().sum(1).mean())
    tail = float(torch.linalg.svdvals(layer.weight @ x.mT / len(x) ** 0.5)[kept:].square().sum())
    assert measured == pytest.approx(tail, rel=1e-6)
    whole = float((x @ layer.weight.mT).square().sum(1).mean())
    assert plan.entries[0].predicted * whole == pytest.approx(tail, rel=1e-6)


def test_lord_gives_a_bias_to_a_layer_without_one_and_keeps_the_mean_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 64)).double().eval()
    x = correlated(512, 64)
    small = gramian.compress(model, list(x.split(128)), recipe="lord", keep=0.4)
    first = small[0]
    assert isinstance(first, StructuredLinear)
    assert first.bias is not None
    with torch.no_grad():
        assert float((first(x) - model[0](x)).mean(0).abs().max()) < 1e-9
    plain = gramian.compress(model, list(x.split(128)), recipe="svd-llm", keep=0.4)
    assert plain[0].bias is None


def test_data_free_recipes_need_no_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    small = gramian.compress(model, recipe="svd", keep=0.5)
    wanted = truncated(model[0].weight.detach().double(), 19)
    assert torch.allclose(small[0].op.dense().double(), wanted, atol=1e-5)
    assert isinstance(gramian.compress(model, recipe="welore", keep=0.5)[0], nn.Module)


# Dividing the budget ------------------------------------------------------------------------------------------------


def some_layers(count: int = 4) -> dict[str, Layer]:
    """Layers of different shapes and spectra, without Grams."""
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for i in range(count):
        out, in_ = (32, 48) if i % 2 else (40, 40)
        u = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64))[0]
        v = torch.linalg.qr(torch.randn(in_, in_, generator=generator, dtype=torch.float64))[0]
        s = torch.zeros(out, in_, dtype=torch.float64)
        s.diagonal()[:] = torch.logspace(0, -0.4 - 0.6 * i, min(out, in_), dtype=torch.float64)
        layers[f"l{i}"] = Layer(f"l{i}", u @ s @ v, None)
    return layers


def welore_ranks(layers: dict[str, Layer], budget: int) -> dict[str, int]:
    """By trying every threshold at which a rank changes; 0 stands for dense."""
    profiles = {}
    for name, layer in layers.items():
        s = torch.linalg.svdvals(layer.weight)
        profiles[name] = (s - s[-1]) / (s[0] - s[-1])
    best: tuple[int, dict[str, int]] = (-1, {})
    for cut in sorted({float(v) for p in profiles.values() for v in p}):
        ranks, used = {}, 0
        for name, layer in layers.items():
            (m, n), rank = layer.shape, int((profiles[name] >= cut).sum())
            factored = rank * (m + n) < m * n
            ranks[name] = rank if factored else 0
            used += rank * (m + n) if factored else m * n
        if best[0] < used <= budget:
            best = (used, ranks)
    return best[1]


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2])
def test_welore_cuts_all_normalised_spectra_at_one_threshold(keep: float) -> None:
    layers = some_layers()
    plan = plan_recipe(RECIPES["welore"], layers, [], keep=keep)
    found = {entry.layers[0]: entry.size.get("rank", 0) for entry in plan.entries}
    assert found == welore_ranks(layers, plan.budget)
    assert plan.used <= plan.budget


def test_entropic_shares_are_a_softmax_with_a_cap() -> None:
    scores = torch.tensor([0.1, 0.12, 0.3, 0.9])
    shares = entropic_shares(scores, 0.8, temperature=1.0)
    wanted = 1 - 4 * 0.2 * torch.softmax(-scores.double(), 0)
    assert torch.allclose(shares, wanted, atol=1e-9)
    capped = entropic_shares(scores, 0.5, temperature=0.02, most=0.8)
    assert float(capped.min()) == pytest.approx(0.2)
    assert float(capped.mean()) == pytest.approx(0.5)
    assert capped.tolist() == sorted(capped.tolist())
    sizes = torch.tensor([1.0, 5.0, 2.0, 2.0])
    weighted = entropic_shares(scores, 0.6, sizes=sizes)
    assert float((weighted * sizes).sum() / sizes.sum()) == pytest.approx(0.6)


def test_entropic_allocation_keeps_each_share() -> None:
    layers = some_layers()
    importance = {"l0": 0.4, "l1": 0.3, "l2": 0.2, "l3": 0.1}
    plan = make_plan(
        layers, [], keep=0.5, structures="low_rank", weighting="none", allocation="entropic", sensitivity=importance
    )
    sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.float64)
    shares = entropic_shares(torch.tensor(list(importance.values())), 0.5, sizes=sizes)
    for entry, share, size in zip(plan.entries, shares.tolist(), sizes.tolist(), strict=True):
        assert entry.cost <= share * size < entry.cost + sum(layers[entry.layers[0]].shape)
    assert plan.used <= plan.budget


def test_measured_allocation_is_the_best_of_all_choices_of_bits() -> None:
    layers = some_layers(3)
    alphas = {"l0": 0.2, "l1": 3.0, "l2": 0.7}
    recipe = RECIPES["higgs"]
    plan = plan_recipe(recipe, layers, [], keep=0.08, sensitivity=alphas)
    error = {bits: grid_error("gaussian", bits) for bits in range(2, 9)}
    best = min(
        sum(alphas[n] * error[b] for n, b in zip(layers, bits, strict=True))
        for bits in itertools.product(range(2, 9), repeat=3)
        if sum(Quantized.bytes_for(layer.shape, b, rounds=2) for layer, b in zip(layers.values(), bits, strict=True))
        <= plan.budget
    )
    chosen = {entry.layers[0]: entry.size["bits"] for entry in plan.entries}
    assert sum(alphas[n] * error[b] for n, b in chosen.items()) == pytest.approx(best, rel=1e-9)
    assert chosen["l1"] > chosen["l0"]
    assert all(entry.size["feedback"] is False and entry.size["scaling"] == "rms" for entry in plan.entries)
    for entry in plan.entries:
        op = build_entry(entry, layers).layers[entry.layers[0]][0]
        assert isinstance(op, Quantized)
        assert (op.rounds, op.nbytes) == (2, entry.cost)
        x = torch.randn(5, op.shape[1], dtype=torch.float64)
        assert torch.allclose(op.apply(x), x @ op.dense().double().mT, atol=1e-4)


def test_every_weighting_and_allocation_is_used_or_reachable() -> None:
    assert {recipe.weighting for recipe in RECIPES.values()} | {"diagonal"} == set(WEIGHTINGS)
    assert {recipe.allocation for recipe in RECIPES.values()} - {None} | {"exact", "entropic"} == set(ALLOCATIONS)
    layer, x, _ = one_layer(16, 24)
    under = layer.weighed("diagonal")
    assert torch.allclose(under.gram_in, x.square().mean(0))
    assert under.gram_out is None
    assert under.weighed("two-sided") is layer
    assert layer.weighed("diagonal") is under


# Rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_grids_error_is_its_constant_on_every_layer_of_a_trained_encoder(bits: int) -> None:
    """Within 2 %, or as near as the mean over so many exactly Gaussian entries is: of 384 x 384 entries and 8 bits, whose
    errors lie mostly in the few outermost cells, its standard deviation is 1.3 %.
    """
    from gramian.models.loading import load_model

    try:
        model = load_model(None, None).model
    except GramianError:
        pytest.skip("the demo model is not installed")
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder" in n]
    assert len(linears) == 36
    constant = grid_error("gaussian", bits, group=128)
    points = torch.linspace(-1, 1, 100_001, dtype=torch.float64)[1:-1] * 128**0.5
    density = (125 / 2 * torch.log1p(-points.square() / 128)).exp()
    levels = grid_levels("gaussian", bits)
    errors = (points - levels[torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)]).square()
    spread = float((density * (errors / constant - 1).square()).sum() / density.sum()) ** 0.5
    for linear in linears:
        weight = linear.weight.detach()
        rounded = Quantized.fit(weight, bits=bits, **RECIPES["higgs"].fixed).dense()
        error = float((weight - rounded).double().square().sum() / weight.double().square().sum())
        assert error == pytest.approx(constant, rel=max(0.02, 3.5 * spread / weight.numel() ** 0.5))


def test_sensitivities_are_those_of_a_linear_model() -> None:
    """f(x) = W x: noise t ||W|| raises the relative squared error by t^2 E||N x||^2 / ..., known in the mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512, bias=False)).eval()
    x = torch.randn(32, 64) * torch.linspace(0.2, 2, 64)
    before = model[0].weight.clone()
    (alpha,) = measure(model, tensor_workload([x]), ["0"]).values()
    assert torch.equal(model[0].weight, before)
    w = before.detach()
    wanted = (w.square().sum() / w.numel() * 512 * x.square().sum(1) / (x @ w.mT).square().sum(1)).mean()
    assert alpha == pytest.approx(float(wanted), rel=0.05)


def test_low_rank_scaling_rounds_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 32, generator=generator, dtype=torch.float64)
    start = Quantized.fit(weight, bits=3, group=16, grid="uniform", rotate=False, feedback=False)
    layer = ScaledRounding(weight, start, None, 4, generator)
    assert torch.allclose(layer.finish().dense().double(), start.dense().double(), atol=1e-3)  # L = 0: to nearest
    with torch.no_grad():
        for p in (layer.left, layer.rows, layer.columns):
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    s = layer.log_scale.detach().exp().repeat_interleave(16, 1)
    divisor = s * (layer.left @ layer.right + layer.rows + layer.columns).detach().exp()
    levels = grid_levels("uniform", 3)
    codes = (weight / divisor)[..., None].sub(levels).abs().argmin(-1)
    wanted = s * levels[codes]
    assert torch.allclose(layer.finish().dense().double(), wanted, rtol=2e-3, atol=1e-6)
    eye = torch.eye(32, dtype=torch.float64)
    assert torch.allclose(layer(eye).mT.detach(), wanted, rtol=1e-6)


def test_lrq_lowers_the_error_of_its_blocks_and_stores_codes_alone() -> None:
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(nn.functional.gelu(self.up(x)))

    model = nn.Sequential(Residual(), Residual()).eval()
    x = correlated(512, 64).float() * 3
    work = tensor_workload(list(x[:384].split(64)))
    plain = gramian.compress(model, work, recipe="lrq", keep=0.11, heal_steps=1)
    small = gramian.compress(model, work, recipe="lrq", keep=0.11, heal_steps=120)
    ops = [m.op for m in small.modules() if isinstance(m, StructuredLinear)]
    assert len(ops) == 4
    assert all(isinstance(op, Quantized) and op.bits == 3 and op.grid == "uniform" for op in ops)
    held = x[384:]
    with torch.no_grad():
        errors = [float((m(held) - model(held)).square().sum()) for m in (plain, small)]
    assert errors[1] < 0.7 * errors[0]
    again = gramian.compress(model, work, recipe="lrq", keep=0.11, heal_steps=120)
    assert torch.equal(again[0].up.op.codes, small[0].up.op.codes)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2"])
def test_lrq_runs_the_blocks_of_decoders_again_and_again(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {} if family == "GPT2" else {"intermediate_size": 96, "num_key_value_heads": 2}
    end = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + end)(getattr(transformers, f"{family}Config")(**sizes, **more)).eval()
    assert model.config.use_cache
    work = tensor_workload([{"input_ids": torch.randint(0, 96, (4, 12))} for _ in range(2)])
    small = gramian.compress(model, work, recipe="lrq", keep=0.3, heal_steps=2)
    with torch.no_grad():
        assert small(**work.batches[0]).logits.isfinite().all()


def test_low_rank_plus_rounded_alternates_downwards() -> None:
    layer, _, _ = one_layer(48, 64)
    under = dict(gram_in=layer.gram_in, gram_out=layer.gram_out)

    def error(op: object) -> float:
        return layer.error(op.dense())  # type: ignore[attr-defined]

    alone = error(Quantized.fit(layer.weight, bits=3, **under))
    errors = [error(LowRankQuantized.fit(layer.weight, rank=3, bits=3, sweeps=n, **under)) for n in (1, 2, 4)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < 0.85 * alone
    plan = plan_recipe(RECIPES["reallm"], {"layer": layer}, [], keep=0.2)
    built = build_entry(plan.entries[0], {"layer": layer})
    assert plan.entries[0].structure == "low_rank_quantized"
    op = built.layers["layer"][0]
    assert op.nbytes <= plan.entries[0].cost <= plan.budget
    assert built.error["layer"] == pytest.approx(plan.entries[0].predicted, rel=1.0)


# Other structures ---------------------------------------------------------------------------------------------------


def test_monarch_is_the_svd_of_every_block_of_the_permuted_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    layer = Layer("layer", weight, None)
    (size,) = [s for s in monarch_sizes((64, 64), 0.25) if s["blocks"] == [8, 8]]
    assert size == {"rank": 1, "blocks": [8, 8], "strided_rows": True}
    op, _ = build_entry(Entry(["layer"], "block_low_rank", size, 0, 0.0, weighting="none"), {"layer": layer}).layers[
        "layer"
    ]
    permuted = weight.reshape(8, 8, 8, 8)  # row p * 8 + j belongs to block row j
    wanted = torch.empty_like(permuted)
    for j, k in itertools.product(range(8), range(8)):
        wanted[:, j, k, :] = truncated(permuted[:, j, k, :], 1)
    assert torch.allclose(op.dense(), wanted.reshape(64, 64), atol=1e-10)


@pytest.mark.parametrize(
    ("name", "kind"), [("monarch", "block_low_rank"), ("dsformer", "dictionary"), ("sltrain", "low_rank_sparse")]
)
def test_structured_recipes_keep_their_share_and_beat_low_rank_or_tell(name: str, kind: str) -> None:
    layer, _, _ = one_layer(64, 64)
    plan = plan_recipe(RECIPES[name], {"layer": layer}, [], keep=0.5)
    (entry,) = plan.entries
    assert entry.structure == kind
    assert entry.cost <= plan.budget
    built = build_entry(entry, {"layer": layer})
    assert built.layers["layer"][0].numel == entry.cost
    if name == "monarch":
        assert entry.size["strided_rows"]
    assert built.error["layer"] <= entry.predicted * (1 + 1e-6)


def test_blast_is_no_worse_than_the_low_rank_matrix_it_starts_from() -> None:
    layer, _, _ = one_layer(32, 32)
    plan = plan_recipe(RECIPES["blast"], {"layer": layer}, [], keep=0.5)
    (entry,) = plan.entries
    low_rank = float(layer.spectrum.errors[entry.size["rank"]]) * layer.unit
    assert entry.structure == "blast"
    assert entry.cost <= plan.budget
    assert build_entry(entry, {"layer": layer}).error["layer"] <= low_rank * (1 + 1e-9)


def test_healing_a_dictionary_learns_its_support() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    work = tensor_workload(list(torch.randn(6, 32, 64)))
    small = gramian.compress(model, work, recipe="dsformer", keep=0.5)
    before = copy.deepcopy(small)
    heal(small, model, ["0", "2"], work, Healing(steps=40, rate=3e-3, batch=32))
    x = torch.randn(256, 64)
    with torch.no_grad():
        errors = [float((m(x) - model(x)).square().sum()) for m in (before, small)]
    assert errors[1] < errors[0]
    assert isinstance(small[0].op, Dictionary)
    assert not torch.equal(small[0].op.index, before[0].op.index)
    assert small[0].op.coefficients.shape == before[0].op.coefficients.shape


class Words(nn.Module):
    """An embedding, and a linear layer on the mean of its rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(300, 32), nn.Linear(32, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


def test_healing_keeps_frozen_models_frozen_and_bears_answers_beyond_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval().requires_grad_(False)
    model[2].weight *= 1e6
    work = tensor_workload(list(torch.randn(4, 32, 64)))
    assert float(model(work.batches[0]).abs().max()) > 65504
    small = gramian.compress(model, work, keep=0.5, structures="skeleton", heal_steps=3)
    assert any(isinstance(module, StructuredLinear) for module in small)
    assert not any(p.requires_grad for p in small.parameters())


def test_embedding_recipe_factors_tables_by_frequency_and_nothing_else() -> None:
    model = Words().eval()
    draws = torch.distributions.Geometric(0.02).sample((256, 12)).long().clamp_max(299)
    small = gramian.compress(model, list(draws.split(64)), recipe="embedding", keep=0.5)
    assert type(small.head) is PreparedLinear
    op = small.table.op
    assert isinstance(op, BlockLowRank)
    f = (torch.bincount(draws.flatten(), minlength=300).double() + 0.1).sqrt()[:, None]
    e = model.table.weight.detach().double()
    wanted = truncated(f * e, op.rank) / f
    assert float((op.dense().detach().double() - wanted).norm() / wanted.norm()) < 1e-5
    assert op.numel <= 0.5 * e.numel()


def test_new_tokens_get_the_mean_of_their_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    f, known, new = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n, d in ((50, 4), (50, 9), (3, 9)))
    rows = new_rows(f, known, new, neighbours=5, temperature=0.2)
    for i in range(3):
        cosine = torch.stack([torch.dot(new[i], k) / new[i].norm() / k.norm() for k in known])
        best = cosine.argsort(descending=True)[:5]
        weights = (cosine[best] / 0.2).exp()
        assert torch.allclose(rows[i], (weights[:, None] * f[best]).sum(0) / weights.sum())
    with pytest.raises(GramianError, match="new_rows: coordinates"):
        new_rows(f, known[:3], new)


# Plans and the whole run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    return model, list((correlated(512, 64) * 3).float().split(128))


def test_auto_is_the_default_and_the_best(network: tuple[nn.Module, list[Tensor]]) -> None:
    model, data = network
    x = torch.cat(data)
    grams = gramian.collect(model, data)
    errors = {}
    for name in ("auto", *LOW_RANK, "welore", "sltrain", "dsformer", "monarch"):
        small = gramian.compress(model, grams=grams, recipe=name, keep=0.5)
        with torch.no_grad():
            errors[name] = float((small(x) - model(x)).square().sum())
    assert min(errors, key=lambda name: errors[name]) == "auto", errors
    assert errors["svd-llm"] < errors["svd"]
    default = gramian.compress(model, grams=grams, keep=0.5)
    auto = gramian.compress(model, grams=grams, recipe="auto", keep=0.5)
    assert all(torch.equal(a, b) for a, b in zip(default.parameters(), auto.parameters(), strict=True))


def test_a_plan_says_its_weighting_and_old_plans_read(tmp_path: Path, network: tuple[nn.Module, list[Tensor]]) -> None:
    model, data = network
    grams = gramian.collect(model, data, objective="none")
    layers = planning_layers(model, grams)
    plan = plan_recipe(RECIPES["lord"], layers, [], keep=0.5)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.entries == plan.entries
    assert {entry.weighting for entry in again.entries} == {"centred"}
    made = [gramian.compress(model, p, grams=grams) for p in (plan, again)]
    direct = gramian.compress(model, grams=grams, recipe="lord", keep=0.5)
    for a, b, c in zip(*(m.parameters() for m in (*made, direct)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    data_ = json.loads((tmp_path / "plan.json").read_text())
    for entry in data_["entries"]:
        del entry["weighting"]
    (tmp_path / "old.json").write_text(json.dumps(data_))
    assert {entry.weighting for entry in Plan.load(tmp_path / "old.json").entries} == {"two-sided"}
    data_["entries"][1]["weighting"] = "centered"
    (tmp_path / "bad.json").write_text(json.dumps(data_))
    with pytest.raises(GramianError, match=r"entry 1: unknown weighting 'centered' \(did you mean centred"):
        Plan.load(tmp_path / "bad.json")


@pytest.mark.parametrize(("name", "cost", "keep"), [("lord", "params", 0.5), ("higgs", "bytes", 0.13)])
def test_a_job_with_a_recipe(name: str, cost: str, keep: float, encoder_directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    from gramian.models.data import python_topics

    text.write_text("\n\n".join(python_topics().calibration[:40]))
    out = tmp_path / "small"
    report = Job(str(encoder_directory), str(text), out, Settings(recipe=name, cost=cost, keep=keep)).run()
    assert report["kept"]["layers"] <= keep
    weightings = {json.loads(line)["weighting"] for line in plan_lines(out)}
    assert weightings == {RECIPES[name].weighting}
    rows = [row for row in report["layers"] if row["structure"] != "dense"]
    assert all(0 < row["relative"] < 1 for row in rows)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(out)
    held = model.encoder.layer[0].attention.self.query
    assert isinstance(held, StructuredLinear)


def plan_lines(out: Path) -> list[str]:
    return [json.dumps(entry) for entry in json.loads((out / "plan.json").read_text())["entries"]]


# Refusals and the catalogue -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cost"), [(name, cost) for name, r in RECIPES.items() for cost in COSTS if cost not in r.costs]
)
def test_a_cost_that_a_recipe_cannot_lower_is_refused(name: str, cost: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(GramianError, match=f"recipe {name} cannot lower the {cost}; expected a cost of"):
        gramian.compress(model, [torch.randn(4, 64)], recipe=name, cost=cost)
    with pytest.raises(GramianError, match=f"recipe {name} cannot lower the {cost}"):
        Job(None, None, Path("nowhere"), Settings(recipe=name, cost=cost)).check()


def test_what_a_recipe_lacks_is_said() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    data = [torch.randn(8, 64)]
    with pytest.raises(GramianError, match=r"unknown recipe 'svdllm' \(did you mean svd-llm"):
        gramian.compress(model, data, recipe="svdllm")
    with pytest.raises(GramianError, match="recipe svd brings its own structures"):
        gramian.compress(model, data, recipe="svd", structures="skeleton")
    with pytest.raises(GramianError, match="recipe fwsvd needs gradients: objective 'none'"):
        gramian.compress(model, data, recipe="fwsvd", objective="none")
    with pytest.raises(GramianError, match="layer 0: weighting 'fisher-rows' needs gradients"):
        gramian.compress(model, grams=gramian.collect(model, data, objective="none"), recipe="fwsvd")
    with pytest.raises(GramianError, match="compress needs calibration data"):
        gramian.compress(model, recipe="svd-llm")
    with pytest.raises(
        GramianError, match="recipe higgs measures the layers' sensitivities and needs calibration data"
    ):
        gramian.compress(model, recipe="higgs", keep=0.2)
    with pytest.raises(GramianError, match="recipe embedding is for embeddings of words"):
        gramian.compress(model, data, recipe="embedding")
    with pytest.raises(GramianError, match="keep 0.001 is out of reach for 0"):
        gramian.compress(model, data, recipe="svd", keep=0.001)
    with pytest.raises(GramianError, match="keep 0.001 is out of reach: ranks of one keep 0.0312"):
        gramian.compress(model, recipe="welore", keep=0.001)
    with pytest.raises(GramianError, match="unknown cost 'parms'.*did you mean params"):
        gramian.compress(model, data, recipe="svd", cost="parms")


def test_tensors_that_a_weighting_or_allocation_cannot_take_are_refused() -> None:
    layer, _, _ = one_layer(16, 24)
    with pytest.raises(GramianError, match="unknown weighting 'whitened'"):
        layer.weighed("whitened")
    with pytest.raises(GramianError, match="unknown allocation 'unifrm'.*did you mean uniform"):
        make_plan({"layer": layer}, [], keep=0.5, allocation="unifrm")
    bare = Layer("bare", layer.weight, None)
    with pytest.raises(GramianError, match="layer bare: weighting 'input' needs calibration data"):
        plan_recipe(RECIPES["svd-llm"], {"bare": bare}, [], keep=0.5)
    table = Layer("table", torch.randn(40, 8), None, EmbeddingGrams(Gram(40, "diagonal")), embedding=True)
    with pytest.raises(GramianError, match="layer table: weighting 'centred' is for linear layers"):
        plan_recipe(RECIPES["lord"], {"table": table}, [], keep=0.5)
    with pytest.raises(GramianError, match="'measured' multiplies relative errors"):
        make_plan({"layer": layer}, [], keep=0.5, allocation="measured", sensitivity={"layer": 1.0})
    with pytest.raises(GramianError, match="recipe higgs needs the layers' measured sensitivities"):
        plan_recipe(RECIPES["higgs"], {"layer": layer}, [], keep=0.2)
    with pytest.raises(GramianError, match="no sensitivity of layer layer"):
        plan_recipe(RECIPES["higgs"], {"layer": layer}, [], keep=0.2, sensitivity={"later": 1.0})
    with pytest.raises(GramianError, match="'threshold' chooses ranks; layer is offered structures without one"):
        make_plan({"layer": layer}, [], keep=0.2, cost="bytes", structures="quantized", allocation="threshold")
    with pytest.raises(GramianError, match="scaling 'mean'; expected 'best' or 'rms'"):
        Quantized.fit(layer.weight, scaling="mean")
    with pytest.raises(GramianError, match="rotation 96; expected a power of two"):
        Quantized.fit(layer.weight, rotation=96)
    with pytest.raises(GramianError, match="rank 17 for 16 x 24; expected 1 to 16"):
        LowRankQuantized.fit(layer.weight, rank=17)
    rotated = Quantized.fit(layer.weight, bits=4)
    with pytest.raises(GramianError, match="expected a uniform grid without rotation"):
        ScaledRounding(layer.weight, rotated, None, 2)
    with pytest.raises(GramianError, match="layer 0 is a Linear; expected one rounded"):
        model = nn.Sequential(nn.Linear(24, 16))
        reconstruct(copy.deepcopy(model), model, ["0"], tensor_workload([torch.randn(4, 24)]))


def test_a_job_refuses_recipes_it_cannot_run_or_does_not_know(encoder_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(GramianError, match="--recipe svd runs in one process with the model in memory"):
        Job(str(encoder_directory), None, tmp_path / "out", Settings(recipe="svd"), offload=True).check()
    with pytest.raises(GramianError, match="unknown recipe 'lod'"):
        Job(str(encoder_directory), None, tmp_path / "out", Settings(recipe="lod")).check()


def test_blocks_of_layers() -> None:
    assert block_of("encoder.layer.3.attention.self.query") == "encoder.layer.3"
    assert block_of("2") == "2"
    assert block_of("head.out") == "head.out"


def test_the_catalogue_is_complete_and_searchable() -> None:
    from gramian.cli.recipes import run_recipes

    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.paper
        assert recipe.formula
        assert recipe.solver
        assert recipe.weighting in WEIGHTINGS
        for cost in recipe.costs:
            assert recipe.check(cost) == cost
            assert resolve_structures(recipe.options()["structures"], cost)
    assert next(iter(RECIPES)) == "auto"
    assert [r.name for r in find_recipes(["FISHER"])] == ["fwsvd", "fwsvd-columns"]
    assert {"blast", "monarch"} <= {r.name for r in find_recipes(["block"])}
    with CliRunner().isolation() as streams:
        run_recipes(["lord"], json_output=True)
        run_recipes([])
        printed = streams[0].getvalue().decode()
    first, rest = printed.split("\n", 1)
    assert json.loads(first)[0]["weighting"] == "centred"
    assert all(name in rest for name in RECIPES)
    with pytest.raises(GramianError, match="no recipe mentions nonsense"):
        run_recipes(["nonsense"])
    assert resolve_recipe("auto").needs == "gradients, if they can be had"
    assert dataclasses.is_dataclass(RECIPES["svd"])


def test_healing_that_has_nothing_to_train_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    data = [torch.randn(32, 128)]
    with pytest.warns(UserWarning, match="trained nothing"):
        gramian.compress(model, data, recipe="higgs", keep=0.3, heal_steps=2)
