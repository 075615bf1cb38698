from __future__ import annotations

import pytest
import torch
from hotloop.wiring import wire
from hotloop_core.errors import UnsupportedError
from hotloop_gemma import GEMMA, GEMMA2, GEMMA3
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig

SIZES = {**SMALL, "num_hidden_layers": 3}
# The scale is that of head_dim, as llama.cpp has it; another one is checked without export, below.
WINDOWED = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


class TestGemma(FamilyConformance):
    """Gemma 2B: one key/value head, wide heads."""

    spec = GEMMA

    def tiny_config(self):
        return GemmaConfig(**{**SIZES, "num_key_value_heads": 1, "head_dim": 32})


class TestGemma2(FamilyConformance):
    """Soft caps that bite, every other layer windowed."""

    spec = GEMMA2

    def tiny_config(self):
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        # SDPA, the choice of transformers before 5.23, leaves out the attention soft cap.
        return Gemma2Config(**WINDOWED, **caps, attn_implementation="eager")


class TestGemma3(FamilyConformance):
    """Norms over each head; the two kinds of layer rotate differently."""

    spec = GEMMA3

    def tiny_config(self):
        full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
        sliding = {"rope_type": "default", "rope_theta": 100.0}
        rope = {"full_attention": full, "sliding_attention": sliding}
        return Gemma3TextConfig(**WINDOWED, layer_types=MIXED, rope_parameters=rope)


@pytest.mark.parametrize("config", [Gemma2Config, Gemma3TextConfig])
def test_the_attention_scale_is_that_of_query_pre_attn_scalar(config):
    torch.manual_seed(0)
    made = config(**{**WINDOWED, "query_pre_attn_scalar": 5})
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    ids = torch.arange(3, 43)[None]
    expected = model(input_ids=ids, labels=ids).loss
    wire(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)


def test_generation_with_a_static_cache_gives_the_same_text():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**WINDOWED, layer_types=MIXED)).eval()
    ids = torch.randint(3, 320, (2, 17))
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    wire(model)
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, expected)


def test_a_model_that_attends_in_both_directions_is_refused():
    config = Gemma3TextConfig(**WINDOWED, layer_types=MIXED, use_bidirectional_attention=True)
    with pytest.raises(UnsupportedError, match="both directions"):
        wire(AutoModelForCausalLM.from_config(config))
