"""What stands beside the weights: config, generation config or adapter config, as transformers and PEFT save them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path


def save_config(model: Any, directory: Path, *, tied: bool, dtype: str) -> None:
    """Writes config.json and generation_config.json of the merged model: no quantization, the head tied or not."""
    config = copy.deepcopy(model.config)
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.architectures = [type(model).__name__]
    config.tie_word_embeddings = tied
    config.dtype = dtype
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        # Not save_pretrained: it refuses settings that this model was loaded and generates with.
        text = model.generation_config.to_json_string(use_diff=True)
        (directory / "generation_config.json").write_text(text, encoding="utf-8")


def save_adapter(model: Any, directory: Path) -> Path:
    """Writes the one active adapter as PEFT saves it, and gives its safetensors file.

    Raises:
        ExportError: no adapter, or several, are active.

    """
    from peft import PeftModel

    active: list[str] = list(model.active_adapters) if isinstance(model, PeftModel) else []
    if len(active) != 1:
        raise ExportError(
            f"an adapter export needs a PEFT model with one active adapter; found {active or 'none'}. "
            "Choose one with model.set_adapter(NAME), or export the merged model."
        )
    model.save_pretrained(str(directory), selected_adapters=active)
    # PEFT's empty form of a model card, which would be taken for one that a person wrote.
    for form in directory.rglob("README.md"):
        form.unlink()
    folder = directory if active[0] == "default" else directory / active[0]
    if folder is not directory:
        for file in folder.iterdir():
            file.rename(directory / file.name)
        folder.rmdir()
    return directory / "adapter_model.safetensors"
