"""Directories of sentence-transformers: a transformer with its pooling and more, listed in ``modules.json``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from gramian.errors import GramianError

_WEIGHTS = {".bin", ".safetensors", ".onnx", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".gguf", ".index"}
_EXPORTS = {"onnx", "openvino", ".git", ".cache"}


def is_sentence_transformer(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` holds a sentence-transformers model."""
    return Path(directory, "modules.json").is_file()


def transformer_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder of the transformer itself: `directory`, or the part of it that ``modules.json`` names.

    Raises:
        GramianError: ``modules.json`` is damaged or lists no transformer.
    """
    file = Path(directory, "modules.json")
    try:
        modules = [(str(part["type"]), str(part["path"])) for part in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GramianError(
            f"{file} is damaged: {error!r}; expected a list of modules with 'type' and 'path'"
        ) from error
    for kind, path in modules:
        if kind.rpartition(".")[2] == "Transformer":
            return Path(directory, path)
    raise GramianError(f"{file} lists no Transformer; found {', '.join(kind for kind, _ in modules) or 'nothing'}")


def save_sentence_transformer(
    source: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    **other: Any,
) -> None:
    """Write the sentence-transformers model at `source` again, with the compressed `model` in its transformer's place.

    Pooling, normalisation and every other module and setting are copied; the old transformer's weights, in whatever
    format, are not. The result appears atomically.

    Args:
        source: a sentence-transformers directory.
        model: the compressed ``PreTrainedModel``.
        tokenizer: its tokenizer, or None to copy the files at `source`.
        directory: must not exist, or be empty.
        other: JSON-able entries for ``quantization_config``, e.g. the recipe.

    Raises:
        GramianError: `source` is no such directory, or `directory` is not empty or cannot be written.
    """
    from gramian.files import atomic_directory
    from gramian.models.huggingface import write_huggingface

    root, inner = Path(source), transformer_folder(source)

    def stale(folder: str, names: list[str]) -> set[str]:
        weights = {n for n in names if Path(n).suffix in _WEIGHTS or n.endswith(".index.json")}
        return _EXPORTS & set(names) | (weights if Path(folder) == inner else set())

    with atomic_directory(directory) as partial:
        shutil.copytree(root, partial, ignore=stale, copy_function=shutil.copyfile, dirs_exist_ok=True)
        target = partial / inner.relative_to(root)
        target.mkdir(parents=True, exist_ok=True)
        write_huggingface(model, target, tokenizer, **other)
