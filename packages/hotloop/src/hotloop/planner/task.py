"""A request read, and what can be asked of it: the fastest plan, the least memory, the longest context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, Literal

from hotloop_core import ModelFacts, Placement, Plan
from hotloop_core.errors import BudgetError, ConfigError, PlanError
from hotloop_core.plan import RECOMPUTE_ALL, amount

from .amounts import MOST_BYTES, parse_bytes
from .cards import EXAMPLE, REFERENCE, Card, find_card, present_card
from .gradients import unaccumulated
from .host import HOST_SHARE, assumed_host_memory, host_limit
from .job import OPTIMIZER_BYTES, Job
from .kinds import Kind, chosen, recompute_all
from .parts import offer_of, step_parts
from .read import ranks_of, read, whole
from .recorded import beside, is_recorded
from .refusal import enough, refusal
from .search import fastest, homes_of, lean, least, spaces
from .space import Bounds, Found, Homes

if TYPE_CHECKING:
    import os

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    Source = (
        PreTrainedModel | PreTrainedConfig | ModelFacts | Mapping[str, Any] | str | os.PathLike[str]
    )

Placements = Literal["keep", "recompute", "offload"] | Mapping[str, Placement | str]
"""Fixed choices for every layer: keep all; recompute all; recompute all and offload each layer's
input; or tensor name -> placement (others are kept)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `plan` is asked, but for the model; its arguments by the same names."""

    tokens: int
    longest: int | None = None
    lora: int | Mapping[str, int] | None = None
    vram: str | int | None = None
    host: str | int | None = None
    card: str | Card | None = None
    bits: int | None = None
    dtype: str | torch.dtype = "bfloat16"
    full_finetuning: bool = False
    optimizer: str = "adamw_8bit"
    placements: Placements | None = None
    family: str | None = None
    homes: Plan | None = None
    nf4_kv: bool = False
    dequantised: bool | None = None


WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element."""

MOST_TOKENS = 2**31
"""Beyond it byte counts would leave 64 bits."""

