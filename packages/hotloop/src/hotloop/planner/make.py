"""`plan`: reads a model or a config, and finds the fastest placements that fit.

Method. Layers are alike, and so is what it costs to keep or recompute each of their tensors; a plan
is therefore how many layers keep which tensors. All pairs (a subset for the first n layers, a
subset for the rest, n from 0 to all) are
evaluated: exact over plans with two kinds of layer. Costs and bytes add up over tensors, so the
best plan with any number of kinds (a fractional knapsack, filled in order of time saved per byte)
has two kinds but for one tensor of one layer: that is the largest gap. Layers that recompute come
first, because backward reaches them when the others' tensors are free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, Literal

from hotloop_core import (
    LayerPlan,
    ModelFacts,
    Placement,
    Plan,
)
from hotloop_core.errors import BudgetError, ConfigError, PlanError, UnsupportedError
from hotloop_core.plan import RECOMPUTE_ALL, amount

from .cards import REFERENCE, Card, find_card, present_card
from .costs import OPTIMIZER_BYTES, Job
from .read import ranks_of, read

if TYPE_CHECKING:
    import os

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

Placements = Literal["keep", "recompute"] | Mapping[str, Placement | str]
"""Fixed choices for every layer: keep all, recompute all, or tensor name -> placement (others are
kept)."""


def plan(
    model_or_config: PreTrainedModel
    | PreTrainedConfig
    | ModelFacts
    | Mapping[str, Any]
    | str
    | os.PathLike[str],
    *,
    tokens: int,
    longest: int | None = None,
    lora: int | Mapping[str, int] | None = None,
    vram: str | int | None = None,
    card: str | Card | None = None,
    bits: int = 4,
    dtype: str | torch.dtype = "bfloat16",
    full_finetuning: bool = False,
    optimizer: str = "adamw_8bit",
    placements: Placements | None = None,
    family: str | None = None,
) -> Plan:
    """The fastest plan that fits, without any effect.

    Args:
        model_or_config: a model (its weights are then measured, `bits` and `dtype` read from it), a
            transformers config, a mapping as in config.json, a path to one or to a model folder, or
            a hub id. Nothing but the config is read.
        tokens: in one forward and backward on this device.
        longest: the longest sequence among them; default all of them, at most what the model can
            position.
        lora: rank on all seven projections, or role ("q", "k", "v", "o", "gate", "up", "down") ->
            rank.
        vram: "24GiB", "24GB" or bytes. Default: what is free on the card, or all of a card that is
            named; no budget where there is no card.
        card: a name of the table or a `Card`; default the one that is present.
        bits: of the frozen projections, 4 (NF4) or 16.
        dtype: of activations and of what is not quantised.
        full_finetuning: every weight trains.
        optimizer: as Trainer calls it; sizes its state.
        placements: fixed choices, only checked against the budget. None searches.
        family: which one, where several plugins claim the model.

    Raises:
        BudgetError: nothing fits; names the least that would do.
        UnsupportedError: offloading, or a family whose layers the planner cannot count yet.
        ConfigError: an argument that cannot be.

    """
    if tokens < 1 or (longest is not None and not 1 <= longest <= tokens):
        raise ConfigError(
            f"tokens={tokens}, longest={longest}: expected 1 <= longest <= tokens, since a "
            "sequence cannot be longer than the batch that holds it."
        )
    if optimizer not in OPTIMIZER_BYTES:
        raise ConfigError(
            f"optimizer={optimizer!r}; the planner knows {', '.join(OPTIMIZER_BYTES)}"
        )
    if bits not in (4, 16) or (bits == 4 and full_finetuning):
        raise ConfigError(
            f"bits={bits}, full_finetuning={full_finetuning}: expected bits 4 or 16, and 16 where "
            "all weights train."
        )
    facts, measured = read(model_or_config, family, optimizer)
    job = Job(
        facts=facts,
        tokens=tokens,
        longest=min(longest or tokens, facts.max_positions),
        bits=bits,
        width=4 if "float32" in str(dtype) else 2,
        ranks=ranks_of(lora, facts),
        full=full_finetuning,
        optimizer=optimizer,
    )
    if measured is not None:
        job = measured.refine(job, lora is not None)
    rates, card_name, free = _card(card)
    budget = parse_bytes(vram) if vram is not None else free
    best = _best(job, rates, card_name, budget, _candidates(job, placements))
    return replace(best, fixed=placements is not None)


def plan_larger(model: PreTrainedModel, now: Plan, *, tokens: int, longest: int) -> Plan:
    """`now` for a batch larger than it was made for: the same budget, and the same placements if they were chosen.

    Raises:
        BudgetError: the larger batch does not fit.

    """
    tokens, longest = max(tokens, now.tokens), max(longest, now.longest)
    if now.budget is None:
        return replace(now, tokens=tokens, longest=longest, memory={}, step_ms={}, notes=())
    placements = now.layers[0].placements if now.fixed else None
    return plan(model, tokens=tokens, longest=longest, vram=now.budget, placements=placements)


def parse_bytes(size: str | int) -> int:
    """Bytes of "24GiB", "24GB", "24 G" (GiB) or a number of bytes.

    Raises:
        ConfigError: not a size.

    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?B)?\s*", str(size), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(
            f"{size!r} is not an amount of memory; expected such as '24GiB', '24GB' or a number of "
            "bytes"
        )
    base = 1000 if (match[3] or "").lower() == "b" else 1024
    return int(float(match[1]) * base ** ("KMGT".index(match[2].upper()) + 1))


