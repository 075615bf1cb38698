"""norm, gate and up with LoRA, activation, down, residual: forward and a written-out backward.

    h = norm(x);  gate, up = h W_gu^T;  y = x + (act(gate) * up) W_down^T

Saved by name: x_mid (the input, by the caller) and gate_up. act(gate) * up is made again by the activation's backward.
In tiles of the tokens nothing wide is saved: backward makes gate and up again, tile by tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hotloop_engine.ops.lora_linear import GradientSink, LinearGroup, draw_seeds

from .context import (
    BlockContext,
    Norm,
    NormedInput,
    NormView,
    ResidualOutput,
    Saved,
    cut,
    together,
)

if TYPE_CHECKING:
    from hotloop_core.kernels import Activation
    from torch import Tensor


class MlpBlock:
    """The MLP half of a layer, for one call: its weights are read when it is made."""

    input_name = "x_mid"
    names: tuple[str, ...] = ("gate_up", "mlp_out")

    def __init__(
        self,
        context: BlockContext,
        *,
        activation: Activation,
        norm: NormView | None,
        gate_up: LinearGroup,
        down: LinearGroup,
        after: NormView | None = None,
    ) -> None:
        self.context, self.activation = context, activation
        self.gate_up, self.down = gate_up, down
        self.norm_views = [view for view in (norm, after) if view is not None]
        self.input = NormedInput(Norm(norm, context) if norm else None, self.gate_up, context)
        self.output = ResidualOutput(
            self.down, Norm(after, context) if after else None, context, "mlp_out"
        )
        self.glu = context.op("glu")
        self.adapter_glu = context.op("adapter_glu")

    def tensors(self) -> list[Tensor]:
        """Every tensor that autograd may ask a gradient for."""
        norms = [tensor for view in self.norm_views for tensor in view.tensors()]
        return norms + self.gate_up.tensors() + self.down.tensors()

    def forward(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """Returns the residual stream behind the MLP; fills `saved`."""
        tiles = self.context.tiles(x_TD.shape[0])
        if tiles == [None]:
            return self._forward(x_TD, saved)
        y_TD, parts = torch.empty_like(x_TD), []
        with self.gate_up.held(), self.down.held():
            for rows in tiles:
                part: Saved = {}
                y_TD[rows] = self._forward(x_TD[rows], part)
                for name in self.names:
                    part.pop(name, None)
                for name in self.again(part, output=False):
                    del part[name]
                parts.append(part)
        saved["_tiles"] = parts
        return y_TD

    def _forward(self, x_TD: Tensor, saved: Saved) -> Tensor:
        saved["_seeds_gate_up"], saved["_seeds_down"] = (
            draw_seeds(self.gate_up),
            draw_seeds(self.down),
        )
        self._project(x_TD, saved)
        return self._finish(x_TD, saved)

    def restore_output(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """The residual stream behind the MLP again, recomputing what is missing on the way."""
        tiles = self.context.tiles(x_TD.shape[0])
        if tiles == [None]:
            return self._restore_output(x_TD, saved)
        y_TD = torch.empty_like(x_TD)
        with self.gate_up.held(), self.down.held():
            for rows, part in zip(tiles, saved["_tiles"], strict=True):
                y_TD[rows] = self._restore_output(x_TD[rows], dict(part))
        return y_TD

    def _restore_output(self, x_TD: Tensor, saved: Saved) -> Tensor:
        if "mlp_out" in saved:
            return self.output.restore(x_TD, saved)
        if "gate_up" not in saved:
            self._project(x_TD, saved)
        return self._finish(x_TD, saved)

    def again(self, saved: Saved, *, output: bool) -> tuple[str, ...]:
        """What `_project` and, behind a norm, `_finish` make again."""
        names = () if "gate_up" in saved else ("_t_gate_up", "_statistics_x_mid")
        return tuple(n for n in (*names, *self.output.again(saved, output=output)) if n in saved)

    def identity(self) -> tuple[object, ...] | None:
        """See `StreamBlock`."""
        groups = together(self.gate_up.identity(), self.down.identity())
        norms = [view.identity() for view in self.norm_views]
        return groups and (groups, *norms, self.context, self.activation)

    def gradient_room(self, tokens: int, dtype: torch.dtype) -> Tensor | None:
        """Where the gradient of this block's output is best put; None where it does not matter."""
        return self.output.room(tokens, dtype)

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
        """Returns dx; releases each saved tensor as soon as it has been used."""
        tiles = self.context.tiles(x_TD.shape[0])
        if tiles == [None]:
            return self._backward(dy_TD, x_TD, saved, sink, need_dx=need_dx, room=room, out=out)
        dx = out
        if dx is None and need_dx:
            dx = torch.empty_like(x_TD)
        with self.gate_up.held(), self.down.held():
            for rows, part in zip(tiles, saved.pop("_tiles"), strict=True):
                self._backward(
                    dy_TD[rows],
                    x_TD[rows],
                    part,
                    sink,
                    need_dx=need_dx,
                    room=cut(room, rows),
                    out=cut(dx, rows),
                )
        return dx

    def _backward(
        self,
        dy_TD: Tensor,
        x_TD: Tensor,
        saved: Saved,
        sink: GradientSink,
        *,
        need_dx: bool,
        room: Tensor | None,
        out: Tensor | None,
    ) -> Tensor | None:
        tokens = x_TD.shape[0]
        if "gate_up" not in saved:
            self._project(x_TD, saved, keep_weights=True)
        if self.output.after is not None and "mlp_out" not in saved:
            self._finish(x_TD, saved)
        dz = self.output.gradient(dy_TD, room, self.output.taken(saved), sink)
        e = self.down.extend(tokens, backward=True)
        dt, dh_TI = self.down.backward_input(dz, e, seeds=saved["_seeds_down"])
        assert dh_TI is not None
        del e
        wide = saved.pop("gate_up")
        gate, up = self._split(wide)
        t_gate_up, t_down = saved.pop("_t_gate_up"), saved.pop("_t_mlp_out")
        db = da = None
        if self.gate_up.sums and self.down.sums and not self.down.trains_base:
            assert dt is not None  # sums are over adapters, so there are some
            dt_TR = dt[:, : self.down.rank]
            db, da = self.adapter_glu.backward_(
                dh_TI, gate, up, t_gate_up, dt_TR, activation=self.activation
            )
        else:
            self.glu.backward_(dh_TI, gate, up, activation=self.activation)
        self.down.backward_parameters(
            dz, dt, dh_TI if da is None else None, t_down, sink, seeds=saved["_seeds_down"], da=da
        )
        del dz, dh_TI, da
        e = saved.pop("_e_gate_up", None) if self.gate_up.extends(tokens, backward=True) else None
        return self.input.backward(
            wide,
            x_TD,
            saved.pop("_statistics_x_mid"),
            t_gate_up,
            self.gate_up.extend(tokens, backward=True) if e is None else e,
            sink,
            dresidual=dy_TD,
            need_dx=need_dx,
            seeds=saved["_seeds_gate_up"],
            out=out,
            db=db,
        )

    def _project(self, x_TD: Tensor, saved: Saved, *, keep_weights: bool = False) -> None:
        wide, saved["_statistics_x_mid"] = self.input.forward(x_TD)
        tokens = wide.shape[0]
        e = self.gate_up.extend(tokens)
        # In backward gate and up become their gradients, in place: so they lie where that pass wants them.
        gate_up = self.gate_up.wide(tokens, backward=True)
        _, saved["_t_gate_up"] = self.gate_up.forward(
            wide, e, seeds=saved["_seeds_gate_up"], out=gate_up[:, : self.gate_up.n]
        )
        if keep_weights:
            saved["_e_gate_up"] = e
        saved["gate_up"] = gate_up

    def _finish(self, x_TD: Tensor, saved: Saved) -> Tensor:
        gate, up = self._split(saved["gate_up"])
        act = self.down.wide(x_TD.shape[0])
        self.glu.forward(gate, up, activation=self.activation, out=act[:, : self.down.k])
        return self.output.forward(
            act, self.down.extend(x_TD.shape[0]), x_TD, saved, saved["_seeds_down"]
        )

    def _split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        width = self.gate_up.n // 2
        return gate_up[:, :width], gate_up[:, width : 2 * width]
