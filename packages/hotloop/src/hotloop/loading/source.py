"""Where a model's files are: a local folder, a GGUF file, an adapter, or a hub id brought to a
local folder.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import CheckpointError, ConfigError, SecurityError

from .intact import read_object, refuse_stacked

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Hub:
    """How to ask the hub."""

    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's files, and its config as a mapping.

    name: what was asked for. gguf: the file's name in `directory`, or None. repo: the hub id whose
    weights are not here yet, or None. adapter: the folder of a PEFT adapter over the model at
    `directory`, or None.
    """

    name: str
    directory: Path
    config: Mapping[str, Any] = field(repr=False)
    gguf: str | None = None
    repo: str | None = None
    adapter: Path | None = None


def locate(name: str | os.PathLike[str], hub: Hub | None = None) -> Source:
    """Finds a model and reads its config; brings nothing but the config from the hub (a GGUF: the
    file).

    Raises:
        CheckpointError: nothing is there. ConfigError: what is there cannot be a model.
            SecurityError: it is pickled.

    """
    hub, name = hub or Hub(), str(name)
    path = Path(name).expanduser()
    if path.is_file():
        return _of_file(name, path)
    if path.is_dir():
        return _of_directory(name, path, hub)
    return _of_hub(name, hub)


def fetch(source: Source, hub: Hub, *, remote_code: bool = False) -> Source:
    """Brings the weights and the tokenizer of a hub model to this machine; a local one is returned
    as it is.
    """
    if source.repo is None:
        return source
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with _hub_errors(source.repo):
        directory = snapshot_download(
            source.repo,
            revision=hub.revision,
            token=hub.token,
            local_files_only=hub.local_files_only,
            allow_patterns=[*wanted, "*.py"] if remote_code else wanted,
            ignore_patterns=["*/*", "consolidated*"],
        )
    return replace(source, directory=Path(directory), repo=None)


def _of_file(name: str, path: Path) -> Source:
    if path.suffix == ".gguf":
        return _gguf(name, path)
    if path.suffix in PICKLED:
        raise SecurityError(_pickled(path))
    raise ConfigError(
        f"{path} is a file; expected a folder with config.json and safetensors, or a .gguf file"
    )


def _of_directory(name: str, path: Path, hub: Hub) -> Source:
    if (path / "adapter_config.json").is_file():
        return _adapter(name, path, hub)
    if (path / "config.json").is_file():
        return Source(name=name, directory=path, config=read_object(path / "config.json"))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(name, files[0])
    if files:
        raise ConfigError(
            f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files)}); pass the "
            "path of one"
        )
    raise CheckpointError(
        f"{path} has no config.json and no .gguf file; expected a folder that save_pretrained wrote"
    )


def _adapter(name: str, path: Path, hub: Hub) -> Source:
    if not (path / "adapter_model.safetensors").is_file():
        raise (
            SecurityError(_pickled(path))
            if _has_pickles(path)
            else CheckpointError(
                f"{path} has adapter_config.json but no adapter_model.safetensors; save the "
                "adapter again"
            )
        )
    base = read_object(path / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"{path}/adapter_config.json names no base_model_name_or_path; load the base model and "
            "put the adapter on it with peft.PeftModel.from_pretrained"
        )
    refuse_stacked(str(path))
    return replace(locate(base, hub), adapter=path)


def _of_hub(name: str, hub: Hub) -> Source:
    repo, _, file = name, "", ""
    if name.endswith(".gguf") and name.count("/") >= 2:
        owner, model, file = name.split("/", 2)
        repo = f"{owner}/{model}"
    if not _HUB_ID.fullmatch(repo) or repo.startswith("."):
        raise CheckpointError(f"{name}: no such file or folder, and no hub id (owner/model) either")
    from huggingface_hub import hf_hub_download

    where: dict[str, Any] = {
        "revision": hub.revision,
        "token": hub.token,
        "local_files_only": hub.local_files_only,
    }
    with _hub_errors(name):
        path = Path(hf_hub_download(repo, file or "config.json", **where))
    if file:
        return _gguf(name, path)
    return Source(name=name, directory=path.parent, config=read_object(path), repo=repo)


def _gguf(name: str, path: Path) -> Source:
    from .gguf_config import gguf_config

    return Source(name=name, directory=path.parent, config=gguf_config(path), gguf=path.name)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor in the hub's cache, and the hub was not reached. "
            "Check the name and the connection, or pass a local path."
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"the hub does not give {name}: {str(error).strip().splitlines()[-1]} A folder with "
            "config.json is expected; a GGUF file is named owner/model/file.gguf; a gated model "
            "needs token=."
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot bring {name} from the hub: {error}") from error


def _has_pickles(path: Path) -> bool:
    return any(file.suffix in PICKLED for file in path.iterdir())


def _pickled(path: Path) -> str:
    return (
        f"{path}: pickled weights (.bin, .pt) can run code when they are read, so they are "
        "refused. Convert them where you trust them: "
        "`AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)` writes safetensors."
    )


def refuse_pickles(directory: Path) -> None:
    """Raises SecurityError where a folder's only weights are pickled, CheckpointError where it has
    none at all.
    """
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json")):
        return
    if _has_pickles(directory):
        raise SecurityError(_pickled(directory))
    raise CheckpointError(f"{directory} has no weights; expected model.safetensors or its shards")
