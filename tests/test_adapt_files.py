"""Adapters on disk: reloaded bit for bit elsewhere, checked against their base, and exchanged with the peft library."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.adapt import Adapted, Adapter, Start, attach, everywhere, import_peft, load
from gramian.errors import GramianError
from gramian.ops import BlockLowRank, Dense
from test_adapt import METHODS, bottleneck, deep, lora, moved, net, run_deep, tiny


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# gramian's own files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_comes_back_bit_for_bit_and_can_train_on(method: str, tmp_path: Path) -> None:
    model, x = net(), torch.randn(4, 16)
    adapted = attach(model, dataclasses.replace(METHODS[method], ramp=3), rank=3, name="mine")
    moved(adapted)
    for _ in range(2):
        adapted.step()
    adapted.scale(0.5)
    adapted.save(tmp_path / "a")
    adapted.save(tmp_path / "again")
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    other = net()
    again = load(other, tmp_path / "a", adapter=METHODS[method])
    assert again.name == "mine"
    assert torch.equal(outputs(other, x), outputs(model, x))
    assert again.numel == adapted.numel
    for handle in (adapted, again):
        optimizer = handle.optimizer(1e-2)
        for _ in range(3):
            handle.model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.step()
    assert torch.equal(outputs(other, x), outputs(model, x))
    again.detach()
    assert torch.equal(outputs(other, x), outputs(net(), x))


CHILD = """
import sys, torch
from torch import nn
from gramian.adapt import load
torch.manual_seed(99)
torch.randn(7)
model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
from safetensors.torch import load_file, save_file
model.load_state_dict(load_file(sys.argv[1] + "/base.safetensors"))
load(model, sys.argv[1] + "/adapter")
with torch.no_grad():
    save_file({"y": model(torch.linspace(-1, 1, 64).view(4, 16))}, sys.argv[1] + "/y.safetensors")
