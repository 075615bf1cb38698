"""GGUF files of fused projections, norms over all heads and partial rotation, run by llama.cpp itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hotloop_testkit.numerics import relative_error
from transformers import (
    Glm4Config,
    GlmConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    StableLmConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Tiny = Callable[..., Any]
    InBoth = Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]

pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "config, changes",
    [
        pytest.param(Phi3Config, {}, id="phi3"),
        pytest.param(
            Phi3Config,
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}
            | {"tie_word_embeddings": True},
            id="phi4-mini-within-its-original-length",
        ),
        pytest.param(
            Phi3Config,
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
            id="phi4-mini-beyond-its-original-length",
        ),
        pytest.param(GlmConfig, {"head_dim": 16}, id="glm"),
        pytest.param(GlmConfig, {"head_dim": 16, "tie_word_embeddings": True}, id="glm-tied"),
        pytest.param(Glm4Config, {"head_dim": 32}, id="glm4"),
        pytest.param(
            Glm4Config, {"head_dim": 32, "attention_bias": False}, id="glm4-without-biases"
        ),
        pytest.param(Olmo2Config, {}, id="olmo2"),
        pytest.param(Olmo3Config, {"sliding_window": 7}, id="olmo3"),
        pytest.param(
            Olmo3Config,
            {
                "sliding_window": 7,
                "rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL},
            },
            id="olmo3-scaled",
        ),
        pytest.param(StableLmConfig, {"num_key_value_heads": 4}, id="stablelm"),
        pytest.param(StableLmConfig, {"use_qkv_bias": True}, id="stablelm2"),
    ],
)
def test_f32_file_computes_what_transformers_computes(
    config: type[Any],
    changes: dict[str, Any],
    tiny: Tiny,
    in_both: InBoth,
    assert_comes_back: Callable[..., None],
) -> None:
    model = tiny(config, **changes)
    truth, found, report = in_both(model)
    assert relative_error(found, truth) < 1e-5
    assert_comes_back(report.files[0].path, model, truth)


@pytest.mark.parametrize("config", [Phi3Config, Glm4Config], ids=["phi3", "glm4"])
def test_each_fused_tensor_has_the_type_that_llama_cpps_quantiser_gives_it(
    config: type[Any], tiny: Tiny, assert_quantised_as_llama_cpp_does: Callable[[Any], None]
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9}
    assert_quantised_as_llama_cpp_does(tiny(config, **wide, head_dim=64, num_key_value_heads=1))


@pytest.mark.parametrize(
    "config", [Phi3Config, GlmConfig, Olmo2Config], ids=["phi3", "glm", "olmo2"]
)
def test_an_adapter_s_file_gives_what_peft_computes(
    config: type[Any], tiny: Tiny, adapted: Tiny, in_both: InBoth
) -> None:
    model = tiny(config, head_dim=16)
    before, _, base = in_both(model)
    truth, found, _ = in_both(adapted(model), base=base.files[0].path)
    assert relative_error(before, truth) > 0.1
    assert relative_error(found, truth) < 1e-5
