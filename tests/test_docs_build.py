"""The documentation builds without a warning, and its reference has something to say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="needs the docs group: sphinx")
pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("html")
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, built],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return built


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda p: p.stem)
def test_every_object_on_a_reference_page_is_documented(page: Path, html: Path) -> None:
    rendered = (html / "reference" / f"{page.stem}.html").read_text()
    directives = re.findall(r"^\.\. auto(\w+):: ([\w.]+)$", page.read_text(), re.MULTILINE)
    for kind, name in directives:
        last = name.rsplit(".", 1)[-1]
        target = rf'id="module-{name}"' if kind == "module" else rf'id="[\w.]*\b{last}"|>{last}<'
        assert re.search(target, rendered), name
    described = re.findall(r'<dt class="sig.*?</dt>\s*<dd>(.*?)</dd>', rendered, re.DOTALL)
    assert len(described) >= len([kind for kind, _ in directives if kind != "module"])
    assert all(re.sub(r"<[^>]*>", "", text).strip() for text in described)


def test_every_public_name_has_its_place_in_the_reference() -> None:
    import hotloop
    import hotloop_core

    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    missing = [
        f"{module.__name__}.{name}"
        for module in (hotloop, hotloop_core)
        for name in module.__all__
        if not re.search(rf"\b{name}\b", text)
    ]
    assert missing == []
