"""Rows as people have them: odd characters, tools, parts, holes; each is trained as it is or refused by its number."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from hotloop.training.recipe import DataSection
from hotloop.training.render import Renderer
from hotloop.training.rows import read_rows
from hotloop_core.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for t in m.tool_calls or [] %}{{ t.function.name }}({{ t.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def with_tools() -> dict[str, Any]:
    result = {"role": "tool", "content": "2"}
    return {
        "messages": [user("q"), answer(None, tool_calls=[CALL]), result, answer("it is 2")],
        "tools": TOOLS,
    }


def trained(tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> str:
    row = Renderer(tokenizer, DataSection(path="-"), "chat")(record, "row 7")
    return tokenizer.decode([token for token in row.labels.tolist() if token >= 0])


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_json_line_ends_where_the_line_ends_and_not_at_other_separators(
    tmp_path: Path, separator: str
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"one{separator}two"}, {"text": "three"}]
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), newline=""
    )
    assert read_rows(str(file)) == rows
    table = tmp_path / "rows.csv"
    table.write_text(f"text,n\none{separator}two,1\n")
    assert read_rows(str(table)) == [{"text": f"one{separator}two", "n": "1"}]


def test_a_csv_field_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f'text\n"{"word " * 50_000}"\n')
    assert len(read_rows(str(file))[0]["text"]) == 250_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('text\n"a\nb\nc\n', "not well-formed CSV: unexpected end of data"),
        ("text,text\na,b\n", "two columns have one name"),
    ],
)
def test_a_csv_file_that_would_lose_rows_or_columns_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(str(file))


def test_what_a_parquet_file_adds_to_rows_that_lack_a_key_is_left_out(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [with_tools(), {"messages": [user("q"), answer("a")]}]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    read = read_rows(str(file))
    assert read[1] == rows[1]
    assert read[0]["messages"][1] == {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_reach_the_template_and_calls_are_trained(
    tokenizer: PreTrainedTokenizerFast, tools: Any
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    record = {**with_tools(), "tools": tools}
    assert trained(tokenizer, record) == 'add({"x": 1})<|im_end|>it is 2<|im_end|>'
    row = Renderer(tokenizer, DataSection(path="-", loss_on="all"), "chat")(record, "row 1")
    assert '"description": "adds"' in tokenizer.decode(row.ids.tolist())


def test_a_template_that_would_leave_tools_or_calls_out_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    record = with_tools()
    with pytest.raises(DataError, match="row 7: the row has tools and the chat template has no"):
        trained(tokenizer, record)
    del record["tools"]
    with pytest.raises(DataError, match="row 7: the assistant calls 'add' and the chat template"):
        trained(tokenizer, record)


@pytest.mark.parametrize("first", ["a", "start", "-", " m"])
def test_an_answer_to_nothing_is_not_looked_for_in_what_the_template_writes(
    tokenizer: PreTrainedTokenizerFast, first: str
) -> None:
    messages = [answer(first), user("q"), answer("a")]
    assert trained(tokenizer, {"messages": messages}) == f"{first}<|im_end|>a<|im_end|>"


def test_text_in_parts_is_trained_as_one_text(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert trained(tokenizer, {"messages": [user(parts), answer(parts)]}) == "ab<|im_end|>"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (answer([{"type": "image"}]), "a part of a message is {'type': 'image'}, expected text"),
        (answer(None), "the content of a message is None, expected text"),
        (answer(7), "the content of a message is 7, expected text"),
        (answer("\ud800"), "half a surrogate pair"),
        (answer(None, tool_calls=["add"]), "a tool call is 'add', expected a function with a name"),
    ],
)
def test_content_that_is_no_text_is_refused_with_the_row(
    tokenizer: PreTrainedTokenizerFast, message: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=f"row 7: {says}"):
        trained(tokenizer, {"messages": [user("q"), message]})


def test_an_answer_to_nothing_is_trained_without_its_header(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert trained(tokenizer, {"messages": [answer("hello"), user("q")]}) == "hello<|im_end|>"
