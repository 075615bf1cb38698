"""GGUF files whose header or metadata is damaged, or was made to do harm: refused by name."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hotloop.exporting import export
from hotloop.loading import gguf_config, gguf_tokenizer
from hotloop.loading.gguf_file import read_gguf
from hotloop_core.errors import CheckpointError, HotloopError
from hotloop_testkit.tiny import build, tokenizer
from transformers import LlamaConfig


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gguf")
    return export(build(config), tokenizer(320), folder, format="gguf", quant="q8_0").files[0].path


MISSING = object()
DAMAGE: list[tuple[str, Any]] = [
    ("general.architecture", 7),
    ("general.architecture", MISSING),
    ("llama.context_length", MISSING),
    ("llama.rope.freq_base", "zebra"),
    ("llama.rope.freq_base", [1.0]),
    ("tokenizer.ggml.bos_token_id", -1),
    ("tokenizer.ggml.bos_token_id", 2**63),
    ("tokenizer.ggml.eos_token_id", "../../etc/passwd"),
    ("tokenizer.ggml.pre", [1]),
    ("tokenizer.ggml.tokens", MISSING),
    ("tokenizer.ggml.tokens", ["a", "b"]),
    ("tokenizer.ggml.merges", MISSING),
    ("tokenizer.ggml.merges", ["a"]),
    ("tokenizer.ggml.merges", ["never heard"]),
    ("tokenizer.ggml.token_type", [1]),
]


@pytest.mark.parametrize("key, value", DAMAGE)
def test_damaged_metadata_is_refused_with_the_file_s_name(
    key: str, value: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_gguf(file)
    metadata = {k: v for k, v in {**whole.metadata, key: value}.items() if v is not MISSING}
    damaged = replace(whole, metadata=metadata)
    for module in (gguf_config, gguf_tokenizer):
        monkeypatch.setattr(module, "read_gguf", lambda _: damaged)
    with pytest.raises(HotloopError, match=file.name):
        gguf_config.gguf_config(file)
        gguf_tokenizer.gguf_tokenizer(file)


def with_key(data: bytes, key: str, kind: int, value: bytes) -> bytes:
    """A GGUF file with one key more, before the others; of 16 letters and four bytes the data stays aligned."""
    (count,) = struct.unpack_from("<Q", data, 16)
    name = struct.pack("<Q", len(key)) + key.encode()
    return (
        data[:16]
        + struct.pack("<Q", count + 1)
        + name
        + struct.pack("<I", kind)
        + value
        + data[24:]
    )


@pytest.mark.parametrize(
    "kind, value",
    [(4, struct.pack("<I", 0)), (5, struct.pack("<i", -32)), (6, struct.pack("<f", 32.0))],
    ids=["zero", "negative", "no whole number"],
)
def test_an_alignment_that_is_none_is_refused(
    kind: int, value: bytes, file: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(with_key(file.read_bytes(), "general.alignment", kind, value))
    with pytest.raises(CheckpointError, match="its alignment is"):
        read_gguf(damaged)


def test_a_width_that_the_blocks_do_not_divide_is_refused(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "x.gguf"
    name = b"blk.0.attn_q.weight"
    data = bytearray(file.read_bytes())
    place = data.index(name) + len(name) + 4
    data[place : place + 8] = struct.pack("<Q", 63)
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match="63 columns, which blocks of 32 do not divide"):
        read_gguf(damaged)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf cannot be read"):
        read_gguf(tmp_path / "nowhere.gguf")


def test_another_file_of_the_same_name_is_read_again(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file.read_bytes())
    assert "hotloop.the.note" not in read_gguf(path).metadata
    other = tmp_path / "y.gguf"
    other.write_bytes(with_key(file.read_bytes(), "hotloop.the.note", 4, struct.pack("<I", 7)))
    os.replace(other, path)
    assert read_gguf(path).metadata["hotloop.the.note"] == 7
