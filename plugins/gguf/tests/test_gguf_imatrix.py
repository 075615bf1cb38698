"""Importance matrices in llama.cpp's files: layouts as its own reader takes them, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hotloop_core import Importance, TensorEntry, discover
from hotloop_core.errors import CheckpointError, ConfigError
from hotloop_gguf.imatrix import imatrix_bytes, read_imatrix

FACTS = discover().match({"model_type": "llama"}).exports["gguf"]
NAMES = {"blk.0.attn_q.weight": "q", "blk.0.ffn_down.weight": "down"}


def request(importance: Any) -> Any:
    entries = [
        TensorEntry(
            name=role, role=role, part="weight", layer=0, shape=(4, 3), dtype="float32",
            load=lambda: torch.zeros(4, 3),
        )
        for role in ("q", "down", "up")
    ]  # fmt: skip
    return SimpleNamespace(importance=importance, tensors=entries)


@pytest.fixture
def importance() -> Importance:
    columns = {"q": torch.tensor([1.0, 2.5, 0.0]), "down": torch.rand(3)}
    return Importance(columns=columns, tokens=1000, source="mine.txt")


@pytest.mark.parametrize("kind", ["imatrix", "imatrix_dat"])
def test_what_is_written_is_read_again(kind: str, importance: Importance, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(imatrix_bytes(request(importance), FACTS, kind))
    found = read_imatrix(file, NAMES)
    assert found.source == "mine.txt" and found.tokens == (1000 if kind == "imatrix" else 1024)
    for name, means in importance.columns.items():
        torch.testing.assert_close(found.columns[name], means, rtol=1e-6, atol=0.0)


def test_the_gguf_form_has_llama_imatrix_keys_and_sums(
    importance: Importance, tmp_path: Path
) -> None:
    (tmp_path / "i.gguf").write_bytes(imatrix_bytes(request(importance), FACTS, "imatrix"))
    reader = GGUFReader(tmp_path / "i.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    assert keys["general.type"] == "imatrix" and keys["imatrix.datasets"] == ["mine.txt"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (2, 512)
    tensors = {t.name: t.data for t in reader.tensors}
    assert tensors["blk.0.attn_q.weight.in_sum2"].reshape(-1).tolist() == [1000.0, 2500.0, 0.0]
    assert tensors["blk.0.attn_q.weight.counts"].reshape(-1).tolist() == [1000.0]


def test_experts_have_rows_of_their_own_and_one_that_saw_nothing_counts_all_alike(
    tmp_path: Path,
) -> None:
    writer = GGUFWriter(tmp_path / "i.gguf", "llama")
    writer.add_array("imatrix.datasets", ["a", "b"])
    name = "blk.0.ffn_down.weight"
    writer.add_tensor(f"{name}.in_sum2", np.array([[2.0, 4.0], [0.0, 0.0]], np.float32))
    writer.add_tensor(f"{name}.counts", np.array([[2.0], [0.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(tmp_path / "i.gguf", NAMES)
    assert found.columns["down"].tolist() == [[1.0, 2.0], [1.0, 1.0]] and found.source == "a, b"


def test_the_older_form_divides_by_its_calls(tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii2f", 4, 2, 8.0, 2.0)
    (tmp_path / "i.dat").write_bytes(data)  # without the tail that later versions write
    found = read_imatrix(tmp_path / "i.dat", NAMES)
    assert found.columns["q"].tolist() == [2.0, 0.5] and found.source == ""


def gguf(tensors: dict[str, tuple[int, ...]], key: str = "", value: bytes = b"") -> bytes:
    """A file with zeros for tensors and at most one key, right or not."""
    text = lambda name: struct.pack("<Q", len(name)) + name.encode()  # noqa: E731
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), bool(key))
    out += text(key) + value if key else b""
    for name, (size,) in tensors.items():
        out += text(name) + struct.pack("<IQIQ", 1, size, 0, 0)
    return out + bytes(4096)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "truncated"),
        (b"GGUF" + b"\3\0\0\0", "truncated"),
        (struct.pack("<iii", 1, 3, 1) + b"abc", "truncated"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<iif", 1, 1, 1.0), "none is a tensor"),
        (gguf({"w.in_sum2": (8,), "w.counts": (3,)}), "truncated"),
        (gguf({"w.in_sum2": (2**63,), "w.counts": (1,)}), "truncated"),
        (gguf({}, "general.alignment", struct.pack("<II", 4, 0)), "truncated"),
        (gguf({}, "a", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000), "truncated"),
    ],
    ids=["empty", "cut", "garbage", "another model's", "shapes", "sizes", "alignment", "nested"],
)
def test_what_is_no_importance_matrix_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(tmp_path / "i.dat", NAMES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.dat"):
        read_imatrix(tmp_path / "nowhere.dat", NAMES)


@pytest.mark.parametrize("given", [None, Path("i.dat")])
def test_writing_what_was_not_measured_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="writes what was measured"):
        imatrix_bytes(request(given), FACTS, "imatrix")
