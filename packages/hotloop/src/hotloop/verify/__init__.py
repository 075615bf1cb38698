"""`verify`: loss and every gradient of the wired model and of eager PyTorch, both against higher-precision truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from hotloop.wiring import receipt_of
from hotloop.wiring.layer import sequences_of
from hotloop_core.errors import ConfigError, DataError
from torch import Tensor, nn

from .bisection import bisection
from .report import Bisection, Report, Row, Trial
from .truth import Gradients, exact_gradients
from .undisturbed import attributes, checkpointed, training_without_dropout, unwired, wired

if TYPE_CHECKING:
    from hotloop.wiring import Receipt

__all__ = ["Bisection", "Report", "Row", "Trial", "verify"]

FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative error that counts as exact: about the rounding of one stored result, or, in fp32, of a sum of many."""
LARGEST_LOSS_SCALE = 2.0**16
"""Where torch's GradScaler starts; it is halved until eager's gradients are finite."""
_PIECE = 2**24  # elements that are compared at a time, so that an embedding's gradient needs no fp64 copy


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    slack: float = 0.1,
    bisect: bool = False,
) -> Report:
    """Compares the wired model with eager PyTorch on this batch, both against truth.

    Truth is transformers' own code in fp32 (in fp64 where the model computes in fp32), one decoder layer at a time, so
    it needs the model, one layer and the embeddings in fp32 on the device, and on the host the residual stream between
    layers and the fp32 gradients of what trains. Eager is the model's own forward under autocast in the compute dtype,
    as Trainer runs it. The model is left as it was found: wiring, modes, gradients, random state; one that is not
    wired is wired for the comparison. Dropout is off meanwhile, attention is deterministic.

    Args:
        model: a transformers ...ForCausalLM or a PEFT model over one, wired or not, with at least one parameter that
            trains.
        batch: what its forward takes; input_ids [B, S] and labels [B, S] among it.
        dtype: compute dtype; None: that of the 4-bit layers, else of the weights. fp32 means no autocast.
        slack: how much larger than eager's an error may be, as a share of it. Rounding is random: two correct paths
            differ by several percent on a parameter.
        bisect: run again with one op at a time replaced by its torch reference, and name the one that moves the error.

    Returns:
        Relative errors of the loss, of each trained parameter's gradient and of the whole gradient, worst first.

    Raises:
        ConfigError: nothing trains, or a dtype that is none of fp32, bf16, fp16.
        DataError: no labels, or every label is masked.
        WireError: the model cannot be wired.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            "no parameter of the model trains; put adapters on it (hotloop.add_lora) or call "
            "model.requires_grad_(True)"
        )
    device = next(iter(trained.values())).device
    with (
        training_without_dropout(model, device) as drops,
        wired(model, receipt_of(model)) as receipt,
    ):
        dtype = _compute_dtype(receipt.model) if dtype is None else dtype
        if dtype not in FLOOR:
            raise ConfigError(f"dtype={dtype}; expected float32, bfloat16 or float16")
        inputs, notes = _inputs(batch, device)
        notes += ["dropout was off"] if drops else []
        notes += [f"{path}: {why}" for path, why in receipt.left_alone.items()]
        exact_dtype = torch.float64 if dtype == torch.float32 else torch.float32
        with unwired(receipt):
            exact = exact_gradients(
                receipt.model, receipt.family.layers, inputs, trained, exact_dtype
            )
            with checkpointed(receipt.model):
                eager, scale = _scaled_run(model, inputs, trained, dtype)
            eager_errors = _errors(eager, exact)
            del eager
        notes += _notes(exact, scale)
        allowed = {n: max(FLOOR[dtype], (1 + slack) * e) for n, e in eager_errors.items()}
        ours_loss = math.nan

        def ours(**options: Any) -> list[Row]:
            nonlocal ours_loss
            options["deterministic"] = True
            with attributes((receipt.shared, name, value) for name, value in options.items()):
                found = _run(model, inputs, trained, dtype, scale)
            ours_loss = found.loss
            errors = _errors(found, exact)
            return [
                Row(name=n, ours=errors[n], eager=eager_errors[n], allowed=allowed[n])
                for n in errors
            ]

        halves = bisection(ours, receipt) if bisect else None
        rows = ours()
    losses = {"ours": ours_loss, "eager": eager_loss, "truth": exact.loss}
