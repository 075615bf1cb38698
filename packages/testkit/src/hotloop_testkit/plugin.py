"""What pytest loads where the kit is installed: a marker and a fixture for a plugin author's own tests.

torch is imported when used, since every run of pytest in that environment loads this module.
"""

from __future__ import annotations

import pytest


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


@pytest.fixture
def seeded() -> int:
    """torch's random state as after `torch.manual_seed(0)`; the seed."""
    import torch

    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    return 0
