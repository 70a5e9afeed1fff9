"""Starts for training from scratch: the spectral rule, unit output variance, the identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.nn.structured_linear import StructuredLinear, as_linear
from gramian.ops import Operator, Scaled, structure
from gramian.ops.operator import check_size

Layer = nn.Linear | StructuredLinear

_SIZES: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""What ``structured`` was asked for, by layer."""


def structured(
    in_features: int,
    out_features: int,
    kind: str,
    *,
    bias: bool = True,
    generator: torch.Generator | None = None,
    **size: Any,
) -> Layer:
    """A new layer of a structure, started by the spectral rule: every core by its own fan-in and fan-out, then all of
    them scaled alike so that the matrix has spectral norm ``sqrt(out / in)`` (Yang, Simon, Bernstein 2023, condition 1).

    Args:
        in_features: as ``nn.Linear``.
        out_features: as ``nn.Linear``.
        kind: a registered structure; "dense" gives an ``nn.Linear``.
        bias: whether there is one; it starts at zero.
        generator: of the random numbers.
        size: what the structure's ``sizes`` lists.
    """
    check_size(structure(kind), size, (out_features, in_features))
    op = structure(kind).init((out_features, in_features), generator=generator, **size)
    layer = as_linear(op, torch.zeros(out_features) if bias else None)
    _SIZES[layer] = size
    spectral_(layer)
    return layer


