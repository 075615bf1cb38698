"""llama.cpp's importance matrix files, both kinds: what each column of a weight counts for, by tensor name in GGUF.

Source: `tools/imatrix/imatrix.cpp` of llama.cpp. The older kind (.dat) keeps means times a number of calls, the GGUF
kind sums of squares and how many rows they are over.
"""

from __future__ import annotations

import io
import math
import struct
from typing import TYPE_CHECKING

from hotloop_core.errors import CheckpointError, ConfigError
from hotloop_core.exporter import Importance

from .names import tensor_name
from .reader import read_gguf
from .writer import TensorInfo, header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hotloop_core import ExportFacts, ExportRequest
    from torch import Tensor

    from .writer import Value

IMATRIX, IMATRIX_DAT = "imatrix", "imatrix_dat"
FILES = {
    IMATRIX: "the importance matrix alone, as llama-imatrix writes it",
    IMATRIX_DAT: "the importance matrix alone, in the older form",
}
_DAMAGE = (struct.error, ValueError, KeyError, ArithmeticError, RuntimeError)
"""What a damaged file leads to: no number, text or name where one should be, sizes that are none, shapes that disagree,
lists in lists without end."""
_CHUNK = 512
"""Tokens in a chunk, llama-imatrix's own default: counts are whole chunks to its readers."""


def imatrix_bytes(request: ExportRequest, facts: ExportFacts, kind: str) -> bytes:
    """The file of the request's importance, in the form `kind`.

    Raises:
        ConfigError: the request has none, or only a file of it.

    """
    given = request.importance
    if not isinstance(given, Importance):
        raise ConfigError(
            f"quant={kind!r} writes what was measured, and "
            + ("nothing was. Measure it: hotloop export RUN --imatrix data, or importance="
               "hotloop.exporting.measure_importance(model, batches)."
               if given is None else f"{given} is such a file already; copy it.")
        )  # fmt: skip
    by_name = {
        tensor_name(entry, facts): given.columns[entry.name].float().cpu()
        for entry in request.tensors
        if entry.name in given.columns
    }
    return (_gguf if kind == IMATRIX else _dat)(by_name, given)


def read_imatrix(path: Path, names: Mapping[str, str]) -> Importance:
    """The importance in a file, of either kind. names: tensor name in GGUF -> in the model.

    Raises:
        ConfigError: there is no such file. CheckpointError: it is no such file, or of another model.

    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the importance matrix {path}: {error.strerror}") from error
    try:
        found, source = _read_gguf(data) if data[:4] == b"GGUF" else _read_dat(data)
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is no importance matrix of llama.cpp, or is truncated ({error}); expected a "
            ".gguf or .dat file that llama-imatrix or Hotloop wrote"
        ) from error
    columns = {names[name]: means for name, (means, _) in found.items() if name in names}
    if not columns:
        raise CheckpointError(
            f"{path} has {len(found)} entries, of which none is a tensor of this model (the first is "
            f"{next(iter(found), 'none')!r}). Measure it on this model."
        )
    return Importance(
        columns=columns, tokens=max(count for _, count in found.values()), source=source
    )


def _gguf(by_name: Mapping[str, Tensor], given: Importance) -> bytes:
    import torch

    from .mixes import BLOCKS

    keys: dict[str, Value] = {
        "general.type": IMATRIX,
        "imatrix.datasets": [given.source],
        "imatrix.chunk_count": math.ceil(given.tokens / _CHUNK),
        "imatrix.chunk_size": _CHUNK,
    }
    tensors: dict[str, Tensor] = {}
    for name, means in by_name.items():
        rows = means.reshape(-1, means.shape[-1])
        tensors[f"{name}.in_sum2"] = rows * given.tokens
        tensors[f"{name}.counts"] = torch.full((len(rows), 1), float(given.tokens))
    infos = [TensorInfo(name, tuple(t.shape), BLOCKS["F32"]) for name, t in tensors.items()]
    out = bytearray(header(keys, infos))
    for info, tensor in zip(infos, tensors.values(), strict=True):
        out += tensor.contiguous().numpy().tobytes() + b"\0" * (info.padded - info.bytes)
    return bytes(out)


def _dat(by_name: Mapping[str, Tensor], given: Importance) -> bytes:
    calls = math.ceil(given.tokens / _CHUNK)
    out = bytearray(struct.pack("<i", len(by_name)))
    for name, means in by_name.items():
        text = name.encode()
        out += struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, means.numel())
        out += (means * calls).contiguous().numpy().tobytes()
    source = given.source.encode()
    return bytes(out + struct.pack("<ii", calls, len(source)) + source)


def _read_gguf(data: bytes) -> tuple[dict[str, tuple[Tensor, int]], str]:
    metadata, tensors = read_gguf(data)
    found: dict[str, tuple[Tensor, int]] = {}
    for name, sums in tensors.items():
        base, _, part = name.rpartition(".")
        if part != "in_sum2":
            continue
        counts = tensors[f"{base}.counts"].reshape(-1, 1)
        rows = sums.reshape(len(counts), -1)
        # An expert that no token reached says nothing of its columns: all count alike.
        means = (rows / counts.clamp(min=1.0)).masked_fill(counts == 0, 1.0)
        found[base] = (means if len(means) > 1 else means[0], int(counts.max()))
    return found, ", ".join(metadata.get("imatrix.datasets", []))


def _read_dat(data: bytes) -> tuple[dict[str, tuple[Tensor, int]], str]:
    import torch

    file = io.BytesIO(data)

    def integers(count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", file.read(4 * count))

    def floats(count: int) -> Tensor:
        raw = file.read(4 * count)
        if count < 0 or len(raw) != 4 * count:
            raise ValueError(f"{count} values were announced and {len(raw) // 4} are there")
        return torch.frombuffer(bytearray(raw), dtype=torch.float32)

    found: dict[str, tuple[Tensor, int]] = {}
    (entries,) = integers(1)
    if not 0 < entries < 1 << 20:
        raise ValueError(f"{entries} entries")
    for _ in range(entries):
        (length,) = integers(1)
        name = file.read(length).decode()
        calls, values = integers(2)
        found[name] = (floats(values) / max(1, calls), calls * _CHUNK)
    tail = file.read(8)
    source = file.read(struct.unpack("<ii", tail)[1]).decode() if len(tail) == 8 else ""
    return found, source
