"""What a product really does: the matrix products and memory traffic of ``op.apply``, found by tracing it.

No structure describes itself twice: the operator runs once on meta tensors (shapes without numbers) and every tensor
operation is written down. So a cost model that knows matrix products and memory traffic knows every structure, those of
third parties included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gramian.ops import Operator


@dataclass(frozen=True)
class MatrixProduct:
    """`count` products (m, k) @ (k, n).

    Attributes:
        count, m, n, k: sizes.
        left_transposed, right_transposed: whether the operand's columns, not its rows, are contiguous in memory.
        strided: an operand is contiguous along neither axis, or the batch: a kernel must copy it or is slow.
        dtype: of the operands.
        library: that runs it, where it is not torch's choice: "onednn" or "compiled" (the modules of those names here).
        bits: of an entry of the right operand, where they are fewer than the dtype's (``execution.int4``, ``execution.codes``).
    """

    count: int
    m: int
    n: int
    k: int
    left_transposed: bool
    right_transposed: bool
    strided: bool
    dtype: torch.dtype
    library: str = ""
    bits: int = 0

    @property
    def kernels(self) -> str:
        """Which kernels run it: the dtype's name, and the library where it is not torch's choice."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.library}".strip()

    @property
    def flops(self) -> int:
        """A multiply-add counts two."""
        return 2 * self.count * self.m * self.n * self.k

    @property
    def nbytes(self) -> int:
        """Bytes of operands and result."""
        weight = self.k * self.n * (self.bits or 8 * self.dtype.itemsize) // 8
        return self.count * ((self.m * self.k + self.m * self.n) * self.dtype.itemsize + weight)


@dataclass(frozen=True)
class Pass:
    """A pass over memory: an element-wise operation, a copy, a gather, a Fourier transform; or a view, which moves
    nothing but takes a moment to make.

    Attributes:
        name: of the tensor operation.
        nbytes: read and written.
        run: bytes that lie side by side in everything read and written: a permuted copy or a gather moves pieces of so many.
        dtype: of the result.
        count: how often, over the same memory.
    """

    name: str
    nbytes: int
    run: int
    dtype: torch.dtype
    count: int = 1


