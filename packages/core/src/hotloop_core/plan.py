"""A plan: where every tensor that backward needs lives, and what it is expected to cost. Data only;
no effect.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .facts import ModelFacts

GIB = 2**30


def amount(size: float) -> str:
    """Bytes for a reader: "3.41 GiB", and in MiB below a tenth of one."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


class Placement(StrEnum):
    """Where a tensor that backward needs is between forward and backward."""

    KEEP = "keep"
    OFFLOAD = "offload"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor that a dense layer's backward needs.

    elements: per token, in the model's dtype. extra_bytes: per token beside them (the fp32
    log-sum-exp).
    flops: per token, to compute it again, attention's own (which grow with the sequence) not
    counted.
    can_recompute: False for the residual stream that enters the layer: its own layer cannot make it again.
    """

    name: str
    elements: int
    extra_bytes: int = 0
    flops: int = 0
    can_recompute: bool = True


def saved_tensors(facts: ModelFacts) -> tuple[SavedTensor, ...]:
    """What one dense layer's backward needs, in the order of forward. The engine's blocks use these
    names.
    """
    d, i = facts.hidden_size, facts.intermediate_size
    q, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    in_attention = (
        SavedTensor(name="qkv", elements=q + 2 * kv, flops=2 * d * (q + 2 * kv)),
        SavedTensor(name="attention", elements=q, extra_bytes=4 * facts.heads),
    )
    in_mlp = (SavedTensor(name="gate_up", elements=2 * i, flops=4 * d * i),)
    o, down = 2 * q * d, 2 * d * i
    if "attention" in facts.own:
        in_attention = (_own("attention", facts),)
        o = in_attention[0].flops
    if "mlp" in facts.own:
        in_mlp = (_own("mlp", facts),)
        down = in_mlp[0].flops
    # A norm behind a block needs what it normed; then x_mid is that, normed and added: no GEMM of its own.
    attention_out = (SavedTensor(name="attention_out", elements=d, flops=o),)
    mlp_out = (SavedTensor(name="mlp_out", elements=d, flops=down),)
    return (
        SavedTensor(name="x", elements=d, can_recompute=False),
        *in_attention,
        *(attention_out if facts.post_norms else ()),
        SavedTensor(name="x_mid", elements=d, flops=0 if facts.post_norms else o),
        *in_mlp,
        *(mlp_out if facts.post_norms else ()),
    )


RECORDED_SHARE = 16
"""Of a card's memory recordings of layers take at most one in so many: a batch that needs more keeps a card of that
size busy for as long as the host takes to queue it."""


def recorded_bytes(facts: ModelFacts, tokens: int, width: int = 2) -> int:
    """What a recorded pass of all layers holds: what waits for backward, and what layers hand to each other both ways.

    width: bytes of an activation.
    """
    of_layer = 3 * width * facts.hidden_size
    of_layer += sum(width * saved.elements + saved.extra_bytes for saved in saved_tensors(facts))
    return tokens * of_layer * facts.layers


def _own(part: str, facts: ModelFacts) -> SavedTensor:
    """What a family's own block keeps, as one: its forward makes all of it again."""
    block = facts.own[part]
    flops = 2 * sum(n * k for n, k in block.shapes(facts).values())
    return SavedTensor(name=f"own_{part}", elements=block.kept(facts), flops=flops)


ATTENTION_ROOM = 5 * 2**28
"""Bytes that attention's backward may take beside its results, where it can do with fewer heads at once."""


