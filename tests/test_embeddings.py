"""Embeddings: the layer, its Grams, its place in a plan, and every way in and out of a file."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian
from gramian.compression import Entry, Layer, Plan, make_plan
from gramian.compression.options import build_single, embedding_curve
from gramian.errors import GramianError
from gramian.grams import EmbeddingGrams, Gram, Grams
from gramian.models.api import planning_layers
from gramian.models.checkpoint import describe, load_into, save
from gramian.models.heal import Healing, heal
from gramian.models.huggingface import restore_dense, save_huggingface
from gramian.models.job import Job, Settings
from gramian.models.swap import replace_embedding
from gramian.models.walk import find_layers
from gramian.models.workload import Workload, all_features, text_workload
from gramian.nn import StructuredEmbedding, StructuredLinear, as_embedding
from gramian.ops import BlockLowRank, Dense, Quantized, Skeleton

WORDS = "embeddings.word_embeddings"


def table(rows: int = 50, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def low_rank(weight: Tensor, rank: int = 5) -> BlockLowRank:
    return BlockLowRank.fit(weight, rank=rank)


MAKERS = {
    "low_rank": low_rank,
    "quantized": lambda w: Quantized.fit(w, bits=4, group=8),
    "unrotated": lambda w: Quantized.fit(w, bits=3, group=8, rotate=False),
    "skeleton": lambda w: Skeleton.fit(w, rank=5),  # has no form of its own: made dense
    "monarch": lambda w: BlockLowRank.fit(w, rank=2, blocks=(2, 2)),
}


# The layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_looks_up_the_rows_of_its_matrix(kind: str, shape: tuple[int, ...]) -> None:
    op = MAKERS[kind](table())
    layer = StructuredEmbedding(op, padding_idx=-1)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (50, 16, 49)
    assert layer.weight.shape == (0,)
    ids = torch.randint(0, 50, shape)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(ids), op.dense()[ids].float(), rtol=1e-5, atol=1e-6)
    plain = layer.to_embedding()
    assert plain.padding_idx == 49
    torch.testing.assert_close(plain.weight.detach(), op.dense(), rtol=1e-5, atol=1e-6)  # the padding row too


@pytest.mark.parametrize("kind", ["low_rank", "monarch"])
def test_gradients_are_those_of_the_matrix_and_skip_the_padding(kind: str) -> None:
    op = MAKERS[kind](table()).to(dtype=torch.float64)
    layer = StructuredEmbedding(op, padding_idx=3)
    ids = torch.tensor([[3, 1, 4], [1, 3, 49]])
    probe = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (layer(ids) * probe).sum().backward()
    factors = {name: value.clone().requires_grad_() for name, value in op.factors().items()}
    looked_up = op.replace(**factors).dense()[ids] * (ids != 3)[..., None]
    (looked_up * probe).sum().backward()
    for name, factor in factors.items():
        found = layer.get_submodule(name).weight.grad
        torch.testing.assert_close(found.reshape(factor.shape), factor.grad)
    assert factors["left"].grad.abs().sum() > 0


def test_a_quantized_table_decodes_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = StructuredEmbedding(Quantized.fit(table(), bits=4, group=8))
    decoded: list[int] = []
    whole = Quantized.dense
    monkeypatch.setattr(Quantized, "dense", lambda self: decoded.append(self.shape[0]) or whole(self))
    layer(torch.tensor([[1, 2, 1]]))
    assert decoded == [3]


def test_a_materialised_table_follows_its_factors() -> None:
    layer = StructuredEmbedding(Skeleton.fit(table(), rank=5)).eval()
    ids = torch.arange(50)
    with torch.no_grad():
        first = layer(ids)
        assert layer._kept._made is not None
        layer.basis.weight.mul_(2)
        torch.testing.assert_close(layer(ids), 2 * first)


def test_bad_input_is_named() -> None:
    layer = StructuredEmbedding(MAKERS["quantized"](table()))
    for ids in ([50], [-1]):
        with pytest.raises(IndexError):
            layer(torch.tensor(ids))
        with pytest.raises(IndexError):
            StructuredEmbedding(low_rank(table()))(torch.tensor(ids))
    with pytest.raises(GramianError, match="padding_idx 50; expected a row of 50"):
        StructuredEmbedding(low_rank(table()), 50)
    with pytest.raises(GramianError, match="as_embedding"):
        StructuredEmbedding(Dense(table()))


def test_dense_tables_become_plain_embeddings() -> None:
    layer = as_embedding(Dense(table()), 2)
    assert type(layer) is nn.Embedding
    assert layer.padding_idx == 2
    assert torch.equal(layer.weight, table())
    assert layer.weight.requires_grad


@pytest.mark.parametrize("kind", MAKERS)
def test_copies_and_an_empty_layer_from_the_description(kind: str) -> None:
    layer = StructuredEmbedding(MAKERS[kind](table()), 1)
    ids = torch.arange(50)
    config = json.loads(json.dumps(layer.config()))
    empty = StructuredEmbedding.from_config(config, padding_idx=1, dtype=torch.float32).to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty):
        assert torch.equal(other(ids), layer(ids))
        assert other.padding_idx == 1
    assert not [m for m in layer.modules() if isinstance(m, nn.Linear | nn.Embedding)]  # nothing that adapters may wrap
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_compiles() -> None:
    for kind in ("low_rank", "quantized"):
        layer = StructuredEmbedding(MAKERS[kind](table()), 0).eval()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        ids = torch.tensor([[0, 5], [7, 9]])
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), layer(ids))


# Grams ---------------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """A table looked up once or twice and changed in place before use."""

    def __init__(self, twice: bool = False, padding_idx: int | None = 0) -> None:
        super().__init__()
        self.words = nn.Embedding(90, 8, padding_idx=padding_idx)
        self.out = nn.Linear(8, 6)
        self.twice = twice

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x += 0.1
        if self.twice:
            x = x + 2 * self.words(ids)
        return self.out(torch.tanh(x)).mean(1)


def masked(batches: list[Tensor], masks: list[Tensor | None]) -> Workload:
    known = {id(batch): mask for batch, mask in zip(batches, masks, strict=True)}
    work = gramian.models.api.as_workload(nn.Identity(), batches)
    work.mask = lambda batch: known[id(batch)]
    return work


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_counts_and_gradients_of_real_tokens(twice: bool, with_mask: bool) -> None:
    torch.manual_seed(0)
    model = Bag(twice)
    ids = [torch.randint(1, 90, (4, 5)), torch.randint(1, 90, (3, 6))]
    for batch in ids:
        batch[:, -2:] = 0  # padding
    masks = [batch > 1 for batch in ids] if with_mask else [None, None]
    grams = gramian.collect(model, masked(ids, masks), embeddings=True, exclude=["out"])
    seen = grams["words"]
    assert isinstance(seen, EmbeddingGrams)

    times = 2 if twice else 1
    counts, gradient = torch.zeros(90, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    for place, (batch, mask) in enumerate(zip(ids, masks, strict=True)):
        generator = torch.Generator().manual_seed(place)
        real = (batch > 0) & (torch.ones_like(batch, dtype=torch.bool) if mask is None else mask)
        counts += times * torch.bincount(batch[real], minlength=90)
        looked_up = [model.words(batch).detach().requires_grad_() for _ in range(times)]
        x = looked_up[0] + 0.1
        x = x + 2 * looked_up[1] if twice else x
        features = model.out(torch.tanh(x)).mean(1)
        (features * torch.randn(features.shape, generator=generator)).sum().backward()
        for leaf in looked_up:
            g = leaf.grad[real].double()
            gradient += g.mT @ g
    assert torch.equal(seen.input.second, counts)
    assert seen.tokens == counts.sum()
    assert seen.sequences == 7  # a table used twice saw each sequence once
    torch.testing.assert_close(seen.gradient, gradient, rtol=1e-5, atol=1e-9)
    assert all(p.requires_grad and p.grad is None for p in (model.words.weight,))


def test_frequencies_spare_words_that_calibration_never_showed() -> None:
    counter = Gram(5, "diagonal")
    counts = torch.tensor([6.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    counter.add(counts, counts, 10.0)
    found = EmbeddingGrams(counter, None, 4).frequencies()
    assert float(found.sum()) == pytest.approx(10 / 4)  # as many tokens a sequence as were counted
    assert float(found[4]) > 0
    assert (found[:-1] >= found[1:]).all()


@pytest.mark.parametrize("objective", ["auto", "none"])
def test_shards_merge_and_files_hold_all(objective: str) -> None:
    torch.manual_seed(0)
    model = Bag()
    batches = [torch.randint(0, 90, (4, 5)) for _ in range(3)]

    def gather(part: list[Tensor], **more: Any) -> Grams:
        return gramian.collect(model, part, embeddings=True, include=["words"], objective=objective, **more)

    first, second = gather(batches[:1]), gather(batches[1:])
    both = gather(batches[:1])
    both.merge(second)
    assert both["words"].sequences == 12
    assert torch.equal(both["words"].input.second, first["words"].input.second + second["words"].input.second)
    if objective == "none":
        assert both["words"].gradient is None
    else:
        assert torch.equal(both["words"].gradient, first["words"].gradient + second["words"].gradient)
    back = Grams.from_state(both.state(), json.loads(json.dumps(both.describe())))
    assert isinstance(back["words"], EmbeddingGrams)
    assert torch.equal(back["words"].frequencies(), both["words"].frequencies())
    assert set(back.state()) == set(both.state())


# The plan ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grams(encoder: nn.Module, tokenizer: object, texts: list[str]) -> Grams:
    return gramian.collect(encoder, texts[:40], tokenizer=tokenizer, embeddings=True)


def reference_error(layer: Layer, approximation: Tensor) -> float:
    """1/2 sum_v f_v D_v G D_v^T, row by row in float64."""
    assert isinstance(layer.grams, EmbeddingGrams)
    frequency, g = layer.grams.frequencies(), layer.grams.gram_gradient()
    assert g is not None
    d = (layer.weight - approximation).double()
    return 0.5 * sum(float(f * (row @ g @ row)) for f, row in zip(frequency, d, strict=True))


def test_low_rank_is_the_two_sided_optimum(encoder: nn.Module, grams: Grams) -> None:
    layer = planning_layers(encoder, grams)[WORDS]
    assert layer.embedding
    curve = {c.size["rank"]: c.error for c in embedding_curve(layer, ["skeleton"], "params") if c.size}
    built = build_single(layer, "block_low_rank", {"rank": 16, "blocks": [1, 1]})
    op = built.layers[WORDS][0]
    error = reference_error(layer, op.dense())
    assert built.error[WORDS] == pytest.approx(error, rel=1e-7)
    assert curve[16] == pytest.approx(error, rel=1e-4)
    # Whiten both sides by hand: Eckart and Young say what no other matrix of rank 16 can beat.
    g, f = layer.gram_in, layer.gram_out
    values, vectors = torch.linalg.eigh(g)
    root = (vectors * values.sqrt()) @ vectors.mT
    tail = torch.linalg.svdvals(f.sqrt()[:, None] * layer.weight.double() @ root)[16:]
    assert error == pytest.approx(0.5 * float(tail.square().sum()), rel=1e-5)
    assert error < 0.8 * reference_error(layer, BlockLowRank.fit(layer.weight, rank=16).dense())


def test_the_plan_weighs_tables_against_layers(encoder: nn.Module, grams: Grams) -> None:
    layers = planning_layers(encoder, grams)
    total = sum(layer.weight.numel() for layer in layers.values())
    chosen = make_plan(layers, grams.joints, keep=0.3)
    entry = next(e for e in chosen.entries if e.layers == [WORDS])
    assert entry.structure == "block_low_rank"
    assert chosen.used <= 0.3 * total
    small = gramian.compress(encoder, chosen, grams=grams)
    words = small.get_submodule(WORDS)
    assert isinstance(words, StructuredEmbedding)
    assert words.op.numel == entry.cost == sum(p.numel() for p in words.parameters())
    # Names restrict tables as they restrict layers; joint methods say nothing about them.
    alone = {WORDS: layers[WORDS]}
    with pytest.raises(GramianError, match="out of reach"):
        make_plan(alone, [], keep=0.5, structures="neurons")
    assert make_plan(alone, [], keep=0.5, structures="block_low_rank").entries[0].structure == "block_low_rank"


def test_bytes_are_saved_by_rounding_and_flops_not_at_all(encoder: nn.Module, grams: Grams) -> None:
    layer = planning_layers(encoder, grams)[WORDS]
    curve = embedding_curve(layer, ["quantized", "skeleton"], "bytes")
    rounded = {c.size["bits"]: c for c in curve if c.structure == "quantized"}
    assert set(rounded) == set(range(2, 9))
    for bits in (3, 6):
        built = build_single(layer, "quantized", {"bits": bits})
        op = built.layers[WORDS][0]
        assert op.nbytes == rounded[bits].cost.bytes
        assert op.numel >= rounded[bits].cost.params
        assert built.error[WORDS] == pytest.approx(reference_error(layer, op.dense()), rel=1e-9)
        assert 0.2 < built.error[WORDS] / rounded[bits].error < 3
    assert "quantized" not in {c.structure for c in embedding_curve(layer, ["quantized", "skeleton"], "params")}
    assert [c.structure for c in embedding_curve(layer, ["quantized", "skeleton"], "flops")] == ["dense"]
    chosen = make_plan(planning_layers(encoder, grams), grams.joints, keep=0.5, cost="flops")
    assert next(e for e in chosen.entries if e.layers == [WORDS]).structure == "dense"


def test_without_gradients_frequencies_still_count(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    grams = gramian.collect(encoder, texts[:40], tokenizer=tokenizer, embeddings=True, objective="none")
    layer = planning_layers(encoder, grams)[WORDS]
    assert layer.gram_in is None
    assert not layer.comparable
    assert layer.error(torch.zeros_like(layer.weight)) == pytest.approx(1.0)
    chosen = make_plan(planning_layers(encoder, grams), grams.joints, keep=0.5)
    entry = next(e for e in chosen.entries if e.layers == [WORDS])
    assert entry.structure == "block_low_rank"
    assert entry.cost <= 0.5 * layer.weight.numel()  # errors do not compare: each layer has its own share


def test_an_edited_plan_is_checked(encoder: nn.Module, grams: Grams) -> None:
    for structure, size, message in (
        ("skeleton", {"rank": 4}, "cannot be skeleton; expected block_low_rank or quantized"),
        ("block_low_rank", {"rank": 4, "blocks": [2, 2]}, "cannot be block_low_rank"),
        ("block_low_rank", {"rank": 65}, "rank 65; expected 1 to 64"),
    ):
        plan = Plan("params", 0.5, 0, [Entry([WORDS], structure, size, 0, 0.0)])
        with pytest.raises(GramianError, match=message):
            gramian.compress(encoder, plan, grams=grams)


# The model -----------------------------------------------------------------------------------------------------------


def features(model: nn.Module, tokenizer: object, texts: list[str]) -> Tensor:
    return all_features(model, text_workload(tokenizer, texts))


def test_compress_takes_embeddings_only_when_asked(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    plain = gramian.compress(encoder, texts[:20], tokenizer=tokenizer, objective="none")
    assert type(plain.get_submodule(WORDS)) is nn.Embedding
    before = copy.deepcopy(encoder.state_dict())
    small = gramian.compress(encoder, texts[:20], tokenizer=tokenizer, embeddings=True, keep=0.3, heal_steps=2)
    assert isinstance(small.get_submodule(WORDS), StructuredEmbedding)
    assert type(small.embeddings.position_embeddings) is nn.Embedding
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    cosine = torch.cosine_similarity(features(small, tokenizer, texts), features(encoder, tokenizer, texts))
    assert cosine.mean() > 0.9


def test_healing_trains_tables(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    work = text_workload(tokenizer, texts[:20])
    weight = encoder.get_submodule(WORDS).weight.detach()
    pair, rounded = copy.deepcopy(encoder), copy.deepcopy(encoder)
    replace_embedding(pair, WORDS, low_rank(weight, 8))
    start = {key: p.detach().clone() for key, p in pair.named_parameters()}
    assert len(heal(pair, encoder, [WORDS], work, Healing(steps=6, rate=1e-2))) == 6
    moved = [key for key, p in pair.named_parameters() if not torch.equal(p, start[key])]
    assert moved == [f"{WORDS}.left.weight", f"{WORDS}.right.weight"]
    replace_embedding(rounded, WORDS, Quantized.fit(weight, bits=4))
    assert heal(rounded, encoder, [WORDS], work, Healing(steps=3)) == []


def test_healing_recombines_texts_of_a_model_whose_table_is_compressed(
    encoder: nn.Module, tokenizer: object, texts: list[str]
) -> None:
    work = text_workload(tokenizer, texts[:8])
    teacher = copy.deepcopy(encoder)
    replace_embedding(teacher, WORDS, low_rank(encoder.get_submodule(WORDS).weight.detach(), 8))
    student = copy.deepcopy(teacher)
    assert len(heal(student, teacher, ["encoder.layer.0.output.dense"], work, Healing(steps=2))) == 2


def test_what_is_left_alone_and_why() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2 * super().forward(ids)

    model = nn.ModuleDict(
        {
            "tied": nn.Embedding(400, 16),
            "head": nn.Linear(16, 400),
            "scaled": Scaled(400, 16),
            "renormalised": nn.Embedding(400, 16, max_norm=1.0),
            "positions": nn.Embedding(32, 16),
            "excluded": nn.Embedding(400, 16),
            "words": nn.Embedding(400, 16),
            "layer": nn.Linear(80, 80),
        }
    )
    model["head"].weight = model["tied"].weight
    found = find_layers(model, embeddings=True, exclude=["excluded"])
    reasons = {entry["name"]: entry["reason"] for entry in found.left_alone}
    assert list(found.embeddings) == ["words"]
    assert list(found.layers) == ["layer"]
    assert "tied" in reasons["tied"]
    assert reasons["scaled"] == "computes more than a look-up (Scaled)"
    assert reasons["renormalised"] == "computes more than a look-up (renormalises its rows)"
    assert reasons["positions"] == "an embedding of few rows"
    assert reasons["excluded"] == "excluded"
    assert "words" in {entry["name"] for entry in find_layers(model).left_alone}
    # What was compressed once is not taken apart a second time.
    replace_embedding(model, "words", low_rank(model["words"].weight.detach(), 12))
    model["layer"] = StructuredLinear(low_rank(table(80, 80), 60))
    model["other"] = nn.Linear(80, 80)
    again = find_layers(model, embeddings=True)
    assert [*again.layers, *again.embeddings] == ["other", "excluded"]
    names = {entry["name"]: entry["reason"] for entry in again.left_alone}
    assert names["words"] == names["layer"] == "already structured"
    assert not [name for name in names if name.startswith(("words.", "layer."))]


def test_replacing_checks_names_and_shapes(encoder: nn.Module) -> None:
    op = low_rank(encoder.get_submodule(WORDS).weight.detach())
    with pytest.raises(GramianError, match=r"no embedding 'embeddings.word_embedding'.*word_embeddings"):
        replace_embedding(encoder, "embeddings.word_embedding", op)
    with pytest.raises(GramianError, match=r"is a Linear; expected nn\.Embedding"):
        replace_embedding(encoder, "encoder.layer.0.output.dense", op)
    with pytest.raises(GramianError, match=r"shape \(10, 64\); expected"):
        replace_embedding(encoder, WORDS, low_rank(table(10, 64)))
    encoder.requires_grad_(False)
    layer = replace_embedding(encoder.half(), WORDS, op)
    assert layer.padding_idx == 0
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in layer.parameters())


# Files ---------------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[2, 9, 30, 21, 7, 3], [2, 1, 30, 40, 3, 0]])


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).last_hidden_state


def compressed(encoder: nn.Module, kind: str) -> nn.Module:
    small = copy.deepcopy(encoder)
    replace_embedding(small, WORDS, MAKERS[kind](small.get_submodule(WORDS).weight.detach()))
    return small


@pytest.mark.parametrize("kind", ["low_rank", "quantized", "skeleton"])
def test_plain_checkpoints(kind: str, encoder: nn.Module, tmp_path: Path) -> None:
    small = compressed(encoder, kind)
    save(small, tmp_path / "out")
    description = json.loads((tmp_path / "out/gramian.json").read_text())
    assert description["layers"][WORDS]["embedding"] is True
    fresh = copy.deepcopy(encoder)
    for p in fresh.parameters():
        nn.init.normal_(p)
    load_into(fresh, tmp_path / "out")
    assert torch.equal(run(fresh), run(small))
    assert fresh.get_submodule(WORDS).padding_idx == 0
    # A description that says something else than the model has.
    entry = description["layers"].pop(WORDS)
    for wrong, message in (
        ({"encoder.layer.0.output.dense": entry}, "is a Linear; expected nn.Embedding"),
        ({WORDS: {**entry, "embedding": False}}, "expected nn.Linear, Conv1D or StructuredLinear"),
        ({WORDS: {**entry, "shape": [3, 3]}}, "gives shape|give shape"),
    ):
        (tmp_path / "out/gramian.json").write_text(json.dumps({**description, "layers": wrong}))
        with pytest.raises(GramianError, match=message):
            load_into(copy.deepcopy(encoder), tmp_path / "out")


@pytest.mark.parametrize("kind", ["low_rank", "quantized"])
def test_hugging_face_round_trip(kind: str, encoder: nn.Module, tmp_path: Path) -> None:
    import transformers

    small = compressed(encoder, kind)
    save_huggingface(small, tmp_path / "out")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(run(model), run(small))
    assert describe(model) == describe(small)
    task = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(task.bert.embeddings.word_embeddings, StructuredEmbedding)
    task(IDS).logits.sum().backward()
    trained = list(task.bert.embeddings.word_embeddings.parameters())
    assert all(p.grad is not None for p in trained)
    # An output layer that would be tied to the table cannot be.
    with pytest.raises(GramianError, match=r"BertForMaskedLM ties its output layer to bert\.embeddings"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    dense = model.dequantize()
    dense = model if dense is None else dense
    words = dense.get_submodule(WORDS)
    assert type(words) is nn.Embedding
    assert words.padding_idx == 0
    torch.testing.assert_close(run(dense), run(small), rtol=0, atol=1e-5)
    restore_dense(small)
    assert describe(small) == {}
    assert not hasattr(small.get_submodule(WORDS), "gramian_origin")


SENTENCES = ["a class of values", "the table of names"]  # shortest first, as a workload orders them
FRESH = """
import json, sys
import torch
{gramian}
import transformers
from sentence_transformers import SentenceTransformer
path, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
answers = []
try:
    model = transformers.AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        answers.append(model(ids).last_hidden_state.tolist())
