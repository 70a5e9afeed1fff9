"""The checkpoint contract for any module: exact, atomic, strict."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gramian.errors import GramianError
from gramian.files import atomic_directory
from gramian.models.checkpoint import describe, load_into, save
from gramian.models.swap import linear_shape, linear_weight, replace_linear
from gramian.nn import StructuredLinear
from gramian.ops import BlockLowRank, Dense, KroneckerSum, Operator, Quantized, Skeleton


class Net(nn.Module):
    """A small network with a narrow-able MLP, a tied output and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16)
        self.third = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor([3, 1]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.third(self.second(torch.tanh(self.first(self.embed(ids))))))


IDS = torch.arange(10).reshape(2, 5)


def compressed(seed: int = 0) -> Net:
    model = Net(seed)
    keep = torch.tensor([0, 3, 4, 9, 17])
    replace_linear(model, "first", Dense(model.first.weight[keep]), model.first.bias[keep])
    replace_linear(model, "second", Dense(model.second.weight[:, keep]), model.second.bias)
    replace_linear(model, "third", Skeleton.fit(model.third.weight.detach(), rank=5), None)
    return model


OPERATORS = {
    "skeleton": lambda w: Skeleton.fit(w, rank=3),
    "columns": lambda w: Skeleton.fit(w.mT, rank=3).T,
    "low_rank": lambda w: BlockLowRank.low_rank(w[:, :3].contiguous(), w[:3].contiguous()),
    "blocks": lambda w: BlockLowRank.fit(w, blocks=(2, 2), rank=2),
    "kronecker": lambda w: KroneckerSum.fit(w, **KroneckerSum.sizes(tuple(w.shape), 0.6)[0]),
    "quantized": lambda w: Quantized.fit(w, bits=3, group=8, rotate=True),
    "sum": lambda w: Quantized.fit(w, bits=3, group=8) + Skeleton.fit(w, rank=2),
    "product": lambda w: Skeleton.fit(w, rank=3) @ Quantized.fit(torch.eye(w.shape[1]), bits=8, group=8),
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("layer", ["first", "third"])
def test_round_trip_is_bit_exact(kind: str, layer: str, tmp_path: Path) -> None:
    model = Net()
    op: Operator = OPERATORS[kind](model.get_submodule(layer).weight.detach())
    replace_linear(model, layer, op, model.get_submodule(layer).bias)
    save(model, tmp_path / "a")
    other = Net(seed=1)
    load_into(other, tmp_path / "a")
    assert isinstance(other.get_submodule(layer), StructuredLinear)
    with torch.no_grad():
        assert torch.equal(model(IDS), other(IDS))
    assert describe(other) == describe(model)
    save(other, tmp_path / "b")
    for name in ("model.safetensors", "gramian.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_narrowed_layers_and_tied_tensors(tmp_path: Path) -> None:
    model = compressed()
    save(model, tmp_path / "out", extra={"notes/readme.txt": "grüß", "raw.bin": b"\0\1"})
    description = json.loads((tmp_path / "out/gramian.json").read_text())
    assert set(description["layers"]) == {"first", "second", "third"}  # not the untouched head
    assert description["shared"] == {"head.weight": "embed.weight"}
    assert (tmp_path / "out/notes/readme.txt").read_text("utf-8") == "grüß"
    assert (tmp_path / "out/raw.bin").read_bytes() == b"\0\1"
    other = Net(1)
    load_into(other, tmp_path / "out")
    assert linear_shape(other.first) == (5, 16)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.steps, model.steps)
    assert torch.equal(model(IDS), other(IDS))
    stored = (tmp_path / "out/model.safetensors").stat().st_size
    numbers = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert stored < numbers + 3000  # a header, nothing twice


def test_a_used_layer_forgets_its_fast_form_when_loaded_into(tmp_path: Path) -> None:
    model = compressed()
    save(model, tmp_path / "out")
    other = compressed(seed=5)
    with torch.no_grad():
        assert not torch.equal(other(IDS), model(IDS))  # fills the caches
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(IDS), model(IDS))
        third = compressed(seed=6)
        third(IDS)
        load_into(third, tmp_path / "out")
        assert torch.equal(third(IDS), model(IDS))
        third.load_state_dict(compressed(seed=5).state_dict(), assign=True)
        assert torch.equal(third(IDS), compressed(seed=5)(IDS))


def test_replace_keeps_mode_dtype_and_frozenness() -> None:
    model = Net().double().eval()
    model.third.weight.requires_grad_(False)
    layer = replace_linear(model, "third", Skeleton.fit(model.third.weight, rank=2).to(dtype=torch.float32), None)
    assert layer is model.third
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in layer.parameters())
    replace_linear(model, "third", Dense(torch.ones(16, 16, dtype=torch.float64)), None)
    assert type(model.third) is nn.Linear
    assert "third" not in describe(model)
    assert not model.third.weight.requires_grad


