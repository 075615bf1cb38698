"""Products of 16-bit operands on a CUDA card: which algorithm of cuBLASLt makes each, and the call.

Its own first choice is made for a cold card. In a training step large products run at the limit of the card's power,
where smaller tiles are up to 7% faster (decision 0022).
"""

from __future__ import annotations

from functools import partial
from math import log2
from typing import TYPE_CHECKING

import torch

from .cublaslt import REAL, WORKSPACE_BYTES, Algorithm, Library, Operation, Problem, functions
from .trial import StreamClock, fastest

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

WORTH_A_TRIAL = 2 * 10**10
"""Floating-point operations from which the choice matters: some 30 microseconds on an H100."""

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


class Known:
    """A problem on its card, and the algorithm for it."""

    def __init__(self, device: Device, operation: Operation, algorithm: Algorithm) -> None:
        self.device, self.operation, self.algorithm = device, operation, algorithm

    def launch(self, addresses: Addresses, alpha: float, stream: int) -> bool:
        """Queues the product; False where it does not run."""
        workspace = self.device.workspace(stream)
        return self.operation.launch(self.algorithm, *addresses, alpha, workspace, stream)


class Device:
    """What is known of the current card."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = Library(library)
        self._fastest: dict[Problem, Algorithm] = {}
        self._workspaces: dict[int, Tensor] = {}

    def workspace(self, stream: int) -> int:
        """Its address. Products of one stream follow each other, so they share it."""
        found = self._workspaces.get(stream)
        if found is None:
            found = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
            self._workspaces[stream] = found
        return found.data_ptr()

    def find(self, problem: Problem, addresses: Addresses, stream: int) -> Known | None:
        """The problem with its algorithm, which may first be tried out on these operands; None where there is none.

        What lies at the last address is overwritten, unless it is an operand.
        """
        operation = Operation(self.library, problem)
        alike = problem._replace(m=round(SIZES_ALIKE * log2(problem.m)))
        fastest_alike = self._fastest.get(alike)
        if fastest_alike is not None and operation.takes(fastest_alike):
            return Known(self, operation, fastest_alike)
        algorithms = operation.algorithms()
        if not algorithms:
            return None
        _, _, residual, out = addresses
        if problem.flops < WORTH_A_TRIAL or (problem.ld_residual and residual == out):
            return Known(self, operation, algorithms[0])
        agreeing = self._agreeing(problem, addresses, algorithms, stream)
        ways = [Known(self, operation, algorithm) for algorithm in agreeing]
        calls = [partial(way.launch, addresses, 1.0, stream) for way in ways]
        if not all(call() for call in calls):
            return ways[0]
        chosen = ways[fastest(calls, StreamClock())]
        self._fastest[alike] = chosen.algorithm
        return chosen

    def _agreeing(
        self, problem: Problem, at: Addresses, algorithms: list[Algorithm], stream: int
    ) -> list[Algorithm]:
        """Those that give the bits of the first, on a few rows: what is chosen by time must not decide about values."""
        rows, k, n = min(PROBE_ROWS, problem.m), *(-(-size // 8) * 8 for size in problem[1:3][::-1])
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
        residual if residual is None else (residual.dtype, residual.shape, residual.stride()),
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
            return False  # finding algorithms waits for the card, which a graph cannot record
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        problem = problem_of(a, b, out, residual, together & -together)
        device = _device(index)
        known = device.find(problem, addresses, stream) if problem and device else None
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
    return None if library is None else Library(library).version
