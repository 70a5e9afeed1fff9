"""The forms in which a product can run, and which of them is fastest here."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gramian.execution import codes, compiled, int4, kernels, native, onednn
from gramian.execution.calibration import in_turn, stored
from gramian.execution.cost_model import CostModel
from gramian.execution.kernels import Kernel
from gramian.execution.work import trace
from gramian.modes import counted
from gramian.ops import Dense, Operator

DENSE_ABOVE = 0.75
"""Without a cost model: run dense when the structured product takes more than this share of its operations."""

LEAST_GAIN = 0.9
"""With one: leave the plain dense product for another form only where that is predicted to take at most this share of its
time. Predictions are off by about as much,"""

LEAST_MEASURED_GAIN = 0.95
"""and measurements by half of that."""

CODES_WITHIN = 2.0
"""A rounded matrix stays codes, and nothing dense is kept of it, where that takes at most so many times as long as the fastest
form: it was rounded to be small. ``StructuredLinear.to_linear`` undoes that."""

FAR_AHEAD = 0.5
"""Of the plain dense product's predicted time: forms below it are not measured against that, unless it costs little."""

LITTLE = 1e-2
"""Seconds of a plain dense product that is always measured."""

RIVALS = 6
"""At most so many of the forms that are predicted best are measured: of few rows in any case, of more"""

CLOSE = 1.6
"""where they are predicted to take at most this many times as long as the best."""

MEASURED_ROWS = 1024
"""Of more rows, so many are measured."""

COLD_ROWS = 8
"""Up to so many rows reading the weights takes longest, and they are measured from memory,"""

COLD_BYTES = 2**18
"""where those of the dense matrix are at least so many."""

EVICTED = 2**26
"""For that the weights, and the dense matrix, are copied until each takes so many bytes, more than a processor's caches hold:
as in a model, whose next product of the same weights comes after all others. The copies go when the form is chosen."""

MOST_COPIES = 512

FEW_ROWS = 64
"""Up to so many rows of x matrices may run "cut","""

FEWER_ROWS = 8
"""up to so many "turned" (``Form.way``)."""

LIBRARIES: dict[str, Callable[[], bool]] = {"onednn": onednn.present, "compiled": native.present}
"""That compete where the calibration measured them and they are there."""

SHAPES = 256
"""Of x, for which the kernel is known without counting rows: a microsecond a call."""


@dataclass(frozen=True)
class Form:
    """How to run ``x A^T`` for x (batch, in).

    Attributes:
        dense: on the materialised matrix.
        columns: feature-major inside: ``(A x^T)^T``, transposing what comes in and goes out (by views where the kernel
            takes them).
        dtype: computed in; another than the operator's where the machine has no fast kernel for that one.
        way: of a row-major product (``kernels.WAYS``). "plain" as torch does it. "cut", for few rows of x: each matrix is cut
            into pieces of as many rows, multiplied as one batch; libraries give few rows to one thread, or share them out
            badly, and so a product of 1 to 32 rows takes 1/2 to 4/5 of the time. Stacks of blocks are cut already, and run so
            with any number of rows. "turned", for fewer: pieces and blocks times columns of x^T, which some libraries read
            weights faster for. "onednn": by oneDNN, in float32. "int4", for few: on codes of 4 bits as they are.
            "compiled", for few: all in one call of a kernel compiled on this machine. "codes": by others of them, on codes
            of 2 to 8 bits as they are.
    """

    dense: bool
    columns: bool
    dtype: torch.dtype
    way: str = "plain"

    def operator(self, op: Operator) -> Operator:
        """What runs: `op` in its run-time form, or dense, in the dtype computed in."""
        packed = kernels.WAYS[self.way].packed
        if packed is not None:
            return packed(op, self.dtype)
        return (Dense(op.dense().contiguous()) if self.dense else op.runtime()).to(dtype=self.dtype)

    def kernel(self, runs: Operator, dtype: torch.dtype) -> Kernel:
        """The product of ``runs``, as ``self.operator`` gave it, for x, bias and y of `dtype`."""
        product = _columns(runs) if self.columns else kernels.rows(runs, kernels.WAYS[self.way])
        if self.dtype == dtype:
            return product
        inner = self.dtype

        def cast(x: Tensor, bias: Tensor | None) -> Tensor:
            return product(x.to(inner), None if bias is None else bias.to(inner)).to(dtype)

        return cast


def _columns(op: Operator) -> Kernel:
    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        # Contiguous on both sides: a view would only move the copy into the first product, or into the next layer.
        y = op.apply_columns(x.reshape(-1, x.shape[-1]).mT.contiguous())
        if bias is not None:
            y = y + bias[:, None].to(y.dtype)
        return y.mT.contiguous().reshape(*x.shape[:-1], op.shape[0])

    return product


