"""Stops a run whose gradients teach nothing or ruin the weights, and says which parameters show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import GradientError

if TYPE_CHECKING:
    from torch import Tensor, nn

_SCALER_PATIENCE = 20
"""fp16's loss scale starts at 2**16 and halves at each overflow; a sound run overflows fewer times than this."""


class GradientWatch:
    """Looks at every trained parameter's gradient once per optimizer step, before clipping and stepping.

    `observe` only starts the norms on the device; `check` waits for them, one synchronisation a step.
    """

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled
        self._overflows = 0
        self._names: list[str] = []
        self._norms: Tensor | None = None
        self._moved: Tensor | None = None

    def observe(self, model: nn.Module) -> None:
        """Takes the norm of each gradient, as backward left it.

        Raises:
            GradientError: parameters that train have no gradient at all.

        """
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        missing = [name for name, p in trained if p.grad is None]
        if missing:
            raise GradientError(
                f"{_listed(missing)} of {len(trained)} trained parameters got no gradient: the loss does not depend "
                "on them. Check that the model uses them and that nothing in forward detaches."
            )
        self._names = [name for name, _ in trained]
        self._norms = torch.stack(
            torch._foreach_norm([p.grad for _, p in trained if p.grad is not None], float("inf"))
        )

    def check(self, step: int) -> None:
        """Judges what `observe` saw last.

        Raises:
            GradientError: a gradient is not finite, or all are exactly zero.

        """
        assert self._norms is not None, "check() before observe()"
        norms = self._norms.float().cpu()
        self._moved = norms != 0 if self._moved is None else self._moved | (norms != 0)
        bad = [
            name for name, ok in zip(self._names, norms.isfinite().tolist(), strict=True) if not ok
        ]
        if bad:
            self._overflows += 1
            if self._scaled and self._overflows < _SCALER_PATIENCE:
                return  # GradScaler skips this step and lowers its scale
            raise GradientError(
                f"step {step}: the gradients of {_listed(bad)} of {len(self._names)} parameters are not finite. "
                "Nothing was stepped. Lower schedule.learning_rate, or look for bad values in the last rows."
            )
        self._overflows = 0
        if not bool((norms != 0).any()):
            raise GradientError(
                f"step {step}: all {len(self._names)} gradients are exactly zero ({_listed(self._names)}), so nothing "
                "is learnt. Check that the batch has trained tokens and that the adapter is active."
            )

    @property
    def idle(self) -> list[str]:
        """Parameters whose gradient was zero in every step so far."""
        if self._moved is None:
            return []
        return [
            name for name, moved in zip(self._names, self._moved.tolist(), strict=True) if not moved
        ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{len(names)} ({shown}{', ...' if len(names) > 5 else ''})"
