from __future__ import annotations

import pytest
from hotloop.exporting import export
from hotloop_core import facts_of
from hotloop_core.errors import UnsupportedError
from hotloop_glm import GLM, GLM4
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL, build, tokenizer
from transformers import Glm4Config, GlmConfig

SIZES = {**SMALL, "num_hidden_layers": 2, "head_dim": 16}


@pytest.mark.slow
class TestGlm(FamilyConformance):
    """GLM-4 9B of 2024: biases on q, k and v, half of each head rotated in even/odd pairs."""

    spec = GLM

    def tiny_config(self):
        return GlmConfig(**SIZES)


class TestGlm4(FamilyConformance):
    """GLM-4-0414: norms behind both blocks too; no biases, as in the 32B."""

    spec = GLM4

    def tiny_config(self):
        return Glm4Config(**SIZES, attention_bias=False)


def test_a_config_from_before_rope_parameters_rotates_half_of_each_head():
    hub = {
        "model_type": "glm",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "vocab_size": 151552,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }
    facts = facts_of(GLM, hub)
    assert (facts.head_dim, facts.rotary_dim, facts.kv_heads, facts.qkv_bias) == (128, 64, 2, True)
    assert facts.linear_shapes()["gate_up"] == (27392, 4096)
    assert facts_of(GLM, GlmConfig().to_dict()).linear_shapes() == facts.linear_shapes()


def test_llama_cpp_has_no_head_size_of_its_own_for_chatglm(tmp_path):
    model = build(GlmConfig(**{**SIZES, "head_dim": 32}))
    with pytest.raises(UnsupportedError, match=r"head_dim=32.*'chatglm'.*takes 16"):
        export(model, tokenizer(320), tmp_path, format="gguf", quant="f32")
