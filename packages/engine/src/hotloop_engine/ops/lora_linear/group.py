"""Projections that share their input (q, k, v; gate, up; or one alone), as few wide GEMMs as the hardware allows.

The adapter's product rides in the base GEMM. W, B and s·A lie in one buffer,

    E = [ W    B  b ]      N rows          x_ext = [ x   x(sA)^T  1 ]
        [ sA   0  0 ]      C more rows     dy_ext = [ dy   dy B ]

so that one GEMM each way does everything, accumulated in fp32:

    y  = x_ext  E[:N, :]^T  = x W^T + (x (sA)^T) B^T + b
    dx = dy_ext E[:, :K]    = dy W + (dy B) (sA)

B is block-diagonal for a group, C is the sum of ranks (and one column for biases), padded. Thin GEMMs would read and
write the wide y again. A 16-bit weight has no spare columns: it is copied into E where the tokens outnumber the
columns that a thin GEMM would touch again, else it is used in place with thin GEMMs beside it. See derivation.md.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from hotloop_core.kernels import FourBitWeight
from torch import Tensor

from hotloop_engine.gemm import gemm, matmul_to
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.dropout import dropout

from .one_by_one import one_by_one
from .operand import Operand
from .sink import add_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from hotloop_engine.ops.adapter_gradients.reference import ColumnScale

    from .sink import GradientSink
    from .views import LinearView

CUDA_PITCH = 64  # columns are padded to this, so that every row starts on 128 bytes in 16-bit types

MUCH_WIDER = 3
"""N over K from which dt = dy B is further columns of dx's GEMM, not a pass of its own over dy (gate and up of an 8B at
16,384 tokens: 5.43 ms, apart 5.57; benchmarks/tune_adapters.py). Then dt (sA) is added to dx by a thin GEMM.
"""


class LinearGroup:
    """Projections with one input of K features and N = sum of their output features."""

    def __init__(
        self, views: Sequence[LinearView], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.views = tuple(views)
        self.dtype = dtype
        self.device = device
        self._tensors = [tensor for view in self.views for tensor in view.tensors()]
        sizes = [view.shape[0] for view in self.views]
        ranks = [0 if view.lora is None else view.lora.rank for view in self.views]
        self.k = self.views[0].shape[1]
        self.n = sum(sizes)
        self.rows = [
            slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)
        ]
        self.ranks = [slice(end - r, end) for end, r in zip(accumulate(ranks), ranks, strict=True)]
        self.rank = sum(ranks)
        self.has_bias = any(view.bias is not None for view in self.views)
        needed = self.rank + self.has_bias
        pitch = CUDA_PITCH if device.type == "cuda" else 1
        self.columns = -(-needed // pitch) * pitch
        self.quantised = any(isinstance(view.weight, FourBitWeight) for view in self.views)
        self.drops = any(view.lora is not None and view.lora.dropout > 0 for view in self.views)
        self.sums = not self.drops and implementation("adapter_gradients", device).fits(self)
        """Whether the adapters' gradients come from sums over tokens that whoever makes x or dy may make."""
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.operand = Operand(self)
        self.prepared: dict[
            str, object
        ] = {}  # what implementations keep of this group between launches
        self._cast = any(
            isinstance(view.weight, Tensor) and view.weight.dtype != dtype for view in self.views
        )

    def identity(self) -> tuple[object, ...] | None:
        """Equal where a recording of this group's passes holds for another; None where it must not be recorded.

        Dropout draws anew for each pass, a trained base has gradients too large to hold twice, and what stays
        dequantised may be given back.
        """
        if self.drops or self.trains_base or self.operand.stays:
            return None
        return tuple(view.identity() for view in self.views)

    def tensors(self) -> list[Tensor]:
        """Every tensor that autograd may ask a gradient for."""
        return self._tensors

    @property
    def _adapters_train(self) -> bool:
        return any(
            v.lora is not None and (v.lora.a_RK.requires_grad or v.lora.b_NR.requires_grad)
            for v in self.views
        )

    @property
    def trains_base(self) -> bool:
        """Whether any base weight wants a gradient, which needs the input itself in backward."""
        return any(view.trains for view in self.views)

    def extends(self, tokens: int, *, backward: bool = False) -> bool:
        """Whether E is built for this pass: the copy of W must be cheaper than touching the wide result again.

        The copy moves 2 N K elements. It spares forward 2 T N, backward 2 T K, or, where dy is much wider, T N.
        """
        if self.quantised or self._cast:
            return True
        spared = 2 * self.k if self._much_wider else self.n
        return bool(self.rank) and tokens > (spared if backward else self.k)

    def extend(self, tokens: int, *, backward: bool = False) -> Tensor | None:
        """E [N + C, K + C], or None where the weights are used in place."""
        if (held := self.operand.at_hand) is not None:
            return held
        if not self.extends(tokens, backward=backward):
            return None
        return self.operand.make(backward=backward)

    def held(self) -> AbstractContextManager[None]:
        """Within, E is made once: for several passes over parts of the tokens."""
        return self.operand.held()

    @property
    def _much_wider(self) -> bool:
        return bool(self.rank) and self.n >= MUCH_WIDER * self.k

    def width(self, tokens: int, *, backward: bool = False) -> int:
        """K + C, the width of an input with its columns (backward: N + C); without them where they do not ride."""
        rides = self.extends(tokens, backward=backward) and not (backward and self._much_wider)
        return (self.n if backward else self.k) + (self.columns if rides else 0)

    def wide(self, tokens: int, *, backward: bool = False) -> Tensor:
        """An uninitialised [T, K + C] for the input (backward: [T, N + C] for its gradient)."""
        width = self.width(tokens, backward=backward)
        return torch.empty(tokens, width, dtype=self.dtype, device=self.device)

    def forward(
        self,
        x: Tensor,
        e: Tensor | None,
        *,
        residual: Tensor | None = None,
        alpha: float = 1.0,
        seeds: Sequence[int] = (),
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (y_TN = residual + alpha * projections, t_TR = x (sA)^T for backward).

        x: [T, K], or `wide` with x in its first K columns (the rest is overwritten). out: [T, N], any row stride.
        """
        x_TK = x[:, : self.k]
        rides = x.shape[1] > self.k
        b_NC, a_CK = (None, e[self.n :, : self.k]) if e is not None and rides else self._adapters(e)
        room = x[:, self.k :] if rides else None
        t_TC = self._adapter_input(x_TK, a_CK, e, seeds, out=room)
        y = self._output(x, residual) if out is None else out
        if e is not None and rides:
            gemm(x, e[: self.n].T, y, residual, alpha)
            return y, t_TC[:, : self.rank].clone() if t_TC is not None and self.rank else None
        if e is not None:
            gemm(x_TK, e[: self.n, : self.k].T, y, residual, alpha)
        else:
            self._in_place(x_TK, y, residual, alpha)
        if t_TC is not None:
            assert b_NC is not None
            gemm(t_TC, b_NC.T, y, y, alpha)
        return y, t_TC[:, : self.rank] if t_TC is not None and self.rank else None

    def backward(
        self,
        dy: Tensor,
        x_TK: Tensor,
        t_TR: Tensor | None,
        e: Tensor | None,
        sink: GradientSink,
        *,
        need_dx: bool = True,
        row_scale: Tensor | None = None,
        column_scale: ColumnScale | None = None,
        seeds: Sequence[int] = (),
        db: Tensor | None = None,
    ) -> Tensor | None:
        """Both halves below, for a caller that has the input at hand. Returns dx_TK, or None if it is not needed."""
        dt_TC, dx_TK = self.backward_input(dy, e, need_dx=need_dx, seeds=seeds)
        self.backward_parameters(
            dy,
            dt_TC,
            x_TK,
            t_TR,
            sink,
            row_scale=row_scale,
            column_scale=column_scale,
            seeds=seeds,
            db=db,
        )
        return dx_TK

    def backward_input(
        self, dy: Tensor, e: Tensor | None, *, need_dx: bool = True, seeds: Sequence[int] = ()
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns (dt_TC = dy B, dx_TK).

        dy: [T, N], or `wide(backward=True)` with dy in its first N columns (the rest is overwritten).
        """
        dy_TN = dy[:, : self.n]
        if e is not None and need_dx and self._much_wider:
            dt_TC, dx = self._both_gradients(dy_TN, e)
            if self.drops:
                self._add_dropped(dx, dt_TC, seeds)
            return dt_TC, dx
        rides = e is not None and dy.shape[1] > self.n
        b_NC, a_CK = self._adapters(e)
        dt_TC = self._adapter_gradient(dy, b_NC)
        if not need_dx:
            return dt_TC, None
        dx = torch.empty(dy.shape[0], self.k, dtype=self.dtype, device=self.device)
        if e is not None:
            length = dy.shape[1] if rides else self.n
            gemm(dy[:, :length], e[:length, : self.k], dx)
        else:
            for i, (view, rows) in enumerate(zip(self.views, self.rows, strict=True)):
                assert isinstance(view.weight, Tensor)
                gemm(dy_TN[:, rows], view.weight, dx, dx if i else None, 1.0)
        if dt_TC is not None and not rides:
            gemm(dt_TC, a_CK, dx, dx)
        if self.drops:
            self._add_dropped(dx, dt_TC, seeds)
        return dt_TC, dx

    def backward_parameters(
        self,
        dy: Tensor,
        dt_TC: Tensor | None,
        x_TK: Tensor | None,
        t_TR: Tensor | None,
        sink: GradientSink,
        *,
        row_scale: Tensor | None = None,
        column_scale: ColumnScale | None = None,
        seeds: Sequence[int] = (),
        db: Tensor | None = None,
        da: Tensor | None = None,
    ) -> None:
        """Puts the gradients of every tensor that wants one into `sink`.

        x_TK: forward's input; or, with row_scale [T] and column_scale [K], the tensor that it is the product of
        (rows and columns scaled), so that a normed input need not exist: dA = ((r · s dy B)^T x) · c.
        db, da: the sums of dy and t, of x and dt (see `adapter_gradients`), where whoever made dy or x made them too;
        with da, x is not needed if the base is frozen.
        """
        dy_TN = dy[:, : self.n]
        if dt_TC is not None and t_TR is not None and self._adapters_train:
            if self.sums:
                op = implementation("adapter_gradients", self.device)
                db = op.column_sums(dy_TN, t_TR) if db is None else db
                if da is None:
                    assert x_TK is not None
                    da = op.column_sums(x_TK, dt_TC[:, : self.rank], row_scale_T=row_scale)
                found = op.gradients(self, db, da, column_scale)
                for view, pair in zip(self.views, found, strict=True):
                    if view.lora is not None:
                        add_gradient(sink, view.lora.a_RK, pair[0])
                        add_gradient(sink, view.lora.b_NR, pair[1])
            else:
                assert x_TK is not None
                one_by_one(self, dy_TN, dt_TC, x_TK, t_TR, sink, row_scale, column_scale, seeds)
        for view, rows in zip(self.views, self.rows, strict=True):
            if isinstance(view.weight, Tensor) and view.weight.requires_grad:
                assert x_TK is not None
                add_gradient(
                    sink, view.weight, matmul_to(dy_TN[:, rows].T, x_TK, view.weight.dtype)
                )
            if view.bias is not None and view.bias.requires_grad:
                add_gradient(sink, view.bias, dy_TN[:, rows].sum(0, dtype=self.sum_dtype))

    def _output(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return torch.empty(
            x.shape[0],
            self.n,
            dtype=x.dtype if residual is None else residual.dtype,
            device=x.device,
        )

    def _in_place(self, x_TK: Tensor, y: Tensor, residual: Tensor | None, alpha: float) -> None:
        """The base product from the parameters themselves; a bias rides in the GEMM where it can."""
        for view, rows in zip(self.views, self.rows, strict=True):
            assert isinstance(view.weight, Tensor)
            target = y[:, rows]
            if view.bias is not None and residual is None and alpha == 1.0:
                torch.addmm(view.bias.to(self.dtype), x_TK, view.weight.T, out=target)
                continue
            gemm(
                x_TK, view.weight.T, target, None if residual is None else residual[:, rows], alpha
            )
            if view.bias is not None:
                target.add_(view.bias, alpha=alpha)

    def _adapter_input(
        self,
        x_TK: Tensor,
        a_CK: Tensor,
        e: Tensor | None,
        seeds: Sequence[int],
        out: Tensor | None,
    ) -> Tensor | None:
        """t_TC = x (sA)^T, a one in the bias column of E, zeros in the padding."""
        if not self.columns or (e is None and not self.rank):
            return None
        t_TC = (
            torch.empty(x_TK.shape[0], self.columns, dtype=self.dtype, device=self.device)
            if out is None or not out.shape[1]
            else out
        )
        torch.mm(x_TK, a_CK.T, out=t_TC)
        for i, (view, ranks) in enumerate(zip(self.views, self.ranks, strict=True)):
            if view.lora is not None and view.lora.dropout > 0:
                dropped = dropout(x_TK, view.lora.dropout, seeds[i])
                torch.mm(dropped, self._scaled_a(view).T, out=t_TC[:, ranks])
        if self.has_bias and e is not None:
            t_TC[:, self.rank] = 1.0
        return t_TC

    def _both_gradients(self, dy_TN: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """(dt_TC, dx_TK), side by side in one buffer, from one pass over dy."""
        width = self.k + self.columns
        both = torch.empty(dy_TN.shape[0], width, dtype=self.dtype, device=self.device)
        gemm(dy_TN, e[: self.n], both)
        dx_TK, dt_TC = both[:, : self.k], both[:, self.k :]
        self._clear_bias_column(dt_TC)
        gemm(dt_TC, e[self.n :, : self.k], dx_TK, dx_TK)
        return dt_TC, dx_TK

    def _clear_bias_column(self, dt_TC: Tensor) -> None:
        """dy b can pass fp16's range, and meets a row of zeros in E: infinity times 0 is NaN."""
        if self.has_bias and self.dtype == torch.float16:
            dt_TC[:, self.rank] = 0.0

    def _adapter_gradient(self, dy: Tensor, b_NC: Tensor) -> Tensor | None:
        """dt_TC = dy B, written behind dy where it has room."""
        if not self.rank:
            if dy.shape[1] > self.n:
                dy[:, self.n :].zero_()
            return None
        dt_TC = dy[:, self.n :] if dy.shape[1] > self.n else dy.new_empty(dy.shape[0], self.columns)
        torch.mm(dy[:, : self.n], b_NC, out=dt_TC)
        self._clear_bias_column(dt_TC)
        return dt_TC

    def _add_dropped(self, dx: Tensor, dt_TC: Tensor | None, seeds: Sequence[int]) -> None:
        """The part of dx that comes back through a mask: those rows of sA are zero in E."""
        for i, (view, ranks) in enumerate(zip(self.views, self.ranks, strict=True)):
            if dt_TC is not None and view.lora is not None and view.lora.dropout > 0:
                back = torch.mm(dt_TC[:, ranks], self._scaled_a(view))
                dx += dropout(back, view.lora.dropout, seeds[i])

    def _adapters(self, e: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B of the whole group [N, C], s·A of the whole group [C, K]): the edges of E, or memory of their own."""
        if e is not None:
            return e[: self.n, self.k :], e[self.n :, : self.k]
        b_NC = torch.empty(self.n, self.columns, dtype=self.dtype, device=self.device)
        a_CK = torch.empty(self.columns, self.k, dtype=self.dtype, device=self.device)
        self.fill(b_NC, a_CK)
        return b_NC, a_CK

    def fill(self, b_NC: Tensor, a_CK: Tensor) -> None:
        """Writes B and s·A of all projections, and the biases, to where they lie in E."""
        if self.columns:
            implementation("lora_linear", self.device).fill_columns(self, b_NC, a_CK)

    def _scaled_a(self, view: LinearView) -> Tensor:
        """s·A, multiplied in A's own precision and rounded once."""
        assert view.lora is not None
        return (view.lora.a_RK.detach() * view.lora.scale).to(self.dtype)
