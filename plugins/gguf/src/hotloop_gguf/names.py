"""Role -> tensor name in GGUF. A family overrides single entries in its `ExportFacts.names`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.errors import UnsupportedError

if TYPE_CHECKING:
    from hotloop_core import ExportFacts, TensorEntry

NAMES = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "before_attention": "blk.{layer}.attn_norm",
    "after_attention": "blk.{layer}.post_attention_norm",
    "before_mlp": "blk.{layer}.ffn_norm",
    "after_mlp": "blk.{layer}.post_ffw_norm",
    "q": "blk.{layer}.attn_q",
    "k": "blk.{layer}.attn_k",
    "v": "blk.{layer}.attn_v",
    "qkv": "blk.{layer}.attn_qkv",
    "o": "blk.{layer}.attn_output",
    "q_norm": "blk.{layer}.attn_q_norm",
    "k_norm": "blk.{layer}.attn_k_norm",
    "gate": "blk.{layer}.ffn_gate",
    "up": "blk.{layer}.ffn_up",
    "gate_up": "blk.{layer}.ffn_up",
    "down": "blk.{layer}.ffn_down",
    "router": "blk.{layer}.ffn_gate_inp",
    "shared_gate": "blk.{layer}.ffn_gate_shexp",
    "shared_up": "blk.{layer}.ffn_up_shexp",
    "shared_down": "blk.{layer}.ffn_down_shexp",
}


def tensor_name(entry: TensorEntry, facts: ExportFacts) -> str:
    """The name that llama.cpp looks for.

    Raises:
        UnsupportedError: the tensor has no place in the format.

    """
    pattern = facts.names.get(entry.role, NAMES.get(entry.role))
    if pattern is None or entry.part not in ("weight", "bias"):
        raise UnsupportedError(
            f"{entry.name} (role {entry.role!r}) has no place in a GGUF file of architecture "
            f"{facts.architecture!r}: its family's ExportFacts name none. Export as safetensors, "
            "or add the role to the family's `exports`."
        )
    return f"{pattern.format(layer=entry.layer)}.{entry.part}"
