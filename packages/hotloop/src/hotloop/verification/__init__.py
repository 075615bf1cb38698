"""`verify`: loss and every gradient of the wired model and of eager PyTorch, both against higher-precision truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import ConfigError, DataError
from torch import Tensor, nn

from hotloop.wiring import receipt_of
from hotloop.wiring.layer import sequences_of

from .bisection import bisect_ops
from .compare import FLOOR, Question, Standard, largest_finite_scale, wired_run
from .report import Bisection, Report, Row, Trial
from .truth import Gradients, exact_gradients, quantised
from .undisturbed import checkpointed, training_without_dropout, unwired, wired

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Bisection", "Report", "Row", "Trial", "verify"]

MASKED = -100


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    slack: float = 0.2,
    bisect: bool = False,
) -> Report:
    """Compares the wired model with eager PyTorch on this batch, both against truth.

    Truth is transformers' own code in fp32 (in fp64 where the model computes in fp32), one decoder layer at a time: it
    needs, beside the model, one layer, the embeddings and the logits in that precision on the device, and on the host
    the residual stream between layers and the gradients of what trains. Eager is the model's own forward under
    autocast in the compute dtype, as Trainer runs it. The model is left as it was found: wiring, modes, gradients,
    random state; one that is not wired is wired for the comparison. Dropout is off meanwhile, attention deterministic.

    Args:
        model: a transformers ...ForCausalLM or a PEFT model over one, wired or not, of which something trains.
        batch: what its forward takes, input_ids [B, S] and labels [B, S] among it.
        dtype: compute dtype; None: that of the 4-bit layers, else of the weights. fp32 means no autocast.
        slack: how much larger than eager's an error may be, as a share of it: of the whole gradient, of each layer, and
            of each kind of parameter over all layers. Rounding is random, so a single parameter on a single batch may
            have OUTLIER times eager's error. A tiny model or a handful of tokens needs more slack.
        bisect: run again with one op at a time replaced by its torch reference, and name the one that moves the error.

    Returns:
        Relative errors of the loss, of each trained parameter's gradient, of groups of them, and of all, worst first.

    Raises:
        ConfigError: nothing trains, or a dtype that is none of fp32, bf16, fp16.
        DataError: no labels, or every label is masked.
        GradientError: truth or eager is not finite, so there is nothing to compare with.
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
        root = receipt.model
        dtype = _compute_dtype(root) if dtype is None else dtype
        if dtype not in FLOOR:
            raise ConfigError(f"dtype={dtype}; expected {', '.join(map(str, FLOOR))}")
        exact_dtype = torch.float64 if dtype == torch.float32 else torch.float32
        inputs, notes = _inputs(batch, device)
        ask = Question(model=model, inputs=inputs, trained=trained, dtype=dtype)
        with unwired(receipt):
            exact = exact_gradients(root, receipt.family.layers, inputs, trained, exact_dtype)
            with checkpointed(root):
                ask, eager = largest_finite_scale(ask)
            standard = Standard.of(eager, exact, dtype, slack)
            losses = {"eager": eager.loss, "truth": exact.loss}
            del eager
        ours = wired_run(ask, receipt)
        rows = standard.rows(ours)
        notes += _notes(ask, exact, receipt.left_alone, drops=drops)
        return Report(
            rows=rows,
            losses={"ours": ours.loss, **losses},
            dtype=str(dtype).removeprefix("torch."),
            truth_dtype=str(exact_dtype).removeprefix("torch."),
            slack=slack,
            tokens=inputs["labels"].numel(),
            notes=tuple(notes),
            bisection=bisect_ops(ask, receipt, standard, rows) if bisect else None,
        )


def _compute_dtype(root: nn.Module) -> torch.dtype:
    for module in root.modules():
        if quantised(module):
            return module.compute_dtype or module.weight.quant_state.dtype  # type: ignore[union-attr,return-value]
    return root.dtype  # type: ignore[return-value]


def _inputs(batch: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """The batch on the device, with labels that every implementation trains on alike.

    The wired model lets no token predict the first token of another row or one behind padding; transformers does, so
    those labels are masked for all three.
    """
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        raise DataError(
            f"the batch has {', '.join(map(str, batch)) or 'nothing'}, and no labels; pass "
            "labels=input_ids.clone() to train on every token"
        )
    mask = inputs.get("attention_mask")
    sequences = sequences_of(
        labels.shape[0],
        labels.shape[1],
        device,
        mask,
        inputs.get("position_ids"),
        inputs.get("cu_seq_lens_q"),
    )
    masked = labels.clone()
    masked.view(-1)[sequences.cu_seqlens[:-1].long()] = MASKED
    if mask is not None:
        masked[mask == 0] = MASKED
    if bool((masked == MASKED).all()):
        raise DataError(
            "every label of the batch is masked (-100) or first in its row, so there is no loss; pass a batch with "
            "trained tokens"
        )
    inputs |= {"labels": masked, "use_cache": False}
    first_only = masked[:, 1:].equal(labels[:, 1:])  # no one ever trains on the first of a row
    notes = (
        [] if first_only else ["labels of padding and of each packed row's first token were masked"]
    )
    return inputs, notes


def _notes(
    ask: Question, exact: Gradients, left_alone: Mapping[str, str], *, drops: bool
) -> list[str]:
    notes = ["dropout was off"] if drops else []
    if ask.scale != 1:
        notes.append(f"the loss was scaled by {ask.scale:g}, as GradScaler does for float16")
    silent = [n for n, g in exact.by_name.items() if g is None or not bool(g.any())]
    if silent:
        notes.append(
            f"{len(silent)} of {len(exact.by_name)} gradients are zero in truth and prove nothing "
            f"({silent[0]} ...); of a fresh adapter, whose B is zero, these are all of A"
        )
    return notes + [f"{path}: {why}" for path, why in left_alone.items()]
