"""Assignment, weight matching and merging against independent references in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gramian.compression.match import match_weights, permute
from gramian.compression.merge import ContinualMerge, merge_by_grams, project_out
from gramian.errors import GramianError
from gramian.linalg import linear_assignment
from gramian.models.merging import find_units, match, merge

# Assignment ----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(n=st.integers(0, 30), seed=st.integers(0, 10**6), kind=st.sampled_from(["normal", "ties", "low rank", "huge"]))
def test_assignment_is_scipys_optimum(n: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(n, n, dtype=torch.float64, generator=generator)
    if kind == "ties":
        cost = torch.randint(0, 3, (n, n), generator=generator).double()
    elif kind == "low rank":
        cost = torch.outer(cost[:, :1].sum(1), cost[:1].sum(0)) if n else cost
    elif kind == "huge":
        cost = 1e12 + 1e9 * cost
    found = linear_assignment(cost)
    assert sorted(found.tolist()) == list(range(n))
    rows, columns = linear_sum_assignment(cost.numpy())
    best = cost.numpy()[rows, columns].sum()
    assert float(cost[torch.arange(n), found].sum()) <= best + 1e-9 * max(1.0, abs(best))


def test_assignment_large_and_bad() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.randn(300, 300, dtype=torch.float64, generator=generator)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert np.array_equal(linear_assignment(cost).numpy(), columns[rows.argsort()])
    for bad in (torch.zeros(2, 3), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match="finite square"):
            linear_assignment(bad)


# Weight matching -----------------------------------------------------------------------------------------------------


def mlp(width: int = 24, seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Linear(10, width)]
    if norm:
        parts.append(nn.LayerNorm(width))
    parts += [nn.GELU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)]
    model = nn.Sequential(*parts)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.double()


def shuffled(model: nn.Module, groups: Any, seed: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    state = dict(model.state_dict())
    orders = {
        group: torch.randperm(state[places[0][0]].shape[places[0][1]], generator=generator)
        for group, places in groups.items()
    }
    out = copy.deepcopy(model)
    out.load_state_dict(permute(state, groups, orders))
    return out, orders


def test_units_of_a_chain_with_a_normalisation() -> None:
    model, x = mlp(norm=True), torch.randn(6, 10, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    groups = find_units(model, [x])
    assert {key: set(places) for key, places in groups.items()} == {
        "3": {("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("3.weight", 1)},
        "5": {("3.weight", 0), ("3.bias", 0), ("5.weight", 1)},
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    other, _ = shuffled(model, groups)
    assert torch.allclose(other(x), model(x), atol=1e-12)
    assert not torch.equal(other[0].weight, model[0].weight)


def test_units_of_gated_and_convolutional_networks() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    ids = torch.randint(0, 50, (2, 9))
    groups = find_units(llama, [ids])
    assert set(groups) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    mlp_places = groups["model.layers.1.mlp.down_proj"]
    assert set(mlp_places) == {
        (f"model.layers.1.mlp.{name}_proj.weight", axis) for name, axis in (("gate", 0), ("up", 0), ("down", 1))
    }
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)).eval()
    groups = find_units(gpt, [ids])
    assert set(groups["transformer.h.0.mlp.c_proj"]) == {
        ("transformer.h.0.mlp.c_fc.weight", 1),
        ("transformer.h.0.mlp.c_fc.bias", 0),
        ("transformer.h.0.mlp.c_proj.weight", 0),
    }
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    )
    network(torch.randn(64, 3, 8, 8))  # running statistics that differ
    groups = find_units(network, [torch.randn(4, 3, 8, 8)])
    assert set(groups) == {"3"}  # the flattened map mixes places and channels
    assert ("1.running_var", 0) in groups["3"]


def test_a_permuted_network_is_found_back() -> None:
    for norm in (False, True):
        model, x = mlp(norm=norm), torch.randn(6, 10, dtype=torch.float64)
        other, _ = shuffled(model, find_units(model, [x]))
        back = match(model, other, [x])
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
        assert not torch.equal(other[0].weight, model[0].weight)


def test_one_hidden_layer_is_matched_optimally() -> None:
    """By brute force over all orders."""
    torch.manual_seed(0)
    a, b = (
        {"in": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(5).double(), "out": torch.randn(2, 5).double()}
        for _ in range(2)
    )
    groups = {"hidden": [("in", 0), ("b", 0), ("out", 1)]}
    found = match_weights(a, b, groups)

    def similarity(order: Tensor) -> float:
        moved = permute(b, groups, {"hidden": order})
        return sum(float((a[name] * moved[name]).sum()) for name in a)

    best = max(similarity(torch.tensor(order)) for order in itertools.permutations(range(5)))
    assert found.after == pytest.approx(best) == pytest.approx(similarity(found.orders["hidden"]))
    assert found.before == pytest.approx(similarity(torch.arange(5)))
    distance = [sum(float((a[n] - m[n]).square().sum()) for n in a) for m in (b, permute(b, groups, found.orders))]
    assert distance[0] - distance[1] == pytest.approx(2 * (found.after - found.before))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_matching_never_loses_and_ends_where_no_group_can_gain(seed: int) -> None:
    a, b = (dict(mlp(12, s).state_dict()) for s in (seed, seed + 1))
    groups = {
        "0": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)],
        "1": [("2.weight", 0), ("2.bias", 0), ("4.weight", 1)],
    }
    found = match_weights(a, b, groups, seed=seed)
    assert found.after >= found.before
    moved = permute(b, groups, found.orders)
    again = match_weights(a, moved, groups, seed=seed + 7)
    assert again.after == pytest.approx(found.after)
    assert again.sweeps == 1
    assert match_weights(a, b, groups, seed=seed).orders["1"].equal(found.orders["1"])


def test_a_group_that_meets_itself() -> None:
    """A residual stream: both dimensions of one tensor; the step must not lose."""
    torch.manual_seed(0)
    a = {"mix": torch.randn(9, 9).double(), "in": torch.randn(9, 4).double()}
    groups = {"stream": [("mix", 0), ("mix", 1), ("in", 0)]}
    order = torch.randperm(9)
    b = permute(a, groups, {"stream": order})
    found = match_weights(a, b, groups)
    assert found.after >= found.before
    assert found.after == pytest.approx(float(a["mix"].square().sum() + a["in"].square().sum()))


def test_matching_errors() -> None:
    a = {"w": torch.zeros(3, 2)}
    for groups, words in (
        ({"g": [("v", 0)]}, "no tensor 'v'"),
        ({"g": []}, "appears nowhere"),
        ({"g": [("w", 2)]}, "with a dimension 2"),
        ({"g": [("w", 0), ("w", 1)]}, r"\[2, 3\] units"),
    ):
        with pytest.raises(GramianError, match=words):
            match_weights(a, a, groups)
    with pytest.raises(GramianError, match="NaN"):
        match_weights({"w": torch.full((3, 2), float("nan"))}, a, {"g": [("w", 0)]})
    with pytest.raises(GramianError, match="equal shapes"):
        match_weights({"w": torch.zeros(4, 2)}, a, {"g": [("w", 0)]})
    with pytest.raises(GramianError, match="no hidden units"):
        match(nn.Linear(3, 2), nn.Linear(3, 2), [torch.zeros(2, 3)])


# Gram-weighted merging -----------------------------------------------------------------------------------------------


def problem(
    models: int, m: int, n: int, seed: int, *, rows: int = 40
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights = [normal(m, n) for _ in range(models)]
    inputs = [normal(rows, n) @ normal(n, n) for _ in range(models)]
    outputs = [normal(rows, m) @ normal(m, m) for _ in range(models)]
    return weights, [x.mT @ x / rows for x in inputs], [g.mT @ g / rows for g in outputs]


@settings(max_examples=30, deadline=None)
@given(models=st.integers(1, 4), m=st.integers(1, 5), n=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_gram_merges_solve_the_normal_equations(models: int, m: int, n: int, seed: int) -> None:
    weights, grams, out = problem(models, m, n, seed)
    # One-sided: stacked least squares over square roots of the Grams.
    roots = [torch.linalg.cholesky(g + 1e-13 * torch.eye(n)).mT for g in grams]
    stacked = torch.linalg.lstsq(
        torch.cat(roots), torch.cat([r @ w.mT for r, w in zip(roots, weights, strict=True)])
    ).solution.mT
    found = merge_by_grams(weights, grams)
    assert torch.allclose(found.weight, stacked, rtol=1e-5, atol=1e-6 * float(stacked.abs().max()))
    assert found.residual < 1e-6
    # Two-sided: the Kronecker system, solved densely.
    system = sum(torch.kron(h, g) for h, g in zip(out, grams, strict=True))
    right = sum((h @ w @ g).reshape(-1) for h, w, g in zip(out, weights, grams, strict=True))
    dense = torch.linalg.solve(system, right).reshape(m, n)
    both = merge_by_grams(weights, grams, out)

    def error(x: Tensor) -> float:
        return sum(
            float(torch.trace(h @ (x - w) @ g @ (x - w).mT)) for h, w, g in zip(out, weights, grams, strict=True)
        )

    assert both.residual < 1e-8
    assert both.error == pytest.approx(error(both.weight), rel=1e-6, abs=1e-9)
    assert both.error <= error(dense) * (1 + 1e-6) + 1e-9


def test_gram_merge_of_data_is_a_fit_to_all_of_it() -> None:
    """RegMean's meaning: the merged layer is the least-squares fit to every model's own answers on its own inputs."""
    torch.manual_seed(0)
    xs = [torch.randn(50, 6).double() * torch.rand(6).double() * 3 for _ in range(3)]
    ws = [torch.randn(4, 6).double() for _ in range(3)]
    fit = torch.linalg.lstsq(torch.cat(xs), torch.cat([x @ w.mT for x, w in zip(xs, ws, strict=True)])).solution.mT
    found = merge_by_grams(ws, [x.mT @ x for x in xs])
    assert torch.allclose(found.weight, fit, atol=1e-10)
    mean = sum(ws) / 3
    left = sum(float(((x @ (mean - w).mT) ** 2).sum()) for x, w in zip(xs, ws, strict=True))
    assert found.error < left
    # Off-diagonal entries at zero weigh each column alone.
    alone = merge_by_grams(ws, [x.mT @ x for x in xs], off_diagonal=0.0).weight
    d = torch.stack([x.square().sum(0) for x in xs])[:, None]
    assert torch.allclose(alone, (torch.stack(ws) * d).sum(0) / d.sum(0))


def test_directions_that_no_gram_saw_keep_the_mean() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 5).double() for _ in range(2)]
    grams = [
        torch.diag(torch.tensor([1.0, 2.0, 0, 0, 3.0])).double(),
        torch.diag(torch.tensor([2.0, 1, 0, 0, 0])).double(),
    ]
    out = [torch.eye(3).double(), 2 * torch.eye(3).double()]
    mean = (weights[0] + weights[1]) / 2
    for found in (merge_by_grams(weights, grams), merge_by_grams(weights, grams, out)):
        assert torch.allclose(found.weight[:, 2:4], mean[:, 2:4])
        assert torch.allclose(found.weight[:, 4], weights[0][:, 4])
        assert found.residual < 1e-8


def test_gram_merge_errors() -> None:
    w, g = torch.zeros(2, 3), torch.eye(3)
    for arguments, words in (
        (([], []), "0 weights"),
        (([w], [g, g]), "1 weights, 2 input Grams"),
        (([w], [torch.eye(2)]), r"input Gram 0 is \(2, 2\); expected \(3, 3\)"),
        (([w], [g], [g]), r"output Gram 0 is \(3, 3\); expected \(2, 2\)"),
        (([w * float("nan")], [g]), "weight 0 holds NaN"),
    ):
        with pytest.raises(GramianError, match=words):
            merge_by_grams(*arguments)
    with pytest.raises(GramianError, match="off_diagonal 2"):
        merge_by_grams([w], [g], off_diagonal=2)


# OPCM ----------------------------------------------------------------------------------------------------------------


def dense_projection(update: Tensor, earlier: Tensor, share: float) -> Tensor:
    """With full singular bases and entry by entry."""
    u, s, vh = torch.linalg.svd(earlier, full_matrices=True)
    middle = u.mT @ update @ vh.mT
    total, split = 0.0, 0
    for value in s.tolist():
        total += value
        if total > share * float(s.sum()):
            break
        split += 1
    for i in range(middle.shape[0]):
        for j in range(middle.shape[1]):
            if i == j or (i < split and j < split):
                middle[i, j] = 0
    return u @ middle @ vh


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 7), n=st.integers(1, 7), seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.3, 0.5, 0.9])
)
def test_projection_against_full_bases(m: int, n: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    update, earlier = (torch.randn(m, n, dtype=torch.float64, generator=generator) for _ in range(2))
    found = project_out(update, earlier, share=share)
    assert torch.allclose(found, dense_projection(update, earlier, share), atol=1e-9)
    assert abs(float((found * earlier).sum())) < 1e-9 * float(update.norm() * earlier.norm())
    assert float(found.norm()) <= float(update.norm()) * (1 + 1e-9)


def test_projection_at_its_ends() -> None:
    torch.manual_seed(0)
    update = torch.randn(6, 5).double()
    low = torch.outer(torch.randn(6).double(), torch.randn(5).double())  # of rank one
    u, v = (x / x.norm() for x in (low[:, 0], low[0]))
    expected = update - u[:, None] * (u @ update @ v) * v
    for share in (0.0, 1.0):
        assert torch.allclose(project_out(update, low, share=share), expected, atol=1e-9)
    full = torch.randn(6, 5).double()
    inside = project_out(update, full, share=1.0)  # all of its columns' space and rows' space
    left = torch.linalg.svd(full, full_matrices=False).U
    assert torch.allclose(left.mT @ inside, torch.zeros(5, 5).double(), atol=1e-9)
    assert torch.equal(project_out(update, torch.zeros(6, 5)), update)
    with pytest.raises(GramianError, match="two equal matrices"):
        project_out(update, full.mT)
    with pytest.raises(GramianError, match="share 2"):
        project_out(update, full, share=2)


def test_continual_merge_follows_the_paper_step_by_step() -> None:
    """With the paper's running scales lambda, which the implementation does without."""
    torch.manual_seed(0)
    base = {"w": torch.randn(6, 5).double(), "b": torch.randn(6).double()}
    models = [{name: t + 0.1 * torch.randn(t.shape).double() for name, t in base.items()} for _ in range(4)]
    merged = ContinualMerge(base, ["w"])
    theta, scale, norms = None, 1.0, []
    for model in models:
        merged.add(model)
        update = {name: model[name] - base[name] for name in base}
        norms.append(sum(float(t.square().sum()) for t in update.values()) ** 0.5)
        if theta is None:
            theta = dict(model)
        else:
            previous = {name: theta[name] - base[name] for name in base}
            raw = {
                "w": scale * previous["w"] + dense_projection(update["w"], previous["w"], 0.5),
                "b": scale * previous["b"] + update["b"],
            }
            scale = sum(float(t.square().sum()) for t in raw.values()) ** 0.5 / (sum(norms) / len(norms))
            theta = {name: base[name] + raw[name] / scale for name in base}
        found = merged.merged()
        assert all(torch.allclose(found[name], theta[name], atol=1e-9) for name in base)


