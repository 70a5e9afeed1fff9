"""A narrower key-value cache for a language model: every head's keys and values are stored in a few coordinates each.

The bases are orthogonal, a head's own and ordered, so that any rank is a prefix (MatryoshkaKV 2024, "Adaptive KV compression
via trainable orthogonal projection"): they start as the principal axes of calibration keys (after the rotary embedding) and
values, can be trained by distillation under random ranks, and each head then gets the rank that the budget allows it::

    projection = project_key_values(model, texts, keep=0.37, tokenizer=tokenizer, train_steps=300)
    model.generate(**inputs, past_key_values=projection.cache(model.config))
    projection.save("model-directory")

Everything goes through the cache interface of the transformers library, so that any decoder that uses it will do and no
module is changed.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gramian.compression import solve
from gramian.compression.knapsack import Option
from gramian.errors import GramianError
from gramian.grams import Gram, LayerGrams
from gramian.linalg import eigh, psd_root
from gramian.models.api import as_workload
from gramian.models.huggingface_cache import Tap, projected_cache, tap_cache
from gramian.models.journal import write
from gramian.models.workload import Batch, Workload
from gramian.modes import evaluating
from gramian.ops.orthogonal import Orthogonal

TENSORS = "kv_cache.safetensors"
DESCRIPTION = "kv_cache.json"
SCHEMA = 1
SIDES = ("keys", "values")
ALLOCATIONS = ("uniform", "predicted", "measured")
WEIGHTINGS = ("none", "loss")

Progress = Callable[[str, int, int], None]
"""(stage, done, total)."""


@dataclass(frozen=True, eq=False)
class HeadBases:
    """How the keys, or the values, of one layer are stored: ``x @ down[:, :r]``, read back as
    ``mean + (x - mean) @ down[:, :r] @ up[:r]``, r a head's rank. At full rank x itself is stored.

    Attributes:
        down: (H, D, D) and
        up: (H, D, D), its inverse: its transpose where bases are orthogonal.
        mean: (H, D) of the calibration states.
        ranks: (H,), 1 to D each.
    """

    down: Tensor
    up: Tensor
    mean: Tensor
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        heads, size = self.mean.shape if self.mean.dim() == 2 else (0, 0)
        fits = self.down.shape == self.up.shape == (heads, size, size) and len(self.ranks) == heads > 0
        if not fits or not all(1 <= rank <= size for rank in self.ranks):
            raise GramianError(
                f"key-value bases: down {tuple(self.down.shape)}, up {tuple(self.up.shape)}, mean "
                f"{tuple(self.mean.shape)}, ranks {list(self.ranks)}; expected (H, D, D), the same, (H, D) and H ranks "
                "from 1 to D"
            )

    @property
    def heads(self) -> int:
        """H: key-value heads."""
        return self.mean.shape[0]

    @property
    def size(self) -> int:
        """D: numbers of a head."""
        return self.mean.shape[1]

    def packed(self) -> PackedBases:
        """Ready to run."""
        return PackedBases(self)


class PackedBases:
    """The bases of one layer's keys or values as ``narrow`` and ``widen``; heads of different ranks lie side by side."""

    def __init__(self, bases: HeadBases) -> None:
        heads, size, widest = bases.heads, bases.size, max(bases.ranks)
        self.shape = (heads, size)
        self.full = all(rank == size for rank in bases.ranks)
        down, up, mean = (tensor.detach().clone() for tensor in (bases.down, bases.up, bases.mean))
        column = torch.arange(widest)
        kept = column < torch.tensor(bases.ranks)[:, None]  # (H, widest)
        for head, rank in enumerate(bases.ranks):
            if rank == size:  # nothing is lost by not turning it
                down[head] = up[head] = torch.eye(size).to(down)
                mean[head] = 0
        self.down = down[:, :, :widest]
        self.up = up[:, :widest] * kept.to(up)[:, :, None]
        self.rest = (mean[:, None] - mean[:, None] @ self.down @ self.up).contiguous()
        flat = kept.reshape(-1)
        self.pack: Tensor | None = None
        if not bool(flat.all()):
            self.pack = flat.nonzero().squeeze(1)
            # A dropped coordinate reads any stored one: its row of `up` is zero.
            self.unpack = (flat.cumsum(0) - 1).clamp_min(0)

    def _as(self, states: Tensor) -> None:
        if states.dtype != self.down.dtype or states.device != self.down.device:
            self.down, self.up, self.rest = (tensor.to(states) for tensor in (self.down, self.up, self.rest))
            if self.pack is not None:
                self.pack, self.unpack = self.pack.to(states.device), self.unpack.to(states.device)

    def narrow(self, states: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, 1, T, sum of ranks).

        Raises:
            GramianError: other heads than the bases were made for.
        """
        if (states.shape[1], states.shape[3]) != self.shape:
            raise GramianError(
                f"key-value projection for {self.shape[0]} heads of {self.shape[1]}; the model has {states.shape[1]} of "
                f"{states.shape[3]}: use the projection of this model"
            )
        self._as(states)
        coordinates = states if self.full else states @ self.down
        flat = coordinates.transpose(1, 2).flatten(2)[:, None]
        return flat if self.pack is None else flat.index_select(-1, self.pack)

    def widen(self, stored: Tensor) -> Tensor:
        """(B, 1, T, sum of ranks) -> (B, H, T, D)."""
        flat = stored if self.pack is None else stored.index_select(-1, self.unpack)
        coordinates = flat[:, 0].reshape(*flat.shape[:1], flat.shape[2], self.shape[0], -1).transpose(1, 2)
        return coordinates if self.full else torch.add(coordinates @ self.up, self.rest)


@dataclass(frozen=True, eq=False)
class KeyValueProjection:
    """The bases of every layer's keys and values.

    Attributes:
        layers: (keys, values) of each layer.
    """

    layers: tuple[tuple[HeadBases, HeadBases], ...]

    @property
    def ranks(self) -> list[list[list[int]]]:
        """[layer][keys, values][head]."""
        return [[list(side.ranks) for side in layer] for layer in self.layers]

    @property
    def keep(self) -> float:
        """Numbers stored for a token, as a share of an ordinary cache's."""
        sides = [side for layer in self.layers for side in layer]
        return sum(sum(side.ranks) for side in sides) / sum(side.heads * side.size for side in sides)

    def with_ranks(self, ranks: Sequence[Sequence[Sequence[int]]]) -> KeyValueProjection:
        """The same bases cut at other ranks, [layer][keys, values][head]."""
        return KeyValueProjection(
            tuple(
                (
                    dataclasses.replace(layer[0], ranks=tuple(chosen[0])),
                    dataclasses.replace(layer[1], ranks=tuple(chosen[1])),
                )
                for layer, chosen in zip(self.layers, ranks, strict=True)
            )
        )

    def uniform(self, keep: float) -> KeyValueProjection:
        """Every head at the same share of its size, rounded down to a rank, at least 1."""
        return self.with_ranks(
            [[[max(1, int(keep * side.size + 1e-9))] * side.heads for side in layer] for layer in self.layers]
        )

    def cache(self, config: Any) -> Any:
        """An empty cache for ``model(..., past_key_values=...)`` or ``model.generate(..., past_key_values=...)``, for one
        run: a ``DynamicCache`` of the transformers library, with ``nbytes``.

        Args:
            config: the model's.

        Raises:
            GramianError: the model has another number of layers, or not all of them cache keys and values.
        """
        return projected_cache([(keys.packed(), values.packed()) for keys, values in self.layers], config)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the bases and the ranks beside a model; each file is whole or absent.

        Raises:
            GramianError: the directory cannot be written.
        """
        folder = Path(directory)
        tensors = {
            f"{index}.{side}.{name}": getattr(bases, name).detach().cpu().contiguous()
            for index, layer in enumerate(self.layers)
            for side, bases in zip(SIDES, layer, strict=True)
            for name in ("down", "up", "mean")
        }
        description = {"schema": SCHEMA, "ranks": self.ranks}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / TENSORS, save(tensors, {"format": "pt"}))
            write(folder / DESCRIPTION, (json.dumps(description) + "\n").encode())
        except OSError as error:
            raise GramianError(f"{folder} cannot be written: {error}") from error

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> KeyValueProjection:
        """What ``save`` wrote.

        Raises:
            GramianError: a file is missing or damaged, or the two do not belong together.
        """
        folder = Path(directory)
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise GramianError(f"{folder}: {TENSORS} or {DESCRIPTION} is missing or damaged: {error}") from error
        try:
            if description["schema"] > SCHEMA:
                raise GramianError(
                    f"schema {description['schema']}; this gramian reads up to {SCHEMA}: pip install -U gramian"
                )
            if len(tensors) != 6 * len(description["ranks"]):
                raise GramianError(
                    f"{len(tensors)} tensors for {len(description['ranks'])} layers; expected 6 for each"
                )
            layers = []
            for index, ranks in enumerate(description["ranks"]):
                parts = []
                for side, chosen in zip(SIDES, ranks, strict=True):
                    down, up, mean = (tensors[f"{index}.{side}.{name}"] for name in ("down", "up", "mean"))
                    parts.append(HeadBases(down, up, mean, tuple(int(rank) for rank in chosen)))
                layers.append((parts[0], parts[1]))
            for name, tensor in tensors.items():
                if not bool(tensor.isfinite().all()):
                    raise GramianError(f"tensor {name} holds NaN or Inf")
        except (KeyError, TypeError, ValueError) as error:
            raise GramianError(f"{folder / DESCRIPTION}: {error}; save the projection again") from error
        return cls(tuple(layers))


# What calibration shows ----------------------------------------------------------------------------------------------

LayerStates = tuple[list[LayerGrams], list[LayerGrams]]
"""Grams of the keys and of the values of one layer, by head."""


def language_workload(model: nn.Module, data: Any, tokenizer: Any = None) -> Workload:
    """Data of a causal language model as batches of keyword arguments, with logits.

    Args:
        model: of the transformers library.
        data: texts (with `tokenizer`), token ids (B, T), mappings with ``input_ids``, or a Workload of those.
        tokenizer: for texts.

    Raises:
        GramianError: batches without ``input_ids``.
    """
    work = as_workload(model, data, tokenizer)
    batches = [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in work.batches]
    if not all(hasattr(batch, "keys") and "input_ids" in batch for batch in batches):
        raise GramianError("key-value projection: a batch has no input_ids; expected token ids or mappings with them")

    def logits(model: nn.Module, batch: Batch) -> Tensor:
        found = model(**batch).logits
        assert isinstance(found, Tensor)
        return found

    return dataclasses.replace(
        work, batches=batches, mask=lambda batch: batch.get("attention_mask"), logits=logits, kind="text"
    )


def _through(batch: Batch, tap: Tap) -> Batch:
    return {**batch, "past_key_values": tap_cache(tap), "use_cache": True}


def collect_key_values(
    model: nn.Module,
    data: Any,
    *,
    gradients: bool = True,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerStates]:
    """Grams of every head's keys, as attention reads them (after the rotary embedding), and values; padding is left out.

    A projection is a linear map inserted behind the keys, so the Gram of that map's gradient weighs its error as
    ``LayerGrams`` does a layer's.

    Args:
        model: a decoder of the transformers library that takes ``past_key_values``; left as it was.
        data: see ``language_workload``.
        gradients: whether to collect gradients too, of the loss at labels that the model samples itself.
        tokenizer: for texts.
        seed: of the labels.
        progress: called with ("collect", batches done, batches in all).

    Raises:
        GramianError: the model did not use the cache, or its keys are not finite.
    """
    work = language_workload(model, data, tokenizer)
    objective = work.objective("lm") if gradients else None
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, LayerStates] = {}
    with evaluating(model):
        for index, batch in enumerate(work.batches):
            real = batch.get("attention_mask")
            watch = _Watch(found, None if real is None else real.bool(), gradients)
            if objective is None:
                with torch.no_grad():
                    work.run(model, _through(batch, watch))
            else:
                loss = objective(model, _through(batch, watch), generator)
                watch.finish(torch.autograd.grad(loss, watch.leaves))
            if progress is not None:
                progress("collect", index + 1, len(work.batches))
    if not found or sorted(found) != list(range(len(found))):
        raise GramianError(f"{type(model).__name__} did not pass its keys and values through past_key_values")
    return [found[index] for index in range(len(found))]


class _Watch:
    """A tap that adds what passes to the Grams."""

    def __init__(self, found: dict[int, LayerStates], mask: Tensor | None, gradients: bool) -> None:
        self.found, self.mask, self.gradients = found, mask, gradients
        self.leaves: list[Tensor] = []
        self.seen: list[tuple[Tensor, list[LayerGrams]]] = []

    def __call__(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.found:
            made = [[LayerGrams(Gram(x.shape[-1])) for _ in range(x.shape[1])] for x in (keys, values)]
            self.found[layer] = (made[0], made[1])
        out = []
        for x, grams, side in zip((keys, values), self.found[layer], SIDES, strict=True):
            for head, gram in enumerate(grams):
                states = x[:, head].detach().cpu()
                try:
                    gram.input.update(states[self.mask.cpu()] if self.mask is not None else states.flatten(0, 1))
                except GramianError as error:
                    raise GramianError(f"{side} of layer {layer}, head {head}: {error}") from None
                if gram.centre is None:
                    gram.centre = gram.input.mean.clone()
            if self.gradients:
                leaf = torch.zeros_like(x, requires_grad=True)  # where a change of the states would enter
                self.leaves.append(leaf)
                self.seen.append((x.detach(), grams))
                x = x + leaf
            out.append(x)
        return out[0], out[1]

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Per sequence, D = sum over tokens of g (x - centre)^T; add D D^T."""
        for gradient, (seen, grams) in zip(gradients, self.seen, strict=True):
            states, g = seen.cpu(), gradient.cpu()
            if self.mask is not None:
                g = g * self.mask.cpu()[:, None, :, None].to(g)
            for head, gram in enumerate(grams):
                assert gram.centre is not None
                mean = gram.centre.to(states)
                moved = (g[:, head].mT @ (states[:, head] - mean)).double()  # (B, D, D)
                total = (moved @ moved.mT).sum(0)
                gram.gradient = total if gram.gradient is None else gram.gradient + total
                gram.sequences += len(moved)


