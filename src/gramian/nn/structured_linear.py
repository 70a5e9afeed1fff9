"""Any operator as a drop-in for ``torch.nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.execution import Prepared
from gramian.modes import captured, differentiable
from gramian.nn.structured import Structured
from gramian.ops import BlockLowRank, Dense, Operator, Product, Skeleton, Sum, from_config


class StructuredLinear(Structured):
    """A linear layer ``y = x A^T + bias`` whose matrix A is an Operator.

    The factors are child modules named as in ``op.factors()``: one that acts as a matrix is an ``nn.Linear`` without
    bias (``layer.left.weight``), so that adapter libraries can target it by name; any other is a ``Factor``. The buffer
    ``weight`` has no elements: a loader that does not know this class finds a tensor whose shape cannot match and fails
    instead of starting from random weights; it also carries dtype and device for code that asks ``layer.weight``.

    Without gradients the layer runs in the form that ``gramian.execution`` chooses for the batch (the structure, or the
    materialised matrix, in the layout that is fastest), made once and made again when a factor changes. With gradients
    it runs the stored factors. A change that torch does not count (through ``parameter.data``, or by a fused optimizer)
    is seen after the next pass with gradients or the next ``train()`` / ``eval()``.

    Args:
        op: shape (out, in); its factors are copied.
        bias: (out,) or None; copied.

    Raises:
        GramianError: the bias does not fit, or a factor has the name of an attribute of the layer (``weight`` of a
            Dense operator: use ``as_linear``).
    """

    bias: nn.Parameter | None

    def __init__(self, op: Operator, bias: Tensor | None = None) -> None:
        if bias is not None and tuple(bias.shape) != (op.shape[0],):
            raise GramianError(f"StructuredLinear: bias {tuple(bias.shape)}; expected ({op.shape[0]},)")
        super().__init__(op, linears=True, reserved=("bias", "in_features", "out_features"))
        self.out_features, self.in_features = op.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "meta",
    ) -> StructuredLinear:
        """An uninitialised layer of a recorded structure, ready for a state dict."""
        dtype = dtype or torch.get_default_dtype()
        op = from_config(config, dtype=dtype, device=device)
        layer = cls(op, torch.empty(op.shape[0], dtype=dtype, device=device) if bias else None)
        layer.weight = layer.weight.to(dtype)  # factors with a dtype of their own (scales) do not speak for the layer
        return layer

    def prepared(self) -> Prepared:
        """What runs without gradients: cached until a factor changes, made afresh where a change could not be seen
        (factors made under ``torch.inference_mode``, or standing in for a function transform) or a factor is wrapped.
        """
        return self._ready(self._weights())

    def _ready(self, weights: list[Tensor] | None) -> Prepared:
        return (None if weights is None else self._kept.get(weights, self._make)) or self._make()

    def _make(self) -> Prepared:
        return Prepared(self.op, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: x (..., in) -> (..., out)."""
        weights, bias = self._weights(), self._parameters["bias"]
        if weights is None:
            self._kept.clear()
            y = self._through_children(self._template, "", x)
        elif captured():
            y = self.op.apply(x)
        elif differentiable(x, bias, *weights):
            self._kept.clear()
            y = self.op.apply(x)
        else:
            return self._ready(weights)(x, bias)
        return y if bias is None else y + bias.to(y.dtype)

    def columns(self, x: Tensor) -> Tensor:
        """The feature-major product: x (in, B) -> (out, B).

        Raises:
            GramianError: an adapter library has wrapped a factor; its layers are row-major.
        """
        weights = self._weights()
        if weights is None:
            raise GramianError("a feature-major product cannot run through wrapped factors; use forward()")
        if captured():
            y = self.op.apply_columns(x)
        elif differentiable(x, self.bias, *weights):
            self._kept.clear()
            y = self.op.apply_columns(x)
        else:
            y = self._ready(weights).columns(x)
        return y if self.bias is None else y + self.bias[:, None].to(y.dtype)

    def _through_children(self, op: Operator, prefix: str, x: Tensor) -> Tensor:
        """The product by calling the child layers, so that what wraps them (an adapter) takes part.

        Raises:
            GramianError: the structure has no such form.
        """
        if self._weights(prefix) is not None:
            return op.replace(**{name: self._factor(prefix + name) for name in op.factors()}).apply(x)
        if isinstance(op, Dense):
            return self._holder(prefix + "weight")(x)  # type: ignore[no-any-return]
        if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
            return self._holder(prefix + "left")(self._holder(prefix + "right")(x))  # type: ignore[no-any-return]
        if isinstance(op, Skeleton) and not op.by_columns:
            first = self._holder(prefix + "basis")(x)
            both = torch.cat([first, self._holder(prefix + "coefficients")(first)], -1)
            return torch.zeros_like(both).index_copy(-1, self._factor(prefix + "order").long(), both)
        if isinstance(op, Product):
            for i in reversed(range(len(op.parts))):
                x = self._through_children(op.parts[i], f"{prefix}parts.{i}.", x)
            return x
        if isinstance(op, Sum):
            parts = [self._through_children(part, f"{prefix}parts.{i}.", x) for i, part in enumerate(op.parts)]
            return torch.stack(parts).sum(0)
        raise GramianError(
            f"a {op.kind} layer cannot run through wrapped factors {list(self._shapes)}; "
            "leave its factors out of the adapter's targets"
        )

    def to_linear(self) -> nn.Linear:
        """The same layer as a plain ``nn.Linear``."""
        with torch.no_grad():
            dense = self.op.dense().to(self.weight.dtype)
            layer = nn.Linear(
                self.in_features, self.out_features, self.bias is not None, device=dense.device, dtype=dense.dtype
            )
            layer.weight.copy_(dense)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self._template.kind}, in_features={self.in_features}, out_features={self.out_features}"


def as_linear(op: Operator, bias: Tensor | None = None) -> nn.Linear | StructuredLinear:
    """A layer for `op`: a plain ``nn.Linear`` for a dense matrix, a ``StructuredLinear`` for any other."""
    if not isinstance(op, Dense):
        return StructuredLinear(op, bias)
    out, in_ = op.shape
    layer = nn.Linear(in_, out, bias is not None, device="meta")
    layer.weight = nn.Parameter(op.weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
