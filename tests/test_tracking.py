"""Word problems of groups: the groups themselves, exact tracking by construction, learning, and the command."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gramian.cli.reproduce import TARGETS, run_reproduce
from gramian.errors import GramianError
from gramian.sequence.tracking import Curriculum, constructed, evaluate, group, reflections, track, tracker

NEEDED = {
    "parity": (2, 1),
    "z5": (5, 2),
    "s3": (6, 2),
    "s4": (24, 2),
    "a5": (60, 2),
    "s5": (120, 4),
    "s5_swaps": (120, 1),
}
"""Order, and reflections that the hardest letter needs."""


@pytest.mark.parametrize("name", NEEDED)
def test_groups(name: str) -> None:
    found = group(name)
    assert (found.order, found.reflections) == NEEDED[name]
    table, every = found.table, torch.arange(found.order)
    assert torch.equal(table[0], every)
    assert torch.equal(table[:, 0], every)
    for line in (*table, *table.T):  # a Latin square
        assert torch.equal(line.sort().values, every)
    a, b, c = torch.randint(found.order, (3, 200), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    eye = torch.eye(found.matrices.shape[1], dtype=torch.float64)
    assert torch.allclose(found.matrices @ found.matrices.mT, eye.expand_as(found.matrices), atol=1e-12)


def cycle_type(permutation: tuple[int, ...]) -> int:
    """The order of a permutation."""
    power, count = permutation, 1
    while power != tuple(range(len(permutation))):
        power, count = tuple(permutation[i] for i in power), count + 1
    return count


@pytest.mark.parametrize(
    ("name", "points", "even"), [("s3", 3, False), ("s4", 4, False), ("a5", 5, True), ("s5", 5, False)]
)
def test_orders_of_elements_are_those_of_permutations(name: str, points: int, even: bool) -> None:
    """Rotations of the cube and of the icosahedron are counted as the permutations that they stand for."""
    found = group(name)
    orders = []
    for element in range(found.order):
        power, count = element, 1
        while power:
            power, count = int(found.table[element, power]), count + 1
        orders.append(count)
    permutations = [
        p
        for p in itertools.permutations(range(points))
        if not even or sum(p[i] > p[j] for i in range(points) for j in range(i + 1, points)) % 2 == 0
    ]
    assert sorted(orders) == sorted(map(cycle_type, permutations))


def test_letters_of_swaps() -> None:
    assert len(group("s5_swaps").letters) == 1 + 10
    assert len(group("s3_swaps").letters) == 1 + 3


@pytest.mark.parametrize("name", ["s8", "z1", "z5_swaps", "s4_swaps", "", "parity_swap"])
def test_unknown_groups(name: str) -> None:
    with pytest.raises(GramianError, match="is unknown; expected parity"):
        group(name)


def test_words_multiply_from_the_left() -> None:
    s5 = group("s5")
    words, products = s5.words(3, 20, generator=torch.Generator().manual_seed(0))
    matrix = torch.eye(5, dtype=torch.float64)
    for letter, product in zip(words[0], products[0], strict=True):
        matrix = s5.matrices[letter] @ matrix
        assert torch.equal(matrix, s5.matrices[product])


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_reflections_of_any_orthogonal_matrix(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    keys = reflections(matrix)
    assert len(keys) == torch.linalg.matrix_rank(matrix - torch.eye(size))
    made = torch.eye(size, dtype=torch.float64)
    for key in keys:
        made = made - 2 * torch.outer(key, key @ made)
    torch.testing.assert_close(made, matrix, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["parity", "z5", "s3", "s4", "a5", "s5"])
def test_construction_follows_4096_tokens(name: str) -> None:
    """S5 with four reflections, S4 and A5 (as rotations) with two: in float32 every state is right."""
    found = constructed(name, NEEDED[name][1], length=4096)
    assert found["states"] == 1.0
    assert found["error"] <= 1e-3
    assert constructed(name, NEEDED[name][1], length=512, strength=1.0)["states"] < 1.5 / group(name).order + 0.05
    if NEEDED[name][1] > 1:
        assert constructed(name, NEEDED[name][1] - 1, length=512)["states"] < 0.5


def test_curriculum() -> None:
    words = Curriculum(group("s3"), 4, 20, start=3, seed=1)
    inputs, targets = words(0)
    assert inputs.shape == targets.shape == (4, 4)
    assert (inputs[:, 0] == 6).all()
    assert (targets[:, 0] == -1).all()
    last = Curriculum(group("parity"), 200, 40, start=40, last_only=True)
    inputs, targets = last(0)
    assert ((targets >= 0).sum(1) == 1).all()
    places = (targets >= 0).int().argmax(1)
    assert places.min() >= 3
    assert places.max() == 40
    assert torch.equal(targets.amax(1), (inputs[:, 1:] * (torch.arange(1, 41) <= places[:, None])).sum(1) % 2)


def test_a_model_that_knows_nothing_is_at_chance() -> None:
    torch.manual_seed(0)
    s3 = group("s3")
    found = evaluate(tracker(s3, 1, dim=16, heads=1), s3, 64, count=64)
    assert found["tokens"] < 0.3
    assert found["sequences"] == 0
    assert found["scaled"] == pytest.approx((found["tokens"] - 1 / 6) / (5 / 6))


def test_parity_is_learned_and_held() -> None:
    found = track("parity", 1, train_length=16, test_lengths=(256,), dim=32, steps=110, batch=48)
    assert found["accuracy"][256]["tokens"] >= 0.999
    again = track("parity", 1, train_length=16, test_lengths=(256,), dim=32, steps=3, batch=48)
    same = track("parity", 1, train_length=16, test_lengths=(256,), dim=32, steps=3, batch=48)
    assert again["loss"] == same["loss"]  # the seed decides


def test_the_feed_forward_is_as_narrow_as_asked() -> None:
    """Wide ones learn pairs of letters by heart."""
    wide, narrow = (tracker(group("a5"), 2, hidden=hidden) for hidden in (None, 16))
    assert [m.layers[0].feed_forward.up.weight.shape[0] for m in (wide, narrow)] == [176, 16]
    found = track("z3", 1, train_length=4, test_lengths=(6,), dim=16, hidden=8, steps=2, batch=4)
    assert found["parameters"] == sum(p.numel() for p in tracker(group("z3"), 1, dim=16, hidden=8).parameters())


def test_track_refuses() -> None:
    with pytest.raises(GramianError, match="expected numbers from 1 up"):
        track("parity", 1, train_length=0)


def test_reproduce(capsys: pytest.CaptureFixture[str]) -> None:
    run_reproduce(None, json_output=True)
    assert [row["target"] for row in json.loads(capsys.readouterr().out)] == list(TARGETS)
    run_reproduce("s5-constructive", json_output=True)
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "reproduced"
    assert found["measured"]["4 reflections"]["states"] == 1.0
    run_reproduce("s5-constructive")
    assert "reproduced" in capsys.readouterr().out
    with pytest.raises(GramianError, match="did you mean parity"):
        run_reproduce("paritty")


def test_every_code_block_of_the_tutorial_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "sequence.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    assert names["found"]["accuracy"][128]["tokens"] >= 0.99
