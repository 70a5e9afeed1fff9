"""Language models: what is measured of them, healing by their predictions, shallower and narrower ordinary models."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gramian
from gramian.compression import Entry, Plan
from gramian.errors import GramianError
from gramian.models.clone import clone
from gramian.models.depth import block_influence, depth
from gramian.models.ordinary import become_ordinary
from gramian.models.sensitivity import Distance
from gramian.models.workload import Workload, language_agreement, text_workload

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parents[1] / "examples" / "small_llama.py"
    spec = importlib.util.spec_from_file_location("small_llama", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(example: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[str], list[str]]:
    """A very small Llama that has learnt a little, its tokenizer, calibration and held-out text."""
    folder = tmp_path_factory.mktemp("small") / "llama"
    shape = {"vocabulary": 400, "hidden": 96, "intermediate": 160, "layers": 3, "heads": 3, "key_value_heads": 1}
    example.texts = small_texts(example.texts())
    losses: list[float] = []
    found = example.small_llama(
        folder, steps=60, batch=8, length=64, progress=lambda step, loss: losses.append(loss), **shape
    )
    assert losses[-1] < losses[0] - 1.0
    model = transformers.AutoModelForCausalLM.from_pretrained(found).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    calibration, held_out = example.texts()
    return model, tokenizer, calibration[:48], held_out[:24]


def small_texts(texts: tuple[list[str], list[str]]) -> Any:
    return lambda: (texts[0][:600], texts[1])


def work(tokenizer: Any, texts: list[str]) -> Workload:
    return text_workload(tokenizer, texts, longest=48, language_model=True, batch_size=16)


def random_tokens() -> Workload:
    """One batch of 40 kinds of tokens, and nothing but logits."""
    return Workload(
        [{"input_ids": torch.randint(0, 40, (2, 8))}],
        lambda m, b: m(**b),
        lambda m, b: m(**b).logits.flatten(1),
        lambda b: None,
        lambda m, b: [m(**b).logits.flatten(0, 1)],
        logits=lambda m, b: m(**b).logits,
    )


def test_the_example_resumes_and_is_cached(example: Any, trained: Any, tmp_path: Path) -> None:
    """A killed training ends with the same weights; a second call trains nothing."""
    shape = {"vocabulary": 300, "hidden": 32, "intermediate": 48, "layers": 1, "heads": 2, "key_value_heads": 1}
    common = {"steps": 6, "batch": 2, "length": 16, "every": 2, **shape}
    whole = example.small_llama(tmp_path / "whole", **common)

    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example.small_llama(tmp_path / "killed", progress=stop, **common)
    assert not (tmp_path / "killed").exists()
    seen: list[int] = []
    killed = example.small_llama(tmp_path / "killed", progress=lambda step, loss: seen.append(step), **common)
    assert seen == [5, 6]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert example.small_llama(tmp_path / "killed", progress=stop, **common) == killed


def test_agreement_against_a_loop(trained: Any) -> None:
    """Perplexity and divergence, token by token without padding."""
    model, tokenizer, _, held_out = trained
    other = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    found = language_agreement(model, other, work(tokenizer, held_out))
    losses: list[list[float]] = [[], []]
    apart, same = [], []
    for text in held_out:
        ids = tokenizer(text, truncation=True, max_length=48, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = [m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, other)]
        for i in range(ids.shape[1] - 1):
            for which in (0, 1):
                losses[which].append(-float(logs[which][i, ids[0, i + 1]]))
            apart.append(float((logs[0][i].exp() * (logs[0][i] - logs[1][i])).sum()))
            same.append(float(logs[0][i].argmax() == logs[1][i].argmax()))
    assert found["tokens"] == len(apart)
    for when, values in zip(("before", "after"), losses, strict=True):
        assert found[f"perplexity_{when}"] == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)
    assert found["divergence"] == pytest.approx(sum(apart) / len(apart), rel=1e-3)
    assert found["same_token"] == pytest.approx(sum(same) / len(same), abs=0.01)
    rises = np.array(losses[1]) - np.array(losses[0])
    wanted = found["perplexity_after"] * rises.std() / len(rises) ** 0.5
    assert found["rise_error"] == pytest.approx(wanted, rel=1e-3)
    same_model = language_agreement(model, model, work(tokenizer, held_out))
    assert same_model["divergence"] == pytest.approx(0, abs=1e-6)
    assert same_model["same_token"] == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_masked_models_have_no_perplexity_whatever_the_padding(tokenizer: Any, texts: list[str], side: str) -> None:
    """Both kinds are told apart by a real token, also where the batch's first text is padded or too short."""
    shape = {"vocab_size": 500, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**shape, intermediate_size=32, initializer_range=0.3))
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=32))
    tokenizer.padding_side = side
    data = text_workload(tokenizer, ["", "one", *texts[:6]], language_model=True)
    assert not data.batches[0]["attention_mask"][:2].all()
    assert math.isnan(language_agreement(masked, masked, data)["perplexity_before"])
    data.batches = [{k: v for k, v in b.items() if k != "token_type_ids"} for b in data.batches]
    assert math.isfinite(language_agreement(causal, causal, data)["perplexity_before"])


