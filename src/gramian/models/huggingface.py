"""Compressed models in the format of ``transformers``: saved by ``save_pretrained``, loaded by ``from_pretrained``.

``config.json`` carries a ``quantization_config`` with the description of every changed layer; a quantizer registered
under "gramian" builds those layers before the library streams the weights in. Without the registration the library
builds the stock layers: the empty ``weight`` of every ``StructuredLinear`` (and the shape of every narrowed layer)
then stops the load with an error instead of leaving random weights.

Importing this module imports ``transformers`` and registers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from gramian import __version__
from gramian.errors import GramianError, nearest
from gramian.files import atomic_directory
from gramian.models.checkpoint import SCHEMA, Layers, build, check_schema, describe
from gramian.models.ordinary import become_ordinary
from gramian.models.remote_code import MODULE, remote_code
from gramian.models.swap import conv1d, linear_shape, origin, own_dtypes, swap
from gramian.models.walk import is_linear
from gramian.nn import StructuredEmbedding, StructuredLinear, prepare, unprepare
from gramian.nn.structured import Structured

METHOD = "gramian"
logger = logging.get_logger(__name__)


class GramianConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed model: JSON-able throughout.

    Args:
        layers: layer name -> description, as ``checkpoint.describe`` gives it.
        schema: version of the description.
        gramian_version: that wrote it.
        other: further entries (a recipe, the source model), kept as they are.

    Raises:
        GramianError: damaged, or of a newer schema.
    """

    def __init__(
        self, layers: Layers | None = None, schema: int = SCHEMA, gramian_version: str = __version__, **other: Any
    ) -> None:
        self.__dict__.update(other)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.schema = schema
        self.gramian_version = gramian_version
        self.layers: Layers = {} if layers is None else layers
        try:
            check_schema(self.__dict__)
        except GramianError as error:
            raise GramianError(f"config.json, quantization_config: {error}") from error


class GramianQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the changed layers of a compressed checkpoint, and undoes them on ``model.dequantize()``."""

    quantization_config: Any  # a GramianConfig
    requires_calibration = True  # compressing takes data: `gramian.compress`, not a flag of from_pretrained
    requires_parameters_quantization = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers: Layers = self.quantization_config.layers
        places = resolve(model, list(layers), same_class=type(model).__name__ in (model.config.architectures or [None]))
        self.own_dtypes: dict[str, torch.dtype] = {}
        for name, place in places.items():
            old = model.get_submodule(place)
            if layers[name].get("embedding") is True:
                _check_untied(model, place, old)
            new = build(name, layers[name], old)
            swap(model, old, new)
            if isinstance(new, Structured):
                self.own_dtypes |= {f"{place}.{factor}": dtype for factor, dtype in own_dtypes(new.op).items()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers 4 casts every floating tensor; what is stored in half precision goes back to it.
        for factor, dtype in self.own_dtypes.items():
            model.get_submodule(factor).to(dtype)
        # A later plain `save_pretrained` writes no remote-code file, so config.json must not point to one.
        auto_map = getattr(model.config, "auto_map", None) or {}
        if auto_map and all(f"{MODULE}." in str(reference) for reference in auto_map.values()):
            name = type(model).__name__
            if not type(model).__module__.startswith("transformers_modules."):
                del model.config.auto_map
            elif model._auto_class is None:  # loaded through that file: the library then copies it along
                type(model).register_for_auto_class(next(a for a, ref in auto_map.items() if ref.endswith(f".{name}")))
        return prepare(model, recast=False)

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[None, dict[str, str]]:
        """Called by ``save_pretrained`` before it writes config.json: describes the model as it is now."""
        self.quantization_config.layers = describe(model)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Not needed, and the base class of transformers 4 wants accelerate for it."""

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The trainer may train all of the model, not only adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` works."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        restore_dense(model)
        if isinstance(dtype, str):  # what `save_pretrained` leaves in the configuration
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)


def register() -> None:
    """Make ``from_pretrained`` know gramian's checkpoints. Safe to call again."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(GramianConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(GramianQuantizer)


def resolve(model: Any, names: list[str], *, same_class: bool) -> dict[str, str]:
    """Where a checkpoint's layers are in `model`, which may be a task model around the saved base, or the reverse.

    Args:
        model: the model to load into.
        names: as saved.
        same_class: `model` is of the class that was saved, so every layer must be there. Otherwise a layer that the
            class does not have (another task's head) is left out with a warning, as its tensors are; the empty tensor
            that stands for its weight makes the load fail should that be wrong.

    Raises:
        GramianError: a layer is not there.
    """
    prefix = model.base_model_prefix
    modules = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if is_linear(module) or isinstance(module, nn.Embedding | StructuredEmbedding)
    }
    places: dict[str, str] = {}
    for name in names:
        candidates = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]
        match = next((candidate for candidate in candidates if candidate in modules), None)
        if match is not None:
            places[name] = match
        elif same_class:
            raise GramianError(
                f"config.json lists layer {name!r}, not in {type(model).__name__}{nearest(name, modules)}"
            )
        else:
            logger.warning(f"{type(model).__name__} has no layer {name!r}: that part of the checkpoint is left out")
    if names and not places:
        raise GramianError(
            f"config.json lists {len(names)} layers, {names[0]!r} first; none is in {type(model).__name__}"
        )
    return places


def _check_untied(model: Any, name: str, embedding: nn.Module) -> None:
    """Raise if the output layer of `model` would take its weight from an embedding that is no plain table any more."""
    head = model.get_output_embeddings()
    if head is not None and model.get_input_embeddings() is embedding and model.config.tie_word_embeddings:
        raise GramianError(
            f"{type(model).__name__} ties its output layer to {name}, which this checkpoint holds compressed; load it as "
            "AutoModel, or pass tie_word_embeddings=False for an output layer of its own"
        )


def attach(model: Any, **other: Any) -> None:
    """Make a model that was compressed in memory like one that was loaded: ``save_pretrained``, ``dequantize`` and the
    Trainer then treat it right.

    Args:
        model: a ``PreTrainedModel``.
        other: JSON-able entries for ``quantization_config``, e.g. the recipe.

    Raises:
        GramianError: not a ``PreTrainedModel``, one that another method has quantized, or an encoder-decoder whose tied
            output layer was changed.
    """
    _check(model)
    known = getattr(model.config, "quantization_config", None) or {}
    known = dict(known if isinstance(known, dict) else known.to_dict())
    method = known.pop("quant_method", METHOD)
    if method != METHOD:
        raise GramianError(f"the model is already compressed by {method}; start from its full-precision checkpoint")
    known |= {"gramian_version": __version__, "schema": SCHEMA, **other, "layers": describe(model)}
    model.config.quantization_config = GramianConfig(**known)
    model.hf_quantizer = GramianQuantizer(model.config.quantization_config, pre_quantized=True)
    model.quantization_method = METHOD
    model.is_quantized = True
    _untie(model)


def _untie(model: Any) -> None:
    """Record that an output layer no longer shares the embedding's matrix; loading would else put that in its place."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shares = head is None or head.weight is getattr(embedding, "weight", None)
    if shares or not getattr(model.config, "tie_word_embeddings", False) or not model._tied_weights_keys:
        return
    if model.config.is_encoder_decoder:
        raise GramianError(
            f"the output layer of {type(model).__name__} is tied to its embedding, and that decides how it computes; "
            "leave it out with exclude"
        )
    model.config.tie_word_embeddings = False


def save_huggingface(model: Any, directory: str | os.PathLike[str], tokenizer: Any = None, **other: Any) -> None:
    """Write a compressed ``PreTrainedModel`` (and its tokenizer) as a checkpoint of ``transformers``, atomically.

    The directory also holds a small file for ``trust_remote_code=True``, so that the model loads where gramian is
    installed but not imported.

    Args:
        model: compressed in memory, or loaded from a checkpoint.
        directory: must not exist, or be empty.
        tokenizer: anything with ``save_pretrained``.
        other: JSON-able entries for ``quantization_config``, e.g. the recipe.

    Raises:
        GramianError: the directory is not empty or cannot be written.
    """
    with atomic_directory(directory) as partial:
        write_huggingface(model, partial, tokenizer, **other)


def write_huggingface(model: Any, directory: Path, tokenizer: Any = None, **other: Any) -> None:
    """``save_huggingface`` without the atomic step: into a directory that the caller publishes.

    Of a model on the meta device all but the weights is written. A model that is just a smaller one of its class (fewer
    blocks, narrower everywhere alike) is written as such, and loads without gramian.
    """
    _check(model)
    become_ordinary(model)
    if not describe(model) and getattr(model.config, "quantization_config", None) is None:
        _write(model, directory, tokenizer)
        return
    attach(model, **other)
    _write(model, directory, tokenizer)
    text, auto_map = remote_code(model)
    if text:
        (directory / f"{MODULE}.py").write_text(text, encoding="utf-8")
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = auto_map
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(model: Any, directory: Path, tokenizer: Any) -> None:
    """As ``save_pretrained``; of a model on the meta device all but the weights."""
    if any(p.is_meta for p in model.parameters()):
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
    else:
        model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _check(model: object) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise GramianError(f"found a {type(model).__name__}; expected a PreTrainedModel of transformers")


def restore_dense(model: nn.Module) -> None:
    """Make every layer that gramian changed one of its old class and shape, in place; the model computes the same.

    A layer that lost neurons is padded with zeros: rows that nothing reads and columns that read nothing.
    """
    unprepare(model)
    for module in list(model.modules()):
        if isinstance(module, StructuredEmbedding):
            table = module.to_embedding()
            swap(model, module, table)
            del table.gramian_origin
            continue
        if not isinstance(module, StructuredLinear) and not hasattr(module, "gramian_origin"):
            continue
        before = origin(module)
        dense = module.to_linear() if isinstance(module, StructuredLinear) else module
        if isinstance(dense, nn.Linear) and linear_shape(dense) != before.shape:
            dense = _padded(dense, before.shape)
        if isinstance(dense, nn.Linear) and before.transposed:
            dense = conv1d(dense)
        swap(model, module, dense)
        del dense.gramian_origin


def _padded(linear: nn.Linear, shape: tuple[int, int]) -> nn.Linear:
    out, in_ = linear_shape(linear)
    weight = linear.weight.new_zeros(shape)
    weight[:out, :in_] = linear.weight.detach()
    layer = nn.Linear(shape[1], shape[0], linear.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.cat([linear.bias.detach(), linear.bias.new_zeros(shape[0] - out)]))
    return layer


# The import hook runs this module while ``transformers`` is half imported: nothing above may need more of it than its
# quantizers, and the hook can count on the import alone.
register()
