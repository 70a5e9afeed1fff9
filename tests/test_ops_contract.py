"""The shipped contract over every registered structure, and proof that it catches what it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gramian import ops, testing
from gramian.ops import (
    Blast,
    BlockDiag,
    BlockDiagonal,
    BlockLowRank,
    BlockSparse,
    Cosine,
    Cross,
    Dense,
    Diagonal,
    Dictionary,
    Fourier,
    Hadamard,
    Householder,
    HypercomplexBottleneck,
    Identity,
    Kron,
    KroneckerSum,
    LowDisplacement,
    LowRankQuantized,
    LowRankSparse,
    MaskedLowRank,
    Operator,
    Orthogonal,
    Permutation,
    PixelatedButterfly,
    Product,
    Quantized,
    Scaled,
    Selection,
    SemiStructured,
    Skeleton,
    Sparse,
    Sum,
    SymmetricLowRank,
    Toeplitz,
    Transpose,
    butterfly,
    pauli,
    random_mixer,
    register,
    structures,
)
from gramian.ops import operator as operator_module
from gramian.testing import SHAPES, operator_checks, structure_checks


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _low_rank(out: int, in_: int, rank: int = 2) -> BlockLowRank:
    return BlockLowRank.init((out, in_), rank=rank, generator=_seeded(out))


def _blocks(out: int, in_: int, strided_rows: bool, strided_columns: bool) -> BlockLowRank:
    size: dict[str, Any] = {
        "rank": 2,
        "blocks": (2, 4),
        "strided_rows": strided_rows,
        "strided_columns": strided_columns,
    }
    return BlockLowRank.init((out, in_), generator=_seeded(), **size)


def _permutation(n: int) -> Permutation:
    return Permutation(torch.randperm(n, generator=_seeded()).to(torch.int32))


def _quantized(out: int, in_: int, **size: Any) -> Quantized:
    return Quantized.init((out, in_), generator=_seeded(), **size)


def _dense(out: int, in_: int) -> Dense:
    return Dense.init((out, in_), generator=_seeded(out))


EXAMPLES: dict[str, Callable[[], Operator]] = {
    "dense": lambda: _dense(6, 9),
    "diagonal": lambda: Diagonal(torch.randn(7, generator=_seeded())),
    "identity": lambda: Identity(5),
    "permutation": lambda: _permutation(9),
    "selection": lambda: Selection(torch.tensor([4, 0, 6]), 8),
    "selection, scattering": lambda: Selection(torch.tensor([4, 0, 6], dtype=torch.int32), 8, scatter=True),
    "low rank": lambda: _low_rank(8, 5),
    "blocks": lambda: _blocks(8, 12, False, False),
    "blocks, strided rows": lambda: _blocks(8, 12, True, False),
    "blocks, strided columns": lambda: _blocks(8, 12, False, True),
    "blocks, strided": lambda: _blocks(8, 12, True, True),
    "blocks, padded": lambda: _blocks(7, 10, True, True),
    "block diagonal, equal blocks": lambda: BlockDiagonal.init((6, 9), blocks=3, generator=_seeded()),
    "block diagonal, strided and padded": lambda: BlockDiagonal.init(
        (7, 10), blocks=3, strided_rows=True, strided_columns=True, generator=_seeded()
    ),
    "skeleton": lambda: Skeleton.init((9, 7), rank=3, generator=_seeded()),
    "skeleton by columns": lambda: Skeleton.init((9, 7), rank=3, generator=_seeded()).T,
    "kronecker": lambda: KroneckerSum.init((6, 8), terms=2, generator=_seeded()),
    "kronecker, padded": lambda: KroneckerSum.init((7, 5), terms=2, generator=_seeded()),
    "blast": lambda: Blast.init((8, 12), rank=3, blocks=(2, 4), generator=_seeded()),
    "blast, padded": lambda: Blast.init((7, 11), rank=5, blocks=(4, 3), generator=_seeded()),
    "pixelated butterfly": lambda: PixelatedButterfly.init((8, 12), levels=1, rank=2, block=2, generator=_seeded()),
    "pixelated butterfly, padded": lambda: PixelatedButterfly.init(
        (7, 17), levels=2, rank=1, block=2, generator=_seeded()
    ),
    "butterfly": lambda: butterfly(torch.randn(3, 4, 2, 2, generator=_seeded())),
    "permuted kronecker": lambda: random_mixer((3, 2), (5, 4), generator=_seeded()),
    "block sparse": lambda: BlockSparse.init((8, 12), kept=2, block=(4, 3), generator=_seeded()),
    "block sparse, padded": lambda: BlockSparse.init((7, 11), kept=2, block=(4, 3), generator=_seeded()),
    "sparse": lambda: Sparse.init((7, 11), nonzeros=20, generator=_seeded()),
    "sparse by columns": lambda: Sparse.init((7, 11), nonzeros=20, generator=_seeded()).T,
    "sparse with empty rows": lambda: Sparse.from_dense(torch.tensor([[0.0, 0, 0], [1, 0, 2], [0, 0, 0]])),
    "sparse without entries": lambda: Sparse.from_dense(torch.zeros(5, 4)),
    "low rank and rounded": lambda: LowRankQuantized.init((7, 12), rank=2, bits=3, generator=_seeded()),
    "low rank and sparse": lambda: LowRankSparse.init((7, 11), rank=2, nonzeros=20, generator=_seeded()),
    "semi-structured": lambda: SemiStructured.init((5, 12), kept=2, group=4, generator=_seeded()),
    "semi-structured, padded": lambda: SemiStructured.init((5, 11), kept=3, group=8, generator=_seeded()),
    "dictionary": lambda: Dictionary.init((6, 9), atoms=4, nonzeros=2, generator=_seeded()),
    "dictionary, blocks and padding": lambda: Dictionary.init(
        (7, 9), atoms=3, nonzeros=2, blocks=3, generator=_seeded()
    ),
    "cross": lambda: Cross.init((6, 9), rank=3, generator=_seeded()),
    "quantized": lambda: _quantized(5, 24, bits=3, group=8),
    "quantized, no rotation": lambda: _quantized(5, 9, bits=5, group=4, grid="uniform"),
    "toeplitz": lambda: Toeplitz.init((6, 9), generator=_seeded()),
    "circulant": lambda: ops.Circulant.init((6, 9), generator=_seeded()),
    "low displacement": lambda: LowDisplacement.init((6, 9), rank=2, generator=_seeded()),
    "low displacement, skew on the left": lambda: LowDisplacement.init((8, 6), rank=2, generator=_seeded()),
    "hypercomplex bottleneck": lambda: HypercomplexBottleneck.random(
        12, 8, factors=4, rank=2, slow=1.0, generator=_seeded()
    ),
    "symmetric low rank, wide": lambda: SymmetricLowRank.random((6, 9), 3, generator=_seeded()),
    "symmetric low rank, square": lambda: SymmetricLowRank.random((7, 7), 3, generator=_seeded()),
    "masked low rank": lambda: MaskedLowRank.masked(
        torch.randn(7, 3, generator=_seeded()), torch.randn(3, 9, generator=_seeded()), generator=_seeded()
    ),
    "householder": lambda: Householder.init((7, 7), reflectors=3, generator=_seeded()),
    "orthogonal": lambda: Orthogonal.random(6, generator=_seeded()),
    "orthogonal, blocks, exponential": lambda: Orthogonal.random(6, block=3, method="exponential", generator=_seeded()),
    "orthogonal, truncated series": lambda: Orthogonal(
        0.1 * torch.randn(2, 6, generator=_seeded()), None, "neumann", 3
    ),
    "hadamard": lambda: Hadamard(12, transposed=True),
    "hadamard of three factors": lambda: Hadamard(192),
    "cosine": lambda: Cosine(9),
    "fourier": lambda: Fourier(8, transposed=True),
    "pauli": lambda: pauli("XYZY"),
    "pauli sum": lambda: pauli({"ZZI": -1.0, "IZZ": -1.0, "XII": 0.5, "YYI": 0.25}),
    "sum": lambda: Sum((_low_rank(6, 6, 1), Diagonal(torch.ones(6)), Identity(6))),
    "sum of rounded and low rank": lambda: Sum((_quantized(6, 8, bits=2), _low_rank(6, 8, 1))),
    "product": lambda: Product((_low_rank(6, 8), _permutation(8), Diagonal(torch.arange(1.0, 9.0)))),
    "product with a number-free end": lambda: Product((_low_rank(6, 8), _permutation(8))),
    "transpose": lambda: Transpose(_quantized(5, 8, bits=4)),
    "transpose of block sparse": lambda: BlockSparse.init((7, 11), kept=2, block=(4, 3), generator=_seeded()).T,
    "scaled": lambda: Scaled(torch.tensor(-1.5), _permutation(6)),
    "kron": lambda: Kron(_low_rank(3, 4, 1), _dense(2, 3)),
    "kron with a number-free side": lambda: Kron(Identity(3), _blocks(4, 8, True, False)),
    "block diagonal": lambda: BlockDiag((_dense(2, 5), Identity(3), _low_rank(4, 2, 1))),
    "nested": lambda: Sum(
        (Product((_dense(6, 3), Scaled(torch.tensor(0.5), _low_rank(3, 6, 1)))), _low_rank(6, 6, 1).T)
    ),
}

OURS = {kind: cls for kind, cls in structures().items() if cls.__module__.startswith("gramian.")}


def test_every_registered_structure_has_an_example() -> None:
    assert {make().kind for make in EXAMPLES.values()} == set(OURS)


@pytest.mark.parametrize("check", operator_checks, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EXAMPLES)
def test_operator(name: str, check: Callable[[Operator], None]) -> None:
    check(EXAMPLES[name]())


@pytest.mark.parametrize("check", structure_checks, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", [cls for cls in OURS.values() if cls.fittable], ids=lambda cls: cls.kind)
def test_structure(cls: type[Operator], check: Callable[[type[Operator]], None]) -> None:
    if cls in (Quantized, LowRankQuantized) and check is testing.check_members:
        pytest.skip("its scales are searched for; see test_quantized_recovers_members_that_use_the_whole_grid")
    if cls in (LowRankSparse, Dictionary) and check is testing.check_members:
        pytest.skip("its support is searched for; see test_ops_sparse_families.py")
    if cls is Blast and check is testing.check_members:
        pytest.skip("found again where r is within a block's sides; see test_ops_block_families.py")
    check(cls)


SHAPE_CHECKS = (
    testing.check_product,
    testing.check_wrong_input,
    testing.check_transpose,
    testing.check_counts,
    testing.check_configuration,
    testing.check_dtypes,
    testing.check_runtime,
)


@pytest.mark.parametrize("cls", [cls for cls in OURS.values() if cls.fittable], ids=lambda cls: cls.kind)
def test_every_shape(cls: type[Operator]) -> None:
    ran = 0
    for shape in SHAPES:
        for size in [*cls.sizes(shape, 0.5)[:2], *cls.sizes(shape, 1.4)[-1:]]:
            op = cls.init(shape, generator=_seeded(), **size)
            for check in SHAPE_CHECKS:
                check(op)
            ran += 1
    assert ran >= 3


@pytest.mark.parametrize("strided_columns", [False, True])
@pytest.mark.parametrize("strided_rows", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_block_low_rank_recovers_members_of_each_layout(
    shape: tuple[int, int], strided_rows: bool, strided_columns: bool
) -> None:
    layout: dict[str, Any] = {"strided_rows": strided_rows, "strided_columns": strided_columns}
    for blocks in ((1, 1), (2, 2), (1, 3), (3, 2), (4, 8)):
        size = {"rank": 2, "blocks": tuple(min(b, n) for b, n in zip(blocks, shape, strict=True)), **layout}
        member = BlockLowRank.init(shape, generator=_seeded(), **size)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            matrix = member.to(dtype=dtype).dense()
            found = BlockLowRank.fit(matrix, **size).dense()
            assert float((found - matrix).norm()) <= tolerance * float(matrix.norm())


# The contract itself ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Circulant(Operator):
    """A third party's structure: ``A[i, j] = values[(i - j) mod n]``."""

    kind: ClassVar[str] = "circulant_of_a_test"
    fittable: ClassVar[bool] = True
    values: Tensor

    def __post_init__(self) -> None:
        self._check(self.values.dim() == 1, "values (n,)")

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.values), len(self.values))

    def apply(self, x: Tensor) -> Tensor:
        n = len(self.values)
        self._check(x.shape[-1] == n, f"x (..., {n})")
        place = (torch.arange(n)[:, None] - torch.arange(n)) % n
        return torch.nn.functional.linear(x, self.values[place])

    def transpose(self) -> Circulant:
        return Circulant(self.values.flip(0).roll(1))

    def flops(self, batch: int = 1) -> int:
        return 2 * batch * len(self.values) ** 2

    @classmethod
    def fit(
        cls, weight: Tensor, *, gram_in: Tensor | None = None, gram_out: Tensor | None = None, **size: Any
    ) -> Circulant:
        n = len(weight)
        place = (torch.arange(n)[:, None] - torch.arange(n)) % n
        return cls(weight.new_zeros(n).index_add(0, place.reshape(-1), weight.reshape(-1)) / n)

    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Circulant:
        return cls(torch.randn(shape[0], generator=generator) / shape[0] ** 0.5)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[dict[str, Any]]:
        return [{}] if shape[0] == shape[1] and shape[0] <= keep * shape[0] * shape[1] else []