def test_a_masked_language_model_has_no_perplexity() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    ids = torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = Workload(
        [batch],
        lambda m, b: m(**b),
        lambda m, b: m(**b).logits.flatten(1),
        lambda b: b["attention_mask"],
        lambda m, b: [m(**b).logits.flatten(0, 1)],
        logits=lambda m, b: m(**b).logits,
    )
    found = language_agreement(model, model, plain)
    assert math.isnan(found["perplexity_before"])
    assert found["divergence"] == pytest.approx(0, abs=1e-6)


def test_healing_brings_predictions_back(trained: Any) -> None:
    model, tokenizer, calibration, held_out = trained
    data, unseen = work(tokenizer, calibration), work(tokenizer, held_out)
    grams = gramian.collect(model, data, seed=0)
    small = gramian.compress(model, data, grams=grams, keep=0.4)
    healed = gramian.compress(model, data, grams=grams, keep=0.4, heal_steps=24)
    before, after = (language_agreement(model, m, unseen)["divergence"] for m in (small, healed))
    assert after < 0.9 * before


def test_auto_beats_one_structure(trained: Any) -> None:
    model, tokenizer, calibration, held_out = trained
    data, unseen = work(tokenizer, calibration), work(tokenizer, held_out)
    grams = gramian.collect(model, data, seed=0)
    found = {
        recipe: language_agreement(model, gramian.compress(model, data, grams=grams, recipe=recipe, keep=0.6), unseen)
        for recipe in ("auto", "svd-llm", "modegpt")
    }
    assert found["auto"]["divergence"] < 0.7 * found["svd-llm"]["divergence"]
    assert found["auto"]["divergence"] < found["modegpt"]["divergence"]


def test_depth_is_an_ordinary_model(trained: Any, tmp_path: Path) -> None:
    model, tokenizer, calibration, _ = trained
    data = work(tokenizer, calibration)
    before = {name: p.clone() for name, p in model.named_parameters()}
    small = depth(model, data, keep=0.67)
    assert model.config.num_hidden_layers == 3
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]
    assert small.config.num_hidden_layers == 2
    # The best of all ways to leave one out, by brute force.
    distance, tried = Distance(model, data), []
    for kept in itertools.combinations(range(3), 2):
        other = transformers.AutoModelForCausalLM.from_config(small.config).eval()
        other.config.use_cache = False  # the blocks keep their numbers here
        other.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
        other.model.embed_tokens, other.model.norm, other.lm_head = (
            model.model.embed_tokens,
            model.model.norm,
            model.lm_head,
        )
        with torch.no_grad():
            tried.append(distance(other))
    assert distance(small.eval()) == pytest.approx(min(tried), rel=1e-5)
    small.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    batch = data.head(1)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, small(**batch).logits)
        prompt = batch["input_ids"][:, :4]
        cached = again.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        plain = again.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)
    with pytest.raises(GramianError, match="one of 3 blocks"):
        depth(model, data, keep=0.1)


def test_block_influence_is_the_angle_that_a_block_turns(trained: Any) -> None:
    model, tokenizer, calibration, _ = trained
    data = work(tokenizer, calibration[:10])
    found = block_influence(model, data, ["model.layers.1.mlp.up_proj", "lm_head"])
    cosines: list[torch.Tensor] = []
    for batch in data.batches:
        with torch.no_grad():
            states = model.model(**batch, output_hidden_states=True).hidden_states
        cosine = torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1)
        cosines.append(cosine[batch["attention_mask"].bool()])
    assert found["model.layers.1.mlp.up_proj"] == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-5)
    assert 0 < found["lm_head"] < 2


