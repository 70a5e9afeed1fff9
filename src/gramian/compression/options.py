"""What can be done to a layer, or to a few layers together: for each size its cost and its predicted loss.

A *method* has a ``curve`` (candidates of many sizes) and a ``build`` (one of them, made). Methods for a single layer wrap a
structure of ``gramian.ops``; joint methods span layers. They all speak the same unit of error, so they compete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gramian.compression.layer import Layer
from gramian.errors import GramianError
from gramian.execution import choose
from gramian.fitting import fit
from gramian.linalg import interpolation, psd_solve, reduced_rank
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


def single_curve(layer: Layer, kind: str, cost: str) -> list[Candidate]:
    """Candidates of one structure for one layer, dense left out."""
    if kind == "skeleton":
        return _skeleton_curve(layer)
    if kind == "quantized":
        return _quantized_curve(layer) if cost == "bytes" else []
    cls = structures()[kind]
    out = []
    seen: set[str] = set()
    for keep in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        for size in cls.sizes(layer.shape, keep):
            if repr(size) in seen:
                continue
            seen.add(repr(size))
            made = fit(layer.weight, kind, gram_in=layer.gram_in, gram_out=layer.gram_out, sweeps=1, **size)
            out.append(Candidate(kind, size, op_cost(made.op, layer), layer.unit * made.error))
    return out


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


def rounding_energy(layer: Layer) -> float:
    """``sum_j D_j * sum_i H_ii mean_j W_ij^2``: multiplied by a grid's constant it predicts the error of rounding with
    feedback, D the diagonal of the LDL factorisation of the damped input Gram (QuIP, Chee et al. 2023, theorem 1).
    """
    from gramian.ops.quantized import DAMPING

    rows = layer.weight.double().square().mean(1)
    h = layer.gram_out
    weighted = float((rows if h is None else rows * (h if h.dim() == 1 else h.diagonal())).sum())
    g = layer.gram_in
    if g is None:
        return weighted * layer.shape[1]
    g = g + DAMPING * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    # Rounding each column in turn given the later ones leaves its conditional variance: 1 / (L_jj)^2 of inv = L L^T.
    factor = torch.linalg.cholesky(g.flip(0, 1))
    return weighted * float(factor.diagonal().square().sum())


def _quantized_curve(layer: Layer) -> list[Candidate]:
    energy = rounding_energy(layer) * layer.unit
    out, in_ = layer.shape
    return [
        Candidate(
            "quantized",
            {"bits": bits},
            Cost(out * in_, Quantized.bytes_for(layer.shape, bits), 2 * out * in_),
            energy * grid_error("gaussian", bits),
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
    if "skeleton" in methods or "block_low_rank" in methods:
        for rank in range(max(1, width // 48), width, max(1, width // 48)):
            n = rank * (rows + width)
            if n < rows * width:
                lookup = Cost(n, n * layer.weight.element_size(), 2 * rank * width)
                out.append(("block_low_rank", {"rank": rank, "blocks": [1, 1]}, lookup))
    if "quantized" in methods and cost == "bytes":
        spread = Quantized.fit(layer.weight[:1], bits=8)  # one row shows the rotation's cost
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


def _build_embedding(layer: Layer, kind: str, size: Mapping[str, Any]) -> Built:
    weight = layer.weight
    if kind == "block_low_rank" and tuple(size.get("blocks", (1, 1))) == (1, 1):
        rank = int(size["rank"])
        if not 1 <= rank <= min(layer.shape):
            raise GramianError(f"layer {layer.name}: rank {rank}; expected 1 to {min(layer.shape)}")
        best = layer.spectrum
        pair = BlockLowRank.low_rank(best.left[:, :rank], best.right[:rank])
        # The right factor of the optimum carries an inverse root of the gradients' Gram: balanced, both factors are of the
        # size of the table's entries, whatever the unit of the gradients.
        op: Operator = pair.balanced.to(dtype=weight.dtype)
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


def _spread(gains: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Take dimensions of several heads in the order of their gains: (which head, summed gains so far)."""
    flat = torch.cat(list(gains))
    owner = torch.cat([torch.full((len(g),), i) for i, g in enumerate(gains)])
    order = flat.argsort(descending=True, stable=True)
    return owner[order], torch.cat([flat.new_zeros(1), flat[order].cumsum(0)])


