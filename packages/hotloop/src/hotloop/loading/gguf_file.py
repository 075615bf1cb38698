"""The header of a GGUF file (version 2 and 3): its metadata, and where each tensor is.
Little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache, wraps
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from hotloop_core.errors import CheckpointError, ConfigError, HotloopError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
T = TypeVar("T")


@dataclass(frozen=True)
class GgufTensor:
    """shape: as in torch, rows first. kind: ggml's type number. offset: bytes from the start of the
    file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """metadata: key -> number, text, truth or a list of these."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def dequantise(self, name: str) -> np.ndarray:
        """The tensor `name` in fp32, in its torch shape."""
        import numpy as np
        from gguf import quants
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        *rows, columns = tensor.shape
        stored = np.memmap(
            self.path,
            np.uint8,
            mode="r",
            offset=tensor.offset,
            shape=(*rows, columns // block * block_bytes),
        )
        return np.array(quants.dequantize(stored, kind), np.float32).reshape(tensor.shape)


def reads_metadata(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """`read`, which takes what it needs from a file's metadata: whatever it stumbles over is a CheckpointError."""

    @wraps(read)
    def checked(path: Path) -> T:
        try:
            return read(path)
        except HotloopError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(
                f"{path}: its metadata is damaged or not what its architecture needs ({why}); copy or "
                "download it again, or load the model's original folder"
            ) from error

    return checked


def read_gguf(path: Path) -> GgufFile:
    """Reads the header and checks that the file is as long as it says. The last file read is kept.

    Raises:
        CheckpointError: not a GGUF file, or truncated. ConfigError: the package gguf is missing.

    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _read(path, (found.st_ino, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=1)
def _read(path: Path, _version: tuple[int, int, int]) -> GgufFile:
    """_version: what changes when another file takes the name."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise ConfigError(
            "reading a GGUF file needs the package gguf: `uv add 'hotloop[gguf]'`"
        ) from error
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _parse(path, data)
            length = len(data)
    except (OSError, ValueError, struct.error, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is truncated or no GGUF file ({error}); copy or download it again"
        ) from error
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    for name, tensor in found.tensors.items():
        if tensor.kind not in sizes:
            raise CheckpointError(f"{path}: {name} has the unknown ggml type {tensor.kind}")
        block, block_bytes = sizes[tensor.kind]
        if tensor.shape and tensor.shape[-1] % block:
            raise CheckpointError(
                f"{path}: {name} has {tensor.shape[-1]} columns, which blocks of {block} do not divide; copy or "
                "download it again"
            )
        if tensor.offset + prod(tensor.shape) // block * block_bytes > length:
            raise CheckpointError(
                f"{path} is truncated: {name} lies beyond its {length:,} bytes; copy or download "
                "it again"
            )
    return found


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it starts with {magic!r}, version {version}")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    infos: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, at = _text(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, at + 4)
        at += 4 + 8 * dimensions + 12
        infos.append((name, tuple(reversed(shape)), kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-at // alignment) * alignment
    tensors = {name: GgufTensor(shape, kind, start + offset) for name, shape, kind, offset in infos}
    return GgufFile(path, metadata, tensors)


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise ValueError("a string goes beyond its end")
    return data[at + 8 : end].decode("utf-8"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _text(data, at)
    if kind != _ARRAY:
        layout = _SCALARS[kind]
        return struct.unpack_from(layout, data, at)[0], at + struct.calcsize(layout)
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in _SCALARS:
        layout = f"<{count}{_SCALARS[kind][1]}"
        return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
    items: list[Any] = []
    for _ in range(count):
        item, at = _value(data, at, kind)
        items.append(item)
    return items, at