@torch.no_grad()
def spectral_norm(op: Operator, *, iterations: int = 30, seed: int = 0) -> float:
    """Largest singular value, by power iteration on products with the operator and its transpose; never dense."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, op.shape[1], generator=generator).to(op.device, torch.float32)
    op = op.to(dtype=torch.float32)
    transposed, norm = op.T, 0.0
    for _ in range(iterations):
        y = op.apply(x / x.norm().clamp_min(1e-30))
        norm = float(y.norm())
        if norm == 0:
            return 0.0
        x = transposed.apply(y)
    return norm


def spectral_(layer: Layer, target: float | None = None) -> Layer:
    """Scale the trainable matrix factors alike, so that the matrix has spectral norm `target` (default sqrt(out / in))."""
    op = _operator(layer)
    out, in_ = op.shape
    norm = spectral_norm(op)
    if norm > 0:
        _scale(layer, (target or (out / in_) ** 0.5) / norm)
    return layer


@torch.no_grad()
def unit_variance_(
    model: nn.Module, run: Callable[[], object], *, tolerance: float = 0.1, attempts: int = 10
) -> dict[str, float]:
    """Layer-sequential unit variance (Mishkin & Matas 2016, "All you need is a good init", algorithm 1) for any structure.

    Goes through the linear layers in the order in which they run and scales each until the variance of its outputs over
    the batch is within `tolerance` of one. The paper's orthonormal start is the caller's choice.

    Args:
        model: holds ``nn.Linear`` and ``StructuredLinear`` layers.
        run: runs the model on one batch.
        tolerance: largest distance of the variance from one.
        attempts: passes a layer.

    Returns:
        The variance reached, by layer name, in the order of running.
    """
    names = {module: name for name, module in linear_layers(model)}
    order: list[Layer] = []
    variance: dict[str, float] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Linear | StructuredLinear):
            if module not in order:
                order.append(module)
            variance[names[module]] = float(output.float().var())

    handles = [module.register_forward_hook(note) for module in names]
    try:
        run()
        for layer in list(order):
            for _ in range(attempts):
                found = variance[names[layer]]
                if abs(found - 1) <= tolerance or found <= 0:
                    break
                _scale(layer, found**-0.5)
                run()
    finally:
        for handle in handles:
            handle.remove()
    return {names[layer]: variance[names[layer]] for layer in order}


@torch.no_grad()
def identity_(layer: Layer, scale: float = 1.0) -> Layer:
    """The (padded) identity, ones at (i, i mod in), times `scale` (IDInit: Pan et al. 2025): what comes in goes out.

    Args:
        layer: dense, or of a structure that holds the padded identity exactly.
        scale: 1, or a small number for the last layer of a residual branch.

    Raises:
        GramianError: the structure at this size cannot hold the padded identity.
    """
    op = _operator(layer)
    out, in_ = op.shape
    eye = torch.zeros(out, in_, dtype=torch.float64)
    eye[torch.arange(out), torch.arange(out) % in_] = 1.0
    if isinstance(layer, nn.Linear):
        layer.weight.copy_(scale * eye)
        return layer
    made = [found.to(dtype=layer.weight.dtype) for found in _identities(op, eye, _SIZES.get(layer) or _size(op))]
    errors = [float((found.dense() - eye).norm() / eye.norm()) for found in made]
    error = min(e if e == e else math.inf for e in errors)
    if error > 1e-5:
        raise GramianError(
            f"identity_: a {op.kind} of {out} x {in_} with {op.numel} numbers misses the identity by {error:.1e}; expected "
            "a structure that holds it, or use the layer in a residual branch with a small scale"
        )
    for name, value in made[errors.index(error)].factors().items():
        layer._factor(name).copy_(value)
    _scale(layer, scale)
    return layer


def _identities(op: Operator, eye: Tensor, size: dict[str, Any]) -> Iterator[Operator]:
    """Approximations of the identity by the very structure of `op`: from its own numbers, and from a fit of its size."""
    from gramian.fitting.multilinear import polish

    own = op.to(dtype=torch.float64)
    yield polish(own, eye, sweeps=30)
    if type(op).fittable:
        fitted = type(op).fit(eye, **size)
        if isinstance(fitted, Scaled) and abs(float(fitted.factor) - 1) < 1e-9:  # as of an orthogonal structure
            fitted = fitted.base
        if fitted.config() == own.config():
            yield fitted
            yield polish(fitted, eye, sweeps=30)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Every ``nn.Linear`` and ``StructuredLinear`` by name; the factors inside the latter are not layers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            inside += (f"{name}." if name else "",)
            yield name, module
        elif isinstance(module, nn.Linear) and not any(name.startswith(prefix) for prefix in inside):
            yield name, module


def _operator(layer: Layer) -> Operator:
    if isinstance(layer, StructuredLinear):
        return layer.op
    from gramian.ops import Dense

    return Dense(layer.weight)


def _size(op: Operator) -> dict[str, Any]:
    """The sizes that `op` was made with: those that it has as attributes, else from its own list."""
    wanted = {name: tuple(value.shape) for name, value in op.factors().items()}
    known = {name: getattr(op, name, None) for name in type(op).size_names() - op.factors().keys()}
    known = {name: value for name, value in known.items() if value is not None}
    listed = (
        size for keep in (op.numel / (op.shape[0] * op.shape[1]), 2.0) for size in type(op).sizes(op.shape, keep + 1e-9)
    )
    for size in (known, *listed):
        made = type(op).init(op.shape, **size)
        if {name: tuple(value.shape) for name, value in made.factors().items()} == wanted:
            return size
    return {}


@torch.no_grad()
def _scale(layer: Layer, factor: float) -> None:
    """Multiply the matrix by `factor`: each of its terms, evenly over the factors that are multiplied in it."""
    if isinstance(layer, nn.Linear):
        layer.weight.mul_(factor)
        return
    op = layer.op
    probe = torch.randn(8, op.shape[1], generator=torch.Generator().manual_seed(0)).to(op.device, op.dtype)
    for names in _terms(op, probe):
        rest = {name: torch.zeros_like(value) for name, value in op.trainable().items() if name not in names}
        matrices = [name for name in names if op.factors()[name].dim() >= 2] or names
        # The term's degree in its factors: doubling all of them multiplies it by 2 ** degree.
        base = op.replace(**rest).apply(probe).norm()
        doubled = op.replace(**rest, **{name: 2 * op.factors()[name] for name in matrices}).apply(probe).norm()
        degree = round(float((doubled / base).log2())) if float(base) > 0 else len(matrices)
        for name in matrices:
            layer._factor(name).mul_(factor ** (1 / max(degree, 1)))


def _terms(op: Operator, probe: Tensor) -> list[list[str]]:
    """The names of trainable factors, those together that are multiplied with each other: without one of a term, the others
    change nothing.
    """
    zeros = {name: torch.zeros_like(value) for name, value in op.trainable().items()}
    terms: list[list[str]] = []
    for name in zeros:
        for term in terms:
            first = op.replace(**{term[0]: zeros[term[0]]})
            if torch.equal(first.apply(probe), first.replace(**{name: zeros[name]}).apply(probe)):
                term.append(name)
                break
        else:
            terms.append([name])
    return terms