def test_a_third_party_structure_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "_REGISTRY", dict(operator_module._REGISTRY))
    register(Circulant)
    testing.check_operator(Circulant.init((7, 7), generator=_seeded()))
    testing.check_structure(Circulant)


class _Faulty(Dense):
    """A dense matrix that subclasses break in one place each."""


class _ForgetsPart(_Faulty):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x) * (1 if x.dim() < 3 else 1.001)


class _Broadcasts(_Faulty):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x.expand(*x.shape[:-1], self.shape[1]))


class _Cuts(_Faulty):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x[..., : self.shape[1]])


class _TransposesWrongly(_Faulty):
    def transpose(self) -> Dense:
        return Dense(self.weight.mT * 1.001)


class _Detaches(_Faulty):
    def apply(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.detach())


class _UndercountsWork(_Faulty):
    def flops(self, batch: int = 1) -> int:
        return batch * self.weight.numel()


class _OvercountsWork(_Faulty):
    def flops(self, batch: int = 1) -> int:
        return 4 * batch * self.weight.numel()


class _Undercounts(_Faulty):
    @property
    def numel(self) -> int:
        return self.weight.numel() - 1


class _ForgetsDtype(_Faulty):
    def apply(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.float(), self.weight.float())


class _ReplacesNothing(_Faulty):
    def replace(self, **factors: Tensor) -> Any:
        return self


