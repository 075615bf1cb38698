"""The kit's pytest plugin, in a project of a stranger."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
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
SUITE = """
import pytest
from hotloop_testkit.conformance import Conformance, NotInstalledError

class Suite(Conformance, kit=True):
    def test_two_layers(self):
        assert self.layers() > 1

    def test_a_format(self):
        raise NotInstalledError("no exporter")

    def layers(self):
        return 2
"""
SWITCHED_OFF = {
    "a skip (later)": "class TestMine(Suite):\n    def layers(self): pytest.skip('later')",
    "pytest.xfail('later')": "class TestMine(Suite):\n    def layers(self): pytest.xfail('later')",
    "a skip (all of it)": "pytestmark = pytest.mark.skip(reason='all of it')\nclass TestMine(Suite): pass",
    "an xfail mark": "pytestmark = pytest.mark.xfail(reason='all of it')\nclass TestMine(Suite): pass",
    "a skip (not here)": (
        "class TestMine(Suite):\n    @pytest.fixture(autouse=True)\n    def no(self): pytest.skip('not here')"
    ),
}


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


@pytest.mark.slow
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


@pytest.mark.parametrize("how", SWITCHED_OFF)
def test_a_check_that_was_switched_off_where_it_runs_fails(how, tmp_path):
    (tmp_path / "suite.py").write_text(SUITE)
    (tmp_path / "test_theirs.py").write_text(
        f"import pytest\nfrom suite import Suite\n{SWITCHED_OFF[how]}\n"
    )
    found = pytest_in(tmp_path, entry_points()["hotloop"], "-k", "two_layers")
    assert how in found and "switches off a check of the kit" in found, found
    assert "1 failed" in found or "1 error" in found, found  # a mark is an error of the set-up


def test_a_format_that_is_not_installed_and_a_test_of_ones_own_are_skipped(tmp_path):
    (tmp_path / "suite.py").write_text(SUITE)
    (tmp_path / "test_theirs.py").write_text(
        "import pytest\nfrom suite import Suite\nclass TestMine(Suite):\n"
        "    def test_of_my_own(self): pytest.skip('later')\n"
        "    @pytest.mark.xfail(reason='one layer', strict=True)\n"
        "    def test_two_layers(self): super().test_two_layers()\n"
        "    def layers(self): return 1\n"
    )
    found = pytest_in(tmp_path, entry_points()["hotloop"])
    assert "1 passed, 2 skipped, 1 xfailed" in found, found
