"""A small language model: a stack of any sequence mixers with structured feed-forwards, its trainer and its tokenizer.

h = h + mixer(norm(h));  h = h + feed_forward(norm(h))        in every layer, then a norm and the head
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.files import atomic_directory
from gramian.modes import evaluating
from gramian.nn import parameter_groups, structured
from gramian.nn.training import warm_up_cosine
from gramian.sequence.inputs import MixerState
from gramian.sequence.mixer import SequenceMixer
from gramian.sequence.recipes import mixer
from gramian.sequence.recipes import structured as structured_projections

if TYPE_CHECKING:
    from tokenizers import Tokenizer

State = tuple[MixerState, ...]
"""One state a layer; of a size that does not depend on how many tokens were seen."""
Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Step -> inputs and targets, both (batch, time); targets below 0 do not count."""
WEIGHTS, DESCRIPTION, TOKENIZER = "model.safetensors", "sequence.json", "tokenizer.json"
SCHEMA = 1


@dataclass(frozen=True)
class ModelConfig:
    """What a ``SequenceModel`` is made of; JSON-able.

    Args:
        vocabulary: tokens.
        dim: width.
        mixers: one a layer: a recipe's name, or its name and options. The option "linear" may be a dictionary with the
            "kind" and sizes of a structure for all projections.
        hidden: width inside the feed-forward; None for 8/3 of `dim`, rounded up to a multiple of 16.
        structure: of the feed-forward's matrices, any kind of operator, with its sizes: ``{"kind": "monarch"}``.
        tied: whether the embedding is the head too.
    """

    vocabulary: int
    dim: int
    mixers: tuple[str | tuple[str, dict[str, Any]], ...]
    hidden: int | None = None
    structure: dict[str, Any] = field(default_factory=lambda: {"kind": "dense"})
    tied: bool = True

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or self.dim < 1 or not self.mixers:
            raise GramianError(
                f"ModelConfig: vocabulary {self.vocabulary}, dim {self.dim}, {len(self.mixers)} mixers; expected at least "
                "one of each"
            )
        if "kind" not in self.structure:
            raise GramianError(
                f"ModelConfig: structure {self.structure}; expected its 'kind', e.g. {{'kind': 'dense'}}"
            )


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with matrices of one structure (Shazeer 2020, "GLU variants improve Transformer").

    Args:
        dim: of x.
        hidden: between.
        kind: of the operators.
        size: of the structure.
    """

    def __init__(self, dim: int, hidden: int, kind: str = "dense", **size: Any) -> None:
        super().__init__()
        self.gate = structured(dim, hidden, kind, bias=False, **size)
        self.up = structured(dim, hidden, kind, bias=False, **size)
        self.down = structured(hidden, dim, kind, bias=False, **size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim) -> the same shape."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Layer(nn.Module):
    """A mixer and a feed-forward, each after a norm and added to what came in.

    Args:
        dim: width.
        mixer: over time.
        feed_forward: over channels.
    """

    def __init__(self, dim: int, mixer: SequenceMixer, feed_forward: nn.Module) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(dim), mixer
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(dim), feed_forward

    def forward(
        self, x: Tensor, state: MixerState | None, mask: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        """x: (batch, time, dim); see ``SequenceMixer``."""
        y, state = self.mixer(self.mixer_norm(x), state, mask, segments)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), state


class SequenceModel(nn.Module):
    """Logits of the next token from a recurrence: training runs whole sequences, generation keeps a state of fixed size.

    Args:
        config: sizes and recipes.
        mixers: modules to use in place of the recipes (then ``save`` is refused if they are not what the config says).

    Raises:
        GramianError: an unknown recipe or structure, or a module count that does not fit.
    """

    def __init__(self, config: ModelConfig, mixers: Sequence[SequenceMixer] | None = None) -> None:
        super().__init__()
        if mixers is not None and len(mixers) != len(config.mixers):
            raise GramianError(f"SequenceModel: {len(mixers)} mixers; expected {len(config.mixers)}, one a layer")
        self.config = config
        self.own_mixers = mixers is not None
        dim = config.dim
        hidden = config.hidden or -(-dim * 8 // 48) * 16
        self.embedding = nn.Embedding(config.vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)  # logits of a tied head start at variance one
        made = mixers or [_mixer(spec, dim) for spec in config.mixers]
        self.layers = nn.ModuleList(Layer(dim, m, FeedForward(dim, hidden, **config.structure)) for m in made)
        self.norm = nn.RMSNorm(dim)
        self.head = None if config.tied else nn.Linear(dim, config.vocabulary, bias=False)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits of what follows each token.

        Args:
            tokens: (batch, time) of integers.
            state: of the tokens before; None at the start.
            mask: (batch, time) of bool, False at padding.
            segments: (batch, time), for several texts packed in a row.

        Returns:
            (batch, time, vocabulary), and the state after the last token.

        Raises:
            GramianError: tokens of another shape, or a state of another model.
        """
        if tokens.dim() != 2:
            raise GramianError(f"SequenceModel: tokens {tuple(tokens.shape)}; expected (batch, time)")
        if state is not None and len(state) != len(self.layers):
            raise GramianError(f"SequenceModel: a state of {len(state)} layers; expected {len(self.layers)}")
        x, states = self.embedding(tokens), []
        for i, layer in enumerate(self.layers):
            x, carried = layer(x, None if state is None else state[i], mask, segments)
            states.append(carried)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x), tuple(states)

    def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token a row. tokens: (batch,) -> logits (batch, vocabulary) and the state."""
        logits, state = self(tokens[:, None], state)
        return logits[:, 0], state

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        top: int | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `prompt`, token by token, in memory that does not grow with the length.

        Args:
            prompt: (batch, time), at least one token.
            count: tokens to add.
            temperature: of the softmax; 0 takes the most probable token.
            top: draw from so many most probable tokens only.
            stop: a row that has given this token goes on with it; all rows done ends early.
            generator: of the draws.

        Returns:
            (batch, at most count) of the new tokens.
        """
        if count < 0 or temperature < 0 or (top is not None and top < 1):
            raise GramianError(
                f"generate: count {count}, temperature {temperature}, top {top}; expected count and temperature >= 0, "
                "top >= 1"
            )
        with evaluating(self):
            logits, state = self(prompt)
            logits, made = logits[:, -1], []
            done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
            for i in range(count):
                token = _draw(logits, temperature, top, generator)
                if stop is not None:
                    token = torch.where(done, stop, token)
                    done = done | (token == stop)
                made.append(token)
                if i + 1 == count or bool(done.all()):
                    break
                logits, state = self.step(token, state)
        return torch.stack(made, 1) if made else prompt[:, :0]

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        """Write weights (safetensors), the config (JSON) and the tokenizer, all or nothing.

        Raises:
            GramianError: the mixers were given as modules, or `directory` is in use.
        """
        if self.own_mixers:
            raise GramianError("SequenceModel.save: mixers were given as modules; name them as recipes in the config")
        with atomic_directory(directory) as partial:
            weights = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
            save_file(weights, partial / WEIGHTS)
            description = {"schema": SCHEMA, **dataclasses.asdict(self.config)}
            (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(str(partial / TOKENIZER))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> SequenceModel:
        """What ``save`` wrote, in evaluation mode.

        Raises:
            GramianError: a file is missing or damaged, or of a later version.
        """
        folder = Path(directory)
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if description.pop("schema") != SCHEMA:
                raise GramianError(f"{folder}: written by a later version of gramian; update it")
            layers = (spec if isinstance(spec, str) else (spec[0], spec[1]) for spec in description.pop("mixers"))
            model = cls(ModelConfig(mixers=tuple(layers), **description))
            model.load_state_dict(load_file(folder / WEIGHTS))
        except GramianError:
            raise
        except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise GramianError(f"{folder}: not a saved SequenceModel: {error}") from error
        return model.eval()


def _mixer(spec: str | tuple[str, dict[str, Any]], dim: int) -> SequenceMixer:
    name, options = (spec, {}) if isinstance(spec, str) else (spec[0], dict(spec[1]))
    if isinstance(options.get("linear"), Mapping):
        options["linear"] = structured_projections(**options["linear"])
    return mixer(name, dim, **options)


def _draw(logits: Tensor, temperature: float, top: int | None, generator: torch.Generator | None) -> Tensor:
    """One token a row, (batch,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top is not None and top < logits.shape[-1]:
        least = logits.topk(top).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


# Training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where a training stands after a step.

    Args:
        step: counted from 1.
        loss: mean cross-entropy of the batch, in nats a token.
        rate: learning rate of the step.
        logits: (batch, time, vocabulary), before the step.
        targets: (batch, time).
    """

    step: int
    loss: float
    rate: float
    logits: Tensor
    targets: Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not below 0, in nats. (batch, time, vocabulary) and (batch, time) -> ()."""
    wanted = targets.flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.masked_fill(wanted < 0, -100))  # -100: not counted


def train(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    rate: float = 1e-3,
    parameters: list[dict[str, Any]] | None = None,
    warm_up: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    progress: Callable[[Progress], bool | None] | None = None,
) -> list[float]:
    """AdamW with linear warm-up, then a cosine to zero; gradients are clipped. Same seeds, same result.

    Args:
        model: trained in place; a ``SequenceModel``, or any that gives logits, or a tuple or mapping that begins with them.
        batches: from ``text_batches``, or any function of the step.
        steps: of the optimiser.
        rate: largest learning rate.
        parameters: groups for the optimiser, each with its largest "lr", for training a part of the model (an adapter's
            ``parameter_groups``); by default all, structured layers with rates of their own
            (``gramian.nn.parameter_groups``).
        warm_up: share of the steps.
        weight_decay: of AdamW, decoupled.
        clip: largest norm of the gradient.
        progress: called after each step; True ends the training.

    Returns:
        The loss of every step.

    Raises:
        GramianError: the loss is no longer finite.
    """
    groups = parameter_groups(model, rate) if parameters is None else parameters
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    rising = max(1, round(warm_up * steps))
    peaks = [group["lr"] for group in optimiser.param_groups]
    losses: list[float] = []
    model.train()
    for step in range(steps):
        factor = warm_up_cosine(step, steps, rising)
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = factor * peak
        inputs, targets = batches(step)
        given = model(inputs)
        logits = given if isinstance(given, Tensor) else given[0]
        loss = cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise GramianError(f"train: the loss of step {step + 1} is {losses[-1]}; lower the rate ({rate:g})")
        if progress is not None and progress(Progress(step + 1, losses[-1], factor * rate, logits.detach(), targets)):
            break
    model.eval()
    return losses


def text_batches(tokens: Tensor, batch: int, length: int, *, seed: int = 0) -> Batches:
    """Pieces of a text at random places, each with the token that follows every one of its tokens.

    Args:
        tokens: (count,) of integers.
        batch: pieces a step.
        length: tokens a piece.
        seed: of the places; the batch of a step does not depend on other steps.

    Raises:
        GramianError: the text is too short.
    """
    if tokens.dim() != 1 or len(tokens) <= length:
        raise GramianError(f"text_batches: tokens {tuple(tokens.shape)}; expected one axis of more than {length}")

    def batches(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
        pieces = tokens[starts + torch.arange(length + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    return batches


@torch.no_grad()
def perplexity(model: SequenceModel, tokens: Tensor, *, length: int = 1024) -> float:
    """``exp`` of the mean cross-entropy of a text, read once from its start with the state passed on.

    Args:
        model: in evaluation mode.
        tokens: (count,) of integers, at least two.
        length: tokens at once.
    """
    total, state = 0.0, None
    for start in range(0, len(tokens) - 1, length):
        piece = tokens[start : start + length + 1]
        logits, state = model(piece[None, :-1], state)
        total += float(cross_entropy(logits, piece[None, 1:])) * (len(piece) - 1)
    return math.exp(total / (len(tokens) - 1))


# Tokenizer -----------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer (Sennrich et al. 2016) that begins every text with ``<s>``, token 0; ``</s>`` is 1.

    Args:
        texts: to learn the pairs from.
        vocabulary: tokens, 258 at least.

    Raises:
        GramianError: the ``tokenizers`` library is missing, or the vocabulary too small.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    except ImportError as error:
        raise GramianError("train_tokenizer needs the tokenizers library: pip install gramian[hf]") from error
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    if vocabulary < len(alphabet) + len(special):
        raise GramianError(
            f"train_tokenizer: vocabulary {vocabulary}; expected at least {len(alphabet) + len(special)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that ``SequenceModel.save`` wrote."""
    from tokenizers import Tokenizer

    path = Path(directory) / TOKENIZER
    if not path.is_file():
        raise GramianError(f"{path} is not there; the model was saved without a tokenizer")
    return Tokenizer.from_file(str(path))