def key_heads_at_once(tokens: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """How many key heads, each with its query heads, attention takes at once.

    Backends sum dq in fp32, and keep dk and dv of each query head until they are added: 8 bytes for each number in q.
    """
    for_one = 8 * tokens * (heads // kv_heads) * head_dim
    return min(kv_heads, max(1, ATTENTION_ROOM // max(1, for_one)))


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: tensor name -> placement (a name that is not there is kept).

    x, the layer's input, can be recomputed only from the layers below, back to one that has its own.
    streamed: the frozen projections wait in host memory and travel to the device for each pass.
    nf4_kv: keys and values wait for backward in NF4. Lossy: gradients of q and k change; only on request.
    dequantised: 4-bit projections are dequantised once and stay so from step to step, beside their 4-bit form.
    """

    placements: Mapping[str, Placement] = field(default_factory=dict[str, Placement])
    streamed: bool = False
    nf4_kv: bool = False
    dequantised: bool = False

    def placement(self, name: str) -> Placement:
        """Where the tensor `name` waits."""
        return self.placements.get(name, Placement.KEEP)

    def __str__(self) -> str:
        by_placement: dict[Placement, list[str]] = {}
        for name, placement in self.placements.items():
            by_placement.setdefault(placement, []).append(name)
        kept = not (by_placement.keys() - {Placement.KEEP})
        parts = [
            f"{placement} {_names(names)}"
            for placement, names in by_placement.items()
            if placement is not Placement.KEEP
        ]
        if self.nf4_kv:
            parts.append("keys and values in NF4 (lossy)")
        if self.streamed:
            parts.append("weights streamed from host memory")
        return "; ".join(["keep everything", *parts] if kept else parts)


_RECOMPUTABLE = (
    "qkv",
    "attention",
    "own_attention",
    "attention_out",
    "x_mid",
    "gate_up",
    "own_mlp",
    "mlp_out",
)


def _names(names: list[str]) -> str:
    everything = [name for name in names if name in _RECOMPUTABLE] == list(_RECOMPUTABLE)
    if not everything:
        return " ".join(names)
    return " ".join([*(name for name in names if name not in _RECOMPUTABLE), "everything"])


KEEP_ALL = LayerPlan()
RECOMPUTE_ALL = LayerPlan(placements=dict.fromkeys(_RECOMPUTABLE, Placement.RECOMPUTE))
"""Of every kind of layer: a name that a layer does not have changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Placements for every layer, and the prediction that they rest on.

    tokens: per step on this device; longest: the longest sequence among them. memory: what the peak
    is made of, in bytes, by name. step_ms: predicted, by part; empty where the card is unknown.
    budget: bytes, or None.
    notes: why the next faster plan does not fit, and what else a user should know.
    fixed: the placements were the caller's choice, which planning again for a larger batch must keep.
    tile: tokens that the norms, projections and the MLP take at once; None for all. A family's own block takes all.
    embedding_on_host, head_on_host: where these two weights live; of the first only the rows of a batch
    travel, the second travels once a loss.
    host_memory: pinned bytes, by name: "activations", "weights", "embedding", "head".
    unaccumulated: bytes by which the peak is lower in a step of one batch, without gradient accumulation.
    """

    layers: tuple[LayerPlan, ...]
    tokens: int
    longest: int
    memory: Mapping[str, int] = field(default_factory=dict[str, int])
    step_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    budget: int | None = None
    card: str | None = None
    notes: tuple[str, ...] = ()
    fixed: bool = False
    tile: int | None = None
    embedding_on_host: bool = False
    head_on_host: bool = False
    host_memory: Mapping[str, int] = field(default_factory=dict[str, int])
    unaccumulated: int = 0

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of device memory."""
        return sum(self.memory.values())

    @property
    def streamed(self) -> tuple[int, ...]:
        """The layers whose weights stream, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.streamed)

    @property
    def dequantised(self) -> tuple[int, ...]:
        """The layers whose weights stay dequantised, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.dequantised)

    @property
    def has_weights_on_host(self) -> bool:
        """Whether any weight lives in host memory."""
        return bool(self.streamed) or self.embedding_on_host or self.head_on_host

    @property
    def host_bytes(self) -> int:
        """The pinned host memory."""
        return sum(self.host_memory.values())

    def __str__(self) -> str:
        lines = [f"plan for {self.tokens:,} tokens a step, longest sequence {self.longest:,}"]
        lines += [f"  {line}" for line in (*self._layer_lines(), *self._home_lines())]
        budget = "" if self.budget is None else f" of {amount(self.budget)}"
        lines += _sizes(self.memory, "predicted peak", budget)
        lines += _sizes(self.host_memory, "pinned host memory", prefix="host: ")
        for name, ms in self.step_ms.items():
            lines.append(f"  {name:<34}{ms:9.1f} ms")
        if self.step_ms:
            total = sum(self.step_ms.values())
            on = f" on {self.card}" if self.card else ""
            rate = f", {self.tokens / total * 1e3:,.0f} tokens/s"
            lines.append(f"  {'predicted step':<34}{total:9.1f} ms{on}{rate}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _layer_lines(self) -> list[str]:
        """One line for each run of layers that differ in their weights' form and place and in x alone."""
        lines: list[str] = []
        first = 0
        for _, group in groupby(self.layers, key=_but_for_x):
            members = [replace(layer, streamed=False, dequantised=False) for layer in group]
            last = first + len(members) - 1
            which = f"layer {first}" if first == last else f"layers {first} to {last}"
            what = str(members[0])
            inputs = Counter(layer.placement("x") for layer in members)
            if len(inputs) > 1:
                x = ", ".join(f"{placement} in {inputs[placement]}" for placement in sorted(inputs))
                others = replace(members[0], placements=dict(_but_for_x(members[0])[0]))
                what = f"x {x}; {others}".replace("keep everything", "keep all else")
            lines.append(f"{which}: {what}")
            first = last + 1
        return lines

    def _home_lines(self) -> list[str]:
        streamed = sum(layer.streamed for layer in self.layers)
        homes = [
            name
            for name, there in (("embedding", self.embedding_on_host), ("head", self.head_on_host))
            if there
        ]
        lines = [f"weights of {streamed} of {len(self.layers)} layers streamed"] if streamed else []
        if ready := len(self.dequantised):
            lines.append(f"weights of {ready} of {len(self.layers)} layers stay dequantised")
        lines += [f"{' and '.join(homes)} on the host"] if homes else []
        return lines + ([f"{self.tile:,} tokens at once but in attention"] if self.tile else [])


def _but_for_x(layer: LayerPlan) -> tuple[tuple[tuple[str, Placement], ...], bool]:
    return tuple((n, p) for n, p in layer.placements.items() if n != "x"), layer.nf4_kv


def _sizes(sizes: Mapping[str, int], total: str, of: str = "", prefix: str = "") -> list[str]:
    """Lines for bytes by name and their sum; none where there are none."""
    lines = [f"  {prefix + name:<34}{amount(size):>12}" for name, size in sizes.items()]
    return [*lines, f"  {total:<34}{amount(sum(sizes.values())):>12}{of}"] if sizes else []
