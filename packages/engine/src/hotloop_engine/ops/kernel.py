"""What every Triton kernel of the engine needs to know about the machine it runs on."""

from __future__ import annotations

from functools import cache

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True where kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 at import)."""


@cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has; 2 for the interpreter's CPU."""
    if device.type != "cuda":
        return 2  # more than one, so that tests meet partial sums and uneven shares
    return torch.cuda.get_device_properties(device).multi_processor_count
