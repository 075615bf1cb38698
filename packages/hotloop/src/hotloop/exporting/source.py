"""What `hotloop export` is given: a run directory, or a model's name, opened for export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError

from hotloop.loading.intact import refuse_stacked, require_adapter

from .bases import NOTES, Base
from .checkpoint import check_base, open_checkpoint, open_model, open_tokenizer, put_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotloop.training.recipe import Recipe

_TOKENS = 1 << 16
"""Tokens of a run's data on which importance is measured: the means settle well before."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model and its tokenizer, and where it is from. run: the run directory, or None. note: for the report."""

    model: Any
    tokenizer: Any
    name: str | None
    run: Path | None = None
    recipe: Recipe | None = field(default=None, repr=False)
    note: str | None = None

    def held_out(self) -> Iterator[dict[str, Any]]:
        """The run's held-out rows, each as a batch of one.

        Raises:
            ConfigError: this is no run.

        """
        return self._batches(held_out=True)

    def data(self) -> Iterator[dict[str, Any]]:
        """The first 65,536 tokens of the run's rows to train on, each row as a batch of one.

        Raises:
            ConfigError: this is no run.

        """
        tokens = 0
        for batch in self._batches(held_out=False):
            yield batch
            tokens += batch["input_ids"].numel()
            if tokens >= _TOKENS:
                return

    def _batches(self, *, held_out: bool) -> Iterator[dict[str, Any]]:
        if self.recipe is None:
            raise ConfigError(
                "only a run directory has data of its own; give a file, or measure from Python"
            )
        import torch

        from hotloop.training.data import prepare, read

        prepared = prepare(self.recipe, read(self.recipe.data), self.tokenizer)
        for row in prepared.held_out if held_out else prepared.train:
            yield {
                "input_ids": torch.as_tensor(row.ids).long()[None],
                "labels": torch.as_tensor(row.labels).long()[None],
            }


def open_source(source: str, *, base: Base = "trained") -> Opened:
    """Opens a run directory, or a model by name or path. Nothing is read before it is used, but for 4-bit bases.

    Raises:
        ConfigError: base="original" where no adapter on a 4-bit base is merged. Else as `open_checkpoint`, `load`.

    """
    if (Path(source) / "recipe.yaml").is_file():
        return _open_run(source, base)
    if base == "original":
        raise ConfigError("base='original' is for a QLoRA run directory")
    from hotloop.loading.source import locate

    refuse_stacked(source)
    found = locate(source)
    if found.gguf is None and not found.config.get("quantization_config"):
        model, tokenizer = open_checkpoint(source)
    else:
        from hotloop.loading import load

        model, tokenizer = load(source, bits=16, wire=False)
    return Opened(model=model, tokenizer=tokenizer, name=None)


def _open_run(source: str, base: Base) -> Opened:
    from transformers.trainer_utils import align_special_tokens

    from hotloop.loading.source import Hub, fetch, locate
    from hotloop.training.directory import open_run

    directory, recipe = open_run(source)
    trained, section = directory.trained(), recipe.model
    here: dict[str, Any] = {
        "name": Path(source).resolve().name,
        "run": directory.path,
        "recipe": recipe,
    }
    if base == "original" and (section.bits != 4 or recipe.lora is None):
        raise ConfigError(
            f"base='original' is for a QLoRA run; {source} trained with bits={section.bits}"
        )
    if recipe.lora is None:
        model, tokenizer = open_checkpoint(str(trained))
        return Opened(model=model, tokenizer=tokenizer, **here)
    hub = Hub(revision=section.revision)
    found = locate(section.name, hub)
    quantised = found.gguf is not None or found.config.get("quantization_config")
    if quantised or (section.bits == 4 and base == "trained"):
        from hotloop.training.models import load_trained

        require_adapter(trained)
        check_base(trained, fetch(found, hub))
        model, tokenizer = load_trained(recipe, trained)
        return Opened(model=model, tokenizer=tokenizer, **here)
    model, files = open_model(
        section.name, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    model = put_adapter(model, trained, base=files)
    # The run's own, with its chat template; a token that ends answers there ends them here, as Trainer has it.
    tokenizer = open_tokenizer(trained, trust_remote_code=section.trust_remote_code)
    align_special_tokens(model, tokenizer)
    note = NOTES["original"] if base == "original" else None
    return Opened(model=model, tokenizer=tokenizer, note=note, **here)
