"""Host memory that a device copies from and to at the full rate of the link."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import BudgetError
from hotloop_core.plan import amount
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNMENT = 256
"""Bytes. Places in a buffer begin at multiples of it, which suits every dtype and vectorised loads on the device."""

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits."""

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device of the process


def aligned(nbytes: int) -> int:
    """`nbytes`, at least 1, rounded up to a multiple of ALIGNMENT."""
    return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT


class HostBuffer:
    """`nbytes` of host memory, page-locked where `device` is a CUDA device, so that copies of it are asynchronous.

    Exactly that many bytes: torch's own pinned allocator rounds to powers of two and keeps what it has. The memory
    goes back to the system with the last tensor over it, whether or not this object still lives; the device is waited
    for first, so a copy under way is never cut off. Forks do not inherit locked memory: a child that reads it crashes.

    flat: uint8 [nbytes], all of it.

    Raises:
        BudgetError: the host does not have that much memory, or will not lock it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._pages = _pages(nbytes, device)
        self.flat: Tensor = torch.frombuffer(self._pages, dtype=torch.uint8)

    def view(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor over the bytes from `start`, a multiple of ALIGNMENT.

        It has a storage of its own size, so saving it writes nothing of what lies beside it.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self._pages, dtype=torch.uint8, offset=start, count=nbytes)
        return flat.view(dtype).view(tuple(shape))


def pinned_bytes() -> int:
    """Bytes of host memory that all buffers of this process hold page-locked now."""
    return sum(len(pages) for pages in _PINNED)


class _Pages(mmap.mmap):
    """Anonymous memory. Where `device` is set, it is registered with CUDA until it is freed."""

    device: torch.device | None = None
    address: int

    def __del__(self) -> None:
        if self.device is None or not orderly():
            return
        # cudaHostUnregister is not documented to wait for copies that still use the pages.
        torch.cuda.synchronize(self.device)
        if code := runtime().cudaHostUnregister(self.address):
            raise RuntimeError(f"cudaHostUnregister: {error_text(code)}")


_PINNED: weakref.WeakSet[_Pages] = weakref.WeakSet()
_CREATOR = os.getpid()


def orderly() -> bool:
    """Whether what a finalizer gives back is this process's to give, and the modules that it needs are still there.

    In a forked child the device and the pages are the parent's.
    """
    return os.getpid() == _CREATOR and not sys.is_finalizing()


def _pages(nbytes: int, device: torch.device) -> _Pages:
    what_to_do = (
        "Offload or stream less: plan for fewer tokens, for more device memory or with a smaller host_memory; or free "
        "host memory."
    )
    if nbytes > (available := available_bytes()):
        # Asked for more, Linux would rather kill the process while it locks pages than refuse.
        raise BudgetError(
            f"{amount(nbytes)} of host memory are needed and {amount(available)} are available "
            f"({amount(pinned_bytes())} are page-locked already). {what_to_do}"
        )
    try:
        pages = _Pages(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BudgetError(
            f"the system refused {amount(nbytes)} of host memory: {error.strerror}. {what_to_do}"
        ) from error
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        # Fewer pages to lock, and for the device to look up.
        pages.madvise(mmap.MADV_HUGEPAGE)
    if device.type == "cuda":
        # After a fork, writing a page would move it from under the device's copies.
        pages.madvise(mmap.MADV_DONTFORK)
        pages.address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        # By every core; the registration would have the system clear page after page on one.
        torch.frombuffer(pages, dtype=torch.uint8).zero_()
        if code := runtime().cudaHostRegister(pages.address, len(pages), _PORTABLE):
            raise BudgetError(
                f"{amount(nbytes)} of host memory could not be page-locked: {error_text(code)}. {amount(available)} "
                f"were available, {amount(pinned_bytes())} are page-locked already. {what_to_do} Where a limit on "
                "locked memory is set (`ulimit -l`, or the container's), raise it."
            )
        pages.device = device
        _PINNED.add(pages)
    return pages


def available_bytes() -> int:
    """Host memory that can still be had without swapping: the system's, or the container's where that is less."""
    limits: list[int] = []
    system = Path("/proc/meminfo")
    if system.exists():
        fields = dict(line.split(":") for line in system.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    if (CONTROL_GROUP / "memory.max").exists():
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        if limit != "max":
            lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
            parts = dict(line.split() for line in lines)
            used = int((CONTROL_GROUP / "memory.current").read_text())
            limits.append(int(limit) - used + int(parts["file"]))  # cached files give way
    return min(limits, default=sys.maxsize)


@cache
def runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch loaded, for what torch does not expose: the copy of rows, and clearing an error."""
    library = ctypes.CDLL(None)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.cudaHostRegister.argtypes = [pointer, size, ctypes.c_uint]
    library.cudaHostUnregister.argtypes = [pointer]
    library.cudaMemcpy2DAsync.argtypes = [
        *(pointer, size, pointer, size, size, size),
        *(ctypes.c_int, pointer),
    ]
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def error_text(code: int) -> str:
    """What a CUDA error means. Clears it, else torch would report it again at its next launch."""
    runtime().cudaGetLastError()
    return runtime().cudaGetErrorString(code).decode()
