"""The EXAONE family for Hotloop: LG's EXAONE 4."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hotloop_core import (
    API,
    Attention,
    ConfigKeys,
    FamilySpec,
    Glu,
    LayerSpec,
    Norms,
    hookimpl,
)

if TYPE_CHECKING:
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
    windowed = config.get("sliding_window") is not None
    kinds = config.get("layer_types")
    return UNROTATED if windowed and kinds and kinds[index] == "full_attention" else ROTATED


EXAONE4 = FamilySpec(
    api=API,
    name="exaone4",
    model_types=frozenset({"exaone4"}),
    layer=_layer,
    keys=ConfigKeys(window="sliding_window"),
    examples=("EXAONE 4.0 1.2B, 32B",),
)


@hookimpl
def hotloop_families() -> list[FamilySpec]:
    """EXAONE 4: norms behind the blocks alone, and over each head of q and k."""
    return [EXAONE4]
