"""Layers by CUDA graphs: two launches instead of a hundred, where the card waits for the host in small batches.

The first batches of a kind run as ever. Then, in one pass, each layer's forward and backward is recorded, and replayed
from there on: the same kernels on memory that stays where it is, so the same bits. What comes from outside (hidden
states, tables, offsets, the incoming gradient) is copied to where the recording reads it, unless it lies there already,
as what one layer hands to the next does. A layer is read at each call as before; where anything is not what was
recorded, it is recorded again.

A pass whose backward has not come yet owns the memory of its kind: one that begins meanwhile runs without recordings.
"""

from __future__ import annotations

import warnings
import weakref
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import PlanError
from torch import Tensor

from hotloop_engine.attention import Sequences

from . import graphs
from .run import Run, Surroundings, ran_twice, refuse_second_derivative, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotloop_engine.ops.lora_linear import GradientSink

    from .graphs import Replay
    from .run import StreamBlock

TRIES = 4
"""After so many recordings of one layer that did not hold, its kind of batch is left alone."""


class Pass:
    """One pass through the layers. Whoever still needs its memory holds it."""


class _Table:
    """cos and sin of a batch where recordings read them."""

    def __init__(self, cos_PR: Tensor, sin_PR: Tensor) -> None:
        self.cos_PR, self.sin_PR = torch.empty_like(cos_PR), torch.empty_like(sin_PR)
        self._given: tuple[Any, ...] = ()
        self._by: weakref.ref[Pass] | None = None

    def holds(self, cos: Tensor, sin: Tensor) -> bool:
        """Whether these two were copied here last, and nobody changed them since."""
        return _same(self._given, (cos, sin))

    def fill(self, cos: Tensor, sin: Tensor, passing: Pass) -> bool:
        """Copies them, if they are not there.

        False where they are of another size, or where others came in this pass, which backward will read.
        """
        by, self._by = self._by, weakref.ref(passing)
        if self.holds(cos, sin):
            return True
        if cos.numel() != self.cos_PR.numel() or (by is not None and by() is passing):
            return False
        self.cos_PR.copy_(cos.reshape(self.cos_PR.shape))
        self.sin_PR.copy_(sin.reshape(self.sin_PR.shape))
        self._given = _noted((cos, sin))
        return True


