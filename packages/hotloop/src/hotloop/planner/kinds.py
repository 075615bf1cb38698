"""The ways in which one layer can treat its tensors, and what each costs in bytes and in time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from hotloop_core import LayerPlan, Placement
from hotloop_core.plan import RECOMPUTE_ALL, key_heads_at_once

from .timing import MOVE_MS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .job import Job
    from .timing import LayerTimes

KEEP, OFFLOAD, RECOMPUTE = Placement.KEEP, Placement.OFFLOAD, Placement.RECOMPUTE

STRIDES = (2, 3, 4, 8)
"""x may be stored for every so many layers only, where everything else is recomputed."""

ABOVE_ATTENTION = ("attention_out", "x_mid", "gate_up", "own_mlp", "mlp_out")
"""What is free when backward comes to attention itself."""

TILED_AWAY = ("gate_up", "mlp_out")
"""With tiles the MLP makes these a tile at a time, and again in backward."""


@dataclass(frozen=True)
class Kind:
    """Placement of every tensor of a layer, x among them, by name; x is stored for the first of every
    `stride` layers and recomputed for the others.
    """

    placements: tuple[tuple[str, Placement], ...]
    stride: int = 1

    def layers(self, count: int, *, last: bool) -> list[LayerPlan]:
        """So many layers of this kind. The model's last layer keeps what the others send away, since
        backward wants it at once.
        """
        made: list[LayerPlan] = []
        for i in range(count):
            chosen = dict(self.placements)
            if i % self.stride:
                chosen["x"] = RECOMPUTE
            if last and i == count - 1:
                chosen = _kept(chosen)
            made.append(LayerPlan(placements=_named(chosen)))
        return made


def _kept(placements: Mapping[str, Placement]) -> dict[str, Placement]:
    """With what is sent away kept instead."""
    return {n: KEEP if p is OFFLOAD else p for n, p in placements.items()}


def _named(placements: Mapping[str, Placement]) -> dict[str, Placement]:
    """Without what is kept; recomputing everything is named alike for every kind of layer."""
    x = {"x": placements["x"]} if placements["x"] is not KEEP else {}
    others = {n: p for n, p in placements.items() if n != "x"}
    if all(p is RECOMPUTE for p in others.values()):
        return {**x, **RECOMPUTE_ALL.placements}
    return x | {n: p for n, p in others.items() if p is not KEEP}


class Costs(NamedTuple):
    """What a layer of one kind costs: numbers, or arrays of them.

    Bytes: kept on the device and away on the host from forward to backward, the stored input of the
    layer counted apart (x_kept, x_away, once for every `stride` layers); backward and forward:
    beyond those, at the worst moment; last: of backward in the model's last layer, which keeps what
    the others send away. Milliseconds: again, of recomputation on the device; queue and
    queue_again, of the host in forward and in backward, for what moves or is recomputed.
    """

    kept: Any
    away: Any
    x_kept: Any
    x_away: Any
    stride: Any
    backward: Any
    last: Any
    forward: Any
    again: Any
    queue: Any
    queue_again: Any


def kinds(job: Job, tile: int | None) -> list[Kind]:
    """All kinds that the search considers.

    Each tensor is kept, offloaded or recomputed. A norm's input behind attention follows attention's
    output; what costs nothing to make again is never stored.
    """
    choices: dict[str, tuple[Placement, ...]] = {"x": (KEEP, OFFLOAD)}
    for s in job.saved:
        if s.name in ("x", "attention_out"):
            continue
        forced = s.flops == 0 and s.name != "attention"
        forced |= tile is not None and s.name in TILED_AWAY
        choices[s.name] = (RECOMPUTE,) if forced else (KEEP, OFFLOAD, RECOMPUTE)
    found = [
        _complete(job, dict(zip(choices, row, strict=True))) for row in product(*choices.values())
    ]
    return found + leanest(job)[2:]


def leanest(job: Job) -> list[Kind]:
    """The kinds that recompute all they can, the input kept or offloaded, of every layer or of fewer."""
    return [
        Kind(recompute_all(job, x).placements, stride)
        for stride in (1, *STRIDES)
        if stride <= job.facts.layers
        for x in (KEEP, OFFLOAD)
    ]


def recompute_all(job: Job, x: Placement = KEEP) -> Kind:
    """Nothing but the layer's input is stored."""
    return Kind(tuple((s.name, x if s.name == "x" else RECOMPUTE) for s in job.saved))


def chosen(job: Job, placements: Mapping[str, Placement]) -> Kind:
    """A caller's own choice; a name that is not there is kept."""
    return Kind(tuple((s.name, Placement(placements.get(s.name, KEEP))) for s in job.saved))


def _complete(job: Job, placements: dict[str, Placement]) -> Kind:
    if job.facts.post_norms:
        behind = "own_attention" if "attention" in job.facts.own else "attention"
        placements["attention_out"] = placements[behind]
    return chosen(job, placements)


def costs(job: Job, kind: Kind, times: LayerTimes, tile: int | None) -> Costs:
    """Bytes and milliseconds of one layer of this kind."""
    place = dict(kind.placements)
    x, whole = place["x"], job.whole["x"]
    again = {n: times.again[n] for n, p in place.items() if n != "x" and p is RECOMPUTE}
    moves = sum(p is OFFLOAD for p in place.values())
    return Costs(
        kept=_waiting(job, place, KEEP) + job.small(place),
        away=_waiting(job, place, OFFLOAD),
        x_kept=whole * (x is KEEP),
        x_away=whole * (x is OFFLOAD),
        stride=kind.stride,
        backward=_backward(job, place, kind.stride, tile),
        last=_backward(job, _kept(place), kind.stride, tile),
        forward=_forward(job, place, tile),
        again=sum(again.values()),
        queue=moves * MOVE_MS,
        queue_again=moves * MOVE_MS + times.launches[0] * len(again) / max(1, len(times.again)),
    )


