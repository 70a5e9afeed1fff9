"""The task that claims on fine-tuning share: a network for handwritten digits is adapted to digits turned by 90 degrees."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from tasks import accuracy, digits
from torch import Tensor, nn

from gramian.adapt import Adapter, attach

SEEDS = (0, 1, 2, 3, 4)
WIDTH, STEPS, TARGET = 128, 250, 0.1
LAYERS = ("0", "2", "4")
"""The three hidden layers; the head stays as it is."""


def turned() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tasks.digits`` with every image turned by 90 degrees."""
    x, y, test_x, test_y = digits()

    def turn(images: Tensor) -> Tensor:
        return images.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)

    return turn(x), y, turn(test_x), test_y


def network(seed: int) -> nn.Sequential:
    """Three hidden layers of 128, trained on upright digits for 300 steps of Adam."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip
    x, y, _, _ = digits()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(300):
        picked = torch.randint(len(x), (128,), generator=generator)
        F.cross_entropy(model(x[picked]), y[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of (images, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def adapt(
    model: nn.Sequential,
    adapter: Adapter | dict[str, Adapter],
    *,
    rank: Any,
    lr: float,
    steps: int = STEPS,
    include: Iterable[str] = LAYERS,
    seed: int = 0,
) -> dict[str, Any]:
    """Full-batch training of one adapter.

    Returns:
        steps until the loss on all training digits is below 0.1 (None if never), the final loss, test accuracy, and how many
        numbers train. The adapter is taken off again.
    """
    x, y, test_x, test_y = turned()
    adapted = attach(model, adapter, include=tuple(include), rank=rank, data=[(x, y)], loss=loss, seed=seed)
    optimizer = adapted.optimizer(lr)
    reached: int | None = None
    value = torch.tensor(0.0)
    for step in range(steps):
        value = loss(model, (x, y))
        if reached is None and float(value.detach()) < TARGET:
            reached = step
        (value + adapted.penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        adapted.step()
    found = {"steps": reached, "loss": float(value.detach()), "accuracy": accuracy(model, test_x, test_y)}
    found["parameters"] = adapted.numel
    adapted.detach()
    return found


def tuned(adapter: Adapter, *, rank: int, rates: Iterable[float], steps: int = STEPS) -> float:
    """The learning rate with the lowest final loss on a network of seed 100, which no result is taken from."""
    model = network(100)
    tried = {lr: adapt(model, adapter, rank=rank, lr=lr, steps=steps)["loss"] for lr in rates}
    return min(tried, key=lambda lr: tried[lr] if tried[lr] == tried[lr] else float("inf"))


def over_seeds(adapter: Adapter, *, rank: int, lr: float, steps: int = STEPS) -> dict[str, Any]:
    """``adapt`` on the networks of ``SEEDS``: medians, and the half width of a 95 % interval of the mean accuracy."""
    runs = [adapt(network(seed), adapter, rank=rank, lr=lr, steps=steps, seed=seed) for seed in SEEDS]
    reached = [run["steps"] if run["steps"] is not None else steps + 1 for run in runs]
    accuracies = [run["accuracy"] for run in runs]
    return {
        "parameters": runs[0]["parameters"],
        "learning rate": lr,
        "median steps to 0.1": statistics.median(reached) if statistics.median(reached) <= steps else f"over {steps}",
        "final loss, median": round(statistics.median(run["loss"] for run in runs), 4),
        "accuracy, mean": round(statistics.mean(accuracies), 4),
        # Student's t for four degrees of freedom.
        "accuracy, 95 % interval": round(2.776 * statistics.stdev(accuracies) / len(accuracies) ** 0.5, 4),
    }
