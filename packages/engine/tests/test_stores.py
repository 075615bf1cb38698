"""The stores where the CPU is the device, and every refusal."""

from __future__ import annotations

import gc
import pickle
import threading

import pytest
import torch
from hotloop_core.errors import BudgetError, PlanError, UnsupportedError
from hotloop_core.stores import ActivationStore, WeightStore
from hotloop_engine.stores import (
    HostActivationStore,
    StreamedWeights,
    host,
    link_to,
)
from hotloop_engine.stores.links import Rows, as_rows
from hotloop_testkit.numerics import poisoned_buffers
from torch import Tensor

MIB = 2**20
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "columns of a wider buffer": lambda x: x[:, 3:130],
    "heads of a wider buffer": lambda x: x.view(24, 4, 64)[:, 1:3],
    "every second row": lambda x: x[::2],
    "transposed": lambda x: x.t(),
    "one row": lambda x: x[5],
    "one element": lambda x: x[3, 7],
    "broadcast": lambda x: x[:1].expand(7, -1),
    "empty": lambda x: x[:0],
    "three strides": lambda x: x.view(4, 6, 256)[:, ::2, ::3],
}


def random_bits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Any bit pattern at all, NaN among them (bool: its two)."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(
        dtype
    )


def bits(x: Tensor) -> bytes:
    return bytes(x.contiguous().flatten().view(torch.uint8).numpy()) if x.numel() else b""


