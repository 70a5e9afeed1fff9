"""The contract every structured matrix fulfils."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gramian.errors import GramianError, nearest

Size = dict[str, Any]
"""Keyword arguments that fix how large a member of a structure is, e.g. ``{"rank": 16}``; JSON-able."""


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A matrix of shape (out, in), stored by its structure.

    A subclass is a frozen dataclass. Its fields are tensors (the *factors*: what is stored, trained and saved), other
    operators, tuples of operators, or static JSON-able values (sizes and layout flags). It defines ``kind``,
    ``shape``, ``apply`` and ``transpose``; a structure that dense matrices can be projected on also defines ``fit``,
    ``init`` and ``sizes``. Everything else here is derived.

    Operators are values: nothing changes one in place.
    """

    kind: ClassVar[str]
    """Name in the registry and in checkpoints."""
    constants: ClassVar[frozenset[str]] = frozenset()
    """Names of floating-point factors that define the structure and are never trained (random signs, say)."""
    matrices: ClassVar[frozenset[str]] = frozenset()
    """Names of factors that are plain matrices acting on activations, so that a layer can hold each as an nn.Linear."""
    fittable: ClassVar[bool] = False
    """Whether a dense matrix can be projected on this structure (``fit``, ``init`` and ``sizes`` exist)."""
    own_sweeps: ClassVar[int] = 0
    """Where ``fit`` itself alternates over all factors under both Grams: for each sweep asked of ``gramian.fit``, so many of
    its own (argument ``sweeps``), and no other polishing."""

    # What a structure defines ------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """``x A^T``, as ``torch.nn.functional.linear(x, A)``: x (..., in) -> (..., out)."""
        raise NotImplementedError

    def apply_columns(self, x: Tensor) -> Tensor:
        """``A x``, feature-major: x (in, B) -> (out, B). Override where that order is natural and faster."""
        return self.apply(x.mT).mT

    def transpose(self) -> Operator:
        """The transpose, of the same structure where it is closed under transposition."""
        raise NotImplementedError

    def flops(self, batch: int = 1) -> int:
        """Floating-point operations of ``apply`` on `batch` rows; a multiply-add counts two."""
        raise NotImplementedError

    @classmethod
    def fit(
        cls, weight: Tensor, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None, **size: Any
    ) -> Operator:
        """Best approximation found of a dense `weight` (out, in) by this structure, in the Gram-weighted norm
        ``|| gram_out^{1/2} (weight - A) gram_in^{1/2} ||_F``.

        Args:
            weight: (out, in).
            gram_in: (in, in), its diagonal (in,), or None for the identity.
            gram_out: (out, out), its diagonal (out,), or None for the identity.
            size: what ``sizes`` lists.
        """
        raise GramianError(f"structure {cls.kind!r} has no projection of a dense matrix")

    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Operator:
        """Random start whose spectral norm is near sqrt(out / in): the spectral condition for feature learning
        (Yang, Simon, Bernstein 2023).
        """
        raise GramianError(f"structure {cls.kind!r} has no random initialisation")

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """The configurations that store at most ``keep * out * in`` numbers, largest first within a family."""
        raise GramianError(f"structure {cls.kind!r} has no list of sizes")

    @classmethod
    def size_names(cls) -> set[str]:
        """The keyword arguments by which ``fit`` and ``init`` are told a size, or how to look for it."""
        both = (inspect.signature(method).parameters.values() for method in (cls.fit, cls.init))
        names = {p.name for parameters in both for p in parameters if p.kind is p.KEYWORD_ONLY}
        return names - {"gram_in", "gram_out", "generator"}

    # What is derived ---------------------------------------------------------------------------------------------

    def _walk(self, prefix: str = "") -> Iterator[tuple[str, Tensor, Operator, str]]:
        """Every factor as (full name, tensor, the operator that owns it, its name there)."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield prefix + field.name, value, self, field.name
            elif isinstance(value, Operator):
                yield from value._walk(f"{prefix}{field.name}.")
            elif isinstance(value, tuple) and value and isinstance(value[0], Operator):
                for index, part in enumerate(value):
                    yield from part._walk(f"{prefix}{field.name}.{index}.")

    def factors(self) -> dict[str, Tensor]:
        """What is stored, by stable name and in stable order; a nested operator's names are prefixed by its field."""
        return {name: tensor for name, tensor, _, _ in self._walk()}

    def trainable(self) -> dict[str, Tensor]:
        """The factors that gradient descent may change: floating point and not a constant of the structure."""
        return {
            name: tensor
            for name, tensor, owner, local in self._walk()
            if tensor.is_floating_point() and local not in owner.constants
        }

    def linear_factors(self) -> dict[str, Tensor]:
        """The factors that act as one matrix each, (..., in) -> (..., out): what an adapter library may wrap."""
        return {
            name: tensor
            for name, tensor, owner, local in self._walk()
            if local in owner.matrices and tensor.dim() - 2 == sum(length == 1 for length in tensor.shape[:-2])
        }

    def replace(self, **factors: Tensor) -> Self:
        """The same structure with other factors; names as in ``factors()`` (nested names through ``**{"a.b": t}``).

        Raises:
            GramianError: a name is not a factor, or the new tensors' shapes do not fit together.
        """
        changes: dict[str, Any] = {}
        remaining = dict(factors)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name in remaining:
                changes[field.name] = remaining.pop(field.name)
            elif isinstance(value, Operator):
                inner = _take(remaining, field.name)
                if inner:
                    changes[field.name] = value.replace(**inner)
            elif isinstance(value, tuple) and value and isinstance(value[0], Operator):
                parts = [_take(remaining, f"{field.name}.{index}") for index in range(len(value))]
                if any(parts):
                    changes[field.name] = tuple(
                        part.replace(**inner) if inner else part for part, inner in zip(value, parts, strict=True)
                    )
        if remaining:
            name = next(iter(remaining))
            raise GramianError(f"{self.kind} has no factor {name!r}{nearest(name, self.factors())}")
        return dataclasses.replace(self, **changes)

    @property
    def T(self) -> Operator:
        """The transpose."""
        return self.transpose()

    def dense(self) -> Tensor:
        """The matrix itself, (out, in)."""
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return self.apply(eye).mT

    def runtime(self) -> Operator:
        """An operator equal to this one, in the form that products run on: for a form that is only stored (codes, a
        skeleton) the one it stands for, elsewhere the operator itself. Whether the dense matrix is faster still is for
        ``gramian.execution`` to say.
        """
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``apply`` computes in: that of the first floating-point factor (of its owner, when nested); complex
        where any factor is.
        """
        first: torch.dtype | None = None
        for _, tensor, owner, _ in self._walk():
            if not tensor.is_floating_point() and not tensor.is_complex():
                continue
            own = tensor.dtype if owner is self else owner.dtype
            if own.is_complex:
                return own if first is None else torch.promote_types(first, own)
            first = first or own
        return first or torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        for tensor in self.factors().values():
            return tensor.device
        return torch.device("cpu")

    @property
    def numel(self) -> int:
        """How many numbers are stored, indices included."""
        return sum(tensor.numel() for tensor in self.factors().values())

    @property
    def nbytes(self) -> int:
        """How many bytes the factors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.factors().values())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move every factor; `dtype` applies to floating-point factors only."""
        moved = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in self.factors().items()
        }
        return self.replace(**moved) if moved else self

    def config(self) -> dict[str, Any]:
        """Everything but the numbers, as JSON-able data: `from_config` with the factors gives the operator back."""
        out: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                # "float": the model's own dtype. A factor stored in another one (half-precision scales) keeps it.
                same = value.is_floating_point() and value.dtype == self.dtype
                dtype = "float" if same else str(value.dtype).removeprefix("torch.")
                out.setdefault("factors", {})[field.name] = [dtype, *value.shape]
            elif isinstance(value, Operator):
                out[field.name] = value.config()
            elif isinstance(value, tuple) and value and isinstance(value[0], Operator):
                out[field.name] = [part.config() for part in value]
            else:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    def __matmul__(self, other: Any) -> Any:
        from gramian.ops.algebra import compose

        if isinstance(other, Operator):
            return compose(self, other)
        if isinstance(other, Tensor):
            if other.dim() == 1:
                return self.apply(other)
            return self.apply_columns(other) if other.dim() == 2 else self.apply(other.mT).mT
        return NotImplemented

    def __add__(self, other: Operator) -> Operator:
        from gramian.ops.algebra import add

        return add(self, other) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Operator) -> Operator:
        return self + (-1.0) * other if isinstance(other, Operator) else NotImplemented

    def __neg__(self) -> Operator:
        return (-1.0) * self

    def __mul__(self, factor: complex | Tensor) -> Operator:
        from gramian.ops.algebra import scale

        return scale(self, factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        out, in_ = self.shape
        return f"{type(self).__name__}({out}x{in_}, numel={self.numel}, {str(self.dtype).removeprefix('torch.')})"

    def _check(self, condition: bool, expected: str) -> None:
        """Raise a GramianError that says which factors were found and what was expected."""
        if not condition:
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.factors().items())
            raise GramianError(f"{self.kind}: found {found or 'no factors'}; expected {expected}")


def _take(factors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in factors if name.startswith(prefix + ".")]
    return {name[len(prefix) + 1 :]: factors.pop(name) for name in names}


_REGISTRY: dict[str, type[Operator]] = {}


def register(cls: type[Operator]) -> type[Operator]:
    """Class decorator: make a structure known to checkpoints, the planner and the contract tests.

    Raises:
        GramianError: another class has the same ``kind`` (at import time, so it cannot pass unseen).
    """
    known = _REGISTRY.get(cls.kind)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise GramianError(f"structure {cls.kind!r} is registered twice: {known.__qualname__} and {cls.__qualname__}")
    _REGISTRY[cls.kind] = cls
    return cls


def structures() -> dict[str, type[Operator]]:
    """Every registered structure by kind."""
    return dict(_REGISTRY)


def structure(kind: str) -> type[Operator]:
    """The structure of that name.

    Raises:
        GramianError: unknown name; the message lists the nearest ones.
    """
    if kind not in _REGISTRY:
        raise GramianError(
            f"unknown structure {kind!r}{nearest(kind, _REGISTRY)}; known: {', '.join(sorted(_REGISTRY))}. "
            "A checkpoint that names it may need a newer gramian"
        )
    return _REGISTRY[kind]


def check_size(cls: type[Operator], size: Size, shape: tuple[int, int]) -> None:
    """Raise a GramianError at a name in `size` that the structure would ignore."""
    for name in size:
        if name not in cls.size_names() and not any(name in known for known in cls.sizes(shape, 2.0)):
            known = sorted(cls.size_names())
            raise GramianError(
                f"{cls.kind}: unknown size {name!r}{nearest(name, known)}; known: {', '.join(known) or 'none'}"
            )


def from_config(
    config: Mapping[str, Any],
    factors: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "meta",
) -> Operator:
    """Rebuild an operator from ``Operator.config()``.

    Args:
        config: as written by ``config()``.
        factors: the tensors by name; None gives uninitialised ones of the recorded shapes on `device`.
        dtype: of uninitialised floating-point factors.
        device: of uninitialised factors.

    Raises:
        GramianError: unknown kind, missing or surplus tensors, shapes that differ from the recorded ones.
    """
    return _build(config, None if factors is None else dict(factors), dtype, device, "")


def _build(
    config: Mapping[str, Any],
    factors: dict[str, Tensor] | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    prefix: str,
) -> Operator:
    cls = structure(str(config.get("kind")))
    recorded: Mapping[str, list[Any]] = config.get("factors", {})
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if field.name in recorded:
            kind, *shape = recorded[field.name]
            if factors is None:
                wanted = dtype if kind == "float" else getattr(torch, str(kind), None)
                if kind != "float" and not isinstance(wanted, torch.dtype):
                    raise GramianError(f"{cls.kind}: factor {name!r} has dtype {kind!r}; expected a dtype of torch")
                fields[field.name] = torch.empty(shape, dtype=wanted, device=device)
                continue
            if name not in factors:
                raise GramianError(f"{cls.kind}: factor {name!r} is missing; found {', '.join(factors) or 'none'}")
            tensor = factors.pop(name)
            if list(tensor.shape) != shape:
                raise GramianError(f"{cls.kind}: factor {name!r} is {tuple(tensor.shape)}; expected {tuple(shape)}")
            fields[field.name] = tensor
            continue
        if field.name not in config:
            raise GramianError(f"{cls.kind}: the description lacks {field.name!r}; found {', '.join(config)}")
        value = config[field.name]
        if isinstance(value, Mapping) and "kind" in value:
            value = _build(value, factors, dtype, device, name + ".")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = tuple(_build(part, factors, dtype, device, f"{name}.{i}.") for i, part in enumerate(value))
        elif isinstance(value, list):
            value = tuple(value)
        fields[field.name] = value
    if factors and not prefix:
        raise GramianError(f"{cls.kind}: surplus factors {', '.join(factors)}")
    built = cls(**fields)
    said = tuple(config.get("shape", ()))
    if built.shape != said:
        raise GramianError(f"{cls.kind}: factors give shape {built.shape}; the description says {said}")
    return built
