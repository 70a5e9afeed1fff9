"""Exchanging one linear layer or embedding of a network for another, whatever class held it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gramian.errors import GramianError, nearest
from gramian.models.walk import is_conv1d, is_linear
from gramian.nn import StructuredEmbedding, StructuredLinear, as_embedding, as_linear
from gramian.nn.exchange import exchange
from gramian.ops import Operator


@dataclass(frozen=True)
class Origin:
    """What a layer was before gramian changed it: kept on the layer that took its place, as ``gramian_origin``.

    Args:
        shape: (out, in) of the first layer at that place; (rows, width) of an embedding.
        transposed: it was a ``transformers`` Conv1D, whose weight is stored (in, out).
    """

    shape: tuple[int, int]
    transposed: bool


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, also of one on the meta device.

    Raises:
        GramianError: not a linear layer.
    """
    if is_conv1d(module):
        in_, out = module.weight.shape  # type: ignore[union-attr, misc]
        return int(out), int(in_)
    if isinstance(module, nn.Linear | StructuredLinear):
        return module.out_features, module.in_features
    raise GramianError(f"a {type(module).__name__} is no linear layer; expected nn.Linear, Conv1D or StructuredLinear")


def linear_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The matrix (out, in) and the bias (out,) or None of a linear layer; views of the live tensors where possible.

    Raises:
        GramianError: not a linear layer.
    """
    linear_shape(module)
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    if isinstance(module, StructuredLinear):
        return module.op.dense(), bias
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.mT if is_conv1d(module) else weight), bias


def replace_linear(model: nn.Module, name: str, op: Operator, bias: Tensor | None) -> nn.Module:
    """Put a layer for `op` in the place of the linear layer `name`, in place; returns the new layer.

    A dense operator of the first shape gives a layer of the first class, a dense one of another shape (neuron
    selection) a plain ``nn.Linear``, any other a ``StructuredLinear``. The tensors are copies with the old layer's
    device, dtype, training mode and ``requires_grad``; half-precision storage of an operator that computes in another
    dtype stays. Where the old module sits at several names of the network, so does the new one.

    Args:
        model: the network.
        name: dotted name of an ``nn.Linear``, Conv1D or ``StructuredLinear``.
        op: (out, in), neither larger than it was at first.
        bias: (out,) or None.

    Raises:
        GramianError: no such layer, shapes that do not fit, or a dense layer of unchanged shape gains or loses its bias
            (a loader without gramian would not notice).
    """
    old = find_linear(model, name)
    before, weight = origin(old), old.weight
    assert isinstance(weight, Tensor)
    check_shape(name, op.shape, before)
    if bias is not None and tuple(bias.shape) != (op.shape[0],):
        raise GramianError(f"layer {name!r}: bias {tuple(bias.shape)}; expected ({op.shape[0]},)")

    layer: nn.Module = as_linear(_moved(op, weight), None if bias is None else bias.detach().to(weight))
    if isinstance(layer, StructuredLinear):
        layer.weight = layer.weight.to(weight.dtype)
    if isinstance(layer, nn.Linear) and op.shape == before.shape:
        if (bias is None) != (old.bias is None):
            what = "added" if old.bias is None else "removed"
            raise GramianError(
                f"layer {name!r} is dense, of unchanged shape, and its bias was {what}; "
                "keep a bias (zero if need be) exactly where there was one"
            )
        if before.transposed:
            layer = conv1d(layer)
    swap(model, old, layer)
    return layer


def replace_embedding(model: nn.Module, name: str, op: Operator) -> nn.Module:
    """Put an embedding with the table `op` in the place of the embedding `name`, in place; returns the new layer.

    As ``replace_linear``: copies, with the old layer's device, dtype, training mode, ``requires_grad`` and
    ``padding_idx``.

    Args:
        model: the network.
        name: dotted name of an ``nn.Embedding`` or ``StructuredEmbedding``.
        op: (rows, width), exactly as it was.

    Raises:
        GramianError: no such embedding, or another shape.
    """
    old = find_embedding(model, name)
    if op.shape != origin(old).shape:
        raise GramianError(f"embedding {name!r}: shape {op.shape}; expected {origin(old).shape}")
    layer = as_embedding(_moved(op, old.weight), old.padding_idx)
    if isinstance(layer, StructuredEmbedding):
        layer.weight = layer.weight.to(old.weight.dtype)
    swap(model, old, layer)
    return layer


def _moved(op: Operator, like: Tensor) -> Operator:
    apart = own_dtypes(op)
    moved = {
        key: t.detach()
        .to(like.device, like.dtype if t.is_floating_point() and key not in apart else t.dtype)
        .contiguous()
        for key, t in op.factors().items()
    }
    return op.replace(**moved)


def own_dtypes(op: Operator) -> dict[str, torch.dtype]:
    """The floating-point factors that are stored in another dtype than their operator computes in, and so do not follow
    the model's: half-precision scales.
    """
    return {
        name: tensor.dtype
        for name, tensor, owner, _ in op._walk()
        if tensor.is_floating_point() and tensor.dtype != owner.dtype
    }


def check_shape(name: str, shape: tuple[int, int], before: Origin) -> None:
    """Raise a GramianError if a layer is larger than the one it stands for."""
    if shape[0] > before.shape[0] or shape[1] > before.shape[1]:
        raise GramianError(f"layer {name!r}: shape {shape}; expected at most {before.shape}, the model's own")


def conv1d(linear: nn.Linear) -> nn.Module:
    """The same layer as a Conv1D of ``transformers``: weight (in, out), always with a bias."""
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(0, 0)  # type: ignore[no-untyped-call]
    layer.nf, layer.nx = linear.weight.shape  # type: ignore[assignment]
    layer.weight = nn.Parameter(linear.weight.detach().mT.contiguous())
    layer.bias = nn.Parameter(
        linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias.detach()
    )
    return layer


def find_linear(model: nn.Module, name: str) -> nn.Module:
    """The linear layer of that name.

    Raises:
        GramianError: no such module (the message lists the nearest names) or not a linear layer.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        linears = [known for known, module in modules.items() if is_linear(module)]
        raise GramianError(f"no layer {name!r} in {type(model).__name__}{nearest(name, linears)}")
    if not is_linear(modules[name]):
        raise GramianError(
            f"layer {name!r} is a {type(modules[name]).__name__}; expected nn.Linear, Conv1D or StructuredLinear"
        )
    return modules[name]


def find_embedding(model: nn.Module, name: str) -> nn.Embedding | StructuredEmbedding:
    """The embedding of that name.

    Raises:
        GramianError: no such module (the message lists the nearest names) or not an embedding.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    found = modules.get(name) if name else None
    if found is None:
        tables = [known for known, module in modules.items() if isinstance(module, nn.Embedding | StructuredEmbedding)]
        raise GramianError(f"no embedding {name!r} in {type(model).__name__}{nearest(name, tables)}")
    if not isinstance(found, nn.Embedding | StructuredEmbedding):
        raise GramianError(f"{name!r} is a {type(found).__name__}; expected nn.Embedding or StructuredEmbedding")
    return found


def origin(module: nn.Module) -> Origin:
    """What a linear layer or embedding was before any exchange; itself if there was none."""
    known = getattr(module, "gramian_origin", None)
    if isinstance(module, nn.Embedding | StructuredEmbedding):
        return Origin((module.num_embeddings, module.embedding_dim), False)
    return known if isinstance(known, Origin) else Origin(linear_shape(module), is_conv1d(module))


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """As ``exchange``; the record of the origin carries over."""
    new.gramian_origin = origin(old)  # type: ignore[assignment]
    exchange(model, old, new)
