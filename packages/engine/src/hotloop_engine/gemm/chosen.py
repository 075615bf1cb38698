"""Products of 16-bit operands on a CUDA card: which algorithm of cuBLASLt makes each, and the call.

Its own first choice suits a card that has power to spare. In training, large products run at the limit of the card's
power, where others are faster: by up to 7% in a loop of one product, by less in a step (decision 0022).
"""

from __future__ import annotations

from functools import partial
from math import log2
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from .cublaslt import (
    REAL,
    WORKSPACE_BYTES,
    Algorithm,
    Library,
    Operation,
    Problem,
    functions,
    version,
)
from .trial import StreamClock, fastest

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

WORTH_A_TRIAL = 2 * 10**10
"""Floating-point operations from which the choice matters: some 30 microseconds on an H100."""

CALLS_BEFORE = 64
"""Of products alike, before they are tried out: two steps of a model with 32 layers. By then kernels are compiled, and
the card is warm. A trial takes as long as some twenty products.
"""

SIZES_ALIKE = 2
"""Products alike but for their rows share a trial: so many trials for each doubling of the rows."""

PROBE_ROWS = 64
"""On so many rows algorithms show whether they give the same bits."""

Addresses = tuple[int, int, int, int]
"""Of a, b, the residual (out again where there is none) and out."""

LEAST_ALIGNMENT, MOST_ALIGNMENT = 16, 256
"""Bytes. Addresses that are multiples of less are left to torch; more makes no difference to an algorithm."""

MOST_KNOWN = 4096
"""Problems remembered; ragged batches bring new ones without end."""


class Alike:
    """Products that differ in their rows alone, and not by much: how many there were, what is fastest for them."""

    def __init__(self) -> None:
        self.calls = 0
        self.fastest: Algorithm | None = None
        self.members: WeakSet[Known] = WeakSet()


class Known:
    """A problem on its card, and the algorithm for it. alike: None where there is nothing to try."""

    def __init__(
        self, device: Device, operation: Operation, algorithm: Algorithm, alike: Alike | None
    ) -> None:
        self.device, self.operation, self.algorithm = device, operation, algorithm
        self.alike = alike

    def launch(self, addresses: Addresses, alpha: float, stream: int) -> bool:
        """Queues the product; False where cuBLASLt declines it."""
        if self.alike is not None:
            self._count(self.alike, addresses, stream)
        workspace = self.device.workspace(stream)
        return self.operation.launch(self.algorithm, *addresses, alpha, workspace, stream)

    def take(self, algorithm: Algorithm) -> None:
        """From now on this one, if it serves this problem."""
        if self.operation.takes(algorithm):
            self.algorithm = algorithm

    def _count(self, alike: Alike, addresses: Addresses, stream: int) -> None:
        if alike.fastest is None:
            alike.calls += 1
            if alike.calls <= CALLS_BEFORE or torch.cuda.is_current_stream_capturing():
                return
            alike.fastest = self.device.try_out(self.operation, addresses, stream)
            for member in alike.members:
                member.take(alike.fastest)
        self.alike = None


class Device:
    """What is known of the current card."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = Library(library)
        self._alike: dict[Problem, Alike] = {}
        self._workspaces: dict[int, Tensor] = {}

    def workspace(self, stream: int) -> int:
        """Its address. Products of one stream follow each other, so they share it."""
        found = self._workspaces.get(stream)
        if found is None:
            found = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
            self._workspaces[stream] = found
        return found.data_ptr()

    def find(self, problem: Problem, addresses: Addresses) -> Known | None:
        """The problem with its algorithm; None where cuBLASLt has none."""
        operation = Operation(self.library, problem)
        algorithms = operation.algorithms()
        if not algorithms:
            return None
        _, _, residual, out = addresses
        in_place = problem.ld_residual and residual == out
        if in_place or len(algorithms) == 1 or problem.flops < WORTH_A_TRIAL:
            return Known(self, operation, algorithms[0], None)
        key = problem._replace(m=round(SIZES_ALIKE * log2(problem.m)))
        alike = self._alike.setdefault(key, Alike())
        known = Known(self, operation, algorithms[0], alike)
        alike.members.add(known)
        if alike.fastest is not None:
            known.take(alike.fastest)
        return known

    def try_out(self, operation: Operation, addresses: Addresses, stream: int) -> Algorithm:
        """The algorithm that is fastest on these operands; the product is left at the last address."""
        algorithms = self._agreeing(operation.problem, addresses, operation.algorithms(), stream)
        workspace = self.workspace(stream)
        calls = [
            partial(operation.launch, algorithm, *addresses, 1.0, workspace, stream)
            for algorithm in algorithms
        ]
        if not all(call() for call in calls):
            return algorithms[0]
        return algorithms[fastest(calls, StreamClock())]

    def _agreeing(
        self, problem: Problem, at: Addresses, algorithms: list[Algorithm], stream: int
    ) -> list[Algorithm]:
        """Those that give the bits of the first, on a few rows: what is chosen by time must not decide about values."""
        rows = min(PROBE_ROWS, problem.m)
        k, n = (-(-size // 8) * 8 for size in (problem.k, problem.n))
        shape = (rows, k) if problem.a_rows else (k, rows)
        # Not random: the generator is the user's.
        a = torch.arange(rows * k, dtype=torch.float32, device="cuda").sin_().to(problem.dtype)
        few = Operation(
            self.library,
            problem._replace(m=rows, lda=shape[1], ld_residual=0, ld_out=n),
        )
        first, other = (torch.zeros(rows, n, dtype=problem.dtype, device="cuda") for _ in range(2))
        differs, tried = [], []
        for algorithm in algorithms:
            out = other if tried else first
            addresses = a.data_ptr(), at[1], out.data_ptr(), out.data_ptr()
            if few.takes(algorithm) and few.launch(
                algorithm, *addresses, 1.0, self.workspace(stream), stream
            ):
                tried.append(algorithm)
                differs.append((out.view(torch.int16) != first.view(torch.int16)).any())
        if not tried:
            return algorithms[:1]
        apart = torch.stack(differs).tolist()
        return [
            algorithm for algorithm, other_bits in zip(tried, apart, strict=True) if not other_bits
        ]


def prepare_stream(stream: torch.cuda.Stream) -> None:
    """Gives the products of a stream their workspace now: one that is made in a recording lies in that one's memory."""
    with torch.cuda.device(stream.device):
        device = _device(stream.device_index)
        if device is not None:
            device.workspace(stream.cuda_stream)


