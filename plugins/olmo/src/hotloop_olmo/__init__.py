"""The OLMo family for Hotloop: OLMo 2 and OLMo 3."""

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

OLMO_LAYER = LayerSpec(
    norms=Norms(
        before_attention=None,
        before_mlp=None,
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        norm_over="all",
    ),
    mlp=Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
)

# llama.cpp reads the biases and adds none.
OLMO2_GGUF = ExportFacts(
    architecture="olmo2",
    implied={
        "head_dim": lambda model: model.hidden_size // model.heads,
        "tied": lambda _: False,
        "qkv_bias": lambda _: False,
        "o_bias": lambda _: False,
    },
)


def _gguf_windowed(model: ModelFacts) -> list[bool]:
    """llama.cpp takes every fourth layer for one that sees everything, and no list."""
    return [model.window is not None and (i + 1) % 4 != 0 for i in range(model.layers)]


OLMO3_GGUF = replace(
    OLMO2_GGUF,
    metadata={
        "attention.sliding_window": "window",
        "rope.freq_base_swa": "window_rope_theta",
    },
    implied={**OLMO2_GGUF.implied, "windowed": _gguf_windowed},
)

_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-5}

OLMO2 = FamilySpec(
    api=API,
    name="olmo2",
    model_types=frozenset({"olmo2"}),
    layer=OLMO_LAYER,
    keys=ConfigKeys(defaults=_DEFAULTS),
    exports={"gguf": OLMO2_GGUF},
    examples=("OLMo 2 1B, 7B, 13B, 32B",),
)

OLMO3 = FamilySpec(
    api=API,
    name="olmo3",
    model_types=frozenset({"olmo3"}),
    layer=OLMO_LAYER,
    keys=ConfigKeys(
        window="sliding_window",
        window_pattern=4,
        defaults={
            **_DEFAULTS,
            "sliding_window": 4096,
            "rope_theta": 5e5,
            "rope_local_base_freq": 5e5,
        },
    ),
    exports={"gguf": OLMO3_GGUF},
    examples=("OLMo 3 7B, 32B",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """OLMo 2: norms behind the blocks and over all heads; OLMo 3: windows in three layers of four."""
    return [OLMO2, OLMO3]
