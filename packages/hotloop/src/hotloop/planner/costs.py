"""The arithmetic of a plan: bytes at the peak, milliseconds of a step.

Symbols: T tokens a step, D hidden size, I intermediate size, Q = H·K and KV = G·K widths of queries
and keys, V vocabulary, P a layer's projection weights, b bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hotloop_core.plan import SavedTensor, saved_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotloop_core import ModelFacts

    from .cards import Card

LOSS_TILE = 512 * 2**20
"""Bytes of logits that the loss holds at once."""

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of one weight: half a byte, an 8-bit absmax per 64, an fp32 absmax of these per 256 (QLoRA,
arXiv:2305.14314)."""

OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "sgd": 0.0,
}
"""State bytes of one trained element. 8 bit: two codes, an fp32 scale of each per 256 elements."""

SLACK_BYTES, SLACK_SHARE = 64 * 2**20, 0.08
"""What the allocator reserves and cuBLAS's workspace takes beside the tensors: a constant, and a share of all else but
weights. An H100 kept 18.9 GiB for 17.8 of tensors and 56.9 for 53.0; a budget must hold what is reserved."""

LAUNCH_MS = 0.15
"""Of a layer's forward or backward, kernel launches that a small batch cannot hide."""

ATTENTION_GRAD_FACTOR = 2.5
"""Attention's backward does five matrix products where its forward does two."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained.

    bits: 4 or 16 of the frozen projections. width: bytes of an activation and of a 16-bit (or fp32)
    weight. ranks: role -> LoRA rank. weight_bytes, trained_bytes: read from a model; None works
    them out (trained_bytes: weights, gradients and optimizer state of what trains; for LoRA all but
    the base).
    """

    facts: ModelFacts
    tokens: int
    longest: int
    bits: int
    width: int
    ranks: Mapping[str, int]
    full: bool
    optimizer: str
    weight_bytes: int | None = None
    trained_bytes: int | None = None

    @cached_property
    def saved(self) -> tuple[SavedTensor, ...]:
        """What a layer's backward needs."""
        return saved_tensors(self.facts)

    def saved_bytes(self, name: str) -> int:
        """Of the tensor `name` of one layer, all tokens."""
        tensor = next(t for t in self.saved if t.name == name)
        return self.tokens * (tensor.elements * self.width + tensor.extra_bytes)

    @cached_property
    def weights(self) -> int:
        """Bytes of the model's weights on the device."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        f = self.facts
        per_weight = NF4_BYTES if self.bits == 4 else self.width
        outside = f.vocab_size * f.hidden_size * (1 if f.tied else 2)
        norms = (2 * f.layers + 1) * f.hidden_size
        return int(f.layers * f.layer_parameters * per_weight + (outside + norms) * self.width)

    @cached_property
    def trained(self) -> int:
        """Bytes of gradients and optimizer state, and of the LoRA weights themselves (fp32, as PEFT
        keeps them).
        """
        if self.trained_bytes is not None:
            return self.trained_bytes
        state = OPTIMIZER_BYTES[self.optimizer]
        if self.full:
            return int(self.weights / self.width * (self.width + state))
        shapes = self.facts.linear_shapes()
        lora = sum(rank * sum(shapes[role]) for role, rank in self.ranks.items())
        return int(self.facts.layers * lora * (4 + 4 + state))

    @cached_property
    def dequantised(self) -> int:
        """The buffer of the largest group of projections, with the columns that hold LoRA's B and
        the rows of A.
        """
        if self.bits != 4:
            return 0
        f = self.facts
        groups = ((("gate", "up"), 2), (("q", "k", "v"), 3), (("down",), 1), (("o",), 1))
        shapes = f.linear_shapes()
        sizes: list[int] = []
        for roles, _ in groups:
            extra = _pad(sum(self.ranks.get(role, 0) for role in roles))
            n, k = sum(shapes[role][0] for role in roles), shapes[roles[0]][1]
            sizes.append((n + extra) * _pad(k + extra))
        return max(sizes) * self.width

    def working_set(self, kept: frozenset[str]) -> int:
        """Bytes of one layer's backward beyond its kept tensors, at its worse moment.

        In the MLP: what was recomputed, d(act), and five [T, D] (the incoming gradient, x, its
        normed copy, their gradients). In attention, gate and up are freed; d(out), d(q, k, v), the
        fp32 accumulator of dq, five [T, D].
        """
        f, t, b = self.facts, self.tokens, self.width
        q, kv = f.heads * f.head_dim, f.kv_heads * f.head_dim
        again = sum(
            self.saved_bytes(s.name) for s in self.saved if s.can_recompute and s.name not in kept
        )
        streams = 5 * f.hidden_size * b
        mlp = again + t * (f.intermediate_size * b + streams)
        attention = again - self.saved_bytes("gate_up") + t * (2 * (q + kv) * b + 4 * q + streams)
        return max(mlp, attention)

    @cached_property
    def loss(self) -> int:
        """Bytes of the loss: the last hidden states, their normed copy and its gradient, one tile
        of logits.
        """
        tile = min(LOSS_TILE, 4 * self.tokens * self.facts.vocab_size)
        return 3 * self.tokens * self.facts.hidden_size * self.width + tile

    def kept_bytes(self, kept: frozenset[str]) -> int:
        """Bytes that one layer keeps from forward to backward."""
        return sum(
            self.saved_bytes(s.name) for s in self.saved if s.name in kept or not s.can_recompute
        )

    @cached_property
    def _sizes(self) -> dict[frozenset[str], tuple[int, int]]:
        return {}

    def sizes(self, kept: frozenset[str]) -> tuple[int, int]:
        """(kept_bytes, working_set) of one layer, worked out once: the search asks for them often."""
        if kept not in self._sizes:
            self._sizes[kept] = self.kept_bytes(kept), self.working_set(kept)
        return self._sizes[kept]

    def memory(self, early: frozenset[str], count: int, late: frozenset[str]) -> dict[str, int]:
        """The peak by part: the first `count` layers keep `early`, the others `late`.

        Backward runs from the last layer, so the peak is at the loss, in the last layer with
        everything kept, or in the last of the early layers, when the late ones' tensors are already
        free.
        """
        rest = self.facts.layers - count
        (a, early_work), (z, late_work) = self.sizes(early), self.sizes(late)
        kept = count * a + rest * z
        moments = [kept + self.loss]
        if rest:
            moments.append(kept + late_work)
        if count:
            moments.append(count * a + early_work)
        parts = {
            "weights": self.weights,
            "gradients and optimizer"
            if self.full
            else "adapters, gradients, optimizer": self.trained,
            "dequantised weights, one group": self.dequantised,
            "activations kept for backward": kept,
            "working set of a layer or the loss": max(moments) - kept,
        }
        parts["allocator slack"] = SLACK_BYTES + int(
            SLACK_SHARE * (sum(parts.values()) - self.weights)
        )
        return parts

    def recompute_ms(self, name: str, card: Card) -> float:
        """To compute the tensor `name` of one layer again."""
        tensor = next(s for s in self.saved if s.name == name)
        gemm = self.tokens * tensor.flops / (card.gemm_tflops * 1e9)
        if name == "attention":
            return gemm + self.attention_flops / (card.attention_tflops[0] * 1e9)
        moved = 2 * self.saved_bytes(name)
        return gemm + moved / (card.copy_gbs * 1e6) * (name == "qkv")

    @property
    def attention_flops(self) -> float:
        """Of one layer's causal attention forward: two products over half the square, or over the
        window.
        """
        f = self.facts
        contexts = [
            self.longest / 2 if w is None or w >= self.longest else w - w * w / (2 * self.longest)
            for w in f.windows
        ]
        return 4 * self.tokens * f.heads * f.head_dim * sum(contexts) / max(1, len(contexts))

    def step_ms(self, card: Card) -> dict[str, float]:
        """A step without recomputation, by part."""
        f, t, b = self.facts, self.tokens, self.width
        gemm, copy = card.gemm_tflops * 1e9, card.copy_gbs * 1e6
        q, kv = f.heads * f.head_dim, f.kv_heads * f.head_dim
        shapes = f.linear_shapes()
        lora = sum(6 * rank * sum(shapes[role]) for role, rank in self.ranks.items())
        passes = 3 if self.full else 2
        # Read and written in forward: two norms, rope, the gated product; about twice that in
        # backward.
        moved = t * b * (4 * f.hidden_size + 2 * (q + kv) + 3 * f.intermediate_size)
        parts = {
            "GEMMs": f.layers * t * (2 * passes * f.layer_parameters + lora) / gemm,
            "attention": f.layers
            * self.attention_flops
            * (
                1 / (card.attention_tflops[0] * 1e9)
                + ATTENTION_GRAD_FACTOR / (card.attention_tflops[1] * 1e9)
            ),
            "norms, rope, activation": f.layers * 3 * moved / copy,
            "head and loss": t * 2 * passes * f.hidden_size * f.vocab_size / gemm,
            "launches": 2 * f.layers * LAUNCH_MS,
        }
        if self.bits == 4:
            parts["dequantise"] = f.layers * f.layer_parameters * 2 * (NF4_BYTES + b) / copy
        parts["optimizer"] = 2 * self.trained / copy
        return parts


def _pad(n: int) -> int:
    return (n + 63) // 64 * 64
