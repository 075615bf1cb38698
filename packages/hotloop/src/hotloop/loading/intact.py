"""What is wrong with the files of a checkpoint or an adapter, found before anything of them is used."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    SecurityError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_INDEX = "model.safetensors.index.json"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: it cannot be read, or is none.

    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read as JSON: {error}. Copy or write it again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} holds a {type(content).__name__}, expected a JSON object. Copy or write it again."
        )
    return content


def require_index(directory: Path) -> None:
    """Checks the index of a sharded checkpoint, where there is one.

    Raises:
        SecurityError: a shard's name leads out of the folder, or is no safetensors file.
        CheckpointError, ConfigError: it is damaged.

    """
    file = directory / _INDEX
    if not file.is_file():
        return
    shards = read_object(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(
            f"{file} has no weight_map, which says in which file each tensor is; copy or download it again"
        )
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or PurePath(shard).name != shard or "\\" in shard:
            raise SecurityError(
                f"{file} says that {tensor} is in {shard!r}; expected the plain name of a file beside it. "
                "Do not use this checkpoint, or correct the index."
            )
        if not shard.endswith(".safetensors"):
            raise SecurityError(
                f"{file} says that {tensor} is in {shard!r}; only .safetensors files are opened, since "
                "others can run code when they are read. Convert the checkpoint where you trust it."
            )


def refuse_stacked(name: str) -> None:
    """Raises UnsupportedError where `name` is the folder of an adapter whose base is an adapter in turn."""
    folder = Path(name).expanduser()
    if not (folder / _CONFIG).is_file():
        return
    base = read_object(folder / _CONFIG).get("base_model_name_or_path")
    if isinstance(base, str) and (Path(base).expanduser() / _CONFIG).is_file():
        raise UnsupportedError(
            f"{folder} is an adapter on {base}, which is an adapter itself; expected a model there. "
            "Export that one merged (--format safetensors), then write the merged folder into "
            f"base_model_name_or_path of {folder / _CONFIG}."
        )


def require_adapter(folder: Path) -> None:
    """Checks that a folder holds an adapter whose weights can be read.

    Raises:
        SecurityError: they are pickled. CheckpointError: they are missing or truncated. ConfigError: no config.

    """
    from hotloop.loading.source import PICKLED

    read_object(folder / _CONFIG)
    file = folder / _WEIGHTS
    if not file.is_file():
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLED)
        if pickled:
            raise SecurityError(
                f"{folder} has its adapter in {pickled[0]}: pickled weights can run code when they are read, "
                f"so they are refused. Expected {_WEIGHTS}; save the adapter again where you trust it."
            )
        raise CheckpointError(f"{folder} has no {_WEIGHTS}; save or copy the adapter again")
    require_whole(file, "save")


def require_whole(file: Path, again: str) -> None:
    """Raises CheckpointError where a safetensors file is cut short, or none. again: "save" or "download" it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); copy or {again} it again"
        ) from error


def require_all_used(folder: Path, missing: Collection[str], surplus: Collection[str]) -> None:
    """Raises ExportError where an adapter lacks tensors that its config asks for, or has some that nothing takes."""
    for names, problem in ((missing, "lacks"), (surplus, "has no place for")):
        if names:
            first = min(names)
            raise ExportError(
                f"the adapter in {folder} {problem} {len(names)} tensors, the first is {first}: "
                f"{_CONFIG} and {_WEIGHTS} do not belong together, or to this base. Copy or save the adapter again."
            )


def recorded(file: Path) -> Mapping[str, str]:
    """The name and the fingerprint of an adapter's base, from `base.json`.

    Raises:
        ConfigError: it is damaged.

    """
    record = read_object(file)
    if not all(isinstance(record.get(key), str) for key in ("name", "fingerprint")):
        raise ConfigError(
            f"{file} does not say which base the adapter was trained on; expected name and fingerprint. "
            "Copy it again, or remove it if you know that the base is right."
        )
    return record
