"""What can be done to a layer, or to a few layers together: for each size its cost and its predicted loss.

A *method* has a ``curve`` (candidates of many sizes) and a ``build`` (one of them, made). Methods for a single layer wrap a
structure of ``gramian.ops``; joint methods span layers. They all speak the same unit of error, so they compete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.compression.layer import Layer
from gramian.errors import GramianError
from gramian.execution import choose
from gramian.fitting import fit
from gramian.linalg import interpolation, psd_root, psd_solve, reduced_rank
from gramian.nn.structured_embedding import lookup_flops
from gramian.ops import BlockLowRank, Dense, Operator, Product, Quantized, Selection, Skeleton, structures
from gramian.ops.operator import Size
from gramian.ops.quantized import grid_error

COSTS = ("params", "bytes", "flops", "latency")
LATENCY_ROWS = 512
"""Rows (tokens) at once for which a budget of latency counts run time."""


@dataclass(frozen=True)
class Cost:
    """Exact counts of one candidate: stored numbers, stored bytes, floating-point operations a token; and what runs."""

    params: int
    bytes: int
    flops: int
    runs: Callable[[], Sequence[Operator]] = field(default=lambda: (), compare=False, repr=False)

    def __add__(self, other: Cost) -> Cost:
        both = (self.runs, other.runs)
        return Cost(
            self.params + other.params,
            self.bytes + other.bytes,
            self.flops + other.flops,
            lambda: [op for runs in both for op in runs()],
        )

    def of(self, kind: str) -> int:
        """The count of that name; "latency": predicted nanoseconds for `LATENCY_ROWS` rows, each product in its fastest
        form.

        Raises:
            GramianError: latency on a machine that was not calibrated.
        """
        if kind == "latency":
            return sum(nanoseconds(op) for op in self.runs())
        return int(getattr(self, kind))


_NANOSECONDS: dict[str, int] = {}


def nanoseconds(op: Operator) -> int:
    """Predicted run time of ``op`` on `LATENCY_ROWS` rows, by the calibration of this machine; shapes decide alone.

    Raises:
        GramianError: there is no calibration.
    """
    key = f"{op.config()} {op.dtype}"
    if key not in _NANOSECONDS:
        seconds = choose(op.to("meta"), LATENCY_ROWS)[1]
        if math.isnan(seconds):
            raise GramianError("cost latency: this machine is not calibrated; run gramian bench --calibrate first")
        _NANOSECONDS[key] = round(seconds * 1e9)
    return _NANOSECONDS[key]


def unfilled(out: int, in_: int, dtype: torch.dtype) -> Dense:
    """A dense matrix without numbers: its shape stands for its run time."""
    return Dense(torch.empty(out, in_, dtype=dtype, device="meta"))


def check_measurable(cost: str) -> None:
    """Raise where `cost` cannot be counted on this machine.

    Raises:
        GramianError: latency without a calibration.
    """
    if cost == "latency":
        nanoseconds(unfilled(1, 1, torch.float32))


@dataclass(frozen=True)
class Candidate:
    """A structure at a size.

    Attributes:
        structure: name of the method.
        size: its keyword arguments; JSON-able.
        cost: exact.
        error: predicted loss increase.
    """

    structure: str
    size: Size
    cost: Cost
    error: float


@dataclass
class Built:
    """What a method made.

    Attributes:
        layers: per layer name its operator and bias.
        error: predicted loss of what was really built, by layer name (rounding and refits included).
    """

    layers: dict[str, tuple[Operator, Tensor | None]]
    error: dict[str, float] = field(default_factory=dict)


def dense_cost(layer: Layer) -> Cost:
    """What the layer costs as it is; a look-up takes no arithmetic."""
    n = layer.weight.numel()
    if layer.embedding:
        return Cost(n, n * layer.weight.element_size(), 0)
    return Cost(n, n * layer.weight.element_size(), 2 * n, lambda: (unfilled(*layer.shape, layer.weight.dtype),))


def op_cost(op: Operator, layer: Layer) -> Cost:
    """What `op` costs in the place of `layer`."""
    if layer.embedding:
        return Cost(op.numel, op.nbytes, lookup_flops(op))
    return Cost(op.numel, op.nbytes, op.flops(), lambda: (op,))


# One layer ---------------------------------------------------------------------------------------------------------


KEEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of a layer's numbers at which structures that take a fit each are tried."""


