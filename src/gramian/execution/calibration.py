"""Measure this machine: `gramian bench --calibrate`, and where the result is kept."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import GramianError
from gramian.execution import compiled, native, onednn
from gramian.execution.cache import cache_directory
from gramian.execution.cost_model import CostModel
from gramian.execution.steps import Stack
from gramian.execution.work import MatrixProduct
from gramian.ops.sparse import sparse_product

Held = TypeVar("Held")

LARGEST_FLOPS = 2e9
ROUNDS = 3
"""Everything is measured in this many rounds, and the geometric mean counts: the pace of a machine changes. Only one round has
the products of `LONG` and more, which would take most of the time."""
MOST_SHAPES = 1600
AROUND = 2**23
"""Bytes of operands that products and passes are measured on in turn: more than the caches of one core hold."""
WORTH = 0.9
"""oneDNN is measured, and competes, where it takes at most this share of the time of torch's own choice."""
LONG = 2e-3
"""Seconds of a call that is timed once, alone: its own length averages what disturbs it."""


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a calibration holds for."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cache_file() -> Path:
    """Where the calibration of this machine is kept, in the user's cache directory."""
    about = machine()
    name = "-".join(str(about[key]) for key in ("device", "capability", "threads", "torch"))
    return cache_directory() / f"calibration-{''.join(c if c.isalnum() or c in '.-' else '_' for c in name)}.json"


def best_seconds(call: Callable[[], object], *, at_least: float = 0.0005, repeats: int = 3) -> float:
    """Seconds of one call, the best of a few; short calls are timed in groups of `at_least` seconds, ones of `LONG` once."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    if once >= LONG:
        return once
    group = max(1, min(1000, round(at_least / once)))
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(group):
            call()
        best = min(best, (time.perf_counter() - start) / group)
    return best


def in_turn(calls: Sequence[Sequence[Callable[[], object]]], rounds: int = 3) -> list[float]:
    """Seconds of a call of each kind, the least of some rounds over all kinds: the pace of a machine changes.

    Args:
        calls: by kind: one call, which then finds in the caches what it used before; or calls of one kind on different
            memory, made one after the other.
        rounds: how often.
    """

    def once(alike: Sequence[Callable[[], object]]) -> float:
        if len(alike) == 1:
            return best_seconds(alike[0])
        start = time.perf_counter()
        for call in alike:
            call()
        return (time.perf_counter() - start) / len(alike)

    for alike in calls:
        alike[0]()
    taken = [[once(alike) for alike in calls] for _ in range(rounds)]
    return [min(seconds) for seconds in zip(*taken, strict=True)]


def random_product(
    r: random.Random, dtype: torch.dtype, largest: float = LARGEST_FLOPS, *, library: str = ""
) -> MatrixProduct:
    """A shape as structured layers have them: batches of small blocks, skinny and square products; those of other libraries
    are of rows of activations with weights (n, k), of as many rows as the library is for.
    """
    while True:
        count = 1 if r.random() < 0.6 else 2 ** r.randint(1, 6)
        m, n, k = (round(2 ** r.uniform(0 if axis == "m" and count == 1 else 2, 12)) for axis in "mnk")
        if r.random() < 0.2:  # one row: decoding
            m = 1
        if r.random() < 0.5:  # sizes of real layers are multiples of eight
            m, n, k = (v if v < 8 else -(-v // 8) * 8 for v in (m, n, k))
        if r.random() < 0.5:
            m, n = n, m
        if library == "onednn" and count > 1:
            m = max(m, onednn.GROUPED_ROWS)
        if library == "compiled":
            m = min(m, r.randint(1, compiled.MOST_ROWS))
        if library:
            product = MatrixProduct(count, m, n, k, False, True, False, dtype, library)
        else:
            product = MatrixProduct(count, m, n, k, r.random() < 0.3, r.random() < 0.5, False, dtype)
        if 1e3 <= product.flops <= largest and product.nbytes <= 2e8:
            return product


def time_product(product: MatrixProduct, device: str = "cpu") -> float:
    """Seconds of one product. Five short groups say more than one of their length: what disturbs them comes and goes.
    Products of several operands in turn, as in a chain: with the same ones again and again, all lies in the nearest cache.
    """
    made = [_ready(product, device) for _ in range(max(1, min(4, AROUND // product.nbytes)))]
    with torch.inference_mode():
        return best_seconds(alternating(lambda multiply: multiply(), made), at_least=2e-4, repeats=5)


def _ready(product: MatrixProduct, device: str) -> Callable[[], object]:
    """A product on operands of its own."""
    if product.library:
        x = torch.full((product.m, product.count * product.k), 0.5, dtype=product.dtype)
        values = torch.full((product.count, product.n, product.k), 0.5, dtype=product.dtype)
        if product.library == "compiled":
            whole = compiled.chain([Stack(values)], (product.count * product.n, x.shape[1]), lambda x, bias: x)
            assert whole is not None
            return partial(whole, x, None)
        if product.count == 1:
            return partial(onednn.linear(values[0]), x, None)
        return partial(onednn.grouped(values), x)
    left = _operand(product.count, product.m, product.k, product.left_transposed, product.dtype, device)
    right = _operand(product.count, product.k, product.n, product.right_transposed, product.dtype, device)
    return partial(torch.mm, left[0], right[0]) if product.count == 1 else partial(torch.bmm, left, right)


def _kinds() -> list[tuple[torch.dtype, str, float]]:
    """What is measured: dtype, library, and the share of the time until which. Little is enough where few rows are all."""
    shares = [(torch.bfloat16, "", 0.12), (torch.float32, "", 0.8)]
    if _onednn_gains():
        shares = [(torch.bfloat16, "", 0.13), (torch.float32, "", 0.52), (torch.float32, "onednn", 0.26)]
    if native.present():
        shares += [(dtype, "compiled", 0.02) for dtype in compiled.DTYPES]
    return [(dtype, library, sum(s for *_, s in shares[: i + 1])) for i, (dtype, library, _) in enumerate(shares)]


def _onednn_gains() -> bool:
    """Whether oneDNN multiplies float32 faster than torch's own choice, many rows or few."""
    if not onednn.present():
        return False
    for m, n in ((512, 1024), (4, 2048)):
        x, weight = torch.ones(m, n), torch.ones(n, n)
        with torch.inference_mode():
            ours, plain = in_turn([[partial(onednn.linear(weight), x, None)], [partial(F.linear, x, weight)]])
        if ours < WORTH * plain:
            return True
    return False