"""


def test_a_random_start_reloads_exactly_in_a_fresh_process(tmp_path: Path) -> None:
    model = net()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    adapted = attach(model, METHODS["pair"], rank=4, seed=17)
    moved(adapted)
    adapted.save(tmp_path / "adapter")
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], check=True, timeout=600)
    found = load_file(tmp_path / "y.safetensors")["y"]
    assert torch.equal(found, outputs(model, torch.linspace(-1, 1, 64).view(4, 16)))
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 2 * 2 * 4 * (24 + 16) * 4 + 2000  # update and start, two layers, float32, and a header


def test_shared_arrays_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    model, x = deep(), torch.randn(3, 8)
    adapted = attach(model, dataclasses.replace(METHODS["lora"], share={"right": everywhere}), rank=2)
    moved(adapted)
    adapted.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert len([key for key in stored if key.endswith("right")]) == 1
    other = deep()
    again = load(other, tmp_path / "a")
    assert again.numel == adapted.numel
    assert len({id(e.update.right.weight) for e in again.edits.values()}) == 1
    with torch.no_grad():
        assert torch.equal(run_deep(other, x), run_deep(model, x))


def saved(tmp_path: Path, **axes: Any) -> tuple[Path, nn.Module]:
    model = net()
    adapted = attach(model, dataclasses.replace(METHODS["pair"], **axes), rank=2)
    moved(adapted)
    adapted.save(tmp_path / "a")
    return tmp_path / "a", adapted.detach()


def test_another_base_is_refused(tmp_path: Path) -> None:
    path, base = saved(tmp_path)
    wrong = copy.deepcopy(base)
    with torch.no_grad():
        wrong[2].weight[3, 4] += 1e-6
    before = [type(m) for m in wrong.modules()]
    with pytest.raises(GramianError, match=r"another base model: 1 of 2 layers differ, first 2 \(other weights\)"):
        load(wrong, path)
    assert [type(m) for m in wrong.modules()] == before
    load(wrong, path, check=False)
    with pytest.raises(GramianError, match=r"first 0 \(dtype bfloat16, not float32\)"):
        load(copy.deepcopy(base).to(torch.bfloat16), path)
    with pytest.raises(GramianError, match=r"a layer '2', which the model lacks"):
        load(nn.Sequential(base[0]), path)
    with pytest.raises(GramianError, match="layer 2 is a ReLU; the adapter is for a linear layer"):
        load(nn.Sequential(base[0], nn.ReLU(), nn.ReLU()), path)
    with pytest.raises(GramianError, match=r"layer 2 \(5 x 24\): update"):
        load(nn.Sequential(base[0], nn.ReLU(), nn.Linear(24, 5)), path, check=False)
    load(base, path)
    with pytest.raises(GramianError, match="has an adapter 'default' already"):
        load(base, path)
    with pytest.raises(GramianError, match="exists and is not an empty directory"):
        attach(net(), METHODS["lora"], rank=2).save(path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((path / "adapter.json").read_text())
    change(found)
    (path / "adapter.json").write_text(json.dumps(found))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    found = load_file(path / "adapter.safetensors")
    change(found)
    save_file({key: value.contiguous() for key, value in found.items()}, path / "adapter.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda p: (p / "adapter.json").unlink(), "cannot be read"),
    "half a description": (lambda p: (p / "adapter.json").write_text("{"), "is damaged"),
    "a list": (lambda p: (p / "adapter.json").write_text("[]"), "found a list"),
    "no layers": (lambda p: edit_json(p, lambda d: d.pop("layers")), "expected 'schema', 'layers'"),
    "newer": (lambda p: edit_json(p, lambda d: d.update(schema=99)), "schema 99.*pip install -U gramian"),
    "unknown structure": (
        lambda p: edit_json(p, lambda d: d["layers"]["0"]["update"].update(kind="block_low_rang")),
        r"layer 0 .*unknown structure 'block_low_rang' \(did you mean block_low_rank",
    ),
    "lacks a setting": (lambda p: edit_json(p, lambda d: d["layers"]["2"].pop("rank")), "layer 2: 'rank' is missing"),
    "wrong setting": (
        lambda p: edit_json(p, lambda d: d["layers"]["2"].update(steps="x")),
        "layer 2: the description is",
    ),
    "trainable unknown": (
        lambda p: edit_json(p, lambda d: d["layers"]["2"].update(trainable=["core"])),
        r"layer 2 .*trainable factors \['core'\]",
    ),
    "no tensors": (lambda p: (p / "adapter.safetensors").unlink(), "missing or damaged"),
    "truncated": (
        lambda p: (p / "adapter.safetensors").write_bytes((p / "adapter.safetensors").read_bytes()[:-40]),
        "missing or damaged",
    ),
    "a tensor less": (lambda p: edit_tensors(p, lambda t: t.pop("0.update.left")), "factor 'left' is missing"),
    "a tensor more": (lambda p: edit_tensors(p, lambda t: t.update({"0.x": torch.zeros(1)})), "surplus tensor '0.x'"),
    "another shape": (
        lambda p: edit_tensors(p, lambda t: t.update({"0.update.left": torch.zeros(1, 24, 3)})),
        r"factor 'left' is \(1, 24, 3\); expected",
    ),
    "NaN": (
        lambda p: edit_tensors(p, lambda t: t["2.start.right"].fill_(float("nan"))),
        r"tensor '2.start.right' \(1, 2, 24\) holds NaN",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named_and_leave_the_model_alone(case: str, tmp_path: Path) -> None:
    path, base = saved(tmp_path)
    damage, message = DAMAGE[case]
    damage(path)
    with pytest.raises(GramianError, match=message):
        load(base, path)
    assert [type(m) for m in base] == [nn.Linear, nn.Tanh, nn.Linear]


def test_a_factor_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    adapted = attach(net(), METHODS["lora"], rank=2)
    with torch.no_grad():
        adapted.edits["2"].update.right.weight[0, 0] = float("nan")
    with pytest.raises(GramianError, match=r"2\.update\.right holds NaN"):
        adapted.save(tmp_path / "a")
    with pytest.raises(GramianError, match=r"2\.lora_A\.weight holds NaN"):
        adapted.export_peft(tmp_path / "b")
    assert not list(tmp_path.iterdir())


# The peft library --------------------------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("method", ["lora", "pair", "singular", "three", "left", "right"])
def test_exports_give_the_same_outputs_in_peft_and_come_back(method: str, tmp_path: Path) -> None:
    model, x = net(96, 80), torch.randn(5, 80)
    ranks = {"0": 3, "2": 5}
    adapted = attach(model, METHODS[method], rank=ranks)
    moved(adapted)
    wanted = outputs(model, x)
    adapted.export_peft(tmp_path / "p")
    theirs = peft.PeftModel.from_pretrained(net(96, 80), tmp_path / "p").eval()
    close(outputs(theirs, x), wanted, 1e-5)
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    double = 2 if adapted.edits["0"].start is not None else 1
    assert {config["r"], *config["rank_pattern"].values()} == {double * rank for rank in ranks.values()}
    back = net(96, 80)
    again = import_peft(back, tmp_path / "p")
    close(outputs(back, x), wanted, 1e-5)
    again.export_peft(tmp_path / "q")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "pq")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "p" / "adapter_config.json").read_bytes() == (
        tmp_path / "q" / "adapter_config.json"
    ).read_bytes()


def test_plain_lora_is_bit_for_bit_the_same_matrices_and_scale_in_peft(tmp_path: Path) -> None:
    model, x = net(64, 48), torch.randn(5, 48)
    adapted = attach(model, METHODS["lora"], rank={"0": 4, "2": 8}, alpha={"0": 5.0, "2": 7.0})
    moved(adapted)
    adapted.export_peft(tmp_path / "p")
    stored = load_file(tmp_path / "p" / "adapter_model.safetensors")
    edit = adapted.edits["0"]
    assert torch.equal(stored["base_model.model.0.lora_A.weight"], edit.update.right.weight)
    assert torch.equal(stored["base_model.model.0.lora_B.weight"], edit.update.left.weight)
    theirs = peft.PeftModel.from_pretrained(net(64, 48), tmp_path / "p")
    assert {n: m.scaling["default"] for n, m in theirs.base_model.model.named_children() if hasattr(m, "scaling")} == {
        "0": 5.0 / 4,
        "2": 7.0 / 8,
    }
    adapted.export_peft(tmp_path / "named", base_model="some/base", task_type="CAUSAL_LM")
    named = peft.PeftConfig.from_pretrained(tmp_path / "named")
    assert (named.base_model_name_or_path, named.task_type, named.peft_type) == ("some/base", "CAUSAL_LM", "LORA")
    close(outputs(theirs, x), outputs(model, x), 1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_hugging_face_models_both_ways(kind: str, tmp_path: Path) -> None:
    model, batch = tiny(kind)
    base = copy.deepcopy(model)
    adapted = attach(model, METHODS["singular"], rank=3)
    moved(adapted, 0.1)
    adapted.export_peft(tmp_path / "p")
    with torch.no_grad():
        wanted = model(**batch).logits
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "p")
        close(theirs(**batch).logits, wanted, 1e-5)
        ours = copy.deepcopy(base)
        handle = import_peft(ours, tmp_path / "p")
        close(ours(**batch).logits, wanted, 1e-5)
        handle.merge()
        close(ours(**batch).logits, wanted, 1e-5)


LORA_FAMILY: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16},
    "odd alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "rank pattern": {"r": 4, "lora_alpha": 16, "rank_pattern": {"2": 7}},
    "both patterns": {"r": 4, "lora_alpha": 16, "rank_pattern": {"^2": 7}, "alpha_pattern": {"0": 3}},
    "rslora with patterns": {
        "r": 4,
        "lora_alpha": 9,
        "use_rslora": True,
        "rank_pattern": {"0": 2},
        "alpha_pattern": {"2": 5},
    },
    "gaussian": {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"},
}


def theirs(options: dict[str, Any], model: nn.Module) -> Any:
    found = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in found.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return found.eval()


@pytest.mark.parametrize("case", LORA_FAMILY)
def test_lora_checkpoints_of_peft_are_imported(case: str, tmp_path: Path) -> None:
    model, x = theirs(LORA_FAMILY[case], net()), torch.randn(5, 16)
    model.save_pretrained(tmp_path / "p")
    ours = net()
    adapted = import_peft(ours, tmp_path / "p")
    close(outputs(ours, x), outputs(model, x), 1e-6)
    assert {n: e.gain for n, e in adapted.edits.items()} == {
        n: m.scaling["default"] for n, m in model.base_model.model.named_children() if hasattr(m, "scaling")
    }
    adapted.detach()
    assert torch.equal(outputs(ours, x), outputs(net(), x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["2"], "target_modules": ["0"]}, r"modules_to_save is \['2'\]"),
        ({"init_lora_weights": "pissa"}, "'pissa': the factors belong to a base that peft rewrote"),
        ({"init_lora_weights": "olora"}, "'olora': the factors belong"),
    ],
)
def test_what_is_more_than_two_factors_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **options})
    peft.get_peft_model(net(), config).save_pretrained(tmp_path / "p")
    with pytest.raises(GramianError, match=message):
        import_peft(net(), tmp_path / "p")


def test_damaged_and_foreign_peft_files(tmp_path: Path) -> None:
    peft.get_peft_model(net(), peft.IA3Config(target_modules=["0"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(GramianError, match="peft_type 'IA3'"):
        import_peft(net(), tmp_path / "ia3")
    with pytest.raises(GramianError, match="cannot be read"):
        import_peft(net(), tmp_path / "none")
    theirs({"r": 2}, net()).save_pretrained(tmp_path / "p")
    with pytest.raises(GramianError, match=r"layer 0 \(9 x 16\): lora_B \(24, 2\)"):
        import_peft(net(9, 16), tmp_path / "p")
    with pytest.raises(GramianError, match="a layer '2', which the model lacks"):
        import_peft(net()[:1], tmp_path / "p")
    file = tmp_path / "p" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.2.extra": torch.zeros(1)}, file)
    with pytest.raises(GramianError, match=r"tensor 'base_model\.model\.2\.extra'"):
        import_peft(net(), tmp_path / "p")
    save_file({k: v for k, v in tensors.items() if "2.lora_B" not in k}, file)
    with pytest.raises(GramianError, match="layer 2 has only lora_A"):
        import_peft(net(), tmp_path / "p")
    save_file({**tensors, "base_model.model.0.lora_A.weight": torch.zeros(3, 16)}, file)
    with pytest.raises(GramianError, match="expected"):
        import_peft(net(), tmp_path / "p")


def test_what_lora_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    full: Adapted = attach(net(), Adapter(lambda w, c: Dense(torch.zeros(c.shape))), rank=2)
    moved(full)
    with pytest.raises(GramianError, match=r"layer 0 \(24 x 16\): the change has rank 16"):
        full.export_peft(tmp_path / "p")
    insert = attach(net(), Adapter(bottleneck, combine="insert", activation="relu"), rank=2)
    with pytest.raises(GramianError, match="layer 0: an edit that combines by 'insert' is no matrix"):
        insert.export_peft(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(16, 16)
            self.block = nn.ModuleDict({"fc": nn.Linear(16, 16)})

        def forward(self, x: Tensor) -> Tensor:
            return self.block["fc"](torch.relu(self.fc(x)))

    model, x = Model(), torch.randn(3, 16)
    everything = attach(model, METHODS["lora"], rank={"fc": 2, "block.fc": 3}, alpha={"fc": 4.0, "block.fc": 5.0})
    assert {n: e.rank for n, e in everything.edits.items()} == {"fc": 2, "block.fc": 3}
    moved(everything)
    everything.export_peft(tmp_path / "both")
    close(outputs(peft.PeftModel.from_pretrained(Model(), tmp_path / "both"), x), outputs(model, x), 1e-5)
    everything.detach()
    first = attach(model, Adapter(lora), include=["fc"], exclude=["block.*"], rank=2)
    moved(first)
    first.export_peft(tmp_path / "one")
    other = peft.PeftModel.from_pretrained(Model(), tmp_path / "one")
    assert isinstance(other.base_model.model.block["fc"], nn.Linear)
    close(outputs(other, x), outputs(model, x), 1e-5)


def test_half_precision_factors_are_imported_in_float32(tmp_path: Path) -> None:
    def half(weight: Tensor, context: Any) -> Start:
        return Start(BlockLowRank.low_rank(torch.randn(context.shape[0], 2), torch.randn(2, context.shape[1])))

    adapted = attach(net(), Adapter(half), rank=2, dtype=torch.bfloat16)
    adapted.export_peft(tmp_path / "p")
    again = import_peft(net(), tmp_path / "p")
    assert {p.dtype for p in again.trainable_parameters()} == {torch.float32}
    assert torch.equal(again.delta("0").dense(), adapted.edits["0"].update.op.to(dtype=torch.float32).dense())
