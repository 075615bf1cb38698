"""The forward of the wired root (…ForCausalLM): the loss from hidden states, logits only where somebody reads them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from hotloop_core.errors import DataError, UnsupportedError
from hotloop_core.kernels import HeadLossOptions
from hotloop_core.plan import KEEP_ALL
from hotloop_engine.blocks import can_record
from hotloop_engine.ops.linear_cross_entropy import (
    TrainedRows,
    linear_cross_entropy,
    linear_log_probs,
    shift_labels,
)
from torch import Tensor, nn

from hotloop.planner import plan_again

from .build import compute_dtype
from .classes import STATE, role
from .head import fused_head, head_weight
from .layer import CACHES, SEQUENCES, Shared, sequences_of
from .lazy import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from hotloop_core import FamilySpec
    from hotloop_engine.attention import Sequences

FUSED = "hotloop_head"
"""The keyword by which TRL's request for a fused head travels through whatever wraps the root's forward."""


@dataclass(eq=False)
class RootState:
    """The wired root's own part."""

    family: FamilySpec
    shared: Shared
    receipt: Any

    def options(self, temperature: float = 1.0, ignore_index: int = -100) -> HeadLossOptions:
        """The head's options for this model."""
        facts = self.shared.facts
        return HeadLossOptions(
            ignore_index=ignore_index,
            softcap=facts.logit_softcap,
            scale=1.0 / facts.logit_divisor,
            temperature=temperature,
        )


@dataclass(frozen=True, kw_only=True)
class FusedRequest:
    """What TRL asked its fused head for."""

    temperature: float
    entropy: bool
    result: type
    moments: bool = False


