"""Key-value caches of the transformers library that store projected keys and values, or only look at what passes.

Both are ``DynamicCache`` objects: pass them as ``past_key_values`` to a model or to ``generate``. Batches, padding, beams,
grouped queries and sliding windows are the library's own, as what is stored still has one row a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from gramian.errors import GramianError


class Projector(Protocol):
    """Keys or values of one layer, made narrow and wide again."""

    def narrow(self, states: Tensor) -> Tensor:
        """(B, heads, T, head size) -> (B, 1, T, stored numbers)."""
        ...

    def widen(self, stored: Tensor) -> Tensor:
        """(B, 1, T, stored numbers) -> (B, heads, T, head size)."""
        ...


Tap = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys, values), each (B, heads, T, head size) -> what attention reads instead."""


def projected_cache(layers: Sequence[tuple[Projector, Projector]], config: Any) -> Any:
    """An empty cache that stores ``narrow(states)`` and gives attention ``widen(stored)``.

    Args:
        layers: (keys, values) of every layer.
        config: of the model; says which layers have a sliding window.

    Raises:
        GramianError: another number of layers, or layers whose cache is not one of keys and values alone.
    """
    return _classes()[0](layers, config)


def tap_cache(tap: Tap) -> Any:
    """A cache that stays empty: every layer's keys and values of the current call pass through `tap`."""
    return _classes()[1](tap)


@functools.cache
def _classes() -> tuple[type, type]:
    """Defined once transformers is asked for."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    class Projected:
        """Comes before the library's layer, which stores what it is given."""

        projectors: tuple[Projector, Projector]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = self.projectors
            stored = super().update(keys.narrow(key_states), values.narrow(value_states), *args, **kwargs)  # type: ignore[misc]
            return keys.widen(stored[0]), values.widen(stored[1])

    class ProjectedLayer(Projected, DynamicLayer):  # type: ignore[misc, no-untyped-call]
        pass

    class ProjectedSlidingLayer(Projected, DynamicSlidingWindowLayer):  # type: ignore[misc, no-untyped-call]
        pass

    class ProjectedCache(DynamicCache):  # type: ignore[misc]
        """Stores projected keys and values."""

        def __init__(self, projectors: Sequence[tuple[Projector, Projector]], config: Any) -> None:
            super().__init__(config=config)
            if len(self.layers) != len(projectors):
                raise GramianError(
                    f"key-value projection: {len(projectors)} layers; this model caches {len(self.layers)}"
                )
            for index, (layer, pair) in enumerate(zip(self.layers, projectors, strict=True)):
                made: Any
                if type(layer) is DynamicLayer:
                    made = ProjectedLayer()  # type: ignore[no-untyped-call]
                elif type(layer) is DynamicSlidingWindowLayer:
                    made = ProjectedSlidingLayer(sliding_window=layer.sliding_window)
                else:
                    raise GramianError(
                        f"key-value projection: layer {index} keeps its state in a {type(layer).__name__}; expected one "
                        "of keys and values alone"
                    )
                made.projectors = pair
                self.layers[index] = made

        @property
        def nbytes(self) -> int:
            """What the stored tensors take, in bytes."""
            layers: list[Any] = self.layers
            held = [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
            return sum(int(tensor.nbytes) for tensor in held)

    class TapCache(DynamicCache):  # type: ignore[misc]
        """Stores nothing."""

        def __init__(self, tap: Tap) -> None:
            super().__init__()
            self.tap = tap

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return self.tap(layer_idx, key_states, value_states)

    return ProjectedCache, TapCache
