"""Directories of sentence-transformers: a transformer with its pooling and more, listed in ``modules.json``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from gramian.errors import GramianError

_WEIGHTS = {".bin", ".safetensors", ".onnx", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".gguf", ".index"}
_POOLINGS = {
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",  # differs in length alone, and features are of unit length
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
}
"""Names of poolings in configurations, old and new, and in ``text_workload``."""
_EXPORTS = {"onnx", "openvino", ".git", ".cache"}


def is_sentence_transformer(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` holds a sentence-transformers model."""
    return Path(directory, "modules.json").is_file()


def transformer_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder of the transformer itself: `directory`, or the part of it that ``modules.json`` names.

    Raises:
        GramianError: ``modules.json`` is damaged or lists no transformer.
    """
    modules = _modules(directory)
    for kind, path in modules:
        if kind == "Transformer":
            return Path(directory, path)
    found = ", ".join(kind for kind, _ in modules) or "nothing"
    raise GramianError(f"{Path(directory, 'modules.json')} lists no Transformer; found {found}")


def pooling(directory: str | os.PathLike[str]) -> str:
    """How the model at `directory` makes an embedding of its tokens' states: "mean", "cls" or "last" (the last token).

    Raises:
        GramianError: another way, or damaged files.
    """
    for kind, path in _modules(directory):
        if kind != "Pooling":
            continue
        file = Path(directory, path, "config.json")
        try:
            config = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise GramianError(f"{file} is damaged: {error!r}; expected the settings of a Pooling module") from error
        told = config.get("pooling_mode")  # one name or several; older versions have a switch for each
        if told is None:
            switches = {key[13:]: on for key, on in config.items() if key.startswith("pooling_mode_")}
            told = [name for name, on in switches.items() if on] or "mean"
        modes = [told] if isinstance(told, str) else list(told)
        if len(modes) == 1 and modes[0] in _POOLINGS:
            return _POOLINGS[modes[0]]
        raise GramianError(
            f"{file}: pooling by {' and '.join(map(str, modes))}; expected mean, cls or lasttoken alone; "
            "with another, compress the transformer in Python and give it as `data` a Workload with these features"
        )
    return "mean"


def _modules(directory: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(class, path) of every part that ``modules.json`` lists, in order."""
    file = Path(directory, "modules.json")
    try:
        modules = [(str(part["type"]), str(part["path"])) for part in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GramianError(
            f"{file} is damaged: {error!r}; expected a list of modules with 'type' and 'path'"
        ) from error
    return [(kind.rpartition(".")[2], path) for kind, path in modules]


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