def _waiting(job: Job, place: Mapping[str, Placement], where: Placement) -> int:
    """Bytes of what waits at a place, x apart."""
    return sum(job.waiting[n] for n, p in place.items() if n != "x" and p is where)


def _under_way(job: Job, place: Mapping[str, Placement]) -> int:
    """Bytes on the device of tensors that leave or come back: the store lets a layer's worth be so."""
    return sum(job.waiting[n] for n, p in place.items() if p is OFFLOAD)


def _positions(job: Job) -> int:
    """Bytes of the rotation's cosines and sines."""
    return 2 * job.tokens * job.facts.head_dim * job.width


def _attention_gradients(job: Job) -> int:
    """Bytes of attention's backward, per token: do, dq, dk, dv, and what its backend makes beside them.

    That is dq summed in fp32; and where queries share keys, dk and dv of every query head before they
    are added up (cuDNN and FlashAttention 2; FlashAttention 4 sums them in fp32, which takes less). A
    long batch takes some heads after others, whose gradients are copied into those of all.
    """
    q, kv, b, facts = job.queries, job.keys, job.width, job.facts
    beside = 4 * q + 2 * q * b * (q != kv)
    heads = key_heads_at_once(job.tokens, facts.heads, facts.kv_heads, facts.head_dim)
    if heads < facts.kv_heads:
        beside = (beside + (q + 2 * kv) * b) * heads // facts.kv_heads
    return (2 * q + 2 * kv) * b + beside


def _backward(job: Job, place: Mapping[str, Placement], stride: int, tile: int | None) -> int:
    """Bytes of a layer's backward beyond what was kept, at the worse of two moments.

    In the MLP: what this layer brought back or computed again; the gradient that enters and the one
    that leaves, whole; and for the tokens that are taken at once the gradients of the block's output
    and of act(gate)·up (before them, to make the output behind a norm again: act(gate)·up, the
    output, the same normed and added), with tiles gate and up. In attention, when all above it is
    free: its gradients, and those entering the layer, entering the block and leaving. To compute
    x_mid again takes all that attention needs, or its output behind a norm. At either: the last
    hidden states, which the model's output holds for whoever asks for logits.
    """
    t, b, d, i = job.tokens, job.width, job.facts.hidden_size, job.facts.intermediate_size
    taken = t if tile is None else min(tile, t)
    tiled = TILED_AWAY if tile is not None else ()
    back = {n: s for n, s in job.whole.items() if place[n] is not KEEP and n not in tiled}
    back["x"] = (stride - 1) * job.whole["x"] + back.get("x", 0)
    through_attention = place["x_mid"] is place.get("attention_out", RECOMPUTE) is RECOMPUTE
    above = back if through_attention else {n: back.get(n, 0) for n in ABOVE_ATTENTION}
    mlp = sum(size for name, size in above.items() if name != "mlp_out") + 2 * job.stream
    if "mlp" in job.facts.own:
        mlp += _own_gradients(job, "mlp")
    else:
        mlp += taken * b * (i + d * (3 if place.get("mlp_out") is RECOMPUTE else 1))
        mlp += taken * b * 2 * i * (tile is not None)
        mlp += job.extended("gate_up") + job.extended("down") * (place["gate_up"] is not KEEP)
    if "attention" not in job.facts.own:
        mlp += job.extended("qkv") * (through_attention and place["qkv"] is RECOMPUTE)
    mlp -= job.waiting.get("mlp_out", 0) * (place.get("mlp_out") is KEEP)
    attention = sum(s for n, s in back.items() if n not in ABOVE_ATTENTION) + 2 * job.stream
    attention += t * _attention_gradients(job)
    if "attention" in job.facts.own:
        attention += _own_gradients(job, "attention")
    else:
        rotated = (job.queries + job.keys) * b * job.facts.qk_norm
        unpacked = 2 * job.keys * b * (job.nf4_kv and place["qkv"] is KEEP)
        attention += t * (rotated + unpacked) + job.extended("qkv") + job.extended("o")
    attention -= sum(job.waiting[n] for n in ABOVE_ATTENTION if place.get(n) is KEEP)
    return max(mlp, attention) + _under_way(job, place) + _positions(job) + job.stream


def _forward(job: Job, place: Mapping[str, Placement], tile: int | None) -> int:
    """Bytes of a layer's forward beyond what is kept: what is dropped or on its way out, act(gate)·up,
    and the residual stream before and after.
    """
    i, taken = job.facts.intermediate_size, job.tokens if tile is None else min(tile, job.tokens)
    tiled = TILED_AWAY if tile is not None else ()
    made = sum(s for n, s in job.whole.items() if place[n] is RECOMPUTE and n not in (*tiled, "x"))
    streams = 2 * job.stream + _under_way(job, place) + _positions(job)
    if "mlp" in job.facts.own:
        return made + streams + _own_gradients(job, "mlp")
    at_once = taken * job.width * (3 * i if tile is not None else i)
    copies = job.extended("gate_up") + job.extended("down") * (tile is not None)  # tiles hold both
    return made + at_once + streams + copies


def _own_gradients(job: Job, part: str) -> int:
    """Bytes that a family's own block works with, beside what it keeps: as much again, its input and its output, and
    the widest copy of a projection.
    """
    return job.whole[f"own_{part}"] + 2 * job.stream + job.extended_own(part)