def single_curve(
    layer: Layer, kind: str, cost: str, keeps: Sequence[float] = KEEPS, fixed: Mapping[str, Any] | None = None
) -> list[Candidate]:
    """Candidates of one structure for one layer, dense left out.

    Args:
        layer: under the weighting that counts.
        kind: a structure, or one of `SPECIAL`.
        cost: what is counted.
        keeps: shares of the layer's numbers (of its bytes, for "low_rank_quantized") to try.
        fixed: entries that every size gets.
    """
    if kind == "skeleton":
        return _skeleton_curve(layer)
    if kind == "low_rank":
        return _low_rank_curve(layer)
    if kind == "quantized":
        return _quantized_curve(layer, **(fixed or {})) if cost == "bytes" else []
    if kind == "low_rank_quantized":
        return _low_rank_quantized_curve(layer, keeps) if cost == "bytes" else []
    structure, sizes = ("block_low_rank", monarch_sizes) if kind == "monarch" else (kind, structures()[kind].sizes)
    out = []
    seen: set[str] = set()
    for keep in keeps:
        for size in sizes(layer.shape, keep):
            if repr(size) in seen:
                continue
            seen.add(repr(size))
            made = fit(layer.weight, structure, gram_in=layer.gram_in, gram_out=layer.gram_out, sweeps=1, **size)
            out.append(Candidate(structure, size, op_cost(made.op, layer), layer.unit * made.error))
    return out


SPECIAL = {
    "low_rank": "factor pairs of every rank, r (m + n) numbers (structure block_low_rank of one block)",
    "monarch": "Monarch matrices, about sqrt(n) blocks of any rank (structure block_low_rank with strided rows)",
}
"""Families inside a structure that can be named like one."""


