from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hotloop_core.errors import ConfigError, DataError
from hotloop_core.packing import MASKED, PackedBatch, Packing, Piece, pack, pack_stream
from hypothesis import given, settings
from hypothesis import strategies as st


def mix(rows: int) -> np.ndarray:
    """60% of the rows under 256 tokens, 40% up to 1,024."""
    random = np.random.default_rng(0)
    short = rows * 6 // 10
    return np.concatenate([random.integers(1, 256, short), random.integers(1, 1025, rows - short)])


def pieces(packing: Packing) -> list[Piece]:
    return sorted(piece for bin in packing for piece in bin)


def best_fit_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    room: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [(free, index) for index, free in enumerate(room) if free >= size]
        if fits:
            room[min(fits)[1]] -= size
        else:
            room.append(capacity - size)
    return sorted(capacity - free for free in room)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90), st.integers(0, 5))
def test_every_row_is_in_one_bin_and_bins_are_those_of_best_fit(
    lengths: list[int], capacity: int, seed: int
) -> None:
    packing = pack(lengths, capacity, seed=seed)
    assert pieces(packing) == [Piece(i, 0, n) for i, n in enumerate(lengths)]
    assert sorted(packing.bin_tokens.tolist()) == best_fit_one_by_one(lengths, capacity)
    assert packing.least_bins <= len(packing)
    assert packing.tokens == sum(lengths)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.integers(7, 30),
    st.sampled_from(["cut", "split"]),
)
def test_overlong_rows_are_cut_or_split_and_counted(
    lengths: list[int], capacity: int, overlong: str
) -> None:
    packing = pack(lengths, capacity, overlong=overlong)
    assert packing.bin_tokens.max() <= capacity
    assert packing.rows_overlong == sum(n > capacity for n in lengths)
    covered = [[p for p in pieces(packing) if p.row == row] for row in range(len(lengths))]
    for row, found in enumerate(covered):
        assert found[0].start == 0
        assert all(a.stop == b.start for a, b in pairwise(found))
        full = lengths[row] if overlong == "split" else min(lengths[row], capacity)
        assert found[-1].stop == full
    assert packing.tokens + packing.tokens_dropped == sum(lengths)


def test_the_worked_example_uses_99_5_percent_of_its_bins() -> None:
    packing = pack(mix(10_000), 2048)
    assert packing.utilisation >= 0.995
    assert len(packing) <= packing.least_bins + 1


def test_a_million_rows_take_under_three_seconds_and_200_megabytes() -> None:
    lengths = mix(1_000_000)
    begin = time.process_time()  # one thread does the work; other programs' time is not its own
    pack(lengths, 2048)
    assert time.process_time() - begin < 3
    tracemalloc.start()
    pack(lengths, 2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_the_lower_bound_sees_rows_that_cannot_share_a_bin() -> None:
    assert pack([60] * 10, 100).least_bins == 10
    assert pack([60] * 5 + [41] * 5, 100).least_bins == 8
    assert pack([], 100).least_bins == 0


def test_same_seed_same_packing_and_another_seed_another() -> None:
    lengths = mix(500)
    first, again, other = pack(lengths, 2048), pack(lengths, 2048), pack(lengths, 2048, seed=1)
    assert list(first) == list(again)
    assert list(first) != list(other)
    assert sorted(first.bin_tokens.tolist()) == sorted(other.bin_tokens.tolist())


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_get_equally_many_bins_and_balanced_tokens(ranks: int) -> None:
    whole = pack(mix(1000), 2048)
    shares = whole.split(ranks)
    assert len({len(share) for share in shares}) == 1
    assert sorted(p for share in shares for p in pieces(share)) == pieces(whole)
    tokens = [share.tokens for share in shares]
    assert max(tokens) - min(tokens) <= 2048
    steps = np.stack([share.bin_tokens for share in shares])
    assert np.median(steps.max(0) - steps.min(0)) <= 2  # beside each other, bins of one size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=40, max_size=80),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_an_epoch_takes_every_row_once_in_as_many_steps_on_every_rank(
    lengths: list[int], ranks: int, each: int, epoch: int
) -> None:
    packing = pack(lengths, 64).divisible(ranks * each)
    order = packing.order(ranks=ranks, each=each, seed=7, epoch=epoch)
    assert sorted(order.tolist()) == list(range(len(packing)))
    steps = order.reshape(-1, ranks, each)
    assert pieces(packing) == [Piece(i, 0, n) for i, n in enumerate(lengths)]
    tokens = packing.bin_tokens[steps].sum(-1)
    spread = packing.bin_tokens[steps].reshape(len(steps), -1)
    assert (np.ptp(tokens, axis=1) <= np.ptp(spread, axis=1)).all()  # dealt, not stacked


def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else() -> None:
    packing = pack(mix(2000), 2048).divisible(8)
    same, again = (packing.order(ranks=4, each=2, seed=3, epoch=1).tolist() for _ in range(2))
    assert same == again
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert packing.order(ranks=4, each=2, **other).tolist() != same


