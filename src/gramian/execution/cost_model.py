"""Predicted run time: matrix products by regression trees over their shapes, memory traffic by measured rates.

A roofline alone is off by a third on small products: kernels have ragged edges, start-up costs and preferred layouts. Here
it is only what trees correct, which learn from products measured on the user's own machine.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.execution.trees import Trees
from gramian.execution.work import INDEXED, MatrixProduct, Pass, Step

VERSION = 6


@dataclass(frozen=True)
class Roofline:
    """``seconds = start + flops / rate + nbytes / bandwidth`` of one dtype's matrix products."""

    start: float
    rate: float
    bandwidth: float

    def seconds(self, product: MatrixProduct) -> float:
        """The bound's estimate."""
        return self.start + product.flops / self.rate + product.nbytes / self.bandwidth

    @classmethod
    def learn(cls, products: Sequence[MatrixProduct], seconds: Tensor) -> Roofline:
        """Least squares of the logarithm, from a start at the best rates seen."""
        flops = torch.tensor([float(p.flops) for p in products], dtype=torch.float64)
        nbytes = torch.tensor([float(p.nbytes) for p in products], dtype=torch.float64)
        first = [seconds.min(), (flops / seconds).max(), (nbytes / seconds).max()]
        theta = torch.stack([x.double().log() for x in first]).requires_grad_()
        optimiser = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            start, rate, bandwidth = theta.exp()
            value = torch.nn.functional.huber_loss(
                (start + flops / rate + nbytes / bandwidth).log(), seconds.log(), delta=0.3
            )
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[no-untyped-call]
        return cls(*theta.detach().exp().tolist())


def features(product: MatrixProduct) -> list[float]:
    """What the efficiency of a product depends on: sizes, what a vector register leaves over of each, layouts, work and
    what it touches, contiguous lengths. Trees divide by one number at a time, so products and ratios of sizes are given too.
    """
    count, m, n, k = product.count, product.m, product.n, product.k
    amounts = (count, m, n, k, min(m, n), max(m, n), min(m, n, k), product.flops, product.nbytes,
               product.flops / product.nbytes, count * m * k, count * k * n, count * m * n,
               m if product.left_transposed else k, k if product.right_transposed else n)  # fmt: skip
    ragged = (m % 8, n % 8, k % 8, n % 16)
    return [*map(math.log2, amounts), *ragged, float(product.left_transposed), float(product.right_transposed)]


