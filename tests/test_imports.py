"""Who may import whom, and when: what the import linter's contracts rest on."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import hotloop_core
import pytest
from hotloop_core.registry import KNOWN_DISTRIBUTIONS

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("packages/*/src/*"), *ROOT.glob("plugins/*/src/*")])
NAMES = [source.name for source in SOURCES]
HEAVY = {"torch", "transformers", "triton", "peft", "accelerate", "bitsandbytes"}
LIGHT = [name for name in NAMES if name not in {"hotloop_engine", "hotloop_testkit"}]
LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


@pytest.mark.parametrize("name", LIGHT)
def test_importing_loads_neither_torch_nor_transformers_nor_triton(name: str) -> None:
    code = f"import json, sys, {name}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & {module.partition(".")[0] for module in json.loads(run.stdout)}


def test_discovering_the_plugins_loads_neither_torch_nor_transformers_nor_triton() -> None:
    code = (
        "import json, sys, hotloop_core; hotloop_core.discover(); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[0] for module in json.loads(run.stdout)}
    assert not HEAVY & loaded
    assert {
        name for name in NAMES if (ROOT / "plugins" / name.removeprefix("hotloop_")).is_dir()
    } <= loaded


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_triton_is_imported_only_by_files_named_kernel(source: Path) -> None:
    offenders = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in source.rglob("*.py")
        if file.name != "kernel.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if "triton" in _imported(node)
    ]
    assert offenders == []


def test_the_import_linter_knows_every_package() -> None:
    assert LINTER["root_packages"] == sorted(NAMES)


def test_every_plugin_is_named_in_each_contract() -> None:
    plugins = [source.name for source in SOURCES if "plugins" in source.parts]
    layers, nothing_imports, light = LINTER["contracts"]
    assert layers["layers"][2] == " | ".join(["hotloop_engine", *plugins])
    assert nothing_imports["forbidden_modules"] == plugins
    assert light["source_modules"] == ["hotloop_core", *plugins]


def _imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return {node.module.partition(".")[0]}
    return set()


def test_every_family_of_this_workspace_is_named_to_whoever_lacks_it() -> None:
    registry = hotloop_core.discover()
    handled = {
        model_type: plugin.distribution
        for plugin in registry.plugins
        for family in plugin.families
        for model_type in family.model_types
    }
    assert dict(KNOWN_DISTRIBUTIONS) == handled
