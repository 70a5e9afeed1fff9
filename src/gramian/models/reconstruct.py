"""Learning how to round, block by block: low-rank weight scaling (LRQ)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.models.swap import replace_linear
from gramian.models.walk import weight_of
from gramian.models.workload import Batch, Workload
from gramian.modes import evaluating
from gramian.nn import StructuredLinear
from gramian.ops import Quantized

BATCH = 16
"""Sequences a step."""
BATCHES = 8
"""Calibration batches whose inputs and targets of one block are held at once."""


class ScaledRounding(nn.Module):
    """A linear layer that learns its rounding: ``Q = s level(round(W / (s exp(L U + r + c))))`` (LRQ, Lee et al. 2024, eq. 4).

    L (out, k) starts at zero, so that the layer starts as the rounding to nearest it was made of. L U says for each entry
    whether it had better go up or down, from out k + k in numbers and not from as many as there are entries: it generalises
    from few texts. After training only codes and scales are left.

    Args:
        weight: W, (out, in), constant.
        op: the start: a uniform grid, not rotated.
        bias: (out,) or None, constant.
        rank: k.
        generator: of U's random start.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, op: Quantized, bias: Tensor | None, rank: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if op.grid != "uniform" or op.rotation > 1:
            raise GramianError(
                f"ScaledRounding: grid {op.grid!r}, rotation {op.rotation}; expected a uniform grid without rotation"
            )
        out, in_ = weight.shape
        self.out_features, self.in_features, self.op = out, in_, op
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.log_scale = nn.Parameter(op.scales.to(weight).log())
        self.left = nn.Parameter(weight.new_zeros(out, rank))
        self.right = nn.Parameter(torch.randn(rank, in_, generator=generator).to(weight) / math.sqrt(rank))
        self.rows = nn.Parameter(weight.new_zeros(out, 1))
        self.columns = nn.Parameter(weight.new_zeros(1, in_))

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes (out, in), real numbers with the gradient of what was rounded; and the scale (out, in) of each entry."""
        top = 2**self.op.bits - 1
        scale = self.log_scale.exp().repeat_interleave(self.op.group, 1)[:, : self.in_features]
        divisor = scale * (self.left @ self.right + self.rows + self.columns).exp()
        place = (self.weight / divisor + 1) * (top / 2)
        return (place + (place.round() - place).detach()).clamp(0, top), scale

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: x (..., in) -> (..., out)."""
        codes, scale = self.codes()
        return F.linear(x, scale * (codes * (2 / (2**self.op.bits - 1)) - 1), self.bias)

    @torch.no_grad()
    def finish(self) -> Quantized:
        """What is stored: codes and scales alone."""
        codes, _ = self.codes()
        return self.op.with_codes(codes.round().long(), self.log_scale.exp())


def reconstruct(
    small: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    workload: Workload,
    *,
    steps: int = 200,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[tuple[int, float]]:
    """Learn the rounding of `names` in `small`, in place, one block after another.

    For each block the inputs are those of the compressed blocks before it, the target what the original block makes of
    the original's inputs. A block whose error over the calibration data did not fall stays as it was.

    Args:
        small: the compressed model, its layers rounded to uniform grids.
        model: the original.
        names: layers of `small`; those of one block (of a numbered list of modules; elsewhere each layer alone) are
            trained together.
        workload: calibration data; its first `BATCHES` batches of `BATCH` sequences are used.
        steps: a block.
        rate: peak learning rate of Adam, with a cosine to zero.
        seed: of random starts and of the order of batches.
        progress: called with (step, loss) counted over all blocks.

    Returns:
        (step, relative squared error of the block's output) of every step.

    Raises:
        GramianError: the loss became NaN or Inf; a layer is no rounded one.
    """
    batches = workload.parts(BATCH)[:BATCHES]
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(block_of(name), []).append(name)
    history: list[tuple[int, float]] = []
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model, small):
        for block, members in blocks.items():
            pairs = [_seen(small, model, block, workload, batch) for batch in batches]
            old = {name: small.get_submodule(name) for name in members}
            made = {name: _scaled(name, old[name], model, generator) for name in members}
            before = _error(small.get_submodule(block), pairs)
            for name, layer in made.items():
                small.set_submodule(name, layer)
            # A layer that is a block of its own has just been replaced.
            _train(small.get_submodule(block), list(made.values()), pairs, steps, rate, generator, history, progress)
            for name, layer in made.items():
                small.set_submodule(name, old[name])
                replace_linear(small, name, layer.finish(), layer.bias)
            if not _error(small.get_submodule(block), pairs) < before:
                for name, module in old.items():
                    small.set_submodule(name, module)
    return history


