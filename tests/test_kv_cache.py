"""Key-value projection: exact at full rank, optimal at its start, better when trained, smaller when stored."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gramian.errors import GramianError
from gramian.linalg import polar
from gramian.models.data import python_topics
from gramian.models.kv_cache import (
    DESCRIPTION,
    TENSORS,
    KeyValueProjection,
    allocate,
    allocate_measured,
    collect_key_values,
    evaluate_key_values,
    predicted_errors,
    principal_bases,
    project_key_values,
    train_bases,
)


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def codes() -> torch.Tensor:
    text = "\n".join(python_topics().calibration[:400]).encode("ascii", "replace")
    return torch.tensor(list(text)).long()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """A small grouped-query model of characters, trained for a while, calibration batches and held-out ones."""
    model, text = llama(), codes()
    generator = torch.Generator().manual_seed(0)
    cut = int(0.9 * len(text))

    def batch(first: int, last: int, count: int = 16) -> torch.Tensor:
        start = torch.randint(first, last - 64, (count, 1), generator=generator)
        return text[start + torch.arange(64)]

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        ids = batch(0, cut)
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval(), [batch(0, cut) for _ in range(8)], [batch(cut, len(text)) for _ in range(2)]


@pytest.fixture(scope="module")
def states(trained: Any) -> Any:
    return collect_key_values(trained[0], trained[1])


@pytest.fixture(scope="module")
def principal(states: Any) -> KeyValueProjection:
    return principal_bases(states)


@pytest.fixture(scope="module")
def turned(trained: Any, principal: KeyValueProjection) -> KeyValueProjection:
    return train_bases(trained[0], trained[1], principal, steps=100)


def test_the_start_is_the_best_orthogonal_projection(trained: Any) -> None:
    """Against projections found by descent, on the states themselves."""
    model, batches, _ = trained
    seen: dict[int, list[torch.Tensor]] = {}

    from gramian.models.huggingface_cache import tap_cache

    def tap(layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.setdefault(layer, []).append(keys.detach())
        return keys, values

    for ids in batches:
        model(ids, past_key_values=tap_cache(tap), use_cache=True)
    keys = torch.cat(seen[1])[:, 1].flatten(0, 1).double()  # head 1 of layer 1
    bases = principal_bases(collect_key_values(model, batches, gradients=False)).layers[1][0]
    assert torch.allclose(bases.mean[1].double(), keys.mean(0), atol=1e-5)
    assert torch.allclose(bases.up, bases.down.mT)
    assert torch.allclose(bases.down @ bases.up, torch.eye(16).expand(2, 16, 16), atol=1e-5)
    centred = keys - keys.mean(0)

    def error(basis: torch.Tensor) -> torch.Tensor:
        return (centred - centred @ basis @ basis.mT).square().sum()

    generator = torch.Generator().manual_seed(0)
    for rank in (2, 6, 11):
        ours = float(error(bases.down[1, :, :rank].double()))
        assert ours == pytest.approx(float(torch.linalg.svdvals(centred)[rank:].square().sum()), rel=1e-4)
        best = float("inf")
        for _ in range(3):
            raw = torch.randn(16, rank, dtype=torch.float64, generator=generator).requires_grad_()
            optimiser = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

            def closure(raw: torch.Tensor = raw, optimiser: Any = optimiser) -> torch.Tensor:
                optimiser.zero_grad()
                loss = error(torch.linalg.qr(raw).Q)
                loss.backward()
                return loss

            optimiser.step(closure)
            best = min(best, float(error(polar(raw.detach()))))
        assert ours <= best * (1 + 1e-5)
        assert best <= ours * 1.5  # the descents did descend


def test_full_rank_gives_identical_logits(trained: Any, turned: KeyValueProjection) -> None:
    model, _, held = trained
    cache = turned.cache(model.config)
    plain = model(held[0]).logits
    assert torch.equal(model(held[0], past_key_values=cache, use_cache=True).logits, plain)
    assert turned.keep == 1
    assert cache.get_seq_length() == 64
    # One step short of it is another function, and the bases themselves lose nothing but rounding.
    almost = turned.with_ranks([[[15, 16] for _ in layer] for layer in turned.layers])
    assert not torch.equal(model(held[0], past_key_values=almost.cache(model.config), use_cache=True).logits, plain)
    for layer in turned.layers:
        for side in layer:
            assert torch.allclose(side.down @ side.up, torch.eye(16).expand_as(side.up), atol=1e-5)


def test_tokens_one_by_one_see_what_all_at_once_see(trained: Any, principal: KeyValueProjection) -> None:
    model, _, held = trained
    ranks = [[[3, 9], [16, 5]], [[1, 16], [7, 7]]]
    projection = principal.with_ranks(ranks)
    cache = projection.cache(model.config)
    whole = model(held[0], past_key_values=projection.cache(model.config), use_cache=True).logits
    parts = [model(held[0][:, :40], past_key_values=cache, use_cache=True).logits]
    for at in range(40, 64):
        parts.append(model(held[0][:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)
    # By hand: what attention reads.
    bases = projection.layers[0][0]
    x = torch.randn(2, 2, 5, 16)
    packed = bases.packed()
    stored = packed.narrow(x)
    assert stored.shape == (2, 1, 5, 12)
    for head, rank in enumerate((3, 9)):
        axes, mean = bases.down[head, :, :rank], bases.mean[head]
        by_hand = mean + (x[:, head] - mean) @ axes @ axes.mT
        assert torch.allclose(packed.widen(stored)[:, head], by_hand, atol=1e-5)


def test_stored_memory_is_smaller(trained: Any, principal: KeyValueProjection) -> None:
    from transformers import DynamicCache

    model, _, held = trained
    plain = DynamicCache(config=model.config)
    model(held[0], past_key_values=plain, use_cache=True)
    full = sum(t.numel() * t.element_size() for layer in plain.layers for t in (layer.keys, layer.values))
    for keep in (0.5, 0.25):
        cache = principal.uniform(keep).cache(model.config)
        model(held[0], past_key_values=cache, use_cache=True)
        storages = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
        assert cache.nbytes == storages == keep * full


def test_generate_with_batch_padding_and_beams(trained: Any, principal: KeyValueProjection) -> None:
    model, _, held = trained
    ids = held[0][:3, :20].clone()
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 0, 0  # padded on the left
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    plain = model.generate(input_ids=ids, attention_mask=mask, **options)
    full = principal.cache(model.config)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, past_key_values=full, **options), plain)
    small = principal.uniform(0.75)
    together = model.generate(input_ids=ids, attention_mask=mask, past_key_values=small.cache(model.config), **options)
    for row in range(3):
        skip = 7 * (row == 1)
        alone = model.generate(
            input_ids=ids[row : row + 1, skip:], past_key_values=small.cache(model.config), **options
        )
        assert torch.equal(alone[0], together[row, skip:])
    beams = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=3, past_key_values=principal.cache(model.config), **options
    )
    assert torch.equal(beams, model.generate(input_ids=ids, attention_mask=mask, num_beams=3, **options))


def test_training_improves_low_ranks_on_unseen_text(
    trained: Any, principal: KeyValueProjection, turned: KeyValueProjection
) -> None:
    model, _, held = trained
    for keep in (0.5, 0.37, 0.25):
        before = evaluate_key_values(model, held, principal.uniform(keep))
        after = evaluate_key_values(model, held, turned.uniform(keep))
        assert after["kl"] < before["kl"]
        assert after["keep"] == before["keep"]
    assert all(torch.allclose(side.up, side.down.mT, atol=1e-6) for layer in turned.layers for side in layer)
    again = train_bases(model, trained[1][:2], principal, steps=3)
    twice = train_bases(model, trained[1][:2], principal, steps=3)
    assert torch.equal(again.layers[1][0].down, twice.layers[1][0].down)


def test_predicted_errors_are_the_quadratic_form(states: Any, principal: KeyValueProjection) -> None:
    weighted = principal_bases(states, weighting="loss")
    for bases in (principal, weighted):
        errors = predicted_errors(bases, states)
        for side in (0, 1):
            head, rank = states[1][side][1], 5
            down, up = (t[1].double() for t in (bases.layers[1][side].down, bases.layers[1][side].up))
            left_out = torch.eye(16, dtype=torch.float64) - down[:, :rank] @ up[:rank]
            h = head.gram_out()
            by_hand = 0.5 * torch.trace(h @ left_out.mT @ head.input.covariance() @ left_out)
            assert float(errors[1][side][1, rank]) == pytest.approx(float(by_hand), rel=1e-3)
            curve = errors[1][side][1]
            assert curve.shape == (17,)
            assert float(curve[16]) == 0 < float(curve[5]) < float(curve[0])
    # Weighted bases are best where it counts.
    plain, best = predicted_errors(principal, states), predicted_errors(weighted, states)
    for layer in range(2):
        for side in (0, 1):
            assert bool((best[layer][side] <= plain[layer][side] * (1 + 1e-3) + 1e-9).all())


def test_allocation_is_optimal_and_within_budget(states: Any, principal: KeyValueProjection) -> None:
    errors = predicted_errors(principal, states)
    chosen = allocate(principal, 0.37, errors=errors, step=5)
    total = sum(sum(side) for layer in chosen.ranks for side in layer)
    budget = int(0.37 * 128)
    assert total <= budget
    curves = [head for layer in errors for side in layer for head in side]
    grid = (5, 10, 15, 16)
    best = min(
        sum(float(curve[rank]) for curve, rank in zip(curves, ranks, strict=True))
        for ranks in itertools.product(grid, repeat=8)
        if sum(ranks) <= budget
    )
    ours = sum(
        float(curve[rank])
        for curve, rank in zip(curves, [r for la in chosen.ranks for s in la for r in s], strict=True)
    )
    assert ours == pytest.approx(best, rel=1e-9)


def test_measured_allocation_beats_uniform(trained: Any, turned: KeyValueProjection) -> None:
    model, batches, held = trained
    chosen = allocate_measured(model, [batches[0]], turned, 0.375)
    assert chosen.keep <= 0.375
    same = turned.uniform(0.375)
    assert evaluate_key_values(model, held, chosen)["kl"] < evaluate_key_values(model, held, same)["kl"]


def test_padding_counts_for_nothing(trained: Any) -> None:
    model, batches, _ = trained
    ids = batches[0][:4]
    padded = torch.cat([ids, torch.full((4, 9), 3)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 9, dtype=torch.long)], 1)
    plain = collect_key_values(model, [ids], gradients=False)
    with_padding = collect_key_values(model, [{"input_ids": padded, "attention_mask": mask}], gradients=False)
    for side in (0, 1):
        a, b = plain[0][side][1].input, with_padding[0][side][1].input
        assert a.count == b.count == 4 * 64
        assert torch.allclose(a.second, b.second, rtol=1e-4, atol=1e-3)


def test_saved_and_loaded(trained: Any, states: Any, turned: KeyValueProjection, tmp_path: Path) -> None:
    model, _, held = trained
    chosen = allocate(turned, 0.5, errors=predicted_errors(turned, states))
    chosen.save(tmp_path)
    loaded = KeyValueProjection.load(tmp_path)
    assert loaded.ranks == chosen.ranks

    def logits(projection: KeyValueProjection) -> torch.Tensor:
        return model(held[0], past_key_values=projection.cache(model.config), use_cache=True).logits

    assert torch.equal(logits(loaded), logits(chosen))
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    for damage, words in (
        ({"schema": 99}, "reads up to"),
        ({"ranks": [[[99, 1], [1, 1]]] * 2}, "ranks from 1 to D|expected"),
        ({"ranks": description["ranks"][:1]}, "12 tensors for 1 layers"),
    ):
        (tmp_path / DESCRIPTION).write_text(json.dumps(description | damage))
        with pytest.raises(GramianError, match=words):
            KeyValueProjection.load(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    content = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(content[: len(content) // 2])
    with pytest.raises(GramianError, match="missing or damaged"):
        KeyValueProjection.load(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "mistral"])
def test_other_architectures(kind: str) -> None:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    if kind == "gpt2":
        ends = dict(eos_token_id=None, bos_token_id=None)
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, **ends))
    elif kind == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    model.eval()
    ids = torch.randint(0, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)
    projection = project_key_values(model, [ids], keep=0.5)
    assert projection.keep <= 0.5
    full = projection.uniform(1.0).cache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=full, **options), model.generate(ids, **options))
    cache = projection.cache(model.config)
    out = model.generate(ids, past_key_values=cache, **options)
    assert out.shape == (3, 30)
    last = model(out[:, :-1], past_key_values=projection.cache(model.config), use_cache=True).logits[:, -1]
    assert torch.equal(last.argmax(-1), out[:, -1])
    if kind == "mistral":  # only the window is stored
        assert cache.layers[0].keys.shape[-2] == 7


def test_half_precision(trained: Any, principal: KeyValueProjection) -> None:
    import copy

    model = copy.deepcopy(trained[0]).to(torch.bfloat16)
    cache = principal.uniform(0.5).cache(model.config)
    logits = model(trained[2][0], past_key_values=cache, use_cache=True).logits
    assert cache.layers[0].keys.dtype == torch.bfloat16 == logits.dtype
    wide = trained[0](trained[2][0], past_key_values=principal.uniform(0.5).cache(model.config), use_cache=True).logits
    assert float((logits.float() - wide).detach().norm() / wide.detach().norm()) < 0.05


def test_errors_at_the_door(trained: Any, principal: KeyValueProjection, states: Any) -> None:
    model, batches, _ = trained
    with pytest.raises(GramianError, match="smallest ranks take 0.125"):
        project_key_values(model, batches[:1], keep=0.1)
    with pytest.raises(GramianError, match="expected above 0"):
        allocate(principal, 1.5, errors=predicted_errors(principal, states))
    with pytest.raises(GramianError, match="expected one of uniform, predicted, measured"):
        project_key_values(model, batches[:1], allocation="best")
    with pytest.raises(GramianError, match="expected one of none, loss"):
        principal_bases(states, weighting="fisher")
    with pytest.raises(GramianError, match="no gradients"):
        principal_bases(collect_key_values(model, batches[:1], gradients=False), weighting="loss")
    with pytest.raises(GramianError, match="no input_ids"):
        project_key_values(model, [{"labels": batches[0]}])
    with pytest.raises(GramianError, match="2 layers; this model caches 3"):
        principal.cache(llama(num_hidden_layers=3).config)
    with pytest.raises(GramianError, match="2 heads of 16; the model has 4 of 16"):
        other = llama(num_key_value_heads=4)
        other(batches[0], past_key_values=principal.cache(other.config), use_cache=True)
    with pytest.raises(GramianError, match="did not pass its keys"):

        class Plain(nn.Module):
            def forward(self, input_ids: torch.Tensor, **other: Any) -> Any:
                return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 4)})()

        collect_key_values(Plain(), batches[:1], gradients=False)
    broken = llama()
    broken.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(GramianError, match="keys of layer 1, head 0: NaN"):
        collect_key_values(broken, batches[:1], gradients=False)