WORTH = 0.05
"""Of a step: how much faster another plan must be to be worth a note."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request read: the job, the card's rates, and what must hold it.

    rates: of the card, or of the reference where it is unknown (`timed` is False then). budget, host:
    bytes. only: the one kind of layer that the caller chose. homes: where weights may live.
    settled: the plan that says where they do, if they do already. dequantised: memory that is left goes to weights
    that stay so.
    """

    job: Job
    rates: Card
    timed: bool
    card: str | None
    budget: int | None
    host: int
    host_assumed: bool
    only: Kind | None
    homes: tuple[Homes, ...]
    settled: Plan | None = None
    dequantised: bool = False

    @classmethod
    def of(cls, model_or_config: Source, request: Request) -> Task:
        """Reads a request."""
        job = _job(model_or_config, request)
        rates, name, free = _card(request.card)
        assumed = request.card is not None and request.host is None
        if request.host is not None:
            host = parse_bytes(request.host, least=0)
        elif assumed:
            host = int(HOST_SHARE * assumed_host_memory(free or 0))
        else:
            host = host_limit(again=request.homes is not None)
        only = None if request.placements is None else _fixed(job, request.placements)
        if request.homes is not None:
            homes = [_homes(request.homes)]
        else:
            homes = homes_of(job) if only is None else [Homes(streamed=0)]
        return cls(
            job=job,
            rates=rates or REFERENCE,
            timed=rates is not None,
            card=name,
            budget=free if request.vram is None else parse_bytes(request.vram),
            host=host,
            host_assumed=assumed,
            only=only,
            homes=tuple(homes),
            settled=request.homes,
            dequantised=request.vram is not None
            if request.dequantised is None
            else request.dequantised,
        )

    def training_as(self, now: Plan) -> Task:
        """With the bytes of what trains as `now` knew them: a model does not tell its optimizer."""
        known = now.memory.get(_trained(self.job))
        return self if known is None else replace(self, job=replace(self.job, trained_bytes=known))

    @property
    def bounds(self) -> Bounds:
        """What must hold the plan."""
        return Bounds(
            device=inf if self.budget is None else self.budget,
            host=self.host,
            stream=not self.job.full,
        )

    def search(self) -> Found | None:
        """The fastest plan within bounds."""
        only = None if self.only is None else [self.only]
        return fastest(spaces(self.job, self.rates, self.homes, only), self.bounds)

    def least(self) -> tuple[int, Found] | None:
        """The least memory for the job, and its plan; None where the host cannot hold it."""
        only = None if self.only is None else [self.only]
        return least(spaces(self.job, self.rates, self.homes, only), self.bounds)

    def longest(self) -> int:
        """Tokens of the longest single sequence that fits, at most what the model positions."""
        only = None if self.only is None else [self.only]
        low, high = 0, self.job.facts.max_positions
        while low < high:
            middle = (low + high + 1) // 2
            job = replace(self.job, tokens=middle, longest=middle)
            found = least(lean(job, self.rates, self.homes, only), self.bounds)
            fits = found is not None and found[0] <= self.bounds.device
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def plan(self) -> Plan:
        """The fastest plan within bounds, with its notes.

        Raises:
            BudgetError: nothing fits.

        """
        found = self.search()
        if found is None:
            raise BudgetError(refusal(self))
        return self.describe(found, self._notes(found))

    def describe(self, found: Found, notes: tuple[str, ...] = ()) -> Plan:
        """A plan of the search as the engine reads it."""
        held, space = found.bytes(), found.space
        ready, recorded = self._stay_dequantised(found), self._recorded(found)
        memory = {
            "weights": held.weights,
            **(
                {"weights that stay dequantised": ready * self.job.layer_dequantised}
                if ready
                else {}
            ),
            **({"room for streamed weights": held.slots} if held.slots else {}),
            _trained(self.job): self.job.trained,
            "activations kept for backward": held.kept,
            **({"recordings of layers": beside(self.job)} if recorded else {}),
            "working set of a layer or the loss": held.working,
            "allocator slack": held.slack,
        }
        host = {
            "activations": held.away,
            "weights": held.host_weights,
            "embedding": self.job.embedding * space.homes.embedding,
            "head": self.job.head * space.homes.head,
        }
        layers = found.layers()
        if self.settled is not None:  # as many layers stream as there; and they are those
            there = self.settled.layers
            layers = tuple(
                replace(layer, streamed=old.streamed)
                for layer, old in zip(layers, there, strict=True)
            )
        layers = tuple(
            replace(layer, dequantised=not layer.streamed and i < ready)
            for i, layer in enumerate(layers)
        )
        if self.job.nf4_kv:
            layers = tuple(
                replace(layer, nf4_kv=layer.placement("qkv") is not Placement.RECOMPUTE)
                for layer in layers
            )
        return Plan(
            layers=layers,
            tokens=self.job.tokens,
            longest=self.job.longest,
            memory={name: int(size) for name, size in memory.items()},
            step_ms=step_parts(found, ready, recorded=recorded) if self.timed else {},
            budget=self.budget,
            card=self.card,
            notes=notes,
            fixed=self.only is not None,
            tile=space.tile,
            embedding_on_host=space.homes.embedding,
            head_on_host=space.homes.head,
            host_memory={name: int(size) for name, size in host.items() if size},
            unaccumulated=unaccumulated(found),
        )

    def _recorded(self, found: Found) -> bool:
        """Whether layers will be recorded."""
        left = self.bounds.device - found.space.peak(found.bytes())
        return is_recorded(found, left=left, card=self.rates.memory)

    def _stay_dequantised(self, found: Found) -> int:
        """How many layers can keep their weights dequantised in what is left of the budget, if they may.

        After the search, not in it: a GiB of them spares less than a millisecond, of activations that need not be
        computed again more, of weights that need not be streamed much more. With streamed weights none is left. Layers
        that are recorded gain far more by that.
        """
        size, layers = self.job.layer_dequantised, found.space.layers
        if not self.dequantised or found.streamed or not size or self._recorded(found):
            return 0
        left = self.bounds.device - found.space.peak(found.bytes())
        return int(min(layers * size, max(0, left)) // size)

    def _notes(self, found: Found) -> tuple[str, ...]:
        notes: list[str] = []
        peak = int(found.space.peak(found.bytes()))
        faster = found.space.next_faster(found, WORTH) if self.only is None else None
        if faster is not None and self.budget is not None:
            short = faster > self.budget
            needs = enough(faster) if short else f"more host memory than {amount(self.host)}"
            notes.append(f"to be {WORTH:.0%} faster needs {needs}")
        leanest = self.least()
        if leanest is not None and leanest[0] < peak and self.only is None:
            slower = leanest[1].ms / found.ms - 1
            notes.append(
                f"the least memory for this batch is {enough(leanest[0])}, {slower:.0%} slower"
            )
        if not self.dequantised and self.timed and self.budget is not None:
            notes += offer_of(replace(self, dequantised=True)._stay_dequantised(found), found)
        spared = unaccumulated(found)
        if spared > peak / 100:
            notes.append(f"a step without gradient accumulation takes {amount(spared)} less")
        if self.budget is not None:
            longest = self.longest()
            whole = ", all that the model positions" * (longest == self.job.facts.max_positions)
            notes.append(f"the longest single sequence in this budget is {longest:,} tokens{whole}")
        if found.host and self.host_assumed:
            notes.append(f"a host that can pin {amount(self.host)} is assumed; host= says another")
        if self.job.nf4_kv:
            notes.append("keys and values wait in NF4: lossy, the gradients of q and k change")
        if not self.timed and self.card is None and self.job.weight_bytes is None:  # not yet loaded
            notes.append("for times, name a card (card=), such as 'RTX 4090'")
        if not self.timed and self.card is not None:
            notes.append(
                f"no times: the table lacks {self.card}; card= takes a card's numbers, {EXAMPLE!r}"
            )
        if self.timed and not self.rates.measured:
            notes.append(f"times rest on the data sheet of {self.card}, not on a measurement")
        if self.timed and not self.rates.bf16:
            notes.append(f"{self.card} has no bf16 in hardware: train in fp16")
        return tuple(notes)


def _job(model_or_config: Source, request: Request) -> Job:
    tokens = request.tokens
    longest = tokens if request.longest is None else request.longest
    if not (whole(tokens) and whole(longest) and 1 <= longest <= tokens <= MOST_TOKENS):
        raise ConfigError(
            f"tokens={tokens!r}, longest={longest!r}: expected whole numbers, 1 <= longest <= tokens "
            f"<= {MOST_TOKENS:,}, since a sequence cannot be longer than the batch that holds it."
        )
    dtype = str(request.dtype).removeprefix("torch.")
    if dtype not in WIDTHS:
        raise ConfigError(f"dtype={request.dtype!r}; expected {', '.join(WIDTHS)}")
    if request.optimizer not in OPTIMIZER_BYTES:
        raise ConfigError(
            f"optimizer={request.optimizer!r}; the planner knows {', '.join(OPTIMIZER_BYTES)}"
        )
    full = request.full_finetuning
    bits = request.bits if request.bits is not None else 16 if full else 4
    if bits not in (4, 16) or (bits == 4 and full):
        raise ConfigError(
            f"bits={bits}, full_finetuning={full}: expected bits 4 or 16, and 16 where all weights "
            "train."
        )
    if full and request.lora:
        raise ConfigError(
            f"full_finetuning=True trains every weight, lora={request.lora!r} adapters alone; pass one "
            "of them"
        )
    facts, measured = read(model_or_config, request.family, request.optimizer)
    job = Job(
        facts=facts,
        tokens=tokens,
        longest=min(longest, facts.max_positions),
        bits=bits,
        width=WIDTHS[dtype],
        ranks=ranks_of(request.lora, facts),
        full=full,
        optimizer=request.optimizer,
        nf4_kv=request.nf4_kv,
    )
    job = job if measured is None else measured.refine(job, request.lora is not None)
    everything = job.weights + job.trained + facts.layers * sum(job.whole.values())
    everything += sum(job.extended(name) for name in job.groups)
    if everything > MOST_BYTES:
        raise ConfigError(
            f"{facts.layers:,} layers of hidden size {facts.hidden_size:,}, {tokens:,} tokens and "
            f"lora={request.lora!r} come to {everything:.0e} bytes; expected less than {MOST_BYTES:.0e}. "
            "Check config.json, tokens and lora."
        )
    return job


def _trained(job: Job) -> str:
    return "gradients and optimizer" if job.full else "adapters, gradients, optimizer"


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


def _homes(plan: Plan) -> Homes:
    return Homes(
        embedding=plan.embedding_on_host,
        head=plan.head_on_host,
        streamed=sum(layer.streamed for layer in plan.layers),
    )


def _fixed(job: Job, placements: Placements) -> Kind:
    names = [s.name for s in job.saved]
    if isinstance(placements, str):
        if placements == "keep":
            return chosen(job, {})
        if placements in ("recompute", "offload"):
            away = placements == "offload"
            return recompute_all(job, Placement.OFFLOAD if away else Placement.KEEP)
    if not isinstance(placements, Mapping):
        raise ConfigError(
            f"placements={placements!r}; expected 'keep', 'recompute', 'offload' or a mapping of "
            f"{', '.join(names)}"
        )
    # Also names of other kinds of layer: no harm in naming them.
    known = {"x", *RECOMPUTE_ALL.placements}
    for name, placement in placements.items():
        if name not in known or placement not in set(Placement):
            raise ConfigError(
                f"placements[{name!r}]={placement!r}; expected {', '.join(names)} -> "
                f"{', '.join(Placement)}"
            )
    if placements.get("x") == Placement.RECOMPUTE:
        raise PlanError(
            "x, the residual stream that enters a layer, cannot be recomputed in every layer; keep or "
            "offload it, or let the planner choose, which recomputes it where that pays"
        )
    return chosen(job, {n: Placement(p) for n, p in placements.items()})
