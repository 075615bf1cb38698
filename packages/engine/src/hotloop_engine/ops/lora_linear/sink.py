"""Where the gradients of parameters gather during a backward pass."""

from __future__ import annotations

from torch import Tensor

GradientSink = dict[int, Tensor]
"""id of a parameter -> its gradient, added up where a parameter occurs twice."""


def add_gradient(sink: GradientSink, parameter: Tensor, gradient: Tensor) -> None:
    """Adds to what is known of a parameter's gradient, if it wants one."""
    if parameter.requires_grad:
        known = sink.get(id(parameter))
        sink[id(parameter)] = gradient if known is None else known + gradient
