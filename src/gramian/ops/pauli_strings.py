"""Pauli strings and their weighted sums: tensor products of I, X, Y and Z, the terms of a qubit Hamiltonian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops.algebra import add
from gramian.ops.combinators import Product
from gramian.ops.diagonal import Diagonal, Permutation
from gramian.ops.operator import Operator, register


@register
@dataclass(frozen=True, eq=False, repr=False)
class PauliSum(Operator):
    """``sum_t weights[t] P_t`` of Pauli strings P_t on n qubits, (2^n, 2^n); the first letter acts on the most significant
    bit, in the order of ``torch.kron``.

    A string has one nonzero entry in each row: row r has it in column ``r xor m``, m the bits at which the string has X or
    Y (``pauli_entries``; PauliComposer, 2023). Strings of one m share their permutation, so a product costs a
    multiplication and an addition for each distinct m and each entry.

    Args:
        weights: (t,), trainable where real. Complex weights give a complex operator; real ones need strings with an even
            number of Y, whose matrices are real.
        strings: t strings of one length n >= 1.
    """

    kind: ClassVar[str] = "pauli_sum"
    weights: Tensor
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(string) for string in self.strings}
        wrong = "".join(sorted({letter for string in self.strings for letter in string} - set("IXYZ")))
        if wrong or len(lengths) != 1 or 0 in lengths:
            found = f"letters {wrong}" if wrong else f"{len(self.strings)} strings of lengths {sorted(lengths)}"
            raise GramianError(f"pauli_sum: found {found}; expected letters of IXYZ and one length of at least 1")
        self._check(self.weights.shape == (len(self.strings),), f"weights ({len(self.strings)},)")
        if not self.weights.is_complex():
            odd = [string for string in self.strings if string.count("Y") % 2]
            if odd:
                raise GramianError(
                    f"pauli_sum: {odd[0]} has imaginary entries (an odd number of Y); give complex weights"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return (2 ** len(self.strings[0]), 2 ** len(self.strings[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    def _rows(self) -> list[tuple[Tensor, Tensor]]:
        """For each distinct m: the column of the entry in each row (N,), and the entry (N,)."""
        groups: dict[int, list[int]] = {}
        for position, string in enumerate(self.strings):
            groups.setdefault(_mask(string, "XY"), []).append(position)
        rows = torch.arange(self.shape[0], device=self.weights.device)
        found = []
        for mask, members in groups.items():
            values = torch.stack([_values(self.strings[t], self.weights) for t in members])
            found.append((rows ^ mask, self.weights[members] @ values))
        return found

    def apply(self, x: Tensor) -> Tensor:
        self._check(x.shape[-1] == self.shape[1], f"x (..., {self.shape[1]})")
        (columns, values), *others = self._rows()
        y = x.index_select(-1, columns) * values
        for columns, values in others:
            y = y + x.index_select(-1, columns) * values
        return y

    def transpose(self) -> PauliSum:
        """Y is antisymmetric, the others symmetric: strings with an odd number of Y change sign."""
        signs = [-1.0 if string.count("Y") % 2 else 1.0 for string in self.strings]
        return PauliSum(self.weights * torch.tensor(signs).to(self.weights), self.strings)

    def dense(self) -> Tensor:
        full = self.weights.new_zeros(self.shape)
        for columns, values in self._rows():
            full.scatter_(1, columns[:, None], values[:, None])
        return full

    def runtime(self) -> Operator:
        """Permutations scaled by diagonals, made once."""
        if self.weights.is_complex():
            return self
        return add(*(Product((Diagonal(values), Permutation(columns))) for columns, values in self._rows()))

    def flops(self, batch: int = 1) -> int:
        masks = len({_mask(string, "XY") for string in self.strings})
        return batch * self.shape[0] * (2 * masks - 1)


def pauli(strings: str | Mapping[str, complex], dtype: torch.dtype | None = None) -> PauliSum:
    """A Pauli string, or a weighted sum of them, as an operator.

    Args:
        strings: "XIZY", or {"ZZI": -1.0, "IZZ": -1.0, "XII": 0.5, ...}.
        dtype: by default torch's default dtype where everything is real, else the complex one of that precision.

    Raises:
        GramianError: a letter other than I, X, Y, Z, strings of different lengths, or a real dtype for what is complex.
    """
    weights = {strings: 1.0} if isinstance(strings, str) else dict(strings)
    if dtype is None:
        real = all(complex(weight).imag == 0 and string.count("Y") % 2 == 0 for string, weight in weights.items())
        dtype = torch.get_default_dtype()
        dtype = dtype if real else torch.complex128 if dtype == torch.float64 else torch.complex64
    if not dtype.is_complex and any(complex(weight).imag for weight in weights.values()):
        raise GramianError(f"pauli: complex weights in {dtype}; expected a complex dtype")
    numbers = torch.tensor([complex(weight) for weight in weights.values()], dtype=torch.complex128)
    return PauliSum((numbers if dtype.is_complex else numbers.real).to(dtype), tuple(weights))


def pauli_entries(string: str, dtype: torch.dtype = torch.complex128) -> tuple[Tensor, Tensor]:
    """The nonzero entries of a Pauli string, one in each row (PauliComposer, 2023): columns (2^n,) and values (2^n,).

    Row r has its entry in column ``r xor m``, m the mask of X and Y. Its value is ``(-i)^y`` with y the number of Y, and
    one sign for each Z or Y at which r has a 1: built by doubling, a bit at a time, in O(2^n).
    """
    return torch.arange(2 ** len(string)) ^ _mask(string, "XY"), _values(string, torch.empty((), dtype=dtype))


def _mask(string: str, letters: str) -> int:
    return sum(1 << place for place, letter in enumerate(reversed(string)) if letter in letters)


def _values(string: str, like: Tensor) -> Tensor:
    """The entry of each row, (2^n,); real dtypes need an even number of Y."""
    y = string.count("Y")
    phase = (-1j) ** y
    values = torch.full((1,), phase if like.is_complex() else phase.real, dtype=like.dtype, device=like.device)
    for letter in reversed(string):
        values = torch.cat([values, -values if letter in "ZY" else values])
    return values
