from __future__ import annotations

import pytest
import torch
from hotloop_core.errors import DataError, UnsupportedError
from hotloop_core.packing import PackedBatch
from hotloop_engine.attention import Sequences


def offsets(sequences: Sequences) -> list[int]:
    assert sequences.cu_seqlens.dtype == torch.int32
    assert sequences.count == len(sequences.bounds())
    return sequences.cu_seqlens.tolist()


def test_a_dense_batch_has_one_sequence_a_row() -> None:
    sequences = Sequences.dense(3, 5, "cpu")
    assert offsets(sequences) == [0, 5, 10, 15]
    assert sequences.dense_shape == (3, 5)
    assert (sequences.longest, sequences.tokens) == (5, 15)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_has_no_sequence(shape: tuple[int, int]) -> None:
    sequences = Sequences.dense(*shape, "cpu")
    assert (offsets(sequences), sequences.tokens, sequences.longest) == ([0], 0, 0)


def test_padding_on_either_side_is_a_sequence_of_its_own() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    sequences = Sequences.from_padding_mask(mask)
    assert offsets(sequences) == [0, 2, 5, 9, 10, 11, 13, 15, 20]
    assert sequences.dense_shape is None
    assert sequences.longest == 5


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_ones_is_dense(dtype: torch.dtype) -> None:
    assert Sequences.from_padding_mask(torch.ones(2, 4, dtype=dtype)).dense_shape == (2, 4)


def test_a_mask_that_numbers_segments_is_refused_and_any_one_value_is_a_mask() -> None:
    with pytest.raises(UnsupportedError, match="several values beside 0"):
        Sequences.from_padding_mask(torch.tensor([[1, 1, 2, 2, 0]]))
    for value in (-1, 255):
        found = Sequences.from_padding_mask(torch.tensor([[value, value, 0], [0, value, value]]))
        assert found.bounds() == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert Sequences.from_padding_mask(torch.ones(2, 0, dtype=torch.long)).tokens == 0


def test_padding_between_tokens_is_refused_with_its_row() -> None:
    with pytest.raises(UnsupportedError, match="row 1 has padding between its tokens"):
        Sequences.from_padding_mask(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]))


def test_a_mask_over_pairs_of_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"expected \[batch, length\]"):
        Sequences.from_padding_mask(torch.ones(1, 1, 4, 4))


def test_positions_that_restart_begin_a_sequence_and_rows_never_join() -> None:
    ids = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert offsets(Sequences.from_position_ids(ids)) == [0, 3, 5, 6, 10]


def test_a_break_that_is_not_a_restart_at_zero_counts_too() -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    ids = torch.tensor([[4, 5, 9, 10, 10, 0, 1], [3, 2, 1, 0, 0, 1, 2]])
    of_token = find_packed_sequence_indices(ids)
    lengths = [int(n) for row in of_token for n in row.unique(return_counts=True)[1]]
    found = offsets(Sequences.from_position_ids(ids))
    assert torch.tensor(found).diff().tolist() == lengths


def test_plain_positions_are_dense_also_as_one_row_for_the_batch() -> None:
    ids = torch.arange(6)[None]
    assert Sequences.from_position_ids(ids).dense_shape == (1, 6)
    assert Sequences.from_position_ids(ids, batch=4).dense_shape == (4, 6)
    assert Sequences.from_position_ids(ids + 3).dense_shape == (1, 6)
    with pytest.raises(DataError, match="2 rows; expected 1 or 3"):
        Sequences.from_position_ids(ids.expand(2, 6), batch=3)


def test_a_bin_of_equal_rows_is_dense() -> None:
    ids = torch.arange(4).repeat(3)[None]
    assert Sequences.from_position_ids(ids).dense_shape == (3, 4)


def test_offsets_lose_empty_sequences() -> None:
    sequences = Sequences.from_cu_seqlens(torch.tensor([0, 3, 3, 7, 10]), tokens=10)
    assert offsets(sequences) == [0, 3, 7, 10]
    assert sequences.longest == 4
    assert sequences.positions().tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("bad", [[1, 10], [0, 5, 3, 10], [0, 11], [], [[0, 3]], [0], [0, 3, 7]])
def test_offsets_that_make_no_sense_are_refused(bad: list) -> None:
    with pytest.raises(DataError, match="cu_seqlens"):
        Sequences.from_cu_seqlens(torch.tensor(bad), tokens=10)


def test_a_packed_batch_means_the_same_by_offsets_and_by_positions() -> None:
    batch = PackedBatch.from_rows([[1, 2, 3], [4], [5, 6]], length=9)
    by_offsets = Sequences.from_cu_seqlens(batch.cu_seqlens, tokens=9)
    by_positions = Sequences.from_position_ids(batch.position_ids[None])
    assert offsets(by_offsets) == offsets(by_positions) == [0, 3, 4, 6, 9]
    assert by_offsets.longest == batch.longest


def test_more_tokens_than_int32_can_count_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="cu_seqlens is int32"):
        Sequences.dense(2**16, 2**15, "cpu")