def test_clone_is_an_ordinary_narrower_model(trained: Any, tmp_path: Path) -> None:
    model, tokenizer, calibration, held_out = trained
    data, unseen = work(tokenizer, calibration), work(tokenizer, held_out)
    small = clone(model, data, keep=0.5, heal_steps=40)
    assert small.config.hidden_size == 48
    small.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    found = language_agreement(model, again, unseen)
    start = language_agreement(model, clone(model, data, keep=0.5, heal_steps=1), unseen)
    assert found["divergence"] < 0.8 * start["divergence"]
    assert found["perplexity_after"] < 0.5 * again.config.vocab_size
    # More of the width and no training to speak of: nearer from the start.
    wider = clone(model, data, keep=0.92, heal_steps=1)
    assert wider.config.hidden_size == 88
    assert language_agreement(model, wider, unseen)["divergence"] < 0.75 * start["divergence"]


def test_clone_leaves_the_random_state_and_the_mode() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        attention_dropout=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    data = random_tokens()
    before = torch.get_rng_state()
    made = [clone(model.train(mode), data, heal_steps=2) for mode in (True, False)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [[m.training for m in small.modules()] for small in made] == [
        [mode] * len(list(model.modules())) for mode in (True, False)
    ]
    for name, p in made[0].named_parameters():
        assert torch.equal(p, made[1].get_parameter(name)), name


def test_clone_refuses_what_it_cannot_do() -> None:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    plain = random_tokens()
    with pytest.raises(GramianError, match="modegpt"):
        clone(model, plain)


def test_equal_widths_make_an_ordinary_model(trained: Any, tmp_path: Path) -> None:
    model, tokenizer, calibration, _ = trained
    data = work(tokenizer, calibration)
    grams = gramian.collect(model, data, seed=0)
    for widths, expected in (((96, 96, 96), True), ((96, 80, 96), False)):
        entries = []
        for joint in grams.joints:
            if joint.kind == "neurons":
                entries.append(Entry(list(joint.layers), "neurons", {"width": widths[len(entries)]}, 0, 0.0))
        small = gramian.compress(model, Plan("params", 0.5, 0, entries), grams=grams)
        batch = data.head(2)
        with torch.no_grad():
            logits = small(**batch).logits
        assert become_ordinary(small) is expected
        if expected:
            small.save_pretrained(tmp_path / "small")
            config = transformers.AutoConfig.from_pretrained(tmp_path / "small")
            assert config.intermediate_size == 96
            assert getattr(config, "quantization_config", None) is None
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
            with torch.no_grad():
                torch.testing.assert_close(again(**batch).logits, logits)


def test_the_job_reports_predictions_and_saves_ordinary_models(trained: Any, tmp_path: Path) -> None:
    from gramian.models.job import Job, Settings
    from gramian.report.compress_page import render

    model, tokenizer, calibration, held_out = trained
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join([*calibration, *held_out]))
    for recipe, keep in (("depth", 0.67), ("auto", 0.5), ("low-rank-clone", 0.5), ("modegpt-uniform", 0.7)):
        out = tmp_path / recipe
        heal = 2 if recipe == "low-rank-clone" else 0
        settings = Settings(keep=keep, cost="params", recipe=recipe, heal=heal)
        report = Job(str(folder), str(data), out, settings, render=render).run()
        language = report["language"]
        assert language["perplexity_after"] > language["perplexity_before"] > 1
        assert language["generation"]["before"] > 0
        page = (out / "report.html").read_text()
        assert "Perplexity" in page
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        ordinary = getattr(again.config, "quantization_config", None) is None
        assert ordinary == (recipe != "auto")
        assert (out / "plan.json").exists() == (recipe in ("auto", "modegpt-uniform"))
        losses = (report["heal"] or {"loss": []})["loss"]
        assert [step for step, _ in losses] == list(range(heal))
        assert all(loss > 0 for _, loss in losses)
        if recipe == "modegpt-uniform":
            assert again.config.intermediate_size < model.config.intermediate_size
        assert report["kept"]["layers"] <= keep
        with torch.no_grad():
            again(**work(tokenizer, held_out[:2]).head(1))
