"""Runs: resume, checkpoints, metrics, and every way in which a run stops."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from hotloop.exporting.source import open_source
from hotloop.training.batches import PackedDataset
from hotloop.training.directory import RunDirectory
from hotloop.training.models import load_trained
from hotloop.training.run import Run
from hotloop_core.errors import (
    ConfigError,
    DataError,
    DeviceMemoryError,
    ExportError,
    GradientError,
    OutputExistsError,
)
from torch.utils._pytree import tree_flatten
from transformers import Trainer, TrainerCallback

if TYPE_CHECKING:
    from hotloop.training.recipe import Recipe


class Stop(Exception):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Stop


def with_values(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def adapter_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    file = Path(recipe.output.directory) / "adapter" / "adapter_model.safetensors"
    return safetensors.torch.load_file(file)


def interrupted(recipe: Recipe, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.train

    def train(self: Trainer, **arguments: Any) -> Any:
        self.add_callback(StopAfter(at))
        return original(self, **arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop), Run(recipe) as run:
        patch.setattr(Trainer, "train", train)
        run.train()


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_run_equals_one_that_did_not_stop_bit_for_bit(
    recipe: Recipe, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without packing an epoch is 54 steps; with it, seven, so the second epoch is resumed in its middle.
    recipe = with_values(recipe, "data", packing=packing)
    whole = with_values(recipe, "output", directory=str(tmp_path / "whole"))
    with Run(whole) as run:
        report = run.train()
    interrupted(recipe, 11, monkeypatch)
    with Run(recipe, resume=True) as run:
        resumed = run.train()

    expected, found = adapter_of(whole), adapter_of(recipe)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.train_loss == report.train_loss
    assert resumed.held_out_after == report.held_out_after
    assert resumed.tokens == report.tokens
    rows = RunDirectory(recipe.output.directory).read_metrics()
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 5, 10, 12]


def test_a_run_that_was_killed_after_its_last_step_trains_no_step_more(recipe: Recipe) -> None:
    with Run(recipe) as run:
        report = run.train()
    directory, expected = RunDirectory(recipe.output.directory), adapter_of(recipe)
    metrics = [
        (row["step"], row.get("loss"), row.get("eval_loss")) for row in directory.read_metrics()
    ]
    shutil.rmtree(directory.adapter)
    directory.report.unlink()
    with Run(recipe, resume=True) as run:
        again = run.train()

    found = adapter_of(recipe)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (again.steps, again.tokens, again.train_loss) == (
        report.steps,
        report.tokens,
        report.train_loss,
    )
    assert again.held_out_after == report.held_out_after
    rows = [
        (row["step"], row.get("loss"), row.get("eval_loss")) for row in directory.read_metrics()
    ]
    assert [row for row in rows if row[1] or row[2]] == [row for row in metrics if row[1] or row[2]]


def test_an_8_bit_optimizer_learns_and_resumes_bit_for_bit(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # bitsandbytes keeps tensors of fewer than 4,096 elements in fp32: a rank that reaches it.
    recipe = with_values(with_values(recipe, "lora", r=128), "schedule", optimizer="adamw_8bit")
    whole = with_values(recipe, "output", directory=str(tmp_path / "whole"))
    with Run(whole) as run:
        report = run.train()
    assert report.held_out_after < report.held_out_before
    interrupted(recipe, 11, monkeypatch)
    newest = RunDirectory(recipe.output.directory).newest_checkpoint()
    assert newest is not None
    saved = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    kept = tree_flatten(saved)[0]
    large = [x for x in kept if isinstance(x, torch.Tensor) and x.numel() >= 4096]
    assert large and all(x.dtype is torch.uint8 for x in large)
    with Run(recipe, resume=True) as run:
        run.train()
    expected, found = adapter_of(whole), adapter_of(recipe)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_paged_optimizer_is_refused_where_there_is_no_card(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r'set schedule\.optimizer = "adamw_8bit"'):
        Run(with_values(recipe, "schedule", optimizer="paged_adamw_8bit"))


@pytest.mark.gpu
def test_a_paged_optimizer_learns(recipe: Recipe) -> None:
    with Run(with_values(recipe, "schedule", optimizer="paged_adamw_8bit")) as run:
        report = run.train()
    assert report.held_out_after < report.held_out_before


def test_the_report_says_how_full_the_bins_were(recipe: Recipe) -> None:
    recipe = with_values(recipe, "schedule", steps=1, save_every=None, eval_every=None)
    with Run(recipe) as run:
        packing = run.bins.packing
        report = run.train()
    assert report.utilisation == packing.utilisation > 0.85
    assert report.rows_per_bin == packing.rows_per_bin > 2
    assert report.tokens_dropped == 0 and report.processes == 1
    assert f"bins {packing.utilisation:.2%} full" in str(report)
    saved = json.loads(RunDirectory(recipe.output.directory).report.read_text())
    assert saved["utilisation"] == report.utilisation


def test_a_run_leaves_its_recipe_metrics_plot_adapter_and_report(recipe: Recipe) -> None:
    with Run(recipe) as run:
        report = run.train()
    directory = RunDirectory(recipe.output.directory)
    assert directory.plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads(directory.report.read_text())["steps"] == report.steps == 12
    assert [c.name for c in directory.whole_checkpoints()] == ["checkpoint-10", "checkpoint-12"]
    assert report.held_out_before is not None and report.held_out_after is not None
    assert report.held_out_after < report.held_out_before
    assert (directory.adapter / "adapter_model.safetensors").is_file()
    assert not list(directory.path.rglob("*.partial"))


def test_full_fine_tuning_moves_every_weight_and_writes_a_whole_model(recipe: Recipe) -> None:
    recipe = with_values(
        recipe.model_copy(update={"lora": None}), "schedule", steps=2, save_every=None
    )
    with Run(recipe) as run:
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        assert all(not torch.equal(before[n], p) for n, p in run.model.named_parameters())
    assert (Path(recipe.output.directory) / "model" / "model.safetensors").is_file()


def test_held_out_loss_is_the_mean_over_tokens_not_over_batches(recipe: Recipe) -> None:
    recipe = with_values(recipe, "model", max_seq_len=128)
    with Run(recipe) as run:
        assert len(run.held_out_bins) > 1
        packed = run.held_out_loss()
        run.held_out_bins = PackedDataset(run.data.held_out, capacity=128, packed=False)
        assert run.held_out_loss() == pytest.approx(packed, rel=1e-5)


def test_a_directory_that_exists_is_refused_and_left_alone(recipe: Recipe) -> None:
    folder = Path(recipe.output.directory)
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="not a run directory"):
            Run(recipe, overwrite=overwrite)
    assert (folder / "mine.txt").read_text() == "precious"


def test_resume_is_refused_where_it_would_be_another_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no run to resume"):
        Run(recipe, resume=True)
    interrupted(recipe, 6, monkeypatch)
    with pytest.raises(ConfigError, match=r"schedule.learning_rate: 0.01 then, 0.5 now"):
        Run(with_values(recipe, "schedule", learning_rate=0.5), resume=True)
    data = RunDirectory(recipe.output.directory).data
    described = data.read_text()
    data.write_text(described.replace('"processes": 1', '"processes": 4'))
    with pytest.raises(ConfigError, match="4 processes"), Run(recipe, resume=True) as run:
        run.train()
    data.write_text(described)
    rows = Path(recipe.data.path)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="changed since the run"), Run(recipe, resume=True) as run:
        run.train()


def test_a_checkpoint_that_was_cut_short_is_passed_over(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, 11, monkeypatch)
    directory = RunDirectory(recipe.output.directory)
    newest = directory.newest_checkpoint()
    assert newest is not None and newest.name == "checkpoint-10"
    (newest / "whole.json").unlink()
    older = directory.newest_checkpoint()
    assert older is not None and older.name == "checkpoint-5"


def test_optimizer_state_is_read_without_unpickling_objects(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, 6, monkeypatch)
    checkpoint = RunDirectory(recipe.output.directory).newest_checkpoint()
    assert checkpoint is not None
    torch.save({"state": Path("x")}, checkpoint / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"), Run(recipe, resume=True) as run:
        run.train()


def test_gradients_that_are_not_finite_stop_the_run_and_name_the_parameter(recipe: Recipe) -> None:
    with Run(recipe) as run:
        name, parameter = next(
            (n, p) for n, p in run.model.named_parameters() if "v_proj.lora_B" in n
        )
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        before = parameter.detach().clone()
        with pytest.raises(GradientError, match=r"step 1: .*1 \(.*v_proj.lora_B") as caught:
            run.train()
        assert name in str(caught.value)
        assert torch.equal(parameter, before)


def test_gradients_that_are_all_zero_stop_the_run(recipe: Recipe) -> None:
    with Run(recipe) as run:
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)
        with pytest.raises(GradientError, match="exactly zero"):
            run.train()


def test_a_parameter_that_the_loss_does_not_use_stops_the_run(recipe: Recipe) -> None:
    with Run(recipe) as run:
        run.model.register_parameter("stray", torch.nn.Parameter(torch.ones(1)))
        with pytest.raises(GradientError, match="stray"):
            run.train()


def test_out_of_memory_says_what_was_planned_and_what_shrinks_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Run(recipe) as run:
        monkeypatch.setattr(Trainer, "training_step", exhausted)
        with pytest.raises(DeviceMemoryError, match=r"model.bits = 4; model.max_seq_len below 256"):
            run.train()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 11840 vs 11732"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=["the system's", "torch.save's", "torch.save's when it closes"],
)
def test_a_full_disk_is_named_and_earlier_checkpoints_stay(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    original = Trainer._save_checkpoint

    def full(self: Trainer, *arguments: Any) -> None:
        if self.state.global_step > 5:
            raise error
        original(self, *arguments)

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    with pytest.raises(ExportError, match=r"disk .* is full.*--resume"), Run(recipe) as run:
        run.train()
    newest = RunDirectory(recipe.output.directory).newest_checkpoint()
    assert newest is not None and newest.name == "checkpoint-5"


def test_a_disk_that_is_full_from_the_start_is_named(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunDirectory, "begin", full)
    with pytest.raises(ExportError, match=r"is full.*begin again with --overwrite"):
        Run(recipe).train()


def test_a_trained_model_ends_its_answers_as_the_runs_template_does(
    recipe: Recipe, model_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    (base / "chat_template.jinja").unlink()
    for name, key, end in (
        ("config.json", "eos_token_id", 0),
        ("generation_config.json", "eos_token_id", 0),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        (base / name).write_text(json.dumps({**json.loads((base / name).read_text()), key: end}))
    asked = with_values(recipe, "model", name=str(base))
    asked = with_values(asked, "data", chat_template="chatml")
    with Run(with_values(asked, "schedule", steps=1)) as run:
        run.train()
    model, tokenizer = load_trained(run.recipe, run.directory.trained())
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    opened = open_source(str(run.directory.path))
    assert tokenizer.eos_token_id in opened.model.generation_config.eos_token_id
