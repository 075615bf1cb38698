"""Bin packing over integers: the heuristic and the bound that `packing` is made of.

Best-fit decreasing, O(n log n): an item goes into the fullest bin that takes it. All items of one
length, and all bins with the same room, are handled together, which changes nothing in the result
(a bin that has just taken an item of length l is the fullest that takes l, while it does).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]


def best_fit_decreasing(falling: Integers, capacity: int) -> tuple[Integers, int]:
    """The bin of each item, for items from the longest to the shortest, and how many bins."""
    import numpy as np

    assigned = np.empty(falling.size, dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # the bins that have so much room left
    rooms: list[int] = []  # its keys, rising
    count = item = 0

    def give(bins: list[int], room: int) -> None:
        if not room or not bins:
            return
        if room in with_room:
            with_room[room] += bins
        else:
            with_room[room] = bins
            insort(rooms, room)

    values, numbers = np.unique(-falling, return_counts=True)
    for size, left in zip((-values).tolist(), numbers.tolist(), strict=True):
        while left:
            at = bisect_left(rooms, size)
            if at == len(rooms):
                opened = -(-left // (capacity // size))
                give(list(range(count, count + opened)), capacity)
                count += opened
                continue
            room = rooms[at]
            bins = with_room[room]
            each = room // size  # a bin takes so many before the next fullest has its turn
            number = min(len(bins), -(-left // each))
            taken = bins[-number:]
            del bins[-number:]
            if not bins:
                del with_room[room], rooms[at]
            used = min(left, number * each)
            assigned[item : item + used] = np.repeat(taken, each)[:used]
            spare = number * each - used  # items that the last bin could still have taken
            give(taken if not spare else taken[:-1], room - each * size)
            give(taken[-1:] if spare else [], room - (each - spare) * size)
            item += used
            left -= used
    return assigned, count


def least_bins(sizes: Integers, capacity: int) -> int:
    """Martello and Toth's bound L2 (1990, section 8.3), over every threshold at once.

    For a threshold a up to half the capacity, items longer than capacity - a fit with nothing that
    is at least a, those over half need a bin each, and the rest of size a and more can only use
    what these leave free.
    """
    import numpy as np

    if not sizes.size:
        return 0
    counts = np.bincount(sizes, minlength=capacity + 1)
    number = np.concatenate([[0], np.cumsum(counts)])  # number[x]: items shorter than x
    tokens = np.concatenate([[0], np.cumsum(counts * np.arange(capacity + 1))])
    half = capacity // 2
    a = np.arange(half + 1)
    large = number[-1] - number[capacity - a + 1]
    middle = number[capacity - a + 1] - number[half + 1]
    room = middle * capacity - (tokens[capacity - a + 1] - tokens[half + 1])
    small = tokens[half + 1] - tokens[a]
    more = np.maximum(0, -(-(small - room) // capacity))
    return int((large + middle + more).max())
