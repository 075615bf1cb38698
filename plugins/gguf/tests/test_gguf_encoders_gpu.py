"""The Triton searches give the bits of the compiled ones: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from hotloop_gguf.encoders import cpu, gpu, k_quants, legacy, tables
from hotloop_gguf.encoders.searches import Grid
from hotloop_gguf.mixes import BLOCKS

pytestmark = pytest.mark.filterwarnings(
    # What divides a group of zeros by zero is not used; on a GPU nothing warns, the interpreter is numpy.
    "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"
)
KINDS = [kind for kind in BLOCKS if kind not in ("F32", "F16", "BF16")]
DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # the interpreter works on tensors of the CPU
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def groups(n: int, count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [count, n] with a group of zeros, an equal one and outliers; and weights."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(count, n, generator=generator) * 0.02
    x[0], x[1], x[2, 3], x[3] = 0.0, 0.3, 1.0, x[3].abs()
    return x, torch.rand(count, n, generator=generator) ** 4 + 1e-5


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))


@WEIGHTED
@pytest.mark.parametrize(
    "n, grid",
    [(16, Grid(3, -0.5, 0.1, 4, absolute=True)), (32, Grid(15, -1.0, 0.1, 5))],
    ids=["16 absolute", "32"],
)
def test_affine_search_has_the_same_bits(n: int, grid: Grid, weighted: bool) -> None:
    x, weight = groups(n)
    ours = cpu.SEARCHES.affine(x, weight if weighted else None, grid)
    moved = weight.to(DEVICE) if weighted else None
    assert same(ours, gpu.SEARCHES.affine(x.to(DEVICE), moved, grid))


@WEIGHTED
def test_symmetric_search_has_the_same_bits(weighted: bool) -> None:
    x, weight = groups(16)
    ours = cpu.SEARCHES.symmetric(x, weight if weighted else None, 32)
    moved = weight.to(DEVICE) if weighted else None
    assert same(ours, gpu.SEARCHES.symmetric(x.to(DEVICE), moved, 32))


def test_descent_has_the_same_bits() -> None:
    x, _ = groups(16)
    assert same(cpu.SEARCHES.descent(x, 4), gpu.SEARCHES.descent(x.to(DEVICE), 4))


def test_positive_search_has_the_same_bits() -> None:
    x, weight = groups(8)
    ours = cpu.SEARCHES.positive(x.abs(), weight, 63)
    assert same(ours, gpu.SEARCHES.positive(x.abs().to(DEVICE), weight.to(DEVICE), 63))


@WEIGHTED
def test_table_search_has_the_same_bits(weighted: bool) -> None:
    x, weight = groups(32, 5)
    ours = cpu.SEARCHES.table(x, weight if weighted else None)
    theirs = gpu.SEARCHES.table(x.to(DEVICE), weight.to(DEVICE) if weighted else None)
    assert torch.equal(ours, theirs.cpu())


def test_sums_have_the_same_bits() -> None:
    x, _ = groups(300)
    assert torch.equal(cpu.SEARCHES.sums(x), gpu.SEARCHES.sums(x.to(DEVICE)).cpu())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_types_without_a_search_have_the_same_bytes(kind: str) -> None:
    x = groups(32, 150)[0].reshape(75, 64)
    x[4], x[5, 7], x[5, 9] = -x[4].abs(), -0.5, 0.5  # negative, and two equally far from 0
    encoder = getattr(tables if kind == "MXFP4" else legacy, kind.lower())
    ours = encoder(x, None, cpu.SEARCHES)
    assert torch.equal(ours, encoder(x.to(DEVICE), None, gpu.SEARCHES).cpu())


@pytest.mark.gpu
@WEIGHTED
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_on_a_gpu_are_those_on_a_cpu(kind: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 1024, generator=generator).bfloat16().float() * 0.02
    x[7], x[9, 256:512], x[11] = 0.0, 0.1, x[11].abs()
    x[20:40] = torch.randn(20, 1024, generator=generator) * 0.05  # no bfloat16
    importance = torch.rand(1024, generator=generator) ** 4 + 1e-5 if weighted else None
    module = next(m for m in (k_quants, legacy, tables) if hasattr(m, kind.lower()))
    encoder = getattr(module, kind.lower())
    ours = encoder(x, importance, cpu.SEARCHES)
    moved = None if importance is None else importance.cuda()
    assert torch.equal(ours, encoder(x.cuda(), moved, gpu.SEARCHES).cpu())
