"""What both stores are: a link, copies and waits on it that may be timed, and an end that waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hotloop_core.errors import PlanError

from .host import orderly
from .links import Link, Stopwatch, Stream, link_to

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Store:
    """Copies over one link, ordered by events. What derives from it says how its memory is given back."""

    closed: ClassVar[str]
    """What an error says about a store that was closed, and what to do."""

    _link: Link | None = None

    def __init__(self, device: torch.device | str, link: Link | None, *, timing: bool) -> None:
        self._link = link_to(device) if link is None else link
        self._copies = Stopwatch(self._link, on=timing)
        self._waits = Stopwatch(self._link, on=timing)

    def close(self) -> None:
        """Waits for the copies and gives all memory back that no tensor outside still reads."""
        if self._link is not None:
            self._link.synchronize()
            self._link = None
            self._drop()

    def __del__(self) -> None:
        # Copies under way write to device memory that would be another's as soon as it is dropped.
        if orderly():
            self.close()

    def _drop(self) -> None:
        """Lets go of all memory."""
        raise NotImplementedError

    def _open(self) -> Link:
        if self._link is None:
            raise PlanError(self.closed)
        return self._link

    def _copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        started = self._copies.start(stream)
        self._open().copy(target, source, stream)
        self._copies.stop(started, stream)

    def _wait(self, stream: Stream, event: Any) -> None:
        started = self._waits.start(stream)
        stream.wait_event(event)
        self._waits.stop(started, stream)
