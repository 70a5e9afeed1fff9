"""The gradient of a loss with respect to the weight of linear layers, whatever holds the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian.adapt.layer import layer_shape
from gramian.errors import GramianError
from gramian.modes import evaluating

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar."""


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a Hugging Face model computes itself when its batch has labels.

    Raises:
        GramianError: it gives none.
    """
    out = model(**batch) if isinstance(batch, Mapping) else model(*batch) if isinstance(batch, tuple) else model(batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        raise GramianError(
            f"{type(model).__name__} gives no loss on a batch of type {type(batch).__name__}; put labels in the batch or "
            "pass loss=function of (model, batch)"
        )
    return loss


def weight_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any], loss: Loss = default_loss
) -> dict[str, Tensor]:
    """``dL/dW`` (out, in) of each layer, summed over the batches, in float32; the model is left as it was.

    No parameter needs to require a gradient: a layer's is the sum of its output gradients times its inputs.

    Raises:
        GramianError: no data, a loss that is not a finite scalar, or a layer that the loss does not reach.
    """
    sums = {name: torch.zeros(layer_shape(layer)) for name, layer in layers.items()}

    def add(name: str, g: Tensor, x: Tensor) -> None:
        sums[name] = sums[name].to(g.device).addmm_(g.mT, x)

    _passes(model, layers, data, loss, add)
    return sums


def layer_products(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    blocks: Mapping[str, tuple[bool, Tensor]],
    loss: Loss = default_loss,
) -> dict[str, Tensor]:
    """``G z`` (out, k) or ``G^T z`` (in, k) for the gradient G = ``dL/dW`` of each layer, summed over the batches, without the
    (out, in) array.

    Args:
        model: any module, left as it was.
        layers: its linear layers by name.
        data: batches.
        loss: (model, batch) -> scalar.
        blocks: for each layer whether the transpose is meant, and z: (in, k), or (out, k) for the transpose.

    Raises:
        GramianError: as ``weight_gradients``.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, g: Tensor, x: Tensor) -> None:
        adjoint, z = blocks[name]
        first, second = (x, g) if adjoint else (g, x)
        product = first.mT @ (second @ z.to(second))
        sums[name] = product if name not in sums else sums[name].add_(product)

    _passes(model, layers, data, loss, add)
    return sums


def _passes(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    loss: Loss,
    take: Callable[[str, Tensor, Tensor], None],
) -> None:
    """One backward pass a batch; `take` is given a layer's name, output gradients (tokens, out) and inputs (tokens, in)."""
    reached: set[str] = set()

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
            x = inputs[0].detach()
            if not y.requires_grad:
                y = y.detach().requires_grad_().clone()  # no leaf: what follows may change it in place

            def add(g: Tensor) -> None:
                reached.add(name)
                take(name, *(t.reshape(-1, t.shape[-1]).float() for t in (g.detach(), x)))

            y.register_hook(add)  # type: ignore[no-untyped-call]
            return y

        return hook

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    batches = 0
    try:
        model.requires_grad_(False)
        with evaluating(model):
            for batch in data:
                batches += 1
                with torch.enable_grad():
                    value = loss(model, batch)
                    if value.numel() != 1 or not bool(torch.isfinite(value.detach()).all()):
                        raise GramianError(f"batch {batches}: loss {value.detach().tolist()}; expected a finite scalar")
                    if value.requires_grad:
                        value.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for p, want in wanted:
            p.requires_grad_(want)
    if not batches:
        raise GramianError("the start of this adapter uses the gradient; found no data")
    missed = [name for name in layers if name not in reached]
    if missed:
        raise GramianError(f"layer {missed[0]}: the loss does not reach it; leave it out or change the data")
