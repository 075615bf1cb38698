"""The head's loss in chunks of tokens: the loop over them, and what autograd sees of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from hotloop_core.errors import GradientError

from hotloop_engine.gemm import gemm, matmul_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotloop_core.kernels import CrossEntropyRows, HeadLossOptions
    from torch import Tensor

    from hotloop_engine.ops.linear_cross_entropy.labels import TrainedRows

PITCH = 64
"""Rows of the tile begin at multiples of this many elements, or cuBLAS takes its slow kernels."""

Outputs = tuple["Tensor", "Tensor", "Tensor | None", "Tensor", "Tensor | None"]
"""loss_T, log_prob_T, entropy_T, is_top1_T, moments_2T (mean z and log sum p^2)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadWork:
    """What one call computes, decided before autograd is entered: inside, grad mode is always off.

    gradient: "none"; "forward", made beside the loss, where all that backward can bring is one
        number per row (the head is frozen), or one for all rows; or "backward", where it is made
        from logits that are computed again.
    dloss: 0-d, in the dtype of the losses: what the gradient made in forward is multiplied by
        before it is rounded, and divided by in backward. The mantissa of 1 / num_items leaves
        backward a power of two, which rounds nothing; its exponent stays out, so that nothing is
        lost to fp16.
    moments: whether mean z and log sum p^2 are returned; they have no gradient.
    entropy_gradient: the entropy may be differentiated. A gradient made in forward does not have
        that part, so the inputs are kept, and all is made again if backward does bring one.
    """

    ops: CrossEntropyRows
    options: HeadLossOptions
    rows: TrainedRows
    chunk_tokens: int
    dtype: torch.dtype
    dloss: Tensor
    entropy: bool
    entropy_gradient: bool
    moments: bool
    gradient: Literal["none", "forward", "backward"]
    train_hidden: bool
    train_weight: bool
    train_bias: bool