def activation_store(capacity: int = MIB, ahead: int = MIB, **options: bool) -> HostActivationStore:
    return HostActivationStore("cpu", capacity=capacity, ahead=ahead, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_get_of_put_is_bitwise_the_tensor(dtype: torch.dtype, layout: str):
    store: ActivationStore = activation_store()
    x = LAYOUTS[layout](random_bits(24, 256, dtype=dtype))
    before = bits(x)
    with poisoned_buffers():
        back = store.get(store.put(x))
    assert (back.shape, back.dtype, back.is_contiguous()) == (x.shape, x.dtype, True)
    assert bits(back) == before
    assert back.data_ptr() != x.data_ptr() or not x.numel()


def test_rows_are_recognised_and_nothing_else():
    x = torch.zeros(24, 256)
    assert as_rows(x[:, :200]) == Rows(24, 800, 1024)
    assert as_rows(x[::3, :200]) == Rows(8, 800, 3072)
    assert as_rows(x.view(2, 12, 256)[:, :, :200]) == Rows(24, 800, 1024)
    assert as_rows(x.view(24, 4, 64)[:, 1:4]) == Rows(24, 768, 1024)
    assert as_rows(x.view(24, 1, 256)[..., :200]) == Rows(24, 800, 1024)
    assert as_rows(x.view(4, 6, 256)[:, ::2, :200]) == Rows(12, 800, 2048)
    assert as_rows(x.view(4, 6, 256)[:, 1:6, :200]) is None  # two pitches
    assert as_rows(x[:, :100]) is None  # 400 bytes: too narrow to be worth it
    assert as_rows(x.t()) is None
    assert as_rows(x[:1].expand(5, -1)) is None  # rows that overlap
    assert as_rows(x[:, ::2]) is None


def test_a_second_redemption_is_refused_with_its_cause():
    store = activation_store()
    ticket = store.put(torch.ones(4))
    store.get(ticket)
    for use in (store.get, store.prefetch):
        with pytest.raises(PlanError, match=r"second time .* retained graph"):
            use(ticket)


def test_another_stores_ticket_is_refused():
    one, other = activation_store(), activation_store()
    ticket, mine = one.put(torch.ones(4)), other.put(torch.zeros(4))
    with pytest.raises(PlanError, match="not this store's"):
        other.get(ticket)
    assert torch.equal(other.get(mine), torch.zeros(4))
    assert torch.equal(one.get(ticket), torch.ones(4))


def test_places_of_dropped_tickets_are_used_again():
    store = activation_store(capacity=64 * 1024)
    for _ in range(10):
        tickets = [store.put(torch.randn(1000)) for _ in range(16)]
        del tickets
    assert store.statistics().grown == 0
    assert store.statistics().peak_bytes == 16 * 4000


def test_tickets_that_a_cycle_or_another_thread_drops_give_their_places_back():
    store = activation_store(capacity=4096)
    cycle: list = [store.put(torch.randn(1000))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    box = [store.put(torch.randn(1000))]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    store.put(torch.randn(1000))
    assert store.statistics().grown == 0


def test_a_batch_larger_than_planned_gets_more_host_memory_and_keeps_it():
    store = activation_store(capacity=4096, ahead=0)
    values = [torch.randn(1000) for _ in range(3)]
    for _ in range(3):
        tickets = [store.put(value) for value in values]
        assert all(torch.equal(store.get(t), v) for t, v in zip(tickets, values, strict=True))
        assert store.statistics().grown == 1
    assert 3 * 4000 <= store.statistics().reserved_bytes <= 4096 + 2 * MIB


def test_a_failed_put_leaves_the_store_as_it_was(monkeypatch: pytest.MonkeyPatch):
    store = activation_store(capacity=4096)
    kept = store.put(torch.arange(1000.0))
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match=r"are needed and 0\.0 MiB are available.*Offload"):
        store.put(torch.ones(1000))
    assert torch.equal(store.get(kept), torch.arange(1000.0))
    assert torch.equal(store.get(store.put(torch.ones(1000))), torch.ones(1000))


def test_no_host_memory_is_taken_before_the_first_put():
    store = activation_store(capacity=2**60)
    assert store.statistics().reserved_bytes == 0
    with pytest.raises(BudgetError, match="are needed"):
        store.put(torch.ones(1))


def test_statistics_count_what_was_moved():
    store = activation_store(timing=True)
    tickets = [store.put(torch.ones(1000)) for _ in range(3)]
    store.get(tickets[2])
    store.get(tickets[1])
    found = store.statistics()
    assert (found.tensors, found.bytes_out, found.bytes_back) == (3, 12000, 12000)
    assert (found.peak_bytes, found.stalls, found.grown, found.held_bytes) == (12000, 1, 0, 0)
    assert found.copy_ms > 0 and found.wait_ms >= 0
    assert activation_store().statistics().copy_ms is None


@pytest.mark.parametrize("options", [{"capacity": -1}, {"ahead": -1}])
def test_negative_sizes_are_refused(options: dict):
    with pytest.raises(PlanError, match="0 or more"):
        activation_store(**options)


def test_tensors_of_another_device_and_devices_without_a_link_are_refused():
    with pytest.raises(PlanError, match="tensor on meta was put into the store of cpu"):
        activation_store().put(torch.ones(3, device="meta"))
    with pytest.raises(UnsupportedError, match="cuda and cpu, not meta"):
        link_to("meta")


def test_a_closed_store_refuses_and_closing_twice_is_nothing():
    activations, weights = activation_store(), StreamedWeights("cpu", [[torch.ones(2)]])
    ticket = activations.put(torch.ones(2))
    for store in (activations, weights):
        store.close()
        store.close()
    uses = [
        lambda: activations.put(torch.ones(2)),
        lambda: activations.get(ticket),
        lambda: activations.prefetch(ticket),
        activations.statistics,
        lambda: weights.fetch(0, next_index=None),
        lambda: weights.views(0),
        lambda: weights.host(0),
        lambda: weights.add_layer([torch.ones(2)]),
        weights.statistics,
    ]
    for use in uses:
        with pytest.raises(PlanError, match="closed"):
            use()


def test_a_gradient_passes_through_a_stored_tensor_in_autograds_thread():
    store = activation_store()

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.ticket = store.put(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * store.get(ctx.ticket) * dy

    x = torch.randn(50, requires_grad=True)
    loss = Square.apply(Square.apply(x)).sum()
    loss.backward(retain_graph=True)
    assert torch.allclose(x.grad, 4 * x.detach() ** 3)
    with pytest.raises(PlanError, match="retained graph"):
        loss.backward()


def weight_layers(count: int = 4) -> list[list[Tensor]]:
    return [
        [random_bits(3 + i, 5, dtype=dtype) for dtype in DTYPES] + [torch.tensor(1.5)]
        for i in range(count)
    ]


def test_weights_are_bitwise_what_was_put_in_on_both_sides():
    layers = weight_layers()
    store = StreamedWeights("cpu", iter(layers))
    concrete: WeightStore = store
    for index in [0, 1, 2, 3, 2, 1, 0]:
        concrete.fetch(index, next_index=None)
        for mine, at_home, there in zip(
            layers[index], store.host(index), concrete.views(index), strict=True
        ):
            assert (mine.shape, mine.dtype) == (at_home.shape, at_home.dtype)
            assert (mine.shape, mine.dtype) == (there.shape, there.dtype)
            assert bits(mine) == bits(at_home) == bits(there)


def test_addresses_stay_a_layers_own_and_are_aligned():
    store = StreamedWeights("cpu", weight_layers(), slots=2)
    before = [[v.data_ptr() for v in store.views(i)] for i in range(len(store))]
    for index in (0, 1, 2, 3, 2):
        store.fetch(index, next_index=None)
    assert before == [[v.data_ptr() for v in store.views(i)] for i in range(len(store))]
    starts = [[address - addresses[0] for address in addresses] for addresses in before]
    assert all(start % 256 == 0 for layer in starts for start in layer)
    assert before[0][0] == before[2][0] != before[1][0] == before[3][0]


def test_a_store_at_rest_holds_no_device_memory_and_goes_on():
    weights = StreamedWeights("cpu", [[torch.full((5,), float(i))] for i in range(3)])
    weights.fetch(1, next_index=2)
    weights.rest()
    assert weights.statistics().device_bytes == 0
    weights.fetch(2, next_index=None)
    assert torch.equal(weights.views(2)[0], torch.full((5,), 2.0))


def test_a_store_first_used_in_inference_mode_goes_on_in_training():
    layers = [[torch.randn(3, 4)], [torch.randn(3, 4)], [torch.randn(3, 4)]]
    store = StreamedWeights("cpu", layers)
    with torch.inference_mode():
        store.fetch(0, next_index=1)
    store.fetch(2, next_index=None)
    x = torch.randn(4, requires_grad=True)
    (store.views(2)[0] @ x).sum().backward()
    assert torch.equal(x.grad, layers[2][0].sum(0))


def test_views_and_transposed_tensors_are_kept_whole():
    x = torch.randn(6, 8)
    store = StreamedWeights("cpu", [[x.t(), x[:, 2:5], torch.empty(0, 4)]])
    store.fetch(0, next_index=None)
    assert torch.equal(store.views(0)[0], x.t())
    assert torch.equal(store.host(0)[1], x[:, 2:5])
    assert store.views(0)[2].shape == (0, 4)


def test_a_saved_host_tensor_takes_no_more_than_its_own_bytes():
    store = StreamedWeights("cpu", [[torch.ones(10), torch.ones(100_000)]])
    assert store.host(0)[0].untyped_storage().nbytes() == 40
    assert len(pickle.dumps(store.host(0)[0])) < 2000


def test_layers_are_refused_after_the_first_use_and_so_are_indices_that_are_not_there():
    store = StreamedWeights("cpu", weight_layers(2))
    store.fetch(1, next_index=0)
    with pytest.raises(PlanError, match="after the first use"):
        store.add_layer([torch.ones(1)])
    uses = [
        lambda: store.fetch(2, next_index=None),
        lambda: store.fetch(0, next_index=-1),
        lambda: store.views(2),
        lambda: store.host(-1),
    ]
    for use in uses:
        with pytest.raises(PlanError, match="with 2 layers"):
            use()
    with pytest.raises(PlanError, match="1 or more"):
        StreamedWeights("cpu", slots=0)


def test_weight_statistics_count_loads_and_memory():
    store = StreamedWeights("cpu", [[torch.ones(64)], [torch.ones(32)], [torch.ones(64)]])
    store.fetch(0, next_index=1)
    store.fetch(1, next_index=2)
    found = store.statistics()
    assert (found.layers, found.loads, found.stalls) == (3, 3, 1)
    assert (found.bytes_back, found.host_bytes, found.device_bytes) == (768, 768, 512)
    assert found.copy_ms is None
