"""What is to be trained, and the bytes of its parts.

Symbols: T tokens a step, D hidden size, I intermediate size, Q = H·K and KV = G·K widths of queries
and keys, V vocabulary, P a layer's projection weights, b bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hotloop_core import Placement
from hotloop_core.plan import SavedTensor, saved_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotloop_core import ModelFacts

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of one weight: half a byte, an 8-bit absmax per 64, an fp32 absmax of these per 256 (QLoRA,
arXiv:2305.14314)."""

NF4_KV_BYTES = 1 / 2 + 4 / 64
"""Of one key or value that waits in NF4: half a byte, and an fp32 absmax per 64."""

OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "sgd": 0.0,
}
"""State bytes of one trained element. 8 bit: two codes, an fp32 scale of each per 256 elements."""

LOSS_TILE = 576 * 2**20
"""The most bytes of logits that the loss holds at once, in the dtype of the activations."""

PITCH = 64
"""Adapter columns in the GEMMs' buffers are padded to this many elements."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One wide GEMM: [n, k] weights and c more columns and rows for the adapters (decision 2)."""

    n: int
    k: int
    c: int

    @property
    def extended(self) -> int:
        """Elements of the buffer that holds the weights, the adapters and the padding."""
        return (self.n + self.c) * (self.k + self.c)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained.

    bits: 4 or 16 of the frozen projections. width: bytes of an activation and of a 16-bit (or fp32)
    weight. ranks: role -> LoRA rank. weight_bytes, trained_bytes: read from a model; None works
    them out (trained_bytes: weights, gradients and optimizer state of what trains; for LoRA all but
    the base). outside_frozen: neither embedding nor head trains, so that they may live on the host.
    """

    facts: ModelFacts
    tokens: int
    longest: int
    bits: int
    width: int
    ranks: Mapping[str, int]
    full: bool
    optimizer: str
    nf4_kv: bool = False
    weight_bytes: int | None = None
    trained_bytes: int | None = None
    outside_frozen: bool = True

    @cached_property
    def saved(self) -> tuple[SavedTensor, ...]:
        """What a layer's backward needs."""
        return saved_tensors(self.facts)

    @property
    def queries(self) -> int:
        """Q, elements per token."""
        return self.facts.heads * self.facts.head_dim

    @property
    def keys(self) -> int:
        """KV, elements per token: of the keys, and as many of the values."""
        return self.facts.kv_heads * self.facts.head_dim

    @property
    def stream(self) -> int:
        """Bytes of a whole [T, D]: the residual stream, or its gradient."""
        return self.tokens * self.facts.hidden_size * self.width

    @cached_property
    def whole(self) -> dict[str, int]:
        """Tensor name -> bytes of it on the device, one layer, all tokens. What a group of projections
        makes lies in a buffer with the adapters' columns beside it.
        """
        beside = {name: group.c for name, group in self.groups.items()}
        return {
            s.name: self.tokens
            * ((s.elements + beside.get(s.name, 0)) * self.width + s.extra_bytes)
            for s in self.saved
        }

    @cached_property
    def waiting(self) -> dict[str, int]:
        """Tensor name -> bytes of it while it waits for backward; keys and values may wait in NF4."""
        lossy = int(2 * self.keys * (self.width - NF4_KV_BYTES)) * self.tokens
        return {
            name: size - lossy * (self.nf4_kv and name == "qkv")
            for name, size in self.whole.items()
        }

    def small(self, place: Mapping[str, Placement]) -> int:
        """Bytes that a layer keeps beside the named tensors: each norm's statistics (fp32), and what
        enters the adapters' second GEMM, unless the projection is computed again.
        """
        made = {name for name, where in place.items() if where is Placement.RECOMPUTE}
        post = self.facts.post_norms
        # group -> whether its input to the second GEMM is made again; down's output is not, as a rule. A family's own
        # block makes all of it again, and counts it itself.
        again = {name: name in made for name in ("qkv", "gate_up")}
        again |= {"o": ("attention_out" if post else "x_mid") in made, "down": "mlp_out" in made}
        norms = 2 - again["qkv"] - again["gate_up"] + post * (2 - again["o"] - again["down"])
        own = {role for block in self.facts.own.values() for role in block.projections}
        ranks = sum(self.rank(name) for name in self.groups.keys() - own if not again[name])
        return self.tokens * (4 * norms + ranks * self.width)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The four wide GEMMs of a layer: projections that share their input run as one."""
        shapes = self.facts.linear_shapes()
        return {
            name: Group(
                n=sum(shapes[role][0] for role in roles),
                k=shapes[roles[0]][1],
                c=-(-self.rank(name) // PITCH) * PITCH,
            )
            for name, roles in self.facts.groups.items()
        }

    def rank(self, group: str) -> int:
        """Ranks of the adapters on a group's projections, together."""
        return sum(self.ranks.get(role, 0) for role in self.facts.groups[group])

    @property
    def copies_weights(self) -> bool:
        """Whether a GEMM reads a copy of its weights: dequantised, or with the adapters beside them."""
        return self.bits == 4 or bool(self.ranks)

    def extended(self, group: str) -> int:
        """Bytes of the buffer that a group of projections is copied to; 0 where it is used in place."""
        return self.groups[group].extended * self.width * self.copies_weights

    def extended_own(self, part: str) -> int:
        """Bytes of the largest such buffer of a family's own block, which runs its projections one by one."""
        return max(self.extended(role) for role in self.facts.own[part].projections)

    @cached_property
    def layer_dequantised(self) -> int:
        """Bytes of one layer's projections as the GEMMs read them, adapters beside them; 0 where none is 4-bit."""
        return sum(map(self.extended, self.groups)) if self.bits == 4 else 0

    @cached_property
    def layer_weights(self) -> int:
        """Bytes of one layer's frozen projections."""
        per_weight = NF4_BYTES if self.bits == 4 else self.width
        return int(self.facts.layer_parameters * per_weight)

    @cached_property
    def embedding(self) -> int:
        """Bytes of the embedding."""
        return self.facts.vocab_size * self.facts.hidden_size * self.width

    @cached_property
    def head(self) -> int:
        """Bytes of the head beside the embedding: none where they are tied."""
        return 0 if self.facts.tied else self.embedding

    @cached_property
    def weights(self) -> int:
        """Bytes of all the model's weights."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        f = self.facts
        norms = (2 * f.layers + 1) * f.hidden_size * self.width
        return f.layers * self.layer_weights + self.embedding + self.head + norms

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
        return int(self.gradients / 4 * (4 + 4 + state))

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients: in fp32 of LoRA weights, in their own dtype of all weights."""
        if self.full:
            return self.weights
        shapes = self.facts.linear_shapes()
        lora = sum(rank * sum(shapes[role]) for role, rank in self.ranks.items())
        return 4 * self.facts.layers * lora

    @cached_property
    def loss(self) -> int:
        """Bytes of the loss: the last hidden states, their normed copy and its gradient; and a tile of
        logits with the hidden states of its tokens and their gradient.
        """
        vocabulary = self.facts.vocab_size
        taken = min(self.tokens, LOSS_TILE // (vocabulary * self.width))
        return 3 * self.stream + taken * (vocabulary + 2 * self.facts.hidden_size) * self.width
