"""State tracking: word problems of finite groups, which tell apart what recurrences can follow.

A word is a sequence of group elements; after each one the product of all so far is asked for. Every group here is a group of
orthogonal matrices, so what a layer needs is plain: an orthogonal matrix Q is a product of rank(Q - I) reflections, and a
transition with n Householder factors follows exactly the groups whose elements need at most n.

    parity = z2: 1    z_m: 2    s3: 2    s4 (rotations of the cube): 2    a5 (of the icosahedron): 2    s5: 4

Protocols: Siems et al. 2025 ("DeltaProduct", words of every length, all positions asked, a token for the beginning) and Grazzi
et al. 2025 ("Unlocking state-tracking in linear RNNs through negative eigenvalues", parity asked at the last position only).
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.sequence.models import ModelConfig, Progress, SequenceModel, train
from gramian.sequence.scan import scan
from gramian.sequence.transitions import HouseholderProduct

# Groups --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of orthogonal matrices.

    Args:
        name: as in ``group(name)``.
        matrices: (order, n, n), float64; the identity first.
        table: (order, order) of integers, ``matrices[table[a, b]] = matrices[a] @ matrices[b]``.
        letters: (count,), the elements that words are made of.
    """

    name: str
    matrices: Tensor
    table: Tensor
    letters: Tensor

    @property
    def order(self) -> int:
        """How many elements."""
        return len(self.matrices)

    @property
    def reflections(self) -> int:
        """Householder factors that the letter needing most needs."""
        return max(len(reflections(self.matrices[i])) for i in self.letters.tolist())

    def words(self, count: int, length: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Random words and their running products, ``product_t = letter_t * product_{t-1}``; both (count, length)."""
        words = self.letters[torch.randint(len(self.letters), (count, length), generator=generator)]
        products = [words[:, 0]]
        for letter in words[:, 1:].unbind(1):
            products.append(self.table[letter, products[-1]])
        return words, torch.stack(products, 1)


@functools.cache
def group(name: str) -> Group:
    """A group by name: "z2" (or "parity"), "z3", ...; "s3", "s4", "s5"; "a5"; "s5_swaps", whose words hold only the
    identity and swaps of two.

    Raises:
        GramianError: another name.
    """
    swaps = name.endswith("_swaps")
    base = name.removesuffix("_swaps")
    matrices = _closure(_generators(base, name))
    order = len(matrices)
    index = {_key(matrix): i for i, matrix in enumerate(matrices)}
    products = (matrices[:, None] @ matrices[None]).flatten(0, 1)
    table = torch.tensor([index[_key(matrix)] for matrix in products]).view(order, order)
    size = matrices.shape[1]
    # The trace of a permutation is how many points it leaves in place.
    letters = (
        (matrices.diagonal(dim1=1, dim2=2).sum(1) >= size - 2 - 1e-9).nonzero()[:, 0] if swaps else torch.arange(order)
    )
    return Group(name, matrices, table, letters)


def _generators(base: str, name: str) -> list[Tensor]:
    """Matrices that generate the group, in as few dimensions as its elements need."""
    if base == "parity":
        base = "z2"
    if base == "z2":
        return [-torch.ones(1, 1, dtype=torch.float64)]
    if re.fullmatch(r"z[1-9]\d{0,2}", base) and base != "z1" and base == name:
        return [_turn(2 * math.pi / int(base[1:]))]
    if base in ("s3", "s5"):
        eye = torch.eye(int(base[1]), dtype=torch.float64)
        return [eye.roll(1, 0), eye[[1, 0, *range(2, len(eye))]]]
    if base == "s4" and base == name:  # quarter turns of a cube about two axes
        quarter = torch.eye(3, dtype=torch.float64)
        quarter[:2, :2] = _turn(math.pi / 2)
        return [quarter, quarter.roll((1, 1), (0, 1))]
    if (
        base == "a5"
    ):  # a fifth of a turn about a corner (0, 1, golden ratio) of an icosahedron, half a turn about an edge
        axis = torch.tensor([0.0, 1.0, (1 + 5**0.5) / 2], dtype=torch.float64)
        a, angle = axis / axis.norm(), 2 * math.pi / 5
        x, y, z = a.tolist()
        cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
        fifth = torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
        return [fifth, torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))]
    raise GramianError(f"group {name!r} is unknown; expected parity, z2, z3, ..., s3, s4, s5, s5_swaps, s3_swaps or a5")


def _turn(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def _key(matrix: Tensor) -> tuple[int, ...]:
    return tuple((matrix.flatten() * 1e6).round().long().tolist())


def _closure(generators: list[Tensor]) -> Tensor:
    """Every product of the generators, the identity first."""
    eye = torch.eye(len(generators[0]), dtype=torch.float64)
    found, fresh = {_key(eye): eye}, [eye]
    while fresh:
        products = [generator @ matrix for matrix in fresh for generator in generators]
        fresh = []
        for product in products:
            if _key(product) not in found:
                found[_key(product)] = product
                fresh.append(product)
    return torch.stack(list(found.values()))


# What a product of reflections can follow, by construction -----------------------------------------------------------


def reflections(matrix: Tensor) -> Tensor:
    """Unit vectors k_1, ..., k_r with ``Q = H_r ... H_1``, ``H_j = I - 2 k_j k_j^T``: as few as there are, rank(Q - I).

    Every reflection ``k = (Q x - x) / |Q x - x|`` brings Q x back to x and leaves alone what Q leaves alone (Cartan and
    Dieudonné).

    Args:
        matrix: Q, (n, n), orthogonal.

    Returns:
        (r, n), first to act first.
    """
    keys: list[Tensor] = []
    rest = matrix.double()
    while True:
        moved = rest - torch.eye(len(rest), dtype=rest.dtype)
        lengths = moved.norm(dim=0)
        if float(lengths.max()) < 1e-9:
            break
        keys.append(moved[:, lengths.argmax()] / lengths.max())
        rest = rest - 2 * torch.outer(keys[-1], keys[-1] @ rest)
    return torch.stack(keys[::-1]) if keys else matrix.new_zeros(0, len(matrix)).double()


def constructed(
    group_name: str,
    factors: int,
    *,
    length: int = 4096,
    count: int = 2,
    strength: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Follow random words with a scan whose weights are written down, not learned: each letter's reflections as keys.

    Args:
        group_name: of the group.
        factors: Householder factors a token; letters that need more are cut short.
        length: letters a word.
        count: words.
        strength: largest beta; 2 is a reflection, at most 1 leaves eigenvalues in [0, 1].
        seed: of the words.
        dtype: of the scan.

    Returns:
        "states", the share of states nearest to the right matrix, and "error", the largest error of an entry.
    """
    chosen = group(group_name)
    size = chosen.matrices.shape[1]
    keys = torch.zeros(chosen.order, factors, size, dtype=torch.float64)
    betas = torch.zeros(chosen.order, factors, dtype=torch.float64)
    for i, matrix in enumerate(chosen.matrices):
        found = reflections(matrix)[:factors]
        keys[i, : len(found)], betas[i, : len(found)] = found, strength
    words, products = chosen.words(count, length, generator=torch.Generator().manual_seed(seed))
    transition = HouseholderProduct(
        keys[words].to(dtype)[:, :, None].expand(-1, -1, size, -1, -1),
        betas[words].to(dtype)[:, :, None].expand(-1, -1, size, -1),
    )
    eye = torch.eye(size, dtype=dtype)
    nothing = torch.zeros(count, length, size, factors, size, dtype=dtype)
    # One head a row: head i reads row i of the state.
    start = eye.expand(count, size, size, size).contiguous()
    states, _ = scan(transition, nothing, eye.expand(count, length, size, size), start)
    likeness = states.flatten(2).double() @ chosen.matrices.flatten(1).T
    right = chosen.matrices[products]
    return {
        "states": float((likeness.argmax(-1) == products).double().mean()),
        "error": float((states.double() - right).abs().max()),
    }


# What training finds -------------------------------------------------------------------------------------------------


def tracker(
    chosen: Group,
    factors: int,
    *,
    beta: str = "hard",
    dim: int = 64,
    heads: int = 2,
    key_dim: int = 16,
    hidden: int | None = None,
) -> SequenceModel:
    """One layer of DeltaProduct without gates, decay or convolution, as in the papers' word problems.

    Args:
        chosen: group; its letters are the tokens, and one more begins every word.
        factors: Householder factors a token.
        beta: "hard" in [0, 2], "two_sigmoid" in (0, 2), "sigmoid" in (0, 1).
        dim: width.
        heads: H.
        key_dim: of keys and values.
        hidden: of the feed-forward; None for 8/3 of `dim`. A wide one learns the products of two letters by heart, and what
            the recurrence would have to find for longer words is then not found (A5, 3600 pairs: not in 2000 steps).
    """
    options = {
        "heads": heads,
        "key_dim": key_dim,
        "value_dim": key_dim,
        "householders": factors,
        "beta": beta,
        "gated": False,
        "output_gate": False,
        "convolution": 0,
    }
    return SequenceModel(ModelConfig(chosen.order + 1, dim, (("delta_product", options),), hidden=hidden, tied=False))


class Curriculum:
    """Training words that get longer: from three letters, by a half whenever the last product is right in 95 % of them.

    Args:
        chosen: group.
        batch: words a step.
        longest: letters.
        start: letters of the first words; `longest` for no curriculum.
        last_only: ask for the last product only, of words of every length from 3 (parity in Grazzi et al. 2025).
        seed: of the words.
    """

    def __init__(
        self, chosen: Group, batch: int, longest: int, *, start: int, last_only: bool = False, seed: int = 0
    ) -> None:
        self.chosen, self.batch, self.longest, self.length, self.last_only = chosen, batch, longest, start, last_only
        self.generator = torch.Generator().manual_seed(seed)
        self.right = 0.0
        """Running share of right last products."""

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: tokens and what to say after each."""
        words, products = self.chosen.words(self.batch, self.length, generator=self.generator)
        if self.last_only:
            shortest = min(3, self.length)
            last = torch.randint(shortest - 1, self.length, (self.batch, 1), generator=self.generator)
            products = torch.where(torch.arange(self.length) == last, products, -1)
        return _framed(words, products, self.chosen)

    def observe(self, progress: Progress) -> None:
        """Lengthen the words when they have become easy."""
        shown = progress.targets >= 0
        place = (shown * torch.arange(shown.shape[1])).argmax(1)[:, None]
        answer = progress.logits.argmax(-1).gather(1, place)
        right = float((answer == progress.targets.gather(1, place)).double().mean())
        self.right += 0.1 * (right - self.right)
        if self.right > 0.95 and self.length < self.longest:
            self.length, self.right = min(self.longest, -(-self.length * 3 // 2)), 0.0


def _framed(words: Tensor, products: Tensor, chosen: Group) -> tuple[Tensor, Tensor]:
    """With the beginning's token, after which nothing is asked."""
    first = torch.full((len(words), 1), chosen.order)
    return torch.cat([first, words], 1), torch.cat([torch.full_like(first, -1), products], 1)


@torch.no_grad()
def evaluate(
    model: SequenceModel, chosen: Group, length: int, *, count: int = 256, seed: int = 1_000_000
) -> dict[str, float]:
    """How well a trained model follows fresh words.

    Returns:
        Shares: "tokens" of products that are right, "last quarter" of those in the last quarter of a word, "sequences" of
        words right throughout; and "scaled", tokens above chance, ``(tokens - 1 / order) / (1 - 1 / order)``.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed + length)
    right = torch.cat([_right(model, chosen, n, length, generator) for n in _pieces(count, max(1, 16384 // length))])
    tokens, chance = float(right.double().mean()), 1 / chosen.order
    return {
        "tokens": tokens,
        "last quarter": float(right[:, -max(1, length // 4) :].double().mean()),
        "sequences": float(right.all(1).double().mean()),
        "scaled": (tokens - chance) / (1 - chance),
    }


def _right(model: SequenceModel, chosen: Group, count: int, length: int, generator: torch.Generator) -> Tensor:
    inputs, targets = _framed(*chosen.words(count, length, generator=generator), chosen)
    right: Tensor = model(inputs)[0].argmax(-1) == targets
    return right[:, 1:]


def _pieces(count: int, size: int) -> Iterator[int]:
    for start in range(0, count, size):
        yield min(size, count - start)


def track(
    task: str,
    factors: int = 2,
    *,
    beta: str = "hard",
    train_length: int = 32,
    test_lengths: Sequence[int] = (256,),
    dim: int = 64,
    heads: int = 2,
    key_dim: int = 16,
    hidden: int | None = None,
    steps: int = 400,
    batch: int = 128,
    rate: float = 3e-3,
    curriculum: bool = False,
    last_only: bool = False,
    seed: int = 0,
    cpu_limit: float | None = None,
    progress: Callable[[Progress, int], object] | None = None,
) -> dict[str, Any]:
    """Train a one-layer tracker on a word problem and measure how far beyond the training length it goes.

    Args:
        task: a name of ``group``.
        factors: Householder factors a token.
        beta: see ``tracker``.
        train_length: letters of the longest training words.
        test_lengths: letters of the test words.
        dim: width.
        heads: H.
        key_dim: of keys and values.
        hidden: see ``tracker``.
        steps: of the optimiser, at most.
        batch: words a step.
        rate: largest learning rate.
        curriculum: see ``Curriculum``.
        last_only: see ``Curriculum``.
        seed: of weights and words.
        cpu_limit: stop training after so many seconds of processor time.
        progress: called after each step with what ``train`` gives and the current training length.

    Returns:
        What was asked, "steps", "reached" (letters of the last training words), "cpu_seconds" of training, "parameters",
        "state" (numbers the layer carries), "loss" of the last step, and by length "accuracy" (``evaluate``), the training
        length included.
    """
    if min(train_length, *test_lengths) < 1 or steps < 1 or batch < 1:
        raise GramianError(
            f"track: train_length {train_length}, test_lengths {tuple(test_lengths)}, steps {steps}, batch {batch}; "
            "expected numbers from 1 up"
        )
    chosen = group(task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tracker(chosen, factors, beta=beta, dim=dim, heads=heads, key_dim=key_dim, hidden=hidden)
    start = min(3, train_length) if curriculum else train_length
    words = Curriculum(chosen, batch, train_length, start=start, last_only=last_only, seed=seed)
    clock = time.process_time()

    def observe(now: Progress) -> bool:
        words.observe(now)
        if progress is not None:
            progress(now, words.length)
        return cpu_limit is not None and time.process_time() - clock > cpu_limit

    losses = train(model, words, steps=steps, rate=rate, weight_decay=1e-6, progress=observe)
    seconds = time.process_time() - clock
    return {
        "task": task,
        "factors": factors,
        "beta": beta,
        "train_length": train_length,
        "seed": seed,
        "steps": len(losses),
        "reached": words.length,
        "cpu_seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state": heads * key_dim * key_dim,
        "loss": losses[-1],
        "accuracy": {length: evaluate(model, chosen, length) for length in (train_length, *test_lengths)},
    }