@dataclass
class QueryKey:
    """Fewer dimensions a head for the scores ``q^T k`` (MoDeGPT type II, without rotary embedding: the optimum by SVD).

    For a head, ``q^T A k`` with A of rank t replaces ``q^T k``; ``tr(S_q (I - A) S_k (I - A)^T)`` is least for the
    two-sided truncation of I under the second moment S_q of the queries and the covariance S_k of the keys (what all keys
    share drops out of the softmax). The rest of the head is stored as nothing: its coordinates are zero.
    """

    query: Layer
    key: Layer
    heads: int
    _parts: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def _solve(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per head: left (d, d), right (d, d), errors (d + 1,) in units of predicted loss."""
        if self._parts is not None:
            return self._parts
        q, k = self.query, self.key
        assert q.grams is not None
        assert k.grams is not None
        moment, mean = q.grams.input.moment(), q.mean
        covariance = k.grams.gram_in(centred=True)
        w_q, w_k = q.weight.double(), k.weight.double()
        b_q = torch.zeros(len(w_q), dtype=torch.float64) if q.bias is None else q.bias.double()
        cross = torch.outer(w_q @ mean, b_q)
        second_q = w_q @ moment @ w_q.mT + cross + cross.mT + torch.outer(b_q, b_q)
        second_k = w_k @ covariance @ w_k.mT
        width = len(w_q) // self.heads
        self._parts = []
        for head in range(self.heads):
            span = slice(head * width, (head + 1) * width)
            s_q, s_k = second_q[span, span], second_k[span, span]
            best = reduced_rank(torch.eye(width, dtype=torch.float64), s_k, s_q)
            if q.gram_out is not None and k.gram_out is not None:
                # What a unit of score error costs, seen from either side; the two agree if the scores' curvature is even.
                from_q = torch.trace(q.gram_out[span, span]) / torch.trace(s_k).clamp_min(1e-300)
                from_k = torch.trace(k.gram_out[span, span]) / torch.trace(s_q).clamp_min(1e-300)
                scale = 0.5 * float((from_q * from_k).sqrt())
            else:
                scale = 2.0 / self.heads / max(float(best.errors[0]), 1e-300)
            self._parts.append((best.left, best.right, best.errors * scale))
        return self._parts

    def curve(self, cost: str) -> list[Candidate]:
        """Total dimensions over all heads, in steps of the head count."""
        parts = self._solve()
        _, saved = _spread([-errors.diff() for _, _, errors in parts])
        lost = float(sum(errors[0] for _, _, errors in parts)) - saved
        return _head_curve("query_key", self.query, self.key, lost, self.heads)

    def build(self, size: Mapping[str, Any]) -> Built:
        """Row-sparse query and key."""
        parts = self._solve()
        owner, _ = _spread([-errors.diff() for _, _, errors in parts])
        ranks, rows = _head_ranks(owner, int(size["dimensions"]), self.heads, len(parts[0][0]))
        lefts = [left[:, :r].mT for (left, _, _), r in zip(parts, ranks, strict=True)]
        rights = [right[:r] for (_, right, _), r in zip(parts, ranks, strict=True)]
        made = Built({})
        for layer, blocks in ((self.query, lefts), (self.key, rights)):
            turn = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
            made.layers[layer.name] = _rows(turn, layer, rows)
        lost = sum(float(errors[r]) for (_, _, errors), r in zip(parts, ranks, strict=True))
        made.error = {self.query.name: lost, self.key.name: 0.0}
        return made


@dataclass
class ValueOutput:
    """Fewer dimensions a head between value and output (MoDeGPT type III), by the output layer's two-sided optimum.

    Attention rows sum to one, so what a head hands on is linear in its values: for a head with reader ``W_o,h`` the best
    rank-t ``W_o,h A`` under the covariance of what the output layer reads and the output Gram is ``linalg.reduced_rank``;
    its right factor moves into the value layer. Heads share one budget; at the end the reader is refitted to all at once.
    """

    value: Layer
    output: Layer
    heads: int
    _parts: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def _solve(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        if self._parts is not None:
            return self._parts
        o = self.output
        assert o.gram_in is not None
        width = o.shape[1] // self.heads
        self._parts = []
        for head in range(self.heads):
            span = slice(head * width, (head + 1) * width)
            best = reduced_rank(o.weight[:, span], o.gram_in[span, span], o.gram_out)
            # Both layers shrink for the one loss.
            self._parts.append((best.left, best.right, best.errors * o.unit))
        return self._parts

    def curve(self, cost: str) -> list[Candidate]:
        """Total dimensions over all heads, in steps of the head count."""
        parts = self._solve()
        _, saved = _spread([-errors.diff() for _, _, errors in parts])
        lost = float(sum(errors[0] for _, _, errors in parts)) - saved
        return _head_curve("value_output", self.value, self.output, lost, self.heads)

    def build(self, size: Mapping[str, Any]) -> Built:
        """Row-sparse value, column-sparse output."""
        parts = self._solve()
        owner, _ = _spread([-errors.diff() for _, _, errors in parts])
        width = self.output.shape[1] // self.heads
        ranks, rows = _head_ranks(owner, int(size["dimensions"]), self.heads, width)
        turn = torch.block_diag(*(right[:r] for (_, right, _), r in zip(parts, ranks, strict=True)))  # type: ignore[no-untyped-call]
        g = self.output.gram_in
        assert g is not None
        seen = turn @ g
        reader = psd_solve(seen @ turn.mT, seen @ self.output.weight.double().mT).mT
        effective = reader @ turn
        index = rows.to(torch.int32)
        op = Product((Dense(reader.to(self.output.weight)), Selection(index, self.output.shape[1])))
        return Built(
            {
                self.value.name: _rows(turn, self.value, rows),
                self.output.name: (op, self.output.corrected_bias(effective)),
            },
            {self.value.name: 0.0, self.output.name: self.output.error(effective)},
        )


def _head_curve(kind: str, first: Layer, second: Layer, lost: Tensor, heads: int) -> list[Candidate]:
    item = first.weight.element_size()
    inner = first.shape[1] + (second.shape[1] if kind == "query_key" else second.shape[0])
    out = []
    for k in range(heads, first.shape[0], heads):
        runs = partial(_unfilled_heads, kind, first, second, k)
        cost = Cost(k * (inner + 2), k * (inner * item + 8), 2 * k * inner, runs)
        out.append(Candidate(kind, {"dimensions": k}, cost, max(float(lost[k]), 0.0)))
    return out


def _unfilled_heads(kind: str, first: Layer, second: Layer, k: int) -> list[Operator]:
    dtype, index = first.weight.dtype, torch.empty(k, dtype=torch.int32, device="meta")

    def written(layer: Layer) -> Operator:
        return Product((Selection(index, layer.shape[0], scatter=True), unfilled(k, layer.shape[1], dtype)))

    if kind == "query_key":
        return [written(first), written(second)]
    read = Product((unfilled(second.shape[0], k, dtype), Selection(index, second.shape[1])))
    return [written(first), read]


def _head_ranks(owner: Tensor, total: int, heads: int, width: int) -> tuple[list[int], Tensor]:
    """Rank of each head, and the coordinates (total,) that stay in use: the first of each head."""
    if not 1 <= total <= heads * width:
        raise GramianError(f"dimensions {total}; expected 1 to {heads * width}")
    ranks = torch.bincount(owner[:total], minlength=heads).tolist()
    rows = torch.cat([torch.arange(r) + head * width for head, r in enumerate(ranks)])
    return ranks, rows


def _rows(turn: Tensor, layer: Layer, rows: Tensor) -> tuple[Operator, Tensor | None]:
    """``turn W`` (k, in) written to the given output coordinates; all others are zero."""
    inner = Dense((turn @ layer.weight.double()).to(layer.weight))
    op = Product((Selection(rows.to(torch.int32), layer.shape[0], scatter=True), inner))
    if layer.bias is None:
        return op, None
    bias = torch.zeros_like(layer.bias)
    bias[rows] = (turn @ layer.bias.double()).to(layer.bias)
    return op, bias


JOINT: dict[str, Callable[..., Any]] = {
    "neurons": lambda layers, heads: Neurons(list(layers[:-1]), layers[-1]),
    "query_key": lambda layers, heads: QueryKey(layers[0], layers[1], heads),
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
