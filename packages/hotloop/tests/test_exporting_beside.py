"""What stands beside exported weights: several chat templates, and what an older export left in the directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hotloop.exporting import export
from hotloop_core.errors import ExportError
from hotloop_gguf.tokenizer import Tokenizer
from hotloop_testkit.tiny import SMALL, build, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag-2": "{{ documents }}"}


def tiny() -> Any:
    return build(LlamaConfig(**SMALL, num_hidden_layers=1)).eval()


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def with_templates(template: Any) -> Any:
    made = tokenizer(320)
    made.chat_template = template
    return made


def test_several_chat_templates_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    export(tiny(), with_templates(TEMPLATES), tmp_path, format="safetensors")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATES


def test_a_gguf_file_has_the_default_template_and_the_others_by_name(tmp_path: Path) -> None:
    from gguf import GGUFReader

    asked = {"format": "gguf", "quant": "f16"}
    file = export(tiny(), with_templates(TEMPLATES), tmp_path, **asked).files[0].path
    found = {
        name.removeprefix("tokenizer.chat_template"): field.contents()
        for name, field in GGUFReader(file).fields.items()
        if name.startswith("tokenizer.chat_template")
    }
    default, tool_use, rag = TEMPLATES.values()
    assert found == {"": default, "s": ["tool_use", "rag_2"], ".tool_use": tool_use, ".rag_2": rag}


def test_one_chat_template_has_no_others_beside_it() -> None:
    assert "tokenizer.chat_templates" not in Tokenizer({}, {"chat_template": "x"}).further_templates


@pytest.mark.parametrize("first", ["adapter", "16bit"])
def test_a_model_and_an_adapter_in_one_directory_are_refused(first: str, tmp_path: Path) -> None:
    model = adapted(tiny())
    export(model, None, tmp_path, format="safetensors", quant=first)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    second = {"adapter": "16bit", "16bit": "adapter"}[first]
    with pytest.raises(ExportError, match=r"holds an? \w+ already.*Choose another directory"):
        export(model, None, tmp_path, format="safetensors", quant=second, overwrite=True)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_chat_template_of_an_older_export_does_not_stay(tmp_path: Path) -> None:
    export(tiny(), with_templates("{{ 'old' }}"), tmp_path, format="safetensors")
    export(tiny(), tokenizer(320), tmp_path, format="safetensors", overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def test_a_tokenizer_that_is_not_exported_is_left_alone(tmp_path: Path) -> None:
    with_templates("{{ 'mine' }}").save_pretrained(tmp_path)
    export(tiny(), None, tmp_path, format="safetensors")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ 'mine' }}"
