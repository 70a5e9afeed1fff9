"""A model larger than memory: its tensors on disk, its repeated blocks run one at a time inside the model's own forward.

The model is a skeleton whose parameters are on the meta device. ``resident`` gives some modules their values for a while;
``Blocks`` runs the model so that only one block computes: the blocks before it hand on what they are given, and the
forward is left once it has run. Masks, positions and whatever else a block is passed are thus made by the model itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gramian.errors import GramianError, nearest
from gramian.nn.structured import Structured

INDEX = "model.safetensors.index.json"


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules made inside keep their parameters on the meta device. Buffers are real: tables that a constructor fills
    (rotary frequencies, position ids) are in no checkpoint.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Shards:
    """The tensors of a checkpoint in safetensors files, read when asked for.

    Args:
        directory: with an index file, or any number of safetensors files.

    Raises:
        GramianError: a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}
        index = directory / INDEX
        try:
            if index.is_file():
                names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                self.files = {name: directory / str(file) for name, file in names.items()}
            paths = sorted(set(self.files.values())) or sorted(directory.glob("*.safetensors"))
            for path in paths:
                with safe_open(path, "pt") as file:
                    held = set(file.keys())
                lacking = [name for name, owner in self.files.items() if owner == path and name not in held]
                if lacking:
                    raise GramianError(f"{path} lacks tensor {lacking[0]!r}, which {INDEX} says it holds")
                if not index.is_file():
                    self.files |= dict.fromkeys(held, path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise GramianError(f"{directory}: the checkpoint cannot be read: {error}; fetch the model again") from error

    def __contains__(self, name: object) -> bool:
        return name in self.files

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def shape(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (in the format's words) of a tensor that is not read."""
        with safe_open(self.files[name], "pt") as file:
            part = file.get_slice(name)
            return tuple(part.get_shape()), str(part.get_dtype())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of some tensors; no file stays mapped into memory."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        out: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with safe_open(path, "pt") as file:
                for name in wanted:
                    out[name] = file.get_tensor(name).clone()
        return out


def sources(model: nn.Module, shards: Shards) -> dict[str, str]:
    """Where in the checkpoint each parameter and persistent buffer of the model is: name in the model -> tensor name.
    Tied parameters have one source.

    Raises:
        GramianError: a tensor is missing, or of another shape.
    """
    groups: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    out: dict[str, str] = {}
    for names in groups.values():
        source = next((name for name in names if name in shards), None)
        if source is None:
            raise GramianError(
                f"MODEL {shards.directory}: tensor {names[0]!r} is not in the checkpoint"
                f"{nearest(names[0], shards.files)}; offload reads tensors that have the model's own names"
            )
        shape = shards.shape(source)[0]
        if shape != tuple(state[source].shape):
            raise GramianError(
                f"MODEL {shards.directory}: tensor {source} is {list(shape)}, config.json asks for "
                f"{list(state[source].shape)}; fetch the model again"
            )
        out |= dict.fromkeys(names, source)
    return out


@contextlib.contextmanager
def resident(
    model: nn.Module,
    names: Iterable[str],
    shards: Shards,
    where: dict[str, str] | None = None,
    *,
    widen: torch.dtype | None = None,
) -> Iterator[None]:
    """Give some parameters and buffers of a skeleton the checkpoint's values; they go when the block ends.

    Args:
        model: the skeleton.
        names: of its state.
        shards: the checkpoint.
        where: ``sources``; by default every tensor has its own name there.
        widen: what the skeleton has in this dtype becomes float32 (products of half-precision numbers take hundreds of
            times longer on processors without instructions for them).
    """
    names = list(names)
    found = shards.read({name if where is None else where[name] for name in names})
    before: list[tuple[nn.Module, str, Any]] = []
    fresh: dict[tuple[str, bool], Tensor] = {}  # tied parameters stay one object
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            source = name if where is None else where[name]
            parameter = leaf in module._parameters
            value = fresh.get((source, parameter))
            if value is None:
                held = (module._parameters if parameter else module._buffers)[leaf]
                value, dtype = found[source], found[source].dtype if held is None else held.dtype
                if value.is_floating_point():
                    value = value.to(torch.float32 if dtype == widen else dtype)
                if parameter:
                    value = nn.Parameter(value, requires_grad=False)
                fresh[source, parameter] = value
            holder: dict[str, Any] = module._parameters if parameter else module._buffers
            before.append((module, leaf, holder[leaf]))
            holder[leaf] = value
        del found
        yield
    finally:
        for module, leaf, old in before:
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = old
        del before[:], fresh
        parents = {part for name in names for part in itertools.accumulate(name.split("."), "{}.{}".format)}
        for parent in parents - set(names):
            layer = model.get_submodule(parent)
            if isinstance(layer, Structured):
                layer._kept.clear()  # holds on to the factors
        _trim()


def _trim() -> None:
    """Give freed memory back to the system: the GNU allocator else keeps what blocks of odd sizes leave between small
    objects, and peak memory creeps up with depth.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Left(BaseException):
    """Leaves the model's forward with what was computed."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and elements of the largest ``nn.ModuleList`` of more than one module that lies in no other.

    Raises:
        GramianError: there is none.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise GramianError(
            f"{type(model).__name__} has no repeated blocks (an nn.ModuleList); offload needs them: give it more memory"
        )
    name = max(outer, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return name, list(lists[name])


class Blocks:
    """The repeated blocks of a model, as ``find_blocks`` finds them.

    Args:
        model: a skeleton; the blocks' forward is replaced until ``close``.

    Attributes:
        name: of the list.
        modules: the blocks in order.

    Raises:
        GramianError: there is no such list.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name, self.modules = find_blocks(model)
        self._active: int | None = None
        self._given: Tensor | None = None
        self._last: Tensor | None = None
        self._rest: tuple[Any, ...] | None = None  # what a block returns besides hidden states
        self._chain: list[tuple[int, Any]] | None = None
        for index, module in enumerate(self.modules):
            module.forward = self._forward(index, module)  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self.modules)

    def close(self) -> None:
        """Give the blocks their own forward back."""
        for module in self.modules:
            module.__dict__.pop("forward", None)

    def prefix(self, index: int) -> str:
        """How names inside a block begin."""
        return f"{self.name}.{index}."

    def _forward(self, index: int, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            place = next((i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()), None)
            key = next((k for k, a in kwargs.items() if isinstance(a, Tensor) and a.is_floating_point()), None)
            if place is None and key is None:
                raise GramianError(f"block {self.prefix(index)[:-1]} was given no hidden states; offload cannot run it")
            hidden = args[place] if place is not None else kwargs[str(key)]
            if self._active == index:
                if self._given is None:
                    raise _Left(hidden)
                if place is not None:
                    args = (*args[:place], self._given, *args[place + 1 :])
                else:
                    kwargs = {**kwargs, str(key): self._given}
                raise _Left(type(module).forward(module, *args, **kwargs))
            if self._chain is not None:
                self._chain.append((index, hidden))
                hidden = hidden.view_as(hidden)
                self._chain.append((index, hidden))
            if self._last is not None and index == len(self.modules) - 1:
                hidden = self._last
            return hidden if self._rest is None else (hidden, *self._rest)

        return forward

    def _run(self, call: Callable[[], Any], active: int, given: Tensor | None) -> Any:
        self._active, self._given = active, given
        try:
            call()
        except _Left as left:
            return left.value
        finally:
            self._active = self._given = None
        raise GramianError(f"block {self.prefix(active)[:-1]} never ran; offload cannot run this model")

    def enter(self, call: Callable[[], Any]) -> Tensor:
        """The hidden states that reach the first block.

        Args:
            call: runs the model on a batch.
        """
        hidden = self._run(call, 0, None)
        assert isinstance(hidden, Tensor)
        return hidden

    def through(self, index: int, call: Callable[[], Any], hidden: Tensor) -> Tensor:
        """What block `index` makes of `hidden`; only it and what runs before the blocks need values."""
        output = self._run(call, index, hidden)
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            raise GramianError(
                f"block {self.prefix(index)[:-1]} turned hidden states {tuple(hidden.shape)} into "
                f"{tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}; offload needs the same"
            )
        return output

    @contextlib.contextmanager
    def ending(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the model runs as if its last block had returned `hidden`; no block needs values."""
        self._last = hidden
        try:
            yield
        finally:
            self._last = None

    def check(self, call: Callable[[], Any]) -> None:
        """See how blocks answer, and that each reads what the one before wrote and nothing else of it. The first block and
        everything outside the blocks must be resident.

        Args:
            call: runs the model on a small batch.

        Raises:
            GramianError: the blocks are no such chain (a decoder's blocks also read an encoder, say).
        """
        output = self._run(call, 0, self.enter(call))
        self._rest = tuple(output[1:]) if isinstance(output, tuple) else None
        if self._rest and any(isinstance(part, Tensor) for part in self._rest):
            raise GramianError(f"the blocks of {self.name} hand on more than hidden states; offload cannot run them")
        self._chain = []
        try:
            call()
            chain = self._chain
        finally:
            self._chain = None
        order = [index for index, _ in chain[::2]]
        reads, writes = [h for _, h in chain[2::2]], [h for _, h in chain[1:-1:2]]
        if order != list(range(len(self.modules))) or any(r is not w for r, w in zip(reads, writes, strict=True)):
            raise GramianError(
                f"the blocks of {self.name} do not feed one another in order; offload cannot run this model"
            )


def outside(blocks: Blocks, call: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """Names of the modules outside the blocks that hold tensors: those that run before the blocks, and the others.

    Args:
        blocks: of the model.
        call: runs the model on a small batch; everything outside the blocks must be resident.
    """
    holders = {
        name: module
        for name, module in blocks.model.named_modules()
        if (module._parameters or module._buffers) and not f"{name}.".startswith(f"{blocks.name}.")
    }
    early: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: early.add(name)) for name, module in holders.items()
    ]
    try:
        blocks.enter(call)
    finally:
        for handle in handles:
            handle.remove()
    return early, set(holders) - early


def state_of(model: nn.Module, modules: Sequence[str] | set[str]) -> list[str]:
    """Names of the state that some modules themselves hold (not the modules inside them)."""
    return [name for name in model.state_dict(keep_vars=True) if name.rpartition(".")[0] in modules]


__all__ = ["INDEX", "Blocks", "Shards", "find_blocks", "meta_parameters", "outside", "resident", "sources", "state_of"]
