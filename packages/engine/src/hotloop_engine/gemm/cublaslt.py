"""cuBLASLt through ctypes: the library that torch has loaded, one product's layouts, its algorithms.

Names and values are those of the cuBLAS documentation, chapter "Using the cuBLASLt API". cuBLAS counts columns first:
a row-major [M, N] is its [N, M], so out = a b is given to it as out^T = b^T a^T.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import NamedTuple

import torch

COMPUTE_32F, REAL_32F = 68, 0
REAL = {torch.float16: 2, torch.bfloat16: 14}
"""cudaDataType of what is multiplied, and of the result."""

DESC_TRANSPOSE_A, DESC_TRANSPOSE_B = 3, 4
PREFER_MAX_WORKSPACE, PREFER_REDUCTIONS, PREFER_MIN_ALIGNMENT = 1, 3, (5, 6, 7, 8)
REDUCE_IN_COMPUTE_TYPE = 2
"""Parts of a split sum are added up in fp32: in the output's type each would be rounded."""
CONFIG_SPLIT_K = 2

REFUSALS = {7: "invalid value", 8: "architecture mismatch", 15: "not supported"}
"""cublasStatus_t by which a product is declined before anything is done. Every other but 0 is a failure."""

WORKSPACE_BYTES = 2**20
"""What an algorithm may use beside its operands. Those that do not split the sum need a counter, four bytes."""

MOST_ALGORITHMS = 16


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class Problem(NamedTuple):
    """What algorithms are found for: out [m, n] = alpha a [m, k] b [k, n] + residual.

    a_rows, b_rows: whether the operand is row-major. ld: the leading dimension, the stride between rows (or columns).
    ld_residual: 0 where there is none. alignment: bytes that every address is a multiple of.
    """

    m: int
    n: int
    k: int
    a_rows: bool
    lda: int
    b_rows: bool
    ldb: int
    ld_residual: int
    ld_out: int
    dtype: torch.dtype
    alignment: int

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.m * self.n * self.k


class Library:
    """The library and a handle of the device that is current."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.functions = functions
        self.handle = ctypes.c_void_p()
        self.call("cublasLtCreate", ctypes.byref(self.handle))
        self.matmul = functions.cublasLtMatmul
        pointer = ctypes.c_void_p
        self.matmul.argtypes = [*[pointer] * 14, ctypes.c_size_t, pointer]

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function that cannot fail on arguments of ours.

        Raises:
            RuntimeError: it did.
        """
        status = getattr(self.functions, name)(*arguments)
        if status:
            raise RuntimeError(
                f"{name} of cuBLASLt returned status {status}; expected 0. The driver or torch's CUDA libraries are "
                "damaged, or the card ran out of memory for a context."
            )


def accepted(name: str, status: int) -> bool:
    """Whether cuBLASLt took a product; False where it declines.

    Raises:
        RuntimeError: it failed. Another library would meet the same card.
    """
    if status and status not in REFUSALS:
        raise RuntimeError(
            f"{name} of cuBLASLt returned status {status}; expected 0, or for a product that it does not take one of "
            f"{sorted(REFUSALS)}. An earlier kernel may have failed: CUDA_LAUNCH_BLOCKING=1 shows which."
        )
    return not status


