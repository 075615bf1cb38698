from __future__ import annotations

import pytest
from hotloop_mistral import MINISTRAL, MISTRAL
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL
from transformers import MinistralConfig, MistralConfig

SIZES = {**SMALL, "num_hidden_layers": 3}


class TestMistral(FamilyConformance):
    """Mistral 7B v0.2 to Nemo: no window; a head size of its own, as Nemo has it."""

    spec = MISTRAL

    def tiny_config(self):
        return MistralConfig(**SIZES, sliding_window=None, head_dim=8)


class TestMistralWithAWindow(FamilyConformance):
    """Mistral 7B v0.1: a window over every layer."""

    spec = MISTRAL

    def tiny_config(self):
        return MistralConfig(**SIZES, sliding_window=9)


@pytest.mark.slow
class TestMinistral(FamilyConformance):
    """Layers with and without a window."""

    spec = MINISTRAL

    def tiny_config(self):
        return MinistralConfig(
            **SIZES,
            head_dim=32,
            sliding_window=9,
            layer_types=["full_attention", *["sliding_attention"] * 2],
        )
