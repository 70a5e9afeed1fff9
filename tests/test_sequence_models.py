"""The small language model, its trainer, tokenizer and files; and softmax attention turned into a recurrence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.nn import StructuredLinear
from gramian.sequence import mixer
from gramian.sequence.models import (
    ModelConfig,
    Progress,
    SequenceModel,
    load_tokenizer,
    perplexity,
    text_batches,
    train,
    train_tokenizer,
)

SMALL = ModelConfig(
    19,
    32,
    (("delta_product", {"heads": 2}), ("gla", {"heads": 2}), ("s4d", {"states": 8}), "linear_attention"),
    hidden=48,
)


def model(config: ModelConfig = SMALL) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(config).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(seed))


# The model -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_steps_and_pieces_give_what_whole_sequences_give() -> None:
    net, ids = model(), tokens(2, 23)
    whole, last = net(ids)
    assert whole.shape == (2, 23, 19)
    state, steps = None, []
    for token in ids.unbind(1):
        logits, state = net.step(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=2e-5, rtol=1e-4)
    first, state = net(ids[:, :9])
    second, state = net(ids[:, 9:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=2e-5, rtol=1e-4)
    assert [s.nbytes for s in state] == [s.nbytes for s in last] == [s.nbytes for s in net(ids[:, :3])[1]]


@torch.no_grad()
def test_padding_is_as_if_not_there() -> None:
    net, ids = model(), tokens(1, 12)
    mask = torch.tensor([[False] * 4 + [True] * 12])
    padded, _ = net(torch.cat([tokens(1, 4, seed=1), ids], 1), mask=mask)
    torch.testing.assert_close(padded[:, 4:], net(ids)[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_generation_is_the_repeated_argmax_and_holds_no_more_with_time() -> None:
    net, prompt = model(), tokens(2, 5)
    made = net.generate(prompt, 8, temperature=0)
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, net(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, ids[:, 5:])
    draws = [net.generate(prompt, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(net.generate(prompt, 8, top=1), made)
    assert net.generate(prompt, 0).shape == (2, 0)
    stop = int(made[0, 2])
    ended = net.generate(prompt[:1], 8, temperature=0, stop=stop)
    assert ended.shape[1] == made[0].tolist().index(stop) + 1


def test_structured_feed_forward_and_projections() -> None:
    spec = ("gla", {"heads": 2, "linear": {"kind": "block_low_rank", "rank": 4}})
    net = model(ModelConfig(19, 32, (spec,), structure={"kind": "block_low_rank", "rank": 6}, tied=False))
    kinds = {name: type(m) for name, m in net.named_modules() if name.endswith(("up", "down", "projections.q"))}
    assert len(kinds) == 3
    assert set(kinds.values()) == {StructuredLinear}
    net(tokens(1, 4))[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_mixers_as_modules(tmp_path: Path) -> None:
    config = ModelConfig(19, 32, ("mine",))
    net = SequenceModel(config, [mixer("delta_net", 32, heads=2)])
    assert net(tokens(1, 4))[0].shape == (1, 4, 19)
    with pytest.raises(GramianError, match="name them as recipes"):
        net.save(tmp_path / "model")
    with pytest.raises(GramianError, match="1 mixers; expected 4"):
        SequenceModel(SMALL, [mixer("delta_net", 32)])


def test_what_is_refused() -> None:
    with pytest.raises(GramianError, match="did you mean delta_net"):
        SequenceModel(ModelConfig(19, 32, ("delta_nett",)))
    with pytest.raises(GramianError, match="0 mixers"):
        ModelConfig(19, 32, ())
    with pytest.raises(GramianError, match="its 'kind'"):
        ModelConfig(19, 32, ("gla",), structure={"rank": 2})
    net = model()
    with pytest.raises(GramianError, match="expected \\(batch, time\\)"):
        net(tokens(4))
    with pytest.raises(GramianError, match="a state of 1 layers; expected 4"):
        net(tokens(1, 4), net(tokens(1, 4))[1][:1])
    with pytest.raises(GramianError, match="top >= 1"):
        net.generate(tokens(1, 4), 3, top=0)


# Training ------------------------------------------------------------------------------------------------------------


def test_training_learns_repeats_and_stops() -> None:
    text = torch.arange(400) * 7 % 19
    batches = text_batches(text, 8, 24, seed=3)
    assert torch.equal(batches(5)[0], batches(5)[0])
    assert torch.equal(batches(5)[0][:, 1:], batches(5)[1][:, :-1])
    config = ModelConfig(19, 32, (("delta_net", {"heads": 2}),))
    seen: list[Progress] = []
    net = model(config)
    losses = train(net, batches, steps=50, rate=1e-2, progress=seen.append)
    assert losses[0] > 2
    assert losses[-1] < 0.1
    assert [p.step for p in seen] == list(range(1, 51))
    assert max(p.rate for p in seen) == pytest.approx(1e-2)
    assert seen[-1].rate < 1e-4
    assert losses == train(model(config), batches, steps=50, rate=1e-2)
    assert len(train(model(config), batches, steps=60, progress=lambda p: p.step == 4)) == 4
    assert perplexity(net, text, length=50) == pytest.approx(perplexity(net, text, length=64), rel=1e-3)
    assert 1 <= perplexity(net, text) < 1.3
    with pytest.raises(GramianError, match="expected one axis of more than 500"):
        text_batches(text, 8, 500)


def test_training_says_when_it_diverges() -> None:
    net = model()
    with torch.no_grad():
        net.norm.weight.fill_(math.nan)
    with pytest.raises(GramianError, match="the loss of step 1 is nan; lower the rate"):
        train(net, text_batches(tokens(100), 2, 8), steps=3)


# Files ---------------------------------------------------------------------------------------------------------------

TEXTS = ["the scan reads the state", "the state holds what the scan wrote", "a reflection holds parity"] * 5


def test_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    config = ModelConfig(
        tokenizer.get_vocab_size(),
        32,
        ("performer", ("retnet", {"heads": 2})),
        structure={"kind": "block_low_rank", "rank": 4},
        tied=False,
    )
    net = model(config)
    net.save(tmp_path / "model", tokenizer)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.safetensors", "sequence.json", "tokenizer.json"}
    again = SequenceModel.load(tmp_path / "model")
    assert again.config == config
    ids = torch.tensor([load_tokenizer(tmp_path / "model").encode("the scan holds").ids])
    assert ids[0, 0] == 0
    assert tokenizer.decode(ids[0].tolist()) == "the scan holds"
    with torch.no_grad():
        assert torch.equal(again(ids)[0], net(ids)[0])
    with pytest.raises(GramianError, match="not an empty directory"):
        net.save(tmp_path / "model")


def test_damaged_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(GramianError, match="not a saved SequenceModel"):
        SequenceModel.load(folder)
    model().save(folder)
    with pytest.raises(GramianError, match="saved without a tokenizer"):
        load_tokenizer(folder)
    description = json.loads((folder / "sequence.json").read_text())
    for change, message in (
        ({"schema": 2}, "later version"),
        ({"dim": 64}, "not a saved"),
        ({"mixers": ["gly"]}, "gla"),
    ):
        (folder / "sequence.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(GramianError, match=message):
            SequenceModel.load(folder)
    (folder / "sequence.json").write_text(json.dumps(description))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(GramianError, match="not a saved"):
        SequenceModel.load(folder)


def test_tokenizer_refuses_a_vocabulary_without_all_bytes() -> None:
    with pytest.raises(GramianError, match="expected at least 258"):
        train_tokenizer(TEXTS, 100)


# Softmax attention as a recurrence -----------------------------------------------------------------------------------


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**{**size, **heads, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, **changes})
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_linearised_attention_is_the_formula() -> None:
    """One layer against the recurrence and the window written out token by token in float64."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from gramian.models.convert import linearise

    net, ids = llama().double(), tokens(1, 17)
    before = {name: p for name, p in net.named_parameters()}
    attention = net.model.layers[0].self_attn
    assert linearise(net, window=5, share=0.3) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {name: p for name, p in net.named_parameters()}.keys() == before.keys()
    assert all(p is before[name] for name, p in net.named_parameters())
    x = net.model.embed_tokens(ids)
    places = net.model.rotary_emb(x, torch.arange(17)[None])
    found, _ = net.model.layers[0].self_attn(x, places)
    q, k, v = (getattr(attention, f"{n}_proj")(x).view(1, 17, -1, 8).transpose(1, 2) for n in "qkv")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    rotated_q, rotated_k = apply_rotary_pos_emb(q, k, *places)
    out = torch.zeros(1, 4, 17, 8, dtype=torch.float64)
    for head in range(4):
        state = torch.zeros(8, 8, dtype=torch.float64)
        for t in range(17):
            key = k[0, head, t]
            state = key.sigmoid()[:, None] ** (1 / 16) * state + torch.outer(key.softmax(0), v[0, head, t])
            near = slice(max(0, t - 4), t + 1)
            weights = (rotated_k[0, head, near] @ rotated_q[0, head, t] / 8**0.5).softmax(0)
            out[0, head, t] = 0.7 * q[0, head, t].softmax(0) @ state + 0.3 * weights @ v[0, head, near]
    torch.testing.assert_close(found, attention.o_proj(out.transpose(1, 2).flatten(2)), atol=1e-10, rtol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("window", [6, 0])
def test_linearised_decoding_is_the_whole_sequence_in_constant_memory(window: int) -> None:
    from transformers import DynamicCache

    from gramian.models.convert import linearise

    net, ids = llama(), tokens(2, 30)
    linearise(net, window=window)
    whole = net(ids).logits
    cache, parts, held = DynamicCache(config=net.config), [], []
    for piece in (ids[:, :11], *ids[:, 11:].split(1, 1)):
        parts.append(net(piece, past_key_values=cache, use_cache=True).logits)
        held.append(sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values, *layer.recurrent)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    assert len(set(held)) == 1
    whole_prompt = {"inputs": ids[:, :8], "attention_mask": torch.ones(2, 8, dtype=torch.long), "do_sample": False}
    greedy = net.generate(**whole_prompt, max_new_tokens=12)
    want = ids[:, :8]
    for _ in range(12):
        want = torch.cat([want, net(want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, want)
    beams = net.generate(**whole_prompt, max_new_tokens=6, num_beams=3)
    assert torch.equal(beams, net.generate(**whole_prompt, max_new_tokens=6, num_beams=3, use_cache=False))


@torch.no_grad()
def test_linearised_padding() -> None:
    from gramian.models.convert import linearise

    net, ids = llama(), tokens(1, 14)
    linearise(net, window=6)
    mask = torch.tensor([[0] * 5 + [1] * 14])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    padded = net(torch.cat([tokens(1, 5, seed=1), ids], 1), attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(padded[:, 5:], net(ids).logits, atol=2e-5, rtol=1e-4)


def test_linearised_recovers_by_low_rank_tuning() -> None:
    from gramian.adapt import attach, recipe
    from gramian.models.convert import linearise

    def batches(step: int) -> tuple[Tensor, Tensor]:  # which token was two before
        ids = tokens(16, 24, seed=step)
        return ids, torch.cat([torch.full((16, 2), -1), ids[:, :-2]], 1)

    net = llama(num_hidden_layers=1)
    good = sum(train(net, batches, steps=150, rate=1e-2)[-5:]) / 5
    linearise(net, window=4)
    adapted = attach(net, recipe("lora"), include=["q_proj", "k_proj", "v_proj"], rank=4)
    losses = train(net, batches, steps=60, parameters=adapted.parameter_groups(1e-2))
    assert losses[0] > 2 * good
    assert losses[-1] < 0.5 * losses[0]


def test_linearise_refuses() -> None:
    from transformers import BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM

    from gramian.models.convert import linearise

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(GramianError, match="BertModel has no attention layer"):
        linearise(BertModel(BertConfig(**shape)))
    with pytest.raises(GramianError, match="it also has q_norm, k_norm"):
        linearise(Qwen3ForCausalLM(Qwen3Config(vocab_size=9, head_dim=16, num_key_value_heads=1, **shape)))
    with pytest.raises(GramianError, match="expected window >= 0"):
        linearise(llama(), window=-1)
    with pytest.raises(GramianError, match=r"among nothing"):
        linearise(llama(), layers=["nothing"])
    net = llama()
    linearise(net, layers=["model.layers.0.*"])
    with pytest.raises(GramianError, match="takes a DynamicCache"):
        net.generate(tokens(1, 3), max_new_tokens=2, cache_implementation="static")