def test_continual_merge_errors() -> None:
    base = {"weight": torch.zeros(2, 2)}
    with pytest.raises(GramianError, match=r"no tensor 'wieght' \(did you mean weight"):
        ContinualMerge(base, ["wieght"])
    merged = ContinualMerge(base, ["weight"])
    with pytest.raises(GramianError, match="add one first"):
        merged.merged()
    with pytest.raises(GramianError, match="in one of base and model only"):
        merged.add({"other": torch.zeros(2, 2)})
    with pytest.raises(GramianError, match=r"expected \(2, 2\), finite"):
        merged.add({"weight": torch.zeros(3, 2)})
    merged.add(base)  # nothing learned
    assert torch.equal(merged.merged()["weight"], base["weight"])


# Modules -------------------------------------------------------------------------------------------------------------


def tuned(base: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape).to(p))
    return model


def test_average_and_gram_recipes_of_modules() -> None:
    base = mlp(norm=True)
    models = [tuned(base, s) for s in (1, 2, 3)]
    mean = merge(models)
    assert torch.allclose(mean[3].weight, sum(m[3].weight for m in models) / 3)
    x = torch.randn(80, 10).double()
    same = merge([models[0]] * 2, "gram", data=[[x]] * 2)
    assert all(torch.allclose(a, b) for a, b in zip(same.parameters(), models[0].parameters(), strict=True))
    # The first layer's inputs are the data: weight and bias must be the least-squares fit with a column of ones.
    data = [torch.randn(80, 10).double() * torch.rand(10).double() + i for i in range(3)]
    merged = merge(models, "gram", data=[[d] for d in data], off_diagonal=1.0)
    ones = torch.ones(80, 1).double()
    targets = torch.cat([m[0](d) for m, d in zip(models, data, strict=True)])
    fit = torch.linalg.lstsq(torch.cat([torch.cat([d, ones], 1) for d in data]), targets.detach()).solution
    assert torch.allclose(merged[0].weight, fit[:-1].mT, atol=1e-5)
    assert torch.allclose(merged[0].bias, fit[-1], atol=1e-5)
    assert torch.allclose(merged[1].weight, mean[1].weight)  # a normalisation: averaged
    assert not torch.allclose(merged[3].weight, mean[3].weight)
    two = merge(models, "gram-two-sided", data=[[d] for d in data])
    assert not torch.allclose(two[3].weight, merged[3].weight)


