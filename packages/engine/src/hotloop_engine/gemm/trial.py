"""Which of several ways to do the same work is fastest, in the middle of other work."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROUNDS = 3
"""In which every way takes its turn, after one that only says how long turns are; the median counts."""

HOPELESS = 1.06
"""A way that took longer than the shortest by this factor takes no further part."""

TURN_MS = 1.0
"""The least that a turn lasts; short work is repeated in it."""


class Clock(Protocol):
    """Marks moments in a queue of work, and measures between them."""

    def mark(self) -> Any:
        """A moment, in the queue."""
        ...

    def between(self, start: Any, stop: Any) -> float:
        """Milliseconds; waits for `stop`."""
        ...


class StreamClock:
    """The current CUDA stream's."""

    def mark(self) -> torch.cuda.Event:
        """An event in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """Milliseconds; waits for `stop`."""
        stop.synchronize()
        return start.elapsed_time(stop)


def fastest(ways: Sequence[Callable[[], object]], clock: Clock) -> int:
    """The number of the way that takes the least time. All are called several times, in turns.

    To be called when the card is warm, and behind work that is queued: one that comes from idling runs at a clock that
    it cannot hold.
    """
    if len(ways) == 1:
        return 0
    taking_part = list(range(len(ways)))
    times: list[list[float]] = [[] for _ in ways]
    shortest = min(_round(ways, taking_part, 1, clock).values())
    repeats = max(1, round(TURN_MS / max(shortest, 1e-3)))
    for _ in range(ROUNDS):
        found = _round(ways, taking_part, repeats, clock)
        best = min(found.values())
        for way, time in found.items():
            times[way].append(time)
        taking_part = [way for way in taking_part if found[way] <= HOPELESS * best]
    return min(taking_part, key=lambda way: median(times[way]))


def _round(
    ways: Sequence[Callable[[], object]], taking_part: list[int], repeats: int, clock: Clock
) -> dict[int, float]:
    """Way -> milliseconds of its turn."""
    ways[taking_part[0]]()  # the first turn must not wait for the host
    marks = [clock.mark()]
    for way in taking_part:
        for _ in range(repeats):
            ways[way]()
        marks.append(clock.mark())
    return {
        way: clock.between(start, stop)
        for way, start, stop in zip(taking_part, marks, marks[1:], strict=False)
    }
