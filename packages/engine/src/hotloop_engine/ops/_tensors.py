"""What every op does to tensors before and after its arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which dtype an op on x computes: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def stored(value: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The result, rounded once: in `out`, whatever its dtype, or in new memory of `dtype`."""
    return value.to(dtype) if out is None else out.copy_(value)


def unit_last(x: Tensor) -> Tensor:
    """Returns x, or a copy where its last dimension is not contiguous, as in expanded gradients."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """Returns x as [tokens, last dimension], a view wherever its strides allow one."""
    return unit_last(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
