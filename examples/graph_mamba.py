"""Token order for graphs: neighbourhoods as sequences, nodes as a sequence (Behrouz and Hashemi 2024, "Graph Mamba: towards
learning on graphs with state space models").

A node becomes a short sequence: token m summarises what random walks of m steps visit, and the longest walks come first, so
that the last state has seen the far before the near. A causal mixer reads it. Then the nodes themselves, in the order of their
degrees, are one sequence for a mixer in each direction: those with many edges have the whole past in both. No edge is used
after the walks.

The task: which community of a random graph a node belongs to, from features too noisy to tell by themselves.

    python examples/graph_mamba.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.sequence import mixer


def walk_tokens(adjacency: Tensor, x: Tensor, longest: int, walks: int, generator: torch.Generator) -> Tensor:
    """Mean features of the nodes that walks of `longest`, ..., 1, 0 steps visit.

    Args:
        adjacency: (n, n) of 0 and 1; a node without neighbours stays where it is.
        x: (n, d).
        longest: M, steps of the longest walk.
        walks: from each node, of each length.
        generator: of the walks.

    Returns:
        (n, M + 1, d), the longest walks first, the node itself last.
    """
    alone = adjacency.sum(1) == 0
    chances = adjacency + torch.diag(alone.to(adjacency))
    place = torch.arange(len(x)).repeat(walks, 1)  # (walks, n)
    visited = x[place]
    tokens = [x]
    for steps in range(1, longest + 1):
        place = torch.multinomial(chances[place.flatten()], 1, generator=generator).reshape(place.shape)
        visited = visited + x[place]
        tokens.append(visited.mean(0) / (steps + 1))
    return torch.stack(tokens[::-1], 1)


class GraphMamba(nn.Module):
    """Neighbourhoods by one mixer, nodes by two.

    Args:
        features: d.
        dim: width.
        classes: of nodes.
        name: of the mixer's recipe.
    """

    def __init__(self, features: int, dim: int, classes: int, name: str = "mamba2", **options: int) -> None:
        super().__init__()
        self.lift = nn.Linear(features, dim)
        self.near = mixer(name, dim, **options)
        self.onward, self.back = mixer(name, dim, **options), mixer(name, dim, **options)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(3))
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor, degrees: Tensor) -> Tensor:
        """From tokens (n, M + 1, d) and degrees (n,) to (n, classes)."""
        x = self.lift(tokens)
        x = (x + self.near(self.norms[0](x))[0])[:, -1]
        order = degrees.argsort(stable=True)
        line = self.norms[1](x[order])[None]
        both = self.onward(line)[0] + self.back(line.flip(1))[0].flip(1)
        x = x + torch.zeros_like(x).index_copy(0, order, both[0])
        return self.head(self.norms[2](x))


def community_graph(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Adjacency (n, n) and labels (n,) of `count` communities of `size` nodes: edges with chance 0.15 within, 0.01 across."""
    labels = torch.arange(count).repeat(size)[torch.randperm(count * size, generator=generator)]
    chance = torch.where(labels[:, None] == labels, 0.15, 0.01)
    upper = (torch.rand(chance.shape, generator=generator) < chance).float().triu(1)
    return upper + upper.mT, labels


def accuracy(longest: int, steps: int = 100, seed: int = 0) -> float:
    """Share of the unseen half of the nodes that is classified right, with walks of up to `longest` steps."""
    generator = torch.Generator().manual_seed(seed)
    adjacency, labels = community_graph(4, 50, generator)
    x = F.one_hot(labels, 4) + torch.randn(len(labels), 4, generator=generator)
    seen = torch.rand(len(labels), generator=generator) < 0.5
    tokens = walk_tokens(adjacency, x, longest, 8, generator)
    torch.manual_seed(seed)
    model = GraphMamba(4, 32, 4, key_dim=16, value_dim=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens, adjacency.sum(1))[seen], labels[seen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model(tokens, adjacency.sum(1)).argmax(1)
    return float((found == labels)[~seen].float().mean())


def main() -> None:
    """Print the accuracy without walks and with longer ones."""
    for longest in (0, 1, 4):
        print(f"walks of up to {longest} steps: {accuracy(longest):.0%} of the unseen nodes are right")


if __name__ == "__main__":
    main()
