"""Runs the blocks of a layer as one autograd function, keeping of each named tensor what the plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from hotloop_core.errors import PlanError
from hotloop_core.plan import LayerPlan, Placement
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_engine.ops.lora_linear import GradientSink

    from .context import Saved


class Block(Protocol):
    """A part of a layer that maps the residual stream to the residual stream, with a backward of its own.

    input_name: what a plan calls its input. names: what a plan calls the other tensors that its backward needs; forward
    puts each into `saved` under its name, backward recomputes those that are missing and removes what it has used.
    Names that begin with an underscore are small and always kept.
    """

    input_name: str
    names: tuple[str, ...]

    def tensors(self) -> list[Tensor]:
        """Every tensor that autograd may ask a gradient for."""
        ...

    def forward(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """Returns the block's output."""
        ...

    def restore_output(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """The block's output again, from what `saved` still has."""
        ...

    def gradient_room(self, tokens: int, dtype: torch.dtype) -> Tensor | None:
        """A buffer [T, at least D] in which this block likes to find its dy, so that it need not copy it, or None."""
        ...

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
        """Returns dx_TD (None only if not needed); puts parameter gradients into `sink` by the parameter's id.

        room: the buffer of `gradient_room` if dy lies in its first columns. out: where dx is to be put.
        """
        ...


def run_blocks(
    blocks: Sequence[Block], x_TD: Tensor, plan: LayerPlan, *, where: str = "layer"
) -> Tensor:
    """The blocks one after another on x [T, D]. `where` names the layer in errors.

    Without a gradient to compute nothing is saved. Autocast is off inside: the blocks cast explicitly.
    """
    tensors = [tensor for block in blocks for tensor in block.tensors()]
    wants = x_TD.requires_grad or any(tensor.requires_grad for tensor in tensors)
    with torch.autocast(x_TD.device.type, enabled=False):
        if torch.is_grad_enabled() and wants:
            return _Blocks.apply(_Run(blocks, plan, where), x_TD, *tensors)
        with torch.no_grad():
            for block in blocks:
                x_TD = block.forward(x_TD, {})
    return x_TD


class _Run:
    """One pass through the blocks of one layer: what backward still needs."""

    def __init__(self, blocks: Sequence[Block], plan: LayerPlan, where: str) -> None:
        self.blocks, self.plan, self.where = blocks, plan, where
        self.saved: Saved | None = {}

    def forward(self, x_TD: Tensor) -> Tensor:
        assert self.saved is not None
        for i, block in enumerate(self.blocks):
            if i and self.plan.placement(block.input_name) is Placement.KEEP:
                self.saved[block.input_name] = x_TD
            x_TD = block.forward(x_TD, self.saved)
            for name in block.names:
                if self.plan.placement(name) is Placement.RECOMPUTE:
                    self.saved.pop(name, None)
        return x_TD

    def backward(
        self, dy_TD: Tensor, x_TD: Tensor, sink: GradientSink, need_dx: bool
    ) -> Tensor | None:
        if self.saved is None:
            raise PlanError(
                f"{self.where}: backward ran a second time through the same forward. Its saved tensors were released "
                "when the first had used them; run forward again, or add the losses before one backward."
            )
        saved, self.saved = self.saved, None
        dx: Tensor | None = dy_TD
        room: Tensor | None = None
        for i in reversed(range(len(self.blocks))):
            block_input = self._input(i, x_TD, saved)
            saved.pop(self.blocks[i].input_name, None)
            below = (
                self.blocks[i - 1].gradient_room(x_TD.shape[0], block_input.dtype) if i else None
            )
            assert dx is not None
            dx = self.blocks[i].backward(
                dx,
                block_input,
                saved,
                sink,
                need_dx=need_dx or i > 0,
                room=room,
                out=None if below is None else below[:, : x_TD.shape[1]],
            )
            room = below
        return dx

    def _input(self, i: int, x_TD: Tensor, saved: Saved) -> Tensor:
        if i == 0:
            return x_TD
        name = self.blocks[i].input_name
        if name not in saved:
            saved[name] = self.blocks[i - 1].restore_output(self._input(i - 1, x_TD, saved), saved)
        return saved[name]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x_TD: Tensor, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.tensors = run, tensors
        # Saved through autograd, so that an in-place change between the passes is an error, not a wrong gradient.
        ctx.save_for_backward(x_TD, *(t for t in tensors if t.requires_grad))
        return run.forward(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD = ctx.saved_tensors[0]
        if dy_TD.stride(-1) != 1 or dy_TD.stride(0) < dy_TD.shape[1]:
            dy_TD = dy_TD.contiguous()  # a broadcast gradient (loss = output.sum()) has stride 0
        sink: GradientSink = {}
        with torch.autocast(dy_TD.device.type, enabled=False):
            dx_TD = ctx.run.backward(dy_TD, x_TD, sink, ctx.needs_input_grad[1])
        gradients = (
            (sink.get(id(t)), t) if needed else (None, t)
            for t, needed in zip(ctx.tensors, ctx.needs_input_grad[2:], strict=True)
        )
        return (None, dx_TD, *(None if g is None else g.to(t.dtype) for g, t in gradients))
