"""The recipe: one schema for everything that `hotloop train` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from hotloop_core.errors import ConfigError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import recipe_file

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Frozen and strict: an unknown key, a value of another type or an infinite one is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model to load, and how."""

    name: str = Field(description="Hub id, local directory, or a .gguf file.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    bits: Literal[4, 16] = Field(
        default=4, description="4: NF4 with double quantisation (QLoRA). 16: as stored."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, description="Compute dtype; null: bfloat16 where the device has it."
    )
    max_seq_len: Positive = Field(
        default=2048, description="Longest row, and the size of a packed bin, in tokens."
    )
    vram: str | None = Field(
        default=None, description='Budget of device memory, such as "24GiB"; null: what is free.'
    )
    family: str | None = Field(
        default=None, description="Which plugin's family, where several claim the model type."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model."
    )


class DataSection(Section):
    """Which rows to train on, and which of their tokens."""

    path: str = Field(
        description="A .jsonl, .json, .csv or .parquet file, or the id of a data set on the hub."
    )
    split: str = Field(default="train", description="Split of a hub data set.")
    form: Literal["auto", "chat", "prompt_completion", "text"] = Field(
        default="auto", description="auto: by the fields of the first row."
    )
    messages_field: str = Field(default="messages", description="chat: a list of {role, content}.")
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    text_field: str = "text"
    weight_field: str | None = Field(
        default=None,
        description="A number that the loss of a row is multiplied by. A message may have a weight of its own.",
    )
    system: str | None = Field(
        default=None, description="chat: system message for rows that have none."
    )
    chat_template: str | None = Field(
        default=None, description="Name of a built-in template; null: the tokenizer's own."
    )
    held_out: Fraction | str = Field(
        default=0.05, description="Share of rows kept for measuring, or a file that holds them."
    )
    loss_on: Literal["responses", "all"] | None = Field(
        default=None, description="null: responses for chat and prompt_completion, all for text."
    )
    overlong: Literal["error", "cut", "drop", "split"] = Field(
        default="error", description="Rows longer than max_seq_len. split: into rows of their own."
    )
    packing: bool = Field(
        default=True,
        description="Several rows to a bin of max_seq_len; attention stays inside rows.",
    )
    shuffle_seed: Seed = Field(default=0, description="Seeds the held-out choice and the bins.")


class LoraSection(Section):
    """The adapter."""

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Fraction = 0.0
    targets: str | list[str] = Field(
        default="all-linear",
        description="all-linear: the seven projections of every layer; or names.",
    )
    rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(r) instead of alpha / r."
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Trained in full beside the adapter."
    )
    seed: Seed = 3407


class ScheduleSection(Section):
    """How long, how fast, how often measured and saved."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Passes over the data (1 if unset)."
    )
    steps: Positive | None = Field(default=None, description="Optimizer steps; instead of epochs.")
    batch_size: Positive = Field(
        default=1, description="Bins (rows, without packing) a device takes at once."
    )
    gradient_accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: Annotated[float, Field(ge=0)] = Field(
        default=0.03, description="Share of all steps if below 1, else a number of steps."
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(default=1.0, description="0: no clipping.")
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw_torch",
        description="8bit: a quarter of the state's memory. paged: it moves to host memory when the card is full.",
    )
    seed: Seed = 3407
    log_every: Positive = 1
    eval_every: Positive | None = Field(
        default=None, description="Steps; null: before and after only."
    )
    save_every: Positive | None = Field(default=200, description="Steps; null: no checkpoints.")

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both set; set one of them")
        return self


class ExportItem(Section):
    """One export after training."""

    format: str = Field(description="Name of an installed exporter, such as safetensors or gguf.")
    quant: str | list[str] | None = Field(default=None, description="null: the exporter's first.")


class OutputSection(Section):
    """Where the results go."""

    directory: str = Field(description="The run directory, relative to where the command runs.")
    keep_checkpoints: Positive = 2
    export: list[ExportItem] = []


def _or_false(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"const": False})


class Recipe(Section):
    """A training run. Relative paths of model and data are relative to the recipe's own folder."""

    model: ModelSection
    data: DataSection
    lora: LoraSection | None = Field(
        default=LoraSection(),
        description="false (or null in YAML): full fine-tuning.",
        json_schema_extra=_or_false,
    )
    schedule: ScheduleSection = ScheduleSection()
    output: OutputSection
    report_to: list[str] = Field(
        default=[], description="Trackers that transformers knows, such as wandb."
    )

    @model_validator(mode="before")
    @classmethod
    def _false_means_no_adapter(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("lora") is False:  # TOML has no null
            return {**values, "lora": None}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.lora is None and self.model.bits == 4:
            raise ValueError(
                "model.bits is 4 without lora; 4-bit weights do not train: set model.bits = 16"
            )
        if self.data.form == "text" and self.data.loss_on == "responses":
            raise ValueError('data.loss_on is "responses" and data.form is "text", which has none')
        return self


def make_recipe(values: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Checks a recipe's values.

    Raises:
        ConfigError: lists every problem at once, each with its path and, for an unknown key, the nearest valid one.

    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [recipe_file.explain(problem, Recipe) for problem in error.errors()]
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{source} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:\n{lines}\n"
            "`hotloop schema` prints every key with its type."
        ) from None


def read_recipe(path: str | Path, *, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Reads a recipe from a .toml, .yaml or .yml file.

    Args:
        path: the file.
        overrides: "section.key=value" texts, the value in TOML's notation; a bare word is text.

    Raises:
        ConfigError: the file cannot be read, or `make_recipe` refuses what is in it.

    """
    path = Path(path)
    values = recipe_file.override(recipe_file.read(path), overrides)
    recipe = make_recipe(values, source=str(path))
    folder = path.resolve().parent
    data = {"path": recipe_file.beside(folder, recipe.data.path)}
    if isinstance(recipe.data.held_out, str):
        data["held_out"] = recipe_file.beside(folder, recipe.data.held_out)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"name": recipe_file.beside(folder, recipe.model.name)}
            ),
            "data": recipe.data.model_copy(update=data),
        }
    )
