"""The SmolLM family for Hotloop: SmolLM3. (SmolLM and SmolLM2 are Llama.)"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from hotloop_core import ModelFacts
    from hotloop_core.family import Config

_ATTENTION = Attention(
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
)

ROTATED = LayerSpec(
    norms=Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    attention=_ATTENTION,
    mlp=Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", bias="mlp_bias"),
)
UNROTATED = replace(ROTATED, attention=replace(_ATTENTION, rotary=False))


def _layer(config: Config, index: int) -> LayerSpec:
    """One layer in four, or those that the config lists with a 0, has no positions."""
    listed = config.get("no_rope_layers")
    rotary = (index + 1) % config["no_rope_layer_interval"] if listed is None else listed[index]
    return ROTATED if rotary else UNROTATED


def _gguf_rotated(model: ModelFacts) -> list[int]:
    """llama.cpp leaves out every fourth rotation, and has no key for another pattern."""
    beyond = model.config.get("no_rope_layers", ())[model.layers :]
    return [*(int((i + 1) % 4 != 0) for i in range(model.layers)), *beyond]


SMOLLM3 = FamilySpec(
    api=API,
    name="smollm3",
    model_types=frozenset({"smollm3"}),
    layer=_layer,
    keys=ConfigKeys(
        window="sliding_window",
        use_window="use_sliding_window",
        defaults={
            "hidden_act": "silu",
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
    ),
    # llama.cpp rotates even/odd pairs for this architecture: q and k rows are reordered to match.
    exports={
        "gguf": ExportFacts(
            architecture="smollm3",
            transforms={"q": "rope_interleave_q", "k": "rope_interleave_k"},
            metadata={"rope.dimension_count": "head_dim", "vocab_size": "vocab_size"},
            implied={
                "qkv_bias": lambda _: False,
                "o_bias": lambda _: False,
                "mlp_bias": lambda _: False,
                "config.no_rope_layers": _gguf_rotated,
            },
        )
    },
    examples=("SmolLM3 3B",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """SmolLM3, which rotates the heads of three layers in four."""
    return [SMOLLM3]
