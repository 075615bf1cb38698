"""`save_pretrained_merged`, `save_pretrained_gguf` and their hub twins: `hotloop.export` under the
field's names.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError

from .refusals import SAVE, refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_core import ExportReport
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZATION_ALIASES = {"not_quantized": "bf16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
"""Names that such scripts use beside llama.cpp's own."""


def add_saving(model: PreTrainedModel | PeftModel) -> None:
    """Puts the four methods on this instance.

    As partials, not bound methods: a copy or a pickle of the model then saves the copy, not the
    original.
    """
    for function in (
        save_pretrained_merged,
        save_pretrained_gguf,
        push_to_hub_merged,
        push_to_hub_gguf,
    ):
        setattr(model, function.__name__, partial(function, model))


def save_pretrained_merged(
    model: PreTrainedModel,
    save_directory: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    overwrite: bool = True,
    **others: Any,
) -> ExportReport:
    """Writes safetensors: "merged_16bit" or "merged_4bit", the whole model with its adapter merged
    in; "lora", the adapter alone. A file of the same name is replaced, as by `save_pretrained`, unless overwrite=False.
    `others` is only there to be refused by name.

    Raises:
        ConfigError: another method. Else as `hotloop.export`.

    """
    refuse("save_pretrained_merged", others, ("save_directory", "tokenizer", "save_method"), SAVE)
    from hotloop.exporting import export

    quants = {
        "merged_16bit": "16bit",
        "merged_4bit": "4bit",
        "merged_4bit_forced": "4bit",
        "lora": "adapter",
    }
    if save_method not in quants:
        raise ConfigError(f"save_method={save_method!r}; expected {', '.join(quants)}")
    return export(
        model,
        tokenizer,
        save_directory,
        format="safetensors",
        quant=quants[save_method],
        overwrite=overwrite,
    )


def save_pretrained_gguf(
    model: PreTrainedModel,
    save_directory: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    overwrite: bool = True,
    **others: Any,
) -> ExportReport:
    """Writes one GGUF file for each quantisation method, the adapter merged in. A file of the same name is replaced
    unless overwrite=False. `others` is only there to be refused by name.

    Raises:
        ConfigError, UnsupportedError: a method that the exporter does not have. Else as
        `hotloop.export`.

    """
    accepted = ("save_directory", "tokenizer", "quantization_method")
    refuse("save_pretrained_gguf", others, accepted, SAVE)
    from hotloop.exporting import export

    asked = [quantization_method] if isinstance(quantization_method, str) else quantization_method
    quants = [QUANTIZATION_ALIASES.get(name.lower(), name.lower()) for name in asked]
    return export(
        model, tokenizer, save_directory, format="gguf", quant=quants, overwrite=overwrite
    )


def push_to_hub_merged(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    token: str | None = None,
    private: bool | None = None,
) -> str:
    """`save_pretrained_merged` into a hub repository; returns its address."""
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained_merged(model, directory, tokenizer, save_method)
        return _upload(directory, repo_id, token, private)


def push_to_hub_gguf(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    token: str | None = None,
    private: bool | None = None,
) -> str:
    """`save_pretrained_gguf` into a hub repository; returns its address."""
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained_gguf(model, directory, tokenizer, quantization_method)
        return _upload(directory, repo_id, token, private)


def _upload(directory: str, repo_id: str, token: str | None, private: bool | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address: Any = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=directory)
    return str(address)
