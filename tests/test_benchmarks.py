"""The benchmarks run to their end without a GPU, so that a run on one is not lost to a slip."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module(name)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A Llama of two layers with a byte-level tokenizer."""
    from hotloop_testkit.tiny import build, tokenizer
    from transformers import LlamaConfig

    folder = tmp_path / "tiny"
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    build(config).save_pretrained(folder)
    tokenizer(300).save_pretrained(folder)
    return folder


def test_the_curve_is_eagers_on_a_cpu_and_can_be_drawn(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    curve = module("smollm2_curve", monkeypatch)
    monkeypatch.setattr(
        curve, "topics", lambda: [f"Topic {i} says {i * i}. " * 9 for i in range(40)]
    )
    history = tmp_path / "curves.jsonl"
    arguments = ["--steps", "6", "--batch", "2", "--length", "32", "--history", str(history)]
    monkeypatch.setattr(sys, "argv", ["curve", "--model", str(tiny), *arguments])
    curve.main()
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [(r["framework"], r["seed"]) for r in rows] == [
        ("hf", 1), ("hotloop", 1), ("hf", 2), ("hotloop", 2),
    ]  # fmt: skip
    for eager, ours in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert eager["loss"] == pytest.approx(ours["loss"], abs=1e-3)
        assert eager["held_out"][-1] == pytest.approx(ours["held_out"][-1], abs=1e-3)
        assert ours["held_out"][-1][1] < ours["held_out"][0][1]
    found = curve.differences(curve.last_runs(rows))
    assert found["loss, frameworks"] < found["loss, seeds"]
    assert found["held-out loss, frameworks"] < 1e-3
    for name in ("a.svg", "b.svg"):
        monkeypatch.setattr(
            sys, "argv", ["curve", "--history", str(history), "--draw", str(tmp_path / name)]
        )
        curve.main()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "loss, frameworks" in capsys.readouterr().out


def test_a_step_is_the_same_training_for_ours_and_for_eager(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = module("step", monkeypatch)
    for framework, checkpointing in (
        ("hf", "--no-ckpt"),
        ("hf-kbit", ""),
        ("hotloop", "--no-ckpt"),
    ):
        options = ["run", framework, str(tiny), "--bits", "16", *checkpointing.split()]
        options += ["--settings", "2x16,1x8", "--warmup", "1", "--steps", "3"]
        monkeypatch.setattr(sys, "argv", ["step", *options])
        step.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if "batch" in line]
    assert [(row["framework"], row["ckpt"], row["seq"]) for row in rows] == [
        ("hf", False, 16), ("hf", False, 8), ("hf-kbit", True, 16), ("hf-kbit", True, 8),
        ("hotloop", False, 16), ("hotloop", False, 8),
    ]  # fmt: skip
    for eager, ours in zip(rows[:2], rows[4:], strict=True):
        assert ours["loss"] == pytest.approx(eager["loss"], abs=0.05)
        assert ours["grad_norm"][0] == pytest.approx(eager["grad_norm"][0], rel=0.05)
    assert set(step.MODELS) >= {"llama3-8b", "mistral-7b", "gemma-2-9b", "qwen3-8b"}


def test_a_checkpoint_that_is_nf4_from_the_start_loads_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from hotloop import FastLanguageModel

    checkpoint, step = module("nf4_checkpoint", monkeypatch), module("step", monkeypatch)
    small = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "vocab_size": 512,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    checkpoint.write(step.SHAPES["llama3-8b"] | small | heads, tmp_path)
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), 32, torch.float32)
    model = FastLanguageModel.get_peft_model(model)
    assert [layer.mlp.up_proj.base_layer.weight.quant_state.shape for layer in model.model.model.layers] == [
        torch.Size([192, 128])
    ] * 3  # fmt: skip
    _, loss, norm = step.Training(model).step(torch.arange(3, 19)[None])
    assert 5 < loss < 9 and norm > 0