def _card(card: str | Card | None) -> tuple[Card | None, str | None, int | None]:
    """The card's rates where they are known, its name, and the memory that is free or all of it."""
    if isinstance(card, Card):
        return card, card.name, card.memory
    if card is not None:
        found = find_card(card)
        return found, found.name, found.memory
    present = present_card()
    if present is None:
        return None, None, None
    name, free = present
    try:
        return find_card(name), name, free
    except ConfigError:
        return None, name, free


@dataclass(frozen=True)
class _Candidate:
    early: frozenset[str]
    count: int
    late: frozenset[str]

    def layers(self, job: Job) -> tuple[LayerPlan, ...]:
        return (_layer(job, self.early),) * self.count + (_layer(job, self.late),) * (
            job.facts.layers - self.count
        )

    def recompute_ms(self, job: Job, times: Mapping[str, float]) -> float:
        """Milliseconds of a step spent on computing again what was not kept."""
        rest = job.facts.layers - self.count
        return sum(
            ms * ((name not in self.early) * self.count + (name not in self.late) * rest)
            for name, ms in times.items()
        )


def _layer(job: Job, kept: frozenset[str]) -> LayerPlan:
    if not kept:
        return RECOMPUTE_ALL
    again = (s.name for s in job.saved if s.can_recompute and s.name not in kept)
    return LayerPlan(placements=dict.fromkeys(again, Placement.RECOMPUTE))


def _candidates(job: Job, placements: Placements | None) -> list[_Candidate]:
    names = [s.name for s in job.saved if s.can_recompute]
    if placements is not None:
        kept = _fixed(placements, names)
        return [_Candidate(kept, 0, kept)]
    subsets = [
        frozenset(kept)
        for kept in chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))
    ]
    uniform = [_Candidate(kept, 0, kept) for kept in subsets]
    mixed = [
        _Candidate(early, count, late)
        for early in subsets
        for late in subsets
        if early < late
        for count in range(1, job.facts.layers)
    ]
    return uniform + mixed


