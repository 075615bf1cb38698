"""Plans as arrays: the bytes of a plan's two parts, and blocks of plans from which a search picks."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import numpy as np

CHUNK = 8192
"""Pairs of kinds that are evaluated at once, which bounds the search's own memory."""


class Part(NamedTuple):
    """Bytes of the early or of the late layers: kept for backward, their worst moment (early layers:
    in all; late ones: beyond all that is kept), away on the host, and on the device of what one of
    them sends away: it may still be on its way when the layers above, or the loss, are at work.
    """

    kept: Any
    moment: Any
    away: Any
    leaving: Any


class Index(NamedTuple):
    """Plans of one space, as arrays: the numbers of their two kinds, how many layers are early, and
    their bytes.
    """

    first: Any
    second: Any
    count: Any
    parts: tuple[Part, Part]


class Block(NamedTuple):
    """Plans of one space: a row for each pair of kinds, a column for each count of early layers.

    ms: of the early and of the late layers by kind and count, without streamed weights: bounds from
    below. parts: their bytes.
    """

    first: Any
    second: Any
    counts: Any
    ms: tuple[Any, Any]
    parts: tuple[Part, Part]

    def pick(self, ms: float, room: float, host: float) -> Index:
        """Those that may take `ms` at most, `room` bytes of activations and `host` bytes there."""
        early, late = self.parts
        wanted = self._sums(*self.ms) <= ms
        if room < inf:
            wanted &= self._sums(early.kept, late.kept + late.moment) <= room
        if host < inf:
            wanted &= self._sums(early.away, late.away) <= host
        rows, columns = np.nonzero(wanted)
        first, second = self.first[rows], self.second[rows]
        return Index(
            first=first,
            second=second,
            count=self.counts[columns],
            parts=(
                Part(*(part[first, columns] for part in early)),
                Part(*(part[second, columns] for part in late)),
            ),
        )

    def _sums(self, early: Any, late: Any) -> Any:
        return early[self.first] + late[self.second]
