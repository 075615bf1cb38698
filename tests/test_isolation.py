"""Each distribution as a stranger gets it: its wheel in a fresh environment with what it declares, and nothing else.

A workspace environment hides an undeclared dependency; these do not. Versions are those of uv.lock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

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


def uv(*arguments: str | Path, environment: Path | None = None) -> str:
    variables = dict(os.environ) | ({"VIRTUAL_ENV": str(environment)} if environment else {})
    run = subprocess.run(
        ["uv", *map(str, arguments)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"uv {' '.join(map(str, arguments))}\n{run.stdout}{run.stderr}"
    return run.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheels")
    uv("build", "--all-packages", "--wheel", "--out-dir", directory)
    return directory


@pytest.fixture(scope="module")
def install(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes an environment with one requirement and what it pulls in; returns its Python."""
    constraints = tmp_path_factory.mktemp("lock") / "constraints.txt"
    constraints.write_text(
        uv(
            *("export", "--frozen", "--all-packages", "--all-extras", "--no-hashes"),
            *("--no-emit-workspace", "--no-annotate", "--no-header"),
        )
    )

    def make(requirement: str) -> Path:
        environment = tmp_path_factory.mktemp("environment") / "venv"
        uv("venv", "--python", sys.executable, environment)
        uv(
            *("pip", "install", "--find-links", wheels, "--constraints", constraints, requirement),
            environment=environment,
        )
        return environment / "bin" / "python"

    return make


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=program.parent,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize("name", PROJECTS)
def test_every_module_imports_with_the_declared_dependencies_alone(
    name: str, install: Callable[[str], Path]
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
    import zipfile

    for name in PROJECTS:
        (wheel,) = wheels.glob(f"{name.replace('-', '_')}-*.whl")
        files = zipfile.ZipFile(wheel).namelist()
        assert f"{name.replace('-', '_')}/py.typed" in files
        assert not [file for file in files if "/tests/" in file]
    (wheel,) = wheels.glob("hotloop-*.whl")
    assert {"hotloop/data/quickstart.toml", "hotloop/data/hotloop_qa.jsonl"} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"train", "all"}))
def test_an_extra_brings_its_own_plugin_and_no_other(
    extra: str, install: Callable[[str], Path], tmp_path: Path
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
