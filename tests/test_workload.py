"""Recombined texts: what healing trains on beside the texts themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramian.models.workload import LONGEST, Neighbours, recombine

FIRST, LAST, PAD = 1, 2, 0


def batch(lengths: list[int], side: str) -> dict[str, Tensor]:
    """Sequences FIRST, own tokens, LAST; row i uses tokens 100 i + 3 and on."""
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for i, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, place] = torch.tensor([FIRST, *range(100 * i + 3, 100 * i + n + 1), LAST])
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_recombined_sequences_are_windows_of_the_texts(side: str) -> None:
    lengths = [5, 40, 90, 96]
    seen = set()
    for seed in range(40):
        made = recombine(batch(lengths, side), torch.Generator().manual_seed(seed), None)
        assert {value.shape for value in made.values()} == {(4, LONGEST)}
        for i, n in enumerate(lengths):
            mask = made["attention_mask"][i].bool()
            real = made["input_ids"][i][mask]
            assert len(real) == min(n, LONGEST)
            assert mask[0 if side == "right" else -1]
            assert [real[0], real[-1]] == [FIRST, LAST]
            inside = real[1:-1]
            own = inside[(inside >= 100 * i + 3) & (inside < 100 * (i + 1))]
            seen.update(own.tolist())
            assert (inside >= 3).all()
    third = [token for token in seen if 200 < token < 300]
    assert min(third) < 210, "windows reach the beginning of a long text"
    assert max(third) > 283, "and its end"


def test_neighbours_replace_some_tokens_inside() -> None:
    table = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    words = torch.arange(3, 400)
    one = batch([30], "right")
    made = recombine(one, torch.Generator().manual_seed(1), Neighbours(table, words))["input_ids"][0]
    before = one["input_ids"][0]
    changed = made != before
    assert 0 < changed.sum() < 20
    assert not changed[[0, -1]].any()
    unit = torch.nn.functional.normalize(table, dim=1)
    for old, new in zip(before[changed].tolist(), made[changed].tolist(), strict=True):
        cosine = unit[words] @ unit[old]
        cosine[words == old] = -2
        assert new in words[cosine.topk(12).indices].tolist()
