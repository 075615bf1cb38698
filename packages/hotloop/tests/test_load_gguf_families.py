"""The config of a GGUF file: what a family writes by its description is read back by it."""

import pytest
import torch
from gguf import GGUFWriter
from hotloop.exporting import export
from hotloop.loading import load
from hotloop.loading.gguf_config import gguf_config
from hotloop_core.errors import CheckpointError, NoFamilyError, UnsupportedError
from hotloop_testkit.tiny import SMALL, tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Qwen3Config,
)

SIZES = {**SMALL, "num_hidden_layers": 3}
WIDE = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LOCAL_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **parameters}}


@pytest.mark.parametrize(
    "made",
    [
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        LlamaConfig(**SIZES, **rope("linear", factor=4.0), rms_norm_eps=1e-5, head_dim=8),
        LlamaConfig(
            **SIZES,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.8),
        ),
        GemmaConfig(**{**SIZES, "num_key_value_heads": 1, "head_dim": 32}),
        Gemma2Config(
            **SIZES,
            **WIDE,
            layer_types=MIXED,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        Gemma2Config(
            **{**SIZES, "num_hidden_layers": 46},
            **{**WIDE, "query_pre_attn_scalar": 16},
        ),
        Gemma3TextConfig(**SIZES, **WIDE, layer_types=MIXED, rope_parameters=LOCAL_ROPE),
        Qwen3Config(**SIZES, head_dim=32),
    ],
    ids=[
        "llama-biases",
        "llama-linear",
        "llama-yarn",
        "gemma",
        "gemma2",
        "gemma2-27b",
        "gemma3",
        "qwen3",
    ],
)
def test_a_gguf_file_computes_what_it_was_written_from(made, tmp_path):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    report = export(model, tokenizer(320), tmp_path, format="gguf", quant="f32", name="tiny")
    again, words = load(
        report.files[0].path,
        bits=16,
        max_seq_len=64,
        wire=False,
        device="cpu",
        attn="eager",
    )
    for key in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "pad_token_id"):
        assert getattr(again.config, key) == getattr(made, key), key
    assert words.model_max_length == 256
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def header(path, architecture, *, change=None, embedding=True):
    """A file that holds what a config is read from, and no layer."""
    writer = GGUFWriter(path, architecture)
    values = {
        "block_count": 4,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        **(change or {}),
    }
    for key, value in values.items():
        add = {list: writer.add_array, str: writer.add_string, int: writer.add_uint32}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    if embedding:
        writer.add_tensor("token_embd.weight", torch.zeros(320, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gemma_3_of_others_has_llama_cpps_defaults_and_its_pattern_as_a_number(tmp_path):
    pattern = {"attention.sliding_window": 9, "attention.sliding_window_pattern": 2}
    config = gguf_config(header(tmp_path / "n.gguf", "gemma3", change=pattern))
    assert (config["model_type"], config["tie_word_embeddings"]) == ("gemma3_text", True)
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    assert config["num_key_value_heads"] == 4
    assert config["query_pre_attn_scalar"] == 16
    assert config["final_logit_softcapping"] is None


@pytest.mark.parametrize(
    "architecture, options, error, message",
    [
        ("martian", {}, NoFamilyError, "'martian'.*families read .*gemma3"),
        ("llama", {"embedding": False}, CheckpointError, "embedding"),
        ("llama", {"change": {"block_count": 0}}, CheckpointError, "'block_count'.* is 0"),
        (
            "llama",
            {"change": {"feed_forward_length": [96, 96, 96, 64]}},
            UnsupportedError,
            "'feed_forward_length' differs",
        ),
        (
            "llama",
            {"change": {"rope.scaling.type": "longrope"}},
            UnsupportedError,
            "'longrope'",
        ),
    ],
)
def test_a_file_that_no_config_can_say_is_refused(architecture, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        gguf_config(header(tmp_path / "odd.gguf", architecture, **options))
