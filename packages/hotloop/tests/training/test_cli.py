"""The command line: what it prints, what it refuses, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hotloop import cli
from hotloop.cli import app
from hotloop.training.recipe import Recipe
from hotloop_core.errors import ConfigError
from hotloop_core.packing import pack
from typer.testing import CliRunner

COMMANDS = [
    "quickstart",
    "train",
    "data",
    "chat",
    "plan",
    "verify",
    "export",
    "plugins",
    "doctor",
    "schema",
]  # as the issue names them


def hotloop(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from hotloop.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def recipe_file(recipe: Recipe, tmp_path: Path) -> Path:
    import yaml

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return file


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_every_command(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"hotloop {command}" in result.output.split("Examples")[1]


def test_help_and_plugins_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hotloop.cli import app\n"
        "for arguments in (['--help'], ['train', '--help'], ['plugins'], ['plugins', '--json']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments\n"
        "print([m for m in ('torch', 'transformers', 'triton', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_come_lazily_and_are_not_shadowed_by_modules() -> None:
    code = (
        "import sys, hotloop\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)\n"
        "assert callable(hotloop.plan) and callable(hotloop.load) and callable(hotloop.export)\n"
        "import hotloop.training.models\n"
        "assert set(hotloop.__all__) <= set(dir(hotloop))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cli.__dict__["app"], __import__("hotloop").trian


def test_an_error_is_one_panel_and_exit_status_1() -> None:
    result = hotloop("train", "missing.toml")
    assert result.returncode == 1
    assert "ConfigError" in result.stderr and "missing.toml does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in hotloop("--debug", "train", "missing.toml").stderr


def test_wrong_usage_is_exit_status_2() -> None:
    assert hotloop("train", "--no-such-option").returncode == 2
    assert hotloop("tarin").returncode == 2


def test_ctrl_c_says_how_a_run_goes_on() -> None:
    code = (
        "import sys\n"
        "from hotloop.cli import main\n"
        "from hotloop.training import recipe\n"
        "def pressed(*_, **__):\n"
        "    raise KeyboardInterrupt\n"
        "recipe.read_recipe = pressed\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "a.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert "interrupted; `hotloop train RECIPE --resume` goes on" in done.stderr


def test_plugins_as_json_lists_what_each_claims() -> None:
    result = CliRunner().invoke(app, ["plugins", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["llama"]["families"][0]["model_types"] == ["llama"]
    assert "q8_0" in rows["gguf"]["exporters"][0]["quants"]
    assert all(row["problem"] is None for row in rows.values())


def test_schema_prints_the_recipes_schema() -> None:
    result = CliRunner().invoke(app, ["schema"])
    assert json.loads(result.stdout) == Recipe.model_json_schema()


def test_doctor_as_json_names_the_machine_and_the_attention_backends() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"torch", "triton", "host memory"} <= {row["what"] for row in found["machine"]}
    assert any(row["available"] for row in found["attention"])


def test_data_shows_the_rows_and_what_of_them_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", str(recipe_file(recipe, tmp_path)), "--rows", "2"])
    assert result.exit_code == 0, result.output
    assert result.output.count("<|im_start|>user") == 2
    assert "54 rows (chat) to train on, 6 held out" in result.output


def test_a_dry_run_shows_plan_steps_and_a_row_and_writes_nothing(
    recipe: Recipe, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["train", str(recipe_file(recipe, tmp_path)), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "12 steps of 1 bins" in result.output
    assert "plan for 256 tokens" in result.output
    assert "<|im_start|>assistant" in result.output
    assert not Path(recipe.output.directory).exists()


def test_train_then_chat_then_export(recipe: Recipe, tmp_path: Path) -> None:
    file = str(recipe_file(recipe, tmp_path))
    run = recipe.output.directory
    trained = CliRunner().invoke(app, ["train", file, "--set", "schedule.steps=2"])
    assert trained.exit_code == 0, trained.output
    assert f"hotloop chat {run}" in trained.output
    asked = CliRunner().invoke(
        app, ["chat", run, "--ask", "What is Hotloop?", "--max-new-tokens", "5"]
    )
    assert asked.exit_code == 0, asked.output
    exported = CliRunner().invoke(app, ["export", run, "--format", "safetensors", "--json"])
    assert exported.exit_code == 0, exported.output
    files = json.loads(exported.stdout[exported.stdout.index("{") :])["files"]
    assert all(Path(entry["path"]).is_file() for entry in files)


def test_plan_reads_nothing_but_a_config(model_dir: Path) -> None:
    result = CliRunner().invoke(
        app, ["plan", str(model_dir), "--tokens", "512", "--card", "H100", "--json"]
    )
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert len(planned["layers"]) == 2 and planned["peak_bytes"] > 0


@pytest.mark.parametrize("data", [False, True])
def test_verify_compares_and_exits_by_the_verdict(
    model_dir: Path, recipe: Recipe, data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["--data", recipe.data.path] if data else []
    arguments = [
        "verify",
        str(model_dir),
        "--bits",
        "16",
        "--tokens",
        "128",
        "--lora",
        "4",
        "--json",
        *rows,
    ]
    good = CliRunner().invoke(app, arguments)
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout[good.stdout.index("{") :])
    monkeypatch.setattr("hotloop.verification.report.Report.ok", property(lambda self: False))
    assert CliRunner().invoke(app, arguments).exit_code == 1


def test_data_says_how_rows_pack_and_draws_them(recipe: Recipe, tmp_path: Path) -> None:
    picture = tmp_path / "bins.png"
    file = recipe_file(recipe, tmp_path)
    result = CliRunner().invoke(app, ["data", str(file), "--rows", "1", "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "% used" in result.output and "rows a bin" in result.output


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    from hotloop.training.picture import draw_bins

    with pytest.raises(ConfigError, match=r"cannot write .*No such file or directory"):
        draw_bins(pack([3, 4], 8), tmp_path / "none" / "bins.png")


def test_padding_wastes_what_the_longest_row_of_each_batch_leaves() -> None:
    from hotloop.training.picture import padded_utilisation

    assert padded_utilisation([4, 1, 3, 3], rows=2) == (4 + 1 + 3 + 3) / (8 + 6)
    assert padded_utilisation([], rows=2) == 1.0
