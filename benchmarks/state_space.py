"""The diagonal state space: kernel and layer against the direct Vandermonde formula of the published S4D code.

    python benchmarks/state_space.py

One thread, process CPU time, interleaved, the best of a few runs. 128 channels of 64 states (32 conjugate pairs), batch 4.
"direct" builds the kernel as ``2 Re sum_n C_n b_n a_n^l`` from all ``exp(l dt A_n)`` and convolves by the same Fourier
transform; errors are the largest against the same sum in float64, whole kernel. The state space is kernel,
convolution and skip (and, on our side, the state after the sequence); the layer adds GELU, the projection to twice the width
and GLU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from common import write
from gramian.sequence.recipes import mixer
from gramian.sequence.state_space import DiagonalStateSpace

CHANNELS, STATES, BATCH = 128, 64, 4


class Direct(DiagonalStateSpace):
    """The same layer, kernel by the formula; no state."""

    def kernel(self, length: int) -> Tensor:
        """As its parent's."""
        z, b, c = self.discrete()
        powers = torch.exp(z[..., None] * torch.arange(length))
        return 2 * torch.einsum("hn,hnl->hl", b * c, powers).real

    def forward(self, u: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As its parent's, from no state."""
        length, x = u.shape[1], u.mT
        spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(self.kernel(length), n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + self.skip[:, None] * x
        return y.mT, u.new_zeros(())


def milliseconds(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Best process CPU time of each, interleaved."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], (time.process_time() - start) * 1e3)
    return {name: round(value, 2) for name, value in best.items()}


def exact(layer: DiagonalStateSpace, length: int) -> Tensor:
    """The kernel in float64, a few channels at a time."""
    z, b, c = (x.to(torch.complex128) for x in layer.discrete())
    places = torch.arange(length)
    rows = [2 * ((b * c)[h, :, None] * torch.exp(z[h, :, None] * places)).sum(0).real for h in range(len(z))]
    return torch.stack(rows)


def main() -> None:
    """Measure and write benchmarks/results/state_space.json."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: dict[str, object] = {}
    layer = mixer("s4d", CHANNELS, states=STATES)
    direct_layer = copy.deepcopy(layer)
    ours = layer.core.filter
    assert isinstance(ours, DiagonalStateSpace)
    direct_layer.core.filter.__class__ = Direct
    direct = direct_layer.core.filter
    for length, repeats in ((1024, 5), (4096, 4), (16384, 1)):
        x = torch.randn(BATCH, length, CHANNELS)

        def forward(module: DiagonalStateSpace, length: int = length) -> None:
            with torch.no_grad():
                module.kernel(length)

        def backward(module: DiagonalStateSpace, length: int = length) -> None:
            module.kernel(length).square().sum().backward()

        def whole(module: torch.nn.Module, x: Tensor = x) -> None:
            module(x)[0].square().sum().backward()

        with torch.no_grad():
            reference = exact(ours, length)
            errors = {
                name: float((m.kernel(length) - reference).abs().max())
                for name, m in (("two-level", ours), ("direct", direct))
            }
        calls: dict[str, Callable[[], object]] = {
            "kernel, two-level": lambda: forward(ours),
            "kernel, direct": lambda: forward(direct),
            "kernel forward and backward, two-level": lambda: backward(ours),
            "kernel forward and backward, direct": lambda: backward(direct),
            "state space forward and backward, two-level": lambda: whole(ours),
            "state space forward and backward, direct": lambda: whole(direct),
            "layer forward and backward, two-level": lambda: whole(layer),
            "layer forward and backward, direct": lambda: whole(direct_layer),
        }
        taken = milliseconds(calls, repeats)
        ratios = {
            name.removesuffix(", direct"): round(taken[name] / taken[name.replace("direct", "two-level")], 1)
            for name in taken
            if name.endswith("direct")
        }
        rows[str(length)] = {
            "milliseconds": taken,
            "times faster": ratios,
            "largest error": errors,
            "largest entry": float(reference.abs().max()),
        }
        print(length, rows[str(length)], flush=True)
        write("state_space", rows)


if __name__ == "__main__":
    main()