def call(root: nn.Module, own_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Turns TRL's `fused_lm_head=True` into a request that reaches `forward` through every wrapper on the way."""
    if kwargs.get("fused_lm_head") and STATE in root.__dict__ and _fused_head(root):
        request = _fused_request(root)
        if request is not None:
            del kwargs["fused_lm_head"]
            kwargs[FUSED] = request
    return own_call(*args, **kwargs)


def _fused_request(root: Any) -> FusedRequest | None:
    """Reads what TRL's own closure would compute; None leaves the call to it.

    That is so for outputs that this head does not have, and for a closure of another TRL that does not say what it
    computes: a temperature must never be guessed.
    """
    for name in (
        "_original_forward",
        "forward",
    ):  # accelerate keeps what it wrapped under the first
        bound = root.__dict__.get(name)
        function = getattr(bound, "__func__", bound)
        if getattr(getattr(function, "__code__", None), "co_name", None) != "_fused_forward":
            continue
        cells = inspect.getclosurevars(cast("Callable[..., Any]", function))
        known = cells.nonlocals
        if not known.keys() >= {"outputs", "temperature", "cast_lm_head_to_fp32"}:
            return None
        asked = set(known["outputs"])
        if known["cast_lm_head_to_fp32"] or not asked <= _FUSED_OUTPUTS:
            return None
        return FusedRequest(
            temperature=float(known["temperature"]),
            entropy="entropy" in asked,
            moments=bool(asked & _MOMENTS),
            result=cells.globals["FusedCausalLMOutput"],
        )
    return None


_MOMENTS = {"mean_logits", "log_sum_sq_probs"}
_FUSED_OUTPUTS = {"log_probs", "entropy", "is_top1", *_MOMENTS}


@role("root", call=call)
def forward(root: nn.Module, own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As the model's own forward; with labels and no cache the loss comes from the fused head."""
    state: RootState = root.__dict__[STATE]
    if args:
        bound = inspect.signature(own_forward).bind_partial(*args)
        kwargs = {**bound.arguments, **kwargs}
    request: FusedRequest | None = kwargs.pop(FUSED, None)
    cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache")
    labels = kwargs.get("labels")
    if kwargs.get("output_attentions") is None and root.config.output_attentions:  # type: ignore[union-attr]
        kwargs["output_attentions"] = True  # so that the layers see it
    if kwargs.get("use_cache") is None and (request or labels is not None or _records(root)):
        kwargs["use_cache"] = (
            False  # the default, True, would build a cache that training never reads
        )
    if not cached:
        kwargs = _with_sequences(kwargs, state.shared.allow_eager)
        if _records(root):
            _plan_for(root, state, kwargs.get(SEQUENCES))
    elif _records(root):
        kwargs[CACHES] = True
    recorder = state.shared.recorder
    with recorder.passing(None if cached else _to_record(root, state, kwargs), *_autocast()):
        if request is not None:
            return _fused(root, state, request, kwargs)
        trains = labels is not None or kwargs.get("shift_labels") is not None
        if trains and not cached and _plain_loss(root) and _fused_head(root):
            return _with_loss(root, state, kwargs)
        return own_forward(**kwargs)


def _to_record(root: Any, state: RootState, kwargs: Mapping[str, Any]) -> Sequences | None:
    """The batch's sequences, where its layers may run by recordings.

    All is kept on the card, and nobody asks what a layer gave, which the next pass overwrites.
    """
    shared, sequences = state.shared, kwargs.get(SEQUENCES)
    asked = ("output_hidden_states", "output_attentions")
    if (
        sequences is None
        or not sequences.tokens
        or not (shared.cuda_graphs and _records(root) and can_record(sequences.device))
        or any(kwargs.get(name, getattr(root.config, name, False)) for name in asked)
        or shared.homes is not None
        or shared.plan.tile
        or any(layer != KEEP_ALL for layer in shared.plan.layers)
    ):
        return None
    return sequences


def _autocast() -> tuple[object, ...]:
    enabled = torch.is_autocast_enabled("cuda")
    return (enabled, torch.get_autocast_dtype("cuda") if enabled else None)


def _fused_head(root: Any) -> bool:
    state: RootState = root.__dict__[STATE]
    return fused_head(root.get_output_embeddings(), state.shared.allow_eager)


def _records(root: nn.Module) -> bool:
    return root.training and torch.is_grad_enabled()


def _plan_for(root: Any, state: RootState, sequences: Sequences | None) -> None:
    """Plans again where a batch outgrows the plan; what does not fit moves further weights to the host.

    A batch that fits no plan is refused before it runs.
    """
    now = state.shared.plan
    if sequences is None or not now.tokens:
        return
    if sequences.tokens <= now.tokens and sequences.longest <= now.longest:
        return
    larger = plan_again(root, now, tokens=sequences.tokens, longest=sequences.longest)
    state.receipt.replan(larger)


def _with_sequences(kwargs: dict[str, Any], allow_eager: Collection[str]) -> dict[str, Any]:
    """Works out once per batch what each layer would have to ask the positions for."""
    tokens = (
        kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    )
    mask = kwargs.get("attention_mask")
    if tokens is None or (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2)):
        return kwargs
    try:
        found = sequences_of(
            tokens.shape[0],
            tokens.shape[1],
            tokens.device,
            mask,
            kwargs.get("position_ids"),
            kwargs.get("cu_seq_lens_q"),
        )
    except UnsupportedError:
        if "mask" not in allow_eager:
            raise
        return kwargs  # each layer finds the same, and runs the model's own code
    if kwargs.get("cu_seq_lens_q") is not None and kwargs.get("position_ids") is None:
        # A layer that is left to the model's own code knows rows apart by their positions alone.
        kwargs = {**kwargs, "position_ids": found.positions().view(tokens.shape[:2])}
    return {**kwargs, SEQUENCES: found}


def _plain_loss(root: Any) -> bool:
    """Whether the loss is the one that the fused head computes: there is a head, and nobody put in another loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return root.get_output_embeddings() is not None and root.loss_function is ForCausalLMLoss


_LOSS_ONLY = (
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "ignore_index",
    "logits_to_keep",
    "return_dict",
)


def _hidden(root: nn.Module, state: RootState, kwargs: Mapping[str, Any]) -> Any:
    """The decoder's outputs, for the loss that follows."""
    decoder = root.get_submodule(state.family.decoder)
    waiting = state.shared.waiting
    waiting.loss_follows = True
    try:
        given = {k: v for k, v in kwargs.items() if k not in _LOSS_ONLY}
        return decoder(**given, return_dict=True)
    finally:
        waiting.loss_follows = False


def _targets(kwargs: Mapping[str, Any], ignore_index: int) -> Tensor:
    """Labels [B, S], one for each position: given shifted, or shifted here; never across a packed boundary."""
    shifted = kwargs.get("shift_labels")
    labels = kwargs["labels"] if shifted is None else shifted
    ids = kwargs.get("input_ids")
    expected = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
    if labels.shape != expected:
        raise DataError(
            f"labels of shape {tuple(labels.shape)} for a batch of {tuple(expected)}; give one label for each token, "
            f"{ignore_index} where none is trained"
        )
    if shifted is not None:
        return shifted
    sequences = kwargs.get(SEQUENCES)
    packed = None
    if sequences is not None and sequences.count > labels.shape[0]:
        packed = sequences.cu_seqlens
    return shift_labels(labels, ignore_index=ignore_index, cu_seqlens_S1=packed)


def _with_loss(root: Any, state: RootState, kwargs: dict[str, Any]) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    ignore_index = kwargs.get("ignore_index", -100)
    labels = _targets(kwargs, ignore_index)
    rows = TrainedRows(
        labels, ignore_index=ignore_index
    )  # their number is known before the layers are done
    outputs = _hidden(root, state, kwargs)
    hidden = outputs.last_hidden_state
    head = head_weight(root.get_output_embeddings(), hidden)
    items = kwargs.get("num_items_in_batch")
    items = rows.count if items is None else items
    loss = linear_cross_entropy(
        head.hidden,
        head.weight,
        labels,
        bias=head.bias,
        options=state.options(ignore_index=ignore_index),
        num_items=_at_least_one(items),
        rows=rows,
        impl=state.shared.ops.get("linear_cross_entropy"),
    )
    vocabulary = head.weight.shape[0]
    result = CausalLMOutputWithPast(
        loss=loss,
        logits=_lazy_logits(root, state, hidden, vocabulary, kwargs.get("logits_to_keep", 0)),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )
    wants_dict = kwargs.get("return_dict")
    wants_dict = root.config.return_dict if wants_dict is None else wants_dict
    return result if wants_dict else result.to_tuple()


def _at_least_one(items: Tensor | int) -> Tensor | int:
    """A batch without any trained token has the loss 0 and the gradient 0, not 0 / 0, which would ruin the weights."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def _lazy_logits(
    root: Any, state: RootState, hidden: Tensor, vocabulary: int, keep: int | Tensor
) -> LazyTensor:
    if isinstance(keep, int):
        hidden = hidden[:, -keep:] if keep else hidden
    else:
        hidden = hidden[:, keep]
    facts = state.shared.facts
    kind, dtype = hidden.device.type, compute_dtype(hidden)
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(kind)
    cast = torch.get_autocast_dtype(kind)

    def make() -> Tensor:
        with torch.set_grad_enabled(grad), torch.autocast(kind, dtype=cast, enabled=autocast):
            logits = root.get_output_embeddings()(hidden) / facts.logit_divisor
            if facts.logit_softcap is None:
                return logits
            return torch.tanh(logits / facts.logit_softcap) * facts.logit_softcap

    return LazyTensor(make, (*hidden.shape[:-1], vocabulary), dtype, hidden.device)


def _fused(root: Any, state: RootState, request: FusedRequest, kwargs: dict[str, Any]) -> Any:
    """TRL's fields: per-token log-probabilities, entropy and is-top-1, zero where the label is ignored."""
    kwargs["use_cache"] = False
    labels = _targets(kwargs, -100)
    outputs = _hidden(root, state, kwargs)
    hidden = outputs.last_hidden_state
    if kwargs.get("shift_labels") is None:
        hidden, labels = hidden[:, :-1], labels[:, :-1]
    head = head_weight(root.get_output_embeddings(), hidden)
    tokens = linear_log_probs(
        head.hidden,
        head.weight,
        labels,
        bias=head.bias,
        options=state.options(temperature=request.temperature),
        entropy=request.entropy,
        entropy_gradient=request.entropy,
        moments=request.moments,
        impl=state.shared.ops.get("linear_cross_entropy"),
    )
    mask = labels != -100
    items = kwargs.get("num_items_in_batch")
    total = -tokens.log_prob.sum()
    moments = {}
    if request.moments:
        moments = {
            "mean_logits": tokens.mean_logit,
            "log_sum_sq_probs": tokens.log_sum_sq_prob,
        }
    return request.result(
        loss=total / _at_least_one(mask.sum() if items is None else items),
        log_probs=tokens.log_prob,
        entropy=tokens.entropy,
        is_top1=tokens.is_top1,
        label_mask=mask,
        **moments,
    )
