"""From files to tokens: what is read, what is trained, what is held out, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hotloop.chat_templates import (
    CHAT_TEMPLATES,
    get_chat_template,
    train_on_responses_only,
)
from hotloop.training.batches import PackedDataset, as_row, collate, collate_weighted
from hotloop.training.data import Prepared, held_out_sides, prepare, read
from hotloop.training.recipe import DataSection, make_recipe
from hotloop.training.render import Renderer, Row
from hotloop.training.rows import read_rows
from hotloop_core.errors import ConfigError, DataError, SecurityError
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Tokenizer = PreTrainedTokenizerFast


def write(path: Path, records: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def render(tokenizer: Tokenizer, record: dict[str, Any], form: str = "chat", **options: Any) -> Row:
    return Renderer(tokenizer, DataSection(path="-", **options), form)(record, "row 1")


def trained_text(tokenizer: Tokenizer, row: Row) -> str:
    return tokenizer.decode([token for token in row.labels.tolist() if token >= 0])


def prepared(tokenizer: Tokenizer, path: str, max_seq_len: int = 64, **data: Any) -> Prepared:
    recipe = make_recipe(
        {
            "model": {"name": "-", "max_seq_len": max_seq_len},
            "data": {"path": path, "held_out": 0.0, **data},
            "output": {"directory": "-"},
        }
    )
    return prepare(recipe, read(recipe.data), tokenizer)


def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a, b", "completion": 'say "c"\nd'}, {"prompt": "e", "completion": "ü"}]
    write(tmp_path / "r.jsonl", rows)
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.csv").write_text('prompt,completion\n"a, b","say ""c""\nd"\ne,ü\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert read_rows(str(tmp_path / f"r.{suffix}")) == rows, suffix


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": ', "line 2 is not well-formed JSON"),
        ("r.jsonl", "[1]\n", "line 1 holds a list"),
        ("r.jsonl", "\n", "has no rows"),
        ("r.json", '{"a": 1}', "expected a list"),
        ("r.csv", "a,b\n1\n", "do not match the header"),
        ("r.parquet", "no parquet", "not a whole Parquet file"),
        ("r.txt", "text", "expected a file that ends in"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["pkl", "pt", "bin", "npy"])
def test_pickled_data_is_refused_unread(suffix: str) -> None:
    with pytest.raises(SecurityError, match="can run code"):
        read_rows(f"does-not-even-exist.{suffix}")


@pytest.mark.parametrize("template", ["chatml", "mistral", "zephyr", "alpaca"])
def test_exactly_the_answers_of_a_multi_turn_chat_are_trained(
    tokenizer: Tokenizer, template: str
) -> None:
    get_chat_template(tokenizer, template)
    row = render(
        tokenizer, chat("What is it?", " A fast loop.", "And you?", "A\nmodel"), system=None
    )
    answers = trained_text(tokenizer, row).replace(" ", "")
    end = tokenizer.eos_token
    assert answers == f"Afastloop.{end}A\nmodel{end}"


def test_loss_on_all_trains_every_token(tokenizer: Tokenizer) -> None:
    row = render(tokenizer, chat("q", "a"), loss_on="all")
    assert row.labels.tolist() == row.ids.tolist()


def test_a_system_message_is_added_once_and_not_trained(tokenizer: Tokenizer) -> None:
    row = render(tokenizer, chat("q", "a"), system="Be brief.")
    assert tokenizer.decode(row.ids.tolist()).count("Be brief.") == 1
    assert trained_text(tokenizer, row) == "a<|im_end|>"


def test_prompt_and_completion_train_the_completion_and_its_end(tokenizer: Tokenizer) -> None:
    record = {"prompt": "two and two are", "completion": " four"}
    row = render(tokenizer, record, "prompt_completion")
    assert trained_text(tokenizer, row) == " four<|im_end|>"
    talk = chat("hello", "hi")["messages"]
    row = render(
        tokenizer,
        {"prompt": talk, "completion": chat("x", "bye")["messages"][1:]},
        "prompt_completion",
    )
    assert trained_text(tokenizer, row) == "bye<|im_end|>"


def test_plain_text_trains_all_of_it(tokenizer: Tokenizer) -> None:
    row = render(tokenizer, {"text": "just text"}, "text")
    assert trained_text(tokenizer, row) == "just text<|im_end|>"


def test_a_template_that_rewrites_earlier_answers_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:"
        "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert (
        trained_text(tokenizer, render(tokenizer, chat("q", "hm</think>a"))).strip()
        == "hm</think>a"
    )
    with pytest.raises(DataError, match="changes an earlier answer"):
        render(tokenizer, chat("q", "hm</think>a", "again", "b"))


def test_rows_without_the_named_fields_are_listed_by_number(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "r.jsonl", [chat("q", "a"), {"text": "x"}, chat("q", "b"), {"messages": None}]
    )
    with pytest.raises(
        DataError, match=r"2 of 4 rows without 'messages' \(rows 2, 4; row 2 has 'text'"
    ):
        prepared(tokenizer, path)


def test_rows_that_fit_no_form_say_what_was_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"'question', 'answer', which fit no form"):
        prepared(tokenizer, path)
    named = {"prompt_field": "question", "completion_field": "answer"}
    assert prepared(tokenizer, path, **named).report.form == "prompt_completion"


def test_rows_without_a_trained_token_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [chat("q", "a"), chat("only a question")])
    with pytest.raises(DataError, match=r"1 of 2 rows with no token to train on \(rows 2"):
        prepared(tokenizer, path)


def test_overlong_rows_are_refused_cut_dropped_or_split_as_asked(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = " ".join(f"word{i}" for i in range(60))
    path = write(tmp_path / "r.jsonl", [{"text": "short"}, {"text": long}])
    full = len(render(tokenizer, {"text": long}, "text"))
    with pytest.raises(
        DataError, match=r"1 of 2 rows with more than max_seq_len = 64 tokens \(rows 2"
    ):
        prepared(tokenizer, path)
    cut, drop, split = (prepared(tokenizer, path, overlong=how) for how in ("cut", "drop", "split"))
    assert cut.report.overlong == drop.report.overlong == split.report.overlong == 1
    assert [len(row) for row in cut.train][1:] == [64] and cut.report.dropped_tokens == full - 64
    assert len(drop.train) == drop.report.dropped_rows == 1 and drop.report.dropped_tokens == full
    assert sum(len(row) for row in split.train[1:]) == full and split.report.dropped_tokens == 0
    assert "1 rows were longer" in str(cut.report)


def test_a_row_whose_answer_was_cut_away_is_dropped_and_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = " ".join(f"word{i}" for i in range(60))
    path = write(tmp_path / "r.jsonl", [chat("q", "a"), chat(long, "answer")])
    report = prepared(tokenizer, path, overlong="cut").report
    assert (report.rows, report.dropped_rows) == (1, 1)


def test_the_held_out_side_of_a_row_depends_on_its_content_not_its_place() -> None:
    records = [{"n": n} for n in range(200)]
    sides = held_out_sides(records, 0.1, seed=0)
    assert sum(sides) == 20
    assert held_out_sides(records[::-1], 0.1, seed=0) == sides[::-1]
    assert held_out_sides(records + records, 0.1, seed=0) == sides + sides
    assert held_out_sides(records, 0.1, seed=1) != sides


def test_held_out_rows_come_from_a_share_or_from_a_file(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "r.jsonl", [{"text": f"row {n}"} for n in range(20)])
    other = write(tmp_path / "h.jsonl", [{"text": "held"}, {"text": "out"}])
    share = prepared(tokenizer, path, held_out=0.1)
    assert (len(share.train), len(share.held_out)) == (18, 2)
    file = prepared(tokenizer, path, held_out=other)
    assert (len(file.train), len(file.held_out)) == (20, 2)


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="held_out = 0"):
        held_out_sides([{"n": 1}, {"n": 1}], 0.5, seed=0)


def test_a_batch_keeps_rows_apart_and_masks_their_first_labels(
    tokenizer: Tokenizer, qa_records: list[dict[str, Any]]
) -> None:
    rows = [render(tokenizer, record, loss_on="all") for record in qa_records[:40]]
    bins = PackedDataset(rows, capacity=512)
    assert len(bins) < 40
    batch = collate([bins[0], bins[1]])
    bins_tokens = bins.packing.bin_tokens[:2].sum()
    starts = batch["position_ids"][0] == 0
    assert int(starts.sum()) == len(bins[0]) + len(bins[1])
    assert bool((batch["labels"][0][starts] == -100).all())
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, int(bins_tokens))}
    every = sorted(row.ids.tobytes() for index in range(len(bins)) for row in bins[index])
    assert every == sorted(row.ids.tobytes() for row in rows)


def test_answers_alone_are_trained_in_a_packed_batch_of_multi_turn_chats(
    tokenizer: Tokenizer,
) -> None:
    chats = [("q1", "one.", "q2", "two."), ("q3", "three."), ("q4", "four.", "q5", "five.")]
    rows = [render(tokenizer, chat(*turns)) for turns in chats]
    bins = PackedDataset(rows, capacity=200)
    assert len(bins) == 1
    labels = collate([bins[0]])["labels"][0].tolist()
    answers = tokenizer.decode([token for token in labels if token >= 0])
    expected = [trained_text(tokenizer, row) for row in bins[0]]
    assert answers == "".join(expected)
    assert sorted(expected) == sorted(
        "".join(f"{answer}<|im_end|>" for answer in turns[1::2]) for turns in chats
    )


def test_a_weight_of_a_row_and_of_a_message_reach_the_batch(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first, second, third = chat("q", "a", "r", "b"), chat("s", "c"), chat("t", "d")
    first["messages"][1]["weight"], first["messages"][3]["weight"] = 0, 0.5
    records = [
        {**record, "importance": weight} for record, weight in ((first, 1), (second, 3), (third, 1))
    ]
    path = write(tmp_path / "r.jsonl", records)
    rows = prepared(tokenizer, path, weight_field="importance").train
    assert trained_text(tokenizer, rows[0]) == "b<|im_end|>"  # weight 0 is not trained
    assert {float(w) for w in rows[0].weights[rows[0].labels >= 0]} == {0.5}
    assert set(rows[1].weights.tolist()) == {3.0}
    assert rows[2].weights is None
    batch = collate_weighted([rows])
    weights = batch["loss_weights"][0][batch["labels"][0] >= 0]
    assert weights.tolist() == [0.5] * 2 + [3.0] * 2 + [1.0] * 2
    with pytest.raises(DataError, match="collate_weighted"):
        collate([rows])
    with pytest.raises(DataError, match="loss weights, which TRL"):
        PackedDataset(rows, capacity=64).to_datasets()
    assert "loss_weights" not in collate_weighted([rows[2:]])
    report = prepared(tokenizer, path, weight_field="importance").report
    assert report.fingerprint != prepared(tokenizer, path).report.fingerprint


@pytest.mark.parametrize("weight", [-1, "2", True, None])
def test_a_weight_that_is_no_number_from_0_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, weight: Any
) -> None:
    path = write(tmp_path / "r.jsonl", [{**chat("q", "a"), "importance": weight}])
    with pytest.raises(DataError, match=r"row 1.*importance|without.*importance"):
        prepared(tokenizer, path, weight_field="importance")


def test_rows_of_others_are_read_as_mappings() -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    bins = PackedDataset(rows, capacity=5)
    assert sorted(row.labels.tolist() for row in bins[0]) == [[5, 6, 7], [8, 9]]
    split = PackedDataset([{"input_ids": list(range(7))}], capacity=4, overlong="split")
    assert sorted(row.ids.tolist() for item in split for row in item) == [[0, 1, 2, 3], [4, 5, 6]]
    for bad, message in (
        ({"text": "x"}, r"found a row \['text'\]"),
        ({"input_ids": [1, 2], "labels": [1]}, "as many labels and weights"),
        ({"input_ids": [1.5, 2.7]}, "input_ids are float64, such as .*1.5"),
        ({"input_ids": [1, 2], "labels": [1, 2**40]}, "labels are int64"),
        ({"input_ids": [1, None]}, "input_ids are object"),
        ({"input_ids": [7, 0, 0], "attention_mask": [1, 0, 0]}, "a row has padding"),
    ):
        with pytest.raises(DataError, match=message):
            as_row(bad)


def test_a_column_that_a_row_has_not_is_one_that_is_not_there() -> None:
    import datasets

    rows = datasets.Dataset.from_list(
        [
            {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1]},
            {"input_ids": [8, 9]},
        ]
    )
    assert [as_row(row).labels.tolist() for row in rows] == [[-100, 6], [8, 9]]


def test_without_packing_every_row_has_a_bin_and_several_processes_need_even_shares() -> None:
    rows = [{"input_ids": [1] * n} for n in (3, 4, 5)]
    assert len(PackedDataset(rows, capacity=64, packed=False)) == 3
    assert len(PackedDataset(rows, capacity=64, divisible_by=2)) == 2
    with pytest.raises(DataError, match="3 rows in 3 bins"):
        PackedDataset(rows, capacity=64, packed=False, divisible_by=2)


def test_a_batch_without_a_trained_token_is_refused(tokenizer: Tokenizer) -> None:
    row = render(tokenizer, chat("q", "a"))
    with pytest.raises(DataError, match="no trained token"):
        collate([[row[:2]]])


def test_a_template_whose_stop_token_is_missing_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"'<\|eot_id\|>', which is not in this"):
        get_chat_template(tokenizer, "llama-3")
    with pytest.raises(ConfigError, match="no built-in chat template 'vicuna'"):
        get_chat_template(tokenizer, "vicuna")
    assert set(CHAT_TEMPLATES) >= {"chatml", "llama-3", "gemma", "mistral", "alpaca"}


class FakeTrainer:
    def __init__(self, tokenizer: Tokenizer, dataset: Any) -> None:
        self.processing_class, self.train_dataset, self.eval_dataset = tokenizer, dataset, None


def test_train_on_responses_only_masks_what_is_outside_the_answers(tokenizer: Tokenizer) -> None:
    import datasets

    text = tokenizer.apply_chat_template(chat("q", "a", "r", "b")["messages"], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    trainer = FakeTrainer(tokenizer, datasets.Dataset.from_dict({"input_ids": [ids]}))
    train_on_responses_only(trainer, *parts)  # type: ignore[arg-type]
    labels = trainer.train_dataset[0]["labels"]
    assert tokenizer.decode([t for t in labels if t >= 0]) == "a<|im_end|>\nb<|im_end|>\n"
    rest = tokenizer("once more", add_special_tokens=False)["input_ids"]
    packed = {"input_ids": [ids + rest + ids], "seq_lengths": [[len(ids), len(rest) + len(ids)]]}
    trainer = FakeTrainer(tokenizer, datasets.Dataset.from_dict(packed))
    train_on_responses_only(trainer, *parts)  # type: ignore[arg-type]
    assert trainer.train_dataset[0]["labels"] == labels + [-100] * len(rest) + labels
    wrong = FakeTrainer(tokenizer, datasets.Dataset.from_dict({"input_ids": [ids]}))
    with pytest.raises(DataError, match="nothing would be trained"):
        train_on_responses_only(wrong, "USER:", "ASSISTANT:")  # type: ignore[arg-type]
