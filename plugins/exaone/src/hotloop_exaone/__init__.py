"""The EXAONE family for Hotloop: LG's EXAONE 4."""

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
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)

ROTATED = LayerSpec(
    norms=Norms(
        before_attention=None,
        before_mlp=None,
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    attention=_ATTENTION,
    mlp=Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
)
UNROTATED = replace(ROTATED, attention=replace(_ATTENTION, rotary=False))


def _layer(config: Config, index: int) -> LayerSpec:
    """Where some layers have a window, those that see everything have no positions (the 32B)."""
    if config.get("sliding_window") is None:
        return ROTATED
    kinds = config.get("layer_types")
    if kinds is None:
        return ROTATED if (index + 1) % config["sliding_window_pattern"] else UNROTATED
    return ROTATED if kinds[index] == "sliding_attention" else UNROTATED


def _gguf_windowed(model: ModelFacts) -> list[bool]:
    """llama.cpp knows the 32B by its 64 layers: three windowed and rotated to one that is neither. Others have none."""
    return [model.layers == 64 and (i + 1) % 4 != 0 for i in range(model.layers)]


EXAONE4 = FamilySpec(
    api=API,
    name="exaone4",
    model_types=frozenset({"exaone4"}),
    layer=_layer,
    keys=ConfigKeys(
        window="sliding_window",
        window_pattern="sliding_window_pattern",
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
    ),
    exports={
        "gguf": ExportFacts(
            architecture="exaone4",
            metadata={"vocab_size": "vocab_size", "attention.sliding_window": "window"},
            implied={
                "head_dim": lambda model: model.hidden_size // model.heads,
                "windowed": _gguf_windowed,
            },
        )
    },
    examples=("EXAONE 4.0 1.2B, 32B",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """EXAONE 4: norms behind the blocks alone, and over each head of q and k."""
    return [EXAONE4]
