"""`hotloop export` on run directories, made by hand so that nothing trains here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hotloop.cli import app
from hotloop.training.recipe import make_recipe
from hotloop_core.errors import ConfigError, ExportError, OutputExistsError
from hotloop_testkit.tiny import build, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, bos_token_id=0, eos_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    build(config).save_pretrained(folder)
    words = tokenizer(320)
    words.chat_template = CHATML
    words.save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, **model: Any) -> Path:
    rows = folder / "rows.jsonl"
    folder.mkdir()
    talks = [
        [{"role": r, "content": f"some {r} text {i}"} for r in ("user", "assistant")]
        for i in range(8)
    ]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    recipe = make_recipe(
        {
            "model": {"name": str(base), "bits": 16, "max_seq_len": 256} | model,
            "data": {"path": str(rows), "held_out": 0.25},
            "lora": {"r": 4, "alpha": 8},
            "schedule": {"steps": 3},
            "output": {"directory": str(folder)},
        }
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    (folder / "report.json").write_text(json.dumps({"held_out_after": 1.25}))
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(folder / "adapter")
    words = tokenizer(320)
    words.chat_template = CHATML
    words.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    return make_run(tmp_path / "first", base)


def hotloop(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_several_quantisations_a_modelfile_and_a_card_from_one_command(run: Path) -> None:
    result = hotloop(run, "--format", "gguf", "--quant", "q8_0,f16", "--json")
    found = json.loads(result.stdout)
    folder = run / "export" / "gguf"
    names = {Path(file["path"]).name for file in found["files"]}
    assert names == {
        "first-Q8_0.gguf", "first-F16.gguf", "first-Q8_0.Modelfile", "first-F16.Modelfile"
    }  # fmt: skip
    assert {f.name for f in folder.iterdir()} == {*names, "README.md"}
    assert "held-out loss after, nats | 1.25" in (folder / "README.md").read_text()
    assert all(len(file["sha256"]) == 64 for file in found["files"])
    with pytest.raises(OutputExistsError, match="--overwrite"):
        hotloop(run, "--format", "gguf")
    hotloop(run, "--format", "gguf", "--overwrite")


def test_a_size_splits_the_file_and_an_adapter_is_written_alone(run: Path) -> None:
    hotloop(run, "--format", "gguf", "--quant", "f16", "--max-shard-size", "100KB")
    folder = run / "export" / "gguf"
    assert len(list(folder.glob("first-F16-0*-of-0*.gguf"))) > 2
    hotloop(run, "--format", "gguf", "--quant", "adapter")
    assert (folder / "first-adapter.gguf").is_file()


def test_a_model_by_its_path_is_exported_too(base: Path, tmp_path: Path) -> None:
    hotloop(base, "--format", "safetensors", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="not a run directory"):
        hotloop(base, "--format", "safetensors")


def test_a_check_compares_each_file_with_the_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")
    (tmp_path / "text").write_text("some text\n\nand more of it")
    result = hotloop(
        run, "--format", "gguf", "--quant", "f32,q8_0", "--check", "--check-text", tmp_path / "text",
        "--json",
    )  # fmt: skip
    checks = json.loads(result.stdout)["checks"]
    assert [Path(c["path"]).stem for c in checks] == ["first-F32", "first-Q8_0"]
    assert all(c["texts"] == 2 and c["other_ids"] == [] for c in checks)
    assert checks[0]["kl"] < 1e-8 < checks[1]["kl"] < 0.1
    with pytest.raises(ConfigError, match="--check loads GGUF"):
        hotloop(run, "--format", "safetensors", "--check")
    with pytest.raises(ConfigError, match="on the GGUF of its base"):
        hotloop(run, "--format", "gguf", "--quant", "lora", "--check")


def test_importance_is_measured_on_the_runs_data(run: Path) -> None:
    hotloop(run, "--format", "gguf", "--quant", "imatrix", "--imatrix", "data")
    data = (run / "export/gguf/first-imatrix.gguf").read_bytes()
    assert data[:4] == b"GGUF" and b"blk.1.ffn_down.weight.in_sum2" in data


def test_both_bases_are_compared_and_either_is_written(tmp_path: Path, base: Path) -> None:
    run = make_run(tmp_path / "first", base, bits=4)
    result = hotloop(
        run, "--format", "safetensors", "--base", "original", "--compare-bases", "--json"
    )
    found = json.loads(result.stdout[result.stdout.index("{") :])
    losses = found["held_out_loss"]
    assert losses["trained"] > 0 and losses["original"] > 0 and losses["tokens"] > 0
    assert any("original 16-bit weights" in note for note in found["notes"])
    trained = hotloop(run, "--format", "safetensors", "--overwrite", "--json")
    assert any("dequantised 4-bit weights" in n for n in json.loads(trained.stdout)["notes"])
    sixteen = make_run(tmp_path / "second", base)
    with pytest.raises(ConfigError, match="is for a QLoRA run"):
        hotloop(sixteen, "--format", "safetensors", "--base", "original")


def test_a_push_happens_only_when_asked_and_sends_what_was_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, set[str], bool]] = []

    def push(directory: Path, repo: str, *, files: list[Path], private: bool) -> str:
        sent.append((repo, {f.name for f in files}, private))
        return "there"

    monkeypatch.setattr("hotloop.exporting.hub.push", push)
    hotloop(run, "--format", "gguf", "--quant", "f16")
    assert sent == []
    result = hotloop(run, "--format", "gguf", "--overwrite", "--quant", "f16", "--push", "me/it")
    assert sent == [("me/it", {"first-F16.gguf", "first-F16.Modelfile", "README.md"}, True)]
    assert "pushed to there" in result.output


def test_an_adapter_trained_on_another_base_is_refused(run: Path, base: Path) -> None:
    from hotloop.exporting.checkpoint import BASE_FILE

    record = {"name": "owner/other", "fingerprint": "0" * 64}
    (run / "adapter" / BASE_FILE).write_text(json.dumps(record))
    with pytest.raises(ExportError, match="was trained on 'owner/other'"):
        hotloop(run, "--format", "gguf")


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_looks_whole_and_can_be_repeated(run: Path) -> None:
    program = (
        "import sys, time; from hotloop_core.files import HashingFile\n"
        "write = HashingFile.write\n"
        "def slow(self, data):\n"
        "    print('writing', flush=True); time.sleep(0.2); return write(self, data)\n"
        "HashingFile.write = slow\n"
        "from hotloop.cli import main; main()"
    )
    arguments = [sys.executable, "-c", program, "export", str(run), "--format", "gguf"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = [file.name for file in (run / "export" / "gguf").iterdir()]
    assert left and all(name.endswith(".partial") for name in left)
    hotloop(run, "--format", "gguf")
    assert not list((run / "export" / "gguf").glob(".*.gguf.partial"))


def test_a_read_only_directory_is_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refused(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if {"w", "x"} & set(mode) and self.is_relative_to(run / "export"):
            raise PermissionError(13, "Permission denied")
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ExportError, match="Permission denied"):
        hotloop(run, "--format", "gguf")