def candidates(
    op: Operator, dtype: torch.dtype, batch: int = 0, *, libraries: Collection[str] = (), recast: bool = True
) -> list[Form]:
    """The candidates: structured and dense, in `dtype` and in float32; row- and feature-major (for a single row both are
    the same), in every way that is for so many rows.

    Args:
        op: any operator.
        dtype: of what comes in.
        batch: rows of x; 0 for many.
        libraries: "onednn": products of float32 by oneDNN too; "compiled": of few rows by compiled kernels too.
        recast: half precision in float32 too.
    """
    runs = op.to("meta").runtime()
    ways = [True] if isinstance(runs, Dense) else [False, True]
    out = []
    for kind in [dtype, torch.float32] if recast and dtype.itemsize < 4 else [dtype]:
        if 1 <= batch <= FEWER_ROWS and kind == dtype and int4.able(op, dtype):
            out.append(Form(False, False, kind, "int4"))
        if "compiled" in libraries and kind == dtype and codes.able(op, dtype):
            out.append(Form(False, False, kind, "codes"))
        for dense in ways:
            out += [Form(dense, False, kind)]
            matrix = Dense(torch.empty(op.shape, device="meta")) if dense else runs
            out += [Form(dense, True, kind)] if batch != 1 else []
            plain, stacks = kernels.multiplied(matrix)
            cuttable = stacks or any(kernels.pieces(weight) > 1 for weight in plain)
            if cuttable and (1 <= batch <= FEW_ROWS or not plain):
                out.append(Form(dense, False, kind, "cut"))
            if 1 <= batch <= FEWER_ROWS and (plain or stacks):
                out.append(Form(dense, False, kind, "turned"))
            many = not 1 <= batch < onednn.GROUPED_ROWS
            few = 1 <= batch <= compiled.MOST_ROWS and kind == dtype in compiled.DTYPES
            if "compiled" in libraries and few and (plain or stacks):
                out.append(Form(dense, False, kind, "compiled"))
            if "onednn" in libraries and kind == dtype == torch.float32 and (plain or (stacks and many)):
                out.append(Form(dense, False, kind, "onednn"))
    return out


def predicted(op: Operator, form: Form, batch: int, dtype: torch.dtype, model: CostModel) -> float:
    """Seconds of ``form`` on x (batch, in) of `dtype`: traced without numbers, priced by the model."""
    kernel = form.kernel(form.operator(op.to("meta")), dtype)
    steps = trace(lambda x: kernel(x, None), (batch, op.shape[1]), dtype)
    return model.seconds(steps)


def choose(
    op: Operator,
    batch: int,
    dtype: torch.dtype | None = None,
    model: CostModel | None = None,
    *,
    recast: bool = True,
) -> tuple[Form, float]:
    """The form predicted fastest, and its predicted seconds.

    Args:
        op: any operator.
        batch: rows of x.
        dtype: of x; the operator's by default.
        model: a cost model; the calibration of this machine by default.
        recast: see ``candidates``.

    Without a calibration the number of operations decides, with a margin for the lower efficiency of small products
    (`DENSE_ABOVE`), and the seconds are NaN.
    """
    dtype = dtype or op.dtype
    if model is None and op.device.type in ("cpu", "meta"):
        model = stored()
    if model is None:
        return Form(_dense_by_operations(op), False, dtype), math.nan
    order = ranked(op, batch, dtype, model, recast=recast)
    fastest, plain = next(iter(order)), Form(True, False, dtype)
    form = fastest if order[fastest] <= LEAST_GAIN * order[plain] else plain
    return form, order[form]


def ranked(op: Operator, batch: int, dtype: torch.dtype, model: CostModel, *, recast: bool = True) -> dict[Form, float]:
    """Every form's predicted seconds, the fastest first."""
    light = op.to("meta")
    libraries = {name for name in model.libraries if LIBRARIES[name]()}
    forms = candidates(light, dtype, batch, libraries=libraries, recast=recast)
    seconds = {form: predicted(light, form, batch, dtype, model) for form in forms}
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _dense_by_operations(op: Operator) -> bool:
    runs = op.runtime()
    return isinstance(runs, Dense) or runs.flops() > DENSE_ABOVE * 2 * op.shape[0] * op.shape[1]


def cold(op: Operator, batch: int) -> bool:
    """Whether a product of so many rows is measured with weights from memory."""
    return batch <= COLD_ROWS and op.shape[0] * op.shape[1] * op.dtype.itemsize >= COLD_BYTES