def test_replace_copies_the_operator() -> None:
    model = Net()
    op = Skeleton.fit(model.third.weight.detach(), rank=2)
    before = op.dense().clone()
    replace_linear(model, "third", op, None)
    with torch.no_grad():
        for p in model.third.parameters():
            p.add_(1)
    assert torch.equal(op.dense(), before)


def test_a_module_used_at_two_places_stays_one(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.Tanh(), shared)

    model = build()
    replace_linear(model, "2", Skeleton.fit(model[0].weight.detach(), rank=2), model[0].bias)
    assert model[0] is model[2]
    save(model, tmp_path / "out")
    other = build()
    load_into(other, tmp_path / "out")
    assert other[0] is other[2]
    x = torch.randn(3, 8)
    assert torch.equal(model(x), other(x))


def test_encoder_layers_of_torch_run_their_changed_layers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()

    model, x = build(), torch.randn(2, 3, 16)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    w = model.layers[1].linear1.weight.detach()
    replace_linear(model, "layers.1.linear1", Skeleton.fit(w, rank=16), model.layers[1].linear1.bias)
    save(model, tmp_path / "out")
    other = build()
    load_into(other, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(other(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask))


def test_linear_weight_of_every_kind() -> None:
    layer = nn.Linear(4, 6)
    weight, bias = linear_weight(layer)
    assert weight is layer.weight
    assert bias is layer.bias
    structured = StructuredLinear(Skeleton.fit(layer.weight.detach(), rank=4))
    torch.testing.assert_close(linear_weight(structured)[0], layer.weight)
    assert linear_weight(structured)[1] is None
    with pytest.raises(GramianError, match="Embedding"):
        linear_weight(nn.Embedding(3, 4))


@pytest.mark.parametrize(
    ("name", "op", "bias", "message"),
    [
        ("thirdd", Dense(torch.ones(16, 16)), None, r"no layer 'thirdd' in Net \(did you mean third"),
        ("embed", Dense(torch.ones(16, 16)), None, "layer 'embed' is a Embedding"),
        ("third", Dense(torch.ones(16, 17)), None, r"'third': shape \(16, 17\); expected at most \(16, 16\)"),
        ("first", Dense(torch.ones(24, 16)), torch.ones(3), r"'first': bias \(3,\); expected \(24,\)"),
        ("third", Dense(torch.ones(16, 16)), torch.ones(16), "its bias was added"),
        ("first", Dense(torch.ones(24, 16)), None, "its bias was removed"),
    ],
)
def test_replace_refuses(name: str, op: Operator, bias: torch.Tensor | None, message: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GramianError, match=message):
        replace_linear(model, name, op, bias)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def _edit(folder: Path, change: str) -> None:
    """Damage a checkpoint in one way."""
    from safetensors.torch import load_file, save_file

    weights, text = folder / "model.safetensors", folder / "gramian.json"
    description = json.loads(text.read_text())
    tensors = load_file(weights)
    layer = description["layers"]["third"]
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif change == "no weights":
        weights.unlink()
    elif change == "no description":
        text.unlink()
    elif change == "half a description":
        text.write_text(text.read_text()[:100])
    elif change == "a list":
        text.write_text("[]")
    elif change == "newer":
        description |= {"schema": 2, "gramian_version": "9.9"}
    elif change == "unknown kind":
        layer["kind"] = "skeletom"
    elif change == "unknown layer":
        description["layers"]["thrid"] = description["layers"].pop("third")
    elif change == "no shape":
        del layer["shape"]
    elif change == "text for a number":
        layer["factors"]["basis"][1] = "five"
    elif change == "other rank":
        layer["factors"]["basis"][1] = 6
    elif change == "other shape":
        layer["shape"] = [16, 15]
    elif change == "too large":
        description["layers"]["first"]["shape"] = [64, 16]
    elif change == "bias":
        layer["bias"] = 1
    elif change == "unknown dtype":
        layer["factors"]["basis"][0] = "float17"
    elif change == "not listed":
        del description["layers"]["third"]
    elif change == "missing tensor":
        del tensors["third.basis.weight"]
    elif change == "surplus tensor":
        tensors["third.extra"] = torch.ones(1)
    elif change == "wrong shape":
        tensors["second.weight"] = torch.ones(16, 6)
    elif change == "wrong dtype":
        tensors["third.order.weight"] = tensors["third.order.weight"].float()
    elif change == "nan":
        tensors["third.coefficients.weight"][0, 0] = float("nan")
    elif change == "shared":
        description["shared"]["head.weight"] = "embedd.weight"
    if change in ("missing tensor", "surplus tensor", "wrong shape", "wrong dtype", "nan"):
        save_file(tensors, weights)
    elif text.exists() and change not in ("half a description", "a list"):
        text.write_text(json.dumps(description))


DAMAGE = {
    "truncated": r"model\.safetensors is missing or damaged",
    "no weights": r"model\.safetensors is missing or damaged",
    "no description": r"gramian\.json cannot be read .*expected a gramian checkpoint",
    "half a description": r"gramian\.json is damaged",
    "a list": r"gramian\.json: the description is damaged",
    "newer": r"schema 2, written by gramian 9\.9.*pip install -U gramian",
    "unknown kind": r"layer 'third': unknown structure 'skeletom' \(did you mean skeleton",
    "unknown layer": r"no layer 'thrid' in Net \(did you mean third",
    "no shape": r"layer 'third': the description lacks 'shape'",
    "text for a number": r"layer 'third': the description is damaged",
    "other rank": r"layer 'third': skeleton: found",
    "other shape": r"layer 'third': skeleton: factors give shape",
    "too large": r"layer 'first': shape \(64, 16\); expected at most \(24, 16\)",
    "bias": r"layer 'third': the description is damaged \(bias 1",
    "unknown dtype": r"layer 'third': .*float17",
    "not listed": r"tensor 'third\.weight' is \(0,\)",
    "missing tensor": r"model\.safetensors: tensor 'third\.basis\.weight' of layer 'third\.basis' is missing",
    "surplus tensor": r"model\.safetensors: surplus tensor 'third\.extra'",
    "wrong shape": r"tensor 'second\.weight' is \(16, 6\).*expected \(16, 5\)",
    "wrong dtype": r"tensor 'third\.order\.weight' is \(16,\) torch\.float32.*expected \(16,\) torch\.int32",
    "nan": r"third\.coefficients\.weight' holds NaN",
    "shared": r"tensor 'embedd\.weight' of layer 'head' is missing",
}


@pytest.mark.parametrize("change", DAMAGE)
def test_damage_is_a_one_line_error_and_changes_nothing(change: str, tmp_path: Path) -> None:
    save(compressed(), tmp_path / "out")
    _edit(tmp_path / "out", change)
    other = Net(1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(GramianError, match=DAMAGE[change]) as caught:
        load_into(other, tmp_path / "out")
    assert "\n" not in str(caught.value)
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("length", [0, 7, 8, 60, 2000])
def test_weights_cut_anywhere_are_refused(length: int, tmp_path: Path) -> None:
    save(compressed(), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(GramianError, match="missing or damaged"):
        load_into(Net(), tmp_path / "out")


def test_nan_is_not_saved(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.second.bias[3] = float("nan")
    with pytest.raises(GramianError, match=r"'second\.bias' holds NaN"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_views_of_a_larger_storage_are_saved_alone(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            big = torch.arange(10_000.0)
            self.register_buffer("part", big[10:20])
            self.register_buffer("matrix", big.view(100, 100))
            self.register_buffer("turned", big.view(100, 100).T)
            self.register_buffer("flat", big)

    save(Views(), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_size < 3 * 40_000 + 1000
    other = Views()
    for tensor in other.buffers():
        tensor.zero_()
    other.turned = other.turned.clone()
    other.part, other.flat = other.part.clone(), other.flat.clone()
    load_into(other, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), Views().buffers(), strict=True))


def test_a_mask_of_infinities_is_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    save(model, tmp_path / "out")
    other = nn.Linear(2, 2)
    other.register_buffer("mask", torch.zeros(2))
    load_into(other, tmp_path / "out")
    assert torch.equal(other.mask, model.mask)


def test_atomic_directory(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
        assert partial.parent == target.parent  # the same file system, so the rename is one step
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    with pytest.raises(GramianError, match="not an empty directory"), atomic_directory(target):
        pytest.fail("entered")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(GramianError, match="not an empty directory"), atomic_directory(file):
        pytest.fail("entered")
    empty = tmp_path / "empty"
    empty.mkdir()
    with atomic_directory(empty) as partial:
        (partial / "b").touch()
    assert (empty / "b").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("bad")])
def test_an_error_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(GramianError if isinstance(error, OSError) else type(error)) as caught:
        write()
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)


def test_a_directory_that_fills_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "a").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(GramianError, match="cannot be written"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_killed_writer_leaves_no_checkpoint(tmp_path: Path) -> None:
    code = f"""
import os, signal
from gramian.files import atomic_directory
with atomic_directory({str(tmp_path / "out")!r}) as partial:
    (partial / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with atomic_directory(tmp_path / "out") as partial:  # what the dead writer left is not in the way
        (partial / "a").touch()
    assert (tmp_path / "out" / "a").exists()