YARDSTICK = """
import json, pathlib, sys
MODELS = {"small": ("llama", {})}
def make(name, path):
    pathlib.Path(path).mkdir()
    (pathlib.Path(path) / "config.json").write_text(json.dumps(MODELS[name]))
if __name__ == "__main__":
    framework, path = sys.argv[2:4]
    print(json.dumps({"framework": framework, "load_s": 1.0}))
    if framework == "broken":
        sys.exit("no such kernel")
    print("a warning")
    print(json.dumps({"framework": framework, "bits": 4, "ckpt": "--no-ckpt" not in sys.argv, "batch": 2, "seq": 8}))
"""


def test_a_contest_leaves_complete_rows_and_says_who_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contest = module("contest", monkeypatch)
    (tmp_path / "step.py").write_text(YARDSTICK)
    monkeypatch.setattr(contest, "IMPORTS", dict.fromkeys(("hotloop", "broken"), "json"))
    out = tmp_path / "rows.jsonl"
    arguments = ["--run", "r", "--commit", "c", "--models", "small,qwen3-8b", "--out", str(out)]
    arguments += ["--yardstick", str(tmp_path / "step.py")]
    arguments += ["--starts", "hotloop:keep,broken:recompute:3.4"]
    monkeypatch.setattr(sys, "argv", ["contest", *arguments])
    with pytest.raises(SystemExit) as stopped:
        contest.main()
    assert stopped.value.code == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row["framework"]) for row in rows] == [
        ("small", "hotloop"), ("small", "broken"), ("qwen3-8b", "hotloop"), ("qwen3-8b", "broken"),
    ]  # fmt: skip
    assert all({"run", "date", "commit", "card", "versions"} <= row.keys() for row in rows)
    assert rows[0]["ckpt"] is False and rows[0]["load_s"] == 1.0
    assert "no such kernel" in rows[1]["error"]
    assert "framework='broken'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "hotloop:fast"])
    with pytest.raises(SystemExit):
        contest.main()
    assert "expected FRAMEWORK:keep or FRAMEWORK:recompute" in capsys.readouterr().err


def test_the_page_of_results_is_made_of_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    results = module("results", monkeypatch)
    assert results.PAGE.read_text() == results.page(), "run `python benchmarks/results.py --page`"


def test_the_page_has_the_newest_row_of_each_thing_and_no_smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = module("results", monkeypatch)
    row = {
        "op": "nf4", "mode": "dequantise", "variant": "hotloop", "p50_ms": 1.0, "share_of_copy": 0.5,
        "shape": {"name": "gate", "N": 8, "K": 4}, "gpu": "A card", "date": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    curve = {
        "run": "1", "framework": "hf", "seed": 1, "model": "m", "text": "t", "steps": 4, "rank": 2,
        "tokens_per_step": 8, "card": "A card", "loss": [3.0, 2.0], "held_out": [[0, 3.5], [4, 2.5]],
        "seconds": 2.0, "date": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    rows = [row, row | {"p50_ms": 2.0, "share_of_copy": 0.75}, row | {"p50_ms": 9.0, "smoke": True}]
    (tmp_path / "op_nf4.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "curves.jsonl").write_text(json.dumps(curve) + "\n")
    page = results.page(tmp_path, tmp_path)
    assert "| gate, 8 x 4 | 2 ms, 75% |" in page
    assert "9 ms" not in page
    assert "| transformers + PEFT, seed 1 | 3.5000 | 2.5000 | 2.5000 | 2 |" in page
    assert page.count("No rows yet.") == 4
    assert results.PICTURE not in page.replace(f"docs/{results.PICTURE}", "")
    (tmp_path / results.PICTURE).write_text("<svg/>")
    assert f"]({results.PICTURE})" in results.page(tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "elementwise",
        "nf4",
        "linear_cross_entropy",
        "attention",
        "attention_gemma2",
        "tune_attention",
        "tune_adapters",
        "tune_linear_cross_entropy",
    ],
)
def test_an_ops_benchmark_runs_to_its_end_and_leaves_history_alone(name: str) -> None:
    history = BENCHMARKS / "history"
    before = {file: file.stat().st_size for file in history.iterdir()}
    command = [sys.executable, str(BENCHMARKS / "run_ops.py"), "--smoke", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert {file: file.stat().st_size for file in history.iterdir()} == before
