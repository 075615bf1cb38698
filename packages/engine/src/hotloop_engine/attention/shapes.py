"""Which shapes of batch are worth a plan: some libraries prepare for each, for longer than one batch gains by it."""

from __future__ import annotations

from collections import Counter

PLANS = 16
"""Shapes that have one at first sight. cuDNN takes 0.09 s for forward and backward (H200): 1.5 s of a run for all."""

OFTEN = 8
"""Batches of one shape after which it has one in any case."""

LONG = 2**26
"""Tokens times length from which one batch gains what a plan costs: 0.4 ms in each of 32 layers at 2 x 2048."""


class Shapes:
    """The shapes of dense batches that came so far."""

    def __init__(self) -> None:
        self._batches: Counter[tuple[int, int]] = Counter()
        self._planned: set[tuple[int, int]] = set()

    def is_fresh(self, shape: tuple[int, int]) -> bool:
        """Whether this batch (sequences, tokens of each) does better without a plan. Asked once for each batch."""
        count, length = shape
        self._batches[shape] += 1
        if (
            len(self._planned) < PLANS
            or self._batches[shape] >= OFTEN
            or count * length * length >= LONG
        ):
            self._planned.add(shape)
        return shape not in self._planned


SHAPES = Shapes()
"""Those of this process, whose plans they are."""
