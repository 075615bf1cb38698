"""GGUF files of every family, run by llama.cpp itself against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hotloop_testkit.numerics import relative_error
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MinistralConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Tiny = Callable[..., Any]
    InBoth = Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]

pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")

GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
LOCAL_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}


@pytest.mark.parametrize(
    "config, changes",
    [
        pytest.param(MistralConfig, {"sliding_window": None}, id="mistral"),
        pytest.param(MistralConfig, {"sliding_window": None, "head_dim": 32}, id="nemo"),
        pytest.param(
            MinistralConfig,
            {"head_dim": 32, "sliding_window": 128, "layer_types": MIXED},
            id="ministral-within-its-window",
        ),
        pytest.param(GemmaConfig, {"head_dim": 32, "num_key_value_heads": 1}, id="gemma"),
        pytest.param(Gemma2Config, GEMMA, id="gemma2"),
        pytest.param(
            Gemma2Config,
            {
                **GEMMA,
                "layer_types": MIXED,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 5.0,
            },
            id="gemma2-tight-caps-and-other-windows",
        ),
        pytest.param(
            Gemma2Config,
            {**GEMMA, "num_hidden_layers": 46, "query_pre_attn_scalar": 16},
            id="gemma2-27b-scale",
        ),
        pytest.param(
            Gemma3TextConfig,
            {**GEMMA, "num_hidden_layers": 62, "query_pre_attn_scalar": 16},
            id="gemma3-27b-scale",
        ),
        pytest.param(Gemma3TextConfig, GEMMA, id="gemma3-windows-alone"),
        pytest.param(
            Gemma3TextConfig,
            {**GEMMA, "layer_types": MIXED, "rope_parameters": LOCAL_ROPE},
            id="gemma3",
        ),
        pytest.param(
            Gemma3TextConfig,
            {**GEMMA, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
            id="gemma3-capped-and-untied",
        ),
        pytest.param(Qwen2Config, {}, id="qwen2"),
        pytest.param(Qwen2Config, {"tie_word_embeddings": True}, id="qwen2-tied"),
        pytest.param(Qwen3Config, {"head_dim": 32}, id="qwen3"),
    ],
)
def test_f32_file_computes_what_transformers_computes(
    config: type[Any], changes: dict[str, Any], tiny: Tiny, in_both: InBoth
) -> None:
    model = tiny(config, **changes)
    truth, found, _ = in_both(model)
    # llama.cpp looks GELU up in a table of fp16 values, once a layer.
    limit = 2.5e-4 * model.config.num_hidden_layers if "gemma" in config.model_type else 1e-5
    assert relative_error(found, truth) < limit
