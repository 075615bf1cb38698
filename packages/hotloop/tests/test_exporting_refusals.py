"""Damaged, foreign and hostile inputs of an export: each is refused by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hotloop.cli import app
from hotloop.exporting import export, open_checkpoint
from hotloop.exporting.card import MARK
from hotloop.exporting.check import check_gguf
from hotloop.exporting.source import open_source
from hotloop.training.recipe import make_recipe
from hotloop_core.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    HotloopError,
    SecurityError,
    UnsupportedError,
)
from hotloop_testkit.tiny import build, tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in two shards, `base`, an adapter on it, `adapter`, and a run, `run`."""
    folder = tmp_path_factory.mktemp("made")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    build(config).save_pretrained(folder / "base", max_shard_size="100KB")
    tokenizer(320).save_pretrained(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"]),
    )
    model.save_pretrained(folder / "adapter")
    tokenizer(320).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of `base` and `adapter`, and a run of them, that a test may damage; the working directory."""
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    edit(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "adapter", run / "adapter")
    recipe = make_recipe(
        {
            "model": {"name": str(tmp_path / "base"), "bits": 16},
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "lora": {"r": 4},
            "schedule": {"steps": 3},
            "output": {"directory": str(run)},
        }
    )
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shards(here: Path, change: Callable[[str], Any]) -> None:
    """Other file names in the index of the base."""
    index = json.loads((here / "base" / INDEX).read_text())
    edit(here / "base" / INDEX, weight_map={k: change(v) for k, v in index["weight_map"].items()})


def tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def write(file: Path, content: str | bytes) -> None:
    file.write_bytes(content.encode() if isinstance(content, str) else content)


BASE: dict[str, tuple[Callable[[Path], Any], type[HotloopError], str]] = {
    "shard above": (lambda h: shards(h, lambda n: f"../{n}"), SecurityError, "plain name"),
    "shard elsewhere": (
        lambda h: shards(h, lambda n: str(h / "base" / n)), SecurityError, "plain name",
    ),
    "shard above, in Windows": (
        lambda h: shards(h, lambda n: f"..\\{n}"), SecurityError, "plain name",
    ),
    "shard without a name": (lambda h: shards(h, lambda _: 3), SecurityError, "is in 3"),
    "pickled shard": (
        lambda h: shards(h, lambda n: n.replace("safetensors", "bin")), SecurityError, "run code",
    ),
    "no index": (lambda h: write(h / "base" / INDEX, "{"), ConfigError, "cannot be read as JSON"),
    "index of nothing": (lambda h: write(h / "base" / INDEX, "{}"), CheckpointError, "weight_map"),
    "index that is a list": (lambda h: write(h / "base" / INDEX, "[]"), ConfigError, "holds a list"),
    "other sizes": (
        lambda h: edit(h / "base/config.json", hidden_size=32),
        CheckpointError, r"of another shape: lm_head\.weight \(320, 64\) for \(320, 32\)",
    ),
    "a size that is no number": (
        lambda h: edit(h / "base/config.json", hidden_size="64"), CheckpointError, "config.json",
    ),
    "code of its own": (
        lambda h: edit(
            h / "base/config.json", model_type="strange", auto_map={"AutoConfig": "strange.Config"}
        ),
        SecurityError, "Python code of its own",
    ),
    "tokenizer with code": (
        lambda h: edit(
            h / "base/tokenizer_config.json", tokenizer_class="Strange",
            auto_map={"AutoTokenizer": ["strange.Strange", None]},
        ),
        SecurityError, "tokenizer in .* Python code of its own",
    ),
    "no tokenizer": (
        lambda h: [f.unlink() for f in (h / "base").glob("token*")],
        CheckpointError, "tokenizer in .* cannot be read",
    ),
    "damaged tokenizer": (
        lambda h: write(h / "base/tokenizer.json", "{"), CheckpointError, "tokenizer in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BASE)
def test_a_damaged_or_hostile_model_is_refused_by_name(case: str, here: Path) -> None:
    damage, error, message = BASE[case]
    damage(here)
    (here / "base/strange.py").write_text(f"open({str(here / 'ran')!r}, 'w')")
    with pytest.raises(error, match=message):
        open_checkpoint(str(here / "base"))
    assert not (here / "ran").exists()


def stacked(here: Path) -> None:
    shutil.copytree(here / "adapter", here / "inner")
    edit(here / "adapter/adapter_config.json", base_model_name_or_path=str(here / "inner"))


def pickled(here: Path) -> None:
    (here / "run/adapter/adapter_model.safetensors").unlink()
    torch.save({}, here / "run/adapter/adapter_model.bin")


WEIGHTS, SETTINGS = "run/adapter/adapter_model.safetensors", "run/adapter/adapter_config.json"
EXTRA = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
ADAPTER: dict[str, tuple[Callable[[Path], Any], type[HotloopError], str]] = {
    "pickled": (pickled, SecurityError, r"adapter_model\.bin"),
    "missing": (lambda h: (h / WEIGHTS).unlink(), CheckpointError, "has no adapter_model"),
    "truncated": (
        lambda h: write(h / WEIGHTS, (h / WEIGHTS).read_bytes()[:-9]), CheckpointError, "truncated",
    ),
    "no config": (lambda h: write(h / SETTINGS, "{"), ConfigError, "cannot be read as JSON"),
    "config that is a list": (lambda h: write(h / SETTINGS, "[]"), ConfigError, "holds a list"),
    "unknown kind": (lambda h: edit(h / SETTINGS, peft_type="ZORA"), ExportError, "ZORA"),
    "rank that is no number": (lambda h: edit(h / SETTINGS, r="4"), ExportError, "does not fit"),
    "another rank": (lambda h: edit(h / SETTINGS, r=8), ExportError, r"\[4, 64\]"),
    "a factor too few": (
        lambda h: tensors(h / WEIGHTS, lambda held: held.pop(min(held))), ExportError, "lacks 1",
    ),
    "a layer too many": (
        lambda h: tensors(h / WEIGHTS, lambda held: held.update({EXTRA: torch.zeros(4, 64)})),
        ExportError, r"no place for 1 tensors.*layers\.7",
    ),
    "fewer targets than factors": (
        lambda h: edit(h / SETTINGS, target_modules=["q_proj"]), ExportError, "no place for 4",
    ),
    "damaged record of the base": (
        lambda h: write(h / "run/adapter/base.json", "{"), ConfigError, "cannot be read as JSON",
    ),
    "record of no base": (
        lambda h: write(h / "run/adapter/base.json", '{"name": "x"}'), ConfigError, "which base",
    ),
    "no tokenizer": (
        lambda h: [f.unlink() for f in (h / "run/adapter").glob("token*")],
        CheckpointError, "tokenizer in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTER)
def test_a_damaged_or_hostile_adapter_is_refused_by_name(case: str, here: Path) -> None:
    damage, error, message = ADAPTER[case]
    damage(here)
    with pytest.raises(error, match=message):
        open_source("run")


@pytest.mark.parametrize("opened", [open_source, open_checkpoint])
def test_an_adapter_on_an_adapter_is_refused_and_not_merged_in_part(
    opened: Callable[[str], Any], here: Path
) -> None:
    stacked(here)
    with pytest.raises(UnsupportedError, match="is an adapter itself"):
        opened("adapter")
    edit(here / "adapter/adapter_config.json", base_model_name_or_path="adapter")
    with pytest.raises(UnsupportedError, match="is an adapter itself"):
        opened("adapter")


def refused(*arguments: str) -> HotloopError:
    """The error of `hotloop export run --format gguf --output out` and `arguments`."""
    command = ["export", "run", "--format", "gguf", "--output", "out", *arguments]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, HotloopError), error
    return error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--quant", ""], "no quantisation ''"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--device", "cuda:77"], "torch sees"),
        (["--push", "not a name"], "no name of a repository"),
        (["--check", "--check-text", "missing.txt"], "missing.txt cannot be read"),
        (["--check", "--check-text", "empty.txt"], "holds no text"),
        (["--check", "--check-text", "bytes.txt"], "cannot be read as UTF-8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_refused_is_refused_before_anything_is_written(
    arguments: list[str], message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotloop.exporting.check.require_llama_cpp", lambda: None)
    write(here / "empty.txt", "\n\n \n")
    write(here / "bytes.txt", b"\xff\xfe")
    assert message in str(refused(*arguments))
    assert not list(here.rglob("*.gguf"))


def test_a_size_that_is_none_is_told_before_the_model_is_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = lambda *_, **__: pytest.fail("the model was opened")  # noqa: E731
    monkeypatch.setattr("hotloop.exporting.source.open_source", opened)
    assert "'abc' is not an amount" in str(refused("--max-shard-size", "abc"))


def test_a_missing_llama_cpp_is_told_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotloop.exporting.check.find_spec", lambda _: None)
    assert "uv add llama-cpp-python" in str(refused("--check"))
    assert not (here / "out").exists()


def test_texts_without_a_token_are_no_check(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token"):
        check_gguf(tmp_path / "x.gguf", None, tokenizer(320), texts=["", ""])


@pytest.mark.parametrize("file, content", [("report.json", "{"), ("recipe.yaml", "a: [")])
def test_a_damaged_run_is_refused_before_anything_is_written(
    file: str, content: str, here: Path
) -> None:
    write(here / "run" / file, content)
    assert file in str(refused())
    assert not (here / "out").exists()


def test_a_readme_that_is_no_text_is_a_persons_and_left(here: Path) -> None:
    (here / "out").mkdir()
    write(here / "out/README.md", b"\xff\xfe")
    command = ["export", "run", "--format", "gguf", "--output", "out"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (here / "out/README.md").read_bytes() == b"\xff\xfe"


def test_a_card_that_cannot_be_written_says_that_the_export_is_whole(here: Path) -> None:
    (here / "out/README.md").mkdir(parents=True)
    assert "are whole, but README.md" in str(refused())
    assert (here / "out/run-Q8_0.gguf").is_file()


def test_an_adapter_alone_has_our_card_and_not_pefts_empty_form(here: Path) -> None:
    for format_, quant in (("safetensors", "adapter"), ("gguf", "adapter")):
        command = ["export", "run", "--format", format_, "--quant", quant, "--output", format_]
        assert CliRunner().invoke(app, command).exit_code == 0
        text = (here / format_ / "README.md").read_text()
        assert MARK in text and "More Information Needed" not in text


def test_a_gguf_file_is_exported_again_under_its_own_name(here: Path) -> None:
    assert (
        CliRunner().invoke(app, ["export", "base", "--format", "gguf", "--output", "a"]).exit_code
        == 0
    )
    command = ["export", "a/base-Q8_0.gguf", "--format", "gguf", "--quant", "q4_0", "--output", "b"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert [f.name for f in (here / "b").glob("*.gguf")] == ["base-Q8_0-Q4_0.gguf"]


def test_a_full_temporary_folder_is_reported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = open_checkpoint("base")

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(words, "save_pretrained", full)
    with pytest.raises(ExportError, match=r"No space left on device.*TMPDIR"):
        export(model, words, here / "out", format="gguf")
    assert not list((here / "out").iterdir())
