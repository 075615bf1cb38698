"""The time of a step: what the device computes, what the host queues, what the link carries.

A pass through a run of layers takes as long as the slowest of the three. Within a run the link's
work is spread evenly over the layers, and the stores move one tensor ahead of the computation, so
the three overlap but for what is stated here as not hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .job import NF4_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .cards import Card
    from .job import Job
    from .kinds import Costs

ATTENTION_GRAD_FACTOR = 2.5
"""Attention's backward does five matrix products where its forward does two."""

CAPPED_SHARE = 0.6
"""Of the card's attention rate under a soft cap, which the fastest libraries do not compute: our Triton kernel's (330
and 258 TFLOP/s forward and backward where flash-attn-4 has 529 and 438, H200, 8 x 2,048 tokens)."""

POST_NORM_PASSES = 4
"""Further passes over the residual stream, forward, of a norm behind a block: in, out, and a sum of its own."""

MOVE_MS = 0.05
"""What the host needs to send a tensor or a layer's weights off, or to call it back. An estimate."""

TILE_MS = 0.3
"""What a further tile of one layer's pass costs the host."""

OPTIMIZER_TENSOR_MS: Mapping[str, float] = {
    "adamw_8bit": 0.005,
    "paged_adamw_8bit": 0.11,
    "adamw_torch": 0.045,
    "adamw_torch_fused": 0.045,
    "sgd": 0.045,
}
"""Per trained tensor: an optimizer over an adapter's small tensors is bound by the host. torch's take 20 ms for 448 of
them. bitsandbytes' wait for the card after each, 50 ms, but for the one that a wired model steps in one launch
(docs/decisions/0021): what is left is Python, about 2 ms."""

LINK_SHARE = 0.9
"""Of the link's rate that a plan may count on: copies start and end with the work that they wait for."""

GATHER_GBS = 10.0
"""Rows of an embedding on the host are gathered at its memory's rate, by one thread. An estimate."""


