"""A trained softmax-attention model as a gated recurrence, without new parameters (Lan et al. 2025, "Liger: Linearizing Large
Language Models to Gated Recurrent Structures").

    names = linearise(model)                                    # every attention layer; weights keep their names
    adapted = attach(model, recipe("lora"), include=["q_proj", "k_proj", "v_proj"])
    train(model, text_batches(tokens, 8, 256), steps=300, parameters=adapted.parameter_groups(1e-3))
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.models.walk import matches
from gramian.sequence.cores import Recurrent
from gramian.sequence.features import softmax
from gramian.sequence.inputs import Layout
from gramian.sequence.rules import GatedRule, SigmoidDecay

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RecurrentAttention(nn.Module):
    """Takes the place of a Llama-shaped attention layer, with that layer's own projections:

        o = (1 - share) * recurrence + share * softmax attention over the last `window` tokens

    The recurrence is ``S_t = Diag(sigmoid(k_t)^(1 / temperature)) S_{t-1} + softmax(k_t) v_t^T``, read with softmax(q_t): the
    decay is made of the keys (section 3 of the paper, where the pooling that makes the gate is the identity). Positions enter
    the window only. What a decoder carries does not grow: S and `window` - 1 keys and values.

    Args:
        attention: the layer; its projections are taken, not copied.
        heads: of the queries.
        window: tokens; 0 for the recurrence alone.
        share: of the window in the output.
        temperature: of the decay.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, attention: nn.Module, heads: int, *, window: int, share: float, temperature: float) -> None:
        super().__init__()
        for name in PROJECTIONS:
            setattr(self, name, getattr(attention, name))
        head_dim, index = attention.head_dim, attention.layer_idx
        assert isinstance(head_dim, int)
        assert isinstance(index, int)
        self.head_dim, self.layer_idx, self.heads = head_dim, index, heads
        self.window, self.share = window, share
        self.rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.core = Recurrent(
            heads, head_dim, GatedRule(SigmoidDecay(head_dim, stream="k", temperature=temperature)), features=softmax
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As the attention layer: hidden states (batch, time, dim) to the same, and no weights."""
        batch, time, _dim = hidden_states.shape
        q, k, v = (getattr(self, name)(hidden_states).view(batch, time, -1, self.head_dim) for name in PROJECTIONS[:3])
        keep = None if attention_mask is None else _allowed(attention_mask)[:, 0, -1, -time:]
        held = None if past_key_values is None else _layer(past_key_values, self.layer_idx, self.window)
        groups = self.heads // k.shape[2]
        wide = {"q": q, "k": k.repeat_interleave(groups, 2), "v": v.repeat_interleave(groups, 2)}
        streams = {name: tensor.flatten(2) for name, tensor in wide.items()}
        out, _bonus, state = self.core(streams, () if held is None else held.recurrent, Layout(keep))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        q, k = self.rotate(q, k, *position_embeddings)
        if held is not None:
            held.recurrent = state
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.window:
            seen = self._seen(time, k.shape[2], attention_mask, q.device)
            near = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=groups > 1)
            out = (1 - self.share) * out + self.share * near.transpose(1, 2)
        if keep is not None:
            out = out * keep[..., None, None].to(out.dtype)
        y: Tensor = self.o_proj(out.flatten(2).to(hidden_states.dtype))
        return y, None

    def _seen(self, time: int, total: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Which of the `total` last keys each of the `time` last tokens attends to."""
        back = torch.arange(total - time, total, device=device)[:, None] - torch.arange(total, device=device)
        seen = (back >= 0) & (back < self.window)
        if mask is None:
            return seen
        # A token that is padding attends to itself, so that no row is empty.
        return (seen & _allowed(mask)[:, :, -1:, -total:]) | (back == 0)


def _allowed(mask: Tensor) -> Tensor:
    """Of bool: an attention mask that may be added to scores, (batch, 1, time, keys)."""
    return mask if mask.dtype == torch.bool else mask == 0


@functools.cache
def _layer_class() -> type:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    class RecurrentLayer(DynamicSlidingWindowLayer):  # type: ignore[misc, no-untyped-call]
        """A cache layer that holds a recurrent state and the last keys and values."""

        recurrent: tuple[Tensor, ...] = ()

        def _each(self, function: Any) -> None:
            self.recurrent = tuple(map(function, self.recurrent))

        def reset(self) -> None:
            super().reset()
            self.recurrent = ()

        def reorder_cache(self, beam_idx: Any) -> None:
            super().reorder_cache(beam_idx)
            self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._each(lambda tensor: tensor[indices])

        def crop(self, max_length: int) -> None:
            raise GramianError("a recurrent state cannot go back; decode without assistance or look-ahead")

    return RecurrentLayer


def _layer(cache: Any, index: int, window: int) -> Any:
    """The cache's layer of that index, made ours if nothing is in it."""
    from transformers import DynamicCache

    if not isinstance(cache, DynamicCache):
        raise GramianError(f"a linearised model takes a DynamicCache; found {type(cache).__name__}")
    kind = _layer_class()
    while len(cache.layers) <= index:
        cache.layers.append(kind(max(window, 2)))
    if not isinstance(cache.layers[index], kind):
        held: Any = cache.layers[index]
        if held.get_seq_length():
            raise GramianError(
                "a linearised model cannot go on from the cache of softmax attention; begin with a new one"
            )
        cache.layers[index] = kind(max(window, 2))
    return cache.layers[index]


def linearise(
    model: nn.Module,
    *,
    window: int = 64,
    share: float = 0.5,
    temperature: float = 16.0,
    layers: Sequence[str] = (),
) -> list[str]:
    """Replace softmax attention by ``RecurrentAttention``, in place. No parameter is added and names stay, so what
    ``save_pretrained`` writes is read by ``from_pretrained`` and then linearised again with the same options.

    The outputs change a good deal at once: fine-tune the projections afterwards (low rank is enough), see the module.

    Args:
        model: a Hugging Face language model whose attention is shaped like Llama's (four projections and a rotary
            embedding, with or without grouped queries).
        window: tokens that softmax attention still sees; 0 for the recurrence alone.
        share: of the window in the output.
        temperature: of the decay.
        layers: patterns of the attention layers' names; () for all.

    Returns:
        The names of the layers replaced.

    Raises:
        GramianError: no such layer, or one that has more than the four projections (norms of queries, biases by position).
    """
    if window < 0 or not 0 <= share <= 1 or temperature <= 0:
        raise GramianError(
            f"linearise: window {window}, share {share}, temperature {temperature}; expected window >= 0, share in [0, 1] "
            "and temperature > 0"
        )
    found = {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, p) for p in PROJECTIONS)
        and not isinstance(module, RecurrentAttention)
        and (not layers or matches(name, layers))
    }
    if not found:
        raise GramianError(
            f"{type(model).__name__} has no attention layer with {', '.join(PROJECTIONS)}"
            + (f" among {', '.join(layers)}" if layers else "")
        )
    for name, module in found.items():
        extra = [child for child, _ in module.named_children() if child not in PROJECTIONS]
        if extra or not hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb"):
            raise GramianError(
                f"layer {name!r} ({type(module).__name__}) is not shaped like Llama's attention: "
                + (f"it also has {', '.join(extra)}" if extra else "it has no rotary embedding")
            )
    for name, module in found.items():
        heads = module.q_proj.out_features // module.head_dim
        new = RecurrentAttention(module, heads, window=window, share=share, temperature=temperature)
        model.set_submodule(name, new.train(module.training))
    return list(found)
