"""The scan against dense matrices multiplied step by step, for every transition, method, chunk and length."""

from __future__ import annotations

import math
import multiprocessing
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gramian.errors import GramianError
from gramian.ops import Operator
from gramian.sequence import (
    DenseTransition,
    DiagonalGate,
    DiagonalPlusLowRank,
    Householder,
    HouseholderProduct,
    Identity,
    Rotation,
    ScalarGate,
    SequenceMap,
    Transition,
    combine,
    linear_recurrence,
    parallel_scan,
    scan,
    sequence_map,
    step,
    summary,
)

DK, DV = 8, 6
NAMES = (
    "identity",
    "scalar",
    "scalar constant",
    "scalar signed",
    "diagonal",
    "diagonal signed",
    "diagonal strong",
    "diagonal constant",
    "complex",
    "complex constant",
    "rotation",
    "rotation @ scalar",
    "rotation @ diagonal",
    "householder",
    "householder @ scalar",
    "scalar @ householder",
    "householder @ diagonal",
    "diagonal @ householder",
    "householder @ signed",
    "householder @ rotation",
    "householder @ complex",
    "product",
    "product @ scalar",
    "product @ diagonal",
    "low rank 1",
    "low rank 2",
    "dense",
)
ERASING = [name for name in NAMES if ("householder" in name or "product" in name or name == "low rank 1")]


def transition(name: str, batch: int, time: int, heads: int, dtype: torch.dtype, dk: int = DK) -> Transition:
    gen = torch.Generator().manual_seed(len(name) + time)
    lead = (batch, time, heads)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, dtype=torch.float64).to(dtype)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=gen, dtype=torch.float64), dim=-1).to(dtype)

    def signs(*shape: int) -> Tensor:
        return torch.where(uniform(*shape) < 0.3, -1.0, 1.0).to(dtype)

    scalar, diagonal = ScalarGate(-uniform(*lead)), DiagonalGate(-uniform(*lead, dk))
    house = Householder(unit(*lead, dk), 2 * uniform(*lead))
    product = HouseholderProduct(unit(*lead, 3, dk), 2 * uniform(*lead, 3))
    rotation = Rotation(3 * unit(*lead, dk // 2))
    erase = unit(*lead, dk)
    made: dict[str, Transition] = {
        "identity": Identity(),
        "scalar": scalar,
        "scalar constant": ScalarGate(-uniform(heads) / 10),
        "scalar signed": ScalarGate(-uniform(*lead), signs(*lead)),
        "diagonal": diagonal,
        "diagonal signed": DiagonalGate(-uniform(*lead, dk), signs(*lead, dk)),
        "diagonal strong": DiagonalGate(torch.where(uniform(*lead, dk) < 0.2, -100.0, -0.01).to(dtype)),
        "diagonal constant": DiagonalGate(-uniform(heads, dk)),
        "complex": DiagonalGate(torch.complex(-uniform(*lead, dk), 3 * unit(*lead, dk))),
        "complex constant": DiagonalGate(torch.complex(-uniform(heads, dk) / 10, 3 * unit(heads, dk))),
        "rotation": rotation,
        "rotation @ scalar": rotation @ scalar,
        "rotation @ diagonal": rotation @ diagonal,
        "householder": house,
        "householder @ scalar": house @ scalar,
        "scalar @ householder": scalar @ house,
        "householder @ diagonal": house @ diagonal,
        "diagonal @ householder": diagonal @ house,
        "householder @ signed": house @ DiagonalGate(-uniform(*lead, dk), signs(*lead, dk)),
        "householder @ rotation": house @ rotation,
        "householder @ complex": house @ DiagonalGate(torch.complex(-uniform(*lead, dk), 3 * unit(*lead, dk))),
        "product": product,
        "product @ scalar": product @ scalar,
        "product @ diagonal": product @ diagonal,
        "low rank 1": DiagonalPlusLowRank(-uniform(*lead, dk), -erase, uniform(*lead, dk) * erase),
        "low rank 2": DiagonalPlusLowRank(-uniform(*lead, dk), 0.3 * unit(*lead, 2, dk), 0.3 * unit(*lead, 2, dk)),
        "dense": DenseTransition(0.5 * unit(*lead, dk, dk)),
    }
    return made[name]


def streams(batch: int, time: int, heads: int, dtype: torch.dtype, dk: int = DK, dv: int = DV) -> tuple[Tensor, ...]:
    """q, k, v and the first state."""
    gen = torch.Generator().manual_seed(time)
    shapes = ((batch, time, heads, dk), (batch, time, heads, dk), (batch, time, heads, dv), (batch, heads, dk, dv))
    return tuple(torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes)


def reference(made: Transition, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64 (complex128) with dense matrices from each class's own ``dense``."""

    def wide(x: Tensor) -> Tensor:
        return x.to(torch.complex128 if x.is_complex() else torch.float64)

    full = wide(made.map(wide).dense(q.shape[-1]))
    full = full.expand(*q.shape[:3], *full.shape[-2:])
    q, k, v, state = (wide(x).to(full.dtype) for x in (q, k, v, state))
    outputs = []
    for t in range(q.shape[1]):
        state = full[:, t] @ state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1), state


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)) if wanted.numel() else 0.0


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_the_definition(name: str) -> None:
    q, k, v, start = streams(2, 21, 3, torch.float64)
    made = transition(name, 2, 21, 3, torch.float64)
    wanted = reference(made, q, k, v, start)
    ran = []
    for method in ("auto", "sequential", "recurrent", "chunkwise", "dense", "associative", "fft"):
        if (method == "associative" and not made.is_diagonal) or (
            method == "fft" and not (made.is_diagonal and made.is_time_invariant)
        ):
            with pytest.raises(GramianError):
                scan(made, (k, v), q, start, method)
            continue
        found = scan(made, (k, v), q, start, method)
        assert max(error(*pair) for pair in zip(found, wanted, strict=True)) <= 1e-12, method
        ran.append(method)
    assert len(ran) >= 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_chunkwise_at_every_chunk_and_length(name: str, dtype: torch.dtype, bar: float) -> None:
    for time in (1, 63, 257, 1000):
        q, k, v, start = streams(1, time, 2, dtype)
        made = transition(name, 1, time, 2, dtype)
        wanted = reference(made, q, k, v, start)
        for chunk in (16, 32, 64, 128) if time == 257 else (64,):
            found = scan(made, (k, v), q, start, "chunkwise", chunk=chunk)
            for one, other in zip(found, wanted, strict=True):
                assert error(one, other) <= bar, (time, chunk)


