"""What pytest loads where the kit is installed: a marker and a fixture, and a check that no check was switched off.

torch is imported when used, since every run of pytest in that environment loads this module.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker `gpu`."""
    config.addinivalue_line(
        "markers", "gpu: needs a CUDA device; skipped where there is none (hotloop-testkit)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a check of the kit that was skipped, or expected to fail by others than itself."""
    report = yield
    conformance: Any = sys.modules.get("hotloop_testkit.conformance")
    if conformance is None or call.when == "teardown":  # no suite was imported, or it was judged
        return report
    how = conformance.switched_off(item, None if call.excinfo is None else call.excinfo.value)
    if how is not None:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid}: {how} switches off a check of the kit. Keep it; where it cannot pass, override it with "
            "@pytest.mark.xfail(reason=...) and call super()"
        )
        vars(report).pop("wasxfail", None)
    return report


@pytest.fixture
def seeded() -> int:
    """torch's random state as after `torch.manual_seed(0)`; the seed."""
    import torch

    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    return 0
