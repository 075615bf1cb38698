"""A tokenizer that is missing or damaged is refused by the file that is; other failures are not taken for it."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers
from hotloop.loading import load_tokenizer
from hotloop_core.errors import CheckpointError


@pytest.fixture
def copy(tiny_llama, tmp_path):
    (directory := tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, directory)
    return directory


def changed(file, **values):
    return json.dumps(json.loads(file.read_text()) | values)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", b'{"version": "1.0", "added_tokens": 3}'),
        ("tokenizer_config.json", b'{"eos_token": '),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_a_damaged_file_is_named(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*again"):
        load_tokenizer(copy)


def test_a_model_that_the_tokenizers_library_does_not_know_is_named(copy):
    file = copy / "tokenizer.json"
    file.write_text(changed(file, model={"type": "Unheard-of"}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged: .*ModelUntagged"):
        load_tokenizer(copy)


@pytest.mark.parametrize("value", [{"eos_token": 3}, {"added_tokens_decoder": [1]}])
def test_files_that_are_whole_and_at_odds_are_all_named(copy, value):
    file = copy / "tokenizer_config.json"
    file.write_text(changed(file, **value))
    with pytest.raises(CheckpointError, match=r"made of tokenizer\.json, tokenizer_config\.json"):
        load_tokenizer(copy)


def test_a_folder_without_a_vocabulary_has_no_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of tokenizer\.json, .* is there"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    "error", [ImportError("install it"), MemoryError(), RuntimeError("its own")]
)
def test_what_is_no_fault_of_the_files_is_let_through(copy, monkeypatch, error):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load_tokenizer(copy)
    assert caught.value is error