@pytest.mark.parametrize("name", ERASING)
def test_the_delta_rule_writes_what_the_erase_says(name: str) -> None:
    """``write=v`` against ``write=(w, v)`` with w of the normal form."""
    batch, time, heads = 2, 37, 2
    q, _, v, start = streams(batch, time, heads, torch.float64)
    made = transition(name, batch, time, heads, torch.float64)
    steps = made.microsteps()
    assert steps is not None
    if len(steps) > 1:
        v = torch.randn(batch, time, heads, len(steps), DV, dtype=torch.float64)
        k = torch.stack([s.w for s in steps if s.w is not None], 3)
    else:
        assert steps[0].w is not None
        k = steps[0].w
    wanted = scan(made, (k, v), q, start, "sequential")
    for method in ("chunkwise", "recurrent", "sequential"):
        found = scan(made, v, q, start, method, chunk=16)
        assert max(error(*pair) for pair in zip(found, wanted, strict=True)) <= 1e-12, method


def gradients(name: str, method: str, tied: bool, dtype: torch.dtype, run: torch.dtype, time: int) -> list[Tensor]:
    """Of a random linear function of outputs and state: inputs rounded to `dtype`, computed in `run`."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        wide = torch.promote_types(run, torch.complex64) if x.is_complex() else run
        leaves.append(x.detach().to(wide).clone().requires_grad_())
        return leaves[-1]

    q, k, v, start = (leaf(x) for x in streams(2, time, 2, dtype))
    made = transition(name, 2, time, 2, dtype).map(leaf)
    write: Any = (k, v)
    if tied:
        write = v[:, :, :, None] * torch.arange(1.0, 4.0)[:, None].to(run) if "product" in name else v
    outputs, state = scan(made, write, q, start, method, chunk=16)
    gen = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=run)
    for x in (outputs, state):
        weight = torch.randn(x.shape, generator=gen, dtype=torch.complex128 if x.is_complex() else torch.float64)
        term = (x * weight.to(x.dtype)).sum()
        loss = loss + (term.real if x.is_complex() else term)
    loss.backward()
    return [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    for dtype, bar in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        for tied in (False, True) if name in ERASING else (False,):
            for time in (1, 37):
                found = gradients(name, "chunkwise", tied, dtype, dtype, time)
                wanted = gradients(name, "sequential", tied, dtype, torch.float64, time)
                assert len(found) == len(wanted) >= 4 - tied
                for one, other in zip(found, wanted, strict=True):
                    assert error(one, other) <= bar, (dtype, tied, time)


@pytest.mark.parametrize("name", ["householder @ scalar", "product @ diagonal", "low rank 1", "complex"])
def test_gradcheck(name: str) -> None:
    q, k, v, start = (x.requires_grad_() for x in streams(1, 5, 1, torch.float64, DK, 3))
    leaves: list[Tensor] = []
    transition(name, 1, 5, 1, torch.float64).map(lambda x: leaves.append(x.detach().clone().requires_grad_()) or x)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given_ = iter(tensors[4:])
        made = transition(name, 1, 5, 1, torch.float64).map(lambda _: next(given_))
        return scan(made, (tensors[1], tensors[2]), tensors[0], tensors[3], "chunkwise", chunk=2)

    assert torch.autograd.gradcheck(run, (q, k, v, start, *leaves), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_splits_equal_the_scan(name: str) -> None:
    time = 45
    q, k, v, start = streams(2, time, 2, torch.float32)
    made = transition(name, 2, time, 2, torch.float32)
    whole, last = scan(made, (k, v), q, start, "chunkwise", chunk=16)
    state: Tensor | None = start
    for t in range(time):
        now = made if made.is_time_invariant else made.expand(2, time, 2).map(lambda x: x[:, t])  # noqa: B023
        out, state = step(now, (k[:, t], v[:, t]), q[:, t], state)
        assert error(out, whole[:, t]) <= 1e-4
    assert state is not None
    assert error(state, last) <= 1e-5
    for cut in (1, 7, 16, 31, 44):
        state, parts = start, []
        for part in (slice(0, cut), slice(cut, time)):
            now = made if made.is_time_invariant else made.map(lambda x: x[:, part])  # noqa: B023
            out, state = scan(now, (k[:, part], v[:, part]), q[:, part], state, "chunkwise", chunk=16)
            parts.append(out)
        assert max(error(torch.cat(parts, 1), whole), error(state, last)) <= 1e-5, cut


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_step_changes_nothing_before(name: str) -> None:
    time, at = 70, 50
    q, k, v, _ = streams(1, time, 2, torch.float64)
    made = transition(name, 1, time, 2, torch.float64)
    before, _ = scan(made, (k, v), q, method="chunkwise", chunk=16)
    k, v = k.clone(), v.clone()
    k[:, at] *= 10
    v[:, at] *= 100
    after, _ = scan(made, (k, v), q, method="chunkwise", chunk=16)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])


@pytest.mark.parametrize("name", NAMES)
def test_padding_packing_and_reversal(name: str) -> None:
    time = 40
    q, k, v, start = streams(2, time, 2, torch.float64)
    made = transition(name, 2, time, 2, torch.float64)

    def part(rows: slice) -> Transition:
        return made if made.is_time_invariant else made.map(lambda x: x[:, rows])

    # Packing: three sequences in a row, the first with a state before it.
    segments = torch.zeros(2, time, dtype=torch.long)
    segments[:, 13:] = 1
    segments[:, 30:] = 2
    for method in ("chunkwise", "recurrent"):
        packed, last = scan(made, (k, v), q, start, method, segments=segments, chunk=16)
        for i, rows in enumerate((slice(0, 13), slice(13, 30), slice(30, time))):
            alone, state = scan(
                part(rows), (k[:, rows], v[:, rows]), q[:, rows], start if i == 0 else None, "sequential"
            )
            assert error(packed[:, rows], alone) <= 1e-12
        assert error(last, state) <= 1e-12
    # Padding: as if the padded steps were not there.
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, 25:] = False
    padded, last = scan(made, (k, v), q, start, "chunkwise", mask=mask, chunk=16)
    rows = slice(0, 25)
    short, state = scan(part(rows), (k[:, rows], v[:, rows]), q[:, rows], start, "sequential")
    assert error(padded[0, rows], short[0]) <= 1e-12
    assert error(last[0], state[0]) <= 1e-12
    assert not padded[0, 25:].abs().any()
    # Reversal: of the flipped inputs.
    flipped = made if made.is_time_invariant else made.map(lambda x: x.flip(1))
    wanted, state = scan(flipped, (k.flip(1), v.flip(1)), q.flip(1), start, "sequential")
    found, last = scan(made, (k, v), q, start, reverse=True, chunk=16)
    assert max(error(found, wanted.flip(1)), error(last, state)) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_sequence_map_is_a_lower_triangular_operator(name: str) -> None:
    time = 33
    q, k, v, _ = streams(2, time, 2, torch.float64)
    made = transition(name, 2, time, 2, torch.float64)
    op = sequence_map(made, k, q, index=(1, 0))
    assert isinstance(op, SequenceMap)
    assert op.shape == (time, time)
    full = op.dense()
    assert not full.triu(1).abs().any()
    outputs, _ = scan(made, (k, v), q, method="sequential")
    assert error(full @ v[1, :, 0].to(full.dtype), outputs[1, :, 0]) <= 1e-11
    if full.is_complex():
        return
    x, y = torch.randn(3, time, dtype=torch.float64), torch.randn(time, 2, dtype=torch.float64)
    assert error(op.apply(x), x @ full.mT) <= 1e-11
    assert error(op.T @ y, full.mT @ y) <= 1e-11
    assert error(op.T.dense(), full.mT) == 0
    backwards = sequence_map(made, k, q, index=(1, 0), reverse=True)
    assert error(backwards @ y, backwards.dense() @ y) <= 1e-11
    assert not backwards.dense().tril(-1).abs().any()


def test_all_keys_equal_and_full_reflections() -> None:
    """Beta 2 and one key: each step reflects; the compact form's system is far from the identity."""
    time, size = 4096, 64
    gen = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(size, generator=gen), dim=0).expand(1, time, 1, size)
    q, v = torch.randn(1, time, 1, size, generator=gen), torch.randn(1, time, 1, size, generator=gen)
    for strength, bar in ((2.0, 1e-3), (1.0, 1e-5)):
        made = Householder(key, torch.full((1, time, 1), strength))
        found, last = scan(made, v, q)
        wanted, state = scan(made.map(Tensor.double), v.double(), q.double(), method="recurrent")
        assert torch.isfinite(found).all()
        assert max(error(found, wanted), error(last, state)) <= bar


