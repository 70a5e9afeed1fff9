"""Small tasks that the claims share: handwritten digits, and the next character of CPython's documentation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train x, train y, test x, test y): 8 x 8 images in 64 numbers of mean 0 and deviation 1; every third for testing."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x[order] - x.mean()) / x.std(), y[order]
    test = torch.arange(len(x)) % 3 == 0
    return x[~test], y[~test], x[test], y[test]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean()
    model.train()
    return float(right)


def fit_digits(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int = 128,
    seed: int = 0,
    each: Callable[[int], None] | None = None,
) -> tuple[float, float]:
    """Train on digits with a cosine schedule; (mean training loss of the last tenth, seconds).

    Args:
        model: (batch, 64) -> (batch, 10).
        optimiser: its groups' rates are what the schedule starts from.
        steps: optimiser steps.
        batch: images a step.
        seed: of the batches.
        each: called before every step with its number.
    """
    x, y, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimiser.param_groups]
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        if each is not None:
            each(step)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        picked = torch.randint(len(x), (batch,), generator=generator)
        loss = F.cross_entropy(model(x[picked]), y[picked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail), time.perf_counter() - start


class Characters:
    """The text of CPython's documentation as numbers, cut into a training and a test part."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        common = sorted(set(text), key=text.count, reverse=True)[:95]
        place = {character: i + 1 for i, character in enumerate(common)}
        codes = torch.tensor([place.get(character, 0) for character in text])
        cut = int(0.9 * len(codes))
        self.size = len(common) + 1
        self.train, self.test = codes[:cut], codes[cut:]

    def batch(self, part: Tensor, count: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(count, context) characters and the (count,) that follow."""
        first = torch.randint(len(part) - context, (count,), generator=generator)
        span = first[:, None] + torch.arange(context)
        return part[span], part[first + context]


def character_model(
    text: Characters, hidden: Iterable[nn.Module], *, context: int = 16, width: int = 512
) -> nn.Sequential:
    """Embedding, `hidden` layers on a vector of `width` numbers each followed by a GELU, and a read-out."""
    layers: list[nn.Module] = [nn.Embedding(text.size, width // context), nn.Flatten()]
    for layer in hidden:
        layers += [layer, nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, text.size))


def fit_characters(
    model: nn.Module,
    text: Characters,
    optimiser: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int = 128,
    context: int = 16,
    seed: int = 0,
) -> float:
    """Train with a linear schedule; the loss on 8192 test positions in nats a character."""
    generator = torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimiser.param_groups]
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, 20 * (step + 1) / steps) * (1 - step / steps)
        x, y = text.batch(text.train, batch, context, generator)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        x, y = text.batch(text.test, 8192, context, torch.Generator().manual_seed(1))
        return float(F.cross_entropy(model(x), y))
