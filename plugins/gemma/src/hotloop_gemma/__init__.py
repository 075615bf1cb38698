"""The Gemma family for Hotloop: Gemma 1, Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Callable

    from hotloop_core import ModelFacts
    from hotloop_core.kernels import Activation

GEMMA_LAYER = LayerSpec(
    norms=Norms(
        before_attention="input_layernorm", before_mlp="post_attention_layernorm", offset=1.0
    ),
    attention=Attention(
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    mlp=Glu(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
)

GEMMA2_LAYER = replace(
    GEMMA_LAYER,
    norms=Norms(
        before_attention="input_layernorm",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        offset=1.0,
    ),
)

GEMMA3_LAYER = replace(
    GEMMA2_LAYER,
    attention=replace(GEMMA2_LAYER.attention, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
)

# transformers multiplies the normed x by 1 + w, llama.cpp by w.
_NORM_ROLES = (
    "before_attention",
    "after_attention",
    "before_mlp",
    "after_mlp",
    "q_norm",
    "k_norm",
    "final_norm",
)
_ADD_ONE: dict[str, str] = dict.fromkeys(_NORM_ROLES, "add_one")
_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256}
_REFUSED = {
    "use_bidirectional_attention": "it attends in both directions, the engine only to what came before"
}
# Every release means the tanh form; the first Gemma's configs call it "gelu".
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu_tanh"}


def _gguf_attention_scale(layers_of_27b: int) -> Callable[[ModelFacts], float]:
    """llama.cpp keeps no scale in the file: it is head_dim ** -0.5, but for the 27B, known by its number of layers."""
    return lambda m: (m.hidden_size // m.heads if m.layers == layers_of_27b else m.head_dim) ** -0.5


# llama.cpp has one activation for all three, and no biases.
_GGUF_IMPLIED: dict[str, Callable[[ModelFacts], Any]] = {
    "activation": lambda _: "gelu_tanh",
    "qkv_bias": lambda _: False,
    "o_bias": lambda _: False,
}


GEMMA = FamilySpec(
    api=API,
    name="gemma",
    model_types=frozenset({"gemma"}),
    layer=GEMMA_LAYER,
    keys=ConfigKeys(
        refused=_REFUSED,
        activations=_ACTIVATIONS,
        defaults={
            **_DEFAULTS,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
        },
    ),
    exports={
        "gguf": ExportFacts(
            architecture="gemma",
            transforms=_ADD_ONE,
            implied={**_GGUF_IMPLIED, "tied": lambda _: True},
        )
    },
    examples=("Gemma 2B, 7B", "CodeGemma"),
)

GEMMA2 = FamilySpec(
    api=API,
    name="gemma2",
    model_types=frozenset({"gemma2"}),
    layer=GEMMA2_LAYER,
    keys=ConfigKeys(
        activation="hidden_activation",
        query_scale="query_pre_attn_scalar",
        attention_softcap="attn_logit_softcapping",
        logit_softcap="final_logit_softcapping",
        refused=_REFUSED,
        window="sliding_window",
        window_pattern=2,
        defaults={
            **_DEFAULTS,
            "hidden_activation": "gelu_pytorch_tanh",
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    exports={
        "gguf": ExportFacts(
            architecture="gemma2",
            transforms=_ADD_ONE,
            metadata={
                "attn_logit_softcapping": "attention_softcap",
                "final_logit_softcapping": "logit_softcap",
                "attention.sliding_window": "window",
                "attention.sliding_window_pattern": "windowed",
            },
            implied={
                **_GGUF_IMPLIED,
                "tied": lambda _: True,
                "attention_scale": _gguf_attention_scale(46),
            },
        )
    },
    examples=("Gemma 2 2B, 9B, 27B",),
)

GEMMA3 = FamilySpec(
    api=API,
    name="gemma3",
    model_types=frozenset({"gemma3_text"}),
    layer=GEMMA3_LAYER,
    # A config may name an attention soft cap; Gemma 3's attention does not have one.
    keys=ConfigKeys(
        activation="hidden_activation",
        query_scale="query_pre_attn_scalar",
        logit_softcap="final_logit_softcapping",
        refused=_REFUSED,
        window="sliding_window",
        window_pattern="sliding_window_pattern",
        defaults={
            **_DEFAULTS,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 262208,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    exports={
        "gguf": ExportFacts(
            architecture="gemma3",
            transforms=_ADD_ONE,
            metadata={
                "final_logit_softcapping": "logit_softcap",
                "attention.sliding_window": "window",
                "attention.sliding_window_pattern": "windowed",
                "rope.freq_base_swa": "window_rope_theta",
            },
            implied={**_GGUF_IMPLIED, "attention_scale": _gguf_attention_scale(62)},
        )
    },
    examples=("Gemma 3 270M, 1B and the text models of 4B, 12B, 27B",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """The three generations: each adds to the layer before it."""
    return [GEMMA, GEMMA2, GEMMA3]
