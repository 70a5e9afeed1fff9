"""Orthogonal matrices of a skew-symmetric parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.linalg import eigh, eigvalsh, polar, solve, weigh
from gramian.ops.block_diagonal import BlockDiagonal
from gramian.ops.combinators import Product, Scaled
from gramian.ops.dense import Dense
from gramian.ops.diagonal import Permutation
from gramian.ops.operator import Operator, Size, register
from gramian.ops.toeplitz import computable

METHODS = ("cayley", "neumann", "exponential")
STEPS = 20
"""At most so many descent steps of a fit under an output Gram."""


@register
@dataclass(frozen=True, eq=False, repr=False)
class Orthogonal(Operator):
    """A block-diagonal orthogonal matrix: K blocks R(S) of b x b, each of its own skew-symmetric S, times a diagonal of
    fixed signs.

    ``method`` says how R is made of S:

    * "cayley": ``(I + S) (I - S)^{-1}``, exactly orthogonal;
    * "neumann": ``(I + S) (I + S + ... + S^terms)``, the inverse by its truncated series (POET, 2025, "Reparameterized LLM
      training via orthogonal equivalence transformation"): no solve. It is the Cayley matrix times ``I - S^(terms + 1)``,
      so ``R^T R - I`` has norm ``||S||^(2 terms + 2)`` for an even number of terms and near ``2 ||S||^(terms + 1)`` for an
      odd one;
    * "exponential": ``exp(S)``, exactly orthogonal.

    No S gives an eigenvalue -1 by Cayley; the signs put every orthogonal matrix within reach.

    Args:
        skew: (K, b (b - 1) / 2): the entries of each S above its diagonal, row by row.
        signs: (n,) of 1 and -1 with n = K b, not trained; None for ones.
        method: see above.
        terms: of the truncated series.
    """

    kind: ClassVar[str] = "orthogonal"
    fittable: ClassVar[bool] = True
    constants: ClassVar[frozenset[str]] = frozenset({"signs"})
    skew: Tensor
    signs: Tensor | None = None
    method: str = "cayley"
    terms: int = 4

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.terms < 1:
            raise GramianError(
                f"orthogonal: method {self.method!r} with {self.terms} terms; expected one of {', '.join(METHODS)} and at "
                "least 1"
            )
        fits = self.skew.dim() == 2 and len(self.skew) > 0
        fits = fits and self.block * (self.block - 1) // 2 == self.skew.shape[1]
        if fits and self.signs is not None:
            fits = self.signs.shape == (self.shape[0],)
        self._check(fits, "skew (K, b (b - 1) / 2) and signs (K b,)")

    @classmethod
    def random(
        cls,
        size: int,
        *,
        block: int | None = None,
        method: str = "cayley",
        generator: torch.Generator | None = None,
    ) -> Orthogonal:
        """Uniform (Haar) random blocks of b x b; one block by default.

        Raises:
            GramianError: b does not divide `size`.
        """
        b = size if block is None else block
        _check_block(size, b)
        q, r = torch.linalg.qr(torch.randn(size // b, b, b, dtype=torch.float64, generator=generator))
        q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]  # uniform only with this choice of signs
        return cls._of_blocks(q, method, torch.get_default_dtype())

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, block: int | None = None, method: str = "cayley") -> Orthogonal:
        """The operator of an orthogonal `matrix` (n, n), to rounding; with b < n of its diagonal blocks, which must be
        orthogonal themselves.

        Signs D are chosen by elimination so that every pivot of ``Q + D`` is at least 1 in size (as Ballard et al. 2014,
        "Reconstructing Householder vectors from tall-skinny QR", choose theirs): entries of ``S = (Q D - I)(Q D + I)^{-1}``
        stay near 1 at most (2.2 in random matrices of side 512). For the exponential ``2 atan(S)`` is stored.

        Args:
            matrix: (n, n), orthogonal.
            block: b; n by default.
            method: "cayley" or "exponential".

        Raises:
            GramianError: the matrix is not square or not orthogonal to 1e-3, b does not divide n, or the method is
                "neumann", which reaches orthogonal matrices only nearly.
        """
        n = len(matrix)
        b = n if block is None else block
        _check_block(n, b)
        if matrix.shape != (n, n):
            raise GramianError(f"orthogonal: matrix {tuple(matrix.shape)}; expected a square one")
        blocks = _diagonal_blocks(matrix.to(torch.float64), b)
        check_orthogonal(blocks)
        return cls._of_blocks(polar(blocks), method, matrix.dtype)

    @classmethod
    def _of_blocks(cls, q: Tensor, method: str, dtype: torch.dtype) -> Orthogonal:
        """From orthogonal blocks (K, b, b) in float64."""
        if method == "neumann":
            raise GramianError("orthogonal: method 'neumann' has no inverse; start from 'cayley', or from zeros")
        skew, signs = _inverse_cayley(q)
        if method == "exponential":
            values, vectors = eigh(skew.mT @ skew)
            root = values.clamp_min(0).sqrt()
            twice = torch.where(root > 1e-8, 2 * root.atan() / root.clamp_min(1e-8), 2 * torch.ones_like(root))
            skew = skew @ (vectors * twice[:, None, :]) @ vectors.mT  # 2 atan(S), as S^T S commutes with S
        upper = torch.triu_indices(q.shape[1], q.shape[1], 1, device=q.device)
        skew = (skew - skew.mT) / 2
        return cls(skew[:, upper[0], upper[1]].to(dtype), signs.reshape(-1).to(dtype), method)

    @property
    def block(self) -> int:
        """b: the side of a block."""
        return (1 + math.isqrt(1 + 8 * self.skew.shape[1])) // 2

    @property
    def shape(self) -> tuple[int, int]:
        n = self.skew.shape[0] * self.block
        return (n, n)

    def blocks(self) -> Tensor:
        """The blocks R(S), (K, b, b), signs left out; half precision is computed in float32 and rounded."""
        upper = computable(self.skew)
        b = self.block
        rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
        s = upper.new_zeros(len(upper), b * b).index_copy(1, rows * b + columns, upper).reshape(-1, b, b)
        s = s - s.mT
        eye = torch.eye(b, dtype=s.dtype, device=s.device)
        made: Tensor
        if self.method == "cayley":
            made = solve(eye - s, eye + s)  # the two commute
        elif self.method == "exponential":
            # In float32 torch's is off by up to 3e-5, which is far from orthogonal.
            made = torch.linalg.matrix_exp(s.double()).to(s.dtype)
        else:
            series = eye + s
            for _ in range(self.terms - 1):
                series = eye + s @ series
            made = series + s @ series
        return made.to(self.skew.dtype)

    def orthogonality(self) -> Tensor:
        """``max |R^T R - I|`` over the entries of all blocks, a scalar tensor."""
        made = computable(self.blocks())
        return (made.mT @ made - torch.eye(self.block, dtype=made.dtype, device=made.device)).abs().max()

    def apply(self, x: Tensor) -> Tensor:
        n, b = self.shape[1], self.block
        self._check(x.shape[-1] == n, f"x (..., {n})")
        x = x if self.signs is None else x * self.signs
        if b == n:
            return F.linear(x, self.blocks()[0])
        y = x.reshape(-1, n // b, b).transpose(0, 1) @ self.blocks().mT
        return y.transpose(0, 1).reshape(x.shape)

    def apply_columns(self, x: Tensor) -> Tensor:
        n, b = self.shape[1], self.block
        self._check(x.shape[0] == n, f"x ({n}, B)")
        x = x if self.signs is None else self.signs[:, None] * x
        return (self.blocks() @ x.reshape(n // b, b, x.shape[1])).reshape(x.shape)

    def transpose(self) -> Orthogonal:
        if self.signs is None:
            return Orthogonal(-self.skew, None, self.method, self.terms)
        # (R(S) D)^T = D R(-S) = R(-D S D) D.
        b = self.block
        rows, columns = torch.triu_indices(b, b, 1, device=self.skew.device)
        signs = self.signs.reshape(-1, b)
        return Orthogonal(-self.skew * signs[:, rows] * signs[:, columns], self.signs, self.method, self.terms)

    def dense(self) -> Tensor:
        made = self.blocks()
        full = made[0] if len(made) == 1 else torch.block_diag(*made)  # type: ignore[no-untyped-call]
        return full if self.signs is None else full * self.signs

    def runtime(self) -> Operator:
        """The blocks, made once."""
        if len(self.skew) == 1:
            return Dense(self.dense())
        made = self.blocks()
        if self.signs is not None:
            made = made * self.signs.reshape(len(made), 1, -1)
        return BlockDiagonal(made, *self.shape)

    def flops(self, batch: int = 1) -> int:
        n = self.shape[0]
        return batch * (2 * n * self.block + (0 if self.signs is None else n))

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        *,
        gram_in: Tensor | None = None,
        gram_out: Tensor | None = None,
        block: int | None = None,
        method: str = "cayley",
        **size: Any,
    ) -> Scaled:
        """The best multiple ``c Q`` (a ``Scaled``; Q is its ``base``) of the Q that ``orthogonal_fit`` finds; within one
        block, the polar factor is the best choice. Orthogonal inputs are recovered.
        """
        b = len(weight) if block is None else block
        _check_block(len(weight), b)

        def project(target: Tensor) -> Tensor:
            full: Tensor = torch.block_diag(*polar(_diagonal_blocks(target, b)))  # type: ignore[no-untyped-call]
            return full

        factor, q = orthogonal_fit(weight, gram_in, gram_out, project)
        return Scaled(factor.to(weight), cls._of_blocks(_diagonal_blocks(q, b), method, weight.dtype))

    @classmethod
    def init(
        cls,
        shape: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        block: int | None = None,
        method: str = "cayley",
        **size: Any,
    ) -> Orthogonal:
        """``random``.

        Raises:
            GramianError: the shape is not square.
        """
        if shape[0] != shape[1]:
            raise GramianError(f"orthogonal: shape {tuple(shape)}; expected a square one")
        return cls.random(shape[0], block=block, method=method, generator=generator)

    @classmethod
    def sizes(cls, shape: tuple[int, int], keep: float) -> list[Size]:
        """Blocks of the whole size, of its half, quarter, ... while they divide; square shapes only."""
        n, in_ = shape
        found: list[Size] = []
        b = n
        while n == in_:
            if n * (b - 1) // 2 + n + 1 <= keep * n * n:
                found.append({"block": b})
            if b % 2 or b < 4:
                break
            b //= 2
        return found


def permuted_orthogonal(
    size: int, block: int, *, method: str = "neumann", terms: int = 4, generator: torch.Generator | None = None
) -> Product:
    """POET's sparse orthogonal factor at its start, the identity: ``P^T diag(R_1 ... R_K) P`` with a random permutation P
    and blocks of zero skew parameter.

    Raises:
        GramianError: `block` does not divide `size`.
    """
    _check_block(size, block)
    order = torch.randperm(size, generator=generator)
    inner = Orthogonal(torch.zeros(size // block, block * (block - 1) // 2), None, method, terms)
    permutation = Permutation(order)
    return Product((permutation.T, inner, permutation))


# The nearest orthogonal matrix --------------------------------------------------------------------------------------


def orthogonal_fit(
    weight: Tensor, gram_in: Tensor | None, gram_out: Tensor | None, project: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A scalar c and a member Q of a family of orthogonal matrices with small ``||H^{1/2} (W - c Q) G^{1/2}||_F``.

    The square is ``-2 c tr(Q^T H W G) + c^2 tr(H Q G Q^T)`` and a constant. Without an output Gram (H = I) its second term
    is ``c^2 tr G``, so that ``project(W G)`` is optimal where `project` is. With one, the better of ``project(H W G)``
    and ``project(W)`` starts a descent: ``project(L Q + H (W / c - Q) G)`` minimises a bound from above for L the product
    of the largest eigenvalues, and a step that does not lower the error is not taken.

    Args:
        weight: (n, n).
        gram_in: G (n, n), (n,) or None.
        gram_out: H (n, n), (n,) or None.
        project: target (n, n) -> the member Q with the largest ``tr(Q^T target)``.

    Returns:
        c () and Q (n, n), in float64.

    Raises:
        GramianError: the weight is not square.
    """
    w = weight.to(torch.float64)
    if w.dim() != 2 or w.shape[0] != w.shape[1]:
        raise GramianError(f"orthogonal: weight {tuple(w.shape)}; expected a square matrix")
    g, h = (None if gram is None else gram.to(w) for gram in (gram_in, gram_out))

    def weighted(matrix: Tensor) -> Tensor:
        return weigh(weigh(matrix, h, side="out"), g, side="in")

    def multiple(q: Tensor) -> tuple[Tensor, Tensor]:
        image = weighted(q)
        square = (image * q).sum()
        if not bool(square > 0):  # Grams that see nothing: in the plain norm
            image, square = q, (q * q).sum()
        factor = (image * w).sum() / square
        return factor, -factor * factor * square

    tiny = torch.finfo(w.dtype).tiny
    seen = weighted(w)
    # A trace of W itself decides in directions that the Grams do not see.
    q = project(seen / seen.norm().clamp_min(tiny) + 1e-10 * w / w.norm().clamp_min(tiny))
    factor, error = multiple(q)
    if h is None:
        return factor, q
    plain = project(w)
    if bool(multiple(plain)[1] < error):
        q, (factor, error) = plain, multiple(plain)
    bound = math.prod(
        float(gram.max() if gram.dim() == 1 else eigvalsh(gram)[0]) for gram in (g, h) if gram is not None
    )
    for _ in range(STEPS):
        if not (bound > 0 and bool(factor > 0)):
            break
        step = project(bound * q + weighted(w / factor - q))
        new_factor, new_error = multiple(step)
        if not bool(new_error < error):
            break
        q, factor, error = step, new_factor, new_error
    return factor, q


def check_orthogonal(matrix: Tensor) -> None:
    """Raise a GramianError unless matrix (..., n, n) is orthogonal to 1e-3 an entry."""
    off = float((matrix.mT @ matrix - torch.eye(matrix.shape[-1]).to(matrix)).abs().max())
    if not off < 1e-3:
        raise GramianError(
            f"orthogonal: Q^T Q differs from I by {off:.1e}; expected an orthogonal matrix (fit projects any matrix)"
        )


def _check_block(size: int, block: int) -> None:
    if block < 1 or size % block:
        divisors = [b for b in range(1, size + 1) if size % b == 0]
        raise GramianError(f"orthogonal: blocks of {block} in {size}; expected one of {divisors}")


def _diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """(K, b, b) of a square matrix (n, n)."""
    k = len(matrix) // block
    return matrix.reshape(k, block, k, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _inverse_cayley(q: Tensor) -> tuple[Tensor, Tensor]:
    """S (K, b, b) and signs D (K, b) with ``q = (I + S)(I - S)^{-1} diag(D)``, for orthogonal q (K, b, b)."""
    b = q.shape[1]
    signs = q.new_ones(len(q), b)
    rest = q.clone()
    for i in range(b):
        pivot = rest[:, i, i]
        signs[:, i] = torch.where(pivot < 0, -1.0, 1.0)
        column = rest[:, i + 1 :, i] / (pivot + signs[:, i])[:, None]
        rest[:, i + 1 :, i + 1 :] -= column[:, :, None] * rest[:, i, None, i + 1 :]
    eye = torch.eye(b, dtype=q.dtype, device=q.device)
    turned = q * signs[:, None, :]
    return solve(turned.mT + eye, turned.mT - eye).mT, signs
