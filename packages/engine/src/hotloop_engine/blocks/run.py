"""Runs the blocks of a layer as one autograd function; each named tensor waits for backward where the plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from hotloop_core.errors import GradientError, PlanError, UnsupportedError
from hotloop_core.plan import KEEP_ALL, LayerPlan, Placement
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotloop_core.stores import ActivationStore, Ticket

    from hotloop_engine.ops.lora_linear import GradientSink

    from .context import Saved


class StreamBlock(Protocol):
    """A part of a layer that maps the residual stream to the residual stream, with a backward of its own.

    input_name: what a plan calls its input. names: what a plan calls the other tensors that its backward needs; forward
    puts each into `saved` under its name, backward recomputes those that are missing and removes what it has used.
    Names that begin with an underscore are small; they are kept, but for those that `again` names.
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

    def again(self, saved: Saved, *, output: bool) -> tuple[str, ...]:
        """The small tensors in `saved` that will be made again: with what is missing in it, and with the output."""
        ...

    def identity(self) -> tuple[object, ...] | None:
        """What must be equal for what was recorded of this block to hold, `tensors` apart; None: do not record it."""
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
        """Returns dx_TD (None only if not needed); adds parameter gradients to `sink` by the parameter's id.

        room: the buffer of `gradient_room` if dy lies in its first columns. out: where dx is to be put.
        """
        ...


@dataclass(kw_only=True, eq=False)
class Surroundings:
    """What a layer's run needs of the model around it.

    where: names the layer in errors. store: takes the tensors whose placement is offload. fetch: brings the layer's
    weights to the device, called before forward (False) and before backward (True). below: the run whose output is
    this layer's input, for an input that is recomputed.
    """

    where: str = "layer"
    store: ActivationStore | None = None
    fetch: Callable[[bool], None] | None = None
    below: Run | None = None


def run_blocks(
    blocks: Sequence[StreamBlock],
    x_TD: Tensor,
    plan: LayerPlan = KEEP_ALL,
    around: Surroundings | None = None,
) -> tuple[Tensor, Run | None]:
    """The blocks one after another on x [T, D]; and the run, where there is a gradient to compute.

    Without one nothing is saved. Autocast is off inside: the blocks cast explicitly.

    Raises:
        PlanError: the plan offloads and `around` has no store.
        UnsupportedError: a transform of torch.func is active.
    """
    around = around or Surroundings()
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            f"{around.where}: a torch.func transform (vmap, grad, jvp ...) is active; written-out backward passes are "
            "not transformed. Undo the wiring for it, or use torch.autograd."
        )
    tensors = tensors_of(blocks)
    wants = x_TD.requires_grad or any(tensor.requires_grad for tensor in tensors)
    with torch.autocast(x_TD.device.type, enabled=False):
        if torch.is_grad_enabled() and wants:
            run = Run(blocks, plan, around=around)
            return _Blocks.apply(run, x_TD, *tensors), run
        with torch.no_grad():
            if around.fetch is not None:
                around.fetch(False)
            for block in blocks:
                x_TD = block.forward(x_TD, {})
    return x_TD, None


_ROOM = "_hotloop_room"
"""Marks a buffer in which a layer left its dx with room beside it: what lies there is nobody else's."""


def tensors_of(blocks: Sequence[StreamBlock]) -> list[Tensor]:
    """Each once: one that serves twice, as tied projections do, has one gradient, their sum."""
    return list({id(t): t for block in blocks for t in block.tensors()}.values())


def ran_twice(where: str) -> str:
    """What a second backward is told."""
    return (
        f"{where}: backward ran a second time through the same forward. Its saved tensors were released when the first "
        "had used them; run forward again, or add the losses before one backward."
    )


