"""The tensors of a checkpoint before they are read: what each is, and where its bytes lie."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import torch
    from torch import Tensor

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The safetensors format's names (its documentation, "Format") -> torch's."""


@dataclass(frozen=True)
class Span:
    """`nbytes` bytes of a file from `start`."""

    file: Path
    start: int
    nbytes: int

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fills `buffer` (bytes) from `offset` within the span. Read, not mapped: that costs no page faults.

        Raises:
            CheckpointError: the file ends before.
        """
        position = self.start + offset
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(position)
            while len(buffer):
                read = opened.readinto(buffer)
                if not read:
                    raise CheckpointError(
                        f"{self.file} ends at byte {position}, in the middle of a tensor; copy or download it again"
                    )
                position, buffer = position + read, buffer[read:]


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    span: where its bytes lie as they are, else `make` computes it (a quantised GGUF tensor), on the host.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    span: Span | None = None
    make: Callable[[], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """As stored, or as made."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor in host memory of its own."""
        import torch

        if self.span is None:
            assert self.make is not None
            return self.make()
        data = torch.empty(max(self.nbytes, self.dtype.itemsize), dtype=torch.uint8)
        if self.nbytes:
            self.span.read_into(writable(data))
        return data.view(self.dtype)[: math.prod(self.shape)].view(self.shape)


def writable(data: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the host."""
    array: Any = data.numpy()
    return memoryview(array)


def safetensors_index(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of safetensors files whose headers safetensors itself has checked, by name.

    Raises:
        CheckpointError: two files hold the same tensor, or one is of a dtype that torch does not have.
    """
    import torch

    found: dict[str, Stored] = {}
    for file in files:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            kind = getattr(torch, _DTYPES.get(entry["dtype"], ""), None)
            if kind is None:
                raise CheckpointError(
                    f"{file}: {name} is of dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}"
                )
            if name in found:
                raise CheckpointError(
                    f"{name} is in {file.name} and in another file of {file.parent}; delete the files that do not "
                    "belong to this checkpoint"
                )
            first, last = entry["data_offsets"]
            span = Span(file, 8 + size + first, last - first)
            found[name] = Stored(name, tuple(entry["shape"]), kind, span)
    return found
