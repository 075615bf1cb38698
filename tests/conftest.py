"""Wheels of every distribution, fresh environments, and the projects that the documentation holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Install = Callable[..., Path]


def uv(*arguments: str | Path, environment: Path | None = None) -> str:
    """Runs uv in the workspace, or for one environment; returns what it printed."""
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


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of every distribution of the workspace."""
    directory = tmp_path_factory.mktemp("wheels")
    uv("build", "--all-packages", "--wheel", "--out-dir", directory)
    return directory


@pytest.fixture(scope="session")
def install(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Makes an environment with some requirements and what they pull in, in uv.lock's versions; returns its Python."""
    constraints = tmp_path_factory.mktemp("lock") / "constraints.txt"
    constraints.write_text(
        uv(
            *("export", "--frozen", "--all-packages", "--all-extras", "--no-hashes"),
            *("--no-emit-workspace", "--no-annotate", "--no-header"),
        )
    )

    def make(*requirements: str | Path) -> Path:
        environment = tmp_path_factory.mktemp("environment") / "venv"
        uv("venv", "--python", sys.executable, environment)
        uv(
            *("pip", "install", "--find-links", wheels, "--constraints", constraints),
            *requirements,
            environment=environment,
        )
        return environment / "bin" / "python"

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of an environment far from the workspace, without its variables."""

    def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=program.parent,
            env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
        )

    return run


@pytest.fixture(scope="session")
def project_of() -> Callable[[Path, Path], list[Path]]:
    """Writes what a page holds as files (blocks that begin with a comment `# some/path`) into a folder."""

    def write(page: Path, folder: Path) -> list[Path]:
        written: list[Path] = []
        blocks = re.findall(
            r"^```(?:python|toml)\n# (\S+/\S+)\n(.*?)^```$",
            page.read_text(),
            re.DOTALL | re.MULTILINE,
        )
        for name, text in blocks:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.append(path)
        return written

    return write
