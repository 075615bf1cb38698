"""Which of several ways is fastest, found out from calls that have to be made anyway.

Every way takes its turn in the real step, between two events; nothing is computed twice and nobody waits. So the times
are those of the step: the card is as warm and as short of power as it will be, and its caches hold what they will hold.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTED = 3
"""Times that decide about a way, after a first one that does not count: it may load the kernel."""

HOPELESS = 1.15
"""A way whose first counted time is longer than the shortest by this factor has no second."""


class Clock(Protocol):
    """Marks moments in a queue of work, and measures between them once they have passed."""

    def mark(self) -> Any:
        """A moment, in the queue."""
        ...

    def between(self, start: Any, stop: Any) -> float | None:
        """Seconds, in any unit; None while `stop` has not passed."""
        ...


class StreamClock:
    """The current CUDA stream's."""

    def mark(self) -> torch.cuda.Event:
        """An event in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float | None:
        """Milliseconds."""
        return start.elapsed_time(stop) if stop.query() else None


class Trial:
    """Ways 0 to count - 1; 0 is the one that is taken while nothing is known."""

    def __init__(self, count: int, clock: Clock) -> None:
        self.settled: int | None = 0 if count == 1 else None
        self.clock = clock
        self._lock = Lock()
        self._begun = [0] * count
        self._times: list[list[float]] = [[] for _ in range(count)]
        self._in = list(range(count))
        self._waiting: deque[tuple[int, float, Any, Any]] = deque()

    def turn(self, able: Sequence[bool], *, timing: bool = True) -> tuple[int | None, bool]:
        """The way to take for a call that only the `able` ones can make, None if none can; whether to time it.

        timing: whether this call may be timed at all.
        """
        with self._lock:
            if self.settled is None:
                self._gather()
            if self.settled is not None and able[self.settled]:
                return self.settled, False
            ways = [way for way in self._in if able[way]]
            if self.settled is not None or not ways:
                return next((way for way, can in enumerate(able) if can), None), False
            way = min(ways, key=lambda w: self._begun[w])
            if not timing or self._begun[way] > COUNTED:  # or the card is still at their turns
                return min(ways, key=self._time), False
            self._begun[way] += 1
            return way, True

    def timed(self, way: int, size: float, start: Any, stop: Any) -> None:
        """A call of `size` that took this way, between two marks."""
        with self._lock:
            self._waiting.append((way, size, start, stop))

    def drop(self, way: int) -> None:
        """This way does not run."""
        with self._lock:
            self._in = [w for w in self._in if w != way]
            if len(self._in) == 1:
                self.settled = self._in[0]

    def _gather(self) -> None:
        while self._waiting:
            way, size, start, stop = self._waiting[0]
            time = self.clock.between(start, stop)
            if time is None:
                break
            self._waiting.popleft()
            self._times[way].append(time / size)
        counted = [way for way in self._in if len(self._times[way]) > 1]
        if not counted:
            return
        best = min(map(self._time, counted))
        late = {way for way in counted if self._time(way) > HOPELESS * best}
        self._in = [way for way in self._in if way not in late]
        if all(len(self._times[way]) > COUNTED for way in self._in):
            self.settled = min(self._in, key=self._time)
            self._waiting.clear()

    def _time(self, way: int) -> float:
        return median(self._times[way][1:]) if len(self._times[way]) > 1 else float("inf")
