"""The Granite family for Hotloop: IBM's dense Granite 3 models."""

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

GRANITE_LAYER = LayerSpec(
    norms=Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    mlp=Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", bias="mlp_bias"),
)

GRANITE = FamilySpec(
    api=API,
    name="granite",
    model_types=frozenset({"granite"}),
    layer=GRANITE_LAYER,
    # The fourth multiplier, on the embedding, is applied outside the layers, by the model's own code.
    keys=ConfigKeys(
        attention_scale="attention_multiplier",
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
        defaults={"hidden_act": "silu", "attention_multiplier": 1.0},
    ),
    # llama.cpp rotates even/odd pairs for this architecture: q and k rows are reordered to match.
    exports={
        "gguf": ExportFacts(
            architecture="granite",
            transforms={"q": "rope_interleave_q", "k": "rope_interleave_k"},
            metadata={
                "rope.dimension_count": "head_dim",
                "vocab_size": "vocab_size",
                "attention.scale": "attention_scale",
                "embedding_scale": "config.embedding_multiplier",
                "residual_scale": "residual_scale",
                "logit_scale": "logit_divisor",
            },
        )
    },
    examples=("Granite 3.0 to 3.3, dense: 2B, 8B",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """Granite."""
    return [GRANITE]
