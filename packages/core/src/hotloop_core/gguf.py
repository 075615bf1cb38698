"""Role -> tensor name in GGUF: what the exporter writes and the loader reads.

Source: `gguf-py/gguf/constants.py` of llama.cpp. A family overrides single entries in its `ExportFacts.names`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .family import ExportFacts

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


def gguf_name(facts: ExportFacts, role: str, layer: int | None = None) -> str | None:
    """The name of a role's tensor, without its `.weight` or `.bias`; None: the format has none for it."""
    name = facts.names.get(role, NAMES.get(role))
    return None if name is None else name.format(layer=layer)
