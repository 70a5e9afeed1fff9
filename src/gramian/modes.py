"""The modes that torch and models are in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """``model.eval()`` within; afterwards the training flag of each of their modules is what it was."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether autograd looks on at what is made from these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def captured() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` writes down what runs: what was chosen for this
    machine, or kept, does not belong in there.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def tracked(*tensors: Tensor) -> bool:
    """Whether autograd, or a transform of ``torch.func``, looks on at what is made from these."""
    return torch._C._are_functorch_transforms_active() or differentiable(*tensors)


def counted() -> bool:
    """Whether a dispatch mode, such as a counter of operations, sees all that this thread runs. (What torch's own
    ``is_in_torch_dispatch_mode`` tells is of the process, and is wrong for ever once two threads were in modes at a time.)
    """
    return bool(torch._C._len_torch_dispatch_stack())


def watched(*tensors: Tensor) -> bool:
    """Whether anything looks on that a bare operation of a library would pass by: autograd, forward mode, a transform of
    ``torch.func``, or autocast, which would choose the dtype.
    """
    return tracked(*tensors) or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu")