def version(functions: ctypes.CDLL) -> str:
    """As in 13.1.0."""
    functions.cublasLtGetVersion.restype = ctypes.c_size_t
    major, rest = divmod(int(functions.cublasLtGetVersion()), 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


@cache
def functions() -> ctypes.CDLL | None:
    """The library of torch's own CUDA; None where torch has none, as on CPU or ROCm."""
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.partition(".")[0]
    name = f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"
    try:
        return ctypes.CDLL(name)  # torch has loaded it: the same file is found by its name alone
    except OSError:
        return None


class Operation:
    """A problem as cuBLASLt has it: descriptor and layouts."""

    def __init__(self, library: Library, problem: Problem) -> None:
        self.library, self.problem = library, problem
        p = problem
        self._descriptor = ctypes.c_void_p()
        library.call(
            "cublasLtMatmulDescCreate", ctypes.byref(self._descriptor), COMPUTE_32F, REAL_32F
        )
        # cuBLAS's first operand is b^T, its second a^T; row-major is its own order, transposed twice.
        for attribute, transposed in (
            (DESC_TRANSPOSE_A, not p.b_rows),
            (DESC_TRANSPOSE_B, not p.a_rows),
        ):
            value = ctypes.c_int32(transposed)
            library.call(
                "cublasLtMatmulDescSetAttribute",
                self._descriptor,
                attribute,
                ctypes.byref(value),
                ctypes.c_size_t(4),
            )
        self._first = self._layout(*((p.n, p.k) if p.b_rows else (p.k, p.n)), p.ldb)
        self._second = self._layout(*((p.k, p.m) if p.a_rows else (p.m, p.k)), p.lda)
        self._out = self._layout(p.n, p.m, p.ld_out)
        self._added = self._layout(p.n, p.m, p.ld_residual or p.ld_out)
        self._numbers = (ctypes.c_float * 2)(1.0, 1.0 if p.ld_residual else 0.0)
        self._alpha = ctypes.addressof(self._numbers)
        self._beta = self._alpha + 4

    def _layout(self, rows: int, columns: int, ld: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self.library.call(
            "cublasLtMatrixLayoutCreate",
            ctypes.byref(layout),
            REAL[self.problem.dtype],
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(ld),
        )
        return layout

    def __del__(self) -> None:
        destroy = self.library.functions.cublasLtMatrixLayoutDestroy
        for name in ("_first", "_second", "_out", "_added"):
            if name in self.__dict__:
                destroy(self.__dict__[name])
        self.library.functions.cublasLtMatmulDescDestroy(self._descriptor)

    def algorithms(self) -> list[Algorithm]:
        """What cuBLASLt expects to be fastest, best first; empty where it has none.

        Those that split the sum over k give other bits than those that do not: either the first splits it, and is the
        only one, or none does.
        """
        lib = self.library
        preference = ctypes.c_void_p()
        lib.call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        try:
            limits: list[tuple[int, ctypes.c_uint64 | ctypes.c_uint32]] = [
                (PREFER_MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES)),
                (PREFER_REDUCTIONS, ctypes.c_uint32(REDUCE_IN_COMPUTE_TYPE)),
                *((kind, ctypes.c_uint32(self.problem.alignment)) for kind in PREFER_MIN_ALIGNMENT),
            ]
            for kind, value in limits:
                lib.call(
                    "cublasLtMatmulPreferenceSetAttribute",
                    preference,
                    kind,
                    ctypes.byref(value),
                    ctypes.c_size_t(ctypes.sizeof(value)),
                )
            found, count = (_Found * MOST_ALGORITHMS)(), ctypes.c_int()
            status = lib.functions.cublasLtMatmulAlgoGetHeuristic(
                lib.handle,
                self._descriptor,
                self._first,
                self._second,
                self._added,
                self._out,
                preference,
                MOST_ALGORITHMS,
                found,
                ctypes.byref(count),
            )
        finally:
            lib.call("cublasLtMatmulPreferenceDestroy", preference)
        if not accepted("cublasLtMatmulAlgoGetHeuristic", status):  # as with rows at odd addresses
            return []
        usable = [
            Algorithm.from_buffer_copy(one.algorithm)
            for one in found[: count.value]
            if not one.state
        ]
        if usable and self._splits(usable[0]):
            return usable[:1]
        return [algorithm for algorithm in usable if not self._splits(algorithm)]

    def _splits(self, algorithm: Algorithm) -> bool:
        parts, written = ctypes.c_int32(), ctypes.c_size_t()
        self.library.call(
            "cublasLtMatmulAlgoConfigGetAttribute",
            ctypes.byref(algorithm),
            CONFIG_SPLIT_K,
            ctypes.byref(parts),
            ctypes.c_size_t(4),
            ctypes.byref(written),
        )
        return parts.value > 1

    def takes(self, algorithm: Algorithm) -> bool:
        """Whether an algorithm that was found for another problem serves this one."""
        found = _Found()
        status = self.library.functions.cublasLtMatmulAlgoCheck(
            self.library.handle,
            self._descriptor,
            self._first,
            self._second,
            self._added,
            self._out,
            ctypes.byref(algorithm),
            ctypes.byref(found),
        )
        return status == 0 and found.workspace <= WORKSPACE_BYTES

    def launch(
        self,
        algorithm: Algorithm,
        a: int,
        b: int,
        residual: int,
        out: int,
        alpha: float,
        workspace: int,
        stream: int,
    ) -> bool:
        """Queues the product of what lies at these addresses; False where the algorithm does not take it."""
        scale = self._alpha
        if alpha != 1.0:
            other = ctypes.c_float(alpha)  # read by the call, so it has to live no longer
            scale = ctypes.addressof(other)
        status = self.library.matmul(
            self.library.handle,
            self._descriptor,
            scale,
            b,
            self._first,
            a,
            self._second,
            self._beta,
            residual,
            self._added,
            out,
            self._out,
            ctypes.addressof(algorithm),
            workspace,
            WORKSPACE_BYTES,
            stream,
        )
        return accepted("cublasLtMatmul", status)
