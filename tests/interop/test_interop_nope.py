"""GGUF files of layers that differ in their rotation (SmolLM3, EXAONE 4), run by llama.cpp itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hotloop.exporting import export
from hotloop_core.errors import UnsupportedError
from hotloop_testkit.numerics import relative_error
from transformers import (
    Exaone4Config,
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    Tiny = Callable[..., Any]
    InBoth = Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]

pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")

LONG = {"max_position_embeddings": 16384}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NO_WINDOW = {"sliding_window": None, "layer_types": ["full_attention"] * 4}
FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 64}
DEEP = {"num_hidden_layers": 64, "hidden_size": 32, "initializer_range": 0.2, "sliding_window": 7}
"""As deep as EXAONE 4.0 32B, by which llama.cpp knows it."""


@pytest.mark.parametrize(
    "config, changes",
    [
        pytest.param(SmolLM3Config, {}, id="smollm3"),
        pytest.param(SmolLM3Config, {"tie_word_embeddings": False}, id="smollm3-untied"),
        pytest.param(SmolLM3Config, {"head_dim": 32}, id="smollm3-wide-heads"),
        pytest.param(SmolLM3Config, {"rope_parameters": YARN}, id="smollm3-yarn"),
        pytest.param(SmolLM3Config, {"no_rope_layers": [1, 1, 1, 0, 0]}, id="smollm3-listed"),
        pytest.param(Exaone4Config, NO_WINDOW, id="exaone4-1.2b"),
        pytest.param(
            Exaone4Config,
            {**NO_WINDOW, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
            id="exaone4-1.2b-tied-scaled",
        ),
        pytest.param(Exaone4Config, DEEP, id="exaone4-32b"),
        pytest.param(
            Exaone4Config,
            {**DEEP, "rope_parameters": LLAMA3, "head_dim": 8},
            id="exaone4-32b-scaled",
        ),
    ],
)
def test_a_file_of_unlike_layers_computes_what_transformers_computes(
    config: type[Any],
    changes: dict[str, Any],
    tiny: Tiny,
    in_both: InBoth,
    assert_comes_back: Callable[..., None],
) -> None:
    model = tiny(config, **LONG | changes)
    truth, found, report = in_both(model)
    assert not report.notes
    assert relative_error(found, truth) < 1e-5
    assert_comes_back(report.files[0].path, model, truth, "sliding_window", "layer_types")


@pytest.mark.parametrize(
    "config, changes", [(SmolLM3Config, {}), (Exaone4Config, NO_WINDOW)], ids=["smollm3", "exaone4"]
)
def test_an_adapter_of_unlike_layers_gives_what_peft_computes(
    config: type[Any], changes: dict[str, Any], tiny: Tiny, adapted: Tiny, in_both: InBoth
) -> None:
    model = tiny(config, **LONG | changes)
    before, _, base = in_both(model)
    truth, found, _ = in_both(adapted(model), base=base.files[0].path)
    assert relative_error(before, truth) > 0.1
    assert relative_error(found, truth) < 1e-5


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (SmolLM3Config, {"no_rope_layer_interval": 3}, r"no_rope_layers=\[1, 1, 0, 1\]"),
        (SmolLM3Config, {"no_rope_layers": [0, 1, 1, 1]}, r"no_rope_layers=\[0, 1, 1, 1\]"),
        (SmolLM3Config, {"attention_bias": True}, "qkv_bias=True"),
        (SmolLM3Config, {"mlp_bias": True}, "mlp_bias=True"),
        (SmolLM3Config, {"rope_parameters": LLAMA3}, "'llama3'.*'smollm3'"),
        (SmolLM3Config, {"hidden_act": "gelu"}, "activation=gelu"),
        (Exaone4Config, {"sliding_window": 7}, r"windowed=\[True, True, True, False\]"),
        (Exaone4Config, {**DEEP, **FULL}, r"windowed=\[False"),
        (Exaone4Config, {**DEEP, "sliding_window_pattern": 2}, r"windowed=\[True, False"),
        (Exaone4Config, {**NO_WINDOW, "head_dim": 32}, "head_dim=32.*takes 16"),
        (LlamaConfig, {"hidden_act": "gelu"}, "activation=gelu.*'llama'"),
        (GemmaConfig, {"hidden_act": "silu"}, "activation=silu.*takes gelu_tanh"),
        (GemmaConfig, {"attention_bias": True}, "qkv_bias=True"),
        (Qwen2Config, {"head_dim": 32}, "head_dim=32.*takes 16"),
        (Qwen3Config, {"attention_bias": True}, "qkv_bias=True"),
        (Qwen3Config, {"rope_parameters": LLAMA3}, "'llama3'.*'qwen3'"),
    ],
)
def test_a_config_that_llama_cpp_cannot_hold_is_refused_by_name(
    config: type[Any],
    changes: dict[str, Any],
    message: str,
    tiny: Tiny,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = tiny(config, **LONG | changes)
    with pytest.raises(UnsupportedError, match=message):
        export(model, tokenizer, tmp_path, format="gguf", quant="f32")
    assert not list(tmp_path.iterdir())
