"""Input and output-gradient Grams of many layers in one pass over the data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.grams.gram import Gram, shrink
from gramian.modes import evaluating

OUTPUT_DAMPING = 1e-2
"""Shrinkage of the output-gradient Gram: a few hundred sequences do not show every output direction."""
INPUT_DAMPING = 1e-3
"""Shrinkage of the input Gram."""
UNSEEN = 0.1
"""Occurrences that every row of an embedding is granted on top of those counted."""
ROUNDING = 1e-7
"""Of float32 products, relative to the trace of the second moment."""


@dataclass
class LayerGrams:
    """What was seen of one layer.

    Attributes:
        input: Gram of the inputs, one sample a token; layers fed by the same tensor share one object.
        gradient: sum over sequences of ``D D^T`` (out, out), D the gradient of the objective with respect to the weight
            (inputs centred); None without a backward pass.
        sequences: how many sequences went into `gradient`.
        centre: (in,) the mean that the gradient's inputs were centred by.
        site: name of the first layer that reads the same input.
    """

    input: Gram
    gradient: Tensor | None = None
    sequences: int = 0
    centre: Tensor | None = None
    site: str = ""

    @property
    def tokens(self) -> int:
        """Real tokens seen; padding is not counted."""
        return round(self.input.count)

    def gram_in(self, centred: bool = True, damping: float = INPUT_DAMPING) -> Tensor:
        """G_in (in, in): the inputs' covariance (a bias absorbs their mean) or second moment, slightly shrunk.

        Where the mean outweighs the spread, the covariance is a difference of large numbers; what float32 products may have
        rounded is added to the diagonal, so that the result is positive definite.
        """
        gram = shrink(self.input.covariance() if centred else self.input.moment(), damping)
        noise = ROUNDING * float(self.input.moment().diagonal().sum())
        return gram + noise * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)

    def gram_out(self, damping: float = OUTPUT_DAMPING) -> Tensor | None:
        """G_out (out, out), such that ``1/2 tr(G_out D G_in D^T)`` predicts the rise of the objective.

        With L = E[D D^T] over sequences and C the input covariance, ``E[vec D vec D^T] ~ L (x) C / tr(C)``: the
        Kronecker-factored curvature with the coherence of the tokens of one sequence kept (the factor L is Shampoo's
        left one, Gupta et al. 2018). None without a backward pass.
        """
        if self.gradient is None:
            return None
        energy = float(torch.trace(self.input.covariance()))
        left = self.gradient / max(self.sequences, 1) / max(energy, 1e-300)
        return shrink((left + left.mT) / 2, damping)


@dataclass
class EmbeddingGrams(LayerGrams):
    """What was seen of an embedding (rows, width): a linear layer on one-hot inputs.

    Attributes:
        input: Gram of the one-hot inputs, which is diagonal: how often each row was looked up.
        gradient: sum over real tokens of ``g g^T`` (width, width), g the gradient of the objective with respect to the
            embedding's output; None without a backward pass.
    """

    def gram_in(self, centred: bool = True, damping: float = INPUT_DAMPING) -> Tensor:
        """Not for an embedding, whose rows are weighed by ``frequencies``."""
        raise GramianError("the inputs of an embedding are one-hot: ask for frequencies(), not gram_in()")

    def gram_out(self, damping: float = OUTPUT_DAMPING) -> Tensor | None:
        """Not for an embedding, whose rows share ``gram_gradient``."""
        raise GramianError(
            "an embedding has one Gram of gradients for all rows: ask for gram_gradient(), not gram_out()"
        )

    def frequencies(self, unseen: float = UNSEEN) -> Tensor:
        """(rows,) expected look-ups of each row in a sequence.

        Counts of a sample understate words that it did not happen to show: with none at all a row's error would be free,
        and use would pay for it. Each row is granted `unseen` occurrences more (Lidstone's rule), at the same total.
        """
        counts = self.input.second + unseen
        return counts * (self.input.count / float(counts.sum()) / max(self.sequences, 1))

    def gram_gradient(self, damping: float = OUTPUT_DAMPING) -> Tensor | None:
        """G_g = E[g g^T] (width, width) over tokens, such that ``1/2 sum_v frequency_v D_v G_g D_v^T`` predicts the rise of
        the objective when row v changes by D_v; what two tokens of a sequence share is left out. None without a backward
        pass.
        """
        if self.gradient is None:
            return None
        moment = self.gradient / max(self.input.count, 1.0)
        return shrink((moment + moment.mT) / 2, damping)


@dataclass(frozen=True)
class Joint:
    """Layers that can be compressed together.

    Attributes:
        kind: "neurons" (layers[:-1] write the neurons that layers[-1] reads, coordinate by coordinate); "query_key",
            "rotary_halves" or "rotary_neighbours" (layers (query, key) of one attention); "value_output" (layers (value,
            output)).
        layers: names.
        heads: query heads; 0 for neurons. Shapes tell how many key and value heads they share.
    """

    kind: str
    layers: tuple[str, ...]
    heads: int = 0


@dataclass
class Grams:
    """The Grams of a model's layers, by layer name; additive over shards.

    Attributes:
        layers: by name.
        joints: layers of this model that can be compressed together.
    """

    layers: dict[str, LayerGrams] = field(default_factory=dict)
    joints: list[Joint] = field(default_factory=list)

    def __getitem__(self, name: str) -> LayerGrams:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def __repr__(self) -> str:
        gradients = "with" if any(layer.gradient is not None for layer in self.layers.values()) else "without"
        tokens = max((layer.tokens for layer in self.layers.values()), default=0)
        return f"Grams({len(self)} layers, {tokens} tokens, {gradients} gradients, {len(self.joints)} joints)"

    def merge(self, other: Grams) -> Grams:
        """Add the sums of another shard, collected with the same centres (``collect_layers(centres=...)``).

        Raises:
            GramianError: other layers, or gradients centred differently.
        """
        if set(self.layers) != set(other.layers):
            raise GramianError("Grams.merge: the shards hold different layers; collect both from the same model")
        merged: set[int] = set()
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            if id(mine.input) not in merged:
                mine.input.merge(theirs.input)
                merged.add(id(mine.input))
            if (mine.gradient is None) != (theirs.gradient is None):
                raise GramianError(f"Grams.merge: {name} has gradients in one shard only")
            mine.sequences += theirs.sequences
            if mine.gradient is not None and theirs.gradient is not None:
                if mine.centre is not None and (theirs.centre is None or not torch.equal(mine.centre, theirs.centre)):
                    raise GramianError(
                        f"Grams.merge: {name} was centred differently in the two shards; pass one shard's "
                        "centres() to the other's collect"
                    )
                mine.gradient += theirs.gradient
        return self

    def centres(self) -> dict[str, Tensor]:
        """The means that gradients were centred by, for collecting further shards."""
        return {name: layer.centre for name, layer in self.layers.items() if layer.centre is not None}

    def state(self) -> dict[str, Tensor]:
        """Plain tensors; a shared input Gram is stored once."""
        out: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if layer.site == name:
                out.update({f"{name}|input.{key}": value for key, value in layer.input.state().items()})
            if layer.gradient is not None:
                out[f"{name}|gradient"] = layer.gradient
            if layer.centre is not None:
                out[f"{name}|centre"] = layer.centre
        return out

    def describe(self) -> dict[str, Any]:
        """The JSON-able rest of ``state``."""
        return {
            "layers": {name: {"site": layer.site, "sequences": layer.sequences} for name, layer in self.layers.items()},
            "joints": [asdict(joint) for joint in self.joints],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> Grams:
        """Inverse of ``state`` and ``describe``."""
        inputs: dict[str, Gram] = {}
        layers: dict[str, LayerGrams] = {}
        for name, entry in description["layers"].items():
            site = entry["site"]
            if site not in inputs:
                parts = {key: state[f"{site}|input.{key}"] for key in ("second", "first", "count")}
                inputs[site] = Gram.from_state(parts)
            kind = EmbeddingGrams if inputs[site].kind == "diagonal" else LayerGrams
            layers[name] = kind(
                inputs[site], state.get(f"{name}|gradient"), entry["sequences"], state.get(f"{name}|centre"), site
            )
        return cls(layers, [Joint(j["kind"], tuple(j["layers"]), j["heads"]) for j in description["joints"]])


Batch = Any
Objective = Callable[[nn.Module, Batch, torch.Generator], Tensor]
"""(model, batch, generator) -> scalar whose gradient per sequence is one random probe of the loss's curvature."""


def collect_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    run: Callable[[nn.Module, Batch], Any],
    objective: Objective | None = None,
    mask: Callable[[Batch], Tensor | None] = lambda batch: None,
    seed: int = 0,
    places: Iterable[int] | None = None,
    centres: Mapping[str, Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Grams:
    """One pass over `batches`: the input Gram of every layer, and its output-gradient Gram if there is an objective.

    A tensor that several layers read in a row (query, key and value, say) is accumulated once. Memory is the Grams
    plus the activations of one batch.

    Args:
        model: put in eval mode for the pass; the training flag of each of its modules is restored.
        layers: linear layers and embeddings of `model` by name.
        batches: whatever `run` understands.
        run: forward pass, used when there is no objective.
        objective: see ``Objective``; None collects inputs only, without a backward pass.
        mask: (batch, tokens) of a batch, non-zero at real tokens; None for no padding.
        seed: of the objective's random probes, which depend on it and on a batch's place alone.
        places: of these batches among all, where they are a share of more; 0, 1, ... by default.
        centres: means to centre the gradients' inputs by; by default those of the first batch.
        progress: called after each batch with the number of sequences so far (of batches, without an objective).

    Raises:
        GramianError: no data; NaN or Inf in a layer's input or gradient (the layer is named); a layer that never ran.
    """
    grams = Grams()
    generator = torch.Generator()
    state = _Pass(layers, grams, objective is not None, dict(centres or {}))
    tables = {name: module for name, module in layers.items() if isinstance(module, nn.Embedding)}
    linears = {name: module for name, module in layers.items() if name not in tables}
    handles = [module.register_forward_pre_hook(state.before(name)) for name, module in linears.items()]
    handles += [module.register_forward_hook(state.looked_up(name)) for name, module in tables.items()]
    if objective is not None:
        handles += [module.register_forward_hook(state.after(name)) for name, module in linears.items()]
    seen = 0
    try:
        with evaluating(model), _frozen(model) if objective is not None else torch.no_grad():
            for place, batch in zip(itertools.count() if places is None else places, batches, strict=False):
                generator.manual_seed(seed * 104729 + place)
                state.mask = mask(batch)
                state.previous = None
                if objective is None:
                    run(model, batch)
                else:
                    objective(model, batch, generator).backward()  # type: ignore[no-untyped-call]
                state.finish_batch()
                seen += 1
                if progress is not None:
                    progress(state.sequences)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise GramianError("no calibration data: the iterator of batches was empty")
    silent = [name for name in layers if name not in grams.layers]
    if silent:
        raise GramianError(f"layer {silent[0]} never ran on the calibration data; leave it out with exclude")
    grams.layers = {name: grams.layers[name] for name in layers}
    return grams


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in autograd: the backward pass computes activations' gradients alone."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


class _Pass:
    """The hooks' shared state during one pass."""

    def __init__(
        self, layers: Mapping[str, nn.Module], grams: Grams, backward: bool, centres: dict[str, Tensor]
    ) -> None:
        self.layers, self.grams, self.backward, self.centres = layers, grams, backward, centres
        self.mask: Tensor | None = None
        self.previous: tuple[Tensor, int, str] | None = None
        self.inputs: dict[str, Tensor] = {}
        self.tables: set[str] = set()
        self.sequences = 0

    def before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            site = name
            # Written to in between, it is another input.
            version = 0 if x.is_inference() else x._version
            if self.previous is not None and self.previous[0] is x and self.previous[1] == version:
                site = self.previous[2]
            self.previous = (x, version, site)
            known = self.grams.layers.get(name)
            if known is None:
                size = x.shape[-1]
                shared = self.grams.layers[site].input if site != name else Gram(size, device=x.device)
                known = self.grams.layers[name] = LayerGrams(shared, site=site)
            elif known.site != site:
                raise GramianError(
                    f"layer {name} read the input of {known.site} in one batch and not in another; "
                    "collect such a model in parts"
                )
            if site == name:
                try:
                    known.input.update(self._tokens(x))
                except GramianError as error:
                    raise GramianError(f"layer {name}: {error}") from None
            if not self.backward:
                return None
            self.inputs[name] = x.detach()
            return (x if x.requires_grad else x.detach().requires_grad_(), *args[1:])

        return hook

    def after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = self.inputs.pop(name)
            output.register_hook(lambda gradient: self._gradient(name, x, gradient))  # type: ignore[no-untyped-call]

        return hook

    def looked_up(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            ids = args[0]
            mask = self.mask if self.mask is not None and self.mask.numel() == ids.numel() else None
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.reshape(ids.shape).bool()
            if module.padding_idx is not None:  # padding also where there is no mask
                real = real & (ids != module.padding_idx)
            layer = self.grams.layers.get(name)
            if layer is None:
                counter = Gram(module.num_embeddings, "diagonal", ids.device)
                layer = self.grams.layers[name] = EmbeddingGrams(counter, site=name)
            counts = torch.bincount(ids[real], minlength=module.num_embeddings).double()
            layer.input.add(counts, counts, float(counts.sum()))
            if name not in self.tables:  # a table used twice in a pass still saw each sequence once
                self.tables.add(name)
                layer.sequences += len(ids if mask is None else mask)
            if not self.backward:
                return None
            # The model may change what it is given in place, which the leaf of the graph does not allow.
            leaf = output.detach().requires_grad_()
            leaf.register_hook(lambda gradient: self._row_gradient(name, real, gradient))  # type: ignore[no-untyped-call]
            return leaf.clone()

        return hook

    def _row_gradient(self, name: str, real: Tensor, gradient: Tensor) -> None:
        layer = self.grams.layers[name]
        if not bool(gradient.isfinite().all()):
            raise GramianError(f"layer {name}: NaN or Inf in the gradient of its output; try a wider dtype")
        g = gradient[real].float()
        if layer.gradient is None:
            layer.gradient = torch.zeros(g.shape[-1], g.shape[-1], dtype=torch.float64, device=g.device)
        with torch.autocast(g.device.type, enabled=False):
            layer.gradient += g.mT @ g

    def _tokens(self, x: Tensor) -> Tensor:
        """(n, d): the real tokens of x (..., d)."""
        mask = self.mask
        if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
            return x.detach()[mask.bool()]
        if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
            return x.detach()[mask.reshape(-1).bool()]
        return x.detach().reshape(-1, x.shape[-1])

    def _gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        layer = self.grams.layers[name]
        if not bool(gradient.isfinite().all()):
            raise GramianError(f"layer {name}: NaN or Inf in the gradient of its output; try a wider dtype")
        if layer.centre is None:
            layer.centre = self.centres.get(name, layer.input.mean)
        if x.dim() == 2:  # one token a sequence, or flattened (batch * tokens, d)
            batch = self.mask.shape[0] if self.mask is not None and x.shape[0] == self.mask.numel() else len(x)
            x, gradient = x.reshape(batch, -1, x.shape[-1]), gradient.reshape(batch, -1, gradient.shape[-1])
        x = x.reshape(len(x), -1, x.shape[-1]).float() - layer.centre.to(x.device, torch.float32)
        g = gradient.reshape(len(gradient), -1, gradient.shape[-1]).float()
        if self.mask is not None and x.shape[:2] == self.mask.shape:
            g = g * self.mask.to(g)[:, :, None]
        if layer.gradient is None:
            layer.gradient = torch.zeros(g.shape[-1], g.shape[-1], dtype=torch.float64, device=g.device)
        layer.gradient += _outer(g, x)
        layer.sequences += len(x)

    def finish_batch(self) -> None:
        self.previous = None
        self.inputs.clear()
        self.tables.clear()
        counts = [layer.sequences for layer in self.grams.layers.values()]
        self.sequences = max(counts, default=0) if self.backward else self.sequences + 1


def _outer(g: Tensor, x: Tensor) -> Tensor:
    """Sum over sequences of ``D D^T`` (m, m) for ``D = g^T x``; g (B, T, m), x (B, T, n). Takes the cheaper bracketing."""
    with torch.autocast(g.device.type, enabled=False):
        return _outer_in_full(g, x)


def _outer_in_full(g: Tensor, x: Tensor) -> Tensor:
    (b, t, m), n = g.shape, x.shape[-1]
    if t * (n + m) + m * m < m * n + m * m * n / t:
        inner = (x @ x.mT) @ g  # (B, T, m)
        return g.reshape(b * t, m).mT @ inner.reshape(b * t, m)
    d = g.mT @ x  # (B, m, n)
    d = d.transpose(0, 1).reshape(m, b * n)
    return d @ d.mT
