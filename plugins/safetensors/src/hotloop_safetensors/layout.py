"""The safetensors file format: 8 bytes of header length, a JSON header, then the tensors' bytes.

Source: the format section of the safetensors README. The header says every tensor's dtype, shape and
place, and all of that is known before any value is: so a file is written one tensor at a time.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hotloop_core.errors import ExportError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_core import TensorEntry

_CODES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


@dataclass(frozen=True)
class Part:
    """A tensor of the file; dtype by torch name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.width

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return _code(self.dtype)[1]


@dataclass(frozen=True)
class Stored:
    """A tensor of the model and what it is in the file: itself in some dtype, or what a quantisation makes of it."""

    entry: TensorEntry
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return sum(part.bytes for part in self.parts)


def plain(entry: TensorEntry, dtype: str) -> Stored:
    """The tensor itself, in `dtype`."""
    return Stored(entry, (Part(entry.name, dtype, entry.shape),))


def header(tensors: Sequence[Stored]) -> bytes:
    """Length and header of a file that holds `tensors` in this order."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    parts = [part for tensor in tensors for part in tensor.parts]
    for part in parts:
        described[part.name] = {
            "dtype": _code(part.dtype)[0],
            "shape": list(part.shape),
            "data_offsets": [offset, offset + part.bytes],
        }
        offset += part.bytes
    if len(described) != len(parts) + 1:
        raise ExportError("two tensors have one name; this is a fault of the tensor stream")
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    return struct.pack("<Q", len(text)) + text


def shards(tensors: Sequence[Stored], max_bytes: int) -> list[list[Stored]]:
    """`tensors` in files of at most `max_bytes` of data; one larger than that has a file alone.

    Within a file the wider dtypes come first, so that every tensor starts aligned to its own dtype.
    """
    groups: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    return [sorted(group, key=lambda t: -max(p.width for p in t.parts)) for group in groups]


def _code(dtype: str) -> tuple[str, int]:
    if dtype not in _CODES:
        raise UnsupportedError(
            f"dtype {dtype!r} has no place in safetensors; it has {', '.join(_CODES)}. "
            "Cast the tensor before the export."
        )
    return _CODES[dtype]
