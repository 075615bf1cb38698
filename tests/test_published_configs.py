"""Config files as published, shrunk: read as transformers reads them, and trained as its own code trains them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hotloop.wiring import wire
from hotloop_core import discover, facts_of
from hotloop_core.errors import HotloopError
from hotloop_testkit.numerics import assert_no_worse_than
from hotloop_testkit.tiny import build, gradients
from transformers import CONFIG_MAPPING

Config = dict[str, Any]
WINDOW = 9
LENGTHS = (50, 1, 2, 43)
"""Of the packed rows: longer and shorter than the window, and than the length at which longrope changes its factors."""
ORIGINAL = 32
FACTORS = {
    "short_factor": [1 + 0.01 * i for i in range(48)],
    "long_factor": [1 + 0.5 * i for i in range(48)],
}

COMMON: Config = {"hidden_act": "silu", "attention_dropout": 0.0, "rms_norm_eps": 1e-5}
LLAMA3_ROPE: Config = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN: Config = {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn"}
GEMMA: Config = {
    "attention_dropout": 0.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
GEMMA3: Config = {
    **GEMMA,
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
}
QWEN2: Config = {
    **COMMON,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
PHI3: Config = {
    **COMMON,
    "model_type": "phi3",
    "embd_pdrop": 0.0,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
LONGROPE: Config = {**FACTORS, "type": "longrope"}
GRANITE: Config = {
    **COMMON,
    "model_type": "granite",
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
}
GLM4: Config = {
    **COMMON,
    "model_type": "glm4",
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
EXAONE4: Config = {
    **COMMON,
    "model_type": "exaone4",
    "rope_scaling": {**LLAMA3_ROPE, "factor": 16.0},
    "rope_theta": 1000000,
}
STABLELM: Config = {
    "model_type": "stablelm",
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
}
OLMO2: Config = {**COMMON, "model_type": "olmo2", "rms_norm_eps": 1e-6, "rope_theta": 500000}
FIVE_TO_ONE = [*["sliding_attention"] * 5, "full_attention"]
THREE_TO_ONE = [*["sliding_attention"] * 3, "full_attention"]


def sizes(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> Config:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size")
    return dict(zip(names, (layers, hidden, inner, heads, kv_heads, vocab), strict=True))


PUBLISHED: dict[str, Config] = {
    "Llama 1 7B": {
        **sizes(32, 4096, 11008, 32, 32, 32000),
        "model_type": "llama",
        "hidden_act": "silu",
    },
    "Llama 3.2 1B": {
        **COMMON,
        **sizes(16, 2048, 8192, 32, 8, 128256),
        "model_type": "llama",
        "head_dim": 64,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Falcon 3 7B": {
        **COMMON,
        **sizes(28, 3072, 23040, 12, 4, 131072),
        "model_type": "llama",
        "head_dim": 256,
        "rope_theta": 1000042,
    },
    "Mistral 7B v0.1": {
        **COMMON,
        **sizes(32, 4096, 14336, 32, 8, 32000),
        "model_type": "mistral",
        "sliding_window": 4096,
    },
    "Mistral Nemo": {
        **COMMON,
        **sizes(40, 5120, 14336, 32, 8, 131072),
        "model_type": "mistral",
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Ministral 8B": {
        **COMMON,
        **sizes(36, 4096, 12288, 32, 8, 131072),
        "model_type": "ministral",
        "head_dim": 128,
        "layer_types": ["full_attention", *["sliding_attention"] * 3] * 9,
        "rope_theta": 100000000.0,
        "sliding_window": 32768,
    },
    "Gemma 2B": {
        **GEMMA,
        **sizes(18, 2048, 16384, 8, 1, 256000),
        "model_type": "gemma",
        "hidden_act": "gelu",
    },
    "Gemma 2 2B": {
        **GEMMA,
        **sizes(26, 2304, 9216, 8, 4, 256000),
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "Gemma 3 270M": {
        **GEMMA3,
        **sizes(18, 640, 2048, 4, 1, 262144),
        "_sliding_window_pattern": 6,
        "layer_types": FIVE_TO_ONE * 3,
        "use_bidirectional_attention": False,
    },
    "Gemma 3 1B": {
        **GEMMA3,
        **sizes(26, 1152, 6912, 4, 1, 262144),
        "cache_implementation": "hybrid",
        "sliding_window_pattern": 6,
    },
    "Qwen 1.5 0.5B": {
        **QWEN2,
        **sizes(24, 1024, 2816, 16, 16, 151936),
        "max_window_layers": 21,
        "tie_word_embeddings": True,
    },
    "Qwen 2.5 0.5B": {
        **QWEN2,
        **sizes(24, 896, 4864, 14, 2, 151936),
        "max_window_layers": 24,
        "tie_word_embeddings": True,
    },
    "Qwen 2.5 7B, window in half": {
        **QWEN2,
        **sizes(28, 3584, 18944, 28, 4, 152064),
        "max_window_layers": 14,
        "use_sliding_window": True,
    },
    "Qwen 2.5 7B, yarn": {
        **QWEN2,
        **sizes(28, 3584, 18944, 28, 4, 152064),
        "max_window_layers": 28,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
    },
    "Qwen 3 0.6B": {
        **COMMON,
        **sizes(28, 1024, 3072, 16, 8, 151936),
        "model_type": "qwen3",
        "head_dim": 128,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Phi-3 mini 4k": {**PHI3, **sizes(32, 3072, 8192, 32, 32, 32064)},
    "Phi-3 mini, longrope and window": {
        **PHI3,
        **sizes(32, 3072, 8192, 32, 32, 32064),
        "max_position_embeddings": 131072,
        "rope_scaling": LONGROPE,
    },
    "Phi-4-mini": {
        **PHI3,
        **sizes(32, 3072, 8192, 24, 8, 200064),
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "SmolLM3 3B": {
        **COMMON,
        **sizes(36, 2048, 11008, 16, 4, 128256),
        "model_type": "smollm3",
        "layer_types": ["full_attention"] * 36,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Granite 3.3 2B": {**GRANITE, **sizes(40, 2048, 8192, 32, 8, 49159)},
    "OLMo 2 7B": {**OLMO2, **sizes(32, 4096, 11008, 32, 32, 100352)},
    "OLMo 3 7B": {
        **OLMO2,
        **sizes(32, 4096, 11008, 32, 32, 100278),
        "model_type": "olmo3",
        "layer_types": THREE_TO_ONE * 8,
        "rope_scaling": YARN,
        "sliding_window": 4096,
    },
    "GLM-4 32B 0414": {**GLM4, **sizes(61, 6144, 23040, 48, 2, 151552), "attention_bias": False},
    "GLM-4 9B 0414": {**GLM4, **sizes(40, 4096, 13696, 32, 2, 151552), "attention_bias": True},
    "EXAONE 4 1.2B": {
        **EXAONE4,
        **sizes(30, 2048, 4096, 32, 8, 102400),
        "head_dim": 64,
        "layer_types": ["full_attention"] * 30,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "tie_word_embeddings": True,
    },
    "EXAONE 4 32B": {
        **EXAONE4,
        **sizes(64, 5120, 27392, 40, 8, 102400),
        "head_dim": 128,
        "layer_types": THREE_TO_ONE * 16,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
    },
    "StableLM 2 1.6B": {
        **STABLELM,
        **sizes(24, 2048, 5632, 32, 32, 100352),
        "use_qkv_bias": True,
    },
}


def shrunk(published: Config) -> Config:
    """The same kinds of layers, few and narrow; heads stay what they are to the hidden size."""
    heads, groups = published["num_attention_heads"], published["num_key_value_heads"]
    size = published.get("head_dim", published["hidden_size"] // heads)
    own = size * heads != published["hidden_size"]
    small = {
        **published,
        **sizes(4, 64, 96, 4, 4 if groups == heads else 1 if groups == 1 else 2, 320),
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if "head_dim" in published:
        small["head_dim"] = 32 if own else 16
    if FIVE_TO_ONE[0] in published.get("layer_types", ()) or "sliding_window_pattern" in published:
        small["num_hidden_layers"] = 6
    for key in ("layer_types", "no_rope_layers"):
        if key in published:
            small[key] = published[key][: small["num_hidden_layers"]]
    if "max_window_layers" in published:
        part = published["max_window_layers"] / published["num_hidden_layers"]
        small["max_window_layers"] = round(part * 4)
    if published.get("sliding_window") is not None:
        small["sliding_window"] = WINDOW
    rope = published.get("rope_scaling")
    if rope is not None:
        pairs = int(16 * published.get("partial_rotary_factor", 1)) // 2
        shorter = {key: rope[key][:pairs] for key in FACTORS if key in rope}
        original = {key: ORIGINAL for key in rope if key.startswith("original")}
        small["rope_scaling"] = {**rope, **shorter, **original}
    if "original_max_position_embeddings" in published:
        small["original_max_position_embeddings"] = ORIGINAL
    return small


def config_of(values: Config) -> Any:
    return CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_transformers_reads_it(name):
    published = PUBLISHED[name]
    family = discover().match(published)
    found, expected = (
        replace(facts_of(family, values), config={}, rope={})
        for values in (published, config_of(published).to_dict())
    )
    assert found == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_of_a_published_config_has_the_gradients_of_its_own_code(name):
    config = config_of(shrunk(PUBLISHED[name]))
    config._attn_implementation = "eager"  # SDPA leaves out soft caps
    if config.model_type == "gemma":
        config.hidden_act = (
            "gelu_pytorch_tanh"  # what "gelu" means there; older transformers took it at its word
        )
    model = build(config)
    ids = torch.randint(3, 320, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, -100),
        "use_cache": False,
    }
    dense = {"input_ids": ids[:, :50], "labels": ids[:, :50], "use_cache": False}
    own = [gradients(model, batch) for batch in (packed, dense)]
    silent = [name for name, gradient in own[0].items() if not gradient.any()]
    wire(model)
    for batch, expected in zip((packed, dense), own, strict=True):
        found = gradients(model, batch)
        assert found.keys() == expected.keys() and not silent
        assert_no_worse_than(found, expected, expected, floor=3e-4)


REFUSED: dict[str, tuple[Config, str]] = {
    "Granite 3.1, attention dropout 0.1": (
        {**PUBLISHED["Granite 3.3 2B"], "attention_dropout": 0.1},
        "allow_eager={'attention-dropout'}",
    ),
    "StableLM 2 12B": (
        {**PUBLISHED["StableLM 2 1.6B"], "use_parallel_residual": True, "qk_layernorm": True},
        "beside each other",
    ),
    "StableLM with norms over each head": (
        {**PUBLISHED["StableLM 2 1.6B"], "qk_layernorm": True},
        "LayerNorm of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_that_the_blocks_do_not_run_is_refused_with_the_reason(name):
    published, reason = REFUSED[name]
    model = build(config_of(shrunk(published)))
    ids = torch.arange(3, 43)[None]
    with pytest.raises(HotloopError, match=reason):
        wire(model)
        model(input_ids=ids, labels=ids)
