"""A few rows times a chain of matrices and stacks of blocks in one call: ``c/few_rows.c``.

A product of few rows takes as long as reading the weights, and libraries for products of many rows read them at half of the
rate that memory gives, a call for each of them. The kernel reads them once, in order, with all threads, and moves numbers
between the products as it writes them. It has no gradients or batching rules: where something looks on, torch's own products
run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.execution.native import DTYPES, library, readable
from gramian.execution.onednn import Kernel
from gramian.execution.steps import Matrix, Mixed, Placed, Resized, Stack, Step, Swapped, Taken

MOST_ROWS = 32
"""Of more rows, libraries that reuse weights in registers are faster; of more than a few they often are."""


class _Stack(ctypes.Structure):
    """``Stack`` of few_rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "place")),
        *((name, ctypes.c_int64) for name in ("groups", "out", "in", "stride", "size", "sparse")),
    ]


class _Chain(ctypes.Structure):
    """``Chain`` of few_rows.c.

    Attributes:
        held: whose addresses these are, beside the weights.
    """

    _fields_ = [
        ("stacks", ctypes.POINTER(_Stack)),
        ("take", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "taken", "columns", "half")),
    ]
    held: list[Tensor | None]


def _taken_apart(steps: Sequence[Step]) -> Iterator[Step]:
    """Stacks, and what moves numbers."""
    for step in steps:
        if isinstance(step, Matrix):
            yield Stack(step.weight[None])
        elif isinstance(step, Mixed):
            r, i, k = step.scales.shape
            yield from (Swapped(k, r), Stack(step.scales), Swapped(r, i))
        else:
            yield step


def _moved(order: Tensor, step: Step) -> Tensor:
    """Which number each is after a step; -1 for zero."""
    if isinstance(step, Swapped):
        return order.view(step.long, step.short, step.run).transpose(0, 1).reshape(-1)
    if isinstance(step, Resized):
        return F.pad(order, (0, max(0, step.size - len(order))), value=-1)[: step.size]
    if isinstance(step, Taken):
        return order[step.index.long()]
    assert isinstance(step, Placed)
    return order.new_full((step.size,), -1).index_copy(0, step.index.long(), order)


def _places(order: Tensor, made: int) -> Tensor | None:
    """The inverse: where each of the numbers made goes, -1 for nowhere; None where one would go to two places."""
    kept = (order >= 0).nonzero()[:, 0]
    places = order.new_full((made,), -1).index_copy(0, order[kept], kept)
    return places if torch.equal(places[order[kept]], kept) else None


def _in_order(order: Tensor, made: int) -> bool:
    return len(order) == made and torch.equal(order, torch.arange(made))


def chain(steps: Sequence[Step], shape: tuple[int, int], otherwise: Kernel) -> Kernel | None:
    """The product of all steps in one call.

    Args:
        steps: of the product, the first first.
        shape: (out, in).
        otherwise: the same by torch: for gradients, and what else looks on.

    Returns:
        None where the kernel is not for them: no products among the steps, a dtype other than `DTYPES`, weights whose rows
        are not contiguous, numbers that go to several places. Of meta tensors a product that can only be traced.
    """
    (size, columns), parts = shape, list(_taken_apart(steps))
    stacks = [part.values for part in parts if isinstance(part, Stack)]
    if not stacks or any(stack.numel() == 0 for stack in stacks):
        return None
    first = stacks[0]
    if first.is_meta:
        return lambda x, bias: torch.ops.gramian.few_rows(x, stacks, size, 0)  # type: ignore[no-any-return]
    loaded, dtype = library(), first.dtype
    fits = all(s.dtype == dtype and s.device.type == "cpu" and s[0].is_contiguous() for s in stacks)
    if loaded is None or not fits or dtype not in DTYPES:
        return None

    orders = [torch.arange(columns)]  # of what each stack multiplies, and of what comes out
    for part in parts:
        if isinstance(part, Stack):
            orders.append(torch.arange(part.values.shape[0] * part.values.shape[1]))
        else:
            orders[-1] = _moved(orders[-1], part)
    take = None if _in_order(orders[0], columns) else orders[0].int()
    rows = (_Stack * len(stacks))()
    about = _Chain(rows, _address(take), len(stacks), len(orders[0]), columns, dtype == torch.bfloat16)
    about.held = [take]
    for row, stack, order in zip(rows, stacks, orders[1:], strict=True):
        groups, out, in_ = stack.shape
        places = _places(order, groups * out)
        if places is None:
            return None
        about.held.append(None if _in_order(order, groups * out) else places.int())
        row.values, row.place = stack.data_ptr(), _address(about.held[-1])
        row.groups, row.out, row.stride, row.size = groups, out, stack.stride(0), len(order)
        setattr(row, "in", in_)
        row.sparse = bool((order < 0).any())
    multiply, pointer, addresses = loaded.gramian_few_rows, ctypes.pointer(about), [s.data_ptr() for s in stacks]

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        if not readable(x, dtype, *stacks):
            return otherwise(x, bias)
        if [s.data_ptr() for s in stacks] != addresses:  # freed or moved behind our back, as sharding libraries do
            return otherwise(x, bias)
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], size))
        if bias is not None:
            bias = bias.to(dtype).contiguous()
        batch = x.numel() // columns
        if multiply(pointer, batch, x.data_ptr(), _address(bias), y.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"a product of {batch} rows by {len(stacks)} matrices")
        return y

    return product


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# Known to torch as shapes alone, so that the cost model sees what would run; `bits` of an entry, where they are fewer than
# the dtype's (``execution.codes``).
_LIBRARY = torch.library.Library("gramian", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("few_rows(Tensor x, Tensor[] stacks, int out, int bits) -> Tensor")  # type: ignore[no-untyped-call]


def _shape(x: Tensor, stacks: list[Tensor], out: int, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


_LIBRARY.impl("few_rows", _shape, "Meta")  # type: ignore[no-untyped-call]


__all__ = ["DTYPES", "MOST_ROWS", "chain"]
