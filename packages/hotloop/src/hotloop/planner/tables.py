"""What a user can do with more or less memory: speeds, contexts and least budgets around one plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hotloop_core import Placement

from .task import Request, Task

if TYPE_CHECKING:
    from hotloop_core import Plan

    from .task import Source

GIB = 2**30
BUDGETS = (4, 6, 8, 12, 16, 24, 32, 48, 80, 141, 192)
"""GiB of cards that people have."""

ROWS = 5


@dataclass(frozen=True, kw_only=True)
class Line:
    """One budget (bytes) and one batch (tokens, and the longest sequence among them).

    plan: None where nothing fits. context: tokens of the longest single sequence in this budget.
    """

    budget: int | None
    tokens: int
    longest: int
    plan: Plan | None
    context: int

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted; None where nothing fits or the card is unknown."""
        if self.plan is None or not self.plan.step_ms:
            return None
        return self.tokens / sum(self.plan.step_ms.values()) * 1e3


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """least: bytes that this batch needs at least, None where the host cannot hold what that takes.
    budgets: this batch in other budgets. contexts: single sequences in this budget, up to the longest
    that fits.
    """

    least: int | None
    budgets: tuple[Line, ...]
    contexts: tuple[Line, ...]


def outlook(model_or_config: Source, request: Request) -> Outlook:
    """Tables of what else could be done, for the same model on the same card.

    Raises:
        As `plan`, but for a budget that nothing fits: that is a line without a plan.

    """
    task = Task.of(model_or_config, request)
    found = task.least()
    least = None if found is None else found[0]
    everything = replace(task, budget=None).plan().peak_bytes
    sizes = [gib * GIB for gib in BUDGETS if (least or 0) <= gib * GIB]
    # Beyond the first budget in which everything is kept there is nothing to win.
    useful = [size for i, size in enumerate(sizes) if not i or sizes[i - 1] < everything]
    budgets = tuple(_line(replace(task, budget=size)) for size in _spread(useful))
    contexts: list[Line] = []
    if task.budget is not None:
        most = task.longest()
        lengths = [most // 2**i for i in range(ROWS) if most // 2**i >= task.job.longest]
        for length in reversed(lengths):
            job = replace(task.job, tokens=length, longest=length)
            contexts.append(_line(replace(task, job=job), most))
    return Outlook(least=least, budgets=budgets, contexts=tuple(contexts))


def _spread(sizes: list[int]) -> list[int]:
    """At most ROWS of them, the first and the last among them."""
    step = max(1, len(sizes) - 1) / (ROWS - 1)
    return sizes if len(sizes) <= ROWS else [sizes[round(i * step)] for i in range(ROWS)]


def _line(task: Task, context: int | None = None) -> Line:
    found = task.search()
    return Line(
        budget=task.budget,
        tokens=task.job.tokens,
        longest=task.job.longest,
        plan=None if found is None else task.describe(found),
        context=task.longest() if context is None else context,
    )


def summary(plan: Plan) -> str:
    """A plan in a few words: "offload 12, recompute 20 of 32 layers; 8 stream; tiles of 4,096"."""
    total = len(plan.layers)

    def count(where: Placement) -> int:
        return sum(where in layer.placements.values() for layer in plan.layers)

    parts = [f"{where} {count(where)}" for where in (Placement.OFFLOAD, Placement.RECOMPUTE)]
    parts = [part for part in parts if not part.endswith(" 0")]
    words = [f"{', '.join(parts)} of {total} layers" if parts else "keep everything"]
    streamed = sum(layer.streamed for layer in plan.layers)
    words += [f"{streamed} stream weights"] if streamed else []
    words += [f"{len(plan.dequantised)} stay dequantised"] if plan.dequantised else []
    homes = [
        n for n, on in (("embedding", plan.embedding_on_host), ("head", plan.head_on_host)) if on
    ]
    words += [f"{' and '.join(homes)} on host"] if homes else []
    words += [f"tiles of {plan.tile:,}"] if plan.tile else []
    return "; ".join(words)
