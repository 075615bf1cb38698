"""One process at a time in a run directory, and what is left of it when that process is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hotloop.training.directory import RunDirectory
from hotloop.training.run import Run
from hotloop_core.errors import OutputExistsError

if TYPE_CHECKING:
    from pathlib import Path

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
        with pytest.raises(OutputExistsError, match="Go on with that run"):  # it ended meanwhile
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


def test_a_directory_that_was_half_removed_is_still_a_runs(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(recipe.output.directory)
    directory.begin(recipe, {})
    directory.adapter.mkdir()

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        directory.begin(recipe, {})
    directory.check(recipe, resume=False, overwrite=True)
    directory.begin(recipe, {})
    assert sorted(entry.name for entry in directory.path.iterdir()) == [
        "checkpoints",
        "data.json",
        "recipe.yaml",
    ]
