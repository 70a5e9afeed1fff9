"""Mixer layers as wide, sparse matrices: the permuted-Kronecker family (Hayase, Karakida 2024, "Understanding MLP-Mixer
as a Wide and Sparse MLP", section 3).

Features X (tokens, channels), stacked channel by channel into one vector of length tokens * channels, the *effective
width*. Mixing tokens, ``W X``, is then ``kron(I, W)``, and mixing channels, ``X V``, is ``kron(V^T, I)``, which is
``J^T kron(I, V^T) J`` with J the permutation that transposes the (channels, tokens) grid. A pair of such layers without
a non-linearity between is a Monarch matrix whose blocks are tied; with another J it is a *permuted Kronecker* product.

Everything here is a composition of ``Kron``, ``Permutation`` and ``Dense``: a product is two matrix products with the
tied blocks, all blocks at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops.combinators import Kron, Product
from gramian.ops.dense import Dense, spectral_normal
from gramian.ops.diagonal import Identity, Permutation
from gramian.ops.operator import Operator


def token_mixing(weight: Tensor, channels: int) -> Kron:
    """``X -> weight X`` on stacked features: ``kron(I, weight)``.

    Args:
        weight: (tokens out, tokens in).
        channels: how many.
    """
    return Kron(Identity(channels), Dense(weight))


def channel_mixing(weight: Tensor, tokens: int) -> Kron:
    """``X -> X weight^T`` on stacked features: ``kron(weight, I)``.

    Args:
        weight: (channels out, channels in).
        tokens: how many.
    """
    return Kron(Dense(weight), Identity(tokens))


def mixer(second: Tensor, first: Tensor, *, permutation: Tensor | None = None) -> Operator:
    """A linear mixer pair: a Monarch matrix with tied blocks, or with a permutation of one's own between them.

    Without `permutation` it is ``J^T kron(I, second) J kron(I, first)`` with J the transposition of the grid, which is
    ``kron(second, first)``: no permutation is stored or run. With one it is ``kron(I, second) J kron(I, first)``.

    Args:
        second: (c', c), mixes channels.
        first: (s', s), mixes tokens.
        permutation: (c s',) integers, J as ``Permutation`` takes it; random in the paper's random permuted mixers.

    Returns:
        Shape (c' s', c s).

    Raises:
        GramianError: the permutation has another length.
    """
    if permutation is None:
        return Kron(Dense(second), Dense(first))
    inner = second.shape[1] * first.shape[0]
    if tuple(permutation.shape) != (inner,):
        raise GramianError(f"mixer: permutation {tuple(permutation.shape)}; expected ({inner},)")
    return Product(
        (token_mixing(second, first.shape[0]), Permutation(permutation), token_mixing(first, second.shape[1]))
    )


def random_mixer(
    channels: tuple[int, int], tokens: tuple[int, int], *, generator: torch.Generator | None = None
) -> Operator:
    """A random permuted mixer pair, both weights by the spectral rule.

    Args:
        channels: (c', c), the shape of the second weight.
        tokens: (s', s), the shape of the first.
        generator: of weights and permutation.

    Returns:
        Shape (c' s', c s), of spectral norm near sqrt(out / in).
    """
    order = torch.randperm(channels[1] * tokens[0], generator=generator).to(torch.int32)
    return mixer(spectral_normal(channels, generator), spectral_normal(tokens, generator), permutation=order)


class MixerSize(NamedTuple):
    """A mixer block of square weights, seen as a wide sparse network.

    Attributes:
        tokens: s.
        channels: c.
    """

    tokens: int
    channels: int

    @property
    def width(self) -> int:
        """The effective width s c: of the vector that a layer maps."""
        return self.tokens * self.channels

    @property
    def weights(self) -> int:
        """Numbers stored by one token-mixing and one channel-mixing layer, s^2 + c^2."""
        return self.tokens**2 + self.channels**2

    @property
    def connections(self) -> int:
        """Non-zero entries of the two effective matrices, s c (s + c): multiply-adds of the pair."""
        return self.width * (self.tokens + self.channels)


def mixer_sizes(connections: int) -> list[MixerSize]:
    """For every number of tokens, the most channels with at most `connections` connections, widest first.

    At a fixed number of connections the width is largest where tokens and channels are about as many: the sizes along
    which the paper's hypothesis (wider is better until optimisation suffers) is tested.

    Raises:
        GramianError: fewer than 2 connections, the smallest pair.
    """
    if connections < 2:
        raise GramianError(f"mixer_sizes: {connections} connections; expected at least 2")
    found = []
    for tokens in range(1, connections):
        # s c (s + c) <= connections, solved for c; the while corrects rounding.
        channels = int(((tokens**4 + 4 * tokens * connections) ** 0.5 - tokens**2) / (2 * tokens)) + 1
        while channels and MixerSize(tokens, channels).connections > connections:
            channels -= 1
        if not channels:
            break
        found.append(MixerSize(tokens, channels))
    return sorted(found, key=lambda size: -size.width)
