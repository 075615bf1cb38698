"""Reads a small GGUF file whole: metadata and float tensors. For importance matrices, not for models."""

from __future__ import annotations

import struct
from math import prod
from typing import TYPE_CHECKING, Any

from .writer import ALIGNMENT

if TYPE_CHECKING:
    from torch import Tensor

_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT32 = 0


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and every tensor in float32 with its shape as torch says it.

    Raises:
        ValueError, struct.error: it is damaged, or holds another type of tensor.

    """
    import torch

    place = 4

    def take(code: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(f"<{code}", data, place)
        place += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        nonlocal place
        length = take("Q")
        place += length
        return data[place - length : place].decode()

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take(_SCALARS[kind])

    version, tensors, keys = take("I"), take("Q"), take("Q")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}, expected 2 or 3")
    metadata = {text(): value(take("I")) for _ in range(keys)}
    infos: list[tuple[str, tuple[int, ...], int]] = []
    for _ in range(tensors):
        name, dims = text(), take("I")
        shape = tuple(take("Q") for _ in range(dims))[::-1]
        kind, offset = take("I"), take("Q")
        if kind != _FLOAT32:
            raise ValueError(f"tensor {name!r} is of type {kind}, expected float32 (0)")
        infos.append((name, shape, offset))
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    start = -(-place // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, offset in infos:
        raw = data[start + offset : start + offset + 4 * prod(shape)]
        if len(raw) != 4 * prod(shape):
            raise ValueError(f"tensor {name!r} ends beyond the file")
        found[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
    return metadata, found
