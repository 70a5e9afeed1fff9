"""What every layer over an operator shares: its factors as child modules, the guard tensor, and a cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.ops import Operator, from_config

Made = TypeVar("Made")


class Factor(nn.Module):
    """Holds one factor that is not a plain matrix: a batch of blocks, indices, codes."""

    def __init__(self, value: Tensor, trainable: bool) -> None:
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(value)
        else:
            self.register_buffer("weight", value)

    def forward(self) -> Tensor:
        """The factor itself."""
        return self.weight


class Kept(Generic[Made]):
    """Something made from tensors, kept until one of them changes. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._made: Made | None = None
        self._from: list[tuple[Tensor, int, int, Tensor]] = []

    def get(self, tensors: Sequence[Tensor], make: Callable[[], Made]) -> Made | None:
        """``make()``, or what it gave before; None where a change could not be seen (tensors made under
        ``torch.inference_mode``, or standing in for a function transform).
        """
        try:
            if self._made is not None and len(tensors) == len(self._from):
                for tensor, (seen, version, address, _) in zip(tensors, self._from, strict=True):
                    if tensor is not seen or tensor._version != version or tensor.data_ptr() != address:
                        break
                else:
                    return self._made
            # Holds on to the memory it was made from, so that no other tensor comes to lie there.
            now = [(tensor, tensor._version, tensor.data_ptr(), tensor.detach()) for tensor in tensors]
        except RuntimeError:
            return None
        device = tensors[0].device.type if tensors else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            self._made, self._from = make(), now
        return self._made

    def clear(self) -> None:
        """Make it anew when next asked."""
        self._made, self._from = None, []

    def __reduce__(self) -> tuple[Any, ...]:
        return (Kept, ())


class Keeping(nn.Module):
    """A layer that keeps something made from its parameters, until ``train()``, ``eval()`` or a move."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: Kept[Any] = Kept()

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; what was kept is made again."""
        self._kept.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._kept.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


class Structured(Keeping):
    """Owns the factors of an operator, as child modules named as in ``op.factors()``.

    The buffer ``weight`` has no elements: a loader that does not know this class finds a tensor whose shape cannot match
    and fails instead of starting from random weights; it also carries dtype and device for code that asks
    ``layer.weight``.

    Args:
        op: its factors are copied.
        linears: hold each factor that acts as a matrix in an ``nn.Linear`` without bias, so that adapter libraries can
            target it by name; any other is a ``Factor``.
        fixed: names of floating-point factors that are buffers here, not parameters.
        reserved: further names that no factor may have.

    Raises:
        GramianError: a factor has the name of an attribute of the layer.
    """

    weight: Tensor

    def __init__(
        self, op: Operator, *, linears: bool, fixed: Collection[str] = (), reserved: Collection[str] = ()
    ) -> None:
        super().__init__()
        trainable, matrices = op.trainable().keys() - set(fixed), op.linear_factors() if linears else {}
        for root in {name.partition(".")[0] for name in op.factors()}:
            if root in ("weight", *reserved) or root in self.__dict__ or hasattr(type(self), root):
                raise GramianError(
                    f"{type(self).__name__}: the factor {root!r} of a {op.kind} operator has the name of an attribute "
                    "of the layer; rename it, or use as_linear or as_embedding for a dense operator"
                )
        for name, value in op.factors().items():
            _attach(self, name, value, name in trainable, name in matrices)
        self.register_buffer("weight", torch.empty(0, dtype=op.dtype, device=op.device))
        self._config = op.config()
        self._template = from_config(self._config)  # on the meta device: structure without numbers
        self._shapes = {name: tuple(value.shape) for name, value in op.factors().items()}

    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs; JSON-able."""
        return self._config

    @property
    def op(self) -> Operator:
        """The operator over the live factors; gradients flow to them."""
        return self._template.replace(**{name: self._factor(name) for name in self._shapes})

    def _holder(self, name: str) -> nn.Module:
        module: nn.Module = self
        for part in name.split("."):
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def _factor(self, name: str) -> Tensor:
        holder = self._holder(name)
        weight = holder.weight
        assert isinstance(weight, Tensor)
        return weight.view(self._shapes[name])

    def _weights(self, prefix: str = "") -> list[Tensor] | None:
        """The tensors that hold the factors whose names start with `prefix`; None unless all are as they were made: no
        adapter or pruning library has taken one over, and no hook waits for a call. Runs in every product: past
        ``nn.Module``'s search for attributes.
        """
        found: list[Tensor] = []
        for name in self._shapes:
            if not name.startswith(prefix):
                continue
            module = self._holder(name)
            kind = type(module)
            if kind is not Factor and (kind is not nn.Linear or module._forward_pre_hooks or module._forward_hooks):
                return None
            weight = module._parameters.get("weight")
            weight = module._buffers.get("weight") if weight is None else weight  # type: ignore[assignment]
            if weight is None:
                return None
            found.append(weight)
        return found


def _attach(root: nn.Module, name: str, value: Tensor, trainable: bool, matrix: bool) -> None:
    """Add a copy of `value` under the dotted `name`, making containers on the way."""
    value = value.detach().clone(memory_format=torch.contiguous_format)
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if matrix:
        out, in_ = value.shape[-2:]
        holder: nn.Module = nn.Linear(in_, out, bias=False, device="meta", dtype=value.dtype)
        holder.weight = nn.Parameter(value.reshape(out, in_), requires_grad=trainable)
    else:
        holder = Factor(value, trainable)
    root.add_module(last, holder)
