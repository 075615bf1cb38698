from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hotloop_core import TensorEntry
from hotloop_core.errors import ExportError, UnsupportedError
from hotloop_safetensors.layout import Stored, header, plain, shards
from safetensors.torch import load_file


def stored(name: str, tensor: torch.Tensor) -> Stored:
    dtype = str(tensor.dtype).removeprefix("torch.")
    entry = TensorEntry(
        name=name, role="other", part="weight", layer=None, shape=tuple(tensor.shape), dtype=dtype,
        load=lambda: tensor,
    )  # fmt: skip
    return plain(entry, dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "scalar": torch.tensor(7),
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False, True]),
        'na"me\u00e9': torch.randn(2, 3, dtype=torch.float64),
        "half": torch.randn(5, 1).half(),
    }


def test_the_library_reads_what_the_layout_writes(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (group,) = shards([stored(*item) for item in tensors.items()], 10**9)
    data = header(group) + b"".join(raw(tensors[t.entry.name]) for t in group)
    (tmp_path / "x.safetensors").write_bytes(data)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_every_tensor_starts_aligned_to_its_dtype(tensors: dict[str, torch.Tensor]) -> None:
    (group,) = shards([stored(*item) for item in tensors.items()], 10**9)
    head = header(group)
    (length,) = struct.unpack("<Q", head[:8])
    described = json.loads(head[8:])
    assert length == len(head) - 8 and len(head) % 8 == 0
    for name, tensor in tensors.items():
        assert described[name]["data_offsets"][0] % tensor.element_size() == 0


def test_shards_keep_order_and_their_limit_but_never_split_a_tensor() -> None:
    sizes = [4, 4, 20, 1, 8, 3]
    group = shards([stored(str(i), torch.zeros(n)) for i, n in enumerate(sizes)], 40)
    assert [[t.entry.name for t in g] for g in group] == [["0", "1"], ["2"], ["3", "4"], ["5"]]


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ExportError, match="one name"):
        header([stored("a", torch.zeros(1)), stored("a", torch.zeros(1))])


def test_a_dtype_without_a_place_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="complex64"):
        header([stored("a", torch.zeros(1, dtype=torch.complex64))])