@pytest.mark.parametrize(("size", "factors"), [(3, 2), (5, 4)])
def test_permutations_are_tracked_exactly(size: int, factors: int) -> None:
    """A product of transpositions, each ``I - 2 k k^T`` with ``k = (e_i - e_j) / sqrt 2``, for 4096 steps."""
    time = 4096
    gen = torch.Generator().manual_seed(0)
    keys = torch.zeros(time, factors, size)
    now, wanted = torch.eye(size), []
    for t in range(time):
        image = torch.randperm(size, generator=gen).tolist()
        matrix = torch.eye(size)[image]
        now = matrix @ now
        wanted.append(now)
        rest, used = list(image), 0
        swaps = []
        for i in range(size):
            while rest[i] != i:
                j = rest[i]
                rest[i], rest[j] = rest[j], rest[i]
                swaps.append((i, j))
        for i, j in swaps:
            keys[t, used, i], keys[t, used, j] = 2**-0.5, -(2**-0.5)
            used += 1
        product = torch.eye(size)
        for j in range(factors):
            product = (torch.eye(size) - 2 * torch.outer(keys[t, j], keys[t, j])) @ product
        if not torch.allclose(product, matrix, atol=1e-5):  # the swaps compose in the other order
            keys[t, :used] = keys[t, :used].flip(0)
    made = HouseholderProduct(keys[None, :, None], torch.full((1, time, 1, factors), 2.0))
    v = torch.zeros(1, time, 1, factors, size)
    for row in range(size):  # reads one row of the state at every step
        q = torch.zeros(1, time, 1, size)
        q[..., row] = 1
        found, _ = scan(made, v, q, torch.eye(size)[None, None])
        target = torch.stack(wanted)[:, row]
        assert torch.equal(found[0, :, 0].argmax(-1), target.argmax(-1))
        assert error(found[0, :, 0], target) <= 1e-3
    capped = HouseholderProduct(keys[None, :, None], torch.ones(1, time, 1, factors))
    found, _ = scan(capped, v, q, torch.eye(size)[None, None])
    assert float((found[0, 100:, 0].round() == target[100:]).all(-1).double().mean()) <= 0.1


