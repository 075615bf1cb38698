from __future__ import annotations

from hotloop_granite import GRANITE
from hotloop_testkit.family import FamilyConformance
from transformers import GraniteConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
    "embedding_multiplier": 3.0,
}


class TestGranite(FamilyConformance):
    """Granite 3: the four multipliers, a tied head."""

    spec = GRANITE

    def tiny_config(self):
        return GraniteConfig(**SIZES, **MULTIPLIERS, tie_word_embeddings=True)


class TestGraniteWithBiases(FamilyConformance):
    """Biases of attention and MLP, a head of its own."""

    spec = GRANITE

    def tiny_config(self):
        return GraniteConfig(**SIZES, **MULTIPLIERS, attention_bias=True, mlp_bias=True)
