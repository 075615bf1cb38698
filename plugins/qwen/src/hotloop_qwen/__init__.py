"""The Qwen family for Hotloop: Qwen 1.5, 2 and 2.5, and the dense models of Qwen 3."""

from __future__ import annotations

from typing import Any

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

_NORMS = Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
_MLP = Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")

QWEN2_LAYER = LayerSpec(
    norms=_NORMS,
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        qkv_bias=True,
    ),
    mlp=_MLP,
)

QWEN3_LAYER = LayerSpec(
    norms=_NORMS,
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    ),
    mlp=_MLP,
)

_WINDOW: dict[str, Any] = {
    "window": "sliding_window",
    "use_window": "use_sliding_window",
    "window_start": "max_window_layers",
}
_DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}

QWEN2 = FamilySpec(
    api=API,
    name="qwen2",
    model_types=frozenset({"qwen2"}),
    layer=QWEN2_LAYER,
    keys=ConfigKeys(**_WINDOW, defaults=_DEFAULTS),
    exports={
        "gguf": ExportFacts(
            architecture="qwen2",
            implied={"head_dim": lambda model: model.hidden_size // model.heads},
        )
    },
    examples=("Qwen 1.5", "Qwen 2", "Qwen 2.5", "QwQ", "DeepSeek-R1-Distill-Qwen"),
)

QWEN3 = FamilySpec(
    api=API,
    name="qwen3",
    model_types=frozenset({"qwen3"}),
    layer=QWEN3_LAYER,
    keys=ConfigKeys(**_WINDOW, defaults={**_DEFAULTS, "head_dim": 128}),
    exports={
        "gguf": ExportFacts(
            architecture="qwen3",
            implied={"qkv_bias": lambda _: False, "o_bias": lambda _: False},
        )
    },
    examples=("Qwen 3, dense: 0.6B to 32B",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """Qwen 2 (q, k, v biases) and Qwen 3 (norms over each head of q and k)."""
    return [QWEN2, QWEN3]
