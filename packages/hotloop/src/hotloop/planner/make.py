"""`plan`: reads a model or a config, and makes the fastest plan that fits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from hotloop_core.errors import BudgetError, ConfigError, PlanError

from .host import host_limit
from .task import Request, Task

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from hotloop_core import Plan
    from transformers import PreTrainedModel

    from .cards import Card
    from .task import Placements, Source


def plan(
    model_or_config: Source,
    *,
    tokens: int,
    longest: int | None = None,
    lora: int | Mapping[str, int] | None = None,
    vram: str | int | None = None,
    host: str | int | None = None,
    card: str | Card | None = None,
    bits: int | None = None,
    dtype: str | torch.dtype = "bfloat16",
    full_finetuning: bool = False,
    optimizer: str = "adamw_8bit",
    placements: Placements | None = None,
    family: str | None = None,
    homes: Plan | None = None,
    nf4_kv: bool = False,
    dequantised: bool | None = None,
) -> Plan:
    """The fastest plan that fits, without any effect.

    Args:
        model_or_config: a model (its weights are then measured, `bits` and `dtype` read from it), a
            transformers config, a mapping as in config.json, a path to one or to a model folder, or
            a hub id. Nothing but the config is read.
        tokens: in one forward and backward on this device.
        longest: the longest sequence among them; default all of them, at most what the model can
            position.
        lora: rank on every projection, or role ("q", "k", "v", "o", "gate", "up", "down"; fused "qkv", "gate_up") ->
            rank.
        vram: "24GiB", "24GB" or bytes. Default: what is free on the card, or all of a card that is
            named; no budget where there is no card.
        host: host memory that may be pinned, likewise; 0 for none. Default: 80% of what is free here; of a host
            with 64 GiB, or twice the card's memory, where the card is named.
        card: a name of the table, its numbers ("24GiB,165TFLOP/s,1008GB/s,25GB/s": memory, peak
            16-bit rate, memory's rate, the host link's) or a `Card`; default the one that is present.
        bits: of the frozen projections, 4 (NF4) or 16. Default: 4, and 16 where every weight trains.
        dtype: of activations and of what is not quantised.
        full_finetuning: every weight trains.
        optimizer: as Trainer calls it; sizes its state.
        placements: fixed choices, with all weights on the device, only checked against the budget.
            None searches.
        family: which one, where several plugins claim the model.
        homes: a plan whose homes of weights stay; only the rest is planned anew.
        nf4_kv: keys and values that are kept or offloaded wait for backward in NF4. Lossy; the
            planner never chooses it.
        dequantised: memory that the fastest plan leaves goes to 4-bit weights that are dequantised once and stay so,
            layer by layer. Default: where `vram` is given; what is free otherwise stays so.

    Raises:
        BudgetError: nothing fits; names the least that would do.
        UnsupportedError: a family whose layers the planner cannot count yet.
        ConfigError: an argument that cannot be.
        PlanError: placements that no layer can carry out.

    """
    given = locals()
    request = Request(**{field.name: given[field.name] for field in fields(Request)})
    return Task.of(model_or_config, request).plan()


def plan_again(
    model: PreTrainedModel,
    now: Plan,
    *,
    tokens: int = 0,
    longest: int = 0,
    lora: Mapping[str, int] | None = None,
    placements: Placements | None = None,
) -> Plan:
    """As `plan_larger`; what does not fit with the weights where they are has more of them on the host.

    Chosen placements say nothing of weights, and move none.

    Raises:
        BudgetError: it does not fit whatever is on the host.
        PlanError: as `plan_larger`.

    """
    try:
        return plan_larger(
            model, now, tokens=tokens, longest=longest, lora=lora, placements=placements
        )
    except BudgetError:
        if now.fixed or placements is not None:
            raise
    return _elsewhere(model, now, _larger(now, tokens, longest, lora))


def plan_larger(
    model: PreTrainedModel,
    now: Plan,
    *,
    tokens: int = 0,
    longest: int = 0,
    lora: Mapping[str, int] | None = None,
    placements: Placements | None = None,
) -> Plan:
    """`now` for a larger batch, or for adapters that are to come: within its budget, weights where they are. What was
    chosen stays: placements, unless there are others, and keys and values in NF4.

    A plan without budget and prediction, as by hand, only gets the larger numbers.

    Raises:
        BudgetError: that does not fit.
        PlanError: placements for a plan that knows of no batch.

    """
    request = _larger(now, tokens, longest, lora)
    if placements is not None:
        if not request.tokens:
            raise PlanError(
                f"found placements={placements!r} for a model that was wired without a plan; expected one that knows "
                "its batch: wire(model, hotloop.plan(model, tokens=..., placements=...))"
            )
        request = replace(request, placements=placements)
    elif now.budget is None and not now.memory:
        return replace(now, tokens=request.tokens, longest=max(longest, now.longest))
    return _task(model, now, request).plan()


def _elsewhere(model: PreTrainedModel, now: Plan, request: Request) -> Plan:
    """The plan of `request` where weights may move to the host; what `now` has there stays."""
    request = replace(request, homes=None, host=host_limit(again=True))
    free = _task(model, now, request).plan()
    layers = tuple(
        replace(new, streamed=new.streamed or old.streamed)
        for new, old in zip(free.layers, now.layers, strict=True)
    )
    homes = replace(
        free,
        layers=layers,
        embedding_on_host=free.embedding_on_host or now.embedding_on_host,
        head_on_host=free.head_on_host or now.head_on_host,
    )
    return _task(model, now, replace(request, homes=homes)).plan()


def _task(model: PreTrainedModel, now: Plan, request: Request) -> Task:
    """The task of a request; what trains is that of `now` unless adapters are to come."""
    task = Task.of(model, request)
    return task.training_as(now) if request.lora is None else task


def _larger(now: Plan, tokens: int, longest: int, lora: Mapping[str, int] | None) -> Request:
    """The request that `now` answers, for no smaller a batch, and for adapters."""
    return replace(
        request_again(now),
        tokens=max(tokens, now.tokens),
        longest=max(longest, now.longest),
        lora=lora,
    )


def request_again(now: Plan) -> Request:
    """The request that `now` answers for a loaded model, as far as a plan says, weights where they
    are.
    """
    return Request(
        tokens=now.tokens,
        longest=now.longest,
        vram=now.budget,
        placements=now.layers[0].placements if now.fixed else None,
        homes=now,
        nf4_kv=any(layer.nf4_kv for layer in now.layers),
        dequantised=bool(now.dequantised),
    )


def checkpointing_placements(checkpointing: str | bool | None) -> Placements | None:
    """The `placements` of the field's `use_gradient_checkpointing`.

    True: recompute every layer. False: keep everything. "offload": recompute every layer, its input
    waits on the host. None and "auto": the planner finds the fastest that fits; so for "unsloth", which
    FastLanguageModel takes for "offload".

    Raises:
        ConfigError: another value.

    """
    match checkpointing:
        case True:
            return "recompute"
        case False:
            return "keep"
        case "offload":
            return "offload"
        case None | "auto" | "unsloth":
            return None
    raise ConfigError(
        f"use_gradient_checkpointing={checkpointing!r}; expected True, False, 'offload', or None (or "
        "'auto', 'unsloth') for the fastest plan that fits"
    )
