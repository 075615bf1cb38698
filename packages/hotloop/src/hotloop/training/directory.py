"""The run directory: recipe, metrics, checkpoints, adapter. Each file in it is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, DataError, OutputExistsError
from hotloop_core.files import write_atomically

from . import recipe_file
from .recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LOCK = ".lock"
"""Held by the process that trains here; the system lets go of it when that process ends, however it ends. It stays,
and tells a run's folder from one with a recipe that somebody wrote there."""

_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
"""What systems say of a lock that another process has."""

_WHOLE = "whole.json"
"""Written into a checkpoint after everything else, so that one without it was cut short."""

_NAME = re.compile(r"checkpoint-\d+")
"""Of a folder that Trainer writes; a copy of one beside it has another name."""

_MAY_CHANGE = {
    "output.keep_checkpoints",
    "output.export",
    "output.directory",
    "schedule.eval_every",
    "schedule.log_every",
    "schedule.save_every",
    "report_to",
}
"""What a resumed run may set anew without training something else."""


class RunDirectory:
    """Paths of one run, and what may be done with them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.plot = self.path / "loss.png"
        self.report = self.path / "report.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.exports = self.path / "export"

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Raises, before any work, where this directory cannot be used as asked.

        Raises:
            OutputExistsError: it has something in it and neither resume nor overwrite was asked for, or what is in it
                is no run and so is not ours to delete.
            ConfigError: nothing to resume, another recipe, or a folder that cannot be written.

        """
        if resume and overwrite:
            raise ConfigError("resume and overwrite exclude each other; choose one")
        there = next(p for p in (self.path, *self.path.absolute().parents) if os.path.lexists(p))
        if there != self.path and not there.is_dir():
            raise self._unwritable(f"{there} is no folder")
        if not os.access(there, os.W_OK):
            raise self._unwritable(f"{there} is read-only")
        if resume:
            self._check_resume(recipe)
        elif self.path.exists() and (not self.path.is_dir() or self._contents()):
            if not self.recipe.is_file() or not (self.path / _LOCK).is_file():
                raise OutputExistsError(
                    f"{self.path} is not a run directory, which has a recipe.yaml and a {_LOCK}, so it is not "
                    "overwritten. Choose another output.directory."
                )
            if not overwrite:
                raise OutputExistsError(
                    f"{self.path} has {self._state()}, or choose another output.directory."
                )

    def _state(self) -> str:
        """How far the run here came, and what can be done with it."""
        if self.report.is_file():
            return "a finished run. Replace it (--overwrite)"
        newest = self.newest_checkpoint()
        if newest is None:
            return "a run that has no whole checkpoint yet. Begin it again (--overwrite)"
        return f"a run that came to step {step_of(newest)}. Go on with it (--resume), replace it (--overwrite)"

    def _check_resume(self, recipe: Recipe) -> None:
        if not self.recipe.is_file():
            raise ConfigError(f"{self.path} has no run to resume. Start it without --resume.")
        if self.report.is_file():
            raise ConfigError(f"the run in {self.path} is finished. Replace it with --overwrite.")
        if self.newest_checkpoint() is None:
            raise ConfigError(
                f"{self.path} has no whole checkpoint to resume from. Start again with --overwrite, and set "
                "schedule.save_every lower."
            )
        changed = _differences(_flat(read_recipe(self.recipe)), _flat(recipe))
        if changed:
            raise ConfigError(
                f"this recipe differs from that of the run in {self.path}:\n  "
                + "\n  ".join(changed)
                + "\nResume with the same recipe, or start another run in another directory."
            )

    def _contents(self) -> list[Path]:
        unfinished = (
            f".{self.recipe.name}.partial"  # of a process that was killed at its first file
        )
        return [e for e in self.path.iterdir() if e.name not in {_LOCK, unfinished}]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains into this directory.

        Raises:
            OutputExistsError: one does.
            ConfigError: the folder cannot be made or locked.

        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / _LOCK).open("a")
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        with file:
            try:
                _lock(file.fileno())
            except OSError as error:
                if error.errno not in _HELD:  # a file system without locks
                    raise self._unwritable(f"{file.name}: {error.strerror}") from error
                raise OutputExistsError(
                    f"another process trains into {self.path}. Wait for it, or choose another output.directory."
                ) from None
            yield

    def _unwritable(self, why: str | None) -> ConfigError:
        return ConfigError(
            f"cannot make or write the run directory {self.path}: {why}. Choose another output.directory."
        )

    def begin(self, recipe: Recipe, data: dict[str, Any]) -> None:
        """Makes the directory anew, with the recipe and what the data came to.

        The old recipe goes last, so that a directory that was half removed still is known as a run's; and
        none of its folders is there in part.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self._contents():
            if entry.is_dir() and not entry.is_symlink():
                _remove(entry)
            elif entry != self.recipe:
                entry.unlink()
        write_atomically(self.recipe, recipe_file.dump(recipe.model_dump(mode="json")))
        write_atomically(self.data, json.dumps(data, indent=2) + "\n")
        self.checkpoints.mkdir()

    def check_data(self, data: dict[str, Any]) -> None:
        """Raises, before any work, where a resumed run would not go on with the rows that were left.

        Raises:
            DataError: the data is no longer what the run began with.
            ConfigError: another number of processes, among which the bins were dealt.

        """
        before = json.loads(self.data.read_text())
        if before["fingerprint"] != data["fingerprint"]:
            raise DataError(
                f"the data, or how it is tokenised, changed since the run in {self.path} began, so going on would "
                "train on some rows twice and on some never. Restore it, or start another run."
            )
        if before.get("processes", 1) != data["processes"]:
            raise ConfigError(
                f"the run in {self.path} began with {before.get('processes', 1)} processes and this one has "
                f"{data['processes']}; the bins were dealt among those. Resume with as many, or start another run."
            )

    def resume(self) -> None:
        """Removes everything that came after the newest whole checkpoint."""
        newest = self.newest_checkpoint()
        assert newest is not None  # check() saw it
        for checkpoint in self.checkpoints.iterdir():
            if checkpoint.is_dir() and not (checkpoint / _WHOLE).is_file():
                shutil.rmtree(checkpoint)
        # Trainer logs into its state what it logs here, so the state says how many lines there were.
        logged = len(json.loads((newest / "trainer_state.json").read_text())["log_history"])
        kept = [json.dumps(row) for row in self.read_metrics()[:logged]]
        write_atomically(self.metrics, "".join(f"{line}\n" for line in kept))

    def whole_checkpoints(self) -> list[Path]:
        """Checkpoints that were written to the end, oldest first."""
        marked = (mark.parent for mark in self.checkpoints.glob(f"checkpoint-*/{_WHOLE}"))
        return sorted((folder for folder in marked if _NAME.fullmatch(folder.name)), key=step_of)

    def newest_checkpoint(self) -> Path | None:
        """The last of them, or None."""
        return next(reversed(self.whole_checkpoints()), None)

    def seal_checkpoint(self, step: int, *, keep: int) -> None:
        """Marks the checkpoint of `step` as whole, then removes all but the `keep` newest."""
        checkpoint = self.checkpoints / f"checkpoint-{step}"
        _sync(checkpoint)
        write_atomically(checkpoint / _WHOLE, json.dumps({"step": step}) + "\n")
        for old in self.whole_checkpoints()[:-keep]:
            (old / _WHOLE).unlink()
            shutil.rmtree(old)

    def trained(self) -> Path:
        """Where the trained weights are: the finished adapter or model, or else the newest checkpoint.

        Raises:
            ConfigError: the run has not come that far.

        """
        finished = [folder for folder in (self.adapter, self.model) if folder.is_dir()]
        newest = finished[0] if finished else self.newest_checkpoint()
        if newest is None:
            raise ConfigError(f"the run in {self.path} has no adapter and no whole checkpoint yet")
        return newest

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl; a last line that was cut short is left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def save_folder(self, target: Path, write: Callable[[Path], object]) -> None:
        """Replaces `target` by a folder that `write` fills; no part of either is ever under its name."""
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write(partial)
            _sync(partial)
            if target.exists():
                _remove(target)
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def open_run(path: str | Path) -> tuple[RunDirectory, Recipe]:
    """A run that `hotloop train` made, and its recipe.

    Raises:
        ConfigError: `path` is no run directory.

    """
    directory = RunDirectory(path)
    if not directory.recipe.is_file():
        raise ConfigError(
            f"{path} is no run directory: it has no recipe.yaml. `hotloop train` makes one."
        )
    return directory, read_recipe(directory.recipe)


def _lock(file: int) -> None:
    """Raises OSError where another process holds it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(folder: Path) -> None:
    """Takes a folder away under another name first, so that half of it is never taken for all."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _sync(folder: Path) -> None:
    """Waits until every file in it is on disk: what is named or marked whole then stays so without power."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, section in recipe.model_dump(mode="json").items():
        if isinstance(section, dict):
            flat.update({f"{name}.{key}": value for key, value in section.items()})
        else:
            flat[name] = section
    return flat


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if key not in _MAY_CHANGE and before.get(key) != now.get(key)
    ]
