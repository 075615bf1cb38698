from __future__ import annotations

import pytest
from hotloop_llama import LLAMA
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL
from transformers import LlamaConfig

SIZES = {**SMALL, "num_hidden_layers": 2}


class TestLlama(FamilyConformance):
    spec = LLAMA

    def tiny_config(self):
        return LlamaConfig(**SIZES)


class TestLlama3RopeScalingAndTiedHead(FamilyConformance):
    """Llama 3.2: llama3 rope scaling, tied embeddings, a head size of its own."""

    spec = LLAMA

    def tiny_config(self):
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        return LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True, rope_parameters=rope)


@pytest.mark.slow
class TestLlamaWithBiases(FamilyConformance):
    """Attention and MLP biases, and a key/value head for each query head."""

    spec = LLAMA

    def tiny_config(self):
        sizes = {**SIZES, "num_key_value_heads": 4}
        return LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
