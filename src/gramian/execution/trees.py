"""Extremely randomised regression trees (Geurts, Ernst, Wehenkel 2006, "Extremely randomized trees", section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trees:
    """The nodes of all trees in one pool; the first `trees` are the roots.

    Attributes:
        trees: how many.
        feature: (nodes,) which one a node divides by; -1 for a leaf.
        threshold: (nodes,) what lies below it goes to ``child``, the rest to ``child + 1``.
        child: (nodes,) the first of a node's two children.
        value: (nodes,) mean target of what a node holds.
    """

    trees: int
    feature: Integers
    threshold: Floats
    child: Integers
    value: Floats

    def __call__(self, x: Floats) -> Floats:
        """(m,) predictions at x (m, f): means over the trees."""
        node = np.tile(np.arange(self.trees), (len(x), 1))
        rows = np.arange(len(x))[:, None]
        while True:
            feature = self.feature[node]
            inner = feature >= 0
            if not inner.any():
                return np.asarray(self.value[node].mean(1))
            above = x[rows, feature] >= self.threshold[node]
            node = np.where(inner, self.child[node] + above, node)

    @classmethod
    def learn(cls, x: Floats, y: Floats, *, trees: int = 100, leaf: int = 2, seed: int = 0) -> Trees:
        """Every tree sees all samples. A node draws one threshold for each feature, uniformly between the least and the
        largest value it holds, and divides by the one that leaves the least squared error. All nodes of one depth are
        divided together.

        Args:
            x: (n, f).
            y: (n,).
            trees: how many.
            leaf: least number of samples of a leaf.
            seed: of the thresholds.
        """
        generator = np.random.default_rng(seed)
        feature, threshold, child, value = ([np.zeros(0)] for _ in range(4))
        rows, node = np.tile(np.arange(len(x)), trees), np.repeat(np.arange(trees), len(x))  # sorted by node
        first = trees  # the number of the first node one level down
        while len(rows):
            starts = np.flatnonzero(np.r_[True, node[1:] != node[:-1]])
            held = np.diff(np.r_[starts, len(rows)])
            own = np.repeat(np.arange(len(starts)), held)  # the place of each sample's node in this level
            points, targets = x[rows], y[rows]
            low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
            cut = low + (high - low) * generator.random(low.shape)
            below = points < cut[own]
            count = np.add.reduceat(below.astype(np.int64), starts)
            part = np.add.reduceat(below * targets[:, None], starts)
            total = np.add.reduceat(targets, starts)
            rest = held[:, None] - count
            able = (count >= leaf) & (rest >= leaf)
            gain = part**2 / count.clip(1) + (total[:, None] - part) ** 2 / rest.clip(1)
            gain = np.where(able, gain, -np.inf)
            best = gain.argmax(1)
            divides = able.any(1)
            places = np.cumsum(divides) - 1
            children = first + 2 * places
            feature.append(np.where(divides, best, -1))
            threshold.append(cut[np.arange(len(cut)), best])
            child.append(np.where(divides, children, 0))
            value.append(total / held)
            first += 2 * int(divides.sum())
            stays = divides[own]
            down = children[own] + ~below[np.arange(len(rows)), best[own]]
            rows, node = rows[stays], down[stays]
            order = np.argsort(node, kind="stable")
            rows, node = rows[order], node[order]
        parts = [np.concatenate(values) for values in (feature, threshold, child, value)]
        return cls(trees, parts[0].astype(np.int64), parts[1], parts[2].astype(np.int64), parts[3])


__all__ = ["Trees"]
