"""The forms in which a product can run, and which of them is fastest here."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gramian.execution.calibration import best_seconds, stored
from gramian.execution.cost_model import CostModel
from gramian.execution.work import trace
from gramian.ops import BlockLowRank, Dense, Operator, Product, Selection

DENSE_ABOVE = 0.75
"""Without a cost model: run dense when the structured product takes more than this share of its operations."""

LEAST_GAIN = 0.9
"""With one: leave the plain dense product for another form only where that takes at most this share of its time. Predictions
are off by about as much."""

FAR_AHEAD = 0.5
"""Of the plain dense product's predicted time: a form below it is taken without measuring, unless that costs little."""

LITTLE = 1e-3
"""Seconds of a dense product that is always measured."""

MEASURED_ROWS = 1024
"""Of more rows, so many are measured."""

Kernel = Callable[[Tensor, Tensor | None], Tensor]
"""(x (..., in), bias (out,) or None) -> y (..., out)."""


@dataclass(frozen=True)
class Form:
    """How to run ``x A^T`` for x (batch, in).

    Attributes:
        dense: on the materialised matrix.
        columns: feature-major inside: ``(A x^T)^T``, transposing what comes in and goes out (by views where the kernel
            takes them).
        dtype: computed in; another than the operator's where the machine has no fast kernel for that one.
        single: for one row at a time: the factor with more rows than columns is kept a second time, column after column.
            Read from memory so, a product with one row takes about half the time.
    """

    dense: bool
    columns: bool
    dtype: torch.dtype
    single: bool = False

    def operator(self, op: Operator) -> Operator:
        """What runs: `op` in its run-time form, or dense, in the dtype computed in."""
        runs = (Dense(op.dense()) if self.dense else op.runtime()).to(dtype=self.dtype)
        tall = _tall(runs) if self.single else {}
        return runs.replace(**{name: factor.mT.contiguous().mT for name, factor in tall.items()}) if tall else runs

    def kernel(self, runs: Operator, dtype: torch.dtype) -> Kernel:
        """The product of ``runs``, as ``self.operator`` gave it, for x, bias and y of `dtype`."""
        product = _columns(runs) if self.columns else _rows(runs)
        if self.dtype == dtype:
            return product
        inner = self.dtype

        def cast(x: Tensor, bias: Tensor | None) -> Tensor:
            return product(x.to(inner), None if bias is None else bias.to(inner)).to(dtype)

        return cast


def _tall(op: Operator) -> dict[str, Tensor]:
    """The factor that ``Form.single`` is about, by name."""
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        return {"left": op.left} if op.shape[0] > op.left.shape[2] else {}
    return {"weight": op.weight} if isinstance(op, Dense) and op.shape[0] > op.shape[1] else {}


def _rows(op: Operator) -> Kernel:
    if isinstance(op, Dense):
        weight = op.weight
        return lambda x, bias: F.linear(x, weight, bias)
    if isinstance(op, BlockLowRank) and op.blocks == (1, 1):
        left, right = op.left[0], op.right[0]
        return lambda x, bias: F.linear(F.linear(x, right), left, bias)
    if isinstance(op, Product) and len(op.parts) == 2:
        return _pair(*op.parts) or _applied(op)
    return _applied(op)


def _pair(left: Operator, right: Operator) -> Kernel | None:
    """Some rows or some columns of a dense matrix: what is left when coordinates were chosen."""
    if isinstance(left, Selection) and isinstance(right, Dense) and left.scatter:
        weight, index, size = right.weight, left.index.long(), left.size

        def scattered(x: Tensor, bias: Tensor | None) -> Tensor:
            some = F.linear(x, weight)
            y = some.new_zeros(*x.shape[:-1], size).index_copy_(-1, index, some)
            return y if bias is None else y + bias

        return scattered
    if isinstance(left, Dense) and isinstance(right, Selection) and not right.scatter:
        weight, index = left.weight, right.index
        return lambda x, bias: F.linear(x.index_select(-1, index), weight, bias)
    return None


def _applied(op: Operator) -> Kernel:
    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = op.apply(x)
        return y if bias is None else y + bias.to(y.dtype)

    return product


def _columns(op: Operator) -> Kernel:
    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        # Contiguous on both sides: a view would only move the copy into the first product, or into the next layer.
        y = op.apply_columns(x.reshape(-1, x.shape[-1]).mT.contiguous())
        if bias is not None:
            y = y + bias[:, None].to(y.dtype)
        return y.mT.contiguous().reshape(*x.shape[:-1], op.shape[0])

    return product


def candidates(op: Operator, dtype: torch.dtype, batch: int = 0) -> list[Form]:
    """The candidates: structured and dense, in `dtype` and in float32; row- and feature-major. For a single row, of which
    both are the same, ``Form.single`` where there is a tall factor (and the plain dense product, to compare with).
    """
    dtypes = [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]
    runs = op.to("meta").runtime()
    out = []
    for kind in dtypes:
        if not isinstance(runs, Dense):
            out += [Form(False, False, kind, batch == 1 and bool(_tall(runs)))]
            out += [Form(False, True, kind)] if batch != 1 else []
        out += [Form(True, False, kind)]
        out += [Form(True, True, kind)] if batch != 1 else []
        out += [Form(True, False, kind, True)] if batch == 1 and op.shape[0] > op.shape[1] else []
    return out