except Exception as error:
    answers.append(type(error).__name__)
try:
    answers.append(SentenceTransformer(path, device="cpu").encode(json.loads(sys.argv[3])).tolist())
except Exception as error:
    answers.append(type(error).__name__)
print(json.dumps(answers))
"""


def python(code: str, *arguments: object, home: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not importlib.util.find_spec("sentence_transformers"), reason="needs sentence-transformers")
def test_the_whole_job(encoder_directory: Path, encoder: nn.Module, texts: list[str], tmp_path: Path) -> None:
    """From a sentence-transformers directory and text to one that a fresh process loads, or refuses without gramian."""
    from transformers import AutoModel, AutoTokenizer

    source, data, out = tmp_path / "source", tmp_path / "text.txt", tmp_path / "out"
    shutil.copytree(encoder_directory, source)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    )
    data.write_text("\n\n".join(texts), encoding="utf-8")

    facts = Job(str(source), str(data), out, Settings(embeddings=True)).check()
    rows, width = encoder.get_submodule(WORDS).weight.shape
    assert facts["total"] == rows * width + Job(str(source), str(data), out, Settings()).check()["total"]
    assert WORDS not in {entry["name"] for entry in facts["left_alone"]}

    report = Job(str(source), str(data), out, Settings(embeddings=True, keep=0.3)).run()
    row = next(row for row in report["layers"] if row["name"] == WORDS)
    assert row["structure"] == "block_low_rank"
    assert row["flops_before"] == 0 < row["flops_after"] == 2 * row["size"]["rank"] * width
    assert report["budget"]["used"] <= report["budget"]["asked"]
    assert report["kept"]["layers"] <= 0.3

    loaded = AutoModel.from_pretrained(out)
    stored = sum(p.numel() for p in loaded.parameters())
    indices = sum(b.numel() for name, b in loaded.named_buffers() if name.endswith((".order.weight", ".index.weight")))
    assert report["size"]["model_params_after"] == stored + indices

    given = (json.dumps(IDS.tolist()), json.dumps(SENTENCES))
    states, sentences = python(FRESH.format(gramian="import gramian"), out, *given, home=tmp_path)
    assert torch.equal(torch.tensor(states), run(loaded))
    tokens = AutoTokenizer.from_pretrained(out)
    pooled = text_workload(tokens, SENTENCES).features(loaded, text_workload(tokens, SENTENCES).batches[0])
    found = torch.tensor(sentences)
    torch.testing.assert_close(nn.functional.normalize(found), pooled, rtol=0, atol=1e-6)
    refused = python(FRESH.format(gramian=""), out, *given, home=tmp_path)
    assert all(isinstance(answer, str) for answer in refused), "loaded without gramian"
