"""Activations that wait in host memory between forward and backward."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hotloop_core.errors import PlanError

from .arena import Arena, Place
from .links import Link, Stream, as_rows
from .store import Store

if TYPE_CHECKING:
    import torch
    from hotloop_core.stores import Ticket
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics:
    """What an activation store did since it was made. Sizes in bytes.

    tensors: that were put. bytes_out, bytes_back: copied to the host and to the device. peak_bytes: most that waited
    at one time. held_bytes: device memory of tensors whose copy out is not known to be done. reserved_bytes: of host
    memory. grown: chunks that had to be added to it. stalls: gets that had to start their own copy.
    copy_ms, wait_ms: device time of the copies, and of the caller's stream waiting for them; None without timing.
    """

    tensors: int
    bytes_out: int
    bytes_back: int
    peak_bytes: int
    held_bytes: int
    reserved_bytes: int
    grown: int
    stalls: int
    copy_ms: float | None = None
    wait_ms: float | None = None


class HostTicket:
    """A tensor that waits in host memory. When this object goes, redeemed or not, the tensor's place is free again."""

    __slots__ = ("_returned", "nbytes", "serial")

    def __init__(self, serial: int, nbytes: int, returned: deque[int]) -> None:
        self.serial, self.nbytes, self._returned = serial, nbytes, returned

    def belongs_to(self, returned: deque[int]) -> bool:
        """Whether it is of the store with this list of returned tickets."""
        return self._returned is returned

    def __del__(self) -> None:
        # Collection may come at any moment, in any thread: leave a note, the store reads it when it is next used.
        self._returned.append(self.serial)


@dataclass(slots=True)
class _Away:
    """A tensor that waits. Once on its way back: the tensor, where it was allocated, and when it has arrived."""

    place: Place
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    sent: Any = None
    tensor: Tensor | None = None
    stream: Stream | None = None
    arrived: Any = None


class _Held(NamedTuple):
    """A tensor on its way out, whose memory the copy still reads."""

    tensor: Tensor
    stream: Stream
    sent: Any


