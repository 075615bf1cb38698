"""`new_family`: writes the package of a guessed family and lets the conformance kit judge it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hotloop_core import discover
from hotloop_core.errors import ConfigError, OutputExistsError
from hotloop_core.registry import KNOWN_DISTRIBUTIONS

from .guess import Guess, guess
from .render import write

_RUN = """
import sys
sys.path.insert(0, {metadata!r})
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
"""Runs pytest where the plugin's entry point is found although nothing was installed."""


@dataclass(frozen=True, kw_only=True)
class KitResult:
    """What the conformance kit said: how many checks passed, and the first line of each that did not."""

    passed: int
    failures: dict[str, str]
    output: str

    @property
    def ok(self) -> bool:
        """Whether checks ran and none failed."""
        return self.passed > 0 and not self.failures


@dataclass(frozen=True, kw_only=True)
class NewFamily:
    """A package that was written. kit: None where it was not to run."""

    directory: Path
    guess: Guess
    kit: KitResult | None


def new_family(model_type: str, directory: Path | None = None, *, kit: bool = True) -> NewFamily:
    """Writes a plugin package with a guessed description of a model type, and runs the conformance kit on it.

    Nothing is installed: the kit finds the package through metadata in a temporary folder.

    Args:
        model_type: as in a config.json, of a model that transformers has.
        directory: where to; "hotloop-MODEL_TYPE" by default. It must not exist.
        kit: whether to run the kit, which takes about ten seconds and needs hotloop-testkit.

    Raises:
        UnsupportedError: an unknown or multimodal type, or layers that no description can say; with the list of what
            is missing. Nothing was written.
        ConfigError: an installed plugin, or one of this project, has the family; or the kit is to run and is not
            installed.
        OutputExistsError: the folder exists.
    """
    claimed = [f.name for f in discover().families if model_type in f.model_types]
    if claimed:
        raise ConfigError(
            f"model_type={model_type!r} is handled by the installed family {claimed[0]!r}; there is nothing to write."
        )
    if model_type in KNOWN_DISTRIBUTIONS:
        known = KNOWN_DISTRIBUTIONS[model_type]
        raise ConfigError(
            f"model_type={model_type!r} is handled by {known}, which is not installed: `uv add {known}`."
        )
    if directory is None:
        directory = Path(f"hotloop-{model_type.replace('_', '-')}")
    if directory.exists():
        raise OutputExistsError(f"{directory} exists; name another folder with --output.")
    if kit and importlib.util.find_spec("hotloop_testkit") is None:
        raise ConfigError(
            "the conformance kit is not installed. Install it (`uv add --dev hotloop-testkit`), or write the package "
            "without judging it: --no-kit."
        )
    guessed = guess(model_type)
    write(guessed, directory)
    return NewFamily(
        directory=directory,
        guess=guessed,
        kit=run_kit(directory, guessed.family.name) if kit else None,
    )


def run_kit(directory: Path, name: str) -> KitResult:
    """Runs the tests of the package of family `name` in a fresh interpreter, as if it were installed."""
    project = directory.resolve()
    with TemporaryDirectory() as scratch:
        metadata = Path(scratch) / f"hotloop_{name}-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: hotloop-{name}\nVersion: 0.1.0\n", encoding="utf-8"
        )
        (metadata / "entry_points.txt").write_text(
            f"[hotloop]\n{name} = hotloop_{name}\n", encoding="utf-8"
        )
        report = Path(scratch) / "report.xml"
        program = _RUN.format(metadata=scratch)
        arguments = ("-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}")
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments, f"--rootdir={project}", project / "tests"],
            cwd=project
            / "src",  # where this interpreter, and those that it starts, find the module
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        if not report.exists():
            return KitResult(passed=0, failures={"pytest": output.strip()[-500:]}, output=output)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failures = {
        case.get("name", "?"): _first_line(case) for case in cases if _problem(case) is not None
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return KitResult(passed=len(cases) - len(failures) - skipped, failures=failures, output=output)


def _problem(case: ElementTree.Element) -> ElementTree.Element | None:
    failure = case.find("failure")
    return case.find("error") if failure is None else failure


def _first_line(case: ElementTree.Element) -> str:
    problem = _problem(case)
    message = "" if problem is None else problem.get("message", "")
    return " ".join(message.split())[:300]
