"""Inverted dropout as a function of a seed: the mask is drawn again in backward, never saved."""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop_engine.ops._tensors import compute_dtype


def forward(x: Tensor, *, p: float, seed: int) -> Tensor:
    """x / (1 - p) where a Bernoulli(1 - p) draw says keep, else 0. The same seed and shape give the same mask."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    keep.bernoulli_(1.0 - p, generator=generator)
    return torch.where(keep, x.to(compute_dtype(x)) / (1.0 - p), 0.0).to(x.dtype)
