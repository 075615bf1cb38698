"""Inverted dropout as a function of a seed: the mask is drawn again in backward, never saved."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, *, p: float, seed: int) -> Tensor:
    """x / (1 - p) where a Bernoulli(1 - p) draw says keep, else 0. The same seed and shape give the same mask."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    keep.bernoulli_(1.0 - p, generator=generator)
    return (x.float() * keep.div_(1.0 - p)).to(x.dtype)
