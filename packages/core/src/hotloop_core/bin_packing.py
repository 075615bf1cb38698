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

    owners: list[int] = []  # the bins in the order in which they take items,
    takes: list[int] = []  # and how many of the next items each takes
    with_room: dict[int, list[int]] = {}  # the bins that have so much room left
    rooms: list[int] = []  # its keys, rising
    count = 0

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
            last = min(each, left - (number - 1) * each)  # the last bin may get fewer
            owners += taken
            takes += [each] * (number - 1) + [last]
            if last < each:
                give([taken.pop()], room - last * size)
            give(taken, room - each * size)
            left -= (number - 1) * each + last
    return np.repeat(np.array(owners, dtype=np.int64), takes), count


def least_bins(sizes: Integers, capacity: int) -> int:
    """Martello and Toth's bound L2 (1990, section 8.3), over every threshold at once.

    For a threshold a up to half the capacity, items longer than capacity - a fit with nothing that
    is at least a, those over half need a bin each, and the rest of size a and more can only use
    what these leave free.
    """
    import numpy as np

    if not sizes.size:
        return 0
    items, counts = np.unique(sizes, return_counts=True)
    number = np.concatenate([[0], np.cumsum(counts)])  # number[i]: items shorter than items[i]
    tokens = np.concatenate([[0], np.cumsum(counts * items)])
    half = np.searchsorted(items, capacity // 2, side="right")  # from here on, a bin each
    # Up to the next length a threshold keeps the small items and only takes room: lengths suffice.
    a = np.concatenate([[0], items[:half]])
    small = np.searchsorted(items, a)
    large = np.searchsorted(items, capacity - a, side="right")
    room = (number[large] - number[half]) * capacity - (tokens[large] - tokens[half])
    rest = tokens[half] - tokens[small]
    more = np.maximum(0, -(-(rest - room) // capacity))
    return int((number[-1] - number[half] + more).max())
