"""The numeric standard of Hotloop: against higher-precision truth, no worse than eager PyTorch in the same dtype."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error that counts as exact for a dtype: about the rounding of one stored result."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in fp64; infinite for NaN, infinity or another shape; 0 / 0 is 0."""
    if value.shape != truth.shape:
        return float("inf")
    value64, truth64 = value.detach().double(), truth.detach().double()
    if not bool(torch.isfinite(value64).all()):
        return float("inf")
    distance, size = (value64 - truth64).norm(), truth64.norm()
    if float(distance) == 0.0:
        return 0.0
    return float(distance / size) if float(size) else float("inf")


def assert_no_worse_than(
    ours: Mapping[str, Tensor | None],
    eager: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    *,
    slack: float = 0.05,
    floor: float | None = None,
) -> None:
    """Fails where our error passes max(floor, (1 + slack) x eager's error), naming each tensor and both errors.

    The three mappings name the same tensors (outputs and gradients); None must be None in all three.
    `floor` defaults to the rounding of the eager tensor's dtype, so an eager path that happens to round exactly does
    not make every other correct rounding a failure.
    """
    if not (ours.keys() == eager.keys() == truth.keys()):
        raise AssertionError(
            f"compared sets differ: {sorted(ours)}, {sorted(eager)}, {sorted(truth)}"
        )
    failures: list[str] = []
    for name, mine in ours.items():
        theirs, exact = eager[name], truth[name]
        if mine is None or theirs is None or exact is None:
            if not (mine is None and theirs is None and exact is None):
                failures.append(f"{name}: present in one, missing in another")
            continue
        allowed = max(
            FLOOR.get(theirs.dtype, 0.0) if floor is None else floor,
            (1 + slack) * relative_error(theirs, exact),
        )
        error = relative_error(mine, exact)
        if not error <= allowed:
            failures.append(f"{name}: error {error:.3e}, allowed {allowed:.3e}")
    if failures:
        raise AssertionError("worse than eager:\n  " + "\n  ".join(failures))


@contextmanager
def poisoned_buffers() -> Generator[None]:
    """Inside, torch.empty and its kin return memory filled with NaN (or the dtype's largest integer).

    An op that forgets to write an element, or reads one before writing it, then shows it.
    """

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            return poison(function(*args, **kwargs))

        return poisoned

    names = ("empty", "empty_like", "empty_strided")
    factories: dict[str, Any] = {name: wrap(getattr(torch, name)) for name in names}
    with (
        mock.patch.multiple(torch, **factories),
        mock.patch.object(Tensor, "new_empty", wrap(Tensor.new_empty)),
    ):
        yield