def _noted(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple((weakref.ref(t), t._version) for t in tensors)


def _same(noted: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> bool:
    return len(noted) == len(tensors) and all(
        r() is t and v == t._version for (r, v), t in zip(noted, tensors, strict=True)
    )


class Kind:
    """Recordings for batches that divide alike: of as many tokens, in as many sequences, the longest as long."""

    def __init__(self) -> None:
        self.passes = 0
        self.begun = 0
        self.refused = False
        self.bytes = 0
        self.passing: Pass | None = None
        """The one in forward; afterwards those hold it that wait for backward."""
        self._last: weakref.ref[Pass] | None = None
        self.sequences: Sequences | None = None
        self.layers: dict[int, Recording] = {}
        self._tables: list[_Table] = []
        self._table_of: dict[int, _Table] = {}
        self._pool: Any = None

    @property
    def busy(self) -> bool:
        """Whether a pass still waits for its backward."""
        return self._last is not None and self._last() is not None

    def begin(self, given: Sequences) -> None:
        """A pass begins, over these sequences."""
        if self.sequences is None:
            self.sequences = Sequences(
                cu_seqlens=given.cu_seqlens.clone(), longest=given.longest, tokens=given.tokens
            )
            self.sequences.__dict__["fresh"] = given.fresh  # the same backend as before
        else:
            self.sequences.cu_seqlens.copy_(given.cu_seqlens)
        self.begun += 1
        self.passing = Pass()
        self._last = weakref.ref(self.passing)

    def over(self, given: Sequences) -> Sequences:
        """These sequences, whose offsets `begin` put where recordings read them."""
        assert self.sequences is not None
        same = (given.tokens, given.count, given.longest)
        own = (self.sequences.tokens, self.sequences.count, self.sequences.longest)
        return self.sequences if same == own else given

    def tables(self, index: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [P, R] of layer `index`, where recordings read them; as given, where that cannot be."""
        assert self.passing is not None
        table = self._table_of.get(index)
        if table is None:
            table = next((t for t in self._tables if t.holds(cos, sin)), None)
            if table is None:
                table = _Table(cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))
                self._tables.append(table)
            self._table_of[index] = table
        if table.fill(cos, sin, self.passing):
            return table.cos_PR, table.sin_PR
        return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])

    def layer(self, index: int) -> Recording:
        """The recording of a layer, made if there is none."""
        found = self.layers.get(index)
        if found is None:
            found = self.layers[index] = Recording(self, index)
        return found

    def record(
        self, work: Callable[[], list[Tensor]], where: str
    ) -> tuple[Replay, list[Tensor]] | None:
        """Records what `work` queues, which is not run; returns that and what `work` returned. None if it cannot be."""
        # Recorded in one pass, layers share what is free in between. One that is recorded later must not: what it keeps
        # would lie where graphs of layers behind it put what they need for a moment.
        if self.begun > 1 or self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            assert self.sequences is not None
            return graphs.capture(work, self._pool, self.sequences.device)
        except RuntimeError as error:
            warnings.warn(
                f"{where}: could not be recorded as a CUDA graph ({error}); batches of this kind run without. "
                "wire(model, cuda_graphs=False) does not try.",
                stacklevel=2,
            )
            self.refuse()
            return None

    def refuse(self) -> None:
        """From now on these batches run as ever."""
        self.refused = True
        self.layers.clear()


class Recording:
    """One layer's forward and backward for one kind of batch."""

    def __init__(self, kind: Kind, index: int) -> None:
        self.kind, self.index = kind, index
        self._tries = 0
        self._identity: tuple[object, ...] | None = None
        self._forward: Replay | None = None
        self._backward: Replay | None = None
        self._dx_TD: Tensor | None = None

    def holds(
        self,
        blocks: Sequence[StreamBlock],
        identity: tuple[object, ...],
        where: str,
        x_TD: Tensor,
    ) -> bool:
        """Whether forward is recorded for blocks of this identity, if need be now."""
        if self._forward is not None and identity == self._identity:
            return True
        self._tries += 1
        if self._tries > TRIES:
            self.kind.refuse()
            return False
        self._identity, self._forward, self._backward = identity, None, None
        self._blocks, self._where = blocks, where
        below = self.kind.layers.get(self.index - 1)
        self._lowest = below is None or below._forward is None or not _lies(x_TD, below.y_TD)
        self.x_TD = torch.empty_like(x_TD) if below is None or self._lowest else below.y_TD
        made = self.kind.record(self._run_forward, where)
        if made is None:
            return False
        self._forward, (self.y_TD,) = made
        # Held, so that no other layer's backward is given this memory: backward may come in any order.
        self._saved = _tensors_of(self._run.saved)
        return True

    def _run_forward(self) -> list[Tensor]:
        self._run = Run(self._blocks, around=Surroundings(where=self._where))
        return [self._run.forward(self.x_TD)]

    def forward(self, x_TD: Tensor) -> Tensor:
        """The blocks' output [T, D], in memory that the next pass of this kind overwrites."""
        assert self._forward is not None
        _bring(x_TD, self.x_TD)
        self._forward.replay()
        return self.y_TD.detach()

    def backward(
        self, dy_TD: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], *, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx, in memory that the next pass overwrites, and fresh gradients of the tensors that need one."""
        if self._backward is not None:
            _bring(dy_TD, self._dy_TD)
            self._backward.replay()
            return self._given_below(), self._fresh()
        above = self.kind.layers.get(self.index + 1)
        if above is not None and above._dx_TD is not None and _lies(dy_TD, above._dx_TD):
            self._dy_TD = above._dx_TD
        else:
            self._dy_TD = torch.empty_like(dy_TD, memory_format=torch.contiguous_format)
        _bring(dy_TD, self._dy_TD)
        self._tensors, self._needed, self._need_dx = tensors, needed, need_dx
        saved = dict(self._run.saved or {})
        made = self.kind.record(self._run_backward, self._where)
        if made is None:  # what the replayed forward saved is still there
            self._run.saved = saved
            found = self._run_backward()
        else:
            self._backward, found = made
            self._backward.replay()
        self._dx_TD = found[0] if need_dx else None
        self._flat = found[1:] if need_dx else found
        return self._given_below(), self._fresh()

    def _given_below(self) -> Tensor | None:
        """dx; a copy from the lowest layer, since a leaf under it would keep what it is given as its gradient."""
        return self._dx_TD.clone() if self._lowest and self._dx_TD is not None else self._dx_TD

    def _run_backward(self) -> list[Tensor]:
        sink: GradientSink = {}
        dx_TD = self._run.backward(self._dy_TD, sink, self._need_dx)
        found = [
            (i, sink[id(t)].to(t.dtype))
            for i, (t, needed) in enumerate(zip(self._tensors, self._needed, strict=True))
            if needed and id(t) in sink
        ]
        self._places: list[list[tuple[int, slice, torch.Size]]] = []
        made: list[Tensor] = [] if dx_TD is None else [dx_TD]
        for dtype in dict.fromkeys(g.dtype for _, g in found):
            alike = [(i, g) for i, g in found if g.dtype == dtype]
            ends = pairwise([0, *accumulate(g.numel() for _, g in alike)])
            self._places.append(
                [(i, slice(*span), g.shape) for (i, g), span in zip(alike, ends, strict=True)]
            )
            made.append(torch.cat([g.reshape(-1) for _, g in alike]))
        return made

    def _fresh(self) -> list[Tensor | None]:
        """Copies: what becomes a parameter's gradient outlives this pass."""
        gradients: list[Tensor | None] = [None] * len(self._tensors)
        for flat, places in zip(self._flat, self._places, strict=True):
            fresh = flat.clone()
            for i, where, shape in places:
                gradients[i] = fresh[where].view(shape)
        return gradients


def _bring(given: Tensor, to: Tensor) -> None:
    if not _lies(given, to):
        to.copy_(given)


def _lies(given: Tensor, there: Tensor) -> bool:
    return given.data_ptr() == there.data_ptr() and given.stride() == there.stride()


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in _tensors_of(part)]


def run_recorded(
    recording: Recording, blocks: Sequence[StreamBlock], where: str, x_TD: Tensor
) -> Tensor | None:
    """The blocks' output, replayed or just recorded; None where they have to run as ever."""
    identity = _identity(blocks, x_TD)
    tensors = tensors_of(blocks)
    wants = x_TD.requires_grad or any(t.requires_grad for t in tensors)
    if identity is None or recording.kind.refused or not (wants and torch.is_grad_enabled()):
        return None
    with torch.autocast(x_TD.device.type, enabled=False):
        with torch.no_grad():
            if not recording.holds(blocks, identity, where, x_TD):
                return None
        return _Recorded.apply(recording, where, x_TD, *tensors)


def _identity(blocks: Sequence[StreamBlock], x_TD: Tensor) -> tuple[object, ...] | None:
    """What must be the same for a recording to hold; None where a block cannot be recorded."""
    parts: list[object] = [x_TD.shape, x_TD.stride(), x_TD.dtype, x_TD.requires_grad]
    for block in blocks:
        identity = block.identity()
        if identity is None:
            return None
        parts.append(identity)
        parts += [(t.data_ptr(), t.dtype, t.requires_grad) for t in block.tensors()]
    return tuple(parts)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording,
        where: str,
        x_TD: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.recording, ctx.passing, ctx.tensors = recording, recording.kind.passing, tensors
        ctx.where = where
        ctx.save_for_backward(*tensors)  # a change in place between the passes is an error
        return recording.forward(x_TD)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(ctx.where)
        _ = ctx.saved_tensors
        if ctx.passing is None:
            raise PlanError(ran_twice(ctx.where))
        ctx.passing = None
        with torch.autocast(dy_TD.device.type, enabled=False):
            dx_TD, gradients = ctx.recording.backward(
                dy_TD, ctx.tensors, ctx.needs_input_grad[3:], need_dx=ctx.needs_input_grad[2]
            )
        return (None, None, dx_TD, *gradients)
