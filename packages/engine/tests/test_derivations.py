"""Each derivation stands beside its kernel and in the documentation."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "packages" / "engine" / "src" / "hotloop_engine"


def test_the_documentation_includes_every_derivation_that_there_is() -> None:
    page = (ROOT / "docs" / "derivations.md").read_text()
    there = {str(Path("..") / file.relative_to(ROOT)) for file in ENGINE.rglob("derivation.md")}
    included = {
        line.removeprefix("```{include} ") for line in page.splitlines() if "{include}" in line
    }
    assert included == there