def _operand(count: int, rows: int, columns: int, transposed: bool, dtype: torch.dtype, device: str) -> Tensor:
    if transposed:
        return torch.full((count, columns, rows), 0.5, dtype=dtype, device=device).mT
    return torch.full((count, rows, columns), 0.5, dtype=dtype, device=device)


def calibrate(*, budget: float = 17.0, seed: int = 0, progress: Callable[[float], None] | None = None) -> CostModel:
    """Measure products and passes for about `budget` seconds, on the threads torch uses now.

    Args:
        budget: seconds; most go to float32 (shared with oneDNN where that gains), the rest to bfloat16, the compiled kernel
            for few rows, which is made first, and memory traffic.
        seed: of the shapes.
        progress: called with the share done.
    """
    begun = time.perf_counter()

    def tell() -> None:
        if progress is not None:
            progress(min(1.0, (time.perf_counter() - begun) / budget))

    r = random.Random(seed)
    pace, passes, penalties = Pace(), _passes(), [_strided_penalty()]
    _measure(passes, pace)
    products: dict[str, list[tuple[MatrixProduct, float]]] = {}
    for dtype, library, until in _kinds():
        largest = LARGEST_FLOPS if dtype == torch.float32 else _affordable(dtype)
        start = time.perf_counter()
        share, again = until * budget - (start - begun), 0.0
        shapes: list[MatrixProduct] = []
        seconds: list[list[float]] = []
        short: list[int] = []
        while len(shapes) < 24 or (time.perf_counter() - start + again < share and len(shapes) < MOST_SHAPES):
            shape, before = random_product(r, dtype, largest, library=library), time.perf_counter()
            took = time_product(shape)
            shapes.append(shape)
            seconds.append([pace.relative(took)])
            if took < LONG:
                short.append(len(shapes) - 1)
                again += (ROUNDS - 1) * (time.perf_counter() - before)
            tell()
        for _ in range(ROUNDS - 1):
            for i in short:
                seconds[i].append(pace.relative(time_product(shapes[i])))
            tell()
        usual = [pace.usual * statistics.geometric_mean(values) for values in seconds]
        products[shapes[0].kernels] = list(zip(shapes, usual, strict=True))
        _measure(passes, pace)
        penalties.append(_strided_penalty())
    rates: dict[str, list[tuple[float, float, float]]] = {}
    for each in passes:
        took = pace.usual * statistics.geometric_mean(each.seconds)
        rates.setdefault(each.kind, []).append((each.nbytes, each.run, took))
    model = CostModel(machine(), products, rates, statistics.geometric_mean(penalties))
    model.learn()
    return model


class Pace:
    """How fast the machine is at the moment. On a shared one that changes by up to a factor of two, for minutes, and a
    measurement says little without it.
    """

    def __init__(self) -> None:
        self._a = torch.ones(192, 192)
        self._seen: list[float] = []

    def relative(self, seconds: float) -> float:
        """What was just measured, in units of the reference product at this moment."""
        with torch.inference_mode():
            self._seen.append(best_seconds(lambda: self._a @ self._a, at_least=1e-4, repeats=1))
        return seconds / statistics.median(self._seen[-5:])

    @property
    def usual(self) -> float:
        """Seconds of the reference product, the median so far."""
        return statistics.median(self._seen)