def block_of(name: str) -> str:
    """The module that holds a layer and is one of a numbered list, or the layer itself: "h.0.mlp.up" is of "h.0"."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return name


_Pair = tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor | None]
"""Positional and keyword arguments of a block, the output to match, and the mask of real tokens."""


class _Seen(Exception):
    """Ends a forward pass: the block has run."""


def _output(value: Any) -> Tensor:
    first = value[0] if isinstance(value, tuple) else value
    assert isinstance(first, Tensor)
    return first


def _uncached(value: Any) -> Any:
    """None for a cache of keys and values: a block that runs again would append to it."""
    return None if hasattr(value, "get_seq_length") else value


@torch.no_grad()
def _seen(small: nn.Module, model: nn.Module, block: str, workload: Workload, batch: Batch) -> _Pair:
    found: dict[str, Any] = {}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found["target"] = _output(output).detach().clone()
        raise _Seen

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["args"] = tuple(a.clone() if isinstance(a, Tensor) else _uncached(a) for a in args)
        found["kwargs"] = {key: _uncached(value) for key, value in kwargs.items()}
        raise _Seen

    handles = (
        (model, model.get_submodule(block).register_forward_hook(after)),
        (small, small.get_submodule(block).register_forward_pre_hook(before, with_kwargs=True)),
    )
    for network, handle in handles:
        try:
            workload.run(network, batch)
        except _Seen:
            pass
        finally:
            handle.remove()
    if "args" not in found:
        raise GramianError(f"block {block} never ran on the calibration data; leave its layers out with exclude")
    return found["args"], found["kwargs"], found["target"], workload.mask(batch)


def _scaled(name: str, module: nn.Module, model: nn.Module, generator: torch.Generator) -> ScaledRounding:
    if not (isinstance(module, StructuredLinear) and isinstance(module.op, Quantized)):
        raise GramianError(f"layer {name} is a {type(module).__name__}; expected one rounded to a uniform grid")
    weight = weight_of(model.get_submodule(name))
    return ScaledRounding(weight, module.op, module.bias, max(1, min(weight.shape) // 8), generator)


def _loss(block: nn.Module, pair: _Pair) -> Tensor:
    """Relative squared error of the block's output on real tokens."""
    args, kwargs, target, mask = pair
    difference = (_output(block(*args, **kwargs)) - target).float()
    target = target.float()
    if mask is not None and target.shape[:2] == mask.shape:
        difference, target = difference[mask.bool()], target[mask.bool()]
    return difference.square().sum() / target.square().sum().clamp_min(1e-30)


@torch.no_grad()
def _error(block: nn.Module, pairs: Sequence[_Pair]) -> float:
    return sum(float(_loss(block, pair)) for pair in pairs) / len(pairs)


def _train(
    block: nn.Module,
    layers: Sequence[ScaledRounding],
    pairs: Sequence[_Pair],
    steps: int,
    rate: float,
    generator: torch.Generator,
    history: list[tuple[int, float]],
    progress: Callable[[int, float], None] | None,
) -> None:
    parameters = [p for layer in layers for p in layer.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            place = int(torch.randint(len(pairs), (1,), generator=generator))
            loss = _loss(block, pairs[place])
            value = float(loss.detach())
            if not math.isfinite(value):
                raise GramianError(f"learning the rounding: the loss became {value} at step {len(history)}")
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            optimiser.step()
            history.append((len(history), value))
            if progress is not None:
                progress(len(history) - 1, value)


__all__ = ["ScaledRounding", "block_of", "reconstruct"]