class HeadGradients:
    """The gradients of hidden states, head and bias, gathered from chunks of dlogits.

    The head's and the bias's are summed in fp32 (fp64: in fp64) from chunk to chunk and rounded
    once; in a 16-bit head's own dtype every chunk would round again, which eager does not.
    """

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, work: HeadWork) -> None:
        """Starts from zeros: ignored rows have a gradient of zero."""

        def zeros(wanted: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
            return hidden_TD.new_zeros(shape, dtype=dtype) if wanted else None

        wide = torch.promote_types(work.dtype, torch.float32)
        self.hidden_TD = zeros(work.train_hidden, hidden_TD.shape, hidden_TD.dtype)
        self.weight_VD = zeros(work.train_weight, weight_VD.shape, wide)
        self.bias_V = zeros(work.train_bias, weight_VD.shape[:1], wide)

    def add(
        self, dlogits_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, rows: Tensor | slice
    ) -> None:
        """Adds one chunk, its operands in the compute dtype."""
        if self.hidden_TD is not None:
            if isinstance(rows, slice) and self.hidden_TD.dtype == weight_VD.dtype:
                gemm(dlogits_CV, weight_VD, self.hidden_TD[rows])
            else:
                made_CD = matmul_to(dlogits_CV, weight_VD, weight_VD.dtype)
                self.hidden_TD[rows] = made_CD.to(self.hidden_TD.dtype)
        if self.weight_VD is not None:
            _add_product(self.weight_VD, dlogits_CV.t(), hidden_CD)
        if self.bias_V is not None:
            self.bias_V += dlogits_CV.sum(0, dtype=self.bias_V.dtype)

    def scaled(self, factor_T: Tensor, work: HeadWork) -> HeadGradients:
        """Multiplies what was gathered in forward by what backward brought, in place."""
        if work.rows.count:
            factor_T = factor_T / work.dloss
            if self.hidden_TD is not None:
                work.ops.scale_rows_(self.hidden_TD, factor_T)
            for total in (self.weight_VD, self.bias_V):
                if total is not None:  # then all factors are the same
                    total.mul_(factor_T[0])
        return self

    def returned(
        self, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None
    ) -> tuple[Any, ...]:
        """What `HeadLoss.backward` returns: one entry for each argument of `forward`."""
        weight_VD = None if self.weight_VD is None else self.weight_VD.to(weight_dtype)
        bias_V = None if self.bias_V is None else self.bias_V.to(bias_dtype)
        return self.hidden_TD, weight_VD, bias_V, None, None


def chunks(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, work: HeadWork
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Yields (rows, hidden_CD, logits_CV) for each chunk of trained rows, in the compute dtype.

    All logits lie in one buffer: those of a chunk are gone when the next is asked for.
    """
    count, vocabulary = work.rows.count, weight_VD.shape[0]
    pitch = -(-vocabulary // PITCH) * PITCH
    tile = weight_VD.new_empty(min(work.chunk_tokens, count), pitch)
    for start in range(0, count, work.chunk_tokens):
        stop = min(start + work.chunk_tokens, count)
        rows = work.rows.select(start, stop)
        hidden_CD = hidden_TD[rows].to(work.dtype)
        logits_CV = tile[: stop - start, :vocabulary]
        if bias_V is None:
            gemm(hidden_CD, weight_VD.t(), logits_CV)
        else:
            torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=logits_CV)
        yield rows, hidden_CD, logits_CV


def run_forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    work: HeadWork,
) -> tuple[Outputs, Tensor, HeadGradients | None]:
    """Returns (outputs, lse_T, the gradients where they are made here)."""
    wide = torch.promote_types(work.dtype, torch.float32)
    total = labels_T.shape[0]
    loss_T, log_prob_T, lse_T = (hidden_TD.new_zeros(total, dtype=wide) for _ in range(3))
    entropy_T = hidden_TD.new_zeros(total, dtype=wide) if work.entropy else None
    is_top1_T = hidden_TD.new_zeros(total, dtype=torch.bool)
    moments_2T = hidden_TD.new_zeros(2, total, dtype=wide) if work.moments else None
    in_forward = work.gradient == "forward"
    with torch.autocast(hidden_TD.device.type, enabled=False):
        gradients = HeadGradients(hidden_TD, weight_VD, work) if in_forward else None
        weight_VD = weight_VD.to(work.dtype)
        bias_V = None if bias_V is None else bias_V.to(work.dtype)
        for rows, hidden_CD, logits_CV in chunks(hidden_TD, weight_VD, bias_V, work):
            moments: dict[str, Any] = {}  # an implementation without them serves all who need none
            if moments_2T is not None:
                moments["moments_2T"] = moments_2T.new_empty(2, len(logits_CV))
            found = work.ops.forward_(
                logits_CV,
                labels_T[rows],
                options=work.options,
                dloss_T=work.dloss.expand(len(logits_CV)) if in_forward else None,
                want_entropy=work.entropy,
                **moments,
            )
            loss_T[rows] = found.loss_T
            log_prob_T[rows] = found.log_prob_T
            lse_T[rows] = found.lse_T
            is_top1_T[rows] = found.is_top1_T
            if entropy_T is not None and found.entropy_T is not None:
                entropy_T[rows] = found.entropy_T
            if moments_2T is not None:
                moments_2T[:, rows] = moments["moments_2T"]
            if gradients is not None:
                gradients.add(logits_CV, hidden_CD, weight_VD, rows)
    return (loss_T, log_prob_T, entropy_T, is_top1_T, moments_2T), lse_T, gradients


class HeadLoss(torch.autograd.Function):
    """`Outputs` from hidden states, head and labels."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        work: HeadWork,
    ) -> Outputs:
        """As `run_forward`; keeps the gradients, or what making them again needs."""
        outputs, lse_T, gradients = run_forward(hidden_TD, weight_VD, bias_V, labels_T, work)
        ctx.work, ctx.spent = work, False
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        # Not a saved tensor: backward turns it into the gradient that it returns.
        ctx.gradients = gradients
        if work.gradient == "backward" or work.entropy_gradient:
            ctx.save_for_backward(hidden_TD, weight_VD, bias_V, labels_T, lse_T, outputs[2])
        plain = outputs[3:] if work.entropy_gradient else outputs[2:]
        ctx.mark_non_differentiable(*(o for o in plain if o is not None))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        """Gradients of hidden states, head and bias from those of the outputs (None: zeros)."""
        if torch.is_grad_enabled():
            raise GradientError(
                "linear_cross_entropy has no second derivative, and create_graph=True asks for "
                "one. Pass create_graph=False, or compute this loss from logits."
            )
        work: HeadWork = ctx.work
        dloss_T, dlog_prob_T, dentropy_T, *_ = grad_outputs
        if dloss_T is None and dlog_prob_T is None and dentropy_T is None:
            return (None,) * 5
        if work.gradient == "backward" or dentropy_T is not None:
            ctx.gradients = None
            return _made_again(ctx, dloss_T, dlog_prob_T, dentropy_T)
        if ctx.spent:
            raise GradientError(
                "backward reached linear_cross_entropy a second time; its gradient was made once, "
                "beside the loss, and the first backward has used it. Sum the losses and call "
                "backward once, or compute the loss again."
            )
        ctx.spent = True
        gradients, ctx.gradients = ctx.gradients, None
        if dlog_prob_T is None:
            factor_T = dloss_T
        elif dloss_T is None:
            factor_T = -dlog_prob_T
        else:
            factor_T = dloss_T - dlog_prob_T
        return gradients.scaled(factor_T, work).returned(*ctx.dtypes)


def _made_again(
    ctx: Any, dloss_T: Tensor | None, dlog_prob_T: Tensor | None, dentropy_T: Tensor | None
) -> tuple[Any, ...]:
    work: HeadWork = ctx.work
    hidden_TD, weight_VD, bias_V, labels_T, lse_T, entropy_T = ctx.saved_tensors
    with torch.autocast(hidden_TD.device.type, enabled=False):
        gradients = HeadGradients(hidden_TD, weight_VD, work)
        weight_VD = weight_VD.to(work.dtype)
        bias_V = None if bias_V is None else bias_V.to(work.dtype)
        for rows, hidden_CD, logits_CV in chunks(hidden_TD, weight_VD, bias_V, work):
            work.ops.backward_(
                logits_CV,
                labels_T[rows],
                lse_T[rows],
                _rows_of(entropy_T, rows),
                options=work.options,
                dloss_T=_rows_of(dloss_T, rows),
                dlog_prob_T=_rows_of(dlog_prob_T, rows),
                dentropy_T=_rows_of(dentropy_T, rows),
            )
            gradients.add(logits_CV, hidden_CD, weight_VD, rows)
    return gradients.returned(*ctx.dtypes)


def _rows_of(values_T: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if values_T is None else values_T[rows]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total` without rounding the product to the dtype of a and b first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # on CPU, mm has no output of another dtype
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