def refuse_second_derivative(where: str) -> None:
    """Raises GradientError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise GradientError(
            f"{where}: a wired layer has no second derivative, and create_graph=True asks for one. "
            "Pass create_graph=False, or undo the wiring."
        )


class Run:
    """One pass through the blocks of one layer: what backward still needs, and where that is."""

    def __init__(
        self, blocks: Sequence[StreamBlock], plan: LayerPlan = KEEP_ALL, *, around: Surroundings
    ) -> None:
        self.blocks, self.plan, self.around = blocks, plan, around
        self.saved: Saved | None = {}
        self.input = self._placement_of_input()
        self._away: dict[str, Ticket | tuple[Ticket, ...]] = {}

    def _placement_of_input(self) -> Placement:
        placement = self.plan.placement(self.blocks[0].input_name)
        if placement is not Placement.RECOMPUTE or self.around.below is not None:
            return placement
        # Not the output of the layer below, as it came: nothing can make it again.
        return Placement.KEEP if self.around.store is None else Placement.OFFLOAD

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns the last block's output."""
        assert self.saved is not None
        if self.around.fetch is not None:
            self.around.fetch(False)
        if self.input is not Placement.RECOMPUTE:
            self._leave(self.blocks[0].input_name, x_TD, self.input)
        for i, block in enumerate(self.blocks):
            if i:
                self._leave(block.input_name, x_TD, self.plan.placement(block.input_name))
            x_TD = block.forward(x_TD, self.saved)
            for name in block.names:
                if name in self.saved:
                    self._leave(name, self.saved.pop(name), self.plan.placement(name))
            above = self.blocks[i + 1].input_name if i + 1 < len(self.blocks) else None
            output = above is not None and self.plan.placement(above) is Placement.RECOMPUTE
            if self.plan.placements:  # else everything is kept
                for name in block.again({**self.saved, **self._away}, output=output):
                    self.saved.pop(name, None)
        return x_TD

    def backward(self, dy_TD: Tensor, sink: GradientSink, need_dx: bool) -> Tensor | None:
        """Returns dx."""
        if self.saved is None:
            raise PlanError(ran_twice(self.around.where))
        saved = self.saved
        if self.input is Placement.RECOMPUTE:
            self._input(0)  # brings the weights of layers below; this layer's come after
        if self.around.fetch is not None:
            self.around.fetch(True)
        dx: Tensor | None = dy_TD
        room = dy_TD._base if hasattr(dy_TD._base, _ROOM) else None
        tokens, dtype = dy_TD.shape[0], dy_TD.dtype
        for i in reversed(range(len(self.blocks))):
            block_input = self._input(i)
            self._bring(i)
            saved.pop(self.blocks[i].input_name)
            leave = None
            if i:
                leave = self.blocks[i - 1].gradient_room(tokens, dtype)
            elif need_dx:
                # The layer below most likely ends as this one does, and likes the same room for its dy; dx may lie over
                # this block's dy, if that is in a buffer of this run.
                own = room is not None and len(self.blocks) > 1
                leave = room if own else self.blocks[-1].gradient_room(tokens, dtype)
            assert dx is not None
            dx = self.blocks[i].backward(
                dx,
                block_input,
                saved,
                sink,
                need_dx=need_dx or i > 0,
                room=room,
                out=None if leave is None else leave[:, : dy_TD.shape[1]],
            )
            room = leave
        if room is not None:
            setattr(room, _ROOM, True)
        self.saved = None
        self._away.clear()
        return dx

    def _has(self, name: str) -> bool:
        assert self.saved is not None
        return name in self.saved or name in self._away

    def _leave(self, name: str, value: Any, placement: Placement) -> None:
        """Puts a tensor where it waits; one that is recomputed is dropped."""
        assert self.saved is not None
        if placement is Placement.KEEP:
            self.saved[name] = value
        elif placement is Placement.OFFLOAD:
            self._put(name, value)

    def _put(self, name: str, value: Any) -> None:
        store = self.around.store
        if store is None:
            raise PlanError(
                f"{self.around.where}: the plan offloads {name}, but there is no store to put it into"
            )
        single = isinstance(value, Tensor)
        self._away[name] = store.put(value) if single else tuple(store.put(part) for part in value)

    def _get(self, name: str) -> None:
        """Takes a tensor back from the store, if it is there."""
        assert self.saved is not None
        ticket = self._away.pop(name, None)
        if ticket is None:
            return
        store = self.around.store
        assert store is not None
        if isinstance(ticket, tuple):
            # The last that was put comes first, as the store expects.
            parts = [store.get(part) for part in reversed(ticket)]
            self.saved[name] = tuple(reversed(parts))
        else:
            self.saved[name] = store.get(ticket)

    def _bring(self, i: int) -> None:
        for name in reversed(self.blocks[i].names):
            self._get(name)

    def _input(self, i: int) -> Tensor:
        assert self.saved is not None
        name = self.blocks[i].input_name
        self._get(name)
        if name not in self.saved:
            if i == 0:
                self.saved[name] = self._output_below()
            else:
                before = self._input(i - 1)
                self._bring(i - 1)
                self.saved[name] = self.blocks[i - 1].restore_output(before, self.saved)
        return self.saved[name]

    def _output_below(self) -> Tensor:
        below = self.around.below
        assert below is not None
        return below.output_again()

    def output_again(self) -> Tensor:
        """This layer's output, computed once more for the layer above, before this layer's own backward.

        The layer's input stays on the device for that; everything else is dropped again.
        """
        if self.saved is None:
            raise PlanError(
                f"{self.around.where}: the layer above asked for this layer's output after its backward had run. "
                "Backward must go down through all layers in one call."
            )
        x_TD = self._input(0)
        if self.around.fetch is not None:
            self.around.fetch(False)
        scratch = dict(self.saved)  # offloaded tensors stay where they are: this pass makes its own
        for i, block in enumerate(self.blocks):
            if i and self.blocks[i].input_name in self.saved:
                x_TD = self.saved[self.blocks[i].input_name]
            x_TD = block.restore_output(x_TD, scratch)
            for name in block.names:
                scratch.pop(name, None)
        return x_TD


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, x_TD: Tensor, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.tensors = run, tensors
        # Named to autograd as well, so that an in-place change between the passes is an error, not a wrong gradient.
        # Not so streamed weights: the memory under them is another layer's by then, and theirs again before it is read.
        kept = (x_TD,) if run.input is Placement.KEEP else ()
        lasting = (t for t in tensors if t.requires_grad or run.around.fetch is None)
        ctx.save_for_backward(*kept, *lasting)
        return run.forward(x_TD)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(ctx.run.around.where)
        _ = ctx.saved_tensors  # autograd checks that nobody changed them
        if dy_TD.stride(-1) != 1 or dy_TD.stride(0) < dy_TD.shape[1]:
            dy_TD = dy_TD.contiguous()  # a broadcast gradient (loss = output.sum()) has stride 0
        sink: GradientSink = {}
        with torch.autocast(dy_TD.device.type, enabled=False):
            dx_TD = ctx.run.backward(dy_TD, sink, ctx.needs_input_grad[1])
        gradients = (
            (sink.get(id(t)), t) if needed else (None, t)
            for t, needed in zip(ctx.tensors, ctx.needs_input_grad[2:], strict=True)
        )
        return (None, dx_TD, *(None if g is None else g.to(t.dtype) for g, t in gradients))
