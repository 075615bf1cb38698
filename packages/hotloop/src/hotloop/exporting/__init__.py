"""Export: from a live model to files that other programs load, through the exporter plugins."""

from __future__ import annotations

import importlib
import re
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop_core import ExportReport, ExportRequest, discover, facts_of
from hotloop_core.errors import BrokenPluginError, ConfigError, ExportError, UnsupportedError

from .bases import NOTES, Base, compare_bases
from .checkpoint import on_original, open_checkpoint
from .hub import push
from .importance import measure_importance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from hotloop_core import ExporterSpec, FamilySpec, Importance, ModelFacts, Registry
    from hotloop_core.exporter import Contents

    from .stream import Tensors

__all__ = ["compare_bases", "export", "measure_importance", "open_checkpoint", "push"]


def export(
    model: Any,
    tokenizer: Any,
    directory: str | Path,
    *,
    format: str,
    quant: str | Sequence[str] | None = None,
    base: Base = "trained",
    importance: Importance | str | Path | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    name: str | None = None,
    family: str | None = None,
    registry: Registry | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Writes a model, with its active adapters merged in, as `format` says. The live model is only read.

    Args:
        model: a transformers model, or a PEFT model over one, in 16 or 32 bits or bitsandbytes 4 bit, wired or not.
        tokenizer: its tokenizer; None where the format needs none.
        directory: where the files go; made where it is missing.
        format: the name of an installed exporter ("safetensors", "gguf").
        quant: what that exporter calls it ("16bit", "adapter"; "q8_0", "q4_k_m"), or several, written in one pass.
        base: what an adapter on a 4-bit base is merged into: "trained", the dequantised weights that it was trained
            against, or "original", the 16-bit weights that these were made from. The report says which.
        importance: what each column counts for (`measure_importance`), or a file of it that the format knows
            (llama.cpp's imatrix); formats that search their roundings weight them by it.
        device: where tensors are brought, a block of rows at a time, merged and encoded; None: where each is.
        overwrite: replace outputs that exist.
        max_shard_bytes: largest size of one file; the format's own habit where None (safetensors 5 GB, gguf one file).
        progress: called with (tensors done, tensors in all, name of the tensor).
        name: the model's name in file names and metadata; the last part of its name or path where None.
        family: the family's name, where two plugins claim the model type.
        registry: the plugins to use; what is installed where None.
        metadata: what a model card says (licence, base model ...), plain values.

    Returns:
        The files that were written, with sizes and SHA-256.

    Raises:
        ExportError: it cannot be made or finished, with the reason; nothing that looks whole is left.
        OutputExistsError: an output exists. UnsupportedError: an adapter or a quantisation that cannot be merged.
        ConfigError: no such quantisation. NoExporterError, NoFamilyError: no plugin for it.

    """
    registry = registry or discover()
    exporter = registry.exporter(format)
    quants = _quants(exporter, quant)
    contents: Contents = "adapter" if quants[0] in exporter.adapter_quants else "merged"
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    core = _base_model(model)
    note = _merged_into(model, core, base, contents)
    if base == "original":
        model = on_original(model)
        core = _base_model(model)
    spec = registry.match(core.config.to_dict(), family=family)
    where = _device(device)
    write = _writer(exporter)
    target = _directory(Path(directory))
    with tempfile.TemporaryDirectory(prefix="hotloop-export-") as temporary:
        source = Path(temporary)
        tensors, facts = _prepare(model, core, spec, contents, source, where, tokenizer)
        request = ExportRequest(
            family=spec,
            facts=facts,
            tensors=tensors,
            directory=target,
            source=source,
            name=_name(name or str(core.config.name_or_path or ""), target),
            quants=quants,
            contents=contents,
            tokenize=None if tokenizer is None else _tokenize(tokenizer),
            chat_template=_default_template(tokenizer),
            render=None if tokenizer is None else _render(tokenizer),
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            importance=Path(importance) if isinstance(importance, str) else importance,
            progress=progress,
            metadata=dict(metadata or {}),
        )
        with _full_precision():
            report = write(request)
    return report if note is None else replace(report, notes=(*report.notes, note))


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 in the merging products, whatever the program trains with."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _quants(exporter: ExporterSpec, quant: str | Sequence[str] | None) -> tuple[str, ...]:
    if quant is None:
        return (next(iter(exporter.quants)),)
    asked = [quant] if isinstance(quant, str) else list(quant)
    if not asked:
        raise ConfigError(f"quant is an empty list; choose among {', '.join(exporter.quants)}")
    names = tuple(dict.fromkeys(exporter.resolve(name) for name in asked))
    if len({name in exporter.adapter_quants for name in names}) > 1:
        raise ConfigError(
            f"quant={asked!r} mixes the adapter alone with the merged model; export them one after the other"
        )
    return names


def _base_model(model: Any) -> Any:
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        config = next(iter(model.peft_config.values()), None)
        if config is not None and config.is_prompt_learning:
            raise UnsupportedError(
                f"{config.peft_type} adds virtual tokens, which no weight holds; export the adapter with PEFT"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"cannot export a {type(model).__name__}; expected a transformers model or a PEFT model over one. "
            "Unwrap it first (accelerator.unwrap_model(model))."
        )
    return model


def _merged_into(model: Any, core: Any, base: Base, contents: Contents) -> str | None:
    """What the report says of the base, where there is a choice of it."""
    if base not in NOTES:
        raise ConfigError(f"base={base!r}; expected {' or '.join(NOTES)}")
    if base == "original" and (contents == "adapter" or model is core):
        raise ConfigError(
            "base='original' says what an adapter is merged into; none is merged here"
        )
    in_4bit = getattr(core, "is_loaded_in_4bit", False)
    return NOTES[base] if in_4bit and model is not core and contents == "merged" else None


def _refuse_foreign_quantisation(base: Any) -> None:
    quantization = getattr(base.config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    method = getattr(method, "value", method)
    if method not in (None, "bitsandbytes", "gguf"):
        raise UnsupportedError(
            f"the base is quantised with {method!r}; merged are 16-bit and bitsandbytes 4-bit models. "
            "Export the adapter alone (format='safetensors', quant='adapter')."
        )


def _device(asked: str | torch.device | None) -> torch.device | None:
    import torch

    if asked is None:
        return None
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(
            f"device={asked!r} is no device; expected such as 'cuda', 'cuda:1' or 'cpu'"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={str(device)!r}, and torch sees {torch.cuda.device_count()} CUDA devices; leave device "
            "out, or take another"
        )
    return device


def _directory(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is no directory" if isinstance(error, FileExistsError) else error.strerror
        raise ExportError(f"cannot make {directory}: {why}. Choose another directory.") from error
    return directory


def _writer(exporter: ExporterSpec) -> Callable[[ExportRequest], ExportReport]:
    module, _, function = exporter.target.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:
        raise BrokenPluginError(
            f"exporter {exporter.name!r} names {exporter.target!r}, which cannot be imported: {error}. "
            f"Reinstall it (`uv add hotloop-{exporter.name}`) or tell its author."
        ) from error


def _prepare(
    model: Any,
    base: Any,
    family: FamilySpec,
    contents: Contents,
    source: Path,
    device: torch.device | None,
    tokenizer: Any,
) -> tuple[Tensors, ModelFacts]:
    """Saves what stands beside the weights into `source`; gives the weights, and the facts of what is exported."""
    from .places import Places
    from .sidecar import save_adapter, save_config
    from .stream import adapter_tensors, merged_tensors

    config: dict[str, Any] = base.config.to_dict()
    facts = facts_of(family, config)
    places = Places(family, config, facts.layers)
    try:
        if tokenizer is not None:
            _save_tokenizer(tokenizer, source)
        if contents == "adapter":
            return adapter_tensors(save_adapter(model, source), places), facts
        _refuse_foreign_quantisation(base)
        tensors, tied = merged_tensors(base, places, tied=facts.tied, device=device)
        save_config(base, source, tied=tied, dtype=tensors.dtype)
    except OSError as error:
        raise ExportError(
            f"cannot write {source}, where config and tokenizer wait for the weights: {error.strerror or error}. "
            "Free space there, or name another folder in TMPDIR."
        ) from error
    return tensors, facts_of(family, config | {family.keys.tied: tied})


def _save_tokenizer(tokenizer: Any, source: Path) -> None:
    """Several chat templates go into tokenizer_config.json, not into a folder: an export is a flat set of files."""
    several = isinstance(getattr(tokenizer, "chat_template", None), dict)
    tokenizer.save_pretrained(source, **({"save_jinja_files": False} if several else {}))


def _default_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _tokenize(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def _render(tokenizer: Any) -> Callable[[Sequence[Mapping[str, str]], bool], str]:
    def render(messages: Sequence[Mapping[str, str]], opened: bool) -> str:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=opened
        )

    return render


def _name(asked: str, directory: Path) -> str:
    """A plain file name: the last part of a hub id or path, else the directory's name."""
    last = Path(asked).name.removesuffix(".gguf") or directory.resolve().name
    return re.sub(r"[^\w.+-]", "-", last) or "model"
