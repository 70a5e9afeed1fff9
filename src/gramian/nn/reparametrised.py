"""Training by orthogonal equivalence: the weight is turned from both sides and keeps its singular values (POET, 2025,
"Reparameterized LLM training via orthogonal equivalence transformation").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gramian.errors import GramianError
from gramian.linalg import polar
from gramian.nn.prepared_linear import is_plain_linear
from gramian.ops import Dense, Permutation, Product
from gramian.ops.orthogonal import Orthogonal


class ReparametrisedLinear(nn.Module):
    """A linear layer ``y = R W P x + bias`` that trains the orthogonal R (out, out) and P (in, in) and not W.

    Each of the two is block-diagonal between a random permutation and its inverse. The blocks are made of skew-symmetric
    parameters that start at zero (``Orthogonal``), so that the layer starts as the one it replaces. ``merge`` folds them
    into W and draws new permutations: over many merges every pair of coordinates meets.

    Args:
        linear: the layer to replace; its weight is copied, its bias is taken over and stays trainable.
        block: sides of the blocks; each side of the weight gets its largest divisor that is not larger.
        method, terms: as in ``Orthogonal``.
        generator: of the permutations; on the CPU.
    """

    left: nn.Parameter
    right: nn.Parameter
    base: Tensor
    left_order: Tensor
    right_order: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        *,
        block: int = 256,
        method: str = "neumann",
        terms: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if block < 1:
            raise GramianError(f"ReparametrisedLinear: block {block}; expected at least 1")
        self.out_features, self.in_features = linear.weight.shape
        self.method, self.terms = method, terms
        self.bias = linear.bias
        weight = linear.weight.detach().clone()
        for side, length in (("left", self.out_features), ("right", self.in_features)):
            b = next(b for b in range(min(block, length), 0, -1) if length % b == 0)
            skew = torch.zeros(length // b, b * (b - 1) // 2, dtype=weight.dtype, device=weight.device)
            self.register_parameter(side, nn.Parameter(skew))
            self.register_buffer(side + "_order", torch.arange(length, device=weight.device))
        self.register_buffer("base", weight)  # rows and columns in the order of the permutations
        self._permute(weight, generator)

    @property
    def op(self) -> Product:
        """The operator over the live parameters; gradients flow to them."""
        left, right = (Orthogonal(skew, None, self.method, self.terms) for skew in (self.left, self.right))
        first, last = Permutation(self.right_order), Permutation(self.left_order.argsort())
        return Product((last, left, Dense(self.base), right, first))

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``: x (..., in) -> (..., out)."""
        y = self.op.apply(x)
        return y if self.bias is None else y + self.bias

    def _permute(self, weight: Tensor, generator: torch.Generator | None) -> None:
        """Draw new permutations and keep `weight` (out, in) in their order."""
        for order in (self.left_order, self.right_order):
            order.copy_(torch.randperm(len(order), generator=generator))
        self.base = weight[self.left_order][:, self.right_order].contiguous()

    @torch.no_grad()
    def merge(self, generator: torch.Generator | None = None) -> float:
        """``W <- R W P`` with R and P made exactly orthogonal first (polar factors, in float64); parameters start at zero
        again, under new permutations.

        Returns:
            ``max |R^T R - I|`` over both before that: what the truncated series was off.
        """
        blocks = [Orthogonal(skew, None, self.method, self.terms).blocks().double() for skew in (self.left, self.right)]
        off = max(float((r.mT @ r - torch.eye(r.shape[-1]).to(r)).abs().max()) for r in blocks)
        left, right = (polar(r) for r in blocks)
        out, in_ = self.out_features, self.in_features
        weight = (left @ self.base.double().reshape(len(left), -1, in_)).reshape(out, in_)
        weight = (weight.reshape(out, len(right), -1).transpose(0, 1) @ right).transpose(0, 1).reshape(out, in_)
        weight = weight[self.left_order.argsort()][:, self.right_order.argsort()]
        self._permute(weight.to(self.base.dtype), generator)
        self.left.zero_()
        self.right.zero_()
        return off

    def to_linear(self) -> nn.Linear:
        """The same layer as a plain ``nn.Linear``; merges first."""
        self.merge()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.base[self.left_order.argsort()][:, self.right_order.argsort()]
        layer.weight = nn.Parameter(weight.contiguous())
        layer.bias = self.bias
        return layer

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, method={self.method}"


