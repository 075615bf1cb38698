"""A device and the two ways between it and host memory: streams on CUDA, plain copies where the device is the CPU."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from hotloop_core.errors import PlanError, UnsupportedError
from torch import Tensor

from .host import error_text, runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost
_NARROWEST = (
    512  # bytes; below it a copy of rows spends its time on rows, and a temporary is cheaper
)


class Stream(Protocol):
    """Work in order. torch.cuda.Stream is one; `Any` is an event: what record_event returned."""

    def record_event(self, event: Any = None) -> Any:
        """Marks the end of what was queued so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """What is queued from now on comes after the event."""
        ...


class Link(Protocol):
    """Law: a copy reads and writes when its stream gets there, not when it is queued; only events order streams."""

    @property
    def device(self) -> torch.device:
        """Whose memory `empty` gives."""
        ...

    @property
    def out(self) -> Stream:
        """The stream of copies to the host."""
        ...

    @property
    def back(self) -> Stream:
        """The stream of copies to the device."""
        ...

    def current(self) -> Stream:
        """The stream that the caller computes on."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Device memory, reusable in the order of the current stream as soon as the tensor is dropped."""
        ...

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        """Queues target = source on `stream`; one is a contiguous host tensor. A source on the device may be rows.

        The caller keeps both alive until the copy is done.
        """
        ...

    def timed_event(self) -> Any:
        """An event that has elapsed_time(other), in ms, and query()."""
        ...

    def synchronize(self) -> None:
        """Blocks the host until all copies are done."""
        ...


def link_to(device: torch.device | str) -> Link:
    """The link to `device`, with streams of its own.

    Raises:
        UnsupportedError: the device is neither CUDA nor the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return CudaLink(device)
    if device.type == "cpu":
        return HostLink()
    raise UnsupportedError(
        f"stores know the devices cuda and cpu, not {device}. Use a plan without offloading and streaming."
    )


class CudaLink:
    """A CUDA device and two side streams."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.out: torch.cuda.Stream = torch.cuda.Stream(self.device)
        self.back: torch.cuda.Stream = torch.cuda.Stream(self.device)

    def current(self) -> torch.cuda.Stream:
        """torch's current stream of the device, in this thread."""
        return torch.cuda.current_stream(self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From torch's allocator, in the current stream's pool."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Through the copy engines: neither kernels nor temporaries."""
        if source.is_contiguous():
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            return
        rows = as_rows(source)
        if rows is None or source.device.type != "cuda":
            raise PlanError(f"expected rows on the device, found strides {source.stride()}")
        # torch would gather such a source into a temporary first, with a kernel on the copy's stream.
        code = runtime().cudaMemcpy2DAsync(
            *(target.data_ptr(), rows.width, source.data_ptr(), rows.pitch),
            *(rows.width, rows.height, _DEVICE_TO_HOST, stream.cuda_stream),
        )
        if code != 0:
            raise RuntimeError(f"cudaMemcpy2DAsync of {rows}: {error_text(code)}")

    def timed_event(self) -> torch.cuda.Event:
        """A CUDA event with timing on."""
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Both side streams."""
        self.out.synchronize()
        self.back.synchronize()


class _HostEvent:
    def __init__(self) -> None:
        self.seconds = 0.0

    def elapsed_time(self, other: _HostEvent) -> float:
        return 1e3 * (other.seconds - self.seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Whatever was recorded has happened."""


class _HostStream:
    """Work that is done as soon as it is queued."""

    def record_event(self, event: _HostEvent | None = None) -> _HostEvent:
        event = event or _HostEvent()
        event.seconds = time.perf_counter()
        return event

    def wait_event(self, event: _HostEvent) -> None:
        """It has happened."""


class HostLink:
    """The CPU as the device: a copy is done when `copy` returns."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.out = self.back = _HostStream()

    def current(self) -> _HostStream:
        """The one stream that there is."""
        return self.out

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From torch's allocator."""
        return torch.empty(tuple(shape), dtype=dtype)

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        """At once."""
        target.copy_(source)

    def timed_event(self) -> _HostEvent:
        """Reads the host's clock."""
        return _HostEvent()

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class Rows(NamedTuple):
    """`height` rows of `width` bytes, one every `pitch` bytes."""

    height: int
    width: int
    pitch: int


def as_rows(x: Tensor) -> Rows | None:
    """x as rows in its row-major order, or None where it is not, or where its rows are too narrow to copy well."""
    dims = [(n, step) for n, step in zip(x.shape, x.stride(), strict=True) if n != 1]
    width = height = 1
    while dims and dims[-1][1] == width:
        width *= dims.pop()[0]
    pitch = dims[-1][1] if dims else width
    while dims and dims[-1][1] == pitch * height:
        height *= dims.pop()[0]
    if dims or pitch < width or width * x.itemsize < _NARROWEST:
        return None
    return Rows(height, width * x.itemsize, pitch * x.itemsize)


class Stopwatch:
    """Milliseconds that streams spend in pieces of work. Off, it records nothing and knows none."""

    def __init__(self, link: Link, *, on: bool) -> None:
        self._link, self._on = link, on
        self._total = 0.0
        self._open: deque[tuple[Any, Any]] = deque()

    def start(self, stream: Stream) -> Any:
        """Begins a piece."""
        return stream.record_event(self._link.timed_event()) if self._on else None

    def stop(self, started: Any, stream: Stream) -> None:
        """Ends the piece that `start` began."""
        if started is None:
            return
        self._open.append((started, stream.record_event(self._link.timed_event())))
        while len(self._open) > 256 and self._open[0][1].query():  # never read, it must not grow
            self._close()

    def milliseconds(self) -> float | None:
        """Of all pieces so far; waits for those that are not over yet. None where it is off."""
        while self._open:
            self._open[0][1].synchronize()
            self._close()
        return self._total if self._on else None

    def _close(self) -> None:
        started, stopped = self._open.popleft()
        self._total += started.elapsed_time(stopped)
