"""Loss and log-probabilities from hidden states and the head, never the logits of all tokens.

Chunks of trained tokens go through one reused tile of logits: z = h W^T by cuBLAS, softmax
statistics and dlogits in place by `CrossEntropyRows`, dh = dlogits W by cuBLAS.
"""

from __future__ import annotations

from math import frexp
from typing import TYPE_CHECKING, NamedTuple

import torch
from hotloop_core.errors import ConfigError, UnsupportedError
from hotloop_core.kernels import HeadLossOptions

from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.linear_cross_entropy.chunking import chunk_tokens as choose_chunk
from hotloop_engine.ops.linear_cross_entropy.function import HeadLoss, HeadWork, run_forward
from hotloop_engine.ops.linear_cross_entropy.labels import TrainedRows, shift_labels

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "HeadLossOptions",
    "TokenLosses",
    "TrainedRows",
    "linear_cross_entropy",
    "linear_log_probs",
    "shift_labels",
]

DEFAULT = HeadLossOptions()


class TokenLosses(NamedTuple):
    """One value per label, in the labels' shape, zero (False) where the label is ignored.

    loss, log_prob: fp32 (fp64 inputs: fp64), in nats. entropy: the same, None where not asked for.
    is_top1: bool, whether the label is the first of the largest logits.
    mean_logit, log_sum_sq_prob: the mean of z over the vocabulary and log sum p^2, both without a
        gradient; None where not asked for.
    """

    loss: Tensor
    log_prob: Tensor
    entropy: Tensor | None
    is_top1: Tensor
    mean_logit: Tensor | None = None
    log_sum_sq_prob: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    options: HeadLossOptions = DEFAULT,
    num_items: Tensor | int | None = None,
    rows: TrainedRows | None = None,
    chunk_tokens: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Sum of the token losses of h W^T + b, divided; the equations stand at `CrossEntropyRows`.

    The gradient is made beside the loss, unscaled, and multiplied in backward: two GEMMs, three
    where the head trains (whose gradient is summed in fp32: 4 V D bytes), none beyond the first
    under `no_grad`. A second backward raises.

    Args:
        hidden: (..., D), any float dtype, rows of any stride.
        weight: (V, D), hidden's dtype or fp32. Under autocast both are cast as `F.linear` would;
            otherwise an fp32 head is cast to hidden's dtype, which takes a copy of it.
        labels: (...), int64, already shifted (`shift_labels`). Ignored rows never reach a GEMM. A
            label outside the vocabulary raises on CPU and makes the loss NaN in Triton, where
            reading it would stop the host.
        bias: (V,).
        options: ignore_index, label smoothing, soft cap, scale, z-loss, temperature.
        num_items: what the sum is divided by: the labels of the whole accumulation window, as
            Trainer counts them; a 0-d tensor is never read on the host. None: the labels of this
            call, and then the loss of no label at all is NaN, as `F.cross_entropy`'s.
        rows: which rows are trained, where the caller has begun to count them; None counts here,
            which stops the host once for a number from the device.
        chunk_tokens: the most tokens in one tile; None: see `chunking`.
        impl: "triton", "reference" or a plugin's; None lets the device decide.

    Returns:
        A 0-d tensor of its own, fp32 (fp64 inputs: fp64).

    Raises:
        UnsupportedError: shapes, dtypes or devices that do not go together.
        ConfigError: `chunk_tokens` below 1, or `rows` of other labels.
        DataError: on CPU, a label outside the vocabulary.
        GradientError: backward reached it a second time.

    """
    rows = _rows(labels, rows, options)
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(hidden.device)
    divisor = rows.count if num_items is None else num_items
    losses = _token_losses(
        hidden, weight, labels, bias, options, rows, chunk_tokens, impl, divisor=divisor
    )
    return losses.loss.sum() / divisor


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    options: HeadLossOptions = DEFAULT,
    entropy: bool = False,
    entropy_gradient: bool = False,
    moments: bool = False,
    rows: TrainedRows | None = None,
    chunk_tokens: int | None = None,
    impl: str | None = None,
) -> TokenLosses:
    """Loss, log-probability, entropy and is-top-1 of every label, each with its own gradient.

    Where the head is frozen and the loss is just -log_prob, the gradient is made beside the loss
    (two GEMMs, and a second backward raises); otherwise backward makes the logits again (three
    GEMMs, four where the head trains). So it does where backward brings a gradient of the entropy.

    Args:
        hidden: (..., D); this and all that is not listed here as in `linear_cross_entropy`.
        weight: (V, D).
        labels: (...), int64.
        bias: (V,).
        options: temperature and the rest.
        entropy: whether to return the entropy of each trained position.
        entropy_gradient: whether it can be differentiated; needs `entropy`. Costs two GEMMs where
            backward then brings such a gradient, and until backward the inputs are kept.
        moments: whether to return `mean_logit` and `log_sum_sq_prob`.
        rows: which rows are trained.
        chunk_tokens: the most tokens in one tile.
        impl: which implementation runs.

    Raises:
        UnsupportedError, DataError, GradientError: as in `linear_cross_entropy`.
        ConfigError: the same, or `entropy_gradient` without `entropy`.

    """
    if entropy_gradient and not entropy:
        raise ConfigError("entropy_gradient=True needs entropy=True; pass both or neither.")
    return _token_losses(
        hidden,
        weight,
        labels,
        bias,
        options,
        _rows(labels, rows, options),
        chunk_tokens,
        impl,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        moments=moments,
    )


def _rows(labels: Tensor, rows: TrainedRows | None, options: HeadLossOptions) -> TrainedRows:
    if rows is None:
        return TrainedRows(labels, ignore_index=options.ignore_index)
    if rows.total != labels.numel():
        raise ConfigError(
            f"rows were counted on {rows.total} labels, this call has {labels.numel()}; count the "
            "labels that you pass."
        )
    return rows


def _token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: HeadLossOptions,
    rows: TrainedRows,
    chunk_tokens: int | None,
    impl: str | None,
    *,
    divisor: Tensor | int | None = None,
    entropy: bool = False,
    entropy_gradient: bool = False,
    moments: bool = False,
) -> TokenLosses:
    """The token losses.

    A `divisor` promises that only the sum of the losses, divided by it, is differentiated: backward
    then brings one number for all rows.
    """
    dtype = _compute_dtype(hidden, weight, bias, labels)
    uniform = divisor is not None
    train_hidden, train_weight, train_bias = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    )
    if not (train_hidden or train_weight or train_bias):
        gradient = "none"
    elif uniform or not (train_weight or train_bias or not options.loss_is_nll):
        gradient = "forward"
    else:
        gradient = "backward"
    work = HeadWork(
        ops=implementation("linear_cross_entropy", hidden.device, impl),
        options=options,
        rows=rows,
        chunk_tokens=choose_chunk(rows.count, weight, dtype, chunk_tokens),
        dtype=dtype,
        dloss=_mantissa(divisor, hidden, dtype),
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        moments=moments,
        gradient=gradient,
        train_hidden=train_hidden,
        train_weight=train_weight,
        train_bias=train_bias,
    )
    arguments = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), work)
    if gradient == "none":
        with torch.no_grad():
            outputs, _, _ = run_forward(*arguments)
    else:
        outputs = HeadLoss.apply(*arguments)
    loss_T, log_prob_T, entropy_T, is_top1_T, moments_2T = outputs
    shape = labels.shape
    mean_logit, log_sum_sq_prob = (None, None) if moments_2T is None else moments_2T.view(2, *shape)
    return TokenLosses(
        loss=loss_T.view(shape),
        log_prob=log_prob_T.view(shape),
        entropy=None if entropy_T is None else entropy_T.view(shape),
        is_top1=is_top1_T.view(shape),
        mean_logit=mean_logit,
        log_sum_sq_prob=log_sum_sq_prob,
    )


def _mantissa(divisor: Tensor | int | None, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The mantissa of 1 / divisor, 0-d, in the losses' dtype; 1 where there is no divisor."""
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(divisor, torch.Tensor):
        return divisor.to(wide).reciprocal().frexp().mantissa
    return hidden.new_full((), frexp(1 / divisor)[0] if divisor else 1.0, dtype=wide)


def _compute_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> torch.dtype:
    """The dtype of the GEMMs; refuses operands that do not go together."""
    operands = (weight,) if bias is None else (weight, bias)
    shapes_fit = (
        weight.dim() == 2
        and hidden.shape[-1:] == weight.shape[1:]
        and hidden.shape[:-1] == labels.shape
        and (bias is None or bias.shape == weight.shape[:1])
    )
    same_device = all(t.device == hidden.device for t in (*operands, labels))
    if not shapes_fit or not same_device or labels.dtype != torch.int64:
        found = ", ".join(
            f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
            for name, t in (
                ("hidden", hidden),
                ("weight", weight),
                ("bias", bias),
                ("labels", labels),
            )
            if t is not None
        )
        raise UnsupportedError(
            f"found {found}; expected hidden (..., D), weight (V, D), bias (V,) and int64 labels "
            "(...), all on one device."
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for tensor in operands:
        if tensor.dtype not in (hidden.dtype, torch.float32):
            raise UnsupportedError(
                f"the head is {tensor.dtype}, the hidden states are {hidden.dtype}; without "
                "autocast the head must have the same dtype or fp32. Cast one of them."
            )
    return hidden.dtype
