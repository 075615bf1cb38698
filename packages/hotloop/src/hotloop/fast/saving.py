"""`save_pretrained_merged`, `save_pretrained_gguf` and their hub twins: `hotloop.export` under the
field's names.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, UnsupportedError

from .refusals import METHODS, PUSH, SAVE, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotloop_core import ExportReport
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZATION_ALIASES = {"not_quantized": "bf16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
"""Names that such scripts use beside llama.cpp's own."""


def add_saving(model: PreTrainedModel | PeftModel) -> None:
    """Puts the four methods on this instance, and those that scripts call and Hotloop refuses.

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
    for name in METHODS:
        setattr(model, name, partial(_refuse_method, name))


def _refuse_method(name: str, *_: object, **others: object) -> None:
    raise UnsupportedError(f"a model of Hotloop has no {name}: {METHODS[name]}")


def save_pretrained_merged(
    model: PreTrainedModel,
    save_directory: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = True,
    **others: Any,
) -> ExportReport:
    """Writes safetensors: "merged_16bit" or "merged_4bit", the whole model with its adapter merged
    in; "lora", the adapter alone. A file of the same name is replaced, as by `save_pretrained`, unless overwrite=False.
    max_shard_size: of one file, in bytes or such as "5GB". `others` is only there to be refused by name.

    Raises:
        ConfigError: another method. Else as `hotloop.export`.

    """
    accepted = ("save_directory", "tokenizer", "save_method", "max_shard_size")
    refuse("save_pretrained_merged", others, accepted, SAVE)
    from hotloop.exporting import export
    from hotloop.planner import parse_bytes

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
        max_shard_bytes=None if max_shard_size is None else parse_bytes(max_shard_size),
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
    *,
    commit_message: str = "Export with Hotloop",
    max_shard_size: int | str | None = None,
    **others: Any,
) -> str:
    """`save_pretrained_merged` into a hub repository, public unless private=True; returns its address. `others` is only
    there to be refused by name.
    """
    accepted = ("repo_id", "tokenizer", "save_method", *_OF_A_PUSH, "max_shard_size")
    refuse("push_to_hub_merged", others, accepted, PUSH)

    def save(directory: str) -> ExportReport:
        return save_pretrained_merged(
            model, directory, tokenizer, save_method, max_shard_size=max_shard_size
        )

    return _push(save, repo_id, token, private, commit_message)


def push_to_hub_gguf(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    token: str | None = None,
    private: bool | None = None,
    *,
    commit_message: str = "Export with Hotloop",
    **others: Any,
) -> str:
    """`save_pretrained_gguf` into a hub repository, public unless private=True; returns its address. `others` is only
    there to be refused by name.
    """
    accepted = ("repo_id", "tokenizer", "quantization_method", *_OF_A_PUSH)
    refuse("push_to_hub_gguf", others, accepted, PUSH)

    def save(directory: str) -> ExportReport:
        return save_pretrained_gguf(model, directory, tokenizer, quantization_method)

    return _push(save, repo_id, token, private, commit_message)


_OF_A_PUSH = ("token", "private", "commit_message")


def _push(
    save: Callable[[str], ExportReport],
    repo_id: str,
    token: str | None,
    private: bool | None,
    message: str,
) -> str:
    from hotloop.exporting.hub import push, require_name

    require_name(repo_id)  # before hours of export, not after
    with tempfile.TemporaryDirectory() as directory:
        files = [file.path for file in save(directory).files]
        return push(
            Path(directory),
            repo_id,
            files=files,
            private=bool(private),
            token=token or None,  # scripts leave an empty one standing
            message=message,
        )