def _fixed(placements: Placements, names: list[str]) -> frozenset[str]:
    if isinstance(placements, str):
        if placements not in ("keep", "recompute"):
            raise ConfigError(
                f"placements={placements!r}; expected 'keep', 'recompute' or a mapping of "
                f"{', '.join(names)}"
            )
        return frozenset(names if placements == "keep" else ())
    chosen = {"x": Placement.KEEP, **placements}
    for name, placement in chosen.items():
        known = {
            "x",
            *RECOMPUTE_ALL.placements,
        }  # also of other kinds of layer: no harm in naming them
        if name not in known or placement not in set(Placement):
            raise ConfigError(
                f"placements[{name!r}]={placement!r}; expected x, {', '.join(names)} -> "
                f"{', '.join(Placement)}"
            )
        if placement == Placement.OFFLOAD:
            raise UnsupportedError(
                f"placements[{name!r}]='offload': offloading to host memory is not built yet; use "
                "'keep' or 'recompute'."
            )
    if chosen["x"] != Placement.KEEP:
        raise PlanError("x, the residual stream that enters a layer, cannot be recomputed; keep it")
    return frozenset(n for n in names if chosen.get(n, Placement.KEEP) == Placement.KEEP)


def _best(
    job: Job, card: Card | None, name: str | None, budget: int | None, candidates: list[_Candidate]
) -> Plan:
    rates = card or REFERENCE
    times = {s.name: job.recompute_ms(s.name, rates) for s in job.saved if s.can_recompute}
    rows = [
        (c.recompute_ms(job, times), sum(job.memory(c.early, c.count, c.late).values()), c)
        for c in candidates
    ]
    fitting = [row for row in rows if budget is None or row[1] <= budget]
    least = min(rows, key=lambda row: row[1])
    if not fitting:
        raise BudgetError(_refusal(job, least[1], budget or 0, len(rows) == 1))
    again_ms, peak, best = min(fitting, key=lambda row: row[:2])
    step = job.step_ms(rates)
    total = sum(step.values()) + again_ms
    notes: list[str] = []
    faster = [row for row in rows if row[0] < again_ms]
    if faster:
        ms, size, _ = min(faster, key=lambda row: row[1])
        notes.append(
            f"the next faster plan ({(again_ms - ms) / total:.1%} of the step) needs {amount(size)}"
        )
    if least[1] < peak:
        slower = (least[0] - again_ms) / total
        notes.append(f"the least memory for this batch is {amount(least[1])}, {slower:.0%} slower")
    if budget is not None:
        notes.append(
            f"the longest single sequence in this budget is {_longest(job, budget):,} tokens"
        )
    if again_ms > 0 and len(rows) > 1:
        notes.append("offloading to host memory is not built yet; what does not fit is recomputed")
    if card is not None and not card.measured:
        notes.append(f"times rest on the data sheet of {card.name}, not on a measurement")
    return Plan(
        layers=best.layers(job),
        tokens=job.tokens,
        longest=job.longest,
        memory=job.memory(best.early, best.count, best.late),
        step_ms={} if card is None else {**step, "recomputation": again_ms},
        budget=budget,
        card=name,
        notes=tuple(notes),
    )


def _least(job: Job) -> int:
    """The peak with everything recomputed."""
    return sum(job.memory(frozenset(), 0, frozenset()).values())


def _longest(job: Job, budget: int) -> int:
    """Tokens of the longest single sequence that fits with everything recomputed, at most what the
    model positions.
    """
    low, high = 0, job.facts.max_positions
    while low < high:
        middle = (low + high + 1) // 2
        fits = _least(replace(job, tokens=middle, longest=middle)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _refusal(job: Job, least: int, budget: int, fixed: bool) -> str:
    longest = _longest(job, budget)
    changes = ["raise the budget"]
    if fixed and _least(job) <= budget:
        changes.append("let the planner choose (placements=None), which fits")
    if longest:
        changes.append(f"train at most {longest:,} tokens a step")
    if job.bits != 4 and not job.full:
        changes.append("load the base in 4 bit")
    if longest == 0 and job.ranks:
        changes.append("lower the LoRA rank")
    return (
        f"{job.tokens:,} tokens a step need at least "
        f"{amount(least)}{' with these placements' if fixed else ''}; the budget is "
        f"{amount(budget)} (weights {amount(job.weights)}). To fit: {', or '.join(changes)}."
    )
