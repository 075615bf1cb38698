"""Each distribution as a stranger gets it: its wheel in a fresh environment with what it declares, and nothing else.

A workspace environment hides an undeclared dependency; these do not. Versions are those of uv.lock.
"""

from __future__ import annotations

import json
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

Install = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]
PROJECTS = {
    tomllib.loads(file.read_text())["project"]["name"]: file.parent
    for file in sorted(
        [*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
    )
}
EXTRAS = tomllib.loads((ROOT / "packages/hotloop/pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
PLUGIN_EXTRAS = sorted(extra for extra in EXTRAS if f"hotloop-{extra}" in PROJECTS)
"""The others bring tools (`train`, `check`) or every plugin (`all`)."""

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
name = sys.argv[1]
package = importlib.import_module(name)
missing = {}
for found in pkgutil.walk_packages(package.__path__, name + "."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        missing[found.name] = error.name
print(json.dumps(missing))
"""
"""Prints, for each module that does not import, what it misses."""

OPTIONAL = {"hotloop": {"trl", "datasets", "matplotlib"}, "hotloop-engine": {"flash_attn"}}
"""What only an extra installs; the module that needs it is imported by the work that needs it."""


@pytest.mark.parametrize("name", PROJECTS)
def test_every_module_imports_with_the_declared_dependencies_alone(
    name: str, install: Install, run: Run
) -> None:
    done = run(install(name), "-c", IMPORT_EVERYTHING, name.replace("-", "_"))
    assert done.returncode == 0, done.stderr
    undeclared = {
        module: needed
        for module, needed in json.loads(done.stdout).items()
        if needed not in OPTIONAL.get(name, set())
    }
    assert undeclared == {}


def test_a_wheel_carries_its_types_and_its_data(wheels: Path) -> None:
    for name in PROJECTS:
        (wheel,) = wheels.glob(f"{name.replace('-', '_')}-*.whl")
        files = zipfile.ZipFile(wheel).namelist()
        assert f"{name.replace('-', '_')}/py.typed" in files
        assert not [file for file in files if "/tests/" in file]
    (wheel,) = wheels.glob("hotloop-*.whl")
    assert {"hotloop/data/quickstart.toml", "hotloop/data/hotloop_qa.jsonl"} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


@pytest.mark.parametrize("extra", PLUGIN_EXTRAS)
def test_an_extra_brings_its_own_plugin_and_no_other(
    extra: str, install: Install, run: Run, tmp_path: Path
) -> None:
    hotloop = install(f"hotloop[{extra}]").parent / "hotloop"
    listed = run(hotloop, "plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    (plugin,) = json.loads(listed.stdout)
    assert plugin["distribution"] == f"hotloop-{extra}"
    assert plugin["problem"] is None
    if plugin["families"]:
        stranger = "mistral" if extra == "gemma" else "gemma"
        (tmp_path / "config.json").write_text(json.dumps({"model_type": stranger}))
        refused = run(hotloop, "plan", str(tmp_path))
        assert refused.returncode == 1
        assert f"uv add hotloop-{stranger}" in refused.stderr
