"""Nested JSON in one vector: binding by orthogonal matrices (MBAT: Gallant and Okaywe 2013, "Representing objects,
relations, and sequences", matrix binding of additive terms).

Each key has an orthogonal matrix M. A pair (key, value) is bound as ``M v`` and unbound as ``M^T v``; an object is the sum of
its pairs; a list binds its items to the keys 0, 1, 2, ... A leaf is a random unit vector. Following a path unbinds key after
key; what remains is the leaf, and as noise everything else in the tree, since orthogonal matrices change no length and random
ones leave unrelated vectors nearly orthogonal.

    python examples/json_binding.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.ops import Operator, Orthogonal

Path = tuple[Hashable, ...]


class Memory:
    """Matrices of keys and vectors of leaves, drawn when first met.

    Args:
        size: n, of the vectors.
        seed: of everything that is drawn.
        matrix: (n, generator) -> the matrix of a new key.
    """

    def __init__(
        self,
        size: int = 512,
        seed: int = 0,
        matrix: Callable[[int, torch.Generator], Operator] = lambda n, generator: Orthogonal.random(
            n, generator=generator
        ),
    ) -> None:
        self.size, self.matrix = size, matrix
        self.generator = torch.Generator().manual_seed(seed)
        self.keys: dict[Hashable, Operator] = {}
        self.leaves: dict[str, Tensor] = {}

    def key(self, name: Hashable) -> Operator:
        """The matrix of a key (a string, or a position in a list), in the form that runs fastest."""
        if name not in self.keys:
            self.keys[name] = self.matrix(self.size, self.generator).runtime()
        return self.keys[name]

    def leaf(self, value: Any) -> Tensor:
        """The unit vector of a leaf: a string, a number, true, false or null."""
        text = json.dumps(value)
        if text not in self.leaves:
            vector = torch.randn(self.size, generator=self.generator)
            self.leaves[text] = vector / vector.norm()
        return self.leaves[text]

    def encode(self, tree: Any) -> Tensor:
        """The vector (n,) of a JSON value: leaves looked up, pairs bound, objects and lists summed."""
        if isinstance(tree, dict | list):
            pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
            bound = [self.key(name).apply(self.encode(value)) for name, value in pairs]
            return torch.stack(bound).sum(0) if bound else torch.zeros(self.size)
        return self.leaf(tree)

    def follow(self, vector: Tensor, path: Sequence[Hashable]) -> Tensor:
        """What is left of a tree's vector (n,) after unbinding the keys of a path, from the root on."""
        for name in path:
            vector = self.key(name).T.apply(vector)
        return vector

    def query(self, vector: Tensor, path: Sequence[Hashable]) -> Any:
        """The known leaf nearest in angle to what is found at `path`."""
        names = list(self.leaves)
        table = torch.stack([self.leaves[name] for name in names])
        return json.loads(names[int((table @ self.follow(vector, path)).argmax())])


def paths(tree: Any, prefix: Path = ()) -> list[tuple[Path, Any]]:
    """Every leaf of a JSON value with its path."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [found for name, value in pairs for found in paths(value, (*prefix, name))]
    return [(prefix, tree)]


TREE = {
    "name": "Ada",
    "born": {"year": 1815, "city": "London"},
    "works": [{"title": "Notes", "year": 1843}, {"title": "Letters", "year": 1992}],
    "friends": [{"name": "Charles", "born": {"year": 1791}}, {"name": "Mary", "born": {"year": 1780}}],
}


def main() -> None:
    """Encode one tree and ask for each of its leaves."""
    memory = Memory()
    vector = memory.encode(TREE)
    print(f"{len(paths(TREE))} leaves in one vector of {memory.size} numbers, norm {float(vector.norm()):.2f}\n")
    for path, value in paths(TREE):
        found = memory.query(vector, path)
        score = float(memory.follow(vector, path) @ memory.leaf(value))
        print(
            f"{'.'.join(map(str, path)):24} {found!s:10} {'' if found == value else 'WRONG, is ' + str(value)}({score:.2f})"
        )


if __name__ == "__main__":
    main()
