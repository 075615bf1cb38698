"""Chat templates by name, and conversations of other formats."""

from __future__ import annotations

import pytest
from hotloop.chat_templates import (
    CHAT_TEMPLATES,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
)
from hotloop_core.errors import ConfigError, DataError, UnsupportedError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]


@pytest.fixture
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [t.stop for t in CHAT_TEMPLATES.values() if t.stop]}
    )
    return tokenizer


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_continues_what_it_asked(tokenizer, name):
    """The text with the answer starts with the text that asks for it: training and inference agree."""
    get_chat_template(tokenizer, name)
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.startswith(asked)
    assert whole[len(asked) :].strip().startswith("a" + tokenizer.eos_token)
    assert whole.count("Be brief.") == 1 and asked.count("q") >= 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "llama-3.2",
            "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>",
        ),
        (
            "gemma3",
            "<s><start_of_turn>user\nBe brief.\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n",
        ),
        (
            "phi-4",
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>q<|im_end|>"
            "<|im_start|>assistant<|im_sep|>a<|im_end|>",
        ),
    ],
)
def test_templates_write_what_the_models_were_trained_on(tokenizer, name, text):
    get_chat_template(tokenizer, name)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text


def test_the_default_system_message_stands_where_there_is_none(tokenizer):
    get_chat_template(tokenizer, "qwen-2.5")
    text = tokenizer.apply_chat_template(CHAT[1:], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")


def test_the_end_of_text_stays_where_it_is_asked_to(tokenizer):
    get_chat_template(tokenizer, "chatml", map_eos_token=False)
    assert tokenizer.eos_token == "</s>"


def test_a_mapping_is_refused_with_what_converts_the_rows(tokenizer):
    get_chat_template(tokenizer, "chatml", mapping={"role": "role", "user": "user"})
    with pytest.raises(UnsupportedError, match=r"hotloop\.standardize_data_formats"):
        get_chat_template(tokenizer, "chatml", mapping={"role": "from", "content": "value"})
    with pytest.raises(ConfigError, match="no built-in chat template 'vicuna'"):
        get_chat_template(tokenizer, "vicuna")


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_conversations_stay_in_their_column_with_all_that_they_had(column):
    import datasets

    expected = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0},
    ]
    rows = [{column: SHAREGPT, "source": "x"}]
    assert standardize_sharegpt(rows) == [{column: expected, "source": "x"}]
    plain = [{key: message[key] for key in ("from", "value")} for message in SHAREGPT]
    table = datasets.Dataset.from_list([{column: plain, "source": "x"}])
    for data in (table, table.to_iterable_dataset()):
        (row,) = standardize_data_formats(data)
        assert row["source"] == "x"
        assert row[column] == [{"role": m["role"], "content": m["content"]} for m in expected]


def test_messages_of_tools_stay_as_they_are():
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [1]},
        {"role": "tool", "content": "2"},
    ]
    assert standardize_data_formats([{"messages": messages}]) == [{"messages": messages}]


def test_unknown_speakers_and_rows_are_refused():
    with pytest.raises(DataError, match="from one of user, assistant"):
        standardize_data_formats([{"conversations": [{"from": "dog", "value": "woof"}]}])
    with pytest.raises(DataError, match="a row has text; expected 'messages' or 'conversations'"):
        standardize_data_formats([{"text": "a"}])
