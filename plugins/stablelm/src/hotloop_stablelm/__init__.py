"""The StableLM family for Hotloop: StableLM 3B, Zephyr, Code and StableLM 2 1.6B."""

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

STABLELM_LAYER = LayerSpec(
    norms=Norms(
        before_attention="input_layernorm", before_mlp="post_attention_layernorm", kind="layer"
    ),
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        qkv_bias="use_qkv_bias",
    ),
    mlp=Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
)

STABLELM = FamilySpec(
    api=API,
    name="stablelm",
    model_types=frozenset({"stablelm"}),
    layer=STABLELM_LAYER,
    keys=ConfigKeys(
        norm_eps="layer_norm_eps",
        refused={
            "use_parallel_residual": "attention and MLP stand beside each other (StableLM 2 12B)",
            "qk_layernorm": "each head of q and k has a LayerNorm of its own (StableLM 2 12B)",
            "hidden_dropout": "the MLP's output is dropped out",
        },
        defaults={
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25,
        },
    ),
    exports={
        "gguf": ExportFacts(
            architecture="stablelm",
            metadata={
                "attention.layer_norm_epsilon": "norm_eps",
                "rope.dimension_count": "rotary_dim",
            },
            implied={
                "head_dim": lambda model: model.hidden_size // model.heads,
                "tied": lambda _: False,
            },
        )
    },
    examples=("StableLM 3B 4E1T", "StableLM Zephyr 3B", "Stable Code 3B", "StableLM 2 1.6B"),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """StableLM, but for the models whose blocks stand side by side."""
    return [STABLELM]
