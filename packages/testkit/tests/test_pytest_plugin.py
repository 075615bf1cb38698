"""The kit's pytest plugin, in a project of a stranger."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import torch

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
TESTS = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    import torch
    assert torch.cuda.is_available()

def test_a_seed(seeded):
    import torch
    first = torch.rand(3)
    torch.manual_seed(seeded)
    assert torch.equal(torch.rand(3), first)
"""


def entry_points() -> dict[str, str]:
    return tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["pytest11"]


def pytest_in(folder: Path, *arguments: str) -> str:
    # Named with -p and found under no entry point: the same whether or not this checkout's metadata is current.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-markers", "-p", *arguments],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_the_entry_point_names_a_module_of_the_kit():
    assert entry_points() == {"hotloop": "hotloop_testkit.plugin"}
    importlib.import_module(entry_points()["hotloop"])


def test_a_stranger_has_the_gpu_marker_and_a_seed(tmp_path):
    (tmp_path / "test_theirs.py").write_text(TESTS)
    found = pytest_in(tmp_path, entry_points()["hotloop"])
    outcome = "2 passed" if torch.cuda.is_available() else "1 passed, 1 skipped"
    assert outcome in found, found
    assert "'gpu' not found in `markers`" in pytest_in(tmp_path, "no:cacheprovider")


def test_the_plugin_alone_imports_no_torch(tmp_path):
    (tmp_path / "test_light.py").write_text(
        "import sys\ndef test_light(): assert 'torch' not in sys.modules\n"
    )
    found = pytest_in(tmp_path, entry_points()["hotloop"])
    assert "1 passed" in found, found
