"""Matrix products: what is left to torch, how an algorithm is chosen, and on a card every layout against fp64."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import pytest
import torch
from hotloop_engine.gemm import chosen, cublaslt, gemm, library_version, matmul_to
from hotloop_engine.gemm.chosen import CALLS_BEFORE
from hotloop_engine.gemm.trial import ROUNDS, TURN_MS, fastest

HALF = (torch.bfloat16, torch.float16)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_of_the_cpu_are_torchs(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(5, 7, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    residual = torch.randn(5, 3, dtype=dtype)
    out = torch.full((5, 9), torch.nan, dtype=dtype)[:, :3]
    gemm(a, b, out)
    assert torch.equal(out, a @ b)
    gemm(a, b, out, residual, 0.5)
    assert torch.equal(out, torch.addmm(residual, a, b, alpha=0.5))
    assert torch.equal(matmul_to(a, b, dtype), a @ b)


def test_a_residual_of_another_dtype_is_added_to_the_rounded_product():
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    residual, out = torch.randn(5, 3), torch.empty(5, 3)
    gemm(a, b, out, residual, 2.0)
    assert torch.equal(out, torch.add(residual, a @ b, alpha=2.0))


def problem(a, b, out, residual=None, alignment=256):
    return chosen.problem_of(a, b, out, residual, alignment)


@pytest.mark.parametrize("dtype", HALF)
def test_layouts_are_read_off_strides(dtype):
    a, b = torch.empty(8, 32, dtype=dtype)[:, :16], torch.empty(16, 24, dtype=dtype)
    out = torch.empty(8, 40, dtype=dtype)[:, :24]
    assert problem(a, b, out) == (8, 24, 16, True, 32, True, 24, 0, 40, dtype, 256)
    assert problem(a, b.T.contiguous().T, out, out)[5:8] == (False, 16, 40)
    assert problem(a[:1], b, out[:1])[3:5] == (True, 32)
    assert problem(torch.empty(1, 16, dtype=dtype), b, out[:1])[3:5] == (True, 16)


def test_what_cublaslt_does_not_take_is_torchs():
    a, b = (torch.empty(size, size, dtype=torch.bfloat16) for size in (16, 16))
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    assert problem(a, b, out) is not None
    assert problem(a.float(), b.float(), out.float()) is None
    assert problem(a, b, out.float()) is None
    assert problem(a, b.half(), out) is None
    assert problem(a[:1].expand(16, 16), b, out) is None  # rows that lie over each other
    assert problem(a[:, ::2], b[:8], out) is None
    assert problem(a, b, out.T) is None  # the result goes row by row
    assert problem(a, b, out, out.T) is None
    assert problem(a, b, out, out[0]) is None
    assert problem(a, b, out, out.float()) is None
    assert problem(a[:, :0], b[:0], out) is None
    assert problem(a, b, out, alignment=8) is None


def test_structures_have_the_sizes_of_the_interface():
    assert ctypes.sizeof(cublaslt.Algorithm) == 64
    assert ctypes.sizeof(cublaslt._Found) == 96


def test_a_torch_without_cuda_has_no_library(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cublaslt.functions.__wrapped__() is None


def test_a_library_that_is_not_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert cublaslt.functions.__wrapped__() is None


@pytest.fixture
def fresh():
    """Nothing is known yet."""
    chosen._known.clear()
    chosen._devices.clear()


def operand(rows: int, columns: int, by_rows: bool, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] in its own order, inside a wider buffer."""
    shape = (rows, columns) if by_rows else (columns, rows)
    inside = torch.randn(shape[0], -(-shape[1] // 8) * 8 + 16, device="cuda")[:, : shape[1]].to(
        dtype
    )
    wide = torch.full((shape[0], -(-shape[1] // 8) * 8 + 16), torch.nan, dtype=dtype, device="cuda")
    wide[:, : shape[1]] = inside
    view = wide[:, : shape[1]]
    return view if by_rows else view.T


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("residual", ["none", "other", "out"])
@pytest.mark.parametrize("orders", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("size", [(1, 64, 8), (63, 72, 40), (1000, 520, 264), (300, 4096, 4160)])
def test_every_layout_is_no_less_exact_than_torch(fresh, size, orders, residual, dtype):
    torch.manual_seed(0)
    m, n, k = size
    a, b = operand(m, k, orders[0], dtype), operand(k, n, orders[1], dtype)
    room = torch.full((m, n + 24), torch.nan, dtype=dtype, device="cuda")
    out = room[:, :n]
    added = None if residual == "none" else torch.randn(m, n, device="cuda").to(dtype)
    truth, alpha = a.double() @ b.double(), 1.0
    if added is not None:
        alpha = 0.75
        truth = added.double() + alpha * truth
    best = truth.to(dtype)
    if residual == "out":
        best = added + alpha * (a @ b)
        out.copy_(added)
        added = out
    gemm(a, b, out, added, alpha)
    assert chosen._devices, "this went to torch"
    assert error(out, truth) <= 1.02 * error(best, truth) + 1e-5
    assert room[:, n:].isnan().all()


@pytest.mark.gpu
def test_a_residual_is_added_before_rounding(fresh):
    torch.manual_seed(0)
    a, b = (torch.randn(4096, 1024, device="cuda").bfloat16() for _ in range(2))
    residual = torch.randn(4096, 4096, device="cuda").bfloat16()
    out = torch.empty_like(residual)
    gemm(a, b.T, out, residual)
    once = (residual.double() + a.double() @ b.double().T).bfloat16()
    assert (out == once).float().mean() > 0.99


@pytest.mark.gpu
def test_rows_at_odd_addresses_are_torchs(fresh):
    a = torch.randn(64, 65, device="cuda").bfloat16()[:, 1:]
    b, out = (
        torch.randn(64, 64, device="cuda").bfloat16(),
        torch.empty(64, 64, device="cuda").bfloat16(),
    )
    gemm(a, b, out)
    assert torch.equal(out, a @ b)


@pytest.mark.gpu
@pytest.mark.parametrize("by_rows", [True, False])
def test_the_choice_decides_about_time_and_not_about_bits(fresh, by_rows, monkeypatch):
    torch.manual_seed(0)
    a, b = operand(4096, 4160, True, torch.bfloat16), operand(4160, 6144, by_rows, torch.bfloat16)
    tried: list[int] = []

    def number(which, ways, clock):
        tried.append(len(ways))
        return min(which, len(ways) - 1)

    monkeypatch.setattr(chosen, "CALLS_BEFORE", 0)
    outs = []
    for which in range(8):
        chosen._known.clear()
        chosen._devices.clear()
        monkeypatch.setattr(chosen, "fastest", partial(number, which))
        outs.append(torch.empty(4096, 6144, device="cuda", dtype=torch.bfloat16))
        gemm(a, b, outs[-1])
    assert min(tried) > 1
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.gpu
def test_a_trial_on_a_card_leaves_the_product_and_is_the_only_one(fresh, monkeypatch):
    torch.manual_seed(0)
    a, b = operand(4096, 4160, True, torch.bfloat16), operand(4160, 6144, True, torch.bfloat16)
    outs = [torch.empty(4096, 6144, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    trials: list[int] = []

    def counted(ways, clock):
        trials.append(fastest(ways, clock))
        return trials[-1]

    monkeypatch.setattr(chosen, "fastest", counted)
    for count in range(CALLS_BEFORE + 5):
        gemm(a, b, outs[count > 0])
        assert len(trials) == (count >= CALLS_BEFORE)
    assert torch.equal(*outs)
    gemm(a[:3900], b, outs[1][:3900])
    assert len(trials) == 1
    assert torch.equal(outs[0][:3900], outs[1][:3900])


@pytest.mark.gpu
def test_what_is_added_to_is_not_tried_out(fresh):
    torch.manual_seed(0)
    a, b = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    before = torch.randn(4096, 4096, device="cuda").bfloat16()
    out = before.clone()
    gemm(a, b, out, out)
    truth = before.double() + a.double() @ b.double()
    assert error(out, truth) <= 1.02 * error(before + a @ b, truth)


@pytest.mark.gpu
def test_a_graph_records_products_and_waits_for_nothing(fresh):
    a, b = (torch.randn(2048, 2048, device="cuda").bfloat16() for _ in range(2))
    out = torch.zeros(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for known_before in (False, True):
        if known_before:
            gemm(a, b, out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gemm(a, b, out)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, a @ b)


@pytest.mark.gpu
def test_streams_do_not_share_a_workspace(fresh):
    torch.manual_seed(0)
    a, b = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    truth = a @ b
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs = []
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            outs.append(torch.empty_like(truth))
            gemm(a, b, outs[-1])
    torch.cuda.synchronize()
    assert all(torch.equal(out, truth) for out in outs)


@pytest.mark.gpu
def test_the_library_is_torchs_own():
    version = library_version()
    assert version is not None
    assert version.partition(".")[0] == str(torch.version.cuda).partition(".")[0]
