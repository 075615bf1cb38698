"""A checkpoint opened for export: its weights stay in their files, mapped into memory, and are read when asked for."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    SecurityError,
    UnsupportedError,
)
from hotloop_core.files import write_atomically

from hotloop.loading.intact import (
    read_object,
    recorded,
    refuse_stacked,
    require_adapter,
    require_all_used,
    require_index,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hotloop.loading.source import Source

BASE_FILE = "base.json"
"""Beside an adapter: the name of the base that it was trained on, and what its weights look like."""
_HEAD, _SAMPLE = 1 << 20, 1 << 16


def open_checkpoint(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A 16 or 32-bit model on the CPU in its own dtype, and its tokenizer. Costs no memory before a tensor is used.

    name: a folder of safetensors, a hub id, or an adapter's folder (its base is opened and the adapter put on it).

    Raises:
        CheckpointError: tensors are missing, surplus or of another shape. UnsupportedError: a quantised checkpoint, an
        adapter on an adapter. ExportError: an adapter of another base. SecurityError: pickled weights, code, or names
        that lead out of the folder.

    """
    model, source = open_model(name, revision=revision, trust_remote_code=trust_remote_code)
    folder = source.adapter or source.directory
    if not (folder / "tokenizer_config.json").is_file():
        folder = source.directory
    return model, open_tokenizer(folder, trust_remote_code=trust_remote_code)


def open_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        CheckpointError: transformers cannot read it. SecurityError: it brings code of its own.

    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file makes transformers stumble over
        _refuse_code(error, f"the tokenizer in {folder}")
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read: {_first_line(error)} Expected tokenizer.json and "
            "tokenizer_config.json as save_pretrained writes them; copy them there again."
        ) from error


def open_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Source]:
    """The model of `open_checkpoint`, and where its files are."""
    from transformers import AutoModelForCausalLM

    from hotloop.loading import checks
    from hotloop.loading.source import Hub, fetch, locate

    refuse_stacked(name)
    hub = Hub(revision=revision)
    source = fetch(locate(name, hub), hub, remote_code=trust_remote_code)
    if source.gguf is not None or source.config.get("quantization_config"):
        raise UnsupportedError(
            f"{name} is quantised; opened without loading are 16 and 32-bit safetensors. "
            "Use hotloop.load and hotloop.export."
        )
    require_index(source.directory)
    checks.weight_files(source.directory)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            str(source.directory),
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report below says which
        )
    except Exception as error:  # whatever a damaged config makes transformers stumble over
        _refuse_code(error, name)
        raise CheckpointError(
            f"transformers cannot open {name}: {error}\nCheck its config.json, and that the installed "
            "transformers knows the model."
        ) from error
    model, info = opened
    checks.require_complete(info, name)
    model = model.eval().requires_grad_(False)
    if source.adapter is None:
        model.config.name_or_path = model.name_or_path = name
        return model, source
    settings = read_object(source.adapter / "adapter_config.json")
    model.config.name_or_path = model.name_or_path = settings["base_model_name_or_path"]
    return put_adapter(model, source.adapter, base=source), source


def put_adapter(model: Any, adapter: Path, *, base: Source) -> Any:
    """`model` with the PEFT adapter in `adapter` on it. base: where the model's weights came from.

    Raises:
        ExportError: the adapter was trained on another base, by what was recorded then or by its shapes and names.
        SecurityError, CheckpointError, ConfigError: see `intact.require_adapter`.

    """
    from peft import PeftModel

    require_adapter(adapter)
    check_base(adapter, base)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        # Once more, for the names: from_pretrained keeps to itself what it could not place.
        placed: Any = adapted.load_adapter(str(adapter), "default", is_trainable=False)
    except Exception as error:  # whatever a damaged config makes PEFT stumble over
        raise ExportError(
            f"the adapter in {adapter} does not fit {base.name!r}: {_first_line(error)} Take the base that it was "
            "trained on (base_model_name_or_path in its adapter_config.json)."
        ) from error
    require_all_used(adapter, placed.missing_keys, placed.unexpected_keys)
    return adapted.eval()


def on_original(model: Any) -> Any:
    """The active adapter of a PEFT model with a 4-bit base, on the 16-bit weights which that was made from.

    Raises:
        ConfigError: the base is not quantised, or has no name to find its original by. ExportError: see `put_adapter`.

    """
    from .sidecar import save_adapter

    base = model.get_base_model()
    name = str(base.config.name_or_path or "")
    if not getattr(base, "is_loaded_in_4bit", False) or not name:
        raise ConfigError(
            "base='original' is for an adapter on a 4-bit base that was loaded from a 16-bit checkpoint; "
            f"found {'a base that is not in 4 bit' if name else 'a base without a name'}. Leave base out."
        )
    original, source = open_model(name)
    with tempfile.TemporaryDirectory(prefix="hotloop-adapter-") as folder:
        save_adapter(model, Path(folder))
        return put_adapter(original, Path(folder), base=source)


def fingerprint(source: Source) -> str:
    """What tells one checkpoint from another in a moment: SHA-256, in hexadecimal, over each weight file's size, first
    MiB and samples of 64 KiB from its middle and end. It does not depend on how the weights are loaded.
    """
    from hotloop.loading import checks

    if source.gguf is not None:
        files = [source.directory / source.gguf]
    else:
        files = checks.weight_files(source.directory)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as data:
            for place, length in (
                (0, _HEAD),
                (size // 2, _SAMPLE),
                (max(0, size - _SAMPLE), _SAMPLE),
            ):
                data.seek(place)
                digest.update(data.read(length))
    return digest.hexdigest()


def record_base(adapter: Path, name: str, *, revision: str | None = None) -> None:
    """Writes beside an adapter which base it was trained on. name, revision: as that was loaded; nothing is downloaded.

    Raises:
        CheckpointError: it is not on this machine.

    """
    from hotloop.loading.source import Hub, fetch, locate

    hub = Hub(revision=revision, local_files_only=True)
    record = {"name": name, "fingerprint": fingerprint(fetch(locate(name, hub), hub))}
    write_atomically(adapter / BASE_FILE, json.dumps(record, indent=2) + "\n")


def check_base(adapter: Path, base: Source) -> None:
    """Raises ExportError where the adapter was recorded on another base than `base`."""
    file = adapter / BASE_FILE
    if not file.is_file():
        return
    record = recorded(file)
    found = fingerprint(base)
    if found != record["fingerprint"]:
        raise ExportError(
            f"the adapter in {adapter} was trained on {record['name']!r} with fingerprint "
            f"{record['fingerprint'][:12]}; the weights of {base.name!r} have {found[:12]}. Take that base."
        )


def _refuse_code(error: Exception, what: str) -> None:
    """Raises SecurityError where transformers refused to run Python files of a checkpoint."""
    if "trust_remote_code" in str(error):
        raise SecurityError(
            f"{what} needs Python code of its own, which is not run unless you say so. Read it, then set "
            "model.trust_remote_code in the recipe, or pass trust_remote_code=True in Python."
        ) from error


def _first_line(error: Exception) -> str:
    """Of PEFT's shape errors the first shape, of others the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "mismatch" in line), (lines or [repr(error)])[0])
