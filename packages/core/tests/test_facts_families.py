"""Facts of published models, read from what their config.json says (keys that no fact comes from left out)."""

import pytest
from hotloop_core import discover, facts_of
from hotloop_core.errors import ConfigError, UnsupportedError

MISTRAL_7B_V01 = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_7B_V03 = {
    **MISTRAL_7B_V01,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
MISTRAL_NEMO = {
    **MISTRAL_7B_V03,
    "hidden_size": 5120,
    "head_dim": 128,
    "num_hidden_layers": 40,
    "max_position_embeddings": 1024000,
    "vocab_size": 131072,
}
MINISTRAL = {
    **MISTRAL_7B_V03,
    "model_type": "ministral",
    "head_dim": 128,
    "num_hidden_layers": 4,
    "sliding_window": 32768,
    "layer_types": ["full_attention", *["sliding_attention"] * 3],
}
GEMMA_2B = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
GEMMA_2_27B = {
    **GEMMA_2_9B,
    "head_dim": 128,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# The text_config of the 4B: what it leaves out is what the config class fills in.
GEMMA_3_4B = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
QWEN_25_7B = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "mistral-7b-v0.1": MISTRAL_7B_V01,
    "mistral-7b-v0.3": MISTRAL_7B_V03,
    "mistral-nemo": MISTRAL_NEMO,
    "ministral": MINISTRAL,
    "gemma-2b": GEMMA_2B,
    "gemma-2-9b": GEMMA_2_9B,
    "gemma-2-27b": GEMMA_2_27B,
    "gemma-3-1b": GEMMA_3_1B,
    "gemma-3-4b": GEMMA_3_4B,
    "qwen2.5-7b": QWEN_25_7B,
    "qwen3-8b": QWEN3_8B,
}
REGISTRY = discover()


def facts(config, **changes):
    config = {**config, **changes}
    return facts_of(REGISTRY.match(config), config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_and_transformers_reading_of_it_give_the_same_facts(name):
    transformers = pytest.importorskip("transformers")
    config = PUBLISHED[name]
    options = {k: v for k, v in config.items() if k != "model_type"}
    read = transformers.AutoConfig.for_model(config["model_type"], **options).to_dict()
    from dataclasses import asdict

    ours, theirs = asdict(facts(config)), asdict(facts(read))
    del ours["config"], theirs["config"]
    assert ours == theirs


def test_mistral_s_window_holds_for_every_layer_where_there_is_one():
    assert facts(MISTRAL_7B_V01).windows == (4096,) * 32
    assert facts(MISTRAL_7B_V03).windows == (None,) * 32
    without = {k: v for k, v in MISTRAL_7B_V01.items() if k != "sliding_window"}
    assert facts(without).window == 4096  # as transformers' config class fills it in
    listed = facts(MISTRAL_7B_V01, layer_types=["full_attention"] * 32)
    assert listed.windows == (4096,) * 32


def test_nemo_s_heads_are_narrower_than_its_hidden_size_divided():
    found = facts(MISTRAL_NEMO)
    assert found.head_dim == 128 and found.linear_shapes()["q"] == (4096, 5120)


def test_ministral_s_windows_follow_its_layer_types():
    assert facts(MINISTRAL).windows == (None, 32768, 32768, 32768)


def test_the_first_gemma_is_tied_and_its_gelu_is_the_tanh_form():
    found = facts(GEMMA_2B)
    assert (found.tied, found.activation, found.head_dim) == (True, "gelu_tanh", 256)
    assert (found.attention_scale, found.post_norms, found.qk_norm) == (1 / 16, False, False)
    assert found.windows == (None,) * 18


def test_gemma_2_has_soft_caps_four_norms_and_every_other_layer_windowed():
    found = facts(GEMMA_2_9B)
    assert (found.attention_softcap, found.logit_softcap, found.post_norms) == (50.0, 30.0, True)
    assert found.windows == (4096, None) * 21
    assert (found.attention_scale, facts(GEMMA_2_27B).attention_scale) == (1 / 16, 1 / 12)


def test_gemma_3_has_five_windowed_layers_to_one_full_and_two_rope_bases():
    found = facts(GEMMA_3_1B)
    assert found.windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert found.windowed[4:7] == [True, False, True] and found.window == 512
    assert found.rope["full_attention"] == {"rope_type": "default", "rope_theta": 1e6}
    assert found.window_rope_theta == 1e4
    assert found.qk_norm and found.post_norms and found.tied
    assert found.attention_softcap is None and found.logit_softcap is None


def test_the_larger_gemma_3_scales_the_rope_of_its_full_layers_alone():
    found = facts(GEMMA_3_4B)
    assert (found.heads, found.kv_heads, found.vocab_size) == (8, 4, 262208)
    assert found.rope["full_attention"]["rope_type"] == "linear"
    assert found.rope["sliding_attention"]["rope_type"] == "default"


def test_embedding_gemma_is_refused_because_it_attends_in_both_directions():
    with pytest.raises(UnsupportedError, match="both directions"):
        facts(GEMMA_3_1B, use_bidirectional_attention=True)


def test_qwen_2_has_biases_on_q_k_v_alone_and_qwen_3_norms_its_heads():
    two, three = facts(QWEN_25_7B), facts(QWEN3_8B)
    assert (two.qkv_bias, two.o_bias, two.qk_norm, two.head_dim) == (True, False, False, 128)
    assert (three.qkv_bias, three.qk_norm) == (False, True)
    assert facts(QWEN3_8B, attention_bias=True).o_bias


def test_qwen_s_window_counts_where_it_is_switched_on_and_from_the_layer_that_is_named():
    assert facts(QWEN_25_7B).windows == (None,) * 28
    found = facts(QWEN_25_7B, use_sliding_window=True, max_window_layers=26)
    assert found.windows == (None,) * 26 + (131072,) * 2


def test_layer_types_that_are_too_few_or_unknown_are_refused():
    with pytest.raises(ConfigError, match="names 2 layers, 'num_hidden_layers' says 42"):
        facts(GEMMA_2_9B, layer_types=["full_attention"] * 2)
    with pytest.raises(UnsupportedError, match="'chunked_attention'"):
        facts(GEMMA_2_9B, layer_types=["chunked_attention"] * 42)
