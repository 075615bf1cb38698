"""What both blocks share: the compute dtype, op implementations, norms, and the tensors that wait for backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.adapter_gradients.reference import ColumnScale
from hotloop_engine.ops.lora_linear import add_gradient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotloop_engine.ops.lora_linear import GradientSink, LinearGroup

Saved = dict[str, Any]
"""Name -> what backward needs: the tensors of `hotloop_core.plan.saved_tensors` under their names, and small ones
(norm statistics, adapter inputs, dropout seeds) under names that begin with an underscore, which no plan moves."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NormView:
    """A norm at the moment of a call. kind: "rms" or "layer"; the weight multiplies as (offset + w)."""

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float
    offset: float = 0.0
    kind: Literal["rms", "layer"] = "rms"

    def tensors(self) -> list[Tensor]:
        """Every tensor that autograd may ask a gradient for."""
        return [t for t in (self.weight, self.bias) if t is not None]

    def identity(self) -> tuple[object, ...]:
        """What must be equal, tensors apart, for what was recorded of it to hold."""
        return self.kind, self.eps, self.offset, self.weight is None, self.bias is None


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockContext:
    """How a block computes.

    dtype: of the GEMMs and of attention; the residual stream keeps its own (fp32 for an fp32 model under autocast).
    ops: op name -> implementation name, where the default for the device is not wanted.
    residual_scale: multiplies the block's output before it is added to the residual stream.
    tile: tokens that norms, projections and the MLP take at once, None for all; attention always takes all.
    """

    dtype: torch.dtype
    device: torch.device
    ops: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    residual_scale: float = 1.0
    tile: int | None = None

    def tiles(self, tokens: int) -> list[slice | None]:
        """Rows to take at once, one after the other; [None] for all of them."""
        if self.tile is None or tokens <= self.tile:
            return [None]
        return [slice(i, min(i + self.tile, tokens)) for i in range(0, tokens, self.tile)]

    def op(self, name: str) -> Any:
        """The implementation of an op, as `hotloop_core.kernels` declares it."""
        return implementation(name, self.device, self.ops.get(name))


def together(*identities: tuple[object, ...] | None) -> tuple[object, ...] | None:
    """All of them, or None where one is None: what holds that cannot be recorded."""
    return None if None in identities else identities


def cut(value: Any, rows: slice | None) -> Any:
    """The rows of a tensor, of each tensor of a tuple, or of nothing; all of them for None."""
    if rows is None or value is None:
        return value
    return tuple(v[rows] for v in value) if isinstance(value, tuple) else value[rows]


