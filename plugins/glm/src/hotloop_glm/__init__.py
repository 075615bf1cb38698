"""The GLM family for Hotloop: GLM-4 9B of 2024 and GLM-4-0414."""

from __future__ import annotations

from dataclasses import replace

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

GLM_LAYER = LayerSpec(
    norms=Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        qkv_bias="attention_bias",
        interleaved=True,
    ),
    mlp=Glu(gate_up="mlp.gate_up_proj", down="mlp.down_proj"),
)

GLM4_LAYER = replace(
    GLM_LAYER,
    norms=Norms(
        before_attention="input_layernorm",
        after_attention="post_self_attn_layernorm",
        before_mlp="post_attention_layernorm",
        after_mlp="post_mlp_layernorm",
    ),
)

_KEYS = ConfigKeys(
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
    }
)
GLM4_GGUF = ExportFacts(architecture="glm4", metadata={"rope.dimension_count": "rotary_dim"})
CHATGLM_GGUF = replace(
    GLM4_GGUF,
    architecture="chatglm",
    implied={"head_dim": lambda model: model.hidden_size // model.heads},
)

GLM = FamilySpec(
    api=API,
    name="glm",
    model_types=frozenset({"glm"}),
    layer=GLM_LAYER,
    keys=_KEYS,
    exports={"gguf": CHATGLM_GGUF},
    examples=("GLM-4 9B (2024), base and chat",),
)

GLM4 = FamilySpec(
    api=API,
    name="glm4",
    model_types=frozenset({"glm4"}),
    layer=GLM4_LAYER,
    keys=_KEYS,
    exports={"gguf": GLM4_GGUF},
    examples=("GLM-4 9B and 32B 0414", "GLM-Z1"),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """The two generations: the second norms each block's output as well."""
    return [GLM, GLM4]