class Pass(NamedTuple):
    """Milliseconds of one pass through a run of layers, each of which bounds it."""

    device: Any
    launches: Any
    link: Any

    @property
    def total(self) -> Any:
        """As long as the slowest."""
        return np.maximum(np.maximum(self.device, self.launches), self.link)


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Milliseconds of one layer and of what moves, on one card.

    forward, backward: of the device, by part, without recomputation. launches: (forward, backward) of
    the host. again: tensor name -> computing it again. weights: its frozen projections over the link.
    copy, link: of one byte within the device's memory and over the link. outside: of a step beside
    its layers, by part.
    """

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    launches: tuple[float, float]
    again: Mapping[str, float]
    weights: float
    copy: float
    link: float
    outside: Mapping[str, float]
    head: float
    embedding: float


def layer_times(job: Job, card: Card, tile: int | None) -> LayerTimes:
    """The times of a job on a card, when norms, projections and MLP take `tile` tokens at once."""
    f, t, b = job.facts, job.tokens, job.width
    gemm, copy = card.gemm_tflops * 1e9, card.copy_gbs * 1e6
    link = LINK_SHARE * card.link_gbs * 1e6
    columns = {name: 2 * t * g.extended / gemm for name, g in job.groups.items()}
    inputs = sum(g.k for g in job.groups.values() if g.c)
    outputs = sum(g.n for g in job.groups.values() if g.c)
    share = 1.0 if f.attention_softcap is None else CAPPED_SHARE
    rate = [share * r for r in card.attention_rate(job.longest)]
    attend = attention_flops(job) / 1e9
    stream = (4 + 2 * POST_NORM_PASSES * f.post_norms) * f.hidden_size
    moved = t * b * (stream + 2 * (job.queries + job.keys) + 3 * f.intermediate_size)
    per_weight = (NF4_BYTES if job.bits == 4 else b) + b
    copied = f.layer_parameters * per_weight * job.copies_weights / copy
    tiles = 0 if tile is None else -(-t // tile) - 1
    forward = {
        "GEMMs": sum(columns.values()),
        "attention": attend / rate[0],
        "norms, rope, activation": moved / copy,
        "adapters' thin GEMMs": t * b * inputs / copy,
        "copies of weights": copied,
    }
    backward = {
        "GEMMs": sum(columns.values()) * (2 if job.full else 1),
        "attention": attend * ATTENTION_GRAD_FACTOR / rate[1],
        "norms, rope, activation": 2 * moved / copy,
        "adapters' thin GEMMs": t * b * (inputs + outputs) / copy,
        "copies of weights": copied,
    }
    again: dict[str, float] = {}
    if "attention" in f.own:
        o = again["own_attention"] = _own(job, "attention", columns) + forward["attention"]
    else:
        o = columns["o"]
        again["qkv"] = columns["qkv"] + 2 * t * b * (job.queries + 2 * job.keys) / copy
        again["attention"] = forward["attention"]
    if "mlp" in f.own:
        down = again["own_mlp"] = _own(job, "mlp", columns) + 2 * job.stream / copy
    else:
        down = columns["down"] + 3 * t * b * f.intermediate_size / copy
        again["gate_up"] = columns["gate_up"] + 2 * job.stream / copy
    again["attention_out"], again["mlp_out"] = o, down
    again["x_mid"] = 2 * job.stream / copy if f.post_norms else o
    products = 3 if job.full else 2
    trained = f.layers * (9 if job.full else 2 * len(job.ranks))
    return LayerTimes(
        forward=forward,
        backward=backward,
        launches=(card.launch_ms[0] + tiles * TILE_MS, card.launch_ms[1] + 2 * tiles * TILE_MS),
        again={s.name: again[s.name] for s in job.saved if s.name != "x"},
        weights=job.layer_weights / link,
        copy=1 / copy,
        link=1 / link,
        outside={
            "head and loss": t * 2 * products * f.hidden_size * f.vocab_size / gemm,
            "optimizer": max(2 * job.trained / copy, OPTIMIZER_TENSOR_MS[job.optimizer] * trained),
        },
        head=job.embedding / link,
        embedding=job.stream * (1 / link + 1 / (GATHER_GBS * 1e6)),
    )


def _own(job: Job, part: str, columns: Mapping[str, float]) -> float:
    """Milliseconds of the GEMMs of a family's own block."""
    return sum(columns[role] for role in job.facts.own[part].projections)


def attention_flops(job: Job) -> float:
    """Of one layer's causal attention forward: two products over half the square, or over the
    window; the mean of the layers.
    """
    longest = job.longest
    contexts = [
        longest / 2 if w is None or w >= longest else w - w * w / (2 * longest)
        for w in job.facts.windows
    ]
    return 4 * job.tokens * job.queries * sum(contexts) / max(1, len(contexts))


def passes(
    times: LayerTimes,
    costs: Costs,
    count: Any,
    stored: Any,
    away: Any,
    streamed: Any,
    head: float = 0.0,
) -> tuple[Pass, Pass]:
    """Forward and backward through a run of `count` layers, of which `stored` have their input and
    `streamed` their weights on the way; `away` bytes of theirs wait on the host. head: milliseconds
    that the head needs to travel during the forward.

    What crosses the link is read from, or written to, the device's memory, which is not hidden.
    """
    moves = (away + streamed * (times.weights / times.link)) * times.copy
    once, back = sum(times.forward.values()), sum(times.backward.values())
    rerun = count - stored
    forward = Pass(
        device=count * once + moves,
        launches=count * (times.launches[0] + costs.queue) + streamed * MOVE_MS,
        # Two directions: what goes out does not wait for what comes in.
        link=np.maximum(away * times.link, streamed * times.weights + head),
    )
    backward = Pass(
        device=count * (back + costs.again) + rerun * once + moves,
        launches=count * (times.launches[1] + costs.queue_again)
        + rerun * times.launches[0]
        + streamed * MOVE_MS,
        link=away * times.link + streamed * times.weights * (1 + rerun / np.maximum(count, 1)),
    )
    return forward, backward
