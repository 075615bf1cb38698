"""The Phi family for Hotloop: Phi-3, Phi-3.5 mini and medium, Phi-4 and Phi-4-mini."""

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

PHI3_LAYER = LayerSpec(
    norms=Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    attention=Attention(qkv="self_attn.qkv_proj", o="self_attn.o_proj"),
    mlp=Glu(gate_up="mlp.gate_up_proj", down="mlp.down_proj"),
)

PHI3 = FamilySpec(
    api=API,
    name="phi3",
    model_types=frozenset({"phi3"}),
    layer=PHI3_LAYER,
    # transformers' Phi3 gives every layer the window. Its `embd_pdrop` is a number that no module reads.
    keys=ConfigKeys(
        window="sliding_window",
        layer_types=None,
        refused={"resid_pdrop": "each block's output is dropped out before it is added"},
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
        },
    ),
    # Beside the window, which llama.cpp reads and leaves at that, the rest is as transformers has it.
    exports={
        "gguf": ExportFacts(
            architecture="phi3",
            metadata={
                "rope.dimension_count": "rotary_dim",
                "rope.scaling.original_context_length": "config.original_max_position_embeddings",
                "attention.sliding_window": "window",
            },
            implied={"head_dim": lambda model: model.hidden_size // model.heads},
        )
    },
    examples=("Phi-3 mini, medium", "Phi-3.5 mini", "Phi-4 14B", "Phi-4-mini"),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """Phi-3 and what has its layer: q, k and v in one projection, gate and up in another."""
    return [PHI3]
