"""What a run does beside the steps, as Trainer's callbacks: metrics, held-out loss, checkpoints, progress."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .directory import RunDirectory
    from .gradients import GradientWatch


class MetricsFile(TrainerCallback):
    """One JSON object a line, on disk as soon as it is logged: step, seconds, and what Trainer logs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Appends `logs`; of several processes the first does."""
        if not state.is_world_process_zero:
            return
        seconds = round(time.perf_counter() - self._start, 3)
        row = {"step": state.global_step, "seconds": seconds, **(logs or {})}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class HeldOut(TrainerCallback):
    """Measures the held-out loss before the first step, every `every` steps and after the last.

    Trainer's own evaluation averages over batches; packed batches hold different numbers of trained tokens, so this
    one averages over tokens. `log` is Trainer's, so trackers see the figure too.
    """

    def __init__(
        self,
        measure: Callable[[], float],
        log: Callable[[dict[str, float]], None],
        every: int | None,
    ) -> None:
        self._measure, self._log, self._every = measure, log, every
        self._last = -1

    def _at(self, step: int) -> None:
        if step != self._last:
            self._last = step
            self._log({"eval_loss": self._measure()})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the first step; a resumed run has that figure already, and maybe that of its newest step."""
        if state.global_step == 0:
            self._at(0)
        elif any(
            row["step"] == state.global_step for row in state.log_history if "eval_loss" in row
        ):
            self._last = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Every `every` steps."""
        if self._every is not None and state.global_step % self._every == 0:
            due = control.should_log
            self._at(state.global_step)
            control.should_log = (
                due  # logging clears it, and Trainer would skip this step's own line
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the last step."""
        self._at(state.global_step)


class Checkpoints(TrainerCallback):
    """Seals each checkpoint once Trainer has written all of it, and removes the oldest ones after that."""

    def __init__(self, directory: RunDirectory, keep: int) -> None:
        self._directory, self._keep = directory, keep

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called when this process's part is on disk."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            self._directory.seal_checkpoint(state.global_step, keep=self._keep)
        processes.wait_for_everyone()


class GradientCheck(TrainerCallback):
    """Judges the gradients just before the optimizer would use them."""

    def __init__(self, watch: GradientWatch) -> None:
        self._watch = watch

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raises GradientError."""
        self._watch.check(state.global_step + 1)


class ProgressBar(TrainerCallback):
    """A bar with the last losses on a terminal; elsewhere about twenty lines a run."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = console
        self._shown: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", losses="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Shows the bar."""
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Shows the newest losses."""
        names = {"loss": "loss", "eval_loss": "held out"}
        self._shown |= {names[k]: float(v) for k, v in (logs or {}).items() if k in names}
        losses = "  ".join(f"{name} {value:.4f}" for name, value in self._shown.items())
        self._bar.update(self._task, completed=state.global_step, losses=losses)
        every = max(1, state.max_steps // 20)
        if not self._console.is_terminal and (
            state.global_step % every == 0 or "eval_loss" in (logs or {})
        ):
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {losses}", highlight=False
            )

    def close(self) -> None:
        """Takes the bar off the terminal, also after an error."""
        self._bar.stop()
