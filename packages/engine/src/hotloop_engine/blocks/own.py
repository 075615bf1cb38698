"""Runs a family's own block (`hotloop_core.blocks`) among ours: its norms, residual and projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hotloop_engine.ops.lora_linear import GradientSink, LinearGroup, add_gradient, draw_seeds

from .context import BlockContext, Norm, NormView, Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hotloop_core import ModelFacts
    from hotloop_core.blocks import Block as FamilyBlock
    from hotloop_core.blocks import BlockCall, Kept
    from torch import Tensor, nn

    from .attend import Attend


class OwnLinear:
    """A `hotloop_core.blocks.Linear`: one projection as a group of its own."""

    def __init__(self, group: LinearGroup, call: Call) -> None:
        self.group, self._call = group, call
        self._seeds = draw_seeds(group)

    def forward(self, x_TK: Tensor) -> tuple[Tensor, Kept]:
        """Returns (y_TN, the adapter's inner product, where there is one)."""
        group, tokens = self.group, x_TK.shape[0]
        y_TN, t_TR = group.forward(
            _in_first_columns(x_TK, group.width(tokens)), group.extend(tokens), seeds=self._seeds
        )
        return y_TN, () if t_TR is None else (t_TR,)

    def backward(
        self, dy_TN: Tensor, x_TK: Tensor, kept: Kept, *, need_dx: bool = True
    ) -> Tensor | None:
        """Returns dx_TK; parameters' gradients go to the pass at hand."""
        group, tokens = self.group, x_TK.shape[0]
        return group.backward(
            _in_first_columns(dy_TN, group.width(tokens, backward=True)),
            x_TK,
            kept[0] if kept else None,
            group.extend(tokens, backward=True),
            self._call.sink,
            need_dx=need_dx,
            seeds=self._seeds,
        )


def _in_first_columns(x: Tensor, width: int) -> Tensor:
    """x with room behind it for the adapters' columns, which ride in the GEMM."""
    if width == x.shape[1]:
        return x
    wide = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide


@dataclass(kw_only=True, eq=False)
class Call:
    """A `hotloop_core.blocks.BlockCall`.

    groups: role -> the projection as a group. modules: path -> module of the description's `parameters`.
    sink: where gradients go, during backward.
    """

    context: BlockContext
    facts: ModelFacts
    layer: int
    cos_PR: Tensor
    sin_PR: Tensor
    attend: Attend
    groups: Mapping[str, LinearGroup]
    modules: Mapping[str, nn.Module]
    sink: GradientSink = field(default_factory=dict[int, "Tensor"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the GEMMs and of attention."""
        return self.context.dtype

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self.context.device

    def linear(self, role: str) -> OwnLinear:
        """A projection by its role."""
        return OwnLinear(self.groups[role], self)

    def module(self, path: str) -> nn.Module:
        """One of the description's `parameters`."""
        return self.modules[path]

    def op(self, name: str) -> Any:
        """The implementation that runs here."""
        return self.context.op(name)

    def add_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds to a parameter's gradient."""
        add_gradient(self.sink, parameter, gradient)


class OwnBlock:
    """A family's block between this layer's norms, from the residual stream to the residual stream.

    Saved by name: what the block keeps, whole; and its output where a norm follows.
    """

    def __init__(
        self,
        make: Callable[[BlockCall], FamilyBlock],
        call: Call,
        *,
        part: str,
        input_name: str,
        norm: NormView | None,
        after: NormView | None,
    ) -> None:
        self.input_name = input_name
        self._kept, self._out = f"own_{part}", f"{part}_out"
        self.names: tuple[str, ...] = (self._kept, self._out)
        self.call, self.context = call, call.context
        self.norm = None if norm is None else Norm(norm, call.context)
        self.after = None if after is None else Norm(after, call.context)
        self._views = [view for view in (norm, after) if view is not None]
        self.block = make(call)

    def tensors(self) -> list[Tensor]:
        """Every tensor that autograd may ask a gradient for."""
        found = [tensor for view in self._views for tensor in view.tensors()]
        found += [tensor for group in self.call.groups.values() for tensor in group.tensors()]
        return found + [p for module in self.call.modules.values() for p in module.parameters()]

    def forward(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """Returns the residual stream behind the block; fills `saved`."""
        z_TD, saved[self._kept] = self.block.forward(self._normed(x_TD)[0])
        return self._add(z_TD, x_TD, saved)

    def restore_output(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """The residual stream behind the block again."""
        if self._out in saved:
            return self._add(saved[self._out], x_TD, saved)
        return self.forward(x_TD, saved)

    def again(self, saved: Saved, *, output: bool) -> tuple[str, ...]:
        """Nothing: there are no small tensors but the norm's statistics, which go with its input."""
        name = f"_statistics_{self._out}"
        return (name,) if name in saved and self._out not in saved else ()

    def identity(self) -> None:
        """None: what a family's own block queues is not known here."""
        return

    def gradient_room(self, tokens: int, dtype: torch.dtype) -> Tensor | None:
        """None: the gradient may lie anywhere."""
        return None

    def backward(
        self,
        dy_TD: Tensor,
        x_TD: Tensor,
        saved: Saved,
        sink: GradientSink,
        *,
        need_dx: bool,
        room: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Returns dx; runs forward again where what it kept, or what the norm behind it needs, is gone."""
        h_TD, statistics = self._normed(x_TD)
        if self._kept not in saved or (self.after is not None and self._out not in saved):
            z_TD, saved[self._kept] = self.block.forward(h_TD)
            self._add(z_TD, x_TD, saved)
            del z_TD
        dz_TD = self._output_gradient(dy_TD, saved, sink)
        trains = self.norm is not None and any(
            tensor.requires_grad for tensor in self.norm.view.tensors()
        )
        self.call.sink = sink
        dh_TD = self.block.backward(dz_TD, h_TD, saved.pop(self._kept), need_dh=need_dx or trains)
        if dh_TD is None:
            return None
        if self.norm is None:
            return torch.add(dy_TD, dh_TD.to(dy_TD.dtype), out=out)
        return self.norm.backward(dh_TD, x_TD, statistics, sink, dresidual=dy_TD, out=out)

    def _normed(self, x_TD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.norm is None:
            return x_TD.to(self.context.dtype), ()
        h_TD, statistics = self.norm.forward(x_TD)
        return h_TD.to(self.context.dtype), statistics

    def _add(self, z_TD: Tensor, x_TD: Tensor, saved: Saved) -> Tensor:
        if self.after is not None:
            saved[self._out] = z_TD
            z_TD, saved[f"_statistics_{self._out}"] = self.after.forward(z_TD)
        return torch.add(x_TD, z_TD, alpha=self.context.residual_scale)

    def _output_gradient(self, dy_TD: Tensor, saved: Saved, sink: GradientSink) -> Tensor:
        """The gradient of the block's output, through the scale and the norm behind it."""
        scale = self.context.residual_scale
        dz_TD = dy_TD if scale == 1.0 else dy_TD * scale
        if self.after is not None:
            z_TD = saved.pop(self._out)
            statistics = saved.pop(f"_statistics_{self._out}")
            dz_TD = self.after.backward(dz_TD.to(z_TD.dtype), z_TD, statistics, sink)
        return dz_TD.to(self.context.dtype)
