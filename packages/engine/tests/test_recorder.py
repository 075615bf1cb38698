"""Which kinds of batch are recorded, when, and which make room."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hotloop_engine.attention import Sequences
from hotloop_engine.blocks import Recorder
from hotloop_engine.blocks.recorder import KINDS, PASSES_BEFORE, WORTH


class Passes:
    """Passes over batches of one row; counts by length what was recorded and what ran by recordings."""

    def __init__(self, room=2**40, need=1):
        self.recorder = Recorder(lambda device: room, lambda tokens: need * tokens)
        self.recorded: Counter[int] = Counter()
        self.replayed: Counter[int] = Counter()

    def run(self, *lengths, more=()):
        for length in lengths:
            with self.recorder.passing(Sequences.dense(1, length, torch.device("cpu")), *more):
                kind = self.recorder.now
                if kind is not None:
                    self.recorded[length] += not kind.layers
                    self.replayed[length] += 1
                    kind.layers[0] = object()  # stands for a recorded layer


def test_a_kind_is_recorded_after_it_came_eight_times():
    passes = Passes()
    passes.run(*[16] * PASSES_BEFORE)
    assert not passes.recorded
    passes.run(16, 16, 17)
    assert passes.recorded == {16: 1}
    assert passes.replayed == {16: 2}


def test_what_else_makes_a_kind_is_told_apart():
    passes = Passes()
    for more in (("autocast",), ("plain",)):
        passes.run(*[16] * PASSES_BEFORE, more=more)
    assert not passes.recorded


@pytest.mark.parametrize(("room", "expected"), [(15, {}), (16, {16: 1})])
def test_a_kind_without_room_is_left_alone(room, expected):
    passes = Passes(room=room)
    passes.run(*[16] * (PASSES_BEFORE + 3))
    assert passes.recorded == expected


def test_the_kind_that_was_longest_not_met_makes_room():
    passes = Passes(room=40)
    passes.run(*[16] * (PASSES_BEFORE + WORTH), *[20] * (PASSES_BEFORE + WORTH), 16)
    assert passes.recorded == {16: 1, 20: 1}
    passes.run(*[30] * (PASSES_BEFORE + 1))
    assert passes.recorded[30] == 1
    passes.run(16, 20)
    assert passes.recorded == {16: 1, 20: 1, 30: 1}  # they would have to come eight times again


def test_many_lengths_in_turn_are_not_recorded_over_and_over():
    """Each recording costs as much as many passes spare."""
    passes, rounds = Passes(), 400
    for _ in range(rounds):
        passes.run(*range(8, 8 + 3 * KINDS))
    assert sum(passes.recorded.values()) < 4 * 3 * KINDS
    assert sum(passes.replayed.values()) > rounds * KINDS / 2


def test_a_pass_in_another_thread_is_not_recorded():
    import threading

    passes = Passes()
    thread = threading.Thread(target=passes.run, args=[16] * (PASSES_BEFORE + 2))
    thread.start()
    thread.join()
    assert not passes.recorded
