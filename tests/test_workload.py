"""What counts as a model's output, and recombined texts: what healing trains on beside the texts themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gramian
from gramian.errors import GramianError
from gramian.models.api import as_workload
from gramian.models.data import read_corpus
from gramian.models.loading import Loaded, load_model
from gramian.models.workload import LONGEST, Neighbours, Workload, recombine, text_workload

transformers = pytest.importorskip("transformers")

FIRST, LAST, PAD = 1, 2, 0


def batch(lengths: list[int], side: str) -> dict[str, Tensor]:
    """Sequences FIRST, own tokens, LAST; row i uses tokens 100 i + 3 and on."""
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for i, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, place] = torch.tensor([FIRST, *range(100 * i + 3, 100 * i + n + 1), LAST])
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_recombined_sequences_are_windows_of_the_texts(side: str) -> None:
    lengths = [5, 40, 90, 96]
    seen = set()
    for seed in range(40):
        made = recombine(batch(lengths, side), torch.Generator().manual_seed(seed), None)
        assert {value.shape for value in made.values()} == {(4, LONGEST)}
        for i, n in enumerate(lengths):
            mask = made["attention_mask"][i].bool()
            real = made["input_ids"][i][mask]
            assert len(real) == min(n, LONGEST)
            assert mask[0 if side == "right" else -1]
            assert [real[0], real[-1]] == [FIRST, LAST]
            inside = real[1:-1]
            own = inside[(inside >= 100 * i + 3) & (inside < 100 * (i + 1))]
            seen.update(own.tolist())
            assert (inside >= 3).all()
    third = [token for token in seen if 200 < token < 300]
    assert min(third) < 210, "windows reach the beginning of a long text"
    assert max(third) > 283, "and its end"


def test_neighbours_replace_some_tokens_inside() -> None:
    table = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    words = torch.arange(3, 400)
    one = batch([30], "right")
    made = recombine(one, torch.Generator().manual_seed(1), Neighbours(table, words))["input_ids"][0]
    before = one["input_ids"][0]
    changed = made != before
    assert 0 < changed.sum() < 20
    assert not changed[[0, -1]].any()
    unit = torch.nn.functional.normalize(table, dim=1)
    for old, new in zip(before[changed].tolist(), made[changed].tolist(), strict=True):
        cosine = unit[words] @ unit[old]
        cosine[words == old] = -2
        assert new in words[cosine.topk(12).indices].tolist()


@pytest.mark.parametrize(
    ("lengths", "telling"),
    [
        ([[2, 3, 20, 21], [30, 31]], (0, slice(2, 4))),
        ([[2, 3], [4, 17, 18]], (1, slice(1, 3))),
        ([[2, 3, 4], [5, 6]], (1, slice(0, 2))),
        ([[9]], (0, slice(0, 2))),
    ],
)
def test_the_sequences_that_tell_are_long_ones(lengths: list[list[int]], telling: tuple[int, slice]) -> None:
    def none(*_: object) -> Tensor:
        raise AssertionError("no model runs")

    batches = [batch(part, "right") for part in lengths]
    work = Workload(batches, none, none, lambda one: one["attention_mask"], lambda *_: [])
    assert work.telling(2) == telling
    place, which = telling
    assert torch.equal(work.sample(2)["input_ids"], batches[place]["input_ids"][which])


def test_a_classifier_is_judged_by_its_logits(tokenizer: Any, texts: list[str]) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    work = as_workload(model, texts[:6], tokenizer)
    with torch.no_grad():
        wanted = model(**work.batches[0]).logits
        assert torch.equal(work.features(model, work.batches[0]), wanted)
        assert torch.equal(work.outputs(model, work.batches[0])[0], wanted)
    assert work.name == "cosine of logits"
    assert len(gramian.collect(model, texts[:6], tokenizer=tokenizer)) > 5
    model.config.pad_token_id = None
    assert as_workload(model, texts[:3], tokenizer).sizes() == [1, 1, 1]


def test_encoder_decoders_are_refused(encoder_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder_directory, tmp_path / "t5")
    config = transformers.T5Config(vocab_size=500, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(GramianError, match="T5ForConditionalGeneration has an encoder and a decoder; expected"):
        load_model(str(tmp_path / "t5"), None)


def test_padding_and_losses_of_mappings_do_not_count(
    encoder: torch.nn.Module, tokenizer: Any, texts: list[str]
) -> None:
    one = tokenizer(texts[:4], padding=True, return_tensors="pt")
    real = int(one["attention_mask"].sum())
    assert real < one["attention_mask"].numel()
    grams = gramian.collect(encoder, [one], include=["encoder.*"])
    assert {layer.tokens for layer in grams.layers.values()} == {real}
    work = as_workload(encoder, [one])
    longer = as_workload(encoder, [tokenizer(texts[:4], padding="max_length", max_length=200, return_tensors="pt")])
    features = [w.features(encoder, w.batches[0]).detach() for w in (work, longer)]
    torch.testing.assert_close(features[1][:, : features[0].shape[1]], features[0], rtol=1e-4, atol=1e-5)
    assert not features[1][:, features[0].shape[1] :].any()
    model = transformers.BertForSequenceClassification(encoder.config)
    labelled = {"labels": torch.tensor([0, 1, 0, 1]), **one}
    assert len(gramian.collect(model, [labelled])) > 10


@pytest.mark.parametrize("kind", ["Tensor", "BatchEncoding", "dict"])
def test_one_batch_is_not_a_list_of_batches(tokenizer: Any, kind: str) -> None:
    encoding = tokenizer(["one text", "two texts"], return_tensors="pt")
    data = {"Tensor": torch.randn(4, 8), "BatchEncoding": encoding, "dict": dict(encoding)}[kind]
    with pytest.raises(GramianError, match=f"found one {kind}; expected a list of batches"):
        as_workload(torch.nn.Identity(), data, tokenizer)
    with pytest.raises(GramianError, match="one number"):
        as_workload(torch.nn.Identity(), [torch.tensor(1.0)]).features(torch.nn.Identity(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("config", "way", "place"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls", 0),
        ({"pooling_mode": "lasttoken"}, "last", -1),
        ({"pooling_mode": "mean"}, "mean", None),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, None, None),
    ],
)
def test_sentence_encoders_are_judged_by_their_own_pooling(
    config: dict[str, Any],
    way: str | None,
    place: int | None,
    encoder_directory: Path,
    texts: list[str],
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(encoder_directory, model)
    parts = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (model / "modules.json").write_text(json.dumps(parts))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **config}))
    if way is None:
        with pytest.raises(
            GramianError, match="pooling by cls_token and max_tokens; expected mean, cls or lasttoken alone"
        ):
            load_model(str(model), None)
        return
    loaded = load_model(str(model), None)
    work = loaded.workload(texts[:3])
    assert loaded.pooling == way
    with torch.no_grad():
        found = work.features(loaded.model, work.batches[0])
        for row, text in enumerate(sorted(texts[:3], key=len)):
            states = loaded.model(**loaded.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            wanted = torch.nn.functional.normalize(states.mean(0) if place is None else states[place], dim=0)
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eos", ["[SEP]", None])
def test_texts_are_padded_without_a_change_to_the_tokenizer(tokenizer: Any, texts: list[str], eos: str | None) -> None:
    tokenizer.pad_token, tokenizer.eos_token = None, eos
    before = tokenizer.backend_tokenizer.to_str()
    config = transformers.GPT2Config(vocab_size=500, n_embd=64, n_layer=1, n_head=4, n_positions=256)
    for model in (transformers.GPT2Model(config), transformers.GPT2LMHeadModel(config)):
        work = as_workload(model, texts[:4], tokenizer)
        assert not work.batches[0]["attention_mask"].all()
        assert work.features(model, work.batches[0]).isfinite().all()
    assert tokenizer.pad_token is None
    assert tokenizer.backend_tokenizer.to_str() == before


def test_too_few_texts_to_hold_some_out_are_told(encoder_directory: Path, texts: list[str], tmp_path: Path) -> None:
    found = {}
    for count in (9, 10):
        (tmp_path / "text.txt").write_text("\n\n".join(texts[:count]), encoding="utf-8")
        loaded = load_model(str(encoder_directory), str(tmp_path / "text.txt"))
        found[count] = loaded.corpus.held_out_is_calibration, loaded.warnings
    assert found[10] == (False, [])
    assert found[9][0]
    assert "9 texts are too few" in found[9][1][0]


def test_batches_are_bounded_by_their_tokens(tokenizer: Any, texts: list[str]) -> None:
    """Padding and the vocabulary count; every text stays, in the same order."""
    free = text_workload(tokenizer, texts, language_model=True)
    bound = text_workload(tokenizer, texts, most_tokens=300, language_model=True)
    assert all(batch["input_ids"].numel() <= 300 or len(batch["input_ids"]) == 1 for batch in bound.batches)
    assert len(free.sizes()) < len(bound.sizes()) < len(texts)
    rows = [
        [b["input_ids"][i][b["attention_mask"][i] > 0].tolist() for b in w.batches for i in range(len(b["input_ids"]))]
        for w in (free, bound)
    ]
    assert rows[0] == rows[1]
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.LlamaConfig(vocab_size=200_000, **shape)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    loaded = Loaded("", Path(), model, tokenizer, read_corpus(Path(__file__)), False, ())
    assert loaded.width == 200_000
    assert loaded.batch_entries == 256 * 200_000
    sizes = [batch["input_ids"].numel() for batch in loaded.workload(texts).batches]
    assert max(sizes) * loaded.width <= loaded.batch_entries


def test_texts_are_cut_at_what_the_model_takes(tokenizer: Any, texts: list[str]) -> None:
    config = transformers.GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    work = as_workload(transformers.GPT2LMHeadModel(config), texts[:4], tokenizer)
    assert {batch["input_ids"].shape[1] for batch in work.batches} == {16}
