"""The stores on a simulated device, whose streams run as early or as late as their events allow.

Every place where an event is needed is a way to read memory before it is written or after it is someone else's. The
device makes each of them show: new memory is written to by whoever had it before, and freed memory by whoever gets it
next, in the order of the compute stream, as with torch's allocator.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence

import pytest
import torch
from hotloop_core.errors import PlanError
from hotloop_engine.stores import HostActivationStore, StreamedWeights
from hotloop_engine.stores.links import as_rows
from torch import Tensor

FRESH, FREED = 0xDD, 0xEE


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.position = stream, stream.queued

    @property
    def done(self) -> bool:
        return self.stream.finished >= self.position


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: deque[Event | Callable[[], object]] = deque()
        self.queued = self.finished = 0

    def queue(self, work: Event | Callable[[], object]) -> None:
        self.work.append(work)
        self.queued += 1
        self.device.pass_time()

    def record_event(self, event: object = None) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.queue(event)

    def step(self) -> bool:
        """One piece of work, if there is one that may run."""
        if not self.work or (isinstance(self.work[0], Event) and not self.work[0].done):
            return False
        work = self.work.popleft()
        if not isinstance(work, Event):
            work()
        self.finished += 1
        return True

    def run(self, until: int | None = None) -> None:
        """All work, and elsewhere only what it waits for."""
        while self.finished < (self.queued if until is None else until):
            if not self.step():
                event = self.work[0]
                assert isinstance(event, Event)
                event.stream.run(event.position)


class Block(bytearray):
    """Device memory that knows when the last tensor over it is gone; then kept, to see who still writes to it."""

    device: Device

    def __del__(self) -> None:
        self.device.free(self)


class Device:
    """A Link. order: which streams run as soon as they can; the others run only when those wait for them."""

    device = torch.device("cpu")

    def __init__(self, order: str) -> None:
        self.compute, self.out, self.back = Stream(self), Stream(self), Stream(self)
        self.random = random.Random(int(order)) if order.isdigit() else None
        self.eager = [] if self.random else [getattr(self, name) for name in order.split()]
        self.freed: list[Block] = []
        self.kept: list[Tensor] = []
        self.live_bytes = self.peak_bytes = self.copies = 0

    def pass_time(self) -> None:
        for stream in self.eager:
            stream.run()
        if self.random:
            for _ in range(self.random.randrange(5)):
                self.random.choice((self.compute, self.out, self.back)).step()

    def finish(self) -> None:
        for stream in (self.compute, self.out, self.back):
            stream.run()
        late = [block for block in self.freed if block.count(FREED) != len(block)]
        assert not late, (
            f"{len(late)} of {len(self.freed)} blocks were written after they were freed"
        )

    def current(self) -> Stream:
        return self.compute

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        block = Block(bytes([FRESH]) * nbytes)
        block.device = self
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.fill(block, FRESH)
        return torch.frombuffer(block, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def free(self, block: Block) -> None:
        self.live_bytes -= len(block)
        self.freed.append(block)
        self.fill(block, FREED)

    def fill(self, block: Block, byte: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        nbytes = len(block)
        self.compute.queue(lambda: ctypes.memset(address, byte, nbytes))

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        assert target.is_contiguous()
        to, at = target.data_ptr(), source.data_ptr()
        self.kept.append(target if stream is self.out else source)  # the host's side
        self.copies += 1
        rows = as_rows(source)
        if source.is_contiguous():
            stream.queue(lambda n=source.nbytes: ctypes.memmove(to, at, n))
        else:
            height, width, pitch = rows
            stream.queue(
                lambda: [
                    ctypes.memmove(to + i * width, at + i * pitch, width) for i in range(height)
                ]
            )

    def timed_event(self) -> None:
        return None

    def synchronize(self) -> None:
        self.out.run()
        self.back.run()

    def tensor(self, values: Tensor) -> Tensor:
        """A kernel that writes values [T, D] into the first columns of a wider buffer, if that is copied as rows."""
        extra = 8 if values.ndim == 2 and values[0].nbytes >= 512 else 0
        shape = (*values.shape[:-1], values.shape[-1] + extra)
        x = self.empty(shape, values.dtype)[..., : values.shape[-1]]
        to = [row.data_ptr() for row in x.reshape(-1, x.shape[-1])] if not extra else None
        to = to or [x[i].data_ptr() for i in range(x.shape[0])]
        rows = [bytes(r.view(torch.uint8).numpy()) for r in values.reshape(-1, values.shape[-1])]
        self.compute.queue(
            lambda: [ctypes.memmove(t, r, len(r)) for t, r in zip(to, rows, strict=True)]
        )
        return x

    def read(self, x: Tensor) -> list[bytes]:
        """A kernel that reads x; the result is there once it has run."""
        result: list[bytes] = []
        at = x.data_ptr()
        self.compute.queue(lambda n=x.nbytes: result.append(ctypes.string_at(at, n)))
        return result


ORDERS = ["compute", "out", "back", "out back", "back compute", *map(str, range(6))]


@pytest.fixture(params=ORDERS)
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)


def layers(count: int, sizes: Sequence[tuple[int, int]] = ((3, 200), (2, 64))) -> list[Tensor]:
    return [torch.randn(*sizes[i % len(sizes)]) for i in range(count)]


def as_bytes(x: Tensor) -> bytes:
    return bytes(x.contiguous().flatten().view(torch.uint8).numpy())


def forward(device: Device, store: HostActivationStore, values: list[Tensor]) -> list:
    return [store.put(device.tensor(v)) for v in values]


def backward(device: Device, store: HostActivationStore, tickets: list) -> list[list[bytes]]:
    results = []
    while tickets:
        x = store.get(tickets.pop())
        results.append(device.read(x))
        del x
    return results[::-1]


def assert_read(device: Device, results: list[list[bytes]], values: list[Tensor]) -> None:
    device.finish()
    assert [r[0] for r in results] == [as_bytes(v) for v in values]


@pytest.mark.parametrize("ahead", [0, 3000, 10**6])
def test_tensors_come_back_bitwise_in_every_order_of_the_streams(device: Device, ahead: int):
    store = HostActivationStore("cpu", capacity=9000, ahead=ahead, link=device)
    for _ in range(3):  # the later steps use the places of the earlier ones again
        values = layers(5)
        results = backward(device, store, forward(device, store, values))
        assert_read(device, results, values)
    assert device.live_bytes == 0


def test_a_step_may_begin_while_copies_of_the_step_before_are_under_way(device: Device):
    store = HostActivationStore("cpu", capacity=9000, ahead=4000, link=device)
    values = [layers(4) for _ in range(4)]
    results = [backward(device, store, forward(device, store, v)) for v in values]
    assert_read(device, [r for step in results for r in step], [v for step in values for v in step])


def test_passes_may_overlap_and_end_in_any_order(device: Device):
    store = HostActivationStore("cpu", capacity=20_000, ahead=3000, link=device)
    first, second, third = layers(4), layers(3), layers(5)
    a, b = forward(device, store, first), forward(device, store, second)
    read_a = backward(device, store, a)
    c = forward(device, store, third)
    read_b, read_c = backward(device, store, b), backward(device, store, c)
    assert_read(device, read_a + read_b + read_c, first + second + third)
    assert store.statistics().grown == 0


def test_a_dropped_pass_leaves_nothing_and_the_next_is_exact(device: Device):
    store = HostActivationStore("cpu", capacity=9000, ahead=4000, link=device)
    tickets = forward(device, store, layers(5))
    store.prefetch(tickets[2])  # on its way to memory that is given up below
    kept = backward(device, store, tickets[4:])
    tickets.clear()
    values = layers(5)
    results = backward(device, store, forward(device, store, values))
    assert_read(device, results, values)
    assert kept and device.live_bytes == 0 and store.statistics().grown == 0


def test_device_memory_of_what_is_away_is_freed(device: Device):
    ahead = 5000
    store = HostActivationStore("cpu", capacity=80_000, ahead=ahead, link=device)
    values = layers(20, [(3, 200)])
    largest = 3 * 208 * 4
    tickets = forward(device, store, values)
    assert device.peak_bytes <= ahead * 1.1 + 2 * largest  # held in flight, and the one being put
    store.settle()
    assert device.live_bytes == 0
    device.peak_bytes = 0
    results = backward(device, store, tickets)
    assert device.peak_bytes <= ahead + 2 * largest
    assert_read(device, results, values)


def test_gets_after_the_first_find_their_tensor_on_its_way(device: Device):
    store = HostActivationStore("cpu", capacity=80_000, ahead=5000, link=device)
    values = layers(9)
    assert_read(device, backward(device, store, forward(device, store, values)), values)
    assert store.statistics().stalls == 1


def test_one_tensor_is_under_way_each_way_however_large_it_is(device: Device):
    store = HostActivationStore("cpu", capacity=80_000, ahead=100, link=device)
    values = layers(6, [(3, 200)])
    tickets = forward(device, store, values)
    assert store.statistics().held_bytes == values[-1].nbytes
    assert_read(device, backward(device, store, tickets), values)
    assert store.statistics().stalls == 1


def test_a_tensor_may_set_out_again_before_it_has_arrived(device: Device):
    store = HostActivationStore("cpu", capacity=9000, ahead=10**6, link=device)
    values = layers(3)
    tickets = forward(device, store, values)
    store.prefetch(tickets[0])
    store.prefetch(tickets[0])
    assert store.statistics().bytes_back == values[0].nbytes
    assert_read(device, backward(device, store, tickets), values)


def test_a_get_starts_nothing_that_was_put_after_it(device: Device):
    store = HostActivationStore("cpu", capacity=9000, ahead=10**6, link=device)
    values = layers(4)
    tickets = forward(device, store, values)
    results = [device.read(store.get(ticket)) for ticket in tickets[:2]]
    assert store.statistics().bytes_back == values[0].nbytes + values[1].nbytes
    assert_read(device, results, values[:2])


@pytest.mark.parametrize("collected", [True, False], ids=["collected", "closed"])
def test_an_activation_store_ends_after_its_copies(device: Device, collected: bool):
    store = HostActivationStore("cpu", capacity=9000, ahead=10**6, link=device)
    tickets = forward(device, store, layers(4))
    store.prefetch(tickets[0])
    if not collected:
        store.close()
        with pytest.raises(PlanError, match="closed"):
            store.get(tickets[1])
    del store
    assert not device.back.work and not device.out.work
    device.finish()
    assert device.live_bytes == 0


@pytest.mark.parametrize("collected", [True, False], ids=["collected", "closed"])
def test_a_weight_store_ends_after_its_copies(device: Device, collected: bool):
    store = StreamedWeights("cpu", weight_layers(2), link=device)
    store.fetch(0, next_index=1)
    if not collected:
        store.close()
        with pytest.raises(PlanError, match="closed"):
            store.fetch(1, next_index=None)
    del store
    assert not device.back.work
    device.finish()
    assert device.live_bytes == 0


def weight_layers(count: int) -> list[list[Tensor]]:
    """Uneven: a packed projection, its statistics, and every third layer larger."""
    return [
        [
            torch.randint(0, 256, (40 + 30 * (i % 3), 10), dtype=torch.uint8),
            torch.randn(7 + i),
            torch.randn(5, 3).bfloat16(),
        ]
        for i in range(count)
    ]


def visit(
    device: Device, store: StreamedWeights, order: Sequence[int], ahead: Sequence[int | None]
) -> list[tuple[int, list[list[bytes]]]]:
    seen = []
    for index, following in zip(order, ahead, strict=True):
        store.fetch(index, next_index=following)
        seen.append((index, [device.read(view) for view in store.views(index)]))
    return seen


def assert_seen(device: Device, seen: list, values: list[list[Tensor]]) -> None:
    device.finish()
    for index, results in seen:
        assert [r[0] for r in results] == [as_bytes(t) for t in values[index]], index


def there_and_back(count: int) -> tuple[list[int], list[int | None]]:
    there, back = list(range(count)), list(range(count))[::-1]
    return there + back, [*there[1:], None, *back[1:], None]


@pytest.mark.parametrize("count, slots", [(5, 2), (1, 2), (3, 1), (4, 3), (2, 4)])
def test_layers_are_whole_when_used_there_and_back(device: Device, count: int, slots: int):
    values = weight_layers(count)
    store = StreamedWeights("cpu", values, slots=slots, link=device)
    for _ in range(2):
        assert_seen(device, visit(device, store, *there_and_back(count)), values)


def test_steps_follow_each_other_without_waiting_for_the_host(device: Device):
    values = weight_layers(5)
    store = StreamedWeights("cpu", values, link=device)
    steps = [visit(device, store, *there_and_back(5)) for _ in range(3)]
    assert_seen(device, [visited for step in steps for visited in step], values)


@pytest.mark.parametrize(
    "order, ahead",
    [
        ([0, 2, 4, 3, 1], [2, 4, 3, 1, None]),  # layers left out; neighbours in one slot
        ([0, 1, 2, 3], [3, 0, 0, 2]),  # the wrong direction
        ([2, 2, 2, 0], [2, 0, None, 0]),  # the same layer again
        ([4, 1, 3, 0], [None, None, None, None]),
    ],
)
def test_a_wrong_guess_of_the_next_layer_costs_time_but_no_bits(
    device: Device, order: list[int], ahead: list[int | None]
):
    values = weight_layers(5)
    store = StreamedWeights("cpu", values, link=device)
    assert_seen(device, visit(device, store, order, ahead), values)


def test_turning_round_loads_nothing_again(device: Device):
    store = StreamedWeights("cpu", weight_layers(6), link=device)
    visit(device, store, *there_and_back(6))
    assert device.copies == store.statistics().loads == 6 + 4
    assert store.statistics().stalls == 1
    assert device.live_bytes == store.statistics().device_bytes
