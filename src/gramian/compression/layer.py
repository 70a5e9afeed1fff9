"""One linear layer or embedding as the planner sees it: tensors, never a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gramian.errors import GramianError, nearest
from gramian.grams import EmbeddingGrams, LayerGrams
from gramian.linalg import ReducedRank, pivoted_nystrom, psd_root, reduced_rank, weighted_error


@dataclass
class Layer:
    """A weight, its bias and what measures an error in it.

    Attributes:
        name: for messages and the plan.
        weight: (out, in).
        bias: (out,) or None.
        grams: what calibration saw of the layer, or None: plain Frobenius errors.
        embedding: the weight is a table (rows, width), of which a token looks up one row. As the table's rows are what
            comes in and its columns what goes out, its Grams change sides: G_out is diagonal, the frequency of each row.
        weighting: which Grams measure an error, a name in `WEIGHTINGS`; ``weighed`` gives the layer under another.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    grams: LayerGrams | None = None
    embedding: bool = False
    weighting: str = "two-sided"
    _views: dict[str, Layer] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.grams is not None and self.grams.input.size != self.weight.shape[0 if self.embedding else 1]:
            raise GramianError(
                f"layer {self.name}: Gram of size {self.grams.input.size} for a weight {tuple(self.weight.shape)}"
            )
        resolve_weighting(self.weighting)

    def weighed(self, weighting: str) -> Layer:
        """The same layer under another weighting; what is computed for it is kept for the next time.

        Raises:
            GramianError: unknown name.
        """
        if weighting == self.weighting:
            return self
        if weighting not in self._views:
            self._views[weighting] = replace(self, weighting=weighting, _views={self.weighting: self})
        return self._views[weighting]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @cached_property
    def gram_in(self) -> Tensor | None:
        """G_in of the weighting: (in, in), its diagonal (in,), or None for the identity.

        Raises:
            GramianError: the weighting needs Grams that were not collected, or does not apply to an embedding.
        """
        return WEIGHTINGS[self.weighting].gram_in(self)

    @cached_property
    def gram_out(self) -> Tensor | None:
        """G_out of the weighting: (out, out), its diagonal (out,), or None for the identity.

        Raises:
            GramianError: as ``gram_in``.
        """
        return WEIGHTINGS[self.weighting].gram_out(self)

    @property
    def mean(self) -> Tensor:
        """(in,) mean input; zeros without calibration."""
        if self.grams is None or self.embedding:
            return torch.zeros(self.shape[1], dtype=torch.float64)
        return self.grams.input.mean

    @property
    def comparable(self) -> bool:
        """Whether errors are predicted loss, so that those of different layers compare."""
        if self.weighting != "two-sided":
            return False
        return (self.gram_in if self.embedding else self.gram_out) is not None

    @cached_property
    def unit(self) -> float:
        """What a weighted squared error is multiplied by: 1/2 gives predicted loss; elsewhere errors only compare
        relative to the layer's whole output.
        """
        if self.comparable:
            return 0.5
        return 1.0 / max(float(weighted_error(self.weight, self.gram_in, self.gram_out)), 1e-300)

    @cached_property
    def spectrum(self) -> ReducedRank:
        """All best low-rank approximations."""
        return reduced_rank(self.weight, self.gram_in, self.gram_out)

    @cached_property
    def pivots(self) -> tuple[Tensor, Tensor]:
        """Inputs (in,) in the order in which they are worth keeping, and the weighted squared error (in + 1,) when only
        the first k are kept and the weight is refitted to them.

        Raises:
            GramianError: there are no Grams.
        """
        if self.gram_in is None:
            raise GramianError(f"layer {self.name}: choosing among its inputs needs calibration data")
        w, h = self.weight.double(), self.gram_out
        return pivoted_nystrom(self.gram_in, w if h is None else psd_root(h)[0] @ w)

    def error(self, approximation: Tensor) -> float:
        """Predicted loss of putting a dense `approximation` (out, in) in the weight's place."""
        return self.unit * max(
            float(weighted_error(self.weight.double() - approximation.double(), self.gram_in, self.gram_out)), 0.0
        )

    def corrected_bias(self, approximation: Tensor) -> Tensor | None:
        """The bias that keeps the mean output, ``b + (W - A) mean``, where the weighting counts on it."""
        rule = WEIGHTINGS[self.weighting].bias
        if self.embedding or rule == "kept" or (self.bias is None and (rule == "corrected" or self.grams is None)):
            return self.bias
        shift = (self.weight.double() - approximation.double()) @ self.mean.to(self.weight.device)
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return (bias.double() + shift).to(bias.dtype)

    def release(self) -> None:
        """Forget what is cached; it is computed again when asked."""
        for name in ("spectrum", "pivots", "gram_in", "gram_out"):
            self.__dict__.pop(name, None)
        self._views.clear()


