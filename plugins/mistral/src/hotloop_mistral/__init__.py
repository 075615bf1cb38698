"""The Mistral family for Hotloop: Mistral 7B, Nemo, Mistral Small and Ministral text models."""

from __future__ import annotations

from hotloop_core import (
    API,
    Attention,
    ConfigKeys,
    ExportFacts,
    FamilySpec,
    Glu,
    LayerSpec,
    Norms,
    hookimpl,
)

MISTRAL_LAYER = LayerSpec(
    norms=Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
    ),
    mlp=Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
)

# llama.cpp has no architecture of its own for these: it rotates even/odd pairs, so q and k rows are reordered to match,
# and it has no sliding window.
MISTRAL_GGUF = ExportFacts(
    architecture="llama",
    transforms={"q": "rope_interleave_q", "k": "rope_interleave_k"},
    metadata={"rope.dimension_count": "head_dim", "vocab_size": "vocab_size"},
)

_DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}

MISTRAL = FamilySpec(
    api=API,
    name="mistral",
    model_types=frozenset({"mistral"}),
    layer=MISTRAL_LAYER,
    # transformers' Mistral gives every layer the window, whatever a config's `layer_types` say.
    keys=ConfigKeys(window="sliding_window", layer_types=None, defaults=_DEFAULTS),
    exports={"gguf": MISTRAL_GGUF},
    examples=("Mistral 7B v0.1, v0.2, v0.3", "Mistral Nemo", "Mistral Small (2501)"),
)

MINISTRAL = FamilySpec(
    api=API,
    name="ministral",
    model_types=frozenset({"ministral"}),
    layer=MISTRAL_LAYER,
    keys=ConfigKeys(window="sliding_window", defaults=_DEFAULTS),
    exports={"gguf": MISTRAL_GGUF},
    examples=("Ministral 8B (2410)",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """Mistral, and Ministral, whose layers differ in their windows."""
    return [MISTRAL, MINISTRAL]
