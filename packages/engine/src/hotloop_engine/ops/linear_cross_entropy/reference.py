"""Cross entropy of the rows of a tile of logits, and its gradient by hand, in torch.

The equations stand at `hotloop_core.kernels.CrossEntropyRows`, their derivatives in derivation.md.
Works in fp32 (fp64 logits: in fp64), on any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import DataError
from hotloop_core.kernels import RowStatistics

if TYPE_CHECKING:
    from hotloop_core.kernels import HeadLossOptions
    from torch import Tensor


def forward_(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    options: HeadLossOptions,
    dloss_T: Tensor | None,
    want_entropy: bool,
    moments_2T: Tensor | None = None,
) -> RowStatistics:
    """As `CrossEntropyRows.forward_`; `moments_2T` is filled with mean z and log sum p^2.

    Raises:
        DataError: on CPU, where it costs no wait, a label outside the vocabulary.

    """
    if labels_T.device.type == "cpu":
        _require_classes(labels_T, logits_TV.shape[1])
    z_TV, _ = _z_and_slope(logits_TV, options)
    lse_T = z_TV.logsumexp(-1)
    log_prob_T = z_TV.gather(1, labels_T[:, None])[:, 0] - lse_T
    nll_T = -log_prob_T
    if options.label_smoothing:
        a = options.label_smoothing
        nll_T = (1 - a) * nll_T - a * (z_TV.mean(-1) - lse_T)
    entropy_T = None
    if want_entropy:
        log_p_TV = z_TV - lse_T[:, None]
        # A logit of -inf has no share in the entropy: 0 log 0 = 0.
        entropy_T = -(log_p_TV.exp() * log_p_TV.clamp_min(torch.finfo(z_TV.dtype).min)).sum(-1)
    if moments_2T is not None:
        moments_2T[0] = z_TV.mean(-1)
        moments_2T[1] = (2 * (z_TV - lse_T[:, None])).logsumexp(-1)
    statistics = RowStatistics(
        loss_T=nll_T + options.z_loss * lse_T.square(),
        log_prob_T=log_prob_T,
        lse_T=lse_T,
        is_top1_T=z_TV.argmax(-1) == labels_T,
        entropy_T=entropy_T,
    )
    if dloss_T is not None:
        backward_(
            logits_TV,
            labels_T,
            lse_T,
            None,
            options=options,
            dloss_T=dloss_T,
            dlog_prob_T=None,
            dentropy_T=None,
        )
    return statistics


def backward_(
    logits_TV: Tensor,
    labels_T: Tensor,
    lse_T: Tensor,
    entropy_T: Tensor | None,
    *,
    options: HeadLossOptions,
    dloss_T: Tensor | None,
    dlog_prob_T: Tensor | None,
    dentropy_T: Tensor | None,
) -> None:
    """As `CrossEntropyRows.backward_`: dz = alpha p - beta onehot - gamma - dH p (log p + H)."""
    z_TV, slope = _z_and_slope(logits_TV, options)
    zero_T = torch.zeros_like(lse_T)
    dloss_T = zero_T if dloss_T is None else dloss_T
    dlog_prob_T = zero_T if dlog_prob_T is None else dlog_prob_T
    a = options.label_smoothing
    alpha_T = dloss_T * (1 + 2 * options.z_loss * lse_T) - dlog_prob_T
    beta_T = dloss_T * (1 - a) - dlog_prob_T
    gamma_T = dloss_T * (a / z_TV.shape[1])
    log_p_TV = z_TV - lse_T[:, None]
    p_TV = log_p_TV.exp()
    dz_TV = alpha_T[:, None] * p_TV - gamma_T[:, None]
    if dentropy_T is not None:
        assert entropy_T is not None, "the gradient of the entropy needs forward's entropy"
        finite_TV = log_p_TV.clamp_min(torch.finfo(z_TV.dtype).min)
        dz_TV -= dentropy_T[:, None] * p_TV * (finite_TV + entropy_T[:, None])
    dz_TV.scatter_add_(1, labels_T[:, None], -beta_T[:, None])
    logits_TV.copy_(dz_TV * slope)


def scale_rows_(g_TD: Tensor, factor_T: Tensor) -> None:
    """As `CrossEntropyRows.scale_rows_`."""
    g_TD.copy_(g_TD.to(factor_T.dtype) * factor_T[:, None])


def _require_classes(labels_T: Tensor, vocabulary: int) -> None:
    wrong = labels_T[(labels_T < 0) | (labels_T >= vocabulary)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} is no class of a vocabulary of {vocabulary}; expected 0 to "
            f"{vocabulary - 1}, or ignore_index. Was the tokenizer extended, but not the head?"
        )


def _z_and_slope(logits_TV: Tensor, options: HeadLossOptions) -> tuple[Tensor, Tensor | float]:
    """Returns z and dz / dlogits."""
    wide_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    slope = options.scale / options.temperature
    if options.softcap is None:
        return wide_TV * slope, slope
    bent_TV = torch.tanh(wide_TV * (options.scale / options.softcap))
    return bent_TV * (options.softcap / options.temperature), slope * (1 - bent_TV.square())
