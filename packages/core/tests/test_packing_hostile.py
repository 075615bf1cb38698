"""Lengths, seeds, capacities and rows that nobody should pass to packing, and the largest that somebody will."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from hotloop_core.errors import ConfigError, DataError
from hotloop_core.packing import MASKED, PackedBatch, Piece, pack, pack_stream
from hypothesis import example, given, settings
from hypothesis import strategies as st

MILLION = 1_000_000
HUGE = {
    "ones in bins of one": (lambda random: np.ones(MILLION, dtype=np.int64), 1),
    "ones in one bin": (lambda random: np.ones(MILLION, dtype=np.int64), 2**40),
    "all as long as a bin": (lambda random: np.full(MILLION, 2048), 2048),
    "any length up to a bin": (lambda random: random.integers(1, 131_073, MILLION), 131_072),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_a_million_rows_of_any_kind_stay_within_time_and_memory(name: str) -> None:
    draw, capacity = HUGE[name]
    lengths = draw(np.random.default_rng(0))
    begin = time.process_time()
    packing = pack(lengths, capacity)
    assert time.process_time() - begin < 3
    assert packing.tokens == lengths.sum()
    assert packing.bin_tokens.max() <= capacity
    tracemalloc.start()
    pack(lengths, capacity)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 2**41) | st.integers(1, 9), max_size=50),
    st.integers(1, 12) | st.integers(1, 2**42),
    st.sampled_from(["cut", "error"]),
)
def test_any_lengths_and_any_capacity_pack_whole_or_are_refused(
    lengths, capacity, overlong
) -> None:
    if overlong == "error" and any(n > capacity for n in lengths):
        with pytest.raises(DataError, match="longer than"):
            pack(lengths, capacity)
        return
    packing = pack(lengths, capacity, overlong=overlong)
    found = sorted(piece for bin in packing for piece in bin)
    assert found == [Piece(i, 0, min(n, capacity)) for i, n in enumerate(lengths)]
    assert all(0 < tokens <= capacity for tokens in packing.bin_tokens.tolist())
    assert packing.tokens + packing.tokens_dropped == sum(lengths)
    assert packing.least_bins >= Fraction(packing.tokens, capacity)
    assert packing.least_bins <= len(packing)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 30))
def test_the_bound_is_the_highest_of_all_thresholds(lengths: list[int], capacity: int) -> None:
    kept = [n for n in lengths if n <= capacity]

    def bins(a: int) -> int:
        large = [n for n in kept if n > capacity - a]
        middle = [n for n in kept if capacity - a >= n > capacity // 2]
        small = [n for n in kept if capacity // 2 >= n >= a]
        room = len(middle) * capacity - sum(middle)
        return len(large) + len(middle) + max(0, -(-(sum(small) - room) // capacity))

    assert pack(kept, capacity).least_bins == max(map(bins, range(capacity // 2 + 1)))


@pytest.mark.parametrize(
    "lengths",
    [[3, 2, 5], (3, 2, 5), np.array([3, 2, 5], dtype=np.uint8), torch.tensor([3, 2, 5])],
    ids=["list", "tuple", "uint8", "tensor"],
)
def test_whole_numbers_of_every_kind_pack_alike(lengths) -> None:
    assert list(pack(lengths, np.int32(6))) == list(pack([3, 2, 5], 6))
    assert list(pack([np.int16(3), 2, np.int64(5)], 6)) == list(pack([3, 2, 5], 6))


@pytest.mark.parametrize(
    "lengths",
    [[3.0, 2.5], [float("nan")], [True, False], ["3"], [[3, 2]], [None], 3, [3, 2**70]],
    ids=str,
)
def test_lengths_that_are_no_whole_numbers_are_refused_and_never_cut(lengths) -> None:
    with pytest.raises(DataError, match="expected one whole number a row"):
        pack(lengths, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 2.5}, "capacity=2.5"),
        ({"capacity": -4}, "capacity=-4"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_also_by_the_stream(arguments, message) -> None:
    arguments = {"capacity": 8, **arguments}
    with pytest.raises(ConfigError, match=message):
        pack([1], **arguments)
    with pytest.raises(ConfigError, match=message):
        list(pack_stream([[1]], **arguments))


@pytest.mark.parametrize("arguments", [{"ranks": 0}, {"each": 0}, {"seed": -1}, {"epoch": -1}])
def test_an_order_that_means_nothing_is_refused(arguments) -> None:
    with pytest.raises(ConfigError, match="expected"):
        pack([1, 2, 3], 4).order(**arguments)


def test_a_packing_is_the_same_in_every_process_whatever_pythons_hash_seed() -> None:
    code = (
        "import numpy as np; from hotloop_core.packing import pack, pack_stream;"
        "lengths = np.random.default_rng(5).integers(1, 400, 700);"
        "packing = pack(lengths, 1024, seed=3).divisible(8);"
        "print(list(packing), packing.order(ranks=4, each=2, seed=1, epoch=2).tolist());"
        "print([[p for p, _ in b] for b in pack_stream(map(range, lengths), 1024, buffer=50)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, check=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }  # fmt: skip
    assert len(said) == 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 25), max_size=60),
    st.integers(1, 12),
    st.integers(1, 5),
    st.sampled_from(["cut", "split"]),
)
@example([12, 1, 2], 1, 1, "split")
def test_a_stream_with_a_tiny_buffer_gives_every_token_once(
    lengths: list[int], capacity: int, buffer: int, overlong: str
) -> None:
    drawn, held, given_out = 0, 0, []

    def rows():
        nonlocal drawn
        for n in lengths:
            drawn += 1
            yield range(n)

    for bin in pack_stream(rows(), capacity, buffer=buffer, overlong=overlong):
        given_out += [piece for piece, _ in bin]
        assert sum(piece.stop - piece.start for piece, _ in bin) <= capacity
        held = max(held, drawn - len({piece.row for piece in given_out}))
    assert sorted(given_out) == sorted(
        p for b in pack(lengths, capacity, overlong=overlong) for p in b
    )
    assert held <= buffer


def test_a_stream_counts_the_row_that_it_refuses() -> None:
    with pytest.raises(DataError, match="row 2 has 0 tokens"):
        list(pack_stream([[1], [2, 3], []], 4))
    with pytest.raises(DataError, match=r"the longest \(row 1\) has 5"):
        list(pack_stream([[1], [2] * 5], 4))
    with pytest.raises(DataError, match="expected one whole number a row"):
        list(pack_stream([[1]], 4, length=lambda row: 1.5))
    assert list(pack_stream([], 4)) == []


def test_a_stream_of_rows_that_fit_no_others_is_not_packed_anew_for_each() -> None:
    lengths = [1] * 4000 + [8192] * 4000
    begin = time.process_time()
    bins = list(pack_stream(map(range, lengths), 8192))
    assert time.process_time() - begin < 2  # 1 s for 8,000 rows if it were
    assert len(bins) <= 4004


def test_rows_of_arrays_make_the_batch_that_lists_make() -> None:
    rows = [[11, 12, 13], [21], [31, 32]]
    listed = PackedBatch.from_rows(rows, rows, weights=[1.0, 2.0, 0.5])
    for make in (np.array, torch.tensor):
        made = [make(row) for row in rows]
        batch = PackedBatch.from_rows(made, made, weights=[np.float32(1), np.int64(2), 0.5])
        assert torch.equal(batch.input_ids, listed.input_ids)
        assert torch.equal(batch.labels, listed.labels)
        assert torch.equal(batch.weights, listed.weights)


def test_one_row_of_one_token_is_a_batch_that_trains_nothing() -> None:
    batch = PackedBatch.from_rows([[5]])
    assert batch.labels.tolist() == [MASKED]
    assert (batch.cu_seqlens.tolist(), batch.longest) == ([0, 1], 1)


@pytest.mark.parametrize(
    ("rows", "labels"),
    [([[1.5, 2]], None), ([[True]], None), ([[1, 2]], [[1, 2.5]]), ([[[1], [2]]], None)],
    ids=["float", "bool", "float label", "nested"],
)
def test_ids_and_labels_that_are_no_whole_numbers_are_refused(rows, labels) -> None:
    with pytest.raises(DataError, match="expected rows of whole numbers"):
        PackedBatch.from_rows(rows, labels)


def test_an_empty_list_of_labels_is_not_no_labels() -> None:
    with pytest.raises(DataError, match="one label a token"):
        PackedBatch.from_rows([[1, 2]], [])
