"""The stores on a CUDA device: exact, asynchronous, and no memory left behind."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hotloop_core.errors import PlanError
from hotloop_engine.stores import (
    HostActivationStore,
    HostBuffer,
    StreamedWeights,
    link_to,
    pinned_bytes,
)
from torch import Tensor

pytestmark = pytest.mark.gpu

MIB = 2**20
CUDA = torch.device("cuda", 0)
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "columns of a wider buffer": lambda x: x[:, 3:1990],
    "heads of a wider buffer": lambda x: x.view(300, 8, 256)[:, 1:5],
    "narrow columns": lambda x: x[:, 5:9],
    "every second row": lambda x: x[::2],
    "transposed": lambda x: x.t(),
    "one element": lambda x: x[3, 7],
    "broadcast": lambda x: x[:1].expand(7, -1),
    "empty": lambda x: x[:0],
    "three strides": lambda x: x.view(10, 30, 2048)[:, ::2, ::3],
}


def random_bits(*shape: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, device=CUDA) < 0.5
    wide = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, wide, dtype=torch.uint8, device=CUDA).view(dtype)


def same_bits(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = (t.contiguous().flatten().view(torch.uint8).cpu() for t in (x, y))
    return torch.equal(x, y)


def activation_store(
    capacity: int = 512 * MIB, ahead: int = 64 * MIB, **options
) -> HostActivationStore:
    return HostActivationStore(CUDA, capacity=capacity, ahead=ahead, **options)


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that it does not detect every kind
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def synchronisation_refused() -> Iterator[None]:
    set_sync_debug_mode("error")
    try:
        yield
    finally:
        set_sync_debug_mode("default")


def milliseconds(work: Callable[[], object]) -> float:
    """On the device, second of two runs."""
    for _ in range(2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
    return start.elapsed_time(stop)


@pytest.fixture(scope="module")
def shared() -> Iterator[HostActivationStore]:
    store = activation_store(capacity=64 * MIB)
    yield store
    store.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_get_of_put_is_bitwise_the_tensor_on_cuda(
    shared: HostActivationStore, dtype: torch.dtype, layout: str
):
    x = LAYOUTS[layout](random_bits(300, 2048, dtype=dtype))
    y = shared.get(shared.put(x))
    assert y.is_contiguous() and y.device == x.device and same_bits(x, y)


def test_rows_leave_without_a_temporary_on_the_device():
    store = activation_store()
    x = random_bits(4096, 4160, dtype=torch.bfloat16)[:, :4096]
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    ticket = store.put(x)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before
    assert same_bits(store.get(ticket), x)


def test_memory_of_what_is_away_is_free_and_peaks_stay_under_their_bounds():
    size, ahead = 32 * MIB, 64 * MIB
    store = activation_store(capacity=20 * size, ahead=ahead)
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    tickets = [
        store.put(torch.full((size // 4,), i, dtype=torch.float32, device=CUDA)) for i in range(20)
    ]
    store.settle()
    assert torch.cuda.max_memory_allocated() - before <= ahead + 2 * size
    assert allocated() == before
    torch.cuda.reset_peak_memory_stats()
    for i in reversed(range(20)):
        x = store.get(tickets[i])
        assert bool((x == i).all()), i
        del x
    assert torch.cuda.max_memory_allocated() - before <= ahead + 2 * size + size // 2
    del tickets
    assert allocated() == before
    assert store.statistics().stalls == 1 and store.statistics().grown == 0


def test_the_host_never_waits_on_the_hot_path():
    store = activation_store(ahead=16 * MIB)
    weights = StreamedWeights(CUDA, [[random_bits(4 * MIB, dtype=torch.uint8)] for _ in range(4)])
    x = random_bits(2048, 4096, dtype=torch.bfloat16)
    wide = random_bits(2048, 4160, dtype=torch.bfloat16)[:, :4096]

    def step() -> None:
        tickets = []
        for i in range(4):
            weights.fetch(i, next_index=min(i + 1, 3))
            tickets += [store.put(x + 1), store.put(wide)]
        for i in reversed(range(4)):
            weights.fetch(i, next_index=max(i - 1, 0))
            store.get(tickets.pop())
            store.get(tickets.pop())

    step()  # locks host memory and fills torch's cache
    torch.cuda.synchronize()
    with synchronisation_refused():
        torch.cuda._sleep(2_000_000_000)  # about a second
        busy = torch.cuda.Event()
        busy.record()
        step()
        assert not busy.query()
    torch.cuda.synchronize()


def test_bits_survive_a_device_that_lags_far_behind_the_host():
    store = activation_store(ahead=24 * MIB)
    values = [random_bits(1024, 4096, dtype=torch.bfloat16) for _ in range(12)]
    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(5):
        tickets = []
        for value in values:
            torch.cuda._sleep(2_000_000)
            tickets.append(store.put(value.clone()))
            torch.empty_like(value).fill_(0.0)  # takes what was freed, if it was freed too early
        for value in reversed(values):
            junk = torch.empty_like(value).fill_(
                1.0
            )  # still written to when its memory is next given out
            del junk
            back = store.get(tickets.pop())
            wrong += (back.view(torch.int16) != value.view(torch.int16)).sum()
            del back
    assert int(wrong) == 0


def test_two_hundred_rounds_of_random_shapes_leave_nothing_behind():
    chance = random.Random(0)
    store = activation_store(capacity=256 * MIB, ahead=16 * MIB)
    before, reserved, locked = allocated(), 0, 0
    for round_number in range(200):
        rows = chance.randrange(1, 3000)
        values = [
            random_bits(rows, chance.choice([1, 7, 128, 1024, 4096]), dtype=torch.bfloat16)
            for _ in range(chance.randrange(1, 7))
        ]
        tickets = [store.put(value) for value in values]
        kept = chance.randrange(len(values) + 1)  # the others are dropped, as by an exception
        del tickets[kept:], values[kept:]
        while tickets:
            assert same_bits(store.get(tickets.pop()), values.pop())
        store.settle()
        if round_number == 50:
            reserved, locked = torch.cuda.memory_reserved(), pinned_bytes()
    del values
    assert allocated() == before
    assert torch.cuda.memory_reserved() <= 1.25 * reserved + 64 * MIB
    assert pinned_bytes() == locked and store.statistics().grown == 0


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, store: HostActivationStore, fail: bool) -> Tensor:
        ctx.store, ctx.ticket = store, store.put(x)
        if fail:
            raise KeyboardInterrupt
        return x * x * x

    @staticmethod
    def backward(ctx, dy: Tensor):
        x = ctx.store.get(ctx.ticket)
        return 3 * x * x * dy, None, None


def test_an_interrupted_step_leaves_nothing_and_the_next_is_exact():
    store = activation_store(capacity=64 * MIB, ahead=16 * MIB)
    x = torch.randn(1024, 1024, device=CUDA).mul_(0.1).requires_grad_()

    def step(fail_at: int | None) -> Tensor:
        y = x
        for i in range(8):
            y = _Cube.apply(y + 1, store, i == fail_at)
            y = y / (1 + y.abs())
        return torch.autograd.grad(y.sum(), x)[0]

    expected = step(None)
    store.settle()
    before = allocated()
    for fail_at in (0, 3, 7):
        with pytest.raises(KeyboardInterrupt):
            step(fail_at)
        store.settle()
        assert allocated() == before
        assert torch.equal(step(None), expected)
    assert store.statistics().grown == 0


def test_a_retained_graph_is_refused():
    x = torch.randn(64, 64, device=CUDA, requires_grad=True)
    loss = _Cube.apply(x, activation_store(capacity=MIB), False).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PlanError, match="retained graph"):
        loss.backward()


def test_copies_run_beside_the_computation(capsys: pytest.CaptureFixture):
    store = activation_store(capacity=1024 * MIB, ahead=256 * MIB, timing=True)
    x = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    activations = [random_bits(8192, 4096, dtype=torch.bfloat16) for _ in range(12)]
    out = torch.empty_like(x)

    def step(stored: bool) -> None:
        tickets = []
        for activation in activations:
            torch.matmul(x, x, out=out)
            torch.matmul(x, x, out=out)
            if stored:
                tickets.append(store.put(activation))
        for _ in activations:
            if stored:
                store.get(tickets.pop())
            torch.matmul(x, x, out=out)
            torch.matmul(x, x, out=out)

    without, with_copies = milliseconds(lambda: step(False)), milliseconds(lambda: step(True))
    found = store.statistics()
    with capsys.disabled():
        print(
            f"\n{without:.1f} ms of GEMMs; with copies {with_copies:.1f} ms; "
            f"two steps copied for {found.copy_ms:.1f} ms and waited for {found.wait_ms:.1f} ms"
        )
    assert with_copies < 1.15 * without
    assert found.wait_ms < 0.3 * found.copy_ms


@pytest.mark.parametrize("width", [4096, 4160], ids=["rows", "contiguous"])
def test_the_link_is_used_at_its_rate(width: int, capsys: pytest.CaptureFixture):
    store = activation_store(capacity=1100 * MIB, ahead=0, timing=True)
    x = random_bits(32 * 1024, 4160, dtype=torch.bfloat16)[:, :width]
    rates = []
    for _ in range(3):
        before = store.statistics()
        tickets = [store.put(x) for _ in range(4)]
        middle = store.statistics()
        while tickets:
            store.get(tickets.pop())
        after = store.statistics()
        rates.append(
            (
                (middle.bytes_out - before.bytes_out) / (middle.copy_ms - before.copy_ms) / 1e6,
                (after.bytes_back - middle.bytes_back) / (after.copy_ms - middle.copy_ms) / 1e6,
            )
        )
    out, back = (max(way) for way in zip(*rates, strict=True))
    began = time.perf_counter()
    buffer = HostBuffer(1024 * MIB, CUDA)
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n{buffer.flat.nbytes / MIB:.0f} MiB of host memory locked in {seconds:.2f} s")
        print(f"\n{width} of 4160 columns: {out:.1f} GB/s out, {back:.1f} GB/s back")
    assert out > 5 and back > 5  # a pageable copy reaches less


def test_buffers_are_locked_while_a_tensor_over_them_lives_and_no_longer():
    before = pinned_bytes()
    buffer = HostBuffer(5 * MIB + 100, CUDA)
    view = buffer.view(256, (1000,), torch.float32)
    assert buffer.flat.is_pinned() and view.is_pinned()
    assert pinned_bytes() - before == 5 * MIB + 100
    del buffer
    gc.collect()
    assert view.is_pinned()
    del view
    gc.collect()
    assert pinned_bytes() == before
    for _ in range(30):  # the same addresses, again and again
        HostBuffer(3 * MIB, CUDA).flat.fill_(1)
    assert pinned_bytes() == before


def test_several_stores_share_a_process_and_give_everything_back():
    before, locked = allocated(), pinned_bytes()
    link = link_to(CUDA)
    stores = [activation_store(capacity=8 * MIB, link=link), activation_store(capacity=8 * MIB)]
    values = [random_bits(1000, 1000, dtype=torch.float32) for _ in stores]
    tickets = [store.put(value) for store, value in zip(stores, values, strict=True)]
    weights = StreamedWeights(CUDA, [[value] for value in values], link=link)
    weights.fetch(0, next_index=1)
    for store, ticket, value in zip(stores, tickets, values, strict=True):
        assert same_bits(store.get(ticket), value)
    assert all(same_bits(weights.host(i)[0], values[i].cpu()) for i in range(2))
    for store in (*stores, weights):
        store.close()
    del stores, tickets, values, weights, store, ticket, value, link
    assert allocated() == before and pinned_bytes() == locked


def test_streamed_layers_compute_bitwise_what_resident_ones_do():
    count, size = 7, 1024
    layers = [
        [
            torch.randn(size, size, device=CUDA).mul_(size**-0.5).bfloat16(),
            random_bits(100 + 300 * (i % 3), dtype=torch.uint8),
            torch.randn(size, device=CUDA).cpu(),
        ]
        for i in range(count)
    ]
    store = StreamedWeights(CUDA, layers)
    assert store.statistics().device_bytes == 0
    x = torch.randn(512, size, device=CUDA, dtype=torch.bfloat16)

    def passes(weights: Callable[[int, int | None], tuple[Tensor, ...]]) -> Tensor:
        h = x
        there = list(range(count))
        for order in (there, there[::-1]) * 10:
            for index, following in zip(order, [*order[1:], None], strict=True):
                w, codes, scale = weights(index, following)
                h = torch.tanh((h @ w.t()) * scale.bfloat16() + codes.float().mean().bfloat16())
        return h

    def streamed(index: int, following: int | None) -> tuple[Tensor, ...]:
        store.fetch(index, next_index=following)
        return store.views(index)

    resident = [[t.to(CUDA) for t in layer] for layer in layers]
    expected = passes(lambda index, _: tuple(resident[index]))
    streamed(0, 1)  # makes the slots
    with synchronisation_refused():
        found = passes(streamed)
    assert same_bits(found, expected)
    statistics = store.statistics()
    assert statistics.loads <= 2 + 20 * (count - 1) and statistics.stalls <= 3
    for index in range(count):
        store.fetch(index, next_index=None)
        pairs = zip(layers[index], store.views(index), store.host(index), strict=True)
        assert all(same_bits(t, v) and same_bits(t, h) for t, v, h in pairs)
