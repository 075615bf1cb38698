"""Homes of frozen weights: streamed layers, and the embedding and the output head in host memory.

`settle` carries out what a plan says of weights. A module whose weight lives on the host keeps it as its parameter
(`parameters()`, `state_dict()`, merging and export see the true tensor there), and `module.weight` is the weight on
the device, for as long as it is there.
"""

from __future__ import annotations

from .homes import Homes
from .settling import carried_out, homes_of, move_more, settle
from .weights import device_weight

__all__ = ["Homes", "carried_out", "device_weight", "homes_of", "move_more", "settle"]
