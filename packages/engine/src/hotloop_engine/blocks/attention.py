"""norm, q k v with LoRA, rope, attention, output projection, residual: forward and a written-out backward.

    h = norm(x);  q, k, v = h W_qkv^T;  q, k = rope(q, k);  o = attention(q, k, v);  y = x + o W_o^T

Saved by name: x (by the caller), qkv (rotated; raw where q/k norms need it), attention (o and its log-sum-exp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from hotloop_core.kernels import HeadNorm
from torch import Tensor

from hotloop_engine.attention import Sequences, choose, request
from hotloop_engine.ops.lora_linear import GradientSink, LinearGroup, draw_seeds

from .context import BlockContext, Norm, NormedInput, NormView, ResidualOutput, Saved


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What kind of attention a layer has; the fields are those of `hotloop_core.ModelFacts`."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    interleaved: bool = False


class AttentionBlock:
    """The attention half of a layer, for one call: its weights are read when it is made."""

    input_name = "x"
    names: tuple[str, ...] = ("qkv", "attention", "attention_out")

    def __init__(
        self,
        context: BlockContext,
        shape: AttentionShape,
        *,
        norm: NormView | None,
        qkv: LinearGroup,
        o: LinearGroup,
        cos_PR: Tensor,
        sin_PR: Tensor,
        sequences: Sequences,
        q_norm: NormView | None = None,
        k_norm: NormView | None = None,
        after: NormView | None = None,
        backend: str | None = None,
        deterministic: bool = False,
    ) -> None:
        self.context, self.shape = context, shape
        self.qkv, self.o = qkv, o
        self.norm_views = [view for view in (norm, q_norm, k_norm, after) if view is not None]
        self.input = NormedInput(Norm(norm, context) if norm else None, self.qkv, context)
        self.output = ResidualOutput(
            self.o, Norm(after, context) if after else None, context, "attention_out"
        )
        self.q_norm, self.k_norm = q_norm, k_norm
        self.cos, self.sin = cos_PR.to(context.dtype), sin_PR.to(context.dtype)
        self.sequences = sequences
        self.backend, self.deterministic = backend, deterministic
        self.rope = context.op("rope")

    def tensors(self) -> list[Tensor]:
        """Every tensor that autograd may ask a gradient for."""
        norms = [tensor for view in self.norm_views for tensor in view.tensors()]
        return norms + self.qkv.tensors() + self.o.tensors()

    def forward(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """Returns the residual stream behind attention; fills `saved`."""
        saved["_seeds_qkv"], saved["_seeds_o"] = draw_seeds(self.qkv), draw_seeds(self.o)
        self._project(x_TD, saved)
        o_TN = self._attend(saved)
        return self.output.forward(
            o_TN, self.o.extend(o_TN.shape[0]), x_TD, saved, saved["_seeds_o"]
        )

    def restore_output(self, x_TD: Tensor, saved: Saved) -> Tensor:
        """The residual stream behind attention again, recomputing what is missing on the way."""
        needs_o = "attention_out" not in saved
        o_TN = self._restore(x_TD, saved) if needs_o else x_TD.new_empty(0)
        return self.output.restore(o_TN, x_TD, saved, saved["_seeds_o"])

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
        tokens = x_TD.shape[0]
        o_TN = self._restore(x_TD, saved)
        if self.output.after is not None and "attention_out" not in saved:
            self.output.forward(o_TN, self.o.extend(tokens), x_TD, saved, saved["_seeds_o"])
        dz = self.output.gradient(dy_TD, room, saved, sink)
        do_TN = self.o.backward(
            dz,
            o_TN,
            saved.pop("_t_attention_out"),
            self.o.extend(tokens, backward=True),
            sink,
            seeds=saved["_seeds_o"],
        )
        assert do_TN is not None
        del dz
        dqkv = self._attend_backward(do_TN, saved, sink)
        e = saved.pop("_e_qkv", None) if self.qkv.extends(tokens, backward=True) else None
        return self.input.backward(
            dqkv,
            x_TD,
            saved.pop("_statistics_x"),
            saved.pop("_t_qkv"),
            self.qkv.extend(tokens, backward=True) if e is None else e,
            sink,
            dresidual=dy_TD,
            need_dx=need_dx,
            seeds=saved["_seeds_qkv"],
            out=out,
        )

    def _project(self, x_TD: Tensor, saved: Saved, *, keep_weights: bool = False) -> None:
        wide, saved["_statistics_x"] = self.input.forward(x_TD)
        e = self.qkv.extend(wide.shape[0])
        qkv, saved["_t_qkv"] = self.qkv.forward(wide, e, seeds=saved["_seeds_qkv"])
        if keep_weights:
            saved["_e_qkv"] = e
        q, k, _ = self._split(qkv)
        if self.q_norm is None and self.k_norm is None:
            self.rope.forward(
                q, k, self.cos, self.sin, interleaved=self.shape.interleaved, out_q=q, out_k=k
            )
        saved["qkv"] = qkv

    def _attend(self, saved: Saved) -> Tensor:
        q, k, v = self._rotated(saved["qkv"])
        o_THK, lse = self._backend(q, k).forward(q, k, v, self.sequences, **self._options())
        saved["attention"] = (o_THK, lse)
        return o_THK.reshape(o_THK.shape[0], -1)

    def _restore(self, x_TD: Tensor, saved: Saved) -> Tensor:
        if "qkv" not in saved:
            self._project(x_TD, saved, keep_weights=True)
        if "attention" not in saved:
            return self._attend(saved)
        o_THK, _ = saved["attention"]
        return o_THK.reshape(o_THK.shape[0], -1)

    def _attend_backward(self, do_TN: Tensor, saved: Saved, sink: GradientSink) -> Tensor:
        """The gradient of the projections' outputs, in the group's wide layout."""
        qkv, (o_THK, lse) = saved.pop("qkv"), saved.pop("attention")
        q, k, v = self._rotated(qkv)
        dq, dk, dv = self._backend(q, k).backward(
            do_TN.view(o_THK.shape), q, k, v, o_THK, lse, self.sequences, **self._options()
        )
        del do_TN, o_THK, q, k, v
        # Backends write their gradients where they like; the rotation moves them to where the GEMM wants them.
        wide = self.qkv.wide(qkv.shape[0], backward=True)
        wide_q, wide_k, wide_v = self._split(wide)
        wide_v.copy_(dv)
        raw_q, raw_k, _ = self._split(qkv)
        options = self._head_norms()
        trains = [view for view in (self.q_norm, self.k_norm) if _trains(view)]
        _, _, dwq, dwk = self.rope.backward(
            dq,
            dk,
            self.cos,
            self.sin,
            interleaved=self.shape.interleaved,
            q_THK=raw_q if options else None,
            k_TGK=raw_k if options else None,
            need_dw=bool(trains),
            out_q=wide_q,
            out_k=wide_k,
            **options,
        )
        for view, gradient in ((self.q_norm, dwq), (self.k_norm, dwk)):
            if _trains(view) and gradient is not None:
                sink[id(view.weight)] = gradient
        return wide

    def _rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as attention takes them; with q/k norms from the raw projections, into memory of their own."""
        q, k, v = self._split(qkv)
        options = self._head_norms()
        if options:
            q, k = self.rope.forward(
                q, k, self.cos, self.sin, interleaved=self.shape.interleaved, **options
            )
        return q, k, v

    def _head_norms(self) -> dict[str, HeadNorm]:
        views = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        return {
            name: HeadNorm(w_K=view.weight, eps=view.eps, offset=view.offset)
            for name, view in views.items()
            if view is not None
        }

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, heads, K] of q, k and v inside the wide buffer."""
        shape = self.shape
        counts = (shape.heads, shape.kv_heads, shape.kv_heads)
        parts = torch.split(qkv[:, : self.qkv.n], [c * shape.head_dim for c in counts], dim=1)
        q, k, v = (p.unflatten(1, (c, shape.head_dim)) for p, c in zip(parts, counts, strict=True))
        return q, k, v

    def _backend(self, q: Tensor, k: Tensor):
        asked = request(
            q,
            k,
            self.sequences,
            window=self.shape.window,
            softcap=self.shape.softcap,
            deterministic=self.deterministic,
        )
        return choose(asked, q.device, self.backend)

    def _options(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "scale": shape.scale,
            "window": shape.window,
            "softcap": shape.softcap,
            "deterministic": self.deterministic,
        }


def _trains(view: NormView | None) -> TypeGuard[NormView]:
    return view is not None and view.weight is not None and view.weight.requires_grad