def copies(op: Operator, from_memory: bool, running: int = 0) -> list[Operator]:
    """What is measured in turn: the operator alone, or with copies of it in `EVICTED` bytes, at most `MOST_COPIES`.

    Args:
        op: the first of the list.
        from_memory: whether there are copies.
        running: bytes of what each makes to run, where that is more.
    """
    if not from_memory:
        return [op]
    again = range(1, min(EVICTED // max(op.nbytes, running, 1), MOST_COPIES))
    return [op, *(op.replace(**{name: factor.clone() for name, factor in op.factors().items()}) for _ in again)]


def _rows_of(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _power(batch: int) -> int:
    """The exponent of the next power of two: batches of one are alike."""
    return max(batch - 1, 0).bit_length()


def taken(seconds: Mapping[Form, float], plain: Form, on_codes: Form) -> Form:
    """The form that runs from now on: the fastest, unless another keeps less.

    Args:
        seconds: measured.
        plain: the plain dense product; another must gain something.
        on_codes: a rounded matrix as it is; a dense form must gain more.
    """
    best = min(seconds, key=seconds.__getitem__)
    if best.way != "int4" and seconds.get(on_codes, math.inf) <= CODES_WITHIN * seconds[best]:
        return on_codes
    return plain if seconds[best] > LEAST_MEASURED_GAIN * seconds.get(plain, math.inf) else best


class Prepared:
    """An operator that runs in the form that is fastest for the batch at hand; forms are made when first needed.

    Args:
        op: its factors are not copied.
        dtype: of what comes in.
        recast: half precision may run in float32 where that is faster; what runs is then a copy, of twice the bytes.
    """

    def __init__(self, op: Operator, dtype: torch.dtype | None = None, *, recast: bool = True) -> None:
        self.op = op
        self._recast = recast
        self._dtype = dtype or op.dtype
        self._kernels: dict[int, Kernel] = {}
        self._seen: dict[torch.Size, Kernel] = {}
        self._running: dict[tuple[Hashable, ...], Operator] = {}

    def form(self, batch: int) -> Form:
        """How `batch` rows run, as predicted for the next power of two."""
        return choose(self.op, 1 << _power(batch), self._dtype, recast=self._recast)[0]

    def columns(self, x: Tensor) -> Tensor:
        """``A x``, feature-major: x (in, B) -> (out, B), structured unless that takes nearly the operations of dense."""
        form = Form(_dense_by_operations(self.op), True, self._dtype)
        return self._operator(form).apply_columns(x)

    def settled(self, x: Tensor) -> Form:
        """How x (..., in) runs. Predictions err; so with a calibration, the forms that are predicted best run against each
        other and the plain dense product once, in the process's first product of such an operator and batch. A form that
        is predicted far ahead of a dense product that takes its time does not run against that.
        """
        batch = _rows_of(x)
        model = stored() if x.device.type == "cpu" else None
        if model is None or counted():  # a mode may count what runs
            return self.form(batch)
        shapes = tuple((name, factor.shape, factor.dtype) for name, factor in self.op.factors().items())
        key = (self.op.kind, self.op.shape, shapes, self._dtype, self._recast, _power(batch), torch.get_num_threads())
        if key not in model.settled:  # looked up first: layers alike need no prediction either
            model.settled[key] = self._fastest(x, model)
        form: Form = model.settled[key]
        return form

    def _fastest(self, x: Tensor, model: CostModel) -> Form:
        order = ranked(self.op, 1 << _power(_rows_of(x)), self._dtype, model, recast=self._recast)
        fastest, plain = next(iter(order)), Form(True, False, self._dtype)
        few, ahead = _rows_of(x) <= COLD_ROWS, order[fastest] < FAR_AHEAD * order[plain] and order[plain] >= LITTLE
        close = [form for form, seconds in order.items() if few or seconds <= CLOSE * order[fastest]][:RIVALS]
        forms = [form for form in close if form != plain] if ahead else list(dict.fromkeys([*close, plain]))
        on_codes = Form(False, False, self._dtype, "codes")
        forms += [on_codes] if on_codes in order and on_codes not in forms else []
        if len(forms) == 1:
            return forms[0]
        some = x.reshape(-1, x.shape[-1])[:MEASURED_ROWS]
        apart = Prepared(self.op, self._dtype)  # so that what is only measured is not kept
        evicted = cold(self.op, _rows_of(x))
        with torch.no_grad():
            running = [apart._operator(form) for form in forms]
            alike = {runs: copies(runs, evicted) for runs in dict.fromkeys(running)}
            kernels = [[form.kernel(o, self._dtype) for o in alike[r]] for form, r in zip(forms, running, strict=True)]
            took = in_turn([[partial(kernel, some, None) for kernel in each] for each in kernels])
        return taken(dict(zip(forms, took, strict=True)), plain, on_codes)

    def nbytes(self, form: Form) -> int:
        """Bytes of what runs in a form."""
        return self._operator(form).nbytes

    def _operator(self, form: Form) -> Operator:
        place = (form.dense, form.dtype, kernels.WAYS[form.way].packed)
        if place not in self._running:
            with torch.no_grad(), torch.autocast(self.op.device.type, enabled=False):
                self._running[place] = form.operator(self.op)
        return self._running[place]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x A^T + bias``: x (..., in) -> (..., out)."""
        kernel = self._seen.get(x.shape)
        if kernel is None:
            kernel = self._kernel(x)
        return kernel(x, bias)

    def _kernel(self, x: Tensor) -> Kernel:
        power = _power(_rows_of(x))
        if power not in self._kernels:
            form = self.settled(x)
            self._kernels[power] = form.kernel(self._operator(form), self._dtype)
        if len(self._seen) >= SHAPES:
            self._seen.clear()
        self._seen[x.shape] = self._kernels[power]
        return self._kernels[power]