class _ComputesInDouble(_Faulty):
    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        return dataclasses.replace(self, weight=self.weight.double())


class _BreaksTheGraph(_Faulty):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x) * (1.0 if float(x.sum()) != 0.25 else 0.0)


class _RunsAnother(_Faulty):
    def runtime(self) -> Operator:
        return Dense(self.weight.round())


class _SavesElsewhere(_Faulty):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (_ForgetsPart, testing.check_product),
        (_Broadcasts, testing.check_wrong_input),
        (_Cuts, testing.check_wrong_input),
        (_TransposesWrongly, testing.check_transpose),
        (_Detaches, testing.check_gradients),
        (_UndercountsWork, testing.check_counts),
        (_OvercountsWork, testing.check_counts),
        (_Undercounts, testing.check_counts),
        (_ReplacesNothing, testing.check_replace),
        (_ForgetsDtype, testing.check_dtypes),
        (_ComputesInDouble, testing.check_dtypes),
        (_SavesElsewhere, testing.check_copies),
        (_BreaksTheGraph, testing.check_compile),
        (_BreaksTheGraph, testing.check_vmap),
        (_RunsAnother, testing.check_runtime),
    ],
)
def test_the_contract_catches(faulty: type[Dense], check: Callable[[Operator], None]) -> None:
    sound = _dense(6, 9)
    check(sound)
    with pytest.raises((AssertionError, RuntimeError)):
        check(faulty(sound.weight))