@pytest.mark.parametrize("name", ["scalar", "diagonal", "householder @ diagonal", "low rank 1"])
def test_gates_of_minus_a_hundred_neither_overflow_nor_lose_the_rest(name: str) -> None:
    time = 300
    q, k, v, start = (x.requires_grad_() for x in streams(1, time, 2, torch.float32, 16, 16))
    made = transition(name, 1, time, 2, torch.float32, 16)
    parts = getattr(made, "parts", (made,))
    gate = parts[-1]
    strong = torch.where(torch.rand_like(gate.log_decay) < 0.1, -100.0, -0.001).requires_grad_()
    swapped = type(gate)(strong, *(getattr(gate, f) for f in ("a", "b") if hasattr(gate, f)))
    made = parts[0] @ swapped if len(parts) > 1 else swapped
    found, last = scan(made, (k, v), q, start, "chunkwise")
    (found.sum() + last.sum()).backward()
    wanted = reference(made, q, k, v, start)
    assert max(error(found, wanted[0]), error(last, wanted[1])) <= 5e-6
    for x in (q, k, v, start, strong):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


def test_half_precision_inputs_keep_a_float32_state() -> None:
    q, _k, v, _ = streams(1, 130, 2, torch.float32)
    made = transition("householder @ scalar", 1, 130, 2, torch.float32)
    wanted, _ = scan(made, v, q)
    found, state = scan(made.map(Tensor.bfloat16), v.bfloat16(), q.bfloat16())
    assert found.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert error(found.float(), wanted) <= 0.05