def monarch_sizes(shape: tuple[int, int], keep: float) -> list[Size]:
    """Monarch matrices of at most ``keep * out * in`` numbers: b x b blocks for powers of two b around the square root of
    the smaller side, the largest rank that fits (Dao et al. 2022; rank 1 and b the square root is the paper's own).
    """
    out, in_ = shape
    middle = round(math.log2(max(math.sqrt(min(shape)), 1)))
    found: list[Size] = []
    for b in sorted({2**power for power in range(max(middle - 2, 1), middle + 2) if 2**power <= min(shape)}):
        s, p = -(-out // b), -(-in_ // b)
        rank = min(int(keep * out * in_ / (b * b * (s + p))), s, p)
        if rank >= 1:
            found.append({"rank": rank, "blocks": [b, b], "strided_rows": True})
    return found


def _low_rank_curve(layer: Layer) -> list[Candidate]:
    (out, in_), item = layer.shape, layer.weight.element_size()
    errors = layer.spectrum.errors * layer.unit
    candidates = []
    for rank in range(1, min(out, in_)):
        numbers = rank * (out + in_)
        if numbers >= out * in_:
            break
        cost = Cost(numbers, numbers * item, 2 * numbers, partial(_unfilled_pair, layer, rank))
        size: Size = {"rank": rank, "blocks": [1, 1]}
        candidates.append(Candidate("block_low_rank", size, cost, float(errors[rank])))
    return candidates


def _low_rank_quantized_curve(layer: Layer, keeps: Sequence[float]) -> list[Candidate]:
    """For every number of bits, the rank that fills the bytes left; the error is predicted as that of rounding what the
    best low-rank matrix leaves over.
    """
    (out, in_), item = layer.shape, layer.weight.element_size()
    best = layer.spectrum
    found: dict[str, Candidate] = {}
    for keep in keeps:
        for bits in range(2, 9):
            stored = Quantized.bytes_for(layer.shape, bits)
            rank = min(int((keep * out * in_ * item - stored) / ((out + in_) * item)), *layer.shape)
            if rank < 1:
                break
            size: Size = {"rank": rank, "bits": bits}
            if repr(size) in found:
                continue
            rest = layer.weight.double() - best.left[:, :rank] @ best.right[:rank]
            error = rounding_energy(layer, rest) * layer.unit * grid_error("gaussian", bits)
            numbers = rank * (out + in_)
            cost = Cost(out * in_ + numbers, stored + numbers * item, 2 * (out * in_ + numbers))
            found[repr(size)] = Candidate("low_rank_quantized", size, cost, error)
    return list(found.values())


def _skeleton_curve(layer: Layer) -> list[Candidate]:
    out, in_ = layer.shape
    item = layer.weight.element_size()
    errors = layer.spectrum.errors * layer.unit
    candidates = []
    for rank in range(1, min(out, in_)):
        numbers = Skeleton.count(layer.shape, rank)
        if numbers >= out * in_:
            break
        pair = partial(_unfilled_pair, layer, rank)
        cost = Cost(numbers, (numbers - out) * item + 4 * out, 2 * rank * (out + in_), pair)
        candidates.append(Candidate("skeleton", {"rank": rank}, cost, float(errors[rank])))
    return candidates


def _unfilled_pair(layer: Layer, rank: int) -> tuple[Operator]:
    left, right = (
        unfilled(*shape, layer.weight.dtype).weight for shape in ((layer.shape[0], rank), (rank, layer.shape[1]))
    )
    return (BlockLowRank.low_rank(left, right),)


def rounding_energy(layer: Layer, weight: Tensor | None = None) -> float:
    """``sum_j D_j * sum_i H_ii mean_j W_ij^2``: multiplied by a grid's constant it predicts the error of rounding with
    feedback, D the diagonal of the LDL factorisation of the damped input Gram (QuIP, Chee et al. 2023, theorem 1).
    Another `weight` may be rounded in the layer's place.
    """
    from gramian.ops.quantized import DAMPING

    rows = (layer.weight if weight is None else weight).double().square().mean(1)
    h = layer.gram_out
    weighted = float((rows if h is None else rows * (h if h.dim() == 1 else h.diagonal())).sum())
    g = layer.gram_in
    if g is None:
        return weighted * layer.shape[1]
    if g.dim() == 1:
        return weighted * float(g.sum())
    g = g + DAMPING * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    # Rounding each column in turn given the later ones leaves its conditional variance: 1 / (L_jj)^2 of inv = L L^T.
    factor = torch.linalg.cholesky(g.flip(0, 1))
    return weighted * float(factor.diagonal().square().sum())


def _quantized_curve(
    layer: Layer, rotate: bool = True, rounds: int = 1, grid: str = "gaussian", **fixed: Any
) -> list[Candidate]:
    energy = rounding_energy(layer) * layer.unit
    out, in_ = layer.shape
    return [
        Candidate(
            "quantized",
            {"bits": bits},
            Cost(out * in_, Quantized.bytes_for(layer.shape, bits, rounds=rounds if rotate else 0), 2 * out * in_),
            energy * grid_error(grid, bits),
        )
        for bits in range(8, 1, -1)
    ]


def build_single(layer: Layer, kind: str, size: Mapping[str, Any]) -> Built:
    """Make one structure for one layer, and move the error's mean into the bias."""
    if kind == "dense":
        return Built({layer.name: (Dense(layer.weight.clone()), layer.bias)}, {layer.name: 0.0})
    if layer.embedding:
        return _build_embedding(layer, kind, size)
    if kind == "skeleton":
        best, rank = layer.spectrum, int(size["rank"])
        if not 1 <= rank <= min(layer.shape):
            raise GramianError(f"layer {layer.name}: skeleton of rank {rank}; expected 1 to {min(layer.shape)}")
        op: Operator = Skeleton.from_pair(best.left[:, :rank], best.right[:rank]).to(dtype=layer.weight.dtype)
    elif kind == "block_low_rank" and _is_low_rank(size):
        op = _pair(layer, int(size["rank"]))
    else:
        try:
            op = fit(layer.weight, kind, gram_in=layer.gram_in, gram_out=layer.gram_out, **size).op
        except (GramianError, TypeError) as error:
            raise GramianError(f"layer {layer.name}: {error}") from None
    dense = op.dense()
    return Built({layer.name: (op, layer.corrected_bias(dense))}, {layer.name: layer.error(dense)})


# Embeddings --------------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 4096
"""Rows of an embedding that are rounded together: rounding takes a dozen times their memory in float64."""


def embedding_sizes(layer: Layer, methods: Sequence[str], cost: str) -> list[tuple[str, Size, Cost]]:
    """What an embedding may become, dense first, with costs.

    A factor pair stands for both low-rank structures (the identity gauge saves r^2 of r (rows + width) numbers: nothing
    for a table of many rows). A look-up takes no arithmetic, so a budget of FLOPs leaves the table as it is.
    """
    rows, width = layer.shape
    out: list[tuple[str, Size, Cost]] = [("dense", {}, dense_cost(layer))]
    if cost in ("flops", "latency"):
        return out
    if {"skeleton", "low_rank", "block_low_rank"} & set(methods):
        for rank in range(max(1, width // 48), width, max(1, width // 48)):
            n = rank * (rows + width)
            if n < rows * width:
                lookup = Cost(n, n * layer.weight.element_size(), 2 * rank * width)
                out.append(("block_low_rank", {"rank": rank, "blocks": [1, 1]}, lookup))
    if "quantized" in methods and cost == "bytes":
        row = torch.ones(1, width, dtype=layer.weight.dtype)  # any row shows the rotation's cost
        spread = Quantized.fit(row, bits=8)
        for bits in range(8, 1, -1):
            stored = Cost(rows * width, Quantized.bytes_for(layer.shape, bits), lookup_flops(spread))
            out.append(("quantized", {"bits": bits}, stored))
    return out


def embedding_curve(layer: Layer, methods: Sequence[str], cost: str) -> list[Candidate]:
    """Candidates for an embedding, dense among them."""
    sizes = embedding_sizes(layer, methods, cost)
    kinds = {kind for kind, _, _ in sizes}
    energy = rounding_energy(layer) * layer.unit if "quantized" in kinds else 0.0
    errors = layer.spectrum.errors * layer.unit if "block_low_rank" in kinds else None
    out = []
    for kind, size, price in sizes:
        error = 0.0
        if kind == "quantized":
            error = energy * grid_error("gaussian", size["bits"])
        elif kind == "block_low_rank" and errors is not None:
            error = float(errors[size["rank"]])
        out.append(Candidate(kind, size, price, error))
    return out


def _is_low_rank(size: Mapping[str, Any]) -> bool:
    return tuple(size.get("blocks", (1, 1))) == (1, 1)


def _pair(layer: Layer, rank: int) -> Operator:
    """The best factor pair of that rank, balanced: the right factor of the optimum may carry an inverse root of a Gram,
    whatever its unit; balanced, both factors are of the size of the weight's entries, as storage and training like it.
    """
    if not 1 <= rank <= min(layer.shape):
        raise GramianError(f"layer {layer.name}: rank {rank}; expected 1 to {min(layer.shape)}")
    best = layer.spectrum
    pair = BlockLowRank.low_rank(best.left[:, :rank], best.right[:rank])
    return pair.balanced.to(dtype=layer.weight.dtype)


def _build_embedding(layer: Layer, kind: str, size: Mapping[str, Any]) -> Built:
    weight = layer.weight
    if kind == "block_low_rank" and _is_low_rank(size):
        op = _pair(layer, int(size["rank"]))
    elif kind == "quantized":
        # Feedback alone: of tens of thousands of rows most are rare, and each further pass costs as much as the first.
        parts = [
            Quantized.fit(weight[i : i + ROWS_AT_ONCE], gram_in=layer.gram_in, bits=int(size["bits"]), passes=0)
            for i in range(0, len(weight), ROWS_AT_ONCE)
        ]
        op = parts[0].replace(
            codes=torch.cat([part.codes for part in parts]), scales=torch.cat([part.scales for part in parts])
        )
    else:
        raise GramianError(f"layer {layer.name}: an embedding cannot be {kind}; expected block_low_rank or quantized")
    return Built({layer.name: (op, None)}, {layer.name: layer.error(op.dense())})


# Several layers ----------------------------------------------------------------------------------------------------


@dataclass
class Neurons:
    """Keep some neurons of a two-layer network and refit what reads them (MoDeGPT type I, Lin et al. 2024; selection by
    greedy pivots that minimise the true objective instead of leverage scores).

    ``h = act(W_up x)`` (or a gated product), ``y = W_down h``. The non-linearity forbids anything but choosing
    coordinates J of h; ``W_down' = W_down C[:, J] C[J, J]^+`` then is the best reader, with error
    ``tr(H W_down S_J W_down^T)``, S_J the Schur complement of h's covariance C.

    Attributes:
        ups: the layers that write the neurons.
        down: the layer that reads them.
    """

    ups: list[Layer]
    down: Layer
    step: int = 16

    def curve(self, cost: str) -> list[Candidate]:
        """Widths in steps; for a byte budget also widths whose layers are rounded."""
        _, errors = self.down.pivots
        layers = [*self.ups, self.down]
        width = self.down.shape[1]
        item = self.down.weight.element_size()
        per_neuron = sum(up.shape[1] for up in self.ups) + self.down.shape[0]
        out = []
        for k in range(self.step, width, self.step):
            n = k * per_neuron
            cost_here = Cost(n, n * item, 2 * n, partial(self._unfilled, k))
            out.append(Candidate("neurons", {"width": k}, cost_here, float(errors[k]) * self.down.unit))
        if cost == "bytes":
            energy = sum(rounding_energy(layer) * layer.unit for layer in layers)
            for k in range(4 * self.step, width, 4 * self.step):
                n = k * per_neuron
                for bits in range(3, 9):
                    stored = sum(Quantized.bytes_for((k, up.shape[1]), bits) for up in self.ups)
                    stored += Quantized.bytes_for((self.down.shape[0], k), bits)
                    error = float(errors[k]) * self.down.unit + energy * k / width * grid_error("gaussian", bits)
                    out.append(Candidate("neurons", {"width": k, "bits": bits}, Cost(n, stored, 2 * n), error))
        return out

    def _unfilled(self, width: int) -> list[Operator]:
        dtype = self.down.weight.dtype
        ups = [unfilled(width, up.shape[1], dtype) for up in self.ups]
        return [*ups, unfilled(self.down.shape[0], width, dtype)]

    def build(self, size: Mapping[str, Any]) -> Built:
        """The narrower layers."""
        order, _ = self.down.pivots
        width = int(size["width"])
        if not 1 <= width <= self.down.shape[1]:
            raise GramianError(f"layer {self.down.name}: width {width}; expected 1 to {self.down.shape[1]}")
        kept = order[:width].sort().values
        g = self.down.gram_in
        assert g is not None
        reader = (self.down.weight.double() @ interpolation(g, kept)).to(self.down.weight.dtype)
        effective = torch.zeros_like(self.down.weight)
        effective[:, kept] = reader
        made = Built({})
        bits = size.get("bits")
        for up in self.ups:
            bias = None if up.bias is None else up.bias[kept].clone()
            narrow: Operator = Dense(up.weight[kept].clone())
            made.error[up.name] = 0.0
            if bits:
                h = up.gram_out
                part = Layer(up.name, up.weight[kept], bias)
                part.__dict__.update(gram_in=up.gram_in, gram_out=None if h is None else h[kept][:, kept])
                part.__dict__["unit"] = up.unit
                part.grams = up.grams
                rounded = build_single(part, "quantized", {"bits": int(bits)})
                narrow, bias = rounded.layers[up.name]
                made.error[up.name] = rounded.error[up.name]
            made.layers[up.name] = (narrow, bias)
        op: Operator = Dense(reader)
        if bits:
            op = Quantized.fit(reader, gram_in=g[kept][:, kept], bits=int(bits))
            effective[:, kept] = op.dense().to(effective)
        made.layers[self.down.name] = (op, self.down.corrected_bias(effective))
        made.error[self.down.name] = self.down.error(effective)
        return made


def _outputs_moment(layer: Layer, *, centred: bool = False) -> Tensor:
    """(out, out) second moment of what the layer writes, bias included, or the covariance."""
    assert layer.grams is not None
    w = layer.weight.double()
    if centred:
        return w @ layer.grams.gram_in(centred=True) @ w.mT
    second = w @ layer.grams.input.moment() @ w.mT
    if layer.bias is None:
        return second
    bias = layer.bias.double()
    cross = torch.outer(w @ layer.mean, bias)
    return second + cross + cross.mT + torch.outer(bias, bias)


@dataclass(frozen=True)
class Part:
    """How one key and value head shrinks.

    Attributes:
        first, second: (width, width): the first r rows are what the first and the second layer keep of the head.
        errors: (width + 1,) what is lost with r of them, in units of predicted loss.
    """

    first: Tensor
    second: Tensor
    errors: Tensor


@dataclass
class _Heads:
    """Layers of one attention, whose heads share one budget of dimensions.

    With grouped queries, ``heads / (key and value heads)`` consecutive query heads read one key and value head; what is
    done to that head's dimensions is done in all layers of its group.

    Attributes:
        first, second: (query, key) or (value, output).
        heads: query heads.
    """

    first: Layer
    second: Layer
    heads: int
    _parts: list[Part] | None = field(default=None, init=False)

    kind: ClassVar[str]
    step: ClassVar[int] = 1

    @property
    def wide(self) -> int:
        """Coordinates of all query heads together."""
        raise NotImplementedError

    @property
    def narrow(self) -> Layer:
        """The key or value layer."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Coordinates of a head."""
        return self.wide // self.heads

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.narrow.shape[0] // self.width

    @property
    def queries(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // self.groups

    def spans(self, group: int) -> list[slice]:
        """Where the query heads of a group are."""
        first = group * self.queries
        return [slice(h * self.width, (h + 1) * self.width) for h in range(first, first + self.queries)]

    def parts(self) -> list[Part]:
        """Per key and value head what its first r dimensions are and lose."""
        if self._parts is None:
            self._parts = [self._part(group) for group in range(self.groups)]
        return self._parts

    def _part(self, group: int) -> Part:
        raise NotImplementedError

    def curve(self, cost: str) -> list[Candidate]:
        """Total dimensions over all key and value heads, in steps of their number."""
        counts = F.one_hot(self._order(), self.groups).cumsum(0) * self.step
        lost = sum(part.errors[counts[:, group]] for group, part in enumerate(self.parts()))
        assert isinstance(lost, Tensor)
        item = self.first.weight.element_size()
        read = self.queries * (self.first.shape[1] if self.second is self.narrow else self.second.shape[0])
        inner, layers = self.narrow.shape[1] + read, 1 + self.queries
        out = []
        for k in range(self.groups * self.step, self.groups * self.width, self.groups * self.step):
            cost_here = Cost(
                k * (inner + layers), k * (inner * item + 4 * layers), 2 * k * inner, partial(self._unfilled, k)
            )
            error = max(float(lost[k // self.step - 1]), 0.0)
            out.append(Candidate(self.kind, {"dimensions": k}, cost_here, error))
        return out

    def _unfilled(self, k: int) -> list[Operator]:
        raise NotImplementedError

    def _written(self, layer: Layer, k: int) -> Operator:
        index = torch.empty(k, dtype=torch.int32, device="meta")
        inner = unfilled(k, layer.shape[1], layer.weight.dtype)
        return Product((Selection(index, layer.shape[0], scatter=True), inner))

    def _order(self) -> Tensor:
        """Whose dimension is worth most, and next: key and value heads, one a step."""
        gains = torch.stack([-part.errors[:: self.step].diff() for part in self.parts()])
        return gains.flatten().argsort(descending=True, stable=True) // gains.shape[1]

    def _ranks(self, total: int) -> list[int]:
        """Dimensions of each key and value head.

        Raises:
            GramianError: out of range.
        """
        most = self.groups * self.width
        if not self.step <= total <= most or total % self.step:
            every = f", in steps of {self.step}" if self.step > 1 else ""
            raise GramianError(f"layer {self.first.name}: dimensions {total}; expected {self.step} to {most}{every}")
        counts: list[int] = torch.bincount(self._order()[: total // self.step], minlength=self.groups).tolist()
        return [count * self.step for count in counts]


@dataclass
class QueryKey(_Heads):
    """Fewer dimensions a head for the scores ``q^T k`` (MoDeGPT type II, without rotary embedding: the optimum by SVD).

    For a head, ``q^T A k`` with A of rank t replaces ``q^T k``; ``tr(S_q (I - A) S_k (I - A)^T)`` is least for the
    two-sided truncation of I under the second moment S_q of the queries (summed over the heads that share the key) and the
    covariance S_k of the keys (what all keys share drops out of the softmax). The rest of the head is stored as nothing: its
    coordinates are zero.
    """

    kind = "query_key"

    @property
    def wide(self) -> int:
        return self.first.shape[0]

    @property
    def narrow(self) -> Layer:
        return self.second

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return _outputs_moment(self.first), _outputs_moment(self.second, centred=True)

    def _part(self, group: int) -> Part:
        second_q, second_k = self._moments
        own = slice(group * self.width, (group + 1) * self.width)
        s_q = torch.stack([second_q[span, span] for span in self.spans(group)]).sum(0)
        s_k = second_k[own, own]
        best = reduced_rank(torch.eye(self.width, dtype=torch.float64), s_k, s_q)
        h_q, h_k = self.first.gram_out, self.second.gram_out
        if h_q is not None and h_k is not None:
            # What a unit of score error costs, seen from either side; the two agree if the scores' curvature is even.
            from_q = sum(torch.trace(h_q[span, span]) for span in self.spans(group)) / self.queries
            from_q = from_q / torch.trace(s_k).clamp_min(1e-300)
            from_k = torch.trace(h_k[own, own]) / torch.trace(s_q).clamp_min(1e-300)
            scale = 0.5 * float((from_q * from_k).sqrt())
        else:
            scale = 2.0 / self.groups / max(float(best.errors[0]), 1e-300)
        return Part(best.left.mT, best.right, best.errors * scale)

    def _unfilled(self, k: int) -> list[Operator]:
        return [self._written(self.first, k * self.queries), self._written(self.second, k)]

    def build(self, size: Mapping[str, Any]) -> Built:
        """Row-sparse query and key."""
        parts, ranks = self.parts(), self._ranks(int(size["dimensions"]))
        made = Built({})
        for layer, copies, which in ((self.first, self.queries, "first"), (self.second, 1, "second")):
            blocks = [getattr(part, which)[:r] for part, r in zip(parts, ranks, strict=True) for _ in range(copies)]
            made.layers[layer.name] = _rows(blocks, layer, self._places(ranks, copies))
        lost = sum(float(part.errors[r]) for part, r in zip(parts, ranks, strict=True))
        made.error = {self.first.name: lost, self.second.name: 0.0}
        return made

    def _places(self, ranks: Sequence[int], copies: int) -> Tensor:
        """The coordinates that stay in use: the first of each head."""
        return _first_of_each([r for r in ranks for _ in range(copies)], self.width)


@dataclass
class RotaryPairs(QueryKey):
    """Fewer dimensions a head for scores under rotary embedding, which mixes coordinates pair by pair and forbids all but
    choosing among the pairs (the CR decomposition of MoDeGPT type II, Lin et al. 2024).

    The score is a sum over pairs, so leaving a pair out of the queries, out of the keys or out of both is the same. What
    it costs is predicted from the queries' side and from the keys' side: for rows P of a layer
    ``1/2 sum_ij in P H_ij S_ij`` with the Gram H of their gradients and the second moment S of their values. Pairs go
    one by one, whichever costs least beside those already gone, where the paper scores each pair alone by norms.

    Pairs are (i, i + width / 2), as in Llama.
    """

    kind = "rotary_halves"
    step = 2

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return _outputs_moment(self.first), _outputs_moment(self.second)

    def pairs(self) -> Tensor:
        """(width / 2, 2) coordinates of a head that turn together."""
        return torch.arange(self.width).view(2, -1).mT

    def _part(self, group: int) -> Part:
        pairs = self.pairs()
        own = slice(group * self.width, (group + 1) * self.width)
        whole = slice(self.spans(group)[0].start, self.spans(group)[-1].stop)
        second_q, second_k = self._moments
        sides = []
        for layer, span, second in ((self.first, whole, second_q), (self.second, own, second_k)):
            h = layer.gram_out
            product = second[span, span] * (torch.eye(len(second), dtype=torch.float64) if h is None else h)[span, span]
            # Rows of the same pair together, over the query heads of the group.
            together = product.view(-1, self.width, len(product) // self.width, self.width).sum((0, 2))
            sides.append(together[pairs][:, :, pairs].sum((1, 3)))
        if self.first.gram_out is None:  # norms alone, as the paper has it
            diagonal = torch.stack([side.diagonal() for side in sides]).prod(0)
            cost = torch.diag(2.0 / self.groups * diagonal / diagonal.sum().clamp_min(1e-300))
        else:
            cost = 0.25 * (sides[0] + sides[1])
        left, lost = list(range(len(pairs))), [0.0]
        gone: list[int] = []
        while left:
            increase = [float(cost[p, p] + 2 * cost[p, gone].sum()) for p in left]
            least = min(range(len(left)), key=increase.__getitem__)
            lost.append(max(lost[-1] + increase[least], lost[-1]))
            gone.append(left.pop(least))
        kept = pairs[torch.tensor(gone[::-1])].reshape(-1)
        errors = torch.tensor(lost[::-1], dtype=torch.float64).repeat_interleave(2)[:-1]
        turn = torch.eye(self.width, dtype=torch.float64)[kept]
        return Part(turn, turn, errors)

    def _places(self, ranks: Sequence[int], copies: int) -> Tensor:
        kept = [part.first[:r].argmax(1) for part, r in zip(self.parts(), ranks, strict=True) for _ in range(copies)]
        return torch.cat([rows + head * self.width for head, rows in enumerate(kept)])


class RotaryNeighbours(RotaryPairs):
    """The same for pairs (2i, 2i + 1), as in GPT-J."""

    kind = "rotary_neighbours"

    def pairs(self) -> Tensor:
        return torch.arange(self.width).view(-1, 2)


@dataclass
class ValueOutput(_Heads):
    """Fewer dimensions a head between value and output (MoDeGPT type III), by the output layer's two-sided optimum.

    Attention rows sum to one, so what a head hands on is linear in its values: for a value head with the stacked readers
    ``W_o,h`` of its query heads the best rank-t ``W_o,h A`` under the mean second moment of what those read and the output
    Gram is ``linalg.reduced_rank``; its right factor moves into the value layer. Heads share one budget; at the end the
    reader is refitted to all at once.
    """

    kind = "value_output"

    @property
    def wide(self) -> int:
        return self.second.shape[1]

    @property
    def narrow(self) -> Layer:
        return self.first

    def _part(self, group: int) -> Part:
        o = self.second
        g, h = o.gram_in, o.gram_out
        assert g is not None
        spans = self.spans(group)
        seen = torch.stack([g[span, span] for span in spans]).mean(0)
        readers = [o.weight[:, span].double() for span in spans]
        stacked = torch.stack([w.mT @ (w if h is None else h @ w) for w in readers]).sum(0)
        # The stack counts through its (width, width) Gram alone. Both layers shrink for the one loss.
        best = reduced_rank(psd_root(stacked)[0], seen)
        return Part(best.right, best.left.mT, best.errors * o.unit)

    def _unfilled(self, k: int) -> list[Operator]:
        o, rows = self.second, k * self.queries
        index = torch.empty(rows, dtype=torch.int32, device="meta")
        read = Product((unfilled(o.shape[0], rows, o.weight.dtype), Selection(index, o.shape[1])))
        return [self._written(self.first, k), read]

    def build(self, size: Mapping[str, Any]) -> Built:
        """Row-sparse value, column-sparse output."""
        parts, ranks = self.parts(), self._ranks(int(size["dimensions"]))
        own = [part.first[:r] for part, r in zip(parts, ranks, strict=True)]
        turn = torch.block_diag(*(block for block in own for _ in range(self.queries)))  # type: ignore[no-untyped-call]
        o = self.second
        g = o.gram_in
        assert g is not None
        seen = turn @ g
        reader = psd_solve(seen @ turn.mT, seen @ o.weight.double().mT).mT
        effective = reader @ turn
        index = _first_of_each([r for r in ranks for _ in range(self.queries)], self.width).to(torch.int32)
        op = Product((Dense(reader.to(o.weight)), Selection(index, o.shape[1])))
        return Built(
            {
                self.first.name: _rows(own, self.first, _first_of_each(ranks, self.width)),
                o.name: (op, o.corrected_bias(effective)),
            },
            {self.first.name: 0.0, o.name: o.error(effective)},
        )


def _first_of_each(ranks: Sequence[int], width: int) -> Tensor:
    """The first coordinates of each head."""
    return torch.cat([torch.arange(r) + head * width for head, r in enumerate(ranks)])


def _rows(blocks: Sequence[Tensor], layer: Layer, rows: Tensor) -> tuple[Operator, Tensor | None]:
    """``turn W`` (k, in), the turn block-diagonal, written to the given output coordinates; all others are zero."""
    turn = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    rows, order = rows.sort()
    inner = Dense((turn @ layer.weight.double())[order].to(layer.weight))
    op = Product((Selection(rows.to(torch.int32), layer.shape[0], scatter=True), inner))
    if layer.bias is None:
        return op, None
    bias = torch.zeros_like(layer.bias)
    bias[rows] = (turn @ layer.bias.double())[order].to(layer.bias)
    return op, bias


JOINT: dict[str, Callable[..., Any]] = {
    "neurons": lambda layers, heads: Neurons(list(layers[:-1]), layers[-1]),
    "query_key": lambda layers, heads: QueryKey(layers[0], layers[1], heads),
    "rotary_halves": lambda layers, heads: RotaryPairs(layers[0], layers[1], heads),
    "rotary_neighbours": lambda layers, heads: RotaryNeighbours(layers[0], layers[1], heads),
    "value_output": lambda layers, heads: ValueOutput(layers[0], layers[1], heads),
}
"""Joint methods by kind: (layers, heads) -> an object with ``curve`` and ``build``."""

__all__ = [
    "COSTS",
    "JOINT",
    "Built",
    "Candidate",
    "Cost",
    "build_single",
    "dense_cost",
    "embedding_curve",
    "embedding_sizes",
    "op_cost",
    "single_curve",
]
