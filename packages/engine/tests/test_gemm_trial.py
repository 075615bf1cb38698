"""How an algorithm is chosen for products that have come often; on a card that there is not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import pytest
import torch
from hotloop_engine.gemm import chosen
from hotloop_engine.gemm.chosen import CALLS_BEFORE
from hotloop_engine.gemm.trial import ROUNDS, TURN_MS, fastest


class FakeDevice:
    """Work takes the time that it is told to take; marks read the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[int] = []

    def mark(self) -> float:
        return self.now

    def between(self, start: float, stop: float) -> float:
        return stop - start

    def ways(self, *times: Callable[[float], float]) -> list[Callable[[], None]]:
        """Each takes what its function says of the time that has passed."""

        def call(number: int) -> None:
            self.calls.append(number)
            self.now += times[number](self.now)

        return [partial(call, number) for number in range(len(times))]


def takes(milliseconds: float) -> Callable[[float], float]:
    return lambda _: milliseconds


def test_the_fastest_way_is_found_and_the_hopeless_leave_early():
    device = FakeDevice()
    ways = device.ways(takes(3.0), takes(2.0), takes(9.0), takes(2.1))
    assert fastest(ways, device) == 1
    assert device.calls.count(2) == 2  # one that says how long turns are, and one turn
    assert device.calls.count(3) == 1 + ROUNDS


def test_one_slow_turn_does_not_decide():
    device = FakeDevice()
    a_round = 1.0 + 1.0 + 1.04  # its first call is not timed
    slow = (2 * a_round - 0.1, 3 * a_round - 0.1)
    ways = device.ways(lambda now: 1.05 if slow[0] < now < slow[1] else 1.0, takes(1.04))
    assert fastest(ways, device) == 0
    assert device.now > slow[1]


def test_short_work_is_repeated_until_a_turn_is_long_enough():
    device = FakeDevice()
    assert fastest(device.ways(takes(0.02), takes(0.01)), device) == 1
    assert device.calls[-1 - round(TURN_MS / 0.01) :] == [1] * (1 + round(TURN_MS / 0.01))


def test_one_way_is_not_tried():
    device = FakeDevice()
    assert fastest(device.ways(takes(1.0)), device) == 0
    assert not device.calls


class FakeOperation:
    """Algorithms are numbers; they take the milliseconds of `times`, and serve rows up to theirs of `most_rows`."""

    times: ClassVar[dict[int, float]] = {}
    most_rows: ClassVar[dict[int, int]] = {}
    refuses: ClassVar[set[int]] = set()
    clock: ClassVar[FakeDevice]
    launched: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, library, problem):
        self.problem = problem

    def algorithms(self):
        return [n for n in self.times if self.takes(n)]

    def takes(self, algorithm):
        return self.problem.m <= self.most_rows.get(algorithm, 2**31)

    def launch(self, algorithm, a, b, residual, out, alpha, workspace, stream):
        if algorithm in self.refuses:
            return False
        self.launched.append((self.problem.m, algorithm))
        self.clock.now += self.times[algorithm]
        return True


@pytest.fixture
def fake(monkeypatch):
    """A card that there is not: `product` on CPU tensors, with algorithms 0, 1 and 2."""
    FakeOperation.times, FakeOperation.most_rows = {0: 3.0, 1: 2.0, 2: 4.0}, {}
    FakeOperation.refuses, FakeOperation.launched = set(), []
    FakeOperation.clock = FakeDevice()
    monkeypatch.setattr(chosen, "Operation", FakeOperation)
    monkeypatch.setattr(chosen, "Library", lambda functions: None)
    monkeypatch.setattr(chosen, "functions", object)
    monkeypatch.setattr(chosen, "StreamClock", lambda: FakeOperation.clock)
    monkeypatch.setattr(chosen.Device, "workspace", lambda self, stream: 0)
    monkeypatch.setattr(chosen.Device, "_agreeing", lambda self, problem, at, found, stream: found)
    monkeypatch.setattr(chosen, "_known", {})
    monkeypatch.setattr(chosen, "_devices", {})
    monkeypatch.setattr(chosen, "WORTH_A_TRIAL", 2 * 64 * 64 * 64)
    monkeypatch.setattr(chosen, "MOST_ALIGNMENT", 16)  # a host's memory begins now here, now there
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FakeOperation


def call(rows, residual=None, *, times=1):
    """The algorithms of so many products [rows, 64] of 64 terms."""
    a, b = torch.zeros(rows, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    out = torch.zeros(rows, 64).bfloat16()
    added = {"none": None, "out": out, "other": torch.zeros_like(out)}[residual or "none"]
    taken = []
    for _ in range(times):
        assert chosen.product(a, b, out, added, 1.0)
        taken.append(FakeOperation.launched[-1][1])
    return taken


@pytest.mark.parametrize("residual", ["none", "other"])
def test_products_are_tried_out_once_they_have_come_often(fake, residual):
    assert call(256, residual, times=CALLS_BEFORE) == [0] * CALLS_BEFORE
    assert {way for _, way in fake.launched} == {0}
    assert call(256, residual, times=3) == [1] * 3
    tried = len(fake.launched)
    assert call(256, residual, times=9) == [1] * 9
    assert len(fake.launched) == tried + 9


def test_sizes_that_are_alike_share_a_trial_as_far_as_the_algorithm_serves_them(fake):
    fake.most_rows = {1: 250}
    assert set(call(251)) | set(call(252)) == {0}
    call(249, times=CALLS_BEFORE)
    assert call(250) == [1]  # the last of those calls had them tried out
    assert call(249) == [1]
    assert call(251) + call(252) + call(253) == [0] * 3
    assert set(call(400, times=CALLS_BEFORE)) == {0}


def test_what_is_small_or_added_to_is_not_tried_out(fake):
    assert set(call(63, times=2 * CALLS_BEFORE)) == {0}
    assert set(call(256, "out", times=2 * CALLS_BEFORE)) == {0}
    assert len(fake.launched) == 4 * CALLS_BEFORE


def test_while_a_graph_is_recorded_nothing_is_tried_out_and_nothing_new_is_met(fake, monkeypatch):
    call(256, times=CALLS_BEFORE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert set(call(256, times=5)) == {0}
    x = torch.zeros(128, 64).bfloat16()
    assert not chosen.product(x, x.T, torch.zeros(128, 128).bfloat16(), None, 1.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert call(256) == [1]


def test_an_algorithm_that_does_not_run_is_not_chosen_and_a_product_without_one_is_torchs(fake):
    fake.refuses = {1}
    assert set(call(256, times=CALLS_BEFORE + 3)) == {0}
    fake.refuses = {0}
    x = torch.zeros(16, 64).bfloat16()
    assert not chosen.product(x, x.T, torch.zeros(16, 16).bfloat16(), None, 1.0)


def test_problems_are_forgotten_before_there_are_too_many(fake, monkeypatch):
    monkeypatch.setattr(chosen, "MOST_KNOWN", 5)
    for rows in range(64, 84):
        call(rows)
    assert len(chosen._known) <= 5
    gc.collect()
    (device,) = chosen._devices.values()
    assert sum(len(alike.members) for alike in device._alike.values()) <= 5
