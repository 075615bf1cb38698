"""Host memory: when it is locked, how it is refused, and the places in it."""

from __future__ import annotations

import gc

import pytest
import torch
from hotloop_core.errors import BudgetError
from hotloop_engine.stores import HostBuffer, host, pinned_bytes
from hotloop_engine.stores.arena import Arena
from hypothesis import given, settings
from hypothesis import strategies as st

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)

sizes = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 10**6)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_places_never_overlap_and_merge_again_when_all_are_given_back(sizes):
    arena = Arena(CPU, 16 * 1024)
    taken = []
    for nbytes, pick in sizes:
        if taken and pick % 3 == 0:
            arena.give(taken.pop(pick % len(taken)))
        place = arena.take(nbytes)
        assert place.stop - place.start >= max(nbytes, 1) and place.start % 256 == 0
        for other in taken:
            same = place.chunk == other.chunk
            assert not (same and place.start < other.stop and other.start < place.stop)
        taken.append(place)
    for place in taken:
        arena.give(place)
    reserved = arena.reserved
    whole = arena.take(16 * 1024)  # the first chunk in one piece
    assert (whole.chunk, whole.start, arena.reserved) == (0, 0, reserved)


def test_a_buffers_memory_lives_as_long_as_a_tensor_over_it():
    buffer = HostBuffer(1000, CPU)
    x = buffer.view(256, (3, 4), torch.float32).fill_(2.0)
    assert torch.equal(buffer.flat[256:304], x.flatten().view(torch.uint8))
    assert buffer.view(0, (0, 7), torch.int64).shape == (0, 7)
    del buffer
    gc.collect()
    assert float(x.sum()) == 24.0
    assert pinned_bytes() == 0  # only memory for a CUDA device is locked


class Runtime:
    """CUDA's, as far as locking pages goes."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, []

    def __getattr__(self, name: str):
        def call(*arguments: int) -> object:
            self.calls.append(name)
            return b"out of memory" if name == "cudaGetErrorString" else self.code

        return call


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(host, "runtime", lambda: runtime)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: runtime.calls.append(f"synchronize {device}")
    )
    return runtime


def test_pages_stay_locked_until_the_last_tensor_over_them_is_gone(card: Runtime):
    buffer = HostBuffer(1000, CARD)
    x = buffer.view(0, (4,), torch.float32)
    cycle: list = [x]
    cycle.append(cycle)
    del buffer, x
    assert card.calls == ["cudaHostRegister"] and pinned_bytes() == 1000
    del cycle
    gc.collect()
    assert card.calls == ["cudaHostRegister", "synchronize cuda:0", "cudaHostUnregister"]
    assert pinned_bytes() == 0


def test_a_forked_child_leaves_the_parents_pages_locked(card: Runtime, monkeypatch):
    buffer = HostBuffer(1000, CARD)
    monkeypatch.setattr(host, "_CREATOR", -1)
    del buffer
    gc.collect()
    assert card.calls == ["cudaHostRegister"]


def test_pages_that_cannot_be_locked_are_an_error_with_amounts_that_torch_does_not_see(
    card: Runtime,
):
    card.code = 2
    with pytest.raises(BudgetError, match=r"0\.1 MiB .* out of memory\. .* were available.*ulimit"):
        HostBuffer(100_000, CARD)
    gc.collect()
    assert card.calls == ["cudaHostRegister", "cudaGetLastError", "cudaGetErrorString"]
    assert pinned_bytes() == 0


def test_memory_that_the_system_refuses_is_an_error_of_the_plan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "available_bytes", lambda: 2**62)
    with pytest.raises(BudgetError, match=r"the system refused 1073741824\.00 GiB"):
        HostBuffer(2**60, CPU)


def test_available_memory_is_the_containers_where_that_is_less(tmp_path, monkeypatch):
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 400000\nfile 300000\n")
    monkeypatch.setattr(host, "CONTROL_GROUP", group)
    assert host.available_bytes() == 600_000
    (group / "memory.max").write_text("max\n")
    assert host.available_bytes() > 600_000
