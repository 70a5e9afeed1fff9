"""Every recipe: how many numbers it trains, where it starts, and what its paper says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.adapt import attach, auto
from gramian.adapt.recipes import RECIPES, ensemble, recipe, restart, two_level_optimizers, two_level_step
from gramian.errors import GramianError
from gramian.ops import Operator

SHAPES = ((384, 384), (1536, 384), (384, 1536), (37, 53), (64, 96), (48, 48))
"""(out, in)."""


def network(out: int, in_: int, layers: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(in_, out) for _ in range(layers)))


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    total = torch.zeros(())
    for layer in model:  # type: ignore[attr-defined]
        total = total + (layer(batch) - 1).square().mean()
    return total


def data(in_: int, count: int = 200) -> list[Tensor]:
    return [torch.randn(count, in_, generator=torch.Generator().manual_seed(1))]


def attached(name: str, out: int, in_: int, rank: int, layers: int = 1, **options: Any) -> Any:
    model = network(out, in_, layers)
    adapter = recipe(name, **options)
    grams = {str(i): data(in_)[0].T @ data(in_)[0] for i in range(layers)} if "gram_in" in adapter.needs else None
    return attach(model, adapter, rank=rank, data=data(in_), loss=squares, grams=grams)


def up(a: int, b: int) -> int:
    return -(-a // b)


def divisor(n: int, most: int) -> int:
    return max(b for b in range(1, most + 1) if n % b == 0)


COUNTS: dict[str, Callable[[int, int, int], int]] = {
    "lora": lambda m, n, r: r * (m + n),
    "lora_plus": lambda m, n, r: r * (m + n),
    "rslora": lambda m, n, r: r * (m + n),
    "pissa": lambda m, n, r: r * (m + n),
    "nlora": lambda m, n, r: r * (m + n) + r * r,
    "slora": lambda m, n, r: r * (m + n) + r * r,
    "intermediate_tune": lambda m, n, r: r * r,
    "lora_sb": lambda m, n, r: r * r,
    "gradient_core": lambda m, n, r: r * r,
    "lora_xs": lambda m, n, r: r * r,
    "svfit": lambda m, n, r: r,
    "lora_mini": lambda m, n, r: 2 * r * min(4 * r, m, n),
    "singlora": lambda m, n, r: r * max(m, n),
    "asymmetric_lora": lambda m, n, r: r * m,
    "mica": lambda m, n, r: r * n,
    "eva": lambda m, n, r: r * (m + n),
    "corda": lambda m, n, r: r * (m + n),
    "compacter": lambda m, n, r: 4**3 + 2 * (r + m) + r + m,
    "surm_circulant": lambda m, n, r: max(m, n) + n,
    "surm_toeplitz": lambda m, n, r: (m + n - 1) + (2 * n - 1),
    "surm_displacement": lambda m, n, r: r * (m + n),
    "surm_kronecker": lambda m, n, r: up(m, r) * r + r * up(n, r),
    "surm_insert": lambda m, n, r: 2 * m + r + m,
    "hut": lambda m, n, r: r * (m + n),
    "pmss": lambda m, n, r: r * r,
    "msplora": lambda m, n, r: (r + r // 2 + r // 4) * (m + n),
    "capaboost": lambda m, n, r: r * (m + n),
    "lora_dropout": lambda m, n, r: r * (m + n),
    "bilora": lambda m, n, r: r * (m + n + 1),
    "moe_lora": lambda m, n, r: 4 * r * (m + n) + 4 * n,
    "riemann_lora": lambda m, n, r: r * (m + n),
    "poet": lambda m, n, r: (m * (divisor(m, r) - 1) + n * (divisor(n, r) - 1)) // 2,
    "oft": lambda m, n, r: n * (divisor(n, r) - 1) // 2,
    "hra": lambda m, n, r: r * n,
    "prolip": lambda m, n, r: m * n,
    "snnk": lambda m, n, r: m * r,
}
MOVES = {"lora_sb"}
"""Recipes that do not start as the model was."""


def test_every_recipe_has_a_formula() -> None:
    assert set(COUNTS) == set(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_counts_and_starts(name: str) -> None:
    for out, in_ in SHAPES:
        if name == "compacter" and out % 4:
            with pytest.raises(GramianError, match=r"layer 0.*37"):
                attached(name, out, in_, 8)
            continue
        if name in ("poet", "oft") and (out, in_) == (37, 53):  # primes have no blocks but the whole
            with pytest.raises(GramianError, match=r"layer 0.*do not divide its side"):
                attached(name, out, in_, 8)
            continue
        adapted = attached(name, out, in_, 8)
        assert adapted.numel == COUNTS[name](out, in_, 8), (name, out, in_)
        if name not in MOVES:
            x = torch.randn(64, in_, generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                y = adapted.model[0](x)
                with adapted.disabled():
                    plain = adapted.model[0](x)
            assert float((y - plain).abs().max()) <= 1e-6 * float(plain.abs().max()), (name, out, in_)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_training_lowers_the_loss(name: str) -> None:
    adapted = attached(name, 48, 48, 8)
    optimizer = adapted.optimizer(3e-2)
    x = data(48)[0]
    losses = []
    for _ in range(30):
        loss = squares(adapted.model, x)
        losses.append(float(loss.detach()))
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapted.step()
    assert losses[-1] < 0.995 * losses[0], (name, losses[0], losses[-1])


# What the papers say ------------------------------------------------------------------------------------------------


def randomised(op: Operator, seed: int = 0) -> Operator:
    """The operator with every trainable factor redrawn."""
    g = torch.Generator().manual_seed(seed)
    return op.replace(**{n: torch.randn(t.shape, generator=g).double() for n, t in op.trainable().items()})


@pytest.mark.parametrize("copies", [2, 4])
@pytest.mark.parametrize("shape", [(48, 40), (24, 20)])
def test_capaboost_has_the_full_predicted_rank(copies: int, shape: tuple[int, int]) -> None:
    adapted = attached("capaboost", *shape, 8, copies=copies)
    assert adapted.numel == 8 * sum(shape)
    made = randomised(adapted.edits["0"].update.op).dense()
    assert int(torch.linalg.matrix_rank(made)) == min(8 * copies, *shape)


def test_capaboost_gradients_are_those_of_the_sum() -> None:
    op = attached("capaboost", 12, 10, 3).edits["0"].update.op
    left, right = (op.factors()[name].detach() for name in ("left", "right"))
    masks = op.left_masks.float(), op.right_masks.float()
    wanted = sum((left * a) @ (right * b) for a, b in zip(*masks, strict=True))
    assert torch.allclose(op.dense(), wanted, atol=1e-6)


def test_singlora_is_positive_semi_definite_on_square_layers() -> None:
    op = attached("singlora", 48, 48, 4).edits["0"].update.op
    assert float(torch.linalg.eigvalsh(randomised(op).dense()).min()) > -1e-9
    wide = randomised(attached("singlora", 10, 16, 4).edits["0"].update.op)
    factor = wide.factors()["factor"]
    assert torch.allclose(wide.dense(), factor[:10] @ factor.mT)


def test_lora_dropout_masks_rows_and_columns_and_averages() -> None:
    adapted = attached("lora_dropout", 30, 20, 4, p=0.5)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.normal_()
    torch.manual_seed(0)
    op = adapted.edits["0"].update.op
    masked = adapted.adapters["0"].perturb(op).dense()
    kept = masked != 0
    rows, columns = kept.any(1), kept.any(0)
    assert torch.equal(kept, rows[:, None] & columns)  # whole rows and columns, never the rank
    assert 5 < int(rows.sum()) < 25
    assert torch.allclose(masked[rows][:, columns], 4 * op.dense()[rows][:, columns], atol=1e-4)
    x = torch.randn(6, 20)
    run = lambda model: model(x)  # noqa: E731
    with torch.no_grad():
        one = ensemble(adapted, run, 1)
        many = ensemble(adapted, run, 2000)
        plain = adapted.model.eval()(x)
    assert float((many - plain).norm()) < 0.15 * float((one - plain).norm())


def test_two_levels_learn_from_two_losses() -> None:
    x, other = data(20)[0], torch.randn(100, 20, generator=torch.Generator().manual_seed(5))
    for lookahead in (0.0, 0.01):
        adapted = attached("bilora", 24, 20, 4)
        optimizers = two_level_optimizers(adapted, 1e-2, 3e-2)
        losses = [
            two_level_step(
                adapted,
                optimizers,
                lambda adapted=adapted: squares(adapted.model, x),
                lambda adapted=adapted: squares(adapted.model, other),
                lookahead=lookahead,
            )
            for _ in range(30)
        ]
        assert float(losses[-1][1]) < 0.97 * float(losses[0][1])
    with pytest.raises(GramianError, match=r"layer 0.*bilora"):
        two_level_optimizers(attached("lora", 24, 20, 4), 1e-2, 1e-2)


def test_the_look_ahead_gradient_is_that_of_the_unrolled_step() -> None:
    """Against autograd through the inner step."""
    adapted = attached("bilora", 8, 6, 2)
    edit = adapted.edits["0"].double()
    adapted.model.double()
    x, other = (torch.randn(50, 6, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        edit.trainable()["parts.1.values"].normal_()
    names = list(edit.trainable())
    values = {n: p.detach().clone().requires_grad_() for n, p in edit.trainable().items()}
    base = adapted.model[0].base

    def loss(values: dict[str, Tensor], batch: Tensor) -> Tensor:
        p, s, q = (values[f"parts.{i}.{k}"] for i, k in enumerate(("weight", "values", "weight")))
        return ((base(batch) + (batch @ q.T * s) @ p.T) - 1).square().mean()

    def lower(values: dict[str, Tensor]) -> Tensor:
        p, q = values["parts.0.weight"], values["parts.2.weight"]
        eye = torch.eye(2, dtype=torch.float64)
        return loss(values, x) + 0.1 * ((p.T @ p - eye).square().sum() + (q @ q.T - eye).square().sum())

    xi = 0.05
    inner = [n for n in names if n != "parts.1.values"]
    steps = torch.autograd.grad(lower(values), [values[n] for n in inner], create_graph=True)
    moved = {**values, **{n: values[n] - xi * g for n, g in zip(inner, steps, strict=True)}}
    (wanted,) = torch.autograd.grad(loss(moved, other), [values["parts.1.values"]])

    class Recorder(torch.optim.SGD):
        seen: Tensor | None = None

        def step(self, closure: Any = None) -> None:
            grad = self.param_groups[0]["params"][0].grad
            type(self).seen = None if grad is None else grad.clone()

    trainable = edit.trainable()
    first = torch.optim.SGD([trainable[n] for n in inner], lr=0.0)
    second = Recorder([trainable["parts.1.values"]], lr=0.0)
    two_level_step(
        adapted,
        (first, second),
        lambda: squares(adapted.model, x),
        lambda: squares(adapted.model, other),
        lookahead=xi,
    )
    assert Recorder.seen is not None
    assert float((Recorder.seen - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_shared_arrays_are_one() -> None:
    layers, r = 4, 8
    model = nn.ModuleDict({f"block{i}": nn.ModuleDict({"q": nn.Linear(32, 24)}) for i in range(layers)})
    pyramid = attach(model, recipe("msplora"), rank=r)
    assert pyramid.numel == (r + 2 * r // 2 + layers * r // 4) * (32 + 24)
    shared = attach(model, recipe("compacter"), rank=r, name="other")
    assert shared.numel == 4**3 + layers * (2 * (r + 24) + r + 24)


def test_lora_plus_rates() -> None:
    groups = attached("lora_plus", 30, 20, 4, ratio=8.0).parameter_groups(1e-3)
    assert {group["lr"]: [tuple(p.shape) for p in group["params"]] for group in groups} == {
        8e-3: [(30, 4)],
        1e-3: [(4, 20)],
    }


def test_a_mixture_passes_the_gradients_of_its_paper() -> None:
    from gramian.adapt.mixture import gate_weights, mixed

    outputs = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = gate_weights(scores, 3)
    plain, rescaled = (mixed(outputs, weights, rescaled=flag) for flag in (False, True))
    assert torch.allclose(plain, rescaled)
    for i, output in enumerate(outputs):
        (a,) = torch.autograd.grad(plain.sum(), output, retain_graph=True)
        (b,) = torch.autograd.grad(rescaled.sum(), output, retain_graph=True)
        assert torch.allclose(b * weights[:, i, None].sqrt(), a)
    (a,) = torch.autograd.grad(plain.sum(), scores, retain_graph=True)
    (b,) = torch.autograd.grad(rescaled.sum(), scores)
    assert torch.allclose(a, b)
    sparse = gate_weights(scores, 2)
    assert ((sparse > 0).sum(-1) == 2).all()
    assert torch.allclose(sparse.sum(-1), torch.ones(5, dtype=torch.float64))


def test_poet_keeps_singular_values_over_merges() -> None:
    model = network(16, 24)
    before = torch.linalg.svdvals(model[0].weight.detach().double())  # type: ignore[index]
    adapted = attach(model, recipe("poet"), rank=8, include=("0",))
    optimizer = adapted.optimizer(1e-2)
    x = torch.randn(64, 24)
    for step in range(1000):
        if step and step % 170 == 0:
            adapted = restart(adapted, optimizer, seed=step)
        optimizer.zero_grad()
        squares(adapted.model, x).backward()
        optimizer.step()
    adapted.merge(lossy=True)
    weight = model[0].weight.detach().double()  # type: ignore[index]
    assert float((weight - network(16, 24)[0].weight.detach()).norm()) > 0.3 * float(weight.norm())  # type: ignore[index]
    assert float((torch.linalg.svdvals(weight) / before - 1).abs().max()) <= 1e-5


def test_prolip_is_held_near_its_start() -> None:
    adapted = attached("prolip", 20, 16, 1, weight=0.5)
    with torch.no_grad():
        adapted.trainable_parameters()[0].fill_(0.1)
    assert float(adapted.penalty().detach()) == pytest.approx(0.5 * 0.01 * 20 * 16)


def test_moment_probe() -> None:
    from gramian.adapt.probing import MomentProbe

    torch.manual_seed(0)
    probe = MomentProbe(768, 10)
    assert probe.second.in_features == 2883
    probe = MomentProbe(24, 3, heads=3, size=8)
    tokens = torch.randn(2, 7, 24)
    mask = torch.ones(2, 7)
    mask[0, 4:] = 0
    z = probe.norm(probe.reduce(tokens[0, :4]).reshape(4, 3, 8)).double()
    z = z - z.mean(0)
    wanted = torch.stack([z[:, h].T @ z[:, h + 1] for h in range(2)])
    found = probe.moments(tokens, mask)[0].double()
    assert torch.allclose(found, wanted / wanted.norm(), atol=1e-5)
    assert torch.allclose(probe(tokens, mask)[0], probe(tokens[:1, :4])[0], atol=1e-5)
    with pytest.raises(GramianError, match="1 heads"):
        MomentProbe(24, 3, heads=1)


def test_recipes_by_name() -> None:
    assert recipe("LoRA-SB", step=1e-3).recipe == "lora_sb"
    with pytest.raises(GramianError, match=r"unknown recipe 'pisa' \(did you mean pissa"):
        recipe("pisa")
    with pytest.raises(GramianError, match=r"no option 'alpa'.*alpha"):
        recipe("lora", alpa=3)
    assert all(RECIPES[name]().recipe == name for name in RECIPES)


# auto -----------------------------------------------------------------------------------------------------------------


def test_auto_spends_the_budget_where_the_gradient_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[2].weight.mul_(0.01)  # little gradient reaches the layers before

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch[:, :20]).square().mean()

    batch = torch.randn(100, 30)
    plan = auto(model, [batch], 150, loss=loss)
    assert plan.parameters <= 150
    assert plan.parameters == sum(choice.parameters for choice in plan.choices.values())
    assert plan.choices["2"].parameters > plan.choices["0"].parameters
    adapted = plan.attach(model)
    assert adapted.numel == plan.parameters
    # Optimal: no other split of ranks between the layers captures more.
    gradients = {name: torch.linalg.svdvals(op.dense()).square() for name, op in plan.gradients.items()}
    whole = sum(float(values.sum()) for values in gradients.values())
    best = max(
        sum(float(gradients[name][:r].sum()) for name, r in zip("012", (a, b, c), strict=True)) / whole
        for a in range(13)
        for b in range(13)
        for c in range(13)
        if a * a + b * b + c * c <= 150
    )
    assert plan.captured >= best - 1e-4
    with pytest.raises(GramianError, match="budget 0"):
        auto(model, [batch], 0, loss=loss)
