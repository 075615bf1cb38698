"""The GGUF file format, version 3: header, metadata, tensor infos, then the tensors' bytes, aligned.

Source: docs/gguf.md of ggml. Everything before the data is known before any value is, so a file is
written one tensor at a time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hotloop_core.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hotloop_core.files import HashingFile

ALIGNMENT = 32


class UInt16(int):
    """An integer that llama.cpp reads as 16 bits without sign."""


class Int32(int):
    """An integer that llama.cpp reads as 32 bits with sign."""


Scalar = int | float | bool | str
Value = Scalar | list[int] | list[float] | list[bool] | list[str]

_UINT16, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 2, 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Block:
    """A storage type: its number in ggml, `values` elements stored in `bytes` bytes."""

    name: str
    number: int
    values: int
    bytes: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: shape as torch says it (GGUF writes it reversed) and its storage type."""

    name: str
    shape: tuple[int, ...]
    block: Block

    @property
    def bytes(self) -> int:
        """Size of the data, without padding."""
        return prod(self.shape) // self.block.values * self.block.bytes

    @property
    def padded(self) -> int:
        """Size of the data with the zeros after it."""
        return self.bytes + -self.bytes % ALIGNMENT


class GgufWriter:
    """Writes one file: the header at once, then each tensor's bytes, in the order of `tensors`."""

    def __init__(
        self, file: HashingFile, metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]
    ) -> None:
        self._file = file
        self._waiting = list(reversed(tensors))
        self._written = 0
        file.write(header(metadata, tensors))

    def write(self, name: str, part: memoryview) -> None:
        """The next bytes of the next tensor.

        Raises:
            ExportError: it is not the next one, or has more bytes than announced.

        """
        info = self._waiting[-1] if self._waiting else None
        self._written += self._file.write(part)
        if info is None or name != info.name or self._written > info.bytes:
            raise ExportError(
                f"{name} ({self._written} bytes) was written where the file announced {info}; "
                "this is a fault of the exporter"
            )
        if self._written == info.bytes:
            self._file.write(b"\0" * (-info.bytes % ALIGNMENT))
            self._waiting.pop()
            self._written = 0

    def finish(self) -> None:
        """Raises ExportError where a tensor that was announced is missing or incomplete."""
        if self._waiting:
            raise ExportError(
                f"{self._waiting[-1].name} ({self._waiting[-1].bytes} bytes) was announced and "
                f"{self._written} bytes of it written; this is a fault of the exporter"
            )


def split(
    metadata: Mapping[str, Value], tensors: Sequence[TensorInfo], max_bytes: int | None
) -> list[tuple[dict[str, Value], list[TensorInfo]]]:
    """Metadata and tensors of each file, of at most `max_bytes` where no single tensor is larger; None: one file.

    The layout of llama.cpp's gguf-split: the first file has the model's metadata, every file says which of how many
    it is.
    """
    groups: list[list[TensorInfo]] = [[]]
    size = len(header(metadata, tensors))
    for tensor in tensors:
        if max_bytes is not None and groups[-1] and size + tensor.padded > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.padded
    if len(groups) == 1:
        return [(dict(metadata), groups[0])]
    files: list[tuple[dict[str, Value], list[TensorInfo]]] = []
    for number, group in enumerate(groups):
        place: dict[str, Value] = {
            "split.no": UInt16(number),
            "split.count": UInt16(len(groups)),
            "split.tensors.count": Int32(len(tensors)),
        }
        files.append(({**metadata, **place} if number == 0 else place, group))
    return files


def header(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the tensor data, padded to the alignment."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _typed(key, value)
    offset = 0
    for tensor in tensors:
        dims = tuple(reversed(tensor.shape))
        out += _string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", tensor.block.number, offset)
        offset += tensor.padded
    return bytes(out) + b"\0" * (-len(out) % ALIGNMENT)


def data_bytes(tensors: Sequence[TensorInfo]) -> int:
    """Size of the data section."""
    return sum(tensor.padded for tensor in tensors)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Value) -> bytes:
    if not isinstance(value, list):
        kind, data = _scalar(key, value)
        return struct.pack("<I", kind) + data
    if not value:
        raise ExportError(f"metadata {key!r} is an empty list, whose type GGUF cannot say; omit it")
    head = struct.pack("<I", _ARRAY)
    first = value[0]
    if isinstance(first, str):
        strings = b"".join(_string(str(item)) for item in value)
        return head + struct.pack("<IQ", _STRING, len(value)) + strings
    if isinstance(first, bool):
        kind, code = _BOOL, "?"
    else:
        kind, code = (_INT32, "i") if isinstance(first, int) else (_FLOAT32, "f")
    return head + struct.pack(f"<IQ{len(value)}{code}", kind, len(value), *value)


def _scalar(key: str, value: Scalar) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, UInt16):
        return _UINT16, struct.pack("<H", value)
    if isinstance(value, Int32):
        return _INT32, struct.pack("<i", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    raise ExportError(
        f"metadata {key!r} is {value!r}; GGUF holds numbers, booleans, strings and lists of them"
    )
