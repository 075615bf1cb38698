"""A loss in which tokens count differently."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hotloop_core.errors import DataError, WireError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


class _Tokens(NamedTuple):
    """What the wired head answers with, under the names that TRL's has."""

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor
    label_mask: Tensor


def weighted_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    weights: Tensor,
    *,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """L = sum_t w_t nll_t / N over the trained tokens t; with all weights 1 the model's own loss.

    Args:
        model: wired; an adapter or DistributedDataParallel may be around it.
        inputs: of the model's forward, labels [B, S] among them, as `PackedBatch.model_inputs()` has them.
        weights: fp32, one for each label in the order of labels: what its loss is multiplied by.
        num_items: N; None: the number of trained tokens of this batch. Trainer counts those of a whole step. It is no
            sum of weights, so a row of weight 2 pulls twice as hard whatever it is batched with.

    Returns:
        A 0-d fp32 tensor. The logits of the batch are never made.

    Raises:
        WireError: the model is not wired: transformers' own models have no weights of tokens.
        DataError: no labels, or another number of weights.

    """
    from accelerate.utils import extract_model_from_parallel

    from hotloop.wiring import receipt_of
    from hotloop.wiring.root import FUSED, FusedRequest

    if receipt_of(extract_model_from_parallel(model)) is None:
        raise WireError(
            "loss weights need a wired model, this one would not see them; call hotloop.wire(model) first"
        )
    labels = inputs.get("labels")
    if labels is None or "shift_labels" in inputs or weights.numel() != labels.numel():
        found = "none" if labels is None else f"{tuple(labels.shape)}"
        raise DataError(
            f"weights of shape {tuple(weights.shape)} for labels {found}; expected labels (not shifted ones) and one "
            "weight for each"
        )
    request = FusedRequest(temperature=1.0, entropy=False, result=_Tokens)
    tokens: _Tokens = model(**inputs, **{FUSED: request})
    weights_BS = weights.to(tokens.log_probs).reshape(labels.shape)[:, 1:]
    items = tokens.label_mask.sum().clamp(min=1) if num_items is None else num_items
    return -(weights_BS * tokens.log_probs).sum() / items
