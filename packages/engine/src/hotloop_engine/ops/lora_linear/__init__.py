"""y = x W^T + b + s · dropout(x) A^T B^T for one projection or a group that shares x, with its gradients."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import ConfigError
from torch import Tensor
from torch.autograd.function import once_differentiable

from hotloop_engine.ops._select import CUDA, EVERYWHERE, register

from .group import LinearGroup
from .sink import GradientSink, add_gradient
from .views import LinearView, Lora

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "GradientSink",
    "LinearGroup",
    "LinearView",
    "Lora",
    "add_gradient",
    "lora_linear",
]

for _op in ("lora_linear", "adapter_gradients"):  # what groups are made of; not chosen one by one
    _folder = f"hotloop_engine.ops.{_op}"
    register(_op, "triton", partial(import_module, f"{_folder}.kernel"), CUDA)
    register(_op, "reference", partial(import_module, f"{_folder}.reference"), EVERYWHERE)


def lora_linear(x: Tensor, views: Sequence[LinearView]) -> Tensor:
    """The projections of x side by side.

    Args:
        x: [..., K] in the compute dtype.
        views: projections with the same K; weights in 16, 32 or 4 bits, adapters in any floating dtype.

    Returns:
        [..., N1 + N2 + ...]: the outputs in the order of `views`.

    Raises:
        ConfigError: no views, or shapes that do not fit each other.

    """
    _require_fit(x, views)
    group = LinearGroup(views, x.dtype, x.device)
    seeds = draw_seeds(group)
    x_TK = x.reshape(-1, group.k)
    y_TN = _LoraLinear.apply(group, seeds, x_TK, *group.tensors())
    return y_TN.view(*x.shape[:-1], group.n)


def _require_fit(x: Tensor, views: Sequence[LinearView]) -> None:
    if not views:
        raise ConfigError("lora_linear: no projections; pass one view or more.")
    for number, view in enumerate(views):
        n, k = view.shape
        found = {"x": x.shape[-1:], "weight": (n, k)}
        expected = {"x": (k,), "weight": (n, k)}
        if view.bias is not None:
            found["bias"], expected["bias"] = view.bias.shape, (n,)
        if view.lora is not None:
            found["A"], expected["A"] = view.lora.a_RK.shape, (view.lora.rank, k)
            found["B"], expected["B"] = view.lora.b_NR.shape, (n, view.lora.rank)
        if wrong := [name for name in found if tuple(found[name]) != expected[name]]:
            raise ConfigError(
                f"lora_linear: projection {number} has "
                + ", ".join(f"{name} {tuple(size)}" for name, size in found.items())
                + f"; expected {', '.join(f'{name} {expected[name]}' for name in wrong)}."
            )


def draw_seeds(group: LinearGroup) -> tuple[int, ...]:
    """One seed for each projection's dropout mask, from torch's own CPU generator; none where nothing drops."""
    if not group.drops:
        return ()
    return tuple(torch.randint(2**31 - 1, (len(group.views),)).tolist())


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: LinearGroup, seeds: tuple[int, ...], x_TK: Tensor, *tensors: Tensor
    ) -> Tensor:
        wide = group.wide(x_TK.shape[0])
        wide[:, : group.k] = x_TK
        y_TN, t_TR = group.forward(wide, group.extend(x_TK.shape[0]), seeds=seeds)
        ctx.group, ctx.seeds, ctx.tensors, ctx.has_t = group, seeds, tensors, t_TR is not None
        ctx.save_for_backward(x_TK, *(() if t_TR is None else (t_TR,)))
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        group: LinearGroup = ctx.group
        x_TK, *rest = ctx.saved_tensors
        wide = group.wide(dy_TN.shape[0], backward=True)
        wide[:, : group.n] = dy_TN
        sink: GradientSink = {}
        dx_TK = group.backward(
            wide,
            x_TK,
            rest[0] if ctx.has_t else None,
            group.extend(dy_TN.shape[0], backward=True),
            sink,
            need_dx=ctx.needs_input_grad[2],
            seeds=ctx.seeds,
        )
        gradients = (sink.get(id(tensor)) for tensor in ctx.tensors)
        found = (
            None if g is None else g.to(t.dtype)
            for g, t in zip(gradients, ctx.tensors, strict=True)
        )
        return (None, None, dx_TK, *found)
