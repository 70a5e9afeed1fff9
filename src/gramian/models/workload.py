"""How to run a model on calibration data and what counts as its output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.grams.collect import Objective
from gramian.modes import evaluating
from gramian.nn.structured import Structured

Batch = Any
LONGEST = 48
"""Tokens of a recombined sequence, at most."""
CHANGED = 0.4
"""Most tokens of a recombined text, as a share, that become a neighbour of theirs in the embedding table."""
NEIGHBOURS = 12
"""How many neighbours a token has."""
ENOUGH = 16
"""Real tokens of a sequence that shows what attention does."""


@dataclass
class Workload:
    """Calibration batches of one model, and how to run them.

    Attributes:
        batches: whatever `run` understands; kept in memory (texts are small, activations are not kept).
        run: (model, batch) -> raw output.
        features: (model, batch) -> (sequences, d) float tensor: what the compressed model should reproduce.
        mask: (batch) -> (sequences, tokens) or None.
        outputs: (model, batch) -> [features, last hidden states (real tokens, d), inner ones, ...] (the features alone where
            there are no others): what healing matches. A language model's begin with its logits (real tokens, vocabulary) in
            the features' place.
        augment: (model, batch, generator) -> a batch of recombined inputs, or None where inputs cannot be recombined.
        name: what the features are, for reports.
        logits: (model, batch) -> (sequences, tokens, vocabulary) of a language model; else None.
        kind: "text" or "tensors".
    """

    batches: list[Batch]
    run: Callable[[nn.Module, Batch], Any]
    features: Callable[[nn.Module, Batch], Tensor]
    mask: Callable[[Batch], Tensor | None]
    outputs: Callable[[nn.Module, Batch], list[Tensor]]
    augment: Callable[[nn.Module, Batch, torch.Generator], Batch] | None = None
    name: str = "relative error of outputs"
    logits: Callable[[nn.Module, Batch], Tensor] | None = None
    kind: str = "tensors"

    def sizes(self) -> list[int]:
        """Sequences in each batch."""
        return [_length(batch) for batch in self.batches]

    def head(self, sequences: int) -> Batch:
        """The first few sequences of the first batch."""
        return _cut(self.batches[0], slice(sequences))

    def telling(self, sequences: int) -> tuple[int, slice]:
        """A few neighbouring sequences with enough real tokens to tell what attention does: number of the batch, and which
        of it. The first of which each has `ENOUGH`, else the longest; without a mask the first of all.
        """
        best, found = -1, (0, slice(sequences))
        for place, batch in enumerate(self.batches):
            mask = self.mask(batch)
            if mask is None:
                return found
            lengths = mask.reshape(len(mask), -1).bool().sum(1)
            for first in range(max(1, len(mask) - sequences + 1)):
                which = slice(first, first + sequences)
                length = int(lengths[which].min())
                if length > best:
                    best, found = length, (place, which)
                if best >= ENOUGH:
                    return found
        return found

    def sample(self, sequences: int) -> Batch:
        """The sequences that `telling` names."""
        place, which = self.telling(sequences)
        return _cut(self.batches[place], which)

    def parts(self, sequences: int) -> list[Batch]:
        """The batches cut into ones of at most that many sequences."""
        return [
            _cut(batch, slice(first, first + sequences))
            for batch in self.batches
            for first in range(0, _length(batch), sequences)
        ]

    def objective(self, kind: str) -> Objective | None:
        """The probe of the loss's curvature, by name.

        "features": a Gaussian direction of the output a sequence, ``<v, f(x)>``: Gauss-Newton of the squared error of the
        features. "lm": cross-entropy at labels sampled from the model's own predictions: the true Fisher. "none": no
        backward pass. "auto": "lm" where there are logits of a language model, else "features".

        Raises:
            GramianError: unknown name, or "lm" for a model without token logits.
        """
        if kind == "auto":
            kind = "lm" if self.logits is not None else "features"
        if kind == "none":
            return None
        if kind == "features":
            return self._probe
        if kind == "lm":
            if self.logits is None:
                raise GramianError("objective 'lm' needs a language model with token logits; use 'features' or 'none'")
            return self._sampled_labels
        raise GramianError(f"unknown objective {kind!r}; expected auto, features, lm or none")

    def _probe(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        features = self.features(model, batch)
        direction = torch.randn(features.shape, generator=generator).to(features)
        return (features * direction).sum()

    def _sampled_labels(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        assert self.logits is not None
        logits = self.logits(model, batch).float()
        mask = self.mask(batch)
        flat = logits.reshape(-1, logits.shape[-1])
        with torch.no_grad():
            labels = torch.multinomial(flat.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(flat.device)
        loss = F.cross_entropy(flat, labels, reduction="none")
        return (loss * mask.reshape(-1).to(loss)).sum() if mask is not None else loss.sum()


def _cut(batch: Batch, which: slice) -> Batch:
    if isinstance(batch, Tensor):
        return batch[which]
    if hasattr(batch, "items"):
        return {key: _cut(value, which) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(_cut(value, which) for value in batch)
    return batch


def _length(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    if hasattr(batch, "values"):
        return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)
    if isinstance(batch, Sequence):
        return _length(batch[0])
    return 1


def tensor_workload(batches: Sequence[Batch]) -> Workload:
    """Workload of any module whose batches are tensors, tuples of positional or mappings of keyword arguments.

    The features are the first floating-point tensor of the output, flattened to one row a sequence. Of a mapping with an
    ``attention_mask`` (sequences, tokens), padding counts neither as input nor as output.

    Raises:
        GramianError: no batches, or one that is none of these.
    """
    batches = list(batches)
    if not batches:
        raise GramianError("no calibration data: expected a list of batches")

    def run(model: nn.Module, batch: Batch) -> Any:
        if isinstance(batch, Tensor):
            return model(batch)
        if hasattr(batch, "keys"):
            return model(**batch)
        if isinstance(batch, Sequence):
            return model(*batch)
        raise GramianError(f"batch of type {type(batch).__name__}; expected a tensor, a tuple or a mapping")

    def features(model: nn.Module, batch: Batch) -> Tensor:
        output = first_tensor(run(model, batch))
        real = mask(batch)
        if real is not None and output.dim() == 3 and output.shape[:2] == real.shape:
            output = output * real.to(output)[:, :, None]
        return output.reshape(len(output), -1)

    def mask(batch: Batch) -> Tensor | None:
        found = batch.get("attention_mask") if hasattr(batch, "get") else None
        return found if isinstance(found, Tensor) and found.dim() == 2 else None

    return Workload(batches, run, features, mask, lambda model, batch: [features(model, batch)])


def first_tensor(output: Any) -> Tensor:
    """The first floating-point tensor of a model's output; a lone number (a loss, say) is not one.

    Raises:
        GramianError: there is none.
    """
    if isinstance(output, Tensor):
        if not output.dim():
            raise GramianError("the model returned one number; expected a row a sequence: pass batches without labels")
        return output
    values = output.values() if hasattr(output, "values") else output if isinstance(output, Sequence) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
    raise GramianError(
        f"the model returned {type(output).__name__}, which holds no floating-point tensor; expected one with a row a sequence"
    )


def text_workload(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    longest: int = 256,
    most_tokens: int | None = None,
    pooling: str = "mean",
    language_model: bool = False,
    classifier: bool = False,
) -> Workload:
    """Workload of a Hugging Face text model: batches of texts of similar length, padded, with an attention mask.

    An encoder's features are its sentence embeddings: the mean of the last hidden states over real tokens, or that of the
    first or last token (`pooling` "cls" or "last"), of unit length. A language model's features are the same of its last
    hidden states, and it has logits. A model that answers with one row a text, and not with states of its tokens, has that
    row as its features.

    Args:
        tokenizer: called as ``tokenizer(texts, padding=True, truncation=True, max_length=..., return_tensors="pt")``; left as
            it was, and may have no padding token.
        texts: calibration texts.
        batch_size: sequences a batch.
        longest: tokens after which a text is cut.
        most_tokens: tokens of a batch, padding included, unless one text has more; None for no bound.
        pooling: "mean", "cls" or "last".
        language_model: whether the output holds logits over the vocabulary.
        classifier: whether the output is a row of logits a text (``is_classifier``).

    Raises:
        GramianError: no texts, or an unknown pooling.
    """
    if not texts:
        raise GramianError("no calibration text")
    if pooling not in ("mean", "cls", "last"):
        raise GramianError(f"unknown pooling {pooling!r}; expected mean, cls or last")
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in special])
    tokenizer = copy.deepcopy(tokenizer)  # padding and cutting leave their settings in it, which would be saved with it
    if tokenizer.pad_token is None:  # any token will do, for its places are masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    if most_tokens is None or batch_size * longest <= most_tokens:
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    else:
        ids = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        groups = _groups(order, [len(row) for row in ids], batch_size, most_tokens)
    batches = [
        dict(
            tokenizer([texts[j] for j in group], padding=True, truncation=True, max_length=longest, return_tensors="pt")
        )
        for group in groups
    ]

    def run(model: nn.Module, batch: Batch) -> Any:
        return model(**batch)

    def features(model: nn.Module, batch: Batch) -> Tensor:
        if language_model:
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
        else:
            output = run(model, batch)
            states = output.last_hidden_state if hasattr(output, "last_hidden_state") else first_tensor(output)
        return states.float() if states.dim() == 2 else pool(states, batch["attention_mask"], pooling)

    def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
        result = model(**batch, output_hidden_states=True)
        _, *inner, last = result.hidden_states
        last = getattr(result, "last_hidden_state", last)
        real = batch["attention_mask"].bool()
        if language_model:
            first = result.logits[real]
        elif classifier:
            first = result.logits.float()
        else:
            first = pool(last, batch["attention_mask"], pooling)
        return [first, *(states[real] for states in (last, *inner))]

    def logits(model: nn.Module, batch: Batch) -> Tensor:
        result = run(model, batch).logits
        assert isinstance(result, Tensor)
        return result

    known: WeakKeyDictionary[nn.Module, Neighbours] = WeakKeyDictionary()

    def augment(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
        find = getattr(model, "get_input_embeddings", None)
        embedding = None if find is None else find()
        if embedding is not None and embedding not in known:
            # The weight of a structured embedding is empty.
            table = embedding.op.dense() if isinstance(embedding, Structured) else embedding.weight
            known[embedding] = Neighbours(table, words)
        return recombine(batch, generator, None if embedding is None else known[embedding])

    return Workload(
        batches,
        run,
        features,
        lambda batch: batch["attention_mask"],
        outputs,
        augment,
        "cosine of logits" if classifier else "cosine of sentence embeddings",
        logits if language_model else None,
        kind="text",
    )


def _groups(order: Sequence[int], lengths: Sequence[int], size: int, most_tokens: int) -> list[list[int]]:
    """Runs of `order` of at most `size` texts and, padded to the longest of them, `most_tokens` tokens (or of one text)."""
    groups: list[list[int]] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if groups and len(groups[-1]) < size and (len(groups[-1]) + 1) * longest <= most_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = lengths[i]
    return groups


def longest_text(model: nn.Module) -> int:
    """Tokens after which a text is cut: what the model takes, at most 256."""
    return min(256, int(getattr(getattr(model, "config", None), "max_position_embeddings", 256) or 256))


def is_classifier(model: nn.Module) -> bool:
    """Whether the model answers with one row of logits a text."""
    return "ForSequenceClassification" in type(model).__name__


def takes_padding(model: nn.Module) -> bool:
    """Whether the model takes texts of several lengths at once; a classifier may need a padding token to tell them apart."""
    config = getattr(model, "config", None)
    return not is_classifier(model) or getattr(config, "pad_token_id", None) is not None


def recombine(batch: Batch, generator: torch.Generator, neighbours: Neighbours | None) -> Batch:
    """New token sequences from a padded batch: half of them end, or begin, as another sequence of the batch does, and in
    all of them some tokens (a share up to `CHANGED`, drawn for each sequence) become a near one in the embedding table:
    calibration texts show but a part of the vocabulary. Of long sequences a part of `LONGEST` tokens is drawn: more
    sequences in the same time teach more than longer ones.

    The first and last real token (special ones, in an encoder) stay.

    Args:
        batch: input_ids and attention_mask (B, T).
        generator: of the draws.
        neighbours: of each token, or None to leave the tokens as they are.

    Returns:
        The batch of the new sequences, (B, min(T, LONGEST)); padded on the side where `batch` is.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    width = min(LONGEST, ids.shape[1])
    shorter = {key: value[:, :width].clone() for key, value in batch.items()}
    rows = [_window(ids[i][mask[i]], width, generator) for i in range(len(ids))]
    partners = torch.randperm(len(ids), generator=generator).tolist()
    for i, own in enumerate(rows):
        mixed, other = own.clone(), rows[partners[i]]
        whether, which, where, share = torch.rand(4, generator=generator).tolist()
        stop = min(len(own), len(other)) - 1
        if whether < 0.5 and stop > 2:
            cut = 1 + int(where * (stop - 1))
            part = slice(cut, stop) if which < 0.5 else slice(1, cut)
            mixed[part] = other[part]
        if neighbours is not None and len(mixed) > 2:
            changed = torch.rand(len(mixed) - 2, generator=generator) < CHANGED * share
            places = 1 + changed.nonzero().squeeze(1)
            near = neighbours(mixed[places])
            drawn = torch.randint(0, near.shape[1], (len(places), 1), generator=generator)
            mixed[places] = near.gather(1, drawn).squeeze(1).to(mixed)
        padding_first = bool(mask[i, -1]) and not bool(mask[i, 0])
        where_real = slice(width - len(mixed), width) if padding_first else slice(0, len(mixed))
        shorter["attention_mask"][i] = 0
        shorter["attention_mask"][i, where_real] = 1
        shorter["input_ids"][i, where_real] = mixed
    return shorter