class Reparametrisation:
    """A training hook that reparametrises the linear layers of a model and merges every few hundred steps::

        hook = Reparametrisation(model, block=64, every=200)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        for batch in data:
            loss(model, batch).backward()
            optimizer.step()
            hook.step(optimizer)
            optimizer.zero_grad()
        hook.finish()  # plain nn.Linear layers again

    Args:
        model: changed in place.
        block, method, terms, generator: as in ``ReparametrisedLinear``.
        every: steps between merges.
        limit: warn when a merge finds ``max |R^T R - I|`` above this: the series is too short for how far R has gone.
        choose: (name, layer) -> whether to take this layer; all ``nn.Linear`` by default. POET leaves the head out.
        restart: start from Gaussian weights with rows of norm one (the paper's start), not from the model's.

    Raises:
        GramianError: no layer is chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        block: int = 256,
        every: int = 200,
        method: str = "neumann",
        terms: int = 4,
        limit: float = 1e-3,
        choose: Callable[[str, nn.Linear], bool] = lambda name, layer: True,
        restart: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if every < 1:
            raise GramianError(f"Reparametrisation: merges every {every} steps; expected at least 1")
        self.model, self.every, self.limit, self.generator, self.steps = model, every, limit, generator, 0
        self.layers: dict[str, ReparametrisedLinear] = {}
        for name, layer in list(model.named_modules()):
            if is_plain_linear(layer) and name and choose(name, layer):
                if restart:
                    unit_rows_(layer.weight, generator)
                made = ReparametrisedLinear(layer, block=block, method=method, terms=terms, generator=generator)
                self.layers[name] = made
                _place(model, name, made)
        if not self.layers:
            raise GramianError("Reparametrisation: no layer chosen; expected at least one nn.Linear inside the model")

    def parameters(self) -> list[nn.Parameter]:
        """The skew-symmetric parameters of all layers; biases are not among them."""
        return [skew for layer in self.layers.values() for skew in (layer.left, layer.right)]

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> float | None:
        """Count a step of training; every ``every`` steps ``merge``, and return what it returns."""
        self.steps += 1
        return self.merge(optimizer) if self.steps % self.every == 0 else None

    def merge(self, optimizer: torch.optim.Optimizer | None = None) -> float:
        """Merge every layer and drop the moments that `optimizer` keeps of the parameters, which start anew.

        Returns:
            The largest ``max |R^T R - I|`` of the layers before they were made orthogonal.
        """
        off = {name: layer.merge(self.generator) for name, layer in self.layers.items()}
        worst = max(off, key=lambda name: off[name])
        if off[worst] > self.limit:
            warnings.warn(
                f"{worst}: R^T R differed from I by {off[worst]:.1e} at a merge, more than {self.limit:.0e}; merge more "
                "often, lower the learning rate, or use method='cayley'",
                stacklevel=2,
            )
        if optimizer is not None:
            for skew in self.parameters():
                optimizer.state.pop(skew, None)
        return off[worst]

    def finish(self) -> nn.Module:
        """Merge and put plain ``nn.Linear`` layers back; returns the model."""
        self.merge()
        for name, layer in self.layers.items():
            _place(self.model, name, layer.to_linear())
        return self.model


@torch.no_grad()
def unit_rows_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill `weight` (out, in) in place with Gaussian rows of norm one."""
    rows = torch.randn(weight.shape, generator=generator)
    return weight.copy_(rows / rows.norm(dim=1, keepdim=True))


def _place(model: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path).register_module(last, layer)
