"""Second moments: exact sums, padding, sharing, gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gramian
from gramian.errors import GramianError
from gramian.grams import Gram, Grams, collect_layers
from gramian.grams.gram import shrink
from gramian.models.workload import text_workload


class Tower(nn.Module):
    """Two heads on one input, then a mixing layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
        self.c = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.a(x) * self.b(x))).mean(1)


def test_gram_is_the_float64_second_moment() -> None:
    x = torch.randn(100, 7)
    gram = Gram(7)
    for part in x.split(13):
        gram.update(part)
    expected = x.double().mT @ x.double() / 100
    assert torch.allclose(gram.moment(), expected, atol=1e-6)
    assert torch.allclose(gram.covariance(), torch.cov(x.double().mT, correction=0), atol=1e-6)
    assert gram.count == 100
    assert torch.allclose(gram.root() @ gram.root(), expected, atol=1e-6)
    diagonal = Gram(7, "diagonal").update(x)
    assert torch.allclose(diagonal.moment(), expected.diagonal(), atol=1e-6)


def test_weights_count_samples() -> None:
    x, w = torch.randn(20, 3), torch.rand(20)
    gram = Gram(3).update(x, w)
    assert torch.allclose(gram.moment(), torch.einsum("n,ni,nj->ij", w, x, x).double() / w.sum().double(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_inputs_are_accumulated_wide(dtype: torch.dtype) -> None:
    x = torch.randn(4096, 4).to(dtype)
    moment = Gram(4).update(x).moment()
    expected = x.double().mT @ x.double() / 4096
    assert (moment - expected).abs().max() < 1e-5


def test_merge_is_exact_and_checked() -> None:
    x = torch.randn(50, 4)
    whole, left, right = Gram(4).update(x), Gram(4).update(x[:20]), Gram(4).update(x[20:])
    left.merge(right)
    assert torch.allclose(whole.second, left.second, atol=1e-5)
    assert left.count == whole.count
    with pytest.raises(GramianError, match="size 5"):
        left.merge(Gram(5))


def test_bad_samples_are_named() -> None:
    with pytest.raises(GramianError, match="NaN or Inf"):
        Gram(3).update(torch.tensor([[1.0, float("nan"), 2.0]]))
    with pytest.raises(GramianError, match="expected \\(n, 3\\)"):
        Gram(3).update(torch.zeros(2, 4))


def test_rank_and_shrinkage_of_a_deficient_gram() -> None:
    gram = Gram(9).update(torch.randn(4, 9))
    assert gram.rank() == 4
    assert torch.linalg.eigvalsh(shrink(gram.moment(), 1e-3)).min() > 0


def reference_gradients(model: Tower, x: torch.Tensor, probes: torch.Tensor, centre: dict) -> dict:
    """sum over sequences of D D^T with D = sum_t g_t (x_t - centre)^T, one sequence at a time, float64."""
    model = model.double()
    out: dict[str, torch.Tensor] = {}
    for i in range(len(x)):
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str, seen: dict = seen):
            def hook(module: nn.Module, args: tuple, result: torch.Tensor) -> None:
                result.retain_grad()
                seen[name] = (args[0], result)

            return hook

        handles = [m.register_forward_hook(keep(n)) for n, m in model.named_children()]
        (model(x[i : i + 1].double()) * probes[i].double()).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (inputs, output) in seen.items():
            d = output.grad[0].mT @ (inputs[0].detach() - centre[name])
            out[name] = out.get(name, 0) + d @ d.mT
    return out


def test_gradients_equal_autograd_per_sequence() -> None:
    torch.manual_seed(0)
    model, x = Tower(), torch.randn(8, 5, 6)
    layers = dict(model.named_children())
    probes: list[torch.Tensor] = []

    def objective(m: nn.Module, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        y = m(batch)
        probe = torch.randn(y.shape, generator=generator)
        probes.append(probe)
        return (y * probe).sum()

    grams = collect_layers(model, layers, [x[:4], x[4:]], run=lambda m, b: m(b), objective=objective, seed=3)
    assert grams["b"].input is grams["a"].input  # one input, accumulated once
    assert grams["a"].tokens == 40
    expected = reference_gradients(model, x, torch.cat(probes), grams.centres())
    for name in layers:
        assert torch.allclose(grams[name].gradient, expected[name], rtol=1e-4, atol=1e-6), name
        assert grams[name].sequences == 8


def test_shards_merge_to_one_pass() -> None:
    torch.manual_seed(0)
    model, x = Tower(), torch.randn(8, 5, 6)
    layers = dict(model.named_children())

    def objective(m: nn.Module, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return m(batch).square().sum()  # no randomness: the split must not matter

    def run(data: list, centres: dict | None = None) -> Grams:
        return collect_layers(model, layers, data, run=lambda m, b: m(b), objective=objective, centres=centres)

    whole = run([x[:4], x[4:]])
    merged = run([x[:4]]).merge(run([x[4:]], whole.centres()))
    for name in layers:
        assert torch.allclose(merged[name].gram_in(), whole[name].gram_in(), rtol=1e-12)
        assert torch.allclose(merged[name].gram_out(), whole[name].gram_out(), rtol=1e-9)
    with pytest.raises(GramianError, match="centred differently"):
        run([x[:4]]).merge(run([x[4:]]))
    again = Grams.from_state(whole.state(), whole.describe())
    assert torch.equal(again["c"].gradient, whole["c"].gradient)
    assert again["b"].input is again["a"].input


def test_predicted_loss_of_a_small_change() -> None:
    """1/2 tr(G_out D G_in D^T) is the mean squared change of the output when one token makes a sequence: exact for a
    linear model, whose gradients do not depend on the inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    x = torch.randn(4000, 6)
    layers = {"0": model[0]}

    def objective(m: nn.Module, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        y = m(batch)
        return (y * torch.randn(y.shape, generator=generator)).sum()

    grams = collect_layers(model, layers, x.split(500), run=lambda m, b: m(b), objective=objective)
    change = 0.1 * torch.randn(5, 6)
    centred = x - x.mean(0)
    truth = (centred @ change.mT @ model[1].weight.detach().mT).square().sum(1).mean().double()
    h, g = grams["0"].gram_out(0.0), grams["0"].gram_in(damping=0.0)
    predicted = torch.trace(h @ change.double() @ g @ change.double().mT)
    assert predicted == pytest.approx(float(truth), rel=0.1)


def test_padding_does_not_count(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    alone = gramian.collect(encoder, text_workload(tokenizer, texts[:8], batch_size=1), objective="none")
    together = gramian.collect(encoder, text_workload(tokenizer, texts[:8], batch_size=8), objective="none")
    for name in alone:
        assert alone[name].tokens == together[name].tokens
        assert torch.allclose(alone[name].gram_in(), together[name].gram_in(), rtol=1e-3, atol=1e-4), name


def test_model_is_left_as_it_was(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    encoder.train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    gramian.collect(encoder, texts[:4], tokenizer=tokenizer)
    assert encoder.training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_bad_calibration_is_named(encoder: nn.Module, tokenizer: object, texts: list[str]) -> None:
    with pytest.raises(GramianError, match="empty"):
        gramian.collect(encoder, [], tokenizer=tokenizer)
    with pytest.raises(GramianError, match="tokenizer"):
        gramian.collect(encoder, texts[:2])
    with pytest.raises(GramianError, match="did you mean"):
        gramian.collect(encoder, texts[:2], tokenizer=tokenizer, include=["encoder.layer.0.intermediate.dens"])
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight[:] = float("inf")
    with pytest.raises(GramianError, match=r"layer encoder\.layer\.0\.attention\.self\.query: NaN or Inf"):
        gramian.collect(encoder, texts[:4], tokenizer=tokenizer)
    with torch.no_grad():
        encoder.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(GramianError, match=r"encoder\.layer\.1\.output\.dense: 1 of 8192 entries"):
        gramian.collect(encoder, texts[:4], tokenizer=tokenizer)


def test_language_model_objective() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=32)).eval()
    from gramian.models.workload import Workload

    ids = torch.randint(0, 64, (4, 16))
    work = Workload(
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}],
        run=lambda m, b: m(**b),
        features=lambda m, b: m(**b).logits.mean(1),
        mask=lambda b: b["attention_mask"],
        outputs=lambda m, b: [m(**b).logits.mean(1)],
        logits=lambda m, b: m(**b).logits,
    )
    grams = gramian.collect(model, work)
    assert set(grams) == {f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert grams["transformer.h.0.mlp.c_fc"].gradient.shape == (256, 256)
    assert [j.kind for j in grams.joints] == ["neurons"]  # Conv1D: found like any other


class Changing(nn.Module):
    """Writes to its input between two layers; batch statistics that stay in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        first = self.a(x)
        return first + self.b(x.relu_())


def test_autocast_does_not_narrow_the_sums() -> None:
    x = 1 + 0.05 * torch.randn(4096, 6)
    with torch.autocast("cpu", torch.bfloat16):
        gram = Gram(6).update(x)
    wanted = torch.cov(x.double().mT, correction=0)
    assert float((gram.covariance() - wanted).norm() / wanted.norm()) < 1e-3
    tower = Tower()
    with torch.autocast("cpu", torch.bfloat16):
        found = collect_layers(
            tower,
            {"a": tower.a},
            [x.view(512, 8, 6)],
            run=lambda m, batch: m(batch),
            objective=lambda m, batch, _: m(batch).sum(),
        )["a"]
    assert float((found.input.covariance() - wanted).norm() / wanted.norm()) < 1e-3
    assert found.gradient is not None
    assert torch.linalg.eigvalsh(found.gradient).min() > -1e-6 * found.gradient.trace()


def test_an_input_written_to_in_between_is_another_input() -> None:
    model = Changing().train()
    model.norm.eval()
    x = torch.randn(64, 6)
    layers = {"a": model.a, "b": model.b}
    grams = collect_layers(model, layers, [x], run=lambda m, batch: m(batch))
    with torch.no_grad():
        read = model.norm(x)
    assert grams["b"].site == "b"
    assert torch.allclose(grams["a"].input.moment().float(), read.mT @ read / 64, atol=1e-5)
    assert torch.allclose(grams["b"].input.moment().float(), read.relu().mT @ read.relu() / 64, atol=1e-5)
    assert model.training
    assert model.a.training
    assert not model.norm.training
