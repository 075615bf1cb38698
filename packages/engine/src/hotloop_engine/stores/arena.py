"""Places in host memory, taken and given back in any order."""

from __future__ import annotations

from bisect import bisect
from typing import TYPE_CHECKING, NamedTuple

from .host import HostBuffer, aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

_LEAST_GROWTH = 2 * 2**20  # bytes: one huge page


class Place(NamedTuple):
    """Bytes start to stop of the chunk with this number."""

    chunk: int
    start: int
    stop: int


class Arena:
    """Host memory in chunks that are kept for good: one of `capacity` bytes, made when it is first needed.

    Places are taken lowest first, so what is taken and given back like a stack leaves no holes, and other orders leave
    holes that merge as their neighbours are given back. Where nothing fits, a further chunk is added.

    Raises:
        BudgetError: the host cannot give a chunk.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._device, self._capacity = device, capacity
        self._chunks: list[HostBuffer] = []
        self._free: list[list[tuple[int, int]]] = []  # of each chunk: disjoint, apart, in order

    @property
    def reserved(self) -> int:
        """Bytes of host memory held."""
        return sum(chunk.flat.nbytes for chunk in self._chunks)

    @property
    def grown(self) -> int:
        """Chunks beyond the first."""
        return max(0, len(self._chunks) - 1)

    def take(self, nbytes: int) -> Place:
        """A place for `nbytes`."""
        size = aligned(nbytes)
        for number, free in enumerate(self._free):
            for i, (start, stop) in enumerate(free):
                if stop - start >= size:
                    free[i : i + 1] = [(start + size, stop)] if stop - start > size else []
                    return Place(number, start, start + size)
        # A further chunk locks pages in the middle of a step: few of some size, not one for each tensor.
        least = max(self._capacity // 8, _LEAST_GROWTH) if self._chunks else self._capacity
        chunk = HostBuffer(max(size, aligned(least)), self._device)
        self._chunks.append(chunk)
        self._free.append([(0, chunk.flat.nbytes)])
        return self.take(nbytes)

    def give(self, place: Place) -> None:
        """`place` is free again."""
        free, (_, start, stop) = self._free[place.chunk], place
        i = bisect(free, (start, stop))
        if i < len(free) and free[i][0] == stop:
            stop = free.pop(i)[1]
        if i and free[i - 1][1] == start:
            i -= 1
            start = free.pop(i)[0]
        free.insert(i, (start, stop))

    def view(self, place: Place, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The place as a contiguous tensor."""
        return self._chunks[place.chunk].view(place.start, shape, dtype)
