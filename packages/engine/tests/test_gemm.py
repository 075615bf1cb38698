"""Matrix products: what is left to torch, and on a card every layout against fp64."""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch
from hotloop_engine.gemm import chosen, cublaslt, gemm, library_version, matmul_to
from hotloop_engine.gemm.chosen import CALLS_BEFORE
from hotloop_engine.gemm.trial import fastest

HALF = (torch.bfloat16, torch.float16)


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


def test_a_product_that_is_declined_is_torchs_and_one_that_fails_is_an_error():
    assert cublaslt.accepted("cublasLtMatmul", 0)
    for status in cublaslt.REFUSALS:
        assert not cublaslt.accepted("cublasLtMatmul", status)
    for status in (1, 3, 13, 14):  # not initialised, no memory, not executed, internal
        with pytest.raises(
            RuntimeError, match=f"cublasLtMatmul of cuBLASLt returned status {status}"
        ):
            cublaslt.accepted("cublasLtMatmul", status)


def test_versions_are_read_off_one_number():
    class Functions:
        @staticmethod
        def cublasLtGetVersion():
            return 120805

    assert cublaslt.version(Functions) == "12.8.5"


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
