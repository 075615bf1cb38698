"""A guess as the files of a package."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import TYPE_CHECKING, Any

from hotloop_core import FamilySpec

if TYPE_CHECKING:
    from pathlib import Path

    from .guess import Guess

_PROJECT = """\
[project]
name = "hotloop-{dash}"
version = "0.1.0"
description = "The {name} family for Hotloop."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["hotloop-core>=0.1,<0.2"]

[project.entry-points.hotloop]
{name} = "hotloop_{name}"

[dependency-groups]
dev = ["hotloop-testkit>=0.1,<0.2", "hotloop-safetensors>=0.1,<0.2"]

[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["src/hotloop_{name}"]
"""
_README = """\
# hotloop-{dash}

The {name} family for Hotloop. `uv pip install .` makes it known, `uv run pytest` runs the conformance kit.

Guessed by `hotloop new-family {name}` from transformers' model. Look at these before you rely on it:

{notes}
"""
_MODULE = '''\
"""The {name} family for Hotloop."""

from __future__ import annotations

from hotloop_core import (
{imports}
)

{constant} = {spec}


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """{title}."""
    return [{constant}]
'''
_TEST = """\
from __future__ import annotations

from hotloop_{name} import {constant}
from hotloop_testkit.family import FamilyConformance
from transformers import {config}


class Test{title}(FamilyConformance):
    spec = {constant}

    def tiny_config(self):
        return {config}(
{arguments}
        )
"""


def files(guess: Guess) -> dict[str, str]:
    """Path within the package -> text."""
    name = guess.family.name
    constant = name.upper()
    title = "".join(part.capitalize() for part in name.split("_"))
    used: set[str] = {"FamilySpec", "hookimpl"}
    spec = _source(guess.family, used)
    names = sorted(used, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    fields = {
        "name": name,
        "dash": name.replace("_", "-"),
        "constant": constant,
        "title": title,
        "spec": spec,
        "imports": "\n".join(f"    {each}," for each in names),
        "config": guess.tiny.config_class.__name__,
        "arguments": "\n".join(
            f"            {key}={value!r}," for key, value in guess.tiny.arguments.items()
        ),
        "notes": "\n".join(f"- {note}" for note in guess.notes),
    }
    package = f"src/hotloop_{name}"
    return {
        "pyproject.toml": _PROJECT.format_map(fields),
        "README.md": _README.format_map(fields),
        f"{package}/__init__.py": _MODULE.format_map(fields),
        f"{package}/py.typed": "",
        f"tests/test_{name}_family.py": _TEST.format_map(fields),
    }


def write(guess: Guess, directory: Path) -> None:
    """Writes the package into a new folder."""
    for path, text in files(guess).items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _source(value: Any, used: set[str]) -> str:
    """A description as Python that makes it, without what is as it is by default."""
    if isinstance(value, frozenset):
        return f"frozenset({{{', '.join(json.dumps(each) for each in sorted(value))}}})"
    if isinstance(value, dict) and value:
        entries = ",\n".join(f"{json.dumps(k)}: {_source(v, used)}" for k, v in value.items())
        return f"{{\n{textwrap.indent(entries, '    ')},\n}}"
    if isinstance(value, str):
        return json.dumps(value)
    if not dataclasses.is_dataclass(value):
        return repr(value)
    kind = type(value).__name__
    used.add(kind)
    lines: list[str] = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if own == field.default or (
            field.default_factory is not dataclasses.MISSING and own == field.default_factory()
        ):
            continue
        if isinstance(value, FamilySpec) and field.name == "api":
            used.add("API")
            text = "API"
        else:
            text = _source(own, used)
        lines.append(f"{field.name}={text},")
    if not lines:
        return f"{kind}()"
    return f"{kind}(\n{textwrap.indent(chr(10).join(lines), '    ')}\n)"
