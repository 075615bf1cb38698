from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hotloop_core.errors import ExportError
from hotloop_core.files import Outputs
from hotloop_gguf.mixes import BLOCKS
from hotloop_gguf.writer import GgufWriter, TensorInfo, data_bytes, header

METADATA = {
    "general.architecture": "llama",
    "a.int": 7,
    "a.float": 0.5,
    "a.bool": True,
    "a.text": "é<|x|>",
    "a.ints": [1, -2, 3],
    "a.floats": [0.5, -1.0],
    "a.bools": [True, False, True],
    "a.texts": ["", "a b", "▁\n"],
}
TENSORS = [
    TensorInfo("odd", (3,), BLOCKS["F32"]),
    TensorInfo("matrix", (2, 5), BLOCKS["F16"]),
    TensorInfo("blocks", (2, 64), BLOCKS["Q8_0"]),
]


def write(path: Path, parts: dict[str, bytes]) -> None:
    with Outputs(path.parent) as outputs, outputs.open(path.name) as file:
        writer = GgufWriter(file, METADATA, TENSORS)
        for name, data in parts.items():
            half = len(data) // 2
            writer.write(name, memoryview(data[:half]))
            writer.write(name, memoryview(data[half:]))
        writer.finish()


PARTS = {
    "odd": np.arange(3, dtype=np.float32).tobytes(),
    "matrix": np.arange(10, dtype=np.float16).tobytes(),
    "blocks": bytes(range(136)),
}


def test_the_gguf_package_reads_what_the_writer_writes(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", PARTS)
    reader = GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        found = reader.fields[key].contents()
        assert found == value and type(found) is type(value)
        if isinstance(value, list):
            assert [type(item) for item in found] == [type(item) for item in value]
    read = {t.name: t for t in reader.tensors}
    assert read["odd"].data.tolist() == [0, 1, 2]
    assert read["matrix"].data.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert read["blocks"].data.tobytes() == PARTS["blocks"]
    assert list(read["blocks"].shape) == [64, 2]  # GGUF writes dimensions reversed


def test_the_size_is_known_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", PARTS)
    expected = len(header(METADATA, TENSORS)) + data_bytes(TENSORS)
    assert (tmp_path / "x.gguf").stat().st_size == expected


@pytest.mark.parametrize("parts", [{"matrix": PARTS["matrix"]}, {"odd": b"1234"}])
def test_a_wrong_tensor_or_size_is_refused(parts: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="announced"):
        write(tmp_path / "x.gguf", parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [[], None])
def test_a_value_that_gguf_cannot_hold_is_refused_by_key(value: object) -> None:
    with pytest.raises(ExportError, match=r"'a\.key'"):
        header({"a.key": value}, [])  # type: ignore[dict-item]