class _RunsAnotherPair(BlockLowRank):
    kind: ClassVar[str] = "faulty_pair_of_a_test"

    def runtime(self) -> Operator:
        return BlockLowRank(self.left * 1.001, self.right, *self.shape)


def test_the_contract_catches_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "_REGISTRY", dict(operator_module._REGISTRY))
    register(_RunsAnotherPair)
    pair = _low_rank(8, 5)
    testing.check_layer(pair)
    with pytest.raises(AssertionError, match="without gradients"):
        testing.check_layer(_RunsAnotherPair(pair.left, pair.right, *pair.shape))


def test_a_failed_check_says_what_it_found() -> None:
    with pytest.raises(AssertionError, match=r"apply to \(2, 3, 9\): relative error 1\.0e-03"):
        testing.check_operator(_ForgetsPart(_dense(6, 9).weight))


class _TooLarge(Diagonal):
    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[dict[str, Any]]:
        return [{}] if shape[0] == shape[1] else []


class _IgnoresGenerator(Diagonal):
    @classmethod
    def init(cls, shape: tuple[int, int], *, generator: torch.Generator | None = None, **size: Any) -> Diagonal:
        return super().init(shape)


class _FitsRoughly(Diagonal):
    @classmethod
    def fit(cls, weight: Tensor, **size: Any) -> Diagonal:
        return cls(weight.diagonal() * 1.0001)


class _NeedsInverse(Diagonal):
    @classmethod
    def fit(cls, weight: Tensor, *, gram_in: Tensor | None = None, **size: Any) -> Diagonal:
        scale = 1.0 if gram_in is None or gram_in.dim() == 1 else torch.linalg.inv(gram_in).diagonal()
        return cls(weight.diagonal() * scale)


class _Overshoots(Diagonal):
    @classmethod
    def fit(cls, weight: Tensor, *, gram_in: Tensor | None = None, **size: Any) -> Diagonal:
        return cls(weight.diagonal() * (1.0 if gram_in is None else 30.0))


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (_TooLarge, testing.check_sizes),
        (_IgnoresGenerator, testing.check_init),
        (_FitsRoughly, testing.check_members),
        (_NeedsInverse, testing.check_fit),
        (_Overshoots, testing.check_fit),
    ],
)
def test_the_contract_catches_structures(faulty: type[Diagonal], check: Callable[[type[Operator]], None]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(faulty)