def _window(tokens: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """At most `width` of the tokens (n,): the first, the last, and a run between."""
    if len(tokens) <= width:
        return tokens
    first = 1 + int(torch.randint(0, len(tokens) - width + 1, (), generator=generator))
    return torch.cat([tokens[:1], tokens[first : first + width - 2], tokens[-1:]])


class Neighbours:
    """The `NEIGHBOURS` tokens whose input embeddings have the largest cosine with a token's; found when first asked for.

    Args:
        table: (vocabulary, d) input embeddings.
        words: (n,) token ids that count as neighbours.
    """

    def __init__(self, table: Tensor, words: Tensor) -> None:
        self._words = words
        self._unit = F.normalize(table.detach().float().cpu(), dim=1)
        self._candidates = self._unit[words]
        self._near = words.new_full((len(table), min(NEIGHBOURS, len(words) - 1)), -1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(n, `NEIGHBOURS`) ids near each of the tokens (n,), itself left out."""
        tokens = tokens.cpu()
        missing = torch.unique(tokens[self._near[tokens, 0] < 0])
        for part in missing.split(1024):
            cosine = self._unit[part] @ self._candidates.mT
            cosine.masked_fill_(self._words == part[:, None], -2)
            self._near[part] = self._words[cosine.topk(self._near.shape[1], 1).indices]
        return self._near[tokens]


def pool(states: Tensor, mask: Tensor, pooling: str = "mean") -> Tensor:
    """Unit-length sentence embeddings (B, d) of hidden states (B, T, d) under mask (B, T)."""
    if pooling != "mean":
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        real = mask * (places if pooling == "last" else places.flip(0))
        return F.normalize(states[torch.arange(len(states), device=states.device), real.argmax(1)], dim=-1)
    weight = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weight).sum(1) / weight.sum(1).clamp_min(1), dim=-1)


@torch.no_grad()
def all_features(model: nn.Module, workload: Workload) -> Tensor:
    """(sequences, d) features of every batch, in the workload's order."""
    with evaluating(model):
        return torch.cat([workload.features(model, batch).float().cpu() for batch in workload.batches])


def agreement(before: Tensor, after: Tensor) -> dict[str, float]:
    """How well new features (n, d) reproduce the old ones.

    Returns:
        mean and p5: mean and 5th percentile of the cosines; relative_error: ``||E - E'||_F / ||E||_F``; rank_correlation:
        Spearman's of all pairwise similarities; neighbours: share of the ten nearest neighbours kept (both NaN for fewer
        than twelve texts, which say nothing about them); texts: n.
    """
    cosine = F.cosine_similarity(before, after, dim=1)
    out = {
        "texts": len(before),
        "mean": float(cosine.mean()),
        "p5": float(cosine.quantile(0.05)),
        "relative_error": float((before - after).norm() / before.norm().clamp_min(1e-30)),
        "rank_correlation": math.nan,
        "neighbours": math.nan,
    }
    if len(before) > 11:
        a, b = F.normalize(before, dim=1), F.normalize(after, dim=1)
        similar_a, similar_b = a @ a.mT, b @ b.mT
        i, j = torch.triu_indices(len(a), len(a), 1)
        out["rank_correlation"] = spearman(similar_a[i, j], similar_b[i, j])
        near = [s.fill_diagonal_(-2).topk(10, 1).indices for s in (similar_a, similar_b)]
        shared = (near[0][:, :, None] == near[1][:, None, :]).any(-1).float().mean()
        out["neighbours"] = float(shared)
    return out


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence, in nats, of logits (n, vocabulary) from others."""
    return F.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="batchmean", log_target=True
    )


@torch.no_grad()
def language_agreement(
    before: nn.Module, after: nn.Module, workload: Workload, *, causal: bool | None = None
) -> dict[str, float]:
    """How well a changed language model predicts, and how near it is to the original.

    Args:
        before: the original.
        after: the changed one.
        workload: held-out texts; it has logits.
        causal: whether a prediction sees no later token; found out if None.

    Returns:
        tokens: predictions that counted; divergence: mean Kullback-Leibler divergence from the original in nats a token;
        same_token: share of tokens whose likeliest prediction stays; perplexity_before and perplexity_after: of the next
        token, NaN for a model whose predictions see the tokens after them (a masked language model); rise_error: standard
        error of perplexity_after minus perplexity_before, each token's loss taken as independent of the others'.
    """
    logits = workload.logits
    assert logits is not None
    with evaluating(before, after):
        causal = _is_causal(before, workload) if causal is None else causal
        tokens, sums = 0, torch.zeros(5, dtype=torch.float64)
        for batch in workload.batches:
            mask = workload.mask(batch)
            ids = batch["input_ids"]
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            if causal:
                real, targets = real[:, 1:] & real[:, :-1], ids[:, 1:]
                pair = [logits(model, batch)[:, :-1][real].float().log_softmax(-1) for model in (before, after)]
                wanted = targets[real][:, None]
                losses = [-log.gather(1, wanted).double() for log in pair]
                sums[:2] += torch.stack([loss.sum() for loss in losses]).cpu()
                sums[4] += float((losses[1] - losses[0]).square().sum())
            else:
                pair = [logits(model, batch)[real].float().log_softmax(-1) for model in (before, after)]
            sums[2] += float((pair[0].exp() * (pair[0] - pair[1])).sum(dtype=torch.float64))
            sums[3] += float((pair[0].argmax(-1) == pair[1].argmax(-1)).sum())
            tokens += len(pair[0])
    mean = (sums / max(tokens, 1)).tolist()
    perplexity = math.exp(min(mean[1], 700.0))
    spread = math.sqrt(max(mean[4] - (mean[1] - mean[0]) ** 2, 0.0) / max(tokens, 1))
    return {
        "tokens": tokens,
        "divergence": max(mean[2], 0.0),
        "same_token": mean[3],
        "perplexity_before": math.exp(min(mean[0], 700.0)) if causal else math.nan,
        "perplexity_after": perplexity if causal else math.nan,
        "rise_error": perplexity * spread if causal else math.nan,
    }


def _is_causal(model: nn.Module, workload: Workload) -> bool:
    """Whether a prediction does not depend on the tokens after it; found by changing the last real one of a text.

    Texts of fewer than three tokens say nothing; a model that is shown no other counts as one that sees them all.
    """
    assert workload.logits is not None
    for batch in workload.batches:
        mask = workload.mask(batch)
        real = torch.ones_like(batch["input_ids"]) if mask is None else mask
        for row in (real.sum(1) > 2).nonzero()[:1, 0].tolist():
            text = _cut(batch, slice(row, row + 1))
            *earlier, last = real[row].nonzero()[:, 0].tolist()
            first = workload.logits(model, text)
            ids = text["input_ids"].clone()
            ids[0, last] = (ids[0, last] + 1) % first.shape[-1]
            changed = workload.logits(model, {**text, "input_ids": ids})[0, earlier]
            first = first[0, earlier]
            return bool(torch.allclose(first, changed, rtol=1e-4, atol=1e-4 * float(first.std())))
    return False


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; ties share no rank (order of appearance)."""
    ranks = [x.double().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