class HostActivationStore(Store):
    """An ActivationStore in page-locked host memory: copies run beside the computation, ordered by events alone.

    Nothing here waits on the host, except that a batch which needs more than `capacity` locks further memory. A tensor
    that was put must not be written to any more. put and get are called from one stream at a time; where that changes,
    the caller orders the streams as for any tensor that changes hands. Contiguous tensors and rows of a wider buffer
    are copied as they lie; any other layout costs a temporary on the device.

    device: cuda, or cpu for tests.
    capacity: bytes of host memory, locked at the first put and kept.
    ahead: bytes of device memory that tensors under way may hold: those going out (beyond it, the caller's stream
    waits for the oldest copy) and those coming back before they were asked for. One each way always may, whatever its
    size: to wait for it at once would be no overlap at all.
    timing: measure copies and waits with events.
    link: streams to share with another store.
    """

    closed = "the activation store was closed; make another"

    def __init__(
        self,
        device: torch.device | str,
        *,
        capacity: int,
        ahead: int,
        timing: bool = False,
        link: Link | None = None,
    ) -> None:
        if capacity < 0 or ahead < 0:
            raise PlanError(f"capacity={capacity}, ahead={ahead}: expected bytes, 0 or more")
        super().__init__(device, link, timing=timing)
        self._ahead = ahead
        self._arena = Arena(self._open().device, capacity)
        self._away: dict[int, _Away] = {}  # by serial number, so in the order of put
        self._returned: deque[int] = deque()  # serial numbers of tickets that are gone
        self._held: deque[_Held] = deque()
        self._held_bytes = self._fetched_bytes = self._waiting_bytes = 0
        self._tensors = self._bytes_out = self._bytes_back = self._peak = self._stalls = 0

    def put(self, x: Tensor) -> Ticket:
        """Takes x away, whatever its shape, dtype and strides.

        Raises:
            PlanError: x is on another device, or the store is closed. BudgetError: the batch needs more host memory
                than was planned, and the host does not have it.
        """
        link = self._open()
        if x.device != link.device:
            raise PlanError(f"a tensor on {x.device} was put into the store of {link.device}")
        self._read_notes()
        x = x.detach()
        if not x.is_contiguous() and as_rows(x) is None:
            x = x.contiguous()
        serial = self._tensors
        away = _Away(self._arena.take(x.nbytes), x.shape, x.dtype, x.nbytes)
        self._away[serial] = away
        ticket = HostTicket(serial, x.nbytes, self._returned)  # a failure now gives the place back
        self._tensors += 1
        self._waiting_bytes += x.nbytes
        self._peak = max(self._peak, self._waiting_bytes)

        current = link.current()
        link.out.wait_event(current.record_event())
        self._copy(self._view(away), x, link.out)
        away.sent = link.out.record_event()
        self._bytes_out += x.nbytes
        self._held.append(_Held(x, current, away.sent))
        self._held_bytes += x.nbytes
        while self._held_bytes > self._ahead and len(self._held) > 1:
            self._let_go()
        return ticket

    def prefetch(self, ticket: Ticket) -> None:
        """Starts the way back now, also beyond `ahead`; more than once changes nothing.

        Raises:
            PlanError: as for get.
        """
        away = self._find(ticket)[1]
        if away.tensor is None:
            self._fetch(away)

    def get(self, ticket: Ticket) -> Tensor:
        """The tensor again, contiguous; work queued after this call sees it. Those put before it set out too.

        Raises:
            PlanError: the ticket was redeemed before or is another store's, or the store is closed.
        """
        link = self._open()
        serial, away = self._find(ticket)
        self.settle()
        if away.tensor is None:
            self._stalls += 1
            self._fetch(away)
        self._wait(link.current(), away.arrived)
        tensor = away.tensor
        assert tensor is not None
        self._forget(serial)
        for before in reversed(self._away):
            one = self._away[before]
            if before > serial or one.tensor is not None:
                continue
            if self._fetched_bytes and self._fetched_bytes + one.nbytes > self._ahead:
                break
            self._fetch(one)
        return tensor

    def settle(self) -> None:
        """Lets go of tensors whose copies are under way: the caller's stream waits for the copies, the host does not.

        Called by the first get, and worth calling after a step that failed; later puts do the rest.
        """
        self._read_notes()
        while self._held:
            self._let_go()

    def statistics(self) -> ActivationStatistics:
        """What was done so far. With timing, waits for what is under way."""
        self._open()
        self._read_notes()
        return ActivationStatistics(
            tensors=self._tensors,
            bytes_out=self._bytes_out,
            bytes_back=self._bytes_back,
            peak_bytes=self._peak,
            held_bytes=self._held_bytes,
            reserved_bytes=self._arena.reserved,
            grown=self._arena.grown,
            stalls=self._stalls,
            copy_ms=self._copies.milliseconds(),
            wait_ms=self._waits.milliseconds(),
        )

    def _drop(self) -> None:
        """Tickets that are out become worthless."""
        self._away.clear()
        self._held.clear()
        self._held_bytes = self._fetched_bytes = self._waiting_bytes = 0
        del self._arena

    def _find(self, ticket: Ticket) -> tuple[int, _Away]:
        self._open()
        if not isinstance(ticket, HostTicket) or not ticket.belongs_to(self._returned):
            raise PlanError(
                "the ticket is not this store's; get the tensor from the store that it was put into"
            )
        away = self._away.get(ticket.serial)
        if away is None:
            raise PlanError(
                "a tensor was asked for a second time after its place in host memory was given up: backward ran twice "
                "through one forward (a retained graph). Run forward again, or add the losses before one backward."
            )
        return ticket.serial, away

    def _let_go(self) -> None:
        """Drops the oldest tensor on its way out, once its memory can be used again in its stream's order."""
        tensor, stream, sent = self._held[0]
        self._wait(stream, sent)
        self._held.popleft()
        self._held_bytes -= tensor.nbytes

    def _fetch(self, away: _Away) -> None:
        link = self._open()
        current = link.current()
        tensor = link.empty(away.shape, away.dtype)
        # Kernels queued before may still use this memory, and the copy out may not be done.
        link.back.wait_event(current.record_event())
        link.back.wait_event(away.sent)
        self._copy(tensor, self._view(away), link.back)
        away.arrived = link.back.record_event()
        away.tensor, away.stream = tensor, current
        self._fetched_bytes += away.nbytes
        self._bytes_back += away.nbytes

    def _view(self, away: _Away) -> Tensor:
        return self._arena.view(away.place, away.shape, away.dtype)

    def _forget(self, serial: int) -> None:
        """Frees the place. If a copy back still reads it, the caller's stream waits for that, and so does every put."""
        away = self._away.pop(serial)
        if away.tensor is not None:
            self._fetched_bytes -= away.nbytes
        self._arena.give(away.place)
        self._waiting_bytes -= away.nbytes

    def _read_notes(self) -> None:
        """Frees what tickets that are gone have left: nothing, if they were redeemed."""
        while self._returned:
            serial = self._returned.popleft()
            away = self._away.get(serial)
            if away is None:
                continue
            if away.stream is not None:  # on its way back already, to memory that is dropped here
                away.stream.wait_event(away.arrived)
            self._forget(serial)
