"""One layer of a network for another."""

from __future__ import annotations

from torch import nn

from gramian.errors import GramianError


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at every name that `old` has in `model`, in place. The training mode carries over, and where nothing of
    `old` is trained, nothing of `new` is.

    Raises:
        GramianError: `old` is the model itself.
    """
    if old is model:
        raise GramianError(
            f"the model itself is the {type(old).__name__}; expected one that holds it, e.g. nn.Sequential"
        )
    if not any(parameter.requires_grad for parameter in old.parameters()):
        new.requires_grad_(False)
    new.train(old.training)
    for module in list(model.modules()):
        # PyTorch's fused encoder kernels read `linear1.weight` themselves, past the layer's forward.
        if isinstance(module, nn.TransformerEncoderLayer) and old in (module.linear1, module.linear2):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(part is old for part in module.modules()):
            module.use_nested_tensor = False
        for key, child in list(module._modules.items()):
            if child is old:
                module._modules[key] = new
