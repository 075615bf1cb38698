from __future__ import annotations

import pytest
from hotloop_granite import GRANITE
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL
from transformers import GraniteConfig

SIZES = {**SMALL, "num_hidden_layers": 2}
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


@pytest.mark.slow
class TestGraniteWithBiases(FamilyConformance):
    """Biases of attention and MLP, a head of its own."""

    spec = GRANITE

    def tiny_config(self):
        return GraniteConfig(**SIZES, **MULTIPLIERS, attention_bias=True, mlp_bias=True)
