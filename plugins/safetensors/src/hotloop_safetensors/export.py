"""Writes a checkpoint directory: tokenizer, weights tensor by tensor, index, config last."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, ExportError
from hotloop_core.exporter import ExportReport, round_tensor
from hotloop_core.files import Outputs

from .layout import Part, Stored, header, plain, shards

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotloop_core import ExportRequest, TensorEntry
    from hotloop_core.files import HashingFile
    from torch import Tensor

_WEIGHTS = {"merged": "model", "adapter": "adapter_model"}
_ELEMENTS = 1 << 23
"""Values that are rounded and written at once."""
_SHARD = 5 * 10**9
"""As transformers splits a checkpoint where nothing else is asked for, in bytes."""
_KEPT = {"embedding", "head", "router"}
"""Roles that stay in 16 bits beside 4-bit projections, as where bitsandbytes quantises on loading."""
_NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}
_LAST = {"merged": "config.json", "adapter": "adapter_config.json"}
"""Nothing loads the directory before this file is there, so it is renamed last."""
_OTHER = {"merged": "adapter", "adapter": "merged"}
_TOKENIZERS = (
    *("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)
"""What a tokenizer reads where it is there, and not every one writes."""


def export(request: ExportRequest) -> ExportReport:
    """Writes what `request` asks for; memory stays bounded by the largest tensor.

    Raises:
        ConfigError: several quantisations at once, which would share file names; an importance matrix.
        OutputExistsError, ExportError: see `hotloop_core.files.Outputs`.

    """
    if len(request.quants) != 1:
        raise ConfigError(
            f"safetensors writes one of {', '.join(request.quants)} to a directory, since the file "
            "names are the same; export each into a directory of its own"
        )
    if request.importance is not None:
        raise ConfigError(
            "safetensors has no use for an importance matrix; leave it out, or export as gguf"
        )
    _refuse_the_other(request)
    config = _config(request)
    stored = [_stored(request, config, entry) for entry in request.tensors]
    stem = _WEIGHTS[request.contents]
    files = _named(stem, shards(stored, _limit(request)))
    side = sorted(_side_files(request))
    with Outputs(request.directory, overwrite=request.overwrite) as outputs:
        outputs.check([*(file.name for file in side), *files, _LAST[request.contents]])
        outputs.replace(_of_an_older_export(request, stem, {file.name for file in side}))
        outputs.require_space(sum(tensor.bytes for tensor in stored))
        for file in side:
            outputs.copy(file)
        _write_weights(request, outputs, files, len(stored), config.get("dtype", ""))
        if len(files) > 1:
            outputs.write(f"{stem}.safetensors.index.json", _index(files))
        outputs.write(_LAST[request.contents], json.dumps(config, indent=2, sort_keys=True) + "\n")
    return ExportReport(
        format="safetensors",
        quants=request.quants,
        files=tuple(outputs.files),
        tensors=len(stored),
    )


def _limit(request: ExportRequest) -> int:
    # PEFT reads an adapter from one file only.
    return (request.max_shard_bytes or _SHARD) if request.contents == "merged" else 2**62


def _config(request: ExportRequest) -> dict[str, Any]:
    file = request.source / _LAST[request.contents]
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if request.contents == "merged":
        half = "float16" if config.get("dtype") == "float16" else "bfloat16"
        config["dtype"] = "float32" if request.quants == ("32bit",) else half
    if request.quants == ("4bit",):
        config["quantization_config"] = _NF4 | {
            "bnb_4bit_compute_dtype": config["dtype"],
            "llm_int8_skip_modules": [
                entry.name.removesuffix(".weight")
                for entry in request.tensors
                if entry.role in _KEPT and entry.part == "weight"
            ],
        }
    return config


def _stored(request: ExportRequest, config: dict[str, Any], entry: TensorEntry) -> Stored:
    matrix = len(entry.shape) == 2 and entry.layer is not None and entry.part == "weight"
    if request.quants != ("4bit",) or not matrix or entry.role in _KEPT:
        return plain(entry, _dtype(request, config, entry))
    from . import nf4

    described = zip(nf4.SUFFIXES, nf4.shapes(entry.shape), strict=True)
    return Stored(entry, tuple(Part(entry.name + end, *kind) for end, kind in described))


def _dtype(request: ExportRequest, config: dict[str, Any], entry: TensorEntry) -> str:
    import torch

    floating = getattr(torch, entry.dtype).is_floating_point
    return config["dtype"] if floating and request.contents == "merged" else entry.dtype


def _side_files(request: ExportRequest) -> Iterable[Any]:
    skipped = {_LAST[request.contents], "adapter_model.safetensors"}
    return (f for f in request.source.iterdir() if f.is_file() and f.name not in skipped)


def _refuse_the_other(request: ExportRequest) -> None:
    other = _OTHER[request.contents]
    if (request.directory / _LAST[other]).exists():
        held = {"merged": "a model", "adapter": "an adapter"}[other]
        raise ExportError(
            f"{request.directory} holds {held} already ({_LAST[other]}): of an adapter and a model in one directory "
            "transformers loads the adapter, on the base that it names, and not the model. Choose another directory."
        )


def _of_an_older_export(request: ExportRequest, stem: str, side: set[str]) -> set[str]:
    """What transformers would load instead of, or beside, what is written now."""
    patterns = (
        f"{stem}.safetensors",
        f"{stem}-*-of-*.safetensors",
        f"{stem}.safetensors.index.json",
    )
    found = {file.name for pattern in patterns for file in request.directory.glob(pattern)}
    if "tokenizer_config.json" in side:
        found |= {n for n in _TOKENIZERS if n not in side and (request.directory / n).exists()}
    return found


def _named(stem: str, groups: list[list[Stored]]) -> dict[str, list[Stored]]:
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    total = len(groups)
    return {f"{stem}-{i:05}-of-{total:05}.safetensors": g for i, g in enumerate(groups, 1)}


def _write_weights(
    request: ExportRequest,
    outputs: Outputs,
    files: dict[str, list[Stored]],
    total: int,
    dtype: str,
) -> None:
    done = 0
    for name, tensors in files.items():
        with outputs.open(name) as file:
            file.write(header(tensors))
            for tensor in tensors:
                _write_tensor(file, tensor, dtype)
                done += 1
                if request.progress is not None:
                    request.progress(done, total, tensor.entry.name)


def _write_tensor(file: HashingFile, tensor: Stored, dtype: str) -> None:
    """dtype: what a quantised tensor is dequantised to."""
    import torch

    entry = tensor.entry
    if len(tensor.parts) == 1:
        to = getattr(torch, tensor.parts[0].dtype)
        for _, part in entry.parts(_ELEMENTS):
            file.write(_bytes(round_tensor(part, to, entry.name)))
        return
    from . import nf4

    for _, whole in entry.parts(max(1, prod(entry.shape))):
        for made in nf4.encode(whole, dtype):
            file.write(_bytes(made))


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _index(files: dict[str, list[Stored]]) -> str:
    size = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
    places = {p.name: name for name, tensors in files.items() for t in tensors for p in t.parts}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2) + "\n"
