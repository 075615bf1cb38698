"""Matrix products: what is left to torch, how an algorithm is chosen, and on a card every layout against fp64."""

from __future__ import annotations

import ctypes
from itertools import cycle

import pytest
import torch
from hotloop_engine.gemm import chosen, cublaslt, gemm, library_version, matmul_to
from hotloop_engine.gemm.trial import COUNTED, Trial

HALF = (torch.bfloat16, torch.float16)


class FakeClock:
    """Moments are read off a list; a stretch is over once the device has got so far."""

    def __init__(self) -> None:
        self.now, self.reached = 0.0, float("inf")

    def mark(self) -> float:
        return self.now

    def between(self, start: float, stop: float) -> float | None:
        return stop - start if stop <= self.reached else None


def run(
    trial: Trial, seconds: list[float], calls: int, able: list[bool] | None = None
) -> list[int]:
    """So many calls, each way taking its seconds; the ways that were taken."""
    taken = []
    for _ in range(calls):
        way, timed = trial.turn(able or [True] * len(seconds))
        assert way is not None
        start = trial.clock.mark()
        trial.clock.now += seconds[way]
        if timed:
            trial.timed(way, 1.0, start, trial.clock.mark())
        taken.append(way)
    return taken


def test_a_trial_settles_on_the_fastest_way_and_leaves_the_hopeless_early():
    trial = Trial(4, FakeClock())
    taken = run(trial, [3.0, 2.0, 9.0, 2.1], 40)
    assert trial.settled == 1
    assert taken[-1] == 1
    assert taken.count(2) == 2  # one that did not count, one that was enough
    assert taken.count(3) == 1 + COUNTED


def test_a_first_call_that_loads_a_kernel_does_not_count():
    trial = Trial(2, FakeClock())
    slow_once = {0: cycle([1.0]), 1: iter([50.0] + [0.5] * 100)}
    for _ in range(20):
        way, timed = trial.turn([True, True])
        assert way is not None
        start = trial.clock.mark()
        trial.clock.now += next(slow_once[way])
        if timed:
            trial.timed(way, 1.0, start, trial.clock.mark())
    assert trial.settled == 1


def test_while_the_device_is_behind_nothing_is_decided_and_nothing_more_is_timed():
    trial = Trial(2, FakeClock())
    trial.clock.reached = -1.0
    run(trial, [2.0, 1.0], 2 * (1 + COUNTED))
    assert trial.settled is None
    assert trial.turn([True, True]) == (0, False)  # nothing is known: cuBLASLt's own choice
    trial.clock.reached = float("inf")
    assert trial.turn([True, True]) == (1, False)
    assert trial.settled == 1


def test_times_count_per_row():
    trial = Trial(2, FakeClock())
    for _ in range(20):
        way, timed = trial.turn([True, True])
        start = trial.clock.mark()
        rows, each = (1000, 1.0) if way == 0 else (10, 2.0)
        trial.clock.now += rows * each
        if timed:
            assert way is not None
            trial.timed(way, rows, start, trial.clock.mark())
    assert trial.settled == 0


def test_a_way_that_does_not_serve_or_does_not_run_is_passed_over():
    trial = Trial(3, FakeClock())
    assert set(run(trial, [3.0, 1.0, 2.0], 30, able=[True, False, True])) == {0, 2}
    trial.drop(2)
    trial.drop(0)
    assert trial.settled == 1
    assert trial.turn([True, False, True]) == (0, False)
    assert trial.turn([False, False, False]) == (None, False)


def test_a_call_that_cannot_be_timed_takes_no_turn():
    trial = Trial(2, FakeClock())
    for _ in range(20):
        assert trial.turn([True, True], timing=False) == (0, False)
    run(trial, [2.0, 1.0], 20)
    assert trial.settled == 1


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
    if added is None:
        eager = a @ b
    else:
        alpha = 0.75
        truth = added.double() + alpha * truth
        eager = torch.addmm(added, a, b, alpha=alpha)
    if residual == "out":
        out.copy_(added)
        added = out
    gemm(a, b, out, added, alpha)
    assert chosen._devices, "this went to torch"
    assert error(out, truth) <= 1.02 * error(eager, truth) + 1e-7
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
def test_the_choice_decides_about_time_and_not_about_bits(fresh, by_rows):
    torch.manual_seed(0)
    a, b = operand(4096, 4160, True, torch.bfloat16), operand(4160, 6144, by_rows, torch.bfloat16)
    outs = []
    for _ in range(12):  # of several calls each, so that some end before others begin
        for _ in range(6):
            outs.append(torch.empty(4096, 6144, device="cuda", dtype=torch.bfloat16))
            gemm(a, b, outs[-1])
        assert all(torch.equal(outs[0], out) for out in outs)
        del outs[1:]
    (candidates,) = (found.candidates for found in chosen._known.values() if found)
    assert len(candidates.algorithms) > 1
    assert candidates.trial.settled is not None
    few = torch.empty(3900, 6144, device="cuda", dtype=torch.bfloat16)
    gemm(a[:3900], b, few)  # another size that is alike takes the same algorithms
    assert torch.equal(few, outs[0][:3900])
    assert all(found.candidates is candidates for found in chosen._known.values() if found)


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
