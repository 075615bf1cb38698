"""The Llama family for Hotloop: Llama 2 to 3.2, SmolLM2, Yi, TinyLlama and whatever says model_type llama."""

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

LLAMA_LAYER = LayerSpec(
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

LLAMA = FamilySpec(
    api=API,
    name="llama",
    model_types=frozenset({"llama"}),
    layer=LLAMA_LAYER,
    keys=ConfigKeys(defaults={"hidden_act": "silu"}),
    # llama.cpp rotates even/odd pairs for this architecture: q and k rows are reordered to match.
    exports={
        "gguf": ExportFacts(
            architecture="llama",
            transforms={"q": "rope_interleave_q", "k": "rope_interleave_k"},
            metadata={"rope.dimension_count": "head_dim", "vocab_size": "vocab_size"},
        )
    },
    examples=("Llama 2, 3, 3.1, 3.2", "SmolLM2", "Falcon 3", "Yi", "TinyLlama"),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """The Llama family."""
    return [LLAMA]