_devices: dict[int, Device] = {}
_known: dict[tuple[object, ...], Known | None] = {}


def product(a: Tensor, b: Tensor, out: Tensor, residual: Tensor | None, alpha: float) -> bool:
    """out = residual + alpha * a b, if this is a product for cuBLASLt; False, and nothing done, if it is torch's."""
    index = out.get_device()
    addresses = a_at, b_at, added_at, out_at = (
        a.data_ptr(),
        b.data_ptr(),
        out.data_ptr() if residual is None else residual.data_ptr(),
        out.data_ptr(),
    )
    together = a_at | b_at | added_at | out_at | MOST_ALIGNMENT
    key = (
        index,
        together & -together,
        *(a.dtype, a.shape, a.stride()),
        *(b.dtype, b.shape, b.stride()),
        *(out.dtype, out.stride()),
        residual is not None and (residual.dtype, residual.shape, residual.stride()),
        residual is not None and added_at == out_at,
    )
    known = _known.get(key, _NEVER_SEEN)
    if known is None:
        return False
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return product(a, b, out, residual, alpha)
    stream = torch._C._cuda_getCurrentRawStream(index)
    if not isinstance(known, Known):
        if torch.cuda.is_current_stream_capturing():
            return False  # a workspace of this graph's memory would not outlive it
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        problem = problem_of(a, b, out, residual, together & -together)
        device = _device(index)
        known = device.find(problem, addresses) if problem and device else None
        _known[key] = known
        if known is None:
            return False
    return known.launch(addresses, alpha, stream)


_NEVER_SEEN = object()


def _device(index: int) -> Device | None:
    if index not in _devices:
        library = functions()
        if library is None:
            return None
        _devices[index] = Device(library)
    return _devices[index]


def problem_of(
    a: Tensor, b: Tensor, out: Tensor, residual: Tensor | None, alignment: int
) -> Problem | None:
    """What cuBLASLt would have to do; None where operands are of kinds, layouts or addresses that it does not take.

    alignment: bytes that every operand's address is a multiple of.
    """
    dtype = out.dtype
    if dtype not in REAL or a.dtype != dtype or b.dtype != dtype or alignment < LEAST_ALIGNMENT:
        return None
    (m, k), (_, n) = a.shape, b.shape
    first, second, result = _order(a), _order(b), _order(out)
    if first is None or second is None or result is None or not result[0] or not k:
        return None
    added = (True, 0)
    if residual is not None:
        if residual.dtype != dtype or residual.shape != out.shape:
            return None
        added = _order(residual)
        if added is None or not added[0]:
            return None
    return Problem(m, n, k, *first, *second, added[1], result[1], dtype, alignment)


def _order(matrix: Tensor) -> tuple[bool, int] | None:
    """(whether rows lie one after the other, the stride between them or else between columns); None for neither."""
    rows, columns = matrix.shape
    down, along = matrix.stride()
    if along == 1 and down >= columns > 0:
        return True, down
    if down == 1 and along >= rows > 0:
        return False, along
    if rows == 1 and along == 1 and columns:
        return True, columns
    return None


def library_version() -> str | None:
    """Of the cuBLASLt that makes products on the current card; None where torch makes them."""
    library = functions()
    return None if library is None else version(library)