def predicted(op: Operator, form: Form, batch: int, dtype: torch.dtype, model: CostModel) -> float:
    """Seconds of ``form`` on x (batch, in) of `dtype`: traced without numbers, priced by the model."""
    kernel = form.kernel(form.operator(op.to("meta")), dtype)
    steps = trace(lambda x: kernel(x, None), (batch, op.shape[1]), dtype)
    return model.seconds(steps)


def choose(
    op: Operator, batch: int, dtype: torch.dtype | None = None, model: CostModel | None = None
) -> tuple[Form, float]:
    """The form predicted fastest, and its predicted seconds.

    Args:
        op: any operator.
        batch: rows of x.
        dtype: of x; the operator's by default.
        model: a cost model; the calibration of this machine by default.

    Without a calibration the number of operations decides, with a margin for the lower efficiency of small products
    (`DENSE_ABOVE`), and the seconds are NaN.
    """
    dtype = dtype or op.dtype
    if model is None and op.device.type in ("cpu", "meta"):
        model = stored()
    if model is None:
        return Form(_dense_by_operations(op), False, dtype), math.nan
    light = op.to("meta")
    ranked = [
        (predicted(light, form, batch, dtype, model), i, form) for i, form in enumerate(candidates(light, dtype, batch))
    ]
    seconds, _, form = min(ranked)
    plain = next(row for row in ranked if row[2] == Form(True, False, dtype))
    if seconds > LEAST_GAIN * plain[0]:
        seconds, _, form = plain
    return form, seconds


def _dense_by_operations(op: Operator) -> bool:
    runs = op.runtime()
    return isinstance(runs, Dense) or runs.flops() > DENSE_ABOVE * 2 * op.shape[0] * op.shape[1]


def _rows_of(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _power(batch: int) -> int:
    """The exponent of the next power of two: batches of one are alike."""
    return max(batch - 1, 0).bit_length()


_SETTLED: dict[tuple[Hashable, ...], Form] = {}
"""What ``Prepared`` found by measuring, by kind and shapes of operator, dtype, batch and threads."""


class Prepared:
    """An operator that runs in the form that is fastest for the batch at hand; forms are made when first needed.

    Args:
        op: its factors are not copied.
        dtype: of what comes in.
    """

    def __init__(self, op: Operator, dtype: torch.dtype | None = None) -> None:
        self.op = op
        self._dtype = dtype or op.dtype
        self._kernels: dict[int, Kernel] = {}
        self._running: dict[tuple[bool, torch.dtype, bool], Operator] = {}

    def form(self, batch: int) -> Form:
        """How `batch` rows run, as predicted for the next power of two."""
        return choose(self.op, 1 << _power(batch), self._dtype)[0]

    def columns(self, x: Tensor) -> Tensor:
        """``A x``, feature-major: x (in, B) -> (out, B), structured unless that takes nearly the operations of dense."""
        form = Form(_dense_by_operations(self.op), True, self._dtype)
        return self._operator(form).apply_columns(x)

    def settled(self, x: Tensor) -> Form:
        """How x (..., in) runs: as predicted, or plainly dense where that turns out faster on x. Predictions err; so with a
        calibration, a form that is not predicted to be far ahead of a product that takes its time runs against that once,
        in the process's first product of such an operator and batch.
        """
        batch = _rows_of(x)
        model = stored() if x.device.type == "cpu" else None
        if model is None or is_in_torch_dispatch_mode():  # a mode may count what runs
            return self.form(batch)
        shapes = tuple((name, factor.shape, factor.dtype) for name, factor in self.op.factors().items())
        key = (self.op.kind, self.op.shape, shapes, self._dtype, _power(batch), torch.get_num_threads())
        if key not in _SETTLED:  # looked up first: layers alike need no prediction either
            _SETTLED[key] = self._measured(x, self.form(batch), model)
        return _SETTLED[key]

    def _measured(self, x: Tensor, form: Form, model: CostModel) -> Form:
        plain = Form(True, False, self._dtype)
        if form == plain:
            return form
        light, batch = self.op.to("meta"), _rows_of(x)
        said = [predicted(light, each, batch, self._dtype, model) for each in (form, plain)]
        if said[0] < FAR_AHEAD * said[1] and said[1] >= LITTLE:
            return form
        with torch.no_grad():
            runs = (self._operator(form), plain.operator(self.op))
            kernels = [each.kernel(op, self._dtype) for each, op in zip((form, plain), runs, strict=True)]
            some = x.reshape(-1, x.shape[-1])[:MEASURED_ROWS]
            took = [best_seconds(partial(kernel, some, None)) for kernel in kernels]
        return form if took[0] < took[1] else plain

    def _operator(self, form: Form) -> Operator:
        place = (form.dense, form.dtype, form.single)
        if place not in self._running:
            with torch.no_grad(), torch.autocast(self.op.device.type, enabled=False):
                self._running[place] = form.operator(self.op)
        return self._running[place]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x A^T + bias``: x (..., in) -> (..., out)."""
        key = _power(_rows_of(x))
        kernel = self._kernels.get(key)
        if kernel is None:
            form = self.settled(x)
            kernel = self._kernels[key] = form.kernel(self._operator(form), self._dtype)
        return kernel(x, bias)
