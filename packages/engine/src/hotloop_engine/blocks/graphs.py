"""CUDA graphs: what a stretch of code queues, recorded once and queued again by one launch."""

from __future__ import annotations

import gc
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hotloop_engine.gemm import prepare_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class Replay(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Queues it on the current stream."""
        ...


def can_record(device: torch.device) -> bool:
    """Whether there are CUDA graphs, and this is not part of one."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


_streams: dict[int, torch.cuda.Stream] = {}


def capture(
    work: Callable[[], list[Tensor]], pool: Any, device: torch.device
) -> tuple[Replay, list[Tensor]]:
    """A CUDA graph of `work`, in the memory of `pool`. What `work` raises comes through, and nothing stays behind."""
    with torch.cuda.device(device):
        here = torch.cuda.current_stream()
        if here.device_index not in _streams:
            _streams[here.device_index] = torch.cuda.Stream()
        aside = _streams[here.device_index]
        prepare_stream(aside)
        graph = torch.cuda.CUDAGraph()
        aside.wait_stream(here)
        with torch.cuda.stream(aside), _nothing_collected():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                found = work()
            except BaseException:
                with suppress(RuntimeError):  # says again that the recording failed
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(aside)
    return graph, found


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What is collected may belong to the card, and must not be given back in a recording."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
