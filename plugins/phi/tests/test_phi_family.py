from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hotloop import add_lora, plan
from hotloop.exporting import export
from hotloop.loading.gguf_config import gguf_config
from hotloop.wiring import wire
from hotloop_core import facts_of
from hotloop_core.errors import UnsupportedError
from hotloop_phi import PHI3
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.tiny import SMALL, build, tokenizer
from transformers import Phi3Config

SIZES = {**SMALL, "num_hidden_layers": 2}


class TestPhi3(FamilyConformance):
    """Phi-3 mini 4k: a window over every layer, whole heads rotated, as many key/value heads as query heads."""

    spec = PHI3

    def tiny_config(self):
        return Phi3Config(**{**SIZES, "num_key_value_heads": 4}, sliding_window=9)


@pytest.mark.slow
class TestPhi4Mini(FamilyConformance):
    """Three quarters of each head rotated, longrope, a tied head. Batches pass the original length of 32."""

    spec = PHI3

    def tiny_config(self, original=32):
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
        }
        return Phi3Config(
            **SIZES,
            rope_parameters=rope,
            original_max_position_embeddings=original,
            tie_word_embeddings=True,
        )

    @pytest.mark.parametrize("length, other", [(24, 16), (48, 64)], ids=["within", "beyond"])
    def test_the_loss_is_that_of_the_factors_for_the_texts_length(self, length, other):
        model = build(self.tiny_config())
        ids = torch.arange(3, 3 + length)[None]
        expected = model(input_ids=ids, labels=ids).loss
        wire(model)
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
        unlike = build(self.tiny_config(original=other))
        wire(unlike)
        assert abs(unlike(input_ids=ids, labels=ids).loss - expected) > 1e-3


@pytest.mark.parametrize(
    "target, path",
    [("qkv", "self_attn.qkv_proj"), ("gate_up", "mlp.gate_up_proj"), ("o", "self_attn.o_proj")],
)
def test_an_adapter_goes_to_a_fused_projection_by_its_role(target, path):
    model = add_lora(build(Phi3Config(**SIZES)), r=4, targets=[target])
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {
        f"base_model.model.model.layers.{i}.{path}.lora_A.default.weight" for i in range(2)
    }


def test_a_plan_knows_the_fused_weights_of_phi_4():
    sizes = {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 100352,
    }
    facts = facts_of(PHI3, Phi3Config(**sizes).to_dict())
    assert facts.linear_shapes() == {
        "qkv": (7680, 5120),
        "o": (5120, 5120),
        "gate_up": (35840, 5120),
        "down": (5120, 17920),
    }
    assert plan(facts, tokens=4096, lora={"qkv": 16}, vram="24GiB", card="H100").tokens == 4096


def test_dropout_of_a_blocks_output_is_refused_and_that_of_the_embedding_does_nothing():
    with pytest.raises(UnsupportedError, match=r"'resid_pdrop' is 0\.1"):
        facts_of(PHI3, Phi3Config(**SIZES, resid_pdrop=0.1).to_dict())
    model = build(Phi3Config(**SIZES, embd_pdrop=0.5))
    ids = torch.arange(3, 30)[None]
    expected = model(input_ids=ids, labels=ids).loss
    wire(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)


@pytest.mark.parametrize(
    "changes, message",
    [({"hidden_act": "gelu"}, "activation=gelu"), ({"head_dim": 32}, "head_dim=32")],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_written(changes, message, tmp_path):
    model = build(Phi3Config(**SIZES, **changes))
    with pytest.raises(UnsupportedError, match=message):
        export(model, tokenizer(320), tmp_path, format="gguf", quant="f32")


def test_an_export_says_what_llama_cpp_makes_of_windows_and_longrope(tmp_path):
    model = build(TestPhi4Mini().tiny_config())
    model.config.sliding_window = 9
    report = export(model, tokenizer(320), tmp_path, format="gguf", quant="f32")
    assert any("last 9 tokens" in note and "'phi3'" in note for note in report.notes)
    assert any("open it with at most 32" in note for note in report.notes)


def test_a_file_of_llama_cpps_converter_is_read_without_window_and_with_longrope(tmp_path):
    writer = GGUFWriter(tmp_path / "theirs.gguf", "phi3")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(12)
    writer.add_rope_scaling_orig_ctx_len(32)
    writer.add_rope_scaling_attn_factors(1.25)
    writer.add_sliding_window(0)
    for name, factor in (("long", 4.0), ("short", 1.5)):
        writer.add_tensor(f"rope_factors_{name}.weight", np.full(6, factor, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((320, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = gguf_config(tmp_path / "theirs.gguf")
    assert config["sliding_window"] is None and config["tie_word_embeddings"]
    assert config["rope_parameters"] == {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "long_factor": [4.0] * 6,
        "short_factor": [1.5] * 6,
    }
