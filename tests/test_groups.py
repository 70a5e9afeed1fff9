"""Attention groups with shared keys and values, and under rotary embedding, against independent references."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian
from gramian.compression import Entry, Layer, Plan
from gramian.compression.options import JOINT, RotaryNeighbours, RotaryPairs, ValueOutput
from gramian.errors import GramianError
from gramian.grams import Gram, LayerGrams
from gramian.models.api import planning_layers

transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}


def tiny(family: str) -> Any:
    """A random model with scores large enough to matter."""
    torch.manual_seed(0)
    configs = {
        "llama": lambda: transformers.LlamaConfig(**DECODER),
        "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**DECODER),
        "qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=32),
        "gptj": lambda: transformers.GPTJConfig(
            vocab_size=96, n_embd=128, n_layer=1, n_head=4, rotary_dim=32, n_positions=64, initializer_range=0.15
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=96, n_embd=128, n_layer=2, n_head=4, n_positions=64, initializer_range=0.15
        ),
        "bert": lambda: transformers.BertConfig(
            vocab_size=96,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            initializer_range=0.15,
            is_decoder=True,
        ),
    }
    classes = {"bert": "BertLMHeadModel", "gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM"}
    name = classes.get(family, f"{family.capitalize()}ForCausalLM")
    model = getattr(transformers, name)(configs[family]()).eval()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.2)  # biases that matter, norms that differ
    return model


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(count):
        ids = torch.randint(0, 96, (4, 12), generator=generator)
        out.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return out


def heads(model: nn.Module) -> list[str]:
    """What is outside the repeated blocks."""
    return [name for name in ("lm_head", "cls") if hasattr(model, name)]


FOUND = {
    "llama": {"neurons", "rotary_halves", "value_output"},
    "mistral": {"neurons", "rotary_halves", "value_output"},
    "qwen2": {"neurons", "rotary_halves", "value_output"},
    "qwen3": {"neurons", "value_output"},  # queries and keys are normalised: leaving coordinates out changes the others
    "gptj": {"neurons", "rotary_neighbours", "value_output"},
    "gpt2": {"neurons"},  # one fused layer writes queries, keys and values
    "bert": {"neurons", "query_key", "value_output"},
}


@pytest.mark.parametrize("family", FOUND)
def test_what_each_family_allows_is_found_and_round_trips(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    data = batches()
    grams = gramian.collect(model, data, exclude=heads(model))
    assert {joint.kind for joint in grams.joints} == FOUND[family]
    layers = planning_layers(model, grams)
    entries, joined = [], set()
    for joint in grams.joints:
        middle = JOINT[joint.kind]([layers[n] for n in joint.layers], joint.heads).curve("params")
        chosen = middle[len(middle) // 2]
        entries.append(Entry(list(joint.layers), chosen.structure, chosen.size, 0, 0.0, joint.heads))
        joined.update(joint.layers)
    entries += [Entry([n], "skeleton", {"rank": 20}, 0, 0.0) for n in layers if n not in joined]
    small = gramian.compress(model, Plan("params", 0.5, 0, entries), grams=grams)
    with torch.no_grad():
        expected = small(**data[0]).logits
        assert not torch.allclose(expected, model(**data[0]).logits, atol=1e-3)
    gramian.save_huggingface(small, tmp_path / "small")
    options = {"is_decoder": True} if family == "bert" else {}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", **options)
    with torch.no_grad():
        torch.testing.assert_close(again(**data[0]).logits, expected, rtol=1e-4, atol=1e-4)
        prompt = data[0]["input_ids"][:1, :5]
        cached = again.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
        plain = again.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_half_precision_finds_what_float32_finds_and_comes_back_bit_for_bit(family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    grams = gramian.collect(model, batches(1), exclude=heads(model), objective="none")
    assert {joint.kind for joint in grams.joints} == FOUND[family]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])


def collected(weight: Tensor, inputs: Tensor, gradient: Tensor | None) -> Layer:
    gram = Gram(weight.shape[1])
    gram.update(inputs)
    grams = LayerGrams(gram, gradient, 1 if gradient is not None else 0, site="x")
    return Layer("x", weight, None, grams)


def test_grouped_value_output_is_the_optimum_of_the_stacked_problem() -> None:
    """Against the textbook: SVD of the stacked, whitened readers times the root of the second moment."""
    torch.manual_seed(0)
    heads, width, groups, size = 6, 4, 2, 10
    value = collected(torch.randn(groups * width, size), torch.randn(50, size), None)
    root = torch.randn(size, size, dtype=torch.float64)
    output = collected(torch.randn(size, heads * width), torch.randn(200, heads * width), root @ root.mT)
    method = ValueOutput(value, output, heads)
    assert (method.groups, method.queries) == (2, 3)
    g, h = output.gram_in, output.gram_out
    assert g is not None
    assert h is not None
    h_root = torch.linalg.cholesky(h).mT
    for group in range(groups):
        spans = [slice(k * width, (k + 1) * width) for k in range(group * 3, group * 3 + 3)]
        stack = torch.cat([h_root @ output.weight[:, span].double() for span in spans])
        seen = sum(g[span, span] for span in spans) / 3
        values = torch.linalg.svdvals(stack @ torch.linalg.cholesky(seen)).square()
        tails = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        torch.testing.assert_close(method.parts()[group].errors, 0.5 * tails, rtol=1e-6, atol=1e-8)
        # The best readers of what is kept do have that error.
        for rank in range(1, width):
            right = method.parts()[group].first[:rank]
            reader = torch.linalg.solve(right @ seen @ right.mT, right @ seen @ stack.mT).mT
            rest = stack - reader @ right
            torch.testing.assert_close((rest @ seen @ rest.mT).trace(), tails[rank], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_all_dimensions_change_nothing(family: str) -> None:
    model, data = tiny(family), batches()
    grams = gramian.collect(model, data, exclude=heads(model))
    layers = planning_layers(model, grams)
    for joint in grams.joints:
        if joint.kind == "neurons":
            continue
        method = JOINT[joint.kind]([layers[n] for n in joint.layers], joint.heads)
        size = {"dimensions": method.groups * method.width}
        plan = Plan("params", 1.0, 0, [Entry(list(joint.layers), joint.kind, size, 0, 0.0, joint.heads)])
        small = gramian.compress(model, plan, grams=grams)
        with torch.no_grad():
            torch.testing.assert_close(small(**data[0]).logits, model(**data[0]).logits, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("family", "kind"), [("llama", RotaryPairs), ("gptj", RotaryNeighbours)])
def test_kept_pairs_are_whole_and_zero_elsewhere(family: str, kind: type[RotaryPairs]) -> None:
    model, data = tiny(family), batches()
    grams = gramian.collect(model, data, exclude=heads(model))
    joint = next(j for j in grams.joints if j.kind == kind.kind)
    layers = planning_layers(model, grams)
    method = kind(*(layers[n] for n in joint.layers), joint.heads)
    built = method.build({"dimensions": 24})
    query, key = (built.layers[n][0].dense() for n in joint.layers)
    alive = key.abs().sum(1).ne(0).view(method.groups, method.width)
    assert int(alive.sum()) == 24
    assert torch.equal(alive[:, method.pairs()[:, 0]], alive[:, method.pairs()[:, 1]])
    shared = query.abs().sum(1).ne(0).view(method.groups, method.queries, method.width)
    assert torch.equal(shared, alive[:, None].expand_as(shared))
    kept = query[shared.flatten()]
    torch.testing.assert_close(kept, layers[joint.layers[0]].weight[shared.flatten()])  # chosen, not changed
    with pytest.raises(GramianError, match="steps of 2"):
        method.build({"dimensions": 7})


def test_the_predicted_loss_of_pairs_orders_what_happens() -> None:
    """Keeping the half of the pairs that the prediction calls dearest hurts less than keeping the other half; the sizes of
    queries and keys alone would not tell, as half of the keys here are large where the queries are small.
    """
    model, data = tiny("llama"), batches(6)
    query, key = (model.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    with torch.no_grad():
        scale = torch.rand(2, 16).mul(4).sub(2).exp().repeat(1, 2)
        key.weight.mul_(scale.flatten()[:, None])
        other = torch.rand(2, 16).mul(3).sub(2.5).exp().repeat(1, 2) / scale
        query.weight.mul_(other.repeat_interleave(2, 0).flatten()[:, None])
    grams = gramian.collect(model, data, exclude=heads(model))
    joint = next(j for j in grams.joints if j.kind == "rotary_halves")
    layers = planning_layers(model, grams)
    method = RotaryPairs(*(layers[n] for n in joint.layers), joint.heads)
    harm = []
    for kept in (slice(0, 16), slice(16, 32)):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for group, part in enumerate(method.parts()):
                gone = torch.ones(method.width, dtype=torch.bool)
                gone[part.first[kept].argmax(1)] = False
                changed.get_submodule(joint.layers[1]).weight[group * method.width + gone.nonzero()] = 0
            total = 0.0
            for batch in data:
                before, after = (m(**batch).logits.log_softmax(-1) for m in (model, changed))
                total += float((before.exp() * (before - after)).sum(-1).mean())
        harm.append(total)
    assert harm[0] < 0.5 * harm[1]


def test_curves_fall_and_count_what_is_stored() -> None:
    model, data = tiny("llama"), batches()
    grams = gramian.collect(model, data, exclude=heads(model))
    layers = planning_layers(model, grams)
    for joint in grams.joints:
        method = JOINT[joint.kind]([layers[n] for n in joint.layers], joint.heads)
        curve = method.curve("params")
        errors = [c.error for c in curve]
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(errors))
        for candidate in curve[:: max(1, len(curve) // 3)]:
            built = method.build(candidate.size)
            ops = [op for op, _ in built.layers.values()]
            assert candidate.cost.params == sum(op.numel for op in ops)
            assert candidate.cost.bytes == sum(op.nbytes for op in ops)
            assert candidate.cost.flops == sum(op.flops() for op in ops)
