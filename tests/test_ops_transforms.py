"""Shift-structured matrices, fast transforms and Pauli strings, against scipy, numpy and brute force."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor

from gramian import testing
from gramian.errors import GramianError
from gramian.fitting import fit
from gramian.linalg import psd_root, svdvals, weighted_error
from gramian.ops import (
    BlockLowRank,
    Circulant,
    Cosine,
    Dense,
    Fourier,
    Hadamard,
    LowDisplacement,
    Operator,
    PauliSum,
    Toeplitz,
    fourier_blocks,
    from_config,
    hadamard_blocks,
    kron,
    pauli,
    pauli_entries,
    toeplitz,
    transforms,
)

WIDE = torch.float64


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gram(n: int, rank: int | None = None, seed: int = 0) -> Tensor:
    samples = _normal(rank or 3 * n, n, seed=seed) * torch.logspace(0, -1, n, dtype=WIDE)
    return samples.mT @ samples / len(samples)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# Toeplitz and circulant -------------------------------------------------------------------------------------------------

SHAPES = ((6, 6), (4, 9), (9, 4), (1, 1), (1, 5), (5, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_toeplitz_and_circulant_are_those_of_scipy(shape: tuple[int, int]) -> None:
    out, in_ = shape
    values = _normal(out + in_ - 1)
    wanted = scipy.linalg.toeplitz(values[in_ - 1 :].numpy(), values[:in_].flip(0).numpy())
    assert np.array_equal(Toeplitz(values, out, in_).dense().numpy(), wanted)
    column = _normal(max(shape))
    wanted = scipy.linalg.circulant(column.numpy())[:out, :in_]
    assert np.array_equal(Circulant(column, out, in_).dense().numpy(), wanted)


SHIFTED: dict[str, Callable[[], Operator]] = {
    "toeplitz": lambda: Toeplitz.init((12, 12), generator=_seeded()),
    "toeplitz, wide": lambda: Toeplitz.init((5, 13), generator=_seeded()),
    "toeplitz, tall": lambda: Toeplitz.init((13, 4), generator=_seeded()),
    "circulant": lambda: Circulant.init((9, 9), generator=_seeded()),
    "circulant, wide": lambda: Circulant.init((5, 12), generator=_seeded()),
    "circulant, tall": lambda: Circulant.init((13, 4), generator=_seeded()),
    "low displacement": lambda: LowDisplacement.init((9, 9), rank=2, generator=_seeded()),
    "low displacement, wide": lambda: LowDisplacement.init((5, 12), rank=3, generator=_seeded()),
    "low displacement, tall and skew on the left": lambda: LowDisplacement.init((12, 9), rank=2, generator=_seeded()),
}
CHECKS = [check for check in testing.operator_checks if check is not testing.check_counts]


@pytest.mark.parametrize("name", SHIFTED)
def test_the_contract_holds_by_transforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = SHIFTED[name]()
    by_matrix = op.apply(torch.eye(op.shape[1]))
    monkeypatch.setattr(toeplitz, "TRANSFORM_COST", 0.0)
    assert op.runtime() is op  # nothing here is small enough any more
    assert _relative(op.apply(torch.eye(op.shape[1])), by_matrix) < 1e-6
    assert not torch.equal(op.apply(torch.eye(op.shape[1])), by_matrix), "the product did not change: no transform ran"
    for check in CHECKS:
        if check is not testing.check_compile or name in ("toeplitz, tall", "low displacement, wide"):
            check(op)


@pytest.mark.parametrize("cls", [Toeplitz, Circulant])
def test_large_products_run_by_transforms_and_cost_less(cls: type[Toeplitz] | type[Circulant]) -> None:
    n = 1024
    op = cls.init((n, n), generator=_seeded())
    x = torch.randn(3, n, generator=_seeded(1))
    assert op.runtime() is op
    assert op.flops() < 2 * n * n / 10
    assert _relative(op.apply(x), x @ op.dense().mT) < 1e-5
    half = op.to(dtype=torch.bfloat16).apply(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert _relative(half.float(), x @ op.dense().mT) < 1e-2
    small = cls.init((96, 96), generator=_seeded())
    assert small.flops() == 2 * 96 * 96


@pytest.mark.parametrize("grams", ["none", "input", "output", "both", "diagonals", "rank-deficient"])
@pytest.mark.parametrize("cls", [Toeplitz, Circulant])
@pytest.mark.parametrize("shape", [(7, 7), (4, 9), (8, 3)])
def test_shift_fits_are_the_weighted_optimum(
    cls: type[Toeplitz] | type[Circulant], shape: tuple[int, int], grams: str
) -> None:
    out, in_ = shape
    weight = _normal(out, in_)
    g, h = _gram(in_, seed=1), _gram(out, seed=2)
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "none": (None, None),
        "input": (g, None),
        "output": (None, h),
        "both": (g, h),
        "diagonals": (g.diagonal(), h.diagonal()),
        "rank-deficient": (_gram(in_, rank=2, seed=3), h),
    }
    gram_in, gram_out = pairs[grams]
    full = [
        torch.eye(n, dtype=WIDE) if gram is None else gram.diag() if gram.dim() == 1 else gram
        for gram, n in ((gram_in, in_), (gram_out, out))
    ]
    root_in, root_out = (psd_root(gram)[0] for gram in full)
    count = len(cls.fit(weight).values)
    basis = torch.stack(
        [(root_out @ cls(e, out, in_).dense() @ root_in).reshape(-1) for e in torch.eye(count).double()], 1
    )
    target = (root_out @ weight @ root_in).reshape(-1)
    best = float((target - basis @ torch.linalg.pinv(basis, rtol=1e-10) @ target).square().sum())
    found = cls.fit(weight, gram_in=gram_in, gram_out=gram_out)
    error = float(weighted_error(weight - found.dense(), gram_in, gram_out))
    assert error <= best * (1 + 1e-6) + 1e-12


def test_a_large_weighted_fit_iterates_to_the_same_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, g, h = _normal(20, 30), _gram(30, seed=1), _gram(20, seed=2)
    exact = Toeplitz.fit(weight, gram_in=g, gram_out=h)
    monkeypatch.setattr(toeplitz, "DIRECT", 0)
    plain, near = Toeplitz.fit(weight), Toeplitz.fit(weight, gram_in=g, gram_out=h)
    best, reached, start = (float(weighted_error(weight - op.dense(), g, h)) for op in (exact, near, plain))
    assert best <= reached <= best + 1e-3 * (start - best)


# Low displacement rank --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 7), (5, 8), (9, 6), (12, 6), (16, 4), (1, 3)])
def test_low_displacement_is_a_sum_of_products(shape: tuple[int, int]) -> None:
    out, in_ = shape
    op = LowDisplacement.init(shape, rank=2, generator=_seeded()).to(dtype=WIDE)

    def square(column: Tensor, skew: bool) -> np.ndarray[Any, Any]:
        full = scipy.linalg.circulant(column.numpy())
        return np.tril(full) - np.triu(full, 1) if skew else full

    wanted = sum(
        square(left, op.skew_left) @ np.eye(out, in_) @ square(right, not op.skew_left)
        for left, right in zip(op.left, op.right, strict=True)
    )
    assert np.allclose(op.dense().numpy(), wanted, atol=1e-12)
    unit = torch.eye(out, dtype=WIDE)[min(1, out - 1)], torch.eye(in_, dtype=WIDE)[min(1, in_ - 1)]
    shifts = [square(column, skew) for column, skew in zip(unit, (op.skew_left, not op.skew_left), strict=True)]
    if min(shape) > 1:
        displaced = torch.from_numpy(shifts[0] @ wanted - wanted @ shifts[1])
        assert float(svdvals(displaced)[2:].sum()) < 1e-10  # the class's reason: rank 2, rectangular too


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (24, 12)])
def test_low_displacement_holds_toeplitz_matrices_and_inverses(shape: tuple[int, int]) -> None:
    matrix = Toeplitz.init(shape, generator=_seeded()).to(dtype=WIDE).dense()
    assert fit(matrix, "low_displacement", rank=2).relative < 1e-20
    assert fit(matrix, "block_low_rank", rank=2).relative > 0.1
    if shape[0] == shape[1]:
        inverse = torch.linalg.inv(matrix)
        assert fit(inverse, "low_displacement", rank=2).relative < 1e-16
        assert fit(inverse, "low_displacement", rank=1).relative > 1e-3


@pytest.mark.parametrize("shape", [(48, 48), (30, 50), (64, 32)])
def test_low_displacement_fit_beats_its_start_and_random_members(shape: tuple[int, int]) -> None:
    weight = _normal(*shape)
    found = fit(weight, "low_displacement", rank=3)
    # Any member can be scaled to an error of at most 1; a fit must do notably better than chance.
    member = LowDisplacement.init(shape, rank=3, generator=_seeded(1)).to(dtype=WIDE).dense()
    chance = 1 - float((member * weight).sum() ** 2 / member.square().sum() / weight.square().sum())
    assert found.relative < chance - 0.05
    low_rank = fit(weight, "block_low_rank", rank=3).relative
    assert abs(found.relative - low_rank) < 0.05  # of no shift structure: no better and no worse than low rank


def test_low_displacement_is_polished_under_grams() -> None:
    weight, gram = _normal(20, 20), _gram(20, seed=1)
    plain = LowDisplacement.fit(weight, rank=2).dense()
    found = fit(weight, "low_displacement", gram_in=gram, rank=2)
    assert found.error < 0.9 * float(weighted_error(weight - plain, gram, None))


def test_low_displacement_starts_at_zero_with_a_gradient() -> None:
    op = LowDisplacement.delta((6, 8), 2, generator=_seeded())
    left = op.left.clone().requires_grad_()
    assert not op.dense().any()
    op.replace(left=left).apply(torch.ones(3, 8)).square().sum().backward()
    assert not left.grad.any()  # of a square at zero; the gradient of a loss that is not at its minimum:
    left.grad = None
    (op.replace(left=left).apply(torch.ones(3, 8)) - 1).square().sum().backward()
    assert left.grad.abs().sum() > 0


def test_low_displacement_says_what_is_wrong() -> None:
    with pytest.raises(GramianError, match="rank 0; expected at least 1"):
        LowDisplacement.fit(torch.eye(4), rank=0)
    with pytest.raises(GramianError, match="left \\(r, out\\) and right \\(r, in\\)"):
        LowDisplacement(torch.zeros(2, 4), torch.zeros(3, 4))


# Transforms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 64, 128, 256, 2048])
def test_hadamard_is_that_of_scipy(size: int) -> None:
    x = _normal(3, size)
    wanted = x.numpy() @ scipy.linalg.hadamard(size) / size**0.5
    assert np.allclose(Hadamard(size).apply(x).numpy(), wanted, atol=1e-12)
    assert np.allclose(Hadamard(size).apply_columns(x.mT).mT.numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("size", [12, 20, 24, 28, 36, 40, 44, 48, 56, 96, 112, 160, 384, 768, 896, 1280])
def test_hadamard_of_paley(size: int) -> None:
    op = Hadamard(size).to(dtype=WIDE)
    matrix = op.dense()
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert _relative(matrix @ matrix.mT, torch.eye(size, dtype=WIDE)) < 1e-12
    x = _normal(2, size)
    assert _relative(op.T.apply(op.apply(x)), x) < 1e-12
    assert op.flops() <= 2 * size * max(size // 4, 128)


@pytest.mark.parametrize("size", [3, 6, 10, 52, 100, 172])
def test_hadamard_refuses_other_sizes(size: int) -> None:
    with pytest.raises(GramianError, match=f"no Hadamard matrix of size {size} here; the nearest are of \\d+ and \\d+"):
        Hadamard(size)


@pytest.mark.parametrize("direct", [10**6, 0])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 37, 100, 255])
def test_cosine_and_fourier_are_those_of_scipy(size: int, direct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "GEMM_UP_TO", direct)
    x = _normal(2, 3, size)
    numbers = x.numpy()
    assert np.allclose(Cosine(size).apply(x).numpy(), scipy.fft.dct(numbers, norm="ortho"), atol=1e-12)
    assert np.allclose(Cosine(size).T.apply(x).numpy(), scipy.fft.idct(numbers, norm="ortho"), atol=1e-12)
    spectrum = scipy.fft.rfft(numbers, norm="ortho")
    weight = np.full(spectrum.shape[-1], 2**0.5)
    weight[[0, -1] if size % 2 == 0 else [0]] = 1.0
    wanted = np.concatenate([spectrum.real * weight, spectrum.imag[..., 1 : (size + 1) // 2] * 2**0.5], -1)
    found = Fourier(size).apply(x)
    assert np.allclose(found.numpy(), wanted, atol=1e-12)
    assert np.allclose(Fourier(size).T.apply(found).numpy(), numbers, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cls", [Cosine, Fourier])
def test_the_contract_holds_by_fast_transforms(
    cls: type[Cosine] | type[Fourier], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "GEMM_UP_TO", 0)
    for size in (1, 8, 15):
        for check in CHECKS:
            if check is not testing.check_compile or size == 15:
                check(cls(size, transposed))


def test_fast_transforms_cost_little() -> None:
    n = 4096
    assert Hadamard(n).flops() == 2 * n * (64 + 64)
    for cls in (Cosine, Fourier):
        assert cls(n).flops() < 2 * n * n / 100
        assert cls(64).flops() == 2 * 64 * 64
    assert Cosine(n).numel == 0


def test_tables_outlive_inference_mode() -> None:
    with torch.inference_mode():
        Cosine(19).apply(torch.ones(2, 19))
    x = torch.ones(2, 19, requires_grad=True)
    Cosine(19).apply(x).sum().backward()
    assert x.grad is not None


def test_few_tables_are_kept() -> None:
    for size in range(1, 80):
        Cosine(size).apply(torch.ones(size))
    assert len(transforms._TABLES) <= transforms._MOST_TABLES


@pytest.mark.parametrize("size", [4, 8, 64, 256])
def test_hadamard_is_block_low_rank_in_its_layout(size: int) -> None:
    matrix = Hadamard(size).to(dtype=WIDE).dense()
    blocks = hadamard_blocks(size).to(dtype=WIDE)
    assert blocks.rank == 1
    assert _relative(blocks.dense(), matrix) < 1e-7  # its factors were rounded to float32
    found = BlockLowRank.fit(matrix, rank=1, blocks=blocks.blocks, strided_rows=True)
    assert _relative(found.dense(), matrix) < 1e-12
    found = BlockLowRank.fit(matrix.float(), rank=1, blocks=blocks.blocks, strided_rows=True)
    assert _relative(found.dense(), matrix) < 1e-6
    wrong = BlockLowRank.fit(matrix, rank=1, blocks=blocks.blocks)
    assert _relative(wrong.dense(), matrix) > 0.3


@pytest.mark.parametrize(("size", "row_blocks"), [(4, None), (12, None), (12, 2), (64, None), (7, None), (30, 6)])
def test_fourier_is_block_low_rank_in_its_layout(size: int, row_blocks: int | None) -> None:
    full = np.fft.fft(np.eye(size), norm="ortho")
    matrix = torch.from_numpy(np.block([[full.real, -full.imag], [full.imag, full.real]]))
    blocks = fourier_blocks(size, row_blocks)
    assert _relative(blocks.dense().double(), matrix) < 1e-6
    layout: dict[str, Any] = {"strided_rows": True, "strided_columns": True}
    found = BlockLowRank.fit(matrix, rank=2, blocks=blocks.blocks, **layout)
    assert _relative(found.dense(), matrix) < 1e-12
    assert _relative(BlockLowRank.fit(matrix.float(), rank=2, blocks=blocks.blocks, **layout).dense(), matrix) < 1e-6
    z = torch.randn(size, dtype=torch.complex128, generator=_seeded())
    y = blocks.to(dtype=WIDE).apply(torch.cat([z.real, z.imag]))
    assert _relative(torch.complex(y[:size], y[size:]), torch.fft.fft(z, norm="ortho")) < 1e-6


def test_transforms_say_what_is_wrong() -> None:
    with pytest.raises(GramianError, match="size 0; expected at least 1"):
        Cosine(0)
    with pytest.raises(GramianError, match="5 row blocks for size 12; expected a divisor"):
        fourier_blocks(12, 5)
    with pytest.raises(GramianError, match="size 12; expected a power of two"):
        hadamard_blocks(12)


# Pauli strings ----------------------------------------------------------------------------------------------------------

LETTERS = {
    "I": np.eye(2),
    "X": np.array([[0, 1], [1, 0]]),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1, -1]),
}


def _chain(string: str) -> Any:
    return functools.reduce(np.kron, [LETTERS[letter] for letter in string])


def test_every_pauli_string_is_its_kronecker_product() -> None:
    for length in (1, 2, 3):
        for letters in itertools.product("IXYZ", repeat=length):
            string = "".join(letters)
            op, wanted = pauli(string), _chain(string)
            assert op.dtype.is_complex == (string.count("Y") % 2 == 1)
            assert np.array_equal(op.dense().numpy(), wanted), string
            assert np.array_equal(op.T.dense().numpy(), wanted.T), string
            x = torch.randn(5, 2**length, dtype=torch.complex64, generator=_seeded())
            assert np.allclose(op.apply(x).numpy(), x.numpy() @ wanted.T, atol=1e-6), string
            columns, values = pauli_entries(string)
            full = torch.zeros(wanted.shape, dtype=torch.complex128)
            full[torch.arange(2**length), columns] = values
            assert np.array_equal(full.numpy(), wanted), string


def test_a_hamiltonian_is_the_sum_of_its_strings() -> None:
    sites = 6
    terms = {"I" * i + "ZZ" + "I" * (sites - i - 2): -1.0 for i in range(sites - 1)}
    terms |= {"I" * i + "X" + "I" * (sites - i - 1): -0.7 for i in range(sites)}
    op = pauli(terms, WIDE)
    wanted = sum(weight * _chain(string) for string, weight in terms.items())
    assert np.allclose(op.dense().numpy(), wanted)
    x = _normal(4, 2**sites)
    assert np.allclose(op.apply(x).numpy(), x.numpy() @ wanted.T)
    assert op.numel == len(terms)
    assert op.flops() == 2**sites * (2 * (1 + sites) - 1)  # the ZZ share one permutation
    assert np.allclose(op.runtime().dense().numpy(), wanted)


def test_complex_sums_keep_their_numbers() -> None:
    op = pauli({"XY": 1j, "ZZ": 2, "YI": 0.5})
    assert op.dtype == torch.complex64
    again = from_config(op.config(), op.factors())
    assert torch.equal(again.dense(), op.dense())
    assert np.allclose(op.dense().numpy(), 1j * _chain("XY") + 2 * _chain("ZZ") + 0.5 * _chain("YI"))
    assert op.runtime() is op
    assert pauli("XY", torch.complex128).dtype == torch.complex128


def test_weights_of_strings_can_be_trained() -> None:
    op = pauli({"XI": 0.0, "ZZ": 0.0, "YY": 0.0}, WIDE)
    wanted = pauli({"XI": 0.3, "ZZ": -1.0, "YY": 2.0}, WIDE)
    weights = op.weights.clone().requires_grad_()
    loss = (op.replace(weights=weights).dense() - wanted.dense()).square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert torch.allclose(gradient, -2 * 4 * wanted.weights)  # strings are orthogonal, of squared norm 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pauli("XQW"), "letters QW"),
        (lambda: pauli(""), "lengths \\[0\\]"),
        (lambda: pauli({"XX": 1.0, "Z": 1.0}), "lengths \\[1, 2\\]"),
        (lambda: pauli("XY", torch.float32), "XY has imaginary entries"),
        (lambda: pauli({"XX": 1j}, torch.float32), "expected a complex dtype"),
        (lambda: PauliSum(torch.ones(3), ("XX", "ZZ")), "weights \\(2,\\)"),
    ],
)
def test_pauli_says_what_is_wrong(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(GramianError, match=said):
        make()


def test_what_is_made_of_complex_operators_is_complex() -> None:
    y, z = pauli("Y"), pauli("Z")
    full, other = (torch.from_numpy(_chain(letter)).to(torch.complex64) for letter in "YZ")
    assert torch.equal((2 * y).dense(), 2 * full)
    assert torch.equal((y + z).dense(), full + other)
    assert torch.equal(kron(y, y).dense(), torch.kron(full, full))
    assert (Dense(torch.eye(2)) + y).dtype == torch.complex64
    made = from_config(y.config(), y.factors())
    assert torch.equal(made.dense(), y.dense())
    assert from_config(y.config(), dtype=torch.float32).dtype == torch.complex64


def test_only_a_number_scales() -> None:
    op = Dense(torch.ones(3, 3))
    for wrong, said in ((torch.arange(3.0), "expected a number"), (op, "expected a number"), (1j, "a complex number")):
        with pytest.raises(GramianError, match=said):
            op * wrong
