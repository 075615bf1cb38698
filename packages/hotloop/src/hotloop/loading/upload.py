"""From files to the device, one tensor at a time, while threads read the next ones into page-locked chunks."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .stored import writable

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from concurrent.futures import Future

    import torch
    from torch import Tensor

    from .stored import Span, Stored

CHUNK_BYTES = (
    32 * 2**20
)  # long enough for the link's full rate, short enough that few are in flight
CHUNKS = 8
THREADS = 4  # memory bandwidth of one socket is reached by about as many


def uploaded(stored: Sequence[Stored], device: torch.device) -> Generator[Tensor, None, None]:
    """Each tensor on `device` as it is stored, in order; a consumer drops one before it asks for the next.

    All copies are queued on the current stream, so the memory of one tensor serves the next: the device never holds
    two of them. The host holds CHUNKS chunks beside a tensor that it computes itself (of a GGUF file).

    Raises:
        CheckpointError: a file ends before its tensors do. BudgetError: the host cannot lock the chunks.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        reader = _Reader(pool, stored, device)
        try:
            for tensor in stored:
                yield reader.upload(tensor)
        finally:
            pool.shutdown(cancel_futures=True)


class _Reader:
    """A ring of chunks: each is being read into, waiting to be copied, or being copied to the device."""

    def __init__(
        self, pool: ThreadPoolExecutor, stored: Sequence[Stored], device: torch.device
    ) -> None:
        import torch
        from hotloop_engine.stores import HostBuffer, link_to

        self._pool, self._link = pool, link_to(device)
        self._pieces: Iterator[tuple[Span, int, int]] = (
            (s.span, start, min(start + CHUNK_BYTES, s.nbytes))
            for s in stored
            if s.span is not None
            for start in range(0, s.nbytes, CHUNK_BYTES)
        )
        ring = HostBuffer(CHUNKS * CHUNK_BYTES, device)
        self._under_way: deque[tuple[Tensor, Future[None]]] = deque()
        for number in range(CHUNKS):
            self._read_next(ring.view(number * CHUNK_BYTES, (CHUNK_BYTES,), torch.uint8), None)

    def upload(self, stored: Stored) -> Tensor:
        """The next tensor."""
        import torch

        if stored.span is None:
            return stored.load().to(self._link.device)
        target = self._link.empty(stored.shape, stored.dtype)
        flat = target.view(-1).view(torch.uint8)
        stream = self._link.current()
        for start in range(0, stored.nbytes, CHUNK_BYTES):
            chunk, read = self._under_way.popleft()
            read.result()
            part = flat[start : start + CHUNK_BYTES]
            self._link.copy(part, chunk[: part.numel()], stream)
            self._read_next(chunk, stream.record_event())
        return target

    def _read_next(self, chunk: Tensor, copied: Any) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            return
        span, start, stop = piece

        def read() -> None:
            if copied is not None:
                copied.synchronize()
            span.read_into(writable(chunk)[: stop - start], start)

        self._under_way.append((chunk, self._pool.submit(read)))
