"""One run, from a recipe to a trained adapter: transformers' Trainer does the steps, this does what is around them."""

from __future__ import annotations

import errno
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from hotloop_core.errors import ConfigError, ExportError
from torch import nn
from transformers import PrinterCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hotloop.exporting.checkpoint import record_base

from . import callbacks
from .batches import PackedDataset, collate, collate_weighted
from .data import prepare, read
from .directory import RunDirectory, step_of
from .gradients import GradientWatch
from .memory import out_of_memory
from .models import build, plan_batch
from .output import check_output, write_exports
from .render import Row
from .report import RunReport, plot_loss
from .trainer import PackedTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .recipe import Recipe


class WatchedTrainer(PackedTrainer):
    """PackedTrainer, with the gradients looked at before it clips them (after that, NaN in one is NaN in all)."""

    watch: GradientWatch

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As Trainer's; on the last micro-batch of a step the gradients are complete."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.watch.observe(model)
        return loss


class Run:
    """A recipe carried out, in steps that can be called one by one; a context manager.

        with Run(read_recipe("recipe.toml")) as run:
            report = run.train()

    Making it reads the data, loads the model, adds the adapter and plans memory; it raises before anything is written
    if any of these fails. `train` makes the run directory and trains. Under torchrun each process makes a Run of its
    own, on its own card, and all train as one; the first writes, in a directory that all of them see.

    Raises:
        HotloopError: one of its children, from whichever of these found something wrong.

    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        overwrite: bool = False,
        console: Console | None = None,
        budget: int | None = None,
    ) -> None:
        if recipe.schedule.optimizer.startswith("paged") and not torch.cuda.is_available():
            raise ConfigError(
                f'schedule.optimizer = "{recipe.schedule.optimizer}" pages between card and host, and this machine has '
                'no card; set schedule.optimizer = "adamw_8bit".'
            )
        check_output(recipe)
        self.recipe = recipe
        self.directory = RunDirectory(recipe.output.directory)
        self._overwrite = overwrite
        self.directory.check(recipe, resume=resume, overwrite=overwrite)
        self.processes = PartialState(cpu=not torch.cuda.is_available())
        self._resume = resume
        self._console = console if self.main else None
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        records = read(recipe.data)  # before the model, so that bad rows are told in a second
        planned = recipe
        if (
            budget is not None
        ):  # after running out of memory; the run is the recipe's own for all that
            planned = recipe.model_copy(
                update={"model": recipe.model.model_copy(update={"vram": budget})}
            )
        self.model, self.tokenizer = build(planned)
        self.data = prepare(recipe, records, self.tokenizer)
        self.bins = self._packed(self.data.train, even=True)
        self.held_out_bins = self._packed(self.data.held_out, even=False)
        self.plan = plan_batch(self.model, planned, longest=self.data.report.longest)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets go of the model; the run trains no more."""
        self.__dict__.pop("model", None)

    def _packed(self, rows: list[Row], *, even: bool) -> PackedDataset:
        ranks = self.processes.num_processes
        return PackedDataset(
            rows,
            capacity=self.recipe.model.max_seq_len,
            packed=self.recipe.data.packing,
            seed=self.recipe.data.shuffle_seed,
            divisible_by=ranks * self.recipe.schedule.batch_size if even and ranks > 1 else 1,
        )

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints; the only one, unless torchrun started several."""
        return self.processes.is_main_process

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the matrix products are in: the dtype of the frozen weights (of all, in full fine-tuning)."""
        dtypes = {
            p.requires_grad: p.dtype for p in self.model.parameters() if p.is_floating_point()
        }
        return dtypes.get(False, dtypes[True])

    @property
    def steps(self) -> int:
        """Optimizer steps in all, as Trainer counts them."""
        schedule = self.recipe.schedule
        if schedule.steps is not None:
            return schedule.steps
        batches = math.ceil(len(self.bins) / (schedule.batch_size * self.processes.num_processes))
        per_epoch = max(1, math.ceil(batches / schedule.gradient_accumulation))
        return math.ceil((schedule.epochs or 1) * per_epoch)

    def held_out_loss(self) -> float:
        """Mean loss over the trained tokens of the held-out rows, in nats; their weights do not matter here.

        Each process measures its share of the bins.
        """
        total, tokens = 0.0, 0
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._autocast():
            ranks = self.processes.num_processes
            for index in range(self.processes.process_index, len(self.held_out_bins), ranks):
                rows = [Row(row.ids, row.labels) for row in self.held_out_bins[index]]
                batch: dict[str, Any] = {**collate([rows])}
                count = int((batch["labels"][:, 1:] != -100).sum())
                inputs = {k: v.to(self.device) if hasattr(v, "to") else v for k, v in batch.items()}
                total += float(self.model(**inputs).loss) * count
                tokens += count
        self.model.train(training)
        sums = torch.tensor([total, tokens], dtype=torch.float64, device=self.device)
        if ranks > 1:
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    def train(self) -> RunReport:
        """Trains, measures, saves the adapter (or the whole model), draws the loss, writes the exports.

        Raises:
            GradientError: gradients that are missing, all zero or not finite.
            DeviceMemoryError: the device's memory was not enough.
            ExportError: the disk is full. Whole checkpoints stay and `resume` goes on from the newest.
            OutputExistsError: another process trains into the same directory, or has meanwhile.

        """
        with self.directory.locked() if self.main else nullcontext(), self._explained():
            return self._train()

    def _train(self) -> RunReport:
        described = {**asdict(self.data.report), "processes": self.processes.num_processes}
        if self.main:  # again, now that nobody else can change what is there
            self.directory.check(self.recipe, resume=self._resume, overwrite=self._overwrite)
        if self._resume:
            self.directory.check_data(described)
        self.processes.wait_for_everyone()  # all have checked the directory before one changes it
        if self.main:
            if self._resume:
                self.directory.resume()
            else:
                self.directory.begin(self.recipe, described)
        self.processes.wait_for_everyone()
        checkpoint = self.directory.newest_checkpoint() if self._resume else None
        trainer = self._trainer()
        progress = None if self._console is None else callbacks.ProgressBar(self._console)
        if progress is not None:
            trainer.add_callback(progress)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        try:
            if checkpoint is not None and step_of(checkpoint) >= self.steps:
                _restore(trainer, checkpoint)
            else:
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
        finally:
            if progress is not None:
                progress.close()
        return self._finish(trainer, time.perf_counter() - start)

    def _trainer(self) -> WatchedTrainer:
        trainer = WatchedTrainer(
            model=self.model,
            args=self._arguments(),
            train_dataset=self.bins,
            data_collator=collate_weighted,
            processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.watch = GradientWatch(scaled=self._scaled)
        trainer.add_callback(callbacks.GradientCheck(trainer.watch))
        trainer.add_callback(callbacks.MetricsFile(self.directory.metrics))
        trainer.add_callback(
            callbacks.Checkpoints(self.directory, self.recipe.output.keep_checkpoints)
        )
        if len(self.held_out_bins):
            every = self.recipe.schedule.eval_every
            trainer.add_callback(callbacks.HeldOut(self.held_out_loss, trainer.log, every))
        return trainer

    def _arguments(self) -> TrainingArguments:
        schedule = self.recipe.schedule
        warmup = schedule.warmup if schedule.warmup >= 1 else schedule.warmup * self.steps
        arguments = TrainingArguments(
            output_dir=str(self.directory.checkpoints),
            max_steps=self.steps,
            per_device_train_batch_size=schedule.batch_size,
            gradient_accumulation_steps=schedule.gradient_accumulation,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type=schedule.scheduler,
            warmup_steps=math.ceil(warmup),
            weight_decay=schedule.weight_decay,
            max_grad_norm=schedule.max_grad_norm,
            optim=schedule.optimizer,
            seed=schedule.seed,
            logging_steps=schedule.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # the watch sees them, and a filter would hide them
            save_strategy="no" if schedule.save_every is None else "steps",
            save_steps=schedule.save_every or 500,
            save_total_limit=None,  # Checkpoints removes old ones, once the new one is whole
            report_to=self.recipe.report_to or "none",
            disable_tqdm=True,
            remove_unused_columns=False,  # an item is a list of rows
            include_num_input_tokens_seen="all",
            dataloader_pin_memory=self.device.type == "cuda",
            use_cpu=self.device.type == "cpu",
            ddp_find_unused_parameters=False,  # the watch refuses a parameter without a gradient
            bf16=self.device.type == "cuda" and self.compute_dtype is torch.bfloat16,
            fp16=self._scaled,
        )
        arguments._n_gpu = min(
            arguments.n_gpu, 1
        )  # else Trainer copies the model to every card it sees
        return arguments

    @property
    def _scaled(self) -> bool:
        return self.device.type == "cuda" and self.compute_dtype is torch.float16

    def _autocast(self) -> torch.autocast:
        enabled = self.device.type == "cuda" and self.compute_dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=enabled)

    def _save(self) -> None:
        target = self.directory.model if self.recipe.lora is None else self.directory.adapter

        def write(folder: Path) -> None:
            self.model.save_pretrained(str(folder))
            self.tokenizer.save_pretrained(str(folder))
            if self.recipe.lora is not None:
                record_base(folder, self.recipe.model.name, revision=self.recipe.model.revision)

        self.directory.save_folder(target, write)

    def _finish(self, trainer: WatchedTrainer, seconds: float) -> RunReport:
        exports: list[str] = []
        note = None
        if self.main:
            self._save()
            target = self.directory.model if self.recipe.lora is None else self.directory.adapter
            exports = [str(target), *write_exports(self)]
            note = plot_loss(self.directory)
        self.processes.wait_for_everyone()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        held_out = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        packing = self.bins.packing
        cuda = self.device.type == "cuda"
        report = RunReport(
            directory=str(self.directory.path),
            steps=trainer.state.global_step,
            tokens=int(trainer.state.num_input_tokens_seen),
            seconds=seconds,
            train_loss=losses[-1],
            held_out_before=held_out[0] if held_out else None,
            held_out_after=held_out[-1] if held_out else None,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else None,
            utilisation=packing.utilisation,
            rows_per_bin=packing.rows_per_bin,
            tokens_dropped=self.data.report.dropped_tokens,
            processes=self.processes.num_processes,
            idle=trainer.watch.idle,
            exports=exports,
            notes=[] if note is None else [note],
        )
        if self.main:
            report.save(self.directory.report)
        return report

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the device and the disk say into errors that say what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self, error) from error
        except Exception as error:
            if _disk_full(error):
                whole = self.directory.newest_checkpoint() is not None
                then = "go on with --resume from the newest whole checkpoint"
                raise ExportError(
                    f"the disk of {self.directory.path} is full ({error}). Free some space, then "
                    f"{then if whole else 'begin again with --overwrite: there is no whole checkpoint yet'}."
                ) from error
            raise


def _restore(trainer: WatchedTrainer, checkpoint: Path) -> None:
    """A run that was stopped after its last step: Trainer, asked to go on, would train one step too many."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer._load_from_checkpoint(str(checkpoint))
    events, told = trainer.callback_handler, (trainer.args, trainer.state, trainer.control)
    events.on_train_begin(*told)
    events.on_train_end(*told)


_FULL = (
    "No space left on device",
    "PytorchStreamWriter failed",
    "inline_container.cc",
    "iostream error",
)
"""What safetensors and torch.save say: both raise errors of their own, with or without the system's text inside."""


def _disk_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    return full or any(text in str(error) for text in _FULL)
