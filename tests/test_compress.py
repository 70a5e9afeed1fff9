"""Joint options, plans and the one-call interface."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gramian
from gramian.compression import Entry, Plan, build_entry, count, make_plan
from gramian.errors import GramianError
from gramian.grams import Grams
from gramian.models.api import as_layer, planning_layers
from gramian.models.entries import module_row
from gramian.models.groups import find_groups
from gramian.models.workload import agreement, all_features, text_workload
from gramian.nn import PreparedLinear, StructuredLinear


@pytest.fixture
def grams(encoder: nn.Module, tokenizer: object, texts: list[str]) -> Grams:
    return gramian.collect(encoder, texts[:40], tokenizer=tokenizer)


def features(model: nn.Module, tokenizer: object, texts: list[str]) -> torch.Tensor:
    return all_features(model, text_workload(tokenizer, texts))


def test_groups_are_found_by_trying(grams: Grams) -> None:
    found = {(j.kind, j.layers) for j in grams.joints}
    for i in range(2):
        a = f"encoder.layer.{i}.attention"
        assert ("query_key", (f"{a}.self.query", f"{a}.self.key")) in found
        assert ("value_output", (f"{a}.self.value", f"{a}.output.dense")) in found
        b = f"encoder.layer.{i}"
        assert ("neurons", (f"{b}.intermediate.dense", f"{b}.output.dense")) in found
    assert len(found) == 6


def test_gated_network_and_rotary_attention() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    grams = gramian.collect(model, [batch], objective="none", exclude=["lm_head"])
    found = {j.kind: j.layers for j in grams.joints}
    mlp = "model.layers.0.mlp"
    assert set(found["neurons"][:-1]) == {f"{mlp}.gate_proj", f"{mlp}.up_proj"}
    assert found["neurons"][-1] == f"{mlp}.down_proj"
    assert "query_key" not in found  # a rotation does not commute with rotary embedding: rightly not offered
    assert "value_output" in found


def test_a_norm_between_layers_is_no_neuron_group() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    normed = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64))
    for model, expected in ((plain, 1), (normed, 0)):
        x = torch.randn(4, 64)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        found = find_groups(model, layers, lambda model=model, x=x: model(x), {n: n for n in layers})
        assert len(found) == expected


def test_a_bottleneck_too_narrow_for_joint_sizes_is_planned_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 512))
    data = [torch.randn(64, 512)]
    grams = gramian.collect(model, data)
    assert [joint.kind for joint in grams.joints] == ["neurons"]
    chosen = gramian.plan(model, grams, keep=0.5)
    assert chosen.used <= chosen.budget
    assert sorted(name for entry in chosen.entries for name in entry.layers) == ["0", "2"]


@pytest.mark.parametrize(
    ("structure", "place", "size"),
    [
        ("neurons", ("intermediate.dense", "output.dense"), {"width": 128}),
        ("query_key", ("attention.self.query", "attention.self.key"), {"dimensions": 64}),
        ("value_output", ("attention.self.value", "attention.output.dense"), {"dimensions": 64}),
        ("skeleton", ("attention.self.query",), {"rank": 64}),
    ],
)
def test_full_size_changes_nothing(
    structure: str, place: tuple, size: dict, encoder: nn.Module, tokenizer: object, texts: list[str], grams: Grams
) -> None:
    names = [f"encoder.layer.0.{p}" for p in place]
    plan = Plan("params", 1.0, 0, [Entry(names, structure, size, 0, 0.0, heads=4)])
    small = gramian.compress(encoder, plan, grams=grams)
    assert (features(small, tokenizer, texts) - features(encoder, tokenizer, texts)).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("structure", "place", "size"),
    [
        ("neurons", ("intermediate.dense", "output.dense"), {"width": 48}),
        ("value_output", ("attention.self.value", "attention.output.dense"), {"dimensions": 32}),
        ("skeleton", ("attention.output.dense",), {"rank": 24}),
    ],
)
def test_the_error_of_what_was_built_is_measured_on_the_data(
    structure: str, place: tuple, size: dict, encoder: nn.Module, tokenizer: object, texts: list[str]
) -> None:
    """The certificate: the weighted error of the last layer equals the mean squared change of its output."""
    grams = gramian.collect(encoder, texts[:40], tokenizer=tokenizer, objective="none")
    for layer in grams.layers.values():  # isotropic output metric: plain squared error
        layer.gradient = torch.eye(len(layer.gradient) if layer.gradient is not None else 1, dtype=torch.float64)
        layer.gradient = None
    layers = planning_layers(encoder, grams)
    names = [f"encoder.layer.0.{p}" for p in place]
    built = build_entry(Entry(names, structure, size, 0, 0.0, heads=4), layers)
    last = names[-1]
    seen: list[torch.Tensor] = []
    work = text_workload(tokenizer, texts[:40])
    small = copy.deepcopy(encoder)
    from gramian.models.api import apply_built

    apply_built(small, built)
    for model in (encoder, small):
        rows = []

        def hook(module: nn.Module, args: tuple, output: torch.Tensor, rows: list = rows) -> None:
            rows.append(output.detach())

        handle = model.get_submodule(last).register_forward_hook(hook)
        with torch.no_grad():
            for batch in work.batches:
                rows_before = len(rows)
                model(**batch)
                rows[rows_before] = rows[rows_before][batch["attention_mask"].bool()]
        handle.remove()
        seen.append(torch.cat(rows).double())
    measured = (seen[0] - seen[1]).square().sum(1).mean()
    scale = seen[0].sub(seen[0].mean(0)).square().sum(1).mean()
    # The planner's Gram is shrunk by 1e-3, so the two agree to about that.
    assert built.error[last] == pytest.approx(float(measured / scale), rel=0.05, abs=2e-3)
    assert float((seen[0] - seen[1]).mean(0).norm() / seen[0].mean(0).norm()) < 1e-3  # the bias keeps the mean


def test_plan_meets_the_budget_and_beats_uniform(encoder: nn.Module, grams: Grams) -> None:
    layers = planning_layers(encoder, grams)
    total = sum(layer.weight.numel() for layer in layers.values())
    for keep in (0.7, 0.4, 0.2):
        best = make_plan(layers, grams.joints, keep=keep)
        even = make_plan(layers, grams.joints, keep=keep, allocation="uniform")
        assert best.used <= keep * total
        assert best.predicted <= even.predicted * (1 + 1e-9)
        exact = sum(count(build_entry(entry, layers)).params for entry in best.entries)
        assert exact == best.used
        assert {n for e in best.entries for n in e.layers} == set(layers)


@pytest.mark.parametrize("cost", ["params", "bytes", "flops"])
def test_costs_are_exact(cost: str, encoder: nn.Module, grams: Grams) -> None:
    layers = planning_layers(encoder, grams)
    plan = make_plan(layers, grams.joints, keep=0.3, cost=cost)
    assert plan.used <= plan.budget
    for entry in plan.entries:
        assert count(build_entry(entry, layers)).of(cost) == entry.cost, entry


def test_other_structures_compete_when_named(encoder: nn.Module, grams: Grams) -> None:
    layers = {n: layer for n, layer in planning_layers(encoder, grams).items() if "layer.0.attention" in n}
    plan = make_plan(layers, [], keep=0.5, structures="block_low_rank,block_sparse,kronecker")
    assert plan.used <= plan.budget
    kinds = {e.structure for e in plan.entries}
    assert kinds <= {"dense", "block_low_rank", "block_sparse", "kronecker"}
    assert len(kinds) > 0


def test_plan_file_round_trip_and_edit(tmp_path: Path, encoder: nn.Module, grams: Grams) -> None:
    plan = gramian.plan(encoder, grams, keep=0.5)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.entries == plan.entries
    edited = json.loads((tmp_path / "plan.json").read_text())
    edited["entries"] = [e for e in edited["entries"] if "layer.0" not in e["layers"][0]]
    edited["entries"].append(
        {"layers": ["encoder.layer.0.attention.self.key"], "structure": "skeleton", "size": {"rank": 3}}
    )
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    small = gramian.compress(encoder, Plan.load(tmp_path / "plan.json"), grams=grams)
    key = small.encoder.layer[0].attention.self.key
    assert isinstance(key, StructuredLinear)
    assert key.op.rank == 3
    assert type(small.encoder.layer[0].attention.self.query) is PreparedLinear


def test_bad_plans(tmp_path: Path, encoder: nn.Module, grams: Grams) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(GramianError, match="plan"):
        Plan.load(path)
    path.write_text("{}")
    with pytest.raises(GramianError, match="not a plan"):
        Plan.load(path)
    path.write_text(
        '{"gramian": "plan", "schema": 1, "cost": "params", "keep": 0.5, "budget": 1, "entries": [{"x": 1}]}'
    )
    with pytest.raises(GramianError, match="entry 0"):
        Plan.load(path)
    name = "encoder.layer.0.attention.self.key"
    for entries, message in (
        ([Entry([name + "s"], "dense", {}, 0, 0)], "did you mean"),
        ([Entry([name], "dense", {}, 0, 0), Entry([name], "dense", {}, 0, 0)], "in two entries"),
        ([Entry([name], "skeleton", {"rank": 65}, 0, 0)], "rank 65"),
        ([Entry([name], "skeletn", {"rank": 5}, 0, 0)], "unknown structure"),
    ):
        with pytest.raises(GramianError, match=message):
            gramian.compress(encoder, Plan("params", 0.5, 1, entries), grams=grams)


def test_bad_arguments(encoder: nn.Module, grams: Grams) -> None:
    with pytest.raises(GramianError, match=r"keep 1\.5"):
        gramian.plan(encoder, grams, keep=1.5)
    with pytest.raises(GramianError, match="unknown cost"):
        gramian.plan(encoder, grams, cost="parameters")
    with pytest.raises(GramianError, match="did you mean"):
        gramian.plan(encoder, grams, structures="skeleton,neurns")
    with pytest.raises(GramianError, match="out of reach"):
        gramian.plan(encoder, grams, keep=1e-4)
    with pytest.raises(GramianError, match="calibration"):
        gramian.compress(encoder, keep=0.5)


def test_one_call_and_healing(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    small = gramian.compress(encoder, texts[:40], keep=0.3, tokenizer=tokenizer)
    healed = gramian.compress(encoder, texts[:40], keep=0.3, tokenizer=tokenizer, heal_steps=30)
    reference = features(encoder, tokenizer, texts)
    plain = agreement(reference, features(small, tokenizer, texts))
    better = agreement(reference, features(healed, tokenizer, texts))
    assert better["relative_error"] <= plain["relative_error"] * (1 + 1e-6)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    stored = {n: m.op.kind for n, m in small.named_modules() if isinstance(m, StructuredLinear)}
    after = {n: m.op.kind for n, m in healed.named_modules() if isinstance(m, StructuredLinear)}
    assert stored == after
    untouched = [n for n, p in encoder.named_parameters() if "LayerNorm" in n or "embeddings" in n]
    for name in untouched:
        assert torch.equal(dict(healed.named_parameters())[name], dict(encoder.named_parameters())[name])


def test_any_module_with_tensors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 8))
    x = torch.randn(256, 80) @ torch.randn(80, 80).tril(-60)
    small = gramian.compress(model, list(x.split(64)), keep=0.4, structures="skeleton")
    kept = sum(m.op.numel if isinstance(m, StructuredLinear) else m.weight.numel() for m in small[::2])
    assert kept - small[4].weight.numel() <= 0.4 * (80 * 96 * 2) + 1
    error = (small(x) - model(x)).norm() / (model(x) - model(x).mean(0)).norm()
    assert error < 0.2


def test_gradient_free_plan_is_uniform(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    grams = gramian.collect(encoder, texts[:20], tokenizer=tokenizer, objective="none")
    plan = gramian.plan(encoder, grams, keep=0.5)
    layers = planning_layers(encoder, grams)
    for entry in plan.entries:
        own = sum(layers[n].weight.numel() for n in entry.layers)
        if len(entry.layers) > 1:
            assert entry.cost <= 0.5 * own
    assert plan.used <= plan.budget


def test_bad_choices_are_met_before_any_work(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the model ran")

    encoder.register_forward_pre_hook(work)
    for wrong, said in (
        ({"keep": 5}, "keep 5"),
        ({"structures": "lowrank"}, "lowrank"),
        ({"heal_steps": -3}, "heal_steps -3"),
        (
            {"recipe": "depth", "exclude": ["encoder.layer.1.*"]},
            "recipe depth acts on the model as a whole; leave out exclude",
        ),
        ({"grams": Grams(), "include": ["encoder.*"]}, "leave them out beside grams"),
        ({"plan": Plan("params", 0.5, 1, [Entry(["nowhere"], "dense", {}, 1, 0.0)])}, "no layer 'nowhere'"),
    ):
        with pytest.raises(GramianError, match=said):
            gramian.compress(encoder, texts[:8], tokenizer=tokenizer, **wrong)  # type: ignore[arg-type]


def test_heads_are_left_alone_unless_named(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    pooler = "pooler.dense"
    assert pooler not in gramian.collect(encoder, texts[:8], tokenizer=tokenizer, objective="none")
    both = [pooler, "encoder.layer.0.output.dense"]
    grams = gramian.collect(encoder, texts[:8], tokenizer=tokenizer, include=both)
    with pytest.raises(GramianError, match=f"layer {pooler}: no gradient reached it"):
        gramian.plan(encoder, grams)


def test_rows_of_a_shallower_model_follow_its_blocks(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    small = gramian.compress(encoder, texts[:8], tokenizer=tokenizer, recipe="depth", keep=0.5)
    name, kept = small.gramian_blocks
    assert name == "encoder.layer"
    for place in (0, 1):
        layer = as_layer(f"{name}.{place}.output.dense", encoder.get_submodule(f"{name}.{place}.output.dense"))
        assert module_row(layer, small)["structure"] == ("dense" if place in kept else "removed")
