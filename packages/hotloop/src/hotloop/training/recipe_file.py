"""Recipe files: reading TOML and YAML, overriding single values, and saying what is wrong with them."""

from __future__ import annotations

import difflib
import re
import tomllib
from typing import TYPE_CHECKING, Any, get_args

from hotloop_core.errors import ConfigError
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def read(path: Path) -> dict[str, Any]:
    """The values of a recipe file, unchecked.

    Raises:
        ConfigError: it is missing, of another kind, or not well-formed.

    """
    if path.suffix not in {".toml", ".yaml", ".yml"}:
        raise ConfigError(f"{path}: a recipe ends in .toml, .yaml or .yml, not {path.suffix!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist. A recipe says model.name, data.path and output.directory at least; "
            "`hotloop schema` prints every key."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    values = _parse_toml(path, text) if path.suffix == ".toml" else _parse_yaml(path, text)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}, expected sections such as model, data, output"
        )
    return values


def _parse_toml(path: Path, text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not well-formed TOML: {error}") from error


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_with_numbers(yaml.SafeLoader)) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not well-formed YAML: {error}") from error


def dump(values: Mapping[str, Any]) -> str:
    """Values as the text of a YAML recipe, which `read` takes for the same."""
    import yaml

    kind = _with_numbers(yaml.SafeDumper)
    return yaml.dump(dict(values), Dumper=kind, sort_keys=False, allow_unicode=True)


_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def _with_numbers(kind: type[Any]) -> type[Any]:
    """A loader or dumper of YAML 1.1 for which 2e-4 is a number, as in YAML 1.2 and TOML, and not a text."""
    made = type(kind.__name__, (kind,), {})
    made.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))
    return made


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each "section.key=value" applied, the value in TOML's notation or a bare word.

    Raises:
        ConfigError: a text without "=", or a path through something that is no section.

    """
    values = _copy(values)
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise ConfigError(f"--set {text!r}: expected section.key=value, such as lora.r=32")
        section = values
        for key in keys[:-1]:
            if section.get(key) in (None, False):
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise ConfigError(
                    f"--set {text!r}: {key!r} holds {section!r}, which has no keys inside"
                )
        section[keys[-1]] = _value(value.strip())
    return values


def _copy(values: Any) -> Any:
    return {k: _copy(v) for k, v in values.items()} if isinstance(values, dict) else values


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def beside(folder: Path, name: str) -> str:
    """`name` as an absolute path where it exists relative to `folder` (else it is a hub id, or already absolute)."""
    candidate = folder / name
    return str(candidate) if candidate.exists() else name


def explain(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: where, what is wrong, and the nearest key where the key is unknown."""
    path = [str(part) for part in problem["loc"] if not _is_branch(part)]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        keys = _keys_at(path[:-1], root)
        near = difflib.get_close_matches(path[-1], keys, n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(sorted(keys))}"
        )
        return f"{where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, found {problem['input']!r}"


_SCALARS = {"str", "int", "float", "bool"}


def _is_branch(part: object) -> bool:
    """Whether it names a union's tried branch ("float", "LoraSection"), which pydantic puts into the path."""
    text = str(part)
    return "[" in text or text.endswith("Section") or text.removeprefix("constrained-") in _SCALARS


def _keys_at(path: list[str], model: type[BaseModel]) -> list[str]:
    for key in path:
        field = model.model_fields.get(key)
        if field is not None:
            model = _model_of(field.annotation) or model
    return list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_of(arg))), None)
