from __future__ import annotations

import pytest
from hotloop_core.errors import UnsupportedError
from hotloop_exaone import EXAONE4
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL
from transformers import Exaone4Config


@pytest.mark.slow
class TestExaone4(FamilyConformance):
    """1.2B: no window, every layer rotated, a tied head."""

    spec = EXAONE4

    def tiny_config(self):
        kinds = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
        return Exaone4Config(**SMALL, **kinds, num_hidden_layers=2, tie_word_embeddings=True)


class TestExaone4WithAWindow(FamilyConformance):
    """32B: three windowed layers, and one that sees everything without a rotation."""

    spec = EXAONE4

    def tiny_config(self):
        return Exaone4Config(**SMALL, num_hidden_layers=4, sliding_window=9)

    @pytest.mark.xfail(
        raises=UnsupportedError, reason="llama.cpp gives windows to a model of 64 layers alone"
    )
    def test_gguf_export_comes_back(self, tmp_path):
        super().test_gguf_export_comes_back(tmp_path)
