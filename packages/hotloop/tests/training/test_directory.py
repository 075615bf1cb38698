"""One process at a time in a run directory, and what is left of it when that process is killed."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hotloop.training.directory import RunDirectory
from hotloop.training.run import Run
from hotloop_core.errors import ConfigError, OutputExistsError

if TYPE_CHECKING:
    from hotloop.training.recipe import Recipe


def test_a_second_run_into_the_same_directory_is_refused_and_the_first_is_left_alone(
    recipe: Recipe,
) -> None:
    directory = RunDirectory(recipe.output.directory)
    with Run(recipe) as run:  # both saw an empty directory
        with directory.locked():
            directory.begin(recipe, {})
            (directory.path / "of_the_first").touch()
            with pytest.raises(OutputExistsError, match="another process trains into"):
                run.train()
        with pytest.raises(
            OutputExistsError, match="no whole checkpoint yet"
        ):  # it ended meanwhile
            run.train()
    assert (directory.path / "of_the_first").is_file()


def test_the_lock_goes_with_the_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from hotloop.training.directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).locked():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert done.returncode == -signal.SIGKILL
    with RunDirectory(tmp_path / "run").locked():
        pass


def begin(directory: RunDirectory, recipe: Recipe) -> None:
    with directory.locked():
        directory.begin(recipe, {})


class KilledError(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture
def half_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed when it has removed half of a folder's files."""

    def killed(path: Path, **_: object) -> None:
        files = sorted(Path(path).rglob("*.bin"))
        for file in files[: len(files) // 2]:
            file.unlink()
        if files:
            raise KilledError

    monkeypatch.setattr(shutil, "rmtree", killed)


def of_two_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(b"whole")


@pytest.mark.usefixtures("half_removed")
def test_a_folder_that_is_replaced_is_never_there_in_part(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.save_folder(directory.adapter, of_two_files)
    with pytest.raises(KilledError):
        directory.save_folder(directory.adapter, of_two_files)
    assert not directory.adapter.exists()


@pytest.mark.usefixtures("half_removed")
def test_a_run_whose_replacement_was_killed_has_no_checkpoint_in_part(recipe: Recipe) -> None:
    directory = RunDirectory(recipe.output.directory)
    begin(directory, recipe)
    of_two_files(directory.checkpoints / "checkpoint-5")
    directory.seal_checkpoint(5, keep=1)
    with pytest.raises(KilledError):
        begin(directory, recipe)
    assert directory.newest_checkpoint() is None
    directory.check(recipe, resume=False, overwrite=True)


def test_a_directory_that_exists_says_how_far_its_run_came(recipe: Recipe) -> None:
    directory = RunDirectory(recipe.output.directory)
    begin(directory, recipe)

    def refused() -> str:
        with pytest.raises(OutputExistsError) as caught:
            directory.check(recipe, resume=False, overwrite=False)
        return str(caught.value)

    assert "no whole checkpoint yet. Begin it again (--overwrite)" in refused()
    of_two_files(directory.checkpoints / "checkpoint-5")
    assert "no whole checkpoint yet" in refused()
    directory.seal_checkpoint(5, keep=1)
    of_two_files(directory.checkpoints / "checkpoint-9 (copy)")
    shutil.copy(
        directory.checkpoints / "checkpoint-5" / "whole.json",
        directory.checkpoints / "checkpoint-9 (copy)",
    )
    assert "came to step 5. Go on with it (--resume)" in refused()
    directory.report.write_text(json.dumps({}))
    assert "a finished run. Replace it (--overwrite)" in refused()


def test_a_run_that_was_killed_at_its_first_file_is_begun_again(recipe: Recipe) -> None:
    directory = RunDirectory(recipe.output.directory)
    with directory.locked():
        (directory.path / ".recipe.yaml.partial").write_text("mod")
        directory.check(recipe, resume=False, overwrite=False)
        directory.begin(recipe, {})
    assert not (directory.path / ".recipe.yaml.partial").exists()


def test_a_directory_that_was_half_removed_is_still_a_runs(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(recipe.output.directory)
    begin(directory, recipe)
    directory.adapter.mkdir()

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        begin(directory, recipe)
    directory.check(recipe, resume=False, overwrite=True)
    begin(directory, recipe)
    assert sorted(entry.name for entry in directory.path.iterdir()) == [
        ".lock",
        "checkpoints",
        "data.json",
        "recipe.yaml",
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_somebodys_own_recipe_is_no_run_and_is_left_alone(
    recipe: Recipe, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {name: m}")
    here = recipe.model_copy(
        update={"output": recipe.output.model_copy(update={"directory": str(tmp_path)})}
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputExistsError, match="is not a run directory"):
        Run(here, overwrite=overwrite)
    assert sorted(tmp_path.iterdir()) == before


def test_a_directory_that_cannot_be_made_is_refused_before_the_model_loads(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    inside = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="file is no folder"):
        inside.check(recipe, resume=False, overwrite=False)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="is read-only"):
        Run(recipe)


def test_a_directory_without_locks_is_not_said_to_be_another_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("hotloop.training.directory._lock", none)
    with (
        pytest.raises(ConfigError, match="No locks available"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        pass