def test_modules_of_the_transformers_library() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).eval()
    models = [tuned(base, s) for s in (1, 2)]
    ids = [torch.randint(0, 40, (8, 12)) for _ in range(2)]
    merged = merge(models, "gram", data=[[i] for i in ids], off_diagonal=1.0)
    assert merged.lm_head.weight is merged.transformer.wte.weight  # tied, and averaged
    assert torch.allclose(merged.lm_head.weight, (models[0].lm_head.weight + models[1].lm_head.weight) / 2)
    rows, answers = [], []
    for model, i in zip(models, ids, strict=True):  # what the layer reads and answers in each model
        layer = model.transformer.h[0].mlp.c_proj
        handle = layer.register_forward_hook(
            lambda _, x, y: rows.append(x[0].detach().flatten(0, 1)) or answers.append(y.detach().flatten(0, 1))
        )
        model(i)
        handle.remove()
    x, y = torch.cat(rows).double(), torch.cat(answers).double()
    fit = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    layer = merged.transformer.h[0].mlp.c_proj  # stores its weight (in, out)
    assert torch.allclose(layer.weight.double(), fit[:-1], atol=1e-3)
    assert torch.allclose(layer.bias.double(), fit[-1], atol=1e-3)
    continual = merge(models, "opcm", base=base)
    assert continual.lm_head.weight is continual.transformer.wte.weight
    one = merge(models[:1], "opcm", base=base)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), models[0].parameters(), strict=True))
    state, start = dict(continual.named_parameters()), {n: p.detach() for n, p in base.named_parameters()}
    norms = [
        sum(float((p.detach() - start[n]).square().sum()) for n, p in m.named_parameters()) ** 0.5
        for m in (*models, continual)
    ]
    assert norms[2] == pytest.approx((norms[0] + norms[1]) / 2, rel=1e-4)
    assert state.keys() == start.keys()


def test_merge_errors() -> None:
    models = [mlp(seed=s) for s in (1, 2)]
    for arguments, words in (
        (dict(recipe="opmc"), "did you mean opcm"),
        (dict(recipe="opcm"), "needs base="),
        (dict(base=models[0]), "takes no base"),
        (dict(recipe="gram"), "needs data="),
        (dict(data=[[]]), "takes no data"),
        (dict(share=0.2), "has no use for share"),
        (dict(off_diagonal=0.5), "has no use for off_diagonal"),
        (dict(recipe="gram", data=[[torch.zeros(2, 10).double()]]), "1 sets of data for 2 models"),
    ):
        with pytest.raises(GramianError, match=words):
            merge(models, **arguments)
    with pytest.raises(GramianError, match="no models"):
        merge([])
    with pytest.raises(GramianError, match=r"\(24, 10\) in model 0 and \(12, 10\) in model 1"):
        merge([models[0], mlp(12)])
