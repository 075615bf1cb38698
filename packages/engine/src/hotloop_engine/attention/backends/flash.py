"""PyTorch's own FlashAttention 2 kernel, as `torch.nn.attention.varlen` calls it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hotloop_engine.attention.interface import (
    HALF,
    Backend,
    Capability,
    Gradients,
    Inputs,
    Request,
    aligned,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_aten = torch.ops.aten
# Its backward for large heads needs more shared memory than these cards have.
_SMALL_CARDS = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})


class Flash(Backend):
    """Packed and dense alike, with windows; no soft cap."""

    name = "flash"
    capability = Capability(
        devices=frozenset({"cuda"}),
        dtypes=HALF,
        head_sizes=(8, 256, 8),
        compute_capability=((8, 0), (12, 1)),
        softcap=False,
    )

    def refusal(self, request: Request, device: torch.device) -> str | None:
        """As every backend, and the head sizes that smaller cards cannot run backward."""
        if reason := super().refusal(request, device):
            return reason
        found = torch.cuda.get_device_capability(device)
        if found in _SMALL_CARDS and 192 < request.head_size <= 224:
            return f"no backward for head size {request.head_size} on this card"
        return None

    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        o_THK, lse_HT, *_ = _aten._flash_attention_forward(
            *(aligned(x) for x in inputs.qkv),
            inputs.sequences.cu_seqlens,
            inputs.sequences.cu_seqlens,
            inputs.sequences.longest,
            inputs.sequences.longest,
            0.0,
            inputs.window is None,
            False,
            scale=inputs.scale,
            **_window(inputs),
        )
        return o_THK, lse_HT

    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        unused_rng = torch.zeros(2, dtype=torch.uint64, device=inputs.q_THK.device)
        unused = torch.empty(0, device=inputs.q_THK.device)
        with _determinism(inputs.deterministic):
            return _aten._flash_attention_backward(
                do_THK.contiguous(),
                *(aligned(x) for x in inputs.qkv),
                o_THK.contiguous(),
                lse,
                inputs.sequences.cu_seqlens,
                inputs.sequences.cu_seqlens,
                inputs.sequences.longest,
                inputs.sequences.longest,
                0.0,
                inputs.window is None,
                unused_rng,
                unused,
                scale=inputs.scale,
                **_window(inputs),
            )


def _window(inputs: Inputs) -> dict[str, int]:
    # Theirs counts the tokens before this one; -1 is no limit.
    left = -1 if inputs.window is None else inputs.window - 1
    return {"window_size_left": left, "window_size_right": 0}


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """The kernel reads PyTorch's process-wide switch and has no argument; set it for this call.

    A switch that the user has set already is left on. Filling fresh memory is left off: it would
    only cost time, since the kernel writes what it returns.
    """
    if not wanted or (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    enabled = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic  # a module whose attributes are made at run time
    fill = switches.fill_uninitialized_memory
    switches.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        switches.fill_uninitialized_memory = fill