def test_one_rank_may_end_on_a_smaller_batch_and_several_may_not() -> None:
    packing = pack([9] * 7, 10)
    assert sorted(packing.order(each=3).tolist()) == list(range(7))
    with pytest.raises(DataError, match="7 bins do not divide by 2 processes x 1"):
        packing.order(ranks=2)
    with pytest.raises(DataError, match="7 rows in 7 bins cannot make bins"):
        packing.divisible(2)
    assert packing.divisible(7) is packing


def test_ranks_hold_about_as_many_tokens_at_every_step_of_uneven_bins() -> None:
    random = np.random.default_rng(1)
    packing = pack(random.integers(900, 2048, 4000), 2048).divisible(16)
    steps = packing.order(ranks=8, each=2).reshape(-1, 8, 2)
    tokens = packing.bin_tokens[steps].sum(-1)
    assert np.median(np.ptp(tokens, axis=1) / tokens.mean(axis=1)) < 0.01
    total = tokens.sum(axis=0)
    assert np.ptp(total) / total.mean() < 1e-3


def test_too_few_rows_for_the_ranks_are_refused() -> None:
    with pytest.raises(
        DataError, match="3 rows in 2 bins cannot make bins whose number divides by 4"
    ):
        pack([5, 5, 5], 10).split(4)


@pytest.mark.parametrize("overlong", ["cut", "split"])
def test_a_stream_is_packed_whole_within_its_buffer(overlong: str) -> None:
    lengths = [*mix(700).tolist(), 5000]
    drawn = 0

    def rows():
        nonlocal drawn
        for n in lengths:
            drawn += 1
            yield [n] * n

    given_out: list[Piece] = []
    used = places = most = 0
    for bin in pack_stream(rows(), 2048, buffer=128, overlong=overlong):
        given_out += [piece for piece, _ in bin]
        assert all(len(row) == lengths[piece.row] for piece, row in bin)
        tokens = sum(piece.stop - piece.start for piece, _ in bin)
        assert tokens <= 2048
        used, places = used + tokens, places + 2048
        most = max(most, drawn - len({piece.row for piece in given_out}))
    expected = pieces(pack(lengths, 2048, overlong=overlong))
    assert sorted(given_out) == expected
    assert most <= 128
    assert used / places > 0.97


def test_a_stream_gives_the_same_bins_every_time() -> None:
    rows = [[0] * n for n in mix(300).tolist()]
    runs = [list(pack_stream(rows, 2048, buffer=50, seed=3)) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([3, 0], 10), DataError, "row 1 has 0 tokens"),
        (([3, 30, 11], 10), DataError, r"2 rows are longer than 10 tokens, the longest \(row 1\)"),
        (([3], 0), ConfigError, "capacity=0"),
    ],
)
def test_bad_lengths_are_named(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pack(*arguments)


def test_an_unknown_choice_for_long_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlong='drop'"):
        pack([3], 10, overlong="drop")
    with pytest.raises(ConfigError, match="buffer=0"):
        next(pack_stream([[1]], 10, buffer=0))


def test_a_batch_restarts_positions_and_masks_each_first_label() -> None:
    batch = PackedBatch.from_rows(
        [[11, 12, 13], [21], [31, 32]], [[-100, 12, 13], [21], [31, 32]], length=9, pad_id=7
    )
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 31, 32, 7, 7, 7]
    assert batch.labels.tolist() == [MASKED, 12, 13, MASKED, MASKED, 32, *[MASKED] * 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 9]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.longest == 3
    assert batch.row_ids.tolist() == [0, 0, 0, 1, 2, 2, -1, -1, -1]


def test_a_padding_free_batch_has_no_padding_and_labels_default_to_the_ids() -> None:
    batch = PackedBatch.from_rows([[5, 6, 7], [8, 9]])
    assert batch.labels.tolist() == [MASKED, 6, 7, MASKED, 9]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    inputs = batch.model_inputs()
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["max_length_q"] == 3


def test_weights_of_rows_and_of_tokens_lie_beside_their_tokens() -> None:
    batch = PackedBatch.from_rows([[5, 6, 7], [8, 9]], weights=[0.5, [1, 2.5]], length=6)
    assert batch.weights is not None
    assert batch.weights.dtype == torch.float32
    assert batch.weights.tolist() == [0.5, 0.5, 0.5, 1.0, 2.5, 0.0]
    assert not any("weight" in name for name in batch.model_inputs())
    assert PackedBatch.from_rows([[5, 6]]).weights is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one number for each row"),
        ([1.0, [1.0]], "one for each of its tokens"),
        ([-1.0, 1.0], "negative or not finite"),
        ([float("nan"), 1.0], "negative or not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message) -> None:
    with pytest.raises(DataError, match=message):
        PackedBatch.from_rows([[5, 6, 7], [8, 9]], weights=weights)


@pytest.mark.parametrize(
    ("rows", "labels", "length", "message"),
    [
        ([], None, None, "one row or more"),
        ([[1], []], None, None, "none of them empty"),
        ([[1, 2]], [[1]], None, "one label a token"),
        ([[1, 2]], None, 1, "do not fit into a batch of 1"),
    ],
)
def test_a_batch_that_cannot_be_laid_out_is_refused(rows, labels, length, message) -> None:
    with pytest.raises(DataError, match=message):
        PackedBatch.from_rows(rows, labels, length=length)


def test_importing_packing_loads_neither_torch_nor_numpy() -> None:
    code = "import hotloop_core.packing, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