def principal_bases(states: Sequence[LayerStates], *, weighting: str = "none") -> KeyValueProjection:
    """Bases by principal components, at full rank.

    With C a head's covariance, the first r eigenvectors of C give the least squared error of any orthogonal projection of
    rank r. With weighting "loss" and H the Gram of the loss's gradient, they are those of ``H^{1/2} C H^{1/2}``, un-weighted:
    the least predicted rise of the loss of any projection of rank r; they are then not orthogonal.

    Args:
        states: from ``collect_key_values``.
        weighting: "none", the paper's, or "loss".

    Raises:
        GramianError: an unknown weighting, or "loss" without gradients.
    """
    if weighting not in WEIGHTINGS:
        raise GramianError(f"weighting {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")

    def bases(grams: Sequence[LayerGrams]) -> HeadBases:
        down, up = [], []
        for head in grams:
            covariance = head.input.covariance()
            if weighting == "none":
                vectors = eigh(covariance)[1]
                down.append(vectors)
                up.append(vectors.mT)
            else:
                root, inverse = psd_root(_gram_out(head))
                vectors = eigh(root @ covariance @ root)[1]
                down.append(root @ vectors)
                up.append(vectors.mT @ inverse)
        mean = torch.stack([head.input.mean for head in grams])
        size = mean.shape[1]
        return HeadBases(torch.stack(down).float(), torch.stack(up).float(), mean.float(), (size,) * len(grams))

    return KeyValueProjection(tuple((bases(keys), bases(values)) for keys, values in states))