def test_autocast_leaves_the_state_in_float32() -> None:
    q, _k, v, start = streams(1, 130, 2, torch.float32)
    made = transition("householder @ scalar", 1, 130, 2, torch.float32)
    wanted = scan(made, v, q, start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scan(made, v, q, start)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_constant_reads_and_keys_run_as_one_convolution() -> None:
    time, heads, size = 50, 3, 4
    gen = torch.Generator().manual_seed(0)
    made = DiagonalGate(torch.complex(-torch.rand(heads, size), torch.randn(heads, size)))
    k, q = (torch.randn(heads, size, generator=gen, dtype=torch.complex64) for _ in range(2))
    v = torch.randn(2, time, heads, 1, generator=gen)
    found, state = scan(made, (k, v), q)
    wanted, last = scan(made, (k.expand(2, time, heads, size), v), q.expand(2, time, heads, size), method="sequential")
    assert max(error(found, wanted), error(state, last)) <= 5e-6


@given(time=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_linear_recurrence(time: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    a, x = (torch.randn(2, time, 3, generator=gen, dtype=torch.float64) for _ in range(2))
    h0 = torch.randn(2, 3, generator=gen, dtype=torch.float64)
    h, rows = h0, []
    for t in range(time):
        h = a[:, t] * h + x[:, t]
        rows.append(h)
    assert torch.allclose(linear_recurrence(a, x, h0), torch.stack(rows, 1), rtol=1e-10, atol=1e-12)


def test_linear_recurrence_gradient() -> None:
    a, x = (torch.randn(1, 7, 2, dtype=torch.complex128, requires_grad=True) for _ in range(2))
    h0 = torch.randn(1, 2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(linear_recurrence, (a, x, h0))


def test_backward_is_linear_in_time() -> None:
    """The saved tensors grow with the length, not with its square, and stay below those of plain steps."""

    def saved(time: int, method: str) -> int:
        q, _, v, _ = (x.requires_grad_() for x in streams(1, time, 1, torch.float32, 32, 32))
        made = Householder(F.normalize(torch.randn(1, time, 1, 32), dim=-1).requires_grad_(), torch.rand(1, time, 1))
        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs, _ = scan(made, v, q, method=method)
        assert outputs.requires_grad
        return sum(seen.values())

    short, long = saved(512, "chunkwise"), saved(2048, "chunkwise")
    assert long <= 4.2 * short
    assert short * 4 <= saved(512, "recurrent")


@pytest.mark.parametrize("name", ["householder @ scalar", "diagonal", "product", "dense"])
def test_parts_combine(name: str) -> None:
    time, cuts = 40, ((0, 9), (9, 26), (26, 40))
    q, k, v, start = streams(2, time, 2, torch.float64)
    made = transition(name, 2, time, 2, torch.float64)
    wanted, last = scan(made, (k, v), q, start, "sequential")
    rows = [slice(*cut) for cut in cuts]
    parts = [summary(made.map(lambda x, r=r: x[:, r]), (k[:, r], v[:, r]), q[:, r]) for r in rows]
    states = combine(parts, start)
    assert error(states[-1], last) <= 1e-12
    for r, state in zip(rows, states, strict=False):
        found, _ = scan(made.map(lambda x, r=r: x[:, r]), (k[:, r], v[:, r]), q[:, r], state)
        assert error(found, wanted[:, r]) <= 1e-12


def _worker(rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    q, k, v, _ = (x.requires_grad_() for x in streams(1, 48, 2, torch.float64))
    part = slice(0, 20) if rank == 0 else slice(20, 48)
    made = transition("householder @ scalar", 1, 48, 2, torch.float64).map(lambda x: x[:, part])
    outputs, last = parallel_scan(made, (k[:, part], v[:, part]), q[:, part], chunk=8)
    outputs.square().sum().backward()
    queue.put((rank, outputs.detach().numpy(), last.detach().numpy(), k.grad.numpy(), v.grad.numpy()))  # type: ignore
    dist.destroy_process_group()


def test_two_processes_share_a_sequence() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = sorted(queue.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    q, k, v, _ = (x.requires_grad_() for x in streams(1, 48, 2, torch.float64))
    wanted, last = scan(transition("householder @ scalar", 1, 48, 2, torch.float64), (k, v), q, method="sequential")
    wanted.square().sum().backward()
    assert error(torch.cat([torch.from_numpy(r[1]) for r in results], 1), wanted) <= 1e-12
    for _, _, state, dk, dv in results:
        assert error(torch.from_numpy(state), last) <= 1e-12
        assert dk.shape == k.shape == (*dv.shape[:3], DK)
    for index, x in ((3, k), (4, v)):
        assert x.grad is not None
        assert error(torch.from_numpy(results[0][index] + results[1][index]), x.grad) <= 1e-10


def test_compiled() -> None:
    q, _, v, _ = streams(1, 70, 2, torch.float32)
    made = transition("householder @ scalar", 1, 70, 2, torch.float32)
    key, beta, log = made.parts[0].key, made.parts[0].strength, made.parts[1].log_decay  # type: ignore[attr-defined]

    def run(key: Tensor, beta: Tensor, log: Tensor, v: Tensor, q: Tensor) -> Tensor:
        return scan(Householder(key, beta) @ ScalarGate(log), v, q)[0].square().sum()

    results = []
    for function in (run, torch.compile(run, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (key, beta, log, v, q)]
        function(*inputs).backward()
        results.append([x.grad for x in inputs])
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        assert error(one, other) <= 1e-5


def test_what_is_wrong_is_said() -> None:
    q, k, v, start = streams(1, 5, 2, torch.float32)
    gate = ScalarGate(-torch.rand(1, 5, 2))
    for wrong, words in (
        (lambda: scan(gate, (k, v), q, method="chunked"), "did you mean chunkwise"),
        (lambda: scan(gate, v, q), r"write=\(k, v\)"),
        (lambda: scan(gate, (k[:, :3], v), q), "write key"),
        (lambda: scan(gate, (k, v), q[:, :3]), "read"),
        (lambda: scan(gate, (k, v), q, start[:, :1]), "state"),
        (lambda: scan(ScalarGate(-torch.rand(1, 4, 2)), (k, v), q), "leading dimensions"),
        (lambda: scan(DiagonalGate(-torch.rand(2, 5)), (k, v), q), "5 x 5"),
        (lambda: scan(Householder(k, torch.ones(1, 5, 2)), v, q, check=True), "spectral norm"),
        (lambda: scan(gate, (k, v * math.nan), q, check=True), "NaN"),
        (lambda: scan(gate, (k, v), q, mask=torch.ones(1, 4, dtype=torch.bool)), "mask"),
    ):
        with pytest.raises(GramianError, match=words):
            wrong()


@pytest.mark.parametrize("name", NAMES)
def test_each_matrix_is_an_operator(name: str) -> None:
    made = transition(name, 2, 3, 2, torch.float64)
    full = made.dense(DK)
    index = (1, 2, 0)[3 - len(made.lead) :]
    op = made.at(*index, size=DK)
    assert isinstance(op, Operator)
    assert error(op.dense(), full[index]) <= 1e-14
    norms = torch.linalg.matrix_norm(full, 2)
    assert bool((norms <= made.spectral_bound() * (1 + 1e-12)).all())
    assert made.is_diagonal == bool((full - torch.diag_embed(full.diagonal(dim1=-2, dim2=-1)) == 0).all())
    assert made.is_time_invariant == (len(made.lead) < 3)
    with pytest.raises(GramianError):
        made.at(*index, 0, size=DK)


def test_an_empty_sequence_keeps_the_state() -> None:
    q, k, v, start = streams(2, 3, 2, torch.float32)
    outputs, state = scan(Identity(), (k[:, :0], v[:, :0]), q[:, :0], start)
    assert outputs.shape == (2, 0, 2, DV)
    assert torch.equal(state, start)
