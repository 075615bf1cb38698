"""The norms over q and k that some families have, and the rotation behind them: forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hotloop_core.kernels import HeadNorm

from hotloop_engine.ops.lora_linear import add_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from hotloop_engine.ops.lora_linear import GradientSink

    from .context import BlockContext, NormView

Statistics = tuple["Tensor | None", "Tensor | None"]
"""1 / rms [T] fp32 of q and of k, where their norms go over all heads."""


class Rotation:
    """q, k [T, heads, K] -> rope(q_norm(q)), rope(k_norm(k)).

    over: what a norm spans, each head (then it is part of the rotation's kernel) or all heads together
    (arXiv:2501.00656 section 2.1).
    """

    def __init__(
        self,
        context: BlockContext,
        cos_PR: Tensor,
        sin_PR: Tensor,
        *,
        interleaved: bool,
        q_norm: NormView | None,
        k_norm: NormView | None,
        over: Literal["head", "all"] = "head",
    ) -> None:
        self.q_norm, self.k_norm, self.over = q_norm, k_norm, over
        self._rope, self._norm = context.op("rope"), context.op("rms_norm")
        # In the model's own dtype: those of OLMo, and of any model under autocast, are not rounded to 16 bits.
        self._tables = cos_PR, sin_PR
        self._interleaved = interleaved

    @property
    def norms(self) -> bool:
        """Whether there is a norm, whose backward needs q and k as they were before it."""
        return self.q_norm is not None or self.k_norm is not None

    def identity(self) -> tuple[object, ...]:
        """What must be equal for what was recorded of it to hold."""
        tables = [(table.data_ptr(), table.shape, table.stride()) for table in self._tables]
        return (*tables, self._interleaved, self.over)

    def turn_(self, q_THK: Tensor, k_TGK: Tensor) -> None:
        """Only the rotation, in place."""
        self._rope.forward(
            q_THK, k_TGK, *self._tables, interleaved=self._interleaved, out_q=q_THK, out_k=k_TGK
        )

    def forward(self, q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor, Statistics]:
        """Returns normed and rotated q and k in memory of their own, and what backward needs beside the inputs."""
        if self.over == "head":
            q, k = self._rope.forward(
                q_THK, k_TGK, *self._tables, interleaved=self._interleaved, **self._head_norms()
            )
            return q, k, (None, None)
        q, q_rstd = self._over_all(q_THK, self.q_norm)
        k, k_rstd = self._over_all(k_TGK, self.k_norm)
        self.turn_(q, k)
        return q, k, (q_rstd, k_rstd)

    def backward(
        self,
        dq_THK: Tensor,
        dk_TGK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        statistics: Statistics,
        sink: GradientSink,
        *,
        out_q: Tensor,
        out_k: Tensor,
    ) -> None:
        """Writes the gradients of forward's inputs; adds those of the norms' weights to `sink`.

        q, k: forward's inputs, not read where there are no norms. The outputs may lie over them then. dq and dk are
        written over where the norms go over all heads.
        """
        if self.norms and self.over == "all":
            self._rope.backward(
                dq_THK,
                dk_TGK,
                *self._tables,
                interleaved=self._interleaved,
                out_q=dq_THK,
                out_k=dk_TGK,
            )
            self._over_all_backward(dq_THK, q_THK, self.q_norm, statistics[0], sink, out_q)
            self._over_all_backward(dk_TGK, k_TGK, self.k_norm, statistics[1], sink, out_k)
            return
        _, _, dwq, dwk = self._rope.backward(
            dq_THK,
            dk_TGK,
            *self._tables,
            interleaved=self._interleaved,
            q_THK=q_THK if self.norms else None,
            k_TGK=k_TGK if self.norms else None,
            need_dw=_trains(self.q_norm) or _trains(self.k_norm),
            out_q=out_q,
            out_k=out_k,
            **self._head_norms(),
        )
        for view, gradient in ((self.q_norm, dwq), (self.k_norm, dwk)):
            if view is not None and view.weight is not None and gradient is not None:
                add_gradient(sink, view.weight, gradient)

    def _head_norms(self) -> dict[str, HeadNorm]:
        views = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        return {
            name: HeadNorm(w_K=view.weight, eps=view.eps, offset=view.offset)
            for name, view in views.items()
            if view is not None
        }

    def _over_all(self, x_THK: Tensor, view: NormView | None) -> tuple[Tensor, Tensor | None]:
        if view is None:
            return x_THK.clone(), None
        y, rstd, _ = self._norm.forward(
            x_THK.flatten(1), view.weight, eps=view.eps, offset=view.offset
        )
        return y.view(x_THK.shape), rstd

    def _over_all_backward(
        self,
        dy_THK: Tensor,
        x_THK: Tensor,
        view: NormView | None,
        rstd_T: Tensor | None,
        sink: GradientSink,
        out: Tensor,
    ) -> None:
        if view is None:
            out.copy_(dy_THK)
            return
        _, dw = self._norm.backward(
            dy_THK.flatten(1),
            x_THK.flatten(1),
            view.weight,
            rstd_T,
            offset=view.offset,
            need_dw=_trains(view),
            out=out.flatten(1),
        )
        if view.weight is not None and dw is not None:
            add_gradient(sink, view.weight, dw)


def _trains(view: NormView | None) -> bool:
    return view is not None and view.weight is not None and view.weight.requires_grad