def _table(products: Iterable[MatrixProduct]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([features(product) for product in products])


@dataclass
class CostModel:
    """Predicts seconds of traced steps on one machine.

    Attributes:
        machine: what it was measured on (processor, threads, torch); see ``calibration.machine``.
        products: measured matrix products and their seconds, by ``MatrixProduct.kernels``.
        passes: (bytes, bytes side by side, seconds) of passes over memory, by kind: copy, index, entrywise, fourier, view.
        strided: how many times slower a product with a strided operand is.
        rooflines: by the same the roofline's three numbers; found when first needed.
        settled: what was measured since then instead of predicted, for this process alone: the forms that ``Prepared`` found
            fastest, by kind and shapes of operator, dtype, batch and threads.
    """

    machine: dict[str, Any]
    products: dict[str, list[tuple[MatrixProduct, float]]]
    passes: dict[str, list[tuple[float, float, float]]]
    strided: float = 1.0
    rooflines: dict[str, list[float]] = field(default_factory=dict)
    settled: dict[tuple[Hashable, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _learned(self) -> dict[str, tuple[Roofline, Trees]]:
        out = {}
        for kernels, rows in self.products.items():
            seconds = torch.tensor([s for _, s in rows], dtype=torch.float64)
            shapes = [p for p, _ in rows]
            known = self.rooflines.get(kernels)
            roofline = Roofline.learn(shapes, seconds) if known is None else Roofline(*known)
            self.rooflines[kernels] = [roofline.start, roofline.rate, roofline.bandwidth]
            bound = np.array([roofline.seconds(p) for p in shapes])
            out[kernels] = (roofline, Trees.learn(_table(shapes), np.log(seconds.numpy() / bound)))
        return out

    def learn(self) -> None:
        """Learn from the measurements now, not when first asked."""
        assert self._learned

    @property
    def libraries(self) -> frozenset[str]:
        """Whose products were measured, beside torch's own choice: whose compete."""
        return frozenset(product.library for rows in self.products.values() for product, _ in rows[:1]) - {""}

    def roofline(self, dtype: torch.dtype) -> Roofline:
        """What the predictions of that dtype's products start from."""
        return self._learned[str(dtype).removeprefix("torch.")][0]

    def seconds(self, steps: Iterable[Step]) -> float:
        """Predicted seconds of the steps, one after the other."""
        steps = list(steps)
        total = sum(step.count * self._pass(step) for step in steps if isinstance(step, Pass))
        alike: dict[str, list[MatrixProduct]] = {}
        for step in steps:
            if isinstance(step, MatrixProduct):
                alike.setdefault(step.kernels, []).append(step)
        for kernels, products in alike.items():
            roofline, trees = self._learned[kernels if kernels in self._learned else "float32"]
            factors = np.exp(trees(_table(products))).tolist()
            for product, factor in zip(products, factors, strict=True):
                total += roofline.seconds(product) * factor * (self.strided if product.strided else 1.0)
        return total

    def _pass(self, step: Pass) -> float:
        """Along bytes at every run that was measured, then along runs; beyond the longest as at the longest."""
        curves = self._curves[kind_of(step)]
        points = [(run, _along(curve, step.nbytes)) for run, curve in curves.items()]
        return _along(points, min(step.run, points[-1][0]))

    @cached_property
    def _curves(self) -> dict[str, dict[float, list[tuple[float, float]]]]:
        """By kind and run, both ascending: (bytes, seconds)."""
        out: dict[str, dict[float, list[tuple[float, float]]]] = {}
        for kind, rows in self.passes.items():
            for nbytes, run, seconds in sorted(rows, key=lambda row: (row[1], row[0])):
                out.setdefault(kind, {}).setdefault(run, []).append((nbytes, seconds))
        return out

    def to_json(self) -> dict[str, Any]:
        """JSON-able; ``from_json`` gives it back."""
        rows = {
            kernels: [{**asdict(p), "dtype": str(p.dtype).removeprefix("torch."), "seconds": s} for p, s in measured]
            for kernels, measured in self.products.items()
        }
        return {
            "version": VERSION,
            "machine": self.machine,
            "products": rows,
            "passes": self.passes,
            "strided": self.strided,
            "rooflines": self.rooflines if self._learned else {},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostModel:
        """Inverse of ``to_json``.

        Raises:
            GramianError: written by another version, or not a calibration at all.
        """
        if data.get("version") != VERSION:
            raise GramianError(
                f"calibration of version {data.get('version')!r}; expected {VERSION}: run gramian bench --calibrate"
            )
        products = {
            kernels: [
                (MatrixProduct(**{k: v for k, v in row.items() if k not in ("seconds", "dtype")},
                               dtype=getattr(torch, row["dtype"])), float(row["seconds"]))
                for row in rows
            ]
            for kernels, rows in data["products"].items()
        }  # fmt: skip
        passes = {kind: [(float(b), float(r), float(s)) for b, r, s in rows] for kind, rows in data["passes"].items()}
        return cls(dict(data["machine"]), products, passes, float(data["strided"]), dict(data["rooflines"]))


def kind_of(step: Pass) -> str:
    """Which measured rate a pass goes by."""
    if step.name == "view":
        return "view"
    if step.name.startswith("sparse_"):
        return "entrywise"
    if step.name.startswith(("_fft", "fft")):
        return "fourier"
    if step.name.startswith(INDEXED):
        return "index"
    return "copy"


def _along(curve: Sequence[tuple[float, float]], x: float) -> float:
    """Seconds at x: linear between measured points in the logarithms, at the last rate beyond the largest."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            return float(y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0)))
    last, seconds = curve[-1]
    return seconds * x / last