def _affordable(dtype: torch.dtype) -> float:
    """Operations of a product that takes about 20 ms: some machines have no kernel for a dtype."""
    a = torch.randn(128, 128).to(dtype)
    seconds = best_seconds(lambda: a @ a)
    return min(LARGEST_FLOPS, max(1e5, 2 * 128**3 / seconds * 0.02))


@dataclass
class _Measured:
    """A kind of pass over so many bytes, so many of them side by side; `call` makes `count`. `seconds` are in units of the
    reference product, one a round.
    """

    kind: str
    nbytes: float
    run: float
    call: Callable[[], object]
    count: int = 1
    seconds: list[float] = field(default_factory=list)


def _passes() -> list[_Measured]:
    """Each kind of pass, over sizes that fit the caches and ones that do not, in pieces of several lengths."""
    out = [_Measured("view", 1.0, 1.0, partial(torch.randn(8, 8).view, 4, 16))]
    for side in (4, 64, 256, 512, 1024, 2048, 3072):
        alike = _alike(side, side)
        nbytes = 8.0 * side**2
        # The largest is memory that an allocator takes from the system anew each time.
        out.append(_Measured("copy", nbytes, 4096.0, alternating(torch.clone, alike)))
        rows = partial(torch.index_select, dim=0, index=torch.randperm(side))
        out.append(_Measured("index", nbytes, 4096.0, alternating(rows, alike)))
        if 16 <= side <= 2048:
            out.append(_Measured("fourier", nbytes, 1.0, alternating(torch.fft.rfft, alike)))
            for width in (1, 4, 16, 64):
                pieces = side * 16 // width
                blocks = [x.view(side // 16, pieces, width) for x in alike]
                turned = [x.mT for x in alike] if width == 1 else [x.transpose(0, 1) for x in blocks]
                chosen = partial(torch.index_select, dim=1, index=torch.randperm(pieces))
                out.append(_Measured("copy", nbytes, 4.0 * width, alternating(torch.Tensor.contiguous, turned)))
                out.append(_Measured("index", nbytes, 4.0 * width, alternating(chosen, blocks)))
    for side, batch, held in ((256, 16, 8), (512, 64, 32), (512, 256, 32), (1024, 512, 32)):
        index = torch.randint(side, (side * held,), dtype=torch.int32)
        starts = torch.arange(0, side * held, held, dtype=torch.int32)
        product = partial(sparse_product, values=torch.randn(side * held), index=index, starts=starts)
        call = alternating(product, _alike(side, batch))
        out.append(_Measured("entrywise", 4.0 * side * batch, 1.0, call, held))
    return out


def _alike(rows: int, columns: int) -> list[Tensor]:
    """Tensors of one size that together take `AROUND` bytes, but not too many."""
    return [torch.randn(rows, columns) for _ in range(max(1, min(32, AROUND // (4 * rows * columns))))]


def alternating(function: Callable[[Held], object], alike: Sequence[Held]) -> Callable[[], object]:
    """Calls with one of several operands after the other: in a chain, what a product or pass reads was just written by another
    core, or some time ago, and passes over the same tensor again and again look nearly twice as fast.
    """
    turn = cycle(alike)
    return lambda: function(next(turn))


@torch.inference_mode()
def _measure(passes: Sequence[_Measured], pace: Pace) -> None:
    """One more round."""
    for each in passes:
        each.seconds.append(pace.relative(best_seconds(each.call) / each.count))


def _strided_penalty() -> float:
    """How much slower a product is whose operand is contiguous along neither axis."""
    ratios = []
    for count, m, n, k in ((1, 256, 256, 256), (16, 128, 32, 64), (64, 32, 256, 32)):
        wide = torch.randn(count, m, 2 * k)
        right = torch.randn(count, k, n)
        smooth, strided = wide[:, :, :k].contiguous(), wide[:, :, ::2]
        with torch.inference_mode():
            slow, fast = (best_seconds(partial(torch.bmm, left, right)) for left in (strided, smooth))
            ratios.append(slow / fast)
    return math.exp(statistics.mean(map(math.log, ratios)))


def save(model: CostModel, path: Path | None = None) -> Path:
    """Keep a calibration (atomically) for later processes on this machine."""
    path = path or cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(model.to_json()), encoding="utf-8")
    scratch.replace(path)
    forget()
    return path


@lru_cache(maxsize=8)
def _read(path: Path) -> CostModel | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return CostModel.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, GramianError) as error:
        # A damaged cache must not stop a model from running.
        warnings.warn(f"{path}: not a calibration ({error}); run gramian bench --calibrate", stacklevel=3)
        return None


@lru_cache(maxsize=8)
def _path(threads: int) -> Path:
    return cache_file()


def stored() -> CostModel | None:
    """The calibration of this machine, or None where none was made (for as many threads as torch uses now)."""
    return _read(_path(torch.get_num_threads()))


def forget() -> None:
    """Read the calibration again when it is next asked for."""
    _read.cache_clear()
    _path.cache_clear()
