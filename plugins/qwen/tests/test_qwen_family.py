from __future__ import annotations

import pytest
from hotloop_core.errors import UnsupportedError
from hotloop_qwen import QWEN2, QWEN3
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL
from transformers import Qwen2Config, Qwen3Config

SIZES = {**SMALL, "num_hidden_layers": 3}


class TestQwen2(FamilyConformance):
    """Qwen 2.5 0.5B to 3B: biases on q, k and v, a tied head."""

    spec = QWEN2

    def tiny_config(self):
        return Qwen2Config(**SIZES, tie_word_embeddings=True)


@pytest.mark.slow
class TestQwen2WithAWindow(FamilyConformance):
    """The larger ones: a head of its own. A window from the second layer on."""

    spec = QWEN2

    def tiny_config(self):
        return Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1)


class TestQwen3(FamilyConformance):
    """Norms over each head, an explicit head size."""

    spec = QWEN3

    def tiny_config(self):
        return Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)


@pytest.mark.slow
class TestQwen3WithBiases(FamilyConformance):
    """attention_bias puts one on o, too."""

    spec = QWEN3

    def tiny_config(self):
        return Qwen3Config(**SIZES, head_dim=16, attention_bias=True)

    @pytest.mark.xfail(raises=UnsupportedError, reason="llama.cpp has no biases for Qwen 3")
    def test_gguf_export_comes_back(self, tmp_path):
        super().test_gguf_export_comes_back(tmp_path)