Step = MatrixProduct | Pass

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot"}
INDEXED = ("index", "gather", "scatter", "embedding", "take")
"""How the names of operations begin that read or write through an index."""
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "lift_fresh"}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode composite operations (linear, matmul) come whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _FREE:
            return result
        if func.is_view or name == "_unsafe_view":
            self.steps.append(Pass("view", 0, 0, args[0].dtype))
            return result
        tensors = [a for a in _flat(args) if isinstance(a, Tensor)]
        formula = None if func.namespace == "aten" else flop_registry.get(func.overloadpacket)
        if name == "_linear_pointwise" or name.endswith("convolution"):
            self.steps.append(_by_onednn(*tensors[:2]))
        elif name == "few_rows":
            for count, n, k in (stack.shape for stack in args[1]):
                rows = math.prod(args[0].shape[:-1])
                self.steps.append(
                    MatrixProduct(count, rows, n, k, False, True, False, args[0].dtype, "compiled", args[3])
                )
        elif name == "_weight_int4pack_mm_for_cpu":
            (m, k), n = tensors[0].shape, tensors[1].shape[0]
            self.steps.append(MatrixProduct(1, m, n, k, False, True, False, tensors[0].dtype, bits=4))
        elif name in _PRODUCTS:
            self.steps.append(_product(name, tensors))
        elif formula is not None:
            # An operation of our own that goes entry by entry: a number is read a multiply-add, over and over from what it
            # multiplies. It reads and writes rows of the batch; others are copied.
            for turned in (tensors[0], result):
                if turned.dim() > 1 and not _smooth(turned):
                    self.steps.append(Pass("copy_", 2 * _held(turned), turned.element_size(), turned.dtype))
            nbytes = int(formula(*args, **kwargs, out_val=result)) // 2 * result.element_size()
            once = max(1, _held(tensors[0]))
            self.steps.append(Pass(name, min(once, nbytes), 0, result.dtype, -(-nbytes // once)))
        else:
            made = [r for r in _flat(result) if isinstance(r, Tensor)]
            if made and not (len(made) == 1 and any(made[0] is t for t in tensors) and not func._schema.is_mutable):
                self.steps.append(Pass(name, sum(map(_held, tensors + made)), _run(name, args, made[0]), made[0].dtype))
        return result


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [part for item in value for part in _flat(item)]
    return [value]


def _product(name: str, tensors: list[Tensor]) -> MatrixProduct:
    left, right = tensors[-2:]
    if left.dim() == 1:
        left = left[None]
    if right.dim() == 1:
        right = right[:, None]
    left, right = (t if t.dim() == 3 else t.reshape(1, *t.shape[-2:]) if t.dim() == 2 else t.flatten(0, -3)
                   for t in (left, right))  # fmt: skip
    (count, m, k), n = left.shape, right.shape[2]
    orders = [_order(t) for t in (left, right)]
    return MatrixProduct(
        count, m, n, k, orders[0] == "columns", orders[1] == "columns", "neither" in orders, left.dtype
    )


def _by_onednn(x: Tensor, weight: Tensor) -> MatrixProduct:
    """Of ``onednn.linear``, or ``onednn.grouped`` as a convolution."""
    if weight.dim() == 2:
        (n, k), count = weight.shape, 1
        m = x.numel() // max(k, 1)
    else:
        k, count = weight.shape[1], x.shape[1] // weight.shape[1]
        m, n = x.shape[2], weight.shape[0] // count
    return MatrixProduct(count, m, n, k, False, True, False, weight.dtype, "onednn")


def _order(matrix: Tensor) -> str:
    rows, columns = matrix.shape[-2:]
    down, along = matrix.stride()[-2:]
    if along == 1:
        return "rows"
    if down == 1 or rows == 1:
        return "columns"  # also of one column, where batched products tell by it which kernel to take
    return "rows" if columns == 1 else "neither"


def _run(name: str, args: tuple[Any, ...], made: Tensor) -> int:
    """Bytes that lie side by side in the operands and in what is made of them."""
    size = made.element_size()
    if name.startswith(INDEXED):
        if name.startswith("index_") and isinstance(args[1], int):  # along one axis
            return math.prod(made.shape[args[1] % made.dim() + 1 :]) * size
        if name == "embedding":
            return made.shape[-1] * size
        if name == "index":
            last = max(i for i, index in enumerate(args[1]) if index is not None)
            return int(math.prod(args[0].shape[last + 1 :])) * size
        return size
    shortest = made.numel()
    inward = sorted(range(made.dim()), key=made.stride)  # axes from the innermost of the result outwards
    for tensor in (a for a in _flat(args) if isinstance(a, Tensor) and a.shape == made.shape):
        whole = 1
        for axis in inward:
            if tensor.shape[axis] > 1 and tensor.stride(axis) not in (0, whole):
                break
            whole *= tensor.shape[axis] if tensor.stride(axis) else 1
        shortest = min(shortest, whole)
    return shortest * size


def _held(tensor: Tensor) -> int:
    """Bytes that are distinct in memory: an expanded tensor is read from cache."""
    numbers = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= length if stride else 1
    return numbers * tensor.element_size()


def _smooth(tensor: Tensor) -> bool:
    """Whether the last axis is contiguous (or of one element)."""
    return tensor.stride(-1) in (0, 1) or tensor.shape[-1] == 1


def trace(call: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Step, ...]:
    """Every step of ``call(x)`` on a meta tensor x of that shape."""
    with torch.no_grad(), _Recorder() as recorder:
        call(torch.empty(shape, dtype=dtype, device="meta"))
    return tuple(recorder.steps)


def work(op: Operator, batch: int, *, columns: bool = False, dtype: torch.dtype | None = None) -> tuple[Step, ...]:
    """What ``op.apply`` on (batch, in), or ``op.apply_columns`` on (in, batch), does.

    Args:
        op: any operator; its numbers are not looked at.
        batch: rows of x.
        columns: the feature-major product.
        dtype: computed in; None for the operator's own.
    """
    light = op.to("meta", dtype)
    in_ = op.shape[1]
    if columns:
        return trace(light.apply_columns, (in_, batch), dtype or op.dtype)
    return trace(light.apply, (batch, in_), dtype or op.dtype)