def join(parts: list[Any]) -> Any:
    """The parts that `cut` rows gave, one below the other."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def seeds_of(seeds: tuple[int, ...], rows: slice | None) -> tuple[int, ...]:
    """Dropout seeds for a tile: its masks must not be those of the tile before."""
    return seeds if rows is None else tuple((seed + rows.start) % (2**31 - 1) for seed in seeds)


class Norm:
    """A norm with its backward; the normed values are never kept."""

    def __init__(self, view: NormView, context: BlockContext) -> None:
        self.view = view
        self.context = context
        self._op = context.op("rms_norm" if view.kind == "rms" else "layer_norm")

    def forward(
        self, x_TD: Tensor, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns (normed x, statistics [T] for backward). `out` may have another dtype than x."""
        view = self.view
        target = out if out is None or out.dtype == x_TD.dtype else None
        if view.kind == "rms":
            y, rstd, _ = self._op.forward(
                x_TD, view.weight, eps=view.eps, offset=view.offset, out=target
            )
            statistics: tuple[Tensor, ...] = (rstd,)
        else:
            y, mean, rstd, _ = self._op.forward(
                x_TD, view.weight, view.bias, eps=view.eps, out=target
            )
            statistics = (mean, rstd)
        if out is not None and target is None:
            out.copy_(y)
            y = out
        return y, statistics

    def backward(
        self,
        dy_TD: Tensor,
        x_TD: Tensor,
        statistics: tuple[Tensor, ...],
        sink: GradientSink,
        *,
        dresidual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns dx (plus dresidual) in x's dtype, in `out` where it is given."""
        view = self.view
        need_dw = any(tensor.requires_grad for tensor in view.tensors())
        options = {"dresidual_TD": dresidual, "need_dw": need_dw, "out": out}
        dy_TD = dy_TD.to(x_TD.dtype)
        if view.kind == "rms":
            dx, dw = self._op.backward(
                dy_TD, x_TD, view.weight, *statistics, offset=view.offset, **options
            )
            db = None
        else:
            dx, dw, db = self._op.backward(dy_TD, x_TD, view.weight, *statistics, **options)
        for parameter, gradient in ((view.weight, dw), (view.bias, db)):
            if parameter is not None and gradient is not None:
                add_gradient(sink, parameter, gradient)
        return dx

    def factors(self, x_TD: Tensor, statistics: tuple[Tensor, ...]) -> dict[str, Any] | None:
        """Row and column factors with normed = rows · x · columns, or None where that does not hold or is not safe.

        In fp16 the product with a large x could leave the range; a layer norm also subtracts a mean.
        """
        view = self.view
        if view.kind != "rms" or x_TD.dtype == torch.float16 or x_TD.dtype != self.context.dtype:
            return None
        if view.weight is None:
            return {"row_scale": statistics[0]}
        return {"row_scale": statistics[0], "column_scale": ColumnScale(view.weight, view.offset)}


class NormedInput:
    """The input of a block's first projections: x through a norm, or x itself, beside the adapter columns."""

    def __init__(self, norm: Norm | None, group: LinearGroup, context: BlockContext) -> None:
        self.norm = norm
        self.group = group
        self.context = context

    def forward(self, x_TD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns (the group's wide input, the norm's statistics)."""
        wide = self.group.wide(x_TD.shape[0])
        target = wide[:, : self.group.k]
        if self.norm is None:
            target.copy_(x_TD)
            return wide, ()
        _, statistics = self.norm.forward(x_TD, out=target)
        return wide, statistics

    def backward(
        self,
        dy: Tensor,
        x_TD: Tensor,
        statistics: tuple[Tensor, ...],
        t_TR: Tensor | None,
        e: Tensor | None,
        sink: GradientSink,
        *,
        dresidual: Tensor,
        need_dx: bool,
        seeds: tuple[int, ...],
        out: Tensor | None,
        db: Tensor | None = None,
    ) -> Tensor | None:
        """Back through the projections and the norm; returns the residual stream's gradient, in `out` if given.

        db: see `LinearGroup.backward_parameters`.
        """
        factors = None
        if self.norm is not None and not self.group.trains_base and not self.group.drops:
            factors = self.norm.factors(x_TD, statistics)
        if factors is not None:
            source = x_TD
        elif self.norm is None:
            source = x_TD.to(self.context.dtype)
        else:
            source = self.norm.forward(x_TD)[0].to(self.context.dtype)
        norm_trains = self.norm is not None and any(
            tensor.requires_grad for tensor in self.norm.view.tensors()
        )
        dh = self.group.backward(
            dy,
            source,
            t_TR,
            e,
            sink,
            need_dx=need_dx or norm_trains,
            seeds=seeds,
            db=db,
            **(factors or {}),
        )
        if dh is None:
            return None
        if self.norm is None:
            return torch.add(dresidual, dh.to(dresidual.dtype), out=out)
        return self.norm.backward(dh, x_TD, statistics, sink, dresidual=dresidual, out=out)


class ResidualOutput:
    """A block's last projection: residual + s · projection(x), with a norm between the two in some families.

    Without that norm the residual is added by the GEMM. With it, the projection's output is a named saved tensor.
    """

    def __init__(
        self, group: LinearGroup, after: Norm | None, context: BlockContext, name: str
    ) -> None:
        self.group = group
        self.after = after
        self.context = context
        self.name = name

    def forward(
        self,
        x: Tensor,
        e: Tensor | None,
        residual: Tensor,
        saved: Saved,
        seeds: tuple[int, ...],
    ) -> Tensor:
        """Returns the new residual stream; notes what backward needs in `saved`."""
        scale = self.context.residual_scale
        if self.after is None:
            y, t = self.group.forward(x, e, residual=residual, alpha=scale, seeds=seeds)
        else:
            z, t = self.group.forward(x, e, seeds=seeds)
            saved[self.name] = z
            y = self._add(z, residual, saved)
        saved[f"_t_{self.name}"] = t
        return y

    def restore(self, residual: Tensor, saved: Saved) -> Tensor:
        """The new residual stream again, from the projection's output, which was kept."""
        return self._add(saved[self.name], residual, saved)

    def taken(self, saved: Saved) -> tuple[Tensor, ...] | None:
        """Takes what the norm behind the projection needs out of `saved`: (its input, its statistics ...)."""
        if self.after is None:
            return None
        return saved.pop(self.name), *saved.pop(f"_statistics_{self.name}")

    def _add(self, z: Tensor, residual: Tensor, saved: Saved) -> Tensor:
        assert self.after is not None
        normed, saved[f"_statistics_{self.name}"] = self.after.forward(z)
        return torch.add(residual, normed, alpha=self.context.residual_scale)

    def again(self, saved: Saved, *, output: bool) -> tuple[str, ...]:
        """The small tensors that are made again: the projection with its output, or because a norm needs it."""
        if self.name in saved:
            return ()
        if self.after is not None:
            return f"_t_{self.name}", f"_statistics_{self.name}"
        return (f"_t_{self.name}",) if output else ()

    def room(self, tokens: int, dtype: torch.dtype) -> Tensor | None:
        """A buffer for the gradient of this output, laid out so that `gradient` need not copy it; None if it must."""
        if (
            self.after is not None
            or self.context.residual_scale != 1.0
            or dtype != self.context.dtype
        ):
            return None
        return self.group.wide(tokens, backward=True)

    def gradient(
        self,
        dy_TD: Tensor,
        room: Tensor | None,
        behind: tuple[Tensor, ...] | None,
        sink: GradientSink,
    ) -> Tensor:
        """The gradient of the projection's output, scaled, in the group's wide layout.

        room: what `room()` of a layer like this one gave, if dy lies in it. behind: what `taken` gave.
        """
        tokens = dy_TD.shape[0]
        if room is not None and self.after is None and self.context.residual_scale == 1.0:
            width = self.group.width(tokens, backward=True)
            if room.shape == (tokens, width) and room.data_ptr() == dy_TD.data_ptr():
                return room
        dz = dy_TD if self.context.residual_scale == 1.0 else dy_TD * self.context.residual_scale
        if self.after is not None:
            assert behind is not None
            z, *statistics = behind
            dz = self.after.backward(dz.to(z.dtype), z, tuple(statistics), sink)
        wide = self.group.wide(dz.shape[0], backward=True)
        wide[:, : self.group.n] = dz
        return wide
