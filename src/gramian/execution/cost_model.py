"""Predicted run time: matrix products by a Gaussian process over their shapes, memory traffic by measured rates.

A roofline alone is off by a third on small products: kernels have ragged edges, start-up costs and preferred layouts. Here
it is only the mean of a Gaussian process over the shapes, which learns from products measured on the user's own machine.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.execution.work import MatrixProduct, Pass, Step
from gramian.linalg import eigh

VERSION = 1


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
    """Coordinates in which close shapes run at similar efficiency: logarithms of the sizes, how ragged the last tile of
    sixteen is, and the layouts.
    """
    sizes = (product.count, product.m, product.n, product.k)
    ragged = [math.log2(-(-v // 16) * 16 / v) for v in sizes[1:]]
    return [*(math.log2(v) for v in sizes), *ragged, float(product.left_transposed), float(product.right_transposed)]


LEARNED_FROM = 350
"""Measurements that the length scales are learned from, which takes their cube; the prediction rests on all."""
GROUPS = (0, 1, 2, 3, 4, 4, 4, 5, 5)
"""Which length scale each feature has."""


class Residuals:
    """A Gaussian process (Matern 3/2) for ``log(measured / roofline)``.

    Args:
        x: (n, f) features.
        y: (n,) residuals, of shapes in no order.
        theta: logarithms of the six length scales, the signal's and the noise's deviation; learned when None, by
            marginal likelihood.
    """

    def __init__(self, x: Tensor, y: Tensor, theta: Tensor | None = None) -> None:
        self.x, self.y = x, y
        self.theta = self._learn() if theta is None else theta
        noise = float(self.theta[-1].exp()) ** 2
        values, vectors = eigh(self._kernel(self.x, self.x, self.theta))
        self.weights = vectors @ ((vectors.mT @ y) / (values.clamp_min(0) + noise))

    def __call__(self, x: Tensor) -> Tensor:
        """Mean residual (m,) at x (m, f)."""
        return self._kernel(x, self.x, self.theta) @ self.weights

    def _kernel(self, a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
        scales = theta[: max(GROUPS) + 1].exp()[list(GROUPS)]
        distance = ((a[:, None] - b[None]) / scales).square().sum(-1).clamp_min(1e-12).sqrt() * math.sqrt(3)
        covariance: Tensor = torch.exp(2 * theta[-2] - distance) * (1 + distance)
        return covariance

    def _learn(self) -> Tensor:
        theta = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -2.5], dtype=torch.float64).requires_grad_()
        optimiser = torch.optim.LBFGS([theta], max_iter=60, line_search_fn="strong_wolfe")
        x, y = self.x[:LEARNED_FROM], self.y[:LEARNED_FROM]
        eye = torch.eye(len(x), dtype=torch.float64)

        def loss() -> Tensor:
            optimiser.zero_grad()
            bounded = theta.clamp(-4.0, 4.0)
            covariance = self._kernel(x, x, bounded) + (bounded[-1].exp().square() + 1e-8) * eye
            factor = torch.linalg.cholesky(covariance)
            white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
            value: Tensor = (
                0.5 * white.square().sum() + factor.diagonal().log().sum() + 0.01 * (theta - 1).square().sum()
            )
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[no-untyped-call]
        return theta.detach().clamp(-4.0, 4.0)


@dataclass
class CostModel:
    """Predicts seconds of traced steps on one machine.

    Attributes:
        machine: what it was measured on (processor, threads, torch); see ``calibration.machine``.
        products: measured matrix products and their seconds, by dtype name.
        passes: (bytes, seconds) of passes over memory by kind: smooth, scattered, index, fourier, view.
        strided: how many times slower a product with a strided operand is.
        learned: by dtype the roofline's three numbers and the Gaussian process's eight; found when first needed.
        settled: what was measured since then instead of predicted, for this process alone: the forms that ``Prepared`` found
            fastest, by kind and shapes of operator, dtype, batch and threads.
    """

    machine: dict[str, Any]
    products: dict[str, list[tuple[MatrixProduct, float]]]
    passes: dict[str, list[tuple[float, float]]]
    strided: float = 1.0
    learned: dict[str, list[float]] = field(default_factory=dict)
    settled: dict[tuple[Hashable, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _learned(self) -> dict[str, tuple[Roofline, Residuals]]:
        out = {}
        for dtype, rows in self.products.items():
            seconds = torch.tensor([s for _, s in rows], dtype=torch.float64)
            shapes = [p for p, _ in rows]
            known = self.learned.get(dtype)
            roofline = Roofline.learn(shapes, seconds) if known is None else Roofline(*known[:3])
            x = torch.tensor([features(p) for p in shapes], dtype=torch.float64)
            y = (seconds / torch.tensor([roofline.seconds(p) for p in shapes], dtype=torch.float64)).log()
            theta = None if known is None else torch.tensor(known[3:], dtype=torch.float64)
            residuals = Residuals(x, y, theta)
            self.learned[dtype] = [roofline.start, roofline.rate, roofline.bandwidth, *residuals.theta.tolist()]
            out[dtype] = (roofline, residuals)
        return out

    def learn(self) -> None:
        """Learn from the measurements now, not when first asked."""
        assert self._learned

    def roofline(self, dtype: torch.dtype) -> Roofline:
        """What the predictions of that dtype's products start from."""
        return self._learned[str(dtype).removeprefix("torch.")][0]

    def seconds(self, steps: Iterable[Step]) -> float:
        """Predicted seconds of the steps, one after the other."""
        steps = list(steps)
        total = sum(step.count * self._pass(step) for step in steps if isinstance(step, Pass))
        by_dtype: dict[str, list[MatrixProduct]] = {}
        for step in steps:
            if isinstance(step, MatrixProduct):
                by_dtype.setdefault(str(step.dtype).removeprefix("torch."), []).append(step)
        for dtype, products in by_dtype.items():
            roofline, residuals = self._learned[dtype if dtype in self._learned else "float32"]
            factors = residuals(torch.tensor([features(p) for p in products], dtype=torch.float64)).exp().tolist()
            for product, factor in zip(products, factors, strict=True):
                total += roofline.seconds(product) * factor * (self.strided if product.strided else 1.0)
        return total

    def _pass(self, step: Pass) -> float:
        kind = kind_of(step)
        rows = self.passes[kind]
        if step.nbytes <= rows[0][0]:
            return rows[0][1]
        # Linear between measured points in the logarithms; at the last rate beyond the largest.
        for (b0, s0), (b1, s1) in pairwise(rows):
            if step.nbytes <= b1:
                share = math.log(step.nbytes / b0) / math.log(b1 / b0)
                return math.exp(math.log(s0) + share * math.log(s1 / s0))
        last, seconds = rows[-1]
        return seconds * step.nbytes / last

    def to_json(self) -> dict[str, Any]:
        """JSON-able; ``from_json`` gives it back."""
        rows = {
            dtype: [{**asdict(p), "dtype": dtype, "seconds": s} for p, s in measured]
            for dtype, measured in self.products.items()
        }
        return {
            "version": VERSION,
            "machine": self.machine,
            "products": rows,
            "passes": self.passes,
            "strided": self.strided,
            "learned": self.learned if self._learned else {},
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
            dtype: [
                (MatrixProduct(**{k: v for k, v in row.items() if k not in ("seconds", "dtype")},
                               dtype=getattr(torch, dtype)), float(row["seconds"]))
                for row in rows
            ]
            for dtype, rows in data["products"].items()
        }  # fmt: skip
        passes = {kind: [(float(b), float(s)) for b, s in rows] for kind, rows in data["passes"].items()}
        return cls(dict(data["machine"]), products, passes, float(data["strided"]), dict(data["learned"]))


def kind_of(step: Pass) -> str:
    """Which measured rate a pass goes by."""
    if step.name == "view":
        return "view"
    if step.name.startswith(("_fft", "fft")):
        return "fourier"
    if step.name.startswith(("index", "gather", "scatter", "embedding", "take")):
        return "index"
    return "scattered" if step.scattered else "smooth"
