"""GGUF files of every family, run by llama.cpp itself against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hotloop.exporting import export
from hotloop.exporting.check import LlamaCpp
from hotloop_testkit.numerics import relative_error
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MinistralConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("llama_cpp", reason="needs the interop group: llama-cpp-python")

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZES = {
    "vocab_size": len(BYTES) + 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
PROMPT = list(range(3, 60))
LOCAL_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token for each byte, and one merge, without which it is no BPE to llama.cpp."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *BYTES, "th"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny(config: type[Any], **changes: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        config(**{**SIZES, **changes}), attn_implementation="eager"
    ).eval()
    centre = 0.0 if "gemma" in config.model_type else 1.0
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            mean = centre if name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.3)
    return model


def hf_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].float()


def llama_cpp_logits(path: Path) -> torch.Tensor:
    with LlamaCpp(path) as llama:
        return llama.logits(PROMPT)


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
    config: type[Any], changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny(config, **changes)
    report = export(model, tokenizer, tmp_path, format="gguf", quant="f32", name="tiny")
    truth, found = hf_logits(model), llama_cpp_logits(report.files[0].path)
    # llama.cpp looks GELU up in a table of fp16 values, once a layer.
    limit = 2.5e-4 * model.config.num_hidden_layers if "gemma" in config.model_type else 1e-5
    assert relative_error(found, truth) < limit
