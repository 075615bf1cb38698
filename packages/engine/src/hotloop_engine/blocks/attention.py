"""norm, q k v with LoRA, rope, attention, output projection, residual: forward and a written-out backward.

    h = norm(x);  q, k, v = h W_qkv^T;  q, k = rope(q, k);  o = attention(q, k, v);  y = x + o W_o^T

Saved by name: x (by the caller), qkv (rotated; raw where q/k norms need it), attention (o and its log-sum-exp).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from hotloop_core.errors import UnsupportedError
from torch import Tensor

from hotloop_engine.attention import add_centre
from hotloop_engine.ops.lora_linear import (
    GradientSink,
    LinearGroup,
    add_gradient,
    draw_seeds,
)

from .context import (
    BlockContext,
    Norm,
    NormedInput,
    NormView,
    ResidualOutput,
    Saved,
    cut,
    join,
    seeds_of,
    together,
)
from .lossy import BLOCK, pack, unpack
from .rotation import Rotation, Statistics

if TYPE_CHECKING:
    from .attend import Attend


class AttentionBlock:
    """The attention half of a layer, for one call: its weights are read when it is made.

    v_bias: v's bias [G * K], which passes attention unchanged and is added behind it: `qkv` is without it, which makes
    the gradients of q and k exact and spares v a rounding (decision 0018).
    """

    input_name = "x"
    names: tuple[str, ...] = ("qkv", "attention", "attention_out")

    def __init__(
        self,
        context: BlockContext,
        attend: Attend,
        *,
        norm: NormView | None,
        qkv: LinearGroup,
        o: LinearGroup,
        cos_PR: Tensor,
        sin_PR: Tensor,
        interleaved: bool = False,
        q_norm: NormView | None = None,
        k_norm: NormView | None = None,
        norm_over: Literal["head", "all"] = "head",
        v_bias: Tensor | None = None,
        after: NormView | None = None,
        nf4_kv: bool = False,
    ) -> None:
        self.context, self.attend, self.shape = context, attend, attend.shape
        self.qkv, self.o = qkv, o
        self.norm_views = [view for view in (norm, q_norm, k_norm, after) if view is not None]
        self.input = NormedInput(Norm(norm, context) if norm else None, self.qkv, context)
        self.output = ResidualOutput(
            self.o, Norm(after, context) if after else None, context, "attention_out"
        )
        self.rotation = Rotation(
            context,
            cos_PR,
            sin_PR,
            interleaved=interleaved,
            q_norm=q_norm,
            k_norm=k_norm,
            over=norm_over,
        )
        keys = 2 * self.shape.kv_heads * self.shape.head_dim
        if nf4_kv and keys % BLOCK:
            raise UnsupportedError(
                f"keys and values of {keys} columns; in NF4 they go in blocks of {BLOCK}. Plan without nf4_kv."
            )
        self.nf4_kv = nf4_kv
        self.v_bias = v_bias
        self.centre = None
        if v_bias is not None:
            self.centre = (
                v_bias.detach().to(context.dtype).view(self.shape.kv_heads, self.shape.head_dim)
            )

    def tensors(self) -> list[Tensor]:
        """Every tensor that autograd may ask a gradient for."""
        norms = [tensor for view in self.norm_views for tensor in view.tensors()]
        biases = [] if self.v_bias is None else [self.v_bias]
        return norms + self.qkv.tensors() + biases + self.o.tensors()

    def forward(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """Returns the residual stream behind attention; fills `saved`."""
        saved["_seeds_qkv"], saved["_seeds_o"] = draw_seeds(self.qkv), draw_seeds(self.o)
        self._project(x_TD, saved)
        o_TN = self._attend(saved)
        if self.nf4_kv:
            widths = self._widths()
            saved["qkv"] = pack(saved["qkv"], widths[0], widths[1] + widths[2])
        return self._finish(o_TN, x_TD, saved)

    def restore_output(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """The residual stream behind attention again, recomputing what is missing on the way."""
        if self.output.name in saved:
            return self.output.restore(x_TD, saved)
        return self._finish(self._restore(x_TD, saved), x_TD, saved)

    def again(self, saved: Saved, *, output: bool) -> tuple[str, ...]:
        """What `_project` and `_finish` make again."""
        names = () if "qkv" in saved else ("_t_qkv", "_statistics_x")
        return tuple(n for n in (*names, *self.output.again(saved, output=output)) if n in saved)

    def identity(self) -> tuple[object, ...] | None:
        """See `StreamBlock`."""
        groups = together(self.qkv.identity(), self.o.identity())
        if self.nf4_kv or (self.v_bias is not None and self.v_bias.requires_grad):
            return None  # `centre` is made of the bias outside
        bias = None if self.v_bias is None else self.v_bias._version
        norms = [view.identity() for view in self.norm_views]
        attend = self.attend
        over = (attend.shape, attend.sequences, attend.backend, attend.deterministic)
        return groups and (groups, *norms, self.context, self.rotation.identity(), bias, *over)

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
        o_TN = self._restore(x_TD, saved)
        if self.output.after is not None and self.output.name not in saved:
            self._finish(o_TN, x_TD, saved)
        do_TN = self._finish_backward(dy_TD, o_TN, room, saved, sink)
        del o_TN
        dqkv = self._attend_backward(do_TN, saved, sink)
        del do_TN
        return self._project_backward(dqkv, dy_TD, x_TD, saved, sink, need_dx, out)

    def _project(self, x_TD: Tensor, saved: Saved, *, keep_weights: bool = False) -> None:
        tokens, n = x_TD.shape[0], self.qkv.n
        # In backward the projections become their gradients, in place: so they lie where that pass wants them.
        qkv = self.qkv.wide(tokens, backward=True)
        e = self.qkv.extend(tokens)
        statistics: list[tuple[Tensor, ...]] = []
        ts: list[Tensor | None] = []
        for rows in self.context.tiles(tokens):
            wide, found = self.input.forward(cut(x_TD, rows))
            seeds = seeds_of(saved["_seeds_qkv"], rows)
            _, t = self.qkv.forward(wide, e, seeds=seeds, out=cut(qkv, rows)[:, :n])
            statistics.append(found)
            ts.append(t)
        saved["_statistics_x"], saved["_t_qkv"] = join(statistics), join(ts)
        if keep_weights:
            saved["_e_qkv"] = e
        if not self.rotation.norms:
            self.rotation.turn_(*self._split(qkv)[:2])
        saved["qkv"] = qkv

    def _attend(self, saved: Saved) -> Tensor:
        q, k, v, _ = self._rotated(saved["qkv"])
        saved["attention"] = self.attend.forward(q, k, v)
        return self._output(saved["attention"][0])

    def _output(self, o_THK: Tensor) -> Tensor:
        """What the output projection reads, from attention over values without their bias."""
        if self.centre is not None:
            o_THK = add_centre(o_THK, self.centre)
        return o_THK.flatten(1)

    def _restore(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """o again, recomputing what is missing."""
        if "qkv" not in saved:
            self._project(x_TD, saved, keep_weights=True)
        elif self.nf4_kv and isinstance(saved["qkv"], tuple):
            saved["qkv"] = unpack(saved["qkv"], self.qkv.wide(x_TD.shape[0], backward=True))
        if "attention" not in saved:
            return self._attend(saved)
        return self._output(saved["attention"][0])

    def _finish(self, o_TN: Tensor, x_TD: Tensor, saved: Saved) -> Tensor:
        tokens = x_TD.shape[0]
        e = self.o.extend(tokens)
        tiles = self.context.tiles(tokens)
        if tiles == [None]:
            return self.output.forward(o_TN, e, x_TD, saved, saved["_seeds_o"])
        y_TD, parts = torch.empty_like(x_TD), []
        for rows in tiles:
            part: Saved = {}
            seeds = seeds_of(saved["_seeds_o"], rows)
            y_TD[rows] = self.output.forward(o_TN[rows], e, x_TD[rows], part, seeds)
            parts.append(part)
        saved.update({name: join([part[name] for part in parts]) for name in parts[0]})
        return y_TD

    def _finish_backward(
        self, dy_TD: Tensor, o_TN: Tensor, room: Tensor | None, saved: Saved, sink: GradientSink
    ) -> Tensor:
        """Back through the output projection; returns do."""
        tokens = o_TN.shape[0]
        e = self.o.extend(tokens, backward=True)
        t = saved.pop(f"_t_{self.output.name}")
        tiles = self.context.tiles(tokens)
        do_TN = None if tiles == [None] else torch.empty_like(o_TN)
        behind = self.output.taken(saved)
        for rows in tiles:
            dz = self.output.gradient(cut(dy_TD, rows), cut(room, rows), cut(behind, rows), sink)
            made = self.o.backward(
                dz,
                cut(o_TN, rows),
                cut(t, rows),
                e,
                sink,
                seeds=seeds_of(saved["_seeds_o"], rows),
            )
            assert made is not None
            if do_TN is None:
                return made
            do_TN[rows] = made
        assert do_TN is not None
        return do_TN

    def _attend_backward(self, do_TN: Tensor, saved: Saved, sink: GradientSink) -> Tensor:
        """The gradient of the projections' outputs, in the group's wide layout."""
        qkv, kept = saved.pop("qkv"), saved.pop("attention")
        q, k, v, statistics = self._rotated(qkv)
        if self.nf4_kv:
            # Probabilities and outputs of the rounded keys and values: against the exact ones rows of probabilities
            # would not sum to one, and the gradients of q and k, which are differences, would be mostly that error.
            kept = self.attend.forward(q, k, v)
        dq, dk, dv = self.attend.backward(do_TN.view(q.shape), q, k, v, kept)
        del do_TN, kept, q, k, v
        # Backends write their gradients where they like; the rotation moves them to where the GEMM wants them, which
        # is over the projections themselves, unless its norms still need these.
        wide = self.qkv.wide(qkv.shape[0], backward=True) if self.rotation.norms else qkv
        wide_q, wide_k, wide_v = self._split(wide)
        wide_v.copy_(dv)
        if self.v_bias is not None and self.v_bias.requires_grad:
            add_gradient(sink, self.v_bias, wide_v.sum(0, dtype=torch.float32).flatten())
        raw_q, raw_k, _ = self._split(qkv)
        self.rotation.backward(dq, dk, raw_q, raw_k, statistics, sink, out_q=wide_q, out_k=wide_k)
        return wide

    def _project_backward(
        self,
        dqkv: Tensor,
        dy_TD: Tensor,
        x_TD: Tensor,
        saved: Saved,
        sink: GradientSink,
        need_dx: bool,
        out: Tensor | None,
    ) -> Tensor | None:
        """Back through the projections and the norm in front of them; returns dx."""
        tokens = x_TD.shape[0]
        e = saved.pop("_e_qkv", None) if self.qkv.extends(tokens, backward=True) else None
        e = self.qkv.extend(tokens, backward=True) if e is None else e
        statistics, t = saved.pop("_statistics_x"), saved.pop("_t_qkv")
        tiles = self.context.tiles(tokens)
        if tiles != [None] and out is None and need_dx:
            out = torch.empty_like(x_TD)
        for rows in tiles:
            dx = self.input.backward(
                cut(dqkv, rows),
                cut(x_TD, rows),
                cut(statistics, rows),
                cut(t, rows),
                e,
                sink,
                dresidual=cut(dy_TD, rows),
                need_dx=need_dx,
                seeds=seeds_of(saved["_seeds_qkv"], rows),
                out=cut(out, rows),
            )
            if rows is None:
                return dx
        return out

    def _rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Statistics]:
        """q, k, v as attention takes them, with q/k norms made from the raw projections; their statistics."""
        q, k, v = self._split(qkv)
        if not self.rotation.norms:
            return q, k, v, (None, None)
        q, k, statistics = self.rotation.forward(q, k)
        return q, k, v, statistics

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, heads, K] of q, k and v inside the wide buffer."""
        shape, tokens, first = self.shape, qkv.shape[0], qkv.storage_offset()
        strides, size = (qkv.stride(0), shape.head_dim, 1), shape.head_dim
        q_end = first + shape.heads * size
        k_end = q_end + shape.kv_heads * size
        q = qkv.as_strided((tokens, shape.heads, size), strides, first)
        k = qkv.as_strided((tokens, shape.kv_heads, size), strides, q_end)
        v = qkv.as_strided((tokens, shape.kv_heads, size), strides, k_end)
        return q, k, v

    def _widths(self) -> list[int]:
        """Columns of q, k and v."""
        shape = self.shape
        return [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