def _gram_out(head: LayerGrams) -> Tensor:
    gram = head.gram_out()
    if gram is None:
        raise GramianError("these Grams hold no gradients; collect_key_values(gradients=True)")
    return gram


def predicted_errors(projection: KeyValueProjection, states: Sequence[LayerStates]) -> list[list[Tensor]]:
    """What each rank of each head is predicted to cost: ``1/2 tr(H N^T C N)`` with N what rank r leaves out.

    In the coordinates of the basis it is a sum over the pairs of those that are left out, so that all ranks come at once.

    Returns:
        [layer][keys, values] -> (H, D + 1) float64, entry r the rise of the loss (nats a sequence) at rank r.
    """
    found = []
    for layer, grams in zip(projection.layers, states, strict=True):
        row = []
        for bases, heads in zip(layer, grams, strict=True):
            curves = []
            for down, up, head in zip(bases.down.double(), bases.up.double(), heads, strict=True):
                pairs = (down.mT @ head.input.covariance() @ down) * (up @ _gram_out(head) @ up.mT)
                tail = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
                curves.append(F.pad(tail / 2, (0, 1)).clamp_min(0))
            row.append(torch.stack(curves))
        found.append(row)
    return found


# Training ------------------------------------------------------------------------------------------------------------


def train_bases(
    model: nn.Module,
    data: Any,
    projection: KeyValueProjection,
    *,
    steps: int = 300,
    learning_rate: float = 5e-3,
    lowest: float = 0.125,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> KeyValueProjection:
    """Turn the bases so that the model loses little at every rank at once (MatryoshkaKV 2024).

    Each basis is multiplied by an orthogonal matrix, the Cayley transform of a skew-symmetric parameter that starts at zero.
    Every step draws a rank for every head, uniform between `lowest` and all of it, so that leading coordinates learn to
    matter most, and descends the divergence ``KL(model || projected model)`` of the next token. The model is not trained.

    Args:
        model: left as it was.
        data: see ``language_workload``; no labels are used.
        projection: the start; its ranks are kept.
        steps: of Adam, one batch each.
        learning_rate: falls to zero along a cosine.
        lowest: least share of a head's coordinates in a step.
        tokenizer: for texts.
        seed: of ranks and batches.
        progress: called with ("train", steps done, steps).

    Raises:
        GramianError: the loss is not finite.
    """
    work = language_workload(model, data, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    sides = [[_Trained(side, device) for side in layer] for layer in projection.layers]
    parameters = [side.skew for layer in sides for side in layer]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)

    def tap(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return sides[layer][0](keys), sides[layer][1](values)

    with evaluating(model):
        order: list[int] = []
        for step in range(steps):
            if not order:
                order = torch.randperm(len(work.batches), generator=generator).tolist()
            batch = work.batches[order.pop()]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
            for layer in sides:
                for side in layer:
                    side.draw(lowest, generator)
            assert work.logits is not None
            with torch.no_grad():
                teacher = work.logits(model, batch)
            loss = _divergence(teacher, work.logits(model, _through(batch, tap)), work.mask(batch))
            if not bool(loss.isfinite()):
                raise GramianError(f"training key-value bases: the loss is {float(loss)} at step {step}")
            for skew, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                skew.grad = gradient
            optimiser.step()
            if progress is not None:
                progress("train", step + 1, steps)
    return KeyValueProjection(tuple((layer[0].bases(), layer[1].bases()) for layer in sides))


class _Trained:
    """One side of one layer in training."""

    def __init__(self, start: HeadBases, device: torch.device) -> None:
        self.start = start
        size = start.size
        self.skew = torch.zeros(start.heads, size * (size - 1) // 2, device=device, requires_grad=True)
        self.down, self.up, self.mean = (t.to(device) for t in (start.down, start.up, start.mean[:, None]))
        self.mask = torch.ones(start.heads, 1, size, device=device)

    def draw(self, lowest: float, generator: torch.Generator) -> None:
        size = self.start.size
        first = max(1, round(lowest * size))
        ranks = torch.randint(first, size + 1, (self.start.heads, 1, 1), generator=generator)
        self.mask = (torch.arange(size) < ranks).float().to(self.mask.device)

    def __call__(self, x: Tensor) -> Tensor:
        turn = Orthogonal(self.skew).blocks()
        read = (x.float() - self.mean) @ (self.down @ turn) * self.mask
        return (read @ (turn.mT @ self.up) + self.mean).to(x.dtype)

    @torch.no_grad()
    def bases(self) -> HeadBases:
        turn = Orthogonal(self.skew.detach().double().cpu()).blocks()
        start = self.start
        down, up = start.down.double().cpu() @ turn, turn.mT @ start.up.double().cpu()
        return HeadBases(down.to(start.down), up.to(start.up), start.mean, start.ranks)


def _divergence(teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens of KL(teacher || student), from logits (B, T, V)."""
    each = F.kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="none")
    each = each.sum(-1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum()


# Ranks under a budget ------------------------------------------------------------------------------------------------


def allocate(
    projection: KeyValueProjection,
    keep: float,
    *,
    errors: Sequence[Sequence[Tensor]],
    step: int | None = None,
) -> KeyValueProjection:
    """The ranks of least predicted error within the budget: an exact knapsack over all heads.

    Args:
        projection: the bases.
        keep: share of the cache's numbers.
        errors: from ``predicted_errors``.
        step: ranks are its multiples; an eighth of the head by default.

    Raises:
        GramianError: the budget is below one step a head.
    """
    sides = [side for layer in projection.layers for side in layer]
    curves = [curve for layer in errors for curve in layer]
    groups, grids = [], []
    for side, curve in zip(sides, curves, strict=True):
        grid = _grid(side.size, step)
        for head in curve:
            groups.append([[[Option(rank, float(head[rank])) for rank in grid]]])
            grids.append(grid)
    solution = solve(groups, _budget(sides, keep, step))
    picked = iter(grid[choice.options[0]] for grid, choice in zip(grids, solution.choices, strict=True))
    return projection.with_ranks(
        [[[next(picked) for _ in range(s.heads)] for s in layer] for layer in projection.layers]
    )


def allocate_measured(
    model: nn.Module,
    data: Any,
    projection: KeyValueProjection,
    keep: float,
    *,
    step: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> KeyValueProjection:
    """The paper's greedy search: from full rank, cut a step off the head where that is measured to cost least, until the
    budget holds.

    A head's cost hardly falls as others are cut, so costs are kept in a heap and only the least is measured again: it is cut
    if it is still the least.

    Args:
        model: left as it was.
        data: see ``language_workload``; every measurement runs all of it, so give little.
        projection: the bases.
        keep: share of the cache's numbers.
        step: numbers cut at a time; an eighth of the head by default.
        tokenizer: for texts.
        progress: called with ("allocate", numbers cut, numbers to cut).

    Raises:
        GramianError: the budget is below one step a head.
    """
    work = language_workload(model, data, tokenizer)
    sides = [side for layer in projection.layers for side in layer]
    budget = _budget(sides, keep, step)
    grids = [_grid(side.size, step) for side in sides]
    level = [[len(grid) - 1] * side.heads for side, grid in zip(sides, grids, strict=True)]
    teachers = _teachers(model, work)

    def ranks() -> list[list[list[int]]]:
        flat = [[grid[i] for i in levels] for grid, levels in zip(grids, level, strict=True)]
        return [flat[2 * i : 2 * i + 2] for i in range(len(projection.layers))]

    def cost(side: int, head: int) -> float:
        level[side][head] -= 1
        found = _mean_divergence(model, work, teachers, projection.with_ranks(ranks()))
        level[side][head] += 1
        return found

    heap = [(-math.inf, side, head) for side, found in enumerate(sides) for head in range(found.heads)]
    total = full = sum(side.heads * side.size for side in sides)
    now = 0.0
    while total > budget:
        _, side, head = heapq.heappop(heap)
        rise = cost(side, head) - now
        if heap and rise > heap[0][0]:
            heapq.heappush(heap, (rise, side, head))
            continue
        grid, at = grids[side], level[side][head]
        level[side][head] -= 1
        total -= grid[at] - grid[at - 1]
        now += rise
        if level[side][head] > 0:
            heapq.heappush(heap, (rise, side, head))
        if progress is not None:
            progress("allocate", min(full - total, full - budget), full - budget)
    return projection.with_ranks(ranks())


def _grid(size: int, step: int | None) -> list[int]:
    """Ranks that a head may take, rising; never 0, as a cache without numbers has no length."""
    step = max(1, size // 8) if step is None else step
    if not 1 <= step <= size:
        raise GramianError(f"key-value ranks in steps of {step}; expected 1 to {size}")
    return [*range(step, size, step), size]


def _budget(sides: Sequence[HeadBases], keep: float, step: int | None) -> int:
    if not 0 < keep <= 1:
        raise GramianError(f"keep {keep}; expected above 0 and at most 1")
    full = sum(side.heads * side.size for side in sides)
    least = sum(side.heads * _grid(side.size, step)[0] for side in sides)
    if int(keep * full) < least:
        raise GramianError(f"keep {keep}: the smallest ranks take {least / full:.3f}; raise keep or lower step")
    return int(keep * full)


# Measuring -----------------------------------------------------------------------------------------------------------


def _teachers(model: nn.Module, work: Workload) -> list[Tensor]:
    assert work.logits is not None
    with evaluating(model), torch.no_grad():
        return [work.logits(model, batch) for batch in work.batches]


def _projecting(projection: KeyValueProjection) -> Tap:
    packed = [(keys.packed(), values.packed()) for keys, values in projection.layers]

    def tap(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        first, second = packed[layer]
        return first.widen(first.narrow(keys)), second.widen(second.narrow(values))

    return tap


@torch.no_grad()
def _mean_divergence(
    model: nn.Module, work: Workload, teachers: Sequence[Tensor], projection: KeyValueProjection
) -> float:
    assert work.logits is not None
    tap = _projecting(projection)
    total, count = 0.0, 0.0
    with evaluating(model):
        for batch, teacher in zip(work.batches, teachers, strict=True):
            mask = work.mask(batch)
            tokens = teacher.shape[0] * teacher.shape[1] if mask is None else float(mask.sum())
            total += tokens * float(_divergence(teacher, work.logits(model, _through(batch, tap)), mask))
            count += tokens
    return total / count


@torch.no_grad()
def evaluate_key_values(
    model: nn.Module, data: Any, projection: KeyValueProjection | None, *, tokenizer: Any = None
) -> dict[str, float]:
    """How well the model predicts with a projected cache, as every token then sees it.

    Args:
        model: left as it was.
        data: see ``language_workload``.
        projection: None for the ordinary cache.
        tokenizer: for texts.

    Returns:
        perplexity: of the next token; kl: mean divergence from the model with its ordinary cache, nats a token; keep: numbers
        stored, as a share.
    """
    work = language_workload(model, data, tokenizer)
    assert work.logits is not None
    tap = None if projection is None else _projecting(projection)
    loss, targets, divergence, tokens = 0.0, 0.0, 0.0, 0.0
    with evaluating(model):
        for batch in work.batches:
            plain = work.logits(model, batch)
            logits = plain if tap is None else work.logits(model, _through(batch, tap))
            ids, mask = batch["input_ids"], work.mask(batch)
            real = torch.ones_like(ids) if mask is None else mask
            scored = (real[:, 1:] * real[:, :-1]).bool()
            loss += float(F.cross_entropy(logits[:, :-1][scored].float(), ids[:, 1:][scored], reduction="sum"))
            targets += float(scored.sum())
            divergence += float(real.sum()) * float(_divergence(plain, logits, real))
            tokens += float(real.sum())
    return {
        "perplexity": math.exp(loss / targets),
        "kl": divergence / tokens,
        "keep": 1.0 if projection is None else projection.keep,
    }


# The recipe ----------------------------------------------------------------------------------------------------------


def project_key_values(
    model: nn.Module,
    data: Any,
    *,
    keep: float = 0.5,
    train_steps: int = 0,
    weighting: str = "none",
    allocation: str = "predicted",
    step: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> KeyValueProjection:
    """Start by principal components, train if asked, and choose ranks: see the module's text.

    Args:
        model: a decoder of the transformers library; left as it was.
        data: calibration: texts (with `tokenizer`), token ids, mappings with ``input_ids``, or a Workload.
        keep: share of the cache's numbers, above 0 and at most 1.
        train_steps: of ``train_bases``.
        weighting: "none" for orthogonal bases, or "loss"; see ``principal_bases``.
        allocation: "predicted" (from gradients, an exact knapsack), "measured" (the paper's greedy search on the first batch)
            or "uniform".
        step: ranks are its multiples; an eighth of the head by default.
        tokenizer: for texts.
        seed: of labels, ranks and batches.
        progress: called with (stage, done, total).

    Raises:
        GramianError: bad arguments, data without tokens, or a model whose cache is not one of keys and values.
    """
    if allocation not in ALLOCATIONS:
        raise GramianError(f"allocation {allocation!r}; expected one of {', '.join(ALLOCATIONS)}")
    work = language_workload(model, data, tokenizer)
    gradients = allocation == "predicted" or weighting == "loss"
    states = collect_key_values(model, work, gradients=gradients, seed=seed, progress=progress)
    found = principal_bases(states, weighting=weighting)
    _budget([side for layer in found.layers for side in layer], keep, step)  # refuse before the long part
    if train_steps:
        found = train_bases(model, work, found, steps=train_steps, seed=seed, progress=progress)
    if allocation == "uniform":
        return found.uniform(keep)
    if allocation == "measured":
        return allocate_measured(model, work.batches[:1], found, keep, step=step, progress=progress)
    return allocate(found, keep, errors=predicted_errors(found, states), step=step)


__all__ = [
    "HeadBases",
    "KeyValueProjection",
    "allocate",
    "allocate_measured",
    "collect_key_values",
    "evaluate_key_values",
    "predicted_errors",
    "principal_bases",
    "project_key_values",
    "train_bases",
]