# Weightings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """Which two Grams measure an error D of a weight: ``tr(G_out D G_in D^T)``.

    Attributes:
        formula: of the two, for people.
        gram_in, gram_out: made from a layer.
        bias: "kept" as it is, "corrected" by the mean of the error where there is one, or "added" where there is none.
        needs: what must have been collected: "nothing", "inputs" or "gradients".
    """

    formula: str
    gram_in: Callable[[Layer], Tensor | None]
    gram_out: Callable[[Layer], Tensor | None]
    bias: str = "kept"
    needs: str = "inputs"


def _seen(layer: Layer, embedding: bool = False) -> LayerGrams:
    """The Grams of the layer, which must be there."""
    if layer.grams is None:
        raise GramianError(f"layer {layer.name}: weighting {layer.weighting!r} needs calibration data; give some")
    if layer.embedding and not embedding:
        raise GramianError(
            f"layer {layer.name}: weighting {layer.weighting!r} is for linear layers; expected 'none', 'input' or "
            "'two-sided' for an embedding"
        )
    return layer.grams


def _identity(layer: Layer) -> Tensor | None:
    return None


def _two_sided_in(layer: Layer) -> Tensor | None:
    if isinstance(layer.grams, EmbeddingGrams):
        return layer.grams.gram_gradient()
    # The mean of the error goes into the bias where there is one.
    return None if layer.grams is None else layer.grams.gram_in(centred=layer.bias is not None)


def _two_sided_out(layer: Layer) -> Tensor | None:
    if isinstance(layer.grams, EmbeddingGrams):
        return layer.grams.frequencies()
    return None if layer.grams is None else layer.grams.gram_out()


def _moment(layer: Layer) -> Tensor | None:
    grams = _seen(layer, embedding=True)
    return None if layer.embedding else grams.input.moment()


def _frequencies(layer: Layer) -> Tensor | None:
    """Of an embedding's rows: its inputs' Gram."""
    grams = _seen(layer, embedding=True)
    return grams.frequencies() if isinstance(grams, EmbeddingGrams) else None


def _squares(layer: Layer) -> Tensor:
    return _seen(layer).input.moment().diagonal()


def _fisher_rows(layer: Layer) -> Tensor:
    grams = _seen(layer)
    if grams.gradient is None:
        raise GramianError(
            f"layer {layer.name}: weighting {layer.weighting!r} needs gradients; collect with objective 'features' or 'lm'"
        )
    return grams.gradient.diagonal() / max(grams.sequences, 1)


WEIGHTINGS: dict[str, Weighting] = {
    "none": Weighting("G_in = I, G_out = I", _identity, _identity, needs="nothing"),
    "diagonal": Weighting("G_in = diag(E x_j^2), G_out = I", _squares, _identity),
    "root-diagonal": Weighting("G_in = diag((E x_j^2)^(1/2)), G_out = I", lambda x: _squares(x).sqrt(), _identity),
    "input": Weighting("G_in = E x x^T, G_out = I", _moment, _frequencies),
    "centred": Weighting(
        "G_in = Cov(x), G_out = I, b + (W - A) E x", lambda x: _seen(x).input.covariance(), _identity, "added"
    ),
    "fisher-rows": Weighting(
        "G_in = I, G_out = diag(sum_j E (dL/dW_ij)^2)", _identity, _fisher_rows, needs="gradients"
    ),
    "fisher-rows-columns": Weighting(
        "G_in = diag(Var x_j), G_out = diag(sum_j E (dL/dW_ij)^2)",
        lambda x: _seen(x).input.covariance().diagonal(),
        _fisher_rows,
        needs="gradients",
    ),
    "two-sided": Weighting(
        "G_in = Cov(x), G_out = E D D^T / tr Cov(x), D = dL/dW of a sequence",
        _two_sided_in,
        _two_sided_out,
        "corrected",
        "nothing",
    ),
}
"""By name. Only "two-sided" Grams are slightly shrunk (they compete across layers); the papers' own are as collected.

"fisher-rows-columns" takes ``E (dL/dW_ij)^2`` as a product of row and column weights, its Kronecker factorisation."""


def resolve_weighting(name: str) -> Weighting:
    """The weighting of that name.

    Raises:
        GramianError: unknown name; the message lists the nearest ones.
    """
    if name not in WEIGHTINGS:
        raise GramianError(f"unknown weighting {name!r}{nearest(name, WEIGHTINGS)}; known: {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name]
